"""Clips: which frames of a video make a training sample or a test view, and which samples make a
batch. Needs video.py.

Dense sampling takes frames a fixed stride apart from one place of the video; uniform (TSN, arXiv
1608.00859) takes one frame from each of T equal parts. Everything random in a sample is a pure
function of (seed, epoch, row, repeat): a resumed run draws what an uninterrupted one does, and the
number of workers changes nothing; nor does the number of ranks, if batch size x ranks stays.

Shapes: V views per video, T frames, H W pixels.
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from tgm.video import TIMEOUT, VideoError, VideoReader


def clip_times(start, end, fps, frames, stride, where):
    """Dense: the times of `frames` frames, `stride` video frames apart, inside [start, end] ->
    float64 [frames], seconds.

    where: the place of the clip between the earliest one, 0, and the latest, 1. If the video is
    shorter than a clip, its last frame repeats."""
    window = frames * stride / fps
    first = start + where * max(0.0, end - start - window)
    return np.minimum(first + np.arange(frames) * stride / fps, max(start, end - 0.5 / fps))


def uniform_times(start, end, fps, frames, where):
    """Uniform: one time in each of `frames` equal parts of [start, end] -> float64 [frames],
    seconds. where: the place in a part, from 0 to 1; a number, or one per part."""
    return np.minimum(
        start + (np.arange(frames) + where) * (end - start) / frames, max(start, end - 0.5 / fps)
    )


def view_times(start, end, fps, frames, stride, clips, sampling):
    """The times of each of `clips` test clips of [start, end] -> float64 [clips, frames], seconds.

    The clips are VideoMAE's. Dense (its kinetics.py, mode "test"): of the L frames that lie
    `stride` apart, clip k of K (k = 0 to K - 1) takes `frames` in a row, the first of which is
    number floor(k * (L - frames) / (K - 1)). So clip 0 begins with the video, and the last clip
    ends with it. If L is too small, the last frame repeats. Uniform (its ssv2.py, mode "test"):
    clip k takes the frame at k / K of each of `frames` equal parts. A single clip, for which the
    dense formula divides by zero, is the middle one, and uniform takes the middle of each part."""
    if sampling == "uniform":
        places = np.arange(clips) / clips if clips > 1 else [0.5]
        return np.stack([uniform_times(start, end, fps, frames, place) for place in places])
    if clips == 1:
        return clip_times(start, end, fps, frames, stride, 0.5)[None]
    # 1e-3 is for rounding: 30 frames at 30 a second are 1 s
    kept = max(1, math.ceil((end - start) * fps / stride - 1e-3))
    room = max(0, kept - frames)
    firsts = np.arange(clips) * room // (clips - 1)
    numbers = np.minimum(firsts[:, None] + np.arange(frames), kept - 1)  # [clips, frames]
    return start + numbers * stride / fps


def center_crop(frames, size):
    """The middle square of frames [T, H, W, 3] whose short side is `size` -> (frames [T, size,
    size, 3], its box: x0, y0, x1, y1 as fractions of the frame)."""
    height, width = frames.shape[1:3]
    top = (height - size) // 2
    left = (width - size) // 2
    box = (left / width, top / height, (left + size) / width, (top + size) / height)
    return frames[:, top : top + size, left : left + size], box


def side_crops(frames, size, count):
    """`count` squares of frames [T, H, W, 3] whose short side is `size` -> [count, T, size, size,
    3]. They lie evenly along the long side, from one end to the other; a single one (count 1) is
    the middle."""
    if count == 1:
        return center_crop(frames, size)[0][None]
    height, width = frames.shape[1:3]
    places = np.rint(np.linspace(0, max(height, width) - size, count)).astype(int)
    if height > width:
        crops = [frames[:, place : place + size] for place in places]
    else:
        crops = [frames[:, :, place : place + size] for place in places]
    return np.stack(crops)


# Where a crop may lie: (down, right), in quarters of the free space, which is the frame's height or
# width minus the crop's.
PLACES = (
    (0, 0), (0, 4), (4, 0), (4, 4), (2, 2),  # corners, middle
    (2, 0), (2, 4), (4, 2), (0, 2),  # middles of the sides
    (1, 1), (1, 3), (3, 1), (3, 3),  # half-way from the middle to the corners
)  # fmt: skip


def multi_scale_crop(height, width):
    """VideoMAE's GroupMultiScaleCrop: sides from {1, .875, .75, .66} of the short side, nearly
    square, at one of 13 places. Returns top, left, height, width in pixels."""
    scales = (1, 0.875, 0.75, 0.66)
    pairs = []  # nearly square: the same scale, or neighbours
    for i in range(len(scales)):
        for j in range(len(scales)):
            if abs(i - j) <= 1:
                pairs.append((scales[i], scales[j]))
    scale_h, scale_w = pairs[torch.randint(len(pairs), ()).item()]
    h = max(1, int(min(height, width) * scale_h))
    w = max(1, int(min(height, width) * scale_w))
    down, right = PLACES[torch.randint(len(PLACES), ()).item()]
    return down * ((height - h) // 4), right * ((width - w) // 4), h, w


def resized_crop(frames, box, size):
    """Cuts a box out of frames and scales it to a square: uint8 [T, 3, H, W] -> [T, 3, size, size].

    box: top, left, height, width in pixels. The result is that of torchvision's resized_crop on a
    CPU (with torch 2.8 a pixel may differ by 1 of 255). Importing torchvision would cost every
    process of a stage more than a second."""
    top, left, height, width = box
    cut = frames[..., top : top + height, left : left + width]
    return F.interpolate(cut, (size, size), mode="bilinear", antialias=True)


class TrainingClips(Dataset):
    """Training samples by (epoch, row). A sample is the dict that `self.sample(epoch, row, rng)` of
    a subclass returns, and "failed": -1, or the row if its video could not be read.

    A video that cannot be read is replaced by another, drawn from `rows`; VideoError if none of ten
    can be read. Each process prints the reasons of its first SAID failures; the run counts all."""

    SAID = 3

    def __init__(self, videos, rows, seed):
        self.videos = videos
        self.rows = rows
        self.seed = seed
        self.replaced = 0  # samples of this process whose video another replaced

    def __getitem__(self, key):
        epoch, row = key
        reason = None
        for attempt in range(10):
            # whenever this sample is read, the same seeds, so the same videos
            rng = np.random.default_rng([self.seed, epoch, row, attempt])
            pick = row if attempt == 0 else int(rng.choice(self.rows))
            try:
                sample = self.sample(epoch, pick, rng)
            except VideoError as error:
                reason = reason or str(error)
                continue
            if reason:
                self.say(reason)
            return sample | {"failed": row if reason else -1}
        raise VideoError(
            f"{reason}; and nine videos drawn in its place cannot be read either: "
            "are the paths right (--root)?"
        )

    def say(self, reason):
        self.replaced += 1
        if self.replaced <= self.SAID:
            more = "; further ones are only counted" if self.replaced == self.SAID else ""
            # in one call: print writes the line and its end apart, and other processes write, too
            sys.stderr.write(f"skipped: {reason}{more}\n")


def seed_from(seed, *numbers):
    """A seed for torch, an int of 63 bits, that follows from the seed of the run and such numbers
    as the epoch, the row and the repeat of a sample."""
    # + 10: TrainingClips takes the seeds whose last number is less, for its attempts
    sequence = np.random.SeedSequence([seed, *numbers[:-1], 10 + numbers[-1]])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class EpochBatches:
    """Batch sampler of one rank: lists of (epoch, row). The order is a function of (seed, epoch)
    alone. The ranks' batches one after another are the global batch: it is the same for any number
    of ranks if batch x ranks is. `start` batches of the epoch are left out, to resume."""

    def __init__(self, rows, batch, batches, seed, rank, ranks):
        self.rows = rows
        self.batch = batch
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0
        self.start = 0

    def __len__(self):
        return self.batches - self.start

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        for index in range(self.start, self.batches):
            first = (index * self.ranks + self.rank) * self.batch
            yield [(self.epoch, int(row)) for row in order[first : first + self.batch]]


class Views(Dataset):
    """Test views: item i is (row, uint8 [V, 3, T, H, W], None) of videos[i], or (row, None, why it
    failed).

    V = clips x crops: clips at `view_times`, crops along the long side. A video's views stay
    together, so nothing has to be merged by name. Loaders want a collate_fn that makes lists, such
    as tgm.loading.share."""

    def __init__(
        self,
        videos,
        frames,
        image_size,
        stride,
        clips=1,
        crops=1,
        sampling="dense",
        timeout=TIMEOUT,
    ):
        self.videos = videos
        self.frames = frames
        self.image_size = image_size
        self.stride = stride
        self.timeout = timeout
        self.clips = clips
        self.crops = crops
        self.sampling = sampling

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        video = self.videos[index]
        try:
            with VideoReader(video.path, timeout=self.timeout) as reader:
                start, end = reader.span(video)
                times = view_times(
                    start, end, reader.fps, self.frames, self.stride, self.clips, self.sampling
                )
                frames = reader.read(times.ravel(), self.image_size)  # [clips*T, H, W, 3]
        except VideoError as error:
            return video.row, None, str(error)
        views = torch.from_numpy(side_crops(frames, self.image_size, self.crops))
        views = views.unflatten(1, (self.clips, self.frames))  # [crops, clips, T, S, S, 3]
        views = views.transpose(0, 1).flatten(0, 1).permute(0, 4, 1, 2, 3)  # [V, 3, T, S, S]
        return video.row, views.contiguous(), None
