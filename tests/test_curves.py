"""tgm/curves.py: what it reads, and that its pictures show it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ENVIRONMENT, NO_MATPLOTLIB, ROOT, run
from PIL import Image

from tgm import curves, training
from tgm.run import RunError

FOUR_STEPS = training.Schedule(
    videos=4, batch_size=1, repeat=1, accum=1, ranks=1, epochs=1, warmup_epochs=0, max_steps=None
)


def write_log(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_log_is_read_as_far_as_it_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    write_log(path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "lr": 0.5}])
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    entries = curves.read_log(path)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert curves.points(entries, "loss") == ([1], [2.0])
    assert curves.points(entries, "lr") == ([2], [0.5])
    assert curves.points(entries, "grad_norm") == ([], [])


def test_running_means():
    assert curves.smooth([1, 2, 3, 4], 2) == [1.5, 2.5, 3.5]
    assert curves.smooth([5, 5, 5], 3) == [5]


def test_running_means_leave_out_what_is_not_finite():
    nan = float("nan")
    means = curves.smooth([1, nan, 3, float("inf"), 7, 9], 2)
    assert means == [1, 3, 3, 7, 8]
    means = curves.smooth([1, nan, nan, 3], 2)
    assert means[0] == 1 and np.isnan(means[1]) and means[2] == 3


def test_one_panel_per_quantity_that_was_logged(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    shown = []
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (shown.append(figure), close(figure)))
    few = [{"step": step, "loss": 1 / step, "skipped": 0} for step in range(1, 11)]
    many = [{"step": step, "loss": 2 / step, "lr": 0.1} for step in range(1, 401)]
    many += [{"step": 400, "val_top1": 0.5, "val_mean_class": 0.4}]
    curves.draw_curves({"few": few, "many": many}, tmp_path / "curves.png")
    (figure,) = shown
    axes = [axis for axis in figure.axes if axis.lines]
    titles = [axis.get_title() for axis in axes]
    assert titles[0] == "loss" and titles[1].startswith("accuracy on --val")
    assert titles[2:] == ["learning rate"]  # skipped is 0 throughout
    line, values, mean = axes[0].lines
    assert list(line.get_ydata()) == [1 / step for step in range(1, 11)]
    assert list(values.get_xdata()) == list(range(1, 401))
    assert list(mean.get_xdata()) == list(range(8, 401))  # a mean of 8 stands at the last of them
    assert mean.get_ydata()[-1] == pytest.approx(sum(2 / step for step in range(393, 401)) / 8)
    assert Image.open(tmp_path / "curves.png").size[0] > 400


def test_a_run_draws_its_own_curves(tmp_path, monkeypatch):
    log = tmp_path / "run/log.jsonl"
    write_log(log, [{"step": step, "loss": 1 / step} for step in range(1, 5)])
    assert curves.draw_own_curves(log) is None
    assert Image.open(log.with_name("curves.png")).format == "PNG"
    assert sorted(path.name for path in log.parent.iterdir()) == ["curves.png", "log.jsonl"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reason = curves.draw_own_curves(log)
    assert reason == (
        f"{tmp_path}/run/curves.png: left out (drawing needs matplotlib: pip install matplotlib)"
    )
    line = run("tgm.curves", log, fails=True)
    assert line == "drawing needs matplotlib: pip install matplotlib"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_log_says_once_why_curves_are_left_out(tmp_path, monkeypatch, capsys, rank):
    machine = training.Machine("cpu", "off")
    machine.rank = rank
    log = training.TrainingLog(tmp_path, [], 0.0, FOUR_STEPS, machine, 0)
    write_log(tmp_path / "log.jsonl", [{"step": 1, "loss": 1.0}])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for step in (1, 4):
        log.draw(step)
    assert capsys.readouterr().err.count("left out") == (rank == 0)
    monkeypatch.undo()
    log.draw(4)
    assert (tmp_path / "curves.png").exists() == (rank == 0)


def test_the_log_draws_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    log = training.TrainingLog(tmp_path, [], 0.0, FOUR_STEPS, training.Machine("cpu", "off"), 0)
    drawn = []
    monkeypatch.setattr(
        training, "draw_own_curves", lambda path: drawn.append(training.time.time())
    )
    for seconds, step in ((0, 1), (59, 2), (60, 3), (61, 4)):
        monkeypatch.setattr(training.time, "time", lambda: seconds)
        log.draw(step)
    assert drawn == [0, 60, 61]


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_both_training_stages_draw_their_curves(world, tmp_path, script):
    """Where matplotlib is installed, which the tests' other runs do without."""
    path = ENVIRONMENT["PYTHONPATH"].split(os.pathsep)
    path = [folder for folder in path if folder != str(NO_MATPLOTLIB)]
    flags = "--size tiny --batch-size 8 --max-steps 2 --log-every 1 --workers 0 --out out"
    data = ["--data", world / "data/train.csv"]
    data += ["--val", world / "data/val.csv"] if script == "finetune.py" else []
    subprocess.run(
        [sys.executable, ROOT / script, *flags.split(), *data],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)},
        check=True,
        capture_output=True,
    )
    assert Image.open(tmp_path / "out/curves.png").size[0] > 400


def test_the_command_line(tmp_path):
    for name in ("a", "b"):
        write_log(tmp_path / name / "log.jsonl", [{"step": 1, "loss_mae": 1.0}])
    flags = ("a/log.jsonl", "b/log.jsonl", "--out", "both.png")
    assert run("tgm.curves", *flags, cwd=tmp_path).strip() == "both.png"
    assert Image.open(tmp_path / "both.png").format == "PNG"
    line = run("tgm.curves", "c/log.jsonl", cwd=tmp_path, fails=True)
    assert line == "c/log.jsonl: No such file or directory"
    (tmp_path / "empty.jsonl").write_text("")
    line = run("tgm.curves", "empty.jsonl", cwd=tmp_path, fails=True)
    assert line == "empty.jsonl: expected the log.jsonl of a training run, found no logged step"
    write_log(tmp_path / "zero/log.jsonl", [{"step": 1, "loss": 0}])
    line = run("tgm.curves", "zero/log.jsonl", cwd=tmp_path, fails=True)
    assert line == "nothing to draw: no log has a value but 0"
    line = run("tgm.curves", "a/log.jsonl", "--out", "no/x.png", cwd=tmp_path, fails=True)
    assert line == "no/x.png: cannot be written (No such file or directory)"
    line = run("tgm.curves", "a/log.jsonl", "--out", ".", cwd=tmp_path, fails=True)
    assert line == "--out .: expected the name of a picture"
    line = run("tgm.curves", "a/log.jsonl", "--out", "x.xyz", cwd=tmp_path, fails=True)
    assert line.startswith("--out x.xyz: Format 'xyz' is not supported")
    assert run("tgm.curves", "a/log.jsonl", "--out", "x", cwd=tmp_path).strip() == "x.png"
    assert (tmp_path / "x.png").exists()
    with pytest.raises(RunError):
        curves.read_log(tmp_path)
