"""Loaders: batches from decoding processes. If such a process dies or finds no room, the run ends
with one line. Needs run.py, sampling.py, training.py and video.py.

    for items in checked_batches(make_loader(dataset, 16, workers=4)):      lists, in order
    batches = batches_from(step, loader, schedule)                  training batches without end
"""

import errno
import sys
from multiprocessing.reduction import ForkingPickler

import torch
from torch.utils.data import DataLoader

from tgm.run import RunError, ignore_signals
from tgm.sampling import EpochBatches, TrainingClips
from tgm.training import Machine, Schedule
from tgm.video import VideoError

NO_SHARED_MEMORY = (
    "a decoding process found no room in shared memory (/dev/shm): give the container more "
    "(docker run --shm-size=16g), or lower --batch-size or --workers; --workers 0 needs none"
)
NO_OPEN_FILES = (
    "the run or a decoding process has too many open files: lower --workers or --batch-size, or "
    "raise the limit (ulimit -n 65536); with --workers 0 such files are not opened"
)
WORKER_ENDED = (
    "(it may have had too little memory, too little shared memory: docker run --shm-size=16g, or "
    "too many open files: ulimit -n 65536). Lower --workers or --batch-size; with --workers 0 the "
    "run decodes by itself and shows where it fails"
)


def begin_worker(number: int) -> None:
    """The worker_init_fn of every loader. The worker ignores signals. It also hides the
    tracebacks of too many open files: a thread of multiprocessing (resource_sharer) hands tensors
    to the run, fails again and again, and prints one each time. The run prints the reason once."""
    ignore_signals(number)
    shown = sys.excepthook

    def show(kind, error, traceback):
        if getattr(error, "errno", None) != errno.EMFILE:
            shown(kind, error, traceback)

    sys.excepthook = show


# ---- lists of items, for stages whose rows stand alone -------------------------------------------


def share(items):
    """The collate_fn of lists. In a worker it packs them to be sent to the run, tensors by shared
    memory.

    Without it the loader does so in a thread of the worker. There an error is lost, such as of a
    full /dev/shm or of too many open files, and the run waits forever for a batch that never comes.
    Here the error reaches the run like any other of a worker. Training batches go without it:
    the usual collate_fn stacks the clips in shared memory in the worker itself, so that a full
    /dev/shm is met there, and a worker has at most two batches of a few tensors under way."""
    if torch.utils.data.get_worker_info() is None:
        return items
    return bytes(ForkingPickler.dumps(items))


class ListLoader(DataLoader):
    """A DataLoader whose collate_fn is `share`: its batches come as lists again."""

    def __iter__(self):
        return self._unpack(super().__iter__())

    def _unpack(self, batches):
        for batch in batches:
            yield self._items(batch)

    def _items(self, batch):
        if self.num_workers == 0:
            return batch
        try:
            return ForkingPickler.loads(batch)
        except (OSError, EOFError) as error:
            raise RuntimeError(
                f"DataLoader worker: a batch cannot be read any more ({error})"
            ) from None


def make_loader(dataset, batch_size: int, workers: int, **options) -> ListLoader:
    """A loader of lists of items, in the order of the data set. Read it by `checked_batches`."""
    return ListLoader(
        dataset,
        batch_size,
        num_workers=workers,
        collate_fn=share,
        worker_init_fn=begin_worker,
        **options,
    )


# ---- training batches ----------------------------------------------------------------------------


def make_clip_loader(
    clips: TrainingClips, schedule: Schedule, machine: Machine, workers: int
) -> DataLoader:
    """A loader of this rank's training batches. Read it by `batches_from`."""
    sampler = EpochBatches(
        clips.rows,
        schedule.batch_size,
        schedule.steps_per_epoch * schedule.accum,
        clips.seed,
        machine.rank,
        machine.ranks,
    )
    return DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=machine.on_gpu,
        persistent_workers=workers > 0,
        worker_init_fn=begin_worker,
    )


def batches_from(step: int, loader: DataLoader, schedule: Schedule):
    """The batches of all steps after `step`, one epoch after the other, without end. RunError if
    neither a video nor any that could take its place can be read."""
    while True:
        epoch, done = divmod(step, schedule.steps_per_epoch)
        loader.batch_sampler.epoch = epoch
        loader.batch_sampler.start = done * schedule.accum
        try:
            yield from checked_batches(loader)
        except VideoError as error:  # a worker puts its traceback before the message
            name = f"{VideoError.__module__}.{VideoError.__qualname__}: "
            reason = str(error).strip().splitlines()[-1].removeprefix(name)
            raise RunError(reason) from None
        step = (epoch + 1) * schedule.steps_per_epoch


# ---- failures ------------------------------------------------------------------------------------


def hide_half_made_loaders() -> None:
    """Keeps Python from printing a traceback when it deletes a loader whose workers could not all
    be started: torch's deletion fails, too, and the reason has been said."""
    shown = sys.unraisablehook

    def show(failure):
        if "DataLoaderIter.__del__" not in repr(failure.object):
            shown(failure)

    sys.unraisablehook = show


def checked_batches(loader: DataLoader):
    """The batches of a loader. RunError where its workers cannot be started, die, find no shared
    memory, or have too many open files."""
    try:
        batches = iter(loader)
    except OSError as error:
        hide_half_made_loaders()
        reason = f"the decoding processes cannot be started ({error.strerror}): lower --workers"
        if error.errno == errno.ENOSPC:
            reason = f"{NO_SHARED_MEMORY} ({error.strerror})"
        if error.errno == errno.EMFILE:
            reason = NO_OPEN_FILES
        raise RunError(reason) from None
    try:
        yield from batches
    except (RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines() or [""]
        reason = lines[-1]
        # "received 0 items of ancdata": the run had no number left for the file that a worker sent
        if "Too many open files" in reason or "items of ancdata" in reason:
            raise RunError(NO_OPEN_FILES) from None
        if "shared memory" in reason or "</torch_" in reason or "Bus error" in lines[0]:
            raise RunError(NO_SHARED_MEMORY) from None
        if lines[0].startswith("DataLoader"):
            # worker (pid ...) is killed by ..., exited unexpectedly, timed out
            said = lines[0].strip()
            raise RunError(f"a decoding process ended: {said} {WORKER_ENDED}") from None
        raise
