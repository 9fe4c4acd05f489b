"""The study: its plan, its controls, its tables, and two cells of it on a small world, stopped and gone
on with."""

import csv
import json
import math
import os
import signal
import threading

import controls
import hidden
import numpy as np
import pytest
import report
import study
import torch
from conftest import CLIP, run

import masking
from tgm.arrays import open_array, read_captions
from tgm.manifest import file_sizes, read_manifest
from tgm.run import RunError


def test_the_plan():
    cells = study.plan()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.seed for cell in cells} == {0, 1, 2, 3, 4}
    done = set(cells)
    for question, one, other in study.questions() + study.afterwards():
        for seed in range(5):  # every pair is run with every seed
            assert {one._replace(seed=seed), other._replace(seed=seed)} <= done, question
    usual = {"epochs": study.EPOCHS, "lr": study.LR}
    assert report.usual_training(cells) == usual
    whole = [cell for cell in cells if cell == cell._replace(**usual) and cell.seed == 0]
    equal = {(cell.mask, cell.nce) for cell in whole if cell.ratio == 0.6 and cell.source == "own"}
    assert equal == {(mask, nce) for mask in masking.MASKS for nce in (0, 1)}
    sources = {(cell.source, cell.nce) for cell in whole if cell.source != "own"}
    assert sources == {(source, nce) for source in study.SOURCES for nce in (0, 1)}


def test_intervals_and_pairs():
    assert report.mean_and_half([2.5]) == (2.5, None)
    mean, half = report.mean_and_half([1.0, 2.0, 6.0])  # deviation sqrt(7); t(0.975, 2) = 4.302653
    assert mean == 3 and half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-3)
    one = {0: {"a": 1.0}, 1: {"a": 3.0}, 2: {"a": 0.0}}
    other = {1: {"a": 1.0}, 0: {"a": 0.5}, 3: {"a": 9.0}}
    assert report.differences(one, other, "a") == [0.5, 2.0]  # of the same seed
    assert report.show_difference([0.1, 0.1001, 0.0999]).startswith("**+0.100")
    assert "*" not in report.show_difference([0.1, -0.1, 0.05])


def test_the_report_has_the_means_and_the_differences(tmp_path):
    cells = study.plan()
    runs = {}
    for seed in (0, 1):
        for cell, value in (
            (study.Cell("text", 0.6, nce=1), 0.5),
            (study.Cell("tube", 0.6, nce=1), 0.25),
            (study.Cell("untrained"), 0.125),
        ):
            cell = cell._replace(seed=seed)
            steps = 187 * cell.epochs
            runs[cell.name] = dict.fromkeys(report.MEASURES, value + 0.1 * seed) | {
                "loss_mae": 0.75,
                "loss_nce": 2.0,
                "steps": steps,
            }
    one = study.Cell("text", 0.6, nce=1)
    for other, changes in (
        (one._replace(epochs=54), {"steps": 10098, "loss_mae": 0.25}),
        (one._replace(lr=1e-3), {"loss_mae": 0.875}),
    ):
        runs[other.name] = runs[one.name] | changes
    pairs = (study.questions(), study.afterwards())
    path = tmp_path / "RESULTS.md"
    path.write_text(f"before\n{report.START}\nOLD\n{report.END}\nafter\n")
    report.write(runs, cells, *pairs, path, tmp_path / "a.png")
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "OLD" not in text
    half = 12.706205 * 0.1 / 2
    assert f"| text 0.6 | on | 2 | 0.550 ± {half:.3f} |" in text and "| 0.750 | 2.000 |" in text
    assert "| text 0.6, loss on | tube 0.6, loss on | 2 | **+0.250 ± 0.000** |" in text
    assert "| tube 0.6 | on | 2 | **+0.125 ± 0.000** |" in text
    assert "in 9 of 9 differences; in 0 of these the difference is 0.05" in text
    before, single = text.split("### Other lengths and learning rates: single runs")
    lines = [line for line in single.splitlines() if line.startswith("| text")]
    assert [line.split(" | ")[3:6] for line in lines] == [
        ["5049", "0.001", "0.500"],
        ["5049", "0.003", "0.500"],
        ["10098", "0.003", "0.500"],
    ]
    losses = [line.split(" | ")[-2] for line in lines]
    assert losses == ["0.875", "0.750", "0.250"] and "tube" not in single
    assert "epochs" not in before and "lr" not in before  # these runs are in no other table
    assert (tmp_path / "a.png").stat().st_size > 1000
    path.write_text("nothing\n")
    with pytest.raises(SystemExit, match="has no lines"):
        report.write(runs, cells, *pairs, path, tmp_path / "a.png")


def test_a_commit_stays_a_text(tmp_path):
    """Its hash may read as a number, as 55e6943 does, which is infinite."""
    path = tmp_path / "runs.csv"
    for number, commit in enumerate(("55e6943", "1234567")):
        study.add_run({"name": f"cell{number}", "commit": commit, "object_knn": 1 / 3}, path)
    assert path.read_text().splitlines()[1:] == ["cell0,55e6943,0.333333", "cell1,1234567,0.333333"]
    assert study.read_runs(path)["cell0"]["object_knn"] == 0.333333


def test_the_commit_is_empty_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert study.commit() == ""


def test_shuffled_captions_are_others(world):
    videos = read_manifest(world / "data/train.csv")
    captions = read_captions(world / "data/train.captions.jsonl", videos, "")
    order = controls.shuffle(captions)
    assert sorted(order) == list(range(len(videos))) and (controls.shuffle(captions) == order).all()
    assert not any(set(captions[row]) & set(captions[other]) for row, other in enumerate(order))
    many = [[f"a {i % 6} {i // 6 % 8}"] for i in range(3000)]
    assert not any(many[row] == many[other] for row, other in enumerate(controls.shuffle(many)))
    with pytest.raises(RunError, match="too many videos have the same texts"):
        controls.shuffle([["one"]] * 5)


def test_a_control_that_is_interrupted_is_not_taken_for_whole(copy, monkeypatch):
    """study.py goes by its text.npy, which saliency.py makes as well, first of all."""

    def interrupted(flags):
        make(flags)
        raise KeyboardInterrupt

    make = controls.saliency.main
    monkeypatch.setattr(controls.saliency, "main", interrupted)
    monkeypatch.chdir(copy)
    flags = ["shuffled", "--data", "data/train.csv", "--out", "shuffled", "--clip", CLIP]
    with pytest.raises(KeyboardInterrupt):
        controls.main(flags)
    assert not (copy / "shuffled.text.npy").exists()
    monkeypatch.setattr(controls.saliency, "main", make)
    controls.main(flags)
    assert (copy / "shuffled.text.npy").read_bytes() == (copy / "data/train.text.npy").read_bytes()


def test_controls(copy):
    videos = read_manifest(copy / "data/train.csv")
    maps, texts = {}, {}
    for control in study.SOURCES:
        run("experiments/controls.py", control, "--out", control, "--clip", CLIP, cwd=copy)
        maps[control] = np.array(open_array(copy / f"{control}.saliency.npy", videos, "")[0])
        texts[control] = np.array(open_array(copy / f"{control}.text.npy", videos, "")[0])
    own = np.array(open_array(copy / "data/train.saliency.npy", videos, "")[0])
    text = np.array(open_array(copy / "data/train.text.npy", videos, "")[0])
    for control in study.SOURCES:  # the loss keeps the own captions
        assert (texts[control] == text).all() and maps[control].shape == own.shape
        assert (maps[control] != own).any((1, 2, 3, 4)).mean() > 0.9
    true = maps["truth"]
    assert 0 == true.min() < true.max() == 1 and (true[:, 0] == true[:, 2]).all()
    masks = np.unpackbits(np.load(copy / "data/train.masks.npy")[5], axis=-1)
    # moment 0 of 8 is at frame 1.25 of 20
    assert true[5, 1, 0, 3, 4] == pytest.approx(masks[1, 24:32, 32:40].mean(), abs=1e-3)
    # a map of the bystander's caption is higher on the bystander than on the actor
    bystander = np.load(copy / "data/train.bystander.npy")
    on = np.unpackbits(bystander[:, 1], axis=-1).reshape(32, 8, 8, 8, 8).mean((2, 4)) > 0.5
    on_actor = np.unpackbits(np.load(copy / "data/train.masks.npy")[:, 1], axis=-1)
    on_actor = on_actor.reshape(32, 8, 8, 8, 8).mean((2, 4)) > 0.5
    first = maps["bystander"][:, 0, 0].astype(np.float32)
    assert first[on].mean() > first[on_actor].mean() + 0.1
    first = own[:, 0, 0].astype(np.float32)
    assert first[on_actor].mean() > first[on].mean() + 0.1
    for control in ("truth", "no-text"):  # of videos that were replaced: noticed
        about = json.loads((copy / f"{control}.saliency.json").read_text())
        assert about["files"] == file_sizes(videos)
    out = run("experiments/hidden.py", "--maps", ".", cwd=copy)
    lines = [line.strip("| ").split(" | ") for line in out.splitlines()[2:]]
    shares = {name: [float(number) for number in numbers] for name, *numbers in lines}
    actors = [actor for actor, *_ in shares.values()]
    assert len(actors) == 11 and actors == sorted(actors)
    assert shares["text of truth 0.6"][0] > 0.98 and shares["text 0.6"][0] > 0.9
    assert shares["text of bystander 0.6"][2] > 0.9 and shares["text-inverse 0.6"][0] < 0.2
    assert shares["text of truth 0.6"][1] > 0.9 > 0.1 > shares["random 0.6"][1]
    assert abs(shares["random 0.6"][0] - 0.58) < 0.06  # 21 of 36 tokens of each slice
    assert abs(shares["tube 0.9"][0] - 0.89) < 0.06  # 32 of 36
    (copy / "truth.saliency.json").unlink()
    assert run("experiments/hidden.py", "--maps", ".", cwd=copy, fails=True).endswith(
        "; delete what is left of it, then: python experiments/controls.py truth --data "
        "data/train.csv --out truth"
    )
    (copy / "data/train.masks.npy").unlink()
    assert "train.masks.npy" in run("experiments/hidden.py", "--maps", ".", cwd=copy, fails=True)
    assert "train.masks.npy" in run(
        "experiments/controls.py", "truth", "--out", "t", cwd=copy, fails=True
    )


def test_a_share_is_counted_in_pixels():
    mask = torch.tensor([[True, False, False, False, True, True, True, True]])  # 2 slices of 2 x 2
    seen = torch.zeros(1, 4, 8, 8, dtype=torch.bool)
    seen[0, 0, 3, 2:6] = True  # half in the masked token of the first slice
    assert hidden.hidden_share(mask, (2, 2, 2), seen) == (0.5, 0)
    seen[0, 3, :2] = True  # 16 pixels of the last frame, where all is masked
    assert hidden.hidden_share(mask, (2, 2, 2), seen) == (pytest.approx(18 / 20), 0)
    nowhere = torch.cat([seen, torch.zeros_like(seen)])  # a thing that is never seen counts not
    twice = mask.expand(2, -1)
    assert hidden.hidden_share(twice, (2, 2, 2), nowhere) == (pytest.approx(18 / 20), 0)
    nowhere[1, 2, 1, 1] = True  # in the second video, where all is masked
    assert hidden.hidden_share(twice, (2, 2, 2), nowhere) == (pytest.approx(19 / 20), 0.5)


class HereRunner:
    """Stands for study.Runner: runs the stages in this process."""

    def __init__(self, folder):
        self.folder = folder
        self.commands = []

    def run(self, script, *flags, log):
        self.commands.append((script, *map(str, flags)))
        run(script, *flags, cwd=self.folder)


def test_a_cell_is_a_pretraining_run_and_nine_probes(copy, monkeypatch):
    """With the stages themselves, at a few steps."""
    monkeypatch.chdir(copy)
    monkeypatch.setattr(study, "BATCH", 8)
    monkeypatch.setattr(
        study, "PRETRAIN", "--size tiny --batch-size 8 --repeat 1 --warmup-epochs 0.5"
    )
    monkeypatch.setattr(study, "PROBE", "--size tiny --clips 1 --attentive --seeds 1 --epochs 2")
    run("experiments/controls.py", "truth", "--out", "runs/study/maps/truth", cwd=copy)
    cell = study.Cell("text", 0.6, "truth", 1, seed=3, epochs=1, lr=2.5e-4)
    row = study.run_cell(HereRunner(copy), cell)
    folder = copy / "runs/study" / cell.name
    assert (row["name"], row["steps"], row["seed"]) == (
        "text-of-truth-0.6-1-epochs-lr-0.00025-nce1-seed3",
        4,
        3,
    )
    probe = json.loads((folder / "probe/scene.json").read_text())
    assert row["scene_attentive"] == probe["attentive"] and set(report.MEASURES) < set(row)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert row["loss_mae"] == log[-1]["loss_mae"] and row["loss_nce"] == log[-1]["loss_nce"]
    used = json.loads((folder / "args.json").read_text())
    assert (used["mask_ratio"], used["nce_weight"], used["seed"]) == (0.6, 1, 3)
    assert used["companions"] == "runs/study/maps/truth"
    assert used["lr"] == pytest.approx(2.5e-4) and used["epochs"] == 1
    assert not list(folder.glob("probe/*.npy"))  # bulky
    untrained = study.run_cell(HereRunner(copy), study.Cell("untrained", seed=3))
    assert "loss_mae" not in untrained and 0 <= untrained["object_knn"] <= 1


def fake_cell(runner, cell, workers):
    """Stands for study.run_cell."""
    runner.run("sleep.py", 0.2, log=study.OUT / f"{cell.name}.txt")
    return {"name": cell.name, "seconds": 1, "object_knn": 0.25}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder in which a study of five short cells runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sleep.py").write_text(
        "import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(3 * (sys.argv[1] == '0.0'))"
    )
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "runs.csv")
    monkeypatch.setattr(study, "plan", lambda: [study.Cell("tube", 0.6, seed=i) for i in range(5)])
    monkeypatch.setattr(study, "prepare", lambda runner, cells: None)
    monkeypatch.setattr(study, "run_cell", fake_cell)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def finished(folder):
    with open(folder / "runs.csv", newline="") as file:
        return sorted(line["name"] for line in csv.DictReader(file))


def test_a_study_that_is_stopped_goes_on(fake, capsys):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit, match="stopped: the same command goes on"):
        study.main([])
    done = finished(fake)
    assert 0 < len(done) < 5
    study.main(["--list"])
    listed = capsys.readouterr().out
    assert listed.count("(done)") == len(done) and f"5 cells, {5 - len(done)} to do" in listed
    study.main(["--jobs", "2"])
    assert finished(fake) == [f"tube-0.6-nce0-seed{seed}" for seed in range(5)]
    study.main([])
    assert "5 cells, 0 to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--only tube: no such cell"):
        study.main(["--only", "tube"])


def test_a_cell_that_fails_is_named_and_the_others_run(fake, monkeypatch, capsys):
    def failing(runner, cell, workers):
        if cell.seed == 1:
            runner.run("sleep.py", 0.0, log=study.OUT / f"{cell.name}.txt")
        return fake_cell(runner, cell, workers)

    monkeypatch.setattr(study, "run_cell", failing)
    with pytest.raises(SystemExit, match="1 cells failed: tube-0.6-nce0-seed1"):
        study.main([])
    assert len(finished(fake)) == 4 and "sleep.py: + python sleep.py 0.0" in capsys.readouterr().err
