"""What is looked at before training begins, so that what would fail after minutes is said at once.
Needs run.py and the repository's model.py.

Each refusal is a RunError: one line with the numbers and the flags that mend it.
"""

import contextlib
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from model import SIZES
from tgm.run import RunError

LOOKED_FOR = 256  # videos, chosen at random: every nth might miss a pattern in the manifest


@contextlib.contextmanager
def as_run_error():
    """If a ValueError is raised inside, raises RunError with its text."""
    try:
        yield
    except ValueError as error:
        raise RunError(str(error)) from None


def refuse_gigabytes(
    size: str, batch_size: int, repeat: int, frames: int | None, pixels: int | None
):
    """RunError if one batch, or the model's table of positions, would not fit into the machine's
    memory (the limit of a container is not looked at). frames, pixels: None for those of the
    size."""
    config = SIZES[size]
    frames = frames or config["frames"]
    pixels = pixels or config["image_size"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    batch = ranks * batch_size * repeat * 3 * frames * pixels**2  # uint8: one byte per number
    if batch > memory:
        raise RunError(
            f"one batch is {batch / 1e9:.0f} GB of pixels ({ranks} ranks x {batch_size} "
            f"videos x {repeat} repeats x {frames} frames of {pixels} pixels), this machine has "
            f"{memory / 1e9:.0f} GB: lower --batch-size, --repeat, --frames or --image-size"
        )
    tokens = (frames // config["tubelet"]) * (pixels // config["patch"]) ** 2
    # The table of positions is made in float64. At the peak there are four tables' worth of memory.
    table = 4 * 8 * tokens * config["width"]
    if table > memory:
        raise RunError(
            f"{frames} frames of {pixels} pixels are {tokens} tokens, more than this machine's "
            f"{memory / 1e9:.0f} GB hold: lower --frames or --image-size"
        )


def refuse_missing(manifest: str, videos, rows, root: str | None, max_bad: float):
    """RunError if too many of the files of these row numbers are not there. Without this, workers
    would skip them one by one."""
    looked_for = rows
    most = max_bad * len(rows)
    if len(rows) > LOOKED_FOR:
        looked_for = np.random.default_rng(0).choice(rows, LOOKED_FOR, replace=False)
        # By chance a draw may have more missing files than their share in all: hardly ever more
        # than the mean plus three standard deviations.
        most = max_bad * LOOKED_FOR + 3 * math.sqrt(max_bad * (1 - max_bad) * LOOKED_FOR)
    missing = [row for row in looked_for if not os.path.exists(videos[int(row)].path)]
    if len(missing) > most:
        raise RunError(
            f"{manifest}: {len(missing)} of {len(looked_for)} videos that were looked for are not "
            f"there, such as {videos[int(missing[0])].path}: relative paths start at "
            f"{root or Path(manifest).parent} (--root names another folder, --max-bad allows more)"
        )


def refuse_few(
    manifest: str, usable: int, batch_size: int, accum: int, ranks: int, trial: str = ""
):
    """RunError if the usable videos fill no step. trial: more flags for the trial run that the
    message suggests, with a space at their end."""
    if usable >= batch_size * accum * ranks:
        return
    reason = (
        f"{manifest}: {usable} usable videos do not fill one step of {batch_size} videos x "
        f"{accum} accumulated x {ranks} ranks"
    )
    if usable < ranks:
        raise RunError(f"{reason}: start fewer ranks (--nproc_per_node), or add videos")
    batch = 1
    while 4 * (2 * batch) * ranks <= usable:  # the largest power of 2 with four steps per epoch
        batch *= 2
    raise RunError(
        f"{reason}: lower --batch-size or --accum; for a trial: {trial}--batch-size {batch} "
        "--accum 1 --epochs 20 --warmup-epochs 2"
    )


def note_on_cpu(size: str, multiply_adds: int, samples: int, steps: int) -> str:
    """What to print before a model of this size is trained on a CPU: how long that takes, guessed
    from the time of one matrix product. Forward and backward together cost three forward passes.

    multiply_adds: of one sample's forward pass; samples: per rank and step; steps: still to do"""
    x = torch.ones(1024, 1024)
    x @ x
    began = time.perf_counter()
    x @ x
    multiply_adds_per_second = 1024**3 / (time.perf_counter() - began)
    seconds = 3 * samples * multiply_adds / multiply_adds_per_second
    return (
        f"note         --size {size} on a CPU: about {seconds:.2g} s per step, "
        f"{seconds * steps / 3600:.2g} hours in all; it wants a GPU; --size tiny is for CPUs"
    )
