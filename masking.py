"""Which tokens a video masked autoencoder hides: random, tube, text- and motion-guided masks, at
one interface and one cost.

    make_mask("text", 0.6, batch=32, grid=(8, 14, 14), saliency=maps)

returns bool [32, 1568], True where a token is masked.

The rule that makes algorithms comparable: in a grid of t x h x w tokens every row masks exactly t *
floor(ratio * h * w) tokens, whatever the algorithm, so all see, and pay for, the same number of
visible tokens.

    random         anywhere in space-time (MAE-ST, arXiv 2205.09113)
    tube           one random spatial mask for all slices (VideoMAE, arXiv 2203.12602)
    text           in each slice, the tokens whose patches best match the caption (TGM, the method
                   of this repository)
    text-inverse   in each slice, those that match it least: the control
    motion         in each slice, a window about what moves (MGM, arXiv 2308.12962)
    flow           all but random spots that travel with what they lie on (MGMAE, arXiv 2308.10794)

Everything random comes from one array of uniform noise [B, N], so a mask is a pure function of
(noise, maps): draw the noise per sample and the masks do not depend on batch, worker or rank. All
functions run on the device their tensors are on, for a whole batch, without reading it. `cut_maps`
and `cut_motion` bring the maps that saliency.py stores, of the whole video and the whole frame, to
the times, crop and flip of a training sample.

    python masking.py --data data/train.csv --row 3 --out mask.png

draws the clip, its saliency and every mask in one strip (the paper's figure 1). Shapes: B batch, N
= t*h*w tokens in (t, h, w) order, S moments of the stored maps, G x G their grid.
"""

import math
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

# each one's own default
RATIOS = {"random": 0.9, "tube": 0.9, "text": 0.6, "text-inverse": 0.6, "motion": 0.75, "flow": 0.9}


def masked_count(ratio, grid):
    """Tokens masked of a grid (t, h, w): t * floor(ratio * h * w). ValueError unless some stay
    visible and some do not.
    """
    t, h, w = grid
    count = math.floor(ratio * h * w + 1e-6)  # 0.29 * 100 is 28.999999999999996
    if not 0 < count < h * w:
        raise ValueError(
            f"mask ratio {ratio} masks {count} of {h * w} tokens in a slice: some must be masked and some not"
        )
    return t * count


def top_k_mask(score, count, noise):
    """Bool like score [..., M]: True at the `count` highest of the last axis; among equal scores
    the lowest of noise [..., M] come first."""
    shuffled = noise.argsort(dim=-1)
    ranks = score.gather(-1, shuffled).argsort(dim=-1, descending=True, stable=True)
    # a stable sort keeps the shuffled order of equals
    chosen = shuffled.gather(-1, ranks[..., :count])
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)


def random_mask(ratio, grid, noise, saliency, motion):
    return top_k_mask(noise, masked_count(ratio, grid), noise)


def tube_mask(ratio, grid, noise, saliency, motion):
    t, h, w = grid
    noise = noise[:, : h * w]
    return top_k_mask(noise, masked_count(ratio, grid) // t, noise).repeat(1, t)


def text_mask(ratio, grid, noise, saliency, motion, sign=1):
    t, h, w = grid
    if saliency is None or tuple(saliency.shape) != (len(noise), t, h, w):
        raise ValueError(
            f"text masks need saliency [{len(noise)}, {t}, {h}, {w}], got "
            f"{None if saliency is None else list(saliency.shape)}"
        )
    score, noise = sign * saliency.float().flatten(2), noise.view(-1, t, h * w)  # [B, t, h*w]
    return top_k_mask(score, masked_count(ratio, grid) // t, noise).flatten(1)


def text_inverse_mask(*args):
    return text_mask(*args, sign=-1)


def token_centres(grid, device):
    """The middle of each token of a slice as fractions of the picture: float32 [h*w, 2], x and
    y.
    """
    _, h, w = grid
    y, x = torch.meshgrid(
        (torch.arange(h, device=device) + 0.5) / h,
        (torch.arange(w, device=device) + 0.5) / w,
        indexing="ij",
    )
    return torch.stack([x, y], -1).flatten(0, 1)


def check_motion(name, motion, batch, grid):
    if motion is None or tuple(motion.shape) != (batch, grid[0], 2, *grid[1:]):
        raise ValueError(
            f"{name} masks need motion [{batch}, {grid[0]}, 2, {grid[1]}, {grid[2]}], got "
            f"{None if motion is None else list(motion.shape)}"
        )


def motion_mask(ratio, grid, noise, saliency, motion):
    """In each slice: take out the camera's motion (the median), find the window of about the
    ratio's area that holds most of the energy that is left, smooth its centre along time, and mask
    the tokens nearest to that centre, in the window's shape.

    That motion vectors place one continuous, moving, rectangular mask is MGM's; its exact rule is
    not public. Ours are: the median, the window in the frame's own aspect, the smoothing by a
    binomial of five slices, and the count made up with the tokens next to the window."""
    (t, h, w), batch = grid, len(noise)
    check_motion("motion", motion, batch, grid)
    moved = motion.float().flatten(3)  # [B, t, 2, h*w]
    energy = (moved - moved.median(-1, keepdim=True).values).square().sum(2).unflatten(-1, (h, w))
    high, wide = (max(1, math.floor(math.sqrt(ratio) * side)) for side in (h, w))
    held = F.avg_pool2d(energy, (high, wide), stride=1).flatten(2)  # [B, t, places of the window]
    held = held / held.amax((1, 2), keepdim=True).clamp(min=1e-12)
    # Where a slice does not say (a still moment), the others do; where none does, one random place
    # for all.
    held = held + 0.01 * held.mean(1, keepdim=True) + 1e-5 * noise[:, None, : held.shape[-1]]
    place, places = held.argmax(-1), w - wide + 1
    centre = torch.stack(
        [(place % places + wide / 2) / w, (place // places + high / 2) / h], 1
    )  # [B, 2, t]
    binomial = torch.tensor([1.0, 4, 6, 4, 1], device=centre.device) / 16
    centre = F.pad(centre, (2, 2), mode="replicate").unfold(2, 5, 1) @ binomial  # [B, 2, t]
    shape = torch.tensor([wide / w, high / h], device=centre.device)
    distance = ((token_centres(grid, centre.device) - centre.mT[:, :, None]).abs() / shape).amax(
        -1
    )  # [B, t, h*w]
    noise = noise[:, None, : h * w].expand(-1, t, -1)
    return top_k_mask(-distance, masked_count(ratio, grid) // t, noise).flatten(1)


def trace_to_middle(motion):
    """Where each token's centre was, or will be, in the middle slice: motion [B, t, 2, h, w] ->
    float32 [B, t, h, w, 2], x and y as fractions of the picture.

    Each trace goes from slice to slice until it is there: before the middle forwards in time, along
    the motion; behind it backwards, against the motion. A trace that leaves the picture goes on
    with the border's motion."""
    batch, t, _, h, w = motion.shape
    middle = t // 2
    field = motion.float().transpose(1, 2)  # [B, 2, t, h, w]
    at = token_centres((t, h, w), motion.device).expand(batch, t, h * w, 2).unflatten(2, (h, w))
    # the slice that each trace is in
    now = torch.arange(t, device=motion.device, dtype=torch.float32)
    for _ in range(middle):
        direction = (middle - now).sign()  # 1: forwards, -1: backwards, 0: it is there
        between = now + 0.5 * direction  # the motion from one slice to the next is that half way
        time = (between + 0.5) / t  # slice 0 lies at the middle of the first of t equal parts
        time = time.view(1, t, 1, 1, 1).expand(batch, t, h, w, 1)
        places = torch.cat([at, time], dim=-1) * 2 - 1  # in [-1, 1], as grid_sample wants them
        moved = F.grid_sample(field, places, padding_mode="border", align_corners=False)
        at = at + direction.view(1, t, 1, 1, 1) * moved.permute(0, 2, 3, 4, 1)
        now = now + direction
    return at


def flow_mask(ratio, grid, noise, saliency, motion):
    """MGMAE's: Gaussian bumps at as many random tokens of the middle slice as stay visible, carried
    to the other slices along the motion; in each slice the tokens where the map is highest are
    visible. A token whose trace leaves the picture has the unmoved map's value. Where bumps overlap
    the highest counts, as in the authors' code: their sum would favour the picture's middle. The
    highest bump is the nearest, whatever the bumps' width.

    Ours are: the motion field is stored (theirs is RAFT's, between all frames, on line), and each
    token is traced to the middle slice, where the map is read, instead of warping the map from
    frame to frame, which blurs it.

    It differs from MGMAE's released code on purpose. That code warps the slices before the middle
    the wrong way, since it compares its option with a value that the option cannot have; and it
    keeps 19 tokens of a slice visible where a ratio of 0.9 of 196 leaves 20. Visible tokens, ours
    against the release, as measured beside it earlier (not by anything in this repository): Jaccard
    0.69 to 0.87 from the middle on, 0.05 to 0.69 before it, and there 0.56 to 0.82 with its option
    mended."""
    t, h, w = grid
    check_motion("flow", motion, len(noise), grid)
    count = masked_count(ratio, grid) // t
    still = token_centres(grid, noise.device)  # [h*w, 2]
    bumps = still[noise[:, : h * w].argsort(1)[:, count:]]  # [B, V, 2]
    traced = trace_to_middle(motion).flatten(2, 3)  # [B, t, h*w, 2]
    outside = ((traced < 0) | (traced > 1)).any(-1, keepdim=True)
    away = (
        torch.where(outside, still, traced)[:, :, :, None] - bumps[:, None, None]
    )  # [B, t, h*w, V, 2]
    # [B, t, h*w], in tokens squared
    away = (away * torch.tensor([w, h], device=noise.device)).square().sum(-1).amin(-1)
    return top_k_mask(away, count, noise.view(-1, t, h * w)).flatten(1)


MASKS = {
    "random": random_mask,
    "tube": tube_mask,
    "text": text_mask,
    "text-inverse": text_inverse_mask,
    "motion": motion_mask,
    "flow": flow_mask,
}
# the stored maps that each one reads
NEEDS = {
    "random": None,
    "tube": None,
    "text": "saliency",
    "text-inverse": "saliency",
    "motion": "motion",
    "flow": "motion",
}


def make_mask(name, ratio, batch, grid, saliency=None, motion=None, generator=None, noise=None):
    """Masks of a batch.

    name: a key of MASKS; ratio: share masked in each slice, in (0, 1); grid: (t, h, w) tokens
    saliency [B, t, h, w]: any real scores, for the text masks
    motion [B, t, 2, h, w]: how far each token moves to the next slice, dx and dy as fractions of
    the crop's width and height,
        for the masks motion and flow
    noise [B, N]: uniform in [0, 1); drawn from `generator` where it is not given, on the device of
    the maps

    Returns bool [B, N] on that device, True = masked, exactly masked_count(ratio, grid) in every
    row. Raises ValueError for an unknown name, a ratio that masks nothing or everything, or maps
    missing or of another shape."""
    if name not in MASKS:
        raise ValueError(f"unknown mask {name!r}: one of {', '.join(MASKS)}")
    if noise is None:
        maps = saliency if saliency is not None else motion
        device = None
        if generator is not None:
            device = generator.device
        elif maps is not None:
            device = maps.device
        noise = torch.rand(batch, math.prod(grid), generator=generator, device=device)
        if maps is not None:
            noise = noise.to(maps.device)
    if noise.shape != (batch, math.prod(grid)):
        raise ValueError(f"noise must be [{batch}, {math.prod(grid)}], got {list(noise.shape)}")
    mask = MASKS[name](ratio, grid, noise, saliency, motion)
    assert mask.shape == (batch, math.prod(grid))
    return mask


def some_masked(mask, noise, count):
    """`count` of each row's masked tokens, for a decoder that reconstructs only these (VideoMAE
    V2's dual masking, arXiv 2303.16727, which takes a fixed pattern of cells): int64 [B, count].
    mask bool [B, N]; noise [B, N], which made it."""
    # The noise of slice 0 alone makes a tube, so by its own order that slice would come last; the
    # fraction of 997 times it is uniform whatever the mask.
    return (noise * 997 % 1).masked_fill(~mask, 2).argsort(dim=1, stable=True)[:, :count]


def cut_maps(maps, times, box, flip, grid, oversample=2):
    """Brings stored maps to the tokens of a sample: the maps' value where each token lies, by
    trilinear interpolation.

    maps [B, S, G, G]: of the whole frame, at the mid-points of S equal parts of the video
    times [B, t]: the middle of each token slice, as a fraction of the video's length
    box [B, 4]: the crop's x0, y0, x1, y1 as fractions of the frame, before the flip; flip bool [B]:
    mirrored left to right
    oversample: each token averages this many points squared, so that a map finer than the tokens is
        not skipped over

    Returns float32 [B, t, h, w].
    """
    (t, h, w), side = grid, oversample
    x0, y0, x1, y1 = box.float()[:, :, None].unbind(1)  # each [B, 1]
    x = (torch.arange(w * side, device=maps.device) + 0.5) / (w * side)  # [w'] across the crop
    x = torch.where(flip[:, None], 1 - x, x)  # [B, w']
    x = x0 + (x1 - x0) * x
    y = y0 + (y1 - y0) * (torch.arange(h * side, device=maps.device) + 0.5) / (h * side)  # [B, h']
    shape = (len(maps), t, h * side, w * side)
    points = torch.stack(
        [
            x[:, None, None, :].expand(shape),
            y[:, None, :, None].expand(shape),
            times.float()[:, :, None, None].expand(shape),
        ],
        dim=-1,
    )  # [B, t, h', w', (x, y, time)]
    # align_corners=False puts the S values at the mid-points of S equal parts: just where they were
    # measured.
    values = F.grid_sample(
        maps.float()[:, None], points * 2 - 1, padding_mode="border", align_corners=False
    )
    return F.avg_pool2d(values[:, 0], side)


def cut_motion(field, times, box, flip, grid, seconds):
    """Brings a stored motion field to the tokens of a sample, as `cut_maps` does, and to its units.

    field [B, S, 2, G, G]: dx, dy in frame widths and heights per second; seconds [B]: the length of
    the video

    Returns float32 [B, t, 2, h, w]: dx, dy to the next slice, as fractions of the crop's width and
    height, after the flip."""
    dx, dy = (cut_maps(field[:, :, axis], times, box, flip, grid) for axis in (0, 1))
    dx = torch.where(flip[:, None, None, None], -dx, dx)
    gaps = times.float().diff(dim=1)
    # a clip's end may stand still
    gaps = torch.cat([gaps, gaps[:, -1:]], 1) if grid[0] > 1 else torch.zeros_like(times)
    scale = (gaps * seconds[:, None])[:, :, None] / (box[:, 2:] - box[:, :2])[:, None]  # [B, t, 2]
    return torch.stack([dx, dy], 2) * scale[..., None, None]


# ---- the preview ---------------------------------------------------------------------------------


def heat(values):
    """Colours float [..., H, W], scaled to [0, 1] within the picture, from blue over white to
    red: float [..., H, W, 3].
    """
    low, high = values.min(), values.max()
    v = ((values - low) / (high - low).clamp(min=1e-6))[..., None]
    return torch.cat([(2 * v).clamp(max=1), 1 - (2 * v - 1).abs(), (2 - 2 * v).clamp(max=1)], -1)


def draw_tiles(clip, masks, grid, saliency=None, motion=None):
    """What a clip, its maps and its masks look like: {name: float [T, H, W, 3] in [0, 1]}.

    clip float [3, T, H, W] in [0, 1]; masks {name: bool [N]}; saliency [t, h, w]; motion [t, 2, h,
    w], drawn in the colours of Baker et al. (the hue is the direction)."""
    from torchvision.utils import flow_to_image

    frames = clip.permute(1, 2, 3, 0)  # [T, H, W, 3]

    def enlarge(maps):  # [t, h, w] -> [T, H, W]
        return F.interpolate(maps.float()[None, None], frames.shape[:3], mode="nearest")[0, 0]

    rows = {"clip": frames}
    if saliency is not None:
        rows["saliency"] = 0.35 * frames + 0.65 * heat(enlarge(saliency))
    if motion is not None:
        colours = flow_to_image(motion.float()) / 255  # [t, 3, h, w]
        colours = torch.stack([enlarge(colour) for colour in colours.unbind(1)], dim=-1)
        rows["motion"] = 0.35 * frames + 0.65 * colours
    grey = torch.full_like(frames, 0.55)
    for name, mask in masks.items():
        hidden = enlarge(mask.view(grid))[..., None] > 0
        rows[name] = torch.where(hidden, grey, frames)
    return rows


def to_picture(tile, side):
    """float [H, W, 3] in [0, 1] -> a PIL picture of side x side pixels."""
    from PIL import Image

    picture = Image.fromarray((tile * 255).round().byte().numpy())
    return picture.resize((side, side), Image.NEAREST)


def tile_side(size):
    """The side of the drawn tiles of a clip of `size` pixels: a whole multiple, at least about
    128.
    """
    return size * max(1, 128 // size)


def wrap(text, font, width, lines):
    """`text` in at most `lines` lines of at most `width` pixels, joined; what is too long ends
    in dots.
    """
    text = " ".join(text.split())[:1000]
    for columns in range(min(len(text), width), 0, -1):
        wrapped = textwrap.wrap(text, columns, max_lines=lines, placeholder="…")
        if max(font.getlength(line) for line in wrapped) <= width:
            return "\n".join(wrapped)
    return ""


def draw_strip(tiles, slices, title):
    """A PIL picture of what `draw_tiles` gives: the title, then one row per tile, its name before
    it, and one column per token slice (its first frame). The letters grow with the picture."""
    from PIL import Image, ImageDraw, ImageFont

    frames, size = tiles["clip"].shape[:2]
    side = tile_side(size)
    step = side + 4
    # read when shrunk to a page, too
    letters = min(max(14, slices * step // 55), max(14, side // 4))
    font = ImageFont.load_default(size=letters)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = {name: wrap(name, font, side, lines=3) for name in tiles}
    margin = 12 + max(measure.multiline_textbbox((0, 0), name, font)[2] for name in names.values())
    margin = math.ceil(margin)
    width = margin + slices * step
    title = wrap(title, font, width - 8, lines=3)
    top = 12 + math.ceil(measure.multiline_textbbox((0, 0), title, font)[3])

    picture = Image.new("RGB", (width, top + len(tiles) * step), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((4, 4), title, "black", font)
    for i, (name, tile) in enumerate(tiles.items()):
        y = top + i * step
        draw.multiline_text((4, y + side // 2), names[name], "black", font, anchor="lm")
        for j, frame in enumerate(tile[:: frames // slices]):
            picture.paste(to_picture(frame, side), (margin + j * step, y))
    return picture


def draw_frames(tiles):
    """The same as moving pictures: a list of T PIL pictures, the tiles three a line, each under
    its name.
    """
    from PIL import Image, ImageDraw, ImageFont

    frames, size = tiles["clip"].shape[:2]
    side = tile_side(size)
    step = side + 4
    font = ImageFont.load_default(size=max(14, side // 9))
    head = math.ceil(1.4 * font.size)
    lines = math.ceil(len(tiles) / 3)
    width = 3 * step // 2 * 2  # H.264 wants even sides
    height = lines * (step + head) // 2 * 2
    names = {name: wrap(name, font, side, lines=1) for name in tiles}
    pictures = []
    for t in range(frames):
        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        for i, (name, tile) in enumerate(tiles.items()):
            x = i % 3 * step
            y = i // 3 * (step + head)
            draw.text((x + 2, y + head // 2), names[name], "black", font, anchor="lm")
            picture.paste(to_picture(tile[t], side), (x, y + head))
        pictures.append(picture)
    return pictures


def write_video(path, pictures, fps):
    """Writes PIL pictures as a GIF, or as H.264 in the container that the name says."""
    from fractions import Fraction

    import av

    if Path(path).suffix.lower() == ".gif":
        options = {"save_all": True, "append_images": pictures[1:], "loop": 0}
        pictures[0].save(path, duration=1000 / fps, **options)
        return
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


TUBELET = 2  # frames of a token, as VideoMAE's
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
MOVING = (".mp4", ".gif", ".mov", ".mkv")
MOST_MEMORY = 4e9  # bytes that a preview may take


def parse_args(argv=None):
    from tgm.flags import Parser, count, frame_count, pixel_count, positive_int, ratio, seed_number

    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data",
        default="data/train.csv",
        help="manifest; captions, saliency and motion are read beside it",
    )
    parser.add_argument(
        "--companions",
        metavar="PREFIX",
        help="read PREFIX.saliency.npy and PREFIX.motion.npy instead",
    )
    parser.add_argument("--row", type=count, default=0, help="line of the manifest, from 0")
    parser.add_argument("--caption", type=count, default=0, help="which of the video's captions")
    parser.add_argument("--out", type=Path, default="mask.png", help="picture to write")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="FILE",
        help="write the clip and its masks as a moving picture too: .mp4 or .gif",
    )
    parser.add_argument(
        "--mask-ratio", type=ratio, help="one ratio for all masks (default: each mask's own)"
    )
    parser.add_argument("--frames", type=frame_count, default=16)
    parser.add_argument(
        "--stride", type=positive_int, default=4, help="use every Nth frame of the video"
    )
    parser.add_argument("--image-size", type=pixel_count, default=224)
    parser.add_argument("--patch-size", type=positive_int, default=16)
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser.parse_args(argv)


def preview_ratios(mask_ratio):
    return {name: mask_ratio or own for name, own in RATIOS.items()}


def preview_grid(frames, image_size, patch_size, mask_ratio):
    """The tokens (t, h, w) of a preview. ValueError, naming the flags, if they do not fit together
    or ask for gigabytes."""
    flags = f"--frames {frames} --image-size {image_size} --patch-size {patch_size}"
    if frames % TUBELET:
        raise ValueError(
            f"--frames {frames}: expected a multiple of {TUBELET}, the frames of a token"
        )
    if image_size % patch_size:
        raise ValueError(f"{flags}: the image size is not a multiple of the patch size")
    grid = (frames // TUBELET, image_size // patch_size, image_size // patch_size)
    masked = {}
    for name, ratio in preview_ratios(mask_ratio).items():
        try:
            masked[name] = masked_count(ratio, grid)
        except ValueError as error:
            flags = f"--mask-ratio {mask_ratio:g} {flags}" if mask_ratio else flags
            raise ValueError(f"{flags}: {name}'s {error}") from None
    rows = 3 + len(MASKS)
    needed = rows * 3 * 4 * frames * image_size**2  # the tiles
    needed += rows * 3 * (frames + grid[0]) * tile_side(image_size) ** 2  # the pictures
    visible = math.prod(grid) - masked["flow"]
    needed += 3 * 2 * 4 * visible * grid[1] * grid[2]  # flow: from each token to each visible one
    if needed > MOST_MEMORY:
        gigabytes = needed / 1e9
        raise ValueError(f"{flags}: drawing that takes {gigabytes:.0f} GB of memory: ask for less")
    return grid


def try_file(flag, path, endings):
    """ValueError, naming the flag, unless `path` ends in one of `endings` and can be written."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"{flag} {path}: expected a name that ends in {', '.join(endings)}")
    there = path.exists()
    try:
        with open(path, "ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def why_uncaptioned(path, row):
    """The reason that caption.py wrote down for a row without captions."""
    import json

    entry = json.loads(path.read_text(encoding="utf-8").splitlines()[row])
    return entry.get("error", "caption.py found none")


def why_unreadable(path):
    """The reason why a video cannot be read; None if it can."""
    from tgm import video

    try:
        with video.VideoReader(path) as reader:
            reader.read([0])
    except video.VideoError as error:
        return str(error)


def read_saliency(data, prefix, videos, row, caption):
    """-> (the saliency of a row for one of its captions [S, G, G], that caption). ManifestError or
    ValueError, one line, where there is none."""
    from tgm import arrays

    remedy = f"python caption.py --data {data} && python saliency.py --data {data}"
    captions_path = arrays.companion(data, "captions.jsonl")
    captions = arrays.read_captions(captions_path, videos, remedy)[row]
    beside = str(prefix) == str(Path(data).with_suffix(""))
    expect = {"captions": arrays.file_hash(captions_path)} if beside else {}  # else they are stale
    path = f"{prefix}.saliency.npy"
    saliency, _ = arrays.open_array(path, videos, remedy, **expect)
    name = videos[row].name
    if not captions:
        reason = why_uncaptioned(captions_path, row)
        raise ValueError(f"--row {row}: {name} has no caption ({reason}); choose another row")
    if caption >= len(captions):
        raise ValueError(f"--caption {caption}: row {row} has {len(captions)} captions")
    if caption >= saliency.shape[1]:
        found = f"has {saliency.shape[1]} captions per video, {captions_path} has {len(captions)}"
        raise ValueError(f"--caption {caption}: {path} {found}")
    maps = torch.from_numpy(saliency[row, caption].copy())
    if not maps.isfinite().all():
        reason = (
            why_unreadable(videos[row].path) or f"to be made with: python saliency.py --data {data}"
        )
        raise ValueError(f"--row {row}: {path} is empty for {name} ({reason})")
    return maps, captions[caption]


def read_motion(data, prefix, videos, row):
    """The motion field of a row [S, 2, G, G], or None where its row is empty. ManifestError if the
    array cannot be used."""
    from tgm import arrays

    motion, _ = arrays.open_array(
        f"{prefix}.motion.npy", videos, f"python saliency.py --data {data} --cue motion"
    )
    field = torch.from_numpy(motion[row].copy())
    return field if field.isfinite().all() else None


def preview(argv=None):
    """The command: draws one row of a manifest."""
    import av

    from tgm import manifest, sampling, video
    from tgm.run import RunError

    args = parse_args(argv)
    try:
        grid = preview_grid(args.frames, args.image_size, args.patch_size, args.mask_ratio)
        try_file("--out", args.out, PICTURES)
        if args.video:
            try_file("--video", args.video, MOVING)
    except ValueError as error:
        raise RunError(error) from None

    videos = manifest.read_manifest(args.data)
    if args.row >= len(videos):
        raise RunError(f"--row {args.row}: {args.data} has rows 0 to {len(videos) - 1}")
    row = videos[args.row]
    if (
        args.video
        and args.video.exists()
        and Path(row.path).exists()
        and args.video.samefile(row.path)
    ):
        raise RunError(f"--video {args.video}: is the video that is to be drawn")
    prefix = args.companions or Path(args.data).with_suffix("")
    has_saliency = Path(f"{prefix}.saliency.npy").exists()
    has_motion = Path(f"{prefix}.motion.npy").exists()
    saliency = field = None
    title = row.name
    try:
        if has_saliency or not has_motion:
            saliency, caption = read_saliency(args.data, prefix, videos, args.row, args.caption)
            title = f"{row.name}: {caption}"
        if has_motion:
            field = read_motion(args.data, prefix, videos, args.row)
        with video.VideoReader(row.path) as reader:
            start, end = reader.span(row)
            times = sampling.clip_times(start, end, reader.fps, args.frames, args.stride, 0.5)
            fps = max(1.0, reader.fps / args.stride)
            frames, box = sampling.center_crop(reader.read(times, args.image_size), args.image_size)
    except (video.VideoError, ValueError) as error:
        raise RunError(error) from None

    seconds = end - start
    middles = torch.from_numpy((times.reshape(grid[0], TUBELET).mean(1) - start) / seconds)
    place = (middles[None], torch.tensor([box]), torch.tensor([False]), grid)
    maps = {}
    if saliency is not None:
        maps["saliency"] = cut_maps(saliency[None], *place)
    if field is not None:
        maps["motion"] = cut_motion(field[None], *place, torch.tensor([seconds]))

    generator = torch.Generator().manual_seed(args.seed)
    masks = {}
    for name, ratio in preview_ratios(args.mask_ratio).items():
        need = NEEDS[name]
        if need is None or need in maps:
            mask = make_mask(name, ratio, 1, grid, generator=generator, **maps)
            masks[f"{name} {ratio:.3g}"] = mask[0]
        elif need == "motion" and has_motion:
            print(
                f"{name}: left out, {prefix}.motion.npy is empty for {row.name}: saliency.py has not come to it, or its codec has no "
                f"motion vectors (for any codec: python saliency.py --data {args.data} --cue motion --flow raft --resume none)"
            )
        else:
            remedy = f"python saliency.py --data {args.data}"
            remedy = (
                f"{remedy} --cue motion"
                if need == "motion"
                else f"python caption.py --data {args.data} && {remedy}"
            )
            print(f"{name}: left out, there is no {prefix}.{need}.npy; make it with: {remedy}")

    drawn = {kind: of_row[0] for kind, of_row in maps.items()}
    tiles = draw_tiles(torch.from_numpy(frames).permute(3, 0, 1, 2) / 255, masks, grid, **drawn)
    try:
        draw_strip(tiles, grid[0], title).save(args.out)
    except (OSError, ValueError) as error:
        raise RunError(f"--out {args.out}: cannot be written ({error})") from None
    print(args.out)
    if args.video:
        try:
            write_video(args.video, draw_frames(tiles), fps)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise RunError(f"--video {args.video}: cannot be written ({error})") from None
        print(args.video)


def main(argv=None):
    # only the preview needs more of ours: the masks stand alone
    from tgm.run import one_line_errors

    one_line_errors(preview)(argv)


if __name__ == "__main__":
    from tgm.run import launch

    launch(main)
