"""Stage 4: the probes by value on features whose answer is known, the features written out, and
the command line.
"""

import json
import math
import os
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
import toy
from conftest import run
from test_run import Child, no_child_is_left, two_ranks  # noqa: F401

import linprobe
from model import VideoMAE, normalize
from tgm import attentive
from tgm.evaluation import bootstrap, t_interval
from tgm.features import RandomViews, TokenRows
from tgm.manifest import Video, read_manifest
from tgm.sampling import Views, clip_times, uniform_times
from tgm.video import read_frames

RATES = [{"rate": rate, "decay": 0.0} for rate in linprobe.RATES]


def blobs(n, seed=0, spread=1.0):
    """Three classes around three centres in 16 dimensions, of wildly different scale a
    dimension: features [n, 1, 16].
    """
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=rng)
    centres = 2 * torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    return (
        (centres[labels] + spread * torch.randn(n, 16, generator=rng)) * torch.logspace(-2, 3, 16)
    )[:, None], labels


# ---- the linear probe ----------------------------------------------------------------------------


def test_the_linear_probe_learns_what_is_linear_and_not_what_is_noise():
    (train, labels), (test, truth) = blobs(600), blobs(300, seed=1)
    probe = partial(linprobe.linear, classes=3, epochs=20)
    known = {"labels": labels, "truth": truth, "seeds": [0]}
    result = linprobe.repeat("linear", probe, RATES, train, test, **known)
    assert result["linear"] > 0.97 and result["linear_chosen"][0] in RATES
    settings = [{"rate": 0.0, "decay": 0.0}, {"rate": 1.0, "decay": 0.0}]
    result = linprobe.repeat("linear", probe, settings, train, test, **known)
    # the chosen setting is the one that is used
    assert result["linear_chosen"] == settings[1:] and result["linear"] > 0.97
    noise = torch.randn(1500, 1, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(3, (1500,), generator=torch.Generator().manual_seed(3))
    known = {"labels": labels[:750], "truth": labels[750:], "seeds": [0]}
    result = linprobe.repeat("linear", probe, RATES, noise[:750], noise[750:], **known)
    assert abs(result["linear"] - 1 / 3) < 0.07


def test_the_sweep_is_each_setting_alone():
    train, labels = blobs(200)
    settings = [{"rate": rate, "decay": decay} for rate in (0.01, 1.0) for decay in (0.0, 0.01)]
    sizes = {"classes": 3, "epochs": 5, "batch": 64, "warmup": 2}
    weight = linprobe.fit_linear(train, labels, settings, 0, **sizes)
    assert weight.shape == (4, 17, 3) and not torch.allclose(weight[2], weight[3], atol=1e-3)
    for together, setting in zip(weight, settings):
        alone = linprobe.fit_linear(train, labels, [setting], 0, **sizes)[0]
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    test = blobs(50, seed=1)[0]
    predicted = linprobe.linear(train, labels, test, settings, 0, classes=3, epochs=5)
    for together, setting in zip(predicted, settings):
        assert torch.equal(
            together, linprobe.linear(train, labels, test, [setting], 0, classes=3, epochs=5)[0]
        )


def test_linear_is_torchs_batch_norm_and_sgd():
    """One batch an epoch, where the batch's statistics are the training set's; weight decay on
    weights and bias, warm-up.
    """
    (train, labels), (test, _) = blobs(64), blobs(40, seed=1)
    setting, epochs, warmup = {"rate": 0.5, "decay": 0.02}, 6, 2
    norm = torch.nn.BatchNorm1d(16, affine=False, eps=1e-6, momentum=1.0)
    layer = torch.nn.Linear(16, 3)
    # no epochs: the initial weights
    first = linprobe.fit_linear(train, labels, [setting], 3, classes=3, epochs=0)[0]
    assert first[:16].std() == pytest.approx(0.01, rel=0.3) and (first[16] == 0).all()
    layer.weight.data, layer.bias.data = first[:16].T.clone(), first[16].clone()
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=0.5 * 64 / 256, momentum=0.9, weight_decay=0.02
    )
    for epoch in range(epochs):
        factor = epoch / 2 if epoch < 2 else (1 + math.cos(math.pi * (epoch - 2) / 4)) / 2
        optimizer.param_groups[0]["lr"] = 0.125 * factor
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(norm(train[:, 0])), labels).backward()
        optimizer.step()
    standard = norm(train[:, 0])[:, None]
    sizes = {"classes": 3, "epochs": epochs, "warmup": warmup}
    weight = linprobe.fit_linear(standard, labels, [setting], 3, **sizes)[0]
    assert torch.allclose(weight[:16].T, layer.weight, atol=1e-5) and torch.allclose(
        weight[16], layer.bias, atol=1e-5
    )
    norm.eval()
    norm.running_var *= 63 / 64  # torch keeps the unbiased variance
    expected = layer(norm(test[:, 0])).argmax(1)
    predicted = linprobe.linear(train, labels, test, [setting], 3, **sizes)
    assert torch.equal(predicted[0], expected)


def test_schedule_and_protocols():
    assert [linprobe.schedule(epoch, 100, 10) for epoch in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )
    assert linprobe.schedule(0, 50) == 1 and linprobe.schedule(25, 50) == pytest.approx(0.5)
    sweep = linprobe.PROTOCOLS["sweep"]
    assert len(sweep["settings"]) == 21 and {"rate": 0.3, "decay": 1e-4} in sweep["settings"]
    assert sweep["training"] == {"epochs": 50, "warmup": 0, "batch": 256}
    assert linprobe.PROTOCOLS["videomae"] == {
        "settings": [{"rate": 0.1, "decay": 0.0}],
        "training": {"epochs": 100, "warmup": 10, "batch": 1024},
    }


@pytest.mark.parametrize(
    "protocol, epochs, trained",
    [("sweep", None, 50), ("videomae", None, 100), ("videomae", 7, 7)],
)
def test_the_protocol_sets_how_the_linear_probe_is_trained(
    monkeypatch, capsys, protocol, epochs, trained
):
    """In every call of it, to choose and to test; --epochs alone goes before it."""
    seen = []

    def fit(features, labels, settings, seed, *, classes, **training):
        seen.append((len(settings), training))
        return torch.zeros(len(settings), 17, classes)

    monkeypatch.setattr(linprobe, "fit_linear", fit)
    flags = ["--checkpoint", "none", "--protocol", protocol, "--seeds", "2", "--device", "cpu"]
    if epochs:
        flags += ["--epochs", str(epochs)]
    args = linprobe.parse_args(flags)
    features = blobs(20)[0][:, 0].numpy()
    videos = [Video(f"{row}.mp4", str(row % 2), None, None, row, f"{row}.mp4") for row in range(20)]
    arrays = {split: {"features": features} for split in ("train", "test")}
    linprobe.probe_all({"train": videos, "test": videos}, arrays, 3, args)
    expected = linprobe.PROTOCOLS[protocol]["training"] | {"epochs": trained}
    count = len(linprobe.PROTOCOLS[protocol]["settings"])
    rounds = [count, 1] if count > 1 else [1]  # nothing to choose among one
    assert seen == [(settings, expected) for settings in rounds * 2]
    note = (
        "note: --epochs 7: the linear probe of --protocol videomae warms up for 10 epochs, and "
        "will not reach its learning rate"
    )
    assert (note in capsys.readouterr().out.splitlines()) == (epochs == 7)


def test_an_epoch_draws_one_view_of_each_video():
    """Views of which one is noise: the layer learns from the other, and both count."""
    clean, labels = blobs(300)
    clean = (clean - clean.mean(0)) / clean.std(0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    setting = [{"rate": 0.1, "decay": 0.0}]
    alone, same, both = (
        linprobe.fit_linear(x, labels, setting, 0, classes=3, epochs=10)
        for x in (clean, torch.cat([clean, clean], 1), torch.cat([clean, noise], 1))
    )
    assert not torch.allclose(same, both, atol=1e-2)
    accuracy = lambda weight: (
        ((clean[:, 0] @ weight[0, :16] + weight[0, 16]).argmax(1) == labels).float().mean()
    )
    assert accuracy(alone) > 0.97 and accuracy(same) > 0.97 and accuracy(both) > 0.9
    predicted = linprobe.linear(
        clean, labels, torch.cat([clean, -clean], 1), setting, 0, classes=3, epochs=1
    )
    # a test video is the mean of its views: here always the same
    assert len(predicted[0].unique()) == 1


# ---- nearest neighbours --------------------------------------------------------------------------


def test_knn_votes_by_similarity():
    ks = lambda *values: [{"k": k} for k in values]
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 3.0], [0.0, 1.0]])[:, None]
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert linprobe.knn(
        train, labels, torch.tensor([[[5.0, 0.1]], [[0.05, 1.0]]]), ks(2), 0, classes=3
    ).tolist() == [[0, 1]]
    # one neighbour at cosine 1 outweighs two at 0.5: exp(1 / 0.07) against 2 exp(0.5 / 0.07)
    train = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [0.5, -(0.75**0.5)]])[:, None]
    assert linprobe.knn(
        train, torch.tensor([0, 1, 1]), torch.tensor([[[1.0, 0.0]]]), ks(3), 0, classes=2
    ).tolist() == [[0]]


def test_knn_is_a_written_out_loop():
    # more test videos than a chunk
    (train, labels), (test, _) = (blobs(300, spread=4.0), blobs(280, seed=1, spread=4.0))
    train, test = torch.cat([train, train + 1], 1), test / 3
    ks = (1, 5, 20, 1000)
    predicted = linprobe.knn(train, labels, test, [{"k": k} for k in ks], 0, classes=3)
    a, b = train.mean(1).double().numpy(), test[:, 0].double().numpy()
    similar = (b / np.linalg.norm(b, axis=1)[:, None]) @ (a / np.linalg.norm(a, axis=1)[:, None]).T
    for k, of_k in zip(ks, predicted):
        for of_video, voted in zip(similar, of_k):
            near = np.argsort(-of_video)[:k]
            votes = [
                sum(math.exp(of_video[i] / 0.07) for i in near if labels[i] == c) for c in range(3)
            ]
            assert int(np.argmax(votes)) == voted
    assert (predicted[0] != predicted[3]).any()


# ---- the choice and the intervals ----------------------------------------------------------------


def test_settings_are_chosen_on_a_tenth_of_the_training_set_and_never_on_the_test_set():
    """A probe that is right with one setting where the label is a training video's, and with the
    other on the test set.
    """
    seen = []

    def probe(train, labels, test, settings, seed):
        seen.append((len(train), len(test), set(train.tolist()) & set(test.tolist())))
        right, training = test % 10, test < 1000
        return torch.stack(
            [torch.where(training == setting["training"], right, -2) for setting in settings]
        )

    train, test = torch.arange(0, 200), torch.arange(1000, 1050)
    settings = [{"training": False}, {"training": True}]
    known = {"labels": train % 10, "truth": test % 10, "seeds": [0, 1]}
    result = linprobe.repeat("x", probe, settings, train, test, **known)
    assert (
        result["x"] == 0 and result["x_chosen"] == settings[1:] * 2 and result["x_seeds"] == [0, 0]
    )
    # chosen on a tenth, then trained anew on the whole
    assert seen == [(180, 20, set()), (200, 50, set())] * 2
    # nothing to choose, nothing trained
    assert linprobe.choose(None, train, None, settings[:1], 0) == settings[0]


def test_k_and_rate_are_chosen_with_the_held_out_part():
    """Labels that only the nearest neighbour knows (every video has a twin), and test videos
    that k = 200 would get right.
    """
    rng = torch.Generator().manual_seed(0)
    twins = torch.nn.functional.normalize(torch.randn(200, 1, 3, generator=rng), dim=-1)
    train = torch.cat([twins, twins + 1e-4])
    labels = torch.randint(2, (200,), generator=rng).repeat(2)
    truth = linprobe.knn(train, labels, twins, [{"k": 200}], 0, classes=2)[0]  # what k = 200 says
    probe, ks = partial(linprobe.knn, classes=2), [{"k": 200}, {"k": 1}]
    known = {"labels": labels, "truth": truth}
    result = linprobe.repeat("knn", probe, ks, train, twins, seeds=[0, 1, 2], **known)
    assert result["knn_chosen"] == [{"k": 1}] * 3 and result["knn"] < 0.95
    assert linprobe.repeat("knn", probe, ks[:1], train, twins, seeds=[0], **known)["knn"] == 1


def test_intervals():
    assert t_interval([0.5]) is None
    margin = 4.302653 / 3**0.5
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx([2 - margin, 2 + margin], abs=1e-3)
    values = np.arange(31.0)
    margin = 2.042272 * values.std(ddof=1) / 31**0.5
    assert t_interval(values) == pytest.approx([15 - margin, 15 + margin], abs=1e-2)
    assert bootstrap(np.ones(50)) == [1, 1] and bootstrap(np.zeros(50)) == [0, 0]
    half = np.arange(400) % 2.0  # a binomial of 400: 0.5 +- 1.96 * 0.025
    assert bootstrap(half) == pytest.approx([0.451, 0.549], abs=0.005)
    assert bootstrap(half, seed=1) == bootstrap(half, seed=1)


def test_intervals_in_words():
    assert linprobe.interval_text(None) == "one seed"
    assert linprobe.interval_text([0.1, 0.2]) == "0.100 to 0.200"
    low, high = t_interval([0.1, 0.1, 0.1])
    assert low != high  # by rounding
    assert linprobe.interval_text([low, high]) == "always 0.100"


# ---- the attentive probe -------------------------------------------------------------------------


def test_the_attentive_probe_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    probe, tokens = attentive.AttentiveProbe(24, 3, 5), 3 * torch.randn(4, 10, 24) + 1
    probe.query.data *= 200  # an attention that is far from uniform
    reference = torch.nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
    reference.in_proj_weight.data = torch.cat(
        [torch.eye(24), probe.key.weight.data, probe.value.weight.data]
    )
    reference.out_proj.weight.data = torch.eye(24)
    normed = torch.nn.LayerNorm(24)(tokens)
    pooled, attention = reference(probe.query.reshape(1, 1, 24).expand(4, 1, 24), normed, normed)
    assert attention.max() > 0.3
    assert torch.allclose(
        attentive.classify_all([probe], tokens)[0], probe.classifier(pooled[:, 0]), atol=1e-5
    )


def test_the_attentive_probe_finds_the_token_that_tells():
    """The class is one token's, at a random place; the others are louder in sum. Each rate is
    trained as if alone.
    """
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(3, size=500))
    tokens = rng.normal(size=(500, 12, 16)).astype(np.float16)
    one_hot = np.eye(16, dtype=np.float16)
    tokens[np.arange(500), rng.integers(12, size=500)] = 3 * one_hot[labels] + 6 * one_hot[9]
    tokens[499] = np.nan  # a failed test video: any prediction will do
    train = TokenRows(tokens, torch.arange(300))
    test = TokenRows(tokens, torch.arange(300, 500))
    probe = partial(attentive.attentive, heads=2, classes=3, epochs=20)
    settings = [{"rate": 1e-5}, {"rate": 1e-2}]
    predicted = probe(train, labels[:300], test, settings, 0)
    assert (
        (predicted[1] == labels[300:])[:-1].float().mean()
        > 0.9
        > 0.6
        > (predicted[0] == labels[300:]).float().mean()
    )
    assert torch.equal(probe(train, labels[:300], test, settings[1:], 0)[0], predicted[1])
    assert linprobe.choose(probe, train, labels[:300], settings, 0) == settings[1]


@pytest.mark.parametrize("least, epochs", ((0, 2), (6, 2), (7, 3), (30, 10)))
def test_the_attentive_probe_adds_epochs_on_a_small_training_set(monkeypatch, least, epochs):
    """The rate falls along half a cosine over all of them."""
    rates = []
    true = torch.optim.AdamW.step

    def step(self):
        rates.append(self.param_groups[0]["lr"])
        return true(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    tokens = np.zeros((130, 2, 8), np.float16)
    train = TokenRows(tokens, torch.arange(130))  # three batches of at most 64
    labels = torch.arange(130) % 3
    probe = partial(attentive.attentive, heads=2, classes=3, epochs=2, least_steps=least)
    probe(train, labels, train, [{"rate": 1e-3}], 0)
    assert len(rates) == 3 * epochs
    done = np.arange(3 * epochs) / (3 * epochs)
    assert rates == pytest.approx(1e-3 * np.cos(np.pi / 2 * done) ** 2)


# ---- features ------------------------------------------------------------------------------------


FAST = ("--workers", 0, "--epochs", 2, "--seeds", 1, "--k", 5)
UNTRAINED = ("--checkpoint", "none", "--size", "tiny")
KINDS = ("features", "tokens")


def both(world):
    return "--data", world / "data/train.csv", "--test", world / "data/val.csv"


def of(folder, array):
    return np.load(folder / f"{array}.npy")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Four videos of 96 x 48 pixels and 24 frames, the third broken: a manifest for both
    training and testing.
    """
    folder = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(0)
    for row in range(4):
        coarse = rng.integers(0, 255, (24, 6, 12, 3), dtype=np.uint8)
        toy.write_video(folder / f"{row}.mp4", coarse.repeat(8, axis=1).repeat(8, axis=2))
    (folder / "2.mp4").write_bytes(b"broken")
    (folder / "all.csv").write_text(
        "path,label\n" + "".join(f"{row}.mp4,{row // 2}\n" for row in range(4))
    )
    return folder, ("--data", folder / "all.csv", "--test", folder / "all.csv", *UNTRAINED, *FAST)


@pytest.mark.parametrize("sampling", ("dense", "uniform"))
def test_features_and_tokens_are_written_out_means_over_clips_and_crops(wide, tmp_path, sampling):
    folder, flags = wide
    run(
        "linprobe.py",
        *flags,
        *"--image-size 32 --clips 2 --crops 3".split(),
        "--sampling",
        sampling,
        *"--attentive --token-grid 2 2 1".split(),
        "--out",
        tmp_path,
    )
    torch.manual_seed(0)
    model, means, pooled = VideoMAE("tiny", image_size=32).eval(), [], []
    for where in {"dense": (0, 1), "uniform": (0, 0.5)}[sampling]:  # of the room; of each part
        times = (
            uniform_times(0, 2.4, 10, 8, where)
            if sampling == "uniform"
            else clip_times(0, 2.4, 10, 8, 2, where)
        )
        frames = read_frames(folder / "1.mp4", times, 32)
        for crop in (frames[:, :, :32], frames[:, :, 16:48], frames[:, :, 32:]):
            with torch.no_grad():
                tokens = model.encode(
                    normalize(torch.from_numpy(crop.copy()).permute(3, 0, 1, 2)[None])
                )[0]
            means.append(tokens.mean(0))
            # (t h w) 4 4 4 -> 2 2 1
            pooled.append(tokens.reshape(2, 2, 2, 2, 4, 96).mean((1, 3, 4)).reshape(4, 96))
    features, stored = of(tmp_path, "test.features"), of(tmp_path, "test.tokens")
    assert (features.shape, features.dtype, stored.shape, stored.dtype) == (
        (4, 96),
        np.float32,
        (4, 24, 96),
        np.float16,
    )
    assert np.allclose(features[1], torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert np.allclose(stored[1], torch.cat(pooled), rtol=2e-3, atol=2e-3)
    assert (
        np.isnan(features[2]).all()
        and np.isnan(stored[2]).all()
        and np.isfinite(features[[0, 1, 3]]).all()
    )
    assert np.allclose(of(tmp_path, "train.features"), features, equal_nan=True)
    result = json.loads((tmp_path / "label.json").read_text())
    assert (result["train"], result["test"], result["unreadable"], result["classes"]) == (
        3,
        4,
        2,
        2,
    )
    about = {kind: json.loads((tmp_path / f"test.{kind}.json").read_text()) for kind in KINDS}
    assert about["tokens"]["token_grid"] == [2, 2, 1]
    assert "token_grid" not in about["features"]  # so that another grid makes no new features
    # the broken one is wrong
    assert max(result[probe] for probe in ("linear", "knn", "attentive", "majority")) <= 0.75


def test_random_views_are_a_pure_function_of_seed_row_and_view(wide, tmp_path):
    folder, flags = wide
    flags += ("--augment", 3, "--attentive")
    run("linprobe.py", *flags, "--out", tmp_path / "a")
    run("linprobe.py", *flags, "--out", tmp_path / "b", "--batch-size", 1, "--workers", 1)
    features, again = of(tmp_path / "a", "train.features"), of(tmp_path / "b", "train.features")
    assert features.shape == (4, 3, 96) and of(tmp_path / "a", "test.features").shape == (4, 96)
    assert np.allclose(features, again, atol=1e-5, equal_nan=True) and np.isnan(features[2]).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (abs(features[:, a] - features[:, b]).max(1)[[0, 1, 3]] > 1e-3).all()
    assert of(tmp_path / "a", "train.tokens").shape == (4, 128, 96)  # clean
    videos = read_manifest(folder / "all.csv")

    def views(videos, flip=False, augment=20, seed=0):
        sizes = {"frames": 8, "stride": 2, "image_size": 48}
        return RandomViews(videos, augment=augment, flip=flip, seed=seed, **sizes)

    plain, flipped = (views(videos, flip=flip)[1][1] for flip in (False, True))
    fewer = views(videos[1:], augment=2)[0]  # the row counts, not the place in the list
    assert fewer[0] == 1 and torch.equal(fewer[1], plain[:2])
    assert plain.shape == (20, 3, 8, 48, 48) and plain.dtype == torch.uint8
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(plain, flipped)]
    assert 3 < sum(mirrored) < 17 and all(
        torch.equal(a, b) for a, b, mirror in zip(plain, flipped, mirrored) if not mirror
    )
    assert not any(torch.equal(a, b) for a, b in zip(plain, views(videos, seed=1)[1][1]))
    run("linprobe.py", *flags, "--out", tmp_path / "a", "--no-flip", "--sampling", "uniform")
    assert abs(of(tmp_path / "a", "train.features") - features)[[0, 1, 3]].max() > 1e-3


def test_a_half_made_extraction_goes_on(world, tmp_path):
    flags = (*both(world), *UNTRAINED, *FAST, "--batch-size", 8, "--attentive")
    run("linprobe.py", *flags, "--out", tmp_path / "whole")
    half = tmp_path / "half"
    out = run("linprobe.py", *flags, "--out", half, "--max-steps", 2)
    assert out == "16 of 32 train videos are done; run it again to go on\n"
    array = np.load(half / "train.features.npy", mmap_mode="r+")
    assert np.isfinite(array[:16]).all() and np.isnan(array[16:]).all()
    # no result of a part
    assert not list(half.glob("label.json*")) and not (half / "test.features.npy").exists()
    array[3] = 7
    del array
    run("linprobe.py", *flags, "--out", half)
    assert (of(half, "train.features")[3] == 7).all()  # what was there has not been made again
    array = np.load(half / "train.features.npy", mmap_mode="r+")
    array[3] = of(tmp_path / "whole", "train.features")[3]
    del array
    for name in ("train.features", "test.features", "train.tokens", "test.tokens"):
        assert (half / f"{name}.npy").read_bytes() == (tmp_path / f"whole/{name}.npy").read_bytes()
        assert (half / f"{name}.json").read_text() == (tmp_path / f"whole/{name}.json").read_text()


def test_features_are_reused_until_something_changes(copy):
    flags = ("--checkpoint", "c.pt", "--size", "tiny", *FAST, "--clips", 1, "--out", "p")
    path = copy / "p/train.features.npy"

    def marked(*more):
        """Marks the features with a seven and runs again: is it still there?"""
        array = np.load(path, mmap_mode="r+")
        array[0] = 7
        del array
        run("linprobe.py", *flags, *more, cwd=copy)
        return bool((np.load(path)[0] == 7).all())

    torch.save({"model": VideoMAE("tiny").state_dict()}, copy / "c.pt")
    run("linprobe.py", *flags, cwd=copy)
    assert marked() and marked("--label-column", "object") and marked("--seed", 1)
    sweep = (copy / "p/label.json").read_bytes()
    assert marked("--protocol", "videomae")
    assert json.loads((copy / "p/label.videomae.json").read_text())["protocol"] == "videomae"
    assert (copy / "p/label.json").read_bytes() == sweep
    assert not marked("--resume", "none") and marked("--resume", "auto")
    assert not marked("--stride", 1) and not marked("--crops", 2) and not marked("--augment", 1)
    assert not marked("--augment", 1, "--seed", 1) and not marked()
    torch.save({"model": VideoMAE("tiny").state_dict()}, copy / "c.pt")
    assert not marked() and marked()
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/train.csv").write_text(
        "\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n"
    )
    assert not marked()


# ---- the command ---------------------------------------------------------------------------------


def test_end_to_end(world, tmp_path):
    flags = (*both(world), *UNTRAINED, "--attentive", "--seeds", 2, "--epochs", 20)
    out = run("linprobe.py", *flags, "--workers", 0, "--out", tmp_path, process=True)
    result = json.loads((tmp_path / "label.json").read_text())
    assert [
        result[key]
        for key in ("label", "checkpoint", "classes", "train", "test", "unreadable", "seed")
    ] == ["label", "none", 8, 32, 24, 0, 0] and 0 < result["majority"] < 0.5
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for probe, settings in (("linear", {"rate", "decay"}), ("knn", {"k"}), ("attentive", {"rate"})):
        seeds, (low, high), (least, most) = (
            result[f"{probe}_{key}"] for key in ("seeds", "interval", "bootstrap")
        )
        assert len(seeds) == 2 and result[probe] == pytest.approx(sum(seeds) / 2) == pytest.approx(
            (low + high) / 2
        )
        assert (
            high - low == pytest.approx(12.706 * abs(seeds[0] - seeds[1]), abs=1e-6)
            and least <= result[probe] <= most
        )
        assert len(result[f"{probe}_chosen"]) == 2 and set(result[f"{probe}_chosen"][0]) == settings
        assert (
            f"{result[probe]:.3f}" in lines[probe] and f"{least:.3f} to {most:.3f}" in lines[probe]
        )
    assert f"{result['majority']:.3f}" in lines["majority"]
    run("linprobe.py", *flags, "--workers", 0, "--out", tmp_path / "again")
    # a pure function of the seed
    assert json.loads((tmp_path / "again/label.json").read_text()) == result


def test_two_ranks_are_one(world, tmp_path):
    flags = (*both(world), *UNTRAINED, *FAST, "--augment", 2, "--attentive")
    run("linprobe.py", *flags, "--out", tmp_path / "two", ranks=2)
    run("linprobe.py", *flags, "--out", tmp_path / "one")
    for name, close in (
        ("train.features", 1e-5),
        ("test.features", 1e-5),
        ("train.tokens", 2e-3),
        ("test.tokens", 2e-3),
    ):
        one, two = of(tmp_path / "one", name), of(tmp_path / "two", name)
        assert np.isfinite(one).all() and np.allclose(one, two, rtol=close, atol=close)
    results = [
        json.loads((tmp_path / f"{ranks}/label.json").read_text()) for ranks in ("one", "two")
    ]
    assert results[0]["knn"] == pytest.approx(results[1]["knn"], abs=0.1)


def test_max_steps_ends_with_the_number_of_videos_tried(copy, tmp_path):
    """On every rank's part, broken videos included; a run that needs no more steps than that
    gives a result.
    """
    flags = (*UNTRAINED, *FAST, "--clips", 1, "--batch-size", 8, "--max-steps", 1, "--out", "p")
    lines = (copy / "data/train.csv").read_text().splitlines()
    lines[2] = "gone.mp4" + lines[2][lines[2].index(",") :]
    (copy / "data/train.csv").write_text("\n".join(lines) + "\n")
    tried = lambda name, count, of: f"{count} of {of} {name} videos are done; run it again to go on"
    assert run("linprobe.py", *flags, cwd=copy).splitlines()[-1] == tried("train", 8, 32)
    for batch, last in ((8, tried("train", 23, 32)), (5, tried("test", 10, 24))):
        # 7 + 16 of 25, then 10 of the last 10
        children = two_ranks(tmp_path, probing, copy, "--batch-size", batch, "--max-steps", 1)
        assert [child.code(60) for child in children] == [0, 0]
        assert (
            children[0].printed().splitlines()[-1] == last and "done" not in children[1].printed()
        )
    assert run("linprobe.py", *flags, cwd=copy).splitlines()[-1] == tried("test", 18, 24)
    assert not list((copy / "p").glob("label.json*"))
    run("linprobe.py", *flags, cwd=copy)
    result = json.loads((copy / "p/label.json").read_text())
    assert (result["train"], result["test"], result["unreadable"]) == (31, 24, 1)


def test_features_of_another_root_are_not_reused(world, copy):
    """The same names in a folder of other videos."""
    other = copy / "other"
    other.mkdir()
    (other / "videos").mkdir()
    (other / "videos/train").symlink_to(copy / "data/videos/val")
    (other / "videos/val").symlink_to(copy / "data/videos/val")
    flags = (
        *UNTRAINED,
        *FAST,
        *"--clips 1 --out p --data few.csv --test data/val.csv".split(),
    )
    (copy / "few.csv").write_text(
        "path,label\n"
        + "".join(
            f"videos/train/{row:05d}.mp4,{('move up', 'move down')[row % 2]}\n" for row in range(8)
        )
    )
    run("linprobe.py", *flags, "--root", "data", cwd=copy)
    first = of(copy / "p", "train.features").copy()
    run("linprobe.py", *flags, "--root", copy / "data", cwd=copy)  # the same folder, told otherwise
    assert np.array_equal(of(copy / "p", "train.features"), first)
    mark = np.load(copy / "p/test.features.npy", mmap_mode="r+")
    mark[0] = 7
    del mark
    run("linprobe.py", *flags, "--root", "other", cwd=copy)
    assert not np.array_equal(of(copy / "p", "train.features"), first)
    assert (of(copy / "p", "test.features")[0] != 7).any()
    assert np.array_equal(of(copy / "p", "train.features"), of(copy / "p", "test.features")[:8])


def test_a_checkpoint_brings_its_own_settings(copy):
    run(
        "pretrain.py",
        *"--size tiny --frames 4 --stride 3 --batch-size 8 --epochs 1 --workers 0".split(),
        cwd=copy,
    )
    out = run(
        "linprobe.py",
        *"--checkpoint runs/text/checkpoint.pt --workers 1 --clips 1".split(),
        cwd=copy,
    )
    about = json.loads((copy / "runs/text/probe/train.features.json").read_text())
    assert (about["size"], about["frames"], about["stride"], about["clips"]) == (
        "tiny",
        4,
        3,
        1,
    ) and "knn" in out


def test_unreadable_unknown_and_few(copy):
    flags = (*UNTRAINED, *FAST, "--attentive", "--clips", 1, "--out", "p")
    lines = (copy / "data/val.csv").read_text().splitlines()
    lines[1] = "missing.mp4" + lines[1][lines[1].index(",") :]
    lines[2] = lines[2].split(",")[0] + ",fly,bird,sea,a bird,a fish"
    (copy / "data/val.csv").write_text("\n".join(lines) + "\n")
    out = run("linprobe.py", *flags, cwd=copy)
    assert "data/val.csv: classes that are not among the 8 trained count as wrong: fly\n" in out
    result = json.loads((copy / "p/label.json").read_text())
    assert result["test"] == 24 and result["unreadable"] == 1
    # five videos, one of class 900, labels with gaps; the sweep holds one out, k is cut to those
    # there are
    (copy / "few.csv").write_text(
        "path,label\n"
        + "".join(
            f"data/videos/train/{row:05d}.mp4,{label}\n"
            for row, label in enumerate((3, 3, 900, 7, 7))
        )
        + "gone.mp4,8\n"
    )
    flags = (
        *UNTRAINED,
        *"--attentive --clips 1 --out q --data few.csv --test few.csv --workers 0".split(),
    )
    out = run("linprobe.py", *flags, "--epochs", 60, cwd=copy)
    result = json.loads((copy / "q/label.json").read_text())
    assert (result["train"], result["test"], result["classes"], result["unreadable"]) == (
        5,
        6,
        3,
        2,
    ) and "wrong: 8" in out
    assert (
        result["knn"] == pytest.approx(5 / 6)
        and result["linear"] <= 5 / 6
        and result["majority"] == pytest.approx(2 / 6)
    )
    (copy / "one.csv").write_text("path,label\ndata/videos/train/00000.mp4,3\ngone.mp4,8\n")
    refusal = run("linprobe.py", *flags, "--data", "one.csv", cwd=copy, fails=True)
    assert refusal == "one.csv: found 1 readable video, expected 2 or more"


def test_labels_without_a_common_class_are_refused_before_videos_are_read(copy):
    names = [line.split(",")[0] for line in (copy / "data/val.csv").read_text().splitlines()[1:]]
    rows = [f"data/{name},class {row}\n" for row, name in enumerate(names)]
    (copy / "other.csv").write_text("path,label\n" + "".join(rows))
    flags = (*UNTRAINED, *FAST, "--test", "other.csv", "--data", "few.csv", "--out", "p")
    (copy / "few.csv").write_text(
        "path,label\n" + "".join(f"data/{name},{row}\n" for row, name in enumerate(names[:10]))
    )
    refusal = run("linprobe.py", *flags, cwd=copy, fails=True)
    assert refusal == (
        "other.csv: none of its labels is among the classes 0, 1, 2, 3, 4, 5, 6, 7, ..."
    )
    assert not (copy / "p").exists()
    # a long list of unknown classes is cut
    (copy / "few.csv").write_text("path,label\n" + "".join(rows[:3]))
    out = run("linprobe.py", *flags, cwd=copy)
    line = next(line for line in out.splitlines() if line.startswith("other.csv: classes"))
    assert line.startswith("other.csv: classes that are not among the 3 trained count as wrong: ")
    assert line.count("class ") == 20 and line.endswith(", ...")


def test_a_test_set_of_which_nothing_can_be_read_is_refused(copy):
    (copy / "broken.mp4").write_bytes(b"broken")
    (copy / "broken.csv").write_text("path,label\nbroken.mp4,move up\n")
    flags = (*UNTRAINED, *FAST, "--test", "broken.csv", "--clips", 1, "--out", "p")
    assert run("linprobe.py", *flags, cwd=copy, fails=True) == (
        "broken.csv: found 0 readable videos, expected 1 or more: the reasons are above (paths "
        "start at .; --root names another folder)"
    )
    assert not (copy / "p/label.json").exists()


def test_a_checkpoint_that_diverged_is_named(copy):
    state = VideoMAE("tiny").state_dict()
    torch.save(
        {"model": state | {"encoder.norm.weight": torch.full((96,), torch.nan)}}, copy / "c.pt"
    )
    flags = ("--checkpoint", "c.pt", "--size", "tiny", *FAST, "--clips", 1, "--out", "p")
    assert run("linprobe.py", *flags, cwd=copy, fails=True) == (
        "--checkpoint c.pt: its weights are not finite, and so would be its features: the "
        "training diverged; take an earlier checkpoint, or train with a lower learning rate"
    )
    assert not (copy / "p").exists()
    # weights that are finite, but too large
    torch.save({"model": state | {"encoder.norm.weight": torch.full((96,), 3e38)}}, copy / "c.pt")
    child = Child(copy / "child", probing, copy, *flags)
    assert child.code(60) == 1
    out = child.printed()
    assert out.count("its features are not finite") == 32 + 24
    assert "data/videos/train/00003.mp4: its features are not finite" in out
    assert (
        "data/train.csv: found 0 readable videos, expected 2 or more: the reasons are above" in out
    )


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(copy, monkeypatch):
    flags = ("--checkpoint", "c.pt", "--size", "tiny", *FAST, "--clips", 1, "--out", "p")
    state = VideoMAE("tiny").state_dict()
    torch.save({"model": state}, copy / "c.pt")
    find_head = linprobe.find_head

    def replace(path):
        torch.save({"model": state | {"encoder.norm.bias": torch.ones(96)}}, path)
        return find_head(path)

    monkeypatch.setattr(linprobe, "find_head", replace)
    assert run("linprobe.py", *flags, cwd=copy, fails=True) == (
        "--checkpoint c.pt: was replaced while it was read: run it again"
    )
    assert not (copy / "p").exists()


def test_one_class_that_can_be_read_is_refused(copy):
    """The manifest has two, but the videos of the other are damaged."""
    lines = (copy / "data/train.csv").read_text().splitlines()
    rows = [f"videos/{name},{label}" for name, label in (("a.mp4", "x"), ("b.mp4", "y"))]
    rows += [f"{line.split(',')[0]},x" for line in lines[1:4]]
    (copy / "data/few.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    videos = copy / "data/videos"
    real = videos.resolve()
    videos.unlink()
    shutil.copytree(real, videos)
    for name in ("a.mp4", "b.mp4"):
        (videos / name).write_bytes(b"bad")
    (copy / "data/test.csv").write_text("\n".join(["path,label", *rows[2:]]) + "\n")
    flags = (*UNTRAINED, *FAST, "--data", "data/few.csv", "--test", "data/test.csv", "--out", "p")
    assert run("linprobe.py", *flags, cwd=copy, fails=True) == (
        "data/few.csv: all of its readable videos are of class 'x'"
    )


def test_the_result_tells_its_settings(copy):
    flags = (*UNTRAINED, *FAST, "--augment", 2, "--no-flip", "--crops", 3, "--out", "p")
    run("linprobe.py", *flags, cwd=copy)
    clip = {"frames": 8, "stride": 2, "image_size": 48, "sampling": "dense"}
    assert json.loads((copy / "p/label.json").read_text())["settings"] == {
        "size": "tiny",
        "weights": "none 0",
        "token_grid": None,
        "data": "data/train.csv",
        "test": "data/val.csv",
        "train_views": clip | {"augment": 2, "flip": False, "seed": 0},
        "test_views": clip | {"clips": 2, "crops": 3},
        "epochs": 2,
        "k": [5],
    }


def test_max_steps_reads_no_video_beyond_them(copy, monkeypatch):
    read = []
    of_video = Views.__getitem__
    monkeypatch.setattr(
        Views, "__getitem__", lambda self, row: read.append(row) or of_video(self, row)
    )
    flags = (*UNTRAINED, *FAST, "--clips", 1, "--batch-size", 1, "--max-steps", 1, "--out", "p")
    run("linprobe.py", *flags, cwd=copy)
    assert read == [0]


@pytest.mark.parametrize(
    "flags, refusal",
    [
        (("--no-flip",), "--no-flip is for --augment"),
        (("--token-grid", 1, 1, 1), "--token-grid is for --attentive"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(tmp_path, flags, refusal):
    assert refusal in run("linprobe.py", *UNTRAINED, *flags, cwd=tmp_path, fails=True)


def test_refusals(copy):
    line = run("linprobe.py", "--checkpoint", "nowhere.pt", cwd=copy, fails=True)
    assert line.startswith("--checkpoint nowhere.pt: no checkpoint there (")
    (copy / "shards").mkdir()
    (copy / "shards/model.safetensors.index.json").touch()
    line = run("linprobe.py", "--checkpoint", "shards", cwd=copy, fails=True)
    assert line.startswith("--checkpoint shards: its weights are in several files")
    (copy / "garbage.pt").write_bytes(b"not a checkpoint")
    refusal = run(
        "linprobe.py", "--checkpoint", "garbage.pt", "--size", "tiny", cwd=copy, fails=True
    )
    assert "garbage.pt: no checkpoint" in refusal
    assert "'verb'" in run(
        "linprobe.py", "--checkpoint", "none", "--label-column", "verb", cwd=copy, fails=True
    )
    assert "--token-grid [9, 1, 1]: expected" in run(
        "linprobe.py", *UNTRAINED, "--attentive", "--token-grid", 9, 1, 1, cwd=copy, fails=True
    )
    for flag in "--seeds --clips --crops --k --epochs --max-steps --batch-size --stride".split():
        refusal = run("linprobe.py", *UNTRAINED, flag, 0, cwd=copy, fails=True)
        assert f"argument {flag}: expected 1 to " in refusal and ", found 0 (" in refusal
    refusal = run("linprobe.py", *UNTRAINED, "--video-timeout=-1", cwd=copy, fails=True)
    assert "argument --video-timeout: expected a finite number, " in refusal
    assert ", found -1 (" in refusal
    assert "argument --augment: expected 0 to 100, found 1000" in run(
        "linprobe.py", *UNTRAINED, "--augment", 1000, cwd=copy, fails=True
    )
    (copy / "file").write_text("")
    assert (
        run("linprobe.py", *UNTRAINED, "--out", "file", cwd=copy, fails=True)
        == "--out file: is a file, expected a folder"
    )
    assert not (copy / "runs").exists()
    (copy / "data/val.csv").write_text("path,label\nvideos/val/00001.mp4,\n")
    assert "has no label" in run(
        "linprobe.py", "--checkpoint", "none", "--size", "tiny", cwd=copy, fails=True
    )


# ---- stopped -------------------------------------------------------------------------------------


def probing(copy, *more):
    """main() in the folder `copy`, for a Child."""
    os.chdir(copy)
    linprobe.main([str(flag) for flag in (*UNTRAINED, *FAST, "--clips", 1, "--out", "p", *more)])


def say_and_sleep(*_, **__):
    print("ready")
    time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_loading_and_probing_at_once(copy, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(linprobe, "load_encoder", say_and_sleep)
        child = Child(tmp_path / "loading", probing, copy)
        child.says("ready")
        child.kill(number)
        assert child.code(3) == -number and child.printed() == "ready\n"
    with monkeypatch.context() as patch:
        patch.setattr(linprobe, "fit_linear", say_and_sleep)
        child = Child(tmp_path / "probing", probing, copy)
        child.says("ready", 60)
        child.kill(number)
        assert child.code(3) == -number
        name = signal.Signals(number).name
        assert child.printed().endswith(
            f"ready\n\n{name}: ended: the features are kept, run it again\n"
        )
    assert {path.name for path in (copy / "p").iterdir()} == {
        f"{split}.features.{kind}" for split in ("train", "test") for kind in ("npy", "json")
    }
    mark = np.load(copy / "p/train.features.npy", mmap_mode="r+")
    mark[0] = 7
    del mark
    run("linprobe.py", *UNTRAINED, *FAST, "--clips", 1, "--out", "p", cwd=copy)
    assert (of(copy / "p", "train.features")[0] == 7).all() and (copy / "p/label.json").exists()


def slow_encode(encode):
    def slowly(self, video, mask=None):
        print("a batch")
        time.sleep(0.3)
        return encode(self, video, mask)

    return slowly


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_an_extraction_after_its_batch(copy, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(VideoMAE, "encode", slow_encode(VideoMAE.encode))
    child = Child(tmp_path / "out", probing, copy, "--batch-size", 4, "--workers", workers)
    child.says(" 1/8 ", 60)
    child.kill(signal.SIGTERM)
    assert child.code(10) == -15
    out = child.printed()
    assert (
        "SIGTERM: ending after this batch; once more ends at once" in out
        and "SIGTERM: stopped; run it again to go on" in out
    )
    features = of(copy / "p", "train.features")
    done = int(np.isfinite(features).all(1).sum())
    assert (
        done in (4, 8, 12)
        and np.isnan(features[done:]).all()
        and not list((copy / "p").glob("label*"))
    )


def test_two_ranks_stop_while_features_are_made_and_while_rank_0_probes(
    copy, tmp_path, monkeypatch
):
    """One rank told: both end by the signal. While rank 0 probes, the other has ended well."""
    with monkeypatch.context() as patch:
        patch.setattr(VideoMAE, "encode", slow_encode(VideoMAE.encode))
        children = two_ranks(tmp_path, probing, copy, "--batch-size", 2)
        for child in children:
            child.says("a batch", 60)
            child.kill(signal.SIGTERM)
        assert [child.code(20) for child in children] == [-15, -15]
    patch = monkeypatch
    patch.setattr(linprobe, "fit_linear", say_and_sleep)
    children = two_ranks(tmp_path, probing, copy)
    children[0].says("ready", 60)
    assert children[1].code(10) == 0
    children[0].kill(signal.SIGTERM)
    assert children[0].code(3) == -15 and not (copy / "p/label.json").exists()
