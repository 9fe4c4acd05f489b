"""Stage 3: pretraining. A video masked autoencoder whose masks follow language, motion or chance.

Reads   a manifest and its videos; train.saliency.npy for the text masks, train.motion.npy for the
        masks motion and flow; train.text.npy for the contrastive loss (--nce-weight 0 does without)
Writes  runs/NAME/: checkpoint.pt, args.json, log.jsonl (a line per logged step),
        reconstruction_*.png

    # CPU, toy world: 5 minutes
    python pretrain.py --size tiny --repeat 4 --epochs 8 --warmup-epochs 1 --blr 8e-3
    # one GPU, ViT-B
    python pretrain.py --mask text
    # eight GPUs
    torchrun --nproc_per_node=8 pretrain.py --mask text
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --mask text

The loss is VideoMAE's mean squared error on masked cubes (about 1.0 for the trivial prediction)
plus --nce-weight times a symmetric InfoNCE between the mean visible token and the caption. Its
negatives are the other videos of the batch, over all ranks; with --accum they are those of one of
the accumulated batches, so for this loss, unlike the other, accumulating is not the same as a
larger batch. With weight 0 the contrastive loss is only monitored: its head trains on detached
features and the encoder is untouched (the paper's figure 4).

One epoch is one pass over the videos. With --repeat R each decoded clip gives R samples (each with
its own crop, flip, caption and mask), so the effective epochs are epochs x R. The learning rate
follows the videos per step, not their samples, as in VideoMAE and mae_st: lr = blr x (batch-size x
accum x ranks) / 256. It rises over --warmup-epochs, then falls along a cosine to 1e-5 x (batch-size
x accum x ranks) / 256.

Every sample is a pure function of (seed, epoch, row, repeat): the number of workers changes
nothing, and a resumed run repeats an uninterrupted one bit for bit on a CPU. --resume auto goes on
from the checkpoint in --out, if there is one, and refuses flags and data other than those that it
was begun with. Free to change are the flags of MAY_CHANGE; the number of ranks and --batch-size, if
their product stays; and --epochs, upwards: the rest of the run follows the longer cosine, so the
rate jumps up to where that one is. --resume none renames an old checkpoint to checkpoint.old.pt, at
once.

SIGTERM and Ctrl-C save after the step, on all ranks, and end the run by that signal (exit codes 143
and 130). torchrun passes a signal on to its ranks, does not restart them then, and exits with 1. If
a rank alone gets the signal, all save and end as well, but to torchrun that is a failure, as is
kill -9: with --max-restarts it starts all ranks again, on all nodes, and --resume auto goes on.
Several nodes must share the folder --out.

Shapes: B batch, R repeats, T frames, H W pixels, (t, h, w) token grid, N tokens, K captions, S
moments, D text embedding."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import masking
import model as models
from tgm.arrays import companion, file_hash, filled, hold, open_array
from tgm.flags import (
    Parser,
    add_machine_flags,
    add_training_flags,
    add_video_flags,
    count,
    fraction,
    frame_count,
    not_negative,
    pixel_count,
    positive,
    positive_int,
    ratio,
    seed_number,
)
from tgm.manifest import ManifestError, manifest_hash, read_manifest
from tgm.run import (
    RunError,
    StopSignal,
    choose_device,
    ignore_signals,
    join_ranks,
    keep_log,
    launch,
    make_folder,
    one_line_errors,
    patient,
    refuse_changes,
    torchrun_ranks,
    wait_for_ranks,
    writing,
)
from tgm.sampling import EpochBatches, TrainingClips, clip_times, multi_scale_crop, repeat_seed
from tgm.video import VideoError, VideoReader

# ---- samples -------------------------------------------------------------------------------------


class Clips(TrainingClips):
    """Training samples by (epoch, row). `text` [N, K, D], `saliency` [N, K, S, G, G] and `motion`
    [N, S, 2, G, G] are mapped arrays or None."""

    def __init__(self, videos, rows, args, grid, text=None, saliency=None, motion=None):
        super().__init__(videos, rows, args.seed)
        self.args = args
        self.grid = grid
        self.text = text
        self.saliency = saliency
        self.motion = motion

    def sample(self, epoch, row, rng):
        args, video = self.args, self.videos[row]
        with VideoReader(video.path, timeout=args.video_timeout) as reader:
            start, end = reader.span(video)
            times = clip_times(start, end, reader.fps, args.frames, args.stride, rng.random())
            frames = reader.read(times)  # uint8 [T, H, W, 3]
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T, 3, H, W]
        middles = torch.from_numpy(
            (times.reshape(self.grid[0], -1).mean(1) - start) / (end - start)
        ).float()
        repeats = [
            self.view(frames, row, repeat_seed(args.seed, epoch, row, repeat))
            for repeat in range(args.repeat)
        ]
        stacked = {key: torch.stack([view[key] for view in repeats]) for key in repeats[0]}
        seconds = torch.full((args.repeat,), end - start, dtype=torch.float32)
        rows = torch.full((args.repeat,), row)
        return stacked | {"times": middles.expand(args.repeat, -1), "seconds": seconds, "row": rows}

    def view(self, frames, row, seed):
        """One crop, flip, caption and mask noise of a decoded clip; all randomness from `seed`."""
        args, (height, width) = self.args, frames.shape[-2:]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed also asks for accelerators: 0.5 ms where there are none
            torch.default_generator.manual_seed(seed)
            if args.crop == "resized":
                top, left, h, w = v2.RandomResizedCrop.get_params(
                    frames, scale=tuple(args.crop_scale), ratio=(3 / 4, 4 / 3)
                )
            else:
                top, left, h, w = multi_scale_crop(height, width)
            flip = args.flip and bool(torch.rand(()) < 0.5)
            noise, choice = torch.rand(math.prod(self.grid)), torch.rand(()).item()
        clip = TF.resized_crop(
            frames, top, left, h, w, [args.image_size, args.image_size], antialias=True
        )
        clip = clip.flip(-1) if flip else clip
        view = {
            "clip": clip.transpose(0, 1).contiguous(),  # uint8 [3, T, H, W]
            "box": torch.tensor(
                [left / width, top / height, (left + w) / width, (top + h) / height]
            ),
            "flip": torch.tensor(flip),
            "noise": noise,
        }
        maps = self.saliency if self.saliency is not None else self.text
        if maps is not None:
            captions = (
                1
                if maps is None
                else int((~np.isnan(maps[row].reshape(len(maps[row]), -1)[:, 0])).sum())
            )
            caption = int(choice * captions)
        if self.text is not None:
            view["text"] = torch.from_numpy(self.text[row, caption].astype(np.float32))
        if self.saliency is not None:
            # float16 [S, G, G]
            view["saliency"] = torch.from_numpy(self.saliency[row, caption].copy())
        if self.motion is not None:
            view["motion"] = torch.from_numpy(self.motion[row].copy())  # float16 [S, 2, G, G]
        for kind in ("saliency", "motion"):
            if kind in view and not view[kind].isfinite().all():
                raise VideoError(
                    f"{self.videos[row].path}: its {kind} has numbers that are not finite"
                )
        return view


# ---- the run -------------------------------------------------------------------------------------


FLOOR = 1e-5  # where the learning rate ends, for 256 videos per step; VideoMAE's min_lr


def learning_rate(step, lr, warmup, total, floor=FLOOR):
    """Linear warm-up, then half a cosine down to `floor` (never above lr): a pure function of
    the step.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    floor = min(floor, lr)
    return floor + (lr - floor) * 0.5 * (
        1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))
    )


def make_optimizer(model, args):
    """AdamW; biases, norms, the mask token and the temperature do not decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    still = lambda name, p: p.ndim < 2 or name == "mask_token"
    groups = [
        {
            "params": [p for name, p in named if not still(name, p)],
            "weight_decay": args.weight_decay,
        },
        {"params": [p for name, p in named if still(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def draw_reconstruction(path, model, dataset, args, device, autocast):
    """Three rows for one clip: as it is, masked, reconstructed (masked cubes keep their true
    mean and deviation).
    """
    batch = torch.utils.data.default_collate([dataset[0, int(dataset.rows[0])]])
    batch = {key: value.flatten(0, 1).to(device) for key, value in batch.items() if value.ndim > 1}
    clip, mask = models.normalize(batch["clip"]), mask_batch(batch, model, args)
    with autocast:
        made = model.reconstruct(clip, mask)
    c = model.config
    cubes = mask[:, :, None].expand(-1, -1, 3 * c["tubelet"] * c["patch"] ** 2).float()
    hidden = models.unpatchify(cubes, model.grid, c["tubelet"], c["patch"])
    true = batch["clip"] / 255
    rows = [
        x[0].transpose(0, 1)[:: c["tubelet"]]
        for x in (true, torch.where(hidden > 0, torch.full_like(true, 0.5), true), made)
    ]
    picture = torch.nn.functional.interpolate(
        torch.cat(rows), scale_factor=max(1, 128 // true.shape[-1])
    )
    save_image(picture, path, nrow=len(rows[0]), padding=4, pad_value=1.0)


def mask_batch(batch, model, args):
    """The masks of a batch on its device: bool [B, N]."""
    maps, place = {}, (batch["times"], batch["box"], batch["flip"], model.grid)
    if "saliency" in batch:
        maps["saliency"] = masking.cut_maps(batch["saliency"], *place)
    if "motion" in batch:
        maps["motion"] = masking.cut_motion(batch["motion"], *place, batch["seconds"])
    return masking.make_mask(
        args.mask, args.mask_ratio, len(batch["clip"]), model.grid, noise=batch["noise"], **maps
    )


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/train.csv", help="the manifest")
    add_video_flags(data)
    data.add_argument(
        "--companions",
        metavar="PREFIX",
        help="read PREFIX.{saliency,motion,text}.npy, not the manifest's",
    )
    data.add_argument("--frames", type=frame_count, help="frames of a clip (default: the size's)")
    data.add_argument(
        "--stride",
        type=positive_int,
        help="video frames a clip frame (default: 4, tiny 2; SSv2 wants 2)",
    )
    data.add_argument("--image-size", type=pixel_count, help="pixels (default: the size's)")
    data.add_argument(
        "--crop",
        choices=("multiscale", "resized"),
        default="multiscale",
        help="VideoMAE's, or random resized",
    )
    data.add_argument(
        "--crop-scale",
        type=ratio,
        nargs=2,
        default=(0.5, 1.0),
        metavar=("MIN", "MAX"),
        help="a resized crop's area",
    )
    data.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mirror half of the samples",
    )
    data.add_argument("--repeat", type=positive_int, default=1, help="samples of each decoded clip")
    data.add_argument(
        "--max-bad",
        type=fraction,
        default=0.05,
        help="stop when more than this share of the videos cannot be read",
    )
    method = parser.add_argument_group("method")
    method.add_argument("--mask", choices=tuple(masking.MASKS), default="text")
    method.add_argument(
        "--mask-ratio", type=ratio, help="share of tokens masked (default: the mask's own)"
    )
    method.add_argument(
        "--decoder-keep",
        type=ratio,
        default=1.0,
        help="share of the masked tokens that are reconstructed; VideoMAE V2: 0.5",
    )
    method.add_argument(
        "--nce-weight",
        type=not_negative,
        default=1.0,
        help="weight of the contrastive loss; 0 only monitors it",
    )
    method.add_argument("--size", choices=tuple(models.SIZES), default="base")
    method.add_argument(
        "--init", help="start from a checkpoint: ours, VideoMAE's .pth, or a Hugging Face folder"
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument(
        "--batch-size",
        type=positive_int,
        default=32,
        help="videos a rank and step, before --repeat",
    )
    optim.add_argument(
        "--accum",
        type=positive_int,
        default=1,
        help="batches whose gradients are added up in a step (each has its own negatives)",
    )
    optim.add_argument("--epochs", type=positive_int, default=200)
    optim.add_argument("--warmup-epochs", type=not_negative, default=20)
    optim.add_argument(
        "--blr", type=positive, default=1.5e-4, help="learning rate for 256 videos per step"
    )
    optim.add_argument("--weight-decay", type=not_negative, default=0.05)
    optim.add_argument(
        "--clip-grad", type=not_negative, default=1.0, help="largest gradient norm; 0 does not clip"
    )
    run = parser.add_argument_group("run")
    add_machine_flags(run, workers=min(8, os.cpu_count()))
    add_training_flags(run)
    run.add_argument("--out", type=Path, help="folder of the run (default: runs/MASK)")
    run.add_argument("--seed", type=seed_number, default=0)
    run.add_argument(
        "--picture-every",
        type=count,
        default=10,
        help="epochs between reconstruction pictures; 0 draws none",
    )
    args = parser.parse_args(argv)
    if args.crop_scale[0] > args.crop_scale[1]:
        parser.error(
            f"argument --crop-scale: expected MIN up to MAX, found {args.crop_scale[0]:g} {args.crop_scale[1]:g}"
        )
    args.mask_ratio = masking.RATIOS[args.mask] if args.mask_ratio is None else args.mask_ratio
    args.out = Path(args.out or f"runs/{args.mask}")
    return args


def open_data(args):
    """The manifest and what the method needs beside it: videos, rows to train on, {"text",
    "saliency", "motion": array or None}.
    """
    videos = read_manifest(args.data, args.root)
    remedy = f"python caption.py --data {args.data} && python saliency.py --data {args.data}"
    prefix = companion_prefix(args)
    captions = companion(args.data, "captions.jsonl")  # if they were remade, the arrays are stale
    expect = {"captions": file_hash(captions)} if captions.exists() and not args.companions else {}
    arrays = {"text": None, "saliency": None, "motion": None}
    need = masking.NEEDS[args.mask]
    if need == "saliency":
        arrays["saliency"], _ = open_array(f"{prefix}.saliency.npy", videos, remedy, **expect)
    if need == "motion":
        arrays["motion"], _ = open_array(
            f"{prefix}.motion.npy", videos, f"python saliency.py --data {args.data} --cue motion"
        )
    if args.nce_weight > 0 or Path(f"{prefix}.text.npy").exists():
        try:
            arrays["text"], _ = open_array(f"{prefix}.text.npy", videos, remedy, **expect)
        except ManifestError as error:
            if need == "saliency" or args.nce_weight == 0:
                raise
            raise ManifestError(f"{error}; or train without captions: --nce-weight 0") from None
    usable = np.ones(len(videos), bool)
    for array in arrays.values():
        if array is not None:
            usable &= filled(array)
    return videos, np.flatnonzero(usable), arrays


def companion_prefix(args):
    """What the companion arrays' names begin with."""
    return args.companions or Path(args.data).with_suffix("")


# ---- before it begins ----------------------------------------------------------------------------


def refuse_gigabytes(args, ranks_here):
    """RunError if one batch's clips, or the table of positions, would not fit into the memory of
    this machine.
    """
    config = models.SIZES[args.size]
    frames = args.frames or config["frames"]
    pixels = args.image_size or config["image_size"]
    memory = machine_memory()
    batch = batch_bytes(args.batch_size, args.repeat, frames, pixels) * ranks_here
    tokens = (frames // config["tubelet"]) * (pixels // config["patch"]) ** 2
    # sines and cosines in float64, and what they are chosen into
    table = 3 * 8 * tokens * config["width"]
    if batch > memory:
        raise RunError(
            f"one batch is {batch / 1e9:.0f} GB of pixels ({ranks_here} ranks x {args.batch_size} videos x {args.repeat} "
            f"repeats x {frames} frames of {pixels} pixels), this machine has {memory / 1e9:.0f} GB: lower --batch-size, "
            "--repeat, --frames or --image-size"
        )
    if table > memory:
        raise RunError(
            f"{frames} frames of {pixels} pixels are {tokens} tokens, more than this machine's {memory / 1e9:.0f} GB "
            "hold: lower --frames or --image-size"
        )


def machine_memory():
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def batch_bytes(videos, repeat, frames, pixels):
    """The size of one rank's batch of uint8 clips."""
    return videos * repeat * 3 * frames * pixels * pixels


def refuse_missing(args, videos, rows):
    """RunError if too many of some 256 videos, evenly from all, are not there: it is said before
    workers stumble on each.
    """
    looked_for = rows[:: max(1, len(rows) // 256)]
    missing = [int(row) for row in looked_for if not os.path.exists(videos[int(row)].path)]
    if missing and len(missing) > args.max_bad * len(looked_for):
        folder = args.root or Path(args.data).parent
        raise RunError(
            f"{args.data}: {len(missing)} of {len(looked_for)} videos that were looked for are not there, such as "
            f"{videos[missing[0]].path}: relative paths start at {folder} (--root names another folder)"
        )


def refuse_small(args, usable, videos, device, ranks):
    """RunError if the usable videos do not fill one step."""
    if usable == 0:
        raise RunError(
            f"{args.data}: none of the {len(videos)} videos has what --mask {args.mask} needs: every row of an array is "
            "empty; the reasons are in captions.jsonl and what saliency.py printed"
        )
    if usable >= args.batch_size * args.accum * ranks:
        return
    reason = (
        f"{args.data}: {usable} usable videos do not fill one step of {args.batch_size} videos x {args.accum} accumulated "
        f"x {ranks} ranks: "
    )
    if usable < ranks:
        raise RunError(reason + "start fewer ranks (--nproc_per_node), or add videos")
    batch = 1
    while batch * 8 * ranks <= usable:  # four steps an epoch, or more
        batch *= 2
    trial = f"--batch-size {batch} --accum 1 --epochs 20 --warmup-epochs 2"
    if device.type == "cpu" and args.size != "tiny":
        trial = f"--size tiny {trial}"
    raise RunError(f"{reason}lower --batch-size or --accum; for a trial: {trial}")


def seconds_per_step(model, samples, visible, decoded):
    """A guess for a CPU, from the time of one matrix product: forward and backward are three
    times the forward pass.
    """
    x = torch.ones(1024, 1024)
    x @ x
    began = time.time()
    x @ x
    per_second = 1024**3 / (time.time() - began)  # multiply-adds
    return 3 * samples * sum(models.count_flops(model, visible, decoded)) / per_second


def data_identity(args, videos, rows, arrays):
    """What a resumed run must find as it was: {what: a text that changes with it}."""
    digest = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()[:16]
    identity = {args.data: manifest_hash(videos), "usable videos": f"{len(rows)} ({digest})"}
    for kind, array in arrays.items():
        path = f"{companion_prefix(args)}.{kind}.npy"
        identity[path] = None if array is None else file_hash(Path(path).with_suffix(".json"))
    return identity


MAY_CHANGE = {  # flags that do not change what is learnt
    "workers", "log_every", "save_every", "picture_every", "device", "compile", "checkpointing", "video_timeout",
    "max_bad", "max_steps", "out", "resume",
}  # fmt: skip


def refuse_other_run(path, saved, args):
    """RunError if the checkpoint at `path`, begun with the flags `saved`, is of another run than
    `args`.
    """
    if "mask" not in saved or "identity" not in saved:
        models.read_checkpoint(path)  # a damaged file is a ValueError with its reason
        raise RunError(
            f"{path}: this version of pretrain.py did not write it: write elsewhere (--out), or start from it with --init"
        )
    before = dict(saved)
    now = dict(vars(args))
    may_change = MAY_CHANGE | {"ranks", "identity", "lr"}
    if args.epochs >= saved["epochs"]:
        may_change = may_change | {"epochs"}
    before["batch_size"] = saved["batch_size"] * saved["ranks"]
    now["batch_size"] = args.batch_size * args.ranks
    if before["batch_size"] != now["batch_size"]:
        before["batch_size"] = f"{saved['batch_size']} on {saved['ranks']} ranks"
        now["batch_size"] = f"{args.batch_size} on {args.ranks} ranks"
    whose = f"{path}, {whose_run(saved)}"
    refuse_changes(whose, before, now, may_change)
    for what, value in args.identity.items():
        known = saved["identity"].get(what)
        if known != value:
            raise RunError(
                f"{whose}: {what} was changed since (was {known or 'not there'}, is {value or 'not there'}): bring it back, write "
                "elsewhere (--out), or begin again with --resume none"
            )


def whose_run(saved):
    """What the flags of a checkpoint say of its run, for the user."""
    return f"a run of {saved['data']} with mask {saved['mask']} at {saved['mask_ratio']:g}"


OF_A_NODE = {
    "workers",
    "device",
    "root",
    "data",
    "companions",
    "out",
    "resume",
    "video_timeout",
    "identity",
}


def refuse_unequal_ranks(rank, ranks, step, args):
    """Ends the run on every rank if they were started with other flags or data, or found other
    checkpoints, as nodes do that do not share a folder."""
    own = {name: value for name, value in vars(args).items() if name not in OF_A_NODE}
    own["what it reads"] = list(args.identity.values())
    found = [None] * ranks
    dist.all_gather_object(found, (step, own))
    first_step, first = found[0]
    for other, (its_step, its_own) in enumerate(found):
        if its_step != first_step:
            steps = f"rank 0 would go on from step {first_step}, rank {other} from step {its_step}"
            give_up(f"--out {args.out}: {steps}: all nodes must see the same folder", rank)
        for name, value in its_own.items():
            if value != first[name]:
                give_up(
                    f"{name} is {first[name]} on rank 0, {value} on rank {other}: start every node alike",
                    rank,
                )


def give_up(message, rank):
    """Ends the run on every rank, all of which call this, with one line that rank 0 prints."""
    if not dist.is_initialized():
        raise RunError(message)
    if rank == 0:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    wait_for_ranks()  # torchrun ends the others as soon as one has ended: only when the line is out
    dist.destroy_process_group()
    sys.exit(1)


# ---- the loop ------------------------------------------------------------------------------------


def choose_precision(asked, device):
    """What --amp auto stands for on a device: bf16, fp16 or off."""
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def batches_from(step, loader, steps_per_epoch, accum):
    """The batches of all steps after `step`, one epoch after the other, without end."""
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        loader.batch_sampler.epoch = epoch
        loader.batch_sampler.start = done * accum
        try:
            yield from patient(loader)
        except VideoError as error:  # a worker puts its traceback before the message
            reason = str(error).strip().splitlines()[-1].removeprefix("tgm.video.VideoError: ")
            raise RunError(f"{reason} (more than --max-bad)") from None
        step = (epoch + 1) * steps_per_epoch


def first_bad_step(finite, step):
    """The number of the first step that is not finite, of steps that end with `step`: finite is
    bool [steps].
    """
    return step - len(finite) + 1 + int((~finite).int().argmax())


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    rank, ranks, local_rank = torchrun_ranks()
    say = print if rank == 0 else lambda *_, **__: None
    device, why = choose_device(args.device, local_rank)
    use_cuda = device.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    args.amp = choose_precision(args.amp, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[args.amp]
    autocast = torch.autocast(device.type, dtype, enabled=args.amp != "off")

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    refuse_gigabytes(args, ranks_here)
    try:
        videos, rows, arrays = open_data(args)
        text = arrays["text"]
        args.text_dim = text.shape[-1] if text is not None else 512
        torch.manual_seed(args.seed)
        model = models.VideoMAE(
            args.size, args.frames, args.image_size, args.text_dim, nce_detach=args.nce_weight == 0
        )
        masked = masking.masked_count(args.mask_ratio, model.grid)
        visible, decoded = model.num_tokens - masked, round(args.decoder_keep * masked)
        if not 0 < decoded <= masked:
            raise ValueError(
                f"--decoder-keep {args.decoder_keep} reconstructs {decoded} of {masked} masked tokens"
            )
    except (ManifestError, ValueError) as error:
        sys.exit(
            str(error)
            + ("" if Path(args.data).exists() else " (the toy world: python data/toy.py)")
        )
    args.frames = model.config["frames"]
    args.image_size = model.config["image_size"]
    grid = model.grid
    args.stride = args.stride or model.config["stride"]
    refuse_small(args, len(rows), videos, device, ranks)
    refuse_missing(args, videos, rows)
    model.contrastive.requires_grad_(text is not None)
    model.set_checkpointing(args.checkpointing)

    videos_per_step = args.batch_size * args.accum * ranks
    samples_per_step = videos_per_step * args.repeat
    steps_per_epoch, left_out = divmod(len(rows), videos_per_step)
    warmup_steps = args.warmup_epochs * steps_per_epoch
    total_steps = args.epochs * steps_per_epoch
    last_step = min(total_steps, args.max_steps or total_steps)
    args.ranks = ranks
    args.lr = args.blr * videos_per_step / 256
    floor = FLOOR * videos_per_step / 256
    args.identity = data_identity(args, videos, rows, arrays)

    checkpoint_path = args.out / "checkpoint.pt"
    log_path = args.out / "log.jsonl"
    saved_args = {}
    if args.resume != "none" and checkpoint_path.exists():
        saved_args = models.saved_args(checkpoint_path)
        try:
            refuse_other_run(checkpoint_path, saved_args, args)
        except ValueError as error:
            sys.exit(str(error))
        if args.resume is None:
            raise RunError(
                f"{checkpoint_path} is there already, {whose_run(saved_args)}: --resume auto goes on from it, --resume none "
                "begins again and keeps it as checkpoint.old.pt, --out writes elsewhere"
            )

    start = 0  # steps done by the run that goes on
    optimizer = make_optimizer(model.to(device), args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    try:
        if args.resume == "auto" and checkpoint_path.exists():
            models.load_pretrained(model, checkpoint_path)
            saved = torch.load(checkpoint_path, map_location=device, weights_only=True)
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            start = saved["step"]
        elif args.init:
            say(
                f"from {args.init}:",
                *(models.load_pretrained(model, args.init) or ["every key"]),
                sep="\n  ",
            )
    except ValueError as error:
        sys.exit(str(error))
    args.out = str(args.out)  # a checkpoint holds plain types alone
    if ranks > 1:
        join_ranks("nccl" if use_cuda else "gloo")
        refuse_unequal_ranks(rank, ranks, start, args)

    if text is None:
        contrastive = "no text array: not computed"
    elif args.nce_weight == 0:
        contrastive = "monitored: the head trains, the encoder does not see it"
    else:
        contrastive = f"weight {args.nce_weight:g}"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"""data         {args.data}: {len(rows)} of {len(videos)} videos usable
steps        {total_steps} = {args.epochs} epochs x {steps_per_epoch}, from step {start}
device       {device} ({why}), amp {args.amp}, {ranks} ranks
model        {args.size}, {millions:.1f} M parameters, {args.frames} frames of {args.image_size} pixels
tokens       {visible} of {math.prod(grid)} visible: mask {args.mask} at {args.mask_ratio}, grid {" x ".join(map(str, grid))}; {decoded} reconstructed
contrastive  {contrastive}
batch        {samples_per_step} = {args.batch_size} videos x {args.repeat} repeats x {args.accum} accumulated x {ranks} ranks
lr           {args.lr:.3g} = {args.blr:g} x {videos_per_step} videos / 256, down to {min(floor, args.lr):.3g}; {args.epochs} epochs, {args.epochs * args.repeat} effective""")
    if left_out > 0:
        say(
            f"note         each epoch leaves out {left_out} videos, others each time, which fill no step of {videos_per_step}"
        )
    for kind, array in arrays.items():
        rows_filled = len(videos) if array is None else int(filled(array).sum())
        if rows_filled < len(videos):
            say(
                f"note         the {kind} array has {rows_filled} of {len(videos)} rows: the others failed or have no caption; if "
                "saliency.py was stopped, run it again"
            )
    if warmup_steps >= last_step:
        say(
            f"note         the warm-up of {args.warmup_epochs:g} epochs is longer than the run, whose learning rate only rises"
        )
    if start > 0 and args.epochs != saved_args.get("epochs", args.epochs):
        longer = learning_rate(start, args.lr, warmup_steps, total_steps, floor)
        shorter = learning_rate(
            start, args.lr, warmup_steps, saved_args["epochs"] * steps_per_epoch, floor
        )
        say(
            f"note         begun for {saved_args['epochs']} epochs, now {args.epochs}: the learning rate jumps from {shorter:.3g} "
            f"to {longer:.3g}, the longer schedule's"
        )
    if not use_cuda and args.size != "tiny":
        seconds = seconds_per_step(model, samples_per_step // ranks, visible, decoded)
        say(
            f"note         --size {args.size} on a CPU: about {seconds:.2g} s per step, {seconds * (last_step - start) / 3600:.2g} hours in "
            "all; it wants a GPU; --size tiny is for CPUs"
        )
    ahead = (
        batch_bytes(args.batch_size, args.repeat, args.frames, args.image_size)
        * 2
        * args.workers
        * ranks_here
    )
    if ahead > machine_memory():
        say(
            f"note         {args.workers} workers may hold {ahead / 1e9:.0f} GB of clips, more than this machine has: lower --workers"
        )
    if start >= last_step:
        say(f"{checkpoint_path}: already at step {start}, nothing left to do")
        if ranks > 1:
            dist.destroy_process_group()
        return
    if rank == 0:
        make_folder(log_path.parent)
        hold(checkpoint_path)
        if args.resume == "none" and checkpoint_path.exists():
            # at once: a kill must not leave it for --resume auto
            checkpoint_path.replace(checkpoint_path.with_suffix(".old.pt"))
            say(f"note         the old checkpoint is now {checkpoint_path.with_suffix('.old.pt')}")
        args_path = log_path.with_name("args.json")
        with writing(args_path):
            aside = args_path.with_name("args.json.new")
            aside.write_text(json.dumps(vars(args), indent=1) + "\n")
            aside.replace(args_path)
        with writing(log_path):
            keep_log(log_path, start)

    sampler = EpochBatches(
        rows, args.batch_size, steps_per_epoch * args.accum, args.seed, rank, ranks
    )
    loader = DataLoader(
        Clips(videos, rows, args, grid, **arrays),
        batch_sampler=sampler,
        num_workers=args.workers,
        pin_memory=use_cuda,
        persistent_workers=args.workers > 0,
        worker_init_fn=ignore_signals,
    )
    if args.compile:
        model.compile()  # in place: the checkpoint's keys stay as they are
    wrapped = model
    if ranks > 1:
        wrapped = DistributedDataParallel(model, device_ids=[local_rank] if use_cuda else None)
    stop = StopSignal(ranks)

    # With weight 0 the loss is the head's alone, and trains it at full weight.
    nce_weight = args.nce_weight if args.nce_weight > 0 else 1.0
    # A head that only monitors has no part in the norm: through it, it would touch the encoder.
    clipped = [
        p
        for name, p in model.named_parameters()
        if args.nce_weight > 0 or not name.startswith("contrastive.")
    ]
    largest_norm = args.clip_grad if args.clip_grad > 0 else math.inf
    failed = set()  # rows that could not be read, of all ranks
    newly_failed = set()  # since the last log line: of this rank
    # since the last log line: the losses and the gradient's norm of each step, on the device
    window = []
    used = []  # since the last log line: the rows of each step
    began = time.time()
    data_time = 0.0
    stopped = False
    batches = batches_from(start, loader, steps_per_epoch, args.accum)
    for step in range(start + 1, last_step + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args.lr, warmup_steps, total_steps, floor)
        losses = []
        used.append([])
        for micro in range(args.accum):
            waited = time.time()
            batch = next(batches)
            data_time += time.time() - waited
            newly_failed.update(row for row in batch["failed"].tolist() if row >= 0)
            used[-1] += batch["row"][:, 0].tolist()
            batch = {  # [B, R, ...] -> [B*R, ...]
                key: value.to(device, non_blocking=True).flatten(0, 1)
                for key, value in batch.items()
                if value.ndim > 1
            }
            mask = mask_batch(batch, model, args)  # bool [B*R, N]
            chosen = (
                masking.some_masked(mask, batch["noise"], decoded) if decoded < masked else None
            )
            is_last = micro == args.accum - 1
            with contextlib.nullcontext() if is_last or ranks == 1 else wrapped.no_sync():
                with autocast:
                    clip = models.normalize(batch["clip"])
                    loss_mae, loss_nce = wrapped(
                        clip, mask, batch.get("text"), visible, chosen, batch["row"]
                    )
                if loss_nce is None:
                    loss_nce = torch.zeros_like(loss_mae)
                scaler.scale((loss_mae + nce_weight * loss_nce) / args.accum).backward()
            losses.append(torch.stack([loss_mae.detach(), loss_nce.detach()]))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(clipped, largest_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.contrastive.limit_temperature()
        window.append(torch.cat([torch.stack(losses).mean(0), norm[None]]))

        ends_epoch = step == last_step or step % steps_per_epoch == 0
        stopped = stop.agreed()
        saves = ends_epoch or stopped or (args.save_every > 0 and step % args.save_every == 0)
        if not saves and step % args.log_every != 0:
            continue
        stats = torch.stack(window)  # [steps, 3]
        # fp16's scaler skips infinite gradients
        judged = stats[:, :2] if scaler.is_enabled() else stats
        finite = judged.isfinite().all(1)
        counts = torch.tensor([len(newly_failed - failed), 0.0], device=device)
        counts[1] = (~finite).any()
        stats = torch.cat([stats.mean(0), counts])
        if ranks > 1:
            dist.all_reduce(stats)
        stats = stats.cpu()  # the one place where the CPU waits for the GPU
        if stats[4] > 0:
            give_up_on_values(finite.cpu(), step, used, videos, rank, ranks)
        if stats[3] > 0:
            failed |= of_all_ranks(newly_failed, ranks)
            if len(failed) > args.max_bad * len(rows):
                names = ", ".join(videos[row].name for row in sorted(failed)[:20])
                give_up(
                    f"{len(failed)} of {len(rows)} videos cannot be read, more than --max-bad {args.max_bad}: {names}",
                    rank,
                )
        seconds = (time.time() - began) / len(window)
        entry = {
            "step": step,
            "epoch": round(step / steps_per_epoch, 3),
            "loss_mae": stats[0].item() / ranks,
            "loss_nce": stats[1].item() / ranks if text is not None else None,
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": stats[2].item() / ranks,
            "data_ms": 1000 * data_time / len(window),
            "step_ms": 1000 * seconds,
            "clips_per_s": samples_per_step / seconds,
            "left_s": (last_step - step) * seconds,
            "skipped": len(failed),
        }
        say(
            "  ".join(f"{key} {value:.4g}" for key, value in entry.items() if value is not None),
            flush=True,
        )
        if rank == 0:
            with writing(log_path), open(log_path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        if rank == 0 and saves:
            models.save_checkpoint(
                checkpoint_path,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                step=step,
                args=vars(args),
            )
        draws = args.picture_every > 0 and (
            step == last_step or step % (steps_per_epoch * args.picture_every) == 0
        )
        if rank == 0 and ends_epoch and draws:
            path = log_path.with_name(f"reconstruction_{step:06d}.png")
            try:
                draw_reconstruction(path, model, loader.dataset, args, device, autocast)
            except (VideoError, OSError, RuntimeError) as error:  # a picture is not worth the run
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"{path}: left out ({reason})", file=sys.stderr)
        if stopped:
            say(f"{stop.name}: saved {checkpoint_path} at step {step}; --resume auto goes on")
            break
        window, used, newly_failed = [], [], set()
        began, data_time = time.time(), 0.0
    if ranks > 1:
        # torchrun ends the others as soon as one has ended by a signal: only when rank 0 has saved
        wait_for_ranks()
        dist.destroy_process_group()
    if stopped:
        stop.end()
    stop.at_once()


def of_all_ranks(rows, ranks):
    """The union of the ranks' sets of rows."""
    if ranks == 1:
        return set(rows)
    found = [None] * ranks
    dist.all_gather_object(found, sorted(rows))
    return set().union(*found)


def give_up_on_values(finite, step, used, videos, rank, ranks):
    """Ends the run on every rank, naming the first step whose loss or gradient is not finite, and
    its videos.

    finite: bool [steps], of this rank; used: the rows of each of these steps, which end with
        `step`."""
    bad = [] if finite.all() else [first_bad_step(finite, step)]
    first = min(of_all_ranks(bad, ranks))
    rows = used[first - step - 1] if first in bad else []
    names = ", ".join(videos[row].name for row in sorted(of_all_ranks(rows, ranks)))
    give_up(
        f"step {first}: the loss or its gradient is not finite; the last checkpoint is kept. Its batch: {names}",
        rank,
    )


if __name__ == "__main__":
    launch(main)
