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
import sys
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from tgm.arrays import companion, refuse_foreign
from tgm.flags import Parser, frame_count, pixel_count, positive_int, whole
from tgm.manifest import read_manifest, require_files
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


def probe(path):
    """Opens a file and decodes its first, middle and last frame -> Found."""
    if not os.path.exists(path):
        return Found("missing")
    try:
        with VideoReader(path) as reader:
            _, height, width, _ = reader.read(
                [0, reader.duration / 2, max(0, reader.duration - 0.5 / reader.fps)]
            ).shape
            return Found(
                None,
                reader.duration,
                reader.fps,
                f"{width}x{height}",
                reader._stream.codec_context.name,
                os.path.getsize(path),
            )
    except VideoError as error:
        return Found(str(error).removeprefix(f"{path}: "))


def aside_of(target):
    return f"{target}.new.mp4"


def reencode(job):
    """(source, target, short side, frames from key frame to key frame) -> None or why it failed.
    The target is H.264 that decodes fast, displayed as the source is, at the same times; no sound.
    Written aside and renamed; one that is there stays. A disk that is full or cannot be written to
    is a RunError."""
    source, target, short = job
    if os.path.exists(target):
        return None
    aside = aside_of(target)
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with (
            VideoReader(source, timeout=math.inf) as reader,
            av.open(aside, "w", options={"movflags": "+faststart"}) as container,
            reader._errors(),
        ):
            stream, size = None, None
            for seconds, frame in reader.frames():
                if seconds < 0:  # before the first that is displayed
                    continue
                if size is None:  # even, as 4:2:0 wants it, and never larger
                    image = reader._convert([(0, frame, None)], None)[0]
                    shape = np.array(image.shape[:2])
                    size = np.maximum(
                        2, np.rint(shape * min(1, short / shape.min()) / 2) * 2
                    ).astype(int)
                    stream = container.add_stream(
                        "libx264",
                        rate=Fraction(reader.fps).limit_denominator(1001),
                        options={
                            "crf": "20",
                            "preset": "fast",
                            "tune": "fastdecode",
                            "g": str(KEY_FRAME_EVERY),
                            "threads": "1",
                        },
                    )
                    stream.height, stream.width, stream.pix_fmt = *map(int, size), "yuv420p"
                    stream.codec_context.time_base = Fraction(1, 90000)
                picture = av.VideoFrame.from_ndarray(
                    reader._convert([(0, frame, None)], size)[0], format="rgb24"
                )
                picture.pts, picture.time_base = round(seconds * 90000), Fraction(1, 90000)
                container.mux(stream.encode(picture))
            if stream is None:
                raise VideoError(f"{source}: no frame could be decoded")
            container.mux(stream.encode())
        os.replace(aside, target)
    except VideoError as error:
        if getattr(error.__cause__, "errno", None) in NO_ROOM:
            raise RunError(
                f"{target}: cannot be written ({os.strerror(error.__cause__.errno)})"
            ) from None
        return str(error)
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(aside)
    return None


def in_processes(function, jobs, workers, title):
    """Yields function(job) for each job, in order. A signal or an error ends the workers at
    once, whatever they do.
    """
    ahead = 100 * workers  # jobs given out before the first of them must be done
    with ProcessPoolExecutor(workers, initializer=ignore_signals, initargs=(None,)) as pool:
        try:
            waiting = deque()
            given = 0
            for _ in tqdm(jobs, title, unit="file"):
                while given < len(jobs) and len(waiting) < ahead:
                    waiting.append(pool.submit(function, jobs[given]))
                    given += 1
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                f"{title}: a process ended in the midst of a file (out of memory? lower --workers; --workers 1 shows which file)"
            ) from None
        except BaseException:
            kill_workers()
            raise


def check(args, videos, report):
    """Probes every file of a manifest once, prints what they are, writes the csv `report`;
    returns the rows that cannot be used.
    """
    paths = list(dict.fromkeys(video.path for video in videos))
    found = dict(zip(paths, in_processes(probe, paths, args.workers, "checking")))
    clip = args.frames * args.stride
    problems = []
    seconds = []
    short = 0
    for video in videos:
        file = found[video.path]
        start = video.start or 0.0
        end = min(file.seconds, video.end or math.inf)
        if file.error == "missing":
            problems.append((video, "missing", file.error))
        elif file.error is not None:
            problems.append((video, "broken", file.error))
        elif start >= file.seconds:
            problems.append(
                (video, "outside", f"starts at {start:g} s of a file that lasts {file.seconds:g} s")
            )
        else:
            seconds.append(end - start)
            short += (end - start) * file.fps < clip - 0.5
    good = [file for file in found.values() if file.error is None]
    shortest, median, longest = np.quantile(seconds, (0, 0.5, 1)) if seconds else (0, 0, 0)
    print(f"""{args.manifest}: {len(videos)} rows in {len(paths)} files, {sum(file.bytes for file in good) / 1e9:.2f} GB
duration    {sum(seconds) / 3600:.2f} hours; shortest {shortest:.2f} s, median {median:.2f} s, longest {longest:.2f} s
codecs      {most_common(file.codec for file in good)}
sizes       {most_common(file.size for file in good)}
frames/s    {most_common(f"{file.fps:.4g}" for file in good)}""")
    if short:
        print(
            f"clips       {short} of {len(videos)} rows are usable and have fewer than {clip} frames (--frames {args.frames} x --stride "
            f"{args.stride}): their last frame is repeated"
        )
    print(
        f"problems    {most_common(kind for _, kind, _ in problems) or 'none'}: {report}",
        flush=True,
    )
    write_csv(
        report, [REPORT, *((video.row, video.name, kind, what) for video, kind, what in problems)]
    )
    return {video.row for video, _, _ in problems}


def most_common(values):
    return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common(6))


def is_report(path):
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file)) == REPORT


def write_text(path, text):
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


def copied_rows(source, path_of):
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


def write_csv(path, rows):
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


def name_inside(name):
    """A relative .mp4 name for the copy of a file: what is left of a name that is absolute or leads
    out of its folder; files that differ in their ending alone keep different names."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    stem, suffix = os.path.splitext(os.path.join("", *parts))
    if suffix != ".mp4":
        stem += suffix.replace(".", "_")
    return stem + ".mp4"


def reencode_all(args, videos):
    """Re-encodes every file of a manifest into args.reencode and writes the manifest of the
    copies; returns the number of failures.
    """
    targets = {}
    for video in videos:
        targets.setdefault(video.path, name_inside(video.name))
    if len(set(targets.values())) < len(targets):
        raise RunError(
            f"{args.manifest}: two of its files would have the same name in {args.reencode}"
        )
    jobs = [
        (path, os.path.join(args.reencode, name), args.short_side) for path, name in targets.items()
    ]
    sources = {os.path.realpath(path) for path in targets}
    for source, target, *_ in jobs:
        if os.path.realpath(target) in sources:
            raise RunError(
                f"--reencode {args.reencode}: the copy of {source} would be the video {target} itself: name another folder"
            )
    make_folder(args.reencode, "--reencode")
    copied = os.path.join(args.reencode, os.path.basename(args.manifest))
    rows = copied_rows(args.manifest, lambda row: targets[videos[row].path])
    refuse_foreign(
        copied, lambda path: is_copy(path, args.manifest, rows), "--reencode names another folder"
    )
    errors = []
    try:
        for error in in_processes(reencode, jobs, args.workers, "re-encoding"):
            if error is not None:
                errors.append(error)
    except BaseException:
        kill_workers()
        for _, target, *_ in jobs:  # of files that were in the works
            with contextlib.suppress(OSError):
                os.remove(aside_of(target))
        raise
    for error in errors:
        print(error)
    write_csv(copied, rows)
    print(f"{copied}: {len(jobs) - len(errors)} of {len(jobs)} files")
    return len(errors)


def is_copy(path, manifest, rows):
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
            sys.exit(
                f"{failed} files could not be re-encoded: their rows are in the manifest, and will be left out later"
            )
        return
    report = companion(args.manifest, "check.csv")
    refuse_foreign(report, is_report, "move it away")
    if args.good:
        make_folder(os.path.dirname(args.good) or ".", "--good")
        refuse_foreign(args.good, lambda path: False, "--good names another file, or delete it")
    bad = check(args, videos, report)
    if args.good:
        write_good(args, videos, bad)
    if bad:
        sys.exit(f"{len(bad)} of {len(videos)} rows cannot be used")


if __name__ == "__main__":
    launch(main)
