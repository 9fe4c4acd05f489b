"""The study: does text-guided masking help, does the contrastive loss, and do the words matter?

    python experiments/study.py --list             the plan: what is done, what is to do
    python experiments/study.py --jobs 2           runs what is missing, one cell per core
    python experiments/study.py --report           rewrites the tables of RESULTS.md, runs nothing

A cell is one pretraining run of the tiny model on the toy world (data/toy.py), and what probes that
are trained on probe.csv make of its frozen encoder on val.csv: the actor's action, object (shape)
and scene, each by a linear probe, by nearest neighbours and by an attentive probe. All cells have
the same videos and, but for a few single runs, the same length and learning rate; cells of one
seed have the same order, crops and first weights, so that differences are taken seed by seed. The
masks named text differ in the map that they follow:

    text         CLIP's patches against the video's own captions, three that the captioner made
    bystander    the same against the true caption of the other thing in the video
    shuffled     the same against the captions of another video
    no-text      each patch against the class token of its own image, by the same CLIP
    truth        the share of each patch that the actor covers

With contrastive weight 1 the loss aligns with the video's own captions, whatever the map.

Writes  runs/study/CELL/, what the stages write; experiments/results/runs.csv, a line per finished
        cell; with --report the tables between the markers of experiments/RESULTS.md and pictures

Cells that have a line in runs.csv are done. The data, captions and maps are made first, where they
are missing. Ctrl-C or SIGTERM stops the study after the step; the same command goes on from there.
"""

import argparse
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tgm.flags import positive_int
from tgm.run import RunError

RESULTS = ROOT / "experiments/results/runs.csv"
OUT = Path("runs/study")
BATCH = 16
PRETRAIN = f"--size tiny --batch-size {BATCH} --repeat 2 --warmup-epochs 2"
EPOCHS = 27  # of 187 steps: 5,049 steps
LR = 3e-3
PROBE = "--data data/probe.csv --size tiny --clips 1 --attentive --token-grid 4 6 6 --seeds 1"
LABELS = {"action": "label", "object": "object", "scene": "scene"}
PROBES = ("linear", "knn", "attentive")
SOURCES = ("bystander", "shuffled", "no-text", "truth")


# ---- the plan ------------------------------------------------------------------------------------


class Cell(NamedTuple):
    mask: str  # one of masking.MASKS, or "untrained"
    ratio: float = 0.0
    source: str = "own"  # of a text mask's map: the own captions, or one of SOURCES
    nce: float = 0.0  # weight of the contrastive loss
    seed: int = 0
    epochs: int = EPOCHS
    lr: float = LR

    @property
    def what(self):
        """What was run, without the contrastive weight and the seed."""
        if self.mask == "untrained":
            return self.mask
        source = "" if self.source == "own" else f" of {self.source}"
        length = "" if self.epochs == EPOCHS else f", {self.epochs} epochs"
        rate = "" if self.lr == LR else f", lr {self.lr:g}"
        return f"{self.mask}{source} {self.ratio:g}{length}{rate}"

    @property
    def name(self):
        words = self.what.replace(",", "").replace(" ", "-")
        return f"{words}-nce{self.nce:g}-seed{self.seed}"


def plan():
    """All cells in the order in which they are run: what the main questions need first."""
    text, tube = Cell("text", 0.6), Cell("tube", 0.6)
    first = [text, tube, text._replace(nce=1), tube._replace(nce=1)]
    first += [text._replace(source=source, nce=1) for source in ("bystander", "no-text")]
    first += [Cell("untrained")]
    second = [text._replace(source=source, nce=1) for source in ("shuffled", "truth")]
    for mask in ("random", "text-inverse", "motion", "flow"):
        second += [Cell(mask, 0.6, nce=1), Cell(mask, 0.6)]
    second += [Cell("tube", 0.9), Cell("tube", 0.9, nce=1)]
    third = [text._replace(source=source) for source in SOURCES]
    third += [Cell("motion", 0.75), Cell("motion", 0.75, nce=1)]
    cells = []
    for part in (first, second, third):
        cells += [cell._replace(seed=seed) for seed in range(3) for cell in part]
    cells += [text._replace(nce=1, epochs=epochs) for epochs in (7, 14, 54)]
    for lr in (1e-3, 6e-3):
        cells += [mask._replace(nce=nce, lr=lr) for nce in (0, 1) for mask in (text, tube)]
    every = first + second + third
    return cells + [cell._replace(seed=seed) for seed in (3, 4) for cell in every]


def questions():
    """The pairs decided on before the first cell was run: [(question, one, other), ...]."""
    text = Cell("text", 0.6)
    pairs = []
    for nce in (0, 1):
        for other in ("tube", "random", "motion", "flow", "text-inverse"):
            pairs.append(
                ("text masking, equal tokens", text._replace(nce=nce), Cell(other, 0.6, nce=nce))
            )
    for what in (text, Cell("tube", 0.6), Cell("random", 0.6), Cell("tube", 0.9)):
        pairs.append(("contrastive loss", what._replace(nce=1), what))
    for nce in (1, 0):
        for source in SOURCES:
            own = text._replace(nce=nce)
            pairs.append(("the words", own, own._replace(source=source)))
    pairs.append(("text masking, own ratios", text._replace(nce=1), Cell("tube", 0.9, nce=1)))
    return pairs


def afterwards():
    """Further pairs that RESULTS.md speaks of, chosen when the results had been seen."""
    text, tube = Cell("text", 0.6), Cell("tube", 0.6)
    inverse, flow, random = Cell("text-inverse", 0.6), Cell("flow", 0.6), Cell("random", 0.6)
    shuffled = text._replace(source="shuffled", nce=1)
    pairs = [
        ("contrastive loss", what._replace(nce=1), what)
        for what in (flow, inverse, Cell("motion", 0.6))
    ]
    for other in (tube, random):
        pairs.append(("inverted text masks", inverse._replace(nce=1), other._replace(nce=1)))
    for nce in (1, 0):
        pairs.append(("inverted text masks", inverse._replace(nce=nce), tube))
        pairs.append(("flow masks", flow._replace(nce=nce), tube._replace(nce=nce)))
    others = [tube, random] + [text._replace(source=source) for source in ("no-text", "truth")]
    for other in others:
        pairs.append(("another video's words", shuffled, other._replace(nce=1)))
    return pairs


# ---- running -------------------------------------------------------------------------------------


class Stopped(Exception):
    """The study was told to stop."""


class Runner:
    """Runs stages as processes of their own, and hands a signal on to them."""

    def __init__(self, threads):
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.processes = set()
        self.stopped = threading.Event()

    def stop(self, *_):
        self.stopped.set()
        for process in list(self.processes):
            process.terminate()

    def run(self, script, *flags, log):
        """Runs a script, its output added to the file `log`. RuntimeError if it fails, Stopped if
        it was told to stop."""
        if self.stopped.is_set():
            raise Stopped
        log.parent.mkdir(parents=True, exist_ok=True)
        flags = [str(flag) for flag in flags]
        with open(log, "a") as file:
            print("+ python", script, shlex.join(flags), file=file, flush=True)
            command = [sys.executable, str(ROOT / script), *flags]
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # Ctrl-C reaches the study alone
            )
            self.processes.add(process)
            if self.stopped.is_set():  # since the question above
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        if self.stopped.is_set():
            raise Stopped
        if code != 0:
            raise RuntimeError(f"{script}: {log.read_text().strip().splitlines()[-1]} ({log})")


def prepare(runner, cells):
    """Makes the toy world, its captions, and the maps of these cells' masks, where they are
    missing."""
    log = OUT / "prepare.txt"
    data = "data/train.csv"
    clip = ("--clip", f"local-dir:{ROOT}/data/toy/clip", "--moments", 8)
    world = [Path(f"data/{split}.masks.npy") for split in ("train", "probe", "val")]
    if not all(path.exists() for path in world):  # the masks of a split are written last
        runner.run("data/toy.py", log=log)
    # each of these goes on from what is there
    runner.run("caption.py", "--data", data, "--model", f"{ROOT}/data/toy/blip", log=log)
    runner.run("saliency.py", "--data", data, *clip, log=log)
    runner.run("saliency.py", "--data", data, "--cue", "motion", "--grid", 8, log=log)
    needed = {cell.source for cell in cells}
    for source in SOURCES:
        if source in needed and not (OUT / f"maps/{source}.text.npy").exists():
            runner.run(
                "experiments/controls.py",
                source,
                "--data",
                data,
                "--out",
                OUT / "maps" / source,
                log=log,
            )


def run_cell(runner, cell, workers=0):
    """Pretrains and probes -> the cell's line of runs.csv, {column: value}. workers: of each
    stage's loader."""
    began = time.time()
    folder = OUT / cell.name
    log = folder / "log.txt"
    result = {"name": cell.name} | cell._asdict()
    checkpoint = "none"
    if cell.mask != "untrained":
        checkpoint = folder / "checkpoint.pt"
        flags = ["--mask", cell.mask, "--mask-ratio", cell.ratio, "--nce-weight", cell.nce]
        flags += ["--epochs", cell.epochs, "--blr", f"{cell.lr * 256 / BATCH:g}"]
        flags += ["--seed", cell.seed, "--picture-every", 0]
        if cell.source != "own":
            flags += ["--companions", OUT / "maps" / cell.source]
        flags += ["--workers", workers, "--log-every", 50, "--resume", "auto", "--out", folder]
        runner.run("pretrain.py", *shlex.split(PRETRAIN), *flags, log=log)
        result |= read_losses(folder / "log.jsonl")
    for name, column in LABELS.items():
        flags = ["--checkpoint", checkpoint, "--label-column", column, "--seed", cell.seed]
        flags += ["--workers", workers, "--out", folder / "probe"]
        runner.run("linprobe.py", *shlex.split(PROBE), *flags, log=log)
        found = json.loads((folder / f"probe/{column}.json").read_text())
        for probe in PROBES:
            result[f"{name}_{probe}"] = found[probe]
    for features in (folder / "probe").glob("*.npy"):
        features.unlink()
    result["seconds"] = round(time.time() - began)
    result["torch"] = torch.__version__
    result["commit"] = commit()
    return result


def read_losses(path):
    """The steps of a run, and the means of its losses over their last tenth. RuntimeError if its
    log cannot be read."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        last = lines[-1]["step"]
        tail = [line for line in lines if line["step"] > 0.9 * last]
        losses = ("loss_mae", "loss_nce")
        means = {loss: sum(line[loss] for line in tail) / len(tail) for loss in losses}
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{path}: cannot be read ({type(error).__name__})"
        raise RuntimeError(f"{reason}: delete its folder, then the same command") from None
    return means | {"steps": last}


def commit():
    """The commit of this code, "" where there is no git, or a copy without its history."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


# Columns that stay text: float("55e6943"), a commit, would be infinite.
TEXT_COLUMNS = ("name", "mask", "source", "commit", "torch")


def read_runs(path=RESULTS):
    """{name: line} of runs.csv; numbers are floats, but for those in TEXT_COLUMNS."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {
            line["name"]: {key: value_of(key, text) for key, text in line.items()}
            for line in csv.DictReader(file)
        }


def value_of(column, text):
    if column in TEXT_COLUMNS:
        return text
    try:
        return float(text)
    except ValueError:
        return text


def add_run(result, path):
    """Adds a line to runs.csv; the file is whole at any time."""
    runs = read_runs(path) | {result["name"]: result}
    columns = dict.fromkeys(key for run in runs.values() for key in run)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    with open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for run in runs.values():
            writer.writerow({key: shown(value) for key, value in run.items()})
    aside.replace(path)


def shown(value):
    return f"{value:.6g}" if isinstance(value, float) else value


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=positive_int, default=1, help="cells that run side by side")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="decoding processes of each cell: raise it where a GPU waits for the CPU",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="file of finished cells, such as a GPU's"
    )
    parser.add_argument("--only", nargs="+", metavar="CELL", help="these cells, as --list has them")
    parser.add_argument("--list", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--report", action="store_true", help="write the tables, run nothing")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    cells = plan()
    if args.only:
        names = {cell.name for cell in cells}
        unknown = [name for name in args.only if name not in names]
        if unknown:
            sys.exit(f"--only {' '.join(unknown)}: no such cell (--list names them)")
        cells = [cell for cell in cells if cell.name in args.only]
    if args.report:
        import report

        try:
            report.write(read_runs(args.results), plan(), questions(), afterwards())
        except RunError as error:
            sys.exit(str(error))
        return
    done = read_runs(args.results)
    missing = [cell for cell in cells if cell.name not in done]
    if args.list:
        for cell in cells:
            print(cell.name, "" if cell in missing else "(done)")
    print(f"{len(cells)} cells, {len(missing)} to do")
    if args.list or not missing:
        return
    runner = Runner(threads=max(1, (os.cpu_count() or 1) // args.jobs))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    try:
        prepare(runner, missing)
        run_cells(runner, missing, args)
    except Stopped:
        sys.exit("stopped: the same command goes on")
    except RuntimeError as error:
        sys.exit(str(error))


def run_cells(runner, cells, args):
    """Runs cells side by side and adds each to runs.csv. RuntimeError names those that failed."""
    lock = threading.Lock()
    failed = []

    def work(cell):
        try:
            result = run_cell(runner, cell, args.workers)
        except Stopped:
            return
        except RuntimeError as error:
            print(f"{cell.name}: {error}", file=sys.stderr, flush=True)
            failed.append(cell.name)
            return
        with lock:
            add_run(result, args.results)
            print(f"{cell.name}: {result['seconds']} seconds", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, cells))
    if runner.stopped.is_set():
        raise Stopped
    if failed:
        raise RuntimeError(f"{len(failed)} cells failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
