"""Long runs: many clips through the loader with four workers leave resident memory and open files where they were."""
import os
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import pretrain
from clips import EpochBatches


def usage(pids):
    """Resident bytes of the processes that are theirs alone, and their open files; shared pages count once, with their writer."""
    private = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                private += 1024 * int(line.split()[1])
    return private, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def soak(world, clips, samples):
    args = pretrain.parse_args(["--data", str(world / "data/train.csv"), "--size", "tiny", "--mask", "text", "--stride", "2"])
    videos, rows, arrays = pretrain.open_data(args)
    args.frames, args.image_size, grid = 8, 32, (4, 4, 4)
    batches = EpochBatches(rows, 8, 4, 0, 0, 1)
    loader = DataLoader(pretrain.Clips(videos, rows, args, grid, **arrays), batch_sampler=batches, num_workers=4, persistent_workers=True)
    epochs, found, seen = clips // 32, [], 0
    for epoch in range(epochs):
        batches.epoch = epoch
        iterator = iter(loader)
        seen += sum(len(batch["clip"]) for batch in iterator)
        if epoch % (epochs // samples) == 0:
            found.append(usage([os.getpid(), *(worker.pid for worker in iterator._workers)]))
    assert seen == epochs * 32
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("clips", [1600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_and_open_files_stay_where_they_are(world, clips):
    found = soak(world, clips, 10)
    settled = found[2:]  # after a fifth; before, workers fill their caches
    memory, files = zip(*settled)
    print(f"{clips} clips, 4 workers: {memory[0] / 2**20:.0f} MiB private after a fifth, {memory[-1] / 2**20:.0f} at the end; {files[0]} and {files[-1]} open files")
    assert max(memory) < 1.02 * memory[0] + 2**20 and max(files) <= files[0] + 2
