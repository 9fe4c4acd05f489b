"""Flags, devices, ranks, loading, stopping, folders and logs. Runs that end by a signal are
processes of their own: most of them forks of this one, which saves the seconds of importing
torch."""

import argparse
import datetime
import errno
import gc
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import UserDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import ENVIRONMENT, ROOT

from tgm import flags, loading, offline, resume, run, training
from tgm.manifest import ManifestError

FORK = multiprocessing.get_context("fork")
STARTED = []


@pytest.fixture(autouse=True)
def no_child_is_left():
    yield
    run.kill_workers()
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.join()


class Child:
    """A fork that runs `program`, as launch(program) at the end of a script does; what it prints
    goes to a file.
    """

    def __init__(self, path, program, *args, environment=None):
        self.path = path
        self.process = FORK.Process(target=self._run, args=(program, args, environment or {}))
        self.process.start()
        STARTED.append(self.process)

    def _run(self, program, args, environment):
        gc.freeze()  # loaders that earlier tests left to be deleted belong to their process
        os.setsid()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run.launch(lambda: program(*args))
        finally:
            run.kill_workers()  # as at the end of a process that is no fork

    def says(self, text, seconds=30):
        """Waits until it has printed `text`."""
        until = time.time() + seconds
        while text not in self.printed():
            assert self.process.is_alive() and time.time() < until, self.printed()
            time.sleep(0.01)

    def printed(self):
        return self.path.read_text() if self.path.exists() else ""

    def kill(self, number):
        os.kill(self.process.pid, number)

    def code(self, seconds=30):
        """Its exit code, negative where a signal ended it."""
        self.process.join(seconds)
        assert not self.process.is_alive(), self.printed()
        return self.process.exitcode


def two_ranks(tmp_path, program, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        children.append(Child(tmp_path / f"rank{rank}", program, *args, environment=environment))
    return children


# ---- flags ---------------------------------------------------------------------------------------


def test_a_wrong_flag_ends_in_one_line(capsys):
    parser = flags.Parser(prog="x.py", description="One line.\n    another")
    parser.add_argument("--batch-size", type=flags.positive_int)
    for wrong in (["--batch-size", "0"], ["--batch-size", "x"], ["--bach", "1"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(wrong)
        assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "x.py: argument --batch-size: expected 1 to 2147483647, found 0 (--help lists the flags)",
        "x.py: argument --batch-size: expected a whole number, found 'x' (--help lists the flags)",
        "x.py: unrecognized arguments: --bach 1 (--help lists the flags)",
    ]
    assert "One line.\n    another" in parser.format_help()


REFUSED = {
    flags.positive_int: ("0", "-1", "1e9", "1.5", "2147483648", "nan", "inf", "x", "", "1" * 5000),
    flags.count: ("-1", "1e9", "nan", "x", ""),
    flags.seed_number: ("-1", "4294967296", "nan"),
    flags.worker_count: ("-1", "1025"),
    flags.frame_count: ("0", "10001"),
    flags.grid_size: ("0", "1025"),
    flags.pixel_count: ("0", "8193"),
    flags.positive: ("0", "-0.0", "-1", "nan", "inf", "-inf", "1e400", "x", ""),
    flags.not_negative: ("-1e-9", "nan", "inf", "x", ""),
    flags.fraction: ("-0.1", "1.1", "nan", "inf"),
    flags.ratio: ("0", "-0.1", "1.0001", "nan"),
    flags.device_name: ("mps", "foo", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:1.0", "cpu:0", ""),
}
ACCEPTED = {
    flags.positive_int: {"1": 1, " 7 ": 7, "2147483647": 2147483647},
    flags.count: {"0": 0},
    flags.seed_number: {"0": 0, "4294967295": 4294967295},
    flags.worker_count: {"0": 0, "1024": 1024},
    flags.frame_count: {"1": 1, "10000": 10000},
    flags.grid_size: {"1": 1, "1024": 1024},
    flags.pixel_count: {"1": 1, "8192": 8192},
    flags.positive: {"1e-9": 1e-9, "1e9": 1e9},
    flags.not_negative: {"0": 0.0, "1e9": 1e9},
    flags.fraction: {"0": 0.0, "1": 1.0, "0.5": 0.5},
    flags.ratio: {"1e-3": 1e-3, "1": 1.0},
    flags.device_name: {
        "auto": "auto",
        "cpu": "cpu",
        "cuda": "cuda",
        "cuda:0": "cuda:0",
        "cuda:12": "cuda:12",
    },
}


def test_types_take_their_range_and_nothing_else():
    for read, texts in REFUSED.items():
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match="^expected .*, found "):
                read(text)
    for read, values in ACCEPTED.items():
        for text, value in values.items():
            assert read(text) == value and type(read(text)) is type(value)
    with pytest.raises(
        argparse.ArgumentTypeError,
        match="^expected a finite number, more than 0 and at most 1, found nan$",
    ):
        flags.ratio("nan")
    with pytest.raises(
        argparse.ArgumentTypeError, match="^expected a finite number, 0 or more, found inf$"
    ):
        flags.not_negative("inf")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.choose_device("auto") == (torch.device("cpu"), "no GPU found")
    assert run.choose_device("cpu", 3) == (torch.device("cpu"), "as asked")
    for name in ("cuda", "cuda:7"):
        with pytest.raises(
            run.RunError, match=f"^--device {name}: no GPU that torch can use was found$"
        ):
            run.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.choose_device("auto", 1) == (torch.device("cuda", 1), "there is a GPU")
    assert run.choose_device("cuda", 1) == (torch.device("cuda", 1), "as asked")
    assert run.choose_device("cuda:0", 1) == (torch.device("cuda", 0), "as asked")
    with pytest.raises(
        run.RunError, match="^--device cuda:7: local rank 0 wants cuda:7, found 2 GPUs$"
    ):
        run.choose_device("cuda:7")
    with pytest.raises(
        run.RunError, match="^--device auto: local rank 2 wants cuda:2, found 2 GPUs$"
    ):
        run.choose_device("auto", 2)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_that_only_emulates_bf16_takes_fp16(monkeypatch, has_bf16):
    def supported(including_emulation=True):
        return has_bf16 or including_emulation

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(offline, "choose_device", lambda *_: (torch.device("cuda", 1), "as asked"))
    expected = "bf16" if has_bf16 else "fp16"
    assert training.choose_precision("auto", torch.device("cuda", 1)) == expected
    assert training.choose_precision("off", torch.device("cuda", 1)) == "off"
    machine = offline.join_machine("cuda:1")
    assert machine.dtype == (torch.bfloat16 if has_bf16 else torch.float16)
    assert chosen == [torch.device("cuda", 1)]  # before its memory is used


def test_ranks_wait_longer_than_nccl_would(monkeypatch):
    joined = []

    def join_ranks(backend, **options):
        joined.append((backend, options))

    monkeypatch.setattr(training, "join_ranks", join_ranks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    training.Machine("cpu", "off").join()
    assert joined == [("gloo", {"timeout": training.LONGEST_WAIT})]
    assert training.LONGEST_WAIT.total_seconds() == 7200


# ---- ranks ---------------------------------------------------------------------------------------


def test_parts_of_ranks_are_contiguous_and_together_the_whole():
    for length in (0, 1, 5, 8, 100):
        for ranks in (1, 2, 3, 8):
            parts = [run.part_of_rank(list(range(length)), rank, ranks) for rank in range(ranks)]
            assert sum(parts, []) == list(range(length))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_as_torchrun_tells_them(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert run.torchrun_ranks() == (0, 1, 0)
    assert run.sum_over_ranks(7) == 7 and run.wait_for_ranks() is None
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run.torchrun_ranks() == (5, 8, 1)


def join():
    rank, ranks, _ = run.torchrun_ranks()
    run.join_ranks("gloo")
    return rank, run.StopSignal(ranks)


def steps_until_stopped():
    rank, stop = join()
    for step in range(10_000):
        time.sleep(0.005)
        if stop.requested():
            print(f"stopped at {step}: {stop.name}")
            assert run.sum_over_ranks(step) == 2 * step
            stop.end()
        if step == 3:
            print("ready")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_stop_at_the_same_step_if_one_is_told(tmp_path, number):
    children = two_ranks(tmp_path, steps_until_stopped)
    for child in children:
        child.says("ready")
    children[1].kill(number)
    assert [child.code() for child in children] == [-number] * 2
    last = [child.printed().splitlines()[-1] for child in children]
    name = signal.Signals(number).name
    assert last[0].endswith(f": {name} to another rank") and last[1].endswith(f": {name}")
    assert last[0].split(":")[0] == last[1].split(":")[0]


def told_while_answering():
    """Rank 0 hears the signal while it waits for rank 1's answer, which is no: then both say no,
    and both say yes next time.
    """
    rank, stop = join()
    run.wait_for_ranks()
    if rank == 0:
        print("asking")
    else:
        time.sleep(1.5)
    print(stop.requested())
    print(stop.requested())
    stop.end()


def test_a_signal_while_the_ranks_answer_counts_the_next_time(tmp_path):
    children = two_ranks(tmp_path, told_while_answering)
    children[0].says("asking")
    time.sleep(0.3)
    children[0].kill(signal.SIGTERM)
    # heard while it waits, not when the other has come
    children[0].says("SIGTERM: saving after this step", seconds=1)
    assert [child.code() for child in children] == [-15, -15]
    for child in children:
        assert [line for line in child.printed().splitlines() if line in ("True", "False")] == [
            "False",
            "True",
        ]


def wait_for_a_rank_that_is_stuck(grace):
    run.GRACE = grace
    rank, stop = join()
    print("ready")
    if rank == 1:
        time.sleep(1000)
    run.wait_for_ranks()


def test_a_rank_that_waits_for_a_stuck_one_is_ended_by_grace_and_by_a_second_signal(tmp_path):
    children = two_ranks(tmp_path, wait_for_a_rank_that_is_stuck, 1)
    for child in children:
        child.says("ready")
    children[0].kill(signal.SIGTERM)
    assert (
        children[0].code(10) == -15 and "SIGTERM: no progress in 1 seconds" in children[0].printed()
    )
    children = two_ranks(tmp_path, wait_for_a_rank_that_is_stuck, 300)
    for child in children:
        child.says("ready")
    children[0].kill(signal.SIGINT)
    children[0].says("once more ends at once")
    time.sleep(1.2)
    children[0].kill(signal.SIGINT)
    assert children[0].code(5) == -2


def one_rank_gives_up(wait):
    @run.one_line_errors
    def main(_):
        rank, stop = join()
        run.wait_for_ranks()
        if rank == 1:
            raise run.RunError("data/train.csv: wrong")
        wait()

    main(None)


@pytest.mark.parametrize(
    "wait",
    [
        run.wait_for_ranks,
        lambda: run.sum_over_ranks(1),
        lambda: run.union_over_ranks({1}),
        lambda: dist.all_reduce(torch.zeros(1)),  # as the averaging of gradients
    ],
)
def test_a_rank_that_gives_up_ends_the_others_in_one_line(tmp_path, wait):
    children = two_ranks(tmp_path, one_rank_gives_up, wait)
    assert [child.code() for child in children] == [1, 1]
    assert children[1].printed().splitlines()[-1] == "data/train.csv: wrong"
    assert (
        children[0]
        .printed()
        .splitlines()[-1]
        .startswith("another rank ended, and this one with it; the other says why (")
    )
    assert "Traceback" not in children[0].printed()


# ---- loading -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: list
    b: None


class Numbers(torch.utils.data.Dataset):
    def __init__(self, item, length=8):
        self.item = item
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.item(index)


def test_items_arrive_as_they_are():
    """In lists, tuples and mappings, with and without workers; through shared memory if there
    are workers.
    """
    item = lambda index: (
        index,
        UserDict(x=torch.full((3,), index)),
        Pair([torch.tensor(index)], None),
        "text",
    )
    for workers in (0, 2):
        batches = list(loading.checked_batches(loading.make_loader(Numbers(item), 3, workers)))
        assert [len(batch) for batch in batches] == [3, 3, 2]
        for index, (number, mapping, pair, text) in enumerate(sum(batches, [])):
            assert (number, mapping["x"].tolist(), pair.a[0].item(), pair.b, text) == (
                index,
                [index] * 3,
                index,
                None,
                "text",
            )
            assert mapping["x"].is_shared() == pair.a[0].is_shared() == (workers > 0)


def test_a_dead_worker_is_one_line(tmp_path):
    def die(index):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        run.RunError, match=r"^a decoding process ended: DataLoader worker .*\(pid.*--workers 0"
    ):
        list(loading.checked_batches(loading.make_loader(Numbers(die), 2, 1)))


def test_other_errors_of_workers_stay_what_they_are():
    """Also where their traceback names shared memory: a project may lie in /dev/shm."""

    def fail(index):
        raise RuntimeError("a bug in\n/dev/shm/project/video.py\nof this stage")

    with pytest.raises(RuntimeError, match="of this stage"):
        list(loading.checked_batches(loading.make_loader(Numbers(fail), 2, 1)))
    with pytest.raises(RuntimeError, match="of this stage"):
        list(loading.checked_batches(loading.make_loader(Numbers(fail), 2, 0)))

    def open_missing(index):
        open("/nowhere/video.mp4")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(loading.checked_batches(loading.make_loader(Numbers(open_missing), 2, 1)))


def no_open_files(batch):
    limit = len(os.listdir("/proc/self/fd")) + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        for items in loading.checked_batches(
            loading.make_loader(Numbers(lambda index: torch.zeros(100), length=400), batch, 1)
        ):
            print(f"{len(items)} items")
    except run.RunError as error:
        print(error)


@pytest.mark.parametrize("batch", [10, 20, 40, 60])
def test_too_many_open_files_is_one_line(tmp_path, batch):
    """As with the default limit of 1024 and hundreds of videos a batch: wherever the limit is
    met, the run does not wait.
    """
    child = Child(tmp_path / "out", no_open_files, batch)
    assert child.code(20) == 0
    if batch == 10:
        assert child.printed() == "10 items\n" * 40
    elif batch == 20:
        # at the limit itself: what is met, and by whom, hangs on how many batches wait
        assert child.printed() == "20 items\n" * 20 or "ulimit -n" in child.printed()
    else:
        assert "ulimit -n" in child.printed() and child.printed().count("\n") <= 2


def hardly_any_open_files(workers):
    limit = len(os.listdir("/proc/self/fd")) + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        next(loading.checked_batches(loading.make_loader(Numbers(torch.zeros), 1, workers)))
    except run.RunError as error:
        print(error)


def two_epochs_near_the_limit(workers):
    """Persistent workers, of which the second epoch makes no new ones."""
    loader = torch.utils.data.DataLoader(
        Numbers(torch.zeros, length=4), 1, num_workers=workers, persistent_workers=True
    )
    counts = [len(list(loading.checked_batches(loader)))]
    limit = len(os.listdir("/proc/self/fd")) + 6  # too few to make the workers again
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    counts.append(len(list(loading.checked_batches(loader))))
    print(counts)


def test_a_second_epoch_needs_no_more_open_files(tmp_path):
    child = Child(tmp_path / "out", two_epochs_near_the_limit, 2)
    assert child.code(20) == 0 and child.printed() == "[4, 4]\n"


def test_workers_that_cannot_be_started_for_want_of_open_files_are_one_line(tmp_path):
    child = Child(tmp_path / "out", hardly_any_open_files, 12)
    assert child.code(20) == 0
    assert child.printed() == loading.NO_OPEN_FILES + "\n"  # no traceback of a half-made loader


def second_worker_cannot_start():
    """As ulimit -u has it: the first worker runs, and no process can be made any more."""
    start = multiprocessing.Process.start
    started = []

    def start_once(process):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(process)
        start(process)

    sys.unraisablehook = sys.__unraisablehook__  # pytest's own prints nothing in a fork
    multiprocessing.Process.start = start_once
    try:
        next(loading.checked_batches(loading.make_loader(Numbers(torch.zeros), 1, 2)))
    except run.RunError as error:
        print(error)
    gc.collect()
    run.kill_workers()


def test_a_second_worker_that_cannot_be_started_is_one_line(tmp_path):
    child = Child(tmp_path / "out", second_worker_cannot_start)
    assert child.code(20) == 0
    assert child.printed() == (
        "the decoding processes cannot be started (Resource temporarily unavailable): lower "
        "--workers\n"
    )


def test_no_number_for_the_file_of_a_batch_is_one_line():
    """What multiprocessing raises in the run if a worker's file finds no number there."""

    def batches():
        raise RuntimeError("received 0 items of ancdata")
        yield

    with pytest.raises(run.RunError, match="^the run or a decoding process has too many open"):
        list(loading.checked_batches(batches()))


def test_a_worker_without_open_files_prints_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(loading, "ignore_signals", lambda _: None)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    loading.begin_worker(0)
    for error in (OSError(errno.EMFILE, "Too many open files"), ValueError("a bug")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "ValueError: a bug\n"


def test_what_cannot_be_packed_is_an_error_and_not_a_wait():
    with pytest.raises(AttributeError, match="Can't (pickle|get) local object"):
        list(
            loading.checked_batches(loading.make_loader(Numbers(lambda index: lambda: index), 2, 1))
        )


def in_small_shared_memory(size, program, *flags):
    """A python process whose /dev/shm holds `size`; skips the test where that is impossible."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs unshare -m")
    code = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} {program} {' '.join(map(str, flags))}"
    return subprocess.Popen(
        ["unshare", "-m", "bash", "-c", code],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


LOADING = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
from tgm import loading, run

class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        if index >= 8 and sys.argv[1] == "stuck":
            time.sleep(1000)
        return index, torch.zeros(int(sys.argv[2]), dtype=torch.uint8), None

@run.one_line_errors
def main(argv=None):
    run.GRACE = int(sys.argv[3])
    stop = run.StopSignal(then="ending after this batch")
    for batch in loading.checked_batches(loading.make_loader(Clips(), 8, 2)):
        print(len(batch), flush=True)
        if stop.name:
            stop.end()

run.launch(main)
"""


@pytest.mark.parametrize(
    "size, each", [("1m", 4_800_000), ("64k", 4_800_000), ("4k", 10), ("1m", 100_000)]
)
def test_full_shared_memory_is_one_line_within_seconds(tmp_path, size, each):
    """Clips of ViT-B, 16 x 224 x 224 x 3 x 2 bytes, that never fit; no room for even a lock; and a
    few clips that fit, but no batch of them."""
    (tmp_path / "loading.py").write_text(LOADING)
    began = time.time()
    process = in_small_shared_memory(size, tmp_path / "loading.py", "fast", each, 300)
    try:
        out, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 1 and time.time() - began < 30
    assert "--shm-size" in errors and "--workers 0" in errors, errors
    if torch.__version__ >= (2, 14):  # torch 2.8 prints more, when the loader is deleted
        assert errors.count("\n") == 1, errors


def test_a_stuck_loader_ends_by_grace_or_by_a_second_signal(tmp_path):
    def load(grace):
        run.GRACE = grace
        stop = run.StopSignal(then="ending after this batch")
        stuck = Numbers(lambda index: time.sleep(1000) if index >= 2 else index)
        for _ in loading.checked_batches(loading.make_loader(stuck, 2, 1)):
            print("a batch")
            if stop.name:
                stop.end()

    child = Child(tmp_path / "grace", load, 1)
    child.says("a batch")
    child.kill(signal.SIGTERM)
    child.says("SIGTERM: ending after this batch; once more ends at once", seconds=1)
    assert child.code(20) == -15 and "SIGTERM: no progress in 1 seconds" in child.printed()
    child = Child(tmp_path / "again", load, 300)
    child.says("a batch")
    child.kill(signal.SIGINT)
    child.says("once more ends at once")
    time.sleep(1.2)
    child.kill(signal.SIGTERM)
    assert child.code(20) == -15


def test_workers_that_are_left_are_killed_without_a_word(tmp_path):
    """By kill_workers at the end of a run whose loader still lives, held by an error's
    traceback.
    """
    (tmp_path / "held.py").write_text(
        LOADING.replace(
            "run.launch(main)",
            """
held = iter(loading.make_loader(Clips(), 8, 2))
next(held)
sys.exit("one line")
""",
        )
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "held.py"), "stuck", "10", "300"],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr == "one line\n"


# ---- stopping ------------------------------------------------------------------------------------


def work(at_once=False):
    stop = run.StopSignal()
    if at_once:
        stop.end_on_signal()
    print("ready")
    for _ in range(2000):
        time.sleep(0.005)
        if stop.requested():
            print("saved")
            stop.end()


def stuck(grace):
    run.GRACE = grace
    run.StopSignal()
    print("ready")
    time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_ends_by_the_signal(tmp_path, number):
    name = signal.Signals(number).name
    child = Child(tmp_path / "out", work)
    child.says("ready")
    child.kill(number)
    assert child.code() == -number
    assert (
        child.printed()
        == f"ready\n\n{name}: saving after this step; once more ends at once\nsaved\n"
    )
    child = Child(tmp_path / "at once", work, True)
    child.says("ready")
    child.kill(number)
    assert child.code(2) == -number and child.printed() == f"ready\n\n{name}: ended\n"
    # as while a model is loaded
    child = Child(tmp_path / "before", lambda: (print("ready"), time.sleep(1000)))
    child.says("ready")
    child.kill(number)
    assert child.code(2) == -number and child.printed() == "ready\n"


def test_a_signal_that_came_before_at_once_ends_the_run_there(tmp_path):
    def program():
        stop = run.StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        print("noted")
        stop.end_on_signal()
        print("never")

    child = Child(tmp_path / "out", program)
    assert child.code() == -15 and "noted" in child.printed() and "never" not in child.printed()


def test_a_second_signal_ends_a_stuck_run_and_so_does_grace(tmp_path):
    child = Child(tmp_path / "second", stuck, 300)
    child.says("ready")
    child.kill(signal.SIGTERM)
    child.kill(signal.SIGTERM)  # the same one again, as `timeout`, srun and torchrun send it
    child.says("once more ends at once")
    time.sleep(0.5)
    child.kill(signal.SIGTERM)
    time.sleep(0.1)
    assert child.process.is_alive()
    time.sleep(0.6)
    child.kill(signal.SIGTERM)
    assert child.code(2) == -15 and child.printed().count("once more") == 1
    child = Child(tmp_path / "grace", stuck, 1)
    child.says("ready")
    began = time.time()
    child.kill(signal.SIGINT)
    assert child.code(5) == -2 and 0.9 < time.time() - began < 4
    assert child.printed().endswith("SIGINT: no progress in 1 seconds\n")


def test_saving_has_grace_seconds_of_its_own(tmp_path):
    def saves_forever():
        run.GRACE = 1
        stop = run.StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.7)
        assert stop.requested()
        time.sleep(0.7)
        print("still saving")
        time.sleep(1000)

    child = Child(tmp_path / "out", saves_forever)
    assert (
        child.code(10) == -15
        and "still saving" in child.printed()
        and "no progress" in child.printed()
    )


def test_stopped_inside_this_process():
    """What `launch` does not see: an in-process caller gets 143 or 130, and no alarm stays
    behind.
    """
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    }
    try:
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            stop = run.StopSignal()
            assert not stop.requested() and stop.name is None
            os.kill(os.getpid(), number)
            assert stop.requested() and stop.name == signal.Signals(number).name
            with pytest.raises(run.Stopped) as end:
                stop.end()
            assert (
                end.value.code == code
                and end.value.number == number
                and isinstance(end.value, SystemExit)
            )
            assert signal.alarm(0) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tgm.run import StopSignal, launch

def main():
    stop = StopSignal()
    print("ready", flush=True)
    while not stop.requested():
        time.sleep(0.01)
    stop.end()

launch(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_does_not_go_on_after_a_stopped_run(tmp_path, number):
    (tmp_path / "stage.py").write_text(PROGRAM)
    process = subprocess.Popen(
        ["bash", "-c", f"{sys.executable} stage.py && echo went on; echo code $?"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    child = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(child[0]), number)
    out, _ = process.communicate(timeout=20)
    if number == signal.SIGTERM:
        assert out == "code 143\n"
    else:
        assert out in ("code 130\n", "")  # bash ends, too, where its child died of Ctrl-C


def test_as_the_first_process_of_a_container_it_ends_with_the_code(tmp_path):
    """There the kernel lets no signal of its own end it."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-pf", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs unshare -p")
    (tmp_path / "stage.py").write_text(
        PROGRAM.replace(
            "while not", "import os, signal\n    os.kill(1, signal.SIGTERM)\n    while not"
        )
    )
    done = subprocess.run(
        ["unshare", "-pf", sys.executable, "stage.py"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 143, done


# ---- errors --------------------------------------------------------------------------------------


def raised(error):
    """What main() ends with if `error` is raised in it."""

    @run.one_line_errors
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_reasons_to_give_up_are_one_line():
    assert raised(run.RunError("wrong\n  place")) == "wrong place"
    assert raised(ManifestError("a.csv:3: expected x")) == "a.csv:3: expected x"
    assert (
        raised(FileNotFoundError(2, "No such file or directory", "a.txt"))
        == "a.txt: No such file or directory"
    )
    assert (
        raised(OSError(28, "No space left on device"))
        == "No space left on device (the system does not say of which file)"
    )
    assert raised(OSError("Caught OSError\nTraceback\nOSError: bad\n")) == "OSError: bad"
    assert raised(OSError()) == "OSError"
    assert (
        raised(MemoryError())
        == "not enough memory: MemoryError (a smaller batch or smaller images need less)"
    )
    assert raised(MemoryError("Caught\nUnable to allocate 7 GiB")).startswith(
        "not enough memory: Unable to allocate 7 GiB ("
    )
    assert raised(torch.OutOfMemoryError("CUDA out of memory. Tried\nto")).startswith(
        "not enough memory: to ("
    )
    pair = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    lost = "another rank ended, and this one with it; the other says why"
    assert raised(RuntimeError(pair)) == f"{lost} ({pair})"
    for said in ("NCCL error: ncclRemoteError: x", "Application timeout caused pair closure"):
        assert raised(dist.DistBackendError(said)).startswith(lost)
    nccl = "NCCL error in: NCCLUtils.cpp:94, {}, NCCL version 2.30.7\n{}\nLast error:\n{}"
    closed = nccl.format("remote process exited", "ncclRemoteError: x", "socket 4: gone")
    assert raised(dist.DistBackendError(closed)) == f"{lost} (socket 4: gone)"
    silent = nccl.format("unhandled system error", "ncclSystemError: x", "").strip()
    assert raised(dist.DistBackendError(silent)).startswith("NCCL failed: NCCL error in: NCCLUtils")
    segment = "Error while creating shared memory segment /dev/shm/x: No space left on device (28)"
    full = nccl.format("unhandled system error", "ncclSystemError: System call failed.", segment)
    assert raised(dist.DistBackendError(full)) == (
        f"NCCL failed: {segment}: give the container more shared memory (docker run --shm-size=16g)"
    )
    for said in (
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Caught AcceleratorError in pin memory thread.\nTraceback:\n  File\ntorch."
        "AcceleratorError: CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "CUDA driver error: out of memory",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        nccl.format("x", "ncclUnhandledCudaError: x", "Cuda failure 2 'out of memory'"),
        nccl.format("x", "ncclUnhandledCudaError: x", "Failed to CUDA calloc 6291456 bytes"),
    ):
        assert re.match(
            "not enough memory: [^\n]*(out of memory|ALLOC|calloc)", raised(RuntimeError(said))
        )
    for bug in (
        RuntimeError("a bug"),
        RuntimeError("[gloo/transport/tcp/device.cc:84] a bug: unable to find address for: x"),
        dist.DistBackendError("a bug: ncclInvalidUsage: Duplicate GPU detected"),
    ):
        with pytest.raises(RuntimeError, match="a bug"):
            run.one_line_errors(lambda argv, bug=bug: raise_(bug))()
    with pytest.raises(ValueError):
        run.one_line_errors(lambda argv: raise_(ValueError("a bug")))()
    assert run.one_line_errors(lambda argv: argv)(["x"]) == ["x"]


def raise_(error):
    raise error


def test_errors_as_the_libraries_raise_them_are_one_line():
    for need in (
        lambda: torch.empty(10**15),
        lambda: torch.empty(2**62, 4),
        lambda: raise_(MemoryError()),
    ):
        with pytest.raises(SystemExit) as end:
            run.one_line_errors(lambda argv, need=need: need())()
        assert end.value.code.startswith("not enough memory: ") and "\n" not in end.value.code

    def no_memory(index):
        import numpy

        return numpy.empty(10**15)

    def read(index):
        with open("/nowhere/a.mp4") as file:
            return file.read()

    for item, line in (
        (no_memory, "not enough memory: "),
        (read, "FileNotFoundError: [Errno 2] No such file"),
    ):
        with pytest.raises(SystemExit) as end:
            run.one_line_errors(
                lambda argv, item=item: list(
                    loading.checked_batches(loading.make_loader(Numbers(item), 2, 1))
                )
            )()
        assert end.value.code.startswith(line) and "\n" not in end.value.code


# ---- training ------------------------------------------------------------------------------------


def test_emulated_bf16_is_not_taken_for_bf16(monkeypatch):
    gpu = torch.device("cuda", 0)
    only_emulated = lambda including_emulation=True: including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", only_emulated)
    assert training.choose_precision("auto", gpu) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert training.choose_precision("auto", gpu) == "bf16"
    assert training.choose_precision("auto", torch.device("cpu")) == "off"
    assert training.choose_precision("bf16", gpu) == "bf16"


def make_log(folder, amp):
    schedule = training.Schedule(
        videos=200,
        batch_size=1,
        repeat=1,
        accum=1,
        ranks=1,
        epochs=1,
        warmup_epochs=0,
        max_steps=None,
    )
    videos = [SimpleNamespace(name="a.mp4")]
    return training.TrainingLog(folder, videos, 0.0, schedule, training.Machine("cpu", amp), 0)


def log_steps(log, first, norms):
    """One logged window: a step for each norm."""
    for norm in norms:
        log.fetch(iter([{"row": torch.tensor([0]), "failed": torch.tensor([-1])}]))
        log.add(torch.tensor(norm), loss=torch.tensor(1.0))
    log.write_step(first + len(norms) - 1, 1e-3)


def test_printed_numbers_of_four_digits_but_all_digits_of_a_step(tmp_path, capsys):
    log = make_log(tmp_path, "off")
    log.write(step=12345, loss=0.123456, step_ms=12345.6, lr=1.5e-5, loss_nce=None, skipped=0)
    out = capsys.readouterr().out
    assert out == "step 12345  loss 0.1235  step_ms 12346  lr 1.5e-05  skipped 0\n"
    assert training.short(9999.7) == "10000" and training.short(-math.inf) == "-inf"


def test_fp16_ends_where_no_gradient_is_finite_any_more(tmp_path):
    log = make_log(tmp_path, "fp16")
    log_steps(log, 1, [math.inf] * 39 + [2.0])  # the scale is found
    log_steps(log, 41, [2.0, 4.0])
    log_steps(log, 43, [math.nan] * 39)
    with pytest.raises(run.RunError, match="fp16: the gradients of the last 40 steps are not fin"):
        log_steps(log, 82, [math.inf])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # all of it JSON; a norm is the mean of those that are finite
    assert [line["grad_norm"] for line in lines] == [2.0, 3.0, None]
    assert [line["skipped_steps"] for line in lines] == [39, 0, 39]


def test_without_fp16_the_first_gradient_that_is_not_finite_ends_the_run(tmp_path):
    log = make_log(tmp_path, "off")
    log_steps(log, 1, [2.0])
    with pytest.raises(run.RunError, match="step 3: the loss or its gradient is not finite"):
        log_steps(log, 2, [2.0, math.inf])
    log.videos = [SimpleNamespace(name=f"{row}.mp4") for row in range(50)]
    assert log._names({3, 1}) == "1.mp4, 3.mp4"
    assert log._names(set(range(50))).endswith(", 18.mp4, 19.mp4, ...")


def test_the_rank_whose_loss_is_not_finite_has_the_videos(tmp_path, monkeypatch):
    """The gradient is averaged, so it is not finite on any rank: a loss tells more."""
    log = make_log(tmp_path, "off")
    log.videos = [SimpleNamespace(name=f"{row}.mp4") for row in range(9)]
    of_others = [set(), {7}]  # no other bad step; the videos of another rank
    monkeypatch.setattr(training, "union_over_ranks", lambda own: own | of_others.pop(0))
    with pytest.raises(run.RunError, match="step 1: .* Its batch: 7.mp4$"):
        log_steps(log, 1, [math.nan])
    log = make_log(tmp_path, "off")
    log.videos = [SimpleNamespace(name=f"{row}.mp4") for row in range(9)]
    of_others = [set(), set(), {7}]  # all losses are finite
    with pytest.raises(run.RunError, match="step 1: .* Its batch: 0.mp4, 7.mp4$"):
        log_steps(log, 1, [math.nan])


def test_all_ranks_do_not_train_on_one_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(run.RunError, match="^--device cuda:0: 8 ranks cannot train on one GPU: "):
        training.Machine("cuda:0", "off")


# ---- folders, logs, resuming ---------------------------------------------------------------------


def test_folders_are_made_and_tried(tmp_path):
    run.make_folder(tmp_path / "a/b")
    run.make_folder(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        run.RunError, match=f"^--out {tmp_path}/file: is a file, expected a folder$"
    ):
        run.make_folder(tmp_path / "file")
    with pytest.raises(
        run.RunError,
        match=f"^--here {tmp_path}/file/c: nothing can be written there \\(Not a directory\\)$",
    ):
        run.make_folder(tmp_path / "file/c", "--here")
    with pytest.raises(run.RunError, match="^--out /proc: nothing can be written there"):
        run.make_folder("/proc")
    with pytest.raises(run.RunError, match="File name too long"):
        run.make_folder(tmp_path / ("n" * 300))
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run.Path, "write_bytes", full)
    with pytest.raises(
        run.RunError, match=r"nothing can be written there \(No space left on device\)$"
    ):
        run.make_folder(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_log_is_cut_back_and_broken_lines_go(tmp_path, capsys, monkeypatch):
    path = tmp_path / "log.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3, 4)]
    path.write_text("".join(whole) + '{"step": 5, "lo')
    resume.keep_log(path, 3)
    assert path.read_text() == "".join(whole[:3])
    assert capsys.readouterr().err == f"{path}: 1 broken line dropped\n"
    path.write_bytes("".join(whole).encode() + b'\n7\n{}\n{"step": null}\nnull\n\xff\xfe')
    resume.keep_log(path, 9)
    assert (
        path.read_text() == "".join(whole) and "6 broken lines dropped" in capsys.readouterr().err
    )
    resume.keep_log(path, 9)
    assert path.read_text() == "".join(whole) and capsys.readouterr().err == ""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(resume.Path, "write_text", full)
        resume.keep_log(path, 1)
    assert path.read_text() == "".join(whole)  # a full disk takes nothing away
    resume.keep_log(path, 0)
    assert path.read_text() == ""
    resume.keep_log(tmp_path / "new.jsonl", 5)
    assert (tmp_path / "new.jsonl").read_text() == "" and {
        file.name for file in tmp_path.iterdir()
    } == {"log.jsonl", "new.jsonl"}


def test_other_flags_and_data_are_refused_by_name_old_and_new_value():
    saved = {
        "stage": "x.py",
        "epochs": 2,
        "crop_scale": [0.5, 1.0],
        "workers": 2,
        "seed": 0,
        "identity": {"a.csv": "ab", "b.csv": None},
    }
    now = saved | {"crop_scale": (0.5, 1.0), "workers": 8, "new_flag": 1}
    may_change = {"workers", "identity"}
    resume.refuse_changes("c.pt", saved, now, may_change)
    resume.refuse_changes("c.pt", saved, now | {"epochs": 3}, may_change)
    for changes, said in (
        ({"epochs": 1}, "--epochs was 2, is 1"),
        (
            {"seed": 1, "crop_scale": (0.4, 1.0)},
            "--crop-scale was [0.5, 1.0], is (0.4, 1.0); --seed was 0, is 1",
        ),
        ({"identity": {"a.csv": "cd", "b.csv": None}}, "a.csv was ab, is cd"),
        ({"identity": {"a.csv": "ab", "b.csv": "cd"}}, "b.csv was not there, is cd"),
        ({"identity": {"other.csv": "ab"}}, "other.csv was not there, is ab"),
    ):
        with pytest.raises(run.RunError) as refusal:
            resume.refuse_changes("c.pt", saved, now | changes, may_change)
        assert str(refusal.value) == (
            f"c.pt: another run: {said}. Give the flags and the data it was begun with, write "
            "elsewhere (--out), or begin again with --resume none"
        )
    with pytest.raises(run.RunError, match="--workers was 2, is 8"):
        resume.refuse_changes("c.pt", saved, now, {"identity"})
    for other in ({}, saved | {"stage": "y.py"}):
        with pytest.raises(run.RunError, match=r"^c\.pt: no checkpoint of x\.py: write elsewhere"):
            resume.refuse_changes("c.pt", other, now, may_change)
    assert math.isfinite(run.GRACE)


def test_another_node_may_have_its_data_elsewhere_but_not_other_data(tmp_path, monkeypatch):
    """The checkpoint holds the flags of rank 0."""
    saved = {
        "stage": "x.py",
        "epochs": 2,
        "data": "a.csv",
        "seed": 0,
        "identity": {"a.csv": "ab", "a.text.npy": "cd"},
    }
    torch.save({"args": saved}, tmp_path / "checkpoint.pt")
    here = saved | {"data": "b.csv", "identity": {"b.csv": "ab", "b.text.npy": "cd"}}
    find = lambda flags: resume.find_run(tmp_path, "auto", flags, {"identity"})
    monkeypatch.setenv("RANK", "1")
    assert find(here)["args"] == saved
    for changes, said in (
        ({"identity": {"b.csv": "ab", "b.text.npy": "ef"}}, "a.text.npy was cd, is ef"),
        ({"seed": 1}, "--seed was 0, is 1"),
    ):
        with pytest.raises(run.RunError, match=f"another run: {said}. Give"):
            find(here | changes)
    torch.save({"args": {"stage": "another.py"}}, tmp_path / "checkpoint.pt")
    with pytest.raises(run.RunError, match="no checkpoint of x.py"):
        find(here)
    torch.save({"args": saved}, tmp_path / "checkpoint.pt")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(run.RunError, match="another run: --data was a.csv, is b.csv; b.csv was"):
        find(here)


@pytest.mark.parametrize("rank, other", [(0, 1), (1, 0)])
def test_a_rank_that_never_starts_is_named(rank, other):
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.2))
    with pytest.raises(run.RunError, match=f"^rank {other} did not start within 0:00:00.2"):
        run.attempt_name(store, rank, 2)


@pytest.mark.parametrize("reason", ("Failed to recv, got 0 bytes", "Broken pipe"))
@pytest.mark.parametrize("rank", (0, 1))
def test_a_store_that_is_lost_while_ranks_join_is_one_line(rank, reason):
    """Its node ended, with torchrun: no other rank is late."""

    class LostStore(dist.HashStore):
        def get(self, key):
            raise dist.DistNetworkError(reason)

        check = get

    @run.one_line_errors
    def main(argv=None):
        run.attempt_name(LostStore(), rank, 2)

    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value.code).startswith(
        f"no connection to torchrun's store ({reason}): torchrun may have ended on another node"
    )


def test_ranks_wait_as_long_for_a_stop_as_for_a_step(monkeypatch):
    asked = {}
    monkeypatch.setattr(run.dist, "new_group", lambda **options: asked.update(options))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    run.StopSignal(ranks=2)
    assert asked == {"backend": "gloo", "timeout": run.LONGEST_WAIT}
    assert run.LONGEST_WAIT.total_seconds() > 30 * 60  # what torch would wait by itself


def test_buffers_are_not_sent_in_every_step(tmp_path):
    """Tables of positions never change."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("table", torch.ones(3))
    place = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    try:
        machine = training.Machine("cpu", "off")
        machine.ranks = 2
        wrapped = machine.wrap(model)
        assert len(wrapped.modules_buffers) == 1 and not wrapped.will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()
