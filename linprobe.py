"""Stage 4: linear, nearest-neighbour and attentive probes on the frozen features of a pretrained
encoder, or an untrained one.

Reads   a training and a test manifest with labels, their videos, a checkpoint (ours, VideoMAE's
        .pth, a Hugging Face folder)
Writes  OUT/LABEL.json, the result; OUT/{train,test}.features.npy [N, D] float32, or [N, A, D] of
        augmented training videos; with --attentive OUT/{train,test}.tokens.npy [N, V*M, D] float16;
        beside each a .json: if that changes, it is remade

    # CPU, the toy world: 20 seconds
    python linprobe.py --checkpoint runs/text/checkpoint.pt
    # its floor: the same encoder, untrained
    python linprobe.py --checkpoint none --size tiny
    torchrun --nproc_per_node=8 linprobe.py --checkpoint checkpoint.pth --size base --data k400/train.csv --test k400/val.csv
    # VideoMAE's setting, on augmented clips
    python linprobe.py --checkpoint checkpoint.pth --protocol videomae --augment 8

Features. A video's feature is the mean of the encoder's tokens after its final norm, averaged over
V unmasked views: --clips clips spread evenly over the video times --crops squares along the frame's
long side. With --augment A a training video has A random views instead (clip, multi-scale crop,
mirrored half of the time), of which each epoch of the linear probe draws one. Features are
extracted once: run again, for another --label-column or after a kill, it reads only the videos that
are missing.

Probes. Settings are chosen on a tenth of the *training* set held out for it, the first of equals;
the test set is used once.
  linear     features standardised by the training set's mean and deviation, which is where batch
             norm without affine arrives; then one linear layer; SGD, momentum 0.9, cosine.
             --protocol sweep: all learning rates x weight decays in one batched product, then the
             best again on the whole training set. --protocol videomae: VideoMAE's one published
             setting, batch 1024, learning rate 0.1 x batch / 256, no weight decay, 100 epochs of
             which 10 warm up. A training set smaller than that is a single, smaller batch.
  knn        cosine, the k nearest vote by exp(similarity / 0.07) (Wu et al. 2018, arXiv
             1805.01978); a mean of augmented views
  attentive  one learned query cross-attends, with the encoder's number of heads, over the
             layer-normed tokens, then one linear layer: V-JEPA's probe (arXiv 2404.08471) without
             its MLP block; AdamW, cosine, 20 epochs, the rate chosen with the first seed; on clean
             views, whatever --augment says. The tokens of a view are average-pooled to
             --token-grid, M of them: 2 V M D bytes per video on disk, by default 0.4 MB for a base
             model, so Kinetics-400 95 GB.

Uncertainty. --seeds repetitions differ in split, order and initial weights. Given are their mean
accuracy and 95 % intervals of it, over seeds (Student's t) and over test videos (bootstrap);
neither knows of another pretraining run. A video that fails is left out of training and counts as
wrong in the test set, as does a class without a training video.

SIGTERM and Ctrl-C end an extraction after its batch, and the probes at once; the next run goes on
from the features it finds.
Shapes: N videos, V views, A random views, T frames, M tokens kept, D width, C classes, L settings,
S seeds, B batch."""

import argparse
import datetime
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import model as models
from tgm.arrays import create_array, file_hash, hold, open_rows
from tgm.evaluation import bootstrap
from tgm.flags import (
    Parser,
    add_machine_flags,
    add_video_flags,
    frame_count,
    not_negative,
    pixel_count,
    positive,
    positive_int,
    seed_number,
    whole,
)
from tgm.manifest import (
    ManifestError,
    file_sizes,
    manifest_hash,
    read_manifest,
    require_files,
    shared_rows,
)
from tgm.run import (
    RunError,
    StopSignal,
    choose_device,
    join_ranks,
    launch,
    make_folder,
    make_loader,
    one_line_errors,
    part_of_rank,
    patient,
    sum_over_ranks,
    torchrun_ranks,
    wait_for_ranks,
    writing,
)
from tgm.sampling import Views, clip_times, multi_scale_crop, repeat_seed, uniform_times
from tgm.video import VideoError, VideoReader

PROTOCOLS = {  # learning rates are for batches of 256
    "sweep": {
        "rates": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        "decays": (0.0, 1e-4, 1e-2),
        "epochs": 50,
        "warmup": 0,
        "probe_batch": 256,
    },
    "videomae": {
        "rates": (0.1,),
        "decays": (0.0,),
        "epochs": 100,
        "warmup": 10,
        "probe_batch": 1024,
    },
}
ATTENTIVE_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
T975 = (  # Student's t at 0.975, for 1 to 30 degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


# ---- features ------------------------------------------------------------------------------------


class RandomViews(Views):
    """Items as of tgm.sampling.Views, (row, uint8 [A, 3, T, H, W], None) or (row, None, why it
    failed), but of A random views, each a pure function of (seed, row, view)."""

    def __init__(self, videos, args):
        self.videos = videos
        self.args = args

    def __getitem__(self, index):
        video = self.videos[index]
        seeds = [
            repeat_seed(self.args.seed, 0, video.row, view) for view in range(self.args.augment)
        ]
        try:
            clips = self.read(video, seeds)
        except VideoError as error:
            return video.row, None, str(error)
        views = [self.crop(clip, seed) for clip, seed in zip(clips, seeds)]
        return video.row, torch.stack(views), None

    def read(self, video, seeds):
        """The frames of a random clip per seed -> A clips uint8 [T, 3, H, W]."""
        args = self.args
        with VideoReader(video.path, timeout=args.video_timeout) as reader:
            start, end = reader.span(video)
            times = []
            for seed in seeds:
                where = np.random.default_rng(seed).random(args.frames)
                if args.sampling == "uniform":
                    times.append(uniform_times(start, end, reader.fps, args.frames, where))
                else:
                    times.append(
                        clip_times(start, end, reader.fps, args.frames, args.stride, where[0])
                    )
            frames = reader.read(np.concatenate(times))  # [A*T, H, W, 3]
        return torch.from_numpy(frames).permute(0, 3, 1, 2).split(args.frames)

    def crop(self, clip, seed):
        """A random crop of a clip [T, 3, H, W], mirrored half of the time with --flip -> [3, T,
        size, size].
        """
        args = self.args
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            box = multi_scale_crop(*clip.shape[-2:])
            mirror = args.flip and bool(torch.rand(()) < 0.5)
        clip = TF.resized_crop(clip, *box, [args.image_size, args.image_size], antialias=True)
        if mirror:
            clip = clip.flip(-1)
        return clip.transpose(0, 1)


def make_unless_there(path, shape, dtype, about, again):
    """Makes an array of NaN and, beside it, a .json of `about`, unless both are there already, with
    rows filled or not.
    again: makes it in any case."""
    expected = about | {"shape": list(shape)}
    there = path.exists() and read_json(path.with_suffix(".json")) == expected
    if again or not there:
        create_array(path, shape, dtype, about)


def read_json(path):
    """What a .json file holds; None if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def rows_there(arrays):
    """The rows that all arrays [N, ...] of a dict have, bool [N]. A row is written from its
    first number to its last.
    """
    there = True
    for array in arrays.values():
        last = array.reshape(len(array), -1)[:, -1]
        there = there & ~np.isnan(last)
    return there


def jobs_of(args):
    """What is extracted, in order: (split, kinds of arrays, whether of random views). Random views
    are for the features of the training set; the tokens are always of clean ones."""
    kinds = ["features"]
    if args.attentive:
        kinds.append("tokens")
    if not args.augment:
        return [("train", kinds, False), ("test", kinds, False)]
    jobs = [("train", ["features"], True)]
    if args.attentive:
        jobs.append(("train", ["tokens"], False))
    return [*jobs, ("test", kinds, False)]


def extract_all(model, identity, videos, args, rank, ranks):
    """The features, and with --attentive the tokens, of all videos; those that are there already
    are not made again.

    identity: a name that changes with the encoder's weights. videos: {split: list}.
    Returns {split: {kind: array, mapped}}, or None where --max-steps ended it before. A signal ends
    the run after a batch."""
    stop = StopSignal(ranks, then="ending after this batch")
    found = {"train": {}, "test": {}}
    for split, kinds, random_views in jobs_of(args):
        manifest = args.data if split == "train" else args.test
        views = args.augment if random_views else args.clips * args.crops
        about = {
            "manifest": manifest_hash(videos[split]),
            # the same paths, starting elsewhere, are other videos
            "root": os.path.realpath(args.root or Path(manifest).parent),
            "files": file_sizes(videos[split]),  # so are files that were replaced
            "checkpoint": identity,
        }
        about |= settings_of(args, random_views)
        arrays = {}
        for kind in kinds:
            path = args.out / f"{split}.{kind}.npy"
            per_video = [model.config["width"]]
            if kind == "tokens":
                per_video.insert(0, views * math.prod(args.token_grid))
            elif random_views:
                per_video.insert(0, views)
            if rank == 0:
                dtype = np.float32 if kind == "features" else np.float16
                shape = (len(videos[split]), *per_video)
                make_unless_there(path, shape, dtype, about, again=args.resume == "none")
            wait_for_ranks()
            arrays[kind] = open_rows(path)

        there = rows_there(arrays)
        todo = part_of_rank([video for video in videos[split] if not there[video.row]], rank, ranks)
        if random_views:
            data = RandomViews(todo, args)
        else:
            data = Views(
                todo,
                args.frames,
                args.image_size,
                args.stride,
                args.clips,
                args.crops,
                args.sampling,
                args.video_timeout,
            )
        left = extract(model, data, arrays, views, f"{split} {' '.join(kinds)}", args, stop, rank)
        left = sum_over_ranks(left)  # every rank is here
        if stop.agreed():
            if rank == 0:
                print(f"{stop.name}: stopped; run it again to go on")
            stop.end()
        if left > 0:
            if rank == 0:
                done = len(videos[split]) - left
                of_all = f"{done} of {len(videos[split])} videos of {manifest}"
                print(f"{of_all} are done; run it again to go on")
            return None
        found[split] |= arrays
    stop.at_once("the features are kept, run it again")
    return found


def settings_of(args, random_views):
    """The flags that features depend on, for the .json beside them."""
    names = ["size", "frames", "stride", "image_size", "sampling"]
    if random_views:
        names += ["augment", "flip", "seed"]
    else:
        names += ["clips", "crops", "token_grid"]
    return {name: getattr(args, name) for name in names}


@torch.inference_mode()
def extract(model, data, arrays, views, title, args, stop, rank):
    """Encodes the videos of a data set and fills their rows of the arrays, {kind: array}; a video
    that fails stays NaN. Returns how many videos are left over, by --max-steps or a signal."""
    on_gpu = args.device.type == "cuda"
    dtype = torch.float16 if on_gpu and not torch.cuda.is_bf16_supported() else torch.bfloat16
    autocast = torch.autocast(args.device.type, dtype, enabled=on_gpu)
    left = len(data)
    workers = args.workers if left > 0 else 0
    loader = make_loader(data, args.batch_size, workers)
    quiet = rank > 0 or left == 0
    batches = tqdm(patient(loader), title, total=len(loader), unit="batch", disable=quiet)
    for step, items in enumerate(batches):
        if step == args.max_steps or stop.name:
            break
        left -= len(items)
        rows = []
        clips = []
        for row, of_video, error in items:
            if error:
                tqdm.write(error)
            else:
                rows.append(row)
                clips.append(of_video)
        if not rows:
            continue
        with autocast:
            video = models.normalize(torch.cat(clips).to(args.device))  # [B*V, 3, T, H, W]
            tokens = model.encode(video)  # [B*V, t*h*w, D]
        volume = tokens.float().mT.unflatten(-1, model.grid)  # [B*V, D, t, h, w]
        for kind, array in arrays.items():
            grid = (1, 1, 1) if kind == "features" else args.token_grid
            pooled = F.adaptive_avg_pool3d(volume, grid).flatten(2).mT  # [B*V, 1 or M, D]
            pooled = pooled.unflatten(0, (len(rows), views)).flatten(1, 2)  # [B, V or V*M, D]
            if array.ndim == 2:
                pooled = pooled.mean(1)
            array[rows] = pooled.cpu().numpy()
    for array in arrays.values():
        array.flush()
    return left


# ---- probes --------------------------------------------------------------------------------------


def schedule(epoch, epochs, warmup=0):
    """The factor on the learning rate at a (fractional) epoch: linear warm-up, then half a
    cosine.
    """
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def fit_linear(features, labels, classes, settings, epochs, seed, batch=256, warmup=0):
    """One linear layer for each of the settings, {"rate": for batches of 256, "decay": of weights},
    as torch.optim.SGD would train it: features [N, A, D], of which every epoch draws one of A ->
    weight [L, D+1, C], its last row the bias.

    The settings stand side by side as columns, so that a step is two matrix products for all of
    them."""
    device = features.device
    count, views, width = features.shape
    generator = torch.Generator().manual_seed(seed)
    weight = 0.01 * torch.randn(width, classes, generator=generator)
    weight = F.pad(weight, (0, 0, 0, 1)).repeat(1, len(settings)).to(device)  # [D+1, L*C]
    velocity = torch.zeros_like(weight)
    rate = torch.tensor(
        [setting["rate"] * min(batch, count) / 256 for setting in settings], device=device
    )
    rate = rate.repeat_interleave(classes)  # [L*C]
    decay = torch.tensor(
        [setting["decay"] for setting in settings], device=device
    ).repeat_interleave(classes)
    steps = math.ceil(count / batch)
    for epoch in range(epochs):
        view = torch.randint(views, (count,), generator=generator).to(device)
        order = torch.randperm(count, generator=generator).to(device)
        for step, index in enumerate(order.split(batch)):
            x = F.pad(features[index, view[index]], (0, 1), value=1.0)  # [B, D+1]
            # of the cross-entropy by the logits: softmax less one-hot
            error = (x @ weight).unflatten(1, (len(settings), classes)).softmax(-1)  # [B, L, C]
            error[torch.arange(len(x), device=device), :, labels[index]] -= 1
            # velocity = 0.9 velocity + x' error / B + decay weight
            velocity.addmm_(x.T, error.flatten(1), beta=0.9, alpha=1 / len(x))
            velocity.addcmul_(weight, decay)
            # weight = weight - factor rate velocity
            factor = schedule(epoch + step / steps, epochs, warmup)
            weight.addcmul_(velocity, rate, value=-factor)
    return weight.unflatten(1, (len(settings), classes)).transpose(0, 1)


def linear(train, labels, test, settings, seed, classes, epochs, batch=256, warmup=0):
    """train [N, A, D], labels [N], test [N', A', D], whose views are averaged -> for each of the L
    settings the predicted classes of the test set, [L, N']. The other two probes are called
    likewise."""
    mean = train.mean((0, 1))
    deviation = (train.var((0, 1), unbiased=False) + 1e-6).sqrt()
    weight = fit_linear(
        (train - mean) / deviation, labels, classes, settings, epochs, seed, batch, warmup
    )
    test = F.pad((test.mean(1) - mean) / deviation, (0, 1), value=1.0)  # [N', D+1]
    return torch.cat([(x @ weight).argmax(-1) for x in test.split(1024)], dim=1)


def knn(train, labels, test, settings, seed, classes, temperature=0.07):
    """settings: {"k": neighbours}; the seed changes nothing."""
    train = F.normalize(train.mean(1), dim=1)
    test = F.normalize(test.mean(1), dim=1)
    largest = max(setting["k"] for setting in settings)
    voted = []
    for chunk in test.split(256):
        # the nearest first
        similarity, index = (chunk @ train.T).topk(min(largest, len(train)), dim=1)
        weight = ((similarity - 1) / temperature).exp()
        near = labels[index]
        of_chunk = []
        for setting in settings:
            k = setting["k"]
            votes = chunk.new_zeros(len(chunk), classes).scatter_add_(1, near[:, :k], weight[:, :k])
            of_chunk.append(votes.argmax(1))
        voted.append(torch.stack(of_chunk))
    return torch.cat(voted, dim=1)


class Tokens:
    """Rows of a mapped array [N, V*M, D], read only when a batch of them is wanted."""

    def __init__(self, array, rows):
        self.array = array
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Tokens(self.array, self.rows[index])

    def read(self, device):
        return (
            torch.from_numpy(self.array[self.rows.numpy()]).to(device).float().nan_to_num(0.0)
        )  # [B, V*M, D]


class AttentiveProbe(torch.nn.Module):
    """tokens [B, M, D] -> logits [B, C]: multi-head cross-attention from one learned query, then a
    linear layer. What another linear map absorbs is left out: the norm's scale and shift, biases of
    keys and values, an output projection."""

    def __init__(self, width, heads, classes):
        super().__init__()
        self.query = torch.nn.Parameter(0.02 * torch.randn(heads, 1, width // heads))
        self.key = models.XavierLinear(width, width, bias=False)
        self.value = models.XavierLinear(width, width, bias=False)
        self.head = torch.nn.Linear(width, classes)

    def forward(self, tokens):
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        heads = len(self.query)
        key = self.key.weight.unflatten(0, (heads, -1))  # [heads, D / heads, D]
        value = self.value.weight.unflatten(0, (heads, -1))
        # one query, so no token needs a key or a value of its own: q . Kx = K'q . x, and the mean
        # of Vx is V of the mean
        query = (self.query @ key).squeeze(1) / key.shape[1] ** 0.5  # [heads, D]
        pooled = (tokens @ query.T).softmax(1).mT @ tokens  # [B, heads, D]
        return self.head((value @ pooled.unsqueeze(-1)).flatten(1))


def attentive(train, labels, test, settings, seed, classes, heads, epochs=20, batch=64):
    """train, test: Tokens; settings: {"rate": learning rate}, trained side by side, so that a
    batch is read once for all.
    """
    device = labels.device
    probes = []
    for _ in settings:
        torch.manual_seed(seed)
        probes.append(AttentiveProbe(train.array.shape[-1], heads, classes).to(device))
    optimizers = [torch.optim.AdamW(probe.parameters(), weight_decay=0.01) for probe in probes]
    steps = math.ceil(len(train) / batch)
    for epoch in range(epochs):
        for step, index in enumerate(torch.randperm(len(train)).split(batch)):
            x = train[index].read(device)
            y = labels[index]
            factor = schedule(epoch + step / steps, epochs)
            for probe, optimizer, setting in zip(probes, optimizers, settings):
                optimizer.param_groups[0]["lr"] = setting["rate"] * factor
                optimizer.zero_grad()
                F.cross_entropy(probe(x), y).backward()
                optimizer.step()
    predicted = []
    with torch.inference_mode():
        for index in torch.arange(len(test)).split(batch):
            x = test[index].read(device)
            predicted.append(torch.stack([probe(x).argmax(1) for probe in probes]))
    return torch.cat(predicted, dim=1)


def choose(probe, train, labels, settings, seed):
    """The setting that is most accurate on a random tenth (at least one) of the training set,
    trained on the rest.
    """
    if len(settings) == 1:
        return settings[0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    tenth = max(1, len(train) // 10)
    held = order[:tenth]
    kept = order[tenth:]
    guess = probe(train[kept], labels[kept], train[held], settings, seed)  # [L, N / 10]
    accuracy = (guess == labels[held]).float().mean(1)
    return settings[int(accuracy.argmax())]


def t_interval(values):
    """The 95 % interval of the mean of a few values by Student's t, [low, high]; None for a
    single one.
    """
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    freedom = min(len(values) - 1, len(T975))
    margin = T975[freedom - 1] * np.std(values, ddof=1) / math.sqrt(len(values))
    return [float(mean - margin), float(mean + margin)]


def repeat(name, probe, train, labels, test, truth, settings, seeds):
    """The keys of a probe in the result; truth [N']: the test set's classes, -1 for what must
    count as wrong.
    """
    correct = []
    chosen = []
    for seed in seeds:
        if name == "attentive" and chosen:  # choosing costs as much as the probe itself: once
            setting = chosen[0]
        else:
            setting = choose(probe, train, labels, settings, seed)
        chosen.append(setting)
        predicted = probe(train, labels, test, [setting], seed)[0]  # [N']
        correct.append((predicted == truth).double().cpu().numpy())
    of_seed = np.mean(correct, axis=1).tolist()  # [S]
    of_video = np.mean(correct, axis=0)  # [N']
    return {
        name: float(of_video.mean()),
        f"{name}_seeds": of_seed,
        f"{name}_interval": t_interval(of_seed),
        f"{name}_bootstrap": bootstrap(of_video, seed=seeds[0]),
        f"{name}_chosen": chosen,
    }


def print_table(result):
    """The accuracies of a result, one probe a line."""
    print_row("probe", "accuracy", "95 %, seeds", "95 %, videos", "chosen")
    for name in ("linear", "knn", "attentive"):
        if name not in result:
            continue
        chosen = []
        for setting in result[f"{name}_chosen"]:
            words = " ".join(f"{key} {value:g}" for key, value in setting.items())
            if words not in chosen:
                chosen.append(words)
        seeds = interval_text(result[f"{name}_interval"])
        videos = interval_text(result[f"{name}_bootstrap"])
        print_row(name, f"{result[name]:.3f}", seeds, videos, " | ".join(chosen))
    print_row("majority", f"{result['majority']:.3f}", "", "", "the floor: the most frequent class")


def print_row(probe, accuracy, seeds, videos, chosen):
    print(f"{probe:<12}{accuracy:<11}{seeds:<18}{videos:<18}{chosen}")


def interval_text(bounds):
    if bounds is None:
        return "one seed"
    low, high = bounds
    return f"{low:.3f} to {high:.3f}"


# ---- the command ---------------------------------------------------------------------------------


def build_encoder(args):
    """-> (the encoder, a name that changes with its weights). Sizes come from our own checkpoints,
    else from the flags; args gets those that were left open."""
    path = Path(args.checkpoint)
    untrained = args.checkpoint == "none"
    file = path
    for candidate in (path / "pytorch_model.bin", path / "model.safetensors"):
        # the latter if there are both
        if candidate.is_file():
            file = candidate
    if not untrained and not file.is_file():
        raise RunError(
            f"--checkpoint {path}: no such file (pretrain.py writes runs/NAME/checkpoint.pt; none: an untrained encoder)"
        )
    ours = models.saved_args(path)
    args.size = args.size or ours.get("size", "base")
    frames = args.frames or ours.get("frames")
    image_size = args.image_size or ours.get("image_size")
    torch.manual_seed(args.seed)
    try:
        model = models.VideoMAE(args.size, frames, image_size, text_dim=ours.get("text_dim", 512))
        if not untrained:
            models.load_pretrained(model, path)
    except ValueError as error:
        raise RunError(str(error)) from None
    args.frames = model.config["frames"]
    args.image_size = model.config["image_size"]
    args.stride = args.stride or ours.get("stride", model.config["stride"])
    time, height, width = model.grid
    args.token_grid = args.token_grid or [time, min(height, 4), min(width, 4)]
    if any(kept > all_of_them for kept, all_of_them in zip(args.token_grid, model.grid)):
        raise RunError(
            f"--token-grid {args.token_grid}: expected numbers from 1 to {list(model.grid)}, the encoder's grid"
        )
    identity = f"none {args.seed}" if untrained else file_hash(file)
    return model.eval().to(args.device), identity


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="file or folder; none: an untrained encoder"
    )
    parser.add_argument("--data", default="data/train.csv", help="training manifest")
    parser.add_argument("--test", default="data/val.csv", help="test manifest")
    add_video_flags(parser)
    parser.add_argument(
        "--label-column", default="label", help="column of both manifests that holds the label"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder (default: probe/ beside the checkpoint, or runs/untrained/probe)",
    )
    features = parser.add_argument_group("features")
    features.add_argument(
        "--size", choices=tuple(models.SIZES), help="for checkpoints that do not say it themselves"
    )
    features.add_argument(
        "--frames", type=frame_count, help="frames of a clip (default: the checkpoint's)"
    )
    features.add_argument(
        "--stride", type=positive_int, help="use every Nth video frame (default: the checkpoint's)"
    )
    features.add_argument(
        "--image-size", type=pixel_count, help="pixels (default: the checkpoint's)"
    )
    features.add_argument(
        "--sampling", choices=("dense", "uniform"), default="dense", help="uniform: for SSv2"
    )
    features.add_argument("--clips", type=whole(1, 100), default=2, help="clips per video")
    features.add_argument(
        "--crops",
        type=whole(1, 100),
        default=1,
        help="squares along a frame's long side; 1: its centre",
    )
    features.add_argument(
        "--augment",
        type=whole(0, 100),
        default=0,
        metavar="A",
        help="random views per training video instead",
    )
    features.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the random views",
    )
    probe = parser.add_argument_group("probes")
    probe.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="sweep",
        help="defaults of the next four flags",
    )
    probe.add_argument(
        "--rates", type=positive, nargs="+", help="learning rates for batches of 256"
    )
    probe.add_argument(
        "--decays", type=not_negative, nargs="+", help="weight decays, each with each rate"
    )
    probe.add_argument("--epochs", type=positive_int, help="passes over the training set")
    probe.add_argument("--probe-batch", type=positive_int, help="videos per step")
    probe.add_argument(
        "--k",
        type=positive_int,
        nargs="+",
        default=(1, 5, 10, 20, 50, 100, 200),
        help="neighbours to choose from",
    )
    probe.add_argument(
        "--attentive",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the attentive probe, too",
    )
    probe.add_argument(
        "--token-grid",
        type=positive_int,
        nargs=3,
        metavar=tuple("THW"),
        help="tokens it sees (default: t 4 4 at most)",
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
        "--batch-size", type=positive_int, default=32, help="videos per batch and rank"
    )
    run.add_argument(
        "--max-steps",
        type=positive_int,
        help="end after this many batches, for a trial; the next run goes on",
    )
    run.add_argument(
        "--resume", choices=("auto", "none"), default="auto", help="none: extract again"
    )
    args = parser.parse_args(argv)
    protocol = PROTOCOLS[args.protocol]
    args.warmup = protocol["warmup"]
    for name in ("rates", "decays", "epochs", "probe_batch"):
        if getattr(args, name) is None:
            setattr(args, name, protocol[name])
    return args


def read_videos(args):
    """{"train": videos, "test": videos} of the two manifests; every video must have a label."""
    videos = {}
    for split, manifest in (("train", args.data), ("test", args.test)):
        try:
            videos[split] = read_manifest(manifest, args.root, args.label_column)
        except ManifestError as error:
            hint = "" if Path(args.data).exists() else " (the toy world: python data/toy.py)"
            raise RunError(f"{error}{hint}") from None
        require_files(videos[split], manifest)
        for video in videos[split]:
            if video.label is None:
                raise RunError(
                    f"{manifest}: {video.name} has no label in column {args.label_column!r}"
                )
    seen = shared_rows(videos["train"], videos["test"])
    if seen > 0:
        print(
            f"note: {seen} of {len(videos['test'])} test videos are training videos, too: "
            "the accuracies will flatter"
        )
    return videos


def probe_all(videos, arrays, heads, args):
    """Fits every probe to the features and tests it -> the result."""
    there = {split: rows_there(of_split) for split, of_split in arrays.items()}
    names = sorted({video.label for video in videos["train"] if there["train"][video.row]})
    unknown = sorted({video.label for video in videos["test"]} - set(names))
    if unknown:
        print(f"{args.test}: classes without a training video count as wrong: {', '.join(unknown)}")
    rows = torch.from_numpy(there["train"].nonzero()[0])
    if len(rows) < 2:
        hint = ""
        if len(rows) == 0:
            hint = f" (paths start at {args.root or Path(args.data).parent}; --root names another folder)"
        raise RunError(f"{args.data}: {len(rows)} readable videos: nothing to train on{hint}")
    number = {name: index for index, name in enumerate(names)}
    labels = [number[video.label] for video in videos["train"] if there["train"][video.row]]
    truth = [
        number.get(video.label, -1) if there["test"][video.row] else -1 for video in videos["test"]
    ]
    labels = torch.tensor(labels, device=args.device)
    truth = torch.tensor(truth, device=args.device)

    # [N, D] or [N, A, D]
    train = torch.from_numpy(arrays["train"]["features"]).to(args.device)[rows]
    train = train.reshape(len(rows), -1, train.shape[-1])  # [N, 1 or A, D]
    test = torch.from_numpy(arrays["test"]["features"]).to(args.device).nan_to_num(0.0)
    test = test[:, None]  # [N', 1, D]
    result = {
        "label": args.label_column,
        "checkpoint": args.checkpoint,
        "protocol": args.protocol,
        "seed": args.seed,
        "classes": len(names),
        "train": len(rows),
        "test": len(test),
        "unreadable": int((~there["train"]).sum() + (~there["test"]).sum()),
    }
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    result["majority"] = (truth == labels.mode().values).float().mean().item()

    seeds = range(args.seed, args.seed + args.seeds)
    settings = [{"rate": rate, "decay": decay} for rate in args.rates for decay in args.decays]
    fit = partial(
        linear, classes=len(names), epochs=args.epochs, batch=args.probe_batch, warmup=args.warmup
    )
    result |= repeat("linear", fit, train, labels, test, truth, settings, seeds)
    settings = [{"k": k} for k in args.k]
    result |= repeat(
        "knn", partial(knn, classes=len(names)), train, labels, test, truth, settings, seeds
    )
    if args.attentive:
        train = Tokens(arrays["train"]["tokens"], rows)
        test = Tokens(arrays["test"]["tokens"], torch.arange(len(test)))
        settings = [{"rate": rate} for rate in ATTENTIVE_RATES]
        fit = partial(attentive, classes=len(names), heads=heads)
        result |= repeat("attentive", fit, train, labels, test, truth, settings, seeds)
    return result


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    videos = read_videos(args)
    rank, ranks, local_rank = torchrun_ranks()
    args.device, _ = choose_device(args.device, local_rank)
    if ranks > 1:  # ranks only wait for one another, after work of very different length
        join_ranks("gloo", timeout=datetime.timedelta(days=7))
    model, identity = build_encoder(args)
    if args.out is None:
        run_folder = (
            Path("runs/untrained") if args.checkpoint == "none" else Path(args.checkpoint).parent
        )
        args.out = run_folder / "probe"
    make_folder(args.out)
    if rank == 0:
        hold(args.out / "features")
    arrays = extract_all(model, identity, videos, args, rank, ranks)
    if ranks > 1:
        dist.destroy_process_group()
    if rank > 0 or arrays is None:
        return
    result = probe_all(videos, arrays, model.config["heads"], args)
    path = args.out / f"{args.label_column.replace('/', '_')}.json"
    aside = path.with_name(path.name + ".new")
    with writing(path):
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    print_table(result)


if __name__ == "__main__":
    launch(main)
