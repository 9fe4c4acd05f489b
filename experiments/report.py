"""The tables and the picture of experiments/RESULTS.md, from runs.csv alone. `python
experiments/study.py --report` calls it.

Shapes: a run is a line of runs.csv, {column: value}.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
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


def by_cell(runs, cells):
    """{(what, contrastive weight): {seed: run}}, in the order of the plan."""
    found = {}
    for cell in cells:
        if cell.name in runs:
            found.setdefault((cell.what, cell.nce), {})[cell.seed] = runs[cell.name]
    return found


def table(head, rows):
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def results_table(found):
    """Means over seeds of every cell."""
    rows = []
    for (what, nce), of_seed in found.items():
        weight = "" if what == "untrained" else f"{nce:g}"
        cells = [show([run[measure] for run in of_seed.values()]) for measure in MEASURES]
        losses = []
        for loss in ("loss_mae", "loss_nce"):
            values = [run[loss] for run in of_seed.values() if run.get(loss) not in (None, "")]
            losses.append(f"{statistics.fmean(values):.3f}" if values else "")
        rows.append([what, weight, str(len(of_seed)), *cells, *losses])
    head = ["mask and ratio", "contrastive weight", "seeds", *MEASURES.values()]
    return table([*head, "reconstruction loss", "contrastive loss"], rows)


def pairs_table(found, pairs):
    """Differences of the pairs that were named beforehand, and their number with an interval."""
    rows = []
    for question, one, other in pairs:
        left = found.get((one.what, one.nce), {})
        right = found.get((other.what, other.nce), {})
        seeds = len(left.keys() & right.keys())
        if seeds == 0:
            continue
        cells = [show_difference(differences(left, right, measure)) for measure in MEASURES]
        names = [f"{cell.what}, weight {cell.nce:g}" for cell in (one, other)]
        rows.append([question, *names, str(seeds), *cells])
    head = ["question", "one", "minus the other", "seeds", *MEASURES.values()]
    with_interval = sum("±" in cell for row in rows for cell in row)
    return table(head, rows), with_interval


def about_intervals(count):
    """How to read the intervals of so many differences."""
    if count == 0:
        return "One seed of each: no intervals yet."
    return (
        f"In bold: the 95 % interval leaves out 0. Of {count} differences with an interval about\n"
        f"{count / 20:.0f} would be in bold if nothing made a difference. They come in groups:\n"
        "the columns of a line are of the same encoders, and one cell stands in several lines."
    )


def text_of(runs, cells, pairs):
    """What stands between the markers of RESULTS.md."""
    found = by_cell(runs, cells)
    pairs_text, count = pairs_table(found, pairs)
    return f"""{len(runs)} of {len(cells)} cells.

### Accuracy on val.csv: mean over seeds, ± half of the 95 % interval (Student's t)

{results_table(found)}
### Pairs named beforehand: differences of runs of the same seed

{about_intervals(count)}

{pairs_text}"""


def draw(found, path):
    """The accuracies of `results_table` as points with intervals."""
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
                mark, colour = "D", "black"
            place = names.index(what) + shift
            axis.errorbar(mean, place, xerr=half, fmt=mark, color=colour, ms=4, capsize=2, lw=1)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.4)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first on top
    handles = [
        plt.Line2D([], [], marker=mark, color=colour, ls="", label=f"contrastive weight {nce:g}")
        for nce, (mark, colour, _) in style.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=80, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def write(runs, cells, pairs, report=REPORT, picture=PICTURE):
    """Rewrites what stands between the markers of `report`, and the picture."""
    old = report.read_text(encoding="utf-8")
    if START not in old or END not in old.split(START, 1)[1]:
        sys.exit(f"{report}: has no lines {START} and {END} to write the tables between")
    if not runs:
        sys.exit("runs.csv: no finished cell (python experiments/study.py)")
    before, rest = old.split(START, 1)
    after = rest.split(END, 1)[1]
    new = f"{before}{START}\n{text_of(runs, cells, pairs)}{END}{after}"
    report.write_text(new, encoding="utf-8")
    draw(by_cell(runs, cells), picture)
    print(f"{report}, {picture}: {len(runs)} cells")
