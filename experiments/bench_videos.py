"""The sections of experiments/bench.py that read videos: decode, sample, reencode, growth, soak.

A section is a function of the flags and a temporary folder; it returns rows of tables.
"""

import math
import multiprocessing
import os
import sys
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import peers
from measure import compare, in_a_process, missing, pairs, resident
from peers import GRID

import model as models
import pretrain
from tgm import prepare
from tgm.loading import batches_from, make_clip_loader
from tgm.manifest import Video, read_manifest
from tgm.training import Machine, Schedule
from tgm.video import VideoReader

# pixels of the short side: the lowest and the highest
SHORT_SIDES = {
    "up to 256": (0, 256),
    "257 to 360": (257, 360),
    "above 360": (361, math.inf),
    "any": (0, math.inf),
}
# frames from key frame to key frame: the lowest and the highest
KEY_FRAMES = {"250": (150, math.inf), "70": (40, 149)}


def by_size(work, peer, seconds, sides, bound=None):
    """A row for each size of videos. sides: pixels of the short side of each pair's video, int
    [pairs]. The bound is for all sizes together."""
    rows = []
    for name, (low, high) in SHORT_SIDES.items():
        chosen = (low <= sides) & (sides <= high)
        if not chosen.any():
            continue
        label = f"{work}, short side {name}"
        if name == "any" and bound is not None:
            rows.append(compare(label, peer, seconds, aim="at least", bound=bound))
        else:
            rows.append(compare(label, peer, seconds[:, chosen]))
    return rows


def make_clips(paths, repeat=1):
    """pretrain.py's samples of these files, 16 x 224 x 224 at stride 4."""
    videos = [Video(path, None, None, None, row, path) for row, path in enumerate(paths)]
    rows = np.arange(len(paths))
    return pretrain.Clips(videos, rows, GRID, frames=16, image_size=224, stride=4, repeat=repeat)


# ---- decoding ------------------------------------------------------------------------------------


class Clip(NamedTuple):
    path: str
    frames: list  # numbers of 16 frames
    times: np.ndarray  # when they are on screen, in seconds


def read_ours(clip):
    with VideoReader(clip.path) as reader:
        return reader.read(clip.times)


def decode(args, temporary):
    """Time and pixels of 16 frames, against other decoders."""
    files = peers.find_videos(args.videos, temporary)
    decoders = {
        "decord get_batch": peers.read_decord,
        "PyAV, decoding all": peers.read_plain,
        "torchcodec, approximate seeking": peers.read_torchcodec,
    }
    bounds = {"decord get_batch": 1.25}
    rng = np.random.default_rng(0)
    rows = []
    pixels = []
    for name, (low, high) in KEY_FRAMES.items():
        paths = [path for path, file in files.items() if low <= file.gop <= high]
        if not paths:
            continue
        clips = draw_clips(files, paths, max(args.repeats, len(paths)), rng)
        work = f"16 frames at stride 4, a key frame about every {name} ({len(paths)} files)"
        for peer, read in decoders.items():
            absent = missing(work, peer, partial(read, clips[0].path, clips[0].frames))
            if absent:
                rows.append(absent)
                continue
            seconds = time_decoding(clips, read)
            bound = bounds.get(peer)
            aim = "" if bound is None else "at least"
            rows.append(compare(work, peer, seconds, aim=aim, bound=bound))
            found = compare_pixels(clips[: len(paths)], read)
            pixels.append({"pixels against": peer, "key frames": name} | found)
            if read is peers.read_plain:
                assert found["largest"] == 0, f"not what plain decoding gives: {pixels[-1]}"
    return rows + pixels


def draw_clips(files, paths, count, rng):
    """`count` clips of these files in turn, each from a random place."""
    clips = []
    for i in range(count):
        path = paths[i % len(paths)]
        frames = peers.clip_frames(files[path], rng.random())
        clips.append(Clip(path, frames, files[path].times[frames]))
    return clips


def time_decoding(clips, read):
    def ours(i):
        read_ours(clips[i])

    def theirs(i):
        read(clips[i].path, clips[i].frames)

    return pairs(ours, theirs, len(clips))


def compare_pixels(clips, read):
    """How far our pixels are from a peer's: columns of a row."""
    means = []  # of clips that differ
    largest = 0
    for clip in clips:
        apart = abs(read_ours(clip).astype(int) - read(clip.path, clip.frames))
        largest = max(largest, int(apart.max()))
        if apart.any():
            means.append(apart.mean())
    return {
        "clips": len(clips),
        "identical": len(clips) - len(means),
        "mean difference of the others": float(np.mean(means)) if means else 0.0,
        "largest": largest,
    }


# ---- training samples ----------------------------------------------------------------------------


def sample(args, temporary):
    """pretrain.py's sample against VideoMAE's, at the same place of the same file."""
    files = peers.find_videos(args.videos, temporary)
    paths = list(files)
    peer = "VideoMAE's: decord, PIL, float, normalised"
    once = make_clips(paths)
    four_times = make_clips(paths, repeat=4)

    def theirs(i):
        epoch, row = divmod(i, len(paths))
        where = np.random.default_rng([0, epoch, row, 0]).random()  # as in TrainingClips
        frames = peers.clip_frames(files[paths[row]], where)
        return peers.videomae_sample(paths[row], frames)

    def plain(i):
        return once[divmod(i, len(paths))]

    def normalised(i):
        return models.normalize(plain(i)["clip"])

    def repeated(i):
        return four_times[divmod(i, len(paths))]

    absent = missing("a training sample", peer, partial(theirs, 0))
    if absent:
        return [absent]
    count = max(args.repeats, len(paths))
    sides = np.array([files[paths[i % len(paths)]].short for i in range(count)])
    rows = []
    for name, ours, samples, bound in (
        ("uint8", plain, 1, 2.5),
        ("normalised", normalised, 1, None),
        ("uint8, --repeat 4, per sample", repeated, 4, 5),
    ):
        seconds = pairs(ours, theirs, count)
        seconds[0] /= samples
        work = f"a training sample as distributed, {name}"
        rows += by_size(work, peer, seconds, sides, bound)
    return rows


def reencode(args, temporary):
    """A sample of a file that `tgm.prepare --reencode` wrote, against one of the file itself."""
    files = peers.find_videos(args.videos, temporary)
    every = max(1, round(len(files) / args.files))
    paths = list(files)[::every]
    copies = []
    for row, path in enumerate(paths):
        copies.append(str(temporary / f"small{row}.mp4"))
        error = prepare.reencode(path, copies[row], short_side=256)
        assert error is None, error
    before = make_clips(paths)
    after = make_clips(copies)

    def ours(i):
        return after[divmod(i, len(paths))]

    def theirs(i):
        return before[divmod(i, len(paths))]

    count = max(args.repeats, len(paths))
    sides = np.array([files[paths[i % len(paths)]].short for i in range(count)])
    seconds = pairs(ours, theirs, count)
    rows = by_size("a training sample, re-encoded", "as distributed", seconds, sides, bound=3)
    sizes = {
        "files": len(paths),
        "MB as distributed": sum(map(os.path.getsize, paths)) / 1e6,
        "MB re-encoded": sum(map(os.path.getsize, copies)) / 1e6,
    }
    return [*rows, sizes]


# ---- growth --------------------------------------------------------------------------------------


def load_clips(paths, workers, batch, count):
    """Loads `count` clips or more with the loader of pretrain.py, epoch after epoch; yields after
    each batch how many so far."""
    clips = make_clips(paths)
    schedule = Schedule(
        videos=len(paths),
        batch_size=batch,
        repeat=1,
        accum=1,
        ranks=1,
        epochs=1,
        warmup_epochs=0,
        max_steps=None,
    )
    loader = make_clip_loader(clips, schedule, Machine("cpu", "off"), workers)
    batches = batches_from(0, loader, schedule)
    for loaded in range(batch, count + batch, batch):
        next(batches)
        yield loaded


def growth(args, temporary):
    """Clips per second with more workers; time and memory of manifests with more rows."""
    paths = list(peers.find_videos(args.videos, temporary))
    rows = []
    for workers in (0, 1, 2, 4):
        speed = loading_speed(paths * 4, workers, 5 * args.repeats)
        rows.append({"loader's workers": workers, "clips/s": speed})
    for count in (10**3, 10**4, 10**5, 10**6):
        path = temporary / "rows.csv"
        write_manifest(path, count)
        found, seconds, megabytes = in_a_process(manifest_cost, path)
        rows.append(
            {
                "rows of a manifest": found,
                "s to read": seconds,
                "MB": megabytes,
                "bytes a row": 1e6 * megabytes / found,
            }
        )
    return rows


def loading_speed(paths, workers, count):
    """Clips per second of the last two thirds: at first workers start, and fill their queues."""
    marks = [(time.perf_counter(), loaded) for loaded in load_clips(paths, workers, 4, count)]
    began, loaded_before = marks[len(marks) // 3]
    ended, loaded = marks[-1]
    return (loaded - loaded_before) / (ended - began)


def write_manifest(path, rows):
    with open(path, "w") as file:
        file.write("path,label\n")
        for row in range(rows):
            label = row % 400
            file.write(f"videos/class {label}/clip_{row:08}.mp4,{label}\n")


def manifest_cost(path):
    """-> (rows of a manifest, seconds to read it, MB that it takes in memory)."""
    before = resident()
    began = time.perf_counter()
    videos = read_manifest(path)
    seconds = time.perf_counter() - began
    return len(videos), seconds, resident() - before


def soak(args, temporary):
    """Many clips through four workers: memory and open files of all five processes, medians of
    each tenth of the run."""
    paths = list(peers.find_videos(args.videos, temporary)) * 8
    rows = []
    measured = []
    for loaded in load_clips(paths, workers=4, batch=8, count=args.clips):
        measured.append(memory_and_files())
        if loaded < args.clips * (len(rows) + 1) / 10:
            continue
        megabytes, opened = np.median(measured, axis=0).tolist()
        compared = ""
        if len(rows) > 1:
            compared = megabytes / rows[1]["MB resident"]
        rows.append(
            {
                "clips": loaded,
                "MB resident": megabytes,
                "of the second tenth's": compared,
                "open files": opened,
            }
        )
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
        measured = []
    return rows


def memory_and_files():
    """MB and open files of this process and its loader's workers."""
    megabytes = 0
    opened = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        megabytes += resident(pid)
        opened += len(os.listdir(f"/proc/{pid}/fd"))
    return megabytes, opened
