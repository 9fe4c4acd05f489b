"""Stage 4: linear, nearest-neighbour and attentive probes on the frozen features of a pretrained encoder, or an untrained one.

Reads   a training and a test manifest with labels, their videos, a checkpoint (ours, VideoMAE's .pth, a Hugging Face folder)
Writes  OUT/LABEL.json, the result; OUT/{train,test}.features.npy [N, D] float32, or [N, A, D] of augmented training videos;
        with --attentive OUT/{train,test}.tokens.npy [N, V*M, D] float16; beside each a .json: if that changes, it is made anew

    python linprobe.py --checkpoint runs/text/checkpoint.pt                          CPU, the toy world: 20 seconds
    python linprobe.py --checkpoint none --size tiny                                 its floor: the same encoder, untrained
    torchrun --nproc_per_node=8 linprobe.py --checkpoint checkpoint.pth --size base --data k400/train.csv --test k400/val.csv
    python linprobe.py --checkpoint checkpoint.pth --protocol videomae --augment 8   VideoMAE's setting, on augmented clips

Features. A video's feature is the mean of the encoder's tokens after its final norm, averaged over V unmasked views: --clips
clips spread evenly over the video times --crops squares along the frame's long side. With --augment A a training video has A
random views instead (clip, multi-scale crop, mirrored half of the time), of which each epoch of the linear probe draws one.
Features are extracted once: run again, for another --label-column or after a kill, it reads only the videos that are missing.

Probes. Settings are chosen on a tenth of the *training* set held out for it, the first of equals; the test set is used once.
  linear     batch norm without affine, at its limit (the training set's own mean and deviation), then one linear layer; SGD,
             momentum 0.9, cosine. --protocol sweep: all learning rates x weight decays in one batched product, then the best
             anew on the whole training set. --protocol videomae: VideoMAE's one published setting, batch 1024, learning rate
             0.1 x batch / 256, no weight decay, 100 epochs of which 10 warm up. A smaller training set is one smaller batch.
  knn        cosine, the k nearest vote by exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978); a mean of augmented views
  attentive  one learned query cross-attends, with the encoder's number of heads, over the layer-normed tokens, then one linear
             layer: V-JEPA's probe (arXiv 2404.08471) without its MLP block; AdamW, cosine, 20 epochs, the rate chosen with the
             first seed; on clean views, whatever --augment says. The tokens of a view are average-pooled to --token-grid, M
             of them: 2 V M D bytes a video on disk, by default 0.4 MB for a base model, so Kinetics-400 95 GB.

Uncertainty. --seeds repetitions differ in split, order and initial weights. Given are their mean accuracy and 95 % intervals of
it, over seeds (Student's t) and over test videos (bootstrap); neither knows of another pretraining run. A video that fails is
left out of training and counts as wrong in the test set, as does a class without a training video.
Letters: N videos, V views, A random views, T frames, M tokens kept, D width, C classes, L settings, S seeds, B batch.
"""
import argparse
import contextlib
import datetime
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import model as models
from clips import Views, clip_times, multi_scale_crop, repeat_seed, uniform_times
from evaluate import bootstrap
from manifest import ManifestError, create_array, file_hash, hold, manifest_hash, open_rows, read_manifest
from tgm.run import (
    Parser,
    StopSignal,
    choose_device,
    count,
    device_name,
    frame_count,
    join_ranks,
    launch,
    make_folder,
    make_loader,
    not_negative,
    one_line_errors,
    part_of_rank,
    patient,
    pixel_count,
    positive,
    positive_int,
    seed_number,
    torchrun_ranks,
    worker_count,
)
from video import TIMEOUT, VideoError, VideoReader

PROTOCOLS = {  # learning rates are for batches of 256
    "sweep": dict(rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), decays=(0.0, 1e-4, 1e-2), epochs=50, warmup=0, probe_batch=256),
    "videomae": dict(rates=(0.1,), decays=(0.0,), epochs=100, warmup=10, probe_batch=1024),
}
ATTENTIVE_RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # and below Student's t at 0.975 for 1 to 30 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
        2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)

class RandomViews(Views):
    """Items as of clips.Views, (row, uint8 [A, 3, T, H, W], None) or (row, None, why it failed), but of A random views, each a
    pure function of (seed, row, view)."""
    def __init__(self, videos, args):
        self.videos, self.args = videos, args
    def __getitem__(self, index):
        video, args, views = self.videos[index], self.args, []
        seeds = [repeat_seed(args.seed, 0, video.row, view) for view in range(args.augment)]
        try:
            with VideoReader(video.path, timeout=args.video_timeout) as reader:
                start, end = reader.span(video)
                wheres = [np.random.default_rng(seed).random(args.frames) for seed in seeds]
                times = [uniform_times(start, end, reader.fps, args.frames, where) if args.sampling == "uniform" else
                         clip_times(start, end, reader.fps, args.frames, args.stride, where[0]) for where in wheres]
                frames = torch.from_numpy(reader.read(np.concatenate(times))).permute(0, 3, 1, 2)         # [A*T, 3, H, W]
        except VideoError as error:
            return video.row, None, str(error)
        for seed, clip in zip(seeds, frames.split(args.frames)):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                box, mirror = multi_scale_crop(*clip.shape[-2:]), args.flip and bool(torch.rand(()) < 0.5)
            clip = TF.resized_crop(clip, *box, [args.image_size, args.image_size], antialias=True)
            views.append((clip.flip(-1) if mirror else clip).transpose(0, 1))
        return video.row, torch.stack(views), None

def create_or_resume(path, shape, dtype, about, anew):
    """Makes an array of NaN and, beside it, a .json of `about`, unless they are there already, with rows filled or not."""
    about_path, about = path.with_suffix(".json"), about | {"shape": list(shape)}
    with contextlib.suppress(OSError, ValueError):
        if not anew and path.exists() and json.loads(about_path.read_text()) == about:
            return
    create_array(path, shape, dtype, about)

def filled(array):
    """Which rows are there, bool [N]: a row is written from its first number to its last."""
    return ~np.isnan(array[(slice(None),) + (-1,) * (array.ndim - 1)])

@torch.inference_mode()
def extract(model, identity, videos, split, kinds, args, rank, ranks, barrier, autocast):
    """-> {kind: OUT/SPLIT.KIND.npy, mapped} for the kinds "features" and "tokens". The videos that any of them lacks are read
    and encoded once for all; each rank fills its own rows."""
    random = args.augment and split == "train" and kinds == ["features"]
    width, views = model.config["width"], args.augment if random else args.clips * args.crops
    shapes = {"features": (len(videos), views, width) if random else (len(videos), width),
              "tokens": (len(videos), views * math.prod(args.token_grid), width)}
    keys = ["size", "frames", "stride", "image_size", "sampling"]
    keys += ["augment", "flip", "seed"] if random else ["clips", "crops", "token_grid"]
    about, arrays = {"manifest": manifest_hash(videos), "checkpoint": identity} | {key: getattr(args, key) for key in keys}, {}
    for kind in kinds:
        path, dtype = args.out / f"{split}.{kind}.npy", np.float32 if kind == "features" else np.float16
        if rank == 0:
            create_or_resume(path, shapes[kind], dtype, about, args.resume == "none")
        barrier()
        arrays[kind] = open_rows(path)
    there = np.all([filled(array) for array in arrays.values()], axis=0)
    todo = part_of_rank([video for video in videos if not there[video.row]], rank, ranks)
    data = Views(todo, args.frames, args.image_size, args.stride, args.clips, args.crops, args.sampling, args.video_timeout)
    data = RandomViews(todo, args) if random else data
    stop = StopSignal(then="ending after this batch")
    loader = make_loader(data, args.batch_size, args.workers)
    for step, items in enumerate(tqdm(patient(loader), f"{split} {' '.join(kinds)}", total=len(loader), unit="batch", disable=rank > 0 or not todo)):
        if step == args.max_steps or stop.name:
            break
        for error in (error for _, _, error in items if error):
            tqdm.write(error)
        rows, clips = [row for row, _, error in items if not error], [clips for _, clips, error in items if not error]
        if rows:
            with autocast:
                tokens = model.encode(models.normalize(torch.cat(clips).to(args.device)))                 # [B*V, t*h*w, D]
            volume = tokens.float().mT.unflatten(-1, model.grid)                                          # [B*V, D, t, h, w]
            for kind, array in arrays.items():
                pooled = F.adaptive_avg_pool3d(volume, (1, 1, 1) if kind == "features" else args.token_grid).flatten(2).mT
                pooled = pooled.unflatten(0, (len(rows), views)).flatten(1, 2)                            # [B, V or V*M, D]
                array[rows] = (pooled.mean(1) if array.ndim == 2 else pooled).cpu().numpy()
    for array in arrays.values():
        array.flush()
    barrier()
    if stop.name:
        print(f"{stop.name}: stopped; run it again to go on")
        stop.end()
    return arrays

def schedule(epoch, epochs, warmup=0):
    """The factor on the learning rate at a (fractional) epoch: linear warm-up, then half a cosine."""
    return epoch / warmup if epoch < warmup else 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))

def fit_linear(features, labels, classes, settings, epochs, seed, batch=256, warmup=0):
    """One linear layer for each of the settings, {"rate": for batches of 256, "decay": of weights}, as torch.optim.SGD would
    train it: features [N, A, D], of which every epoch draws one of A -> weight [L, D+1, C], its last row the bias.
    The settings are columns side by side: a step is two matrix products, the gradient of the logits softmax less one-hot."""
    device, (count, views, width) = features.device, features.shape
    generator = torch.Generator().manual_seed(seed)
    weight = F.pad(0.01 * torch.randn(width, classes, generator=generator), (0, 0, 0, 1)).repeat(1, len(settings)).to(device)
    velocity = torch.zeros_like(weight)                                                                   # [D+1, L*C]
    rate, decay = torch.tensor([(s["rate"] * min(batch, count) / 256, s["decay"]) for s in settings], device=device).T
    rate, decay = rate.repeat_interleave(classes), decay.repeat_interleave(classes)                       # [L*C] each
    for epoch in range(epochs):
        view = torch.randint(views, (count,), generator=generator).to(device)
        for step, index in enumerate(torch.randperm(count, generator=generator).to(device).split(batch)):
            x = F.pad(features[index, view[index]], (0, 1), value=1.0)                                    # [B, D+1]
            error = (x @ weight).unflatten(1, (len(settings), classes)).softmax(-1)                       # [B, L, C]
            error[torch.arange(len(x), device=device), :, labels[index]] -= 1
            velocity.addmm_(x.T, error.flatten(1), beta=0.9, alpha=1 / len(x)).addcmul_(weight, decay)
            weight.addcmul_(velocity, rate, value=-schedule(epoch + step / math.ceil(count / batch), epochs, warmup))
    return weight.unflatten(1, (len(settings), classes)).transpose(0, 1)

def linear(train, labels, test, settings, seed, classes, epochs, batch=256, warmup=0):
    """train [N, A, D], labels [N], test [N', A', D], whose views are averaged -> for each of the L settings the predicted
    classes of the test set, [L, N']. The other two probes are called likewise."""
    mean, deviation = train.mean((0, 1)), (train.var((0, 1), unbiased=False) + 1e-6).sqrt()  # batch norm, at its limit
    weight = fit_linear((train - mean) / deviation, labels, classes, settings, epochs, seed, batch, warmup)
    test = F.pad((test.mean(1) - mean) / deviation, (0, 1), value=1.0)                                    # [N', D+1]
    return torch.cat([(x @ weight).argmax(-1) for x in test.split(1024)], dim=1)

def knn(train, labels, test, settings, seed, classes, temperature=0.07):
    """settings: {"k": neighbours}; the seed changes nothing."""
    train, test, ks = F.normalize(train.mean(1), dim=1), F.normalize(test.mean(1), dim=1), [s["k"] for s in settings]
    voted = []
    for chunk in test.split(256):
        similarity, index = (chunk @ train.T).topk(min(max(ks), len(train)), dim=1)
        weight, near = ((similarity - 1) / temperature).exp(), labels[index]
        votes = chunk.new_zeros(len(ks), len(chunk), classes)
        voted.append(torch.stack([vote.scatter_add_(1, near[:, :k], weight[:, :k]).argmax(1) for vote, k in zip(votes, ks)]))
    return torch.cat(voted, dim=1)

class Tokens(Subset):
    """Rows of a mapped array [N, V*M, D], read only when a batch of them is wanted."""
    def __getitem__(self, index):
        return Tokens(self.dataset, self.indices[index])
    __getitems__ = __getitem__  # which Subset wants beside it
    def read(self, device):
        return torch.from_numpy(self.dataset[self.indices.numpy()]).to(device).float().nan_to_num(0.0)   # [B, V*M, D]

class AttentiveProbe(torch.nn.Module):
    """tokens [B, M, D] -> logits [B, C]: multi-head cross-attention from one learned query, then a linear layer. What
    another linear map absorbs is left out: the norm's scale and shift, biases of keys and values, an output projection."""
    def __init__(self, width, heads, classes):
        super().__init__()
        self.query = torch.nn.Parameter(0.02 * torch.randn(heads, 1, width // heads))
        self.key, self.value = (models.Linear(width, width, bias=False) for _ in range(2))
        self.head = torch.nn.Linear(width, classes)
    def forward(self, tokens):
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        key, value = (layer.weight.unflatten(0, (len(self.query), -1)) for layer in (self.key, self.value))
        # one query, so no token needs a key or a value of its own: q . Kx = K'q . x, and the mean of Vx is V of the mean
        query = (self.query @ key).squeeze(1) / key.shape[1] ** 0.5                                       # [heads, D]
        pooled = (tokens @ query.T).softmax(1).mT @ tokens                                                # [B, heads, D]
        return self.head((value @ pooled.unsqueeze(-1)).flatten(1))

def attentive(train, labels, test, settings, seed, classes, heads, epochs=20, batch=64):
    """train, test: Tokens; settings: {"rate": learning rate}, trained side by side, so that a batch is read once for all."""
    device, probes = labels.device, []
    for _ in settings:
        torch.manual_seed(seed)
        probes.append(AttentiveProbe(train.dataset.shape[-1], heads, classes).to(device))
    optimizers = [torch.optim.AdamW(probe.parameters(), weight_decay=0.01) for probe in probes]
    for epoch in range(epochs):
        for step, index in enumerate(torch.randperm(len(train)).split(batch)):
            x, y = train[index].read(device), labels[index]
            for probe, optimizer, setting in zip(probes, optimizers, settings):
                now = epoch + step / math.ceil(len(train) / batch)
                optimizer.param_groups[0]["lr"] = setting["rate"] * schedule(now, epochs)
                optimizer.zero_grad()
                F.cross_entropy(probe(x), y).backward()
                optimizer.step()
    with torch.inference_mode():
        batches = (test[index].read(device) for index in torch.arange(len(test)).split(batch))
        return torch.cat([torch.stack([probe(x).argmax(1) for probe in probes]) for x in batches], dim=1)

def choose(probe, train, labels, settings, seed):
    """The setting that is most accurate on a random tenth (at least one) of the training set, trained on the rest."""
    if len(settings) == 1:
        return settings[0]
    order, tenth = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)), max(1, len(train) // 10)
    held, kept = order[:tenth], order[tenth:]
    guess = probe(train[kept], labels[kept], train[held], settings, seed)                                 # [L, N / 10]
    return settings[int((guess == labels[held]).float().mean(1).argmax())]

def t_interval(values):
    """The 95 % interval of the mean of a few values by Student's t, [low, high]; None for a single one."""
    if len(values) > 1:
        margin = T975[min(len(values), 31) - 2] * np.std(values, ddof=1) / math.sqrt(len(values))
        return [float(np.mean(values) - margin), float(np.mean(values) + margin)]

def repeat(name, probe, train, labels, test, truth, settings, seeds):
    """The keys of a probe in the result; truth [N']: the test set's classes, -1 for what must count as wrong."""
    correct, chosen = [], []
    for seed in seeds:
        chosen.append(chosen[0] if chosen and name == "attentive" else choose(probe, train, labels, settings, seed))
        correct.append((probe(train, labels, test, chosen[-1:], seed)[0] == truth).double().cpu().numpy())
    each, mean = np.mean(correct, axis=1).tolist(), np.mean(correct, axis=0)                              # [S], [N']
    return {name: float(mean.mean()), f"{name}_seeds": each, f"{name}_interval": t_interval(each),
            f"{name}_bootstrap": bootstrap(mean, seed=seeds[0]), f"{name}_chosen": chosen}

def print_table(result):
    text, row = lambda bounds: "{:.3f} to {:.3f}".format(*bounds) if bounds else "one seed", "{:<12}{:<11}{:<18}{:<18}{}".format
    print(row("probe", "accuracy", "95 %, seeds", "95 %, videos", "chosen"))
    for name in (key.removesuffix("_chosen") for key in result if key.endswith("_chosen")):
        chosen = " | ".join(dict.fromkeys(" ".join(f"{k} {v:g}" for k, v in one.items()) for one in result[f"{name}_chosen"]))
        print(row(name, f"{result[name]:.3f}", text(result[f"{name}_interval"]), text(result[f"{name}_bootstrap"]), chosen))
    print(row("majority", f"{result['majority']:.3f}", "", "", "the floor: the most frequent class"))

def build_encoder(args):
    """The encoder and a name that changes with its weights; sizes come from our own checkpoints, else from the flags."""
    path, untrained = Path(args.checkpoint), args.checkpoint == "none"
    file = next((f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()), path)
    if not untrained and not file.is_file():
        sys.exit(f"--checkpoint {path}: no such file (pretrain.py writes runs/NAME/checkpoint.pt; none: an untrained encoder)")
    ours = models.saved_args(path)
    args.size = args.size or ours.get("size", "base")
    torch.manual_seed(args.seed)
    try:
        model = models.VideoMAE(args.size, args.frames or ours.get("frames"), args.image_size or ours.get("image_size"),
                                text_dim=ours.get("text_dim", 512))
        if not untrained:
            models.load_pretrained(model, path)
    except ValueError as error:
        sys.exit(str(error))
    args.frames, args.image_size = model.config["frames"], model.config["image_size"]
    args.stride = args.stride or ours.get("stride", model.config["stride"])
    args.token_grid = args.token_grid or [model.grid[0], min(model.grid[1], 4), min(model.grid[2], 4)]
    if not all(1 <= small <= large for small, large in zip(args.token_grid, model.grid)):
        sys.exit(f"--token-grid {args.token_grid}: expected numbers from 1 to {list(model.grid)}, the encoder's grid")
    return model.eval().to(args.device), f"none {args.seed}" if untrained else file_hash(file)

def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="file or folder; none: an untrained encoder")
    parser.add_argument("--data", default="data/train.csv", help="training manifest")
    parser.add_argument("--test", default="data/val.csv", help="test manifest")
    parser.add_argument("--root", help="folder that relative paths start from (default: each manifest's)")
    parser.add_argument("--strict-root", action="store_true", help="refuse a manifest whose paths lead out of that folder")
    parser.add_argument("--label-column", default="label", help="column of both manifests that holds the label")
    parser.add_argument("--out", type=Path, help="folder (default: probe/ beside the checkpoint, or runs/untrained/probe)")
    features = parser.add_argument_group("features")
    features.add_argument("--size", choices=tuple(models.SIZES), help="for checkpoints that do not say it themselves")
    features.add_argument("--frames", type=frame_count, help="frames of a clip (default: the checkpoint's)")
    features.add_argument("--stride", type=positive_int, help="video frames from one clip frame to the next (default: the checkpoint's)")
    features.add_argument("--image-size", type=pixel_count, help="pixels (default: the checkpoint's)")
    features.add_argument("--sampling", choices=("dense", "uniform"), default="dense", help="uniform: for SSv2")
    features.add_argument("--clips", type=positive_int, default=2, help="clips a video")
    features.add_argument("--crops", type=positive_int, default=1, help="squares along a frame's long side; 1: its centre")
    features.add_argument("--augment", type=count, default=0, metavar="A", help="random views of a training video instead")
    features.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the random views")
    probe = parser.add_argument_group("probes")
    probe.add_argument("--protocol", choices=tuple(PROTOCOLS), default="sweep", help="defaults of the next four flags")
    probe.add_argument("--rates", type=positive, nargs="+", help="learning rates for batches of 256")
    probe.add_argument("--decays", type=not_negative, nargs="+", help="weight decays, each with each rate")
    probe.add_argument("--epochs", type=positive_int, help="passes over the training set")
    probe.add_argument("--probe-batch", type=positive_int, help="videos a step")
    probe.add_argument("--k", type=positive_int, nargs="+", default=(1, 5, 10, 20, 50, 100, 200), help="neighbours to choose from")
    probe.add_argument("--attentive", action=argparse.BooleanOptionalAction, default=False, help="the attentive probe, too")
    probe.add_argument("--token-grid", type=positive_int, nargs=3, metavar=tuple("THW"), help="tokens it sees (default: t 4 4 at most)")
    probe.add_argument("--seeds", type=positive_int, default=3, help="repetitions of each probe")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=seed_number, default=0, help="of the first repetition, the random views and an untrained encoder")
    run.add_argument("--batch-size", type=positive_int, default=32, help="videos a batch and rank")
    run.add_argument("--workers", type=worker_count, default=2, help="decoding processes a rank; 0 decodes in line")
    run.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda")
    run.add_argument("--video-timeout", type=not_negative, default=TIMEOUT, metavar="S", help="seconds after which a video is given up")
    run.add_argument("--max-steps", type=positive_int, help="stop an extraction after this many batches; the next run continues")
    run.add_argument("--resume", choices=("auto", "none"), default="auto", help="none: extract anew")
    args = parser.parse_args(argv)
    for key, value in PROTOCOLS[args.protocol].items():
        setattr(args, key, value if getattr(args, key, None) is None else getattr(args, key))
    if min(args.seeds, args.clips, args.crops, *args.k) < 1:
        parser.error("--seeds, --clips, --crops and --k: expected 1 or more")
    return args

@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    try:
        videos = {"train": read_manifest(args.data, args.root, args.label_column, args.strict_root),
                  "test": read_manifest(args.test, args.root, args.label_column, args.strict_root)}
    except ManifestError as error:
        sys.exit(f"{error}" + ("" if Path(args.data).exists() else " (the toy world: python data/toy.py)"))
    for video in itertools.chain(*videos.values()):
        if video.label is None:
            sys.exit(f"{video.name}: has no label in column {args.label_column!r}")
    rank, ranks, local = torchrun_ranks()
    args.device, _ = choose_device(args.device, local)
    on_gpu = args.device.type == "cuda"
    dtype = torch.float16 if on_gpu and not torch.cuda.is_bf16_supported() else torch.bfloat16
    autocast = torch.autocast(args.device.type, dtype, enabled=on_gpu)
    if ranks > 1:  # ranks only wait for one another, after work of very different length
        join_ranks("gloo", timeout=datetime.timedelta(days=7))
    barrier = dist.barrier if ranks > 1 else lambda: None
    model, identity = build_encoder(args)
    args.out = args.out or (Path("runs/untrained") if args.checkpoint == "none" else Path(args.checkpoint).parent) / "probe"
    make_folder(args.out)
    if rank == 0:
        hold(args.out / "features")
    arrays, kinds = {split: {} for split in videos}, ["features", "tokens"][:1 + args.attentive]
    for split, of_split in videos.items():  # random views are for the features alone, clean ones for both
        for some in [[kind] for kind in kinds] if args.augment and split == "train" else [kinds]:
            arrays[split] |= extract(model, identity, of_split, split, some, args, rank, ranks, barrier, autocast)
    if rank > 0:
        return

    good = {split: np.all([filled(array) for array in of_split.values()], axis=0) for split, of_split in arrays.items()}
    names = sorted({video.label for video in videos["train"] if good["train"][video.row]})
    unknown = sorted({video.label for video in videos["test"]} - set(names))
    if unknown:
        print(f"{args.test}: classes without a training video count as wrong: {', '.join(unknown)}")
    number = {name: index for index, name in enumerate(names)}
    labels, truth = (torch.tensor([number.get(video.label, -1) if good[split][video.row] else -1 for video in of_split],
                                  device=args.device) for split, of_split in videos.items())
    rows, labels = torch.from_numpy(good["train"].nonzero()[0]), labels[labels >= 0]
    if len(rows) < 2:
        sys.exit(f"{args.data}: {len(rows)} readable videos: nothing to train on")

    train, test = (torch.from_numpy(arrays[split]["features"]).to(args.device) for split in videos)
    train, test = train[rows].reshape(len(rows), -1, train.shape[-1]), test.nan_to_num(0.0)[:, None]     # [N, A or 1, D]
    settings = [{"rate": rate, "decay": decay} for rate in args.rates for decay in args.decays]
    fit = partial(linear, epochs=args.epochs, batch=args.probe_batch, warmup=args.warmup)
    probes = {"linear": (fit, train, test, settings), "knn": (knn, train, test, [{"k": k} for k in args.k])}
    if args.attentive:
        tokens = Tokens(arrays["train"]["tokens"], rows), Tokens(arrays["test"]["tokens"], torch.arange(len(test)))
        fit = partial(attentive, heads=model.config["heads"])
        probes["attentive"] = (fit, *tokens, [{"rate": rate} for rate in ATTENTIVE_RATES])
    result = {"label": args.label_column, "checkpoint": args.checkpoint, "protocol": args.protocol, "seed": args.seed,
              "classes": len(names), "train": len(rows), "test": len(test),
              "unreadable": int(sum((~of_split).sum() for of_split in good.values())),
              "majority": (truth == labels.mode().values).float().mean().item()}
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "majority"))
    seeds = range(args.seed, args.seed + args.seeds)
    for name, (probe, of_train, of_test, settings) in probes.items():
        result |= repeat(name, partial(probe, classes=len(names)), of_train, labels, of_test, truth, settings, seeds)
    (args.out / f"{args.label_column}.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)

if __name__ == "__main__":
    launch(main)
