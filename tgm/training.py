"""What pretraining and fine-tuning share: the machine, the schedule and the log of a training run.
Needs run.py and curves.py.

    machine = Machine(args.device, args.amp)                # rank, device, precision
    schedule = Schedule(...)                                # how many steps, and of how many videos
    log = TrainingLog(out, videos, args.max_bad, schedule, machine, start)
    for step in range(start + 1, schedule.last_step + 1):
        batch = log.fetch(batches)
        ...
        log.add(norm, loss=loss)
        if step % args.log_every == 0:
            log.write_step(step, lr)

Shapes: L losses, N steps since the last log line.
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tgm.curves import draw_own_curves
from tgm.run import (
    LONGEST_WAIT,
    RunError,
    add_up_over_ranks,
    choose_device,
    give_up_together,
    join_ranks,
    list_names,
    torchrun_ranks,
    union_over_ranks,
    wait_for_ranks,
    writing,
)

MOST_NAMED = 20  # videos that a message names
# The run ends at a log line if fp16's scaler has skipped the latest so many steps, or more. It
# halves its scale, at first 2^16, with each of them: if a gradient is still not finite after so
# many, the scale is not the cause.
MOST_SKIPPED = 40


# ---- the machine ---------------------------------------------------------------------------------


class Machine:
    """Where and how this process trains.

    rank, ranks: the number of this process, of how many; 0 of 1 without torchrun
    device: a torch.device; amp: the precision, "bf16", "fp16" or "off"
    autocast: the context of a forward pass in that precision
    about: one line on all this"""

    def __init__(self, device: str, amp: str):
        """device, amp: as --device and --amp. RunError if there is no such GPU, or one for all
        ranks."""
        self.rank, self.ranks, local_rank = torchrun_ranks()
        if self.ranks > 1 and ":" in device:
            raise RunError(
                f"--device {device}: {self.ranks} ranks cannot train on one GPU: --device cuda "
                "gives each its own"
            )
        self.device, why = choose_device(device, local_rank)
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.amp = choose_precision(amp, self.device)
        dtype = DTYPES[self.amp]
        self.autocast = torch.autocast(self.device.type, dtype, enabled=self.amp != "off")
        self.about = f"{self.device} ({why}), amp {self.amp}, {self.ranks} ranks"

    def say(self, text: str):
        """Prints on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def join(self):
        """Connects the ranks."""
        if self.ranks > 1:
            join_ranks("nccl" if self.on_gpu else "gloo", timeout=LONGEST_WAIT)

    def leave(self):
        """Disconnects the ranks, when all have come here. Until then none may end: if one
        ends with an error or by a signal, torchrun ends the others at once, and rank 0 may still be
        writing."""
        if self.ranks > 1:
            wait_for_ranks()
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the ranks."""
        if self.ranks == 1:
            return model
        wrapped = DistributedDataParallel(model, [self.device] if self.on_gpu else None)
        # The buffers are tables of positions, which never change. torch 2.14 deprecates the
        # argument `broadcast_buffers` for `forward_sync_buffers`, which older versions do not know:
        # so the attribute is set.
        wrapped.broadcast_buffers = False
        return wrapped

    def accumulate(self, wrapped: nn.Module, is_last: bool):
        """The context of one of the batches of a step: only in the last one are gradients averaged
        over the ranks."""
        if is_last or self.ranks == 1:
            return contextlib.nullcontext()
        return wrapped.no_sync()


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def choose_precision(asked: str, device: torch.device) -> str:
    """What --amp stands for on a device: bf16, fp16 or off."""
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# ---- the schedule --------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """How many steps a run has, and of how many videos. An epoch is one pass over the videos. If
    their number is no multiple of the videos per step, the remaining ones are not used; they are
    others in each epoch."""

    videos: int  # usable ones; an epoch takes as many as fill whole steps
    batch_size: int  # videos per rank and batch
    repeat: int  # samples per video
    accum: int  # batches per step
    ranks: int
    epochs: int
    warmup_epochs: float
    max_steps: int | None

    @property
    def videos_per_step(self) -> int:
        return self.batch_size * self.accum * self.ranks

    @property
    def samples_per_step(self) -> int:
        return self.videos_per_step * self.repeat

    @property
    def steps_per_epoch(self) -> int:
        return self.videos // self.videos_per_step

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        return min(self.total_steps, self.max_steps or self.total_steps)

    @property
    def warmup_steps(self) -> float:
        return self.warmup_epochs * self.steps_per_epoch

    def epoch(self, step: int) -> float:
        """How many epochs are done after `step`, with its fraction."""
        return round(step / self.steps_per_epoch, 3)

    def ends_epoch(self, step: int, every: int = 1) -> bool:
        """True if this step is the last of the run, or the last of epoch `every`, 2 x `every` and
        so on. Also True for step 0; always False if `every` is 0."""
        if every == 0:
            return False
        return step == self.last_step or step % (every * self.steps_per_epoch) == 0

    def saves(self, step: int, save_every: int) -> bool:
        """Whether a checkpoint is due: at the end of each epoch and of the run, and every so many
        steps."""
        return self.ends_epoch(step) or (save_every > 0 and step % save_every == 0)

    def about(self, blr: float, min_blr: float, start: int, begun_for: int | None) -> str:
        """The derived numbers and notes, a line each.

        blr, min_blr: learning rates for 256 videos per step, the highest and the last
        start: the steps done before; begun_for: the epochs that a resumed run was begun for"""
        lr = blr * self.videos_per_step / 256
        floor = min(lr, min_blr * self.videos_per_step / 256)
        lines = [
            f"steps        {self.total_steps} = {self.epochs} epochs x {self.steps_per_epoch}, "
            f"from step {start}",
            f"batch        {self.samples_per_step} = {self.batch_size} videos x {self.repeat} "
            f"repeats x {self.accum} accumulated x {self.ranks} ranks",
            f"lr           {lr:.3g} = {blr:g} x {self.videos_per_step} videos / 256, down to "
            f"{floor:.3g}; {self.epochs} epochs, {self.epochs * self.repeat} effective",
        ]
        left_out = self.videos % self.videos_per_step
        if left_out > 0:
            lines.append(
                f"note         each epoch leaves out {left_out} videos, others each time, which "
                f"fill no step of {self.videos_per_step}"
            )
        # not last_step: a trial (--max-steps) may be continued
        if self.warmup_steps >= self.total_steps:
            lines.append(
                f"note         the warm-up of {self.warmup_epochs:g} epochs lasts the whole run: "
                "the learning rate only rises"
            )
        if begun_for is not None and begun_for < self.epochs:
            lines.append(
                f"note         begun for {begun_for} epochs, now {self.epochs}: the learning rate "
                "is that of the longer schedule from here on"
            )
        return "\n".join(lines)


# ---- the log -------------------------------------------------------------------------------------


def short(value: float) -> str:
    """A number for the terminal: to four digits, but never as 1.234e+04."""
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text else text


class TrainingLog:
    """log.jsonl, its curves, and what happened since its last line: losses, waiting, videos that
    failed.

    When a line is written, it ends the run, on all ranks with one message, if a loss or a gradient
    since the last line was not finite, or if too many videos cannot be read. fp16's scaler finds
    infinite gradients itself and skips their steps, so with it only the losses are looked at, and
    the run ends where MOST_SKIPPED steps in a row were skipped.

    The steps since the last line are called the window."""

    def __init__(
        self, out: Path, videos, max_bad: float, schedule: Schedule, machine: Machine, start: int
    ):
        """out: the folder of the run; videos: the manifest's; max_bad: the share of the schedule's
        videos that may fail; start: the steps done before."""
        self.path = out / "log.jsonl"
        self.videos = videos
        self.max_bad = max_bad
        self.schedule = schedule
        self.machine = machine
        self.failed = set()  # rows that could not be read, of all ranks
        self.names = []  # of the losses that are computed
        self.missing = {}  # {name: None} of the other losses
        self.skipped_in_a_row = 0  # the latest steps, if fp16's scaler skipped them
        self.drawn = -math.inf  # when curves.png was drawn last, seconds
        self.undrawn = None  # why it was left out
        self._begin_after(start)

    def _begin_after(self, step: int):
        self.last = step  # the step of the last line
        self.began = None  # when the first batch was asked for, seconds
        self.waited = 0.0  # seconds
        self.newly_failed = set()  # rows, of this rank
        self.rows = []  # for each step since: the rows of its batches on this rank, a set
        self.window = []  # for each step since: its losses and its norm, [L + 1], on the device
        self.skipped_steps = {}  # {"skipped_steps": how many of the window's}, with fp16 alone

    def fetch(self, batches) -> dict:
        """The next batch. The wait for it and its videos that failed are counted."""
        if len(self.rows) == len(self.window):  # `add` ended the last step: a new one begins
            self.rows.append(set())
        asked = time.time()
        if self.began is None:  # not earlier: saving and validating are not counted
            self.began = asked
        batch = next(batches)
        self.waited += time.time() - asked
        self.rows[-1].update(batch["row"].flatten().tolist())
        self.newly_failed.update(row for row in batch["failed"].tolist() if row >= 0)
        return batch

    def add(self, norm: torch.Tensor, **losses: torch.Tensor | None):
        """After each step: the norm of the gradient and the losses, numbers on the device. None
        stands for a loss that was not computed."""
        self.missing = {name: None for name, loss in losses.items() if loss is None}
        self.names = [name for name in losses if name not in self.missing]
        self.window.append(torch.stack([*(losses[name] for name in self.names), norm]))

    def write_step(self, step: int, lr: float):
        """Writes a line on the steps since the last one: means over them and over the ranks, all of
        which must call this; "skipped" is the number of videos that could not be read since this
        process began; "skipped_steps", with fp16, the number of steps that the scaler skipped,
        which grad_norm leaves out. Ends the run if it must end: see the class."""
        *losses, norm = self._reduce_and_check()
        seconds = (time.time() - self.began) / len(self.window)
        self.write(
            step=step,
            epoch=self.schedule.epoch(step),
            **dict(zip(self.names, losses, strict=True)),
            **self.missing,
            lr=lr,
            grad_norm=None if math.isnan(norm) else norm,  # NaN: all steps were skipped
            data_ms=1000 * self.waited / len(self.window),
            step_ms=1000 * seconds,
            clips_per_s=self.schedule.samples_per_step / seconds,
            left_s=(self.schedule.last_step - step) * seconds,
            skipped=len(self.failed),
            **self.skipped_steps,
        )
        self._begin_after(step)

    def write(self, **entry):
        """Rank 0 prints a line and appends it to the file. A value of None is not printed."""
        known = [f"{name} {short(value)}" for name, value in entry.items() if value is not None]
        self.machine.say("  ".join(known))
        if self.machine.rank == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def draw(self, step: int):
        """Rank 0 draws the lines so far as curves.png, but before the last step at most once a
        minute; where it cannot, it says why, once."""
        now = time.time()
        too_early = step < self.schedule.last_step and now < self.drawn + 60
        if self.machine.rank > 0 or too_early:
            return
        self.drawn = now
        reason = draw_own_curves(self.path)
        if reason != self.undrawn:
            self.undrawn = reason
            if reason is not None:
                print(reason, file=sys.stderr)

    def _reduce_and_check(self) -> list[float]:
        """-> the means of the losses and of the norm, over the window and the ranks. Ends the run
        if it must end."""
        window = torch.stack(self.window)  # [N, L + 1]
        finite = window.isfinite()
        with_fp16 = self.machine.amp == "fp16"
        good = finite[:, :-1].all(1) if with_fp16 else finite.all(1)  # [N]
        newly_failed = len(self.newly_failed - self.failed)
        problems = torch.tensor([newly_failed, 0.0], device=window.device)
        problems[1] = (~good).any()
        means = window.mean(0)
        if with_fp16:  # without the skipped steps
            means[-1] = window[:, -1].where(finite[:, -1], math.nan).nanmean()
        totals = torch.cat([means, problems])
        add_up_over_ranks(totals)
        # Here, at log lines alone, the CPU waits for the GPU.
        *sums, failed, broken = totals.tolist()
        if broken > 0:
            self._give_up_on_values(good.tolist(), finite[:, :-1].all(1).tolist())
        if failed > 0:
            self._count_failed()
        if with_fp16:
            self._count_skipped(finite[:, -1].tolist())
        return [value / self.machine.ranks for value in sums]

    def _give_up_on_values(self, good: list[bool], losses_finite: list[bool]):
        """Names the first step of any rank whose loss or gradient is not finite, and its videos.
        good: whether each step of the window is; losses_finite: whether its losses on this rank
        are."""
        bad = {i for i, is_good in enumerate(good) if not is_good}
        first = min(union_over_ranks(bad))
        # A gradient is averaged over the ranks, but a loss tells which of them had the videos. If
        # all losses are finite, the videos of all ranks are named.
        rows = set() if losses_finite[first] else self.rows[first]
        # Every rank has the same first union, so that all make the second one or none does.
        names = self._names(union_over_ranks(rows) or union_over_ranks(self.rows[first]))
        first += self.last + 1
        give_up_together(
            f"step {first}: the loss or its gradient is not finite; the last checkpoint is kept. "
            f"Its batch: {names}"
        )

    def _count_skipped(self, finite: list[bool]):
        """Counts the skipped steps, and ends the run after too many in a row. finite: whether each
        step's norm was, the same on every rank, because their gradients are."""
        self.skipped_steps = {"skipped_steps": finite.count(False)}
        for is_finite in finite:
            self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            give_up_together(
                f"fp16: the gradients of the last {self.skipped_in_a_row} steps are not finite, so "
                "nothing is learnt; the last checkpoint is kept. Lower --blr, or use --amp bf16 or "
                "off"
            )

    def _count_failed(self):
        self.failed |= union_over_ranks(self.newly_failed)
        if len(self.failed) > self.max_bad * self.schedule.videos:
            give_up_together(
                f"{len(self.failed)} of {self.schedule.videos} videos cannot be read, "
                f"more than --max-bad {self.max_bad}: {self._names(self.failed)}"
            )

    def _names(self, rows: set) -> str:
        """The names of videos, for a message."""
        return list_names([self.videos[row].name for row in sorted(rows)], MOST_NAMED)
