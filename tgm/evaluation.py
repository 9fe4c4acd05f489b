"""Testing a classifier of videos: several views of each, every video counted once; accuracies with
intervals, written to files. Needs model.py; of this folder loading.py, run.py and sampling.py.

    views = Views(videos, frames=16, image_size=224, stride=4, clips=5, crops=3)
    probabilities = predict(model, views, classes=400, device=device, autocast=autocast)    [N, C]
    result = score(probabilities, labels, classes=400)                     top-1, top-5, ...

Shapes: N videos, V views of each (clips x crops), B videos per batch, C classes.
"""

import csv
import json
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

from model import VideoViT, normalize
from tgm.loading import checked_batches, make_loader
from tgm.run import RunError, add_up_over_ranks, give_up_together, part_of_rank, writing
from tgm.sampling import Views

NAMED_FAILURES = 3  # at most so many videos that cannot be read are named, on each rank
T975 = (  # Student's t at 0.975, for 1 to 30 degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@torch.inference_mode()
def predict(
    model: VideoViT,
    views: Views,
    *,
    classes: int,
    device: torch.device,
    autocast: AbstractContextManager,
    batch_size: int = 32,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> torch.Tensor:
    """The mean softmax over each video's views, float32 [N, C] on the CPU, the same on every rank;
    NaN for a video that cannot be read.

    views: of all N videos of a manifest; each rank reads its share. autocast: the context in which
    the model runs, entered once per batch. batch_size: the most views that the model gets at once,
    per rank. The model is in training mode afterwards. RunError if no video can be read, or if the
    model's outputs are not finite."""
    per_video = views.clips * views.crops
    mine = part_of_rank(range(len(views)), rank, ranks)
    loader = make_loader(Subset(views, mine), max(1, batch_size // per_video), workers)
    probabilities = torch.zeros(len(views), classes, device=device)
    counted = torch.zeros(len(views), device=device)  # how many ranks took each video
    reasons = []
    diverged = torch.zeros((), device=device)  # batches whose outputs are not finite
    model.eval()
    title = f"{views.clips} x {views.crops} views"
    quiet = None if rank == 0 else True  # for tqdm None means: quiet if stderr is no terminal
    with tqdm(total=len(mine), desc=title, unit="video", disable=quiet) as bar:
        for items in checked_batches(loader):
            rows = []
            clips = []
            for row, video_views, error in items:
                counted[row] += 1
                if error is None:
                    rows.append(row)
                    clips.append(video_views)
                else:
                    probabilities[row] = math.nan
                    reasons.append(error)
            if rows:
                video = normalize(torch.cat(clips).to(device))  # [B*V, 3, T, H, W]
                with autocast:
                    logits = torch.cat([model(part) for part in video.split(batch_size)])  # [B*V,C]
                diverged += ~logits.isfinite().all()
                each_view = logits.softmax(-1).unflatten(0, (len(rows), -1))  # [B, V, C]
                probabilities[rows] = each_view.mean(1)
            bar.update(len(items))
    model.train()

    # Each row was filled by one rank and is 0 on the others; NaN survives the sum.
    unreadable = torch.tensor(float(len(reasons)), device=device)
    for tensor in (probabilities, counted, unreadable, diverged):
        add_up_over_ranks(tensor)
    if diverged > 0:
        give_up_together(
            "the model's outputs are not finite: its training diverged, or fp16 does not hold them "
            "(--amp bf16 or off)"
        )
    assert (counted == 1).all(), "a test video was left out or counted twice"
    if unreadable == len(views):
        # a rank that had no videos knows no reason
        first = reasons[0] if reasons else "another rank says why"
        raise RunError(
            f"none of the {len(views)} videos to be tested can be read: {first}: "
            "are the paths right (--root)?"
        )
    for reason in reasons[:NAMED_FAILURES]:
        print(f"counted as wrong: {reason}", file=sys.stderr)
    if len(reasons) > NAMED_FAILURES:
        print(f"counted as wrong: {len(reasons) - NAMED_FAILURES} more", file=sys.stderr)
    return probabilities.cpu()


def score(probabilities: torch.Tensor, labels: torch.Tensor, classes: int) -> dict:
    """Accuracies of probabilities [N, C] for labels [N] (-1: of no known class).

    Returns top1, top5, mean_class (the mean over the classes present), per_class [C] (NaN if
    absent), confusion [C, C] (true, predicted) and correct [N]. A row of NaN counts as wrong, and
    is left out of confusion. A label of -1 counts as wrong in top1 and top5, and is left out of
    mean_class, per_class and confusion."""
    readable = ~probabilities.isnan().any(1)
    ranked = probabilities.nan_to_num(0).topk(min(5, classes), dim=1).indices  # best class first
    hit = (ranked == labels[:, None]) & readable[:, None]  # [N, 5, or C if there are fewer]
    correct = hit[:, 0]
    videos_of_class = torch.bincount(labels[labels >= 0], minlength=classes)
    # the label of a correct video is never -1
    per_class = torch.bincount(labels[correct], minlength=classes) / videos_of_class  # 0 / 0: NaN
    usable = readable & (labels >= 0)
    pairs = labels[usable] * classes + ranked[usable, 0]
    confusion = torch.bincount(pairs, minlength=classes**2).unflatten(0, (classes, classes))
    return {
        "top1": correct.float().mean().item(),
        "top5": hit.any(1).float().mean().item(),
        "mean_class": per_class.nanmean().nan_to_num(0).item(),
        "per_class": per_class,
        "confusion": confusion,
        "correct": correct,
    }


def bootstrap(correct: Sequence[float], resamples: int = 2000, seed: int = 0) -> list[float]:
    """The 95 % percentile interval of the mean of `correct` [N], over resampled test sets: [low,
    high]."""
    correct = np.asarray(correct, float)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(len(correct), size=len(correct))
        means.append(correct[drawn].mean())
    return np.quantile(means, (0.025, 0.975)).tolist()


def t_interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the mean of a few values by Student's t, [low, high]; None for a single
    value."""
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    freedom = min(len(values) - 1, len(T975))  # above 30: the value for 30, slightly too wide
    margin = T975[freedom - 1] * np.std(values, ddof=1) / math.sqrt(len(values))
    return [float(mean - margin), float(mean + margin)]


def draw_confusion(path: Path, confusion: torch.Tensor, names: Sequence[str]) -> None:
    """Draws the confusion matrix [C, C], each row divided by its sum: white is 0, dark is 1. Names
    and counts are written where there is room."""
    from PIL import Image, ImageDraw

    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    cell = max(2, min(36, 1200 // len(names)))  # pixels
    named = cell >= 12
    counted = cell >= 24
    margin = 20
    if named:
        margin = min(200, 12 + 7 * max(map(len, names)))
    side = margin + cell * len(names) + 4
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    title = "true, across: predicted" if margin > 140 else "true \\ predicted"
    draw.text((2, 2), title, fill="black")
    for number, name in enumerate(names):
        middle = margin + number * cell + cell // 2 - 6
        if named:
            draw.text((4, middle), name[:28], fill="black")
            sideways = Image.new("RGB", (margin - 14, 12), "white")
            ImageDraw.Draw(sideways).text((0, 0), name[:28], fill="black")
            picture.paste(sideways.rotate(90, expand=True), (middle, 14))
    outline = "lightgrey" if named else None
    for (true, predicted), share in np.ndenumerate(shares):
        if share == 0 and not named:
            continue  # white already
        x = margin + predicted * cell
        y = margin + true * cell
        colour = tuple(round(255 - share * (255 - darkest)) for darkest in (20, 60, 130))
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour, outline=outline)
        count = int(confusion[true, predicted])
        if counted and count > 0:
            ink = "white" if share > 0.5 else "black"
            draw.text((x + 4, y + cell // 2 - 6), str(count), fill=ink)
    picture.save(path)


def write_test(
    out: Path,
    result: dict,
    names: Sequence[str],
    labels: torch.Tensor,
    probabilities: torch.Tensor,
    about: dict,
    train_labels: torch.Tensor | None = None,
) -> dict:
    """Writes test.json, per_class.csv and confusion.png to the folder `out`; returns the contents
    of test.json.

    result: of `score`. names: of the classes. about: further entries of test.json. The entry
    "majority" is the accuracy of always answering the most frequent class of the training labels,
    or of the test labels if those are not given. RunError if a file cannot be written."""
    floor_labels = labels[labels >= 0] if train_labels is None else train_labels
    summary = about | {
        "videos": len(labels),
        "unreadable": int(probabilities.isnan().any(1).sum()),
        "top1": result["top1"],
        "top1_bootstrap": bootstrap(result["correct"]),
        "top5": result["top5"],
        "mean_class": result["mean_class"],
        "majority": (labels == floor_labels.mode().values).float().mean().item(),
    }
    with writing(out / "test.json"):
        # Removes the one of an earlier test. test.json is written last: if it is there, the other
        # two files belong to it.
        (out / "test.json").unlink(missing_ok=True)
    path = out / "per_class.csv"
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "videos", "accuracy"))
        for number, name in enumerate(names):
            accuracy = result["per_class"][number].item()
            text = "" if math.isnan(accuracy) else f"{accuracy:.4f}"
            writer.writerow((name, int((labels == number).sum()), text))
    with writing(out / "confusion.png"):
        draw_confusion(out / "confusion.png", result["confusion"], names)
    aside = out / "test.json.new"
    with writing(out / "test.json"):
        aside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        aside.replace(out / "test.json")
    return summary
