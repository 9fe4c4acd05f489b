"""Before a long run: which files of a manifest can be read, and copies of them that load several
times faster.

    # checks every file, in parallel; writes data/k400/train.check.csv
    python -m tgm.prepare data/k400/train.csv
    # and a manifest without the rows that cannot be used
    python -m tgm.prepare data/k400/train.csv --good data/k400/good.csv
    # writes small/train.csv and its videos: short side 256, a key frame every 12 frames, coded to
    # decode fast. Stopped, it goes on
    python -m tgm.prepare data/k400/train.csv --reencode small

A check decodes the first, the middle and the last frame of each file, once even if several rows
have it, and sums up durations, codecs, sizes and frame rates. It also counts rows that are shorter
than a training clip: that is no problem, training repeats their last frame. If some rows cannot be
used, the command ends with an error, also after it has written the manifest without them.
--video-timeout is for the check only: re-encoding gives each video the time that it takes.

Re-encoded videos show what the source shows at the same times, upright and without sound, so start
and end in the manifest still hold. A copy that exists is kept, whatever it was made of: after
replacing videos or with another --short-side, re-encode into an empty folder. SIGTERM and Ctrl-C
end a check or a re-encoding at once, by that signal, and leave no half-written copy."""

import contextlib
import csv
import errno
import itertools
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

from tgm.arrays import companion, hold, refuse_foreign, written_aside
from tgm.flags import Parser, add_video_flags, frame_count, pixel_count, positive_int, whole
from tgm.manifest import FilePath, Video, Videos, read_manifest, require_files
from tgm.run import (
    RunError,
    StopSignal,
    ignore_signals,
    kill_workers,
    launch,
    make_folder,
    one_line_errors,
)
from tgm.video import TIMEOUT, VideoError, VideoReader

KEY_FRAME_EVERY = 12  # frames, in a re-encoded video
TICKS = 90000  # per second, the clock of a re-encoded video
MOST_REPEATS = 10_000  # of the last frame: a damaged header may promise hours
REPORT = ["row", "path", "problem", "what"]  # columns; "what" is the reason
MISSING = "missing"
# errors of the disk written to, not of the video read
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Found(NamedTuple):
    """What `probe` found out about a file. The rest holds only if error is None."""

    error: str | None  # why the file cannot be read
    seconds: float = 0.0
    fps: float = 0.0
    size: str = ""
    codec: str = ""
    file_bytes: int = 0


def probe(path: str, timeout: float = TIMEOUT) -> Found:
    """Opens a file and decodes its first, middle and last frame. timeout: seconds for all that."""
    if not os.path.exists(path):
        return Found(MISSING)
    try:
        with VideoReader(path, timeout=timeout) as reader:
            last = max(0, reader.duration - 0.5 / reader.fps)
            _, height, width, _ = reader.read([0, reader.duration / 2, last]).shape
            return Found(
                error=None,
                seconds=reader.duration,
                fps=reader.fps,
                size=f"{width}x{height}",
                codec=reader.codec,
                file_bytes=os.path.getsize(path),
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

    short_side: pixels, at most. The copy is written aside and renamed; one that exists is kept.
    RunError, naming the target, if it cannot be written, such as on a full disk."""
    if os.path.isfile(target):
        return None
    if os.path.isdir(target):
        raise RunError(f"{target}: is a folder, where the copy of {source} is to be written")
    aside = aside_of(target)
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        # PyAV opens the file with its first packet, where an error would count as the source's.
        open(aside, "wb").close()
        with (
            VideoReader(source, timeout=math.inf) as reader,
            # "file:", since a relative folder such as a:b would be taken for a protocol
            av.open(f"file:{aside}", "w", options={"movflags": "+faststart"}) as container,
            reader.errors(),
        ):
            encode_frames(reader, container, short_side)
        os.replace(aside, target)
    except VideoError as error:
        # of reading, encoding or writing frames: all inside reader.errors()
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
    first_dts = None

    def encode(image, seconds):
        nonlocal first_dts
        picture = av.VideoFrame.from_ndarray(image, format="rgb24")
        picture.pts = round(seconds * TICKS)
        picture.time_base = Fraction(1, TICKS)
        packets = stream.encode(picture)
        if packets and first_dts is None:
            first_dts = packets[0].dts
        container.mux(packets)

    count = 0
    for seconds, frame in reader.frames():
        count += 1
        if stream is None:
            size = encoded_size(reader.picture(frame), short_side)
            stream = add_stream(container, size, reader.fps)
        image = reader.picture(frame, size)
        encode(image, seconds)
    if stream is None:
        raise VideoError(f"{reader.path}: no frame could be decoded")
    # The last frame may stay on screen. It is repeated until the copy has as many frames per second
    # as the source's header says, because training chooses its frames by this rate.
    held = reader.duration - seconds  # seconds for which the last frame is on screen
    # how many frames fewer there are than the header says
    missing = reader.fps * reader.duration - count
    # how many frames would follow the last one in these seconds
    fitting = reader.fps * held - 1
    repeats = max(0, round(min(missing, fitting, MOST_REPEATS)))
    for number in range(1, repeats + 1):
        encode(image, seconds + held * number / (repeats + 1))
    packets = stream.encode()  # those that the encoder held back; never none
    if first_dts is None:
        first_dts = packets[0].dts
    # The copy must last as long as the source. An mp4 has two durations, both of which end with its
    # last packet: one counts from the first dts, the other from pts 0. Readers believe the shorter
    # one, so that one is set.
    last = packets[-1]
    until_last = min(last.dts - first_dts, last.pts)
    last.duration = max(1, round(reader.duration * TICKS) - until_last)
    container.mux(packets)


def encoded_size(image: np.ndarray, short_side: int) -> tuple[int, int]:
    """The (height, width) of a copy: even, as 4:2:0 wants it, and never larger than the image or
    than `short_side` (but 2 pixels at least).
    """
    shape = np.array(image.shape[:2])
    short_side = min(short_side, shape.min())
    # what the height and the width must not exceed
    most = np.where(shape == shape.min(), short_side, shape)
    nearest_even = np.rint(shape * (short_side / shape.min()) / 2) * 2
    size = np.minimum(nearest_even, most // 2 * 2)
    height, width = np.maximum(2, size).astype(int).tolist()
    return height, width


def add_stream(container, size, fps):
    stream = container.add_stream(
        "libx264",
        rate=Fraction(fps).limit_denominator(1001),  # 29.97 becomes 30000/1001
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
    """Yields function(*job) for each job, in order. The first argument of a job is a path. A signal
    or an error ends the workers at once, in the midst of a job.
    """
    ahead = 100 * workers  # jobs given out before the first of them must be done
    given_out = deque()  # (job, its future)
    remaining = iter(jobs)
    # ignore_signals takes an argument, since it is also called by torch's loaders
    with ProcessPoolExecutor(workers, initializer=ignore_signals, initargs=(None,)) as pool:
        try:
            for _ in tqdm(jobs, desc=title, unit="file"):  # each turn yields one result
                for job in itertools.islice(remaining, ahead - len(given_out)):
                    given_out.append((job, pool.submit(function, *job)))
                yield given_out[0][1].result()
                given_out.popleft()
        except BrokenProcessPool:
            kill_workers()  # the others ignore the SIGTERM by which the pool ends them
            raise RunError(broken_pool(title, given_out, workers)) from None
        except BaseException:
            kill_workers()
            raise


def broken_pool(title, given_out, workers):
    """The message where a process of a pool died. given_out: (job, future), in order."""
    unfinished = [job for job, future in given_out if future.exception() is not None]
    message = f"{title}: a process ended in the midst of a file"
    if not unfinished:
        return f"{message} (out of memory?)"
    path = unfinished[0][0]
    if workers == 1:
        return f"{message} (out of memory?): {path}"
    return (
        f"{message} (out of memory? lower --workers): {path} or one of the next files; "
        "--workers 1 says which"
    )


# ---- the check -----------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A row of a manifest that cannot be used."""

    video: Video
    kind: str  # missing, broken or outside
    what: str  # the reason


def check_files(args, videos) -> list[Problem]:
    """Probes every file of a manifest once and prints what they are -> the rows that cannot be
    used."""
    paths = dict.fromkeys(video.path for video in videos)  # each once
    jobs = [(path, args.video_timeout) for path in paths]
    found = {}
    results = in_processes(probe, jobs, args.workers, "checking")
    for path, result in zip(paths, results, strict=True):
        found[path] = result
    problems = []
    durations = []
    short = 0
    clip_frames = (args.frames - 1) * args.stride + 1  # from the first of a clip to its last
    for video in videos:
        file = found[video.path]
        problem = problem_of(video, file)
        if problem is not None:
            problems.append(problem)
            continue
        start = video.start or 0.0
        end = min(file.seconds, video.end or math.inf)
        durations.append(end - start)
        if (end - start) * file.fps < clip_frames - 0.5:  # half a frame for rounding
            short += 1
    print_summary(args.manifest, len(videos), found.values(), durations)
    if short:
        print(
            f"clips       {short} of {len(videos)} rows are usable, but shorter than a clip, which "
            f"spans {clip_frames} frames (--frames {args.frames} --stride {args.stride}): "
            "their last frame is repeated"
        )
    kinds = most_common(problem.kind for problem in problems) or "none"
    print(f"problems    {kinds}", flush=True)
    return problems


def problem_of(video, file):
    """The Problem of a row of a manifest, None if it can be used. file: its Found."""
    if file.error == MISSING:
        return Problem(video, "missing", file.error)
    if file.error is not None:
        return Problem(video, "broken", file.error)
    start = video.start or 0.0
    if start >= file.seconds:
        what = f"starts at {start:g} s of a file that lasts {file.seconds:g} s"
        return Problem(video, "outside", what)
    return None


def print_summary(manifest, row_count, files, durations):
    """Prints what the files of a manifest are. files: a Found for each; durations: seconds of each
    row that can be used."""
    good = [file for file in files if file.error is None]
    size = sum(file.file_bytes for file in good)
    shortest, median, longest = np.quantile(durations or [0.0], (0, 0.5, 1))
    print(f"{manifest}: {row_count} rows in {len(files)} files, {size / 1e9:.2f} GB")
    print(
        f"duration    {sum(durations) / 3600:.2f} hours; shortest {shortest:.2f} s, "
        f"median {median:.2f} s, longest {longest:.2f} s"
    )
    print(f"codecs      {most_common(file.codec for file in good)}")
    print(f"sizes       {most_common(file.size for file in good)}")
    print(f"frames/s    {most_common(f'{file.fps:.4g}' for file in good)}")


def most_common(values: Iterable) -> str:
    """The six most common values, each with its count."""
    return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common(6))


def is_report(path: Path) -> bool:
    """Whether a csv is a report of a check, by its header."""
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file)) == REPORT


def write_csv(path: FilePath, rows: Iterable[Sequence]) -> None:
    with written_aside(path) as file:
        csv.writer(file).writerows(rows)


def copied_rows(source: FilePath, path_of: Callable[[int], str]) -> list[list[str]]:
    """The csv rows of the manifest `source`, the header first, with the path of row i replaced by
    path_of(i). To be read before long work: the manifest may change meanwhile."""
    with open(source, encoding="utf-8-sig", newline="") as file:
        header, *rows = [row for row in csv.reader(file) if row]
    column = [name.strip() for name in header].index("path")
    copied = [header]
    for index, row in enumerate(rows):
        copied.append([*row[:column], path_of(index), *row[column + 1 :]])
    return copied


def rows_for(manifest: FilePath, videos: Videos, folder: FilePath) -> list[list[str]]:
    """The csv rows of a manifest as they are in `folder`, the header first: absolute paths stay,
    others become relative to it."""
    folder = os.path.realpath(folder)

    def path_of(row):
        video = videos[row]
        if os.path.isabs(video.name):
            return video.name
        # A folder that is a link is replaced by its target, because ".." after a link leads to the
        # parent of the target. A video that is a link stays one.
        parent, name = os.path.split(video.path)
        return os.path.relpath(os.path.join(os.path.realpath(parent), name), folder)

    return copied_rows(manifest, path_of)


def name_inside(name: str) -> str:
    """The name of a copy in its folder: /data/a.mp4 becomes data/a.mp4, ../b.mp4 becomes b.mp4, and
    c.avi becomes c_avi.mp4, which differs from the copy of c.mp4."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    stem, suffix = os.path.splitext("/".join(parts))
    if suffix != ".mp4":
        stem += suffix.replace(".", "_")
    return stem + ".mp4"


# ---- re-encoding a manifest ----------------------------------------------------------------------


def reencode_all(args, videos):
    """Re-encodes every file of a manifest into args.reencode and writes the manifest of the
    copies; returns the number of failures.
    """
    folder = args.reencode
    targets = copies_of(args.manifest, videos, folder)
    make_folder(folder, "--reencode")
    new_manifest = os.path.join(folder, os.path.basename(args.manifest))
    new_names = {path: os.path.relpath(target, folder) for path, target in targets.items()}
    rows = copied_rows(args.manifest, lambda row: new_names[videos[row].path])
    refuse_foreign(
        new_manifest,
        lambda path: is_copy(path, args.manifest, rows),
        "--reencode names another folder; if it is of an older version of the manifest, delete it",
    )
    # two processes would write the same files
    hold(new_manifest, elsewhere="name another folder (--reencode)")
    source_of = {target: path for path, target in targets.items()}  # each target once
    jobs = [(path, target, args.short_side) for target, path in source_of.items()]
    errors = []
    try:
        for error in in_processes(reencode, jobs, args.workers, "re-encoding"):
            if error is not None:
                errors.append(error)
    except BaseException:
        # A signal may have come here, not inside in_processes. Killed workers leave their files.
        kill_workers()
        for target in source_of:
            with contextlib.suppress(OSError):
                os.remove(aside_of(target))
        raise
    for error in errors:
        print(error)
    write_csv(new_manifest, rows)
    made = len(jobs) - len(errors)
    print(f"{new_manifest}: {made} of {len(jobs)} files{without_root(args)}")
    return len(errors)


def copies_of(manifest, videos, folder):
    """{path of a video: path of its copy in the folder}. Two paths of one file, such as a.mp4 and
    ./a.mp4, may have one copy. RunError if the copies of two files would be one, or if a copy would
    take the place of a video."""
    targets = {}
    first_of = {}  # {path of a copy: the first video that has it}
    for video in videos:
        target = targets.setdefault(video.path, os.path.join(folder, name_inside(video.name)))
        first = first_of.setdefault(target, video.path)
        if first != video.path and os.path.realpath(first) != os.path.realpath(video.path):
            raise RunError(
                f"{manifest}: the copies of {first} and {video.path} would both be {target}: "
                "rename one of the two videos, in the manifest as well"
            )
    sources = {os.path.realpath(path) for path in targets}
    for source, target in targets.items():
        if os.path.realpath(target) in sources:
            raise RunError(
                f"--reencode {folder}: the copy of {source} would be the video {target} itself: "
                "name another folder"
            )
    return targets


def is_copy(path: Path, manifest: FilePath, rows: Sequence[Sequence[str]]) -> bool:
    """Whether all rows of the manifest at `path` are among the `rows` that re-encoding would write:
    then re-encoding wrote it, perhaps when there were fewer. Not if it is the source itself.
    """
    with open(path, encoding="utf-8", newline="") as file:
        existing = {tuple(row) for row in csv.reader(file)}
    return not os.path.samefile(path, manifest) and existing <= {tuple(row) for row in rows}


def without_root(args):
    """What is said of a manifest that was written, if --root was given for the one that was read:
    relative paths in the new one start at its own folder."""
    return " (give no --root with it)" if args.root else ""


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("manifest", help="csv of the videos to check, or to re-encode")
    add_video_flags(parser)
    parser.add_argument("--workers", type=whole(1, 1024), default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--frames",
        type=frame_count,
        default=16,
        help="the frames of a clip in training: rows that are shorter than a clip are counted",
    )
    parser.add_argument(
        "--stride", type=positive_int, default=4, help="the stride that training will use"
    )
    parser.add_argument(
        "--good", metavar="CSV", help="write a manifest without the rows that cannot be used"
    )
    parser.add_argument(
        "--reencode",
        metavar="FOLDER",
        help="re-encode instead: FOLDER/NAME.mp4 and FOLDER/MANIFEST",
    )
    parser.add_argument(
        "--short-side",
        type=pixel_count,
        default=256,
        help="pixels of the short side of re-encoded videos, at most",
    )
    args = parser.parse_args(argv)
    if args.good and args.reencode:
        parser.error("--good belongs to a check: check first, then --reencode its manifest")
    return args


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    videos = read_manifest(args.manifest, args.root)
    if not os.path.isfile(args.manifest):  # but it could be read; files are written beside it
        raise RunError(
            f"{args.manifest}: expected a file, found a pipe, which can be read only once: write "
            "the manifest to a file first"
        )
    require_files(videos, args.manifest)
    StopSignal().end_on_signal()  # from here on a signal ends the process
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
        folder = os.path.dirname(args.good) or "."
        make_folder(folder, "--good")
        header, *rows = rows_for(args.manifest, videos, folder)
        if os.path.abspath(args.good) == os.path.abspath(report):
            raise RunError(f"--good {args.good}: the report of the check goes there")
        if os.path.exists(args.good) and os.path.getsize(args.good) > 0:
            raise RunError(
                f"{args.good}: exists already: not overwritten (--good names another file, or "
                "delete it)"
            )
    problems = check_files(args, videos)
    if args.good:
        bad = {problem.video.row for problem in problems}
        good = [row for number, row in enumerate(rows) if number not in bad]
        if good:
            write_csv(args.good, [header, *good])
            print(f"{args.good}: {len(good)} rows{without_root(args)}")
        else:
            print(f"{args.good}: not written, no row can be used")
    # last: the data set's folder may be read-only
    reasons = [(video.row, video.name, kind, what) for video, kind, what in problems]
    write_csv(report, [REPORT, *reasons])
    print(f"{report}: {len(problems)} rows")
    if problems:
        raise RunError(f"{len(problems)} of {len(videos)} rows cannot be used: {report}")


if __name__ == "__main__":
    launch(main)
