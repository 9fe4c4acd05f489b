"""How experiments/bench.py measures: two sides in turn, memory, and tables of what was found.

seconds = pairs(ours, theirs, repeats=40)
row = compare("16 frames", "decord", seconds, aim="at least", bound=1.25)
print(tables([row]))
"""

import itertools
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"


# ---- time ----------------------------------------------------------------------------------------


def pairs(ours, theirs, repeats, warmup=1):
    """Calls ours(i) and theirs(i) in turn, in alternating order -> their seconds, float [2,
    repeats]. The calls of the warm-up are not counted."""
    seconds = np.zeros((2, repeats))
    sides = [(0, ours), (1, theirs)]
    for i in range(-warmup, repeats):
        order = sides if i % 2 == 0 else sides[::-1]
        for side, function in order:
            took = time_call(function, max(i, 0))
            if i >= 0:
                seconds[side, i] = took
    return seconds


def time_call(function, i):
    """The seconds of function(i), until the GPU has finished its work."""
    began = time.perf_counter()
    function(i)
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(work, peer, seconds, per=1, aim="", bound=None):
    """A row of a table from what `pairs` returned.

    The ratio is the median over the pairs: how many times faster we are than the peer, or with the
    aim "at most", how many times slower. per: items of one call; bound: the number that the ratio
    is to reach."""
    ours, theirs = seconds
    ratios = ours / theirs if aim == "at most" else theirs / ours
    low, ratio, high = np.percentile(ratios, (25, 50, 75)).tolist()
    if bound is not None:
        reached = ratio <= bound if aim == "at most" else ratio >= bound
        aim = f"{aim} {bound}: {'reached' if reached else 'not reached'}"
    print(f"  {work} / {peer}: {ratio:.3g}", file=sys.stderr, flush=True)
    return {
        "work": work,
        "peer": peer,
        "ms": 1000 * float(np.median(ours)) / per,
        "peer's ms": 1000 * float(np.median(theirs)) / per,
        "ratio": ratio,
        "quartiles": [low, high],
        "pairs": len(ratios),
        "aim": aim,
    }


def missing(work, peer, trial):
    """None if trial() works; else the row that says why the peer is left out."""
    try:
        trial()
    except ModuleNotFoundError:
        return {"work": work, "peer": peer, "ratio": "not installed"}
    except (ImportError, OSError, RuntimeError) as error:  # such as for want of a library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"work": work, "peer": peer, "ratio": f"cannot be used: {reason}"}
    return None


# ---- memory --------------------------------------------------------------------------------------


def in_a_process(function, *args):
    """What function(*args) returns in a new process, which has allocated nothing yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def resident(pid="self"):
    """MB of a process's own memory; what it shares is divided by the number of those who share it.
    Mapped files and batches on their way between processes are left out."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"/proc/{pid}/smaps_rollup: has no line Pss_Anon")


# ---- tables --------------------------------------------------------------------------------------


def tables(rows):
    """Markdown. Neighbouring rows that begin with the same column make one table."""
    groups = itertools.groupby(rows, key=first_column)
    return "\n".join(one_table(list(group)) for _, group in groups)


def first_column(row):
    return next(iter(row))


def one_table(rows):
    columns = {}  # a dict keeps the order
    for row in rows:
        columns |= row
    lines = [cells(columns), "|" + "---|" * len(columns)]
    for row in rows:
        lines.append(cells(show(row.get(column, "")) for column in columns))
    return "\n".join(lines) + "\n"


def cells(texts):
    return "| " + " | ".join(texts) + " |"


def show(value):
    if isinstance(value, list):
        return " to ".join(show(number) for number in value)
    if not isinstance(value, float):
        return str(value)
    if abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}"
