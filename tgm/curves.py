"""The curves of training runs, from their log.jsonl: losses, accuracies, learning rate, gradient
norm, and the time of a step.

    python -m tgm.curves runs/*/log.jsonl --out curves.png      several runs over one another

Needs numpy, flags.py and run.py, and matplotlib, which requirements.txt leaves out: pip install
matplotlib. Where it is installed, pretrain.py and finetune.py draw their own curves.png.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from tgm.flags import Parser
from tgm.run import RunError, one_line_errors, reason_of, writing

# {title of a panel: keys of log.jsonl that it shows}; a panel without any value but 0 is left out
PANELS = {
    "reconstruction loss": ("loss_mae",),
    "contrastive loss": ("loss_nce",),
    "loss": ("loss",),
    "accuracy on --val": ("val_top1", "val_mean_class"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "milliseconds per step": ("step_ms", "data_ms"),
    "videos skipped": ("skipped",),
}
LOGARITHMIC = ("gradient norm", "milliseconds per step")
STYLES = ("-", "--")  # of the first and the second key of a panel
MANY = 200  # values from which on a running mean is drawn on top of the faint values


def read_log(path: str | Path) -> list[dict]:
    """The entries of a log.jsonl, one per line. Lines that are not JSON, such as one that a kill
    left half written, and lines without a step are left out. RunError if there is no such file, or
    if it has no entries."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None
    entries = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    if not entries:
        raise RunError(f"{path}: expected the log.jsonl of a training run, found no logged step")
    return entries


def points(entries: list[dict], key: str) -> tuple[list[int], list[float]]:
    """The steps at which a key was logged, and its values."""
    found = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: list[float], window: int) -> list[float]:
    """The mean of each `window` values, without those that are not finite (NaN if none is); the
    result is shorter by window - 1."""
    values = np.array(values, float)
    finite = np.isfinite(values)
    ones = np.ones(window)
    totals = np.convolve(np.where(finite, values, 0), ones, mode="valid")
    counts = np.convolve(finite, ones, mode="valid")
    unknown = np.full_like(totals, np.nan)
    return np.divide(totals, counts, out=unknown, where=counts > 0).tolist()


def load_pyplot():
    """matplotlib's pyplot, which opens no window; RunError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise RunError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_curves(logs: dict[str, list[dict]], path: str | Path) -> None:
    """Draws one panel per quantity, in it a curve per run and key.

    logs: {name: entries of its log}"""
    plt = load_pyplot()
    from matplotlib.ticker import LogFormatter

    panels = {}
    for title, keys in PANELS.items():
        if any(any(points(entries, key)[1]) for entries in logs.values() for key in keys):
            panels[title] = keys
    if not panels:
        raise RunError("nothing to draw: no log has a value but 0")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
        for number, entries in enumerate(logs.values()):
            for key, style in zip(keys, STYLES, strict=False):
                draw_curve(axis, *points(entries, key), colour=f"C{number}", style=style)
        if len(keys) > 1:
            title += f" ({keys[0]}; dashed: {keys[1]})"
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
        if title.startswith(LOGARITHMIC):
            axis.set_yscale("log")
            # 2.75, not 2.75 x 10^0
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    if len(logs) > 1:
        handles = [plt.Line2D([], [], color=f"C{number}") for number in range(len(logs))]
        figure.legend(
            handles, list(logs), loc="outside lower center", ncols=min(4, len(logs)), fontsize=8
        )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_own_curves(log: Path) -> str | None:
    """Draws the curves of a run as curves.png in the folder of its log. -> None, or the reason why
    they are left out: a picture is not worth the run."""
    path = log.with_name("curves.png")
    aside = log.with_name("curves.new.png")  # the picture is whole at any time
    try:
        draw_curves({log.parent.name: read_log(log)}, aside)
        aside.replace(path)
    except (RunError, OSError, RuntimeError, ValueError) as error:
        return f"{path}: left out ({reason_of(error)})"
    return None


def draw_curve(axis, steps: list[int], values: list[float], colour: str, style: str) -> None:
    """One curve; of many values a running mean over the values themselves."""
    if len(values) < MANY:
        axis.plot(steps, values, style, color=colour, lw=1.2)
        return
    window = len(values) // 50
    axis.plot(steps, values, style, color=colour, lw=0.5, alpha=0.3)
    axis.plot(steps[window - 1 :], smooth(values, window), style, color=colour, lw=1.4)


def names_of(paths: list[Path]) -> list[str]:
    """What tells runs apart: their folders, or the whole paths where two are in one folder."""
    folders = [str(path.parent) for path in paths]
    return folders if len(set(folders)) == len(folders) else [str(path) for path in paths]


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl of each run")
    parser.add_argument("--out", type=Path, default="curves.png", help="picture to write")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    if args.out.name == "":  # of "." and "/"
        raise RunError(f"--out {args.out}: expected the name of a picture")
    out = args.out if args.out.suffix else args.out.with_suffix(".png")
    logs = {name: read_log(path) for name, path in zip(names_of(args.logs), args.logs, strict=True)}
    try:
        with writing(out):
            draw_curves(logs, out)
    except ValueError as error:  # an ending that matplotlib does not write
        raise RunError(f"--out {out}: {reason_of(error)}") from None
    print(out)


if __name__ == "__main__":
    main()
