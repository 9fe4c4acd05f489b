"""Stage 4: fine-tuning. A pretrained encoder, or none, learns to classify videos; then a test over
several views of each.

Reads   manifests with labels (train, val, and optionally test), their videos, and a checkpoint:
        ours, VideoMAE's .pth, a Hugging Face VideoMAE folder, or none (from scratch)
Writes  runs/NAME/: checkpoint.pt (the last epoch) and best.pt (the best on --val), args.json,
        log.jsonl; after testing per_class.csv, confusion.png and, last, test.json

    # CPU, the toy world
    python finetune.py --checkpoint runs/text/checkpoint.pt --no-flip --epochs 10 --warmup-epochs 1 --blr 4e-3
    # eight GPUs
    torchrun --nproc_per_node=8 finetune.py --checkpoint runs/text/checkpoint.pt --accum 3
    python finetune.py --checkpoint runs/finetune/best.pt --test-only --views 2 3

Recipes for ViT-B on eight GPUs. Learning rates are scaled as VideoMAE's (run_class_finetuning.py):
lr = blr x videos / 256, with videos = batch size x accum x ranks of a step, whatever --repeat; so
is the floor at which it ends, min-blr. With fewer GPUs raise --accum by as much. VideoMAE's scripts
(scripts/DATA/.../finetune.sh) say "videos x samples of each":

    Kinetics-400            --accum 3 --epochs 75 --blr 5e-4 --views 5 3
        epoch_1600: 384 x 2 (64 GPUs of 6), lr 5e-4, 75 epochs: lr 7.5e-4, floor 1.5e-6. ViT-S: the
            same, 150 epochs;
        ViT-L: 128 x 2, lr 2e-3, 35 epochs (--accum 1: lr 1e-3)
        FINETUNE.md: 512 x 1, lr 1e-3, 100 epochs: --accum 4 --repeat 1 --epochs 100 --blr 1e-3, lr
            2e-3, floor 2e-6
    Something-Something v2  --accum 3 --epochs 30 --blr 5e-4 --sampling uniform --no-flip
                            --views 2 3
        epoch_2400: 384 x 2, lr 5e-4, 30 epochs: lr 7.5e-4, floor 1.5e-6
        epoch_800: 512 x 1, lr 5e-4, 50 epochs: --accum 4 --repeat 1 --epochs 50, lr 1e-3, floor
            2e-6
    UCF101                  --epochs 100 --blr 5e-4 --min-blr 1e-5 --layer-decay 0.7 --drop-path 0.2
                            --head-dropout 0.5 --views 5 3
        epoch_3200: 128 x 2 (8 GPUs of 16): lr 2.5e-4, floor 5e-6
    HMDB51                  as UCF101 (ours: there is no script)
    Diving48                --epochs 100 --blr 5e-4 --sampling uniform --no-flip --views 2 3
                            (ours: it tells left from right)

Training clips are cropped at random, mirrored (not where direction is the label: --no-flip), and
changed by RandAugment and random erasing, alike in every frame; batches are mixed by mixup or
cutmix, each clip with one of another video. The learning rate falls by --layer-decay from layer to
layer towards the input. An epoch is one pass over the videos; --repeat R takes R samples of each
decoded clip. --val is looked at after every epoch with one view; the result is --test's (without it
--val's), with clips x crops views whose softmax is averaged. Where --test is --val, best.pt was
chosen on what it is tested on, and last is the honest figure: it is the default. Every test video
is counted once, whatever the number of ranks, and one that cannot be read counts as wrong.

What differs from VideoMAE's fine-tuning:
    RandAugment    torchvision's operations: Identity is one of them, Invert and SolarizeAdd are
                   not; one magnitude, theirs varies (a deviation of 0.5 of 10); bilinear, theirs
                   bicubic; after the crop, theirs before it
    erasing        the noise in a box is the same in every frame, theirs is drawn for each
    crops          are scaled down with antialiasing
    mixing         a clip with the one before it in the batch, theirs with the one as far from the
                   batch's other end
    dense clips    in training --stride frames apart, theirs stride x T / (T - 1)
    warm-up        from lr / steps, theirs from 0
    validation     the middle clip, theirs a random one
    precision      bf16 where there is bf16, theirs fp16

SIGTERM and Ctrl-C: while it trains, it saves after the step and ends; while it validates or tests,
it ends at once. Both end by the signal (exit code 143 or 130), and --resume auto goes on, with the
flags that the run was begun with. What may change is listed at MAY_CHANGE; --epochs may grow;
--batch-size, --accum and the number of ranks may change if their product does not.

Shapes: B batch, R repeats, V views, T frames, H W pixels, C classes.
"""

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
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import model as models
from tgm import evaluation
from tgm.arrays import hold
from tgm.flags import (
    Parser,
    add_machine_flags,
    add_training_flags,
    add_video_flags,
    fraction,
    frame_count,
    not_negative,
    pixel_count,
    positive,
    positive_int,
    ratio,
    seed_number,
    whole,
)
from tgm.manifest import ManifestError, manifest_hash, read_manifest, require_files, shared_rows
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
    writing,
)
from tgm.sampling import EpochBatches, TrainingClips, clip_times, repeat_seed, uniform_times
from tgm.video import VideoError, VideoReader

GREY = [124, 116, 104]  # the mean colour, 0 once normalised: what augmentation fills in
MAY_CHANGE = (  # when a run goes on: what it learns stays the same, but for rounding
    "video_timeout max_bad test views use out device workers amp compile checkpointing max_steps resume "
    "save_every log_every lr"
).split()


# ---- training samples ----------------------------------------------------------------------------


class EraseWithNoise(v2.RandomErasing):
    """Torchvision's with value="random", which is normal noise for normalised pixels; here for
    those of uint8.
    """

    def __init__(self, probability):
        super().__init__(probability, value="random")

    def make_params(self, flat_inputs):
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            mean = torch.tensor(models.MEAN)[:, None, None]
            deviation = torch.tensor(models.STD)[:, None, None]
            params["v"] = (
                (255 * (mean + deviation * params["v"])).round().clamp(0, 255)
            )  # [3, h, w]
        return params


class Clips(TrainingClips):
    """Training samples by (epoch, row): {"clip": uint8 [R, 3, T, H, W], "label": [R], ...}.
    labels: the class of every row.
    """

    def __init__(self, videos, rows, labels, args):
        super().__init__(videos, rows, args.seed)
        self.labels, self.args = labels, args
        operations, magnitude = args.rand_augment
        one = v2.RandAugment(1, magnitude, interpolation=TF.InterpolationMode.BILINEAR, fill=GREY)
        self.rand_augment = [
            v2.RandomApply([one], p=0.5)
        ] * operations  # as VideoMAE's rand-m7-n4: each with probability 0.5
        self.erase = EraseWithNoise(args.erase)

    def sample(self, epoch, row, rng):
        args = self.args
        with VideoReader(self.videos[row].path, timeout=args.video_timeout) as reader:
            start, end = reader.span(self.videos[row])
            if args.sampling == "uniform":
                times = uniform_times(start, end, reader.fps, args.frames, rng.random(args.frames))
            else:
                times = clip_times(start, end, reader.fps, args.frames, args.stride, rng.random())
            frames = torch.from_numpy(reader.read(times)).permute(0, 3, 1, 2)  # uint8 [T, 3, H, W]
        clips = [
            self.augment(frames, repeat_seed(args.seed, epoch, row, repeat))
            for repeat in range(args.repeat)
        ]
        return {
            "clip": torch.stack(clips),
            "label": torch.full((args.repeat,), self.labels[row]),
            "row": row,
        }

    def augment(self, frames, seed):
        """One crop of a clip, mirrored and changed or not, alike in every frame: uint8 [T, 3, H,
        W] -> [3, T, size, size].
        """
        args = self.args
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            box = v2.RandomResizedCrop.get_params(
                frames, scale=tuple(args.crop_scale), ratio=(3 / 4, 4 / 3)
            )
            clip = TF.resized_crop(frames, *box, [args.image_size, args.image_size], antialias=True)
            clip = clip.flip(-1) if args.flip and torch.rand(()) < 0.5 else clip
            for operation in self.rand_augment:
                clip = operation(clip)
            return self.erase(clip).transpose(0, 1).contiguous()


def flatten_repeats(x):
    """[B, R, ...] -> [R * B, ...]: every video's first sample, then every second one, so that
    neighbours are of different videos.
    """
    return x.transpose(0, 1).flatten(0, 1)


def next_batch(iterator):
    """The next batch; RunError where a sample and all that could take its place cannot be read."""
    try:
        return next(iterator)
    except (
        VideoError
    ) as error:  # out of a worker its text is a whole traceback, with the reason for the last line
        raise RunError(
            str(error).strip().splitlines()[-1].removeprefix("tgm.video.VideoError: ")
        ) from None


def make_mix(mixup, cutmix, classes):
    """Mixup or cutmix of a batch, half and half if both have an alpha above 0 (torchvision's):
    clips [B, 3, T, H, W] float, labels [B] -> clips, targets [B, C]. Each sample is mixed with its
    neighbour in the batch."""
    kinds = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha > 0
    ]
    choose = v2.RandomChoice(kinds) if kinds else None

    def mix(clips, labels):
        if choose is None:
            return clips, F.one_hot(labels, classes).float()
        videos, targets = choose(tv_tensors.Video(clips.transpose(1, 2)), labels)
        return videos.as_subclass(torch.Tensor).transpose(1, 2), targets.float()

    return mix


# ---- optimisation --------------------------------------------------------------------------------


def layer_of(name, depth):
    """0 for the patch embedding, i + 1 for block i, depth + 1 for what follows the blocks."""
    return (
        0
        if name.startswith("patch_embed")
        else int(name.split(".")[1]) + 1
        if name.startswith("blocks.")
        else depth + 1
    )


def make_optimizer(model, lr, layer_decay, weight_decay):
    """AdamW with one learning rate a layer: lr x layer_decay^(layers to the head) (ELECTRA; BEiT,
    arXiv 2106.08254). Groups hold "layer" and "scale"; biases and norms do not decay."""
    depth, groups = model.config["depth"], {}
    for name, parameter in model.named_parameters():
        layer, decays = layer_of(name, depth), parameter.ndim > 1
        scale = layer_decay ** (depth + 1 - layer)
        groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "layer": layer,
                "scale": scale,
                "lr": lr * scale,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )["params"].append(parameter)
    return torch.optim.AdamW(
        [groups[key] for key in sorted(groups)], lr=lr, betas=(0.9, 0.999), fused=True
    )


def layer_table(optimizer, depth):
    """The learning rates as text, a line a layer."""
    layers = {}
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        layers[group["layer"]] = (group["lr"], layers.get(group["layer"], (0, 0))[1] + count)
    name = lambda layer: (
        "patch embedding"
        if layer == 0
        else "norm and head"
        if layer > depth
        else f"block {layer - 1}"
    )
    return "\n".join(
        f"  {name(layer):16} lr {lr:<9.3g} {count / 1e6:8.3f} M"
        for layer, (lr, count) in sorted(layers.items())
    )


def learning_rate(step, lr, warmup, total, floor):
    """Linear warm-up, then half a cosine down to `floor` (never above lr): a pure function of
    the step.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    floor = min(floor, lr)
    return floor + (lr - floor) * 0.5 * (
        1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))
    )


# ---- the run -------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/train.csv", help="training manifest")
    data.add_argument("--val", default="data/val.csv", help="manifest looked at after every epoch")
    data.add_argument("--test", help="manifest of the final test (default: --val)")
    add_video_flags(data)
    data.add_argument("--label-column", default="label", help="column that holds the label")
    data.add_argument(
        "--frames", type=frame_count, help="frames of a clip (default: the checkpoint's)"
    )
    data.add_argument(
        "--stride",
        type=positive_int,
        help="video frames from one clip frame to the next (default: the checkpoint's)",
    )
    data.add_argument("--image-size", type=pixel_count, help="pixels (default: the checkpoint's)")
    data.add_argument(
        "--sampling",
        choices=("dense", "uniform"),
        default="dense",
        help="a window, or one frame of each of T parts",
    )
    data.add_argument(
        "--repeat",
        type=whole(1, 1024),
        default=2,
        help="samples of each decoded clip (repeated augmentation)",
    )
    data.add_argument(
        "--max-bad",
        type=fraction,
        default=0.05,
        help="stop when more than this share of the videos cannot be read",
    )
    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--crop-scale",
        type=ratio,
        nargs=2,
        default=(0.08, 1.0),
        metavar=("MIN", "MAX"),
        help="a crop's area",
    )
    augment.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the samples",
    )
    augment.add_argument(
        "--rand-augment",
        type=whole(0, 30),
        nargs=2,
        default=(4, 21),
        metavar=("OPS", "M"),
        help="0 0: off; M of 30",
    )
    augment.add_argument(
        "--erase", type=fraction, default=0.25, help="probability of random erasing"
    )
    augment.add_argument("--mixup", type=not_negative, default=0.8, help="its alpha; 0: off")
    augment.add_argument("--cutmix", type=not_negative, default=1.0, help="its alpha; 0: off")
    augment.add_argument("--smoothing", type=fraction, default=0.1, help="label smoothing")
    method = parser.add_argument_group("model")
    method.add_argument(
        "--checkpoint", default="none", help="file or folder to start from; none: from scratch"
    )
    method.add_argument(
        "--size",
        choices=tuple(models.SIZES),
        help="for checkpoints that do not say it (default: base)",
    )
    method.add_argument(
        "--drop-path",
        type=fraction,
        default=0.1,
        help="share of residual branches dropped in the last block",
    )
    method.add_argument(
        "--head-dropout", type=fraction, default=0.0, help="dropout before the classifier"
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        help="videos a rank and step, before --repeat",
    )
    optim.add_argument(
        "--accum",
        type=positive_int,
        default=1,
        help="batches whose gradients are added up in a step",
    )
    optim.add_argument("--epochs", type=positive_int, default=75)
    optim.add_argument("--warmup-epochs", type=not_negative, default=5)
    optim.add_argument(
        "--blr",
        type=positive,
        default=5e-4,
        help="learning rate for 256 videos a step, repeats not counted",
    )
    optim.add_argument(
        "--min-blr",
        type=not_negative,
        default=1e-6,
        help="where it ends, likewise for 256 videos a step",
    )
    optim.add_argument(
        "--layer-decay",
        type=ratio,
        default=0.75,
        help="factor on the learning rate from layer to layer; 1: none",
    )
    optim.add_argument("--weight-decay", type=not_negative, default=0.05)
    optim.add_argument(
        "--clip-grad", type=not_negative, default=0.0, help="largest gradient norm; 0 does not clip"
    )
    test = parser.add_argument_group("testing")
    test.add_argument(
        "--views",
        type=positive_int,
        nargs=2,
        default=(5, 3),
        metavar=("CLIPS", "CROPS"),
        help="of each test video",
    )
    test.add_argument(
        "--use", choices=("last", "best"), default="last", help="the epoch tested at the end"
    )
    test.add_argument("--test-only", action="store_true", help="test --checkpoint as it is")
    run = parser.add_argument_group("run")
    add_machine_flags(run, workers=min(8, os.cpu_count()))
    add_training_flags(run)
    run.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the run")
    run.add_argument("--seed", type=seed_number, default=0)
    args = parser.parse_args(argv)
    if args.crop_scale[0] > args.crop_scale[1]:
        parser.error(
            f"argument --crop-scale: expected MIN before MAX, found {args.crop_scale[0]:g} {args.crop_scale[1]:g}"
        )
    return args


def open_data(args):
    """{"train", "val", "test": (videos, labels as a LongTensor, -1 for a class that is not
    trained)}, and the classes' names.
    """
    saved = models.saved_args(args.checkpoint)
    names, splits = saved.get("classes") if args.test_only else None, {}
    for split, path in (("train", args.data), ("val", args.val), ("test", args.test or args.val)):
        if args.test_only and split != "test":
            continue
        videos = read_manifest(path, args.root, args.label_column)
        require_files(videos, path)
        if unlabelled := [video for video in videos if video.label is None]:
            raise ManifestError(
                f"{path}: {unlabelled[0].name} has no label in the column {args.label_column!r}"
            )
        if names is None and args.test_only:
            # somebody else's checkpoint: labels are the numbers of its classes
            names = [str(number) for number in range(models.head_classes(args.checkpoint))]
        if names is None:
            names = sorted(
                {video.label for video in videos},
                key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name),
            )
        number = {name: index for index, name in enumerate(names)}
        splits[split] = videos, torch.tensor([number.get(video.label, -1) for video in videos])
        if (splits[split][1] < 0).all():
            raise ManifestError(
                f"{path}: none of its labels is among the classes {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        if unknown := sorted({video.label for video in videos} - set(names)):
            print(
                f"{path}: classes that are not among the {len(names)} trained count as wrong: {', '.join(unknown[:20])}"
            )
    if "train" in splits:
        seen = shared_rows(splits["train"][0], splits["test"][0])
        if seen > 0:
            print(
                f"note: {seen} of {len(splits['test'][0])} test videos are training videos, too: the accuracy will flatter"
            )
    return splits, names


def data_hash(videos):
    """16 hex digits that change when a row's path, start, end or label does."""
    digest = hashlib.sha256(manifest_hash(videos).encode())
    for video in videos:
        digest.update(json.dumps(video.label).encode() + b"\n")
    return digest.hexdigest()[:16]


def refuse_another_run(path, args):
    """RunError if the checkpoint at `path` is not of the run that args describe: see MAY_CHANGE."""
    saved = models.saved_args(path)
    remedy = "write elsewhere (--out), or begin again with --resume none"
    if "classes" not in saved:
        raise RunError(f"{path}: no checkpoint of finetune.py: {remedy}")
    may_change = {*MAY_CHANGE, "batch_size", "accum", "ranks", "classes", "data_hash", "val_hash"}
    if args.epochs >= saved["epochs"]:
        may_change.add("epochs")
    refuse_changes(path, saved, vars(args), may_change)
    for flag, key in (("--data", "data_hash"), ("--val", "val_hash")):
        if saved.get(key, vars(args)[key]) != vars(args)[key]:
            raise RunError(
                f"{path}: another run: {flag} has other videos or labels than when it was begun; {remedy}"
            )
    if saved["classes"] != args.classes:
        raise RunError(
            f"{path}: another run: of {len(saved['classes'])} classes, now there are {len(args.classes)}; {remedy}"
        )
    before = saved["batch_size"] * saved["accum"] * saved.get("ranks", args.ranks)
    now = args.batch_size * args.accum * args.ranks
    if before != now:
        raise RunError(
            f"{path}: another run: --batch-size x --accum x ranks was {before} videos a step, is {now}; {remedy}"
        )


def train(args, model, splits, out, say, device, autocast, amp, rank, stop):
    """Trains and validates to the last step; a signal that stops it ends the process. The model
    then holds the last weights.
    """
    videos, labels = splits["train"]
    ranks = args.ranks
    checkpoint_path = out / "checkpoint.pt"
    best_path = out / "best.pt"
    log_path = out / "log.jsonl"
    if checkpoint_path.exists() and args.resume != "none":
        refuse_another_run(checkpoint_path, args)
        if args.resume is None:
            raise RunError(
                f"{checkpoint_path} is there already: --resume auto goes on from it, --resume none begins again"
            )
    rows = np.arange(len(videos))
    step_videos = args.batch_size * ranks * args.accum
    steps_per_epoch = len(rows) // step_videos
    if steps_per_epoch == 0:
        raise RunError(
            f"{args.data}: {len(rows)} videos do not fill one step of {args.batch_size} videos x {args.accum} accumulated x "
            f"{ranks} ranks: lower --batch-size or --accum"
        )
    total_steps = args.epochs * steps_per_epoch
    last_step = min(total_steps, args.max_steps or total_steps)
    warmup = args.warmup_epochs * steps_per_epoch
    step_clips = step_videos * args.repeat
    args.lr = args.blr * step_videos / 256
    floor = args.min_blr * step_videos / 256
    optimizer = make_optimizer(model, args.lr, args.layer_decay, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    step, best, validated = 0, -1.0, 0  # validated: the last step whose weights --val has seen
    if args.resume == "auto" and checkpoint_path.exists():
        try:
            models.load_pretrained(model, checkpoint_path)
        except ValueError as error:
            raise RunError(str(error)) from None
        saved = torch.load(checkpoint_path, map_location=device, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where the run began in another precision
            scaler.load_state_dict(saved["scaler"])
        step, best = saved["step"], saved["best"]
        validated = saved.get("validated", step)
    left_out = len(rows) - steps_per_epoch * step_videos
    omitted = (
        f"; the {left_out} videos of its incomplete last step are left out, others each time"
        if left_out
        else ""
    )
    too_long = ""
    if args.warmup_epochs >= args.epochs:
        too_long = f"\n             --warmup-epochs {args.warmup_epochs:g} is no shorter than the run: its learning rate only rises"
    say(f"""data         {args.data}: {len(videos)} videos; {args.val}: {len(splits["val"][0])}
steps        {total_steps} = {args.epochs} epochs x {steps_per_epoch}, from step {step}{omitted}
batch        {step_videos} videos = {args.batch_size} x {args.accum} accumulated x {ranks} ranks; x {args.repeat} repeats = {step_clips} clips
lr           {args.lr:.3g} = {args.blr:g} x {step_videos} / 256, falls to {min(floor, args.lr):.3g}, decay {args.layer_decay} a layer:{too_long}
{layer_table(optimizer, model.config["depth"])}""")
    if rank == 0:
        if args.resume == "none":
            # at once: killed before its first save, this run must not be taken for that one
            for path in (checkpoint_path, best_path):
                with writing(path), contextlib.suppress(FileNotFoundError):
                    path.replace(path.with_suffix(".old.pt"))
        if step < last_step:
            with writing(out / "test.json"):
                (out / "test.json").unlink(missing_ok=True)  # of other weights
        with writing(out / "args.json"):
            (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
        with writing(log_path):
            keep_log(log_path, step)

    def log(**entry):
        say("  ".join(f"{key} {value:.4g}" for key, value in entry.items()), flush=True)
        if rank == 0:
            with writing(log_path), open(log_path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def save(path):
        if rank == 0:
            models.save_checkpoint(
                path,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                step=step,
                best=best,
                validated=validated,
                args=vars(args),
            )

    def validate():
        nonlocal best, validated
        held, held_labels = splits["val"]
        probabilities = evaluation.predict(
            model,
            evaluation.Views(
                held,
                frames=args.frames,
                image_size=args.image_size,
                stride=args.stride,
                sampling=args.sampling,
                timeout=args.video_timeout,
            ),
            classes=len(args.classes),
            device=device,
            autocast=autocast,
            batch_size=args.batch_size,
            workers=args.workers,
            rank=rank,
            ranks=ranks,
        )
        result = evaluation.score(probabilities, held_labels, len(args.classes))
        log(
            step=step,
            epoch=round(step / steps_per_epoch, 3),
            val_top1=result["top1"],
            val_top5=result["top5"],
            val_mean_class=result["mean_class"],
        )
        validated = step
        if result["top1"] > best:
            best = result["top1"]
            save(best_path)
        save(checkpoint_path)

    batches = EpochBatches(
        rows, args.batch_size, steps_per_epoch * args.accum, args.seed, rank, ranks
    )
    loader = DataLoader(
        Clips(videos, rows, labels.tolist(), args),
        batch_sampler=batches,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=args.workers > 0,
        worker_init_fn=ignore_signals,
    )
    mix, wrapped = make_mix(args.mixup, args.cutmix, len(args.classes)), model
    if args.compile:
        model.compile()  # in place: the checkpoint's keys stay as they are
    if ranks > 1:
        wrapped = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )
    model.train()
    if validated != step and (step % steps_per_epoch == 0 or step == last_step):
        # stopped between saving and validating
        validate()
    stop.after_step()

    window = []  # since the last log line: the loss of each step, on the device
    used = []  # since the last log line: the rows of each step
    failed = set()  # in the whole run: rows that could not be read
    began, data_time = time.time(), 0.0
    while step < last_step:
        epoch = step // steps_per_epoch
        batches.epoch, batches.start = epoch, step % steps_per_epoch * args.accum
        iterator = patient(loader)
        end_of_epoch = min(last_step, (epoch + 1) * steps_per_epoch)
        for step in range(step + 1, end_of_epoch + 1):  # noqa: B020 - it goes on from its own step
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(
                    step - 1, args.lr, warmup, total_steps, floor
                )
            losses = []
            for micro in range(args.accum):
                waited = time.time()
                batch = next_batch(iterator)
                data_time += time.time() - waited
                failed.update(row for row in batch["failed"].tolist() if row >= 0)
                used.append((step, batch["row"].tolist()))
                clips, target = (
                    flatten_repeats(batch[key].to(device, non_blocking=True))
                    for key in ("clip", "label")
                )
                # mixup and drop path, resumed or not
                torch.manual_seed(repeat_seed(args.seed, step, rank, micro))
                clips, target = mix(models.normalize(clips), target)  # [R*B, 3, T, H, W], [R*B, C]
                with (
                    contextlib.nullcontext()
                    if micro == args.accum - 1 or ranks == 1
                    else wrapped.no_sync()
                ):
                    with autocast:
                        logits = wrapped(clips)
                    loss = F.cross_entropy(logits.float(), target, label_smoothing=args.smoothing)
                    scaler.scale(loss / args.accum).backward()
                losses.append(loss.detach())
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            window.append(torch.stack([torch.stack(losses).mean(), norm]))

            ends, stops = step == last_step or step % steps_per_epoch == 0, stop.agreed()
            saves = ends or stops or (args.save_every and step % args.save_every == 0)
            if not (saves or step % args.log_every == 0):
                continue
            stats = torch.stack(window)  # [steps, 2]
            # fp16's scaler skips infinite gradients
            broken = ~stats[:, : 1 if scaler.is_enabled() else 2].isfinite().all(1)
            if broken.any():  # the one place where the CPU waits for the GPU
                bad_step = step - len(window) + 1 + int(broken.int().argmax())
                bad = [
                    videos[row].name
                    for at, batch_rows in used
                    if at == bad_step
                    for row in batch_rows
                ]
                sys.exit(
                    f"step {bad_step}: the loss or its gradient is not finite; the last checkpoint is kept. Its batch: {', '.join(bad)}"
                )
            stats = stats.mean(0)
            if ranks > 1:
                dist.all_reduce(stats)
                of_ranks = [None] * ranks
                dist.all_gather_object(of_ranks, failed)
                # not their sum: over the epochs ranks come to meet the same videos
                failed = set().union(*of_ranks)
            stats = (stats / ranks).tolist()
            if len(failed) > args.max_bad * len(rows):
                raise RunError(
                    f"{len(failed)} of {len(rows)} videos cannot be read, more than --max-bad {args.max_bad}: "
                    + ", ".join(videos[row].name for row in sorted(failed)[:20])
                )
            seconds = (time.time() - began) / len(window)
            log(
                step=step,
                epoch=round(step / steps_per_epoch, 3),
                loss=stats[0],
                lr=optimizer.param_groups[-1]["lr"],
                grad_norm=stats[1],
                data_ms=1000 * data_time / len(window),
                step_ms=1000 * seconds,
                clips_per_s=step_clips / seconds,
                left_s=(last_step - step) * seconds,
                skipped=len(failed),
            )
            if saves:
                save(checkpoint_path)
            if stops:
                say(f"{stop.name}: saved {checkpoint_path} at step {step}; --resume auto goes on")
                stop.end()
            if ends:
                stop.at_once("--resume auto goes on from this epoch's end")
                validate()
                stop.after_step()
            window, used, began, data_time = [], [], time.time(), 0.0


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    rank, ranks, local = torchrun_ranks()
    say = print if rank == 0 else lambda *_, **__: None
    device, why = choose_device(args.device, local)
    use_cuda = device.type == "cuda"
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    amp = (
        args.amp
        if args.amp != "auto"
        else "off"
        if not use_cuda
        else "bf16"
        if torch.cuda.is_bf16_supported()
        else "fp16"
    )
    autocast = torch.autocast(
        device.type,
        {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp],
        enabled=amp != "off",
    )

    try:
        if args.checkpoint != "none" and not Path(args.checkpoint).exists():
            sys.exit(
                f"--checkpoint {args.checkpoint}: no such file (pretrain.py writes runs/NAME/checkpoint.pt; none: from scratch)"
            )
        splits, names = open_data(args)
        saved = models.saved_args(args.checkpoint)
        args.size, args.classes = args.size or saved.get("size", "base"), names
        torch.manual_seed(args.seed)
        frames = args.frames or saved.get("frames")
        image_size = args.image_size or saved.get("image_size")
        model = models.VideoViT(
            args.size, len(names), frames, image_size, args.drop_path, args.head_dropout
        )
        notes = []
        loaded = "from scratch"
        if args.checkpoint != "none":
            notes = models.load_pretrained(model, args.checkpoint, new_head=not args.test_only)
            loaded = f"{args.checkpoint}: {models.summary_of(notes)}"
        if args.test_only and any(note.startswith("missing head") for note in notes):
            sys.exit(
                f"--checkpoint {args.checkpoint}: has no classifier to test: fine-tune it first"
            )
    except (ManifestError, ValueError) as error:
        sys.exit(
            str(error)
            + (
                ""
                if Path(args.data).exists() or args.test_only
                else " (the toy world: python data/toy.py)"
            )
        )
    args.frames, args.image_size = model.config["frames"], model.config["image_size"]
    args.stride = args.stride or saved.get("stride", model.config["stride"])
    model.to(device).set_checkpointing(args.checkpointing)
    if ranks > 1:
        join_ranks("nccl" if use_cuda else "gloo")
    say(f"""device       {device} ({why}), amp {amp}, {ranks} ranks
model        {args.size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {args.frames} frames of {args.image_size} pixels, {len(names)} classes
weights      {loaded}""")
    out, args.out = args.out, str(args.out)  # a checkpoint holds plain types alone
    make_folder(out)
    if rank == 0:
        hold(out / "checkpoint.pt")
    tested = args.checkpoint
    again = "with --test-only --checkpoint it is tested again"
    stop = StopSignal(ranks)
    stop.at_once()
    if not args.test_only:
        args.ranks = ranks
        args.data_hash = data_hash(splits["train"][0])
        args.val_hash = data_hash(splits["val"][0])
        train(args, model, splits, out, say, device, autocast, amp, rank, stop)
        tested = str(out / ("best.pt" if args.use == "best" else "checkpoint.pt"))
        again = "--resume auto tests again"
        if ranks > 1:
            # rank 0 has written best.pt
            dist.barrier(device_ids=[device.index] if use_cuda else None)
        if args.use == "best":
            try:
                models.load_pretrained(model, tested)
            except ValueError as error:
                raise RunError(str(error)) from None
    stop.at_once(again)
    videos, labels = splits["test"]
    clips, crops = args.views
    probabilities = evaluation.predict(
        model,
        evaluation.Views(
            videos,
            frames=args.frames,
            image_size=args.image_size,
            stride=args.stride,
            clips=clips,
            crops=crops,
            sampling=args.sampling,
            timeout=args.video_timeout,
        ),
        classes=len(names),
        device=device,
        autocast=autocast,
        batch_size=args.batch_size,
        workers=args.workers,
        rank=rank,
        ranks=ranks,
    )
    if rank == 0:
        about = {
            "checkpoint": tested,
            "test": args.test or args.val,
            "label": args.label_column,
            "classes": len(names),
            "views": list(args.views),
        }
        summary = evaluation.write_test(
            out,
            evaluation.score(probabilities, labels, len(names)),
            names,
            labels,
            probabilities,
            about,
            splits["train"][1] if "train" in splits else None,
        )
        low, high = summary["top1_bootstrap"]
        print(
            f"test         {summary['videos']} videos, {summary['unreadable']} unreadable, {args.views[0]} x {args.views[1]} views: top-1 {summary['top1']:.4f} "
            f"(95 % {low:.3f} to {high:.3f}), top-5 {summary['top5']:.4f}, mean class {summary['mean_class']:.4f}; majority class "
            f"{summary['majority']:.4f}\n{out / 'test.json'}, per_class.csv, confusion.png"
        )
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main)
