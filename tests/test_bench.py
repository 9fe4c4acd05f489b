"""experiments/bench.py: honest arithmetic, alternating order, sides that compute the same, and
tables that land where they belong. The speeds themselves are not tested."""

import json
import statistics
from types import SimpleNamespace

import bench
import numpy as np
import peers
import pytest
from conftest import run


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    peers.make_videos(folder, count=2, size=(96, 128), frames=170)
    return folder


@pytest.fixture
def thin(monkeypatch):
    """A ViT-B of one narrow block each: the sections' code in seconds."""
    monkeypatch.setitem(
        bench.models.SIZES,
        "base",
        bench.models.SIZES["base"]
        | {
            "width": 64,
            "depth": 1,
            "heads": 2,
            "decoder_width": 32,
            "decoder_depth": 1,
            "decoder_heads": 2,
        },
    )


def test_pairs_alternate_and_the_warm_up_is_not_counted(monkeypatch):
    # a second for a call, a hundred between two
    calls, clock = ([], iter(np.cumsum([0] + [1, 100] * 100)))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    seconds = bench.pairs(
        lambda i: calls.append(("ours", i)), lambda i: calls.append(("peer", i)), 3
    )
    assert [name for name, _ in calls[2:]] == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert sorted(calls[2:]) == [(name, i) for name in ("ours", "peer") for i in range(3)]
    assert (seconds == 1).all() and seconds.shape == (2, 3)


def test_a_ratio_is_the_median_of_the_pairs_ratios():
    ours, its = [1.0, 2.0, 10.0, 1.5, 4.0], [3.0, 3.0, 11.0, 6.0, 5.0]
    row = bench.compare("work", "peer", np.array([ours, its]), per=4, aim="at least 1.25")
    assert (
        row["ratio"]
        == statistics.median(b / a for a, b in zip(ours, its))
        == 1.5
        != statistics.median(its) / statistics.median(ours)
    )
    assert row["quartiles"] == [1.25, 3.0] and row["pairs"] == 5
    assert (row["ms"], row["peer's ms"]) == (500, 1250)
    assert row["aim"] == "at least 1.25: reached"
    slower = bench.compare("work", "peer", np.array([ours, its]), aim="at most 0.6")
    assert (
        slower["ratio"] == pytest.approx(statistics.median(a / b for a, b in zip(ours, its)))
        and slower["aim"] == "at most 0.6: not reached"
    )
    assert (
        bench.compare("work", "peer", np.array([ours, its]), aim="at most")["ratio"]
        == slower["ratio"]
    )


def test_made_videos_are_as_asked(videos):
    files = list(peers.find_videos(videos, None).values())
    assert [(file.gop, file.short, len(file.times)) for file in files] == [
        (170, 96, 170),
        (70, 96, 170),
    ]
    assert np.allclose(files[0].times[:-1], (np.arange(169) + 0.5) / 30, atol=1e-3)
    assert (
        peers.clip_frames(files[0], 0.0)[0] == 0 and peers.clip_frames(files[0], 0.9999)[-1] == 169
    )


def test_sections_of_videos(videos, tmp_path):
    pytest.importorskip("decord")
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(
        "# Text\n<!-- decode -->\nold\n<!-- end of decode -->\nbetween\n<!-- paper -->\n<!-- end of paper -->\nafter\n"
    )
    flags = ("--videos", videos, "--repeats", 2, "--files", 1, "--out", tmp_path / "bench.json")
    out = run("experiments/bench.py", "decode", "sample", *flags)
    first = json.loads((tmp_path / "bench.json").read_text())
    assert (
        set(first) == {"decode", "sample"}
        and first["decode"]["threads"] == 1
        and "torch" in first["decode"]["machine"]
    )
    rows = {(row["work"], row["peer"]): row for row in first["decode"]["rows"] if "work" in row}
    assert len(rows) == 6 and all(
        row["ratio"] > 0 and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        for (_, peer), row in rows.items()
        if "torchcodec" not in peer
    )
    same = {row["pixels against"]: row for row in first["decode"]["rows"] if "work" not in row}
    assert same["PyAV, decoding all"]["identical"] == same["PyAV, decoding all"]["clips"] == 1
    repeated = [row for row in first["sample"]["rows"] if "--repeat 4" in row["work"]]
    assert [row["work"].split("short side ")[1] for row in repeated] == ["up to 256", "any"]
    run("experiments/bench.py", "reencode", "paper", *flags)
    results, text = json.loads((tmp_path / "bench.json").read_text()), page.read_text()
    assert (
        set(results) == {"decode", "sample", "reencode", "paper"}
        and results["decode"] == first["decode"]
    )
    assert (
        "old" not in text
        and text.count("<!-- decode -->") == 1
        and text.index("decord get_batch") < text.index("between") < text.index("disk")
    )
    for line in text.splitlines():  # what the page holds was printed
        assert not line.startswith("| 16 frames") or line in out
    disk = next(row for row in results["paper"]["rows"] if "disk" in row)
    assert (
        disk["train.saliency.npy, GB"]
        == np.zeros((1, 3, 16, 14, 14), np.float16).nbytes * 240_000 / 1e9
    )
    trained = next(row for row in results["paper"]["rows"] if row.get("mask") == "tube 0.9")
    ms = next(
        row["ms"]
        for row in results["sample"]["rows"]
        if row["work"].endswith("uint8, short side any")
    )
    assert trained["cores a GPU"] == pytest.approx(trained["clips/s a GPU"] * ms / 1000)
    assert trained["h, 200 epochs"] * 3600 * 8 * trained["clips/s a GPU"] == pytest.approx(
        200 * 240_000
    )


def test_pixels_that_differ_are_an_error(videos, monkeypatch, tmp_path):
    plain = peers.read_plain
    monkeypatch.setattr(
        peers, "read_plain", lambda path, frames: plain(path, [frames[0] + 1, *frames[1:]])
    )
    with pytest.raises(AssertionError, match="not what plain decoding gives"):
        bench.decode(bench.parse_args(["--videos", str(videos), "--repeats", "1"]), tmp_path)


def test_steps_equal_transformers(thin, tmp_path):
    bench.checkpoints.save_huggingface(bench.models.VideoMAE("base"), tmp_path)
    theirs, ours, half = (
        bench.base_step(keep, 0.9, "float32", tmp_path, 1) for keep in (None, 1.0, 0.5)
    )
    first = [step().item() for step in (theirs, ours, half)]
    assert first[1] == pytest.approx(first[0], rel=1e-5) and first[2] != pytest.approx(
        first[0], rel=1e-5
    )
    # so did the optimiser
    assert (
        ours().item()
        == pytest.approx(theirs().item(), rel=1e-4)
        != pytest.approx(first[0], rel=1e-4)
    )


def test_sections_of_steps(thin, monkeypatch, tmp_path):
    """Their code and rows, with every call made once and no time taken."""
    monkeypatch.setattr(bench, "in_a_process", lambda function, *args: 1.0)
    monkeypatch.setattr(
        bench,
        "pairs",
        lambda ours, peer, repeats, warmup=1: [ours(0), np.full((2, repeats), 2.0)][1],
    )
    monkeypatch.setattr(bench.saliency, "patch_features", lambda visual, frames, dense: frames)
    monkeypatch.setattr(bench, "random_clip", lambda: SimpleNamespace(visual=None))
    args = bench.parse_args(["--steps", "3", "--batch", "1"])
    rows = bench.step(args, tmp_path)  # asserts that the losses agree
    assert [row["work"].split(", ", 1)[1] for row in rows[:2]] == [
        "mask 0.9, float32",
        "mask 0.9, float32, --decoder-keep 0.5",
    ]
    assert len(rows) == 10 and [rows[i]["aim"] for i in (0, 4)] == [
        "at least 1.05: not reached",
        "at least 1.0: reached",
    ]
    rows = bench.overhead(args, tmp_path)
    assert [row["work"].split()[1] for row in rows[2:]] == list(bench.masking.RATIOS) and rows[1][
        "pairs"
    ] == 3
    assert rows[2]["ratio"] == 1 / 32  # 32 masks beside 32 steps of one clip


def test_the_loaders_clips_are_counted_and_manifests_weighed(videos, tmp_path):
    dataset = bench.clip_dataset(sorted(map(str, videos.iterdir())) * 2, tmp_path)
    marks = list(bench.load_clips(dataset, 1, 2, 6))
    # whole epochs of 4
    assert [clips for clips, _ in marks] == [2, 4, 6, 8] and all(
        len(pids) == 1 for _, pids in marks
    )
    (tmp_path / "rows.csv").write_text("path\n" + "a.mp4\n" * 7)
    assert bench.manifest_cost(tmp_path / "rows.csv")[0] == 7 and bench.resident() > 50


def test_refusals_and_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(["decode", "speed"])
    assert "no section speed" in capsys.readouterr().err
    assert "soak" not in bench.parse_args([]).sections
    missing = bench.missing(
        "work", "peer", lambda: bench.importlib.import_module("a_peer_that_is_not_there")
    )
    assert missing["ratio"] == "not installed (ModuleNotFoundError)"
    assert bench.tables([{"a": 1.0, "b": [0.5, 2.0]}, {"a": 12345.6}, {"c": "x"}]) == (
        "| a | b |\n|---|---|\n| 1 | 0.5 to 2 |\n| 12,346 |  |\n\n| c |\n|---|\n| x |\n"
    )
