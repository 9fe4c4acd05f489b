"""What the scripts of this folder share: they read official lists, look the videos up on disk, and
write manifests.

    videos = Videos("/disk/ssv2", out="data/ssv2")       one walk through the folder; no video is
                                                         opened
    row = Row(videos.find("78687"), label=41, where="train.json: entry 1", wanted="78687.webm")
    write("data/ssv2", {"train": [row]}, classes)        train.csv, missing-train.txt if videos are
                                                         missing, classes.txt

train.csv has the header path,label,class[,start,end][,further columns]. Every error is one line,
with the file and the line. Nothing but the standard library is needed."""

import argparse
import csv
import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

# of a video that is there twice, the first of these is taken
EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
SPLITS = ("train", "val", "test", "val_unseen")  # all that the scripts write


class Row(NamedTuple):
    path: str | None  # as the csv writes it; None: not on disk
    label: int
    where: str  # place in the annotations, "file:line"
    wanted: str  # path in the folder of videos that was looked for first
    start: float | None = None  # seconds
    end: float | None = None
    extra: tuple = ()  # values of the further columns
    # Two rows with the same id are duplicates. Without ids, two rows with the same path, start and
    # end are.
    id: str | None = None

    @property
    def name(self):
        return self.path or self.wanted


def parser(doc, name):
    """The flags that every script has."""
    flags = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--videos",
        default=f"data/{name}/videos",
        help="folder of the videos; its subfolders are searched too (default: %(default)s)",
    )
    flags.add_argument(
        "--out",
        default=f"data/{name}",
        help="folder for train.csv and the rest (default: %(default)s)",
    )
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


def list_videos(folder):
    """The paths of the videos below a folder, relative to it. Links are followed, and each folder
    is entered once. A link that leads nowhere is no video. Hidden files and folders, whose names
    begin with a dot, are left out: "._1.mp4", which macOS writes beside 1.mp4 on disks of other
    systems, and what lies in the trash."""
    names = []
    entered = set()
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        path = os.path.join(folder, inner)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:  # a link into a folder above
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        continue
                    name = os.path.join(inner, entry.name)
                    if entry.is_dir():
                        waiting.append(name)
                    elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                        names.append(name)
        except OSError as error:
            print(f"warning: {path}: cannot be read ({error.strerror}): nothing of it is listed")
    return names


def preference(name):
    """Sorts first which of two files of the same video is to be taken."""
    return not is_replacement(name), EXTENSIONS.index(os.path.splitext(name)[1].lower()), name


def is_replacement(name):
    """Whether a file is in a folder such as "replacement_for_corrupted_k400": the CVD Foundation
    has whole copies of broken clips in one."""
    return any(folder.startswith("replacement") for folder in Path(name).parts[:-1])


class Videos:
    """The videos below a folder, listed in one walk, so that a row costs no access to the disk.

    names: their paths relative to the folder, sorted. classes: names of folders that hold one class
    each; case does not count, and "_" is " ".
    """

    def __init__(self, folder, out, classes=()):
        if not os.path.isdir(folder):
            sys.exit(f"{folder}: no such folder (--videos sets the folder of the videos)")
        self.classes = {self._plain(name) for name in classes}
        # ".." after a symbolic link is its target's parent
        real = os.path.realpath(folder)
        try:
            self._prefix = os.path.relpath(real, os.path.realpath(out))
        except ValueError:  # another drive
            self._prefix = real
        self.names = sorted(list_videos(folder))
        self._by_stem = {}
        for name in sorted(self.names, key=preference):
            stem = os.path.splitext(os.path.basename(name))[0]
            self._by_stem.setdefault(stem, []).append(name)

    @staticmethod
    def _plain(name):
        return name.replace("_", " ").casefold()

    def path(self, name):
        """How the csv writes one of `names`: relative to the csv's folder."""
        return os.path.normpath(os.path.join(self._prefix, name))

    def find(self, stem, folder=None):
        """The csv's path of the video with this name, extension not counted, or None.

        folder: the name of the video's class. A replacement is preferred, and then a file in a
        folder of this name. If there is none, a file in any folder that is not another class's is
        taken."""
        names = self._by_stem.get(stem, ())
        if folder is not None and names and not is_replacement(names[0]):
            parents = [self._plain(os.path.basename(os.path.dirname(name))) for name in names]
            pairs = list(zip(names, parents, strict=True))
            names = [name for name, parent in pairs if parent == self._plain(folder)]
            if not names:
                names = [name for name, parent in pairs if parent not in self.classes]
        return self.path(names[0]) if names else None


# ---- manifests -----------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What is written of a split."""

    rows: list[Row]  # on disk, each once
    missing: list[str]  # the videos that are not on disk
    duplicates: int


def write(out, splits, classes, columns=(), folder="", within=()):
    """Writes {split: [Row]} as {split}.csv, missing-{split}.txt and classes.txt (line i: class i)
    into the folder `out`.

    Videos that are not on disk and duplicates are left out and counted, and so is a split without
    any video on disk, unless it is train, or no split has any. Before anything is written, these
    end the script:

    * a video with two labels, or in two splits (splits named in `within` are a part of another);
    * a split without rows, train without videos on disk, and no split with videos on disk;
    * what `refuse_to_overwrite` refuses.

    folder: that of the videos, for a message.
    """
    for path in (folder, str(out)):  # both are printed
        to_utf8(path)
    out = Path(out)
    refuse_overlaps(splits, within)
    kept = {split: keep(split, rows, classes) for split, rows in splits.items()}
    kept = leave_out_absent(kept, folder)
    numbering = "".join(f"{name}\n" for name in classes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        refuse_to_overwrite(out, kept, numbering)
        for split in kept:
            write_split(out, split, kept[split], classes, columns)
        # last: without a csv beside it, the next run would not know it for one of ours
        replace(out / "classes.txt", numbering)
    except OSError as error:
        sys.exit(f"{error.filename or out}: cannot be written ({error.strerror})")
    for split in SPLITS:
        if split not in kept and is_manifest(out / f"{split}.csv"):
            print(f"note: {out / split}.csv is of an earlier run, and stays as it is")
    first = shlex.quote(f"{out.absolute() / next(iter(kept))}.csv")
    print(
        f"next, to check the files, in the repository's folder: python -m tgm.prepare {first}, "
        "and so on"
    )


def refuse_overlaps(splits, within):
    """Ends with one line where a video is in two splits."""
    first = {}  # of each video: where it is named first, and the split
    for split, rows in splits.items():
        for row in rows:
            if row.path is None:  # it will be in no manifest
                continue
            where, home = first.setdefault(row.name, (row.where, split))
            if home != split and split not in within:
                sys.exit(
                    f"{row.where}: {row.name} is in {split}, but also in {home} ({where}): take "
                    "it out of one of the two"
                )


def keep(split, rows, classes):
    """The Kept of a split's rows."""
    if not rows:
        sys.exit(f"{split}: has no rows: check the annotations, and the flags that choose its rows")
    unique = {}
    for row in rows:
        other = unique.setdefault(row.id or (row.name, row.start, row.end), row)
        if other.label != row.label:
            sys.exit(
                f"{row.where}: {row.name} is of class {classes[row.label]!r}, but of "
                f"{classes[other.label]!r} at {other.where}"
            )
    on_disk = [row for row in unique.values() if row.path is not None]
    # a dict, because one video may have several rows
    missing = list(dict.fromkeys(row.wanted for row in rows if row.path is None))
    return Kept(on_disk, missing, len(rows) - len(unique))


def leave_out_absent(kept, folder):
    """The splits of {split: Kept} that have videos on disk. Another one is left out with a warning,
    unless it is train or none has videos: then the script ends with one line."""
    present = {split: content for split, content in kept.items() if content.rows}
    for split, content in kept.items():
        if split in present:
            continue
        problem = (
            f"{split}: none of its {len(content.missing)} videos is on disk: looked first for "
            f"{os.path.join(folder, content.missing[0])} (--videos sets the folder)"
        )
        if split == "train" or not present:
            sys.exit(problem)
        print(f"warning: {problem}: {split}.csv is not written (an older one stays as it is)")
    return present


def is_manifest(path):
    """Whether this is a csv as `write_split` writes it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return (file.readline().rstrip() + b",").startswith(b"path,label,class,")


def refuse_to_overwrite(out, splits, numbering):
    """Ends with one line where this run would overwrite a file that is not of these scripts, or
    leave a csv beside a classes.txt that is not its own. The rules:

    * A csv is ours if it has our header. Another csv is not overwritten.
    * Text files have no header. They are ours if a csv of ours is beside them, and a classes.txt
      also if it already holds what this run writes. Others are not overwritten.
    * An empty file may always be overwritten.
    * A csv of ours that this run does not replace may stay only if classes.txt stays as it is.

    splits: those that this run writes. numbering: what it writes to classes.txt."""
    ours = [split for split in SPLITS if is_manifest(out / f"{split}.csv")]
    classes = out / "classes.txt"
    classes_stay = classes.is_file() and classes.read_bytes() == to_utf8(numbering)
    foreign = [out / f"{split}.csv" for split in splits if split not in ours]
    if not ours:
        foreign += [out / f"missing-{split}.txt" for split in splits]
        if not classes_stay:
            foreign.append(classes)
    for path in foreign:
        if path.exists() and path.stat().st_size > 0:
            sys.exit(
                f"{path}: is there, and is none of the files that this command writes: "
                "not overwritten (--out writes elsewhere)"
            )
    for split in ours:
        if split not in splits and not classes_stay:
            sys.exit(
                f"{out / split}.csv: is of an earlier run with other classes: delete it "
                "(or --out writes elsewhere)"
            )


def write_split(out, split, kept, classes, columns):
    """Writes {split}.csv and missing-{split}.txt, and prints a line of counts."""
    timed = any(row.end is not None for row in kept.rows)
    times = ("start", "end") if timed else ()
    lines = [("path", "label", "class", *times, *columns)]
    for row in kept.rows:
        times = (seconds(row.start), seconds(row.end)) if timed else ()
        lines.append((row.path, row.label, classes[row.label], *times, *row.extra))
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    replace(out / f"{split}.csv", text.getvalue())

    absent = out / f"missing-{split}.txt"
    listed_in = ""
    if kept.missing:
        replace(absent, "".join(f"{name}\n" for name in kept.missing))
        listed_in = f" ({absent.name})"
    else:
        absent.unlink(missing_ok=True)
    print(
        f"{out / split}.csv: {len(kept.rows)} rows, {len({row.label for row in kept.rows})} "
        f"classes, {len(kept.missing)} videos missing{listed_in}, {kept.duplicates} duplicates"
    )


def replace(path, text):
    """Writes the file aside and renames it."""
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(to_utf8(text))
    os.replace(aside, path)


def to_utf8(text):
    """The text as bytes. Ends with one line if a name in it is not UTF-8."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(error.start - 40, 0) : error.end + 40]
        sys.exit(f"{around!a}: a name that is not UTF-8: rename the file")


def seconds(value):
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
