"""The study: its plan, its statistics, its controls, and two cells of it on a small world,
stopped and gone on with.
"""

import csv
import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import cells
import controls
import numpy as np
import pytest
import study
import tables
import torch
from conftest import CLIP, run

import masking
from tgm.arrays import open_array, read_captions
from tgm.manifest import read_manifest
from tgm.run import StopSignal

SHORT = (
    "--finetuned",
    "action",
    "--pretrain",
    "--size tiny --epochs 1 --repeat 2 --batch-size 8 --warmup-epochs 0.5",
    "--probe",
    "--clips 1 --seeds 1 --epochs 3",
    "--finetune",
    "--size tiny --epochs 1 --warmup-epochs 0.5 --repeat 1 --batch-size 16 --views 1 1 --rand-augment 0 0",
)
CELLS = ("tube-0.9-nce1-seed0", "text-0.6-nce1-seed0", "tube-0.9-nce1-seed1", "text-0.6-nce1-seed1")


def test_the_plan():
    laptop, gpu = (study.plan(tier, study.TIERS[tier]["seeds"]) for tier in ("laptop", "gpu"))
    for of_tier, seeds in ((laptop, 4), (gpu, 5)):
        assert len({cell.name for cell in of_tier}) == len(of_tier)
        assert {cell.seed for cell in of_tier} == set(range(seeds))
        # whole comparisons first
        assert [cell.seed for cell in of_tier] == sorted(cell.seed for cell in of_tier)
        trained = [cell for cell in of_tier if cell.ratio]
        for cell in trained:  # whatever is compared with tube masks has its pair
            assert study.Cell("tube", 0.9, nce=cell.nce, seed=cell.seed) in of_tier
        assert {cell.saliency for cell in trained} == {"own", *study.CONTROLS}
    assert set(laptop) <= set(gpu) and (len(laptop), len(gpu)) == (44, 5 * (2 * (15 + 3) + 2))
    for ratio in study.EQUAL:
        assert {
            (cell.mask, cell.nce) for cell in gpu if cell.ratio == ratio and cell.saliency == "own"
        } == {(m, n) for m in masking.MASKS for n in (0, 1)}
    every = [pair[1:] for pair in study.questions({(cell.what, cell.nce): {} for cell in laptop})]
    assert len(every) == len(set(every)) == 10


def test_intervals_and_pairs():
    assert tables.spread([2.5]) == (2.5, None)
    mean, half = tables.spread([1.0, 2.0, 6.0])  # deviation sqrt(7); t(0.975, 2) = 4.302653
    assert mean == 3 and half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-3)
    mean, half = tables.spread([1.0, 2.0, 3.0, 4.0, 5.0])  # t(0.975, 4) = 2.776445
    assert mean == 3 and half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-3)
    one = {0: {"a": 1.0}, 1: {"a": 3.0}, 2: {"a": None}}
    other = {1: {"a": 1.0}, 2: {"a": 1.0}, 0: {"a": 0.5}, 3: {"a": 9.0}}
    # of the same seed, where both were measured
    assert tables.paired(one, other, "a") == [0.5, 2.0]
    assert tables.said([0.1, 0.1001, 0.0999], "+").startswith("**+0.100")
    assert "*" not in tables.said([0.1, -0.1, 0.05], "+") and tables.said([]) == ""


def test_shuffled_captions_are_others(world):
    videos = read_manifest(world / "data/train.csv")
    captions = read_captions(world / "data/train.captions.jsonl", videos, "")
    order = controls.shuffle(captions)
    assert sorted(order) == list(range(len(videos))) and (controls.shuffle(captions) == order).all()
    assert not any(set(captions[row]) & set(captions[other]) for row, other in enumerate(order))
    many = [[f"a {i % 6} {i // 6 % 8}"] for i in range(3000)]
    assert not any(many[row] == many[other] for row, other in enumerate(controls.shuffle(many)))
    controls.shuffle([["one"]] * 5)  # impossible: it ends


def test_controls_saliency(copy):
    videos = read_manifest(copy / "data/train.csv")
    make = lambda control, out: run(
        "experiments/controls.py", control, "--out", out, "--clip", CLIP, cwd=copy
    )
    open_ = lambda prefix, kind: np.array(open_array(copy / f"{prefix}.{kind}.npy", videos, "")[0])
    make("no-text", "a")
    make("truth", "t")
    true = open_("t", "saliency")
    assert 0 == true.min() < true.max() == 1 and (true[:, 0] == true[:, 2]).all()
    masks = np.unpackbits(np.load(copy / "data/train.masks.npy")[5], axis=-1)
    # moment 0 of 8 is at frame 1.25 of 20
    assert true[5, 1, 0, 3, 4] == pytest.approx(masks[1, 24:32, 32:40].mean(), abs=1e-3)
    own = open_("data/train", "saliency")
    assert (
        open_("a", "saliency").shape == own.shape
        and (open_("a", "text") == open_("data/train", "text")).all()
    )
    path = copy / "data/train.captions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(line | {"captions": ["a red bar"] * 3}) + "\n" for line in lines)
    )
    run(
        "saliency.py",
        "--data",
        "data/train.csv",
        "--clip",
        CLIP,
        "--moments",
        8,
        "--workers",
        0,
        "--resume",
        "none",
        cwd=copy,
    )
    make("no-text", "b")
    assert (open_("a", "saliency") == open_("b", "saliency")).all() and (
        open_("data/train", "saliency") != own
    ).any()
    assert not (copy / "data/train.masks.npy").unlink()
    assert "train.masks.npy" in run(
        "experiments/controls.py", "truth", "--out", "t", cwd=copy, fails=True
    )


def test_two_cells_twice(copy):
    go = lambda *more, **how: run(
        "experiments/study.py",
        "--jobs",
        1,
        "--results",
        "results",
        "--report",
        "RESULTS.md",
        *SHORT,
        *more,
        cwd=copy,
        **how,
    )
    (copy / "RESULTS.md").write_text(
        "before\n<!-- study.py: laptop -->\nTO BE REPLACED\n<!-- end -->\nafter\n"
    )
    assert "1 cells of the laptop tier" in go("--only", CELLS[0])  # nothing to compare yet
    out = go("--seeds", 2, "--only", *CELLS[:2])
    assert "2 cells, 1 to do" in out and "2 cells of the laptop tier" in out
    folder = copy / "runs/study/laptop"
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert not list(folder.glob("*/probe/*.npy"))  # bulky
    assert "2 cells, 0 to do" in go("--seeds", 2, "--only", *CELLS[:2], "--list")
    out = go("--seeds", 2, "--only", *CELLS)
    assert "4 cells, 2 to do" in out
    assert all(path.stat().st_mtime_ns == first[path] for path in first)
    with open(copy / "results/runs.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(CELLS)
    row = rows["text-0.6-nce1-seed0"]
    assert (row["clips"], row["visible"], row["of"], row["tokens"], row["steps"]) == (
        "64",
        "28",
        "64",
        str(64 * 28),
        "4",
    )
    probe = json.loads((folder / "text-0.6-nce1-seed0/probe/object.json").read_text())
    assert float(row["object_linear"]) == pytest.approx(probe["linear"], abs=1e-4)
    log = [
        json.loads(line)
        for line in (folder / "text-0.6-nce1-seed0/log.jsonl").read_text().splitlines()
    ]
    assert float(row["loss_mae"]) == pytest.approx(log[-1]["loss_mae"], abs=1e-4)
    text = (copy / "RESULTS.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "REPLACED" not in text
    pairs = [
        float(rows[f"text-0.6-nce1-seed{seed}"]["object_knn"])
        - float(rows[f"tube-0.9-nce1-seed{seed}"]["object_knn"])
        for seed in (0, 1)
    ]
    assert f"{np.mean(pairs):+.3f}" in text and "| tube 0.9 | 1 | 2 |" in text
    assert {path.name for path in (copy / "results").glob("*.png")} == {
        f"{name}-laptop.png"
        for name in ("accuracies", "contrastive", "reconstructions", "saliency")
    }
    (
        folder / CELLS[3] / "result.json"
    ).unlink()  # as after a kill: what the stages finished is not done again
    assert "4 cells, 1 to do" in go("--seeds", 2, "--only", *CELLS, "--max-minutes", 0)
    with open(copy / "results/runs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4  # its line stays
    assert "0 cells, 0 to do" in go("--only", CELLS[3], "--skip", "results/runs.csv", "--list")
    assert "--only tube: no such cell" in go("--only", "tube", fails=True)
    assert "--skip absent.csv: no such file" in go("--skip", "absent.csv", fails=True)
    assert "made with other settings" in go("--only", CELLS[0], "--probe", "--clips 2", fails=True)
    (copy / "RESULTS.md").write_text("nothing\n")
    assert "has no lines" in go("--gather", "--only", CELLS[0], fails=True)


def test_a_stage_that_was_told_to_stop_stops_the_study(monkeypatch, tmp_path):
    """Stages note the signal and return as if done; which signal, and whether they return or
    exit, makes no difference.
    """
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def main(argv):
        StopSignal()
        if argv[0] != "none":
            os.kill(os.getpid(), getattr(signal, argv[0]))
        if argv[1:]:
            sys.exit(argv[1])

    monkeypatch.setitem(sys.modules, "a_stage", SimpleNamespace(main=main))
    try:
        for name in ("SIGTERM", "SIGINT"):
            with pytest.raises(KeyboardInterrupt):
                cells.stage("a_stage", name, log=tmp_path / "log.txt")
            assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
        cells.stage("a_stage", "none", log=tmp_path / "log.txt")
        with pytest.raises(RuntimeError, match="a reason"):
            cells.stage("a_stage", "none", "a reason", log=tmp_path / "log.txt")
        assert (tmp_path / "log.txt").read_text().count("+ python a_stage.py") == 4
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


def test_attention_adds_up():
    import pictures

    import model

    mae = model.VideoMAE("tiny").eval()
    seen = pictures.attention(mae, torch.randn(1, 3, 8, 32, 32))
    assert seen.shape == (64,) and seen.sum().item() == pytest.approx(1, abs=1e-5)
