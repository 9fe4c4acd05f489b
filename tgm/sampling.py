"""Clips: which frames of a video make a training sample or a test view, and which samples make a
batch. Needs video.py.

Dense sampling takes frames a fixed stride apart from one place of the video; uniform (TSN, arXiv
1608.00859) takes one frame from each of T equal parts. Everything random in a sample is a pure
function of (seed, epoch, row, repeat), so that neither the number of workers nor that of ranks
changes a batch, and a resumed run repeats an uninterrupted one.

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

    where in [0, 1]: the place of the clip in the room it has. Where the video is shorter, its last
    moment repeats."""
    window = frames * stride / fps
    first = start + where * max(0.0, end - start - window)
    return np.minimum(first + np.arange(frames) * stride / fps, max(start, end - 0.5 / fps))


def uniform_times(start, end, fps, frames, where):
    """Uniform: one time in each of `frames` equal parts of [start, end], at `where` in [0, 1] of
    the part (a number, or one a part) -> float64 [frames], seconds."""
    return np.minimum(
        start + (np.arange(frames) + where) * (end - start) / frames, max(start, end - 0.5 / fps)
    )


def view_times(start, end, fps, frames, stride, clips, sampling):
    """The times of each of `clips` test clips of [start, end] -> float64 [clips, frames], seconds.

    They are VideoMAE's. Dense (its kinetics.py, mode "test"): of every stride-th frame, `frames` in
    a row; the clips begin evenly from the first frame to the last possible one, number k of K at
    frame stride * floor(k * (L - frames) / (K - 1)), L such frames in all. A video that has fewer
    repeats the last of them. Uniform (its ssv2.py, mode "test"): clip k takes the frame at k / K of
    each of `frames` equal parts. One clip, for which its dense formula divides by zero, is the
    middle one: as dense as the video allows, or the middle of each part.
    """
    if sampling == "uniform":
        places = np.arange(clips) / clips if clips > 1 else [0.5]
        return np.stack([uniform_times(start, end, fps, frames, place) for place in places])
    if clips == 1:
        return clip_times(start, end, fps, frames, stride, 0.5)[None]
    # less rounding: 30 frames at 30 a second are 1 s
    kept = max(1, math.ceil((end - start) * fps / stride - 1e-3))
    room = max(0, kept - frames)
    firsts = np.arange(clips) * room // (clips - 1)
    numbers = np.minimum(firsts[:, None] + np.arange(frames), kept - 1)  # [clips, frames]
    return start + numbers * stride / fps


def center_crop(frames, size):
    """The middle square of frames [T, H, W, 3] whose short side is `size` -> (frames [T, size,
    size, 3], its box: x0, y0, x1, y1 as fractions of the frame)."""
    height, width = frames.shape[1:3]
    top, left = (height - size) // 2, (width - size) // 2
    box = (left / width, top / height, (left + size) / width, (top + size) / height)
    return frames[:, top : top + size, left : left + size], box


def side_crops(frames, size, count):
    """`count` squares of frames [T, H, W, 3] whose short side is `size`, evenly along the long side
    from one end to the other, or the middle one -> [count, T, size, size, 3]."""
    if count == 1:
        return center_crop(frames, size)[0][None]
    height, width = frames.shape[1:3]
    places = np.rint(np.linspace(0, max(height, width) - size, count)).astype(int)
    return np.stack(
        [
            frames[:, place : place + size]
            if height > width
            else frames[:, :, place : place + size]
            for place in places
        ]
    )


# Where a crop may lie, in quarters of the room beside it (down, right): corners, middle, middles of
# the sides, quarters.
PLACES = (
    (0, 0), (0, 4), (4, 0), (4, 4), (2, 2),
    (2, 0), (2, 4), (4, 2), (0, 2),
    (1, 1), (1, 3), (3, 1), (3, 3),
)  # fmt: skip


def multi_scale_crop(height, width):
    """VideoMAE's GroupMultiScaleCrop: sides from {1, .875, .75, .66} of the short side, nearly
    square, at one of 13 places. Returns top, left, height, width in pixels."""
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    a, b = pairs[torch.randint(len(pairs), ()).item()]
    h = int(min(height, width) * a)
    w = int(min(height, width) * b)
    down, right = PLACES[torch.randint(len(PLACES), ()).item()]
    return down * ((height - h) // 4), right * ((width - w) // 4), h, w


def resized_crop(frames, box, size):
    """Cuts a box out of frames and scales it to a square: uint8 [T, 3, H, W] -> [T, 3, size, size].

    box: top, left, height, width in pixels. These are the pixels of torchvision's resized_crop on a
    CPU, whose import would cost every process of a stage more than a second."""
    top, left, height, width = box
    cut = frames[..., top : top + height, left : left + width]
    return F.interpolate(cut, (size, size), mode="bilinear", antialias=True)


class TrainingClips(Dataset):
    """Training samples by (epoch, row): what `self.sample(epoch, row, rng)` of a subclass returns,
    a dict, with "failed": the row if its video could not be read and another, drawn from `rows`,
    took its place; else -1. VideoError if none of ten can be read. Each process says the reasons of
    its first SAID failures; the run counts them all."""

    SAID = 3

    def __init__(self, videos, rows, seed):
        self.videos, self.rows, self.seed = videos, rows, seed
        self.replaced = 0  # samples of this process whose video another replaced

    def __getitem__(self, key):
        epoch, row = key
        reason = None
        for attempt in range(10):
            # a broken video gives its place to another, the same one whenever this is asked
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
            # at once: print's line and its end may come apart between processes
            sys.stderr.write(f"skipped: {reason}{more}\n")


def repeat_seed(seed, epoch, row, repeat):
    """The seed for torch of one repeat of a sample: an int of 63 bits."""
    return int(
        np.random.SeedSequence([seed, epoch, row, 10 + repeat]).generate_state(1, np.uint64)[0] >> 1
    )


class EpochBatches:
    """Batch sampler of one rank: lists of (epoch, row). The order is a function of (seed, epoch)
    alone, and the ranks' batches side by side are the global batch, whatever the number of ranks.
    `start` batches of the epoch are left out (resuming)."""

    def __init__(self, rows, batch, batches, seed, rank, ranks):
        self.rows = rows
        self.batch = batch
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch, self.start = 0, 0

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
        self.clips, self.crops, self.sampling = clips, crops, sampling

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
