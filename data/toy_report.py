"""The last table of demo.sh: what each stage made of the toy world, scored against its truth.

    python data/toy.py --report runs/demo

Pointing accuracy: how often the patch of highest saliency points at the object: the object is
within 2 pixels of the patch's centre along both axes (the pointing game allows 15 pixels in
photographs, Zhang et al. 2016, arXiv 1608.00507).
AUC: how likely a patch on the object (at least half of its pixels are) scores higher than one that
is not, mean over frames."""

import csv
import json
from pathlib import Path

import numpy as np
import toy

TOLERANCE = 2  # pixels about a patch's centre that count as pointed at


def caption_match(folder, split="val"):
    """Share of the captions that equal the true one, word for word."""
    with open(folder / f"{split}.csv", newline="") as file:
        truth = [line["caption"] for line in csv.DictReader(file)]
    made = [
        json.loads(line)["captions"]
        for line in (folder / f"{split}.captions.jsonl").read_text().splitlines()
    ]
    return float(
        np.mean([text == true for texts, true in zip(made, truth, strict=True) for text in texts])
    )


def score_saliency(saliency, masks):
    """Saliency [N, K, S, G, G] against the true packed masks [N, 20, 64, 8]: pointing accuracy and
    AUC over all videos, captions and moments, and what chance gives for pointing (the share of
    patches that point at the object)."""
    count, texts, moments, grid, _ = saliency.shape
    seconds = (np.arange(moments) + 0.5) * (toy.FRAMES / toy.FPS) / moments
    pixels = np.unpackbits(masks[:, np.floor(seconds * toy.FPS + 1e-6).astype(int)], axis=-1)
    side, margin = toy.SIZE // grid, max(0, toy.SIZE // grid // 2 - TOLERANCE)
    patches = pixels.reshape(count, moments, grid, side, grid, side).swapaxes(
        3, 4
    )  # [N, S, G, G, side, side]
    near = patches[..., margin : side - margin, margin : side - margin].any((-1, -2))
    on = patches.mean((-1, -2), dtype=np.float32) >= 0.5
    near, on = (
        np.broadcast_to(x[:, None], saliency.shape).reshape(-1, grid * grid) for x in (near, on)
    )
    scores = saliency.astype(np.float32).reshape(on.shape)
    known = np.isfinite(scores).all(1) & on.any(1) & ~on.all(1)
    scores, near, on = scores[known], near[known], on[known]
    pointing = np.take_along_axis(near, scores.argmax(1)[:, None], 1).mean()
    ranks = scores.argsort(1, kind="stable").argsort(1) + 1.0  # Mann and Whitney's U
    positives = on.sum(1)
    auc = ((ranks * on).sum(1) - positives * (positives + 1) / 2) / (
        positives * (grid * grid - positives)
    )
    return float(pointing), float(auc.mean()), float(near.mean())


def report(folder, runs):
    """Prints the table. folder: the toy world's; runs: what demo.sh made."""
    masks = np.load(folder / "val.masks.npy")
    lines = [("captions, exact match on val.csv", f"{caption_match(folder):.3f}")]
    for dense in ("last", "value", "self"):
        pointing, auc, share = score_saliency(np.load(runs / f"{dense}.saliency.npy"), masks)
        lines.append(
            (
                f"saliency --dense {dense}: pointing, AUC (chance {share:.2f}, 0.50)",
                f"{pointing:.3f}  {auc:.3f}",
            )
        )
    log = [json.loads(line) for line in (runs / "text/log.jsonl").read_text().splitlines()]
    for key, name in (("loss_mae", "reconstruction loss"), ("loss_nce", "contrastive loss")):
        lines.append((f"{name}, first and last logged", f"{log[0][key]:.3f}  {log[-1][key]:.3f}"))
    for label, name in (("label", "action"), ("object", "object")):
        trained, untrained = (
            json.loads((runs / where / f"{label}.json").read_text())
            for where in ("text/probe", "untrained")
        )
        chance = f"(majority class {trained['majority']:.2f})"
        for probe in ("linear", "knn"):
            lines.append(
                (
                    f"{name}, {probe}: pretrained, untrained {chance}",
                    f"{trained[probe]:.3f}  {untrained[probe]:.3f}",
                )
            )
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}   {value}")
    print("pictures:", *sorted(str(path) for path in Path(runs).rglob("*.png")), sep="\n  ")
