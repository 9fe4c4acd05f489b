"""Measurements that only a GPU can give. experiments/gpu.sh runs them in parts of a few minutes.

    python experiments/gpu.py steps       training steps of ViT-B and ViT-L, and of transformers;
                                          the six masks
    python experiments/gpu.py stages      captions, saliency and RAFT: videos per second
    python experiments/gpu.py data        decoding: clips per second and core, and the share of a
                                          run that waits for data
    python experiments/gpu.py profile     where the time of one step goes, by torch.profiler
    python experiments/gpu.py tables      prints what was measured as Markdown
    python experiments/gpu.py clips --out gpu-carry
                                          writes re-encoded videos, to be carried to a GPU

Reads   clips for `data`: --videos, a manifest or folder of H.264 videos of 64 frames or more
        (default: those of ../shared/videos, or else drawn ones). All else is of random pixels,
        maps and weights, which are as slow as trained ones
Writes  a line of OUT/SECTION.jsonl for each figure, as soon as it is measured, and for `profile`
        OUT/profile-*.txt, which is replaced. What a .jsonl holds stays: new lines are added

No new figure is begun after --seconds. The most wanted come first. --tiny tries the code on a CPU,
and writes to runs/gpu-tiny.

A step is what pretrain.py does with a batch that is on the device: masks, normalising, forward
and loss under bf16 autocast, backward, clipping, fused AdamW. Utilisation is what the model must
compute (6 x model.count_flops: two FLOPs per multiply-add, a backward pass as two forward passes)
over the time and the card's peak. Recomputed activations and the optimizer do not count.
"""

import argparse
import csv
import functools
import gc
import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "experiments")]
import peers

import caption
import masking
import model as models
import pretrain
import saliency
from tgm import checkpoints, guides, motion, prepare
from tgm.loading import batches_from, make_clip_loader
from tgm.offline import Item
from tgm.training import Schedule

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# dense bf16 FLOP/s, as their maker states; the first name that is part of the card's counts
PEAK = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}
# what is measured first; the rest, as long as there is time
PLAN = (
    ("base", 0.6),
    ("base", 0.9),
    ("large", 0.6),
    ("base", 0.75),
    ("large", 0.9),
    ("large", 0.75),
)
SECTIONS = ("steps", "stages", "data", "profile")


class Out:
    """The files of figures, and the time after which no figure is begun."""

    def __init__(self, folder, seconds):
        self.folder = folder
        self.end = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.machine = "CPU"
        self.peak = None
        if ON_GPU:
            self.machine = torch.cuda.get_device_name()
            # whole words, as an A10G is no A10
            known = [peak for name, peak in PEAK.items() if re.search(rf"\b{name}\b", self.machine)]
            self.peak = known[0] if known else None

    def is_over(self):
        return time.monotonic() > self.end

    def add(self, section, **row):
        """Adds a figure to its section's file, and prints it."""
        row |= {"card": self.machine, "torch": torch.__version__}
        line = json.dumps({name: rounded(value) for name, value in row.items()})
        print(f"{section}: {line}", flush=True)
        with open(self.folder / f"{section}.jsonl", "a") as file:
            file.write(line + "\n")


def rounded(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---- measuring -----------------------------------------------------------------------------------


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def seconds_per_call(call, warmup=3, blocks=3, least=0.7):
    """The median over blocks of calls; each block takes about `least` seconds, and at least two
    calls."""
    for _ in range(warmup):
        call()
    wait()
    began = time.perf_counter()
    call()
    wait()
    calls = max(2, round(least / (time.perf_counter() - began)))
    found = []
    for _ in range(blocks):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        found.append((time.perf_counter() - began) / calls)
    return statistics.median(found)


def compare(one, other, rounds=5):
    """Seconds per call of two things in turn: the medians over the rounds, and that of the rounds'
    ratios."""
    pairs = []
    for number in range(rounds):
        warmup = 3 if number == 0 else 1
        first = seconds_per_call(one, warmup, blocks=1, least=0.5)
        second = seconds_per_call(other, warmup, blocks=1, least=0.5)
        pairs.append((first, second))
    ratio = statistics.median(second / first for first, second in pairs)
    return *(statistics.median(side) for side in zip(*pairs, strict=True)), ratio


def begin_memory():
    """Frees what is not used, and begins to look for the peak."""
    gc.collect()
    torch._dynamo.reset()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gigabytes():
    return torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0.0


# ---- training steps ------------------------------------------------------------------------------


def random_batch(model, batch):
    """What the loader gives for `batch` samples of a model, of random pixels, maps and texts, on
    the device."""
    t, h, w = model.grid
    frames = model.config["frames"]
    side = model.config["image_size"]
    generator = torch.Generator().manual_seed(0)
    corner = 0.3 * torch.rand(batch, 2, generator=generator)
    data = {
        "noise": torch.rand(batch, t * h * w, generator=generator),
        "times": ((torch.arange(t) + 0.5) / t).expand(batch, t),
        "box": torch.cat([corner, corner + 0.7], dim=1),
        "flip": torch.rand(batch, generator=generator) < 0.5,
        "text": F.normalize(torch.randn(batch, 512, generator=generator), dim=-1),
        "saliency": torch.rand(batch, 16, h, w, generator=generator).half(),
        "row": torch.arange(batch),
    }
    data = {name: value.to(DEVICE) for name, value in data.items()}
    shape = (batch, 3, frames, side, side)
    data["clip"] = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    return data


def make_step(model, loss):
    """Forward, backward, clipping and pretrain.py's AdamW: step() -> the loss."""
    optimizer = pretrain.make_optimizer(model, lr=1e-4, weight_decay=0.05)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def our_step(model, batch, mask, ratio, keep=1.0):
    """A step of our model with a mask; the text mask brings the contrastive loss."""
    data = random_batch(model, batch)
    if mask != "text":
        del data["text"], data["saliency"]
    num_visible, num_masked, num_decoded = pretrain.count_tokens(model.grid, ratio, keep)

    def loss():
        hidden = pretrain.mask_batch(data, mask, ratio, model.grid)
        chosen = None
        if num_decoded < num_masked:
            chosen = masking.some_masked(hidden, data["noise"], num_decoded)
        video = models.normalize(data["clip"])
        output = model(video, hidden, data.get("text"), num_visible, chosen, data["row"])
        if output.loss_nce is None:
            return output.loss_mae
        return output.loss_mae + output.loss_nce

    return make_step(model, loss)


def their_step(folder, model, batch, ratio):
    """A step of transformers' model from the same weights, on the same clips and masks."""
    hf = peers.transformers_mae(folder).to(DEVICE).train()
    data = random_batch(model, batch)

    def loss():
        hidden = masking.make_mask("tube", ratio, batch, model.grid, noise=data["noise"])
        video = models.normalize(data["clip"]).transpose(1, 2).contiguous()
        return hf(video, bool_masked_pos=hidden).loss

    return make_step(hf, loss)


def make_model(size, text=False, compiled=False, tiny=False):
    with DEVICE:  # a CPU takes seconds to draw the first weights
        model = models.VideoMAE(size)
    model.contrastive.requires_grad_(text)
    if compiled:
        # a compiler takes longer than all else here where there is only a CPU
        model.compile(backend="aot_eager" if tiny else "inductor")
    return model


def figures(model, batch, ratio, keep, seconds, peak):
    """Clips per second, and the share of the card's peak that they mean."""
    num_visible, _, num_decoded = pretrain.count_tokens(model.grid, ratio, keep)
    rate = batch / seconds
    flops = 6 * sum(models.count_flops(model, num_visible, num_decoded))
    row = {"batch": batch, "ms": 1000 * seconds, "clips/s": rate, "GFLOP a clip": flops / 1e9}
    row["of peak"] = flops * rate / peak if peak else "unknown"
    row["GB"] = gigabytes()
    return row


def measure_batches(out, about, batches):
    """Measures one model at growing batches, until one does not fit or time is over -> the fastest
    of them (None: none was measured).

    about: size, ratio, keep and compiled, as the row has them."""
    if out.is_over():
        return None
    begin_memory()
    tiny = about["size"] == "tiny"
    model = make_model(about["size"], compiled=about["compiled"], tiny=tiny)
    rates = {}
    for batch in batches:
        if out.is_over():
            break
        try:
            step = our_step(model, batch, "tube", about["ratio"], about["keep"])
            seconds = seconds_per_call(step)
        except torch.OutOfMemoryError:
            out.add("steps", **about, batch=batch, note="does not fit")
            break
        rates[batch] = batch / seconds
        row = figures(model, batch, about["ratio"], about["keep"], seconds, out.peak)
        out.add("steps", **about, **row)
        del step
        begin_memory()
    return max(rates, key=rates.get) if rates else None


def against_transformers(out, size, ratio, batch):
    """Our step and transformers', in turn, from the same weights: the losses agree."""
    begin_memory()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(size)
        checkpoints.save_huggingface(model, Path(folder) / "hf")
        theirs = their_step(Path(folder) / "hf", model, batch, ratio)
    ours = our_step(model, batch, "tube", ratio)
    losses = [ours().item(), theirs().item()]
    assert abs(losses[0] / losses[1] - 1) < 0.02, losses
    our_seconds, their_seconds, times_faster = compare(ours, theirs)
    out.add(
        "steps",
        size=size,
        ratio=ratio,
        peer="transformers, sdpa",
        batch=batch,
        ms=1000 * our_seconds,
        peer_ms=1000 * their_seconds,
        times_faster=times_faster,
    )


def text_against_tube(out, size, ratio, batch):
    """What the method costs in a step: text masks and the contrastive loss against tube masks."""
    begin_memory()
    text = our_step(make_model(size, text=True), batch, "text", ratio)
    tube = our_step(make_model(size), batch, "tube", ratio)
    tube_seconds, text_seconds, times_slower = compare(tube, text)
    out.add(
        "steps",
        size=size,
        ratio=ratio,
        peer="tube mask, no text",
        batch=batch,
        ms=1000 * text_seconds,
        peer_ms=1000 * tube_seconds,
        times_slower=times_slower,
    )


def matrix_rate(out, side):
    """What a product of two square matrices reaches: the most that can be hoped for."""
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    rate = 2 * side**3 / seconds_per_call(lambda: a @ b)
    share = rate / out.peak if out.peak else "unknown"
    out.add("steps", work=f"a product of {side} x {side}", tflops=rate / 1e12, of_peak=share)


def mask_times(out, grid, batch):
    """What it takes to make a batch of each of the six masks, at its own ratio, of random maps."""
    t, h, w = grid
    shape = (batch, t * h * w)
    maps = {
        "saliency": torch.rand(batch, t, h, w, device=DEVICE),
        "motion": 0.05 * torch.randn(batch, t, 2, h, w, device=DEVICE),
    }
    for mask, ratio in masking.RATIOS.items():
        noise = torch.rand(shape, device=DEVICE)
        make = functools.partial(masking.make_mask, mask, ratio, batch, grid, noise=noise, **maps)
        milliseconds = 1000 * seconds_per_call(make)
        out.add("steps", work=f"{mask} masks", ratio=ratio, batch=batch, ms=milliseconds)


def steps(out, args):
    matrix_rate(out, 256 if args.tiny else 8192)
    mask_times(out, (4, 6, 6) if args.tiny else (8, 14, 14), 4 if args.tiny else 64)
    torch._dynamo.config.automatic_dynamic_shapes = False  # each batch is compiled for itself
    plan = (("tiny", 0.6), ("tiny", 0.9), ("tiny", 0.75)) if args.tiny else PLAN
    batches = (2, 4) if args.tiny else (64, 128, 256, 512, 1024)
    fastest = {}
    compared = []
    for size, ratio in plan:
        about = {"size": size, "ratio": ratio, "keep": 1.0, "compiled": False}
        first = (32,) if size == "large" else ()
        best = measure_batches(out, about, first + batches)
        if best is None:
            continue
        fastest[size, ratio] = best
        if size != "large" and ratio != 0.75:
            compared.append((size, ratio))
            measure_batches(out, about | {"compiled": True}, [best])
            compare_steps(out, size, ratio, max(1, best // 4))  # two models are held at once
    for keep, compiled in ((0.5, False), (1.0, True), (0.5, True)):  # compiling takes longest
        for (size, ratio), best in fastest.items():
            if (keep, compiled) == (1.0, True) and (size, ratio) in compared:
                continue
            about = {"size": size, "ratio": ratio, "keep": keep, "compiled": compiled}
            measure_batches(out, about, [best])


def compare_steps(out, size, ratio, batch):
    if not out.is_over():
        against_transformers(out, size, ratio, batch)
    if not out.is_over():
        text_against_tube(out, size, ratio, batch)


# ---- captions and saliency -----------------------------------------------------------------------


def stages(out, args):
    videos = 2 if args.tiny else 32
    sections = (caption_rate, saliency_rate, raft_rate)
    for measure in sections:
        if out.is_over():
            return
        begin_memory()
        for row in measure(videos, args.tiny):
            out.add("stages", **row, GB=gigabytes())
            if out.is_over():
                return


def caption_rate(videos, tiny):
    """BLIP-base with random weights: three captions of 20 tokens per video, as random weights do
    not know when to end."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.txt"
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words += [f"word{i}" for i in range(30524 - len(words))]
        vocabulary.write_text("\n".join(words))
        with DEVICE:  # as make_model
            model, processor = random_blip(vocabulary)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = model.to(DEVICE, dtype)
    tokens = 3 if tiny else 20
    images = torch.randint(0, 256, (3, 256, 340, 3), dtype=torch.uint8).numpy()
    items = [Item(None, caption.model_inputs(processor, images, ""))] * videos

    def call():
        caption.describe(model, processor, items, DEVICE, dtype, 1, tokens)

    seconds = seconds_per_call(call, warmup=1, blocks=1 if tiny else 3)
    work = f"captions by BLIP-base, 3 of {tokens} tokens"
    yield {"work": work, "videos/s": videos / seconds, "videos": videos}


def random_blip(vocabulary):
    """BLIP-base for captions, with random weights, and its processor."""
    transformers = importlib.import_module("transformers")
    config = transformers.BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"image_size": 384}
    )
    images = transformers.BlipImageProcessor(size={"height": 384, "width": 384})
    tokenizer = transformers.BertTokenizer(vocab=str(vocabulary))
    processor = transformers.BlipProcessor(images, tokenizer)
    return transformers.BlipForConditionalGeneration(config).eval(), processor


@torch.inference_mode()
def saliency_rate(videos, tiny):
    """CLIP ViT-B-16 with random weights: 16 moments per video."""
    open_clip = importlib.import_module("open_clip")
    with DEVICE:
        clip = open_clip.create_model("ViT-B-16", pretrained=None, force_quick_gelu=True)
    clip = clip.to(DEVICE).eval()
    moments = 2 if tiny else 16
    side = clip.visual.image_size[0]
    images = torch.randint(0, 256, (videos * moments, 3, side, side), dtype=torch.uint8)
    text = F.normalize(torch.randn(videos, 3, clip.visual.output_dim, device=DEVICE), dim=-1)
    for dense in saliency.DENSE:

        def call(dense=dense):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
                patches = saliency.patch_features(clip.visual, images.to(DEVICE) / 255, dense)
            patches = patches.unflatten(0, (videos, moments))
            return torch.einsum("vspd,vkd->vksp", patches, text).cpu()

        seconds = seconds_per_call(call, warmup=1, blocks=1 if tiny else 3)
        work = f"saliency by CLIP ViT-B-16, --dense {dense}, {moments} moments"
        yield {"work": work, "videos/s": videos / seconds, "videos": videos}


@torch.inference_mode()
def raft_rate(videos, tiny):
    """RAFT-small with random weights: one video after the other, as saliency.py does it."""
    flow = importlib.import_module("torchvision.models.optical_flow")
    raft = flow.raft_small(weights=None).eval().to(DEVICE)
    moments = 2 if tiny else 32
    pairs = torch.randint(0, 256, (moments, 2, 3, 256, 256), dtype=torch.uint8)
    apart = torch.full((moments,), 0.1, device=DEVICE)

    def call():
        return motion.raft_field(raft, pairs.to(DEVICE), apart, 14).cpu()

    seconds = seconds_per_call(call, warmup=1, blocks=1 if tiny else 3)
    work = f"motion by RAFT-small, {moments} moments of 256^2"
    yield {"work": work, "videos/s": 1 / seconds, "videos": 1}


# ---- data ----------------------------------------------------------------------------------------


def data(out, args):
    """Decoding alone, by workers; then whole runs, and the share of them that waits."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        manifest = folder / "clips.csv"
        write_manifest(manifest, args.videos, folder, copies=2 if args.tiny else 80)
        size = "tiny" if args.tiny else "base"
        flags = ["--data", str(manifest), "--nce-weight", "0", "--size", size]
        rates = {}  # clips per second and worker
        for workers in (1,) if args.tiny else (cores, 1, 4):
            if out.is_over():
                return
            rate = loader_rate(flags, workers, batch=4 if args.tiny else 16)
            rates[workers] = rate / workers
            row = {"work": "decoding alone", "workers": workers, "cores": cores}
            out.add("data", **row, **{"clips/s": rate, "clips/s and worker": rates[workers]})
        workers = 1 if args.tiny else cores
        for mask, ratio, more in (
            ("tube", 0.6, []),
            ("tube", 0.6, ["--compile"]),
            ("tube", 0.9, []),
            ("tube", 0.9, ["--repeat", "4"]),
        ):
            if args.tiny and more == ["--compile"]:
                continue
            if out.is_over():
                return
            run = [*flags, "--mask", mask, "--mask-ratio", str(ratio), *more]
            work = f"pretrain.py, {mask} {ratio} {' '.join(more)}".strip()
            row = {"work": work, "workers": workers, "cores": cores}
            found = share_of_waiting(run, folder / "run", workers, args.tiny)
            # how many cores, all at work, decode as fast as the GPU takes clips
            samples = 4 if "--repeat" in more else 1
            needed = found["clips/s without waiting"] / samples / rates[workers]
            out.add("data", **row, **found, **{"cores that feed it": needed})


def clips(args, megabytes=14):
    """Re-encodes videos as the README advises, as many as fit into so many megabytes, and writes
    their manifest."""
    folder = args.out / "clips"
    if folder.exists() and not (args.out / "clips.csv").exists():
        sys.exit(f"{folder}: is no folder of this command: give another --out")
    made = args.out / "clips.new"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    names = []
    size = 0
    with tempfile.TemporaryDirectory() as temporary:
        for path in sorted(peers.find_videos(args.videos, Path(temporary))):
            target = made / f"{len(names):03}.mp4"
            problem = prepare.reencode(path, target, 256)
            assert problem is None, problem
            size += target.stat().st_size
            if size > 1e6 * megabytes:
                target.unlink()
                break
            names.append(f"clips/{target.name}")
    if not names:
        sys.exit(f"no H.264 video of 64 frames or more, and of less than {megabytes} MB")
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    (args.out / "clips.csv").write_text("\n".join(["path", *names]) + "\n")
    print(f"{args.out / 'clips.csv'}: {len(names)} videos")


def write_manifest(path, videos, folder, copies):
    """A manifest of the given videos, each `copies` times, so that an epoch is long."""
    files = sorted(peers.find_videos(videos, folder))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path"])
        for _ in range(copies):
            writer.writerows([os.path.abspath(name)] for name in files)


def loader_rate(flags, workers, batch, seconds=8):
    """Clips per second that the loader of pretrain.py gives if nothing else is done."""
    args = pretrain.parse_args([*flags, "--mask", "tube", "--workers", str(workers)])
    videos, rows, arrays, _ = guides.open_data(args.data, args.mask, args.nce_weight)
    config = models.SIZES[args.size]
    args.frames = config["frames"]
    args.image_size = config["image_size"]
    args.stride = config["stride"]
    side = args.image_size // config["patch"]
    grid = (args.frames // config["tubelet"], side, side)
    clips = pretrain.make_clips(videos, rows, grid, arrays, args)
    schedule = Schedule(len(rows), batch, 1, 1, 1, epochs=1, warmup_epochs=0, max_steps=None)
    machine = SimpleNamespace(rank=0, ranks=1, on_gpu=ON_GPU)
    batches = batches_from(0, make_clip_loader(clips, schedule, machine, workers), schedule)
    for _ in range(2 * workers):  # workers start, and fill their queues
        next(batches)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < seconds:
        count += len(next(batches)["clip"])
    rate = count / (time.perf_counter() - began)
    batches.close()
    return rate


def share_of_waiting(flags, out, workers, tiny):
    """Runs pretrain.py for some steps -> what its log says of them, the first lines left out."""
    batch = "4" if tiny else "32"
    if "--repeat" in flags:
        batch = "2" if tiny else "16"
    run = ["--batch-size", batch, "--workers", str(workers), "--amp", "bf16", "--resume", "none"]
    run += ["--max-steps", "4" if tiny else "80", "--log-every", "1" if tiny else "10"]
    run += ["--picture-every", "0", "--epochs", "100", "--out", str(out)]
    command = [sys.executable, str(ROOT / "pretrain.py"), *flags, *run]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=200)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = lines[2:]
    data_ms = statistics.mean(line["data_ms"] for line in kept)
    step_ms = statistics.mean(line["step_ms"] for line in kept)
    rate = statistics.mean(line["clips_per_s"] for line in kept)
    free = rate * step_ms / max(step_ms - data_ms, 1e-3)
    return {
        "batch": int(batch),
        "step_ms": step_ms,
        "data_ms": data_ms,
        "waiting": data_ms / step_ms,
        "clips/s": rate,
        "clips/s without waiting": free,
    }


# ---- a profile -----------------------------------------------------------------------------------

# the first of these words that is in a kernel's name says its kind
KINDS = {
    "cudnn::fusion": "attention",
    "splitkreduce": "matrix products",
    "triton": "fused by the compiler",
    "adam": "optimizer",
    "gammabeta": "norms",
    "flash": "attention",
    "fmha": "attention",
    "attention": "attention",
    "nvjet": "matrix products",
    "cutlass": "matrix products",
    "mm": "matrix products",
    "multi_tensor": "optimizer and clipping",
    "layer_norm": "norms",
    "sort": "masks: sorting",
    "index": "fetching tokens",
    "gather": "fetching tokens",
    "memcpy": "copies",
    "copy": "copies and casts",
    "reduce": "sums",
    "elementwise": "elementwise",
}


def kind_of(kernel):
    for word, kind in KINDS.items():
        if word in kernel.lower():
            return kind
    return "other"


def profile(out, args):
    size = "tiny" if args.tiny else "base"
    batch = 2 if args.tiny else 64
    for mask, ratio, compiled in (
        ("text", 0.6, False),
        ("text", 0.6, True),
        ("tube", 0.9, False),
        ("tube", 0.9, True),
    ):
        if out.is_over():
            return
        name = f"{size}-{mask}-{ratio}{'-compiled' if compiled else ''}"
        begin_memory()
        model = make_model(size, text=mask == "text", compiled=compiled, tiny=args.tiny)
        profile_step(out, name, our_step(model, batch, mask, ratio), batch)


def profile_step(out, name, step, batch):
    """Milliseconds of a step by kind of kernel; the table of kernels goes to a file of its own."""
    seconds = seconds_per_call(step)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ON_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        wait()
    events = profiler.key_averages()
    order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    table = events.table(sort_by=order, row_limit=60, max_name_column_width=90)
    card = out.machine.replace(" ", "-")
    (out.folder / f"profile-{card}-{name}.txt").write_text(table + "\n")
    totals = {}
    for event in events:
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        spent = event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        if on_device == ON_GPU and not event.is_user_annotation:
            kind = kind_of(event.key)
            totals[kind] = totals.get(kind, 0.0) + spent / 1000
    busy = sum(totals.values())
    row = {"step": name, "batch": batch, "ms": 1000 * seconds, "ms busy": busy}
    for kind, ms in sorted(totals.items(), key=lambda item: -item[1]):
        row[f"{kind}, ms"] = ms
    out.add("profile", **row)


# ---- tables and flags ----------------------------------------------------------------------------


def tables(folder):
    """What was measured, as Markdown: rows with the same columns are one table."""
    for section in SECTIONS:
        path = folder / f"{section}.jsonl"
        if not path.exists():
            continue
        print(f"\n## {section}")
        kinds = {}  # {names of columns: rows}
        for line in path.read_text().splitlines():
            row = json.loads(line)
            kinds.setdefault(tuple(row), []).append(row)
        for columns, rows in kinds.items():
            print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
            for row in rows:
                print(f"| {' | '.join(str(value) for value in row.values())} |")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=(*SECTIONS, "tables", "clips"))
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the figures (default: experiments/results/gpu, with --tiny runs/gpu-tiny)",
    )
    parser.add_argument(
        "--seconds", type=float, default=480, help="after which no new figure is begun"
    )
    parser.add_argument("--videos", type=Path, help="a manifest or folder of H.264 videos")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the code on a CPU")
    args = parser.parse_args(argv)
    if args.out is None and args.section == "clips":
        parser.error("clips needs --out, such as gpu-carry")
    if args.out is None:
        args.out = ROOT / ("runs/gpu-tiny" if args.tiny else "experiments/results/gpu")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.section == "tables":
        tables(args.out)
        return
    if args.section == "clips":
        clips(args)
        return
    if not ON_GPU and not args.tiny:
        sys.exit("no GPU that torch can use; --tiny tries the code on a CPU")
    if ON_GPU:
        torch.set_float32_matmul_precision("high")  # as tgm/training.py
    sections = {"steps": steps, "stages": stages, "data": data, "profile": profile}
    sections[args.section](Out(args.out, args.seconds), args)


if __name__ == "__main__":
    main()
