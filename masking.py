"""Which tokens a video masked autoencoder hides: random, tube, text- and motion-guided masks, at one interface and one cost.

    make_mask("text", 0.6, batch=32, grid=(8, 14, 14), saliency=maps)     -> bool [32, 1568], True = masked

The rule that makes algorithms comparable: in a grid of t x h x w tokens every row masks exactly t * floor(ratio * h * w)
tokens, whatever the algorithm, so all see, and pay for, the same number of visible tokens.

    random         anywhere in space-time                                         MAE-ST, arXiv 2205.09113
    tube           one random spatial mask for all slices                         VideoMAE, arXiv 2203.12602
    text           in each slice, the tokens whose patches best match the caption TGM, the method of this repository
    text-inverse   in each slice, those that match it least: the control
    motion         in each slice, a window about what moves                       MGM, arXiv 2308.12962
    flow           all but random spots that travel with what they lie on         MGMAE, arXiv 2308.10794

Everything random comes from one array of uniform noise [B, N], so a mask is a pure function of (noise, maps): draw the noise
per sample and the masks do not depend on batch, worker or rank. All functions run on the device their tensors are on, for a
whole batch, without reading it. `cut_maps` and `cut_motion` bring the maps that saliency.py stores, of the whole video and
the whole frame, to the times, crop and flip of a training sample.

    python masking.py --data data/train.csv --row 3 --out mask.png

draws the clip, its saliency and every mask in one strip (the paper's figure 1). Letters: B batch, N = t*h*w tokens in
(t, h, w) order, S moments of the stored maps, G x G their grid.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

RATIOS = {"random": 0.9, "tube": 0.9, "text": 0.6, "text-inverse": 0.6, "motion": 0.75, "flow": 0.9}  # each one's own default


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


def token_centres(grid, device):
    """The middle of each token of a slice as fractions of the picture: float32 [h*w, 2], x and y."""
    _, h, w = grid
    y, x = torch.meshgrid((torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def check_motion(name, motion, batch, grid):
    if motion is None or tuple(motion.shape) != (batch, grid[0], 2, *grid[1:]):
        raise ValueError(f"{name} masks need motion [{batch}, {grid[0]}, 2, {grid[1]}, {grid[2]}], got "
                         f"{None if motion is None else list(motion.shape)}")


def motion_mask(ratio, grid, noise, saliency, motion):
    """In each slice: take out the camera's motion (the median), find the window of about the ratio's area that holds most of
    the energy that is left, smooth its centre along time, and mask the tokens nearest to that centre, in the window's shape.

    That motion vectors place one continuous, moving, rectangular mask is MGM's; its exact rule is not public. Ours are: the
    median, the window in the frame's own aspect, the smoothing by a binomial of five slices, and the count made up with the
    tokens next to the window."""
    (t, h, w), batch = grid, len(noise)
    check_motion("motion", motion, batch, grid)
    moved = motion.float().flatten(3)                                                       # [B, t, 2, h*w]
    energy = (moved - moved.median(-1, keepdim=True).values).square().sum(2).unflatten(-1, (h, w))
    high, wide = (max(1, math.floor(math.sqrt(ratio) * side)) for side in (h, w))
    held = F.avg_pool2d(energy, (high, wide), stride=1).flatten(2)                          # [B, t, places of the window]
    held = held / held.amax((1, 2), keepdim=True).clamp(min=1e-12)
    # Where a slice does not say (a still moment), the others do; where none does, one random place for all.
    held = held + 0.01 * held.mean(1, keepdim=True) + 1e-5 * noise[:, None, :held.shape[-1]]
    place, places = held.argmax(-1), w - wide + 1
    centre = torch.stack([(place % places + wide / 2) / w, (place // places + high / 2) / h], 1)     # [B, 2, t]
    binomial = torch.tensor([1.0, 4, 6, 4, 1], device=centre.device) / 16
    centre = F.pad(centre, (2, 2), mode="replicate").unfold(2, 5, 1) @ binomial             # [B, 2, t]
    shape = torch.tensor([wide / w, high / h], device=centre.device)
    distance = ((token_centres(grid, centre.device) - centre.mT[:, :, None]).abs() / shape).amax(-1)  # [B, t, h*w]
    noise = noise[:, None, :h * w].expand(-1, t, -1)
    return highest(-distance, masked_count(ratio, grid) // t, noise).flatten(1)


def trace_to_middle(motion):
    """Where each token's centre was, or will be, in the middle slice: motion [B, t, 2, h, w] -> float32 [B, t, h, w, 2] x, y,
    by steps of one slice along the motion between two slices. A trace that leaves the picture goes on with the border's motion."""
    batch, t, _, h, w = motion.shape
    slices = torch.arange(t, device=motion.device, dtype=torch.float32)
    at = token_centres((t, h, w), motion.device).view(1, 1, h, w, 2).expand(batch, t, h, w, 2)
    ahead = (t // 2 - slices).view(1, t, 1, 1, 1)                                           # slices still to go, signed
    field = motion.float().transpose(1, 2)                                                  # [B, 2, t, h, w]
    for _ in range(t // 2):
        step = ahead.sign()
        time = ((t // 2 - ahead + 0.5 * step + 0.5) / t).expand(batch, t, h, w, 1)          # half a step on, as a fraction
        moved = F.grid_sample(field, torch.cat([at, time], -1) * 2 - 1, padding_mode="border", align_corners=False)
        at, ahead = at + step * moved.permute(0, 2, 3, 4, 1), ahead - step
    return at


def flow_mask(ratio, grid, noise, saliency, motion):
    """MGMAE's: Gaussian bumps at as many random tokens of the middle slice as stay visible, carried to the other slices along the
    motion; in each slice the tokens where the map is highest are visible. A token whose trace leaves the picture has the unmoved
    map's value. Where bumps overlap the highest counts, as in the authors' code: their sum would favour the picture's middle. The
    highest bump is the nearest, whatever the bumps' width.

    Ours are: the motion field is stored (theirs is RAFT's, between all frames, on line), and each token is traced to the middle
    slice, where the map is read, instead of warping the map from frame to frame, which blurs it."""
    t, h, w = grid
    check_motion("flow", motion, len(noise), grid)
    count = masked_count(ratio, grid) // t
    still = token_centres(grid, noise.device)                                               # [h*w, 2]
    bumps = still[noise[:, :h * w].argsort(1)[:, count:]]                                   # [B, V, 2]
    traced = trace_to_middle(motion).flatten(2, 3)                                          # [B, t, h*w, 2]
    outside = ((traced < 0) | (traced > 1)).any(-1, keepdim=True)
    away = torch.where(outside, still, traced)[:, :, :, None] - bumps[:, None, None]        # [B, t, h*w, V, 2]
    away = (away * torch.tensor([w, h], device=noise.device)).square().sum(-1).amin(-1)     # [B, t, h*w], in tokens squared
    return highest(away, count, noise.view(-1, t, h * w)).flatten(1)


MASKS = {"random": random_mask, "tube": tube_mask, "text": text_mask, "text-inverse": text_inverse_mask, "motion": motion_mask,
         "flow": flow_mask}


def make_mask(name, ratio, batch, grid, saliency=None, motion=None, generator=None, noise=None):
    """Masks of a batch.

    name: a key of MASKS; ratio: share masked in each slice, in (0, 1); grid: (t, h, w) tokens
    saliency [B, t, h, w]: any real scores, for the text masks
    motion [B, t, 2, h, w]: how far each token moves to the next slice, dx and dy as fractions of the crop's width and height,
        for the masks motion and flow
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


def some_masked(mask, noise, count):
    """`count` of each row's masked tokens, for a decoder that reconstructs only these (VideoMAE V2's dual masking, arXiv 2303.16727,
    which takes a fixed pattern of cells): int64 [B, count]. mask bool [B, N]; noise [B, N], which made it."""
    # The noise of slice 0 alone makes a tube, so by its own order that slice would come last; the fraction of 997 times it is
    # uniform whatever the mask.
    return (noise * 997 % 1).masked_fill(~mask, 2).argsort(dim=1, stable=True)[:, :count]


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


def cut_motion(field, times, box, flip, grid, seconds):
    """Brings a stored motion field to the tokens of a sample, as `cut_maps` does, and to its units.

    field [B, S, 2, G, G]: dx, dy in frame widths and heights per second; seconds [B]: the length of the video

    Returns float32 [B, t, 2, h, w]: dx, dy to the next slice, as fractions of the crop's width and height, after the flip.
    """
    dx, dy = (cut_maps(field[:, :, axis], times, box, flip, grid) for axis in (0, 1))
    dx = torch.where(flip[:, None, None, None], -dx, dx)
    gaps = times.float().diff(dim=1)
    gaps = torch.cat([gaps, gaps[:, -1:]], 1) if grid[0] > 1 else torch.zeros_like(times)   # a clip's end may stand still
    scale = (gaps * seconds[:, None])[:, :, None] / (box[:, 2:] - box[:, :2])[:, None]      # [B, t, 2]
    return torch.stack([dx, dy], 2) * scale[..., None, None]


# ---- the preview ---------------------------------------------------------------------------------------------------------


def heat(values):
    """Colours float [..., H, W], scaled to [0, 1] within the picture, from blue over white to red: float [..., H, W, 3]."""
    low, high = values.min(), values.max()
    v = ((values - low) / (high - low).clamp(min=1e-6))[..., None]
    return torch.cat([(2 * v).clamp(max=1), 1 - (2 * v - 1).abs(), (2 - 2 * v).clamp(max=1)], -1)


def draw_tiles(clip, masks, grid, saliency=None, motion=None):
    """What a clip, its maps and its masks look like: {name: float [T, H, W, 3] in [0, 1]}.

    clip float [3, T, H, W] in [0, 1]; masks {name: bool [N]}; saliency [t, h, w]; motion [t, 2, h, w], drawn in the colours of
    Baker et al. (the hue is the direction)."""
    from torchvision.utils import flow_to_image
    frames = clip.permute(1, 2, 3, 0)                                                       # [T, H, W, 3]
    big = lambda maps: F.interpolate(maps.float()[None, None], frames.shape[:3], mode="nearest")[0, 0]
    rows = {"clip": frames}
    if saliency is not None:
        rows["saliency"] = 0.35 * frames + 0.65 * heat(big(saliency))
    if motion is not None:
        colours = flow_to_image(motion.float()) / 255                                       # [t, 3, h, w]
        rows["motion"] = 0.35 * frames + 0.65 * torch.stack([big(colours[:, channel]) for channel in range(3)], -1)
    for name, mask in masks.items():
        rows[name] = torch.where(big(mask.view(grid))[..., None] > 0, torch.full_like(frames, 0.55), frames)
    return rows


def draw_strip(tiles, slices, title):
    """A PIL picture of what `draw_tiles` gives: one row a tile, one column a token slice (its first frame)."""
    from PIL import Image, ImageDraw
    frames, size = tiles["clip"].shape[:2]
    margin, scale = 90, max(1, 128 // size)
    step = size * scale + 4
    picture = Image.new("RGB", (margin + slices * step, 22 + len(tiles) * step), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 5), title, fill="black")
    for i, (name, tile) in enumerate(tiles.items()):
        draw.text((4, 22 + i * step + step // 2 - 6), name, fill="black")
        for j, image in enumerate((tile[::frames // slices] * 255).round().byte().numpy()):
            image = Image.fromarray(image).resize((size * scale, size * scale), Image.NEAREST)
            picture.paste(image, (margin + j * step, 22 + i * step))
    return picture


def draw_frames(tiles):
    """The same as moving pictures: a list of T PIL pictures, the tiles three a line, each under its name."""
    from PIL import Image, ImageDraw
    frames, size = tiles["clip"].shape[:2]
    scale = max(1, 128 // size)
    step, lines, pictures = size * scale + 4, math.ceil(len(tiles) / 3), []
    for t in range(frames):
        picture = Image.new("RGB", (3 * step // 2 * 2, lines * (step + 14) // 2 * 2), "white")  # H.264 wants even sides
        draw = ImageDraw.Draw(picture)
        for i, (name, tile) in enumerate(tiles.items()):
            x, y = i % 3 * step, i // 3 * (step + 14)
            draw.text((x + 2, y + 1), name, fill="black")
            image = Image.fromarray((tile[t] * 255).round().byte().numpy())
            picture.paste(image.resize((size * scale, size * scale), Image.NEAREST), (x, y + 14))
        pictures.append(picture)
    return pictures


def write_video(path, pictures, fps):
    """Writes PIL pictures as a GIF, or as H.264 in the container that the name says. ValueError for a name that says none."""
    import av
    from fractions import Fraction
    if Path(path).suffix == ".gif":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def parse_args(argv=None):
    from tgm.run import Parser, count, frame_count, pixel_count, positive_int, ratio, seed_number  # the masks stand alone

    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="data/train.csv", help="manifest; captions, saliency and motion are read beside it")
    parser.add_argument("--companions", metavar="PREFIX", help="read PREFIX.saliency.npy and PREFIX.motion.npy instead")
    parser.add_argument("--row", type=count, default=0, help="line of the manifest, from 0")
    parser.add_argument("--caption", type=count, default=0, help="which of the video's captions")
    parser.add_argument("--out", default="mask.png", help="picture to write")
    parser.add_argument("--video", metavar="FILE", help="write the clip and its masks as a moving picture too: .mp4 or .gif")
    parser.add_argument("--mask-ratio", type=ratio, help="one ratio for all masks (default: each mask's own)")
    parser.add_argument("--frames", type=frame_count, default=16)
    parser.add_argument("--stride", type=positive_int, default=4, help="frames of the video between frames of the clip")
    parser.add_argument("--image-size", type=pixel_count, default=224)
    parser.add_argument("--patch-size", type=positive_int, default=16)
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser.parse_args(argv)


def main(argv=None):
    import av


    import clips  # only the preview opens videos: the masks above stand alone
    import manifest
    import video
    args = parse_args(argv)
    saliency = motion = None
    try:
        videos = manifest.read_manifest(args.data)
        if not 0 <= args.row < len(videos):
            sys.exit(f"--row {args.row}: {args.data} has rows 0 to {len(videos) - 1}")
        title, prefix = videos[args.row].name, args.companions or Path(args.data).with_suffix("")
        remedy, motion_remedy = f"python caption.py {args.data} && python saliency.py {args.data}", f"python saliency.py {args.data} --cue motion"
        has = {kind: Path(f"{prefix}.{kind}.npy").exists() for kind in ("saliency", "motion")}
        if has["saliency"] or not has["motion"]:
            saliency, _ = manifest.open_array(f"{prefix}.saliency.npy", videos, remedy)
            captions = manifest.read_captions(manifest.companion(args.data, "captions.jsonl"), videos, remedy)[args.row]
            if not 0 <= args.caption < len(captions):
                sys.exit(f"--caption {args.caption}: row {args.row} has {len(captions)} captions")
            title = f"{title}: {captions[args.caption]}"
        if has["motion"]:
            motion, _ = manifest.open_array(f"{prefix}.motion.npy", videos, motion_remedy)
        with video.VideoReader(videos[args.row].path) as reader:
            start, end = reader.span(videos[args.row])
            times, fps = clips.clip_times(start, end, reader.fps, args.frames, args.stride, 0.5), reader.fps / args.stride
            frames, box = clips.center_crop(reader.read(times, args.image_size), args.image_size)
    except (video.VideoError, manifest.ManifestError) as error:
        sys.exit(str(error))
    grid = (args.frames // 2, args.image_size // args.patch_size, args.image_size // args.patch_size)
    middle = torch.from_numpy((times.reshape(grid[0], -1).mean(1) - start) / (end - start))
    place, maps = (middle[None], torch.tensor([box]), torch.tensor([False]), grid), {}
    if saliency is not None:
        maps["saliency"] = cut_maps(torch.from_numpy(saliency[args.row, args.caption].copy())[None], *place)
    if motion is not None:
        maps["motion"] = cut_motion(torch.from_numpy(motion[args.row].copy())[None], *place, torch.tensor([end - start]))
    generator, masks = torch.Generator().manual_seed(args.seed), {}
    for name, ratio in RATIOS.items():
        need = "saliency" if name.startswith("text") else "motion" if name in ("motion", "flow") else None
        if need is None or need in maps:
            ratio = args.mask_ratio or ratio
            masks[f"{name} {ratio}"] = make_mask(name, ratio, 1, grid, generator=generator, **maps)[0]
        else:
            print(f"{name}: left out, there is no {prefix}.{need}.npy; make it with: {remedy if need == 'saliency' else motion_remedy}")
    tiles = draw_tiles(torch.from_numpy(frames).permute(3, 0, 1, 2) / 255, masks, grid, **{key: map_[0] for key, map_ in maps.items()})
    draw_strip(tiles, grid[0], title).save(args.out)
    print(args.out)
    if args.video:
        try:
            write_video(args.video, draw_frames(tiles), fps)
        except (av.FFmpegError, OSError, ValueError) as error:
            sys.exit(f"--video {args.video}: cannot be written ({error})")
        print(args.video)


if __name__ == "__main__":
    main()
