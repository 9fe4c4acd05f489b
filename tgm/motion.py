"""Motion fields: how fast, and where to, each part of the picture moves, at S moments of a video.
Needs numpy and torch; nothing of ours. Two sources:

    codec   the motion vectors a video carries anyway (as MGM uses them): nothing but decoding, no
            weights
    raft    optical flow by torchvision's RAFT-small (arXiv 2003.12039): for codecs without vectors,
            and a reference for the other

    frames = VideoReader(path, vectors=True).read_vectors(times)
    field = codec_field(frames, moments, window=5 / 30, grid=14)        # float32 [S, 2, G, G]

A field is dx to the right and dy down, in frame widths and heights per second, the mean of each
cell of a G x G grid over the displayed frame. Codec vectors were chosen to save bits, not to be
true: on flat areas they say little, and along an edge only the part across it is right. So a
moment's field averages every vector in a window of a few frames, weighted by area and by time
spanned (total displacement over total time), on a grid twice as fine as asked for; a 3 x 3 median
takes outliers away, and then 2 x 2 cells become one. experiments/MASKS.md compares windows.

A vector may mean any of several earlier pictures, and libav tells its direction in time but not
which one: `video.py` takes the nearest. So where the encoder had a choice (`refs` above 1) some
vectors span more time than they are divided by, and speeds come out too large; directions stay
right. B pictures keep this small, and they are x264's default; streams without them (profile
baseline, tune zerolatency: phones, video calls, surveillance) suffer most. Measured speed / true
speed, the mean over four pans of a texture at x264's preset medium (ultrafast, superfast and
veryfast use one reference, and are exact), without noise and with noise of standard deviation 4 and
10 grey levels added to every frame:

    x264 settings              refs    no noise   noise 4   noise 10   the worst of the 12
    defaults (3 B pictures)    1       1.00       1.00      0.98       0.96
                               3       1.02       1.02      1.19       1.28
    profile baseline           1       1.00       1.00      1.00       1.01
                               2       1.41       1.37      1.43       1.88
                               3       1.36       1.36      1.57       1.82
                               4       1.38       1.40      1.75       2.13
    tune zerolatency           1       1.00       1.00      1.00       0.99
                               2       1.43       1.39      1.37       1.88
                               3       1.44       1.38      1.57       1.88
                               4       1.45       1.45      1.86       2.18
    as tgm.prepare's copies    2       1.00       1.04      1.13       1.15

Where a factor matters (`--mask flow` follows the field), re-encode such videos or use `raft`.

Shapes: S moments, G grid, n vectors of a frame, P pairs of frames.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


class FlowError(Exception):
    """Weights of an optical flow model that cannot be loaded: one line."""


# ---- the codec's vectors -------------------------------------------------------------------------


def coverage(low: np.ndarray, high: np.ndarray, grid: int) -> np.ndarray:
    """The length of each of `grid` equal parts of [0, 1] that lies in [low, high], low and high
    [n] -> float32 [n, grid].
    """
    edges = np.arange(grid + 1, dtype=np.float32) / grid
    ends = np.minimum(high[:, None], edges[1:])
    starts = np.maximum(low[:, None], edges[:-1])
    return (ends - starts).clip(0)


def paint(blocks: np.ndarray, shift: np.ndarray, seconds: np.ndarray, grid: int) -> np.ndarray:
    """Totals over one frame's vectors in each cell, by the area of the block inside it:
    displacement x, displacement y, time -> float32 [3, G, G]. blocks [n, 4] x0, y0, x1, y1 and
    shift [n, 2] as fractions of the frame; seconds [n]."""
    across = coverage(blocks[:, 0], blocks[:, 2], grid)  # [n, G]
    down = coverage(blocks[:, 1], blocks[:, 3], grid)
    values = np.stack([shift[:, 0], shift[:, 1], seconds])  # [3, n]
    return (values[:, :, None] * down).swapaxes(1, 2) @ across


def fill_in_time(field: np.ndarray) -> np.ndarray:
    """NaN cells of field [S, 2, G, G] take the value of the nearest moment that has one (the
    earlier of two); a cell without any takes its moment's median."""
    moments = len(field)
    known = ~np.isnan(field[:, :1])  # [S, 1, G, G]
    moment = np.arange(moments).reshape(-1, 1, 1, 1)
    far = 2 * moments  # stands for "none": farther than any moment
    before = np.maximum.accumulate(np.where(known, moment, -far))
    after = np.minimum.accumulate(np.where(known, moment, far)[::-1])[::-1]
    nearest = np.where(moment - before <= after - moment, before, after).clip(0, moments - 1)
    field = np.take_along_axis(field, np.broadcast_to(nearest, field.shape), 0)
    ever = known.any((0, 1))  # [G, G]
    if ever.any():
        field[:, :, ~ever] = np.median(field[:, :, ever], -1, keepdims=True)
    else:
        field[:] = 0
    return field


def median_3x3(field: np.ndarray) -> np.ndarray:
    """The median over each cell and its neighbours, the border repeated, for each component: [S,
    2, G, G] -> the same.
    """
    padded = np.pad(field, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.median(windows, (-2, -1))


def codec_field(frames: Sequence, moments: np.ndarray, window: float, grid: int) -> np.ndarray:
    """The field at each moment from a codec's vectors -> float32 [S, 2, G, G], finite.

    frames: a list of objects with time, blocks, shift, seconds, as video.VideoReader.read_vectors
        returns them
    moments [S]: seconds; window: seconds around a moment that its field is the mean of
    Cells that no vector covers in a window (key frames, intra blocks) are filled from the moments
    before and after."""
    fine = 2 * grid
    totals = np.zeros((len(moments), 3, fine, fine), np.float32)
    for frame in frames:
        near = abs(moments - frame.time) <= window / 2
        totals[near] += paint(frame.blocks, frame.shift, frame.seconds, fine)
    displacement = totals[:, :2]
    seconds = totals[:, 2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        field = np.where(seconds > 0, displacement / seconds, np.nan)
    field = median_3x3(fill_in_time(field)).clip(-1000, 1000)
    # 2 x 2 cells become one
    return field.reshape(len(moments), 2, grid, 2, grid, 2).mean((3, 5), dtype=np.float32)


# ---- RAFT ----------------------------------------------------------------------------------------


def load_raft(weights: str | os.PathLike | None, device: torch.device | str) -> torch.nn.Module:
    """torchvision's RAFT-small in evaluation mode. weights: a file with its state dict; None: its
    own published weights, downloaded once. FlowError where they cannot be loaded.
    """
    from torchvision.models.optical_flow import Raft_Small_Weights, raft_small

    try:
        if weights:
            model = raft_small(weights=None)
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        else:
            model = raft_small(weights=Raft_Small_Weights.DEFAULT)
    except Exception as error:
        # no network, no such file, a damaged one, another model: torch raises what it likes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FlowError(
            f"--flow raft: cannot load {weights or 'the published weights'}: {lines[0]} "
            "(--flow-weights FILE: a state dict of torchvision's raft_small)"
        ) from None
    return model.eval().to(device)


def pair_times(
    moments: np.ndarray, start: float, end: float, fps: float, apart: float = 0.1
) -> tuple[np.ndarray, float]:
    """Pairs of frames around each moment, about `apart` seconds from one another and at least one
    frame -> (times float64 [S, 2], the seconds between two). Both lie inside [start, end], if that
    holds so many frames."""
    # all in frames
    step = max(1, round(apart * fps))
    earliest = math.ceil(start * fps - 1e-6)
    last = math.ceil(end * fps - 1e-6) - 1
    first = np.floor(np.asarray(moments) * fps - step / 2 + 0.5)
    first = np.clip(first, earliest, max(earliest, last - step))
    return np.stack([first, first + step], 1) / fps, step / fps


@torch.inference_mode()
def raft_field(
    model: torch.nn.Module, pairs: torch.Tensor, seconds: torch.Tensor, grid: int
) -> torch.Tensor:
    """RAFT's flow of each pair, as a field: pairs uint8 [P, 2, 3, H, W], seconds [P] -> float32
    [P, 2, G, G].
    """
    first, second = (pairs / 127.5 - 1).unbind(1)
    flow = model(first, second)[-1]  # [P, 2, H, W] pixels
    height, width = flow.shape[2:]
    size = torch.tensor([width, height], device=flow.device)[:, None, None]
    flow = flow / size / seconds[:, None, None, None]
    return F.adaptive_avg_pool2d(flow, grid)
