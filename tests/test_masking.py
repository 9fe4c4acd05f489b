"""Masks: equal counts, known answers, and maps that follow the crop, the flip and the time of a sample."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import masking
import toy
from masking import MASKS, cut_maps, make_mask


def maps_for(name, batch, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"saliency": torch.rand(batch, *grid, generator=generator)} if name.startswith("text") else {}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("grid", [(8, 14, 14), (4, 4, 4), (3, 5, 7), (1, 1, 9), (5, 3, 1)])
def test_every_row_masks_the_same_count(name, grid):
    t, h, w = grid
    for percent in range(5, 100, 5):
        count = percent * h * w // 100  # in integers: no rounding to trip over
        make = lambda: make_mask(name, percent / 100, 3, grid, generator=torch.Generator().manual_seed(1), **maps_for(name, 3, grid))
        if count == 0:
            with pytest.raises(ValueError, match="some must be masked and some not"):
                make()
            continue
        mask = make()
        assert mask.dtype == torch.bool and mask.shape == (3, t * h * w)
        assert mask.sum(1).tolist() == [t * count] * 3
        if name != "random":  # the others share the count out evenly over the slices
            assert (mask.view(3, t, -1).sum(2) == count).all()


def test_counts_of_the_published_ratios():
    assert masking.masked_count(0.9, (8, 14, 14)) == 8 * 176  # VideoMAE's 160 visible tokens
    assert masking.masked_count(0.29, (1, 10, 10)) == 29      # 0.29 * 100 is 28.999999999999996 in floating point


def test_random_and_tube():
    generator = torch.Generator().manual_seed(0)
    tube = make_mask("tube", 0.5, 64, (4, 6, 6), generator=generator).view(64, 4, 36)
    assert (tube == tube[:, :1]).all()
    random = make_mask("random", 0.5, 64, (4, 6, 6), generator=generator).view(64, 4, 36)
    assert not (random == random[:, :1]).all() and not (random.sum(2) == 18).all()
    for mask in (tube, random):  # each place is masked about half of the time, and no two samples are alike
        assert (mask.float().mean(0) - 0.5).abs().max() < 0.25
        assert len(mask.flatten(1).unique(dim=0)) == 64


def test_text_masks_the_known_square_and_inverse_all_but_it():
    saliency = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    for slice_ in range(3):
        saliency[0, slice_, 1:4, slice_:slice_ + 3] += 1  # moves to the right
    saliency[1, :, 3:, 3:] += 1
    mask = make_mask("text", 9 / 36, 2, (3, 6, 6), saliency=saliency).view(2, 3, 6, 6)
    assert torch.equal(mask, saliency > 0.5)
    inverse = make_mask("text-inverse", 27 / 36, 2, (3, 6, 6), saliency=saliency).view(2, 3, 6, 6)
    assert torch.equal(inverse, ~mask)


def test_ties_are_broken_by_noise_and_only_ties():
    saliency = torch.zeros(200, 1, 4, 4)
    saliency[:, 0, 0] = 1  # four cells beyond doubt, twelve tied, five of them wanted
    mask = make_mask("text", 9 / 16, 200, (1, 4, 4), saliency=saliency, generator=torch.Generator().manual_seed(0)).view(200, 4, 4)
    assert mask[:, 0].all()
    assert (mask[:, 1:].float().mean(0) - 5 / 12).abs().max() < 0.15
    noise = torch.rand(1, 2 * 400, generator=torch.Generator().manual_seed(1))  # all tied: those of the lowest noise, exactly
    mask = make_mask("text", 0.3, 1, (2, 20, 20), saliency=torch.zeros(1, 2, 20, 20), noise=noise).view(2, 400)
    assert torch.equal(mask, noise.view(2, 400).argsort(1).argsort(1) < 120)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_a_function_of_its_sample_alone(name):
    noise, maps = torch.rand(5, 4 * 16, generator=torch.Generator().manual_seed(3)), maps_for(name, 5, (4, 4, 4))
    together = make_mask(name, 0.6, 5, (4, 4, 4), noise=noise, **maps)
    for i in range(5):
        alone = make_mask(name, 0.6, 1, (4, 4, 4), noise=noise[i:i + 1], **{key: m[i:i + 1] for key, m in maps.items()})
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
    for ratio in (0, 0.01, 1, 1.5, -0.5):
        with pytest.raises(ValueError, match="mask ratio"):
            make_mask("tube", ratio, 1, (2, 4, 4))


def test_cut_maps_known_answers():
    ramp = (torch.arange(8) + 0.5) / 8
    across, down = ramp.expand(2, 8, 8)[None], ramp[:, None].expand(2, 8, 8)[None]  # value = x, value = y, at two moments
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
    moments = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])[None]  # measured at a quarter and at three quarters
    times = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])
    assert cut_maps(moments, times, whole, no, (5, 2, 2))[0, :, 0, 0].tolist() == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("crop", ["multiscale", "resized"])
def test_maps_follow_the_crop_flip_and_time_of_a_real_sample(tmp_path, crop):
    """A bright square moves over a dark video; its saliency is its own brightness. Through the training data set's decoding,
    crop, flip and times, each token's brightness must be what `cut_maps` says; unless the flip is forgotten."""
    from pretrain import Clips
    from video import Video
    frames = np.zeros((20, 64, 64, 3), np.uint8)
    for t in range(20):
        frames[t, 24:44, 2 * t + 2:2 * t + 22] = 255
    toy.write_video(tmp_path / "square.mp4", frames)
    bright = torch.from_numpy(frames[1::2, ..., 0] / 255.0)                                  # 10 moments, at 0.1, 0.3, ... s
    saliency = bright.unflatten(1, (16, 4)).unflatten(3, (16, 4)).mean((2, 4))[None, None].numpy().astype(np.float16)
    args = SimpleNamespace(seed=0, frames=8, stride=2, image_size=64, repeat=1, flip=True, crop=crop, crop_scale=(0.3, 1.0))
    data = Clips([Video(str(tmp_path / "square.mp4"), None, None, None, 0, "square.mp4")], [0], args, (4, 4, 4), None, saliency)
    agreement, forgotten, flips = [], [], 0
    for epoch in range(24):
        sample = data[epoch, 0]
        clip = sample["clip"][0, 0].float() / 255                                            # [T, H, W], red
        truth = clip.view(4, 2, 4, 16, 4, 16).mean((1, 3, 5)).flatten()                      # a token's brightness
        cut = lambda flip: cut_maps(sample["saliency"], sample["times"], sample["box"], flip, (4, 4, 4)).flatten()
        agreement.append((cut(sample["flip"]) - truth).abs().mean())
        forgotten.append((cut(~sample["flip"]) - truth).abs().mean())
        flips += int(sample["flip"])
    assert 4 < flips < 20
    assert max(agreement) < 0.06, max(agreement)
    assert np.mean(forgotten) > 0.15


def test_the_preview_draws_every_mask(world, tmp_path):
    flags = ("--data", world / "data/train.csv", "--row", 3, "--frames", 8, "--stride", 2, "--image-size", 64)
    run("masking.py", *flags, "--out", tmp_path / "mask.png", process=True)
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.size == (90 + 4 * (128 + 4), 22 + (2 + len(MASKS)) * (128 + 4))
    run("masking.py", *flags, "--caption", 2, "--mask-ratio", 0.75, "--companions", world / "data/train", "--out", tmp_path / "b.png")
    assert "has rows 0 to 31" in run("masking.py", *flags, "--row", 32, fails=True)
    assert "has 3 captions" in run("masking.py", *flags, "--caption", 3, fails=True)
    assert "make it with: python caption.py" in run("masking.py", *flags, "--companions", "nowhere", fails=True)


def test_heat_colours_and_strip():
    colours = masking.heat(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert colours[0, 0].tolist() == [0, 0, 1]
    assert colours[1, 0].tolist() == [1, 0, 0] and colours[0, 1].tolist() == [1, 1, 1]
    clip = torch.zeros(3, 4, 32, 32)
    picture = masking.draw_strip(clip, torch.zeros(2, 2, 2), {"text 0.6": torch.tensor([True] * 4 + [False] * 4)}, "title")
    tile = 32 * 4 + 4
    assert picture.size == (90 + 2 * tile, 22 + 3 * tile)
    assert picture.getpixel((90 + 5, 22 + 2 * tile + 5)) == (140, 140, 140)   # masked: grey
    assert picture.getpixel((90 + tile + 5, 22 + 2 * tile + 5)) == (0, 0, 0)  # visible: the clip
