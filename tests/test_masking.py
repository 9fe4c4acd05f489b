"""Masks: equal counts, known answers, and maps that follow the crop, the flip and the time of a
sample.
"""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy
from conftest import CLIP, ENVIRONMENT, ROOT, run
from PIL import Image, ImageFont, ImageOps

import masking
from masking import MASKS, cut_maps, make_mask
from tgm import arrays, pictures, preview
from tgm.manifest import read_manifest
from tgm.run import RunError


def maps_for(name, batch, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name in ("motion", "flow"):
        return {"motion": torch.randn(batch, grid[0], 2, *grid[1:], generator=generator) * 0.1}
    return (
        {"saliency": torch.rand(batch, *grid, generator=generator)}
        if name.startswith("text")
        else {}
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("grid", [(8, 14, 14), (4, 4, 4), (3, 5, 7), (1, 1, 9), (5, 3, 1)])
def test_every_row_masks_the_same_count(name, grid):
    t, h, w = grid
    for percent in range(5, 100, 5):
        count = percent * h * w // 100  # in integers: no rounding to trip over
        generator = torch.Generator().manual_seed(1)
        maps = maps_for(name, 3, grid)
        if count == 0:
            with pytest.raises(ValueError, match="some must be masked and some not"):
                make_mask(name, percent / 100, 3, grid, generator=generator, **maps)
            continue
        mask = make_mask(name, percent / 100, 3, grid, generator=generator, **maps)
        assert mask.dtype == torch.bool and mask.shape == (3, t * h * w)
        assert mask.sum(1).tolist() == [t * count] * 3
        if name != "random":  # the others share the count out evenly over the slices
            assert (mask.view(3, t, -1).sum(2) == count).all()


def test_counts_of_the_published_ratios():
    assert masking.masked_count(0.9, (8, 14, 14)) == 8 * 176  # VideoMAE's 160 visible tokens
    # 0.29 * 100 is 28.999999999999996 in floating point
    assert masking.masked_count(0.29, (1, 10, 10)) == 29


def test_random_and_tube():
    generator = torch.Generator().manual_seed(0)
    tube = make_mask("tube", 0.5, 64, (4, 6, 6), generator=generator).view(64, 4, 36)
    assert (tube == tube[:, :1]).all()
    random = make_mask("random", 0.5, 64, (4, 6, 6), generator=generator).view(64, 4, 36)
    assert not (random == random[:, :1]).all() and not (random.sum(2) == 18).all()
    for mask in (tube, random):
        # each place is masked about half of the time, and no two samples are alike
        assert (mask.float().mean(0) - 0.5).abs().max() < 0.25
        assert len(mask.flatten(1).unique(dim=0)) == 64


@pytest.mark.parametrize("name", MASKS)
def test_some_masked_are_a_fair_draw_by_the_samples_own_noise(name):
    grid, batch = (4, 6, 6), 3000
    noise = torch.rand(batch, 144, generator=torch.Generator().manual_seed(0))
    maps = {
        kind: map_[:1].expand(batch, *map_.shape[1:])
        for kind, map_ in maps_for(name, 1, grid).items()
    }
    mask = make_mask(name, 0.75, batch, grid, noise=noise, **maps)
    some = masking.some_masked(mask, noise, 54)
    chosen = torch.zeros_like(mask).scatter(1, some, True)
    assert some.shape == (batch, 54) and (chosen.sum(1) == 54).all() and not (chosen & ~mask).any()

    def share(*dims):
        of_chosen = chosen.view(batch, 4, 36).float().sum(dims)
        return of_chosen / mask.view(batch, 4, 36).float().sum(dims)

    assert (share(0, 2) - 0.5).abs().max() < 0.01  # of each slice a half,
    often = mask.float().mean(0).view(4, 36) > 0.1
    assert (share(0)[often] - 0.5).abs().max() < 0.1  # of each token,
    assert (share(2) - 0.5).abs().mean() > 0.03  # but not in each sample,
    first = (chosen[:, :36] & mask[:, 36:72]).float().sum() / (
        mask[:, :36] & mask[:, 36:72]
    ).float().sum()
    assert abs(first - 0.5) < 0.01  # whatever is masked elsewhere;
    both = (chosen[:, :36] & chosen[:, 36:72]).float().sum() / (
        mask[:, :36] & mask[:, 36:72]
    ).float().sum()
    assert abs(both - 0.25) < 0.01  # a tube is not kept whole
    assert torch.equal(masking.some_masked(mask[7:8], noise[7:8], 54), some[7:8])


def test_text_masks_the_known_square_and_inverse_all_but_it():
    saliency = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    for slice_ in range(3):
        saliency[0, slice_, 1:4, slice_ : slice_ + 3] += 1  # moves to the right
    saliency[1, :, 3:, 3:] += 1
    mask = make_mask("text", 9 / 36, 2, (3, 6, 6), saliency=saliency).view(2, 3, 6, 6)
    assert torch.equal(mask, saliency > 0.5)
    inverse = make_mask("text-inverse", 27 / 36, 2, (3, 6, 6), saliency=saliency).view(2, 3, 6, 6)
    assert torch.equal(inverse, ~mask)


def test_ties_are_broken_by_noise_and_only_ties():
    saliency = torch.zeros(200, 1, 4, 4)
    saliency[:, 0, 0] = 1  # four cells beyond doubt, twelve tied, five of them wanted
    mask = make_mask(
        "text",
        9 / 16,
        200,
        (1, 4, 4),
        saliency=saliency,
        generator=torch.Generator().manual_seed(0),
    ).view(200, 4, 4)
    assert mask[:, 0].all()
    assert (mask[:, 1:].float().mean(0) - 5 / 12).abs().max() < 0.15
    # all tied: those of the lowest noise, exactly
    noise = torch.rand(1, 2 * 400, generator=torch.Generator().manual_seed(1))
    mask = make_mask(
        "text", 0.3, 1, (2, 20, 20), saliency=torch.zeros(1, 2, 20, 20), noise=noise
    ).view(2, 400)
    assert torch.equal(mask, noise.view(2, 400).argsort(1).argsort(1) < 120)


def moving_block(grid, motion, at, size=3):
    """A field that stands still but for a block that moves: at(t) is its row and column."""
    field = torch.zeros(1, grid[0], 2, *grid[1:])
    for t in range(grid[0]):
        y, x = at(t)
        field[0, t, :, y : y + size, x : x + size] = torch.tensor(motion)[:, None, None]
    return field


def test_motion_masks_a_window_about_what_moves():
    grid = (8, 14, 14)
    field = moving_block(grid, (0.05, 0.0), lambda t: (5, t + 1))
    noise = torch.rand(1, 8 * 196, generator=torch.Generator().manual_seed(0))
    mask = make_mask("motion", 36 / 196, 1, grid, motion=field, noise=noise).view(8, 14, 14)
    moving = field[0, :, 0] > 0
    assert mask[moving].all() and (mask.sum((1, 2)) == 36).all()
    for t in range(8):
        # a square of 6 x 6, but for corners that the smoothed centre's fraction decides
        y, x = (mask[t].nonzero()[:, axis] for axis in (0, 1))
        assert max(y.max() - y.min(), x.max() - x.min()) <= 6
    columns = torch.stack([slice_.nonzero()[:, 1].float().mean() for slice_ in mask])
    # continuous
    assert (
        columns[0] < 5
        and columns[-1] > 7
        and (columns.diff() >= 0).all()
        and columns.diff().max() < 2
    )


def test_camera_motion_does_not_count():
    field = moving_block((4, 8, 8), (0.25, -0.125), lambda t: (2, 2 + t))
    noise = torch.rand(1, 256, generator=torch.Generator().manual_seed(0))

    def mask(motion):
        return make_mask("motion", 0.4, 1, (4, 8, 8), motion=motion, noise=noise)

    for camera in ((0.5, 1.0), (-0.25, 0.125)):
        # with the second the object stands still and all else moves
        assert torch.equal(mask(field), mask(field + torch.tensor(camera)[:, None, None]))


def test_a_jump_becomes_a_glide():
    """What moves is at the left, then from slice 4 on at the right: the window's centre goes
    over in steps of the binomial.
    """
    field = moving_block((8, 10, 20), (0.1, 0.0), lambda t: (3, 1 if t < 4 else 16))
    mask = make_mask(
        "motion",
        0.09,
        1,
        (8, 10, 20),
        motion=field,
        noise=torch.rand(1, 1600, generator=torch.Generator().manual_seed(0)),
    )
    centre = torch.stack(
        [slice_.nonzero()[:, 1].float().mean() + 0.5 for slice_ in mask.view(8, 10, 20)]
    )
    low, high = centre[0], centre[-1]
    assert 1 < low < 5 and 15 < high < 19
    share = (centre - low) / (high - low)
    assert torch.allclose(
        share, torch.tensor([0, 0, 1 / 16, 5 / 16, 11 / 16, 15 / 16, 1, 1]), atol=0.05
    )


def test_motion_where_nothing_moves():
    """One random window for all slices; where only some slices move, the others stay with them."""
    noise = torch.rand(40, 4 * 100, generator=torch.Generator().manual_seed(0))
    mask = make_mask(
        "motion", 0.25, 40, (4, 10, 10), motion=torch.zeros(40, 4, 2, 10, 10), noise=noise
    ).view(40, 4, 100)
    assert (mask == mask[:, :1]).all() and len(mask[:, 0].unique(dim=0)) > 10
    field = torch.zeros(40, 4, 2, 10, 10)
    field[:, 1, 0, 6:9, 6:9] = 0.1
    mask = make_mask("motion", 0.25, 40, (4, 10, 10), motion=field, noise=noise).view(40, 4, 10, 10)
    assert mask[:, :, 6:9, 6:9].all()


def test_a_pan_of_the_camera_is_no_motion():
    """What rounding leaves of it is less than the noise, which chooses one window per clip."""
    noise = torch.rand(200, 4 * 100, generator=torch.Generator().manual_seed(0))
    field = torch.rand(200, 1, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    field = field.expand(200, 4, 2, 10, 10)
    field = field + 3e-7 * torch.randn(field.shape, generator=torch.Generator().manual_seed(2))
    mask = make_mask("motion", 0.5, 200, (4, 10, 10), motion=field, noise=noise).view(200, 4, 100)
    still = make_mask("motion", 0.5, 200, (4, 10, 10), motion=0 * field, noise=noise)
    assert (mask == mask[:, :1]).all(2).all(1).float().mean() > 0.95
    assert (mask == still.view(200, 4, 100)).float().mean() > 0.95
    # a window of 7 x 7, though the root is rounded to less
    assert math.floor(math.sqrt(0.0784) * 25) == 6
    field = torch.zeros(1, 1, 2, 25, 25)
    field[:, :, :, 3:10, 3:10] = 0.1
    mask = make_mask("motion", 0.0784, 1, (1, 25, 25), motion=field).view(25, 25)
    assert mask.sum() == 49 and mask[3:10, 3:10].all()


def test_flow_carries_the_visible_tokens_along():
    """The whole picture moves by one token a slice, to the right: so does every visible token
    whose trace stays inside.
    """
    grid, noise = (6, 8, 8), torch.rand(20, 6 * 64, generator=torch.Generator().manual_seed(0))
    field = torch.zeros(20, 6, 2, 8, 8)
    still = make_mask("flow", 0.8, 20, grid, motion=field, noise=noise).view(20, 6, 8, 8)
    # the 13 tokens of the highest noise
    bumps = noise[:, :64].argsort(1).argsort(1).view(20, 8, 8) >= 51
    assert torch.equal(~still, bumps[:, None].expand(-1, 6, -1, -1))
    field[:, :, 0] = 1 / 8
    moved = make_mask("flow", 0.8, 20, grid, motion=field, noise=noise).view(20, 6, 8, 8)
    assert torch.equal(~moved[:, 3], bumps)  # the middle slice
    for t in range(6):
        came_from = torch.arange(8) - (t - 3)
        # what came in has the base map
        came_from = torch.where((came_from >= 0) & (came_from < 8), came_from, torch.arange(8))
        carried, visible = bumps[:, :, came_from], ~moved[:, t]
        kept = (visible & carried).sum((1, 2))
        # the count may need more, or fewer
        assert torch.equal(kept, torch.minimum(carried.sum((1, 2)), visible.sum((1, 2)))), t
    tube = make_mask("tube", 0.8, 20, grid, noise=noise).view(20, 6, 8, 8)

    def constant(mask):
        visible = ~mask[:, 2, :, 1:]
        return (visible & ~mask[:, 1, :, :-1]).sum() / visible.sum()

    assert constant(moved) > 3 * constant(tube) > 0


def test_traces_through_a_motion_that_changes():
    """Slices 0, 1, 2, 3, the middle is 2; steps of 0.1, 0.2 and 0.3 between them, the means of
    neighbouring slices.
    """
    field = torch.zeros(1, 4, 2, 5, 5)
    field[0, :, 0] = torch.tensor([0.05, 0.15, 0.25, 0.35])[:, None, None]
    at = masking.trace_to_middle(field)[0, :, 2, 2]
    # the middle of five tokens is at 2.5
    expected = torch.tensor([2.5 + 1.5, 2.5 + 1.0, 2.5, 2.5 - 1.5])
    assert torch.allclose(at[:, 0], expected, atol=1e-5)
    assert torch.allclose(at[:, 1], torch.tensor(2.5))


def test_the_noise_decides_between_tokens_of_equal_distance(monkeypatch):
    """CPUs divide by a number, GPUs multiply by its inverse, which is rounded: the motion masks are
    the same, because distances are whole multiples of a part of a token and nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    field = torch.rand(64, 8, 2, 14, 14, generator=generator) * 0.1
    noise = torch.rand(64, 8 * 14 * 14, generator=generator)
    on_cpu = make_mask("motion", 0.6, 64, (8, 14, 14), motion=field, noise=noise)
    divide = torch.Tensor.__truediv__

    def by_inverse(x, y):
        return x * (1 / y) if isinstance(y, int | float) else divide(x, y)

    monkeypatch.setattr(torch.Tensor, "__truediv__", by_inverse)
    as_on_gpu = make_mask("motion", 0.6, 64, (8, 14, 14), motion=field, noise=noise)
    assert torch.equal(as_on_gpu, on_cpu)


def test_cut_motion_known_answers():
    field = torch.zeros(1, 2, 2, 4, 4)
    field[:, :, 0], field[:, :, 1] = 0.5, -0.25  # frame sizes per second
    field[:, 1] *= 2
    # one second from slice to slice
    times, seconds, grid = (torch.tensor([[0.25, 0.5, 0.75]]), torch.tensor([4.0]), (3, 2, 2))
    whole, part = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    cut = masking.cut_motion(field, times, whole, torch.tensor([False]), grid, seconds)
    assert cut.shape == (1, 3, 2, 2, 2)
    assert cut[0, :, :, 0, 0].flatten().tolist() == pytest.approx(
        [0.5, -0.25, 0.75, -0.375, 1.0, -0.5]
    )
    crop = masking.cut_motion(field, times, part, torch.tensor([True]), grid, seconds)
    assert crop[0, :, :, 1, 1].flatten().tolist() == pytest.approx(
        [-1.0, -0.5, -1.5, -0.75, -2.0, -1.0]
    )
    held = masking.cut_motion(
        field, torch.tensor([[0.5, 0.75, 0.75]]), whole, torch.tensor([False]), grid, seconds
    )
    # a clip past its end stands still
    assert held[0, :, 0, 0, 0].tolist() == pytest.approx([0.75, 0, 0])
    assert (
        masking.cut_motion(
            field, torch.tensor([[0.5]]), whole, torch.tensor([False]), (1, 2, 2), seconds
        )
        .abs()
        .sum()
        == 0
    )


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_a_function_of_its_sample_alone(name):
    noise = torch.rand(5, 4 * 16, generator=torch.Generator().manual_seed(3))
    maps = maps_for(name, 5, (4, 4, 4))
    together = make_mask(name, 0.6, 5, (4, 4, 4), noise=noise, **maps)
    for i in range(5):
        alone = make_mask(
            name,
            0.6,
            1,
            (4, 4, 4),
            noise=noise[i : i + 1],
            **{key: m[i : i + 1] for key, m in maps.items()},
        )
        assert torch.equal(alone[0], together[i])


def test_refusals():
    with pytest.raises(ValueError, match="unknown mask 'motoin'"):
        make_mask("motoin", 0.5, 1, (2, 4, 4))
    with pytest.raises(ValueError, match=r"need saliency \[1, 2, 4, 4\], got None"):
        make_mask("text", 0.5, 1, (2, 4, 4))
    with pytest.raises(ValueError, match=r"got \[1, 2, 4, 5\]"):
        make_mask("text", 0.5, 1, (2, 4, 4), saliency=torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match="noise"):
        make_mask("tube", 0.5, 2, (2, 4, 4), noise=torch.rand(1, 32))
    for name in ("motion", "flow"):
        with pytest.raises(
            ValueError, match=rf"{name} masks need motion \[1, 2, 2, 4, 4\], got None"
        ):
            make_mask(name, 0.5, 1, (2, 4, 4))
        with pytest.raises(ValueError, match=r"got \[1, 2, 4, 4\]"):
            make_mask(name, 0.5, 1, (2, 4, 4), motion=torch.zeros(1, 2, 4, 4))
    maps = {"saliency": torch.zeros(1, 2, 4, 4), "motion": torch.zeros(1, 2, 2, 4, 4)}
    for name in masking.MASKS:
        for ratio in (0, 0.01, 1, 1.5, -0.5, math.inf, math.nan):
            with pytest.raises(ValueError, match="mask ratio"):
                make_mask(name, ratio, 1, (2, 4, 4), **maps)
    noise = torch.rand(1, 32)
    mask = make_mask("tube", 0.5, 1, (2, 4, 4), noise=noise)  # masks 16 tokens
    assert masking.some_masked(mask, noise, 16).shape == (1, 16)
    with pytest.raises(RuntimeError, match="not every row masks 17 tokens"):
        masking.some_masked(mask, noise, 17)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count {count}, expected 1 or more"):
            masking.some_masked(mask, noise, count)


def test_cut_maps_known_answers():
    ramp = (torch.arange(8) + 0.5) / 8
    # value = x, value = y, at two moments
    across, down = (ramp.expand(2, 8, 8)[None], ramp[:, None].expand(2, 8, 8)[None])
    whole, still, grid = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.5]]), (1, 4, 4)
    no, yes = torch.tensor([False]), torch.tensor([True])
    centres = (torch.arange(4) + 0.5) / 4
    assert torch.allclose(cut_maps(across, still, whole, no, grid)[0, 0, 2], centres)
    assert torch.allclose(cut_maps(across, still, whole, yes, grid)[0, 0, 2], centres.flip(0))
    assert torch.allclose(cut_maps(down, still, whole, yes, grid)[0, 0, :, 1], centres)
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    assert torch.allclose(cut_maps(across, still, box, no, grid)[0, 0, 0], 0.25 + centres / 2)
    assert torch.allclose(cut_maps(across, still, box, yes, grid)[0, 0, 0], 0.75 - centres / 2)
    assert torch.allclose(cut_maps(down, still, box, no, grid)[0, 0, :3, 0], 0.5 + centres[:3] / 2)
    # measured at a quarter and at three quarters
    moments = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])[None]
    times = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])
    assert cut_maps(moments, times, whole, no, (5, 2, 2))[0, :, 0, 0].tolist() == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )


def test_maps_follow_the_crop_flip_and_time_of_a_real_sample(tmp_path):
    """A bright square moves over a dark video; its saliency is its own brightness. Through the
    training data set's decoding, crop, flip and times, each token's brightness must be what
    `cut_maps` says; unless the flip is forgotten."""
    from pretrain import Clips
    from tgm.manifest import Video

    frames = np.zeros((20, 64, 64, 3), np.uint8)
    for t in range(20):
        frames[t, 24:44, 2 * t + 2 : 2 * t + 22] = 255
    toy.write_video(tmp_path / "square.mp4", frames)
    bright = torch.from_numpy(frames[1::2, ..., 0] / 255.0)  # 10 moments, at 0.1, 0.3, ... s
    saliency = (
        bright.unflatten(1, (16, 4))
        .unflatten(3, (16, 4))
        .mean((2, 4))[None, None]
        .numpy()
        .astype(np.float16)
    )
    data = Clips(
        [Video(str(tmp_path / "square.mp4"), None, None, None, 0, "square.mp4")],
        [0],
        (4, 4, 4),
        frames=8,
        image_size=64,
        stride=2,
        flip=True,
        saliency=saliency,
    )
    agreement, forgotten, flips = [], [], 0
    for epoch in range(24):
        sample = data[epoch, 0]
        clip = sample["clip"][0, 0].float() / 255  # [T, H, W], red
        truth = clip.view(4, 2, 4, 16, 4, 16).mean((1, 3, 5)).flatten()  # a token's brightness
        for flip, errors in ((sample["flip"], agreement), (~sample["flip"], forgotten)):
            cut = cut_maps(sample["saliency"], sample["times"], sample["box"], flip, (4, 4, 4))
            errors.append((cut.flatten() - truth).abs().mean())
        flips += int(sample["flip"])
    assert 4 < flips < 20
    assert max(agreement) < 0.06, max(agreement)
    assert np.mean(forgotten) > 0.15


def test_motion_follows_the_crop_and_flip_of_a_real_sample(tmp_path):
    """A textured square moves right and down by known pixels; through the codec, the stage, the
    data set and `cut_motion`, the tokens on it must move as it does in the sample, whatever the
    crop and the flip."""
    from pretrain import Clips
    from tgm.manifest import read_manifest

    texture = (
        np.random.default_rng(0)
        .integers(60, 255, (8, 8, 3))
        .repeat(4, 0)
        .repeat(4, 1)
        .astype(np.uint8)
    )
    frames = np.full((20, 96, 96, 3), 40, np.uint8)
    for t in range(20):
        frames[t, 16 + t : 48 + t, 10 + 2 * t : 42 + 2 * t] = texture
    toy.write_video(tmp_path / "square.mp4", frames)
    (tmp_path / "one.csv").write_text("path\nsquare.mp4\n")
    run(
        "saliency.py",
        *"--data one.csv --cue motion --moments 10 --grid 12 --workers 0".split(),
        cwd=tmp_path,
    )
    field, grid = np.load(tmp_path / "one.motion.npy"), (4, 6, 6)
    data = Clips(
        read_manifest(tmp_path / "one.csv"),
        [0],
        grid,
        frames=8,
        image_size=96,
        stride=2,
        flip=True,
        motion=field,
    )
    errors = []
    flips = 0
    for epoch in range(16):
        sample = data[epoch, 0]
        cut = masking.cut_motion(
            sample["motion"],
            sample["times"],
            sample["box"],
            sample["flip"],
            grid,
            sample["seconds"],
        )[0]
        clip, (x0, y0, x1, y1) = sample["clip"][0].float(), sample["box"][0].tolist()
        # [t, h, w]: square all over
        on = clip.mean(0).view(4, 2, 6, 16, 6, 16).amin((1, 3, 5)) > 55
        if not on.any():
            continue
        flips += int(sample["flip"])
        # 4 frames a slice
        expected = torch.tensor(
            [8 * (-1) ** int(sample["flip"]) / (96 * (x1 - x0)), 4 / (96 * (y1 - y0))]
        )
        errors.append(
            (
                (cut.transpose(0, 1)[:, on] - expected[:, None]).norm(dim=0) / expected.norm()
            ).median()
        )
    assert len(errors) > 8 and 2 < flips < len(errors) - 2
    assert np.median(errors) < 0.2 and max(errors) < 0.4, errors


def rows_and_columns(picture, step=128 + 4):
    """How many tiles a strip has each way; the rest, for title and names, is less than one."""
    width, height = picture.size
    assert 20 < width % step and 20 < height % step < 60
    return height // step, width // step


def last_row(picture, columns=4, step=128 + 4):
    """The tiles of the last row of a strip, as an array."""
    width, height = picture.size
    return np.asarray(picture.crop((width - columns * step, height - step, width, height)))


def test_the_preview_draws_every_mask(world, tmp_path):
    import av

    flags = (
        "--data",
        world / "data/train.csv",
        *"--row 3 --frames 8 --stride 2 --image-size 64".split(),
    )
    run("masking.py", *flags, "--out", tmp_path / "mask.png", process=True)
    with Image.open(tmp_path / "mask.png") as picture:
        assert rows_and_columns(picture) == (3 + len(MASKS), 4)
    run(
        "masking.py",
        *flags,
        "--caption",
        2,
        "--mask-ratio",
        0.75,
        "--companions",
        world / "data/train",
        "--out",
        tmp_path / "b.png",
    )
    assert "has rows 0 to 31" in run("masking.py", *flags, "--row", 32, fails=True)
    assert "has 3 captions" in run("masking.py", *flags, "--caption", 3, fails=True)
    line = run("masking.py", *flags, "--companions", "nowhere", fails=True)
    assert line.endswith(f"make it with: python saliency.py --data {flags[1]} --out nowhere")
    for name in ("masks.mp4", "masks.gif"):
        assert name in run(
            "masking.py", *flags, "--out", tmp_path / "c.png", "--video", tmp_path / name
        )
        with av.open(str(tmp_path / name)) as container:
            moving = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            # 10 a second, every other
            assert float(container.streams.video[0].average_rate) == pytest.approx(5, rel=0.01)
        assert len(moving) == 8 and moving[0].shape == (3 * (128 + 4 + 20), 3 * (128 + 4), 3)
        # the clip's tile moves
        assert np.abs(moving[0][20:148, :128].astype(float) - moving[7][20:148, :128]).mean() > 1
    line = run("masking.py", *flags, "--out", tmp_path / "c.png", "--video", "x.what", fails=True)
    assert line == "--video x.what: expected a name that ends in .mp4, .gif, .mov, .mkv"


def test_the_preview_without_one_of_the_maps(copy):
    flags = "--data data/val.csv --frames 8 --stride 2 --image-size 64 --out mask.png".split()
    run("masking.py", *flags, cwd=copy)
    with Image.open(copy / "mask.png") as picture:
        whole = last_row(picture)  # the mask flow
    (copy / "data/val.motion.npy").rename(copy / "elsewhere.motion.npy")
    out = run("masking.py", *flags, cwd=copy)
    assert (
        "motion: left out, there is no data/val.motion.npy; "
        "make it with: python saliency.py --data data/val.csv --cue motion" in out
    )
    with Image.open(copy / "mask.png") as picture:
        assert rows_and_columns(picture) == (2 + 4, 4)
    (copy / "elsewhere.motion.npy").rename(copy / "data/val.motion.npy")
    (copy / "data/val.saliency.npy").unlink()
    (copy / "data/val.captions.jsonl").unlink()
    assert "text: left out" in run("masking.py", *flags, cwd=copy)
    with Image.open(copy / "mask.png") as picture:
        assert rows_and_columns(picture) == (2 + 4, 4)
        # without the text masks the others draw the same noise
        assert np.array_equal(last_row(picture), whole)
    (copy / "data/val.csv").write_text("path\nx.mp4\n")
    assert "is of another manifest; make it with: python saliency.py" in run(
        "masking.py", *flags, cwd=copy, fails=True
    )


def test_heat_colours_and_tiles():
    colours = pictures.heat(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert colours[0, 0].tolist() == [0, 0, 1]
    assert colours[1, 0].tolist() == [1, 0, 0] and colours[0, 1].tolist() == [1, 1, 1]
    clip, mask = torch.zeros(3, 4, 32, 32), torch.tensor([True] * 4 + [False] * 4)
    motion = torch.zeros(2, 2, 2, 2)
    motion[0, 0] = 1  # to the right in the first slice, nothing in the second
    tiles = pictures.draw_tiles(clip, {"text 0.6": mask}, (2, 2, 2), torch.zeros(2, 2, 2), motion)
    assert list(tiles) == ["clip", "saliency", "motion", "text 0.6"] and all(
        tile.shape == (4, 32, 32, 3) for tile in tiles.values()
    )
    red, white = tiles["motion"][1, 5, 5] / 0.65, tiles["motion"][2, 5, 5] / 0.65
    assert red[0] > 0.9 and red[1:].max() < 0.1 and white.min() > 0.98
    picture = pictures.draw_strip(tiles, 2, "title")
    side = 32 * 4 + 4
    assert rows_and_columns(picture) == (4, 2)
    x, y = picture.width - 2 * side + 5, picture.height - side + 5  # in the last row's first tile
    assert picture.getpixel((x, y)) == (140, 140, 140)  # masked: grey
    assert picture.getpixel((x + side, y)) == (0, 0, 0)  # visible: the clip
    frames = pictures.draw_frames(tiles)
    assert [frame.getpixel((5, side + 20 + 20 + 5)) for frame in frames] == [
        (140, 140, 140)
    ] * 2 + [(0, 0, 0)] * 2


# ---- the contact sheet ---------------------------------------------------------------------------


def test_a_contact_sheet_shows_what_the_preview_of_each_row_shows(world, tmp_path):
    flags = ("--data", world / "data/train.csv", "--frames", 8, "--stride", 2, "--image-size", 64)
    printed = run("masking.py", *flags, "--row", 3, 5, "--out", tmp_path / "sheet.png")
    assert printed == f"{tmp_path}/sheet.png (rows 3, 5; *: the caption of the saliency)\n"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 2 * (128 + 4)
    for line, row in enumerate((3, 5)):
        run("masking.py", *flags, "--row", row, "--out", tmp_path / "mask.png")
        strip = Image.open(tmp_path / "mask.png")
        width, height = strip.size
        top = height - (3 + len(MASKS)) * 132
        middle = width - 2 * 132  # the third of four slices begins with the fifth of eight frames
        for column, tile in enumerate((0, 1, 3 + list(MASKS).index("text"))):
            box = (middle, top + tile * 132, middle + 128, top + tile * 132 + 128)
            found = sheet[line * 132 :][:128, column * 132 :][:, :128]
            np.testing.assert_array_equal(found, np.asarray(strip.crop(box)))


def test_each_caption_has_its_own_map(copy):
    data = str(copy / "data/val.csv")
    stored = np.load(copy / "data/val.saliency.npy", mmap_mode="r+")
    stored[4] = np.random.default_rng(0).random(stored[4].shape)  # so that no two are equal
    stored.flush()
    lines = [{"path": video.name, "captions": ["a", "b", "c"]} for video in read_manifest(data)]
    path = copy / "other.csv"
    shutil.copy(data, path)
    (copy / "other.captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    videos = read_manifest(path)
    opened = preview.open_saliency(str(path), str(copy / "data/val"), videos)
    for number, text in enumerate("abc"):
        maps, caption = opened.read(videos[4], number)
        assert caption == text
        np.testing.assert_array_equal(maps.numpy(), stored[4, number])


def test_random_rows_of_a_contact_sheet_follow_the_seed(world, tmp_path):
    flags = ("--data", world / "data/train.csv", "--frames", 8, "--stride", 2, "--image-size", 64)
    rows = []
    for seed in (0, 0, 1):
        out = run("masking.py", *flags, "--rows", 4, "--seed", seed, "--out", tmp_path / "s.png")
        rows.append([int(row) for row in re.search(r"rows (.*);", out)[1].split(", ")])
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == sorted(set(rows[0])) and len(rows[0]) == 4 and max(rows[0]) < 32


def test_a_contact_sheet_says_what_a_row_lacks(copy, monkeypatch):
    drawn = []
    draw_lines = pictures.draw_lines
    monkeypatch.setattr(
        pictures,
        "draw_lines",
        lambda lines, **sizes: drawn.extend(lines) or draw_lines(lines, **sizes),
    )
    captions = [
        json.loads(line)["captions"]
        for line in (copy / "data/val.captions.jsonl").read_text().splitlines()
    ]
    saliency = np.load(copy / "data/val.saliency.npy", mmap_mode="r+")
    saliency[1] = np.nan
    saliency.flush()
    videos = copy / "data/videos"
    linked = videos.resolve()
    videos.unlink()
    shutil.copytree(linked, videos)
    video = videos / "val/00002.mp4"
    video.write_bytes(b"x" * video.stat().st_size)
    run("masking.py", *SMALL, "--row", 0, 1, 2, "--caption", 1, cwd=copy)
    assert [len(tiles) for tiles, _ in drawn] == [3, 1, 0]
    assert drawn[0][1] == [
        "0: videos/val/00000.mp4",
        f"  {captions[0][0]}",
        f"* {captions[0][1]}",
        f"  {captions[0][2]}",
    ]
    assert "data/val.saliency.npy is empty for videos/val/00001.mp4" in drawn[1][1][1]
    assert drawn[2][1][1].startswith("data/videos/val/00002.mp4: ")
    Image.open(copy / "mask.png").verify()


def test_captions_of_twenty_words_fit_into_a_contact_sheet(monkeypatch):
    wrapped = []
    wrap = pictures.wrap
    monkeypatch.setattr(
        pictures, "wrap", lambda *args, **rest: wrapped.append(wrap(*args, **rest)) or wrapped[-1]
    )
    tile = torch.zeros(224, 224, 3)
    long = " ".join(["someone", "in", "a", "kitchen"] * 5)
    picture = pictures.draw_lines([([tile] * 3, ["name", *[long] * 3])], columns=3, size=224)
    assert [text.split() for text in wrapped[1:]] == [long.split()] * 3
    assert picture.size[1] == 228  # the text is not higher than its tiles


def test_a_sheet_too_tall_for_its_format_is_refused_before_videos_are_read(copy, monkeypatch):
    monkeypatch.setitem(pictures.MOST_PIXELS, ".webp", 1000)
    flags = (*SMALL, "--rows", 10, "--out", "sheet.webp")
    with monkeypatch.context() as patch:
        patch.setattr(preview, "read_clip", None)
        line = run("masking.py", *flags, cwd=copy, fails=True)
    assert line == (
        "--out sheet.webp: the picture has 792 x 1320 pixels, and a .webp at most 1000 per side: "
        "write a .png, or draw fewer rows or frames"
    )
    assert not (copy / "sheet.webp").exists()
    run("masking.py", *SMALL, "--rows", 10, "--out", "sheet.png", cwd=copy)
    assert Image.open(copy / "sheet.png").size == (792, 1320)
    monkeypatch.setitem(pictures.MOST_PIXELS, ".webp", 500)
    line = run("masking.py", *SMALL, "--row", 3, "--out", "one.webp", cwd=copy, fails=True)
    assert line.startswith("--out one.webp: the picture has ")


@pytest.mark.parametrize(
    "flags, line",
    [
        (("--rows", 25), "--rows 25: data/val.csv has 24 rows"),
        (("--row", 3, 24), "--row 24: data/val.csv has rows 0 to 23"),
        (("--rows", 2, "--video", "m.gif"), "--video m.gif: shows one row: give one --row"),
    ],
)
def test_a_contact_sheet_misused(copy, flags, line):
    assert run("masking.py", *SMALL, *flags, cwd=copy, fails=True) == line
    assert not (copy / "mask.png").exists()


def test_a_contact_sheet_needs_captions(copy):
    (copy / "data/val.captions.jsonl").unlink()
    line = run("masking.py", *SMALL, "--rows", 2, cwd=copy, fails=True)
    assert line.startswith("data/val.captions.jsonl: ") and "python caption.py" in line


def test_the_preview_finds_videos_under_a_root(copy):
    (copy / "data/val.csv").rename(copy / "val.csv")
    for path in (copy / "data").glob("val.*"):
        path.rename(copy / path.name)
    flags = ("--data", "val.csv", *SMALL[2:], "--row", 1)
    assert "No such file" in run("masking.py", *flags, cwd=copy, fails=True)
    assert run("masking.py", *flags, "--root", "data", cwd=copy) == "mask.png\n"


# ---- the preview, misused ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_needs_says_which_map_a_mask_reads(name):
    maps = {
        kind: torch.rand(1, *shape)
        for kind, shape in {"saliency": (2, 4, 4), "motion": (2, 2, 4, 4)}.items()
    }
    needed = masking.NEEDS[name]
    assert list(masking.NEEDS) == list(MASKS) and needed in (None, "saliency", "motion")
    alone = {} if needed is None else {needed: maps[needed]}
    noise = torch.rand(1, 32)
    assert torch.equal(
        make_mask(name, 0.5, 1, (2, 4, 4), noise=noise, **alone),
        make_mask(name, 0.5, 1, (2, 4, 4), noise=noise, **maps),
    )
    if needed:
        with pytest.raises(ValueError, match=f"need {needed}"):
            make_mask(
                name,
                0.5,
                1,
                (2, 4, 4),
                noise=noise,
                **{kind: map_ for kind, map_ in maps.items() if kind != needed},
            )


SMALL = "--data data/val.csv --frames 8 --stride 2 --image-size 64 --out mask.png".split()
NUMBERS = (
    "--row --caption --frames --stride --image-size --patch-size --seed --mask-ratio"
).split()


@pytest.mark.parametrize("flag", NUMBERS)
@pytest.mark.parametrize("value", ["0", "-1", "1e9", "1000000000", "nan", "x"])
def test_wrong_numbers_end_in_one_line(copy, flag, value):
    works = [
        ("--row", "0"),
        ("--caption", "0"),
        ("--seed", "0"),
        ("--seed", "1000000000"),
        ("--stride", "1000000000"),
    ]
    line = run("masking.py", *SMALL, flag, value, cwd=copy, fails=(flag, value) not in works)
    assert flag in line or line == "mask.png\n"
    assert (copy / "mask.png").exists() == ((flag, value) in works)


@pytest.mark.parametrize(
    "flags, line",
    [
        (("--frames", 7), "--frames 7: expected a multiple of 2, the frames of a token"),
        (
            ("--patch-size", 24),
            "--frames 8 --image-size 64 --patch-size 24: "
            "the image size is not a multiple of the patch size",
        ),
        (
            ("--patch-size", 128),
            "--frames 8 --image-size 64 --patch-size 128: "
            "the image size is not a multiple of the patch size",
        ),
        (
            ("--patch-size", 64),
            "--frames 8 --image-size 64 --patch-size 64: random's mask ratio 0.9 masks 0 of 1 "
            "tokens in a slice: some must be masked and some not",
        ),
        (
            ("--mask-ratio", 0.01),
            "--mask-ratio 0.01 --frames 8 --image-size 64 --patch-size 16: random's mask ratio "
            "0.01 masks 0 of 16 tokens in a slice: some must be masked and some not",
        ),
        (
            ("--mask-ratio", 1),
            "--mask-ratio 1 --frames 8 --image-size 64 --patch-size 16: random's mask ratio "
            "1.0: expected a number between 0 and 1",
        ),
        (
            ("--image-size", 8192),
            "--frames 8 --image-size 8192 --patch-size 16: "
            "drawing that takes 190 GB of memory: ask for less",
        ),
        (
            ("--frames", 10000),
            "--frames 10000 --image-size 64 --patch-size 16: "
            "drawing that takes 11 GB of memory: ask for less",
        ),
        (
            ("--image-size", 512, "--patch-size", 1),
            "--frames 8 --image-size 512 --patch-size 1: "
            "drawing that takes 110 GB of memory: ask for less",
        ),
        (
            ("--out", "nowhere/mask.png"),
            "--out nowhere/mask.png: cannot be written (No such file or directory)",
        ),
        (
            ("--out", "data/val.csv/mask.png"),
            "--out data/val.csv/mask.png: cannot be written (Not a directory)",
        ),
        (
            ("--out", "mask"),
            "--out mask: expected a name that ends in .png, .jpg, .jpeg, .webp, .pdf",
        ),
        (
            ("--out", "data"),
            "--out data: expected a name that ends in .png, .jpg, .jpeg, .webp, .pdf",
        ),
        (
            ("--video", "nowhere/masks.mp4"),
            "--video nowhere/masks.mp4: cannot be written (No such file or directory)",
        ),
        (
            ("--video", "data/videos/val/00000.mp4"),
            "--video data/videos/val/00000.mp4: is the video that is to be drawn",
        ),
        (("--row", 24), "--row 24: data/val.csv has rows 0 to 23"),
        (("--caption", 3), "--caption 3: row 0 has 3 captions"),
        (
            ("--data", "gone.csv"),
            "gone.csv:1: expected a csv with the header path[,label][,start][,end]; it cannot be "
            "read (No such file or directory) (the toy world: python data/toy.py)",
        ),
    ],
)
def test_wrong_flags_end_in_one_line_that_names_them(copy, flags, line):
    before = {path: path.stat().st_size for path in (copy / "data/videos/val").iterdir()}
    assert run("masking.py", *SMALL, *flags, cwd=copy, fails=True) == line
    assert not (copy / "mask.png").exists()
    assert before == {path: path.stat().st_size for path in (copy / "data/videos/val").iterdir()}


def test_wrong_flags_end_in_one_line_in_a_process_of_its_own(copy):
    line = run(
        "masking.py", *SMALL, "--out", "nowhere/mask.png", cwd=copy, process=True, fails=True
    )
    assert line == "--out nowhere/mask.png: cannot be written (No such file or directory)"


def test_a_disk_that_fills_while_the_picture_is_written(copy):
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import masking\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "masking.main(sys.argv[2:])"
    )
    command = [sys.executable, "-c", code, str(ROOT), *map(str, SMALL)]
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "--out mask.png: cannot be written ([Errno 27] File too large)\n"


def empty(path, row):
    array = np.lib.format.open_memmap(path, mode="r+")
    array[row] = np.nan
    array.flush()


def test_a_row_without_motion_is_drawn_without_it(copy):
    """As of a GIF or an MJPEG video, whose codecs have no motion vectors."""
    empty(copy / "data/val.motion.npy", 1)
    lines = run("masking.py", *SMALL, "--row", 1, cwd=copy).splitlines()
    assert [line.split(":")[0] for line in lines] == ["motion", "flow", "mask.png"]
    for line in lines[:2]:
        assert "left out, data/val.motion.npy is empty for videos/val/00001.mp4" in line
        assert (
            "no motion vectors (for any codec: "
            "python saliency.py --data data/val.csv --cue motion --flow raft --resume none)" in line
        )
    with Image.open(copy / "mask.png") as picture:
        assert rows_and_columns(picture) == (2 + 4, 4)


def test_the_remedy_writes_where_it_is_looked_for(copy):
    """With --companions, saliency.py needs their prefix."""
    shutil.copy(copy / "data/val.saliency.npy", copy / "other.saliency.npy")
    shutil.copy(copy / "data/val.saliency.json", copy / "other.saliency.json")
    lines = run("masking.py", *SMALL, "--companions", "other", cwd=copy)
    remedy = "python saliency.py --data data/val.csv --out other --cue motion"
    assert f"motion: left out, there is no other.motion.npy; make it with: {remedy}\n" in lines
    (copy / "other.saliency.npy").unlink()
    line = run("masking.py", *SMALL, "--companions", "other", cwd=copy, fails=True)
    assert line.endswith("python saliency.py --data data/val.csv --out other")


def test_a_sheet_of_gigabytes_is_refused(copy):
    args = preview.parse_args(["--image-size", "1120"])
    grid = preview.preview_grid(args)
    preview.refuse_gigabytes(args, grid, 1)
    with pytest.raises(RunError, match=r"-size 16, 20 rows: drawing that takes 4 GB of memory"):
        preview.refuse_gigabytes(args, grid, 20)


def test_a_row_without_saliency_is_refused_with_the_reason(copy):
    empty(copy / "data/val.saliency.npy", 1)

    def refused(*flags):
        return run("masking.py", *SMALL, *flags, cwd=copy, fails=True)

    assert refused("--row", 1) == (
        "--row 1: data/val.saliency.npy is empty for videos/val/00001.mp4 "
        "(to be made with: python saliency.py --data data/val.csv)"
    )
    # its caption failed
    path = copy / "data/val.captions.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(
        {"path": "videos/val/00002.mp4", "captions": [], "error": "videos/val/00002.mp4: is empty"}
    )
    path.write_text("\n".join(lines) + "\n")
    about = copy / "data/val.saliency.json"
    settings = json.loads(about.read_text())
    about.write_text(json.dumps(settings | {"captions": arrays.file_hash(path)}))
    empty(copy / "data/val.saliency.npy", 2)
    assert refused("--row", 2) == (
        "--row 2: videos/val/00002.mp4 has no caption (videos/val/00002.mp4: is empty); "
        "choose another row"
    )
    # its video is gone
    (copy / "data/videos").unlink()
    assert refused("--row", 1) == (
        "--row 1: data/val.saliency.npy is empty for videos/val/00001.mp4 "
        "(data/videos/val/00001.mp4: No such file or directory)"
    )
    assert refused("--row", 0) == "data/videos/val/00000.mp4: No such file or directory"
    assert not (copy / "mask.png").exists()


def test_captions_remade_with_other_frames_make_the_saliency_stale(copy):
    path = copy / "data/val.captions.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        entry["captions"] += entry["captions"]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    line = run("masking.py", *SMALL, "--caption", 4, cwd=copy, fails=True)
    assert line.startswith("data/val.saliency.npy: expected captions ")
    remedy = "python saliency.py --data data/val.csv --resume none"
    assert line.endswith(f"; make it with: {remedy}")
    (copy / "other").mkdir()
    for kind in ("npy", "json"):
        shutil.copy(copy / f"data/val.saliency.{kind}", copy / f"other/val.saliency.{kind}")
    line = run(
        "masking.py", *SMALL, "--caption", 4, "--companions", "other/val", cwd=copy, fails=True
    )
    assert line == (
        "--caption 4: other/val.saliency.npy has 3 captions per video, "
        "data/val.captions.jsonl has 6"
    )
    assert run(
        "masking.py", *SMALL, "--caption", 2, "--companions", "other/val", cwd=copy
    ).endswith("mask.png\n")
    run(*remedy.split()[1:], "--clip", CLIP, cwd=copy)
    assert run("masking.py", *SMALL, "--caption", 4, cwd=copy).endswith("mask.png\n")


def ink(picture, box):
    """The box of what is drawn in a part of a picture: left, top, right, bottom, from the part's
    corner.
    """
    return ImageOps.invert(picture.crop(box).convert("L")).getbbox()


def test_letters_grow_with_the_picture():
    heights = {}
    for size, slices in ((32, 2), (224, 8), (224, 16)):
        tiles = {
            "clip": torch.ones(2 * slices, size, size, 3),
            "text-inverse 0.6": torch.ones(2 * slices, size, size, 3),
        }
        picture = pictures.draw_strip(tiles, slices, "a title")
        step = pictures.tile_side(size) + 4
        margin, top = picture.width - slices * step, picture.height - 2 * step
        _, first, right, last = ink(picture, (0, top, margin, top + step))  # "clip"
        heights[size, slices] = (last - first, picture.width)
        # the longest name is whole
        assert ink(picture, (0, top + step, margin, top + 2 * step))[2] <= margin - 4
        assert margin < step + 20
    assert heights[32, 2][0] >= 10
    for height, width in heights.values():
        assert height / width > 0.011  # seen 1000 pixels wide, 11 of them


def test_long_titles_wrap_and_longer_ones_are_cut():
    tiles = {"clip": torch.ones(4, 32, 32, 3)}
    height = {}
    for words in (1, 12, 400):
        picture = pictures.draw_strip(tiles, 2, "a/" * 3 + "word " * words)
        top = picture.height - 132
        height[words] = top
        assert ink(picture, (0, 0, picture.width, top))[2] < picture.width
    assert height[1] < height[12] <= height[400] < 4 * height[1]
    font = ImageFont.load_default(size=14)
    assert pictures.wrap("one two", font, 1000, 1) == "one two"
    assert (
        pictures.wrap("one  two\n three", font, font.getlength("one twox"), 3) == "one two\nthree"
    )
    cut = pictures.wrap("word " * 400, font, 200, 2)
    assert (
        cut.endswith("…")
        and cut.count("\n") == 1
        and max(map(font.getlength, cut.split("\n"))) <= 200
    )
    long = pictures.wrap("folder" * 20, font, 150, 3)
    assert long.replace("\n", "").rstrip("…") == ("folder" * 20)[: len(long) - 3]
    assert max(map(font.getlength, long.split("\n"))) <= 150
