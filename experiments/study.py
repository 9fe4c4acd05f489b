"""The study: does text-guided masking help, does the contrastive loss, and does the text matter or
would any saliency do?

    python experiments/study.py                                  the laptop tier, on the toy world: 40 minutes on two CPU cores
    python experiments/study.py --tier gpu --device cuda --workers 14          everything; in hours, on one GPU (never run so far)
    python experiments/study.py --tier gpu --device cuda --workers 14 --max-minutes 10 --skip experiments/results/runs.csv     a piece
    python experiments/study.py --list                           the plan: cells, nothing run
    python experiments/study.py --gather                         tables and pictures anew from what there is, nothing trained

The first study was run on a world that could not answer (experiments/RESULTS.md says why); its
answers are withdrawn.

A cell is one pretraining run (mask x ratio x where the saliency comes from x contrastive weight x
seed) and what is measured of it, by the stages as they are: reconstruction and contrastive loss,
linear probe, kNN and, where planned, fine-tuning of each label. Beside them stand an untrained
encoder and one trained with labels alone. Controls take the place of the text's saliency:

    shuffled   every video has another video's captions, always another text: saliency.py and the
               contrastive loss read those
    no-text    the cosine of each patch to its own image's class token, by the same CLIP; the
               contrastive loss keeps the own text
    truth      the share of each patch that the true object covers (toy world alone): the upper
               bound; own text, too

Writes  runs/study/TIER/CELL/: the stages' files, log.txt, result.json     runs/study/saliency/: the controls' arrays
        experiments/results/runs.csv, a line a finished cell; *.png; tables between the markers of
        experiments/RESULTS.md

What is missing of the data is made first. Killed, it goes on where it stopped. A line of runs.csv
stays until its cell is run anew, so pieces from several machines add up (--skip leaves out cells
that have a line). Letters: N videos, S moments, G grid, K captions."""

import argparse
import csv
import io
import itertools
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "experiments")]
import tables
from cells import (
    CONTROLS,
    Cell,
    control_prefix,
    run_cell,
    run_stage,
    settings,
    side_by_side,
    stage,
    write,
)
from toy_report import score_saliency

import masking
from tgm.arrays import companion
from tgm.manifest import ManifestError

# experiments/evaluation.py's
LIGHT = (
    "--size tiny --batch-size 32 --repeat 2 --blr 8e-3 --warmup-epochs 1 --layer-decay 0.9 --no-flip --crop-scale 0.5 1 --mixup 0 "
    "--cutmix 0 --erase 0 --rand-augment 0 0 --views 2 1"
)
TIERS = {
    "laptop": dict(  # 24,000 clips a cell: 80 to 100 s on one core; probes 13 s
        seeds=4,
        jobs=2,
        finetuned=[],
        pretrain="--size tiny --batch-size 16 --repeat 2 --epochs 4 --warmup-epochs 0.4 --blr 1.6e-2",
        probe="--clips 1 --seeds 1",
        finetune=f"{LIGHT} --epochs 10",
        supervised=f"{LIGHT} --epochs 60",
    ),
    "gpu": dict(  # 240,000 clips a cell
        seeds=5,
        jobs=1,
        finetuned=["action", "object"],
        pretrain="--size tiny --batch-size 32 --repeat 2 --epochs 40 --warmup-epochs 2 --blr 8e-3",
        probe="--attentive --seeds 1",
        finetune=f"{LIGHT} --epochs 10",
        supervised=f"{LIGHT} --epochs 60",
    ),
}
EQUAL = (0.6, 0.75)  # ratios at which all masks have equally many tokens


# ---- the plan ------------------------------------------------------------------------------------


def plan(tier, seeds):
    """The cells of a tier, seed after seed, so that a study that is stopped has whole
    comparisons.
    """
    own, text = masking.RATIOS, masking.RATIOS["text"]
    if tier == "laptop":  # what the three questions need, and no more
        cells = [Cell(mask, own[mask], nce=nce) for mask in ("tube", "text") for nce in (0.0, 1.0)]
        cells += [
            Cell(mask, ratio, nce=1.0)
            for mask, ratio in (("tube", text), ("text-inverse", text), ("motion", own["motion"]))
        ]
        cells += [Cell("text", text, control, 1.0) for control in CONTROLS]
    else:
        what = [
            (mask, ratio, "own") for mask in own for ratio in dict.fromkeys((own[mask], *EQUAL))
        ]
        what += [("text", text, control) for control in CONTROLS]
        cells = [Cell(*one, nce) for one in what for nce in (0.0, 1.0)] + [Cell("supervised")]
    return [
        cell._replace(seed=seed) for seed in range(seeds) for cell in [*cells, Cell("untrained")]
    ]


# ---- the data ------------------------------------------------------------------------------------


def complete(prefix, *kinds):
    """Whether PREFIX.KIND.npy are there and hold a row for every video."""
    try:
        arrays = [np.load(f"{prefix}.{kind}.npy", mmap_mode="r") for kind in kinds]
    except (OSError, ValueError):
        return False
    return not any(
        np.isnan(array[(slice(None),) + (0,) * (array.ndim - 1)]).any() for array in arrays
    )


def prepare(args, cells):
    """Makes what the cells need and the disk lacks, up to args.jobs stages at a time; ends the
    study if one fails.
    """
    run = ("--device", args.device, "--workers", args.workers)
    clip = ("--clip", args.clip, "--pretrained", args.pretrained)
    need = {cell.saliency for cell in cells}
    data = args.data
    logs = args.out / "prepare"
    rounds = [{}, {}, {}]
    missing = lambda name, *kinds: (
        not complete(data.with_suffix("") if name == "own" else control_prefix(name, args), *kinds)
    )
    shuffled = control_prefix("shuffled", args)

    def add(round, name, script, *argv):
        rounds[round][name] = (run_stage, script, argv, logs / f"{name.replace(' ', '-')}.txt")

    if not data.exists() and data == Path("data/train.csv"):
        run_all(
            {"toy world": (run_stage, "toy", ("--workers", args.jobs), logs / "toy-world.txt")},
            args,
            "the toy world",
        )
    if any(cell.saliency == "own" and cell.mask.startswith("text") or cell.ratio for cell in cells):
        if not companion(data, "captions.jsonl").exists():
            add(0, "captions", "caption", data, "--model", args.captioner, "--batch-size", 64, *run)
        if missing("own", "saliency", "text"):
            add(1, "saliency", "saliency", data, *clip, "--moments", args.moments, *run)
    if any(cell.mask in ("motion", "flow") for cell in cells) and missing("own", "motion"):
        add(0, "motion", "saliency", data, "--cue", "motion", "--grid", 8, *run)
    if "shuffled" in need and missing("shuffled", "saliency", "text"):
        add(
            1,
            "shuffled",
            "saliency",
            data,
            *clip,
            "--moments",
            args.moments,
            *run,
            "--captions",
            f"{shuffled}.captions.jsonl",
            "--out",
            shuffled,
        )
    for control in ("no-text", "truth"):
        if control in need and missing(control, "saliency", "text"):
            add(
                2,
                control,
                "controls",
                control,
                "--data",
                data,
                "--out",
                control_prefix(control, args),
                *clip,
                "--device",
                args.device,
            )
    run_all(rounds[0], args, "captions and motion")
    if "shuffled" in rounds[1]:
        stage("controls", "shuffled", "--data", data, "--out", shuffled, log=logs / "shuffled.txt")
    run_all(rounds[1], args, "saliency")
    run_all(rounds[2], args, "controls")


def run_all(tasks, args, what):
    report(side_by_side(tasks, args, what))


def report(failed):
    if failed:
        sys.exit("\n".join(f"{name}: {error}" for name, error in failed))


# ---- results -------------------------------------------------------------------------------------


def gather(args):
    """Brings the results of this folder into runs.csv, whose other lines stay; returns all lines
    of the tier, as dicts.
    """
    path, rows = args.results / "runs.csv", {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = {(row["tier"], row["name"]): row for row in csv.DictReader(file)}
    for found in sorted(args.out.glob("*/*/result.json")):
        result = json.loads(found.read_text())["result"]
        rows[result["tier"], result["name"]] = {
            key: f"{value:.6g}" if isinstance(value, float) else str(value)
            for key, value in result.items()
        }
    text = io.StringIO()
    writer = csv.DictWriter(
        text, dict.fromkeys(itertools.chain(*rows.values())), restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(row for _, row in sorted(rows.items()))
    write(path, text.getvalue())
    return [
        {key: number(value) for key, value in row.items()}
        for (tier, _), row in sorted(rows.items())
        if tier == args.tier
    ]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text or None


def groups(rows):
    """Results by what was run: {(what, contrastive weight): {seed: row}}, in the order of the
    plan.
    """
    found = {}
    for row in rows:
        cell = Cell(row["mask"], row["ratio"], row["saliency"], row["nce"], int(row["seed"]))
        found.setdefault((cell.what, cell.nce), {})[cell.seed] = row
    order = list(dict.fromkeys((cell.what, cell.nce) for cell in plan("gpu", 1)))
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def questions(found):
    """The comparisons decided on beforehand: [(question, text of the pair, one, other), ...];
    one and other are keys of groups().
    """
    own = {mask: f"{mask} {ratio:g}" for mask, ratio in masking.RATIOS.items()}
    text, tube, pairs = own["text"], own["tube"], []
    for nce in (0.0, 1.0):
        pairs += [
            ("text masking", (text, nce), (other, nce))
            for other in (tube, "tube 0.6", own["motion"], own["text-inverse"])
        ]
    pairs += [("contrastive loss", (what, 1.0), (what, 0.0)) for what in own.values()]
    for nce in (0.0, 1.0):
        pairs += [("the text", (text, nce), (f"{text}, {control}", nce)) for control in CONTROLS]
    return [pair for pair in pairs if pair[1] in found and pair[2] in found]


def text_between(rows, args):
    """What stands between the tier's markers of RESULTS.md."""
    found, each = groups(rows), lambda key: ", ".join(sorted({str(row[key]) for row in rows}))
    majority = ", ".join(
        f"{label} {max(tables.column(dict(enumerate(rows)), f'{label}_majority'), default=0):.3f}"
        for label in args.labels
    )
    tube = lambda what: dict.fromkeys(
        (f"tube {masking.RATIOS['tube']:g}", f"tube {what.split(',')[0].split()[-1]}")
    )
    minutes = sum(row["seconds"] for row in rows) / 60
    return (
        f"{len(rows)} of {len(plan(args.tier, TIERS[args.tier]['seeds']))} cells, {minutes:.0f} minutes in all, on {each('device')}; torch {each('torch')}. Majority class: {majority}.\n\n"
        + tables.report(found, tables.measures_of(rows, args.labels), tube, questions(found))
        + where_it_points(args)
    )


def where_it_points(args):
    """A table of the saliencies that there are, of the first caption, against the toy world's
    true masks; "" without them.
    """
    truth, lines = companion(args.data, "masks.npy"), []
    prefixes = {"text": args.data.with_suffix("")} | {
        control: control_prefix(control, args) for control in CONTROLS
    }
    for name, prefix in prefixes.items():
        if truth.exists() and complete(prefix, "saliency"):
            found = score_saliency(
                np.load(f"{prefix}.saliency.npy", mmap_mode="r")[:, :1],
                np.load(truth, mmap_mode="r"),
            )
            lines.append((name, *(f"{value:.3f}" for value in found)))
    head = ("saliency", "pointing accuracy", "AUC", "pointing by chance")
    return (
        f"\n### What the saliencies point at: the training videos\n\n{tables.table(head, lines)}"
        if lines
        else ""
    )


def write_tables(rows, args):
    start, end = f"<!-- study.py: {args.tier} -->", "<!-- end -->"
    old = args.report.read_text(encoding="utf-8") if args.report.exists() else f"{start}\n{end}\n"
    if start not in old or end not in old.split(start, 1)[1]:
        sys.exit(f"{args.report}: has no lines {start} and {end} to write the tables between")
    before, rest = old.split(start, 1)
    write(args.report, f"{before}{start}\n{text_between(rows, args)}{end}{rest.split(end, 1)[1]}")


def draw(rows, args):
    """The pictures, of what there is: the accuracies from runs.csv, the others from the folders
    of finished cells.
    """
    import pictures

    measures = [
        measure
        for measure in tables.measures_of(rows, args.labels)
        if sum(row.get(measure) is not None for row in rows) > 1
    ]
    summary = {
        (what, nce if what.split()[0] in masking.MASKS else None): {
            tables.title(measure): tables.spread(values)
            for measure in measures
            if (values := tables.column(of_seed, measure))
        }
        for (what, nce), of_seed in groups(rows).items()
    }
    drawn = (
        {
            "accuracies": pictures.accuracies(
                summary, [tables.title(measure) for measure in measures]
            )
        }
        if measures
        else {}
    )
    logs = {}
    done = {}
    for cell in plan(args.tier, args.seeds):
        folder = args.out / args.tier / cell.name
        if (
            cell.ratio == masking.RATIOS.get(cell.mask)
            and cell.saliency == "own"
            and (folder / "result.json").exists()
        ):
            logs.setdefault((cell.what, cell.nce), []).append(
                [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            )
            if cell.nce:
                done.setdefault(cell.what, folder)
    prefixes = {"text": args.data.with_suffix("")} | {
        control: control_prefix(control, args) for control in CONTROLS
    }
    prefixes = {
        name: prefix for name, prefix in prefixes.items() if Path(f"{prefix}.saliency.npy").exists()
    }
    drawn |= {"contrastive": pictures.contrastive(logs)} if logs else {}
    drawn |= {"reconstructions": pictures.reconstructions(done, args.row)} if done else {}
    drawn |= {"saliency": pictures.saliency(args.data, prefixes, args.row)} if prefixes else {}
    for name, figure in drawn.items():
        path = args.results / f"{name}-{args.tier}.png"
        figure.savefig(path, dpi=80, bbox_inches="tight", facecolor="white")
        pictures.plt.close(figure)
        print(path)


# ---- the study -----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", choices=tuple(TIERS), default="laptop")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, default=Path("data/train.csv"), help="training manifest")
    data.add_argument(
        "--test",
        type=Path,
        default=Path("data/val.csv"),
        help="test manifest of probes and fine-tuning",
    )
    data.add_argument(
        "--labels",
        nargs="+",
        default=["action=label", "object=object"],
        metavar="NAME=COLUMN",
        help="what is probed",
    )
    data.add_argument(
        "--captioner",
        default=str(ROOT / "data/toy/blip"),
        help="caption.py --model, where captions are missing",
    )
    data.add_argument(
        "--clip",
        default=f"local-dir:{ROOT}/data/toy/clip",
        help="saliency.py --clip, of the controls too",
    )
    data.add_argument("--pretrained", default="openai", help="saliency.py --pretrained")
    data.add_argument("--moments", type=int, default=8, help="saliency.py --moments")
    what = parser.add_argument_group("what is run")
    what.add_argument("--seeds", type=int, help="seeds of each cell (default: the tier's)")
    what.add_argument(
        "--only", nargs="+", metavar="NAME", help="these cells alone, as --list names them"
    )
    what.add_argument(
        "--skip", type=Path, metavar="CSV", help="leave out cells that have a line in it"
    )
    what.add_argument(
        "--max-minutes", type=float, default=math.inf, help="start no cell after this time"
    )
    for kind, stage_name in (
        ("pretrain", "pretrain.py"),
        ("probe", "linprobe.py"),
        ("finetune", "finetune.py"),
        ("supervised", "finetune.py, of the cell supervised"),
    ):
        what.add_argument(
            f"--{kind}", metavar="FLAGS", help=f"flags of {stage_name} (default: the tier's)"
        )
    what.add_argument(
        "--finetuned",
        nargs="*",
        metavar="NAME",
        help="labels that each cell is fine-tuned on (default: the tier's)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the cells")
    run.add_argument(
        "--results",
        type=Path,
        default=ROOT / "experiments/results",
        help="folder of runs.csv and pictures",
    )
    run.add_argument(
        "--report",
        type=Path,
        default=ROOT / "experiments/RESULTS.md",
        help="file whose tables are rewritten",
    )
    run.add_argument("--jobs", type=int, help="cells side by side (default: the tier's)")
    run.add_argument(
        "--workers", type=int, default=0, help="decoding processes of each stage; 0 decodes in line"
    )
    run.add_argument("--device", default="cpu", help="cpu, cuda")
    run.add_argument(
        "--resume", choices=("auto", "none"), default="auto", help="none: run all cells anew"
    )
    run.add_argument("--list", action="store_true", help="print the plan and end")
    run.add_argument("--gather", action="store_true", help="run nothing: tables and pictures alone")
    run.add_argument(
        "--row",
        type=int,
        default=2,
        help="the video of the pictures, a line of the manifest from 0",
    )
    args = parser.parse_args(argv)
    for key, value in TIERS[args.tier].items():
        if key in args and getattr(args, key) is None:
            setattr(args, key, value)
    args.labels = {
        name: column or name for name, _, column in (label.partition("=") for label in args.labels)
    }
    return args


def main(argv=None):
    args, began = parse_args(argv), time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    planned = {cell.name: cell for cell in plan(args.tier, args.seeds)}
    if unknown := [name for name in args.only or () if name not in planned]:
        sys.exit(
            f"--only {' '.join(unknown)}: no such cell in the {args.tier} tier of {args.seeds} seeds (--list names them)"
        )
    cells = [cell for cell in planned.values() if not args.only or cell.name in args.only]
    if args.skip:
        if not args.skip.exists():
            sys.exit(f"--skip {args.skip}: no such file")
        with open(args.skip, newline="", encoding="utf-8") as file:
            there = {row["name"] for row in csv.DictReader(file) if row["tier"] == args.tier}
        cells = [cell for cell in cells if cell.name not in there]
    tasks = {}
    for cell in cells:
        found = args.out / args.tier / cell.name / "result.json"
        if args.resume == "auto" and found.exists():
            if json.loads(found.read_text())["settings"] != json.loads(
                json.dumps(settings(cell, args))
            ):
                sys.exit(
                    f"{found}: made with other settings; --resume none runs all cells anew, --out takes another folder"
                )
            continue
        tasks[cell.name] = (run_cell, cell, args)
    print(f"{args.tier}: {len(cells)} cells, {len(tasks)} to do, {args.jobs} side by side")
    if args.list:
        print(*(cell.name + (" (to do)" if cell.name in tasks else "") for cell in cells), sep="\n")
        return
    failed = []
    try:
        if tasks and not args.gather:
            prepare(args, cells)
            failed = side_by_side(tasks, args, f"{args.tier} cells", began + 60 * args.max_minutes)
        rows = gather(args)
        if rows:
            write_tables(rows, args)
            draw(rows, args)
        print(
            f"{args.results / 'runs.csv'}, {args.report}: {len(rows)} cells of the {args.tier} tier, {(time.time() - began) / 60:.1f} minutes"
        )
    except (ManifestError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on")
    report(failed)


if __name__ == "__main__":
    main()
