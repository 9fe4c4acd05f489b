"""The last table of demo.sh: what each stage made of the toy world, scored against its truth.

    python data/toy.py --report runs/demo

Pointing accuracy: how often the patch of highest saliency lies on the object (at least half of its pixels do).
AUC: how likely a patch on the object scores higher than one off it, averaged over frames. Chance: the object's share, 0.5.
"""
import csv
import json
from pathlib import Path

import numpy as np

import toy


def caption_match(folder, split="val"):
    """Share of the captions that equal the true one, word for word."""
    with open(folder / f"{split}.csv", newline="") as file:
        truth = [line["caption"] for line in csv.DictReader(file)]
    made = [json.loads(line)["captions"] for line in (folder / f"{split}.captions.jsonl").read_text().splitlines()]
    return float(np.mean([text == true for texts, true in zip(made, truth, strict=True) for text in texts]))


def object_cells(masks, moments, grid):
    """The true mask on the grid of the saliency: packed masks [N, 20, 64, 8] -> share of each cell, float [N, S, G, G]."""
    seconds = (np.arange(moments) + 0.5) * (toy.FRAMES / toy.FPS) / moments
    frames = np.floor(seconds * toy.FPS + 1e-6).astype(int)
    pixels = np.unpackbits(masks[:, frames], axis=-1)                                       # [N, S, 64, 64]
    side = toy.SIZE // grid
    return pixels.reshape(len(masks), moments, grid, side, grid, side).mean((3, 5), dtype=np.float32)


def score_saliency(saliency, masks):
    """Pointing accuracy, AUC and the object's mean share of the patches, for saliency [N, K, S, G, G], all K captions."""
    saliency = saliency.astype(np.float32)
    truth = object_cells(masks, saliency.shape[2], saliency.shape[-1]) >= 0.5
    truth = np.broadcast_to(truth[:, None], saliency.shape).reshape(-1, saliency.shape[-1] ** 2)
    scores = saliency.reshape(truth.shape)
    known = np.isfinite(scores).all(1) & truth.any(1) & ~truth.all(1)
    scores, truth = scores[known], truth[known]
    pointing = np.take_along_axis(truth, scores.argmax(1)[:, None], 1).mean()
    ranks = scores.argsort(1, kind="stable").argsort(1) + 1.0                               # Mann and Whitney's U
    on = truth.sum(1)
    auc = ((ranks * truth).sum(1) - on * (on + 1) / 2) / (on * (truth.shape[1] - on))
    return float(pointing), float(auc.mean()), float(truth.mean())


def report(folder, runs):
    """Prints the table. folder: the toy world's; runs: what demo.sh made."""
    masks = np.load(folder / "val.masks.npy")
    lines = [("captions, exact match on val.csv", f"{caption_match(folder):.3f}")]
    for dense in ("last", "value", "self"):
        pointing, auc, share = score_saliency(np.load(runs / f"{dense}.saliency.npy"), masks)
        lines.append((f"saliency --dense {dense}: pointing, AUC (chance {share:.2f}, 0.50)", f"{pointing:.3f}  {auc:.3f}"))
    log = [json.loads(line) for line in (runs / "text/log.jsonl").read_text().splitlines()]
    for key, name in (("loss_mae", "reconstruction loss"), ("loss_nce", "contrastive loss")):
        lines.append((f"{name}, first and last logged", f"{log[0][key]:.3f}  {log[-1][key]:.3f}"))
    for label, name in (("label", "action"), ("object", "object")):
        trained, untrained = (json.loads((runs / where / f"{label}.json").read_text()) for where in ("text/probe", "untrained"))
        chance = f"(majority class {trained['majority']:.2f})"
        for probe in ("linear", "knn"):
            lines.append((f"{name}, {probe}: pretrained, untrained {chance}", f"{trained[probe]:.3f}  {untrained[probe]:.3f}"))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}   {value}")
    print("pictures:", *sorted(str(path) for path in Path(runs).rglob("*.png")), sep="\n  ")
