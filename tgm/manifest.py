"""Manifests: the csv of videos and their labels. Needs numpy.

    videos = read_manifest("data/train.csv")                                     the header path[,label][,start,end]

Videos that were replaced under the same names are noticed by their sizes: the .json beside an array
(arrays.py) holds those of 100 files, evenly spaced over the rows, and whoever opens the array
compares them. All files replaced are noticed for certain, 5 % of them with a probability of 0.99, 1
% with 0.63, and a single one in a large manifest hardly ever; a manifest of up to 100 rows is
compared whole. The size of every file would double what hashing a million rows costs on a local
disk (4 seconds more for each rank of each stage, measured) and take a round trip to the server for
each file on a network disk. The time of last change is left out: copies to another machine change
it. It does not matter where files lie (--root): the same files elsewhere are the same videos, and
others of the same names are not."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SAMPLE = 100  # files whose sizes tell whether the videos are still those an array was made of


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
    """The rows of a manifest, a sequence of Video, held as a few arrays: about 50 bytes a row and a
    path's own length. A list of tuples takes 400, and each of a loader's workers would come to hold
    a copy, by counting references in it."""

    def __init__(self, folder, names, labels, starts, ends):
        number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        names = [name.encode() for name in names]
        self._folder, self._classes, self._text = folder, list(number), b"".join(names)
        self._at = np.cumsum([0, *map(len, names)])  # row i's name is text[at[i]:at[i + 1]]
        self._labels = np.array([number[label] for label in labels], np.int32)
        # None becomes NaN
        self._starts, self._ends = (np.array(starts, float), np.array(ends, float))

    @property
    def folder(self):
        """Where relative paths start."""
        return self._folder

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self._some(np.arange(len(self))[index]))
        return next(self._some(np.array([range(len(self))[index]])))

    def __iter__(self):
        for first in range(0, len(self), 4096):
            yield from self._some(np.arange(first, min(first + 4096, len(self))))

    def _some(self, rows):
        known = lambda seconds: None if math.isnan(seconds) else seconds
        columns = (
            self._at[rows],
            self._at[rows + 1],
            self._labels[rows],
            self._starts[rows],
            self._ends[rows],
            rows,
        )
        for a, b, label, start, end, row in zip(*(column.tolist() for column in columns)):
            name = self._text[a:b].decode()
            yield Video(
                os.path.join(self._folder, name),
                self._classes[label],
                known(start),
                known(end),
                row,
                name,
            )


def read_manifest(path, root=None, label_column="label"):
    """Read a csv (UTF-8) with the header `path[,label][,start,end]`, in any order; further columns
    are ignored.

    Relative paths start at `root`, else at the csv's folder. `label_column` takes labels from
    another column, which must then exist. `start` and `end` may each be empty or absent. Blank
    lines are allowed at the end only, since row i of every companion array is line i of the
    manifest. Raises ManifestError "file:line: expected ..., found ..."."""
    folder = os.fspath(Path(path).parent if root is None else root)
    names, labels, starts, ends, number = [], [], [], [], lambda text: float(text) if text else None

    def fail(line, what):
        raise ManifestError(f"{path}:{line}: expected {what}") from None

    def seconds(line, name, text):
        try:
            value = number(text.strip())
        except ValueError:
            value = math.nan
        if value is not None and not 0 <= value < math.inf:
            fail(line, f"{name} in seconds, 0 or more, found {text.strip()!r}")
        return value

    rows = blank = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = [name.strip() for name in next(rows, [])]
            for name in {"path", label_column} - {"label"}:
                if name not in header:
                    fail(
                        1, f"a column {name!r} in the header, found {','.join(header) or 'nothing'}"
                    )
            for name in ("path", "label", "start", "end", label_column):
                if header.count(name) > 1:
                    fail(1, f"one column {name!r}, found {header.count(name)}")
            at_path, at_label, at_start, at_end = (
                header.index(name) if name in header else None
                for name in ("path", label_column, "start", "end")
            )
            for fields in rows:
                if blank is not None or not fields:  # blank lines may only end the file
                    if fields:
                        fail(blank, f"{len(header)} fields ({','.join(header)}), found 0")
                    blank = blank or rows.line_num
                    continue
                line = rows.line_num
                if len(fields) != len(header):
                    fail(line, f"{len(header)} fields ({','.join(header)}), found {len(fields)}")
                name = fields[at_path]
                if not name.strip():
                    fail(line, "a path, found none")
                start = seconds(line, "start", fields[at_start]) if at_start is not None else None
                end = seconds(line, "end", fields[at_end]) if at_end is not None else None
                if end is not None and end <= (start or 0):
                    fail(line, f"end after start, found {start or 0:g} to {end:g}")
                label = fields[at_label] or None if at_label is not None else None
                for column, value in ((names, name), (labels, label), (starts, start), (ends, end)):
                    column.append(value)
    except OSError as error:
        fail(1, f"a csv with the header path[,label][,start,end], found none ({error.strerror})")
    except UnicodeDecodeError:
        head = Path(path).read_bytes()
        bad = next(line for line, text in enumerate(head.split(b"\n"), 1) if not is_utf8(text))
        fail(bad, "UTF-8 text")
    except csv.Error as error:
        fail(rows.line_num, f"csv ({error})")
    if not names:
        fail(max(1, rows.line_num), "at least one video after the header, found none")
    return Videos(folder, names, labels, starts, ends)


def is_utf8(text):
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def manifest_hash(videos):
    """16 hex digits that change when a row's path (as written), start or end does, or their
    order; labels do not count.
    """
    digest = hashlib.sha256()
    for video in videos:
        digest.update(json.dumps([video.name, video.start, video.end]).encode() + b"\n")
    return digest.hexdigest()[:16]


def sampled_rows(count):
    """Up to SAMPLE of the rows 0 to count - 1, evenly spaced, the first and the last among them."""
    if count <= SAMPLE:
        return list(range(count))
    return np.linspace(0, count - 1, SAMPLE).round().astype(int).tolist()


def file_sizes(videos):
    """The sizes in bytes of the files of `sampled_rows`, None for a missing one: together with
    `manifest_hash` they identify videos, also those of two folders (--root) with the same names."""
    return [file_size(videos[row].path) for row in sampled_rows(len(videos))]


def file_size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def changed_rows(videos, about):
    """The rows whose file has another size than when the file was made whose .json is `about`:
    {row: (size then, size now)}. Only sampled rows are looked at; a file that was or is missing has
    not changed."""
    changed = {}
    for row, then in zip(sampled_rows(about.get("videos", 0)), about.get("files", ())):
        if then is None or row >= len(videos):
            continue
        now = file_size(videos[row].path)
        if now is not None and now != then:
            changed[row] = (then, now)
    return changed


def renewed_sizes(videos, about):
    """`file_sizes` for going on with what was begun under `about`: files that are missing now
    keep the size that they had.
    """
    sizes = file_sizes(videos)
    if about.get("videos") == len(videos) and len(about.get("files", ())) == len(sizes):
        return [then if now is None else now for then, now in zip(about["files"], sizes)]
    return sizes


def describe_change(videos, changed):
    """For messages: what `changed_rows` found."""
    row, (then, now) = next(iter(changed.items()))
    return (
        f"videos have changed since it was made: {videos[row].path} had {then} bytes, and has {now}"
    )


def require_files(videos, manifest):
    """ManifestError if none of up to SAMPLE rows, evenly spaced, has a file: then the folder is
    wrong, not the files.
    """
    rows = sampled_rows(len(videos))
    if any(os.path.exists(videos[row].path) for row in rows):
        return
    tried = f"{manifest}: none of its {len(videos)} videos is there"
    if len(rows) < len(videos):
        tried = f"{manifest}: none of {len(rows)} of its {len(videos)} videos is there"
    name = videos[0].name
    if os.path.isabs(name):
        raise ManifestError(f"{tried}, the first being {name}: correct the paths in the manifest")
    folder = os.path.abspath(videos.folder)
    raise ManifestError(
        f"{tried}: searched {folder} for {name} and so on; --root FOLDER sets where relative paths start"
    )


def shared_rows(a, b):
    """How many rows of the manifest `b` have the file and the times of a row of `a`, as when one
    is trained on and tested on both.
    """
    of_a = {place_and_time(video) for video in a}
    return sum(place_and_time(video) in of_a for video in b)


def place_and_time(video):
    return os.path.abspath(video.path), video.start, video.end
