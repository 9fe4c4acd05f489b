"""Which tokens a video masked autoencoder hides: random, tube, text-guided and motion-guided masks.

    make_mask("text", 0.6, batch=32, grid=(8, 14, 14), saliency=maps)

returns bool [32, 1568], True where a token is masked.

A token stands for a small block of the clip, such as 2 frames x 16 x 16 pixels. The h x w tokens of
one time step are a slice; a clip has t slices. Every sample masks exactly t * floor(ratio * h * w)
tokens, whatever the mask. So at one ratio all masks leave the same number of tokens visible, and
the model costs the same.

    random         anywhere in space-time (MAE-ST, arXiv 2205.09113)
    tube           one random spatial mask for all slices (VideoMAE, arXiv 2203.12602)
    text           in each slice, the tokens whose patches best match the caption (TGM, arXiv
                   2408.00759, the method of this repository)
    text-inverse   in each slice, the tokens that match the caption least: a control
    motion         in each slice, a window around what moves (MGM, arXiv 2308.12962)
    flow           all tokens but those near random spots; the spots travel with what they lie on
                   (MGMAE, arXiv 2308.10794)

We have not read TGM's paper itself, only notes on it. That it selects the tokens slice by slice is
taken from these.

The text masks follow a saliency map, which scores how well each place matches a caption; motion and
flow masks follow a motion map. saliency.py stores these maps for the whole video and the whole
frame; a motion map holds velocities. `cut_maps` and `cut_motion` cut out the part that belongs to a
training sample: its times, its crop, its flip. `cut_motion` also turns velocities into
displacements from one slice to the next, which the masks read.

All randomness comes from one array of uniform noise [B, N]. A mask is a function of this noise and
of the maps alone. If each sample has its own noise, its mask does not depend on the batch, the
worker or the rank. All functions work on a whole batch, on the device of their tensors. With the
noise given, none of them makes the host wait for a GPU. To look for NaN in the maps would make it
wait, so it is not done. Both text masks hide tokens whose score is NaN first; one NaN in the motion
may spoil a motion or flow mask of the whole clip.

    python masking.py --data data/train.csv --row 3 --out mask.png
    python masking.py --data data/train.csv --rows 12 --out sheet.png

The first draws a clip, its maps and every mask in one picture, as figure 1 of TGM's paper does,
according to our notes. The second draws, for 12 random videos, a frame, its saliency, its text mask
and its captions. They show the maps that saliency.py wrote; masks whose maps are missing are left
out. Only these commands need other files of this project (in tgm/).

Shapes: B batch, grid (t, h, w) tokens, N = t*h*w tokens in (t, h, w) order, S moments of the stored
maps, G x G their grid, V visible tokens of one slice.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]  # tokens (t, h, w)


def masked_per_slice(ratio: float, grid: Grid) -> int:
    """Tokens masked in each slice, floor(ratio * h * w). ValueError unless some tokens are masked
    and some stay visible."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio}: expected a number between 0 and 1")
    _, h, w = grid
    # Rounding errors may put the product just below a whole number: 0.29 * 100 is
    # 28.999999999999996.
    count = math.floor(ratio * h * w + 1e-6)
    if not 0 < count < h * w:
        raise ValueError(
            f"mask ratio {ratio} masks {count} of {h * w} tokens in a slice: "
            "some must be masked and some not"
        )
    return count


def masked_count(ratio: float, grid: Grid) -> int:
    """Tokens masked in a whole clip, t * floor(ratio * h * w). ValueError as in
    `masked_per_slice`."""
    return grid[0] * masked_per_slice(ratio, grid)


def top_k_mask(score: Tensor, count: int, noise: Tensor) -> Tensor:
    """Masks the `count` highest scores [..., n] of the last axis: bool [..., n]. Among equal scores
    those of the lowest noise [..., n] come first."""
    # Put the tokens into random order, then sort by score: a stable sort keeps the order of equals.
    shuffled = noise.argsort(dim=-1)
    shuffled_score = score.gather(-1, shuffled)
    best = shuffled_score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = shuffled.gather(-1, best)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)


def top_k_per_slice(score: Tensor, ratio: float, grid: Grid, noise: Tensor) -> Tensor:
    """Masks the highest scores [B, t, h*w] of each slice: bool [B, N]. The noise has the shape of
    the score."""
    return top_k_mask(score, masked_per_slice(ratio, grid), noise).flatten(1)


def check_map(name: str, kind: str, map_: Tensor | None, shape: tuple[int, ...]) -> None:
    """ValueError unless the map of this kind is given to the mask of this name in this shape."""
    found = None if map_ is None else list(map_.shape)
    if found != list(shape):
        raise ValueError(f"{name} masks need {kind} {list(shape)}, got {found}")


# ---- the masks -----------------------------------------------------------------------------------
# All masks have one signature, so that `make_mask` can call each of them: (ratio, grid, noise
# [B, N], saliency, motion). A mask leaves the arguments unused that it does not need.

Map = Tensor | None


def random_mask(ratio: float, grid: Grid, noise: Tensor, saliency: Map, motion: Map) -> Tensor:
    return top_k_mask(noise, masked_count(ratio, grid), noise)


def tube_mask(ratio: float, grid: Grid, noise: Tensor, saliency: Map, motion: Map) -> Tensor:
    t, h, w = grid
    noise = noise[:, : h * w]
    return top_k_mask(noise, masked_per_slice(ratio, grid), noise).repeat(1, t)


def text_mask(ratio: float, grid: Grid, noise: Tensor, saliency: Map, motion: Map) -> Tensor:
    check_map("text", "saliency", saliency, (len(noise), *grid))
    t, h, w = grid
    score = saliency.float().flatten(2)  # [B, t, h*w]
    return top_k_per_slice(score, ratio, grid, noise.unflatten(1, (t, h * w)))


def text_inverse_mask(
    ratio: float, grid: Grid, noise: Tensor, saliency: Map, motion: Map
) -> Tensor:
    check_map("text-inverse", "saliency", saliency, (len(noise), *grid))
    t, h, w = grid
    score = -saliency.float().flatten(2)  # [B, t, h*w]
    return top_k_per_slice(score, ratio, grid, noise.unflatten(1, (t, h * w)))


def motion_mask(ratio: float, grid: Grid, noise: Tensor, saliency: Map, motion: Map) -> Tensor:
    """Masks, in each slice, the tokens nearest to a centre that follows what moves.

    1. Subtract the camera's motion from each slice: its shift, not zoom or rotation.
    2. Find the window that holds most of the remaining energy. Its sides are those of the picture
       times the square root of the ratio, rounded down: for 0.75 of 14 x 14 tokens, 12 x 12.
    3. Smooth the centre of the window along time.
    4. Mask the tokens nearest to that centre. The distance is the larger of two: the horizontal
       one, in widths of the window, and the vertical one, in heights of the window.

    From MGM: motion vectors place one moving rectangle that never jumps. Its exact rule is not
    public.
    Ours: the median as the camera's motion; the window in the shape of the picture; the smoothing
    over five slices; tokens next to the window where it holds too few (12 x 12 are 144, and 0.75
    asks for 147)."""
    t, h, w = grid
    check_map("motion", "motion", motion, (len(noise), t, 2, h, w))
    scale = math.sqrt(ratio)
    window = (max(1, math.floor(scale * h + 1e-6)), max(1, math.floor(scale * w + 1e-6)))
    noise = noise[:, None, : h * w]  # [B, 1, h*w], the same for all slices
    centre = busiest_window(moving_energy(motion), window, noise)  # [B, 2, t]
    distance = window_distance(smooth_in_time(centre), window, grid)  # [B, t, h*w]
    return top_k_per_slice(-distance, ratio, grid, noise.expand(-1, t, -1))


def moving_energy(motion: Tensor) -> Tensor:
    """The squared motion of each token against the camera: [B, t, 2, h, w] -> [B, t, h, w]. The
    camera's motion is the median of each slice."""
    motion = motion.float()
    camera = motion.flatten(3).median(-1).values  # [B, t, 2]
    return (motion - camera[..., None, None]).square().sum(2)


def busiest_window(energy: Tensor, window: tuple[int, int], noise: Tensor) -> Tensor:
    """The centre of the window with the largest sum of energy [B, t, h, w] in each slice:
    [B, 2, t], x and y in tokens. window: its (height, width) in tokens; noise [B, 1, h*w]."""
    high, wide = window
    energy_inside = F.avg_pool2d(energy, window, stride=1).flatten(2)  # [B, t, places]
    # Divide by the largest value of the clip, so that the two small terms below mean the same in
    # every clip. The clamp is for clips in which the camera alone moves: only errors of rounding
    # (about 1e-12) are left there, and dividing by the largest would make them decide. With the
    # clamp they stay below the noise of the last term (1e-5).
    energy_inside = energy_inside / energy_inside.amax((1, 2), keepdim=True).clamp(min=1e-6)
    score = energy_inside
    # A slice with little or no motion takes the place that is best over all slices.
    score = score + 0.01 * energy_inside.mean(1, keepdim=True)
    # In a clip without motion the noise chooses one place for all slices.
    score = score + 1e-5 * noise[:, :, : energy_inside.shape[-1]]
    place = score.argmax(-1)  # [B, t], an index into the places in row-major order
    columns = energy.shape[-1] - wide + 1
    left = place % columns
    top = place // columns
    return torch.stack([left + wide / 2, top + high / 2], dim=1)


BINOMIAL = (1, 4, 6, 4, 1)  # weights of five neighbouring slices; their sum is 16


def smooth_in_time(centre: Tensor) -> Tensor:
    """Averages the centres [B, 2, t] over five slices with binomial weights. Before the first and
    after the last slice the centre of that slice is repeated."""
    t = centre.shape[2]
    padded = F.pad(centre, (2, 2), mode="replicate")
    total = torch.zeros_like(centre)
    for shift, weight in enumerate(BINOMIAL):
        total = total + weight * padded[:, :, shift : shift + t]
    return total / sum(BINOMIAL)


def window_distance(centre: Tensor, window: tuple[int, int], grid: Grid) -> Tensor:
    """How far each token is from centre [B, 2, t]: [B, t, h*w].

    The distance is the larger of |dx| / wide and |dy| / high, times high * wide: without a division
    nothing is rounded, so that equal distances stay equal and the noise decides between them."""
    high, wide = window
    x, y = token_centres(grid, centre.device).unbind(-1)  # each [h*w]
    centre_x, centre_y = centre[..., None].unbind(1)  # each [B, t, 1]
    across = (x - centre_x).abs() * high
    down = (y - centre_y).abs() * wide
    return torch.maximum(across, down)


def token_centres(grid: Grid, device: torch.device) -> Tensor:
    """The middle of each token of a slice, x and y in tokens: float32 [h*w, 2]. The first token's
    is at 0.5, 0.5."""
    _, h, w = grid
    y = torch.arange(h, device=device) + 0.5
    x = torch.arange(w, device=device) + 0.5
    y, x = torch.meshgrid(y, x, indexing="ij")  # each [h, w]: rows first, as tokens are counted
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def flow_mask(ratio: float, grid: Grid, noise: Tensor, saliency: Map, motion: Map) -> Tensor:
    """Masks all but the tokens that lie nearest to random spots, which travel with the motion.

    1. Choose the spots: random tokens of the middle slice, as many as stay visible in a slice.
    2. Trace each token of each slice to the middle slice along the motion.
    3. Measure how far each traced token lies from the nearest spot. A token whose trace ends
       outside the picture is measured at its own place.
    4. In each slice, leave the nearest tokens visible.

    From MGMAE: a Gaussian bump is put on each of some random tokens of the middle slice. This map
    is moved to the other slices along the flow, and its highest tokens are visible. Where bumps
    overlap, the larger value counts, as in the authors' code (the sum would favour the middle of
    the picture). A bump falls with the distance, so its highest tokens are those nearest to a spot:
    here no Gaussian is computed, and the distance decides.
    Ours: what is done with traces that end outside; a stored motion field in place of RAFT's flow,
    which MGMAE computes during training; one step from slice to slice, by tokens. MGMAE moves its
    map from frame to frame, by pixels, fills the holes after every step, and adds up the map over
    each token's pixels in its two frames.
    We do not copy two faults of MGMAE's released code: docs/method.md names them."""
    t, h, w = grid
    check_map("flow", "motion", motion, (len(noise), t, 2, h, w))
    visible = h * w - masked_per_slice(ratio, grid)
    own_place = token_centres(grid, noise.device)  # [h*w, 2]
    # any h*w numbers of the noise would do to draw the spots: here the first slice's
    order = noise[:, : h * w].argsort(1)
    spots = own_place[order[:, -visible:]]  # [B, V, 2]
    traced = trace_to_middle(motion).flatten(2, 3)  # [B, t, h*w, 2]
    x, y = traced.unbind(-1)
    outside = (x < 0) | (x > w) | (y < 0) | (y > h)
    traced = torch.where(outside[..., None], own_place, traced)
    distance = torch.cdist(
        traced.flatten(1, 2),
        spots,
        # By matrix products it would be rounded, and errors of rounding would decide between tokens
        # of equal distance, not the noise.
        compute_mode="donot_use_mm_for_euclid_dist",
    )  # [B, N, V]
    to_spot = distance.amin(-1).unflatten(1, (t, h * w))  # the farthest tokens are masked
    return top_k_per_slice(to_spot, ratio, grid, noise.unflatten(1, (t, h * w)))


def trace_to_middle(motion: Tensor) -> Tensor:
    """Where the centre of each token will be, or was, in the middle slice: motion [B, t, 2, h, w]
    (see `make_mask`) -> float32 [B, t, h, w, 2], x and y in tokens.

    Traces go from slice to slice. Those of earlier slices go forwards in time, along the motion;
    those of later slices go backwards, against it. A step between slices s and s + 1 is the mean of
    motion[s] and motion[s + 1] where the trace is, which supposes that slices are equally far apart
    in time. (Where the video ends at slice s + 1, motion[s + 1] is 0, because later slices repeat
    the last frame: this step comes out half as long.) A trace that leaves the
    picture goes on with the motion at the border; the caller decides what it is worth."""
    batch, t, _, h, w = motion.shape
    middle = t // 2
    field = motion.float().transpose(1, 2)  # [B, 2, t, h, w]
    centres = token_centres((t, h, w), motion.device).unflatten(0, (h, w))
    x, y = centres.expand(batch, t, h, w, 2).unbind(-1)  # each [B, t, h, w]
    slice_of_trace = torch.arange(t, device=motion.device, dtype=torch.float32)
    for _ in range(middle):  # slice 0 needs `middle` steps, all others as many or fewer
        direction = (middle - slice_of_trace).sign()  # 1 forwards, -1 backwards, 0 arrived
        half_way = slice_of_trace + 0.5 * direction  # a step reads the motion between two slices
        fraction = (half_way + 0.5) / t  # slice 0 lies at the middle of the first of t equal parts
        fraction = fraction[:, None, None].expand(batch, t, h, w)
        points = torch.stack([x / w, y / h, fraction], dim=-1)
        # grid_sample takes points (x, y, depth), each from -1 to 1; the depth is time here
        points = points * 2 - 1
        step = F.grid_sample(field, points, padding_mode="border", align_corners=False)
        dx, dy = (direction[:, None, None] * step).unbind(1)  # each [B, t, h, w]
        x = x + dx * w
        y = y + dy * h
        slice_of_trace = slice_of_trace + direction
    return torch.stack([x, y], dim=-1)


# ---- one interface -------------------------------------------------------------------------------


MASKS: dict[str, Callable[..., Tensor]] = {
    "random": random_mask,
    "tube": tube_mask,
    "text": text_mask,
    "text-inverse": text_inverse_mask,
    "motion": motion_mask,
    "flow": flow_mask,
}
# the ratio of each mask where none is given
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
    """The masks of a batch: bool [B, N], True = masked, exactly masked_count(ratio, grid) in every
    row. They are on the device of the noise.

    name: a key of MASKS
    ratio: share of the tokens to mask, between 0 and 1. It holds in each slice. The random mask
        hides as many in all, spread over the clip
    saliency [B, t, h, w]: any real scores, for the text masks
    motion [B, t, 2, h, w]: for the masks motion and flow: the displacement from each slice to the
        next (velocity x time), dx and dy as fractions of the crop's width and height, as
        `cut_motion` returns it
    noise [B, N]: uniform in [0, 1), on the device of the maps. If it is not given, it is drawn from
        `generator` and brought to that device.

    ValueError for an unknown name, for a ratio that masks nothing or everything, for maps that the
    mask needs and that are missing or of another shape, and for noise of another shape."""
    if name not in MASKS:
        raise ValueError(f"unknown mask {name!r}: one of {', '.join(MASKS)}")
    masked_per_slice(ratio, grid)  # refuses a wrong ratio before anything is computed from it
    shape = (batch, math.prod(grid))
    if noise is None:
        maps = motion if saliency is None else saliency
        noise = draw_noise(shape, generator, None if maps is None else maps.device)
    if noise.shape != shape:
        raise ValueError(f"noise must be {list(shape)}, got {list(noise.shape)}")
    mask = MASKS[name](ratio, grid, noise, saliency, motion)
    assert mask.shape == shape
    return mask


def draw_noise(
    shape: tuple[int, int], generator: torch.Generator | None, device: torch.device | None
) -> Tensor:
    """Uniform noise, drawn on the generator's device and brought to `device` (None: left there)."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


# Less than 2^10: the whole part of noise * SPREAD takes at most 10 of float32's 24 bits. 14 or more
# are left for the fraction, which are 16,384 values, so that few of 1,568 tokens tie.
SPREAD = 997


def some_masked(mask: Tensor, noise: Tensor, count: int) -> Tensor:
    """`count` of the masked tokens of each row: int64 [B, count]. The choice depends on nothing but
    the mask and the noise. mask bool [B, N]; noise [B, N], from which the mask was made.

    A decoder that reconstructs only these tokens is cheaper: VideoMAE V2's dual masking (arXiv
    2303.16727), which chooses them by a fixed pattern; here the choice is random. ValueError if
    count is less than 1. RuntimeError if a row has fewer masked tokens; on a GPU it comes from a
    later call."""
    if count < 1:
        raise ValueError(f"some_masked: count {count}, expected 1 or more")
    enough = (mask.sum(dim=1) >= count).all()
    torch._assert_async(enough, f"some_masked: not every row masks {count} tokens")
    # Sorting by the same noise again would be unfair to some slices. `tube_mask`, for example, uses
    # the noise of slice 0 alone and masks its highest values, so that these tokens of slice 0 would
    # all come last. Multiplying by a large number and keeping the fraction spreads nearby values
    # over [0, 1): the new values hardly depend on the old order.
    order = noise * SPREAD % 1
    order = order.masked_fill(~mask, 2)  # visible tokens come last
    return order.argsort(dim=1, stable=True)[:, :count]


# ---- from stored maps to a sample's tokens -------------------------------------------------------


def cut_maps(
    maps: Tensor, times: Tensor, box: Tensor, flip: Tensor, grid: Grid, oversample: int = 2
) -> Tensor:
    """Cuts the tokens of a sample out of stored maps: the value of the map where each token lies,
    by trilinear interpolation. Returns float32 [B, t, h, w].

    maps [B, S, G, G]: of the whole frame, at the mid-points of S equal parts of the video
    times [B, t]: the middle of each token slice, as a fraction of the video's length
    box [B, 4]: the crop's x0, y0, x1, y1 as fractions of the frame, before the flip
    flip bool [B]: mirrored left to right
    oversample: each token is the mean of oversample x oversample points, and each point is
        interpolated between its two nearest cells in each direction: no cell is skipped while a
        token covers at most 2 * oversample cells along a side"""
    t, h, w = grid
    x0, y0, x1, y1 = box.float().split(1, dim=1)  # each [B, 1]
    high = h * oversample
    wide = w * oversample
    across = (torch.arange(wide, device=maps.device) + 0.5) / wide  # of the crop's width
    across = torch.where(flip[:, None], 1 - across, across)  # [B, wide]
    rows = torch.arange(high, device=maps.device) + 0.5
    x = x0 + (x1 - x0) * across  # [B, wide]
    y = y0 + (y1 - y0) * rows / high  # [B, high]
    shape = (len(maps), t, high, wide)
    x = x[:, None, None, :].expand(shape)
    y = y[:, None, :, None].expand(shape)
    time = times.float()[:, :, None, None].expand(shape)
    points = torch.stack([x, y, time], dim=-1) * 2 - 1  # grid_sample counts from -1 to 1
    # align_corners=False puts the S values at the mid-points of S equal parts, which is where they
    # were measured.
    values = F.grid_sample(
        maps.float()[:, None], points, padding_mode="border", align_corners=False
    )
    return F.avg_pool2d(values[:, 0], oversample)


def cut_motion(
    field: Tensor, times: Tensor, box: Tensor, flip: Tensor, grid: Grid, seconds: Tensor
) -> Tensor:
    """Cuts the tokens of a sample out of a stored motion field, as `cut_maps` does, and converts
    its units. Returns float32 [B, t, 2, h, w]: the velocity at each slice times the time to the
    next slice, dx and dy as fractions of the crop's width and height, after the flip.

    field [B, S, 2, G, G]: dx, dy in frame widths and heights per second
    seconds [B]: the length of the video"""
    dx = cut_maps(field[:, :, 0], times, box, flip, grid)
    dy = cut_maps(field[:, :, 1], times, box, flip, grid)
    dx = torch.where(flip[:, None, None, None], -dx, dx)
    if grid[0] > 1:
        # A gap is 0 where a clip is longer than its video, whose last frame is then repeated. The
        # last slice has no next one and takes the gap before it.
        gaps = times.float().diff(dim=1)
        gaps = torch.cat([gaps, gaps[:, -1:]], dim=1)
    else:  # one slice has no next one: no step, no motion
        gaps = torch.zeros_like(times, dtype=torch.float32)
    size = (box[:, 2:] - box[:, :2]).float()  # [B, 2]
    scale = (gaps * seconds.float()[:, None])[:, :, None] / size[:, None]  # [B, t, 2]
    return torch.stack([dx, dy], dim=2) * scale[..., None, None]


# ---- the command ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    from tgm.preview import main as preview

    preview(argv)


if __name__ == "__main__":
    from tgm.run import launch

    launch(main)
