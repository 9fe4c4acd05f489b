"""How fast: against peers in the same run, pair by pair (ours peer, peer ours, ...); how cost
grows; and what that means on paper.

    python experiments/bench.py                          every section but soak: about 25 minutes on two CPU cores
    python experiments/bench.py decode sample --repeats 80 --videos my.csv
    python experiments/bench.py soak                     20,000 clips through the loader: half an hour
    python experiments/bench.py step overhead saliency captions paper            on a GPU; experiments/gpu.py measures what only one shows

Reads   H.264 videos of 64 frames or more: a manifest or a folder, by default
        ../shared/videos/clips.csv; where there is none, ten made on the spot from the toy world. Models are full-size with random weights, which are as slow as trained ones.
Writes  experiments/bench.json, where a section replaces its last run, and the tables between the
        marks of BENCHMARKS.md beside it

A ratio is the median over pairs, with the quartiles: how many times faster than the peer, but where
the aim is "at most" how many times slower. No speed is asserted; what is asserted is that both
sides compute the same.

A peer that is not installed is left out by name. torchcodec needs FFmpeg's shared libraries; those
inside PyAV serve:
    libs=$(python -c "import av; print(av.__path__[0] + '.libs')"); mkdir -p /tmp/ffmpeg
    for f in $libs/lib{av,sw}*; do ln -sf $f /tmp/ffmpeg/$(basename $f | sed -E 's/-[0-9a-f]+(\\.so\\.[0-9]+).*/\\1/'); done
    LD_LIBRARY_PATH=/tmp/ffmpeg:$libs python experiments/bench.py
"""

import argparse
import csv
import datetime
import functools
import importlib
import json
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import peers

import caption
import masking
import model as models
import pretrain
import saliency
from tgm import checkpoints, manifest, prepare
from tgm.sampling import EpochBatches
from tgm.video import VideoReader

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
SIZES = {
    "up to 256": range(0, 257),
    "257 to 360": range(257, 361),
    "above 360": range(361, 9999),
    "any": range(9999),
}

# ---- measuring -----------------------------------------------------------------------------------


def pairs(ours, peer, repeats, warmup=1):
    """Seconds of ours(i) and of peer(i), one after the other, the order alternating: float [2,
    repeats].
    """
    took = np.zeros((2, repeats))
    for i in range(-warmup, repeats):
        for side in ((0, 1), (1, 0))[i % 2]:
            began = time.perf_counter()
            (ours, peer)[side](max(i, 0))
            if ON_GPU:
                torch.cuda.synchronize()
            if i >= 0:
                took[side, i] = time.perf_counter() - began
    return took


def compare(work, peer, seconds, per=1, aim=""):
    """A row from what `pairs` gave. per: items of a call; aim: "at least 1.25" (peer's seconds over
    ours), "at most 1.05" (ours over the peer's), "at most" or "" (the same, without an aim)."""
    ratios = seconds[0] / seconds[1] if aim.startswith("at most") else seconds[1] / seconds[0]
    low, ratio, high = map(float, np.percentile(ratios, (25, 50, 75)))
    *words, number = aim.split() or [""]
    if number[:1].isdigit():
        aim += (
            ": reached"
            if (ratio <= float(number) if words[-1] == "most" else ratio >= float(number))
            else ": not reached"
        )
    ours, its = (1000 * float(np.median(side)) / per for side in seconds)
    print(f"  {work} / {peer}: {ratio:.3g}", file=sys.stderr, flush=True)
    return {
        "work": work,
        "peer": peer,
        "ms": ours,
        "peer's ms": its,
        "ratio": ratio,
        "quartiles": [low, high],
        "pairs": len(ratios),
        "aim": aim,
    }


def missing(work, peer, trial):
    """None if the peer runs; else the row that says why not."""
    try:
        trial()
    except (ImportError, OSError, RuntimeError) as error:
        return {"work": work, "peer": peer, "ratio": f"not installed ({type(error).__name__})"}


def in_a_process(function, *args):
    """What function(*args) returns in a new process, which has allocated nothing yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def resident(pid="self"):
    """MB of memory of a process, what it shares divided by those who share it (PSS); mapped
    files and batches under way left out.
    """
    return (
        sum(
            int(line.split()[1])
            for line in open(f"/proc/{pid}/smaps_rollup")
            if line.startswith("Pss_Anon:")
        )
        / 1e3
    )


def clip_dataset(paths, folder, *flags):
    """pretrain.py's samples of these files, at 16 x 224 x 224."""
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path",), *((path,) for path in paths)])
    args = pretrain.parse_args(
        ["--data", str(folder / "clips.csv"), "--mask", "tube", "--nce-weight", "0", *flags]
    )
    args.frames, args.stride, args.image_size = 16, 4, 224
    videos, rows, arrays, _ = pretrain.open_data(args.data, args.mask, args.nce_weight)
    return pretrain.make_clips(videos, rows, (8, 14, 14), arrays, args)


def by_size(work, peer, paths, files, seconds, aim):
    """A row for each size of the sources, of pairs whose i-th is of the file i % len(paths); the
    aim is for all together.
    """
    for name, pixels in SIZES.items():
        chosen = [
            i for i in range(seconds.shape[1]) if files[paths[i % len(paths)]].short in pixels
        ]
        if chosen:
            yield compare(
                f"{work}, short side {name}",
                peer,
                seconds[:, chosen],
                aim=aim if name == "any" else "",
            )


# ---- the sections: each returns rows of tables ---------------------------------------------------


def read_ours(path, times):
    with VideoReader(path) as reader:
        return reader.read(times)


def decode(args, temporary):
    files = peers.find_videos(args.videos, temporary)
    rows = []
    pixels = []
    rng = np.random.default_rng(0)
    for name, gops in (("250", range(150, 9999)), ("70", range(40, 150))):
        paths = [path for path, file in files.items() if file.gop in gops]
        picks = [
            (path, peers.clip_frames(files[path], rng.random()))
            for path in (paths * args.repeats)[: max(args.repeats, len(paths))]
        ]
        for peer, read, aim in (
            ("decord get_batch", peers.read_decord, "at least 1.25"),
            ("PyAV, decoding all", peers.read_plain, ""),
            ("torchcodec, approximate seeking", peers.read_torchcodec, ""),
        ):
            work = f"16 frames at stride 4, a key frame about every {name} ({len(paths)} files)"
            if not paths or (row := missing(work, peer, lambda: read(*picks[0]))):
                rows += [row] if paths else []
                continue
            ours = lambda i: read_ours(picks[i][0], files[picks[i][0]].times[picks[i][1]])
            rows.append(
                compare(work, peer, pairs(ours, lambda i: read(*picks[i]), len(picks)), aim=aim)
            )
            apart = [abs(ours(i).astype(int) - read(*picks[i])) for i in range(len(paths))]
            pixels.append(
                {
                    "pixels against": peer,
                    "key frames": name,
                    "clips": len(paths),
                    "identical": sum(not a.any() for a in apart),
                    "mean difference of the others": float(
                        np.mean([a.mean() for a in apart if a.any()] or [0])
                    ),
                    "largest": max(int(a.max()) for a in apart),
                }
            )
            assert read is not peers.read_plain or pixels[-1]["largest"] == 0, (
                f"not what plain decoding gives: {pixels[-1]}"
            )
    return rows + pixels


def sample(args, temporary):
    files = peers.find_videos(args.videos, temporary)
    peer = "VideoMAE's: decord, PIL, float, normalised"
    paths, rows = list(files), []
    one, four = (clip_dataset(paths, temporary, "--repeat", repeat) for repeat in "14")
    key = lambda i: (i // len(paths), i % len(paths))  # (epoch, row)
    # our place
    its = lambda i: peers.videomae_sample(
        paths[i % len(paths)],
        peers.clip_frames(
            files[paths[i % len(paths)]], np.random.default_rng([0, *key(i), 0]).random()
        ),
    )
    if row := missing("a training sample", peer, lambda: its(0)):
        return [row]
    count = max(args.repeats, len(paths))
    for work, ours, repeat, aim in (
        ("uint8", lambda i: one[key(i)], 1, "at least 2.5"),
        ("normalised", lambda i: models.normalize(one[key(i)]["clip"]), 1, ""),
        ("uint8, --repeat 4, per sample", lambda i: four[key(i)], 4, "at least 5"),
    ):
        seconds = pairs(ours, its, count) / [[repeat], [1]]
        rows += by_size(
            f"a training sample as distributed, {work}", peer, paths, files, seconds, aim
        )
    return rows


def reencode(args, temporary):
    files = peers.find_videos(args.videos, temporary)
    paths = list(files)[:: max(1, round(len(files) / args.files))]
    small = {path: str(temporary / f"small{i}.mp4") for i, path in enumerate(paths)}
    for path, target in small.items():
        assert (error := prepare.reencode(path, target, 256)) is None, error
    before, after = (clip_dataset(some, temporary) for some in (paths, list(small.values())))
    key = lambda i: (i // len(paths), i % len(paths))
    seconds = pairs(
        lambda i: after[key(i)], lambda i: before[key(i)], max(args.repeats, len(paths))
    )
    megabytes = [sum(map(os.path.getsize, some)) / 1e6 for some in (small, small.values())]
    return [
        *by_size(
            "a training sample, re-encoded", "as distributed", paths, files, seconds, "at least 3"
        ),
        dict(zip(("files", "MB as distributed", "MB re-encoded"), (len(paths), *megabytes))),
    ]


def random_batch(batch):
    """What the loader gives for `batch` samples, of random pixels, maps and texts."""
    torch.manual_seed(0)
    corner = torch.rand(batch, 2) * 0.3
    data = {
        "clip": torch.randint(0, 256, (batch, 3, 16, 224, 224), dtype=torch.uint8),
        "noise": torch.rand(batch, 1568),
        "times": ((torch.arange(8) + 0.5) / 8).expand(batch, 8),
        "box": torch.cat([corner, corner + 0.7], 1),
        "flip": torch.rand(batch) < 0.5,
        "text": F.normalize(torch.randn(batch, 512), dim=-1),
        "seconds": torch.full((batch,), 10.0),
        "saliency": torch.rand(batch, 16, 14, 14).half(),
        "motion": torch.randn(batch, 32, 2, 14, 14).half() / 10,
    }
    return {key: value.to(DEVICE) for key, value in data.items()}


def train_step(model, loss, dtype):
    """Forward, backward and pretrain.py's AdamW: step(i) -> the loss."""
    optimizer = pretrain.make_optimizer(model, lr=1e-4, weight_decay=0.05)

    def step(_=0):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def base_step(keep, ratio, dtype, folder, batch):
    """A step of ViT-B from the weights in `folder`, of ours with --decoder-keep, or with keep
    None of transformers' model.
    """
    data, grid = random_batch(batch), (8, 14, 14)
    mask = masking.make_mask("tube", ratio, batch, grid, noise=data["noise"])
    video = models.normalize(data["clip"])
    if keep is None:
        hf = peers.transformers_mae(folder).to(DEVICE).train()
        video = video.transpose(1, 2).contiguous()
        return train_step(hf, lambda: hf(video, bool_masked_pos=mask).loss, dtype)
    model, masked = models.VideoMAE("base").to(DEVICE), masking.masked_count(ratio, grid)
    checkpoints.load_pretrained(model, folder)
    model.contrastive.requires_grad_(False)
    decoded = masking.some_masked(mask, data["noise"], round(keep * masked)) if keep < 1 else None
    return train_step(
        model, lambda: model(video, mask, visible=1568 - masked, decoded=decoded).loss_mae, dtype
    )


def step_memory(*args):
    """MB that a model and its first step take at their peak, in a process of its own."""
    _ = importlib.import_module("transformers").VideoMAEForPreTraining  # imported lazily, by name
    # ru_maxrss begins at the parent's
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    before = peak()
    base_step(*args)()
    return torch.cuda.max_memory_allocated() / 1e6 if ON_GPU else peak() - before


def step(args, temporary):
    checkpoints.save_huggingface(models.VideoMAE("base"), folder := temporary / "base")
    rows, memory = [], []
    for ratio, dtype, aims in (
        (0.9, "float32", ("at least 1.05", "at least 1.5")),
        (0.9, "bf16", ("at least 1.05", "at least 1.5")),
        (0.6, "float32", ("at least 1.0", "")),
        (0.6, "bf16", ("at least 1.0", "")),
    ):
        settings = (ratio, dtype, folder, args.batch)
        theirs = base_step(None, *settings)
        losses = [base_step(keep, *settings)().item() for keep in (None, 1.0)]
        assert abs(losses[0] / losses[1] - 1) < (1e-4 if dtype == "float32" else 1e-2), losses
        for keep, aim in zip((1.0, 0.5), aims):
            work = f"a step of ViT-B, mask {ratio}, {dtype}" + ", --decoder-keep 0.5" * (keep < 1)
            seconds = pairs(base_step(keep, *settings), theirs, args.steps)
            rows.append(compare(work, "transformers, sdpa", seconds, args.batch, aim))
        if dtype == "float32":
            peaks = [in_a_process(step_memory, keep, *settings) for keep in (1.0, 0.5, None)]
            memory.append(
                {"peak memory, mask": ratio}
                | dict(zip(("MB", "MB, --decoder-keep 0.5", "MB, transformers"), peaks))
            )
    return rows + memory


def method_step(mask, ratio, batch):
    """A whole step of pretrain.py on a batch that is there: its masks, normalising, forward,
    backward, AdamW; for the text mask with the contrastive loss."""
    data = random_batch(batch)
    model = models.VideoMAE("base").to(DEVICE)
    model.contrastive.requires_grad_(mask == "text")
    data = {
        key: value
        for key, value in data.items()
        if key != "motion" and (mask == "text" or key not in ("saliency", "text"))
    }
    visible = model.num_tokens - masking.masked_count(ratio, model.grid)

    def loss():
        mae, nce = model(
            models.normalize(data["clip"]),
            pretrain.mask_batch(data, mask, ratio, model.grid),
            data.get("text"),
            visible,
        )
        return mae if nce is None else mae + nce

    return train_step(model, loss, "bf16" if ON_GPU else "float32")


def random_clip():
    """CLIP as saliency.py runs it with its default, OpenAI's weights, but with random ones."""
    return open_clip.create_model(
        "ViT-B-16", pretrained=None, force_quick_gelu=True, device=DEVICE
    ).eval()


def overhead(args, temporary):
    tube, text = method_step("tube", 0.9, args.batch), method_step("text", 0.9, args.batch)
    clip, frames = random_clip(), torch.randn(args.batch * 16, 3, 224, 224, device=DEVICE)

    def online(i):
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
            saliency.patch_features(clip.visual, frames, "self")
        text(i)

    peer = "tube mask at as many tokens"
    rows = [
        compare(
            "a step with text mask and contrastive loss",
            peer,
            pairs(text, tube, 2 * args.steps),
            args.batch,
            "at most 1.02",
        ),
        compare(
            "were CLIP run in it, on its 16 frames",
            peer,
            pairs(online, tube, args.steps),
            args.batch,
            "at most",
        ),
    ]
    grid, large = models.VideoMAE("base").grid, random_batch(32)
    for mask, ratio in masking.RATIOS.items():
        need = {
            "text": "saliency",
            "text-inverse": "saliency",
            "motion": "motion",
            "flow": "motion",
        }.get(mask)
        data = {
            key: value
            for key, value in large.items()
            if key not in ("saliency", "motion") or key == need
        }
        draw = functools.partial(pretrain.mask_batch, data, mask, ratio, grid)
        seconds = pairs(lambda i: draw(), tube, args.steps) * [[1], [32 / args.batch]]
        rows.append(
            compare(
                f"masks {mask} {ratio} of 32 clips",
                f"{32 / args.batch:g} x a step of {args.batch}, tube 0.9",
                seconds,
                aim="at most 0.02",
            )
        )
    return rows


@torch.inference_mode()
def clip_maps(args, temporary):
    """saliency.py's work on frames that are there: maps of 3 captions a video. Videos a batch: 2
    on a CPU, 16 on a GPU.
    """
    videos, moments, rows = (16, 16, []) if ON_GPU else (2, 8, [])
    clip, frames = random_clip(), torch.randn(videos * moments, 3, 224, 224, device=DEVICE)
    text = F.normalize(torch.randn(videos, 3, clip.visual.output_dim, device=DEVICE), dim=-1)

    def ours(dense):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
            patches = saliency.patch_features(clip.visual, frames, dense)
        return torch.einsum("vspd,vkd->vksp", patches.unflatten(0, (videos, moments)), text)

    def tower(batches):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
            return [clip.encode_image(part) for part in frames.chunk(batches)]

    for dense in saliency.DENSE:
        work = f"CLIP's maps of {videos} x {moments} frames, --dense {dense}, per frame"
        for peer, batches, aim in (
            ("encode_image, one video a batch", videos, "at least 1.2"),
            ("the bare image tower", 1, "at most 1.05"),
        ):
            seconds = pairs(lambda i: ours(dense), lambda i: tower(batches), args.steps)
            rows.append(
                compare(work, peer, seconds, len(frames), aim if dense == "self" else "at most")
            )
    return rows


def captions(args, temporary):
    """3 captions a video of 20 tokens: random weights do not know when to end. Videos a batch: 8
    on a CPU, 32 on a GPU.
    """
    vocabulary = peers.SHARED / "vocab/bert-base-uncased.txt"
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    videos = 32 if ON_GPU else 8
    work = f"captions of a video, BLIP-base, greedy, {videos} videos a batch"
    peer = "transformers' generate, an image at a time"
    if not vocabulary.exists():
        return [{"work": work, "peer": peer, "ratio": f"not measured: no {vocabulary}"}]
    model, processor = peers.random_blip(vocabulary)
    model = model.to(DEVICE, dtype)
    images = np.random.default_rng(0).integers(0, 256, (videos, 3, 256, 340, 3), dtype=np.uint8)

    def ours(_=0):
        items = [
            (None, processor(images=list(of_video), return_tensors="pt"), None)
            for of_video in images
        ]
        return sum(caption.describe(model, processor, items, DEVICE, dtype, 1, 20), [])

    @torch.inference_mode()
    def its(_=0):
        inputs = (
            processor(images=Image.fromarray(image), return_tensors="pt").to(DEVICE, dtype)
            for image in images.reshape(-1, 256, 340, 3)
        )
        return [
            processor.decode(
                model.generate(**of_one, max_new_tokens=20)[0], skip_special_tokens=True
            )
            for of_one in inputs
        ]

    if not ON_GPU:  # in bf16, sums of another order may decide another token
        assert ours() == [" ".join(text.split()) for text in its()]
    return [
        compare(
            work,
            peer,
            pairs(ours, its, max(2, args.steps // 2), warmup=int(ON_GPU)),
            videos,
            "at least 2",
        )
    ]


def load_clips(dataset, workers, batch, count):
    """Loads `count` clips or more, epoch after epoch; yields how many so far, and the pids of
    the workers.
    """
    batches, clips = EpochBatches(dataset.rows, batch, len(dataset.rows) // batch, 0, 0, 1), 0
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0
    )
    while clips < count:
        for _ in (iterator := iter(loader)):
            clips += batch
            yield clips, [worker.pid for worker in getattr(iterator, "_workers", ())]
        batches.epoch += 1


def manifest_cost(path):
    before, began = resident(), time.perf_counter()
    videos = manifest.read_manifest(path)
    return len(videos), time.perf_counter() - began, resident() - before


def growth(args, temporary):
    rows, paths = [], list(peers.find_videos(args.videos, temporary))
    torch.set_num_threads(1)  # as in a loader's worker
    for workers in (0, 1, 2, 4):
        marks = [
            (time.perf_counter(), clips)
            for clips, _ in load_clips(
                clip_dataset(paths * 3, temporary), workers, 4, 5 * args.repeats
            )
        ]
        first = len(marks) // 3  # workers start, and fill their queues
        rows.append(
            {
                "loader's workers": workers,
                "clips/s": (marks[-1][1] - marks[first][1]) / (marks[-1][0] - marks[first][0]),
            }
        )
    torch.set_num_threads(os.cpu_count())
    for batch in (args.batch, 2 * args.batch, 4 * args.batch):
        seconds = pairs(method_step("tube", 0.9, batch), lambda i: None, max(2, args.steps // 2))
        rows.append(
            {
                "clips a step": batch,
                "ms a step": 1000 * float(np.median(seconds[0])),
                "ms a clip": 1000 * float(np.median(seconds[0])) / batch,
            }
        )
    for count in (10**3, 10**4, 10**5, 10**6):
        with open(path := temporary / "rows.csv", "w") as file:
            file.write(
                "path,label\n"
                + "".join(
                    f"videos/class {i % 400}/clip_{i:08}.mp4,{i % 400}\n" for i in range(count)
                )
            )
        found, seconds, megabytes = in_a_process(manifest_cost, path)
        rows.append(
            {
                "rows of a manifest": found,
                "s to read": seconds,
                "MB": megabytes,
                "bytes a row": 1e6 * megabytes / found,
            }
        )

    def run(ranks, *command):
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            if ranks > 1
            else []
        )
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *launcher, *map(str, command)],
            cwd=temporary,
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        return time.perf_counter() - began

    run(1, ROOT / "data/toy.py", "--train", args.toy, "--val", 1)
    for stage, flags in (
        ("caption.py", ("--model", ROOT / "data/toy/blip")),
        ("saliency.py", ("--clip", f"local-dir:{ROOT}/data/toy/clip")),
    ):
        for ranks in (1, 2):
            start, whole = (
                run(
                    ranks,
                    ROOT / stage,
                    "data/train.csv",
                    *flags,
                    "--workers",
                    0,
                    "--resume",
                    "none",
                    *trial,
                )
                for trial in (("--max-steps", 0), ())
            )
            rows.append(
                {
                    "stage, toy models": stage,
                    "ranks": ranks,
                    "s to start": start,
                    "videos/s then": args.toy / (whole - start),
                }
            )
    return rows


def soak(args, temporary):
    """Clips through four workers: memory and open files of all five processes, medians over each
    tenth of the run.
    """
    rows, seen = [], []
    for clips, workers in load_clips(
        clip_dataset(list(peers.find_videos(args.videos, temporary)) * 8, temporary),
        4,
        8,
        args.clips,
    ):
        pids = [os.getpid(), *workers]
        seen.append(
            (sum(map(resident, pids)), sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids))
        )
        if clips >= args.clips * (len(rows) + 1) / 10:
            megabytes, opened = map(float, np.median(seen, 0))
            rows.append(
                {
                    "clips": clips,
                    "MB resident": megabytes,
                    "of the second tenth's": megabytes / rows[1]["MB resident"]
                    if len(rows) > 1
                    else "",
                    "open files": opened,
                }
            )
            print(f"  {rows[-1]}", file=sys.stderr, flush=True)
            seen = []
    return rows


def paper(args, temporary):
    """Disk and FLOPs are exact. Hours assume GPUs of 312 TFLOP/s (A100, bf16), of which training
    and CLIP get 40 % and BLIP 20 %: assumed, not measured. Cores come from the sections sample and
    reencode of bench.json."""
    rows, seen = [], json.loads(args.out.read_text()) if args.out.exists() else {}
    # multiply-adds of n tokens
    vit = lambda n, depth=12, width=768: depth * (12 * n * width**2 + 2 * n**2 * width)
    # 3 frames, 20 tokens each
    blip = 3 * (vit(577) + 577 * 768**2 + 24 * 577 * 768**2 + 20 * (12 * 14 * 768**2 + 768 * 30524))
    clip = 16 * (vit(197) + 196 * 768**2)  # 16 moments
    hours = lambda clips, macs, part, gpus: clips * 2 * macs / (gpus * 312e12 * part) / 3600
    with torch.device("meta"):
        base = models.VideoMAE("base")
    sizes = (("K400, 8 GPUs", 240_000, 8), ("100 x K400, 64 GPUs", 24_000_000, 64))
    for name, videos, _ in sizes:
        rows.append(
            {
                "disk": name,
                "train.text.npy, GB": videos * 3 * 512 * 2 / 1e9,
                "train.saliency.npy, GB": videos * 3 * 16 * 14**2 * 2 / 1e9,
                "train.motion.npy, GB": videos * 32 * 2 * 14**2 * 2 / 1e9,
            }
        )
    for name, videos, gpus in sizes:
        rows.append(
            {
                "hours, assumed utilisation": name,
                "captions": hours(videos, blip, 0.2, gpus),
                "saliency": hours(videos, clip, 0.4, gpus),
            }
        )
        for mask, ratio, keep in (
            ("tube 0.9", 0.9, 1),
            ("text 0.6", 0.6, 1),
            ("text 0.6, --decoder-keep 0.5", 0.6, 0.5),
        ):
            masked = masking.masked_count(ratio, base.grid)
            macs = 3 * sum(models.count_flops(base, 1568 - masked, round(keep * masked)))
            row = {
                "pretraining": name,
                "mask": mask,
                "PFLOP an epoch": videos * 2 * macs / 1e15,
                "h, 200 epochs": 200 * hours(videos, macs, 0.4, gpus),
                "h, 800": 800 * hours(videos, macs, 0.4, gpus),
                "clips/s a GPU": 312e12 * 0.4 / 2 / macs,
            }
            for column, section, match in (
                ("cores a GPU", "sample", "uint8, short side any"),
                ("cores, --repeat 4", "sample", "per sample, short side any"),
                ("cores, re-encoded", "reencode", "short side any"),
            ):
                ms = [
                    other["ms"]
                    for other in seen.get(section, {"rows": []})["rows"]
                    if str(other.get("work")).endswith(match)
                ]
                row[column] = row["clips/s a GPU"] * ms[0] / 1000 if ms else "run " + section
            rows.append(row)
    return sorted(
        rows,
        key=lambda row: ["disk", "hours, assumed utilisation", "pretraining"].index(
            next(iter(row))
        ),
    )


# ---- the run -------------------------------------------------------------------------------------

# name: (function, torch's threads; 0: as many as there are cores)
SECTIONS = {
    "decode": (decode, 1),
    "sample": (sample, 1),
    "reencode": (reencode, 1),
    "step": (step, 0),
    "overhead": (overhead, 0),
    "saliency": (clip_maps, 0),
    "captions": (captions, 0),
    "growth": (growth, 0),
    "paper": (paper, 0),
    "soak": (soak, 1),
}


def about():
    """The machine and the versions, in a line."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    wanted = (
        "torch",
        "torchvision",
        "transformers",
        "open_clip_torch",
        "av",
        "decord",
        "torchcodec",
        "numpy",
        "pillow",
    )
    found = {dist.name.lower(): dist.version for dist in distributions()}
    return (
        f"{torch.cuda.get_device_name() + ', ' if ON_GPU else ''}{cpu}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, "
        + ", ".join(f"{name} {found[name]}" for name in wanted if name in found)
    )


def cell(value):
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return (
        f"{value}"
        if not isinstance(value, float)
        else f"{value:.3g}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def tables(rows):
    """Markdown; rows that begin with the same column are one table."""
    lines, head = [], None
    for row in rows:
        if head != (head := next(iter(row))):
            columns = list(
                dict.fromkeys(key for other in rows if next(iter(other)) == head for key in other)
            )
            lines += [""] * bool(lines) + [
                "| " + " | ".join(columns) + " |",
                "|" + "---|" * len(columns),
            ]
        lines.append("| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def write(results, out):
    """bench.json, and the tables in BENCHMARKS.md beside it, between the marks of their
    sections.
    """
    aside, page = out.with_name(out.name + ".new"), out.with_name("BENCHMARKS.md")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(out)
    text = page.read_text() if page.exists() else ""
    for name, of in results.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        if start in text and end in text:
            line = f"\n`{of['command']}`, {of['date']}, {of['seconds']:.0f} s; {of['threads']} threads; {of['machine']}\n"
            text = (
                text[: text.index(start) + len(start)]
                + tables(of["rows"])
                + line
                + text[text.index(end) :]
            )
            page.write_text(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all but soak)",
    )
    parser.add_argument(
        "--videos",
        type=Path,
        metavar="FOLDER_OR_MANIFEST",
        help="H.264 videos (default: ../shared/videos/clips.csv, or toy ones)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=40,
        help="pairs of decoded clips and samples, at least one a file",
    )
    parser.add_argument("--files", type=int, default=12, help="files that are re-encoded, about")
    parser.add_argument(
        "--steps",
        type=int,
        default=5,
        help="pairs of training steps and of the frozen models' batches",
    )
    parser.add_argument(
        "--batch", type=int, default=32 if ON_GPU else 2, help="clips a training step"
    )
    parser.add_argument(
        "--toy", type=int, default=400, help="videos of the toy world, for growth with ranks"
    )
    parser.add_argument("--clips", type=int, default=20000, help="clips of the soak")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("bench.json"), help="file to write"
    )
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}: one of {', '.join(SECTIONS)}")
    args.sections = args.sections or [name for name in SECTIONS if name != "soak"]
    return args


def main(argv=None):
    args = parse_args(argv)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    threads = torch.get_num_threads()
    for name in args.sections:
        function, wanted = SECTIONS[name]
        torch.set_num_threads(wanted or threads)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            rows = function(args, Path(temporary))
        results[name] = {
            "machine": about(),
            "threads": wanted or threads,
            "date": f"{datetime.date.today()}",
            "seconds": time.perf_counter() - began,
            "command": shlex.join(
                [
                    "python",
                    "experiments/bench.py",
                    *(sys.argv[1:] if argv is None else map(str, argv)),
                ]
            ),
            "rows": rows,
        }
        torch.set_num_threads(threads)
        print(f"\n## {name}\n\n{tables(rows)}", flush=True)
        write(results, args.out)


if __name__ == "__main__":
    main()
