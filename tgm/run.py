"""What every stage does besides its own work: check flags, choose a device, join ranks, load, stop, and go on. Needs manifest.py.

    parser = Parser(description=__doc__)                    wrong flags end in one line
    parser.add_argument("--batch-size", type=positive_int)  numbers say their range

    @one_line_errors                                        a reason to give up is one line, not a traceback
    def main(argv=None):
        rank, ranks, local_rank = torchrun_ranks()
        device, why = choose_device(args.device, local_rank)
        stop = StopSignal(ranks)
        for batch in patient(make_loader(...)):
            ...
            if stop.agreed():                               the same answer on every rank
                save
                stop.end()

    if __name__ == "__main__":
        launch(main)                                        a stopped run ends by its signal: 143 or 130, never 0
"""

import argparse
import atexit
import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from manifest import ManifestError, release

GRACE = 300  # seconds from a stop signal to the end of a run that makes no progress


class RunError(Exception):
    """A reason to give up, for the user: one line, with the place and the remedy."""


# ---- flags -------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse's, but help keeps the docstring's lines, and a wrong flag ends in one line instead of the whole usage."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def whole(low, high=2**31 - 1):
    """A type for argparse: whole numbers from low to high."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, found {value}")
        return value

    return read


def real(low, high=math.inf, above=False):
    """A type for argparse: finite numbers from low to high; above: low itself is too low."""

    def read(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
        fits = low < value <= high if above else low <= value <= high
        if not (fits and math.isfinite(value)):
            smallest = f"more than {low:g}" if above else f"{low:g} or more"
            largest = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"expected {smallest}{largest}, found {text}")
        return value

    return read


positive_int = whole(1)
count = whole(0)  # 0 or more
seed_number = whole(0, 2**32 - 1)
worker_count = whole(0, 1024)
frame_count = whole(1, 10_000)
grid_size = whole(1, 1024)
pixel_count = whole(1, 8192)
positive = real(0, above=True)
not_negative = real(0)
fraction = real(0, 1)  # both ends included
ratio = real(0, 1, above=True)  # 0 left out


def device_name(text):
    """A type for argparse: auto, cpu, cuda or cuda:N."""
    number = text.removeprefix("cuda:")
    if text in ("auto", "cpu", "cuda") or (text.startswith("cuda:") and number.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, found {text!r}")


# ---- ranks and devices -------------------------------------------------------------------------------------------------


def torchrun_ranks():
    """-> (rank, number of ranks, rank on this machine), as torchrun tells them; (0, 1, 0) without it."""
    environment = os.environ
    rank = int(environment.get("RANK", 0))
    ranks = int(environment.get("WORLD_SIZE", 1))
    local_rank = int(environment.get("LOCAL_RANK", 0))
    return rank, ranks, local_rank


def join_ranks(backend, **options):
    """dist.init_process_group for runs that torchrun may restart (--max-restarts).

    Each attempt gets names of its own in torchrun's store, which outlives it: gloo would connect to the addresses of ranks
    that are dead. Over several nodes the attempts are counted apart, so there this is left out.
    """
    store, rank, ranks = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, **options)


def choose_device(name, local_rank=0):
    """-> (torch.device, why it was chosen). name: as `device_name` lets through. RunError if there is no such GPU."""
    found = torch.cuda.is_available()
    if name == "cpu":
        return torch.device("cpu"), "as asked"
    if name == "auto" and not found:
        return torch.device("cpu"), "no GPU found"
    if not found:
        raise RunError(f"--device {name}: no GPU that torch can use was found")
    number = int(name.removeprefix("cuda:")) if ":" in name else local_rank
    if number >= torch.cuda.device_count():
        raise RunError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, rank {local_rank} wants cuda:{number}")
    return torch.device("cuda", number), "there is a GPU" if name == "auto" else "as asked"


def part_of_rank(rows, rank, ranks):
    """This rank's part of `rows`: one contiguous piece, so that ranks hardly ever write to the same page of a mapped file."""
    first = len(rows) * rank // ranks
    last = len(rows) * (rank + 1) // ranks
    return rows[first:last]


# ---- loading -----------------------------------------------------------------------------------------------------------


def share(items):
    """The collate_fn of lists: moves every tensor to shared memory here, in the worker, where a full /dev/shm is an error that
    reaches the run. Left to the worker's queue thread, the error is lost there and the run waits forever."""
    if torch.utils.data.get_worker_info() is not None:
        for tensor in tensors_in(items):
            tensor.share_memory_()
    return items


def tensors_in(item):
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(item, torch.Tensor):
        yield item
    elif hasattr(item, "values"):
        for value in item.values():
            yield from tensors_in(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from tensors_in(value)


def patient(loader):
    """The batches of a DataLoader; RunError where its workers die or give nothing in time."""
    try:
        yield from loader
    except RuntimeError as error:
        reason = str(error)
        if "shared memory" in reason or "shm" in reason or "Bus error" in reason:
            raise RunError(
                "a decoding process found no room in shared memory (/dev/shm): give the container more "
                "(docker run --shm-size=16g), or lower --batch-size or --workers; --workers 0 needs none"
            ) from None
        if "DataLoader" in reason and ("killed" in reason or "exited" in reason or "timed out" in reason):
            raise RunError(
                f"a decoding process ended: {reason.splitlines()[0]} (out of memory? lower --workers or --batch-size; "
                "--workers 0 decodes in the run itself and shows where)"
            ) from None
        raise


def ignore_signals(_):
    """The worker_init_fn of every loader: signals go to the whole process group, and the run still has to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset, batch_size, workers, **options):
    """A DataLoader of lists of items, for stages whose rows stand alone. See `share` and `patient`."""
    return DataLoader(
        dataset, batch_size, num_workers=workers, collate_fn=share, worker_init_fn=ignore_signals, **options
    )


@atexit.register
def kill_workers():
    """Kills loader workers that are left when the process ends: they ignore SIGTERM, and would be waited for."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error about each that dies
    for worker in workers:
        worker.kill()


# ---- stopping ----------------------------------------------------------------------------------------------------------


class Stopped(SystemExit):
    """A run that a signal stopped. As an exit code 143 (SIGTERM) or 130 (Ctrl-C); `launch` ends by the signal itself."""

    def __init__(self, number):
        super().__init__(128 + number)
        self.number = number


class StopSignal:
    """SIGTERM, as a scheduler sends it, and Ctrl-C, from the moment this is made: a run saves and ends, all ranks at the same
    step. The first signal is noted, and said at once; a second one ends the run without saving, and so do GRACE seconds without
    progress. `at_once()`: nothing is left to save, so a signal ends the run immediately; `after_step()` takes that back."""

    def __init__(self, ranks=1, then="saving after this step"):
        self.name = None
        self._number = None
        self._immediately = False
        self._then = then
        self._loss = ""
        self._group = None
        if ranks > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU: asking does not wait for the GPU
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        signal.signal(signal.SIGALRM, self._give_up)

    def _note(self, number, _):
        if self._immediately:
            os.write(2, f"\n{signal.Signals(number).name}: ended{self._loss}\n".encode())
            raise Stopped(number)
        if self._number is not None:
            raise Stopped(number)
        self._number = number
        self.name = signal.Signals(number).name
        os.write(2, f"\n{self.name}: {self._then}; once more ends at once\n".encode())
        signal.alarm(GRACE)

    def _give_up(self, *_):
        os.write(2, f"{self.name}: no progress in {GRACE} seconds\n".encode())
        raise Stopped(self._number)

    def at_once(self, loss=""):
        """From here on a signal ends the run immediately; so does one that was noted before. loss: what is lost by that, for the
        user."""
        self._immediately = True
        self._loss = f": {loss}" if loss else ""
        signal.alarm(0)
        if self._number is not None:
            raise Stopped(self._number)

    def after_step(self):
        """From here on a signal is noted again, and the run asks `agreed`."""
        self._immediately = False

    def agreed(self):
        """Whether any rank was told to stop by now; every rank must ask, once a step."""
        signal.alarm(0)
        told = torch.tensor(float(self._number or 0))
        if self._group is not None:
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        if told.item() > 0 and self._number is None:
            self._number = int(told.item())
            self.name = f"{signal.Signals(self._number).name} to another rank"
        return self._number is not None

    def end(self):
        """Ends the run as stopped, after it was saved."""
        signal.alarm(0)
        raise Stopped(self._number)


def one_line_errors(main):
    """A stage's main() whose reasons to give up end the process in one line. Other exceptions are bugs and keep their traceback."""

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            return main(argv)
        except (RunError, ManifestError) as error:
            sys.exit(" ".join(str(error).split()))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            reason = error.strerror or str(error).strip().splitlines()[-1]
            sys.exit(where + reason)
        except (MemoryError, torch.OutOfMemoryError) as error:
            sys.exit(f"not enough memory: {' '.join(str(error).split())[:200]} (lower --batch-size; {main.__module__}.py --help)")

    return guarded


def launch(main):
    """Runs main() as a program. A run that a signal stopped ends by that signal, so that `a.py && b.py`, loops of a shell and
    schedulers see that it did not finish."""
    try:
        main()
    except Stopped as stop:
        number = stop.number
    except KeyboardInterrupt:
        number = signal.SIGINT
    else:
        return
    kill_workers()
    release()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# ---- folders, logs, resuming -------------------------------------------------------------------------------------------


def make_folder(path, flag="--out"):
    """Makes the folder `path` and tries to write there; RunError, naming the flag, if that cannot be."""
    path = Path(path)
    trial = path / f".trial-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise RunError(f"{flag} {path}: nothing can be written there ({error.strerror})") from None


@contextlib.contextmanager
def writing(path):
    """RunError, naming the file and the reason, where what happens inside cannot write: a full or read-only disk."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None


def keep_log(path, step):
    """Cuts a log.jsonl back to the lines up to `step`, the checkpoint's; what follows is void, as is a line that a full disk or
    a kill left half written."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.exists() else []
    kept = []
    broken = 0
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    if broken:
        print(f"{path}: {broken} broken line{'s' if broken > 1 else ''} dropped", file=sys.stderr)
    path.write_text("".join(kept), encoding="utf-8")


def refuse_changes(path, saved, now, may_change):
    """RunError if a run is resumed with other flags than it was begun with.

    path: the checkpoint; saved, now: {flag: value}, as the checkpoint holds them and as they are; may_change: the names that do
    not change the run, such as workers. Values are compared as json has them, so that a tuple equals its list.
    """
    changed = []
    for name, value in now.items():
        if name in may_change or name not in saved:
            continue
        if json.dumps(saved[name], default=str) != json.dumps(value, default=str):
            changed.append(f"--{name.replace('_', '-')} was {saved[name]}, is {value}")
    if changed:
        raise RunError(
            f"{path}: another run: {'; '.join(changed)}. Give the flags it was begun with, write elsewhere (--out), or begin "
            "again with --resume none"
        )
