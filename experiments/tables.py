"""The tables of experiments/study.py: means with intervals, and differences of runs of the same
seed. Standard library and Student's t.

Letters: a row is a finished cell, {column of runs.csv: value}; `found` is {(what was run,
contrastive weight): {seed: row}}."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tgm.evaluation import t_interval

PROBES = ("linear", "knn", "attentive", "finetuned")


def spread(values):
    """(mean, half of the 95 % interval by Student's t or None for a single value) of a list."""
    interval = t_interval(values)
    return statistics.fmean(values), (interval[1] - interval[0]) / 2 if interval else None


def paired(one, other, measure):
    """The differences one - other of a measure, seed by seed: a list. one, other: {seed: row}."""
    seeds = [
        seed
        for seed in one
        if seed in other and None not in (one[seed].get(measure), other[seed].get(measure))
    ]
    return [one[seed][measure] - other[seed][measure] for seed in seeds]


def said(values, sign=""):
    """Values as text: mean ± half of the interval, in bold where it leaves out 0 (of differences
    alone).
    """
    if not values:
        return ""
    mean, half = spread(values)
    text = f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if half is not None else "")
    return f"**{text}**" if sign and half is not None and abs(mean) > half else text


def table(head, rows):
    return (
        "\n".join(
            ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            + ["| " + " | ".join(row) + " |" for row in rows]
        )
        + "\n"
    )


def measures_of(rows, labels):
    """The columns of accuracies that any row has."""
    measures = [f"{label}_{probe}" for label in labels for probe in PROBES]
    return [measure for measure in measures if any(row.get(measure) is not None for row in rows)]


def title(measure):
    return measure.replace("_", ", ").replace("finetuned", "fine-tuned")


def column(of_seed, measure):
    """The values of a measure that there are: {seed: row} -> a list."""
    return [row[measure] for row in of_seed.values() if row.get(measure) is not None]


def weight(what, nce):
    """The contrastive weight as text; "" of an encoder that was not pretrained."""
    return "" if what in ("untrained", "supervised") else f"{nce:g}"


def results(found, measures):
    """The means over seeds, the cost beside them."""
    lines = []
    for (what, nce), of_seed in found.items():
        cost = [
            f"{statistics.fmean(values):{form}}" if (values := column(of_seed, key)) else ""
            for key, form in (
                ("visible", ".0f"),
                ("tokens", ",.0f"),
                ("pretrain_s", ".0f"),
                ("seconds", ".0f"),
            )
        ]
        means = [said(column(of_seed, measure)) for measure in (*measures, "loss_mae", "loss_nce")]
        lines.append((what, weight(what, nce), str(len(of_seed)), *means, *cost))
    return table(
        (
            "mask, saliency",
            "contrastive weight",
            "seeds",
            *map(title, measures),
            "reconstruction loss",
            "contrastive loss",
            "visible tokens",
            "tokens encoded",
            "pretraining, s",
            "all, s",
        ),
        lines,
    )


def against(found, measures, pairs):
    """Differences of pairs [(first columns, one, other), ...] -> (table lines, how many
    differences have an interval).
    """
    lines = [
        (*first, *(said(paired(found[one], found[other], measure), "+") for measure in measures))
        for first, one, other in pairs
    ]
    return lines, sum("±" in cell for line in lines for cell in line)


def report(found, measures, tube, questions):
    """The three tables. tube(what): the names of the tube runs that `what` is compared with;
    questions: [(question, one, other), ...]
    """
    tubes = [
        ((what, base, weight(what, nce)), (what, nce), (base, nce))
        for what, nce in found
        if weight(what, nce)
        for base in tube(what)
        if (base, nce) in found and base != what
    ]
    asked = [
        ((question, *(f"{what}, weight {nce:g}" for what, nce in (one, other))), one, other)
        for question, one, other in questions
    ]
    less_tube, compared = against(found, measures, tubes)
    answers, more = against(found, measures, asked)
    return f"""### Mean over seeds, ± half of the 95 % interval (Student's t)

{results(found, measures)}
### Less tube masks, of the same seed and contrastive weight (in bold: the 95 % interval leaves out 0)

{table(("mask, saliency", "less", "contrastive weight", *map(title, measures)), less_tube)}
### The three questions: pairs decided on beforehand

{table(("question", "one", "less the other", *map(title, measures)), answers)}
{compared + more} differences with an interval are in these two tables, some twice: if nothing made any difference, about one in twenty,
{(compared + more) / 20:.0f}, would be in bold.
"""
