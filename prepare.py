"""Before a long run: which files of a manifest can be read, and copies of them that load several times faster.

    python video.py data/k400/train.csv                            checks every file, in parallel; writes data/k400/train.check.csv
    python video.py data/k400/train.csv --good data/k400/good.csv     and a manifest without the rows that cannot be used
    python video.py data/k400/train.csv --reencode small           writes small/train.csv and its videos: short side 256, a key frame
                                                                   every 12 frames, coded to decode fast. Stopped, it goes on

A check decodes the first, the middle and the last frame of each file, once however many rows it has, and sums up durations, codecs,
sizes and frame rates. Re-encoded videos show what the source shows at the same times, upright and without sound, so start and end in
the manifest still hold.
"""
import contextlib
import csv
import math
import multiprocessing
import os
import sys
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from manifest import ManifestError, companion, read_manifest
from tgm.run import Parser, frame_count, launch, one_line_errors, pixel_count, positive_int, worker_count
from video import VideoError, VideoReader


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
            _, height, width, _ = reader.read([0, reader.duration / 2, max(0, reader.duration - 0.5 / reader.fps)]).shape
            return Found(None, reader.duration, reader.fps, f"{width}x{height}", reader._stream.codec_context.name, os.path.getsize(path))
    except VideoError as error:
        return Found(str(error).removeprefix(f"{path}: "))


def reencode(job):
    """(source, target, short side, frames from key frame to key frame) -> None or why it failed. The target is H.264 that decodes
    fast, displayed as the source is, at the same times; no sound. Written aside and renamed; one that is there stays."""
    source, target, short, gop = job
    if os.path.exists(target):
        return None
    aside = f"{target}.new.mp4"
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with VideoReader(source, timeout=math.inf) as reader, av.open(aside, "w", options={"movflags": "+faststart"}) as container, reader._errors():
            stream, size = None, None
            for seconds, frame in reader.frames():
                if seconds < 0:  # before the first that is displayed
                    continue
                if size is None:  # even, as 4:2:0 wants it, and never larger
                    image = reader._convert([(0, frame, None)], None)[0]
                    shape = np.array(image.shape[:2])
                    size = np.maximum(2, np.rint(shape * min(1, short / shape.min()) / 2) * 2).astype(int)
                    stream = container.add_stream("libx264", rate=Fraction(reader.fps).limit_denominator(1001), options={
                        "crf": "20", "preset": "fast", "tune": "fastdecode", "g": str(gop), "threads": "1"})
                    stream.height, stream.width, stream.pix_fmt = *map(int, size), "yuv420p"
                    stream.codec_context.time_base = Fraction(1, 90000)
                picture = av.VideoFrame.from_ndarray(reader._convert([(0, frame, None)], size)[0], format="rgb24")
                picture.pts, picture.time_base = round(seconds * 90000), Fraction(1, 90000)
                container.mux(stream.encode(picture))
            if stream is None:
                raise VideoError(f"{source}: no frame could be decoded")
            container.mux(stream.encode())
        os.replace(aside, target)
    except VideoError as error:
        return str(error)
    finally:
        with contextlib.suppress(OSError):
            os.remove(aside)
    return None


def check(args, videos):
    """Probes every file of a manifest once, prints what they are, writes MANIFEST.check.csv; returns the rows that cannot be used."""
    paths = list(dict.fromkeys(video.path for video in videos))
    with multiprocessing.Pool(args.workers) as pool:
        found = dict(zip(paths, tqdm(pool.imap(probe, paths, chunksize=4), "checking", len(paths), unit="file")))
    problems, seconds = [], []
    for video in videos:
        file = found[video.path]
        start, end = video.start or 0.0, min(file.seconds, video.end or math.inf)
        if file.error is None and start >= file.seconds:
            problems.append((video, "outside", f"starts at {start:g} s of a file that lasts {file.seconds:g} s"))
        elif file.error is not None:
            problems.append((video, "missing" if file.error == "missing" else "broken", file.error))
        else:
            seconds.append(end - start)
            if (end - start) * file.fps < args.frames * args.stride - 0.5:
                problems.append((video, "short", f"{(end - start) * file.fps:.0f} frames: a clip takes {args.frames * args.stride}"))
    report = companion(args.manifest, "check.csv")
    with open(report, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "path", "problem", "what"))
        writer.writerows((video.row, video.name, kind, what) for video, kind, what in problems)
    good = [file for file in found.values() if file.error is None]
    count = lambda values: ", ".join(f"{value} {n}" for value, n in Counter(values).most_common(6))
    quantiles = np.quantile(seconds, (0, 0.5, 1)) if seconds else (0, 0, 0)
    print(f"""{args.manifest}: {len(videos)} rows in {len(paths)} files, {sum(file.bytes for file in good) / 1e9:.2f} GB
duration    {sum(seconds) / 3600:.2f} hours; shortest {quantiles[0]:.2f} s, median {quantiles[1]:.2f} s, longest {quantiles[2]:.2f} s
codecs      {count(file.codec for file in good)}
sizes       {count(file.size for file in good)}
frames/s    {count(f"{file.fps:.4g}" for file in good)}
problems    {count(kind for _, kind, _ in problems) or "none"}: {report} (short ones repeat their last frame; the rest cannot be used)""")
    return {video.row for video, kind, _ in problems if kind != "short"}


def copy_rows(source, target, keep=lambda row: True, path_of=lambda row: None):
    """Writes the manifest `source` to `target` with the rows for which keep(row), their path replaced by path_of(row) if not None."""
    with open(source, encoding="utf-8-sig", newline="") as file:
        header, *rows = [row for row in csv.reader(file) if row]
    column = [name.strip() for name in header].index("path")
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for index, row in enumerate(rows):
            if keep(index):
                row[column] = path_of(index) or row[column]
                writer.writerow(row)


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("manifest", help="whose videos to check, or to re-encode")
    parser.add_argument("--root", help="folder that relative paths start from (default: the manifest's)")
    parser.add_argument("--strict-root", action="store_true", help="refuse a manifest whose paths lead out of that folder")
    parser.add_argument("--workers", type=worker_count, default=os.cpu_count(), help="processes")
    parser.add_argument("--frames", type=frame_count, default=16, help="a video with fewer than frames x stride frames is called short")
    parser.add_argument("--stride", type=positive_int, default=4)
    parser.add_argument("--good", metavar="CSV", help="write a manifest without the rows that cannot be used")
    parser.add_argument("--reencode", metavar="FOLDER", help="re-encode instead: FOLDER/NAME.mp4 and FOLDER/MANIFEST")
    parser.add_argument("--short-side", type=pixel_count, default=256, help="pixels of re-encoded videos, at most")
    parser.add_argument("--gop", type=positive_int, default=12, help="frames from key frame to key frame of re-encoded videos")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    try:
        videos = read_manifest(args.manifest, args.root, strict_root=args.strict_root)
    except ManifestError as error:
        sys.exit(str(error))
    if not args.reencode:
        bad = check(args, videos)
        if args.good:
            copy_rows(args.manifest, args.good, keep=lambda row: row not in bad,
                      path_of=lambda row: os.path.relpath(videos[row].path, os.path.dirname(args.good) or "."))
        sys.exit(f"{len(bad)} of {len(videos)} rows cannot be used" if bad else 0)
    # A name may be absolute or lead out of the folder: what is left of it stays inside. Different files keep different names.
    inside = lambda name: os.path.splitext(os.path.join(*[part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]))
    targets = {}
    for video in videos:
        stem, suffix = inside(video.name)
        targets.setdefault(video.path, stem + ("" if suffix == ".mp4" else suffix.replace(".", "_")) + ".mp4")
    if len(set(targets.values())) < len(targets):
        sys.exit(f"{args.manifest}: two of its files would have the same name in {args.reencode}")
    jobs = [(path, os.path.join(args.reencode, name), args.short_side, args.gop) for path, name in targets.items()]
    with multiprocessing.Pool(args.workers) as pool:
        errors = [error for error in tqdm(pool.imap(reencode, jobs, chunksize=1), "re-encoding", len(jobs), unit="file") if error]
    print(*errors, sep="\n", end="\n" * bool(errors))
    copied = os.path.join(args.reencode, os.path.basename(args.manifest))
    copy_rows(args.manifest, copied, path_of=lambda row: targets[videos[row].path])
    print(f"{copied}: {len(jobs) - len(errors)} of {len(jobs)} files")
    sys.exit(f"{len(errors)} files could not be re-encoded: their rows are in the manifest, and will be left out later" if errors else 0)


if __name__ == "__main__":
    launch(main)
