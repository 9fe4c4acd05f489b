"""What every stage does besides its own work: join ranks, choose a device, stop by a signal, end in
one line. Needs arrays.py and manifest.py.

    @one_line_errors                                        # a reason to give up is one line
    def main(argv=None):
        rank, ranks, local_rank = torchrun_ranks()
        device, why = choose_device(args.device, local_rank)
        if ranks > 1:
            join_ranks("gloo", timeout=LONGEST_WAIT)        # "nccl" on GPUs
        stop = StopSignal(ranks)
        for batch in ...:
            ...
            if stop.requested():                            # the same answer on every rank
                save
                stop.end()

    if __name__ == "__main__":
        launch(main)                                        # a stopped run ends by its signal
"""

import atexit
import contextlib
import datetime
import functools
import multiprocessing
import os
import signal
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from tgm.arrays import release
from tgm.manifest import ManifestError

GRACE = 300  # seconds that a stopped run has to reach the end of its step, and again to save
# How long a rank in training waits for the others: a test of many videos, or a checkpoint on a slow
# disk, may keep one of them for longer than the ten or thirty minutes that torch waits by itself.
LONGEST_WAIT = datetime.timedelta(hours=2)
# seconds in which a signal may come twice and still be one: from a scheduler and through torchrun
SAME_SIGNAL = 1.0


class RunError(Exception):
    """A reason to give up, for the user: one line, with the place and the remedy."""


class SaidByRankZero(RunError):
    """A reason to give up that rank 0 has printed for all ranks: see `give_up_together`."""


# ---- ranks and devices ---------------------------------------------------------------------------


def torchrun_ranks():
    """-> (rank, number of ranks, rank on this machine), as torchrun tells them; (0, 1, 0)
    without it.
    """
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return rank, ranks, local_rank


def join_ranks(backend, **options):
    """dist.init_process_group for runs that torchrun may restart (--max-restarts), on one node or
    several.

    Each attempt gets names of its own in torchrun's store, which outlives it: gloo would connect to
    the addresses of ranks that are dead. torchrun counts restarts for each node apart, so the ranks
    agree on a name themselves."""
    store, rank, ranks = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(attempt_name(store, rank, ranks), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, **options)


def attempt_name(store, rank, ranks):
    """A name that all ranks of this attempt share, and no earlier attempt had.

    Rank 0 makes the name. Each other rank writes a random question to the store, rank 0 stores the
    name as the answer to it, and the rank confirms that it has read it. The question of a rank that
    died may still be there. It is answered, too, but a dead rank confirms nothing: so rank 0 looks
    for a new question until all ranks have confirmed. RunError if a rank does not come within the
    store's timeout (torch's: 30 minutes): on another node it may have ended with a reason of its
    own."""
    missing = f"did not start within {store.timeout}: if it ended, its node says why"
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"question of {rank}", question)
        try:
            name = store.get(f"answer to {question}").decode()
        except dist.DistStoreError:
            raise RunError(f"rank 0 {missing}") from None
        store.set(f"{name} heard by {rank}", "yes")
        return name
    name = uuid.uuid4().hex
    latest = time.monotonic() + store.timeout.total_seconds()
    for other in range(1, ranks):
        while not store.check([f"{name} heard by {other}"]):
            if time.monotonic() > latest:
                raise RunError(f"rank {other} {missing}")
            if store.check([f"question of {other}"]):
                question = store.get(f"question of {other}").decode()
                store.set(f"answer to {question}", name)
            time.sleep(0.01)
    return name


def finish(work):
    """Waits for the end of a collective operation (async_op=True); RunError if a rank is gone.

    It waits in Python, where signals are handled. Inside dist, a rank handles none until all other
    ranks have come."""
    pause = 1e-4
    try:
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.005)
        work.wait()
    except RuntimeError as error:
        if not is_of_lost_rank(error):
            raise
        raise RunError(lost_rank(error)) from None


# parts of gloo's and NCCL's errors where the connection to another rank ended
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "pair closure",
    "ncclRemoteError",
)


def is_of_lost_rank(error):
    """Whether an operation failed because another rank is gone, and not by a fault of this one."""
    return any(part in str(error) for part in LOST)


def lost_rank(error):
    """The message where an operation failed because another rank is gone."""
    reason = nccl_reason(error) if "nccl" in str(error) else reason_of(error)[:200]
    return f"another rank ended, and this one with it; the other says why ({reason})"


def nccl_reason(error):
    """NCCL's text ends with "Last error:" and a line that says most: this line, or if it is empty
    the beginning of the text."""
    last = last_line(error)
    return reason_of(error)[:200] if last == "Last error:" else last[:200]


def wait_for_ranks():
    """dist.barrier(), but signals are handled while it waits; without ranks, nothing."""
    if dist.is_initialized():
        # NCCL would warn that it guesses the GPU, which Machine has made the current one
        gpu = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
        finish(dist.barrier(async_op=True, device_ids=gpu))


def give_up_together(message: str):
    """Raises RunError on every rank, all of which must call this; of several rank 0 alone prints
    the message.

    torchrun ends the other ranks as soon as one has ended, so all wait until the line is out."""
    if not dist.is_initialized():
        raise RunError(message)
    if dist.get_rank() == 0:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    wait_for_ranks()
    dist.destroy_process_group()
    raise SaidByRankZero(message)


def union_over_ranks(values: set) -> set:
    """The union of every rank's set, the same on all ranks, all of which must call this. values: of
    one kind that can be sorted, such as numbers or names."""
    if not dist.is_initialized():
        return set(values)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, sorted(values))
    return set().union(*found)


def add_up_over_ranks(tensor):
    """Puts the sum over all ranks into a tensor of each, all of which must call this; without
    ranks it stays as it is. Signals are handled while it waits."""
    if dist.is_initialized():
        finish(dist.all_reduce(tensor, async_op=True))


def sum_over_ranks(number):
    """The sum of a whole number over all ranks, all of which must call this; the number itself
    without ranks. For gloo: on the CPU.
    """
    total = torch.tensor(number)
    add_up_over_ranks(total)
    return total.item()


def choose_device(name, local_rank=0):
    """-> (torch.device, why it was chosen). name: "auto", "cpu", "cuda" or "cuda:N". RunError if
    there is no such GPU."""
    found = torch.cuda.is_available()
    if name == "cpu":
        return torch.device("cpu"), "as asked"
    if name == "auto" and not found:
        return torch.device("cpu"), "no GPU found"
    if not found:
        raise RunError(f"--device {name}: no GPU that torch can use was found")
    number = int(name.removeprefix("cuda:")) if ":" in name else local_rank
    if number >= torch.cuda.device_count():
        raise RunError(
            f"--device {name}: local rank {local_rank} wants cuda:{number}, "
            f"found {torch.cuda.device_count()} GPUs"
        )
    why = "there is a GPU" if name == "auto" else "as asked"
    return torch.device("cuda", number), why


def part_of_rank(rows, rank, ranks):
    """This rank's part of a list: one contiguous piece, so that two ranks share no more than one
    page of a mapped file.
    """
    first = len(rows) * rank // ranks
    last = len(rows) * (rank + 1) // ranks
    return rows[first:last]


# ---- stopping ------------------------------------------------------------------------------------


def ignore_signals(_):
    """For a loader's worker: signals go to the whole process group, and the run still has to
    save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """Kills all children of multiprocessing, such as loader workers, that are left when the process
    ends: workers ignore SIGTERM, and would be waited for.
    """
    workers = multiprocessing.active_children()
    if workers:
        # torch's handler takes a killed worker for an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()


class Stopped(SystemExit):
    """A run that a signal stopped. As an exit code 143 (SIGTERM) or 130 (Ctrl-C); `launch` ends
    by the signal itself.
    """

    def __init__(self, number):
        super().__init__(128 + number)
        self.number = number


def tell(text):
    """Writes to stderr from a signal's handler. Nobody may read it any more, because in
    `... 2>&1 | tee log` Ctrl-C ends tee as well; the run still has to save."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class StopSignal:
    """Handles SIGTERM, which schedulers send, and Ctrl-C, from the moment this is made: the run
    saves and ends, on all ranks at the same step.

        first signal        It is noted: `name` is its name from then on, None before. A message
                            with `then` says what happens next. The run has GRACE seconds to reach
                            `requested` or `end`, and after `requested` GRACE seconds to save.
        second signal       Within SAME_SIGNAL seconds of the first it is ignored: the same one
                            often comes twice, from a scheduler and through torchrun. Later it
                            ends the run without saving.
        no progress         After GRACE seconds the run ends without saving. If torchrun got the
                            signal, it kills its ranks earlier, after 30 seconds in all;
                            TORCH_ELASTIC_SHUTDOWN_TIMEOUT allows more.
        end_on_signal()     From here on there is nothing to save: the first signal ends the run.
        save_on_signal()    From here on a signal is noted again.

    ranks: if there are several, they have joined (`join_ranks`).

    Python runs these handlers only between its own instructions, so none runs while a rank waits
    inside torch for the others. `requested`, `wait_for_ranks` and `add_up_over_ranks` wait in
    Python. Not covered are the averaging of gradients and the exchange of Python objects: a rank
    that is stuck there is ended by SIGKILL or by torch's own timeout."""

    def __init__(self, ranks=1, then="saving after this step"):
        self.name = None
        self._number = None
        self._when = None  # seconds on the monotonic clock
        self._ends_at_once = False
        self._then = then
        self._remark = ""
        self._group = None
        if ranks > 1:
            # on the CPU: asking does not wait for the GPU
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._give_up)
        signal.signal(signal.SIGTERM, self._hear)
        signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number, _):
        if self._ends_at_once:
            tell(f"\n{signal.Signals(number).name}: ended{self._remark}\n")
            self._leave(number)
        elif self._number is None:
            self._note(number, signal.Signals(number).name)
            tell(f"\n{self.name}: {self._then}; once more ends at once\n")
        elif time.monotonic() - self._when > SAME_SIGNAL:
            self._leave(number)

    def _note(self, number, name):
        self._number = number
        self.name = name
        self._when = time.monotonic()
        signal.alarm(GRACE)

    def _give_up(self, *_):
        tell(f"{self.name}: no progress in {GRACE} seconds\n")
        self._leave(self._number)

    def _leave(self, number):
        signal.alarm(0)
        kill_workers()  # the loader would wait ten seconds for each that is stuck
        for each in (signal.SIGTERM, signal.SIGINT):
            # the run is ending: another signal ends it at once
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    def end_on_signal(self, remark=""):
        """From here on a signal ends the run at once; so does one that was noted before.
        remark: what the message adds, for the user."""
        self._ends_at_once = True
        self._remark = f": {remark}" if remark else ""
        if self._number is not None:
            self._leave(self._number)

    def save_on_signal(self):
        """From here on a signal is noted again, and the run asks `requested`."""
        self._ends_at_once = False

    def requested(self):
        """Whether any rank was told to stop, the same answer on all of them; every rank must ask,
        once a step.

        A signal that comes while the ranks answer counts the next time: the others do not know of
        it."""
        told = torch.tensor(self._number or 0)
        if self._group is not None:
            finish(dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        number = told.item()
        if number == 0:
            return False
        if self._number is None:
            self._note(number, f"{signal.Signals(number).name} to another rank")
        signal.alarm(GRACE)  # from now on, to save
        return True

    def end(self):
        """Ends the run as stopped, after it was saved."""
        self._leave(self._number)


# ---- errors --------------------------------------------------------------------------------------


# In the last line of torch's RuntimeErrors on the CPU, and of numpy's that come out of a worker.
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflowed",
    "MemoryError",
)
# In any line of errors of CUDA and its libraries, which end with lines of advice. (Where torch's
# own allocator finds no memory, that is an OutOfMemoryError.)
NO_GPU_MEMORY = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Cuda failure 2 ",
    "Failed to CUDA ",
    "_STATUS_ALLOC_FAILED",
    "_ALLOCATION_FAILED",
)


def one_line_errors(main):
    """A stage's main() whose reasons to give up end the process in one line. Other exceptions
    are bugs: a traceback.
    """

    @functools.wraps(main)
    def guarded(argv=None):
        try:
            return main(argv)
        except SaidByRankZero:
            sys.exit(1)
        except (RunError, ManifestError) as error:
            sys.exit(" ".join(str(error).split()))
        except OSError as error:
            sys.exit(os_reason(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            sys.exit(memory_reason(error))
        except RuntimeError as error:
            if reason := runtime_reason(error):
                sys.exit(reason)
            raise

    return guarded


def reason_of(error):
    """An exception's text as one line of at most 300 characters; its type where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]


def list_names(names, most):
    """The first names of a list, for a message: "a, b, ..." if there are more than `most`."""
    more = ["..."] if len(names) > most else []
    return ", ".join(names[:most] + more)


def last_line(error):
    """The last line of an exception's message, which is the reason where a worker's traceback
    stands before it.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[-1].split())


def runtime_reason(error):
    """One line for a RuntimeError that is no bug, else None."""
    if any(text in last_line(error) for text in NO_MEMORY):
        return memory_reason(error)
    for line in str(error).splitlines():
        if any(text in line for text in NO_GPU_MEMORY):
            return memory_reason(line)
    if isinstance(error, dist.DistNetworkError):  # before lost ranks: its text may be as theirs
        return (
            f"no connection to torchrun's store ({reason_of(error)[:200]}): torchrun may have "
            "ended on another node, which says why"
        )
    if is_of_lost_rank(error):
        return lost_rank(error)
    if "ncclSystemError" in str(error):
        advice = ""
        if "shared memory" in str(error):
            advice = ": give the container more shared memory (docker run --shm-size=16g)"
        return f"NCCL failed: {nccl_reason(error)}{advice}"
    return None


def os_reason(error):
    """One line for an OSError: the file, if it says which, and the reason."""
    if error.strerror is None:
        return last_line(error)
    if error.filename is None:
        return f"{error.strerror} (the system does not say of which file)"
    return f"{error.filename}: {error.strerror}"


def memory_reason(error):
    """One line for an error of too little memory."""
    reason = last_line(error)[:200]
    return f"not enough memory: {reason} (a smaller batch or smaller images need less)"


def launch(main):
    """Runs main() as a program. A run that a signal stopped ends by that signal, so that `a.py &&
    b.py`, loops of a shell and schedulers see that it did not finish."""
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
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # still here: the first process of a container does not die by a signal of its own
    os._exit(128 + number)


# ---- folders and files ---------------------------------------------------------------------------


def make_folder(path, flag="--out"):
    """Makes the folder `path` and tries to write there; RunError, naming the flag, if that
    cannot be.
    """
    path = Path(path)
    trial = path / f".trial-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(b"trial")
        finally:
            trial.unlink(missing_ok=True)
    except FileExistsError:
        raise RunError(f"{flag} {path}: is a file, expected a folder") from None
    except OSError as error:
        raise RunError(f"{flag} {path}: nothing can be written there ({error.strerror})") from None


@contextlib.contextmanager
def writing(path):
    """RunError, naming the file and the reason, where what happens inside cannot write: a full
    or read-only disk.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None
