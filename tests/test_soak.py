"""Long runs: many clips through the loader with four workers leave resident memory and open
files where they were.
"""

import ctypes
import gc
import itertools
import os
from pathlib import Path

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader

import pretrain
from tgm import guides
from tgm.sampling import EpochBatches
from tgm.video import VideoReader


def usage(pids):
    """Bytes that the processes hold together and no file backs (a page they share counts once),
    and their open files.
    """
    held = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                held += 1024 * int(line.split()[1])
    return held, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def soak(world, clips, samples):
    args = pretrain.parse_args(
        [
            "--data",
            str(world / "data/train.csv"),
            *"--size tiny --mask text --stride 2".split(),
        ]
    )
    videos, rows, arrays, _ = guides.open_data(args.data, args.mask, args.nce_weight)
    args.frames, args.image_size, grid = 8, 48, (4, 6, 6)
    batches = EpochBatches(rows, 8, 4, 0, 0, 1)
    loader = DataLoader(
        pretrain.make_clips(videos, rows, grid, arrays, args),
        batch_sampler=batches,
        num_workers=4,
        persistent_workers=True,
    )
    epochs, found, seen = clips // 32, [], 0
    for epoch in range(epochs):
        batches.epoch = epoch
        iterator = iter(loader)
        seen += sum(len(batch["clip"]) for batch in iterator)
        if epoch % (epochs // samples) == 0:
            found.append(usage([os.getpid(), *(worker.pid for worker in iterator._workers)]))
    assert seen == epochs * 32
    return found


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc"
)


def test_reading_a_video_leaves_nothing_behind(world):
    """1,500 readers: less than 100 bytes of each stay, and no file; the heap's free pages are
    given back before each look.
    """
    path, trim = world / "data/videos/train/00003.mp4", ctypes.CDLL(None).malloc_trim
    found = []
    for count in (300, 1500):
        for _ in range(count):
            with VideoReader(path) as reader:
                reader.read([0.1, 0.9])
            with VideoReader(path, vectors=True) as reader:
                reader.read_vectors([0.5])
                list(itertools.islice(reader.frames(), 2))
        gc.collect()
        trim(0)
        found.append(usage([os.getpid()]))
    assert found[1][0] - found[0][0] < 3000 * 100 and found[1][1] == found[0][1]


def test_no_picture_waits_for_the_cycle_collector(world):
    """Frames are freed as soon as they are read, not when Python next looks for cycles, or a
    loader's worker holds a hundred MB more.
    """
    gc.collect()
    gc.disable()
    try:
        with VideoReader(world / "data/videos/train/00003.mp4", vectors=True) as reader:
            assert (
                len(reader.read(np.arange(8) / 8)) == 8
                and len(reader.read_vectors(np.arange(8) / 8)) > 0
            )
            assert len(list(reader.frames())) > 8
        assert [
            frame for frame in gc.get_objects() if type(frame) is av.VideoFrame and frame.width > 16
        ] == []
    finally:
        gc.enable()


@pytest.mark.slow
def test_twenty_thousand_clips_through_four_workers(world):
    found = soak(world, 20_000, 10)
    memory, files = zip(*found[2:])  # after a fifth; before, workers fill their caches
    print(
        f"20,000 clips, 4 workers: {memory[0] / 2**20:.1f} MiB after a fifth, {memory[-1] / 2**20:.1f} at the end; "
        f"{files[0]} and {files[-1]} open files"
    )
    assert max(memory) < 1.02 * memory[0] and max(files) <= files[0] + 2
