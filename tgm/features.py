"""Frozen features on disk: what an encoder makes of each video, extracted once, one row per video.
Needs model.py; of this folder arrays.py, checkpoints.py, loading.py, manifest.py, offline.py,
run.py, sampling.py and video.py.

    encoder = load_encoder("runs/text/checkpoint.pt")
    plan = plan_extractions(encoder, {"train": videos, "test": others}, clips=2)
    arrays = extract_all(encoder, plan, folder)
    arrays["train"]["features"]                                            float32 [N, D], mapped

A row is NaN until it is filled, and stays NaN if its video cannot be read or its features are not
finite. The next run reads only the videos whose rows are NaN. The .json next to each array holds
the encoder, the settings and the videos that it was made of; if one of them changes, the array is
made again. The precision, half on a GPU and float32 on a CPU, is not among them: features of a GPU
are used on a CPU, too.

Shapes: N videos, B videos per batch, V views per video, T frames, (t, h, w) the encoder's token
grid, M tokens of each view after pooling, D width; A random views per video (`augment`).
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

import model as models
from tgm import checkpoints
from tgm.arrays import create_array, file_hash, open_rows, read_about
from tgm.loading import checked_batches, make_loader
from tgm.manifest import Video, Videos, file_sizes, manifest_hash
from tgm.offline import precision_on
from tgm.run import (
    RunError,
    StopSignal,
    part_of_rank,
    sum_over_ranks,
    wait_for_ranks,
)
from tgm.sampling import (
    Views,
    clip_times,
    multi_scale_crop,
    resized_crop,
    seed_from,
    uniform_times,
)
from tgm.video import TIMEOUT, VideoError, VideoReader


class FrozenEncoder(NamedTuple):
    """A VideoMAE in evaluation mode, and the settings that its features depend on."""

    model: models.VideoMAE
    notes: str  # which parts of it were in the checkpoint, for the user
    identity: str  # changes with the weights
    size: str
    frames: int
    stride: int
    image_size: int
    device: torch.device


def load_encoder(
    checkpoint: str,
    *,
    size: str | None = None,
    frames: int | None = None,
    stride: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> FrozenEncoder:
    """Loads the encoder of a checkpoint, a file or a folder; "none": an untrained one, of `seed`.

    A setting that is None is taken from the checkpoint if pretrain.py or finetune.py wrote it (a
    Hugging Face folder has all but the stride, too), otherwise from the model's defaults. It calls
    torch.manual_seed(seed). RunError if there is no such file, if it does not fit, or if its
    weights are not finite.

    A file that is replaced meanwhile is noticed by comparing `identity`, which is taken first, with
    `weights_identity` afterwards."""
    path = Path(checkpoint)
    untrained = checkpoint == "none"
    if not untrained:
        try:
            checkpoints.expect_weights(checkpoints.weights_file(path))
        except ValueError as error:
            raise RunError(f"--checkpoint {error}; none stands for an untrained encoder") from None
    identity = weights_identity(checkpoint, seed)
    saved = checkpoints.saved_args(path)
    size = size or saved.get("size", "base")
    frames = frames or saved.get("frames")
    image_size = image_size or saved.get("image_size")
    torch.manual_seed(seed)
    notes = []
    try:
        # text_dim: only so that a checkpoint's contrastive head fits
        model = models.VideoMAE(size, frames, image_size, text_dim=saved.get("text_dim", 512))
        if not untrained:
            notes = checkpoints.load_pretrained(model, path)
    except ValueError as error:
        raise RunError(str(error)) from None
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise RunError(
            f"--checkpoint {path}: its weights are not finite, and so would be its features: the "
            "training diverged; take an earlier checkpoint, or train with a lower learning rate"
        )
    return FrozenEncoder(
        model=model.eval().to(device),
        notes=checkpoints.summary_of(notes),
        identity=identity,
        size=size,
        frames=model.config["frames"],
        stride=stride or saved.get("stride", model.config["stride"]),
        image_size=model.config["image_size"],
        device=torch.device(device),
    )


def weights_identity(checkpoint: str, seed: int) -> str:
    """A text that changes with the weights that `load_encoder` loads."""
    if checkpoint == "none":
        return f"none {seed}"
    return file_hash(checkpoints.weights_file(Path(checkpoint)))


# ---- what is extracted ---------------------------------------------------------------------------


class RandomViews(Dataset):
    """Views for training a probe: `augment` of each video, at random times and crops. A view is a
    pure function of (seed, row, number of the view).

    Items are those of tgm.sampling.Views: (row, uint8 [A, 3, T, size, size], None), or (row, None,
    the reason) for a video that cannot be read. flip: mirrors half of the views."""

    def __init__(
        self,
        videos: Sequence[Video],
        *,
        augment: int,
        frames: int,
        image_size: int,
        stride: int,
        sampling: str = "dense",
        flip: bool = True,
        seed: int = 0,
        timeout: float = TIMEOUT,
    ):
        self.videos = videos
        self.augment = augment
        self.frames = frames
        self.image_size = image_size
        self.stride = stride
        self.sampling = sampling
        self.flip = flip
        self.seed = seed
        self.timeout = timeout

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str | None]:
        video = self.videos[index]
        # the epoch is always 0: features are extracted once
        seeds = [seed_from(self.seed, 0, video.row, view) for view in range(self.augment)]
        try:
            clips = self.read_clips(video, seeds)
        except VideoError as error:
            return video.row, None, str(error)
        views = [self.crop(clip, seed) for clip, seed in zip(clips, seeds, strict=True)]
        return video.row, torch.stack(views), None

    def read_clips(self, video: Video, seeds: list[int]) -> tuple[torch.Tensor, ...]:
        """One random clip per seed, each uint8 [T, 3, H, W]."""
        with VideoReader(video.path, timeout=self.timeout) as reader:
            start, end = reader.span(video)
            times = [self.random_times(start, end, reader.fps, seed) for seed in seeds]
            frames = reader.read(np.concatenate(times))  # [A*T, H, W, 3]
        return torch.from_numpy(frames).permute(0, 3, 1, 2).split(self.frames)

    def random_times(self, start: float, end: float, fps: float, seed: int) -> np.ndarray:
        # uniform needs a number from 0 to 1 for each frame, dense one for where the clip begins
        places = np.random.default_rng(seed).random(self.frames)
        if self.sampling == "uniform":
            return uniform_times(start, end, fps, self.frames, places)
        return clip_times(start, end, fps, self.frames, self.stride, places[0])

    def crop(self, clip: torch.Tensor, seed: int) -> torch.Tensor:
        """A random crop of a clip [T, 3, H, W] -> [3, T, size, size]."""
        with torch.random.fork_rng(devices=[]):  # multi_scale_crop draws from the global generator
            torch.default_generator.manual_seed(seed)
            box = multi_scale_crop(*clip.shape[-2:])
            mirror = self.flip and bool(torch.rand(()) < 0.5)
        clip = resized_crop(clip, box, self.image_size)
        if mirror:
            clip = clip.flip(-1)
        return clip.transpose(0, 1)


class Extraction(NamedTuple):
    """One pass over the videos of a split, and the arrays that it fills."""

    split: str  # how the names of its files begin
    videos: Videos
    views: Dataset  # of these videos: Views or RandomViews
    settings: dict  # of the views, for the .json next to the arrays
    row_shapes: dict[str, tuple[int, ...]]  # {kind of array: shape of a video's row}
    token_grid: Sequence[int]  # to which the tokens of a view are average-pooled


def plan_extractions(
    encoder: FrozenEncoder,
    videos: dict[str, Videos],
    *,
    sampling: str = "dense",
    clips: int = 2,
    crops: int = 1,
    augment: int = 0,
    flip: bool = True,
    seed: int = 0,
    tokens: bool = False,
    token_grid: Sequence[int] | None = None,
    timeout: float = TIMEOUT,
) -> list[Extraction]:
    """The passes over {"train": videos, "test": videos}, in the order in which they are made.

    clips, crops: each video has clips x crops clean views
    augment: if more than 0, the training set's features are of so many random views instead
    tokens: keeps tokens, too, always those of clean views
    token_grid: None for all t time steps, and the h x w positions pooled to 4 x 4 at most;
        RunError if the encoder has fewer tokens than that

    There are two passes. With augment and tokens there are three: features of random views of the
    training set, tokens of its clean views, and the test set."""
    time, height, width = encoder.model.grid
    # all time steps, which carry the motion; at most 4 x 4 positions, to save disk space
    token_grid = list(token_grid or (time, min(height, 4), min(width, 4)))
    if any(kept > full for kept, full in zip(token_grid, encoder.model.grid, strict=True)):
        raise RunError(
            f"--token-grid {token_grid}: expected numbers from 1 to {list(encoder.model.grid)}, "
            "the encoder's grid"
        )
    clip_settings = {
        "frames": encoder.frames,
        "stride": encoder.stride,
        "image_size": encoder.image_size,
        "sampling": sampling,
    }
    clean_settings = clip_settings | {"clips": clips, "crops": crops}
    channels = encoder.model.config["width"]
    row_shapes = {"features": (channels,)}
    if tokens:
        row_shapes["tokens"] = (clips * crops * math.prod(token_grid), channels)
    plan = []
    for split in ("train", "test"):
        views = Views(videos[split], **clean_settings, timeout=timeout)
        plan.append(Extraction(split, videos[split], views, clean_settings, row_shapes, token_grid))
    if augment == 0:
        return plan

    train, test = plan
    random_settings = clip_settings | {"augment": augment, "flip": flip, "seed": seed}
    augmented = train._replace(
        views=RandomViews(videos["train"], **random_settings, timeout=timeout),
        settings=random_settings,
        row_shapes={"features": (augment, channels)},
    )
    if not tokens:
        return [augmented, test]
    return [augmented, train._replace(row_shapes={"tokens": row_shapes["tokens"]}), test]


# ---- extraction ----------------------------------------------------------------------------------


def extract_all(
    encoder: FrozenEncoder,
    plan: list[Extraction],
    folder: Path,
    *,
    batch_size: int = 32,
    workers: int = 0,
    max_steps: int | None = None,
    again: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, dict[str, np.ndarray]] | None:
    """Carries out a plan -> {split: {kind: array, mapped}}; None if `max_steps` batches of a pass
    did not suffice.

    batch_size: videos per batch and rank. again: makes all features again. A signal ends the run
    after a batch (torchrun sends it to all ranks); once all is extracted, at once."""
    stop = StopSignal(ranks, then="ending after this batch")
    how = "run it again without --resume none" if again else "run it again"
    found = {}
    for extraction in plan:
        arrays = open_features(encoder, extraction, folder, again, rank)
        todo = np.flatnonzero(~filled_rows(arrays)).tolist()
        wait_for_ranks()  # all ranks must make the same list before any of them fills rows
        mine = part_of_rank(todo, rank, ranks)
        left = len(mine)
        views = Subset(extraction.views, mine)
        loader = make_loader(views, batch_size, workers if mine else 0)
        title = f"{extraction.split} {' '.join(arrays)}"
        quiet = rank > 0 or not mine
        batches = tqdm(
            checked_batches(loader), title, total=len(loader), unit="batch", disable=quiet
        )
        for number, items in enumerate(batches, 1):
            encode_batch(encoder, items, arrays, extraction)
            left -= len(items)
            # stop.name is a signal of this rank alone. `requested` waits for all ranks, so it has
            # to come after the loop: ranks have different numbers of batches.
            if number == max_steps or stop.name:  # max_steps None: no limit
                break
        for array in arrays.values():
            array.flush()
        left = sum_over_ranks(left)  # every rank must get here
        if stop.requested():
            if rank == 0:
                print(f"{stop.name}: stopped; {how} to go on")
            stop.end()
        if left > 0:
            if rank == 0:
                count = len(extraction.videos)
                split = extraction.split
                print(f"{count - left} of {count} {split} videos are done; {how} to go on")
            return None
        found[extraction.split] = found.get(extraction.split, {}) | arrays
    stop.end_on_signal(f"the features are kept, {how}")
    return found


def open_features(
    encoder: FrozenEncoder, extraction: Extraction, folder: Path, again: bool, rank: int
) -> dict[str, np.ndarray]:
    """The arrays FOLDER/SPLIT.KIND.npy of one pass, mapped and writable: {kind: [N, *row]}.

    An array that is missing, or whose .json tells of another encoder, other settings or other
    videos, is made, full of NaN; with `again` every array is. ManifestError if a file is damaged or
    cannot be written."""
    videos = extraction.videos
    settings = {
        "manifest": manifest_hash(videos),
        "root": os.path.realpath(videos.folder),  # equal paths under another root: other videos
        "files": file_sizes(videos),  # of some rows: a file of another size is another video
        "checkpoint": encoder.identity,
        "size": encoder.size,
    }
    settings |= extraction.settings
    arrays = {}
    for kind, row in extraction.row_shapes.items():
        path = folder / f"{extraction.split}.{kind}.npy"
        shape = (len(videos), *row)
        if rank == 0:
            about = settings
            if kind == "tokens":
                about = settings | {"token_grid": list(extraction.token_grid)}
            expected = about | {"shape": list(shape)}  # create_array adds the shape
            same = read_about(path.with_suffix(".json")) == expected
            if again or not same or not path.exists():
                dtype = np.float32 if kind == "features" else np.float16
                create_array(path, shape, dtype, about)
        wait_for_ranks()
        arrays[kind] = open_rows(path)
    return arrays


def filled_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """True where the rows of all arrays [N, ...] are filled, bool [N].

    A process that is killed while it writes may leave the first half of a row, and the rest NaN.
    numpy copies a row from front to back, so the last number tells whether all of it is there."""
    filled = True
    for array in arrays.values():
        last = array.reshape(len(array), -1)[:, -1]
        filled = filled & ~np.isnan(last)
    return filled


@torch.inference_mode()
def encode_batch(
    encoder: FrozenEncoder,
    items: list[tuple],
    arrays: dict[str, np.ndarray],
    extraction: Extraction,
) -> None:
    """Fills the rows of a batch's videos. Those that cannot be read, or whose features are not
    finite, are named and stay NaN."""
    rows = []
    clips = []
    for row, views, error in items:
        if error:
            tqdm.write(error)
        else:
            rows.append(row)
            clips.append(views)
    if not rows:
        return
    model = encoder.model
    device = encoder.device
    precision = precision_on(device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        video = models.normalize(torch.cat(clips).to(device))  # [B*V, 3, T, H, W]
        tokens = model.encode(video)  # [B*V, t*h*w, D]
    volume = tokens.float().mT.unflatten(-1, model.grid)  # [B*V, D, t, h, w]
    found = {}
    for kind, array in arrays.items():
        grid = (1, 1, 1) if kind == "features" else tuple(extraction.token_grid)
        pooled = F.adaptive_avg_pool3d(volume, grid).flatten(2).mT  # [B*V, 1 or M, D]
        pooled = pooled.reshape(len(rows), -1, pooled.shape[-1])  # [B, V or V*M, D]
        # features of clean views are averaged, [N, D]; those of random views stay apart, [N, A, D],
        # and so do tokens, [N, V*M, D]
        average_views = array.ndim == 2
        if average_views:
            pooled = pooled.mean(1)  # [B, D]
        found[kind] = pooled.to(torch.float16 if kind == "tokens" else torch.float32).cpu().numpy()
    for place, row in enumerate(rows):
        if all(np.isfinite(values[place]).all() for values in found.values()):
            for kind, array in arrays.items():
                array[row] = found[kind][place]
        else:
            tqdm.write(f"{extraction.videos[row].path}: its features are not finite")


class TokenRows:
    """Some rows of a mapped array of tokens [N, V*M, D]. An index chooses among them and reads
    nothing; `read` reads them, so that no more than a batch of tokens is in memory."""

    def __init__(self, array: np.ndarray, rows: torch.Tensor):
        self.array = array
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: torch.Tensor) -> "TokenRows":
        return TokenRows(self.array, self.rows[index])

    def read(self, device: torch.device) -> torch.Tensor:
        """-> float32 [B, V*M, D]; 0 for a video that could not be read."""
        tokens = torch.from_numpy(self.array[self.rows.numpy()])
        return tokens.to(device).float().nan_to_num(0.0)
