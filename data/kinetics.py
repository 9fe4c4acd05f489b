"""Kinetics-400, -600, -700: ten-second clips of YouTube videos, one human action each; about
240,000 training clips in K400.

Annotations  kinetics400.tar.gz (600, 700 likewise), from DeepMind ("The Kinetics Human Action Video
             Dataset"): csv files with the columns
             label,youtube_id,time_start,time_end,split[,is_cc]. Licence: Creative Commons
             Attribution 4.0.
Videos       not distributed by DeepMind: the CVD Foundation ("cvdfoundation/kinetics-dataset" on
             GitHub) has copies of the clips, and there are crawlers. What left YouTube is gone;
             nobody's copy is complete.

    python data/kinetics.py --videos /disk/k400 --annotations /disk/kinetics400
    python data/kinetics.py --videos /disk/k400 --annotations /disk/train.csv /disk/val.csv \\
        --out data/k400
    python data/kinetics.py --videos /disk/k400 --list /disk/train.csv /disk/val.csv \\
        --classes /disk/label_map_k400.txt

writes train.csv, val.csv, test.csv (those that have annotations and videos), classes.txt, and
missing-train.txt, ... with the videos that are not on disk. Classes are numbered alphabetically, as
in the lists of VideoMAE and mmaction2. Clips may be called ID_000010_000020.mp4 (the seconds) or
ID.mp4, in folders named by label (with spaces or underscores), by split, or all in one; mkv and
webm serve too.

With --untrimmed, ID.mp4 is the whole YouTube video, and the clip's start and end go to the
manifest. With --list, the lists of VideoMAE, SlowFast and mmaction2 are read: a line is "path
label", whatever the extension of the list.

Confusing: the validation split is "val" or "validate"; some copies of the test csv have no labels
and are left out; lists of VideoMAE end in .csv but are separated by spaces; a few videos have clips
of two classes, so that a single ID.mp4 is left out unless --untrimmed tells that it is all of it.
Files in a folder whose name begins with "replacement", as the CVD Foundation has them, replace
broken clips.
"""

import os
import re
import sys
from pathlib import Path

import lists

SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}


def splits_in(path):
    """The splits that a file's name tells, of train, val and test. "latest" and "interval" tell
    none; "trainval" tells two."""
    words = re.findall(r"(?<![a-z])((?:mini)?(?:train|val|test)+)", Path(path).stem.lower())
    return set(re.findall("train|val|test", " ".join(words)))


def split_of(path):
    """The one split that a file's name tells."""
    names = splits_in(path)
    lists.expect(
        len(names) == 1, path, "a file name with one of train, val, test in it", Path(path).name
    )
    return names.pop()


def first_line(path):
    """The beginning of a file, as bytes; empty for a folder."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.readline(1000)


def official_files(paths):
    """The files among the paths, and in the folders among them those named by a split and with
    labels."""
    files = []
    for path in paths:
        if not os.path.exists(path):
            sys.exit(f"{path}: no such file or folder (--annotations sets the folder or the files)")
        if not os.path.isdir(path):
            files.append(path)
            continue
        # "[!.]": not macOS's "._train.csv"
        inside = sorted(Path(path).glob("[!.]*.csv"))
        # Kinetics-600 as the CVD Foundation has it: train.txt and val.txt are csv files, too
        texts = sorted(Path(path).glob("[!.]*.txt"))
        inside += [file for file in texts if b"youtube_id" in first_line(file)]
        for file in inside:
            header = first_line(file)
            if b"youtube_id" in header and b"label" not in header:
                print(f"warning: {file}: has no labels and is left out")
            elif splits_in(file):
                files.append(file)
    if not files:
        sys.exit(
            f"{paths[0]}: expected train.csv, val.csv or validate.csv in it, found none "
            "(--annotations sets the folder or the files)"
        )
    return files


def read_names(path):
    """The lines of --classes; blank lines may stand at its end."""
    line_of = {}
    for number, line in enumerate(lists.read_text(path).rstrip().split("\n"), 1):
        where = f"--classes {path}:{number}"
        name = line.strip()
        lists.expect(name, where, "a class name", "")
        lists.expect(
            name not in line_of,
            where,
            "each name once",
            f"{name!r} again (line {line_of.get(name)})",
        )
        line_of[name] = number
    return list(line_of)


def read_official(paths, names, args):
    """{split: [Row]} and the classes' names, of the official csv files."""
    lines = []
    for path in paths:
        header = (lists.read_text(path).splitlines() or [""])[0].split(",")
        if "label" not in header and "youtube_id" in header:
            sys.exit(f"{path}:1: has no labels and cannot be used: leave it out of --annotations")
        found = lists.read_csv(path, "label", "youtube_id", "time_start", "time_end")
        lists.expect(found, path, "lines after the header", "")
        for where, fields in found:
            lists.expect(fields["label"], where, "a label", "")
            split = fields.get("split") or split_of(path)
            lists.expect(
                split in SPLITS, where, "the split train, val, validate or test", repr(split)
            )
            start, end = (
                lists.integer(fields[key], where, f"{key} in whole seconds")
                for key in ("time_start", "time_end")
            )
            lists.expect(end > start, where, "time_end after time_start", f"{start} to {end}")
            lines.append((where, SPLITS[split], fields["label"], fields["youtube_id"], start, end))
    names = names or sorted({label for _, _, label, *_ in lines})
    numbers = {name: i for i, name in enumerate(names)}
    videos = lists.Videos(args.videos, args.out, names)
    splits = {}
    clips_of = {}  # of each file called ID.mp4 that is a clip: {(label, start, end)}
    for where, split, label, key, start, end in lines:
        lists.expect(label in numbers, where, "a label that --classes names", repr(label))
        clip = f"{key}_{start:06d}_{end:06d}"
        path = videos.find(clip, label)
        wanted = f"{label}/{clip}.mp4"
        span = (None, None)
        if path is None:
            path = videos.find(key, label)
            if args.untrimmed:
                # a whole video serves several classes, in whatever folder it is
                path = path or videos.find(key)
                wanted = f"{key}.mp4"
                span = (start, end)
            else:
                clips_of.setdefault(path, set()).add((label, start, end))
        splits.setdefault(split, []).append(lists.Row(path, numbers[label], where, wanted, *span))
    return leave_out_ambiguous(splits, clips_of), names


def leave_out_ambiguous(splits, clips_of):
    """{split: [Row]}, where files that may be clips of different classes count as missing."""
    ambiguous = set()
    for path, clips in clips_of.items():
        labels = {label for label, *_ in clips}
        spans = {(start, end) for _, start, end in clips}
        if path is not None and len(labels) > 1 and len(spans) > 1:
            ambiguous.add(path)
    if not ambiguous:
        return splits
    print(
        f"warning: {len(ambiguous)} files, such as {min(ambiguous)}, are left out, because each is "
        "named like several clips of different classes (--untrimmed: they are whole videos)"
    )
    return {
        split: [row._replace(path=None) if row.path in ambiguous else row for row in rows]
        for split, rows in splits.items()
    }


def read_lists(paths, names, args):
    """{split: [Row]} and the classes' names, of lists "path label"."""
    lines = []
    what = "'PATH LABEL', separated by a space, the label an integer"
    for path in paths:
        found = lists.read_lines(path)
        lists.expect(found, path, f"lines {what}", "")
        for where, line in found:
            name, _, number = line.rpartition(" ")
            name = name.strip()
            lists.expect(name and number.isdecimal(), where, what, repr(line))
            label = int(number)
            folder, _, frames = name.rpartition(" ")
            lists.expect(
                not folder or not frames.isdigit(),
                where,
                what,
                f"{line!r}: a list of frames ('PATH FRAMES LABEL')",
            )
            lists.expect(
                names is None or label < len(names), where, "a label that --classes names", label
            )
            lines.append((where, split_of(path), name, label))
    names = names or [str(i) for i in range(1 + max(label for *_, label in lines))]
    folders = [os.path.basename(os.path.dirname(name)) or None for _, _, name, _ in lines]
    videos = lists.Videos(args.videos, args.out, set(folders) - {None})
    splits = {}
    for folder, (where, split, name, label) in zip(folders, lines, strict=True):
        stem, extension = os.path.splitext(os.path.basename(name))
        stem += "" if extension.lower() in lists.EXTENSIONS else extension
        splits.setdefault(split, []).append(
            lists.Row(videos.find(stem, folder), label, where, name)
        )
    return splits, names


def parse_args(argv=None):
    parser = lists.parser(__doc__, "kinetics")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--annotations",
        nargs="+",
        default=["data/kinetics/annotations"],
        metavar="PATH",
        help="folder of the official csv files, or the files (default: data/kinetics/annotations)",
    )
    source.add_argument(
        "--list",
        nargs="+",
        metavar="FILE",
        help="lists 'path label' instead; their names tell the split",
    )
    parser.add_argument(
        "--classes",
        help="text file: line i names class i (default: alphabetical; for --list, numbers)",
    )
    parser.add_argument(
        "--untrimmed", action="store_true", help="ID.mp4 is the whole video, not the clip"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.list and args.untrimmed:
        sys.exit("--untrimmed goes with --annotations: the lines of --list have no start and end")
    names = read_names(args.classes) if args.classes else None
    if args.list:
        splits, names = read_lists(args.list, names, args)
    else:
        splits, names = read_official(official_files(args.annotations), names, args)
    splits = {split: splits[split] for split in ("train", "val", "test") if split in splits}
    lists.write(args.out, splits, names, folder=args.videos)


if __name__ == "__main__":
    main()
