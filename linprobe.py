"""Stage 4: linear probe and kNN on the frozen features of a pretrained encoder, and on an untrained one for the floor.

Reads   a training and a test manifest with labels, their videos, and a checkpoint (ours, VideoMAE's .pth, a Hugging Face folder)
Writes  OUT/{train,test}.features.npy [N, D] float32, with what made them in a .json beside each, and OUT/LABEL.json, the result

    python linprobe.py --checkpoint runs/text/checkpoint.pt                          CPU, the toy world: 15 seconds
    python linprobe.py --checkpoint none --size tiny                                 its floor: the same encoder, untrained
    torchrun --nproc_per_node=8 linprobe.py --checkpoint checkpoint.pth --size base --data k400/train.csv --test k400/val.csv

The protocol. The feature of a video is the mean of the encoder's tokens after its final norm, averaged over --clips clips spread
evenly over the video; each is the centre square of the frame, unmasked and not augmented. Features are extracted once; run
again for another label (--label-column) or other settings, the probe alone takes seconds.
  linear   batch norm without affine, then one linear layer; SGD with momentum 0.9, cosine schedule, no weight decay; for
           each learning rate of the sweep at once, in one batched product. The rate is chosen on a tenth of the *training*
           set held out for it, then the layer is trained anew on the whole; the test set is used once.
  kNN      cosine similarity, the 20 nearest vote with weight exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978)
Rows whose video fails are left out of training; in the test set they count as wrong.
Letters: N videos, V clips a video, D width, C classes, L learning rates.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import model as models
from video import ManifestError, VideoError, VideoReader, center_crop, clip_times, file_hash, manifest_hash, read_manifest

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # for batches of 256


class Views(Dataset):
    """Item i is (row, uint8 [V, 3, T, H, W], None), or (row, None, why it failed)."""

    def __init__(self, videos, args):
        self.videos, self.args = videos, args

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        video, args = self.videos[index], self.args
        try:
            with VideoReader(video.path) as reader:
                start, end = reader.span(video)
                times = [clip_times(start, end, reader.fps, args.frames, args.stride, (clip + 0.5) / args.clips)
                         for clip in range(args.clips)]
                frames, _ = center_crop(reader.read(np.concatenate(times), args.image_size), args.image_size)
        except VideoError as error:
            return video.row, None, str(error)
        clips = torch.from_numpy(np.ascontiguousarray(frames)).unflatten(0, (args.clips, args.frames))
        return video.row, clips.permute(0, 4, 1, 2, 3).contiguous(), None


@torch.inference_mode()
def extract(model, videos, path, about, args, device, autocast, rank, ranks, barrier):
    """The features of a manifest, float32 [N, D], NaN where a video failed; from `path` if it holds just these."""
    about_path = path.with_suffix(".json")
    if path.exists() and about_path.exists() and json.loads(about_path.read_text()) == about and args.resume == "auto":
        return np.load(path, allow_pickle=False)
    barrier()
    if rank == 0:
        about_path.unlink(missing_ok=True)
        array = np.lib.format.open_memmap(path, "w+", np.float32, (len(videos), model.config["width"]))
        array[:] = np.nan
        array.flush()
    barrier()
    array = np.load(path, mmap_mode="r+", allow_pickle=False)
    mine = videos[rank::ranks]
    loader = DataLoader(Views(mine, args), args.batch_size, num_workers=args.workers, collate_fn=list)
    with tqdm(total=len(mine), desc=path.stem, unit="video", disable=rank > 0) as bar:
        for step, items in enumerate(loader):
            if step == args.max_steps:
                break
            for error in (error for _, _, error in items if error):
                tqdm.write(error)
            rows, clips = [row for row, _, error in items if not error], [clips for _, clips, error in items if not error]
            if rows:
                with autocast:
                    tokens = model.encode(models.normalize(torch.cat(clips).to(device)))                     # [B*V, N, D]
                array[rows] = tokens.float().mean(1).unflatten(0, (len(rows), args.clips)).mean(1).cpu().numpy()
            bar.update(len(items))
    array.flush()
    barrier()
    if rank == 0:
        about_path.write_text(json.dumps(about, indent=1) + "\n")
    return np.array(array)


def standardise(train, *others):
    """Batch norm without affine, at its limit: every feature to mean 0 and deviation 1 over the training set."""
    mean, deviation = train.mean(0), train.std(0, unbiased=False)
    return [(x - mean) / (deviation + 1e-5) for x in (train, *others)]


def fit_linear(features, labels, classes, rates, epochs, seed, batch=256):
    """Trains one linear layer for every learning rate at once: features [N, D] standardised -> weight [L, D, C], bias [L, 1, C]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(len(rates), features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(len(rates), 1, classes, requires_grad=True)
    rates = torch.tensor(rates)[:, None, None] * min(batch, len(features)) / 256
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    steps, step = epochs * math.ceil(len(features) / batch), 0
    for _ in range(epochs):
        for index in torch.randperm(len(features), generator=generator).split(batch):
            logits = torch.einsum("nd,ldc->lnc", features[index], weight) + bias
            loss = F.cross_entropy(logits.flatten(0, 1), labels[index].repeat(len(rates))) * len(rates)      # a sum over rates
            for parameter, v, gradient in zip((weight, bias), velocity, torch.autograd.grad(loss, (weight, bias))):
                v.mul_(0.9).add_(gradient)
                parameter.data -= rates * 0.5 * (1 + math.cos(math.pi * step / steps)) * v
            step += 1
    return weight.detach(), bias.detach()


def linear_probe(train, train_labels, test, classes, rates, epochs, seed):
    """-> (predicted classes of the test features [N], the chosen learning rate, its accuracy on the held-out tenth)."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:max(1, len(order) // 10)], order[max(1, len(order) // 10):]
    seen, unseen = standardise(train[kept], train[held])
    weight, bias = fit_linear(seen, train_labels[kept], classes, rates, epochs, seed)
    accuracy = ((unseen @ weight + bias).argmax(-1) == train_labels[held]).float().mean(1)                   # [L]
    best = int(accuracy.argmax())
    train, test = standardise(train, test)
    weight, bias = fit_linear(train, train_labels, classes, [rates[best]], epochs, seed)
    return (test @ weight[0] + bias[0]).argmax(-1), rates[best], accuracy[best].item()


def knn(train, train_labels, test, classes, k=20, temperature=0.07):
    """Predicted classes [N] of the test features by a weighted vote of the k training features nearest by cosine."""
    train, test, votes = F.normalize(train, dim=1), F.normalize(test, dim=1), []
    for chunk in test.split(1024):
        similarity, index = (chunk @ train.T).topk(min(k, len(train)), dim=1)
        weight = ((similarity - 1) / temperature).exp()
        votes.append(torch.zeros(len(chunk), classes).scatter_add_(1, train_labels[index], weight).argmax(1))
    return torch.cat(votes)


def own_args(path):
    """The flags that pretrain.py kept in its checkpoint; {} for anybody else's checkpoint."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return saved["args"] if isinstance(saved["args"], dict) else {}
    except Exception:  # other people's files are load_pretrained's to judge
        return {}


def build_encoder(args):
    """The encoder and a name that changes with its weights; sizes come from our own checkpoints, else from the flags."""
    if args.checkpoint == "none":
        torch.manual_seed(args.seed)
        identity = f"none {args.seed}"
    else:
        path = Path(args.checkpoint)
        file = next((f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()), path)
        if not file.is_file():
            sys.exit(f"--checkpoint {path}: no such file (pretrain.py writes runs/NAME/checkpoint.pt; none: an untrained encoder)")
        identity = file_hash(file)
    ours = own_args(args.checkpoint) if args.checkpoint != "none" else {}
    args.size = args.size or ours.get("size", "base")
    args.frames, args.image_size = args.frames or ours.get("frames"), args.image_size or ours.get("image_size")
    try:
        model = models.VideoMAE(args.size, args.frames, args.image_size, text_dim=ours.get("text_dim", 512))
        if args.checkpoint != "none":
            models.load_pretrained(model, args.checkpoint)
    except ValueError as error:
        sys.exit(str(error))
    args.frames, args.image_size = model.config["frames"], model.config["image_size"]
    args.stride = args.stride or ours.get("stride", model.config["stride"])
    return model.eval(), identity


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="file or folder; none: an untrained encoder")
    parser.add_argument("--data", default="data/train.csv", help="training manifest")
    parser.add_argument("--test", default="data/val.csv", help="test manifest")
    parser.add_argument("--root", help="folder that relative paths start from (default: each manifest's)")
    parser.add_argument("--label-column", default="label", help="column of both manifests that holds the label")
    parser.add_argument("--out", type=Path, help="folder (default: probe/ beside the checkpoint, runs/untrained/probe without one)")
    features = parser.add_argument_group("features")
    features.add_argument("--size", choices=tuple(models.SIZES), help="for checkpoints that do not say it themselves")
    features.add_argument("--frames", type=int, help="frames of a clip (default: the checkpoint's)")
    features.add_argument("--stride", type=int, help="video frames from one clip frame to the next (default: the checkpoint's)")
    features.add_argument("--image-size", type=int, help="pixels (default: the checkpoint's)")
    features.add_argument("--clips", type=int, default=2, help="clips a video, whose features are averaged")
    probe = parser.add_argument_group("probe")
    probe.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the sweep, for batches of 256")
    probe.add_argument("--epochs", type=int, default=50)
    probe.add_argument("--k", type=int, default=20, help="neighbours that vote")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of the probe, and of an untrained encoder")
    run.add_argument("--batch-size", type=int, default=32, help="videos a batch and rank")
    run.add_argument("--workers", type=int, default=2, help="decoding processes a rank; 0 decodes in line")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda")
    run.add_argument("--max-steps", type=int, help="stop the extraction after this many batches, for a trial")
    run.add_argument("--resume", choices=("auto", "none"), default="auto", help="none: extract the features anew")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        videos = {split: read_manifest(path, args.root, args.label_column) for split, path in (("train", args.data), ("test", args.test))}
    except ManifestError as error:
        sys.exit(f"{error}" + ("" if Path(args.data).exists() else " (the toy world: python data/toy.py)"))
    for split in videos.values():
        for video in split:
            if video.label is None:
                sys.exit(f"{video.name}: has no label in column {args.label_column!r}")
    rank, ranks, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if ranks > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    barrier = dist.barrier if ranks > 1 else lambda: None
    use_cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        sys.exit("--device cuda: no GPU that torch can use was found")
    device = f"cuda:{local}" if use_cuda else "cpu"
    dtype = torch.bfloat16 if use_cuda and torch.cuda.is_bf16_supported() else torch.float16
    autocast = torch.autocast("cuda", dtype) if use_cuda else contextlib.nullcontext()

    model, identity = build_encoder(args)
    args.out = args.out or (Path("runs/untrained/probe") if args.checkpoint == "none" else Path(args.checkpoint).parent / "probe")
    args.out.mkdir(parents=True, exist_ok=True)
    features = {}
    for split, of_split in videos.items():
        about = {"manifest": manifest_hash(of_split), "checkpoint": identity} | {key: getattr(args, key) for key in
                 ("size", "frames", "stride", "image_size", "clips", "max_steps")}
        features[split] = torch.from_numpy(extract(model.to(device), of_split, args.out / f"{split}.features.npy", about, args,
                                                   device, autocast, rank, ranks, barrier))
    if rank > 0:
        return

    names = sorted({video.label for video in videos["train"]})
    number = {name: index for index, name in enumerate(names)}
    labels = {split: torch.tensor([number.get(video.label, -1) for video in of_split]) for split, of_split in videos.items()}
    unknown = sorted({video.label for video in videos["test"]} - set(names))
    if unknown:
        print(f"{args.test}: classes without a training video count as wrong: {', '.join(unknown)}")
    good = features["train"].isfinite().all(1)
    readable = features["test"].isfinite().all(1)
    train, train_labels, test = features["train"][good], labels["train"][good], features["test"].nan_to_num(0.0)
    if len(train) < 2:
        sys.exit(f"{args.data}: {len(train)} readable videos: nothing to train on")
    predicted, rate, held_out = linear_probe(train, train_labels, test, len(names), args.rates, args.epochs, args.seed)
    nearest = knn(train, train_labels, test, len(names), args.k)
    accuracy = lambda guess: ((guess == labels["test"]) & readable).float().mean().item()
    result = {"label": args.label_column, "checkpoint": args.checkpoint, "classes": len(names), "train": len(train),
              "test": len(test), "unreadable": int((~good).sum() + (~readable).sum()), "linear": accuracy(predicted),
              "knn": accuracy(nearest), "majority": (labels["test"] == train_labels.mode().values).float().mean().item(),
              "rate": rate, "held_out": held_out, "seed": args.seed}
    (args.out / f"{args.label_column}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
