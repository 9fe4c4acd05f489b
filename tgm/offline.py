"""Helpers that caption.py and saliency.py share: one pass over all videos, before training.
(linprobe.py uses `join_machine` and `leave_ranks` alone, features.py `precision_on`, classes.py
`autocast`.)

Needs flags.py, loading.py, manifest.py, run.py, training.py and video.py.

    add_run_flags(parser, batch_size=32)
    videos = read_manifest(args.data, args.root)
    machine = join_machine(args.device)  # this process among torchrun's
    mine = part_of_rank(videos, machine.rank, machine.ranks)
    for items in batches(machine, mine, read, 32, workers=2):
        ...  # read(video) ran in a loader's worker; save the batch's results here
    leave_ranks()

A pass can be stopped and continued: the results of a batch are written before the next one comes.
"""

import datetime
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from tgm.flags import add_machine_flags, positive_int
from tgm.loading import checked_batches, make_loader
from tgm.manifest import Video
from tgm.run import StopSignal, choose_device, join_ranks, torchrun_ranks
from tgm.training import DTYPES, choose_precision
from tgm.video import VideoError

# Ranks wait for each other only at the start and at the end; one may finish days before another.
# (Training, in run.py, waits for less.)
LONGEST_WAIT = datetime.timedelta(days=7)


def add_run_flags(parser: ArgumentParser, batch_size: int) -> None:
    """--device, --workers, --batch-size (with this default), --max-steps, --resume, --extend."""
    run = parser.add_argument_group("run")
    add_machine_flags(run)
    run.add_argument(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        help="videos per batch, on each rank; lower it where memory is short",
    )
    run.add_argument(
        "--max-steps", type=positive_int, help="end this process after so many batches, for a trial"
    )
    run.add_argument(
        "--resume",
        choices=("auto", "none"),
        default="auto",
        help="auto: go on with what is there; none: throw it away and begin again",
    )
    run.add_argument(
        "--extend",
        action="store_true",
        help="rows were added at the manifest's end: keep the old rows and make the new ones",
    )


def parse_run_flags(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The flags of a parser after `add_run_flags`; refuses flags that contradict each other."""
    args = parser.parse_args(argv)
    if args.extend and args.resume == "none":
        parser.error("--extend keeps what --resume none throws away")
    return args


# ---- ranks ---------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Where this process works, and in which precision. (Training has another Machine.)"""

    rank: int
    ranks: int
    device: torch.device
    dtype: torch.dtype  # see `precision_on`


def join_machine(device: str) -> Machine:
    """Joins the other ranks, if torchrun started any. device: the value of --device."""
    rank, ranks, local_rank = torchrun_ranks()
    chosen, _ = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # else each rank also takes memory on the first GPU
    if ranks > 1:
        join_ranks("gloo", timeout=LONGEST_WAIT)  # no tensors go from GPU to GPU
    return Machine(rank, ranks, chosen, precision_on(chosen))


def precision_on(device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU bfloat16, or float16 if the current GPU has no bfloat16."""
    return DTYPES[choose_precision("auto", device)]


def autocast(machine: Machine) -> torch.autocast:
    """A context for running models: half precision on a GPU, float32 on a CPU."""
    device = machine.device.type
    return torch.autocast(device, machine.dtype, enabled=device != "cpu")


def leave_ranks() -> None:
    """Leaves the ranks that `join_machine` joined, if there were any."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- batches -------------------------------------------------------------------------------------


class Item(NamedTuple):
    """What reading one video gave."""

    video: Video
    value: Any  # what read(video) returned; None if it failed
    error: str | None = None  # why it failed; None if it did not


class VideoItems(Dataset):
    """Item i holds read(videos[i]), or why the video cannot be read."""

    def __init__(self, videos: Sequence[Video], read: Callable[[Video], Any]):
        self.videos = videos
        self.read = read

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index) -> Item:
        video = self.videos[index]
        try:
            return Item(video, self.read(video))
        except VideoError as error:
            return Item(video, None, str(error))


def batches(
    machine: Machine,
    videos: Sequence[Video],
    read: Callable[[Video], Any],
    batch_size: int,
    workers: int,
    max_steps: int | None = None,
) -> Iterator[list[Item]]:
    """The items of `videos` (this rank's share), in order, under a progress bar.

    After SIGTERM or Ctrl-C the current batch is finished, and the program ends by that signal when
    the next one is asked for: write a batch before that."""
    # Without ranks=: each rank may stop by itself, because all of its results are on the disk.
    stop = StopSignal(then="ending after this batch")
    loader = make_loader(VideoItems(videos, read), batch_size, workers)
    with tqdm(total=len(videos), unit="video", disable=machine.rank > 0) as bar:
        for step, items in enumerate(checked_batches(loader), 1):
            yield items
            bar.update(len(items))
            if step == max_steps or stop.name:  # a signal came
                break
    if stop.name:
        print(
            f"{stop.name}: stopped; the same command goes on (not with --resume none, which throws "
            "away what is done)",
            file=sys.stderr,
        )
        stop.end()  # ends the program
    stop.end_on_signal()  # all is on the disk: a signal may end what follows directly
