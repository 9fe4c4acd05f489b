"""What experiments/bench.py compares with: the videos that both sides read, other decoders,
VideoMAE's sample, transformers' models.

A peer is imported where it is used, so that one that is not installed is only left out.
"""

import importlib
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import toy
from PIL import Image

from model import EPS, MEAN, STD
from tgm.manifest import read_manifest
from tgm.sampling import multi_scale_crop

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
GRID = (8, 14, 14)  # tokens of a clip of 16 x 224 x 224


# ---- videos --------------------------------------------------------------------------------------


class File(NamedTuple):
    times: np.ndarray  # seconds when frame i is on screen
    gop: int  # the longest way from key frame to key frame, in frames
    short: int  # pixels of the short side


def find_videos(source, temporary):
    """{path: File} of the H.264 files that hold a clip of 16 frames at stride 4.

    source: a folder or a manifest; None for ../shared/videos, or where there is none, toy videos
    written into the folder `temporary`."""
    if source is None:
        source = SHARED / "videos/clips.csv"
        if not source.exists():
            source = temporary / "videos"
            make_videos(source)
    if source.is_dir():
        paths = sorted(map(str, source.glob("**/*.*")))
    else:
        paths = [video.path for video in read_manifest(source)]
    found = {}
    for path in paths:
        file = read_file(path)
        if file is not None and len(file.times) >= 64:
            found[path] = file
    return found


def read_file(path):
    """The File at a path; None unless it is a video whose one stream is H.264 (of several streams,
    peers take different ones)."""
    try:
        opened = av.open(path)
    except av.FFmpegError:  # a folder of videos may hold a text, too
        return None
    with opened as container:
        if not container.streams.video:
            return None
        stream = container.streams.video[0]
        if stream.codec_context.name != "h264" or len(container.streams.video) > 1:
            return None
        packets = [packet for packet in container.demux(stream) if packet.size]
        starts = np.sort([packet.pts for packet in packets]) * float(stream.time_base)
        keys = np.flatnonzero([packet.is_keyframe for packet in packets])
        gop = int(np.diff([*keys, len(packets)]).max())
        middles = starts + np.diff(starts, append=starts[-1] + 0.01) / 2
        return File(middles - starts[0], gop, min(stream.width, stream.height))


def make_videos(folder, count=10, size=(256, 340), frames=300, gops=(250, 70)):
    """Writes H.264 files of toy scenes, with FFmpeg's defaults but for the key frames."""
    folder.mkdir(parents=True, exist_ok=True)
    to_and_fro = 1 - abs(np.arange(frames) / 60 % 2 - 1)  # seconds of the scene
    for row in range(count):
        images, _ = toy.render(toy.scene(0, "val", row), to_and_fro)
        options = {"g": str(gops[row % len(gops)]), "threads": "1"}
        with av.open(str(folder / f"{row:02}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30, options=options)
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            for image in images:
                picture = Image.fromarray(image).resize(size[::-1], Image.BICUBIC)
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())


def clip_frames(file, where):
    """Numbers of 16 frames at stride 4. where, in [0, 1): the place of the clip in the file."""
    first = int(where * (len(file.times) - 60))
    return [first + 4 * k for k in range(16)]


# ---- other decoders: the frames of these numbers, uint8 [T, H, W, 3] -----------------------------


def read_plain(path, frames):
    """Decodes everything from the start to the last wanted frame, and converts those wanted."""
    images = {}
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for index, frame in enumerate(container.decode(video=0)):
            if index in frames:
                images[index] = frame.to_ndarray(format="rgb24")
            if index >= frames[-1]:
                break
    return np.stack([images[index] for index in frames])


def read_decord(path, frames):
    decord = importlib.import_module("decord")
    return decord.VideoReader(path, num_threads=1).get_batch(frames).asnumpy()


def read_torchcodec(path, frames):
    decoders = importlib.import_module("torchcodec.decoders")
    decoder = decoders.VideoDecoder(
        path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate"
    )
    return decoder.get_frames_at(frames).data.numpy()


# ---- VideoMAE's sample, and transformers' models -------------------------------------------------


def videomae_sample(path, frames, size=224):
    """VideoMAE's pretraining sample, written from its description: decord, one multi-scale crop of
    all frames by PIL, resized, stacked, to float, normalised -> float32 [3, T, H, W]."""
    images = [Image.fromarray(image) for image in read_decord(path, frames)]
    top, left, h, w = multi_scale_crop(images[0].height, images[0].width)
    box = (left, top, left + w, top + h)
    resized = []
    for image in images:
        resized.append(np.asarray(image.crop(box).resize((size, size), Image.BILINEAR)))
    stacked = torch.from_numpy(np.concatenate(resized, axis=2))  # [H, W, 3T]
    clip = stacked.permute(2, 0, 1).contiguous().float().div(255)
    clip = clip.unflatten(0, (len(images), 3))  # [T, 3, H, W]
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    return ((clip - mean) / std).transpose(0, 1)


def transformers_mae(folder):
    """transformers' VideoMAE from a folder that checkpoints.save_huggingface wrote."""
    transformers = importlib.import_module("transformers")
    model = transformers.VideoMAEForPreTraining.from_pretrained(folder, attn_implementation="sdpa")
    model.decoder.norm.eps = EPS  # the authors' value; transformers fixes 1e-5
    return model
