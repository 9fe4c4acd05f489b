"""The tables and the picture of experiments/RESULTS.md, from runs.csv alone. `python
experiments/study.py --report` calls it.

Shapes: a run is a line of runs.csv, {column: value}.
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tgm.curves import load_pyplot
from tgm.evaluation import t_interval

REPORT = ROOT / "experiments/RESULTS.md"
PICTURE = ROOT / "experiments/results/accuracies.png"
START, END = "<!-- study.py -->", "<!-- end -->"
MEASURES = {
    f"{label}_{probe}": f"{label}, {probe}"
    for label in ("action", "object", "scene")
    for probe in ("linear", "knn", "attentive")
}


def mean_and_half(values):
    """-> (mean, half of the 95 % interval by Student's t; None for a single value)."""
    interval = t_interval(values)
    half = (interval[1] - interval[0]) / 2 if interval else None
    return statistics.fmean(values), half


def differences(one, other, measure):
    """one - other, seed by seed, where both were run: a list. one, other: {seed: run}."""
    return [one[seed][measure] - other[seed][measure] for seed in one if seed in other]


def show(values):
    """A mean with half of its interval."""
    mean, half = mean_and_half(values)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def show_difference(values):
    """The same with a sign, in bold where the interval leaves out 0."""
    mean, half = mean_and_half(values)
    if half is None:
        return f"{mean:+.3f}"
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def usual_training(cells):
    """The length and the learning rate of all cells but a few: {"epochs": ..., "lr": ...}."""
    epochs, lr = statistics.mode((cell.epochs, cell.lr) for cell in cells)
    return {"epochs": epochs, "lr": lr}


def by_cell(runs, cells):
    """{(what, contrastive weight): {seed: run}} of the cells with the usual training: untrained
    first, then by name."""
    usual = usual_training(cells)
    found = {}
    for cell in sorted(cells, key=lambda cell: (cell.mask != "untrained", cell.what, cell.nce)):
        if cell.name in runs and cell == cell._replace(**usual):
            found.setdefault((cell.what, cell.nce), {})[cell.seed] = runs[cell.name]
    return found


def table(head, rows):
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def on_or_off(nce):
    """What the contrastive loss of this weight is called in the tables."""
    return "on" if nce else "off"


def results_table(found):
    """Means over seeds of every cell."""
    rows = []
    for (what, nce), of_seed in found.items():
        weight = "" if what == "untrained" else on_or_off(nce)
        texts = [show([run[measure] for run in of_seed.values()]) for measure in MEASURES]
        losses = []
        for loss in ("loss_mae", "loss_nce"):
            values = [run[loss] for run in of_seed.values() if run.get(loss) not in (None, "")]
            losses.append(f"{statistics.fmean(values):.3f}" if values else "")
        rows.append([what, weight, str(len(of_seed)), *texts, *losses])
    head = ["mask and ratio", "contrastive loss", "seeds", *MEASURES.values()]
    return table([*head, "reconstruction loss", "InfoNCE"], rows)


def single_runs_table(runs, cells):
    """A line for each run of another length or learning rate, and for the usual run beside it."""
    usual = usual_training(cells)
    varied = {
        cell._replace(**usual)
        for cell in cells
        if cell.name in runs and cell != cell._replace(**usual)
    }
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell.mask, cell.nce, cell.epochs, cell.lr)):
        beside = cell._replace(**usual)
        if beside in varied and cell.name in runs:
            run = runs[cell.name]
            what = [beside.what, on_or_off(cell.nce), str(cell.seed)]
            numbers = [f"{run[column]:.3f}" for column in (*MEASURES, "loss_mae", "loss_nce")]
            rows.append([*what, f"{run['steps']:.0f}", f"{cell.lr:g}", *numbers])
    head = ["mask and ratio", "contrastive loss", "seed", "steps", "learning rate"]
    head += [*MEASURES.values(), "reconstruction loss", "InfoNCE"]
    return table(head, rows)


def untrained_table(found):
    """Every cell minus the untrained encoder of the same seed."""
    rows = []
    for (what, nce), of_seed in found.items():
        floor = found.get(("untrained", 0.0), {})
        if what != "untrained" and of_seed.keys() & floor.keys():
            texts = [show_difference(differences(of_seed, floor, measure)) for measure in MEASURES]
            rows.append([what, on_or_off(nce), str(len(of_seed.keys() & floor.keys())), *texts])
    return table(["mask and ratio", "contrastive loss", "seeds", *MEASURES.values()], rows)


def pairs_table(found, pairs):
    """Differences of the pairs that were named beforehand, and `about_intervals` of them."""
    rows = []
    with_interval = []  # (mean, half of the interval) of each difference that has one
    for question, one, other in pairs:
        left = found.get((one.what, one.nce), {})
        right = found.get((other.what, other.nce), {})
        seeds = len(left.keys() & right.keys())
        if seeds == 0:
            continue
        by_measure = [differences(left, right, measure) for measure in MEASURES]
        if seeds > 1:
            with_interval += [mean_and_half(values) for values in by_measure]
        names = [f"{cell.what}, loss {on_or_off(cell.nce)}" for cell in (one, other)]
        rows.append([question, *names, str(seeds), *map(show_difference, by_measure)])
    head = ["question", "one", "minus the other", "seeds", *MEASURES.values()]
    return table(head, rows), about_intervals(with_interval)


def about_intervals(with_interval):
    """How to read these differences: [(mean, half of the interval), ...]."""
    if not with_interval:
        return "One seed of each: no intervals yet."
    bold = [mean for mean, half in with_interval if abs(mean) > half]
    small = sum(abs(mean) <= 0.05 for mean in bold)
    return (
        "In bold: the 95 % interval leaves out 0.\n"
        f"This is so in {len(bold)} of {len(with_interval)} differences; in {small} of these the "
        "difference is 0.05 or less.\n"
        f"If nothing made a difference, about {len(with_interval) / 20:.0f} would be in bold.\n"
        "They come in groups: all columns of a line are of the same encoders, and one cell stands "
        "in several lines."
    )


def text_of(runs, cells, pairs, afterwards):
    """What stands between the markers of RESULTS.md. pairs, afterwards: as study.py has them."""
    found = by_cell(runs, cells)
    pairs_text, about = pairs_table(found, pairs)
    afterwards_text, _ = pairs_table(found, afterwards)
    return f"""{len(runs)} of {len(cells)} cells.

### Accuracy on val.csv: mean over seeds, ± half of the 95 % interval (Student's t)

{results_table(found)}
### Pairs named beforehand: differences of runs of the same seed

{about}

{pairs_text}
### Pairs compared afterwards

{afterwards_text}
### Against an untrained encoder of the same seed (compared afterwards)

{untrained_table(found)}
### Other lengths and learning rates: single runs

{single_runs_table(runs, cells)}"""


def draw(found, path):
    """The accuracies of `results_table` as points with intervals; a dotted line at those of the
    untrained encoder."""
    plt = load_pyplot()
    names = list(dict.fromkeys(what for what, _ in found))
    figure, axes = plt.subplots(
        1,
        len(MEASURES),
        figsize=(2 + 1.7 * len(MEASURES), 1.5 + 0.3 * len(names)),
        sharey=True,
        layout="constrained",
    )
    style = {0.0: ("s", "tab:blue", -0.15), 1.0: ("o", "tab:red", 0.15)}
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for (what, nce), of_seed in found.items():
            mean, half = mean_and_half([run[measure] for run in of_seed.values()])
            mark, colour, shift = style[nce]
            if what == "untrained":
                mark, colour, shift = "D", "black", 0.0
                axis.axvline(mean, color="black", ls=":", lw=1)
            place = names.index(what) + shift
            axis.errorbar(mean, place, xerr=half, fmt=mark, color=colour, ms=4, capsize=2, lw=1)
        low, high = axis.get_xlim()
        axis.set_xlim(max(low, 0), min(high, 1.02))  # an interval may leave 0 to 1
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.4)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first on top
    handles = [
        plt.Line2D(
            [], [], marker=mark, color=colour, ls="", label=f"contrastive loss {on_or_off(nce)}"
        )
        for nce, (mark, colour, _) in style.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=80, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def write(runs, cells, pairs, afterwards, report=REPORT, picture=PICTURE):
    """Rewrites what stands between the markers of `report`, and the picture."""
    old = report.read_text(encoding="utf-8")
    if START not in old or END not in old.split(START, 1)[1]:
        sys.exit(f"{report}: has no lines {START} and {END} to write the tables between")
    if not runs:
        sys.exit("runs.csv: no finished cell (python experiments/study.py)")
    before, rest = old.split(START, 1)
    after = rest.split(END, 1)[1]
    new = f"{before}{START}\n{text_of(runs, cells, pairs, afterwards)}{END}{after}"
    draw(by_cell(runs, cells), picture)  # RunError if matplotlib is missing
    report.write_text(new, encoding="utf-8")
    print(f"{report}, {picture}: {len(runs)} cells")
