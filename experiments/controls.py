"""Saliency that is not the own caption's, in the format of saliency.py's: the controls of
experiments/study.py.

    python experiments/controls.py shuffled --out runs/study/saliency/shuffled     PREFIX.captions.jsonl: other videos' captions; then
    python saliency.py --data data/train.csv --captions runs/study/saliency/shuffled.captions.jsonl --out runs/study/saliency/shuffled ...
    python experiments/controls.py no-text --out runs/study/saliency/no-text       a minute on the toy world
    python experiments/controls.py truth --out runs/study/saliency/truth           seconds; the toy world alone
    python pretrain.py --mask text --companions runs/study/saliency/no-text

    shuffled   line i has the path of video i and the captions of another: a permutation of the
               videos, drawn at random, in which videos change places until none has a text that it
               had (where that is possible). How often each text occurs is kept
    no-text    the cosine of each patch's feature to the class token's of its own image, both by
               CLIP; the same for every caption
    truth      the share of each patch that the true object covers (data/toy.py's train.masks.npy)

no-text and truth take the videos' own text embeddings along, for the contrastive loss
(PREFIX.text.npy).
Letters: N videos, K captions, S moments, G grid, D embedding.
"""

import argparse
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
from tgm.arrays import companion, open_array, read_captions
from tgm.manifest import ManifestError, manifest_hash, read_manifest
from tgm.run import RunError
from tgm.video import VideoError, VideoReader, segment_midpoints


def shuffle(captions, seed=0):
    """captions: of each video, a list of texts -> a permutation of the videos after which none
    has a text that it had: int [N].
    """
    rng, texts = np.random.default_rng(seed), [frozenset(of_video) for of_video in captions]
    order = rng.permutation(len(texts))
    for _ in range(100):
        clashes = [row for row in range(len(texts)) if texts[row] & texts[order[row]]]
        for row in clashes:
            other = rng.integers(len(texts))
            order[[row, other]] = order[[other, row]]
        if not clashes:
            break
    return order


def no_text_maps(visual, images):
    """images [S, 3, H, W] normalised -> float32 [S, G, G]: cosine of each patch to the class
    token of its image.
    """
    image = F.normalize(visual(images).float(), dim=-1)  # [S, D]
    return torch.einsum(
        "spd,sd->sp", saliency.patch_features(visual, images, "self"), image
    ).unflatten(-1, visual.grid_size)


@torch.inference_mode()
def no_text(args, videos, moments):
    """-> (maps [N, S, G, G], what made them); a video that cannot be read is NaN."""
    device = (
        "cuda"
        if args.device == "auto" and torch.cuda.is_available()
        else args.device.replace("auto", "cpu")
    )
    model, _ = saliency.load_clip(args.clip, args.pretrained, None, device)
    visual = model.visual
    mean, std = (
        torch.tensor(value, device=device)[:, None, None]
        for value in (visual.image_mean, visual.image_std)
    )
    maps = np.full((len(videos), moments, *visual.grid_size), np.nan, np.float16)
    for video in tqdm(videos, "no-text", unit="video"):
        try:
            with VideoReader(video.path) as reader:
                frames = reader.read(
                    segment_midpoints(*reader.span(video), moments), tuple(visual.image_size)
                )
        except VideoError as error:
            tqdm.write(str(error))
            continue
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).to(device)
        maps[video.row] = no_text_maps(visual, (images / 255 - mean) / std).cpu().numpy()
    return maps, {
        "cue": "class token",
        "clip": args.clip,
        "pretrained": None if ":" in args.clip else args.pretrained,
        "activation": saliency.activation_of(model),
    }


def truth(args, videos, moments, grid):
    """-> (maps [N, S, G, G], what made them)."""
    # [N, 20, 64, 8] of packed bits
    masks = np.load(companion(args.data, "masks.npy"), mmap_mode="r")
    frames = ((np.arange(moments) + 0.5) * toy.FRAMES / moments).astype(int)
    bits = np.unpackbits(masks[:, frames], axis=-1).reshape(
        len(videos), moments, grid, toy.SIZE // grid, grid, toy.SIZE // grid
    )
    return bits.mean((3, 5), dtype=np.float32), {"cue": "true mask"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("control", choices=("shuffled", "no-text", "truth"))
    parser.add_argument(
        "--data",
        default="data/train.csv",
        help="the manifest; its captions and arrays are read beside it",
    )
    parser.add_argument(
        "--out", metavar="PREFIX", required=True, help="write PREFIX.saliency.npy and so on"
    )
    parser.add_argument(
        "--clip", default=f"local-dir:{ROOT}/data/toy/clip", help="as of saliency.py"
    )
    parser.add_argument("--pretrained", default="openai", help="as of saliency.py")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    remedy = f"python caption.py --data {args.data} && python saliency.py --data {args.data}"
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    try:
        videos = read_manifest(args.data)
        if args.control == "shuffled":
            captions = read_captions(companion(args.data, "captions.jsonl"), videos, remedy)
            entries = (
                {"path": video.name, "captions": captions[other]}
                for video, other in zip(videos, shuffle(captions))
            )
            Path(f"{args.out}.captions.jsonl").write_text(
                "".join(json.dumps(entry) + "\n" for entry in entries)
            )
            return
        own, _ = open_array(companion(args.data, "saliency.npy"), videos, remedy)
        open_array(companion(args.data, "text.npy"), videos, remedy)
        maps, about = (
            no_text(args, videos, own.shape[2])
            if args.control == "no-text"
            else truth(args, videos, *own.shape[2:4])
        )
    except (ManifestError, RunError, OSError) as error:
        sys.exit(str(error))
    maps = np.repeat(maps[:, None].astype(np.float16), own.shape[1], 1)  # [N, K, S, G, G]
    for kind in ("npy", "json"):
        shutil.copy(companion(args.data, f"text.{kind}"), f"{args.out}.text.{kind}")
    np.save(f"{args.out}.saliency.npy", maps)
    about = {"manifest": manifest_hash(videos), **about, "shape": list(maps.shape)}
    Path(f"{args.out}.saliency.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{args.out}.saliency.npy {list(maps.shape)}, {args.out}.text.npy")


if __name__ == "__main__":
    main()
