r"""Stage 4: fine-tuning. A pretrained encoder, or none, learns to classify videos; then a test over
several views of each.

Reads   manifests with labels (train, val, and optionally test), their videos, and a checkpoint:
        ours, VideoMAE's .pth, a Hugging Face VideoMAE folder, or none (from scratch)
Writes  runs/finetune/, or --out: checkpoint.pt (the latest weights) and best.pt (the best on
        --val), args.json, log.jsonl, curves.png (where matplotlib is installed); after testing
        per_class.csv, confusion.png and, last, test.json. --test-only writes these three alone, by
        default into the folder test beside the checkpoint

    # CPU, the toy world
    python finetune.py --checkpoint runs/text/checkpoint.pt --no-flip --epochs 10 \
        --warmup-epochs 1 --blr 4e-3
    # eight GPUs
    torchrun --nproc_per_node=8 finetune.py --checkpoint runs/text/checkpoint.pt --accum 3
    # test again, with other views
    python finetune.py --checkpoint runs/finetune/best.pt --test-only --views 2 3

Recipes for the paper's data sets, after VideoMAE's scripts, are in docs/datasets.md; what differs
from VideoMAE's fine-tuning, such as RandAugment's operations, is in docs/method.md.

Training clips are cropped at random, half of them mirrored (give --no-flip where direction is the
label), and changed by RandAugment and random erasing, with the same operations and boxes in every
frame (tgm/augment.py). Batches are mixed by mixup or cutmix, each clip with one of another video
(with --batch-size 1, of the same video). An epoch is one pass over the videos; --repeat R takes R
samples of each decoded clip.

The learning rate is scaled as in VideoMAE's run_class_finetuning.py: lr = blr x videos / 256, where
videos = batch size x accum x ranks, without the repeats. It ends at min-blr x videos / 256. All
this holds for the head; the rate of each layer is that of the next layer towards the head times
--layer-decay, so that the layers near the input learn most slowly.

After every epoch the model is validated on --val, with one view per video, its middle. At the end
it is tested on --test (by default --val), with several (--views CLIPS CROPS), whose softmax is
averaged. Where --test is --val, best.pt was selected on the same videos; the last epoch (--use
last, the default) was not. Every test video is counted once, whatever the number of ranks, and one
that cannot be read counts as wrong. In both, --batch-size counts views, not videos. If clearly more
than --max-bad of a manifest's files are missing (256 of them are looked for), nothing is begun.

Signals. After SIGTERM or Ctrl-C training saves at the end of the step and ends. Validation and
testing end at once, because the weights are saved already. The exit code is that of the signal (143
or 130).

Resuming. Run the same command again, with all its flags and --resume auto. Keep --checkpoint among
them; its file is not read any more. Other flags and data are refused, but for these:
  --device, --workers, --amp, --test, --views, --use and a few more (MAY_CHANGE, here and in
      tgm/resume.py, names all)
  --epochs, upwards
  --batch-size, --accum and the number of ranks, if their product stays the same. Each step then
      still sees the same videos. But random choices are made per rank and accumulated batch: if one
      of the three changes, other clips are mixed, and dropout and drop path drop other things. If
      the weights must be those of an uninterrupted run, to rounding, begin the run with --mixup 0
      --cutmix 0 --drop-path 0 --head-dropout 0: these cannot be changed later.

Shapes: B batch, R repeats, T frames, H W pixels, C classes.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as models
from tgm import checkpoints, checks, evaluation, flags, resume
from tgm.arrays import hold
from tgm.augment import Augmentation, make_mix
from tgm.labels import (
    class_names,
    labels_hash,
    number_labels,
    read_labelled,
    trained_classes,
)
from tgm.loading import batches_from, make_clip_loader
from tgm.manifest import shared_rows
from tgm.run import StopSignal, launch, make_folder, one_line_errors, wait_for_ranks, writing
from tgm.sampling import TrainingClips, Views, clip_times, seed_from, uniform_times
from tgm.training import Machine, Schedule, TrainingLog
from tgm.video import TIMEOUT, VideoReader

# What may differ when a run goes on, besides resume.MAY_CHANGE: amp changes rounding; test, views
# and use concern the test alone; the classes follow from the labels. accum, batch_size and ranks
# may each change as long as their product stays the same: `fine_tune` puts the product into
# args.identity, with hashes of the manifests, and resume.py refuses another identity.
MAY_CHANGE = resume.MAY_CHANGE | {"accum", "amp", "test", "views", "use", "classes"}


# ---- training ------------------------------------------------------------------------------------


def train(state, loader, val, schedule, machine, stop, args):
    """Trains to the last step, or until a signal ends the run; validates after every epoch.

    state: a TrainingState with the step, the best top-1 accuracy on --val and the last validated
    step; in the end its model has the last weights. loader: of Clips; val: (videos, labels) of
    --val; stop: a StopSignal"""
    model = state.model
    optimizer = state.optimizer
    scaler = state.scaler
    wrapped = machine.wrap(model)
    mix = make_mix(args.mixup, args.cutmix, len(args.classes))
    largest_norm = args.clip_grad if args.clip_grad > 0 else math.inf  # inf: only measured
    min_lr = args.min_blr * schedule.videos_per_step / 256
    out = Path(args.out)
    checkpoint = out / "checkpoint.pt"
    videos = loader.dataset.videos
    log = TrainingLog(out, videos, args.max_bad, schedule, machine, state.step)
    if schedule.ends_epoch(state.step) and state.validated != state.step:
        # The run before this one saved the end of an epoch, and ended before it had validated it.
        # (In a new run state.step and state.validated are both 0.)
        validate(state, val, log, machine, args)
    stop.save_on_signal()  # from here on a signal waits for `requested`, below

    batches = batches_from(state.step, loader, schedule)
    for step in range(state.step + 1, schedule.last_step + 1):
        lr = learning_rate(step - 1, args.lr, schedule.warmup_steps, schedule.total_steps, min_lr)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * lr
        losses = []
        for part in range(args.accum):
            batch = log.fetch(batches)
            clips = repeats_first(batch["clip"].to(machine.device, non_blocking=True))
            labels = repeats_first(batch["label"].to(machine.device, non_blocking=True))
            # so that mixing, dropout and drop path are the same in a resumed run
            torch.manual_seed(seed_from(args.seed, step, machine.rank, part))
            clips, targets = mix(models.normalize(clips), labels)  # [R*B, 3, T, H, W], [R*B, C]
            # only the last part's backward pass averages the gradients over the ranks
            with machine.accumulate(wrapped, is_last=part == args.accum - 1):
                with machine.autocast:
                    logits = wrapped(clips)  # [R*B, C], float32
                loss = F.cross_entropy(logits, targets, label_smoothing=args.smoothing)
                scaler.scale(loss / args.accum).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        log.add(norm, loss=torch.stack(losses).mean())
        state.step = step
        stopped = stop.requested()
        saves = stopped or schedule.saves(step, args.save_every)
        if saves or step % args.log_every == 0:
            log.write_step(step, lr)  # ends the run if the loss is not finite, before it is saved
        if saves and machine.rank == 0:
            state.save(checkpoint, vars(args))
        if stopped:
            machine.say(f"{stop.name}: saved {checkpoint} at step {step}; --resume auto goes on")
            machine.leave()
            stop.end()  # does not return
        if schedule.ends_epoch(step):
            stop.end_on_signal("--resume auto goes on from this epoch's end")
            validate(state, val, log, machine, args)
            stop.save_on_signal()


def validate(state, val, log, machine, args):
    """Tests the model with one view per video and saves it; as best.pt, too, if it is the best."""
    videos, labels = val
    probabilities = predict(state.model, videos, (1, 1), machine, args)
    result = evaluation.score(probabilities, labels, len(args.classes))
    log.write(
        step=state.step,
        epoch=log.schedule.epoch(state.step),
        val_top1=result["top1"],
        val_top5=result["top5"],
        val_mean_class=result["mean_class"],
    )
    names = ["checkpoint.pt"]
    if result["top1"] > state.best:
        state.best = result["top1"]
        # best.pt first. After a kill in between, checkpoint.pt still says that these weights were
        # not validated: the resumed run validates again and saves both.
        names = ["best.pt", "checkpoint.pt"]
    state.validated = state.step
    if machine.rank == 0:
        for name in names:
            state.save(Path(args.out) / name, vars(args))
        log.draw(state.step)


def predict(model, videos, views, machine, args):
    """The mean softmax over each video's views, clips x crops: [videos, C], the same on every
    rank."""
    num_clips, num_crops = views
    test_views = Views(
        videos,
        frames=args.frames,
        image_size=args.image_size,
        stride=args.stride,
        clips=num_clips,
        crops=num_crops,
        sampling=args.sampling,
        timeout=args.video_timeout,
    )
    return evaluation.predict(
        model,
        test_views,
        classes=len(args.classes),
        device=machine.device,
        autocast=machine.autocast,
        batch_size=args.batch_size,
        workers=args.workers,
        rank=machine.rank,
        ranks=machine.ranks,
    )


def repeats_first(x):
    """[B, R, ...] -> [R * B, ...]: the first sample of every video, then the second sample of every
    video, so that neighbours are of different videos."""
    return x.transpose(0, 1).flatten(0, 1)


def learning_rate(steps_done, lr, warmup, total, floor):
    """The learning rate of the step that follows `steps_done` steps: a linear warm-up, then half a
    cosine down to `floor` (never above lr). warmup, in steps, may be a fraction."""
    if steps_done < warmup:
        return min(lr, lr * (steps_done + 1) / warmup)
    floor = min(floor, lr)
    angle = math.pi * (steps_done - warmup) / max(1, total - warmup)
    return floor + (lr - floor) * 0.5 * (1 + math.cos(angle))


def layer_of(name, depth):
    """0 for the patch embedding, i + 1 for block i, depth + 1 for what follows the blocks."""
    if name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def make_optimizer(model, lr, layer_decay, weight_decay):
    """AdamW with one learning rate per layer: the head's is lr, and each layer below has that of
    the one above times layer_decay (ELECTRA; BEiT, arXiv 2106.08254). Groups hold "layer" and
    "scale"; biases and norms do not decay."""
    depth = model.config["depth"]
    groups = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name, depth)
        decays = parameter.ndim > 1
        if (layer, decays) not in groups:
            scale = layer_decay ** (depth + 1 - layer)
            groups[layer, decays] = {
                "params": [],
                "layer": layer,
                "scale": scale,
                "lr": lr * scale,
                "weight_decay": weight_decay if decays else 0.0,
            }
        groups[layer, decays]["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups)]
    return torch.optim.AdamW(ordered, lr=lr, betas=(0.9, 0.999), fused=True)


def layer_table(optimizer, depth, lr):
    """The highest learning rate of each layer as text, a line per layer. lr: the head's."""
    names = ["patch embedding", *(f"block {i}" for i in range(depth)), "norm and head"]
    rates = {}
    counts = dict.fromkeys(range(depth + 2), 0)
    for group in optimizer.param_groups:
        # not group["lr"], which in a resumed run is that of the last step
        rates[group["layer"]] = group["scale"] * lr
        counts[group["layer"]] += sum(parameter.numel() for parameter in group["params"])
    lines = []
    for layer, name in enumerate(names):
        lines.append(f"  {name:16} lr {rates[layer]:<9.3g} {counts[layer] / 1e6:8.3f} M")
    return "\n".join(lines)


# ---- samples -------------------------------------------------------------------------------------


class Clips(TrainingClips):
    """Training samples by (epoch, row): {"clip": uint8 [R, 3, T, H, W], "label": [R], "row"}.
    TrainingClips calls `sample`, takes another video for one that cannot be read, and adds
    "failed".

    labels: the class of each video; augment: an `Augmentation`; the other settings are the flags of
    these names (timeout: --video-timeout)."""

    def __init__(
        self,
        videos,
        labels,
        augment,
        frames,
        stride,
        sampling="dense",
        repeat=2,
        seed=0,
        timeout=TIMEOUT,
    ):
        super().__init__(videos, np.arange(len(videos)), seed)
        self.labels = labels
        self.augment = augment
        self.frames = frames
        self.stride = stride
        self.sampling = sampling
        self.repeat = repeat
        self.timeout = timeout

    def sample(self, epoch, row, rng):
        with VideoReader(self.videos[row].path, timeout=self.timeout) as reader:
            start, end = reader.span(self.videos[row])
            if self.sampling == "uniform":
                where = rng.random(self.frames)
                times = uniform_times(start, end, reader.fps, self.frames, where)
            else:
                where = rng.random()  # 0: the earliest possible clip, 1: the latest
                times = clip_times(start, end, reader.fps, self.frames, self.stride, where)
            frames = reader.read(times)  # uint8 [T, H, W, 3]
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T, 3, H, W]
        samples = []
        for repeat in range(self.repeat):
            samples.append(self.augment(frames, seed_from(self.seed, epoch, row, repeat)))
        return {
            "clip": torch.stack(samples),
            "label": torch.full((self.repeat,), self.labels[row]),
            "row": row,
        }


def make_clips(videos, labels, args):
    """The training samples that the flags describe. labels: LongTensor [videos]."""
    augment = Augmentation(
        args.image_size, args.flip, args.crop_scale, args.rand_augment, args.erase
    )
    return Clips(
        videos,
        labels.tolist(),
        augment,
        args.frames,
        args.stride,
        sampling=args.sampling,
        repeat=args.repeat,
        seed=args.seed,
        timeout=args.video_timeout,
    )


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = flags.Parser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="data/train.csv", help="training manifest")
    data.add_argument(
        "--val", default="data/val.csv", help="manifest for the validation after every epoch"
    )
    data.add_argument("--test", help="manifest of the final test (default: --val)")
    data.add_argument(
        "--label-column",
        help="column that holds the label (default: label; with --test-only the checkpoint's)",
    )
    flags.add_video_flags(data)
    flags.add_clip_flags(data, repeat=2, origin="checkpoint's, else the --size")
    data.add_argument(
        "--sampling",
        choices=("dense", "uniform"),
        help="dense: frames --stride apart; uniform: one frame from each of --frames equal parts "
        "(default: as in the checkpoint of a fine-tuning, else dense)",
    )
    flags.add_augmentation_flags(parser.add_argument_group("augmentation"))
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint", default="none", help="file or folder to start from; none: from scratch"
    )
    model.add_argument(
        "--size",
        choices=tuple(models.SIZES),
        help="of the model (default: the checkpoint's, or base where it does not say)",
    )
    model.add_argument(
        "--drop-path",
        type=flags.fraction,
        default=0.1,
        help="probability of dropping a residual branch in the last block; it grows linearly from "
        "0 in the first",
    )
    model.add_argument(
        "--head-dropout", type=flags.fraction, default=0.0, help="dropout before the classifier"
    )
    optim = parser.add_argument_group("optimisation")
    flags.add_optimizer_flags(
        optim, batch_size=16, epochs=75, warmup_epochs=5, blr=5e-4, clip_grad=0.0
    )
    optim.add_argument(
        "--min-blr",
        type=flags.not_negative,
        default=1e-6,
        help="where the learning rate ends, for 256 videos per step as --blr",
    )
    optim.add_argument(
        "--layer-decay",
        type=flags.ratio,
        default=0.75,
        help="factor on the learning rate of each layer towards the input; 1: none",
    )
    test = parser.add_argument_group("testing")
    test.add_argument(
        "--views",
        type=flags.positive_int,
        nargs=2,
        default=(5, 3),
        metavar=("CLIPS", "CROPS"),
        help="clips per test video, and crops per clip",
    )
    test.add_argument(
        "--use", choices=("last", "best"), default="last", help="the epoch tested at the end"
    )
    test.add_argument("--test-only", action="store_true", help="test --checkpoint as it is")
    run = parser.add_argument_group("run")
    flags.add_training_flags(run)
    run.add_argument(
        "--out",
        help="folder of the run (default: runs/finetune; --test-only: the folder test beside "
        "--checkpoint)",
    )
    args = parser.parse_args(argv)
    low, high = args.crop_scale
    if low > high:
        parser.error(f"argument --crop-scale: expected MIN before MAX, found {low:g} {high:g}")
    if args.test_only and args.checkpoint == "none":
        parser.error("--test-only tests the classifier of a --checkpoint: give its file or folder")
    if args.out is None:
        args.out = "runs/finetune"
        if args.test_only:
            args.out = str(Path(args.checkpoint).parent / "test")
    args.stage = "finetune.py"
    return args


# ---- the run -------------------------------------------------------------------------------------


def open_splits(args, machine):
    """-> {"train", "val", "test": (videos, labels)}; "test" alone with --test-only. Sets
    args.classes, the classes' names, and args.label_column where its flag was not given."""
    manifests = {"train": args.data, "val": args.val, "test": args.test or args.val}
    args.classes = None
    if args.test_only:
        manifests = {"test": manifests["test"]}
        saved = checkpoints.saved_args(args.checkpoint)
        args.label_column = args.label_column or saved.get("label_column")
    args.label_column = args.label_column or "label"
    splits = {}
    for split, manifest in manifests.items():
        if split == "test" and manifest == manifests.get("val"):
            splits["test"] = splits["val"]
            continue
        videos = read_labelled(manifest, args.root, args.label_column)
        checks.refuse_missing(manifest, videos, range(len(videos)), args.root, args.max_bad)
        if args.test_only:
            args.classes = trained_classes(args.checkpoint, saved, videos, machine.say)
        elif args.classes is None:
            args.classes = class_names(manifest, videos)
        splits[split] = videos, number_labels(manifest, videos, args.classes, machine.say)
    if args.test_only:
        return splits
    # one note is enough where --test is --val
    held_out = ("test",) if splits["val"] is splits["test"] else ("val", "test")
    for split in held_out:
        seen = shared_rows(splits["train"][0], splits[split][0])
        if seen > 0:
            machine.say(
                f"note: {seen} of {len(splits[split][0])} {split} videos are training videos, too: "
                "the accuracy will be too high"
            )
    return splits


def make_model(args, machine):
    """The classifier, on its device. Where the flags leave args.size, frames, image_size, stride
    and sampling open, fills them from the checkpoint. If a run goes on, that is checkpoint.pt in
    --out, not --checkpoint, and `make_state` loads its weights later."""
    latest = Path(args.out) / "checkpoint.pt"
    goes_on = args.resume == "auto" and latest.exists() and not args.test_only
    saved = checkpoints.saved_args(latest if goes_on else args.checkpoint)
    args.size = args.size or saved.get("size", "base")
    frames = args.frames or saved.get("frames")
    image_size = args.image_size or saved.get("image_size")
    checks.refuse_gigabytes(args.size, args.batch_size, args.repeat, frames, image_size)
    torch.manual_seed(args.seed)
    model = models.VideoViT(
        args.size, len(args.classes), frames, image_size, args.drop_path, args.head_dropout
    )
    args.frames = model.config["frames"]
    args.image_size = model.config["image_size"]
    args.stride = args.stride or saved.get("stride", model.config["stride"])
    args.sampling = args.sampling or saved.get("sampling", "dense")
    weights = "from scratch"
    if goes_on:
        weights = f"{latest}, where the run goes on"
    elif args.checkpoint != "none":
        notes = checkpoints.load_pretrained(model, args.checkpoint, new_head=not args.test_only)
        weights = f"{args.checkpoint}: {checkpoints.summary_of(notes)}"
    model.set_checkpointing(args.checkpointing)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    machine.say(f"device       {machine.about}")
    machine.say(
        f"model        {args.size}, {millions:.1f} M parameters, {args.frames} frames of "
        f"{args.image_size} pixels, {len(args.classes)} classes"
    )
    machine.say(f"weights      {weights}")
    return model.to(machine.device)


def make_state(args, model, machine):
    """The model and its optimizer, as they are trained: from the checkpoint in --out where the run
    goes on."""
    saved = resume.find_run(Path(args.out), args.resume, vars(args), MAY_CHANGE)
    optimizer = make_optimizer(model, args.lr, args.layer_decay, args.weight_decay)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp == "fp16")
    # validated: the last step whose weights --val has seen
    state = resume.TrainingState(model, optimizer, scaler, step=0, best=-1.0, validated=0)
    if saved is not None:
        state.restore(saved)
    return state


def fine_tune(args, model, splits, machine, stop):
    """Prepares or resumes the training of the model, and trains it -> the checkpoint to be
    tested."""
    videos, labels = splits["train"]
    args.ranks = machine.ranks
    checks.refuse_few(args.data, len(videos), args.batch_size, args.accum, args.ranks)
    schedule = Schedule(
        videos=len(videos),
        batch_size=args.batch_size,
        repeat=args.repeat,
        accum=args.accum,
        ranks=args.ranks,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        max_steps=args.max_steps,
    )
    args.lr = args.blr * schedule.videos_per_step / 256
    args.identity = {
        args.data: labels_hash(videos),
        args.val: labels_hash(splits["val"][0]),
        "batch size x accum x ranks": schedule.videos_per_step,
    }

    out = Path(args.out)
    state = make_state(args, model, machine)
    resume.refuse_unequal_ranks(state.step, vars(args))
    machine.say(
        f"data         {args.data}: {len(videos)} videos; {args.val}: {len(splits['val'][0])}"
    )
    machine.say(schedule.about(args.blr, args.min_blr, state.step, state.begun_for))
    machine.say(layer_table(state.optimizer, model.config["depth"], args.lr))
    steps = schedule.last_step - state.step
    if not machine.on_gpu and args.size != "tiny" and steps > 0:
        multiply_adds, _ = models.count_flops(model, model.num_tokens)  # the encoder's
        samples = schedule.samples_per_step // args.ranks
        machine.say(checks.note_on_cpu(args.size, multiply_adds, samples, steps))
    if machine.rank == 0:
        resume.take_folder(out, args.resume, vars(args), state.step)
        if state.step < schedule.last_step:
            with writing(out / "test.json"):
                (out / "test.json").unlink(missing_ok=True)  # of other weights
    loader = make_clip_loader(make_clips(videos, labels, args), schedule, machine, args.workers)
    if args.compile:
        model.compile()  # in place: the checkpoint's keys stay as they are
    train(state, loader, splits["val"], schedule, machine, stop, args)

    if args.use == "last":
        return out / "checkpoint.pt"
    wait_for_ranks()  # until rank 0 has written best.pt
    with checks.as_run_error():  # ends in one line if best.pt cannot be loaded
        checkpoints.load_pretrained(model, out / "best.pt")
    return out / "best.pt"


def test(args, model, splits, checkpoint, machine):
    """Tests the model, whose weights are those of `checkpoint`, over several views per video."""
    videos, labels = splits["test"]
    out = Path(args.out)
    classes = len(args.classes)
    probabilities = predict(model, videos, args.views, machine, args)
    if machine.rank > 0:
        return
    clips, crops = args.views
    about = {
        "checkpoint": str(checkpoint),
        "test": args.test or args.val,
        "label": args.label_column,
        "classes": classes,
        "views": [clips, crops],
    }
    # for the accuracy of always answering the most frequent class
    train_labels = splits["train"][1] if "train" in splits else None
    result = evaluation.score(probabilities, labels, classes)
    summary = evaluation.write_test(
        out, result, args.classes, labels, probabilities, about, train_labels
    )
    low, high = summary["top1_bootstrap"]
    print(
        f"test         {summary['videos']} videos, {summary['unreadable']} unreadable, {clips} x "
        f"{crops} views: top-1 {summary['top1']:.4f} (95 % {low:.3f} to {high:.3f}), top-5 "
        f"{summary['top5']:.4f}, mean class {summary['mean_class']:.4f}; majority class "
        f"{summary['majority']:.4f}\n{out / 'test.json'}, per_class.csv, confusion.png"
    )


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    machine = Machine(args.device, args.amp)
    args.amp = machine.amp
    with checks.as_run_error():
        splits = open_splits(args, machine)
        model = make_model(args, machine)
    machine.join()
    stop = StopSignal(machine.ranks)
    # After end_on_signal a signal ends the run at once, with the given remark if there is one:
    # nothing would be lost now, in a validation or in the test. After save_on_signal, in `train`,
    # it is noted, and `stop.requested()` tells after the step.
    stop.end_on_signal()
    if args.test_only:
        if machine.rank == 0:
            make_folder(args.out)
            # Keeps other runs from the folder. The lock has the name of checkpoint.pt, as in
            # training; no checkpoint.pt is made.
            hold(Path(args.out) / "checkpoint.pt")
        checkpoint = args.checkpoint
        stop.end_on_signal("run it again")
    else:
        checkpoint = fine_tune(args, model, splits, machine, stop)
        stop.end_on_signal("--resume auto tests again")
    test(args, model, splits, checkpoint, machine)
    machine.leave()


if __name__ == "__main__":
    launch(main)
