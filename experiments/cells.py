"""One cell of experiments/study.py: what it is, and the stages that pretrain and measure it; and
tasks side by side.

Letters: as in study.py.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "experiments")]
import tables

import masking
import model as models
from tgm.manifest import ManifestError
from tgm.run import Stopped

CONTROLS = ("shuffled", "no-text", "truth")


class Cell(NamedTuple):
    # a mask of masking.py; "untrained": no pretraining; "supervised": labels alone, for longer
    mask: str
    ratio: float = 0.0
    saliency: str = "own"  # or one of CONTROLS
    nce: float = 0.0
    seed: int = 0

    @property
    def what(self):
        """Its name but for the contrastive weight and the seed."""
        return (
            self.mask
            + (f" {self.ratio:g}" if self.ratio else "")
            + (f", {self.saliency}" if self.saliency != "own" else "")
        )

    @property
    def name(self):
        return f"{self.what.replace(', ', '-').replace(' ', '-')}{f'-nce{self.nce:g}' if self.ratio else ''}-seed{self.seed}"


def control_prefix(control, args):
    return args.out / "saliency" / control


def stage(name, *argv, log):
    """A stage's main() in this process, its output added to the file `log`. RuntimeError if it
    fails, KeyboardInterrupt if stopped.
    """
    argv = [str(arg) for arg in argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "a", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        print("+ python", name + ".py", shlex.join(argv))
        try:
            importlib.import_module(name).main(argv)
        except Stopped:
            raise KeyboardInterrupt from None
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"{name}.py: {stop.code} ({log})") from None
        finally:  # stages note SIGTERM and Ctrl-C (tgm.run.StopSignal); here they end the study
            noted = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
    if getattr(noted, "name", None):
        raise KeyboardInterrupt


def run_stage(name, argv, log):
    stage(name, *argv, log=log)


def last_line(path):
    return json.loads(path.read_text().splitlines()[-1])


def logged(path):
    """Of a pretraining log.jsonl: mean losses over the last tenth of the steps, and the seconds
    of all steps.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    before = 0
    tail = []
    seconds = 0.0
    for line in lines:
        steps, before = line["step"] - before, line["step"]
        seconds += steps * line["step_ms"] / 1000
        if line["step"] > 0.9 * lines[-1]["step"]:
            tail.append(
                (
                    steps,
                    line["loss_mae"],
                    line["loss_nce"] if line["loss_nce"] is not None else math.nan,
                )
            )
    tail = np.array(tail)
    return *(tail[:, 1:] * tail[:, :1]).sum(0) / tail[:, 0].sum(), seconds


def settings(cell, args):
    """What a cell's result hangs on: a result.json with other settings is refused."""
    flags = {kind: getattr(args, kind) for kind in ("pretrain", "probe", "finetune", "supervised")}
    return flags | {
        "data": str(args.data),
        "test": str(args.test),
        "labels": args.labels,
        "finetuned": args.finetuned,
    }


def run_cell(cell, args):
    """Pretrains, probes and fine-tunes; writes result.json, a line of runs.csv to be."""
    folder, began = args.out / args.tier / cell.name, time.time()
    log, checkpoint = folder / "log.txt", folder / "checkpoint.pt"
    run = ["--device", args.device, "--workers", args.workers, "--seed", cell.seed]
    if args.resume == "none":
        shutil.rmtree(folder, ignore_errors=True)
    size = importlib.import_module("pretrain").parse_args(shlex.split(args.pretrain)).size
    result = cell._asdict() | {"tier": args.tier, "name": cell.name}
    if cell.ratio:
        controls = (
            [] if cell.saliency == "own" else ["--companions", control_prefix(cell.saliency, args)]
        )
        stage(
            "pretrain",
            *shlex.split(args.pretrain),
            "--data",
            args.data,
            "--mask",
            cell.mask,
            "--mask-ratio",
            cell.ratio,
            *controls,
            *run,
            "--nce-weight",
            cell.nce,
            "--picture-every",
            0,
            "--resume",
            "auto",
            "--out",
            folder,
            log=log,
        )
        last, used = last_line(folder / "log.jsonl"), json.loads((folder / "args.json").read_text())
        result["loss_mae"], result["loss_nce"], result["pretrain_s"] = logged(folder / "log.jsonl")
        grid = models.VideoMAE(size, used["frames"], used["image_size"], used["text_dim"]).grid
        visible = math.prod(grid) - masking.masked_count(cell.ratio, grid)
        clips = last["step"] * used["batch_size"] * used["repeat"] * used["accum"]
        result |= {
            "steps": last["step"],
            "lr": used["lr"],
            "clips": clips,
            "visible": visible,
            "of": math.prod(grid),
            "tokens": clips * visible,
        }
    weights = checkpoint if cell.ratio else "none"
    data, done = ["--size", size, "--data", args.data], time.time()
    for label, column in args.labels.items():
        if cell.mask != "supervised":
            stage(
                "linprobe",
                *shlex.split(args.probe),
                *data,
                "--test",
                args.test,
                "--checkpoint",
                weights,
                "--label-column",
                column,
                *run,
                "--out",
                folder / "probe",
                log=log,
            )
            found = json.loads((folder / "probe" / f"{column}.json").read_text())
            result |= {
                f"{label}_{probe}": found[probe] for probe in tables.PROBES if probe in found
            } | {f"{label}_majority": found["majority"]}
    result["probe_s"], done = time.time() - done, time.time()
    flags = shlex.split(args.supervised if cell.mask == "supervised" else args.finetune)
    for label in args.finetuned:
        stage(
            "finetune",
            *flags,
            *data,
            "--val",
            args.test,
            "--checkpoint",
            weights,
            "--label-column",
            args.labels[label],
            *run,
            "--resume",
            "auto",
            "--log-every",
            100000,
            "--out",
            folder / f"finetune-{label}",
            log=log,
        )
        found = json.loads((folder / f"finetune-{label}" / "test.json").read_text())
        result |= {f"{label}_finetuned": found["top1"], f"{label}_majority": found["majority"]}
    result["finetune_s"] = time.time() - done
    for bulky in (*folder.glob("probe/*.npy"), *folder.glob("finetune-*/*.pt")):
        bulky.unlink()
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    device = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"cpu, {torch.get_num_threads()} thread"
    )
    result |= {
        "seconds": time.time() - began,
        "device": device,
        "torch": torch.__version__,
        "commit": commit,
    }
    write(
        folder / "result.json",
        json.dumps({"result": result, "settings": settings(cell, args)}, indent=1) + "\n",
    )


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".new").write_text(text)
    path.with_name(path.name + ".new").replace(path)


def side_by_side(tasks, args, what, until=math.inf):
    """Runs tasks {name: (function, its arguments)} in args.jobs processes, or here; none starts
    after the time `until`. Returns [(name, error), ...] of those that failed."""
    failed, waiting = [], list(tasks.items())
    with (
        tqdm(total=len(tasks), desc=what, unit="task", disable=not tasks) as bar,
        contextlib.ExitStack() as stack,
    ):
        submit = None
        if args.jobs > 1 and tasks:
            # processes that end with the last task, and with them their locks on what they wrote
            submit = stack.enter_context(
                ProcessPoolExecutor(
                    args.jobs,
                    multiprocessing.get_context("spawn"),
                    torch.set_num_threads,
                    (max(1, (os.cpu_count() or 1) // args.jobs),),
                )
            ).submit
        running = {}
        while running or (waiting and time.time() < until):
            while waiting and len(running) < args.jobs and time.time() < until:
                name, (work, *of) = waiting.pop(0)
                bar.set_postfix_str(name)
                if submit:
                    running[submit(work, *of)] = name
                    continue
                try:
                    work(*of)
                except (RuntimeError, OSError, ManifestError) as error:
                    failed.append((name, error))
                bar.update()
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                name, error = running.pop(future), future.exception()
                if error is not None and not isinstance(
                    error, (RuntimeError, OSError, ManifestError)
                ):
                    raise error
                failed += [(name, error)] if error else []
                bar.update()
    return failed
