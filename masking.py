"""Which tokens a video masked autoencoder hides: random, tube, and text-guided masks, at one interface and one cost.

    make_mask("text", 0.6, batch=32, grid=(8, 14, 14), saliency=maps)     -> bool [32, 1568], True = masked

The rule that makes algorithms comparable: in a grid of t x h x w tokens every row masks exactly t * floor(ratio * h * w)
tokens, whatever the algorithm, so all see, and pay for, the same number of visible tokens.

    random         anywhere in space-time                                         MAE-ST, arXiv 2205.09113
    tube           one random spatial mask for all slices                         VideoMAE, arXiv 2203.12602
    text           in each slice, the tokens whose patches best match the caption TGM, the method of this repository
    text-inverse   in each slice, those that match it least: the control

Everything random comes from one array of uniform noise [B, N], so a mask is a pure function of (noise, maps): draw the noise
per sample and the masks do not depend on batch, worker or rank. All functions run on the device their tensors are on, for a
whole batch, without reading it. `cut_maps` brings the maps that saliency.py stores, of the whole video and the whole frame,
to the times, crop and flip of a training sample.

    python masking.py --data data/train.csv --row 3 --out mask.png

draws the clip, its saliency and every mask in one strip (the paper's figure 1). Letters: B batch, N = t*h*w tokens in
(t, h, w) order, S moments of the stored maps, G x G their grid.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

RATIOS = {"random": 0.9, "tube": 0.9, "text": 0.6, "text-inverse": 0.6}  # each algorithm's own default


def masked_count(ratio, grid):
    """Tokens masked of a grid (t, h, w): t * floor(ratio * h * w). ValueError unless some stay visible and some do not."""
    t, h, w = grid
    count = math.floor(ratio * h * w + 1e-6)  # 0.29 * 100 is 28.999999999999996
    if not 0 < count < h * w:
        raise ValueError(f"mask ratio {ratio} masks {count} of {h * w} tokens in a slice: some must be masked and some not")
    return t * count


def highest(score, count, noise):
    """Bool like score [..., M]: True at the `count` highest of the last axis; equal scores are drawn by noise [..., M]."""
    order = noise.argsort(-1)                                        # a random order, kept among equals by the stable sort
    order = order.gather(-1, score.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def random_mask(ratio, grid, noise, saliency, motion):
    return highest(noise, masked_count(ratio, grid), noise)


def tube_mask(ratio, grid, noise, saliency, motion):
    t, h, w = grid
    noise = noise[:, :h * w]
    return highest(noise, masked_count(ratio, grid) // t, noise).repeat(1, t)


def text_mask(ratio, grid, noise, saliency, motion, sign=1):
    t, h, w = grid
    if saliency is None or tuple(saliency.shape) != (len(noise), t, h, w):
        raise ValueError(f"text masks need saliency [{len(noise)}, {t}, {h}, {w}], got "
                         f"{None if saliency is None else list(saliency.shape)}")
    score, noise = sign * saliency.float().flatten(2), noise.view(-1, t, h * w)              # [B, t, h*w]
    return highest(score, masked_count(ratio, grid) // t, noise).flatten(1)


def text_inverse_mask(*args):
    return text_mask(*args, sign=-1)


MASKS = {"random": random_mask, "tube": tube_mask, "text": text_mask, "text-inverse": text_inverse_mask}


def make_mask(name, ratio, batch, grid, saliency=None, motion=None, generator=None, noise=None):
    """Masks of a batch.

    name: a key of MASKS; ratio: share masked in each slice, in (0, 1); grid: (t, h, w) tokens
    saliency [B, t, h, w]: any real scores, for the text masks; motion: for masks to come
    noise [B, N]: uniform in [0, 1); drawn from `generator` where it is not given, on the device of the maps

    Returns bool [B, N] on that device, True = masked, exactly masked_count(ratio, grid) in every row.
    Raises ValueError for an unknown name, a ratio that masks nothing or everything, or maps missing or of another shape.
    """
    if name not in MASKS:
        raise ValueError(f"unknown mask {name!r}: one of {', '.join(MASKS)}")
    if noise is None:
        maps = saliency if saliency is not None else motion
        drawn_on = generator.device if generator is not None else None if maps is None else maps.device
        noise = torch.rand(batch, math.prod(grid), generator=generator, device=drawn_on)
        noise = noise if maps is None else noise.to(maps.device)
    if noise.shape != (batch, math.prod(grid)):
        raise ValueError(f"noise must be [{batch}, {math.prod(grid)}], got {list(noise.shape)}")
    mask = MASKS[name](ratio, grid, noise, saliency, motion)
    assert mask.shape == (batch, math.prod(grid))
    return mask


def cut_maps(maps, times, box, flip, grid, oversample=2):
    """Brings stored maps to the tokens of a sample: the maps' value where each token lies, by trilinear interpolation.

    maps [B, S, G, G]: of the whole frame, at the mid-points of S equal parts of the video
    times [B, t]: the middle of each token slice, as a fraction of the video's length
    box [B, 4]: the crop's x0, y0, x1, y1 as fractions of the frame, before the flip; flip bool [B]: mirrored left to right
    oversample: each token averages this many points squared, so that a map finer than the tokens is not skipped over

    Returns float32 [B, t, h, w].
    """
    (t, h, w), side = grid, oversample
    x0, y0, x1, y1 = box.float()[:, :, None].unbind(1)                                      # each [B, 1]
    x = (torch.arange(w * side, device=maps.device) + 0.5) / (w * side)                     # [w'] across the crop
    x = torch.where(flip[:, None], 1 - x, x)                                                # [B, w']
    x = x0 + (x1 - x0) * x
    y = y0 + (y1 - y0) * (torch.arange(h * side, device=maps.device) + 0.5) / (h * side)    # [B, h']
    shape = (len(maps), t, h * side, w * side)
    points = torch.stack([x[:, None, None, :].expand(shape), y[:, None, :, None].expand(shape),
                          times.float()[:, :, None, None].expand(shape)], dim=-1)           # [B, t, h', w', (x, y, time)]
    # align_corners=False puts the S values at the mid-points of S equal parts: just where they were measured.
    values = F.grid_sample(maps.float()[:, None], points * 2 - 1, padding_mode="border", align_corners=False)
    return F.avg_pool2d(values[:, 0], side)


# ---- the preview ---------------------------------------------------------------------------------------------------------


def heat(values):
    """Colours float [..., H, W], scaled to [0, 1] within the picture, from blue over white to red: float [..., H, W, 3]."""
    low, high = values.min(), values.max()
    v = ((values - low) / (high - low).clamp(min=1e-6))[..., None]
    return torch.cat([(2 * v).clamp(max=1), 1 - (2 * v - 1).abs(), (2 - 2 * v).clamp(max=1)], -1)


def draw_strip(clip, saliency, masks, title):
    """A PIL picture: one row for the clip, one for its saliency, one a mask; one column a token slice.

    clip float [3, T, H, W] in [0, 1]; saliency [t, h, w], whose shape is the grid; masks {name: bool [N]}."""
    from PIL import Image, ImageDraw
    frames = clip.permute(1, 2, 3, 0)
    t = len(saliency)
    frames = frames[:: len(frames) // t]                                                    # [t, H, W, 3] first of each slice
    big = lambda maps: F.interpolate(maps.float()[None], frames.shape[1:3], mode="nearest")[0][..., None]
    rows = {"clip": frames, "saliency": 0.35 * frames + 0.65 * heat(big(saliency)[..., 0])}
    for name, mask in masks.items():
        rows[name] = torch.where(big(mask.view(saliency.shape)) > 0, torch.full_like(frames, 0.55), frames)
    size, margin, scale = frames.shape[1], 90, max(1, 128 // frames.shape[1])
    step = size * scale + 4
    picture = Image.new("RGB", (margin + t * step, 22 + len(rows) * step), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 5), title, fill="black")
    for i, (name, row) in enumerate(rows.items()):
        draw.text((4, 22 + i * step + step // 2 - 6), name, fill="black")
        for j, tile in enumerate((row * 255).round().byte().numpy()):
            tile = Image.fromarray(tile).resize((size * scale, size * scale), Image.NEAREST)
            picture.paste(tile, (margin + j * step, 22 + i * step))
    return picture


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/train.csv", help="manifest; its captions and saliency are read beside it")
    parser.add_argument("--companions", metavar="PREFIX", help="read PREFIX.saliency.npy instead of those beside the manifest")
    parser.add_argument("--row", type=int, default=0, help="line of the manifest, from 0")
    parser.add_argument("--caption", type=int, default=0, help="which of the video's captions")
    parser.add_argument("--out", default="mask.png", help="picture to write")
    parser.add_argument("--mask-ratio", type=float, help="one ratio for all masks (default: each mask's own)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--stride", type=int, default=4, help="frames of the video between frames of the clip")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv=None):
    import video  # only the preview opens videos: the masks above stand alone
    args = parse_args(argv)
    try:
        videos = video.read_manifest(args.data)
        if not 0 <= args.row < len(videos):
            sys.exit(f"--row {args.row}: {args.data} has rows 0 to {len(videos) - 1}")
        prefix = args.companions or Path(args.data).with_suffix("")
        remedy = f"python caption.py --data {args.data} && python saliency.py --data {args.data}"
        saliency, _ = video.open_array(f"{prefix}.saliency.npy", videos, remedy)
        captions = video.read_captions(video.companion(args.data, "captions.jsonl"), videos, remedy)[args.row]
        if not 0 <= args.caption < len(captions):
            sys.exit(f"--caption {args.caption}: row {args.row} has {len(captions)} captions")
        with video.VideoReader(videos[args.row].path) as reader:
            start, end = reader.span(videos[args.row])
            times = video.clip_times(start, end, reader.fps, args.frames, args.stride, 0.5)
            frames, box = video.center_crop(reader.read(times, args.image_size), args.image_size)
    except (video.VideoError, video.ManifestError) as error:
        sys.exit(str(error))
    grid = (args.frames // 2, args.image_size // args.patch_size, args.image_size // args.patch_size)
    middle = torch.from_numpy((times.reshape(grid[0], -1).mean(1) - start) / (end - start))
    maps = torch.from_numpy(saliency[args.row, args.caption].copy())
    maps = cut_maps(maps[None], middle[None], torch.tensor([box]), torch.tensor([False]), grid)
    generator = torch.Generator().manual_seed(args.seed)
    masks = {f"{name} {args.mask_ratio or ratio}": make_mask(name, args.mask_ratio or ratio, 1, grid, maps, generator=generator)[0]
             for name, ratio in RATIOS.items()}
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2) / 255
    draw_strip(clip, maps[0], masks, f"{videos[args.row].name}: {captions[args.caption]}").save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
