"""Which tokens a video masked autoencoder hides: random, tube, text- and motion-guided masks, with
one interface and at one cost.

    make_mask("text", 0.6, batch=32, grid=(8, 14, 14), saliency=maps)

returns bool [32, 1568], True where a token is masked.

In a grid of t x h x w tokens every row masks exactly t * floor(ratio * h * w) tokens, whatever the
mask. So all masks of one ratio leave, and pay for, the same number of visible tokens.

    random         anywhere in space-time (MAE-ST, arXiv 2205.09113)
    tube           one random spatial mask for all slices (VideoMAE, arXiv 2203.12602)
    text           in each slice, the tokens whose patches best match the caption (TGM, the method
                   of this repository)
    text-inverse   in each slice, those that match it least: the control
    motion         in each slice, a window around what moves (MGM, arXiv 2308.12962)
    flow           all but random spots that travel with what they lie on (MGMAE, arXiv 2308.10794)

Everything random comes from one array of uniform noise [B, N], so a mask is a pure function of
(noise, maps): with noise drawn per sample, masks do not depend on batch, worker or rank. All
functions work on a whole batch, on the device of their tensors, and never wait for that device.
`cut_maps` and `cut_motion` bring the maps that saliency.py stores, of the whole video and the whole
frame, to the times, crop and flip of a training sample.

    python masking.py --data data/train.csv --row 3 --out mask.png

draws the clip, its saliency and every mask in one strip (the paper's figure 1). Only this command
needs other files of this project.

Shapes: B batch, grid (t, h, w) tokens, N = t*h*w tokens in (t, h, w) order, S moments of the stored
maps, G x G their grid.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]  # tokens (t, h, w)


def masked_per_slice(ratio: float, grid: Grid) -> int:
    """Tokens masked in each slice, floor(ratio * h * w). ValueError unless some tokens are masked
    and some stay visible."""
    _, h, w = grid
    count = math.floor(ratio * h * w + 1e-6)  # 0.29 * 100 is 28.999999999999996
    if not 0 < count < h * w:
        raise ValueError(
            f"mask ratio {ratio} masks {count} of {h * w} tokens in a slice: "
            "some must be masked and some not"
        )
    return count


def masked_count(ratio: float, grid: Grid) -> int:
    """Tokens masked in a whole clip, t * floor(ratio * h * w); ValueError as `masked_per_slice`."""
    return grid[0] * masked_per_slice(ratio, grid)


def top_k_mask(score: Tensor, count: int, noise: Tensor) -> Tensor:
    """Bool like score [..., M]: True at the `count` highest of the last axis. Among equal scores
    those of the lowest noise [..., M] come first."""
    # Put the tokens into random order, then sort by score: a stable sort keeps the order of equals.
    shuffled = noise.argsort(dim=-1)
    shuffled_score = score.gather(-1, shuffled)
    best = shuffled_score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = shuffled.gather(-1, best)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)


def top_of_slices(score: Tensor, ratio: float, grid: Grid, noise: Tensor) -> Tensor:
    """Masks the highest of score [B, t, h*w] in each slice: bool [B, N]; noise like score."""
    return top_k_mask(score, masked_per_slice(ratio, grid), noise).flatten(1)


def by_slice(noise: Tensor, grid: Grid) -> Tensor:
    """[B, N] -> [B, t, h*w]."""
    t, h, w = grid
    return noise.view(-1, t, h * w)


def check_map(mask: str, kind: str, map_: Tensor | None, shape: tuple[int, ...]) -> None:
    found = None if map_ is None else list(map_.shape)
    if found != list(shape):
        raise ValueError(f"{mask} masks need {kind} {list(shape)}, got {found}")


# ---- the masks -----------------------------------------------------------------------------------
# Each takes (ratio, grid, noise [B, N], saliency, motion), as `make_mask` explains.


def random_mask(ratio, grid, noise, saliency, motion):
    return top_k_mask(noise, masked_count(ratio, grid), noise)


def tube_mask(ratio, grid, noise, saliency, motion):
    t, h, w = grid
    noise = noise[:, : h * w]
    return top_k_mask(noise, masked_per_slice(ratio, grid), noise).repeat(1, t)


def text_mask(ratio, grid, noise, saliency, motion):
    check_map("text", "saliency", saliency, (len(noise), *grid))
    score = saliency.float().flatten(2)  # [B, t, h*w]
    return top_of_slices(score, ratio, grid, by_slice(noise, grid))


def text_inverse_mask(ratio, grid, noise, saliency, motion):
    check_map("text-inverse", "saliency", saliency, (len(noise), *grid))
    score = -saliency.float().flatten(2)  # [B, t, h*w]
    return top_of_slices(score, ratio, grid, by_slice(noise, grid))


def motion_mask(ratio, grid, noise, saliency, motion):
    """In each slice: take out the camera's motion, find the window of about the ratio's area that
    holds most of the remaining energy, smooth the window's centre along time, and mask the tokens
    nearest to that centre, in the window's shape.

    That motion vectors place one continuous, moving, rectangular mask is MGM's; its exact rule is
    not public. Ours are: the median for the camera, a window in the frame's own aspect, the
    smoothing by a binomial of five slices, and tokens next to the window that make up the count."""
    t, h, w = grid
    check_map("motion", "motion", motion, (len(noise), t, 2, h, w))
    scale = math.sqrt(ratio)
    window = (max(1, math.floor(scale * h)), max(1, math.floor(scale * w)))
    noise = noise[:, None, : h * w]  # [B, 1, h*w], the same for all slices
    centre = busiest_window(moving_energy(motion), window, noise)  # [B, 2, t]
    distance = window_distance(smooth_in_time(centre), window, grid)  # [B, t, h*w]
    return top_of_slices(-distance, ratio, grid, noise.expand(-1, t, -1))


def moving_energy(motion):
    """The squared motion of each token against the camera, [B, t, 2, h, w] -> [B, t, h, w]. The
    camera's motion is the median of each slice."""
    motion = motion.float()
    camera = motion.flatten(3).median(-1).values  # [B, t, 2]
    return (motion - camera[..., None, None]).square().sum(2)


def busiest_window(energy, window, noise):
    """The centre of the window that holds most of energy [B, t, h, w] in each slice: [B, 2, t], x
    and y as fractions of the picture. window: its (height, width) in tokens; noise [B, 1, h*w]."""
    h, w = energy.shape[2:]
    high, wide = window
    held = F.avg_pool2d(energy, window, stride=1).flatten(2)  # [B, t, places of the window]
    held = held / held.amax((1, 2), keepdim=True).clamp(min=1e-12)
    # A slice without motion follows the other slices; without any motion, the noise picks one place
    # for all slices.
    held = held + 0.01 * held.mean(1, keepdim=True) + 1e-5 * noise[:, :, : held.shape[-1]]
    place = held.argmax(-1)  # [B, t]
    columns = w - wide + 1
    left = place % columns
    top = place // columns
    return torch.stack([(left + wide / 2) / w, (top + high / 2) / h], 1)


def smooth_in_time(centre):
    """Averages [B, 2, t] over five slices with binomial weights; the ends repeat."""
    binomial = torch.tensor([1.0, 4, 6, 4, 1], device=centre.device) / 16
    return F.pad(centre, (2, 2), mode="replicate").unfold(2, 5, 1) @ binomial


def window_distance(centre, window, grid):
    """How far each token is from centre [B, 2, t], in windows: [B, t, h*w]. Tokens of one distance
    lie on the border of a window (the maximum norm)."""
    _, h, w = grid
    high, wide = window
    size = torch.tensor([wide / w, high / h], device=centre.device)
    away = token_centres(grid, centre.device) - centre.mT[:, :, None]  # [B, t, h*w, 2]
    return (away.abs() / size).amax(-1)


def token_centres(grid, device):
    """The middle of each token of a slice as fractions of the picture: float32 [h*w, 2], x, y."""
    _, h, w = grid
    y = (torch.arange(h, device=device) + 0.5) / h
    x = (torch.arange(w, device=device) + 0.5) / w
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def flow_mask(ratio, grid, noise, saliency, motion):
    """MGMAE's: Gaussian bumps at random tokens of the middle slice, as many as stay visible in a
    slice, are carried to the other slices along the motion; the tokens where that map is highest
    are visible. A token whose trace leaves the picture has the map's value at its own place. Where
    bumps overlap the highest counts, as in the authors' code: their sum would favour the picture's
    middle. The highest bump is the nearest one, whatever their width.

    Ours are: the motion field is stored (theirs is RAFT's between all frames, computed during
    training), and each token is traced to the middle slice, where the map is read; warping the map
    from frame to frame would blur it.

    It differs from MGMAE's released code on purpose. That code warps the slices before the middle
    the wrong way, since it compares its option with a value that the option cannot have; and it
    keeps 19 tokens of a slice visible where a ratio of 0.9 of 196 leaves 20. The visible tokens of
    the two overlap (Jaccard) by 0.69 to 0.87 from the middle on and by 0.05 to 0.69 before it, or
    by 0.56 to 0.82 there with the option mended; nothing in this repository repeats that
    measurement."""
    t, h, w = grid
    check_map("flow", "motion", motion, (len(noise), t, 2, h, w))
    hidden = masked_per_slice(ratio, grid)
    still = token_centres(grid, noise.device)  # [h*w, 2]
    bumps = still[noise[:, : h * w].argsort(1)[:, hidden:]]  # [B, V, 2]
    traced = trace_to_middle(motion).flatten(2, 3)  # [B, t, h*w, 2]
    outside = ((traced < 0) | (traced > 1)).any(-1, keepdim=True)
    traced = torch.where(outside, still, traced)
    away = traced[:, :, :, None] - bumps[:, None, None]  # [B, t, h*w, V, 2]
    away = away * torch.tensor([w, h], device=noise.device)  # in tokens
    nearest = away.square().sum(-1).amin(-1)  # [B, t, h*w]
    return top_of_slices(nearest, ratio, grid, by_slice(noise, grid))


def trace_to_middle(motion):
    """Where each token's centre was, or will be, in the middle slice: motion [B, t, 2, h, w] ->
    float32 [B, t, h, w, 2], x and y as fractions of the picture.

    Each trace goes from slice to slice until it is there: from earlier slices forwards in time,
    along the motion; from later ones backwards, against it. A trace that leaves the picture goes on
    with the motion at the border."""
    batch, t, _, h, w = motion.shape
    middle = t // 2
    field = motion.float().transpose(1, 2)  # [B, 2, t, h, w]
    at = token_centres((t, h, w), motion.device).expand(batch, t, h * w, 2).unflatten(2, (h, w))
    # the slice that each trace is in
    now = torch.arange(t, device=motion.device, dtype=torch.float32)
    for _ in range(middle):
        direction = (middle - now).sign()  # 1: forwards, -1: backwards, 0: it is there
        between = now + 0.5 * direction  # the motion between two slices is read half way
        time = (between + 0.5) / t  # slice 0 lies at the middle of the first of t equal parts
        time = time.view(1, t, 1, 1, 1).expand(batch, t, h, w, 1)
        places = torch.cat([at, time], dim=-1) * 2 - 1  # in [-1, 1], as grid_sample wants them
        moved = F.grid_sample(field, places, padding_mode="border", align_corners=False)
        at = at + direction.view(1, t, 1, 1, 1) * moved.permute(0, 2, 3, 4, 1)
        now = now + direction
    return at


# ---- one interface -------------------------------------------------------------------------------


MASKS: dict[str, Callable[..., Tensor]] = {
    "random": random_mask,
    "tube": tube_mask,
    "text": text_mask,
    "text-inverse": text_inverse_mask,
    "motion": motion_mask,
    "flow": flow_mask,
}
# each mask's own default
RATIOS = {"random": 0.9, "tube": 0.9, "text": 0.6, "text-inverse": 0.6, "motion": 0.75, "flow": 0.9}
# the stored maps that each mask reads
NEEDS = {
    "random": None,
    "tube": None,
    "text": "saliency",
    "text-inverse": "saliency",
    "motion": "motion",
    "flow": "motion",
}


def make_mask(
    name: str,
    ratio: float,
    batch: int,
    grid: Grid,
    saliency: Tensor | None = None,
    motion: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Masks of a batch.

    name: a key of MASKS
    ratio: share masked in each slice, in (0, 1)
    saliency [B, t, h, w]: any real scores, for the text masks
    motion [B, t, 2, h, w]: how far each token moves to the next slice, dx and dy as fractions of
        the crop's width and height, for the masks motion and flow
    noise [B, N]: uniform in [0, 1); drawn from `generator` where it is not given

    Returns bool [B, N] on the device of the maps, True = masked, exactly masked_count(ratio, grid)
    in every row. Raises ValueError for an unknown name, a ratio that masks nothing or everything,
    or maps missing or of another shape."""
    if name not in MASKS:
        raise ValueError(f"unknown mask {name!r}: one of {', '.join(MASKS)}")
    shape = (batch, math.prod(grid))
    if noise is None:
        maps = motion if saliency is None else saliency
        noise = draw_noise(shape, generator, None if maps is None else maps.device)
    if noise.shape != shape:
        raise ValueError(f"noise must be {list(shape)}, got {list(noise.shape)}")
    mask = MASKS[name](ratio, grid, noise, saliency, motion)
    assert mask.shape == shape
    return mask


def draw_noise(shape, generator, device):
    """Uniform noise on `device` (None: the generator's), drawn where the generator is."""
    if generator is None:
        return torch.rand(shape, device=device)
    noise = torch.rand(shape, generator=generator, device=generator.device)
    return noise if device is None else noise.to(device)


def some_masked(mask: Tensor, noise: Tensor, count: int) -> Tensor:
    """`count` of each row's masked tokens, for a decoder that reconstructs only these (VideoMAE
    V2's dual masking, arXiv 2303.16727, which takes a fixed pattern of cells): int64 [B, count].
    mask bool [B, N]; noise [B, N], which made it."""
    # The order of the noise is used up: masked tokens are those of the lowest noise (random), or of
    # the lowest in slice 0 (tube), and picking by it again would favour some slices. The fraction
    # of 997 times the noise is uniform as well, and hardly depends on that order.
    fresh = noise * 997 % 1
    visible_last = fresh.masked_fill(~mask, 2)
    return visible_last.argsort(dim=1, stable=True)[:, :count]


# ---- from stored maps to a sample's tokens -------------------------------------------------------


def cut_maps(
    maps: Tensor, times: Tensor, box: Tensor, flip: Tensor, grid: Grid, oversample: int = 2
) -> Tensor:
    """Brings stored maps to the tokens of a sample: the maps' value where each token lies, by
    trilinear interpolation.

    maps [B, S, G, G]: of the whole frame, at the mid-points of S equal parts of the video
    times [B, t]: the middle of each token slice, as a fraction of the video's length
    box [B, 4]: the crop's x0, y0, x1, y1 as fractions of the frame, before the flip
    flip bool [B]: mirrored left to right
    oversample: each token averages this many points squared, so that no cell is skipped of a map
        that is finer than the tokens

    Returns float32 [B, t, h, w]."""
    t, h, w = grid
    x0, y0, x1, y1 = box.float()[:, :, None].unbind(1)  # each [B, 1]
    high = h * oversample
    wide = w * oversample
    across = (torch.arange(wide, device=maps.device) + 0.5) / wide  # of the crop's width
    across = torch.where(flip[:, None], 1 - across, across)  # [B, w']
    x = x0 + (x1 - x0) * across
    y = y0 + (y1 - y0) * (torch.arange(high, device=maps.device) + 0.5) / high  # [B, h']
    shape = (len(maps), t, high, wide)
    x = x[:, None, None, :].expand(shape)
    y = y[:, None, :, None].expand(shape)
    time = times.float()[:, :, None, None].expand(shape)
    points = torch.stack([x, y, time], dim=-1) * 2 - 1  # in [-1, 1], as grid_sample wants them
    # align_corners=False puts the S values at the mid-points of S equal parts: just where they were
    # measured.
    values = F.grid_sample(
        maps.float()[:, None], points, padding_mode="border", align_corners=False
    )
    return F.avg_pool2d(values[:, 0], oversample)


def cut_motion(
    field: Tensor, times: Tensor, box: Tensor, flip: Tensor, grid: Grid, seconds: Tensor
) -> Tensor:
    """Brings a stored motion field to the tokens of a sample, as `cut_maps` does, and to its units.

    field [B, S, 2, G, G]: dx, dy in frame widths and heights per second
    seconds [B]: the length of the video

    Returns float32 [B, t, 2, h, w]: dx, dy to the next slice, as fractions of the crop's width and
    height, after the flip."""
    dx = cut_maps(field[:, :, 0], times, box, flip, grid)
    dy = cut_maps(field[:, :, 1], times, box, flip, grid)
    dx = torch.where(flip[:, None, None, None], -dx, dx)
    if grid[0] > 1:
        gaps = times.float().diff(dim=1)
        gaps = torch.cat([gaps, gaps[:, -1:]], 1)  # 0 where a clip's end stands still
    else:
        gaps = torch.zeros_like(times)
    size = box[:, 2:] - box[:, :2]  # [B, 2]
    scale = (gaps * seconds[:, None])[:, :, None] / size[:, None]  # [B, t, 2]
    return torch.stack([dx, dy], 2) * scale[..., None, None]


# ---- the command ---------------------------------------------------------------------------------


TUBELET = 2  # frames of a token, as VideoMAE's
MOST_MEMORY = 4e9  # bytes that drawing may take


def parse_args(argv: list[str] | None = None):
    from tgm.flags import Parser, count, frame_count, pixel_count, positive_int, ratio, seed_number

    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data",
        default="data/train.csv",
        help="the manifest; captions, saliency and motion are read from the same folder",
    )
    parser.add_argument(
        "--companions",
        metavar="PREFIX",
        help="read PREFIX.saliency.npy and PREFIX.motion.npy, not the manifest's",
    )
    parser.add_argument("--row", type=count, default=0, help="line of the manifest, from 0")
    parser.add_argument("--caption", type=count, default=0, help="which of the video's captions")
    parser.add_argument("--out", type=Path, default="mask.png", help="picture to write")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="FILE",
        help="also write the clip and its masks as a moving picture: .mp4 or .gif",
    )
    parser.add_argument(
        "--mask-ratio", type=ratio, help="one ratio for all masks (default: each mask's own)"
    )
    parser.add_argument("--frames", type=frame_count, default=16, help="frames of the clip")
    parser.add_argument(
        "--stride", type=positive_int, default=4, help="use every Nth frame of the video"
    )
    parser.add_argument("--image-size", type=pixel_count, default=224, help="pixels of a side")
    parser.add_argument(
        "--patch-size", type=positive_int, default=16, help="pixels of a token's side"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the masks' noise")
    return parser.parse_args(argv)


def preview_grid(args, ratios):
    """The tokens (t, h, w) of the clip to be drawn. RunError, naming the flags, if they do not fit
    together or ask for gigabytes."""
    from tgm.pictures import drawing_bytes
    from tgm.run import RunError

    if args.frames % TUBELET:
        raise RunError(
            f"--frames {args.frames}: expected a multiple of {TUBELET}, the frames of a token"
        )
    flags = f"--frames {args.frames} --image-size {args.image_size} --patch-size {args.patch_size}"
    if args.image_size % args.patch_size:
        raise RunError(f"{flags}: the image size is not a multiple of the patch size")
    side = args.image_size // args.patch_size
    grid = (args.frames // TUBELET, side, side)
    if args.mask_ratio:
        flags = f"--mask-ratio {args.mask_ratio:g} {flags}"
    for name, ratio in ratios.items():
        try:
            masked_count(ratio, grid)
        except ValueError as error:
            raise RunError(f"{flags}: {name}'s {error}") from None

    needed = drawing_bytes(3 + len(MASKS), args.frames, grid[0], args.image_size)
    visible = math.prod(grid) - masked_count(ratios["flow"], grid)
    needed += 3 * 2 * 4 * visible * side**2  # flow_mask's `away`, thrice
    if needed > MOST_MEMORY:
        gigabytes = needed / 1e9
        raise RunError(f"{flags}: drawing that takes {gigabytes:.0f} GB of memory: ask for less")
    return grid


def draw_row(argv: list[str] | None = None) -> None:
    """The command: draws one row of a manifest, its maps and all masks that they allow."""
    from tgm import pictures, preview

    args = parse_args(argv)
    ratios = {name: args.mask_ratio or own for name, own in RATIOS.items()}
    grid = preview_grid(args, ratios)
    videos = preview.read_rows(args.data, args.row)
    video = videos[args.row]
    pictures.require_writable("--out", args.out, pictures.STILL)
    if args.video:
        pictures.require_writable("--video", args.video, pictures.MOVING, source=video.path)
    stored = preview.read_stored(args.data, args.companions, videos, args.row, args.caption)
    clip = preview.read_clip(video, args.frames, args.stride, args.image_size, TUBELET)

    place = (clip.times[None], clip.box[None], torch.tensor([False]), grid)
    maps = {}
    if stored.saliency is not None:
        maps["saliency"] = cut_maps(stored.saliency[None], *place)
    if stored.motion is not None:
        maps["motion"] = cut_motion(stored.motion[None], *place, torch.tensor([clip.seconds]))
    generator = torch.Generator().manual_seed(args.seed)
    masks = {}
    for name, ratio in ratios.items():
        need = NEEDS[name]
        if need in stored.missing:
            print(f"{name}: left out, {stored.missing[need]}")
            continue
        mask = make_mask(name, ratio, 1, grid, generator=generator, **maps)
        masks[f"{name} {ratio:.3g}"] = mask[0]

    drawn = {kind: of_batch[0] for kind, of_batch in maps.items()}
    tiles = pictures.draw_tiles(clip.frames, masks, grid, **drawn)
    with pictures.saving("--out", args.out):
        pictures.draw_strip(tiles, grid[0], stored.title).save(args.out)
    print(args.out)
    if args.video:
        with pictures.saving("--video", args.video):
            pictures.write_video(args.video, pictures.draw_frames(tiles), clip.fps)
        print(args.video)


def main(argv: list[str] | None = None) -> None:
    from tgm.run import one_line_errors

    one_line_errors(draw_row)(argv)


if __name__ == "__main__":
    from tgm.run import launch

    launch(main)
