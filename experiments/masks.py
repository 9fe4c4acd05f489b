"""What the masks do, on the toy world, whose objects and motions are known: the tables of
experiments/MASKS.md.

    python data/toy.py
    python caption.py --data data/val.csv --model data/toy/blip && python saliency.py --data data/val.csv --clip local-dir:data/toy/clip --moments 8
    python saliency.py --data data/val.csv --cue motion --grid 8
    python experiments/masks.py                                 the tables: a minute on a CPU
    python experiments/masks.py --field raft=runs/raft          beside them a field that saliency.py wrote with --out runs/raft
    python experiments/masks.py --warp --data my.csv            how well fields explain any videos: frames moved along them, against not

Clips are the first 16 of a video's 20 frames, 64 x 64 pixels; tokens are 2 frames of 8 x 8 pixels:
a grid of 8 x 8 x 8.
Shapes: N videos, S moments, G grid, t h w tokens, P points of the actor.
"""

import argparse
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
from tgm.manifest import ManifestError, read_manifest
from tgm.motion import pair_times
from tgm.video import VideoError, VideoReader, segment_midpoints

GRID, PATCH = (8, 8, 8), 8
SLICES = (2 * np.arange(GRID[0]) + 0.5) / toy.FPS  # seconds: the middle of each slice of two frames
SECONDS = toy.FRAMES / toy.FPS


def moves(sc):
    return sc.actor.action.startswith("move")


def field_error(field, scenes):
    """How far a motion field is from the truth on the actor, camera motion taken out of both (the
    field's median; the true one).

    field [N, S, 2, G, G]; scenes: those of its rows. Cells count whose pixels are half the actor's
    or more, in videos that move. Returns {"static" or "drifting": (share of cells whose direction
    is within 45 degrees, mean of the end-point error relative to the true displacement, number of
    videos)}, means over videos."""
    moments, grid = field.shape[1], field.shape[-1]
    rows = {"static": [], "drifting": []}
    for row, sc in enumerate(scenes):
        if not moves(sc):
            continue
        _, (mask, _) = toy.render(sc, segment_midpoints(0, SECONDS, moments))
        on = (
            mask.reshape(moments, grid, toy.SIZE // grid, grid, toy.SIZE // grid).mean((2, 4))
            >= 0.5
        )
        measured = field[row].astype(np.float32) * toy.SIZE  # pixels per second
        measured = np.moveaxis(measured - np.median(measured, (2, 3), keepdims=True), 1, -1)[on]
        true = sc.actor.travel - sc.camera
        length = np.linalg.norm(true)
        along = measured @ true / (length * np.linalg.norm(measured, axis=1).clip(1e-9))
        error = np.linalg.norm(measured - true, axis=1) / length
        rows["drifting" if sc.camera.any() else "static"].append(
            ((along > np.cos(np.pi / 4)).mean(), error.mean())
        )
    return {
        camera: (*np.mean(values, 0).tolist(), len(values))
        for camera, values in rows.items()
        if values
    }


def hidden_share(mask, scenes, thing):
    """The share of a thing's pixels that a mask hides, over the clip. mask: bool [N, t*h*w]; thing:
    0 the actor, 1 the bystander. Returns float [N]."""
    tokens = mask.view(-1, *GRID).repeat_interleave(2, 1)
    hidden = tokens.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).numpy()
    frames = np.arange(2 * GRID[0]) / toy.FPS
    true = np.stack([toy.render(sc, frames)[1][thing] for sc in scenes])
    return (hidden & true).sum((1, 2, 3)) / true.sum((1, 2, 3))


def actor_points(sc, count=1500):
    """Where points that are fixed on the actor stand in the middle of each slice: pixels [t, P,
    2]; those that stay in the picture.
    """
    actor = sc.actor
    u = np.random.default_rng(0).uniform(-1.2, 1.2, (count, 2))
    u = u[toy.inside(actor.shape, u[:, 0], u[:, 1]) < 0]  # [P, 2] in units of the radius
    past = SLICES - SECONDS / 2
    angle = actor.angle + actor.spin * past
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # [2, 2, t]
    swing = np.sin(2 * np.pi * toy.SWINGS_PER_SECOND * SLICES + actor.phase)
    centre = actor.centre + np.outer(past, actor.travel) + np.outer(swing, actor.swing)  # [t, 2]
    at = centre[:, None] + actor.radius * np.einsum("xyt,py->tpx", turn, u)
    return at[:, ((at >= 0) & (at < toy.SIZE)).all((0, 2))]


def constancy(mask, scenes):
    """How constant the set of visible points of the actor is: the Jaccard index of the sets of two slices
    (points visible in both, of those visible in either), mean over pairs of slices. mask bool [N,
    t*h*w] -> float [N], NaN where no point is ever visible."""
    result = []
    for visible, sc in zip((~mask).view(-1, *GRID).numpy(), scenes):
        at = (actor_points(sc) // PATCH).astype(int)
        seen = visible[np.arange(GRID[0])[:, None], at[..., 1], at[..., 0]].astype(float)  # [t, P]
        both = seen @ seen.T
        either = seen.sum(1)[:, None] + seen.sum(1) - both
        pairs = np.triu(either > 0, 1)
        result.append((both[pairs] / either[pairs]).mean() if pairs.any() else np.nan)
    return np.array(result)


def cut(array, motion=False):
    """A stored array of the whole frame, [N, S, ...], at the tokens of the clips."""
    array = torch.from_numpy(np.array(array))
    whole, n = torch.tensor([[0.0, 0, 1, 1]]), len(array)
    place = (
        torch.tensor(SLICES / SECONDS).expand(n, -1),
        whole.expand(n, -1),
        torch.zeros(n, dtype=torch.bool),
        GRID,
    )
    return (
        masking.cut_motion(array, *place, torch.full((n,), SECONDS))
        if motion
        else masking.cut_maps(array, *place)
    )


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print(
            "| "
            + " | ".join(cell if isinstance(cell, str) else f"{cell:.3f}" for cell in row)
            + " |"
        )
    print(flush=True)


def measure(args):
    with open(args.data, newline="") as file:
        truth = list(csv.DictReader(file))
    scenes = [toy.scene(args.seed, args.split, row) for row in range(len(truth))]
    if [line.get("label") for line in truth] != [sc.actor.action for sc in scenes]:
        sys.exit(f"{args.data}: is not the toy world's {args.split} split of seed {args.seed}")
    videos, prefix = read_manifest(args.data), Path(args.data).with_suffix("")
    remedy = f"python saliency.py --data {args.data} --cue motion --grid 8"
    fields = {"codec": prefix} | dict(field.split("=", 1) for field in args.field)
    fields = {
        name: open_array(f"{where}.motion.npy", videos, remedy)[0] for name, where in fields.items()
    }
    saliency, _ = open_array(
        f"{prefix}.saliency.npy",
        videos,
        f"python saliency.py --data {args.data} --clip local-dir:data/toy/clip",
    )

    print("### The motion field on the actor of moving actions, camera motion taken out\n")
    errors = {name: field_error(field, scenes) for name, field in fields.items()}
    table(
        ("field", "camera", "videos", "direction within 45°", "end-point error / displacement"),
        [
            (name, camera, str(n), right, error)
            for name, of_field in errors.items()
            for camera, (right, error, n) in of_field.items()
        ],
    )

    maps = {"saliency": cut(saliency[:, 0]), "motion": cut(fields["codec"], motion=True)}
    still = maps | {"motion": torch.zeros_like(maps["motion"])}
    drifting = np.array([sc.camera.any() for sc in scenes])
    moving = np.array([moves(sc) for sc in scenes])
    groups = {
        "static, moving": ~drifting & moving,
        "drifting, moving": drifting & moving,
        "static, others": ~drifting & ~moving,
        "drifting, others": drifting & ~moving,
    }
    make = lambda name, ratio, maps: masking.make_mask(
        name, ratio, len(scenes), GRID, generator=torch.Generator().manual_seed(0), **maps
    )
    for title, measured, names in (
        ("### Share of the actor's pixels masked", partial(hidden_share, thing=0), masking.MASKS),
        (
            "### Share of the bystander's pixels masked",
            partial(hidden_share, thing=1),
            masking.MASKS,
        ),
        (
            "### Constancy of the actor's visible points (Jaccard index of two slices)",
            constancy,
            ("random", "tube", "flow"),
        ),
    ):
        print(title + "\n")
        rows = []
        for ratio in (0.6, 0.75, 0.9):
            for name in names:
                for control in (False, True) if name in ("motion", "flow") else (False,):
                    values = measured(make(name, ratio, still if control else maps), scenes)
                    rows.append(
                        (
                            f"{ratio}",
                            name + ", motion set to 0" * control,
                            *(np.nanmean(values[group]) for group in groups.values()),
                        )
                    )
        table(("ratio", "mask", *groups), rows)


def warp_error(field, videos, apart, size=112):
    """How well a field [N, S, 2, G, G] explains the pictures: of two frames `apart` seconds from
    one another around each moment, the first is moved along the field; its mean absolute difference
    from the second, divided by the difference unmoved. Returns one number a video whose row is not
    NaN; 1 is as good as no field."""
    ratios = []
    y, x = torch.meshgrid(
        (torch.arange(size) + 0.5) / size, (torch.arange(size) + 0.5) / size, indexing="ij"
    )
    for video, of_video in zip(videos, field):
        if np.isnan(of_video).any():
            continue
        with VideoReader(video.path) as reader:
            start, end = reader.span(video)
            times, gap = pair_times(
                segment_midpoints(start, end, len(of_video)), start, end, reader.fps, apart
            )
            frames = (
                torch.from_numpy(reader.read(times.ravel(), (size, size)))
                .float()
                .permute(0, 3, 1, 2)
            )
        before, after = frames.unflatten(0, (-1, 2)).unbind(1)  # [S, 3, size, size]
        shift = F.interpolate(torch.tensor(of_video).float() * gap, (size, size), mode="bilinear")
        points = torch.stack([x - shift[:, 0], y - shift[:, 1]], -1) * 2 - 1
        moved = F.grid_sample(before, points, padding_mode="border", align_corners=False)
        ratios.append(
            ((moved - after).abs().mean() / (before - after).abs().mean().clamp(min=1e-3)).item()
        )
    return ratios


def warp(args):
    videos, rows = read_manifest(args.data), []
    for name, where in (
        {"beside the manifest": Path(args.data).with_suffix("")}
        | dict(field.split("=", 1) for field in args.field)
    ).items():
        field, _ = open_array(
            f"{where}.motion.npy", videos, f"python saliency.py --data {args.data} --cue motion"
        )
        errors = [warp_error(field, videos, apart) for apart in (0.1, 0.27)]
        rows.append(
            (
                name,
                f"{len(errors[0])} of {len(videos)}",
                *(statistics.mean(of_gap) for of_gap in errors),
            )
        )
    print(
        "### Difference of two frames after moving the first along the field, relative to before\n"
    )
    table(("field", "videos", "0.1 s apart", "0.27 s apart"), rows)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="data/val.csv", help="a manifest, but for --warp of data/toy.py"
    )
    parser.add_argument("--split", default="val", help="its split")
    parser.add_argument("--seed", type=int, default=0, help="its seed")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=PREFIX",
        help="another PREFIX.motion.npy beside the manifest's",
    )
    parser.add_argument("--warp", action="store_true", help="measure fields on any videos instead")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.warp:
            warp(args)
        else:
            measure(args)
    except (ManifestError, VideoError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
