"""What saliency.py computes of the videos is called a cue: TextCue, which is there, and MotionCue,
which is here. Needs arrays.py, motion.py, run.py and video.py.

A cue has

    videos         those that can have a row
    outputs        the arrays to write, each an Output
    summary        a line to print
    caption_path   the file of captions; None if none are needed
    captions_hash  of this file before it was read, to notice if it is made again meanwhile
    read(video)    decodes a video, in the loader's workers
    rows(items)    computes a batch; yields for each video whose numbers are finite its row's
                   number and a list with one value for each output

Shapes: S moments, G grid, H W pixels.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tgm import motion
from tgm.arrays import file_hash
from tgm.run import RunError
from tgm.video import VideoReader, segment_midpoints


class Output(NamedTuple):
    """An array that a cue writes."""

    kind: str  # PREFIX.kind.npy
    shape: tuple[int, ...]  # of one row
    settings: dict  # for the .json beside it


def read_codec_field(video, moments, window, grid, timeout):
    """float32 [S, 2, G, G]: the motion field from the codec's vectors in a window of frames
    around each moment.
    """
    with VideoReader(video.path, vectors=True, timeout=timeout) as reader:
        start, end = reader.span(video)
        middles = segment_midpoints(start, end, moments)
        window_seconds = window / reader.fps
        # 1e-6 is for rounding: 30.0000001 is frame 30
        first, stop = [math.ceil(time * reader.fps - 1e-6) for time in (start, end)]
        times = np.arange(first, stop) / reader.fps  # of the frames of the span
        near = np.zeros(len(times), bool)
        if len(times):
            near = abs(times[:, None] - middles).min(1) <= window_seconds / 2
        # A window shorter than a frame may have no frame in it. If some moments have none,
        # codec_field gives them the field of the nearest moment that has one. If none has one, the
        # frame on screen at each moment is read.
        frames = reader.read_vectors(times[near] if near.any() else middles)
    return torch.from_numpy(motion.codec_field(frames, middles, window_seconds, grid))


def read_pairs(video, moments, size, timeout):
    """Two frames around each moment, for optical flow, uint8 [S, 2, 3, H, W]; and the seconds
    between the two, float32 [S].
    """
    with VideoReader(video.path, timeout=timeout) as reader:
        start, end = reader.span(video)
        middles = segment_midpoints(start, end, moments)
        times, apart = motion.pair_times(middles, start, end, reader.fps)
        frames = reader.read(times.ravel(), (size, size))
    pairs = torch.from_numpy(frames).permute(0, 3, 1, 2).unflatten(0, (moments, 2)).contiguous()
    return pairs, torch.full((moments,), apart, dtype=torch.float32)


class MotionCue:
    """How every cell moves."""

    caption_path = None
    captions_hash = None

    def __init__(self, args, videos, machine):
        self.videos = videos
        self.grid = args.grid
        self.device = machine.device
        self.raft = None
        moments = args.moments or 32
        settings = {"flow": args.flow, "moments": moments, "grid": args.grid}
        if args.flow == "raft":
            try:
                self.raft = motion.load_raft(args.flow_weights, machine.device)
            except motion.FlowError as error:
                raise RunError(str(error)) from None
            size = args.image_size or 256
            weights = args.flow_weights and file_hash(args.flow_weights)
            settings |= {"weights": weights, "image_size": size}
            self.read = partial(read_pairs, moments=moments, size=size, timeout=args.video_timeout)
        else:
            settings |= {"window": args.window}
            self.read = partial(
                read_codec_field,
                moments=moments,
                window=args.window,
                grid=args.grid,
                timeout=args.video_timeout,
            )
        self.outputs = [Output("motion", (moments, 2, args.grid, args.grid), settings)]
        self.summary = f"motion by {args.flow}, {moments} moments x {args.grid} x {args.grid}"

    def rows(self, items):
        """Yields (row, [field [S, 2, G, G]])."""
        for item in items:
            if self.raft is None:
                field = item.value
            else:
                pairs, seconds = item.value
                field = motion.raft_field(
                    self.raft, pairs.to(self.device), seconds.to(self.device), self.grid
                )
            if field.isfinite().all():
                yield item.video.row, [field]
            else:
                tqdm.write(f"{item.video.path}: its motion has numbers that are not finite")
