"""Manifests: the csv of videos and their labels. Needs numpy.

    videos = read_manifest("data/train.csv")    # the header is path[,label][,start][,end]

Two parts: reading a manifest; noticing that a file was made for another manifest, or that videos
were replaced since."""

import csv
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAMPLE = 100  # files whose sizes are compared; part of the format of "files" in a .json
FilePath = str | os.PathLike


class ManifestError(Exception):
    """A manifest, or a file made for one, that cannot be used: one line, with the place and what
    was expected.
    """


class Video(NamedTuple):
    path: str  # file to open, absolute or relative to the working directory
    label: str | None  # None if there is no such column or it is empty
    start: float | None  # seconds from the first frame; None: the beginning
    end: float | None  # None: the end
    row: int  # counted from 0 after the header; the same row of every array made for the manifest
    name: str  # the path as the manifest writes it


class Videos(Sequence):
    """The rows of a manifest: a sequence of Video, held as a few arrays and one string of bytes.

    A list of tuples would need several times the memory, and every worker of a loader would get a
    copy of it: reading a Python object changes its reference count, which is a write, so that a
    forked process gets its own page of memory."""

    def __init__(
        self,
        folder: str,
        names: list[str],
        labels: list[str | None],
        starts: list[float | None],
        ends: list[float | None],
    ):
        self.folder = folder  # where relative paths start
        encoded = [name.encode() for name in names]
        self._name_bytes = b"".join(encoded)
        # row i's name is name_bytes[offsets[i]:offsets[i + 1]]
        self._offsets = np.cumsum([0, *map(len, encoded)])
        self._label_texts = list(dict.fromkeys(labels))  # each label once
        number_of = {label: number for number, label in enumerate(self._label_texts)}
        self._label_numbers = np.array([number_of[label] for label in labels], np.int32)
        self._starts = np.array(starts, float)  # None becomes NaN
        self._ends = np.array(ends, float)

    def __len__(self) -> int:
        return len(self._label_numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self._videos_at(np.arange(len(self))[index]))
        row = range(len(self))[index]  # IndexError if it is outside; counts -1 from the end
        return next(self._videos_at(np.array([row])))

    def __iter__(self) -> Iterator[Video]:
        for first in range(0, len(self), 4096):
            yield from self._videos_at(np.arange(first, min(first + 4096, len(self))))

    def _videos_at(self, rows):
        """Yields the Video of each row. rows: an array of whole numbers."""
        columns = (
            rows,
            self._offsets[rows],
            self._offsets[rows + 1],
            self._label_numbers[rows],
            self._starts[rows],
            self._ends[rows],
        )
        lists = [column.tolist() for column in columns]  # Python's numbers, not numpy's
        for row, first, last, label, start, end in zip(*lists, strict=True):
            name = self._name_bytes[first:last].decode()
            yield Video(
                path=os.path.join(self.folder, name),
                label=self._label_texts[label],
                start=None if math.isnan(start) else start,
                end=None if math.isnan(end) else end,
                row=row,
                name=name,
            )


# ---- reading -------------------------------------------------------------------------------------


class WrongLine(Exception):
    """A line of a manifest that cannot be used. The text completes "expected ..."."""


def read_manifest(
    path: FilePath, root: FilePath | None = None, label_column: str = "label"
) -> Videos:
    """Read a csv (UTF-8) with the header `path[,label][,start][,end]`, in any order; further
    columns are ignored.

    Relative paths start at `root`, else at the csv's folder. `label_column` takes labels from
    another column, which must then exist. `start` and `end` may each be empty or absent. Blank
    lines are allowed at the end only. Raises ManifestError "file:line: expected ..., found ..."."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = " (the toy world: python data/toy.py)"
        raise ManifestError(
            f"{path}:1: expected a csv with the header path[,label][,start][,end]; it cannot be "
            f"read ({error.strerror}){hint}"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{path}:{line}: expected UTF-8 text") from None
    folder = os.fspath(Path(path).parent if root is None else root)
    columns = ([], [], [], [])  # names, labels, starts, ends
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    blank = None  # the first blank line
    try:
        header = [name.strip() for name in next(reader, [])]
        check_header(header, label_column)
        for fields in reader:
            line = reader.line_num
            if not fields:
                blank = blank or line
                continue
            if blank:  # and a row follows it
                line = blank
                raise wrong_count(header, 0)
            for column, value in zip(columns, parse_row(header, fields, label_column), strict=True):
                column.append(value)
        if not columns[0]:
            raise WrongLine("at least one video after the header, found none")
    except WrongLine as error:
        raise ManifestError(f"{path}:{line}: expected {error}") from None
    except csv.Error as error:
        raise ManifestError(f"{path}:{reader.line_num}: expected csv ({error})") from None
    return Videos(folder, *columns)


def check_header(header, label_column):
    """WrongLine unless the header names a path, the column of labels, and no column twice."""
    required = ["path"]
    if label_column != "label":
        required.append(label_column)
    for name in required:
        if name not in header:
            found = ",".join(header) or "nothing"
            raise WrongLine(f"a column {name!r} in the header, found {found}")
    for name in ("path", "label", "start", "end", label_column):
        if header.count(name) > 1:
            raise WrongLine(f"one column {name!r}, found {header.count(name)}")


def parse_row(header, fields, label_column):
    """-> (path as written, label, start, end); WrongLine if a field cannot be used."""
    if len(fields) != len(header):
        raise wrong_count(header, len(fields))
    values = dict(zip(header, fields, strict=True))
    name = values["path"]
    if not name.strip():
        raise WrongLine("a path, found none")
    start = parse_seconds("start", values.get("start", ""))
    end = parse_seconds("end", values.get("end", ""))
    first = start or 0.0
    if end is not None and end <= first:
        raise WrongLine(f"end after start, found {first:g} to {end:g}")
    label = values.get(label_column, "").strip()  # "a.mp4, dog" is of the class "dog"
    return name, label or None, start, end


def wrong_count(header, found):
    return WrongLine(f"{len(header)} fields ({','.join(header)}), found {found}")


def parse_seconds(name, text):
    """The number in the field `name` of a row; None if the field is empty."""
    text = text.strip()
    if not text:
        return None
    try:
        seconds = float(text.replace("_", "?"))  # float() would take 1_5 for 15
    except ValueError:
        seconds = math.nan  # refused below, too
    if not 0 <= seconds < math.inf:
        raise WrongLine(f"{name} in seconds, 0 or more, found {text!r}")
    return seconds


# ---- noticing another manifest or replaced videos ------------------------------------------------

# A file that was made for a manifest, such as an array (arrays.py), has a .json beside it. There
# `manifest_hash` tells which rows it was made for, and `file_sizes` which videos. A video that was
# replaced under the same name is noticed if its size is another. The sizes of up to SAMPLE files
# are compared, evenly spaced over the rows. If 5 % of the files were replaced, at random, that is
# noticed with a probability of 0.99; 1 % with 0.63; a single one in a large manifest hardly ever.
#
# Not every file is looked at: for a million rows that would take 4 seconds more for each rank of
# each stage (measured on a local disk), and one round trip to the server per file on a network
# disk. The time of last change does not count, since copying to another machine changes it. Neither
# does the folder (--root): the same files elsewhere are the same videos.


def manifest_hash(videos: Sequence[Video], count: int | None = None) -> str:
    """16 hex digits that change when a row's path (as written), start or end does, or their
    order; labels do not count. count: hash the first `count` rows only.
    """
    digest = hashlib.sha256()
    for video in itertools.islice(videos, count):
        digest.update(json.dumps([video.name, video.start, video.end]).encode() + b"\n")
    return digest.hexdigest()[:16]


def sampled_rows(count: int) -> list[int]:
    """Up to SAMPLE of the rows 0 to count - 1, evenly spaced, the first and the last among them."""
    if count <= SAMPLE:
        return list(range(count))
    return np.linspace(0, count - 1, SAMPLE).round().astype(int).tolist()


def file_sizes(videos: Sequence[Video]) -> list[int | None]:
    """The size in bytes of the file of each of `sampled_rows`, None if it is missing. Two folders
    (--root) may hold different files under the same names: their sizes tell them apart."""
    return [file_size(videos[row].path) for row in sampled_rows(len(videos))]


def file_size(path: FilePath) -> int | None:
    """Bytes; None if there is no such file."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return None


def saved_sizes(about: dict) -> dict[int, int | None]:
    """{row: size} of the sampled videos when a file was made. about: the contents of its .json."""
    count = about.get("videos", 0)
    sizes = about.get("files", ())
    if not isinstance(count, int) or not isinstance(sizes, list | tuple):  # edited by hand
        return {}
    return dict(zip(sampled_rows(count), sizes, strict=False))


def changed_rows(videos: Sequence[Video], about: dict) -> dict[int, tuple[int, int]]:
    """The rows whose video was replaced since a file was made: {row: (size then, size now)}. about:
    the contents of the file's .json. Only sampled rows are looked at. A video that was missing
    then, or is missing now, does not count as replaced."""
    changed = {}
    for row, then in saved_sizes(about).items():
        if then is None or row >= len(videos):
            continue
        now = file_size(videos[row].path)
        if now is not None and now != then:
            changed[row] = (then, now)
    return changed


def describe_change(
    videos: Sequence[Video], about: dict, is_made: Callable[[int], bool]
) -> str | None:
    """For messages: the first video that was replaced since its row of a file was made, None if
    there is none. is_made(row): whether the file has that row."""
    for row, (then, now) in changed_rows(videos, about).items():
        if is_made(row):
            return (
                f"videos have changed since it was made: {videos[row].path} had {then} bytes, "
                f"and has {now}"
            )
    return None


def renewed_sizes(videos: Sequence[Video], about: dict) -> list[int | None]:
    """`file_sizes` to save when a file is continued, also with more rows. about: the contents of
    its .json. A video that is missing now keeps the size that it had."""
    before = saved_sizes(about)
    rows = sampled_rows(len(videos))
    sizes = file_sizes(videos)
    return [before.get(row) if now is None else now for row, now in zip(rows, sizes, strict=True)]


def require_files(videos: Videos, manifest: FilePath) -> None:
    """ManifestError if none of up to SAMPLE rows, evenly spaced, has a file: then the folder is
    wrong, not the files.
    """
    rows = sampled_rows(len(videos))
    if any(os.path.exists(videos[row].path) for row in rows):
        return
    looked_at = f"its {len(videos)} videos"
    if len(rows) < len(videos):
        looked_at = f"{len(rows)} of {looked_at}"
    problem = f"{manifest}: none of {looked_at} is there"
    name = videos[0].name
    if os.path.isabs(name):
        raise ManifestError(f"{problem}, the first being {name}: correct the paths in the manifest")
    raise ManifestError(
        f"{problem}: searched {os.path.abspath(videos.folder)} for {name} and so on; "
        "--root FOLDER sets where relative paths start"
    )


def shared_rows(a: Sequence[Video], b: Sequence[Video]) -> int:
    """How many rows of the manifest `b` are in `a` as well: the same file, start and end. A test
    set should share none with its training set.
    """
    of_a = {place_and_time(video) for video in a}
    return sum(place_and_time(video) in of_a for video in b)


def place_and_time(video):
    return os.path.abspath(video.path), video.start or 0.0, video.end
