"""The toy world: small H.264 videos of shapes that act, with everything about them known. Nothing
is downloaded.

A large two-tone shape (the object) acts in front of a textured scene; in half of the videos the
scene drifts as if the camera moved, and up to two small grey distractors wander about. The caption
of a video names the object's colour and shape, and nothing that needs two frames to see. Three of
four objects stand in their shape's home scene, as boats stand on water, so that what is left of a
video when its object is masked still says something about the object. (The split "images", on which
the tiny models are trained, has no such habit: the models must look at the object.)

    python data/toy.py                    writes, in about a minute on two cores, into data/:
        train.csv, val.csv                path, label (the action), object (the shape), caption (the
                                          truth: for scoring only)
        videos/{train,val}/00000.mp4 ...  64 x 64 pixels, 20 frames, 10 frames a second
        train.masks.npy, val.masks.npy    the object's true mask, packed bits:
                                          np.unpackbits(masks[row], axis=-1) is [20, 64, 64]

    python data/toy.py --train-models     remakes data/toy/{blip,clip}, the tiny captioner and the tiny CLIP (data/toy_models.py)
    python data/toy.py --report RUN ...   the demo's last table (data/toy_report.py)

A scene is a pure function of (seed, split, row): `scene(...)` returns it, and `render(...)` draws
any moment of it."""

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
from tgm.flags import Parser, positive_int, seed_number, whole
from tgm.run import RunError, launch, make_folder, one_line_errors

SIZE, FRAMES, FPS = 64, 20, 10
ACTIONS = ("move left", "move right", "move up", "move down", "grow", "shrink", "spin", "shake")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "bar")
# SCENES[i] is the home of SHAPES[i]
SCENES = ("stripes", "checks", "dots", "waves", "bricks", "hills", "mesh", "sky")
COLOURS = {
    "red": (215, 45, 45),
    "green": (40, 165, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
AT_HOME = 0.75


@dataclass
class Scene:
    """Lengths are in pixels, velocities in pixels per second, angles in radians, `seconds` run
    from 0 to FRAMES / FPS.
    """

    action: str
    shape: str
    colour: str
    scene: str
    centre: np.ndarray  # [2] x, y at half time
    radius: float  # at half time
    angle: float
    travel: np.ndarray  # [2] x, y: velocity of the object on the screen
    growth: float  # factor on the radius per second
    spin: float  # radians per second
    shake: np.ndarray  # [2] amplitude of a shake of 2.5 Hz
    camera: np.ndarray  # [2] velocity of the scene on the screen; (0, 0) for a static camera
    offset: np.ndarray  # [2] where the scene's texture starts
    tones: np.ndarray  # [2, 3] the scene's two colours
    tint: np.ndarray  # [3] the object's colour, jittered
    distractors: np.ndarray  # [0..2, 6] x, y, vx, vy, radius, grey

    @property
    def caption(self):
        return f"a {self.colour} {self.shape}"


def scene(seed, split="train", row=0):
    """The scene of one row: a pure function of its arguments. Returns a Scene."""
    rng = np.random.default_rng([seed, {"train": 0, "val": 1, "images": 2}[split], row])
    action, colour = ACTIONS[rng.integers(len(ACTIONS))], list(COLOURS)[rng.integers(len(COLOURS))]
    kind = rng.integers(len(SHAPES))
    home = kind if split != "images" and rng.random() < AT_HOME else rng.integers(len(SCENES))
    speed, sign = rng.uniform(8, 14), rng.choice((-1, 1))
    direction = {
        "move left": (-1, 0),
        "move right": (1, 0),
        "move up": (0, -1),
        "move down": (0, 1),
    }.get(action, (0, 0))
    heading = rng.uniform(0, 2 * np.pi)
    drift = rng.uniform(6, 16) * np.array((np.cos(heading), np.sin(heading)))
    heading = rng.uniform(0, 2 * np.pi)
    base = rng.uniform(70, 150, 3)
    count = rng.integers(3)
    return Scene(
        action=action,
        shape=SHAPES[kind],
        colour=colour,
        scene=SCENES[home],
        centre=SIZE / 2 + rng.uniform(-7, 7, 2),
        radius=rng.uniform(15, 20),
        angle=rng.uniform(-0.5, 0.5),
        travel=speed * np.array(direction, float),
        growth={"grow": 1.55, "shrink": 1 / 1.55}.get(action, 1.0),
        spin=sign * rng.uniform(2, 3.5) if action == "spin" else 0.0,
        shake=rng.uniform(3, 5) * np.array((np.cos(heading), np.sin(heading)))
        if action == "shake"
        else np.zeros(2),
        camera=drift if rng.random() < 0.5 else np.zeros(2),
        offset=rng.uniform(0, 64, 2),
        tones=np.stack([base, base + rng.choice((-1, 1)) * rng.uniform(30, 45)]),
        tint=np.clip(np.array(COLOURS[colour]) + rng.uniform(-12, 12, 3), 0, 255),
        distractors=np.stack(
            [
                rng.uniform(6, 58, count),
                rng.uniform(6, 58, count),
                rng.uniform(-16, 16, count),
                rng.uniform(-16, 16, count),
                rng.uniform(3, 5, count),
                rng.uniform(40, 200, count),
            ],
            1,
        ),
    )


def inside(shape, x, y):
    """Signed distance, roughly, to a shape of radius 1 at the origin: negative inside. x, y:
    arrays of one shape.
    """
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.8
    if shape == "triangle":
        return np.maximum(y, np.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y)) - 0.52
    if shape == "star":
        return r - 0.68 - 0.34 * np.cos(5 * np.arctan2(y, x))
    if shape == "cross":
        return np.minimum(
            np.maximum(abs(x) - 1, abs(y) - 0.32), np.maximum(abs(x) - 0.32, abs(y) - 1)
        )
    if shape == "ring":
        return abs(r - 0.75) - 0.25
    if shape == "moon":
        return np.maximum(r - 1, 0.72 - np.hypot(x - 0.55, y))
    return np.maximum(abs(x) - 1, abs(y) - 0.38)  # bar


def texture(kind, x, y):
    """The scene's pattern in [0, 1] at pixel positions x, y: smooth edges, no noise, a period of
    12 to 16 pixels.
    """
    wave = lambda phase: np.clip(0.5 + 1.5 * np.sin(phase), 0, 1)
    u, v = x * (2 * np.pi / 12), y * (2 * np.pi / 12)
    if kind == "stripes":
        return wave(u + v)
    if kind == "checks":
        return np.clip(0.5 + 2 * np.sin(u) * np.sin(v), 0, 1)
    if kind == "dots":
        return np.clip(1.5 * (np.cos(u) + np.cos(v)) - 0.8, 0, 1)
    if kind == "waves":
        return wave(v + 1.6 * np.sin(u / 2))
    if kind == "bricks":
        shift = np.where((y // 8) % 2 < 1, 0, 8)
        return np.minimum(np.clip(y % 8 - 0.5, 0, 1), np.clip((x + shift) % 16 - 0.5, 0, 1))
    if kind == "hills":
        return wave(u / 2 - 1.2 * np.abs(np.sin(v / 4)) * 3)
    if kind == "mesh":
        return np.maximum(np.clip(3 * np.cos(u) - 2, 0, 1), np.clip(3 * np.cos(v) - 2, 0, 1))
    return 0.5 + 0.5 * np.sin(v / 6 + 0.3 * np.sin(u / 6))  # sky


def render(sc, seconds):
    """Draws a Scene at the times given (float [T], seconds). Returns frames uint8 [T, 64, 64, 3]
    and the object's visible mask bool [T, 64, 64]."""
    t = np.asarray(seconds, float)[:, None, None]  # [T, 1, 1]
    y, x = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    pattern = texture(
        sc.scene, x - sc.offset[0] - sc.camera[0] * t, y - sc.offset[1] - sc.camera[1] * t
    )[..., None]
    image = sc.tones[0] * (1 - pattern) + sc.tones[1] * pattern  # [T, 64, 64, 3]
    for px, py, vx, vy, radius, grey in sc.distractors:
        alpha = np.clip(radius - np.hypot(x - px - vx * t, y - py - vy * t) + 0.5, 0, 1)[..., None]
        image = image * (1 - alpha) + grey * alpha
    past_half = t - FRAMES / FPS / 2
    swing = np.sin(2 * np.pi * 2.5 * t)
    dx = x - sc.centre[0] - sc.travel[0] * past_half - sc.shake[0] * swing
    dy = y - sc.centre[1] - sc.travel[1] * past_half - sc.shake[1] * swing
    radius, angle = sc.radius * sc.growth**past_half, sc.angle + sc.spin * past_half
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / radius
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / radius
    alpha = np.clip(0.5 - inside(sc.shape, u, v) * radius, 0, 1)[..., None]
    shade = np.where(v > 0, 1.0, 0.72)[..., None]  # two tones, so that a spin shows
    image = image * (1 - alpha) + sc.tint * shade * alpha
    return image.round().astype(np.uint8), alpha[..., 0] > 0.5


def write_video(path, frames):
    """Writes frames uint8 [T, H, W, 3] as H.264 with B-frames and one key frame, FPS frames a
    second.
    """
    with av.open(str(path), "w") as container:
        # without macroblock trees: at this size they make two encodings of the same frames differ
        options = {"preset": "fast", "crf": "16", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_row(job):
    out, seed, split, row = job
    sc = scene(seed, split, row)
    frames, masks = render(sc, np.arange(FRAMES) / FPS)
    name = f"videos/{split}/{row:05d}.mp4"
    write_video(out / name, frames)
    return (name, sc.action, sc.shape, sc.caption), np.packbits(masks, axis=-1)


def write_world(out, train, val, seed=0, workers=2):
    """Writes the manifests, the videos and the true masks under the folder `out`."""
    for split, count in (("train", train), ("val", val)):
        (out / "videos" / split).mkdir(parents=True, exist_ok=True)
        jobs = [(out, seed, split, row) for row in range(count)]
        masks = np.zeros((count, FRAMES, SIZE, SIZE // 8), np.uint8)
        with (
            open(out / f"{split}.csv", "w", newline="") as file,
            multiprocessing.Pool(workers) as pool,
        ):
            writer = csv.writer(file)
            writer.writerow(("path", "label", "object", "caption"))
            rows = tqdm(
                pool.imap(write_row, jobs, chunksize=16), f"{split} videos", count, disable=None
            )
            for index, (line, mask) in enumerate(rows):
                writer.writerow(line)
                masks[index] = mask
        np.save(out / f"{split}.masks.npy", masks)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("data"), help="folder for the manifests, videos and masks"
    )
    parser.add_argument("--train", type=positive_int, default=3000, help="videos in train.csv")
    parser.add_argument("--val", type=positive_int, default=600, help="videos in val.csv")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument(
        "--workers", type=whole(1, 1024), default=2, help="processes that draw and encode"
    )
    parser.add_argument(
        "--train-models", action="store_true", help="train the tiny BLIP and CLIP instead"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="RUNS",
        help="print the demo's table for the runs in this folder instead",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.train_models:
        import toy_models

        toy_models.main(["--seed", str(args.seed)])
    elif args.report:
        if not args.report.is_dir():
            raise RunError(f"--report {args.report}: no such folder (./demo.sh makes runs/demo)")
        import toy_report

        toy_report.report(args.out, args.report)
    else:
        make_folder(args.out)
        write_world(args.out, args.train, args.val, args.seed, args.workers)
        print(f"{args.train} + {args.val} videos: {args.out / 'train.csv'}, {args.out / 'val.csv'}")


if __name__ == "__main__":
    launch(main)
