"""Runs that end before their time, by kill -9 at random moments, by signals, on a full disk: what
they leave is whole, and gone on with it is what an uninterrupted run writes, bit for bit. Three
kills a stage here; twenty on demand (pytest -m slow)."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import BLIP, CLIP, ENVIRONMENT, ROOT, run

# the command, and the outputs to compare; batches of one, since a batch's size can change the last
# bit of a sum
STAGES = {
    "caption": (
        ("caption.py", "--model", BLIP, "--batch-size", 1, "--workers", 0),
        "data/train.captions.jsonl",
    ),
    "saliency": (
        ("saliency.py", "--clip", CLIP, "--moments", 8, "--batch-size", 1, "--workers", 0),
        "data/train.saliency.npy",
    ),
    "motion": (
        (
            "saliency.py",
            *"--cue motion --moments 16 --grid 8 --batch-size 1 --workers 0".split(),
        ),
        "data/train.motion.npy",
    ),
    "pretrain": (
        (
            "pretrain.py",
            *(
                "--size tiny --batch-size 4 --epochs 6 --warmup-epochs 1 --workers 1 "
                "--save-every 3 --log-every 2 --picture-every 0 --resume auto "
                "--out run"
            ).split(),
        ),
        "run/checkpoint.pt",
    ),
    "finetune": (
        (
            "finetune.py",
            *(
                "--size tiny --batch-size 4 --epochs 4 --warmup-epochs 1 --workers 1 "
                "--save-every 3 --log-every 2 --views 1 1 --no-flip --resume auto "
                "--out run"
            ).split(),
        ),
        "run/checkpoint.pt",
    ),
    "linprobe": (
        (
            "linprobe.py",
            *(
                "--checkpoint none --size tiny --attentive --seeds 1 --epochs 5 "
                "--batch-size 1 --workers 0 --out run"
            ).split(),
        ),
        "run/label.json",
    ),
}


def start(command, cwd, ranks=1, *flags):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *flags]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / command[0]), *map(str, command[1:])],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def contents(path):
    """What a file holds, for comparing: weights without what only tells how they came about."""
    if path.suffix == ".pt":
        return {
            key: value.numpy().tobytes()
            for key, value in torch.load(path, weights_only=True)["model"].items()
        }
    return path.read_bytes()


def children(process):
    return list(
        map(
            int,
            subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            ).stdout.split(),
        )
    )


def log(folder):
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


def fresh(copy, name, folder):
    """A world of its own for one run, without what the stage is to write."""
    (folder / "data").mkdir(parents=True)
    for path in (copy / "data").iterdir():
        os.symlink(path, folder / "data" / path.name)
    output = folder / STAGES[name][1]
    for path in (
        output,
        output.with_suffix(".json"),
        *(
            [folder / "data/train.text.npy", folder / "data/train.text.json"]
            if name == "saliency"
            else []
        ),
    ):
        path.unlink(missing_ok=True)
    return folder, output


def kill_and_go_on(name, copy, tmp_path, kills, ranks=1):
    """ranks: 2 kills any of the processes, the ranks' or torchrun's, or all."""
    command = STAGES[name][0]
    whole, expected = fresh(copy, name, tmp_path / "whole")
    began = time.time()
    process = start(command, whole, ranks)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lasted = time.time() - began
    killed, output = fresh(copy, name, tmp_path / "killed")
    rng, times = np.random.default_rng(0), []
    for _ in range(kills):
        process = start(command, killed, ranks)
        times.append(rng.uniform(0.3, 1.0) * lasted)
        try:
            process.communicate(timeout=times[-1])
        except subprocess.TimeoutExpired:
            if ranks > 1 and (of_ranks := children(process)):
                os.kill(int(rng.choice(of_ranks)), signal.SIGKILL)
                # the other rank does not outlive it by more than torchrun's 30 s
                _, errors = process.communicate(timeout=60)
                assert (
                    process.returncode == 1 and "exitcode: -9" in errors or process.returncode == 0
                ), errors
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    run(*command, cwd=killed, ranks=ranks)
    assert contents(output) == contents(expected)
    assert not [path for path in killed.rglob("*") if ".part-" in path.name]
    if name in ("pretrain", "finetune"):
        lines, reference = (
            [line for line in log(folder) if "lr" in line] for folder in (killed, whole)
        )
        assert [line["step"] for line in lines] == [line["step"] for line in reference]
        assert [line["grad_norm"] for line in lines] == [line["grad_norm"] for line in reference]


@pytest.mark.parametrize("name", STAGES)
def test_killed_three_times_it_writes_the_same(name, copy, tmp_path):
    kill_and_go_on(name, copy, tmp_path / "runs", 3)


def test_when_one_of_two_ranks_is_killed_the_other_ends_and_the_next_run_goes_on(copy, tmp_path):
    kill_and_go_on("pretrain", copy, tmp_path / "runs", 2, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_killed_twenty_times_it_writes_the_same(name, copy, tmp_path):
    kill_and_go_on(name, copy, tmp_path / "runs", 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_killed_twenty_times_write_the_same(name, copy, tmp_path):
    kill_and_go_on(name, copy, tmp_path / "runs", 20, ranks=2)


def heal(copy, kills):
    """torchrun --max-restarts: after each kill -9 of a rank it starts both again, and the run
    ends as if nothing had been.
    """
    command = (*STAGES["pretrain"][0], "--epochs", 30, "--log-every", 1)
    run(*command, "--out", "whole", cwd=copy, ranks=2)
    process = start(command, copy, 2, f"--max-restarts={kills}")
    rng, seen = np.random.default_rng(0), set()
    step = lambda: (
        ([0] + [line["step"] for line in log(copy)])[-1] if (copy / "run/log.jsonl").exists() else 0
    )
    for reached in np.cumsum(rng.integers(3, 9, kills)):
        until = time.time() + 120
        while step() < reached or seen & set(children(process)):
            assert process.poll() is None and time.time() < until, process.communicate()
            time.sleep(0.02)
        seen |= set(children(process))
        os.kill(int(rng.choice(children(process))), signal.SIGKILL)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (
        contents(copy / "run/checkpoint.pt") == contents(copy / "whole/checkpoint.pt")
        and out.count("120 = 30 epochs x 4") == kills + 1
    )


def test_torchrun_heals_a_run_by_restarts(copy):
    heal(copy, 1)


@pytest.mark.slow
def test_torchrun_heals_a_run_by_ten_restarts(copy):
    heal(copy, 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_stop_at_the_same_step_and_save(copy, number):
    """Between log lines, and only one rank is told."""
    command = (*STAGES["pretrain"][0], "--epochs", 1000, "--save-every", 0, "--log-every", 100000)
    process = start(command, copy, ranks=2)
    while not (copy / "run/checkpoint.pt").exists():  # the end of the first epoch
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(1)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and ": saved run/checkpoint.pt at step" in out, errors
    # Both ranks end by the signal; to torchrun that is a failure. If it looks in between, it ends
    # the second rank by itself.
    ended = errors.count(f"exitcode  : -{number.value}")
    assert ended == 2 or (ended == 1 and "closing signal SIGTERM" in errors), errors
    assert "broadcast_buffers" not in errors  # torch 2.14 warns of the deprecated argument
    assert (
        torch.load(copy / "run/checkpoint.pt", weights_only=True)["step"]
        == log(copy)[-1]["step"]
        < 4000
    )


def test_a_disk_that_fills_leaves_the_last_checkpoint(copy, tmp_path):
    """Files may not grow beyond a limit that the first checkpoint respects: the second ends the
    run, and the first is whole.
    """
    from tgm.checkpoints import save_checkpoint

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model={"x": torch.ones(1000)}, step=1)
    code = """
import pathlib, resource, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
from tgm.checkpoints import save_checkpoint
from tgm.run import one_line_errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))

@one_line_errors
def main(_):
    save_checkpoint(pathlib.Path(sys.argv[2]), model={"x": torch.ones(100000)}, step=2)

main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (
        done.stderr == f"{path}: cannot be written, the last checkpoint is kept (File too large)\n"
    )
    saved = torch.load(path, weights_only=True)
    assert (
        saved["step"] == 1
        and torch.equal(saved["model"]["x"], torch.ones(1000))
        and not list(tmp_path.glob("*.new"))
    )


@pytest.mark.parametrize("name", ["saliency", "motion", "linprobe"])
def test_a_disk_that_fills_while_an_array_is_made(copy, name):
    """All of an array's space is taken before anything is computed: then it either is there, or
    the stage ends with one line.
    """
    for path in [
        *(copy / "data").glob("train.saliency.*"),
        *(copy / "data").glob("train.text.*"),
        *(copy / "data").glob("train.motion.*"),
    ]:
        path.unlink()
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); import importlib; "
        "importlib.import_module(sys.argv[2]).main(sys.argv[3:])"
    )
    command = list(map(str, STAGES[name][0]))
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), command[0][:-3], *command[1:]],
        cwd=copy,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be written (File too large)" in done.stderr.splitlines()[-1]
    assert not [path for path in copy.rglob("*.new")] and not [
        *copy.glob("data/train.motion.*"),
        *copy.glob("data/train.saliency.*"),
    ]
    run(*command, cwd=copy)


def test_an_error_does_not_wait_for_the_loaders_workers(tmp_path):
    """They ignore the SIGTERM with which Python would end them: a rank that fails must end all
    the same, and soon.
    """
    (tmp_path / "fails.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from torch.utils.data import DataLoader
from tgm.run import StopSignal, ignore_signals
class Slow:
    def __len__(self): return 1000
    def __getitem__(self, index): time.sleep(0.05); return index
stop = StopSignal()
held = iter(DataLoader(Slow(), num_workers=2, persistent_workers=True, worker_init_fn=ignore_signals))
next(held)
sys.last_held = held  # what a traceback's frames do: nothing shuts the loader down
raise RuntimeError("a rank fails")
""")
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "fails.py")],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 1 and "a rank fails" in errors
