"""Manifests, and the arrays and captions that hang off them: row i of every array is line i of the manifest. Needs numpy; nothing
of ours.

    videos = read_manifest("data/train.csv")                                     the header path[,label][,start,end]
    text, about = open_array("data/train.text.npy", videos, remedy="python saliency.py")

Arrays are memory-mapped .npy files pre-filled with NaN; a row that stays NaN is a video that failed. The .json beside each holds what
made it and a hash of the manifest's rows, so that a stale file is refused.
"""
import csv
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np


class ManifestError(Exception):
    """A manifest or an array beside it that cannot be used: one line, with the place and what was expected."""


class Video(NamedTuple):
    path: str            # file to open, absolute or relative to the working directory
    label: str | None    # as written; None if there is no such column or it is empty
    start: float | None  # seconds from the first frame; None: the beginning
    end: float | None    # None: the end
    row: int             # 0-based line of the manifest (header not counted), and of every companion array
    name: str            # the path as the manifest writes it


def read_manifest(path, root=None, label_column="label"):
    """Read a csv (UTF-8) with the header `path[,label][,start,end]`, in any order; further columns are ignored.

    Relative paths start at `root`, else at the csv's folder. `label_column` takes labels from another column, which must
    then exist. `start` and `end` may each be empty or absent. Blank lines are allowed at the end only, since row i of
    every companion array is line i of the manifest. Raises ManifestError "file:line: expected ..., found ...".
    """
    folder = os.fspath(Path(path).parent if root is None else root)
    videos, labels, number = [], {}, lambda text: float(text) if text else None  # labels are few: each is kept once

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
                start = seconds(line, "start", fields[at_start]) if at_start is not None else None
                end = seconds(line, "end", fields[at_end]) if at_end is not None else None
                if end is not None and end <= (start or 0):
                    fail(line, f"end after start, found {start or 0:g} to {end:g}")
                label = fields[at_label] or None if at_label is not None else None
                videos.append(Video(os.path.join(folder, name), labels.setdefault(label, label), start, end, len(videos), name))
    except OSError as error:
        fail(1, f"a csv with the header path[,label][,start,end], found none ({error.strerror})")
    except UnicodeDecodeError:
        head = Path(path).read_bytes()
        bad = next(line for line, text in enumerate(head.split(b"\n"), 1) if not is_utf8(text))
        fail(bad, "UTF-8 text")
    except csv.Error as error:
        fail(rows.line_num, f"csv ({error})")
    if not videos:
        fail(max(1, rows.line_num), "at least one video after the header, found none")
    return videos


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


def file_hash(path):
    """16 hex digits that change with the file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def companion(manifest, kind):
    """The file of that kind beside a manifest: companion("data/train.csv", "text.npy") is data/train.text.npy."""
    return Path(manifest).with_suffix(f".{kind}")


def open_array(path, videos, remedy, **expect):
    """Open a companion array: -> (read-only memory map [N, ...] of floats, the contents of the .json beside it).

    Refused, as a ManifestError that ends in "make it with: {remedy}": missing, unreadable or truncated; not N rows of
    floats or not the "shape" its .json says; of another manifest ("manifest" is not manifest_hash(videos)); made with
    other settings (`expect`: values the .json must hold, such as captions=hash).
    """
    path = Path(path)

    def fail(reason):
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
    if meta.get("manifest") != manifest_hash(videos):
        fail("is of another manifest")
    if array.dtype.kind != "f" or array.ndim == 0 or len(array) != len(videos):
        fail(f"expected {len(videos)} rows of floats, found {array.dtype} of shape {list(array.shape)}")
    for key, value in {"shape": list(array.shape), **expect}.items():
        if meta.get(key) != json.loads(json.dumps(value)):
            fail(f"expected {key} {value!r}, its .json says {meta.get(key)!r}")
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
        raise ManifestError(f"{path}: is of another manifest; make it with: {remedy} --resume none")
    return captions


def create_or_resume(path, shape, about, resume, rank, barrier):
    """The float16 array at `path`, filled with NaN where it is new, writable, mapped; `about` lands in the json beside it.

    An array that is there must carry the same `about`, else this exits with the command that remakes it."""
    about = about | {"shape": list(shape)}
    about_path = path.with_suffix(".json")
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume == "auto" and path.exists() and about_path.exists():
            old = json.loads(about_path.read_text())
            changed = [key for key in about if old.get(key) != about[key]]
            if changed:
                sys.exit(f"{path}: made with another {', '.join(changed)}; --resume none remakes it")
        else:
            about_path.unlink(missing_ok=True)  # an array without its json is not an array: a kill here leaves nothing half-made
            array = np.lib.format.open_memmap(path, "w+", np.float16, tuple(shape))
            for start in range(0, len(array), 4096):
                array[start:start + 4096] = np.nan
            array.flush()
            about_path.write_text(json.dumps(about, indent=1) + "\n")
    barrier()
    return np.load(path, mmap_mode="r+", allow_pickle=False)
