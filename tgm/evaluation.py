"""Testing a classifier of videos: several views of each, every video counted once; accuracies with
intervals, and their files.

    # [N, C], the same on every rank
    probabilities = predict(model, videos, classes, views=(5, 3), ...)
    # top-1, top-5, mean class accuracy, ...
    result = score(probabilities, labels, classes)

Shapes: N videos, V views of each (clips x crops), B videos per batch, C classes.
"""

import csv
import json
import math
import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import normalize
from tgm.loading import make_loader, patient
from tgm.run import RunError, part_of_rank, writing
from tgm.sampling import Views

SAID = 3  # so many videos that cannot be read are named


@torch.inference_mode()
def predict(model, videos, classes, views, args, device, autocast, rank=0, ranks=1):
    """The mean softmax over each video's views, float32 [N, C] on the CPU, the same on every rank;
    NaN for a video that cannot be read, and RunError if none can. Rows are shared out over the
    ranks, summed up by row, and each asserted to have come once."""
    mine = part_of_rank(videos, rank, ranks)
    data = Views(
        mine, args.frames, args.image_size, args.stride, *views, args.sampling, args.video_timeout
    )
    loader = make_loader(data, max(1, args.batch_size // math.prod(views)), args.workers)
    probabilities = torch.zeros(len(videos), classes, device=device)
    counted = torch.zeros(len(videos), device=device)
    reasons = []
    model.eval()
    title = f"{views[0]} x {views[1]} views"
    with tqdm(
        total=len(mine), desc=title, unit="video", disable=None if rank == 0 else True
    ) as bar:
        for items in patient(loader):
            good = []
            for row, clips, error in items:
                counted[row] += 1
                if error is None:
                    good.append((row, clips))
                    continue
                probabilities[row] = math.nan
                reasons.append(error)
            if good:
                clips = normalize(
                    torch.cat([clips for _, clips in good]).to(device)
                )  # [B*V, 3, T, H, W]
                with autocast:
                    logits = model(clips)  # [B*V, C]
                rows = [row for row, _ in good]
                probabilities[rows] = (
                    logits.float().softmax(-1).unflatten(0, (len(good), -1)).mean(1)
                )
            bar.update(len(items))
    model.train()
    unreadable = torch.tensor(float(len(reasons)), device=device)
    if ranks > 1:
        for tensor in (probabilities, counted, unreadable):
            dist.all_reduce(tensor)
    assert (counted == 1).all(), "a test video was left out or counted twice"
    if unreadable == len(videos):
        first = reasons[0] if reasons else "another rank says why"
        raise RunError(
            f"none of the {len(videos)} videos to be tested can be read: {first}: are the paths right (--root)?"
        )
    for reason in reasons[:SAID]:
        print(f"counted as wrong: {reason}", file=sys.stderr)
    if len(reasons) > SAID:
        print(f"counted as wrong: {len(reasons) - SAID} more", file=sys.stderr)
    return probabilities.cpu()


def score(probabilities, labels, classes):
    """Accuracies of probabilities [N, C] for labels [N] (-1: of no known class): a dict with top1,
    top5, mean_class (the mean over the classes present), per_class [C] (NaN if absent), confusion
    [C, C] (true, predicted) and correct [N]. NaN rows are wrong."""
    readable = ~probabilities.isnan().any(1)
    ranked = probabilities.nan_to_num(0).topk(min(5, classes), dim=1).indices
    hit = (ranked == labels[:, None]) & readable[:, None]
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    known = readable & (labels >= 0)
    confusion.index_put_(
        (labels[known], ranked[known, 0]), torch.ones_like(labels[known]), accumulate=True
    )
    per_class = torch.tensor(
        [
            hit[labels == c, 0].float().mean().item() if (labels == c).any() else math.nan
            for c in range(classes)
        ]
    )
    return {
        "top1": hit[:, 0].float().mean().item(),
        "top5": hit.any(1).float().mean().item(),
        "mean_class": per_class.nanmean().nan_to_num(0).item(),
        "per_class": per_class,
        "confusion": confusion,
        "correct": hit[:, 0],
    }


def bootstrap(correct, resamples=2000, seed=0):
    """The 95 % percentile interval of the mean of correct [N], over resampled test sets: [low,
    high].
    """
    correct, rng = np.asarray(correct, float), np.random.default_rng(seed)
    means = [
        correct[rng.integers(len(correct), size=len(correct))].mean() for _ in range(resamples)
    ]
    return np.quantile(means, (0.025, 0.975)).tolist()


def draw_confusion(path, confusion, names):
    """The confusion matrix, each row divided by its sum: white 0, dark 1; names and counts where
    there is room.
    """
    from PIL import Image, ImageDraw

    share = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    cell = max(2, min(36, 1200 // len(names)))
    margin = min(200, 12 + 7 * max(map(len, names))) if cell >= 12 else 20
    picture = Image.new(
        "RGB", (margin + cell * len(names) + 4, margin + cell * len(names) + 4), "white"
    )
    draw = ImageDraw.Draw(picture)
    draw.text(
        (2, 2), "true, across: predicted" if margin > 140 else "true \\ predicted", fill="black"
    )
    for i, name in enumerate(names):
        if cell >= 12:
            draw.text((4, margin + i * cell + cell // 2 - 6), name[:28], fill="black")
            sideways = Image.new("RGB", (margin - 14, 12), "white")
            ImageDraw.Draw(sideways).text((0, 0), name[:28], fill="black")
            picture.paste(sideways.rotate(90, expand=True), (margin + i * cell + cell // 2 - 6, 14))
        for j in range(len(names)):
            x, y, dark = margin + j * cell, margin + i * cell, share[i, j]
            draw.rectangle(
                (x, y, x + cell - 1, y + cell - 1),
                fill=tuple(round(255 - dark * (255 - tone)) for tone in (20, 60, 130)),
                outline="lightgrey" if cell >= 12 else None,
            )
            if cell >= 24 and confusion[i, j]:
                draw.text(
                    (x + 4, y + cell // 2 - 6),
                    str(int(confusion[i, j])),
                    fill="white" if dark > 0.5 else "black",
                )
    picture.save(path)


def write_test(out, result, names, labels, probabilities, about, train_labels=None):
    """test.json, per_class.csv and confusion.png in the folder `out`; returns what test.json holds.
    "majority" is the accuracy of always saying the most frequent class of the training labels
    (where they are not given: of the test labels)."""
    known = labels[labels >= 0] if train_labels is None else train_labels
    majority = (labels == known.mode().values).float().mean().item()
    summary = about | {
        "videos": len(labels),
        "unreadable": int(probabilities.isnan().any(1).sum()),
        "top1": result["top1"],
        "top1_bootstrap": bootstrap(result["correct"]),
        "top5": result["top5"],
        "mean_class": result["mean_class"],
        "majority": majority,
    }
    with (
        writing(out / "per_class.csv"),
        open(out / "per_class.csv", "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("class", "videos", "accuracy"))
        for c, name in enumerate(names):
            accuracy = result["per_class"][c].item()
            writer.writerow(
                (name, int((labels == c).sum()), "" if math.isnan(accuracy) else f"{accuracy:.4f}")
            )
    with writing(out / "confusion.png"):
        draw_confusion(out / "confusion.png", result["confusion"], names)
    with writing(out / "test.json"):  # last: where it is, the test is done
        (out / "test.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary
