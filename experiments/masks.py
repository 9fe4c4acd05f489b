"""What the masks and the motion fields do on the toy world, whose things and motions are known: the
tables of experiments/MASKS.md.

    python data/toy.py --train 1
    python caption.py --data data/val.csv --model data/toy/blip
    python saliency.py --data data/val.csv --clip local-dir:data/toy/clip --moments 8
    python saliency.py --data data/val.csv --cue motion --grid 8
    # the tables: a minute on a CPU
    python experiments/masks.py
    # also the field that saliency.py wrote with --out runs/raft
    python experiments/masks.py --field raft=runs/raft
    # any videos: how well fields explain their pictures
    python experiments/masks.py --warp --data my.csv

Clips are the first 16 of a video's 20 frames, 64 x 64 pixels; tokens are 2 frames of 8 x 8 pixels:
a grid of 8 x 8 x 8.
Shapes: N videos, S moments, G grid, t h w tokens, P points of the actor.
"""

import csv
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "data")]
import toy

import masking
from tgm.arrays import open_array
from tgm.flags import Parser
from tgm.manifest import read_manifest
from tgm.motion import pair_times
from tgm.run import RunError, launch, one_line_errors
from tgm.video import VideoError, VideoReader, segment_midpoints

GRID = (8, 8, 8)
PATCH = 8
SLICES = (2 * np.arange(GRID[0]) + 0.5) / toy.FPS  # seconds: the middle of each slice of two frames
SECONDS = toy.FRAMES / toy.FPS
RATIOS = (0.6, 0.75, 0.9)


def moves(sc):
    """Whether the actor of a scene goes somewhere."""
    return sc.actor.action in toy.DIRECTIONS


# ---- motion fields -------------------------------------------------------------------------------


def field_error(field, scenes):
    """How far a motion field [N, S, 2, G, G] is from the truth on the actor, in videos whose actor
    goes somewhere.

    Camera motion is taken out of both: of the field its median, of the truth the true one. Cells
    count if half of their pixels or more are the actor's.
    -> {"static" or "drifting" camera: (share of cells whose direction is within 45 degrees, mean of
    the end-point error relative to the true displacement, number of videos)}, means over videos."""
    found = {"static": [], "drifting": []}
    for of_video, sc in zip(field, scenes, strict=True):
        if not moves(sc):
            continue
        on = actor_cells(sc, moments=len(of_video), grid=of_video.shape[-1])
        measured = of_video.astype(np.float32) * toy.SIZE  # pixels per second
        measured -= np.median(measured, (2, 3), keepdims=True)
        measured = np.moveaxis(measured, 1, -1)[on]  # [cells, 2]
        true = sc.actor.travel - sc.camera
        length = np.linalg.norm(true)
        speed = np.linalg.norm(measured, axis=1).clip(1e-9)
        cosine = measured @ true / (length * speed)
        right = (cosine > np.cos(np.pi / 4)).mean()
        error = np.linalg.norm(measured - true, axis=1).mean() / length
        camera = "drifting" if sc.camera.any() else "static"
        found[camera].append((right, error))
    means = {}
    for camera, values in found.items():
        if values:
            means[camera] = (*np.mean(values, axis=0).tolist(), len(values))
    return means


def actor_cells(sc, moments, grid):
    """The cells that the actor fills at least half of: bool [S, G, G]."""
    _, (seen, _) = toy.render(sc, segment_midpoints(0, SECONDS, moments))
    side = toy.SIZE // grid
    return seen.reshape(moments, grid, side, grid, side).mean((2, 4)) >= 0.5


def warp_error(field, videos, apart, size=112):
    """How well a field [N, S, 2, G, G] explains the pictures of its videos.

    Of two frames `apart` seconds from one another around each moment, the first is moved along the
    field. Its mean absolute difference from the second is divided by the difference unmoved: 1 is
    as good as no field. -> a number for each video whose row is not NaN."""
    ratios = []
    centres = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    for video, of_video in zip(videos, field, strict=True):
        if np.isnan(of_video).any():
            continue
        before, after, gap = read_pairs(video, len(of_video), apart, size)
        shift = F.interpolate(torch.tensor(of_video).float() * gap, (size, size), mode="bilinear")
        points = torch.stack([x - shift[:, 0], y - shift[:, 1]], -1) * 2 - 1
        moved = F.grid_sample(before, points, padding_mode="border", align_corners=False)
        unmoved_error = (before - after).abs().mean().clamp(min=1e-3)
        ratios.append(((moved - after).abs().mean() / unmoved_error).item())
    return ratios


def read_pairs(video, moments, apart, size):
    """Two frames around each moment of a video -> (the first ones and the second ones, float [S, 3,
    size, size]; the seconds between them)."""
    with VideoReader(video.path) as reader:
        start, end = reader.span(video)
        middles = segment_midpoints(start, end, moments)
        times, gap = pair_times(middles, start, end, reader.fps, apart)
        frames = reader.read(times.ravel(), (size, size))
    frames = torch.from_numpy(frames).float().permute(0, 3, 1, 2)
    return frames[0::2], frames[1::2], gap


# ---- masks ---------------------------------------------------------------------------------------


def cut(array, motion=False):
    """A stored array of the whole frame, [N, S, ...], at the tokens of the clips."""
    array = torch.from_numpy(np.array(array))
    count = len(array)
    times = torch.tensor(SLICES / SECONDS).expand(count, -1)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(count, -1)
    flip = torch.zeros(count, dtype=torch.bool)
    if motion:
        seconds = torch.full((count,), SECONDS)
        return masking.cut_motion(array, times, box, flip, GRID, seconds)
    return masking.cut_maps(array, times, box, flip, GRID)


def render_things(scenes):
    """Where the actor and the bystander are seen in the frames of the clips: bool [N, 2, T, H,
    W]."""
    times = np.arange(2 * GRID[0]) / toy.FPS
    return np.stack([toy.render(sc, times)[1] for sc in scenes])


def hidden_share(mask, seen):
    """The share of a thing's pixels that a mask hides, over the clip: float [N].

    mask: bool [N, t*h*w]; seen: where the thing is seen, bool [N, T, H, W]."""
    tokens = mask.view(-1, *GRID).repeat_interleave(2, 1)
    hidden = tokens.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).numpy()
    return (hidden & seen).sum((1, 2, 3)) / seen.sum((1, 2, 3))


def actor_points(sc, count=1500):
    """Where points that are fixed on the actor stand in the middle of each slice: pixels [t, P, 2];
    those that stay in the picture."""
    actor = sc.actor
    u = np.random.default_rng(0).uniform(-1.2, 1.2, (count, 2))
    u = u[toy.inside(actor.shape, u[:, 0], u[:, 1]) < 0]  # [P, 2] in units of the radius
    past = SLICES - SECONDS / 2
    angle = actor.angle + actor.spin * past
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # [2, 2, t]
    swing = np.sin(2 * np.pi * toy.SWINGS_PER_SECOND * SLICES + actor.phase)
    centre = actor.centre + np.outer(past, actor.travel) + np.outer(swing, actor.swing)  # [t, 2]
    at = centre[:, None] + actor.radius * np.einsum("xyt,py->tpx", turn, u)
    stays = ((at >= 0) & (at < toy.SIZE)).all((0, 2))
    return at[:, stays]


def constancy(mask, scenes):
    """How constant the set of visible points of the actor is: float [N], NaN where no point is ever
    visible.

    It is the Jaccard index of the sets of two slices (points visible in both, of those visible in
    either), mean over pairs of slices. mask: bool [N, t*h*w]."""
    result = []
    for visible, sc in zip((~mask).view(-1, *GRID).numpy(), scenes, strict=True):
        cells = (actor_points(sc) // PATCH).astype(int)
        slices = np.arange(GRID[0])[:, None]
        seen = visible[slices, cells[..., 1], cells[..., 0]].astype(float)  # [t, P]
        both = seen @ seen.T
        either = seen.sum(1)[:, None] + seen.sum(1) - both
        pairs = np.triu(either > 0, 1)
        result.append((both[pairs] / either[pairs]).mean() if pairs.any() else np.nan)
    return np.array(result)


# ---- the tables ----------------------------------------------------------------------------------


def print_table(title, head, rows):
    print(f"### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        cells = [cell if isinstance(cell, str) else f"{cell:.3f}" for cell in row]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def read_scenes(data):
    """The scenes of a manifest that data/toy.py wrote with seed 0 for val.csv."""
    with open(data, newline="") as file:
        labels = [line.get("label") for line in csv.DictReader(file)]
    scenes = [toy.scene(0, "val", row) for row in range(len(labels))]
    if labels != [sc.actor.action for sc in scenes]:
        raise RunError(f"{data}: is not the val.csv that data/toy.py writes with seed 0")
    return scenes


def open_fields(args, videos, remedy, **expect):
    """{name: motion field}: the one beside the manifest, and those of --field. remedy, expect: as
    for open_array."""
    prefixes = {"beside the manifest": Path(args.data).with_suffix("")}
    for field in args.field:
        name, _, prefix = field.partition("=")
        prefixes[name] = prefix
    fields = {}
    for name, prefix in prefixes.items():
        fields[name], _ = open_array(f"{prefix}.motion.npy", videos, remedy, **expect)
    return fields


def measure(args):
    """The tables of the toy world."""
    scenes = read_scenes(args.data)
    videos = read_manifest(args.data)
    command = f"python saliency.py --data {args.data}"
    fields = open_fields(args, videos, f"{command} --cue motion --grid 8", grid=8)
    path = Path(args.data).with_suffix(".saliency.npy")
    saliency, _ = open_array(path, videos, f"{command} --clip local-dir:data/toy/clip")
    print_field_errors(fields, scenes)
    motion = fields["beside the manifest"]
    maps = {"saliency": cut(saliency[:, 0]), "motion": cut(motion, motion=True)}
    seen = render_things(scenes)
    for thing, name in enumerate(("actor", "bystander")):
        title = f"Share of the {name}'s pixels masked"
        share = partial(hidden_share, seen=seen[:, thing])
        print_masks(title, share, masking.MASKS, maps, scenes)
    title = "Constancy of the actor's visible points (Jaccard index of two slices)"
    constant = partial(constancy, scenes=scenes)
    print_masks(title, constant, ("random", "tube", "flow"), maps, scenes)


def print_field_errors(fields, scenes):
    head = ("field", "camera", "videos", "direction within 45°", "end-point error / displacement")
    rows = []
    for name, field in fields.items():
        for camera, (right, error, count) in field_error(field, scenes).items():
            rows.append((name, camera, str(count), right, error))
    print_table("The motion field on actors that go somewhere", head, rows)


def print_masks(title, measured, names, maps, scenes):
    """A table of measured(mask), float [N], of the masks of these names. Masks that follow motion
    come a second time, with the motion set to 0."""
    drifting = np.array([sc.camera.any() for sc in scenes])
    moving = np.array([moves(sc) for sc in scenes])
    groups = {
        "static, moving": ~drifting & moving,
        "drifting, moving": drifting & moving,
        "static, others": ~drifting & ~moving,
        "drifting, others": drifting & ~moving,
    }
    still = maps | {"motion": torch.zeros_like(maps["motion"])}
    rows = []
    for ratio in RATIOS:
        for name in names:
            versions = {name: maps}
            if masking.NEEDS[name] == "motion":
                versions[f"{name}, motion set to 0"] = still
            for label, its_maps in versions.items():
                generator = torch.Generator().manual_seed(0)
                mask = masking.make_mask(
                    name, ratio, len(scenes), GRID, generator=generator, **its_maps
                )
                values = measured(mask)
                means = [np.nanmean(values[group]) for group in groups.values()]
                rows.append((str(ratio), label, *means))
    print_table(title, ("ratio", "mask", *groups), rows)


def warp(args):
    """The table of any videos."""
    videos = read_manifest(args.data)
    remedy = f"python saliency.py --data {args.data} --cue motion"
    rows = []
    for name, field in open_fields(args, videos, remedy).items():
        near = warp_error(field, videos, 0.1)
        far = warp_error(field, videos, 0.27)
        count = f"{len(near)} of {len(videos)}"
        rows.append((name, count, statistics.mean(near), statistics.mean(far)))
    title = "Difference of two frames after moving the first along the field, relative to before"
    print_table(title, ("field", "videos", "0.1 s apart", "0.27 s apart"), rows)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data", default="data/val.csv", help="data/toy.py's val.csv; for --warp any manifest"
    )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=PREFIX",
        help="also measure PREFIX.motion.npy; may be repeated",
    )
    parser.add_argument("--warp", action="store_true", help="measure fields on any videos instead")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    try:
        if args.warp:
            warp(args)
        else:
            measure(args)
    except VideoError as error:
        raise RunError(str(error)) from None


if __name__ == "__main__":
    launch(main)
