"""Before a long run: which files of a manifest can be read, and copies of them that load several
times faster.

    # checks every file, in parallel; writes data/k400/train.check.csv
    python -m tgm.prepare data/k400/train.csv
    # and a manifest without the rows that cannot be used
    python -m tgm.prepare data/k400/train.csv --good data/k400/good.csv
    # writes small/train.csv and its videos: short side 256, a key frame every 12 frames, coded to
    # decode fast. Stopped, it goes on
    python -m tgm.prepare data/k400/train.csv --reencode small

A check decodes the first, the middle and the last frame of each file, once however many rows it
has, and sums up durations, codecs, sizes and frame rates. It also counts rows that are shorter than
a training clip, whose last frame is repeated; that is no problem.

Re-encoded videos show what the source shows at the same times, upright and without sound, so start
and end in the manifest still hold. A copy that is there stays, whatever it was made of: after
replacing videos, re-encode into an empty folder. SIGTERM and Ctrl-C end a check or a re-encoding at
once, by that signal, and leave no half-written copy."""

import contextlib
import csv
import errno
import io
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from tgm.arrays import companion, refuse_foreign
from tgm.flags import Parser, frame_count, pixel_count, positive_int, whole
from tgm.manifest import FilePath, read_manifest, require_files
from tgm.run import (
    RunError,
    StopSignal,
    ignore_signals,
    kill_workers,
    launch,
    make_folder,
    one_line_errors,
)
from tgm.video import VideoError, VideoReader

KEY_FRAME_EVERY = 12  # frames, in a re-encoded video
TICKS = 90000  # per second, the clock of a re-encoded video
REPORT = ["row", "path", "problem", "what"]  # columns
# errors of the disk written to, not of the video read
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Found(NamedTuple):
    """What `probe` found out about a file; error is None if it can be read."""

    error: str | None
    seconds: float = 0.0
    fps: float = 0.0
    size: str = ""
    codec: str = ""
    bytes: int = 0


def probe(path: str) -> Found:
    """Opens a file and decodes its first, middle and last frame."""
    if not os.path.exists(path):
        return Found("missing")
    try:
        with VideoReader(path) as reader:
            last = max(0, reader.duration - 0.5 / reader.fps)
            _, height, width, _ = reader.read([0, reader.duration / 2, last]).shape
            return Found(
                error=None,
                seconds=reader.duration,
                fps=reader.fps,
                size=f"{width}x{height}",
                codec=reader.codec,
                bytes=os.path.getsize(path),
            )
    except VideoError as error:
        return Found(str(error).removeprefix(f"{path}: "))


# ---- re-encoding one file ------------------------------------------------------------------------


def aside_of(target: str) -> str:
    """Where a copy is written before it is whole."""
    return f"{target}.new.mp4"


def reencode(source: str, target: str, short_side: int) -> str | None:
    """Writes a copy of a video, H.264 that decodes fast, displayed as the source is at the same
    times, and without sound -> None, or why the source cannot be read.

    short_side: pixels, at most. The copy is written aside and renamed; one that is there stays. A
    disk that is full or cannot be written to is a RunError."""
    if os.path.exists(target):
        return None
    aside = aside_of(target)
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with (
            VideoReader(source, timeout=math.inf) as reader,
            av.open(aside, "w", options={"movflags": "+faststart"}) as container,
            reader.errors(),
        ):
            encode_frames(reader, container, short_side)
        os.replace(aside, target)
    except VideoError as error:
        number = getattr(error.__cause__, "errno", None)
        if number in NO_ROOM:
            raise RunError(f"{target}: cannot be written ({os.strerror(number)})") from None
        return str(error)
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(aside)
    return None


def encode_frames(reader, container, short_side):
    """Encodes every displayed frame of an open video into an open container."""
    stream = None
    for seconds, frame in reader.frames():
        if seconds < 0:  # before the first that is displayed
            continue
        if stream is None:
            size = encoded_size(reader.picture(frame), short_side)
            stream = add_stream(container, size, reader.fps)
        picture = av.VideoFrame.from_ndarray(reader.picture(frame, size), format="rgb24")
        picture.pts = round(seconds * TICKS)
        picture.time_base = Fraction(1, TICKS)
        container.mux(stream.encode(picture))
    if stream is None:
        raise VideoError(f"{reader.path}: no frame could be decoded")
    container.mux(stream.encode())


def encoded_size(image: np.ndarray, short_side: int) -> tuple[int, int]:
    """The (height, width) of a copy: even, as 4:2:0 wants it, and never larger than the image."""
    shape = np.array(image.shape[:2])
    scale = min(1, short_side / shape.min())
    height, width = np.maximum(2, np.rint(shape * scale / 2) * 2).astype(int).tolist()
    return height, width


def add_stream(container, size, fps):
    stream = container.add_stream(
        "libx264",
        rate=Fraction(fps).limit_denominator(1001),
        options={
            "crf": "20",
            "preset": "fast",
            "tune": "fastdecode",
            "g": str(KEY_FRAME_EVERY),
            "threads": "1",
        },
    )
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, TICKS)
    return stream


# ---- many files ----------------------------------------------------------------------------------


def in_processes(function: Callable, jobs: Sequence[tuple], workers: int, title: str) -> Iterator:
    """Yields function(*job) for each job, in order. A signal or an error ends the workers at
    once, whatever they do.
    """
    ahead = 100 * workers  # jobs given out before the first of them must be done
    with ProcessPoolExecutor(workers, initializer=ignore_signals, initargs=(None,)) as pool:
        try:
            waiting = deque()
            given = 0
            for _ in tqdm(jobs, title, unit="file"):
                while given < len(jobs) and len(waiting) < ahead:
                    waiting.append(pool.submit(function, *jobs[given]))
                    given += 1
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                f"{title}: a process ended in the midst of a file (out of memory? lower --workers; "
                "--workers 1 shows which file)"
            ) from None
        except BaseException:
            kill_workers()
            raise


# ---- the check -----------------------------------------------------------------------------------


def check_files(args, videos, report):
    """Probes every file of a manifest once, prints what they are, writes the csv `report`;
    returns the rows that cannot be used.
    """
    paths = list(dict.fromkeys(video.path for video in videos))
    jobs = [(path,) for path in paths]
    results = in_processes(probe, jobs, args.workers, "checking")
    found = dict(zip(paths, results, strict=True))
    problems = []  # (video, kind, what)
    durations = []
    short = 0
    clip = args.frames * args.stride
    for video in videos:
        file = found[video.path]
        problem = problem_of(video, file)
        if problem is not None:
            problems.append((video, *problem))
            continue
        start = video.start or 0.0
        end = min(file.seconds, video.end or math.inf)
        durations.append(end - start)
        if (end - start) * file.fps < clip - 0.5:
            short += 1
    print_summary(args.manifest, len(videos), found.values(), durations)
    if short:
        print(
            f"clips       {short} of {len(videos)} rows are usable and have fewer than {clip} "
            f"frames (--frames {args.frames} x --stride {args.stride}): "
            "their last frame is repeated"
        )
    kinds = most_common(kind for _, kind, _ in problems) or "none"
    print(f"problems    {kinds}: {report}", flush=True)
    rows = [(video.row, video.name, kind, what) for video, kind, what in problems]
    write_csv(report, [REPORT, *rows])
    return {video.row for video, _, _ in problems}


def problem_of(video, file):
    """(kind, what is wrong) with a row of a manifest, None if it can be used. file: its Found."""
    if file.error == "missing":
        return "missing", file.error
    if file.error is not None:
        return "broken", file.error
    start = video.start or 0.0
    if start >= file.seconds:
        return "outside", f"starts at {start:g} s of a file that lasts {file.seconds:g} s"
    return None


def print_summary(manifest, rows, files, durations):
    """Prints what the files of a manifest are. files: a Found for each; durations: seconds of each
    row that can be used."""
    good = [file for file in files if file.error is None]
    size = sum(file.bytes for file in good)
    shortest = median = longest = 0
    if durations:
        shortest, median, longest = np.quantile(durations, (0, 0.5, 1))
    print(f"{manifest}: {rows} rows in {len(files)} files, {size / 1e9:.2f} GB")
    print(
        f"duration    {sum(durations) / 3600:.2f} hours; shortest {shortest:.2f} s, "
        f"median {median:.2f} s, longest {longest:.2f} s"
    )
    print(f"codecs      {most_common(file.codec for file in good)}")
    print(f"sizes       {most_common(file.size for file in good)}")
    print(f"frames/s    {most_common(f'{file.fps:.4g}' for file in good)}")


def most_common(values: Iterable) -> str:
    return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common(6))


def is_report(path: Path) -> bool:
    """Whether a csv is a report of a check, by its header."""
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file)) == REPORT


def write_text(path: FilePath, text: str) -> None:
    """Writes a file aside and renames it. RunError, with the reason, if that cannot be."""
    aside = f"{path}.new"
    try:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None


def copied_rows(source: FilePath, path_of: Callable[[int], str | None]) -> list[list[str]]:
    """The csv rows of the manifest `source`, the header first, with the path of row i replaced by
    path_of(i); rows for which that is None are left out."""
    with open(source, encoding="utf-8-sig", newline="") as file:
        header, *rows = [row for row in csv.reader(file) if row]
    column = [name.strip() for name in header].index("path")
    copied = [header]
    for index, row in enumerate(rows):
        path = path_of(index)
        if path is not None:
            copied.append([*row[:column], path, *row[column + 1 :]])
    return copied


def write_csv(path: FilePath, rows: Iterable[Sequence]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def write_good(args, videos, bad):
    """The manifest without the rows `bad`, its paths relative to the folder of args.good."""
    folder = os.path.dirname(args.good) or "."

    def path_of(row):
        return None if row in bad else os.path.relpath(videos[row].path, folder)

    write_csv(args.good, copied_rows(args.manifest, path_of))
    print(f"{args.good}: {len(videos) - len(bad)} rows")


def name_inside(name: str) -> str:
    """A relative .mp4 name for the copy of a file: what is left of a name that is absolute or leads
    out of its folder; files that differ in their ending alone keep different names."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    stem, suffix = os.path.splitext(os.path.join("", *parts))
    if suffix != ".mp4":
        stem += suffix.replace(".", "_")
    return stem + ".mp4"


# ---- re-encoding a manifest ----------------------------------------------------------------------


def reencode_all(args, videos):
    """Re-encodes every file of a manifest into args.reencode and writes the manifest of the
    copies; returns the number of failures.
    """
    targets = copies_of(args.manifest, videos, args.reencode)
    make_folder(args.reencode, "--reencode")
    folder = args.reencode
    copied = os.path.join(folder, os.path.basename(args.manifest))
    names = {path: os.path.relpath(target, folder) for path, target in targets.items()}
    rows = copied_rows(args.manifest, lambda row: names[videos[row].path])
    refuse_foreign(
        copied, lambda path: is_copy(path, args.manifest, rows), "--reencode names another folder"
    )
    jobs = [(path, target, args.short_side) for path, target in targets.items()]
    errors = []
    try:
        for error in in_processes(reencode, jobs, args.workers, "re-encoding"):
            if error is not None:
                errors.append(error)
    except BaseException:
        kill_workers()
        for target in targets.values():  # of files that were in the works
            with contextlib.suppress(OSError):
                os.remove(aside_of(target))
        raise
    for error in errors:
        print(error)
    write_csv(copied, rows)
    print(f"{copied}: {len(jobs) - len(errors)} of {len(jobs)} files")
    return len(errors)


def copies_of(manifest, videos, folder):
    """{path of a video: path of its copy in the folder}. RunError if two copies would be one file,
    or one would take the place of a video."""
    names = {}
    for video in videos:
        names.setdefault(video.path, name_inside(video.name))
    if len(set(names.values())) < len(names):
        raise RunError(f"{manifest}: two of its files would have the same name in {folder}")
    targets = {path: os.path.join(folder, name) for path, name in names.items()}
    sources = {os.path.realpath(path) for path in targets}
    for source, target in targets.items():
        if os.path.realpath(target) in sources:
            raise RunError(
                f"--reencode {folder}: the copy of {source} would be the video {target} itself: "
                "name another folder"
            )
    return targets


def is_copy(path: Path, manifest: FilePath, rows: Sequence[Sequence[str]]) -> bool:
    """Whether a manifest at `path` is one that re-encoding wrote, perhaps when there were fewer
    rows, and not the source itself.
    """
    with open(path, encoding="utf-8", newline="") as file:
        there = {tuple(row) for row in csv.reader(file)}
    return not os.path.samefile(path, manifest) and there <= {tuple(row) for row in rows}


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("manifest", help="whose videos to check, or to re-encode")
    parser.add_argument(
        "--root", help="folder that relative paths start from (default: the manifest's)"
    )
    parser.add_argument("--workers", type=whole(1, 1024), default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--frames",
        type=frame_count,
        default=16,
        help="a video with fewer than frames x stride frames is called short",
    )
    parser.add_argument("--stride", type=positive_int, default=4)
    parser.add_argument(
        "--good", metavar="CSV", help="write a manifest without the rows that cannot be used"
    )
    parser.add_argument(
        "--reencode",
        metavar="FOLDER",
        help="re-encode instead: FOLDER/NAME.mp4 and FOLDER/MANIFEST",
    )
    parser.add_argument(
        "--short-side", type=pixel_count, default=256, help="pixels of re-encoded videos, at most"
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    videos = read_manifest(args.manifest, args.root)
    require_files(videos, args.manifest)
    StopSignal().at_once()
    if args.reencode:
        failed = reencode_all(args, videos)
        if failed:
            raise RunError(
                f"{failed} files could not be re-encoded: their rows are in the manifest, and will "
                "be left out later"
            )
        return
    report = companion(args.manifest, "check.csv")
    refuse_foreign(report, is_report, "move it away")
    if args.good:
        make_folder(os.path.dirname(args.good) or ".", "--good")
        refuse_foreign(args.good, lambda path: False, "--good names another file, or delete it")
    bad = check_files(args, videos, report)
    if args.good:
        write_good(args, videos, bad)
    if bad:
        raise RunError(f"{len(bad)} of {len(videos)} rows cannot be used")


if __name__ == "__main__":
    launch(main)
