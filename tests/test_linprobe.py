"""Stage 4: the probes by value on features whose answer is known, and the command line."""
import json

import numpy as np
import pytest
import torch
from conftest import run

import linprobe
from model import VideoMAE, normalize
from video import center_crop, clip_times, read_frames


def blobs(n, seed=0, spread=1.0):
    """Three classes around three centres in 16 dimensions, of wildly different scale a dimension."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=rng)
    centres = 2 * torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    return (centres[labels] + spread * torch.randn(n, 16, generator=rng)) * torch.logspace(-3, 3, 16), labels


def test_the_linear_probe_learns_what_is_linear_and_not_what_is_noise():
    (train, train_labels), (test, test_labels) = blobs(600), blobs(300, seed=1)
    predicted, rate, held_out = linprobe.linear_probe(train, train_labels, test, 3, linprobe.RATES, 20, seed=0)
    assert (predicted == test_labels).float().mean() > 0.97 and held_out > 0.95 and rate in linprobe.RATES
    predicted, rate, _ = linprobe.linear_probe(train, train_labels, test, 3, [0.0, 1.0], 20, seed=0)
    assert rate == 1.0 and (predicted == test_labels).float().mean() > 0.97  # the chosen rate is the one that is used
    noise = torch.randn(1500, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(3, (1500,), generator=torch.Generator().manual_seed(3))
    predicted, _, held_out = linprobe.linear_probe(noise[:750], labels[:750], noise[750:], 3, linprobe.RATES, 20, seed=0)
    assert abs((predicted == labels[750:]).float().mean() - 1 / 3) < 0.07 and held_out < 0.55


def test_the_sweep_is_each_rate_alone():
    train, labels = blobs(200)
    train, = linprobe.standardise(train)
    weight, bias = linprobe.fit_linear(train, labels, 3, [0.01, 1.0], 5, seed=0)
    for index, rate in enumerate([0.01, 1.0]):
        alone, alone_bias = linprobe.fit_linear(train, labels, 3, [rate], 5, seed=0)
        assert torch.allclose(weight[index], alone[0], atol=1e-6) and torch.allclose(bias[index], alone_bias[0], atol=1e-6)


def test_fit_linear_is_torchs_sgd():
    train, labels = blobs(64)
    train, = linprobe.standardise(train)
    weight, bias = linprobe.fit_linear(train, labels, 3, [0.5], 3, seed=0)
    layer = torch.nn.Linear(16, 3)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5 * 64 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for _ in range(3):  # one batch an epoch
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(train), labels).backward()
        optimizer.step(), schedule.step()
    assert torch.allclose(weight[0].T, layer.weight, atol=1e-5) and torch.allclose(bias[0, 0], layer.bias, atol=1e-5)


def test_knn_votes_by_similarity():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 3.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert linprobe.knn(train, labels, torch.tensor([[5.0, 0.1], [0.05, 1.0]]), 3, k=2).tolist() == [0, 1]
    # one neighbour at cosine 1 outweighs two at 0.5: exp(1 / 0.07) against 2 exp(0.5 / 0.07)
    train = torch.tensor([[1.0, 0.0], [0.5, 0.75 ** 0.5], [0.5, -(0.75 ** 0.5)]])
    assert linprobe.knn(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), 2, k=3).tolist() == [0]


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    flags = ("--checkpoint", "none", "--size", "tiny", "--data", world / "data/train.csv", "--test", world / "data/val.csv", "--workers", 0)
    out = run("linprobe.py", *flags, "--out", folder, process=True)
    return folder, flags, out


def test_features_are_the_mean_of_the_encoders_tokens(world, probed):
    folder, _, _ = probed
    features = np.load(folder / "test.features.npy")
    assert features.shape == (24, 96) and np.load(folder / "train.features.npy").shape == (32, 96)
    torch.manual_seed(0)
    model = VideoMAE("tiny").eval()
    expected = []
    for where in (0.25, 0.75):
        frames = read_frames(world / "data/videos/val/00009.mp4", clip_times(0, 2.0, 10, 8, 2, where), 32)
        clip = torch.from_numpy(center_crop(frames, 32)[0].copy()).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            expected.append(model.encode(normalize(clip)).mean(1)[0])
    assert np.allclose(features[9], torch.stack(expected).mean(0), rtol=1e-4, atol=1e-5)


def test_features_are_reused_for_another_label_and_equal_over_ranks(probed, tmp_path):
    folder, flags, out = probed
    result = json.loads((folder / "label.json").read_text())
    assert result["classes"] == 8 and result["train"] == 32 and result["test"] == 24 and f"linear {result['linear']:.4g}" in out
    before = (folder / "train.features.npy").stat().st_mtime_ns
    run("linprobe.py", *flags, "--out", folder, "--label-column", "object")
    assert (folder / "train.features.npy").stat().st_mtime_ns == before and (folder / "object.json").exists()
    run("linprobe.py", *flags, "--out", folder, "--seed", 1, "--max-steps", 1)  # another encoder: not reused
    assert (folder / "train.features.npy").stat().st_mtime_ns != before
    run("linprobe.py", *flags, "--out", tmp_path, ranks=2)
    again = json.loads((tmp_path / "label.json").read_text())
    assert again["linear"] == pytest.approx(result["linear"], abs=0.1) and again["unreadable"] == 0
    run("linprobe.py", *flags, "--out", tmp_path / "alone")
    assert np.allclose(np.load(tmp_path / "alone/test.features.npy"), np.load(tmp_path / "test.features.npy"), atol=1e-5)


def test_a_checkpoint_brings_its_own_settings(copy):
    run("pretrain.py", "--size", "tiny", "--frames", 4, "--stride", 3, "--batch-size", 8, "--epochs", 1, "--workers", 0, cwd=copy)
    out = run("linprobe.py", "--checkpoint", "runs/text/checkpoint.pt", "--workers", 1, "--clips", 1, cwd=copy)
    about = json.loads((copy / "runs/text/probe/train.features.json").read_text())
    assert (about["size"], about["frames"], about["stride"], about["clips"]) == ("tiny", 4, 3, 1) and "knn" in out


def test_unreadable_and_unknown(copy):
    lines = (copy / "data/val.csv").read_text().splitlines()
    lines[1] = "missing.mp4" + lines[1][lines[1].index(","):]
    lines[2] = lines[2].split(",")[0] + ",fly,bird,a bird"
    (copy / "data/val.csv").write_text("\n".join(lines) + "\n")
    out = run("linprobe.py", "--checkpoint", "none", "--size", "tiny", "--stride", 2, "--workers", 0, "--out", "p", cwd=copy)
    assert "classes without a training video count as wrong: fly" in out
    result = json.loads((copy / "p/label.json").read_text())
    assert result["test"] == 24 and result["unreadable"] == 1


def test_refusals(copy):
    assert "no such file" in run("linprobe.py", "--checkpoint", "nowhere.pt", cwd=copy, fails=True)
    (copy / "garbage.pt").write_bytes(b"not a checkpoint")
    assert "garbage.pt: no checkpoint" in run("linprobe.py", "--checkpoint", "garbage.pt", "--size", "tiny", cwd=copy, fails=True)
    assert "'verb'" in run("linprobe.py", "--checkpoint", "none", "--label-column", "verb", cwd=copy, fails=True)
    (copy / "data/val.csv").write_text("path,label\nvideos/val/00001.mp4,\n")
    assert "has no label" in run("linprobe.py", "--checkpoint", "none", "--size", "tiny", cwd=copy, fails=True)
