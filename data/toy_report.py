"""The last tables of demo.sh: what each stage made of the toy world, scored against its truth.

    python data/toy.py --report runs/demo

Pointing accuracy: how often the patch of highest saliency points at a thing: the thing is within
2 pixels of the patch's centre along both axes (the pointing game allows 15 pixels in photographs,
Zhang et al. 2016, arXiv 1608.00507). AUC: how likely a patch on the thing (at least half of its
pixels are) scores higher than one that is not, mean over frames.
"""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import toy

from tgm.manifest import read_manifest
from tgm.textprobe import find_head, probe_head

TOLERANCE = 2  # pixels about a patch's centre that count as pointed at
LABELS = {"label": "action", "object": "object", "scene": "scene"}


def read_truth(folder, split):
    """The lines of a manifest, each with the actor's colour beside its columns."""
    with open(folder / f"{split}.csv", newline="") as file:
        return [line | {"colour": line["caption"].split()[1]} for line in csv.DictReader(file)]


def caption_match(folder, split="val"):
    """Share of the captions that equal the true one, word for word."""
    lines = (folder / f"{split}.captions.jsonl").read_text().splitlines()
    made = [json.loads(line)["captions"] for line in lines]
    truth = read_truth(folder, split)
    right = [
        text == line["caption"] for texts, line in zip(made, truth, strict=True) for text in texts
    ]
    return float(np.mean(right))


def usual_label(folder, column, given):
    """Accuracy on val.csv of saying what `column` most often is in probe.csv where `given` is the
    same: what a probe gets that knows `given` alone."""
    seen = {}
    for line in read_truth(folder, "probe"):
        seen.setdefault(line[given], Counter())[line[column]] += 1
    usual = {value: counts.most_common(1)[0][0] for value, counts in seen.items()}
    right = [usual.get(line[given]) == line[column] for line in read_truth(folder, "val")]
    return float(np.mean(right))


def score_saliency(saliency, masks):
    """Saliency [N, K, S, G, G] against packed masks [N, 20, 64, 8] of a thing.

    Returns pointing accuracy and AUC over all videos, captions and moments, and what chance gives
    for pointing: the share of patches that point at the thing."""
    count, _, moments, grid, _ = saliency.shape
    seconds = (np.arange(moments) + 0.5) * (toy.FRAMES / toy.FPS) / moments
    pixels = np.unpackbits(masks[:, np.floor(seconds * toy.FPS + 1e-6).astype(int)], axis=-1)
    side = toy.SIZE // grid
    margin = max(0, side // 2 - TOLERANCE)
    patches = pixels.reshape(count, moments, grid, side, grid, side)
    patches = patches.swapaxes(3, 4)  # [N, S, G, G, side, side]
    near = patches[..., margin : side - margin, margin : side - margin].any((-1, -2))
    on = patches.mean((-1, -2), dtype=np.float32) >= 0.5
    near = np.broadcast_to(near[:, None], saliency.shape).reshape(-1, grid * grid)
    on = np.broadcast_to(on[:, None], saliency.shape).reshape(-1, grid * grid)
    scores = saliency.astype(np.float32).reshape(on.shape)
    known = np.isfinite(scores).all(1) & on.any(1) & ~on.all(1)
    scores, near, on = scores[known], near[known], on[known]
    pointing = np.take_along_axis(near, scores.argmax(1)[:, None], 1).mean()
    ranks = scores.argsort(1, kind="stable").argsort(1) + 1.0  # Mann and Whitney's U
    positives = on.sum(1)
    wins = (ranks * on).sum(1) - positives * (positives + 1) / 2
    auc = wins / (positives * (grid * grid - positives))
    return float(pointing), float(auc.mean()), float(near.mean())


def show(cell):
    return cell if isinstance(cell, str) else f"{cell:.3f}"


def print_table(head, rows):
    """Columns as wide as they need to be; numbers with three digits."""
    cells = [[show(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print()


def saliency_rows(folder, runs):
    actor, bystander = np.load(folder / "val.masks.npy"), np.load(folder / "val.bystander.npy")
    of = {"last": runs / "last", "value": runs / "value", "self": folder / "val"}
    for dense, prefix in of.items():
        maps = np.load(f"{prefix}.saliency.npy")
        pointing, auc, chance = score_saliency(maps, actor)
        yield f"--dense {dense}", pointing, score_saliency(maps, bystander)[0], auc
    yield "chance", chance, score_saliency(maps, bystander)[2], 0.5


def probe_rows(folder, runs):
    for column, name in LABELS.items():
        trained = json.loads((runs / f"text/probe/{column}.json").read_text())
        untrained = json.loads((runs / f"untrained/{column}.json").read_text())
        colour = usual_label(folder, column, "colour")
        scene = usual_label(folder, column, "scene") if column != "scene" else ""
        for probe in ("linear", "knn"):
            floors = trained["majority"], colour, scene
            yield f"{name}, {probe}", trained[probe], untrained[probe], *floors


def head_rows(folder, runs):
    """The pretrained encoder's text head, the same head with its outputs shuffled, and chance."""
    result = json.loads((runs / "text/probe/object.json").read_text())
    head = find_head(runs / "text/checkpoint.pt")
    shuffled = head._replace(weight=np.random.default_rng(0).permutation(head.weight))
    features = np.load(runs / "text/probe/test.features.npy")
    manifest = folder / "val.csv"
    videos = read_manifest(manifest, label_column="object")
    floor = probe_head(shuffled, features, videos, manifest)
    ways = {"video to text": "video_to_text", "text to video": "text_to_video"}
    yield "object, top-1", result["zero_shot"], floor["zero_shot"], 1 / result["zero_shot_classes"]
    for name, way in ways.items():
        for most in (1, 5):
            key = f"recall_{most}"
            chance = result[way][f"chance_{most}"]
            yield f"{name}, recall at {most}", result[way][key], floor[way][key], chance


def report(folder, runs):
    """Prints the tables. folder: the toy world's; runs: what demo.sh made."""
    print(f"Captions: {caption_match(folder):.3f} of val.csv's are the true ones, word for word.\n")
    head = ("saliency of the actor's caption", "points at actor", "at bystander", "AUC")
    print_table(head, saliency_rows(folder, runs))
    log = [json.loads(line) for line in (runs / "text/log.jsonl").read_text().splitlines()]
    losses = {"reconstruction": "loss_mae", "contrastive": "loss_nce"}
    rows = [(name, log[0][key], log[-1][key]) for name, key in losses.items()]
    print_table(("loss", "first logged", "last"), rows)
    floors = "majority", "colour alone", "scene alone"
    print_table(("probe, on val.csv", "pretrained", "untrained", *floors), probe_rows(folder, runs))
    print_table(
        ("text head, on val.csv", "pretrained", "shuffled", "chance"), head_rows(folder, runs)
    )
    print("pictures:", *sorted(str(path) for path in Path(runs).rglob("*.png")), sep="\n  ")
