"""Stage 4: linear, nearest-neighbour and attentive probes of the frozen features of an encoder.

videos -> views -> features -> choose a setting -> train -> test

Reads   a training and a test manifest with labels, and their videos
        a checkpoint: ours, VideoMAE's .pth, a Hugging Face folder, or none for an untrained encoder
        beside a test manifest val.csv, if they exist, val.classes.npy (saliency.py --cue
        classes --data val.csv) and val.text.npy (caption.py --data val.csv, then saliency.py)
Writes  (OUT: --out; by default probe/ next to the checkpoint, or runs/untrained/probe)
        OUT/LABEL.json, the result and its settings. LABEL is --label-column; with --protocol
        videomae the name is LABEL.videomae.json. An earlier result of that name is replaced, even
        one of other flags or of another checkpoint (another --out keeps both).
        OUT/{train,test}.features.npy, float32 [N, D], or [N, A, D] of augmented training videos
        OUT/{train,test}.tokens.npy, float16 [N, V*M, D], with --attentive
        next to each array a .json of what it was made with; if that changes, it is made again

    # CPU, the demo's encoder on the toy world: 20 seconds
    python linprobe.py --checkpoint runs/demo/text/checkpoint.pt --data data/probe.csv
    # the baseline: an untrained encoder (with the checkpoint's --frames, --stride and --image-size,
    # if they differ from the defaults of --size)
    python linprobe.py --checkpoint none --size tiny --data data/probe.csv
    # eight GPUs extract the features; one trains the probes
    torchrun --nproc_per_node=8 linprobe.py --checkpoint vit_b.pth --data train.csv --test val.csv
    # VideoMAE's setting, on augmented clips
    python linprobe.py --checkpoint vit_b.pth --protocol videomae --augment 8

Features (tgm/features.py). A video is seen in V unmasked views: --clips clips, spread evenly over
it, times --crops squares along the frame's long side. The feature of a view is the mean of the
encoder's tokens after its final norm. The linear probe and kNN see the mean of the views' features;
the attentive probe sees the tokens of all views. (finetune.py instead averages the answers of the
classifier.) With --augment A a training video has A random views: a random clip, a multi-scale
crop, and half of them mirrored. Each epoch of the linear probe draws one of them.

Features are extracted once. A second run, for another --label-column or after a kill, reads only
the videos whose features are missing. What makes features again, if it changes (another --out keeps
both):
  all features        the encoder (without a checkpoint, --seed makes it); --frames, --stride,
                      --image-size, --sampling
  the training set's  --augment; with --augment, --flip and --seed, too
  all clean views     --clips, --crops, --token-grid; adding --attentive

Choosing a setting. A tenth of the *training* set is held out to choose the learning rate, the
decay and the number of neighbours. The test set has no part in it. Of equally good settings the
first in the list is taken. Where there is one setting alone, nothing is held out.

Probes.
  linear     One linear layer on features that are standardised with the mean and deviation of the
             training set. SGD with momentum 0.9, cosine.
             --protocol sweep, the default, tries 7 learning rates x 3 weight decays: 50 epochs,
             batch 256, no warm-up. (Fewer than 256 videos are one batch, and each rate is
             multiplied by batch / 256.) The 21 layers are trained side by side, as columns of one
             matrix. Then the best is trained again, on the whole training set.
             --protocol videomae is VideoMAE's one published setting, made for augmented clips
             (--augment): learning rate 0.1 x batch / 256, no weight decay, batch 1024 (or the
             training set, if it is smaller), 100 epochs of which 10 warm up.
  knn        The k nearest neighbours vote, each with weight exp(cosine / 0.07) (Wu et al. 2018,
             arXiv 1805.01978). Random views are averaged.
  attentive  One learned query attends to the layer-normed tokens, with as many heads as the
             encoder has; then one linear layer (tgm/attentive.py). This is V-JEPA's probe (arXiv
             2404.08471) without its MLP block. AdamW with weight decay 0.01, cosine, batch 64, 20
             epochs, or on a small training set as many as make 3,000 steps. The learning rate is
             chosen with the first seed. The views are always the clean ones. Each view's tokens are
             average-pooled to --token-grid, M of them. On disk that takes 2 V M D bytes per video:
             by default 0.4 MB for a base model, so 95 GB for Kinetics-400.

The contrastive head (tgm/textprobe.py). If captions were used in the checkpoint's pretraining, two
more things are asked of the test videos. A video's embedding is its feature, projected by the head.
  zero-shot  Is the name of its class the most similar of those in val.classes.npy, which holds a
             text embedding per class? Top-1 and top-5 of --label-column, without training.
  retrieval  Is a caption of its own (val.text.npy) among the 1, 5, 10 that are most similar to the
             video, and the reverse? Recall, chance, and the median rank of the first right answer.

Uncertainty. There are --seeds repetitions, each with its own held-out split, order of videos, drawn
views and initial weights. (The attentive probe keeps the setting of the first seed. In kNN only the
split is random, which can change k and nothing else.) The table shows the mean accuracy and two
95 % intervals: over seeds (Student's t) and over test videos (bootstrap, which takes videos to be
independent). Both are for one fixed encoder: they do not say how much the result would change with
another pretraining run, or another untrained encoder.

Missing videos. A video that cannot be read, or whose features are not finite, is left out of
training, and counts as wrong in the test set. So does a test video whose class has no training
video.

Signals. After SIGTERM or Ctrl-C an extraction stops after the current batch, and the probes stop at
once. The next run uses the features that are there.

Shapes: N videos, N' test videos, V views, A random views, M tokens of a view after pooling, D
width, C classes, L settings, S seeds, B batch, K neighbours."""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as models
from tgm.arrays import hold, written_aside
from tgm.attentive import attentive
from tgm.checks import as_run_error
from tgm.evaluation import bootstrap, t_interval
from tgm.features import (
    TokenRows,
    extract_all,
    filled_rows,
    load_encoder,
    plan_extractions,
    weights_identity,
)
from tgm.flags import (
    Parser,
    add_machine_flags,
    add_video_flags,
    frame_count,
    pixel_count,
    positive_int,
    seed_number,
    whole,
)
from tgm.labels import class_names, number_labels, read_labelled
from tgm.manifest import shared_rows
from tgm.offline import join_machine, leave_ranks
from tgm.run import (
    RunError,
    give_up_together,
    launch,
    make_folder,
    one_line_errors,
    union_over_ranks,
)
from tgm.textprobe import find_head, print_head, probe_head

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYS = (0.0, 1e-4, 1e-2)
PROTOCOLS = {
    "sweep": {
        "settings": [{"rate": rate, "decay": decay} for rate in RATES for decay in DECAYS],
        "training": {"epochs": 50, "warmup": 0, "batch": 256},
    },
    "videomae": {
        "settings": [{"rate": 0.1, "decay": 0.0}],
        "training": {"epochs": 100, "warmup": 10, "batch": 1024},
    },
}
ATTENTIVE = {
    "settings": [{"rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
    "training": {"epochs": 20, "least_steps": 3000, "batch": 64},
}


# ---- the probes ----------------------------------------------------------------------------------
# A probe is a function (train, labels, test, settings, seed) -> for each of the L settings the
# predicted classes of the test videos, [L, N']. train and test have a length and can be indexed by
# rows: tensors, or TokenRows. `probe_all` fixes the other arguments (classes, epochs, ...).


def linear(train, labels, test, settings, seed, *, classes, epochs, warmup=0, batch=256):
    """The linear probe. train [N, A, D], A = 1 without --augment; test [N', 1, D], or the held-out
    training videos of `choose`, [N', A, D], whose views are averaged here; settings: [{"rate":
    learning rate for batches of 256, "decay": weight decay, of biases, too}, ...]."""
    mean = train.mean((0, 1))
    deviation = (train.var((0, 1), unbiased=False) + 1e-6).sqrt()
    train = (train - mean) / deviation
    test = (test.mean(1) - mean) / deviation  # [N', D]
    weight = fit_linear(
        train, labels, settings, seed, classes=classes, epochs=epochs, warmup=warmup, batch=batch
    )
    test = F.pad(test, (0, 1), value=1.0)  # [N', D+1]
    # [B, D+1] @ [L, D+1, C] -> [L, B, C]
    return torch.cat([(x @ weight).argmax(-1) for x in test.split(1024)], dim=1)  # [L, N']


def fit_linear(features, labels, settings, seed, *, classes, epochs, warmup=0, batch=256):
    """Trains one linear layer per setting, each as torch.optim.SGD with momentum 0.9 would.

    features: [N, A, D], of which every epoch draws one of the A views. Returns weights [L, D+1, C],
    the last row being the bias. All layers stand side by side in one matrix [D+1, L*C]: columns 0
    to C - 1 are the first setting's, the next C the second's. So a step needs two matrix products,
    for the logits and for the gradient."""
    count, views, width = features.shape
    device = features.device
    generator = torch.Generator().manual_seed(seed)
    weight = 0.01 * torch.randn(width, classes, generator=generator)
    weight = F.pad(weight, (0, 0, 0, 1))  # [D+1, C], the bias 0
    weight = weight.repeat(1, len(settings)).to(device)  # [D+1, L*C]
    velocity = torch.zeros_like(weight)
    # Rates are given for batches of 256 and grow with the batch. A training set smaller than
    # `batch` is one batch, so that its rates are smaller.
    scale = min(batch, count) / 256
    rate = torch.tensor([setting["rate"] * scale for setting in settings], device=device)
    rate = rate.repeat_interleave(classes)  # [L*C]
    decay = torch.tensor([setting["decay"] for setting in settings], device=device)
    decay = decay.repeat_interleave(classes)  # [L*C]
    one_hot = torch.eye(classes, device=device)[:, None]  # [C, 1, C]
    steps = math.ceil(count / batch)
    for epoch in range(epochs):
        view = torch.randint(views, (count,), generator=generator).to(device)
        order = torch.randperm(count, generator=generator).to(device)
        for step, index in enumerate(order.split(batch)):
            x = F.pad(features[index, view[index]], (0, 1), value=1.0)  # [B, D+1]
            logits = (x @ weight).unflatten(1, (-1, classes))  # [B, L, C]
            # the cross-entropy's gradient by the logits: softmax - target
            error = (logits.softmax(-1) - one_hot[labels[index]]).flatten(1)  # [B, L*C]
            # A step of SGD, in place, as copies of [D+1, L*C] would cost time:
            #     velocity = 0.9 * velocity + gradient + decay * weight
            #     weight = weight - factor * rate * velocity
            velocity.addmm_(x.T, error, beta=0.9, alpha=1 / len(x))  # gradient: x.T @ error / B
            velocity.addcmul_(weight, decay)
            factor = schedule(epoch + step / steps, epochs, warmup)
            weight.addcmul_(velocity, rate, value=-factor)
    return weight.unflatten(1, (-1, classes)).transpose(0, 1)


def schedule(epoch, epochs, warmup=0):
    """The factor on the learning rate at a fractional epoch: linear warm-up, then half a cosine."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def knn(train, labels, test, settings, seed, *, classes, temperature=0.07):
    """The nearest-neighbour probe. train, test: as in `linear`, all views averaged; settings:
    [{"k": neighbours, or all if there are fewer}, ...]. `seed` is not used: nothing is random."""
    train = F.normalize(train.mean(1), dim=1)
    test = F.normalize(test.mean(1), dim=1)
    most = min(max(setting["k"] for setting in settings), len(train))
    nearest = [(chunk @ train.T).topk(most, dim=1) for chunk in test.split(256)]
    similarity = torch.cat([found.values for found in nearest])  # [N', K], the nearest first
    label = labels[torch.cat([found.indices for found in nearest])]
    # - 1 keeps the weights at most 1; it multiplies all of them by the same number
    weight = ((similarity - 1) / temperature).exp()
    predicted = []
    for setting in settings:
        k = setting["k"]
        votes = test.new_zeros(len(test), classes)
        votes.scatter_add_(1, label[:, :k], weight[:, :k])
        predicted.append(votes.argmax(1))
    return torch.stack(predicted)


# ---- from features to a table --------------------------------------------------------------------


def choose(probe, train, labels, settings, seed):
    """The setting that is most accurate on a random tenth (at least one) of the training set when
    it is trained on the rest."""
    if len(settings) == 1:
        return settings[0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    tenth = max(1, len(train) // 10)
    held = order[:tenth]
    kept = order[tenth:]
    guess = probe(train[kept], labels[kept], train[held], settings, seed)  # [L, N / 10]
    accuracy = (guess == labels[held]).float().mean(1)
    return settings[int(accuracy.argmax())]


def repeat(name, probe, settings, train, test, *, labels, truth, seeds, choose_once=False):
    """Chooses a setting, trains and tests with each seed -> the probe's entries of the result.

    labels [N], truth [N']: the classes; -1 in truth where no answer can be right. choose_once: all
    seeds use the first seed's setting, for a probe that takes long to train."""
    correct = []
    chosen = []
    for seed in seeds:
        if choose_once and chosen:
            setting = chosen[0]
        else:
            setting = choose(probe, train, labels, settings, seed)
        chosen.append(setting)
        predicted = probe(train, labels, test, [setting], seed)[0]  # [N']
        correct.append((predicted == truth).double().cpu().numpy())
    correct = np.stack(correct)  # [S, N']
    seed_accuracy = correct.mean(1).tolist()
    video_accuracy = correct.mean(0)
    return {
        name: float(video_accuracy.mean()),
        f"{name}_seeds": seed_accuracy,
        f"{name}_interval": t_interval(seed_accuracy),
        f"{name}_bootstrap": bootstrap(video_accuracy, seed=seeds[0]),
        f"{name}_chosen": chosen,
    }


def refuse_unreadable(manifest, videos, readable, least):
    """RunError if fewer than `least` of a manifest's videos could be read."""
    count = int(readable.sum())
    if count >= least:
        return
    word = "video" if count == 1 else "videos"
    reason = ""
    if count == 0:
        reason = (
            f": the reasons are above (paths start at {videos.folder}; --root names another folder)"
        )
    raise RunError(f"{manifest}: found {count} readable {word}, expected {least} or more{reason}")


def probe_all(videos, arrays, heads, args):
    """Trains and tests every probe on the features -> the result."""
    readable = {split: filled_rows(arrays[split]) for split in arrays}
    refuse_unreadable(args.data, videos["train"], readable["train"], least=2)
    refuse_unreadable(args.test, videos["test"], readable["test"], least=1)
    rows = torch.from_numpy(readable["train"].nonzero()[0])
    train_videos = [videos["train"][row] for row in rows.tolist()]
    # Sorted as text, not by `class_names`, which sorts numbers by their value: in another order
    # each class would get other initial weights, and published results would change a little.
    names = sorted({video.label for video in train_videos})
    if len(names) == 1:
        raise RunError(f"{args.data}: all of its readable videos are of class {names[0]!r}")
    labels = number_labels(args.data, train_videos, names).to(args.device)
    truth = number_labels(args.test, videos["test"], names)
    truth = truth.where(torch.from_numpy(readable["test"]), -1).to(args.device)
    result = {
        "label": args.label_column,
        "checkpoint": args.checkpoint,
        "protocol": args.protocol,
        "seed": args.seed,
        "classes": len(names),
        "train": len(rows),
        "test": len(truth),
        "unreadable": int((~readable["train"]).sum() + (~readable["test"]).sum()),
    }
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    result["majority"] = (truth == labels.mode().values).float().mean().item()
    seeds = range(args.seed, args.seed + args.seeds)
    measure = partial(repeat, labels=labels, truth=truth, seeds=seeds)

    train = torch.from_numpy(arrays["train"]["features"]).to(args.device)[rows]
    train = train.reshape(len(rows), -1, train.shape[-1])  # [N, 1 or A, D]
    test = torch.from_numpy(arrays["test"]["features"]).to(args.device)
    # NaN is a video that could not be read: its class is -1, so that no answer is right
    test = test.nan_to_num(0.0)[:, None]  # [N', 1, D]
    protocol = PROTOCOLS[args.protocol]
    training = protocol["training"]
    if args.epochs is not None:
        training = training | {"epochs": args.epochs}
    if training["epochs"] <= training["warmup"]:
        print(
            f"note: --epochs {args.epochs}: the linear probe of --protocol {args.protocol} warms "
            f"up for {training['warmup']} epochs, and will not reach its learning rate"
        )
    linear_probe = partial(linear, classes=len(names), **training)
    result |= measure("linear", linear_probe, protocol["settings"], train, test)

    knn_probe = partial(knn, classes=len(names))
    result |= measure("knn", knn_probe, [{"k": k} for k in args.k], train, test)

    if args.attentive:
        train_tokens = TokenRows(arrays["train"]["tokens"], rows)
        test_tokens = TokenRows(arrays["test"]["tokens"], torch.arange(len(truth)))
        training = ATTENTIVE["training"]
        if args.epochs is not None:
            training = training | {"epochs": args.epochs, "least_steps": 0}
        probe = partial(attentive, classes=len(names), heads=heads, **training)
        settings = ATTENTIVE["settings"]
        result |= measure("attentive", probe, settings, train_tokens, test_tokens, choose_once=True)
    return result


def print_table(result):
    """The accuracies of a result, one line per probe."""
    lines = [("probe", "accuracy", "95 %, seeds", "95 %, videos", "chosen")]
    for name in ("linear", "knn", "attentive"):
        if name not in result:
            continue
        chosen = []  # the distinct settings, in order
        for setting in result[f"{name}_chosen"]:
            words = " ".join(f"{key} {value:g}" for key, value in setting.items())
            if words not in chosen:
                chosen.append(words)
        seeds = interval_text(result[f"{name}_interval"])
        videos = interval_text(result[f"{name}_bootstrap"])
        lines.append((name, f"{result[name]:.3f}", seeds, videos, " | ".join(chosen)))
    majority = f"{result['majority']:.3f}"
    lines.append(("majority", majority, "", "", "the floor: the most frequent class"))
    for name, accuracy, seeds, videos, chosen in lines:
        print(f"{name:<12}{accuracy:<11}{seeds:<18}{videos:<18}{chosen}")


def interval_text(bounds):
    """Both ends of an interval. That over seeds may go below 0 or above 1."""
    if bounds is None:
        return "one seed"
    low, high = [f"{bound:.3f}" for bound in bounds]
    # Equal to three digits, as where all seeds agree. An interval of width 0 would look certain.
    if low == high:
        return f"always {low}"
    return f"{low} to {high}"


# ---- the command ---------------------------------------------------------------------------------


def read_videos(args, rank):
    """{"train": videos, "test": videos} of the two manifests."""
    with as_run_error():
        train = read_labelled(args.data, args.root, args.label_column)
        test = read_labelled(args.test, args.root, args.label_column)
        # Only to fail now, not after hours of extraction, if no test label is a training class.
        # `probe_all` asks again, for the videos that could be read.
        number_labels(args.test, test, class_names(args.data, train), say=lambda text: None)
    seen = shared_rows(train, test)
    if seen > 0 and rank == 0:
        print(
            f"note: {seen} of {len(test)} test videos are training videos, too: "
            "the accuracies will be too high"
        )
    return {"train": train, "test": test}


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="file or folder; none: an untrained encoder"
    )
    parser.add_argument(
        "--data",
        default="data/train.csv",
        help="training manifest; in the toy world take data/probe.csv",
    )
    parser.add_argument("--test", default="data/val.csv", help="test manifest")
    add_video_flags(parser)
    parser.add_argument(
        "--label-column", default="label", help="column of both manifests that holds the label"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder (default: probe/ next to the checkpoint, or runs/untrained/probe)",
    )

    clip = parser.add_argument_group("encoder and clips, by default as the checkpoint says")
    clip.add_argument(
        "--size", choices=tuple(models.SIZES), help="base if the checkpoint does not say"
    )
    clip.add_argument("--frames", type=frame_count, help="frames of a clip")
    clip.add_argument("--stride", type=positive_int, help="use every Nth video frame")
    clip.add_argument("--image-size", type=pixel_count, help="pixels")

    views = parser.add_argument_group("views")
    views.add_argument(
        "--sampling",
        choices=("dense", "uniform"),
        default="dense",
        help="dense: frames --stride apart; uniform: one frame from each of --frames equal parts, "
        "for SSv2",
    )
    views.add_argument("--clips", type=whole(1, 100), default=2, help="clips per video")
    views.add_argument(
        "--crops",
        type=whole(1, 100),
        default=1,
        help="squares along a frame's long side; 1: its middle",
    )
    views.add_argument(
        "--augment",
        type=whole(0, 100),
        default=0,
        metavar="A",
        help="train on A random views per video, not on --clips x --crops of them (not the "
        "attentive probe)",
    )
    views.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the random views; --no-flip where the label is a direction",
    )

    probe = parser.add_argument_group("probes")
    probe.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="sweep",
        help="how the linear probe is trained, see above",
    )
    probe.add_argument(
        "--epochs",
        type=positive_int,
        help="of the linear and the attentive probe, for a trial (default: as said above)",
    )
    probe.add_argument(
        "--k",
        type=positive_int,
        nargs="+",
        default=(1, 5, 10, 20, 50, 100, 200),
        help="numbers of neighbours to choose from",
    )
    probe.add_argument(
        "--attentive",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train the attentive probe, too",
    )
    probe.add_argument(
        "--token-grid",
        type=positive_int,
        nargs=3,
        metavar=tuple("THW"),
        help="the attentive probe sees each view's tokens pooled to this grid (default: all time "
        "steps, 4 x 4 places at most)",
    )
    probe.add_argument("--seeds", type=positive_int, default=3, help="repetitions of each probe")

    run = parser.add_argument_group("run")
    add_machine_flags(run)
    run.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="of the first repetition, the random views and an untrained encoder",
    )
    run.add_argument(
        "--batch-size",
        type=positive_int,
        default=32,
        help="videos per batch and rank; the encoder sees all their views at once",
    )
    run.add_argument(
        "--max-steps",
        type=positive_int,
        help="end a pass over the videos after this many batches, for a trial; if videos are left, "
        "no probe is trained; the next run goes on from there, unless it has --resume none",
    )
    run.add_argument(
        "--resume", choices=("auto", "none"), default="auto", help="none: extract again"
    )
    args = parser.parse_args(argv)
    if not args.flip and args.augment == 0:
        parser.error("--no-flip is for --augment")
    if args.token_grid and not args.attentive:
        parser.error("--token-grid is for --attentive")
    if args.out is None and args.checkpoint == "none":
        args.out = Path("runs/untrained/probe")
    elif args.out is None:
        args.out = Path(args.checkpoint).parent / "probe"
    return args


def load_checkpoint(args, machine):
    """-> (the encoder, the contrastive head), of one and the same file on every rank. The head is
    None on every rank but 0, and where the checkpoint was pretrained without captions."""
    encoder = load_encoder(
        args.checkpoint,
        size=args.size,
        frames=args.frames,
        stride=args.stride,
        image_size=args.image_size,
        seed=args.seed,
        device=machine.device,
    )
    head = find_head(args.checkpoint) if machine.rank == 0 else None
    # A pretraining that still runs replaces its checkpoint. The encoder's identity was taken before
    # its weights were read; the file must still have it now.
    seen = {encoder.identity, weights_identity(args.checkpoint, args.seed)}
    if len(union_over_ranks(seen)) > 1:
        give_up_together(
            f"--checkpoint {args.checkpoint}: was replaced while it was read: run it again"
        )
    return encoder, head


def settings_of(args, plan, encoder):
    """What a result was made with, besides what its other entries tell."""
    return {
        "size": encoder.size,
        "weights": encoder.identity,
        "token_grid": plan[-1].token_grid if args.attentive else None,
        "data": args.data,
        "test": args.test,
        "train_views": plan[0].settings,  # those that the linear probe and kNN learned from
        "test_views": plan[-1].settings,
        "epochs": args.epochs,  # None: the protocol's own
        "k": list(args.k),
    }


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    machine = join_machine(args.device)
    args.device = machine.device
    videos = read_videos(args, machine.rank)
    encoder, head = load_checkpoint(args, machine)
    if machine.rank == 0 and args.checkpoint != "none":
        print(f"weights      {args.checkpoint}: {encoder.notes}")
    plan = plan_extractions(
        encoder,
        videos,
        sampling=args.sampling,
        clips=args.clips,
        crops=args.crops,
        augment=args.augment,
        flip=args.flip,
        seed=args.seed,
        tokens=args.attentive,
        token_grid=args.token_grid,
        timeout=args.video_timeout,
    )
    make_folder(args.out)
    if machine.rank == 0:
        hold(args.out / "features")  # a lock until the end: only one run writes to this folder
    arrays = extract_all(
        encoder,
        plan,
        args.out,
        batch_size=args.batch_size,
        workers=args.workers,
        max_steps=args.max_steps,
        again=args.resume == "none",
        rank=machine.rank,
        ranks=machine.ranks,
    )
    leave_ranks()
    if machine.rank > 0 or arrays is None:
        return
    result = probe_all(videos, arrays, encoder.model.config["heads"], args)
    features = arrays["test"]["features"]
    result |= probe_head(head, features, videos["test"], args.test, seed=args.seed)
    result["settings"] = settings_of(args, plan, encoder)
    name = args.label_column.replace("/", "_")
    if args.protocol != "sweep":
        name += f".{args.protocol}"
    with written_aside(args.out / f"{name}.json") as file:
        file.write(json.dumps(result, indent=1) + "\n")
    print_table(result)
    print_head(result)


if __name__ == "__main__":
    launch(main)
