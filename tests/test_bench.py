"""experiments/bench.py: honest arithmetic, alternating order, sides that compute the same, and
tables that land where they belong. The speeds themselves are not tested."""

import importlib
import json
import statistics
from functools import partial
from types import SimpleNamespace

import bench
import bench_models
import bench_videos
import measure
import numpy as np
import peers
import pytest
import torch
from conftest import ROOT, run


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    peers.make_videos(folder, count=2, size=(96, 128), frames=170)
    return folder


@pytest.fixture
def thin(monkeypatch):
    """A ViT-B of one narrow block each: the sections' code in seconds."""
    sizes = bench_models.models.SIZES
    narrow = {"width": 64, "depth": 1, "heads": 2}
    narrow |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    monkeypatch.setitem(sizes, "base", sizes["base"] | narrow)


# ---- arithmetic and tables -----------------------------------------------------------------------


def test_pairs_alternate_and_the_warm_up_is_not_counted(monkeypatch):
    calls = []
    clock = iter(np.cumsum([0] + [1, 100] * 100))  # a second per call, a hundred between two
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    seconds = measure.pairs(
        lambda i: calls.append(("ours", i)), lambda i: calls.append(("peer", i)), 3
    )
    assert [name for name, _ in calls[2:]] == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert sorted(calls[2:]) == [(name, i) for name in ("ours", "peer") for i in range(3)]
    assert (seconds == 1).all() and seconds.shape == (2, 3)


def test_a_ratio_is_the_median_of_the_pairs_ratios():
    ours = [1.0, 2.0, 10.0, 1.5, 4.0]
    theirs = [3.0, 3.0, 11.0, 6.0, 5.0]
    seconds = np.array([ours, theirs])
    row = measure.compare("work", "peer", seconds, per=4, aim="at least", bound=1.25)
    assert row["ratio"] == statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    assert row["ratio"] == 1.5 != statistics.median(theirs) / statistics.median(ours)
    assert row["quartiles"] == [1.25, 3.0] and row["pairs"] == 5
    assert (row["ms"], row["peer's ms"]) == (500, 1250)
    assert row["aim"] == "at least 1.25: reached"
    slower = measure.compare("work", "peer", seconds, aim="at most", bound=0.6)
    expected = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    assert slower["ratio"] == pytest.approx(expected)
    assert slower["aim"] == "at most 0.6: not reached"
    unbound = measure.compare("work", "peer", seconds, aim="at most")
    assert (unbound["ratio"], unbound["aim"]) == (slower["ratio"], "at most")


def test_tables():
    rows = [{"a": 1.0, "b": [0.5, 2.0]}, {"a": 12345.6}, {"c": "x"}]
    assert measure.tables(rows) == (
        "| a | b |\n|---|---|\n| 1 | 0.5 to 2 |\n| 12,346 |  |\n\n| c |\n|---|\n| x |\n"
    )


def test_the_page_shows_what_was_measured():
    results = json.loads((ROOT / "experiments/bench.json").read_text())
    page = (ROOT / "experiments/BENCHMARKS.md").read_text()
    assert set(results) == set(bench.SECTIONS)
    for name, result in results.items():
        assert f"<!-- {name} -->\n" in page
        assert bench.replace_section(page, name, result) == page


def test_refusals_and_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(["decode", "speed"])
    assert "no section speed" in capsys.readouterr().err
    assert "soak" not in bench.parse_args([]).sections
    trial = partial(importlib.import_module, "a_peer_that_is_not_there")
    row = measure.missing("work", "peer", trial)
    assert row["ratio"] == "not installed"

    def without_ffmpeg():
        raise OSError("libavcodec.so.59: cannot open shared object file")

    row = measure.missing("work", "peer", without_ffmpeg)
    assert row["ratio"] == "cannot be used: libavcodec.so.59: cannot open shared object file"


# ---- sections that read videos -------------------------------------------------------------------


def test_made_videos_are_as_asked(videos):
    files = list(peers.find_videos(videos, None).values())
    found = [(file.gop, file.short, len(file.times)) for file in files]
    assert found == [(170, 96, 170), (70, 96, 170)]
    assert np.allclose(files[0].times[:-1], (np.arange(169) + 0.5) / 30, atol=1e-3)
    assert peers.clip_frames(files[0], 0.0)[0] == 0
    assert peers.clip_frames(files[0], 0.9999)[-1] == 169


def test_sections_of_videos(videos, tmp_path):
    pytest.importorskip("decord")
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(
        "# Text\n<!-- decode -->\nold\n<!-- end of decode -->\nbetween\n"
        "<!-- paper -->\n<!-- end of paper -->\nafter\n"
    )
    flags = ("--videos", videos, "--repeats", 2, "--files", 1, "--out", tmp_path / "bench.json")
    out = run("experiments/bench.py", "decode", "sample", *flags)
    first = json.loads((tmp_path / "bench.json").read_text())
    assert set(first) == {"decode", "sample"}
    assert first["decode"]["threads"] == 1 and "torch" in first["decode"]["machine"]

    rows = [row for row in first["decode"]["rows"] if "work" in row]
    assert len(rows) == 6
    for row in rows:
        if "torchcodec" not in row["peer"]:
            low, high = row["quartiles"]
            assert 0 < low <= row["ratio"] <= high
    same = {row["pixels against"]: row for row in first["decode"]["rows"] if "work" not in row}
    assert same["PyAV, decoding all"]["identical"] == same["PyAV, decoding all"]["clips"] == 1
    repeated = [row for row in first["sample"]["rows"] if "--repeat 4" in row["work"]]
    assert [row["work"].split("short side ")[1] for row in repeated] == ["up to 256", "any"]

    run("experiments/bench.py", "reencode", "paper", *flags)
    results = json.loads((tmp_path / "bench.json").read_text())
    text = page.read_text()
    assert set(results) == {"decode", "sample", "reencode", "paper"}
    assert results["decode"] == first["decode"]
    assert "old" not in text and text.count("<!-- decode -->") == 1
    assert text.index("decord get_batch") < text.index("between") < text.index("disk")
    for line in text.splitlines():  # what the page holds was printed
        assert not line.startswith("| 16 frames") or line in out


def test_paper(tmp_path):
    """Of FLOPs follow hours and clips per second, and of those and a sample's time cores."""
    out = tmp_path / "bench.json"
    rows = [
        {"work": "a sample, uint8, short side up to 256", "ms": 7.0},
        {"work": "a sample, uint8, short side any", "ms": 50.0},
    ]
    out.write_text(json.dumps({"sample": {"rows": rows}}))
    found = bench_models.paper(bench.parse_args(["--out", str(out)]), tmp_path)
    maps = np.zeros((1, 3, 16, 14, 14), np.float16)
    assert found[0]["train.saliency.npy, GB"] == maps.nbytes * 240_000 / 1e9
    trained = next(row for row in found if row.get("mask") == "tube 0.9")
    speed = trained["clips/s a GPU"]
    assert trained["cores a GPU"] == pytest.approx(speed * 50 / 1000)
    assert trained["cores, re-encoded"] == "run reencode"
    assert trained["h, 200 epochs"] * 3600 * 8 * speed == pytest.approx(200 * 240_000)


def test_pixels_that_differ_are_an_error(videos, monkeypatch, tmp_path):
    plain = peers.read_plain

    def a_frame_late(path, frames):
        return plain(path, [frames[0] + 1, *frames[1:]])

    monkeypatch.setattr(peers, "read_plain", a_frame_late)
    args = bench.parse_args(["--videos", str(videos), "--repeats", "1"])
    with pytest.raises(AssertionError, match="not what plain decoding gives"):
        bench_videos.decode(args, tmp_path)


def test_growth_and_soak(videos, monkeypatch, tmp_path):
    paths = sorted(map(str, videos.iterdir())) * 2
    assert list(bench_videos.load_clips(paths, 1, 2, 5)) == [2, 4, 6]
    monkeypatch.setattr(bench_videos, "in_a_process", lambda function, path: function(path))
    args = bench.parse_args(["--videos", str(videos), "--repeats", "3", "--clips", "160"])
    rows = bench_videos.growth(args, tmp_path)
    assert [row["clips/s"] > 0 for row in rows[:4]] == [True] * 4
    assert [row["rows of a manifest"] for row in rows[4:]] == [10**3, 10**4, 10**5, 10**6]
    rows = bench_videos.soak(args, tmp_path)
    assert [row["clips"] for row in rows] == list(range(16, 161, 16))
    # this process and four workers, each with its three standard files at least
    assert rows[-1]["MB resident"] > measure.resident() > 50 and rows[-1]["open files"] >= 15


# ---- sections that run models --------------------------------------------------------------------


def test_steps_equal_transformers(thin, tmp_path):
    torch.manual_seed(0)
    models = bench_models.models
    bench_models.checkpoints.save_huggingface(models.VideoMAE("base"), tmp_path)
    settings = (0.9, "float32", tmp_path, 1)
    ours = bench_models.our_step(*settings)
    theirs = bench_models.their_step(*settings)
    half = bench_models.our_step(*settings, keep=0.5)
    first = theirs().item()
    own = ours().item()
    assert own == pytest.approx(first, rel=1e-5)
    # other tokens: their mean loss may be near, but not the same number
    assert half().item() != own
    # so did the optimiser
    second = theirs().item()
    assert ours().item() == pytest.approx(second, rel=1e-4)
    assert second != pytest.approx(first, rel=1e-4)


def test_sections_of_steps(thin, monkeypatch, tmp_path):
    """Their code and rows, with every call made once and no time taken."""

    def call_once(ours, theirs, repeats, warmup=1):
        ours(0)
        theirs(0)
        return np.full((2, repeats), 2.0)

    clip = SimpleNamespace(visual=SimpleNamespace(output_dim=8))
    clip.encode_image = lambda frames: frames
    monkeypatch.setattr(bench_models, "pairs", call_once)
    monkeypatch.setattr(bench_models, "random_clip", lambda: clip)
    monkeypatch.setattr(
        bench_models.saliency,
        "patch_features",
        lambda visual, frames, dense: frames.new_zeros(len(frames), 4, 8),
    )
    args = bench.parse_args(["--steps", "3", "--batch", "1"])
    rows = bench_models.step(args, tmp_path)  # asserts that the losses agree
    assert [row["work"].split(", ", 1)[1] for row in rows[:2]] == [
        "mask 0.9, float32",
        "mask 0.9, float32, --decoder-keep 0.5",
    ]
    assert len(rows) == 8
    assert [rows[i]["aim"] for i in (0, 4)] == [
        "at least 1.05: not reached",
        "at least 1.0: reached",
    ]
    rows = bench_models.overhead(args, tmp_path)
    assert rows[1]["pairs"] == 3
    assert [row["work"].split()[1] for row in rows[2:]] == list(bench_models.masking.RATIOS)
    assert rows[2]["ratio"] == 1 / 32  # 32 masks against 32 steps of one clip
    rows = bench_models.clip_maps(args, tmp_path)
    assert [row["aim"] for row in rows[-2:]] == [
        "at least 1.2: not reached",
        "at most 1.05: reached",
    ]
