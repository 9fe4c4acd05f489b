"""Reads what masking.py draws of one row of a manifest: a clip from the middle of the video, and
the stored maps or the reason why one is missing.

    videos = read_rows("data/train.csv", row=3)
    stored = read_stored("data/train.csv", None, videos, row=3, caption=0)
    clip = read_clip(videos[3], frames=16, stride=4, image_size=224, tubelet=2)

Shapes: T frames, H W pixels, t token slices, S moments of the stored maps, G x G their grid.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tgm import arrays
from tgm.manifest import Video, Videos, read_manifest
from tgm.run import RunError
from tgm.sampling import center_crop, clip_times
from tgm.video import VideoError, VideoReader


class Clip(NamedTuple):
    frames: Tensor  # float32 [3, T, H, W] in [0, 1]
    times: Tensor  # float64 [t], the middle of each slice as a fraction of the video's length
    box: Tensor  # float32 [4], the crop's x0, y0, x1, y1 as fractions of the frame
    seconds: float  # the video's length
    fps: float  # frames of the clip per second


class Stored(NamedTuple):
    title: str  # the video's name and the caption to which the saliency belongs
    saliency: Tensor | None  # [S, G, G]
    motion: Tensor | None  # [S, 2, G, G]
    missing: dict[str, str]  # {"saliency" or "motion": why it is missing, and the remedy}


def read_rows(data: str, row: int) -> Videos:
    """The manifest; RunError unless it has that row, ManifestError if it cannot be read."""
    videos = read_manifest(data)
    if row >= len(videos):
        raise RunError(f"--row {row}: {data} has rows 0 to {len(videos) - 1}")
    return videos


def read_clip(video: Video, frames: int, stride: int, image_size: int, tubelet: int) -> Clip:
    """A clip from the middle of the video, cut to its middle square. RunError if it cannot be
    read."""
    try:
        with VideoReader(video.path) as reader:
            start, end = reader.span(video)
            times = clip_times(start, end, reader.fps, frames, stride, where=0.5)
            pixels, box = center_crop(reader.read(times, image_size), image_size)
            fps = max(1.0, reader.fps / stride)
    except VideoError as error:
        raise RunError(error) from None
    seconds = end - start
    middles = (times.reshape(-1, tubelet).mean(1) - start) / seconds
    pixels = torch.from_numpy(pixels).permute(3, 0, 1, 2) / 255
    return Clip(pixels, torch.from_numpy(middles), torch.tensor(box), seconds, fps)


def read_stored(data: str, prefix: str | None, videos: Videos, row: int, caption: int) -> Stored:
    """The maps that saliency.py stored for a row and for one of its captions.

    prefix: read PREFIX.saliency.npy and PREFIX.motion.npy (None: the manifest's own)

    One kind of map may be missing. RunError or ManifestError if both are missing, or if one cannot
    be used."""
    prefix = prefix or str(Path(data).with_suffix(""))
    saliency_path = Path(f"{prefix}.saliency.npy")
    motion_path = Path(f"{prefix}.motion.npy")
    title = videos[row].name
    saliency = None
    motion = None
    missing = {}
    if saliency_path.exists() or not motion_path.exists():
        saliency, text = read_saliency(data, saliency_path, videos, row, caption)
        title = f"{title}: {text}"
    else:
        missing["saliency"] = (
            f"there is no {saliency_path}; make it with: {saliency_commands(data)}"
        )
    if motion_path.exists():
        motion = read_motion(data, motion_path, videos, row)
        if motion is None:
            missing["motion"] = (
                f"{motion_path} is empty for {videos[row].name}: saliency.py has not come to it, "
                "or its codec has no motion vectors (for any codec: "
                f"{motion_command(data)} --flow raft --resume none)"
            )
    else:
        missing["motion"] = f"there is no {motion_path}; make it with: {motion_command(data)}"
    return Stored(title, saliency, motion, missing)


def saliency_commands(data: str) -> str:
    return f"python caption.py --data {data} && python saliency.py --data {data}"


def motion_command(data: str) -> str:
    return f"python saliency.py --data {data} --cue motion"


def read_saliency(
    data: str, path: Path, videos: Videos, row: int, caption: int
) -> tuple[Tensor, str]:
    """The saliency of a row for one of its captions, [S, G, G], and that caption."""
    remedy = saliency_commands(data)
    captions_path = arrays.companion(data, "captions.jsonl")
    captions = arrays.read_captions(captions_path, videos, remedy)[row]
    expect = {}
    if path == arrays.companion(data, "saliency.npy"):
        # The manifest's own saliency must belong to its captions, or it is out of date. A file in
        # another place may be of an experiment.
        expect["captions"] = arrays.file_hash(captions_path)
    saliency, _ = arrays.open_array(path, videos, remedy, **expect)
    video = videos[row]
    if not captions:
        reason = why_uncaptioned(captions_path, row)
        raise RunError(f"--row {row}: {video.name} has no caption ({reason}); choose another row")
    if caption >= len(captions):
        raise RunError(f"--caption {caption}: row {row} has {len(captions)} captions")
    if caption >= saliency.shape[1]:
        raise RunError(
            f"--caption {caption}: {path} has {saliency.shape[1]} captions per video, "
            f"{captions_path} has {len(captions)}"
        )
    maps = torch.from_numpy(saliency[row, caption].copy())
    if not maps.isfinite().all():
        reason = why_unreadable(video) or f"to be made with: python saliency.py --data {data}"
        raise RunError(f"--row {row}: {path} is empty for {video.name} ({reason})")
    return maps, captions[caption]


def read_motion(data: str, path: Path, videos: Videos, row: int) -> Tensor | None:
    """The motion field of a row [S, 2, G, G], or None if the row is empty."""
    motion, _ = arrays.open_array(path, videos, motion_command(data))
    field = torch.from_numpy(motion[row].copy())
    return field if field.isfinite().all() else None


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
