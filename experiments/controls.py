"""Maps that take the place of the text's saliency in the study: the same mask, another cue.

    python experiments/controls.py bystander --data data/train.csv --out runs/study/maps/bystander

    bystander  CLIP's patches against the true caption of the other thing in the video (column
               bystander of the manifest). It is one text, repeated, so that the array has the usual
               shape
    shuffled   CLIP's patches against the captions of another video. The videos are shuffled at
               random, and any that would get a text of its own is swapped again, until none does
    no-text    the cosine of each patch to the class token of its own image, both by CLIP; the same
               for every caption
    truth      the share of each patch that the actor covers (data/toy.py's train.masks.npy)

Reads   the manifest, its videos, and beside it the captions and the arrays that saliency.py wrote
Writes  PREFIX.saliency.npy, and a copy of the own PREFIX.text.npy: the contrastive loss always
        aligns with the video's own captions

Shapes: N videos, K captions, S moments, G grid, D embedding.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import toy

import saliency
from tgm import clip as clip_models
from tgm.arrays import companion, open_array, origin, read_captions, text_commands
from tgm.manifest import file_sizes, read_manifest
from tgm.run import RunError, one_line_errors
from tgm.video import VideoReader, segment_midpoints


def shuffle(captions, seed=0):
    """captions: the texts of each video, a list of lists -> a permutation of the videos after which
    none has a text that it had: int [N]. RunError if none is found."""
    rng = np.random.default_rng(seed)
    texts = [frozenset(of_video) for of_video in captions]
    order = rng.permutation(len(texts))
    for _ in range(100):
        clashes = [row for row in range(len(texts)) if texts[row] & texts[order[row]]]
        for row in clashes:
            other = rng.integers(len(texts))
            order[[row, other]] = order[[other, row]]
        if not clashes:
            return order
    raise RunError("shuffled: too many videos have the same texts")


def other_captions(control, data, videos):
    """The captions that the maps of `bystander` or `shuffled` follow: a list of K texts per
    video."""
    remedy = f"python caption.py --data {data}"
    own = read_captions(companion(data, "captions.jsonl"), videos, remedy)
    if control == "shuffled":
        return [own[other] for other in shuffle(own)]
    with open(data, newline="", encoding="utf-8") as file:
        texts = [line["bystander"] for line in csv.DictReader(file)]
    return [[text] * len(captions) for text, captions in zip(texts, own, strict=True)]


def no_text_maps(visual, images):
    """images [S, 3, H, W] normalised -> float32 [S, G, G]: the cosine of each patch to the class
    token of its image."""
    image = F.normalize(visual(images).float(), dim=-1)  # [S, D]
    patches = saliency.patch_features(visual, images, "self")  # [S, G*G, D]
    return torch.einsum("spd,sd->sp", patches, image).unflatten(-1, visual.grid_size)


@torch.inference_mode()
def no_text(clip, videos, moments):
    """Maps [N, S, G, G] of `no-text`."""
    visual = clip_models.load_clip(clip, "openai", None, "cpu")[0].visual
    mean = torch.tensor(visual.image_mean)[:, None, None]
    std = torch.tensor(visual.image_std)[:, None, None]
    maps = np.zeros((len(videos), moments, *visual.grid_size), np.float16)
    for video in tqdm(videos, "no-text", unit="video", disable=None):
        with VideoReader(video.path) as reader:
            times = segment_midpoints(*reader.span(video), moments)
            frames = reader.read(times, tuple(visual.image_size))
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)
        maps[video.row] = no_text_maps(visual, (images / 255 - mean) / std).numpy()
    return maps


def truth(data, moments, grid):
    """Maps [N, S, G, G] of `truth`."""
    packed = np.load(companion(data, "masks.npy"), mmap_mode="r")  # [N, 20, 64, 8]
    frames = ((np.arange(moments) + 0.5) * toy.FRAMES / moments).astype(int)
    pixels = np.unpackbits(packed[:, frames], axis=-1)  # [N, S, 64, 64]
    side = toy.SIZE // grid
    patches = pixels.reshape(len(packed), moments, grid, side, grid, side)
    return patches.mean((3, 5), dtype=np.float32)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("control", choices=("bystander", "shuffled", "no-text", "truth"))
    parser.add_argument("--data", default="data/train.csv", help="the manifest")
    parser.add_argument(
        "--out", metavar="PREFIX", required=True, help="write PREFIX.saliency.npy and so on"
    )
    parser.add_argument(
        "--clip", default=f"local-dir:{ROOT}/data/toy/clip", help="the CLIP of saliency.py"
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    videos = read_manifest(args.data)
    remedy = text_commands(args.data, videos)
    own, _ = open_array(companion(args.data, "saliency.npy"), videos, remedy)  # [N, K, S, G, G]
    open_array(companion(args.data, "text.npy"), videos, remedy)
    if args.control in ("bystander", "shuffled"):
        captions = other_captions(args.control, args.data, videos)
        path = Path(f"{args.out}.captions.jsonl")
        lines = [
            json.dumps({"path": video.name, "captions": texts}) + "\n"
            for video, texts in zip(videos, captions, strict=True)
        ]
        path.write_text("".join(lines), encoding="utf-8")
        # under another name, because this writes a text.npy of the other captions
        other = f"{args.out}.other"
        flags = ["--data", args.data, "--captions", str(path), "--out", other]
        flags += ["--clip", args.clip, "--moments", str(own.shape[2]), "--resume", "none"]
        saliency.main(flags)
        for ending in ("json", "npy"):
            Path(f"{other}.saliency.{ending}").replace(f"{args.out}.saliency.{ending}")
            Path(f"{other}.text.{ending}").unlink()
    else:
        if args.control == "no-text":
            maps = no_text(args.clip, videos, own.shape[2])
        else:
            maps = truth(args.data, *own.shape[2:4])
        maps = np.repeat(maps[:, None].astype(np.float16), own.shape[1], 1)
        np.save(f"{args.out}.saliency.npy", maps)
        about = origin(videos, len(videos), {"cue": args.control, "shape": list(maps.shape)})
        about["files"] = file_sizes(videos)  # by which a world that was made again is noticed
        Path(f"{args.out}.saliency.json").write_text(json.dumps(about, indent=1) + "\n")
    for ending in ("json", "npy"):  # last: its text.npy says that a control is whole
        shutil.copy(companion(args.data, f"text.{ending}"), f"{args.out}.text.{ending}")


if __name__ == "__main__":
    main()
