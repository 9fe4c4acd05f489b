"""The command of masking.py: draws the clip, the stored maps and the masks of one row of a
manifest, or a contact sheet of many rows. Look at them before you train for days.

    python masking.py --data data/train.csv --row 3 --out mask.png --video mask.mp4
    python masking.py --data data/train.csv --rows 12 --out sheet.png           12 random rows
    python masking.py --data data/train.csv --row 3 17 40 --out sheet.png       these rows

The clip is from the middle of the video. --seed fixes the random numbers: all masks of a row are
drawn from the same ones.

Shapes: T frames, H W pixels, (t, h, w) token grid, S moments of the stored maps, G x G their grid.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import masking
from tgm import arrays, flags, pictures
from tgm.manifest import Video, Videos, read_manifest
from tgm.run import RunError, one_line_errors
from tgm.sampling import center_crop, clip_times
from tgm.video import TIMEOUT, VideoError, VideoReader

TUBELET = 2  # frames of a token, as in VideoMAE
MOST_MEMORY = 4e9  # bytes that drawing may take


# ---- one row: every mask -------------------------------------------------------------------------


def draw_row(args: argparse.Namespace, videos: Videos, row: int, grid: masking.Grid) -> None:
    """Draws a clip, its maps and all masks that they allow, as --out and --video."""
    stored = read_stored(args.data, args.companions, videos, row, args.caption)
    clip = read_clip(videos[row], args.frames, args.stride, args.image_size, args.video_timeout)
    maps = {}
    if stored.saliency is not None:
        maps["saliency"] = masking.cut_maps(stored.saliency[None], *clip.place(grid))
    if stored.motion is not None:
        seconds = torch.tensor([clip.seconds])
        maps["motion"] = masking.cut_motion(stored.motion[None], *clip.place(grid), seconds)
    # All masks take the same noise: a mask that is left out does not change the others.
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(1, math.prod(grid), generator=generator)
    masks = {}
    for name, ratio in chosen_ratios(args).items():
        need = masking.NEEDS[name]
        if need in stored.missing:
            print(f"{name}: left out, {stored.missing[need]}")
            continue
        mask = masking.make_mask(name, ratio, 1, grid, noise=noise, **maps)
        masks[f"{name} {ratio:.3g}"] = mask[0]

    drawn = {kind: of_batch[0] for kind, of_batch in maps.items()}
    tiles = pictures.draw_tiles(clip.frames, masks, grid, **drawn)
    with pictures.saving("--out", args.out):
        strip = pictures.draw_strip(tiles, grid[0], stored.title)
        pictures.require_size("--out", args.out, strip.size)
        strip.save(args.out)
    print(args.out)
    if args.video:
        with pictures.saving("--video", args.video):
            pictures.write_video(args.video, pictures.draw_frames(tiles), clip.fps)
        print(args.video)


# ---- many rows: a contact sheet ------------------------------------------------------------------


def draw_sheet(
    args: argparse.Namespace, videos: Videos, rows: list[int], grid: masking.Grid
) -> None:
    """Draws a frame of each row, its saliency, its text mask and its captions, as --out. A row that
    lacks some of them says why."""
    saliency = open_saliency(args.data, prefix_of(args.data, args.companions), videos)
    texts = [row_text(videos[row], saliency.captions[row], args.caption) for row in rows]
    # Too large a sheet is refused here, before all the videos are decoded.
    size = pictures.sheet_size(texts, columns=3, size=args.image_size)
    pictures.require_size("--out", args.out, size)
    lines = []
    for row, text in zip(rows, texts, strict=True):
        tiles = []
        try:
            clip = read_clip(
                videos[row], args.frames, args.stride, args.image_size, args.video_timeout
            )
            tiles = [middle_frame(clip.frames.permute(1, 2, 3, 0))]
            maps, _ = saliency.read(videos[row], args.caption)
            tiles += draw_text_mask(args, clip, maps, grid)
        except RunError as error:
            text.insert(1, str(error))
        lines.append((tiles, text))
    with pictures.saving("--out", args.out):
        sheet = pictures.draw_lines(lines, columns=3, size=args.image_size)
        pictures.require_size("--out", args.out, sheet.size)  # reasons take lines, too
        sheet.save(args.out)
    print(f"{args.out} (rows {', '.join(map(str, rows))}; *: the caption of the saliency)")


def row_text(video: Video, captions: list[str], chosen: int) -> list[str]:
    """What a contact sheet says of a row: its name and its captions, the chosen one marked."""
    text = [f"{video.row}: {video.name}"]
    for number, caption in enumerate(captions):
        mark = "*" if number == chosen else " "
        text.append(f"{mark} {caption}")
    return text


def draw_text_mask(
    args: argparse.Namespace, clip: "Clip", maps: Tensor, grid: masking.Grid
) -> list[Tensor]:
    """The middle frame of a clip under its saliency, and under its text mask: [H, W, 3] each."""
    saliency = masking.cut_maps(maps[None], *clip.place(grid))
    ratio = chosen_ratios(args)["text"]
    generator = torch.Generator().manual_seed(args.seed)
    mask = masking.make_mask("text", ratio, 1, grid, generator=generator, saliency=saliency)
    tiles = pictures.draw_tiles(clip.frames, {"text": mask[0]}, grid, saliency=saliency[0])
    return [middle_frame(tiles["saliency"]), middle_frame(tiles["text"])]


def middle_frame(frames: Tensor) -> Tensor:
    """[T, H, W, 3] -> [H, W, 3], a copy: a sheet keeps it, and should not keep all frames."""
    return frames[len(frames) // 2].clone()


# ---- what is drawn -------------------------------------------------------------------------------


class Clip(NamedTuple):
    frames: Tensor  # float32 [3, T, H, W] in [0, 1]
    times: Tensor  # float64 [t], the middle of each slice as a fraction of the video's length
    box: Tensor  # float32 [4], the crop's x0, y0, x1, y1 as fractions of the frame
    seconds: float  # the video's length
    fps: float  # at which it is shown: frames of the clip per second, at least 1

    def place(self, grid: masking.Grid) -> tuple:
        """Where the clip lies in its video: what `masking.cut_maps` asks for, of a batch of 1."""
        return self.times[None], self.box[None], torch.tensor([False]), grid


class Stored(NamedTuple):
    title: str  # the video's name and the caption to which the saliency belongs
    saliency: Tensor | None  # [S, G, G]
    motion: Tensor | None  # [S, 2, G, G]
    missing: dict[str, str]  # {"saliency" or "motion": why it is missing, and the remedy}


def read_clip(
    video: Video, frames: int, stride: int, image_size: int, timeout: float = TIMEOUT
) -> Clip:
    """A clip from the middle of the video, cut to its middle square. RunError if it cannot be
    read."""
    try:
        with VideoReader(video.path, timeout=timeout) as reader:
            start, end = reader.span(video)
            times = clip_times(start, end, reader.fps, frames, stride, where=0.5)
            pixels, box = center_crop(reader.read(times, image_size), image_size)
            fps = max(1.0, reader.fps / stride)
    except VideoError as error:
        raise RunError(error) from None
    seconds = end - start
    middles = (times.reshape(-1, TUBELET).mean(1) - start) / seconds
    pixels = torch.from_numpy(pixels).permute(3, 0, 1, 2) / 255
    return Clip(pixels, torch.from_numpy(middles), torch.tensor(box), seconds, fps)


def to_bytes(frames: torch.Tensor) -> torch.Tensor:
    """Pixels of 0 to 1 -> uint8, as model.normalize takes them."""
    return (255 * frames).round().to(torch.uint8)


def read_stored(data: str, prefix: str | None, videos: Videos, row: int, caption: int) -> Stored:
    """The maps that saliency.py stored for a row and for one of its captions.

    prefix: read PREFIX.saliency.npy and PREFIX.motion.npy (None: the manifest's own)

    One file may be missing, and the row of motion may be empty. RunError or ManifestError if both
    files are missing, if one cannot be used, or if the row of saliency is empty."""
    prefix = prefix_of(data, prefix)
    saliency_path = Path(f"{prefix}.saliency.npy")
    motion_path = Path(f"{prefix}.motion.npy")
    title = videos[row].name
    saliency = None
    motion = None
    missing = {}
    # where both are missing, opening one gives the error and its remedy
    if saliency_path.exists() or not motion_path.exists():
        saliency, text = open_saliency(data, prefix, videos).read(videos[row], caption)
        title = f"{title}: {text}"
    else:
        missing["saliency"] = (
            f"there is no {saliency_path}; make it with: "
            f"{arrays.text_commands(data, videos, out_flag(data, prefix))}"
        )
    command = motion_command(data, prefix)
    if motion_path.exists():
        motion = read_motion(motion_path, videos, row, command)
        if motion is None:
            missing["motion"] = why_no_motion(motion_path, videos[row].name, command)
    else:
        missing["motion"] = f"there is no {motion_path}; make it with: {command}"
    return Stored(title, saliency, motion, missing)


def prefix_of(data: str, prefix: str | None) -> str:
    """What the names of the stored maps begin with."""
    return prefix or str(Path(data).with_suffix(""))


def out_flag(data: str, prefix: str) -> str:
    """What saliency.py needs to write to a prefix that is not the manifest's own."""
    return "" if prefix == prefix_of(data, None) else f" --out {prefix}"


def motion_command(data: str, prefix: str) -> str:
    return f"python saliency.py --data {data}{out_flag(data, prefix)} --cue motion"


class Saliency(NamedTuple):
    """The captions of a manifest, and what saliency.py stored for them."""

    data: str  # the manifest
    prefix: str  # the array is PREFIX.saliency.npy
    captions: list[list[str]]
    maps: np.ndarray  # [videos, K, S, G, G]

    def read(self, video: Video, caption: int) -> tuple[Tensor, str]:
        """The saliency of a video for one of its captions, [S, G, G], and that caption. RunError
        if there is none."""
        captions = self.captions[video.row]
        captions_path = arrays.companion(self.data, "captions.jsonl")
        path = f"{self.prefix}.saliency.npy"
        row = f"--row {video.row}"
        if not captions:
            reason = why_uncaptioned(captions_path, video.row)
            raise RunError(f"{row}: {video.name} has no caption ({reason}); choose another row")
        if caption >= len(captions):
            raise RunError(f"--caption {caption}: row {video.row} has {len(captions)} captions")
        if caption >= self.maps.shape[1]:
            raise RunError(
                f"--caption {caption}: {path} has {self.maps.shape[1]} captions per video, "
                f"{captions_path} has {len(captions)}"
            )
        maps = torch.from_numpy(self.maps[video.row, caption].copy())
        if not maps.isfinite().all():  # a row that was not made is NaN
            out = out_flag(self.data, self.prefix)
            make = f"to be made with: python saliency.py --data {self.data}{out}"
            reason = why_unreadable(video) or make
            raise RunError(f"{row}: {path} is empty for {video.name} ({reason})")
        return maps, captions[caption]


def open_saliency(data: str, prefix: str, videos: Videos) -> Saliency:
    """Opens PREFIX.saliency.npy and the manifest's captions. ManifestError as
    `arrays.open_array`."""
    path = Path(f"{prefix}.saliency.npy")
    remedy = f"python saliency.py --data {data}{out_flag(data, prefix)}"
    captions_path = arrays.companion(data, "captions.jsonl")
    captions = arrays.read_captions(captions_path, videos, f"python caption.py --data {data}")
    expect = {}
    if path == arrays.companion(data, "saliency.npy"):
        # The manifest's own saliency must belong to its captions, or it is out of date. A file in
        # another place may be of an experiment.
        expect["captions"] = arrays.file_hash(captions_path)
    maps, _ = arrays.open_array(path, videos, remedy, **expect)
    return Saliency(data, prefix, captions, maps)


def read_motion(path: Path, videos: Videos, row: int, remedy: str) -> Tensor | None:
    """The motion field of a row [S, 2, G, G], or None if the row is empty. remedy: the command that
    makes the array."""
    motion, _ = arrays.open_array(path, videos, remedy)
    field = torch.from_numpy(motion[row].copy())
    return field if field.isfinite().all() else None


def why_no_motion(path: Path, name: str, command: str) -> str:
    """For messages: a video's row of motion is empty, and what may be the reason. command: the one
    that makes the array."""
    return (
        f"{path} is empty for {name}: saliency.py has not come to it, or its codec has no motion "
        f"vectors (for any codec: {command} --flow raft --resume none)"
    )


def why_uncaptioned(path: Path, row: int) -> str:
    """The reason that caption.py gave for a row without captions."""
    # not splitlines(), which also cuts at U+2028, inside a caption
    entry = json.loads(path.read_text(encoding="utf-8").split("\n")[row])
    return entry.get("error", "caption.py found none")


def why_unreadable(video: Video) -> str | None:
    """The reason why a video cannot be read, or None if it can."""
    try:
        with VideoReader(video.path) as reader:
            reader.read([0])
    except VideoError as error:
        return str(error)
    return None


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=masking.__doc__)
    parser.add_argument(
        "--data",
        default="data/train.csv",
        help="the manifest; captions, saliency and motion are read from beside it",
    )
    parser.add_argument(
        "--companions",
        metavar="PREFIX",
        help="read PREFIX.saliency.npy and PREFIX.motion.npy in place of the manifest's own",
    )
    flags.add_video_flags(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--row",
        type=flags.count,
        nargs="+",
        default=[0],
        help="row of the manifest, from 0; several draw a contact sheet",
    )
    which.add_argument(
        "--rows",
        type=flags.whole(1, 1000),
        metavar="N",
        help="a contact sheet of so many random rows; --seed chooses others",
    )
    parser.add_argument(
        "--caption", type=flags.count, default=0, help="which of the video's captions, from 0"
    )
    parser.add_argument("--out", type=Path, default="mask.png", help="picture to write")
    parser.add_argument(
        "--video",
        type=Path,
        metavar="FILE",
        help="also write the clip and its masks, of one row, as a moving picture: .mp4, "
        ".gif, .mov or .mkv",
    )
    parser.add_argument(
        "--mask-ratio", type=flags.ratio, help="one ratio for all masks (default: each mask's own)"
    )
    parser.add_argument("--frames", type=flags.frame_count, default=16, help="frames of the clip")
    parser.add_argument(
        "--stride", type=flags.positive_int, default=4, help="use every Nth frame of the video"
    )
    parser.add_argument(
        "--image-size", type=flags.pixel_count, default=224, help="pixels of the clip's side"
    )
    parser.add_argument(
        "--patch-size", type=flags.positive_int, default=16, help="pixels of a token's side"
    )
    parser.add_argument(
        "--seed",
        type=flags.seed_number,
        default=0,
        help="another seed draws other random masks and rows",
    )
    return parser.parse_args(argv)


def chosen_ratios(args: argparse.Namespace) -> dict[str, float]:
    """{name of a mask: the share of tokens that it hides}"""
    return {name: args.mask_ratio or own for name, own in masking.RATIOS.items()}


def choose_rows(args: argparse.Namespace, videos: Videos) -> list[int]:
    """The rows to draw; RunError if the manifest has none of that number."""
    if args.rows is None:
        for row in args.row:
            if row >= len(videos):
                raise RunError(f"--row {row}: {args.data} has rows 0 to {len(videos) - 1}")
        return args.row
    if args.rows > len(videos):
        raise RunError(f"--rows {args.rows}: {args.data} has {len(videos)} rows")
    chosen = np.random.default_rng(args.seed).choice(len(videos), args.rows, replace=False)
    return sorted(chosen.tolist())


def refuse_gigabytes(args: argparse.Namespace, grid: masking.Grid, rows: int) -> None:
    """RunError if the flags ask for a picture that takes gigabytes of memory. rows: to be drawn."""
    tiles = 3 + len(masking.MASKS)  # the clip, its two maps and the masks
    tokens = math.prod(grid)
    visible = (tokens - masking.masked_count(chosen_ratios(args)["flow"], grid)) // grid[0]
    distances = 4 * tokens * visible  # flow_mask's largest array, float32
    needed = pictures.drawing_bytes(tiles, args.frames, grid[0], args.image_size) + distances
    if rows > 1:
        needed += pictures.sheet_bytes(rows, 3, args.image_size)
    if needed > MOST_MEMORY:
        given = f"--image-size {args.image_size} --patch-size {args.patch_size}"
        of_rows = f", {rows} rows" if rows > 1 else ""
        raise RunError(
            f"--frames {args.frames} {given}{of_rows}: drawing that takes {needed / 1e9:.0f} GB of "
            "memory: ask for less"
        )


def preview_grid(args: argparse.Namespace) -> masking.Grid:
    """The tokens (t, h, w) of the clip to be drawn. RunError, naming the flags, if they do not fit
    together."""
    ratios = chosen_ratios(args)
    if args.frames % TUBELET:
        raise RunError(
            f"--frames {args.frames}: expected a multiple of {TUBELET}, the frames of a token"
        )
    given = f"--frames {args.frames} --image-size {args.image_size} --patch-size {args.patch_size}"
    if args.image_size % args.patch_size:
        raise RunError(f"{given}: the image size is not a multiple of the patch size")
    side = args.image_size // args.patch_size
    grid = (args.frames // TUBELET, side, side)
    if args.mask_ratio:
        given = f"--mask-ratio {args.mask_ratio:g} {given}"
    for name, ratio in ratios.items():
        try:
            masking.masked_count(ratio, grid)
        except ValueError as error:
            raise RunError(f"{given}: {name}'s {error}") from None
    return grid


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    grid = preview_grid(args)
    videos = read_manifest(args.data, args.root)
    rows = choose_rows(args, videos)
    refuse_gigabytes(args, grid, len(rows))
    pictures.require_writable("--out", args.out, pictures.STILL)
    if args.rows is None and len(rows) == 1:
        row = rows[0]
        if args.video:
            source = videos[row].path
            pictures.require_writable("--video", args.video, pictures.MOVING, source=source)
        draw_row(args, videos, row, grid)
        return
    if args.video:
        raise RunError(f"--video {args.video}: shows one row: give one --row")
    draw_sheet(args, videos, rows, grid)
