"""The pictures of docs/walkthrough.md, from what ./demo.sh left in data/ and runs/demo/.

    ./demo.sh
    .venv/bin/pip install matplotlib
    .venv/bin/python experiments/walkthrough.py

Writes docs/walkthrough/*.png. The similarities are computed here; all other pictures are drawn by
commands that a user may give, too.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import normalize
from tgm import preview, textprobe
from tgm.arrays import companion, open_array, read_captions
from tgm.curves import load_pyplot
from tgm.features import load_encoder
from tgm.manifest import read_manifest
from tgm.run import one_line_errors

DATA = "data/train.csv"
DEMO = Path("runs/demo")
CHECKPOINT = DEMO / "text/checkpoint.pt"
OUT = ROOT / "docs/walkthrough"
ROW = 4  # the clip that the page follows
SHEET = (4, 5, 6, 7)
BATCH = 16  # videos of the matrix
# the clips of --size tiny
CLIP = ("--frames", 8, "--stride", 1, "--image-size", 48, "--patch-size", 8)


def run(*command):
    command = [str(word) for word in command]
    print("+ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def similarities(data, count):
    """Each of the first `count` videos of a manifest goes through the encoder and the contrastive
    head, no token masked -> its cosines with each of their first captions, [videos, captions], and
    these captions."""
    videos = read_manifest(data)
    remedy = "./demo.sh"
    captions = read_captions(companion(data, "captions.jsonl"), videos, remedy)
    texts, _ = open_array(companion(data, "text.npy"), videos, remedy)
    texts = np.asarray(texts[:count, 0], np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    encoder = load_encoder(str(CHECKPOINT))
    size = (encoder.frames, encoder.stride, encoder.image_size)
    clips = [preview.read_clip(video, *size).frames for video in videos[:count]]
    with torch.no_grad():
        tokens = encoder.model.encode(normalize(preview.to_bytes(torch.stack(clips))))  # [B, N, D]
    head = textprobe.find_head(CHECKPOINT)
    found = textprobe.project(head, tokens.mean(1).numpy())  # of unit length
    return found @ texts.T, [of_video[0] for of_video in captions[:count]]


def draw_similarities(path):
    plt = load_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, split in zip(axes, ("train", "val"), strict=True):
        cosines, captions = similarities(f"data/{split}.csv", BATCH)
        image = axis.imshow(cosines, cmap="bwr", vmin=-1, vmax=1)
        axis.set_xticks(range(BATCH), captions, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(BATCH), captions, fontsize=8)
        axis.set_title(f"{split}.csv: one line per video, one column per caption", fontsize=10)
        same = np.equal.outer(captions, captions)
        print(
            f"{split}.csv: mean cosine {cosines[same].mean():.3f} where the captions are equal, "
            f"{cosines[~same].mean():.3f} elsewhere"
        )
    figure.colorbar(image, ax=axes, label="cosine")
    figure.savefig(path, dpi=90)
    plt.close(figure)


@one_line_errors
def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    load_pyplot()  # ends in one line if matplotlib is missing, before anything is drawn
    if not CHECKPOINT.exists():
        sys.exit(
            f"{CHECKPOINT} is missing: run ./demo.sh first, and this from the repository's root"
        )
    OUT.mkdir(exist_ok=True)
    row = ("--data", DATA, "--row", ROW)
    run(ROOT / "masking.py", "--data", DATA, "--row", *SHEET, *CLIP, "--out", OUT / "sheet.png")
    run(ROOT / "masking.py", *row, *CLIP, "--out", OUT / "masks.png")
    figures = ("-m", "tgm.figures", *row, "--mask", "text")
    run(*figures, "--checkpoint", "none", "--size", "tiny", "--out", OUT / "before.png")
    run(*figures, "--checkpoint", CHECKPOINT, "--out", OUT / "after.png")
    run("-m", "tgm.curves", DEMO / "text/log.jsonl", "--out", OUT / "curves.png")
    draw_similarities(OUT / "similarities.png")


if __name__ == "__main__":
    main()
