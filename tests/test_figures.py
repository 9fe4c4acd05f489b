"""tgm/figures.py: the attention map, and the picture of a checkpoint."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import masking
import model as models
from tgm import checkpoints, figures, pictures, preview
from tgm.run import RunError
from tgm.video import read_frames


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return models.VideoMAE("tiny").eval()


@pytest.fixture
def saved(autoencoder, copy):
    """A checkpoint as pretrain.py writes it, in the folder of a small toy world."""
    args = {"size": "tiny", "frames": 8, "stride": 1, "image_size": 48, "text_dim": 512}
    args |= {"mask": "text", "mask_ratio": 0.5}
    path = copy / "checkpoint.pt"
    checkpoints.save_checkpoint(path, model=autoencoder.state_dict(), args=args)
    return path


def naive_attention(attention, x):
    """Attention as in the formula, one head and one token at a time."""
    tokens, width = x.shape
    size = width // attention.heads
    weight = attention.qkv.weight
    received = torch.zeros(tokens)
    for head in range(attention.heads):
        rows = slice(head * size, (head + 1) * size)
        q = x @ weight[:width][rows].T + attention.q_bias[rows]
        k = x @ weight[width : 2 * width][rows].T
        for token in range(tokens):
            scores = torch.stack([q[token] @ k[other] for other in range(tokens)])
            received += (scores / size**0.5).softmax(0)
    return received / tokens / attention.heads


@torch.no_grad()
def test_attention_is_what_the_last_block_computes(autoencoder):
    encoder = autoencoder.encoder
    attention = encoder.blocks[-1].attn
    attention.qkv.weight.mul_(8)  # far from uniform
    torch.nn.init.normal_(attention.q_bias)
    video = torch.randn(1, 3, 8, 48, 48)
    seen = []
    hook = attention.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    encoder.encode_cubes(encoder.to_cubes(video))
    hook.remove()
    found = figures.attention_of(encoder, video)
    expected = naive_attention(attention, seen[0][0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert expected.max() > 2 * expected.min()
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    attention.qkv.weight.zero_()
    torch.testing.assert_close(figures.attention_of(encoder, video), torch.full((144,), 1 / 144))
    assert not attention._forward_pre_hooks  # nothing is left behind


def tile(picture, line, column, columns=4, lines=4):
    """A tile of 96 x 96 pixels of a strip."""
    width, height = picture.size
    x = width - (columns - column) * 100
    y = height - (lines - line) * 100
    return np.asarray(picture)[y : y + 96, x : x + 96]


def test_a_figure_shows_the_mask_and_the_reconstruction_of_the_checkpoint(saved, copy, autoencoder):
    flags = ("--checkpoint", saved, "--row", 3, "--out", "figure.png")
    printed = run("tgm.figures", *flags, cwd=copy)
    data = str(copy / "data/val.csv")
    args = figures.parse_args(["--checkpoint", str(saved), "--data", data, "--row", "3"])
    figures.load_autoencoder(args)
    videos = figures.read_manifest(args.data)
    clip = preview.read_clip(videos[3], frames=8, stride=1, image_size=48)
    mask, title = figures.read_mask(args, videos, clip, autoencoder.grid)
    assert mask.sum() == 4 * math.floor(0.5 * 36) and title.startswith("videos/val/00003.mp4: a ")
    video = models.normalize(preview.to_bytes(clip.frames[None]))
    with torch.no_grad():
        loss = autoencoder(video, mask).loss_mae
    assert printed == f"figure.png: reconstruction loss {loss:.4f} with text 0.5\n"

    picture = Image.open(copy / "figure.png")
    hidden = mask.view(autoencoder.grid)
    made = autoencoder.reconstruct(video, mask)[0]
    for column in range(4):
        pixels = (clip.frames[:, 2 * column] * 255).round().byte().permute(1, 2, 0).numpy()
        rebuilt = (made[:, 2 * column] * 255).round().byte().permute(1, 2, 0).numpy()
        big = np.kron(hidden[column].numpy(), np.ones((16, 16), bool))
        np.testing.assert_array_equal(tile(picture, 0, column)[::2, ::2], pixels)
        np.testing.assert_array_equal(
            tile(picture, 1, column)[~big], tile(picture, 0, column)[~big]
        )
        assert (tile(picture, 1, column)[big] == round(255 * 0.55)).all()
        np.testing.assert_array_equal(tile(picture, 2, column)[::2, ::2], rebuilt)


@pytest.mark.parametrize("mask", masking.MASKS)
def test_a_figure_with_any_mask_and_no_checkpoint(world, tmp_path, mask):
    flags = ("--checkpoint", "none", "--size", "tiny", "--data", world / "data/train.csv")
    printed = run("tgm.figures", *flags, "--mask", mask, "--out", tmp_path / "figure.png")
    ratio = f"{masking.RATIOS[mask]:g}"
    assert re.search(rf": reconstruction loss 1\.\d+ with {mask} {ratio}$", printed.strip())


@pytest.mark.parametrize(
    "flags, line",
    [
        (("--row", 24), "--row 24: data/val.csv has rows 0 to 23"),
        (
            ("--out", "figure.mp4"),
            "--out figure.mp4: expected a name that ends in .png, .jpg, .jpeg, .webp, .pdf",
        ),
        (
            ("--mask-ratio", 0.01),
            "--mask-ratio 0.01: mask ratio 0.01 masks 0 of 36 tokens in a slice: some must be "
            "masked and some not",
        ),
        (
            ("--checkpoint", "gone.pt"),
            "--checkpoint gone.pt: no checkpoint there (pretrain.py writes runs/NAME/checkpoint.pt); "
            "none stands for an untrained encoder",
        ),
        (("--companions", "gone"), "gone.saliency.npy: "),
    ],
)
def test_a_figure_misused(saved, copy, flags, line):
    found = run("tgm.figures", "--checkpoint", saved, *flags, cwd=copy, fails=True)
    assert found.startswith(line)
    assert not (copy / "figure.png").exists()


def test_a_row_without_motion_says_why_and_what_helps(copy):
    path = copy / "data/val.motion.npy"
    array = np.lib.format.open_memmap(path, mode="r+")
    array[1] = np.nan
    array.flush()
    flags = ("--checkpoint", "none", "--size", "tiny", "--mask", "motion", "--row", 1)
    assert run("tgm.figures", *flags, cwd=copy, fails=True) == (
        "--row 1: data/val.motion.npy is empty for videos/val/00001.mp4: saliency.py has not come "
        "to it, or its codec has no motion vectors (for any codec: python saliency.py --data "
        "data/val.csv --cue motion --flow raft --resume none); or choose another row"
    )


@pytest.mark.parametrize("ending", pictures.MOST_PIXELS)
def test_the_sizes_that_formats_can_hold(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    most = pictures.MOST_PIXELS[ending]
    pictures.require_size("--out", path, (1, most))
    Image.new("RGB", (1, most)).save(path)
    with pytest.raises((OSError, ValueError)):
        Image.new("RGB", (1, most + 1)).save(path)
    with pytest.raises(RunError) as error:
        pictures.require_size("--out", path, (1, most + 1))
    assert str(error.value) == (
        f"--out {path}: the picture has 1 x {most + 1} pixels, and a {ending} at most {most} per "
        "side: write a .png, or draw fewer rows or frames"
    )


def test_a_video_may_have_a_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiles = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    pictures.write_video("10:30.mp4", tiles, 10)
    assert read_frames("10:30.mp4", [0.0, 0.1]).shape == (2, 48, 64, 3)


def test_a_fine_tuned_model_reconstructs_nothing(copy):
    path = copy / "best.pt"
    vit = models.VideoViT("tiny", classes=3)
    args = {"size": "tiny", "frames": 8, "image_size": 48, "classes": ["a", "b", "c"]}
    checkpoints.save_checkpoint(path, model=vit.state_dict(), args=args)
    line = run("tgm.figures", "--checkpoint", path, cwd=copy, fails=True)
    assert line.startswith(f"--checkpoint {path}: has no decoder, so it reconstructs nothing")


@pytest.mark.parametrize("fps, duration", [(10, 100), (24, 40), (60, 20), (150, 20)])
def test_a_gif_is_played_at_a_speed_that_players_know(tmp_path, fps, duration):
    tiles = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    pictures.write_video(tmp_path / "x.gif", tiles, fps)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 3 and gif.info["duration"] == duration


def test_a_link_that_leads_nowhere_is_not_removed(tmp_path):
    link = tmp_path / "x.png"
    link.symlink_to(tmp_path / "later.png")
    pictures.require_writable("--out", link, (".png",))
    assert link.is_symlink()
