"""How fast: against peers in the same run, in turn (ours, peer, peer, ours, ...); how cost grows;
and what that means on paper.

    python experiments/bench.py             all sections but soak: 20 minutes on two CPU cores
    python experiments/bench.py decode sample --repeats 80 --videos my.csv
    python experiments/bench.py soak        20,000 clips through the loader: half an hour
    # on a GPU; --out keeps the tables of CPUs
    python experiments/bench.py step overhead saliency --out runs/bench.json

Reads   H.264 videos of 64 frames or more: a manifest or a folder, by default
        ../shared/videos/clips.csv; where there is none, ten made on the spot from the toy world
Writes  experiments/bench.json, where a section replaces its last run, and the tables between the
        marks of BENCHMARKS.md beside it

Sections that read videos are in bench_videos.py, those that run models in bench_models.py; what
they are compared with is in peers.py, how time is taken in measure.py. A ratio is the median over
pairs, with the quartiles: how many times faster than the peer, but where the aim is "at most" how
many times slower. No speed is asserted; what is asserted is that both sides compute the same.

A decoder that is not installed is left out by name. torchcodec needs FFmpeg's shared libraries;
those inside PyAV serve:
    libs=$(python -c "import av; print(av.__path__[0] + '.libs')"); mkdir -p /tmp/ffmpeg
    for f in $libs/lib{av,sw}*; do
        ln -sf $f /tmp/ffmpeg/$(basename $f | sed -E 's/-[0-9a-f]+(\\.so\\.[0-9]+).*/\\1/')
    done
    LD_LIBRARY_PATH=/tmp/ffmpeg:$libs python experiments/bench.py
"""

import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "experiments")]
import bench_models
import bench_videos
from measure import ON_GPU, tables

from tgm.flags import Parser, positive_int

# name: (function, threads of torch: 1 as in a loader's worker; None: as many as there are cores)
SECTIONS = {
    "decode": (bench_videos.decode, 1),
    "sample": (bench_videos.sample, 1),
    "reencode": (bench_videos.reencode, 1),
    "step": (bench_models.step, None),
    "overhead": (bench_models.overhead, None),
    "saliency": (bench_models.clip_maps, None),
    "growth": (bench_videos.growth, 1),
    "paper": (bench_models.paper, None),
    "soak": (bench_videos.soak, 1),
}
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "av",
    "decord",
    "torchcodec",
    "numpy",
    "pillow",
)


# ---- the report ----------------------------------------------------------------------------------


def about_machine():
    """The machine and the versions, in a line."""
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    if ON_GPU:
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            pass
    return f"{machine}; {', '.join(versions)}"


def processor():
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def write(results, out):
    """Writes bench.json, and the tables into BENCHMARKS.md beside it, between the marks of their
    sections."""
    aside = out.with_name(out.name + ".new")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(out)
    page = out.with_name("BENCHMARKS.md")
    if not page.exists():
        return
    text = page.read_text()
    for name, result in results.items():
        text = replace_section(text, name, result)
    page.write_text(text)


def replace_section(text, name, result):
    """The page with a section's tables, and a line on its run, between its two marks."""
    start = f"<!-- {name} -->\n"
    end = f"<!-- end of {name} -->\n"
    if start not in text or end not in text:
        return text
    before = text[: text.index(start) + len(start)]
    after = text[text.index(end) :]
    line = (
        f"`{result['command']}`, {result['date']}, {result['seconds']:.0f} s; "
        f"{result['threads']} threads; {result['machine']}"
    )
    return f"{before}{tables(result['rows'])}\n{line}\n{after}"


# ---- the run -------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all but soak)",
    )
    parser.add_argument(
        "--videos",
        type=Path,
        metavar="FOLDER_OR_MANIFEST",
        help="H.264 videos (default: ../shared/videos/clips.csv, or toy ones)",
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=40,
        help="pairs of decoded clips and of samples; at least one per file",
    )
    parser.add_argument(
        "--files", type=positive_int, default=12, help="about how many files are re-encoded"
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=5,
        help="pairs of training steps and of the frozen models' batches",
    )
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=32 if ON_GPU else 2,
        help="clips per training step (default: 2 on a CPU, 32 on a GPU)",
    )
    parser.add_argument("--clips", type=positive_int, default=20000, help="clips of the soak")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("bench.json"), help="file to write"
    )
    args = parser.parse_args(argv)
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name}: one of {', '.join(SECTIONS)}")
    if not args.sections:
        args.sections = [name for name in SECTIONS if name != "soak"]
    return args


def run_section(name, args, command):
    """What bench.json holds of a section: its rows, and what made them."""
    function, threads = SECTIONS[name]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        rows = function(args, Path(temporary))
    seconds = time.perf_counter() - began
    torch.set_num_threads(threads_before)
    return {
        "machine": about_machine(),
        "threads": threads or threads_before,
        "date": str(datetime.date.today()),
        "seconds": seconds,
        "command": command,
        "rows": rows,
    }


def main(argv=None):
    args = parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "experiments/bench.py", *map(str, given)])
    results = {}
    if args.out.exists():
        results = json.loads(args.out.read_text())
    for name in args.sections:
        results[name] = run_section(name, args, command)
        print(f"\n## {name}\n\n{tables(results[name]['rows'])}", flush=True)
        write(results, args.out)


if __name__ == "__main__":
    main()
