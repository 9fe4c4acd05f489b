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


class File(NamedTuple):
    times: np.ndarray  # seconds when frame i is on screen
    gop: int  # the longest way from key frame to key frame
    short: int  # pixels of the short side


def make_videos(folder, count=10, size=(256, 340), frames=300, gops=(250, 70)):
    """H.264 files of toy scenes, in FFmpeg's defaults but for the key frames."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(count):
        # to and fro
        images = toy.render(toy.scene(0, "val", row), 1 - abs(np.arange(frames) / 60 % 2 - 1))[0]
        with av.open(str(folder / f"{row:02}.mp4"), "w") as container:
            stream = container.add_stream(
                "libx264", rate=30, options={"g": str(gops[row % len(gops)]), "threads": "1"}
            )
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for image in images:
                container.mux(
                    stream.encode(
                        av.VideoFrame.from_image(
                            Image.fromarray(image).resize(size[::-1], Image.BICUBIC)
                        )
                    )
                )
            container.mux(stream.encode())


def find_videos(source, temporary):
    """{path: File} of the H.264 files that hold a clip of 16 frames at stride 4. source: a
    folder, a manifest, or None.
    """
    found, source = {}, source or (SHARED / "videos/clips.csv")
    if source == SHARED / "videos/clips.csv" and not source.exists():
        make_videos(source := temporary / "videos")
    paths = (
        sorted(map(str, source.glob("**/*.*")))
        if source.is_dir()
        else [video.path for video in read_manifest(source)]
    )
    for path in paths:
        with av.open(path) as container:
            stream = container.streams.video[0]
            if stream.codec_context.name != "h264" or len(container.streams.video) > 1:
                # of several, peers take different ones
                continue
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in container.demux(stream)
                if packet.size
            ]
            starts = np.sort([pts for pts, _ in packets]) * float(stream.time_base)
            gop = int(np.diff([*np.flatnonzero([key for _, key in packets]), len(packets)]).max())
            if len(packets) >= 64:
                middles = starts + np.diff(starts, append=starts[-1] + 0.01) / 2
                found[path] = File(middles - starts[0], gop, min(stream.width, stream.height))
    return found


def clip_frames(file, where):
    """16 frames at stride 4, at a place of the file in [0, 1)."""
    return [int(where * (len(file.times) - 60)) + 4 * k for k in range(16)]


def read_plain(path, frames):
    """Decodes everything from the start to the last wanted frame, and converts those wanted."""
    images = {}
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for index, frame in enumerate(container.decode(video=0)):
            if index in frames:
                images[index] = frame.to_ndarray(format="rgb24")
            if index >= frames[-1]:
                return np.stack([images[index] for index in frames])


def read_decord(path, frames):
    return (
        importlib.import_module("decord")
        .VideoReader(path, num_threads=1)
        .get_batch(frames)
        .asnumpy()
    )


def read_torchcodec(path, frames):
    decoder = importlib.import_module("torchcodec.decoders").VideoDecoder
    return (
        decoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        .get_frames_at(frames)
        .data.numpy()
    )


def videomae_sample(path, frames, size=224):
    """VideoMAE's pretraining sample, written from its description: decord, one multi-scale crop of
    all frames by PIL, resized, stacked, to float, normalised -> float32 [3, T, H, W]."""
    images = [Image.fromarray(image) for image in read_decord(path, frames)]
    top, left, h, w = multi_scale_crop(images[0].height, images[0].width)
    images = [
        image.crop((left, top, left + w, top + h)).resize((size, size), Image.BILINEAR)
        for image in images
    ]
    clip = (
        torch.from_numpy(np.concatenate([np.asarray(image) for image in images], axis=2))
        .permute(2, 0, 1)
        .contiguous()
    )
    clip = clip.float().div(255).unflatten(0, (len(images), 3))  # [T, 3, H, W]
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return ((clip - mean) / std).transpose(0, 1)


def transformers_mae(folder):
    """transformers' VideoMAE from a folder that checkpoints.save_huggingface wrote."""
    hf = importlib.import_module("transformers").VideoMAEForPreTraining.from_pretrained(
        folder, attn_implementation="sdpa"
    )
    hf.decoder.norm.eps = EPS  # the authors' value; transformers fixes 1e-5
    return hf


def random_blip(vocabulary):
    """BLIP-base for captions from its configuration, weights random, with its processor and
    BERT's vocabulary.
    """
    transformers = importlib.import_module("transformers")
    config = transformers.BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"image_size": 384}
    )
    images = transformers.BlipImageProcessor(size={"height": 384, "width": 384})
    processor = transformers.BlipProcessor(
        images, transformers.BertTokenizer(vocab=str(vocabulary))
    )
    return transformers.BlipForConditionalGeneration(config).eval(), processor
