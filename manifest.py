"""Manifests, and the arrays and captions that hang off them: row i of every array is line i of the manifest. Needs numpy; nothing
of ours.

    videos = read_manifest("data/train.csv")                                     the header path[,label][,start,end]
    text, about = open_array("data/train.text.npy", videos, remedy="python saliency.py")

Arrays are memory-mapped .npy files pre-filled with NaN; a row that stays NaN is a video that failed. The .json beside each holds what
made it and a hash of the manifest's rows, so that a stale file is refused. Who writes a file holds its lock (FILE.lock) meanwhile.
"""
import atexit
import csv
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None
import numpy as np


HELD = []  # open lock files of this process


class ManifestError(Exception):
    """A manifest or an array beside it that cannot be used: one line, with the place and what was expected."""


class Video(NamedTuple):
    path: str            # file to open, absolute or relative to the working directory
    label: str | None    # as written; None if there is no such column or it is empty
    start: float | None  # seconds from the first frame; None: the beginning
    end: float | None    # None: the end
    row: int             # 0-based line of the manifest (header not counted), and of every companion array
    name: str            # the path as the manifest writes it


class Videos(Sequence):
    """The rows of a manifest, a sequence of Video, held as a few arrays: about 50 bytes a row and a path's own length. A list of
    tuples takes 400, and each of a loader's workers would come to hold a copy, by counting references in it."""

    def __init__(self, folder, names, labels, starts, ends):
        number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        names = [name.encode() for name in names]
        self._folder, self._classes, self._text = folder, list(number), b"".join(names)
        self._at = np.cumsum([0, *map(len, names)])                          # row i's name is text[at[i]:at[i + 1]]
        self._labels = np.array([number[label] for label in labels], np.int32)
        self._starts, self._ends = np.array(starts, float), np.array(ends, float)  # None becomes NaN

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
        columns = (self._at[rows], self._at[rows + 1], self._labels[rows], self._starts[rows], self._ends[rows], rows)
        for a, b, label, start, end, row in zip(*(column.tolist() for column in columns)):
            name = self._text[a:b].decode()
            yield Video(os.path.join(self._folder, name), self._classes[label], known(start), known(end), row, name)


def read_manifest(path, root=None, label_column="label", strict_root=False):
    """Read a csv (UTF-8) with the header `path[,label][,start,end]`, in any order; further columns are ignored.

    Relative paths start at `root`, else at the csv's folder. `label_column` takes labels from another column, which must
    then exist. `start` and `end` may each be empty or absent. Blank lines are allowed at the end only, since row i of
    every companion array is line i of the manifest. With `strict_root` a path that leads out of that folder, be it absolute,
    by .. or by a link, is refused. Raises ManifestError "file:line: expected ..., found ...".
    """
    folder = os.fspath(Path(path).parent if root is None else root)
    inside = os.path.join(os.path.realpath(folder), "")
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
                    fail(1, f"a column {name!r} in the header, found {','.join(header) or 'nothing'}")
            for name in ("path", "label", "start", "end", label_column):
                if header.count(name) > 1:
                    fail(1, f"one column {name!r}, found {header.count(name)}")
            at_path, at_label, at_start, at_end = (header.index(name) if name in header else None
                                                   for name in ("path", label_column, "start", "end"))
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
                if strict_root and not os.path.realpath(os.path.join(folder, name)).startswith(inside):
                    fail(line, f"a path inside {folder} (--strict-root), found {name!r}")
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
    """16 hex digits that change when a row's path (as written), start or end does, or their order; labels do not count."""
    digest = hashlib.sha256()
    for video in videos:
        digest.update(json.dumps([video.name, video.start, video.end]).encode() + b"\n")
    return digest.hexdigest()[:16]


def grown_from(videos, about):
    """Of how many rows a file was made whose .json is `about`, if rows were added at the manifest's end since; else 0."""
    count = about.get("videos", 0) if isinstance(about, dict) else 0
    return count if 0 < count < len(videos) and about.get("manifest") == manifest_hash(videos[:count]) else 0


def file_hash(path, lines=None):
    """16 hex digits that change with the file's contents, or with those of its first `lines` lines."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b"") if lines is None else itertools.islice(file, lines):
            digest.update(block)
    return digest.hexdigest()[:16]


def companion(manifest, kind):
    """The file of that kind beside a manifest: companion("data/train.csv", "text.npy") is data/train.text.npy."""
    return Path(manifest).with_suffix(f".{kind}")


def hold(path):
    """Keeps other processes from writing `path` until `release` or until this one ends, however it ends: by a lock on PATH.lock, a
    file that is removed then. Exits with one line if another process has it. Where locks do not work, nothing is locked."""
    lock = os.path.abspath(f"{path}.lock")
    try:
        while fcntl:
            file = open(lock, "a")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(lock) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):  # not one just removed
                HELD.append(file)
                return
    except BlockingIOError:
        sys.exit(f"{path}: another process is writing it: wait for its end, or write elsewhere (--out)")
    except OSError:  # a file system without locks
        pass


@atexit.register
def release():
    """Lets go of all that this process holds; its end does, too."""
    while HELD:
        file = HELD.pop()
        Path(file.name).unlink(missing_ok=True)
        file.close()


def is_held(path):
    """Whether another process holds `path`."""
    try:
        with open(f"{path}.lock") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):  # nobody, or no locks
        pass
    return False


def open_array(path, videos, remedy, **expect):
    """Open a companion array: -> (read-only memory map [N, ...] of floats, the contents of the .json beside it).

    Refused, as a ManifestError that ends in "make it with: {remedy}": missing, unreadable or truncated; not N rows of
    floats or not the "shape" its .json says; of another manifest ("manifest" is not manifest_hash(videos)); made with
    other settings (`expect`: values the .json must hold, such as captions=hash), or by CLIP with an
    activation that the .json does not tell. And, while another process writes it.
    """
    path = Path(path)

    def fail(reason, remedy=remedy):
        raise ManifestError(" ".join(f"{path}: {reason}; make it with: {remedy}".split()))

    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{os.path.basename(error.filename or path)} cannot be read ({error.strerror or error})")
    except (ValueError, EOFError, SyntaxError) as error:
        fail(f"cannot be read ({error})")
    if not isinstance(meta, dict):
        fail("its .json holds no settings")
    if is_held(path):
        raise ManifestError(f"{path}: another process is writing it: wait for its end")
    if count := grown_from(videos, meta):
        fail(f"has the first {count} of {len(videos)} rows of the manifest", " && ".join(f"{part} --extend" for part in remedy.split(" && ")))
    if meta.get("manifest") != manifest_hash(videos):
        fail("is of another manifest")
    if array.dtype.kind != "f" or array.ndim == 0 or len(array) != len(videos):
        fail(f"expected {len(videos)} rows of floats, found {array.dtype} of shape {list(array.shape)}")
    for key, value in {"shape": list(array.shape), **expect}.items():
        if meta.get(key) != json.loads(json.dumps(value)):
            fail(f"expected {key} {value!r}, its .json says {meta.get(key)!r}")
    if "clip" in meta and "activation" not in meta:
        # Of a time when 19 of open_clip's weights, OpenAI's among them, ran with the wrong one.
        fail("its .json does not tell CLIP's activation", f"{remedy} --resume none")
    return array, meta


def read_captions(path, videos, remedy):
    """The captions that caption.py wrote: a list of strings for each row, empty where it failed. ManifestError, ending in
    "make it with: {remedy}", where the file is missing, damaged, or of another manifest."""
    try:
        entries = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        captions = [[str(text) for text in entry["captions"]] for entry in entries]
        same = [entry["path"] for entry in entries] == [video.name for video in videos]
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); make it with: {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path}: is damaged ({error}); make it with: {remedy}") from None
    if not same:
        if [entry["path"] for entry in entries] == [video.name for video in videos[:len(entries)]]:
            raise ManifestError(f"{path}: has the first {len(entries)} of {len(videos)} rows of the manifest; make it with: {remedy} --extend")
        raise ManifestError(f"{path}: is of another manifest; make it with: {remedy} --resume none")
    return captions


def create_array(path, shape, dtype, about, head=None):
    """Writes an array of NaN, after its first rows `head` if given, and then `about` and the shape to the .json beside it. Exits
    with one line if that is impossible, such as on a full disk: all its space is taken now, and none when rows are filled in."""
    about_path, aside = path.with_suffix(".json"), path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)})
            for start in range(0, 0 if head is None else len(head), 4096):
                file.write(head[start:start + 4096].tobytes())
            empty = np.full(shape[1:], np.nan, dtype).tobytes()
            for start in range(0 if head is None else len(head), shape[0], 4096):
                file.write(empty * min(4096, shape[0] - start))
        if head is None:
            about_path.unlink(missing_ok=True)  # an array without its json is not an array: a kill here leaves nothing half-made
        aside.replace(path)
        about_path.write_text(json.dumps(about | {"shape": list(shape)}, indent=1) + "\n")
    except OSError as error:
        aside.unlink(missing_ok=True)
        sys.exit(f"{path}: cannot be written ({error.strerror})")


def create_or_resume(path, videos, shape, about, resume, rank, barrier):
    """The float16 array [len(videos), *shape] at `path`, filled with NaN where it is new, writable, mapped, held by rank 0; `about`
    and a hash of the manifest land in the .json beside it.

    An array that is there must carry the same `about`, else this exits with the command that remakes it. resume: "none" starts
    anew; "auto" goes on; "extend" also takes an array of the manifest's first rows, and adds the rest. An entry of `about` may be
    a function of the number of rows, to tell what it was for fewer."""
    at = lambda count: ({"manifest": manifest_hash(videos[:count]), "videos": count}
                        | {key: value(count) if callable(value) else value for key, value in about.items()} | {"shape": [count, *shape]})
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        hold(path)
        try:
            old = json.loads(path.with_suffix(".json").read_text()) if resume != "none" and path.exists() else None
        except (OSError, ValueError):
            old = None
        count = grown_from(videos, old)
        if count and resume != "extend":
            sys.exit(f"{path}: has the first {count} of {len(videos)} rows of the manifest: --extend computes the rest")
        if old is not None:
            expected = at(count or len(videos))
            if changed := [key for key in expected if not isinstance(old, dict) or old.get(key) != expected[key]]:
                sys.exit(f"{path}: made with another {', '.join(changed)}; --resume none remakes it")
        if count or old is None:
            create_array(path, (len(videos), *shape), np.float16, at(len(videos)), open_rows(path)[:count] if count else None)
    barrier()
    return open_rows(path)


def fill(array, row, value):
    """Writes value [K, ...] to the first K of array[row], the first of them last, so that `filled` tells a row from half of one."""
    for part in reversed(range(len(value))):
        array[row, part] = value[part]


def filled(array):
    """Which rows of an array [N, K, ...] `fill` has written, bool [N]."""
    return ~np.isnan(array[(slice(None), 0) + (-1,) * (array.ndim - 2)])


def open_rows(path):
    """An array of ours, mapped, to fill rows in; exits with one line if it is damaged."""
    try:
        return np.load(path, mmap_mode="r+", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        sys.exit(f"{path}: cannot be read ({error}); --resume none remakes it")
