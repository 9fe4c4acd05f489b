"""What the scripts of this folder share: they read official lists, look the videos up on disk, and
write manifests.

    videos = Videos("/disk/ssv2", out="data/ssv2")       one walk through the folder; no video is
                                                         opened
    row = Row(videos.find("78687"), label=41, where="train.json: entry 1", wanted="78687.webm")
    write("data/ssv2", {"train": [row]}, classes)        train.csv, missing-train.txt if videos are
                                                         missing, classes.txt

train.csv has the header path,label,class[,start,end][,further columns]. Every error is one line,
with the file and the line."""

import argparse
import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

# of a video that is there twice, the first of these is taken
EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class Row(NamedTuple):
    path: str | None  # as the csv writes it; None: not on disk
    label: int
    where: str  # place in the annotations, "file:line"
    wanted: str  # path in the folder of videos that was looked for first
    start: float | None = None  # seconds
    end: float | None = None
    extra: tuple = ()  # values of the further columns
    id: str | None = (
        None  # rows of the same id are duplicates; None: rows of the same path, start and end are
    )


def parser(doc, name):
    """The flags that every script has."""
    flags = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--videos",
        default=f"data/{name}/videos",
        help="folder of the videos; its subfolders are searched too",
    )
    flags.add_argument("--out", default=f"data/{name}", help="folder for train.csv and the rest")
    return flags


# ---- annotations ---------------------------------------------------------------------------------


def expect(condition, where, expected, found):
    """Ends with one line, "where: expected ..., found ...", unless the condition holds."""
    if not condition:
        sys.exit(f"{where}: expected {expected}, found {found if str(found) else 'nothing'}")


def integer(text, where, expected):
    """The text as an integer of 0 or more."""
    text = str(text).strip()
    expect(text.isascii() and text.isdigit(), where, expected, repr(text))
    return int(text)


def first_of(folder, *names):
    """The first of these files that the folder of annotations has."""
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    sys.exit(
        f"{folder}: expected {' or '.join(names)} in it, found none (--annotations sets the folder)"
    )


def read_text(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        sys.exit(f"{path}: cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        sys.exit(f"{path}:{line}: expected UTF-8 text")


def read_lines(path):
    """[("file:line", text)] of the lines that are not blank."""
    return [
        (f"{path}:{i}", line.strip())
        for i, line in enumerate(read_text(path).split("\n"), 1)
        if line.strip()
    ]


def read_csv(path, *columns):
    """[("file:line", {column: text})] of a csv whose header has these columns among others."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        absent = [column for column in columns if column not in header]
        expect(
            not absent,
            f"{path}:1",
            f"the columns {','.join(columns)}",
            f"{','.join(header)} (without {','.join(absent)})",
        )
        rows = []
        for fields in reader:
            if fields:
                where = f"{path}:{reader.line_num}"
                expect(
                    len(fields) == len(header),
                    where,
                    f"{len(header)} fields ({','.join(header)})",
                    len(fields),
                )
                rows.append((where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        sys.exit(f"{path}:{reader.line_num}: expected csv ({error})")
    return rows


def read_json(path, kind):
    """The contents of a json file, of type `kind` (list or dict)."""
    try:
        contents = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        sys.exit(f"{path}:{error.lineno}: expected json ({error.msg})")
    expect(isinstance(contents, kind), path, f"a json {kind.__name__}", type(contents).__name__)
    return contents


def read_entries(path, *keys):
    """[("file: entry i", object)] of a json list of objects that have these keys."""
    entries = [(f"{path}: entry {i}", entry) for i, entry in enumerate(read_json(path, list), 1)]
    for where, entry in entries:
        expect(
            isinstance(entry, dict) and all(key in entry for key in keys),
            where,
            f"the keys {', '.join(keys)}",
            ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__,
        )
    return entries


# ---- videos --------------------------------------------------------------------------------------


class Videos:
    """The videos below a folder, listed in one walk, so that a row costs no access to the disk.

    names: their paths relative to the folder, sorted. classes: names of folders that hold one class
    each; case does not count, and "_" is " ".
    """

    def __init__(self, folder, out, classes=()):
        if not os.path.isdir(folder):
            sys.exit(f"{folder}: no such folder (--videos sets the folder of the videos)")
        self.folder, self.classes = folder, {self._plain(name) for name in classes}
        # ".." after a symbolic link is its target's parent
        real, base = (os.path.realpath(folder), os.path.realpath(out))
        try:
            self._prefix = os.path.relpath(real, base)
        except ValueError:  # another drive
            self._prefix = real
        self.names, walked = [], set()
        for parent, folders, files in os.walk(real, followlinks=True):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in walked:  # a link into a folder above
                folders.clear()
                continue
            walked.add((status.st_dev, status.st_ino))
            inner = "" if parent == real else os.path.relpath(parent, real)
            self.names += [
                os.path.join(inner, name) for name in files if name.lower().endswith(EXTENSIONS)
            ]
        self.names.sort(
            key=lambda name: (EXTENSIONS.index(os.path.splitext(name)[1].lower()), name)
        )
        self._by_stem = {}
        for name in self.names:
            self._by_stem.setdefault(os.path.splitext(os.path.basename(name))[0], []).append(name)
        self.names.sort()

    @staticmethod
    def _plain(name):
        return name.replace("_", " ").casefold()

    def path(self, name):
        """How the csv writes one of `names`: relative to the csv's folder."""
        return os.path.normpath(os.path.join(self._prefix, name))

    def find(self, stem, folder=None):
        """The csv's path of the video with this name, extension not counted, or None. With
        `folder`, it lies in a folder of that name, or else in none that is another class's."""
        names = self._by_stem.get(stem, ())
        if folder is not None and names:
            parents = [self._plain(os.path.basename(os.path.dirname(name))) for name in names]
            pairs = list(zip(names, parents, strict=True))
            names = [name for name, parent in pairs if parent == self._plain(folder)]
            if not names:
                names = [name for name, parent in pairs if parent not in self.classes]
        return self.path(names[0]) if names else None


# ---- manifests -----------------------------------------------------------------------------------


def write(out, splits, classes, columns=(), folder="", within=()):
    """Writes {split: [Row]} as {split}.csv, missing-{split}.txt and classes.txt (line i: class i)
    into the folder `out`.

    Videos that are not on disk and duplicates are left out and counted; a video with two labels or
    in two splits ends the script before anything is written (splits named in `within` are a part of
    another), and so does a split without videos.
    folder: that of the videos, for this last message.
    """
    out, kept, missing, duplicates, split_of = Path(out), {}, {}, {}, {}
    for split, rows in splits.items():
        unique, missing[split], duplicates[split] = {}, {}, 0
        for row in rows:
            name = row.path or row.wanted
            other = unique.setdefault(row.id or (name, row.start, row.end), row)
            if other.label != row.label:
                old, new = classes[other.label], classes[row.label]
                sys.exit(
                    f"{row.where}: {name} is of class {new!r}, but of {old!r} at {other.where}"
                )
            duplicates[split] += other is not row
            where, home = split_of.setdefault(name, (row.where, split))
            if home != split and split not in within:
                sys.exit(
                    f"{row.where}: {name} is in {split}, but also in {home} ({where}): take it out "
                    "of one of the two"
                )
            if row.path is None:
                missing[split][row.wanted] = None
        kept[split] = [row for row in unique.values() if row.path is not None]
        if not kept[split]:
            first = (
                f": looked first for {os.path.join(folder, next(iter(missing[split])))}"
                if missing[split]
                else ""
            )
            sys.exit(
                f"{split}: none of its {len(unique)} rows has a video on disk{first} "
                "(--videos sets the folder)"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split in kept:  # all, before one is written
            path = out / f"{split}.csv"
            if path.exists() and path.open("rb").read(5) != b"path,":
                sys.exit(
                    f"{path}: is there and is no manifest: not overwritten "
                    "(--out sets another folder)"
                )
        for split, rows in kept.items():
            path = out / f"{split}.csv"
            spans = ("start", "end") if any(row.end is not None for row in rows) else ()
            lines = [("path", "label", "class", *spans, *columns)]
            lines += [
                (
                    row.path,
                    row.label,
                    classes[row.label],
                    *map(seconds, (row.start, row.end)[: len(spans)]),
                    *row.extra,
                )
                for row in rows
            ]
            text = io.StringIO(newline="")
            csv.writer(text).writerows(lines)
            replace(path, text.getvalue())
            gone = out / f"missing-{split}.txt"
            replace(gone, "".join(f"{name}\n" for name in missing[split])) if missing[
                split
            ] else gone.unlink(missing_ok=True)
            print(
                f"{path}: {len(rows)} rows, {len({row.label for row in rows})} classes, "
                f"{len(missing[split])} videos missing"
                f"{f' ({gone.name})' if missing[split] else ''}, {duplicates[split]} duplicates"
            )
        replace(out / "classes.txt", "".join(f"{name}\n" for name in classes))
    except OSError as error:
        sys.exit(f"{error.filename or out}: cannot be written ({error.strerror})")
    except UnicodeEncodeError as error:
        sys.exit(
            f"{error.object[max(error.start - 40, 0) : error.end + 40]!a}: a name that is not "
            "UTF-8: rename the file"
        )
    print(
        f"next, to check the files: python -m tgm.prepare {out / next(iter(kept))}.csv, and so on"
    )


def replace(path, text):
    """Writes the file aside and renames it."""
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(text.encode("utf-8"))
    os.replace(aside, path)


def seconds(value):
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
