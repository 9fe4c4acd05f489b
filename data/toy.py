"""The toy world: small H.264 videos of shapes that act, with everything about them known.

Nothing is downloaded. Two things, whose sizes and colours are drawn alike, move before a textured
scene, the actor in front of the bystander. The actor, whose two tones are halves, does what the
video's label says, and the caption names its colour and shape. The bystander, whose two tones are
stripes, does something else or stands still; its colour and shape tell nothing of the actor's. In
half of the videos the actor moves most, in a quarter the bystander and in a quarter the camera,
which follows the things: only the scene behind them scrolls.

In train.csv, for pretraining, three of four actors are put in front of their shape's home scene, as
boats keep to water (and some of the rest are there by chance). In val.csv (the test videos) and
probe.csv (the training videos of probes, which choose their rates on a part of them) shape and
scene are independent: who learnt only the scene scores at chance there. A probe trained on
train.csv itself would be rewarded for naming the object by its scene. The split "images", on which
the tiny models are trained, has no such habit either.

    python data/toy.py                    about 90 seconds on two cores; writes, into data/:
        train.csv, probe.csv, val.csv     path, label (the action), object (the shape), scene, and
                                          the true captions of both things: caption (the actor's)
                                          and bystander
        videos/{train,probe,val}/*.mp4    64 x 64 pixels, 20 frames, 10 frames per second
        train.masks.npy,                  and so on: where the actor and the bystander are to be
        train.bystander.npy               seen, packed bits: np.unpackbits(masks[row], axis=-1) is
                                          [20, 64, 64]

    python data/toy.py --train-models     remakes data/toy/{blip,clip}, the tiny captioner and CLIP
    python data/toy.py --report RUNS      the demo's last tables (data/toy_report.py)

A scene is a pure function of (seed, split, row): `scene(...)` returns it, and `render(...)` draws
any moment of it. Shapes: T frames; x before y in every pair. Lengths are in pixels, times in
seconds from 0 to 2, angles in radians.
"""

import csv
import multiprocessing
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from tgm.arrays import refuse_foreign
from tgm.flags import Parser, positive_int, seed_number, whole
from tgm.run import RunError, launch, make_folder, one_line_errors

SIZE = 64
FRAMES = 20
FPS = 10
HALF_TIME = FRAMES / FPS / 2
SPLITS = {"train": 0, "val": 1, "images": 2, "probe": 3}
DIRECTIONS = {"move left": (-1, 0), "move right": (1, 0), "move up": (0, -1), "move down": (0, 1)}
SPINS = {"spin left": -1, "spin right": 1}
SWINGS = {"swing sideways": (1, 0), "swing up and down": (0, 1)}
ACTIONS = (*DIRECTIONS, *SPINS, *SWINGS)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "moon")
# SCENES[i] is the home of SHAPES[i]
SCENES = ("stripes", "checks", "dots", "waves", "bricks", "sky")
COLOURS = {
    "red": (215, 45, 45),
    "green": (40, 165, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
COLUMNS = ("path", "label", "object", "scene", "caption", "bystander")  # of a manifest
AT_HOME = 0.75
# who moves most, each as often as it stands here
MOVERS = ("actor", "actor", "bystander", "camera")
SWINGS_PER_SECOND = 0.75


@dataclass
class Thing:
    """A shape that acts. Its pixels move at `speed` on average, whatever it does."""

    action: str  # one of ACTIONS
    shape: str
    colour: str
    striped: bool  # the two tones: stripes, or halves
    speed: float  # pixels per second; 0 stands still
    centre: np.ndarray  # [2] at half time
    radius: float
    angle: float  # at half time
    phase: float  # of a swing
    tint: np.ndarray  # [3] the colour, jittered

    @property
    def caption(self):
        return f"a {self.colour} {self.shape}"

    @property
    def travel(self):
        """Velocity [2] of a thing that goes somewhere."""
        return self.speed * np.array(DIRECTIONS.get(self.action, (0, 0)), float)

    @property
    def spin(self):
        """Angular velocity: a disc of 0.9 radii moves at two thirds of its rim's speed on
        average.
        """
        return SPINS.get(self.action, 0) * self.speed / (2 / 3 * 0.9 * self.radius)

    @property
    def swing(self):
        """Amplitude [2] of a sine, which in a period covers four times its amplitude."""
        amplitude = self.speed / (4 * SWINGS_PER_SECOND)
        return amplitude * np.array(SWINGS.get(self.action, (0, 0)), float)


@dataclass
class Scene:
    actor: Thing
    bystander: Thing
    name: str  # one of SCENES
    camera: np.ndarray  # [2] velocity of the scene on the screen; (0, 0) for a static camera
    offset: np.ndarray  # [2] where the scene's texture starts
    tones: np.ndarray  # [2, 3] the scene's two colours


def draw_thing(rng, action, speed, centre, striped):
    """A Thing of random shape, colour, size and angle."""
    colour = str(rng.choice(list(COLOURS)))
    return Thing(
        action=action,
        shape=str(rng.choice(SHAPES)),
        colour=colour,
        striped=striped,
        speed=speed,
        centre=centre,
        radius=rng.uniform(12.5, 14.5),
        angle=rng.uniform(-0.5, 0.5),
        phase=rng.uniform(0, 2 * np.pi),
        tint=np.clip(np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3), 0, 255),
    )


def unit(angle):
    return np.array((np.cos(angle), np.sin(angle)))


def scene(seed, split="train", row=0):
    """The scene of one row: a pure function of its arguments. Returns a Scene."""
    rng = np.random.default_rng([seed, SPLITS[split], row])
    action, other = rng.choice(ACTIONS, 2, replace=False)
    speeds = {"actor": rng.uniform(7, 10)}
    mover = rng.choice(MOVERS)
    for name in ("bystander", "camera"):
        factor = rng.uniform(1.25, 1.5) if name == mover else rng.choice((0, 0.5))
        speeds[name] = factor * speeds["actor"]

    middle = SIZE / 2 + rng.uniform(-2, 2, 2)
    apart = rng.uniform(28, 32) * unit(rng.uniform(0, 2 * np.pi))
    actor = draw_thing(rng, str(action), speeds["actor"], middle + apart / 2, striped=False)
    bystander = draw_thing(rng, str(other), speeds["bystander"], middle - apart / 2, striped=True)

    name = str(rng.choice(SCENES))
    if split == "train" and rng.random() < AT_HOME:
        name = SCENES[SHAPES.index(actor.shape)]
    base = rng.uniform(70, 150, 3)
    return Scene(
        actor=actor,
        bystander=bystander,
        name=name,
        camera=speeds["camera"] * unit(rng.uniform(0, 2 * np.pi)),
        offset=rng.uniform(0, SIZE, 2),
        tones=np.stack([base, base + rng.choice((-1, 1)) * rng.uniform(30, 45)]),
    )


def inside(shape, x, y):
    """Roughly the signed distance to a shape of radius 1 at the origin, negative inside. The area
    is about 2.5. x, y: arrays of one shape."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.8
    if shape == "triangle":
        return np.maximum(y, np.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y)) - 0.66
    if shape == "cross":
        upright = np.maximum(abs(x) - 0.36, abs(y) - 1.05)
        level = np.maximum(abs(x) - 1.05, abs(y) - 0.36)
        return np.minimum(upright, level)
    if shape == "ring":
        return abs(r - 0.8) - 0.25
    return np.maximum(r - 1.1, 0.75 - np.hypot(x - 0.65, y))  # moon


def texture(name, x, y):
    """The scene's pattern in [0, 1] at pixel positions x, y: smooth edges, no noise, a period of 12
    to 16 pixels."""
    u = x * (2 * np.pi / 12)
    v = y * (2 * np.pi / 12)
    if name == "stripes":
        return np.clip(0.5 + 1.5 * np.sin(u + v), 0, 1)
    if name == "checks":
        return np.clip(0.5 + 2 * np.sin(u) * np.sin(v), 0, 1)
    if name == "dots":
        return np.clip(1.5 * (np.cos(u) + np.cos(v)) - 0.8, 0, 1)
    if name == "waves":
        return np.clip(0.5 + 1.5 * np.sin(v + 1.6 * np.sin(u / 2)), 0, 1)
    if name == "bricks":
        shift = np.where((y // 8) % 2 < 1, 0, 8)
        return np.minimum(np.clip(y % 8 - 0.5, 0, 1), np.clip((x + shift) % 16 - 0.5, 0, 1))
    return 0.5 + 0.5 * np.sin(v / 6 + 0.3 * np.sin(u / 6))  # sky


def draw(thing, x, y, t):
    """A Thing alone at pixels x, y [H, W] and times t [T, 1, 1].

    Returns its opacity [T, H, W] and its colour [T, H, W, 3]."""
    past = t - HALF_TIME
    swing = np.sin(2 * np.pi * SWINGS_PER_SECOND * t + thing.phase)
    dx = x - thing.centre[0] - thing.travel[0] * past - thing.swing[0] * swing
    dy = y - thing.centre[1] - thing.travel[1] * past - thing.swing[1] * swing
    cos = np.cos(thing.angle + thing.spin * past)
    sin = np.sin(thing.angle + thing.spin * past)
    u = (dx * cos + dy * sin) / thing.radius
    v = (dy * cos - dx * sin) / thing.radius
    opacity = np.clip(0.5 - inside(thing.shape, u, v) * thing.radius, 0, 1)
    bright = np.sin(2 * np.pi * v) > 0 if thing.striped else v > 0
    return opacity, np.where(bright, 1.0, 0.6)[..., None] * thing.tint


def render(sc, seconds, things=None):
    """Draws a Scene at the times given (float [T]).

    things: those in it, from front to back; the actor and the bystander unless told otherwise.
    Returns frames uint8 [T, 64, 64, 3] and where each thing is seen, bool [things, T, 64, 64]."""
    things = (sc.actor, sc.bystander) if things is None else things
    t = np.asarray(seconds, float)[:, None, None]
    y, x = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    left = sc.offset[0] + sc.camera[0] * t
    top = sc.offset[1] + sc.camera[1] * t
    pattern = texture(sc.name, x - left, y - top)[..., None]
    image = sc.tones[0] * (1 - pattern) + sc.tones[1] * pattern  # [T, 64, 64, 3]
    masks = np.zeros((len(things), len(t), SIZE, SIZE), bool)
    for index in reversed(range(len(things))):
        opacity, colour = draw(things[index], x, y, t)
        image = image * (1 - opacity[..., None]) + colour * opacity[..., None]
        masks &= opacity <= 0.5  # it hides what is behind it
        masks[index] = opacity > 0.5
    return image.round().astype(np.uint8), masks


def write_video(path, frames):
    """Writes frames uint8 [T, H, W, 3] as H.264 with B-frames and one key frame, at FPS."""
    with av.open(str(path), "w") as container:
        # without macroblock trees: at this size they make two encodings of the same frames differ
        options = {"preset": "fast", "crf": "16", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index
            picture.time_base = Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_row(job):
    out, seed, split, row = job
    sc = scene(seed, split, row)
    frames, masks = render(sc, np.arange(FRAMES) / FPS)
    path = f"videos/{split}/{row:05d}.mp4"
    write_video(out / path, frames)
    line = (path, sc.actor.action, sc.actor.shape, sc.name, sc.actor.caption, sc.bystander.caption)
    return line, np.packbits(masks, axis=-1)


def is_of_toy_world(manifest):
    with open(manifest, encoding="utf-8") as file:
        return file.readline().strip() == ",".join(COLUMNS)


def write_split(out, split, count, seed, workers):
    """Writes the videos of one split under the folder `out`, its manifest and its true masks."""
    (out / "videos" / split).mkdir(parents=True, exist_ok=True)
    jobs = [(out, seed, split, row) for row in range(count)]
    masks = np.zeros((2, count, FRAMES, SIZE, SIZE // 8), np.uint8)
    with open(out / f"{split}.csv", "w", newline="") as file, multiprocessing.Pool(workers) as pool:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        rows = pool.imap(write_row, jobs, chunksize=16)
        for row, (line, both) in enumerate(tqdm(rows, f"{split} videos", count, disable=None)):
            writer.writerow(line)
            masks[:, row] = both
    np.save(out / f"{split}.bystander.npy", masks[1])
    np.save(out / f"{split}.masks.npy", masks[0])  # last: it says that the split is whole


def write_world(out, train, val, seed=0, workers=2):
    """Writes train.csv and probe.csv of `train` videos each, val.csv of `val` videos, and their
    videos and masks."""
    splits = (("train", train), ("probe", train), ("val", val))
    for split, _ in splits:  # before the first is written
        refuse_foreign(out / f"{split}.csv", is_of_toy_world)
    for split, _ in splits:  # of a world that was there: until the end no split is whole
        for kind in ("masks", "bystander"):
            (out / f"{split}.{kind}.npy").unlink(missing_ok=True)
    for split, count in splits:
        write_split(out, split, count, seed, workers)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write into")
    parser.add_argument(
        "--train", type=positive_int, default=3000, help="videos in each of train.csv and probe.csv"
    )
    parser.add_argument("--val", type=positive_int, default=600, help="videos in val.csv")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the whole world")
    parser.add_argument(
        "--workers", type=whole(1, 1024), default=2, help="processes that draw and encode"
    )
    parser.add_argument(
        "--train-models",
        action="store_true",
        help="train the tiny BLIP and CLIP instead, into the folder toy/ in --out",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="RUNS",
        help="print the demo's tables for the runs in this folder instead",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.train_models:
        import toy_models

        toy_models.main(["--seed", str(args.seed), "--out", str(args.out / "toy")])
    elif args.report:
        if not args.report.is_dir():
            raise RunError(f"--report {args.report}: no such folder (./demo.sh makes runs/demo)")
        import toy_report

        toy_report.report(args.out, args.report)
    else:
        make_folder(args.out)
        write_world(args.out, args.train, args.val, args.seed, args.workers)
        names = ", ".join(str(args.out / f"{split}.csv") for split in ("train", "probe", "val"))
        print(f"{args.train} + {args.train} + {args.val} videos: {names}")


if __name__ == "__main__":
    launch(main)
