"""Manifests: the csv of videos and their labels. Needs numpy.

    videos = read_manifest("data/train.csv")            the header is path[,label][,start,end]

A video that was replaced under the same name is noticed by its size. The .json beside an array
(arrays.py) holds the sizes of up to 100 files, evenly spaced over the rows, and whoever opens the
array compares them. If all files were replaced, that is certain to be noticed; 5 % of them with a
probability of 0.99, 1 % with 0.63, and a single one in a large manifest hardly ever. A manifest of
up to 100 rows is compared whole.

Not every file is looked at: for a million rows that would take 4 seconds more for each rank of each
stage (measured on a local disk), and one round trip to the server per file on a network disk. The
time of last change does not count, since copies to another machine change it. Neither does the
folder (--root): the same files elsewhere are the same videos."""

import csv
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAMPLE = 100  # files whose sizes tell whether the videos are still those an array was made of
FilePath = str | os.PathLike


class ManifestError(Exception):
    """A manifest or an array beside it that cannot be used: one line, with the place and what
    was expected.
    """


class Video(NamedTuple):
    path: str  # file to open, absolute or relative to the working directory
    label: str | None  # as written; None if there is no such column or it is empty
    start: float | None  # seconds from the first frame; None: the beginning
    end: float | None  # None: the end
    row: int  # 0-based line of the manifest (header not counted), and of every companion array
    name: str  # the path as the manifest writes it


class Videos(Sequence):
    """The rows of a manifest, a sequence of Video, held as a few arrays: about 50 bytes per row and
    the path's own length. A list of tuples takes 400, and each of a loader's workers would come to
    hold a copy, by counting references in it."""

    def __init__(
        self,
        folder: str,
        names: list[str],
        labels: list[str | None],
        starts: list[float | None],
        ends: list[float | None],
    ):
        number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        encoded = [name.encode() for name in names]
        self._folder = folder
        self._classes = list(number)
        self._text = b"".join(encoded)
        # row i's name is text[at[i]:at[i + 1]]
        self._at = np.cumsum([0, *map(len, encoded)])
        self._labels = np.array([number[label] for label in labels], np.int32)
        self._starts = np.array(starts, float)  # None becomes NaN
        self._ends = np.array(ends, float)

    @property
    def folder(self) -> str:
        """Where relative paths start."""
        return self._folder

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self._some(np.arange(len(self))[index]))
        return next(self._some(np.array([range(len(self))[index]])))

    def __iter__(self) -> Iterator[Video]:
        for first in range(0, len(self), 4096):
            yield from self._some(np.arange(first, min(first + 4096, len(self))))

    def _some(self, rows):
        columns = (
            rows,
            self._at[rows],
            self._at[rows + 1],
            self._labels[rows],
            self._starts[rows],
            self._ends[rows],
        )
        lists = [column.tolist() for column in columns]
        for row, first, last, label, start, end in zip(*lists, strict=True):
            name = self._text[first:last].decode()
            yield Video(
                path=os.path.join(self._folder, name),
                label=self._classes[label],
                start=None if math.isnan(start) else start,
                end=None if math.isnan(end) else end,
                row=row,
                name=name,
            )


# ---- reading -------------------------------------------------------------------------------------


class WrongLine(Exception):
    """What was expected of a line of a manifest, and what was found."""


def read_manifest(
    path: FilePath, root: FilePath | None = None, label_column: str = "label"
) -> Videos:
    """Read a csv (UTF-8) with the header `path[,label][,start,end]`, in any order; further columns
    are ignored.

    Relative paths start at `root`, else at the csv's folder. `label_column` takes labels from
    another column, which must then exist. `start` and `end` may each be empty or absent. Blank
    lines are allowed at the end only, since row i of every companion array is line i of the
    manifest. Raises ManifestError "file:line: expected ..., found ..."."""
    folder = os.fspath(Path(path).parent if root is None else root)
    names = []
    labels = []
    starts = []
    ends = []
    line = 1
    lines = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            check_header(header, label_column)
            blank = None  # number of the first blank line
            for fields in lines:
                if not fields:
                    blank = blank or lines.line_num
                    continue
                line = blank or lines.line_num
                if blank:
                    raise wrong_count(header, 0)
                name, label, start, end = parse_row(header, fields, label_column)
                names.append(name)
                labels.append(label)
                starts.append(start)
                ends.append(end)
        line = max(1, lines.line_num)
        if not names:
            raise WrongLine("at least one video after the header, found none")
    except WrongLine as error:
        raise ManifestError(f"{path}:{line}: expected {error}") from None
    except OSError as error:
        raise ManifestError(
            f"{path}:1: expected a csv with the header path[,label][,start,end], found none "
            f"({error.strerror})"
        ) from None
    except UnicodeDecodeError:
        raise ManifestError(f"{path}:{undecodable_line(path)}: expected UTF-8 text") from None
    except csv.Error as error:
        raise ManifestError(f"{path}:{lines.line_num}: expected csv ({error})") from None
    return Videos(folder, names, labels, starts, ends)


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
    """-> (path as written, label, start, end); WrongLine if a field does not serve."""
    if len(fields) != len(header):
        raise wrong_count(header, len(fields))
    values = dict(zip(header, fields, strict=True))
    name = values["path"]
    if not name.strip():
        raise WrongLine("a path, found none")
    start = parse_seconds("start", values.get("start", ""))
    end = parse_seconds("end", values.get("end", ""))
    if end is not None and end <= (start or 0):
        raise WrongLine(f"end after start, found {start or 0:g} to {end:g}")
    return name, values.get(label_column) or None, start, end


def wrong_count(header, found):
    return WrongLine(f"{len(header)} fields ({','.join(header)}), found {found}")


def parse_seconds(name, text):
    """A time of a manifest, None if it is empty."""
    text = text.strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise WrongLine(f"{name} in seconds, 0 or more, found {text!r}")
    return seconds


def undecodable_line(path):
    """The number of the first line that is no UTF-8."""
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 1


# ---- what tells manifests and videos apart -------------------------------------------------------


def manifest_hash(videos: Sequence[Video], count: int | None = None) -> str:
    """16 hex digits that change when a row's path (as written), start or end does, or their
    order; labels do not count. count: of the first so many rows alone.
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
    """The sizes in bytes of the files of `sampled_rows`, None for a missing one: together with
    `manifest_hash` they identify videos, also those of two folders (--root) with the same names."""
    return [file_size(videos[row].path) for row in sampled_rows(len(videos))]


def file_size(path: FilePath) -> int | None:
    """Bytes; None if there is no such file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def changed_rows(videos: Sequence[Video], about: dict) -> dict[int, tuple[int, int]]:
    """The rows whose file has another size than when an array was made: {row: (size then, size
    now)}. about: the contents of the array's .json. Only sampled rows are looked at; a file that
    was or is missing has not changed."""
    changed = {}
    for row, then in zip(
        sampled_rows(about.get("videos", 0)), about.get("files", ()), strict=False
    ):
        if then is None or row >= len(videos):
            continue
        now = file_size(videos[row].path)
        if now is not None and now != then:
            changed[row] = (then, now)
    return changed


def describe_change(
    videos: Sequence[Video], about: dict, is_made: Callable[[int], bool]
) -> str | None:
    """For messages: the first video that was replaced since its row of an array was made, None if
    there is none. is_made(row): whether the array has that row."""
    for row, (then, now) in changed_rows(videos, about).items():
        if is_made(row):
            return (
                f"videos have changed since it was made: {videos[row].path} had {then} bytes, "
                f"and has {now}"
            )
    return None


def renewed_sizes(videos: Sequence[Video], about: dict) -> list[int | None]:
    """`file_sizes` for going on with an array. about: the contents of its .json. Files that are
    missing now keep the size that they had.
    """
    sizes = file_sizes(videos)
    before = about.get("files", ())
    if about.get("videos") != len(videos) or len(before) != len(sizes):
        return sizes
    return [then if now is None else now for then, now in zip(before, sizes, strict=True)]


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
    """How many rows of the manifest `b` have the file and the times of a row of `a`, as when one
    is trained on and tested on both.
    """
    of_a = {place_and_time(video) for video in a}
    return sum(place_and_time(video) in of_a for video in b)


def place_and_time(video):
    return os.path.abspath(video.path), video.start, video.end
