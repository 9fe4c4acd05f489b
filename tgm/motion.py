"""Motion fields: the velocity of each part of the picture, at S moments of a video. Needs numpy and
torch, and torchvision for RAFT; no other module of this project. Two sources:

    codec   the motion vectors that a video carries anyway (as MGM uses them): nothing but decoding,
            no weights
    raft    optical flow by torchvision's RAFT-small (arXiv 2003.12039): for codecs without vectors,
            and a reference for the other

    frames = VideoReader(path, vectors=True).read_vectors(times)
    # float32 [S, 2, G, G]; a window of 5 frames at 30 frames/s
    field = codec_field(frames, moments, window=5 / 30, grid=14)

A field is a velocity, dx to the right and dy down in frame widths and heights per second, the mean
of each cell of a G x G grid over the displayed frame.

A codec chooses its vectors to save bits, not to be true: on flat areas they say little, and at an
edge only the motion across the edge is reliable. So the field of a moment is made of all vectors
in a window of a few frames, in each cell

    velocity = sum(area x displacement) / sum(area x seconds)

on a grid twice as fine as asked for, where area is how much of the cell a vector's block covers. A
3 x 3 median takes outliers away, and then 2 x 2 cells become one. experiments/MASKS.md compares
windows.

A vector may refer to any of several earlier pictures, and libav does not tell to which: `video.py`
takes the nearest. Where the encoder had a choice (`refs` above 1), speeds may come out up to about
twice too large; directions stay right. Streams without B pictures suffer most: phones, video calls,
surveillance. experiments/MASKS.md has measurements. Where the factor matters (`--mask flow` follows
the field), re-encode such videos (tgm.prepare) or use `raft`.

Shapes: S moments, G grid, n vectors of a frame, P pairs of frames.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

# frame widths or heights per second; more comes from vectors over almost no time
MAX_SPEED = 1000.0


class FlowError(Exception):
    """Weights of an optical flow model that cannot be loaded: one line."""


# ---- the codec's vectors -------------------------------------------------------------------------


def coverage(low: np.ndarray, high: np.ndarray, grid: int) -> np.ndarray:
    """How much of each interval [low, high] lies in each of `grid` equal cells of [0, 1]: low and
    high [n] -> float32 [n, grid], lengths.
    """
    edges = np.arange(grid + 1, dtype=np.float32) / grid
    ends = np.minimum(high[:, None], edges[1:])
    starts = np.maximum(low[:, None], edges[:-1])
    return (ends - starts).clip(0)


def paint(blocks: np.ndarray, shift: np.ndarray, seconds: np.ndarray, grid: int) -> np.ndarray:
    """For each cell the sums over one frame's vectors of dx, dy and seconds, times the area of the
    block inside the cell -> float32 [3, G, G]. blocks [n, 4] x0, y0, x1, y1 and shift [n, 2] as
    fractions of the frame; seconds [n]."""
    across = coverage(blocks[:, 0], blocks[:, 2], grid)  # [n, G]
    down = coverage(blocks[:, 1], blocks[:, 3], grid)
    values = np.stack([shift[:, 0], shift[:, 1], seconds])  # [3, n]
    return (values[:, :, None] * down).swapaxes(1, 2) @ across  # [3, G, n] @ [n, G]


def fill_in_time(field: np.ndarray) -> np.ndarray:
    """NaN cells of field [S, 2, G, G] take the value of the nearest moment that has one, of two
    equally near the earlier. A cell that no moment has a value for takes the median of the moment's
    other cells; if there is no value at all, the field is 0."""
    moments = len(field)
    known = ~np.isnan(field[:, :1])  # [S, 1, G, G]; dx and dy are NaN together
    moment = np.arange(moments).reshape(-1, 1, 1, 1)
    none = 2 * moments  # farther away than any moment
    # the last known moment up to each one, and the first known from it on
    previous = np.maximum.accumulate(np.where(known, moment, -none))
    following = np.minimum.accumulate(np.where(known, moment, none)[::-1])[::-1]
    nearest = np.where(moment - previous <= following - moment, previous, following)
    # where a cell is never known, nearest is out of range, and the value is replaced below
    field = np.take_along_axis(field, nearest.clip(0, moments - 1), 0)
    ever_known = known.any((0, 1))  # [G, G]
    if ever_known.any():
        field[:, :, ~ever_known] = np.median(field[:, :, ever_known], -1, keepdims=True)
    else:
        field[:] = 0
    return field


def median_3x3(field: np.ndarray) -> np.ndarray:
    """The median of each cell and its eight neighbours, the border repeated, of dx and dy apart:
    [S, 2, G, G] -> the same shape.
    """
    padded = np.pad(field, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.median(windows, (-2, -1))


def codec_field(frames: Sequence, moments: np.ndarray, window: float, grid: int) -> np.ndarray:
    """The field at each moment from a codec's vectors -> float32 [S, 2, G, G], finite.

    frames: a list of objects with time (the one asked for, at which the frame is on screen),
        blocks, shift, seconds, as video.VideoReader.read_vectors returns them
    moments [S]: seconds, an array
    window: seconds; frames within half of it, before or after a moment, count for that moment

    Cells that no vector covers in a window (key frames, intra blocks) are filled, see
    `fill_in_time`."""
    fine = 2 * grid
    totals = np.zeros((len(moments), 3, fine, fine), np.float32)
    for frame in frames:
        near = abs(moments - frame.time) <= window / 2
        totals[near] += paint(frame.blocks, frame.shift, frame.seconds, fine)
    displacement = totals[:, :2]
    seconds = totals[:, 2:]
    unknown = np.full_like(displacement, np.nan)
    field = np.divide(displacement, seconds, out=unknown, where=seconds > 0)
    field = median_3x3(fill_in_time(field)).clip(-MAX_SPEED, MAX_SPEED)
    # 2 x 2 cells become one
    return field.reshape(len(moments), 2, grid, 2, grid, 2).mean((3, 5), dtype=np.float32)


# ---- RAFT ----------------------------------------------------------------------------------------


def load_raft(weights: str | os.PathLike | None, device: torch.device | str) -> torch.nn.Module:
    """torchvision's RAFT-small in evaluation mode. weights: a file with its state dict; None: its
    own published weights, downloaded once. FlowError where they cannot be loaded.
    """
    # slow to import, and needed for raft only
    from torchvision.models.optical_flow import Raft_Small_Weights, raft_small

    try:
        if weights:
            model = raft_small(weights=None)
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        else:
            model = raft_small(weights=Raft_Small_Weights.DEFAULT)
    except Exception as error:
        # no network, no such file, a damaged one, another model: torch raises what it likes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FlowError(
            f"--flow raft: cannot load {weights or 'the published weights'}: {reason} "
            "(--flow-weights FILE: a state dict of torchvision's raft_small)"
        ) from None
    return model.eval().to(device)


def pair_times(
    moments: np.ndarray, start: float, end: float, fps: float, apart: float = 0.1
) -> tuple[np.ndarray, float]:
    """The times of two frames around each moment -> (times float64 [S, 2], the seconds between the
    two). These are about `apart`, but at least one frame, and no more than the span [start, end)
    has. Both frames begin in the span, if it has two."""
    # Until the return, these are frame numbers. 1e-6 is for rounding: 1 s at 30 fps is frame 30.
    first_frame = math.ceil(start * fps - 1e-6)
    last_frame = math.ceil(end * fps - 1e-6) - 1
    step = max(1, min(round(apart * fps), last_frame - first_frame))
    # The moment is in the middle of the pair, so the first is half a step earlier, to the nearest
    # frame. At the ends of the span the pair is moved inside.
    first = np.floor(np.asarray(moments) * fps - step / 2 + 0.5)
    first = np.clip(first, first_frame, max(first_frame, last_frame - step))
    return np.stack([first, first + step], 1) / fps, step / fps


@torch.inference_mode()
def raft_field(
    model: torch.nn.Module, pairs: torch.Tensor, seconds: torch.Tensor, grid: int
) -> torch.Tensor:
    """RAFT's flow of each pair, as a field: pairs uint8 [P, 2, 3, H, W], RGB, and the seconds [P]
    between the two frames -> float32 [P, 2, G, G]. H and W are multiples of 8, and 128 or more.
    """
    first, second = (pairs / 127.5 - 1).unbind(1)
    flow = model(first, second)[-1]  # [P, 2, H, W] pixels
    height, width = flow.shape[2:]
    # dx is divided by the width, dy by the height
    size = torch.tensor([width, height], device=flow.device)[:, None, None]
    flow = flow / size / seconds[:, None, None, None]
    return F.adaptive_avg_pool2d(flow, grid)
