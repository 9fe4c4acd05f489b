r"""Any videos of your own, in one folder per class: ROOT/CLASS/*.mp4 (or mkv, webm, avi, mov),
nested deeper if you like.

    python data/folder.py --videos ROOT --out data/mine
    python data/folder.py --videos ROOT --out data/mine --val 0.2 --seed 0 --group '(.*?)(_c\d+)?$'

writes train.csv, val.csv and classes.txt (alphabetical) into data/mine. The script draws which
videos go to val.csv: in each class the share `--val` of its groups, by the seed, at least one group
and never all. The group of a class that has only one goes to train.csv. (But a group that is in
several classes goes where the first of them puts it, which may be val.csv.)

A group is what must stay on one side, such as the clips cut from one recording: with clips of one
scene in both train.csv and val.csv, accuracies mean nothing. Without `--group` every video is a
group of its own. `--group` is a regular expression that is searched in the file's name without
extension; what its first parentheses match is the group. The one above leaves out a clip's number
at the end of the name:

    v_Archery_g01_c02, v_Archery_g01_c03    both in the group v_Archery_g01
    holiday                                 has no such number: in the group holiday

If there is a name in which the expression finds nothing, the script ends and writes nothing.

If ROOT holds train/ and val/ (or validation/, or test/) alone, these are the split, with the class
folders inside: nothing is drawn, and `--val` and `--seed` do nothing. A test/ beside a val/ becomes
test.csv.
"""

import os
import random
import re
import sys
from typing import NamedTuple

import lists

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
# Folders of these names, in capitals or not, are hardly classes if there are class folders in them.
NAMES_OF_SPLITS = {*SPLITS, "training", "valid", "validate", "testing"}


class File(NamedTuple):
    name: str  # path in the folder of videos
    kind: str  # the class
    group: str
    split: str | None  # train, val or test; None: to be drawn


def compile_group(text):
    """The regular expression of --group, or None."""
    if not text:
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        sys.exit(f"--group {text!r}: is no regular expression ({error})")
    if not pattern.groups:
        sys.exit(f"--group {text!r}: expected parentheses around what names the group")
    return pattern


def find_splits(folder, names):
    """{"train": "train", "validation": "val"}, and so on, if the folder of videos is divided in
    this way, and {} if it holds class folders alone. Ends with one line if it is neither."""
    tops = sorted({name.split(os.sep)[0] for name in names if os.sep in name})
    if "train" in tops and len(tops) > 1 and SPLITS.keys() >= set(tops):
        splits = {top: SPLITS[top] for top in tops}
        if "val" not in splits.values():
            splits["test"] = "val"
        return splits
    suspects = [top for top in tops if top.casefold() in NAMES_OF_SPLITS]
    hold_folders = any(
        name.split(os.sep)[0] in suspects and name.count(os.sep) > 1 for name in names
    )
    # a single folder "train" with videos directly in it may well be a class
    if hold_folders or len(suspects) > 1:
        found = suspects + [top for top in tops if top not in suspects]
        more = ", ..." if len(found) > 5 else ""
        sys.exit(
            f"{folder}: found {', '.join(f'{top}/' for top in found[:5])}{more}: expected class "
            "folders alone, or train/ with val/ (or validation/, test/) alone and the class "
            "folders in these (rename a class that is called like a split)"
        )
    return {}


def each_once(names):
    """The names without those of the same video, which differ in the extension alone."""
    chosen = {}
    for name in sorted(names, key=lists.preference):
        chosen.setdefault(os.path.splitext(name)[0], name)
    if len(chosen) < len(names):
        print(
            f"{len(names) - len(chosen)} files are left out: the same video is there with another "
            f"extension (of {', '.join(lists.EXTENSIONS)} the first is taken)"
        )
    return sorted(chosen.values())


def read_names(folder, names, splits, pattern):
    """The [File] of the videos that are in class folders. splits: from `find_splits`."""
    files = []
    loose = 0
    for name in names:
        parts = name.split(os.sep)
        split = None
        if splits:
            split = splits.get(parts.pop(0))
        if len(parts) < 2:
            loose += 1
            continue
        lists.to_utf8(name)  # ends here if it is not: a csv cannot hold it
        group = name
        if pattern:
            match = pattern.search(os.path.splitext(parts[-1])[0])
            if match is None or not match[1]:
                sys.exit(
                    f"{os.path.join(folder, name)}: --group {pattern.pattern!r} finds no group in "
                    "its name, or an empty one: make optional what some names lack, as in "
                    r"'(.*?)(_c\d+)?$'"
                )
            group = match[1]
        files.append(File(name, parts[0], group, split))
    if loose:
        print(f"{loose} videos are in no class folder: left out")
    if not files:
        sys.exit(
            f"{folder}: expected videos in class folders ({', '.join(lists.EXTENSIONS)}), found "
            "none (--videos sets the folder)"
        )
    return files


def empty_classes(folder, splits, classes):
    """The names of the class folders in which no video was found."""
    names = set()
    for top in splits or [""]:
        with os.scandir(os.path.join(folder, top)) as entries:
            names |= {entry.name for entry in entries if entry.is_dir()}
    return sorted(name for name in names - set(classes) if not name.startswith("."))


def name_some(names):
    """The first ten of them, as text; a ? for what is not UTF-8, which print may refuse."""
    more = ", ..." if len(names) > 10 else ""
    return (", ".join(names[:10]) + more).encode("utf-8", "replace").decode()


def check_given(folder, files, splits):
    """Ends with one line where train or val has no videos, or a group is in two splits."""
    for split in ("train", "val"):
        if not any(file.split == split for file in files):
            tops = " and ".join(f"{top}/" for top in splits if splits[top] == split)
            sys.exit(
                f"{folder}: found no videos in class folders in {tops}: expected CLASS/*.mp4 in "
                "train/ and in val/ (or validation/, test/)"
            )
    first_of = {}
    for file in files:
        first = first_of.setdefault(file.group, file)
        if first.split != file.split:
            sys.exit(
                f"{os.path.join(folder, file.name)}: group {file.group!r} is in {file.split}, but "
                f"also in {first.split} ({first.name})"
            )


def draw(groups, share, seed):
    """The groups that go to validation.

    groups: {class: its set of groups}; a group may be in several classes. share: how large a part
    of each class's groups."""
    held = set()
    kept = set()
    for name in sorted(groups):
        n = len(groups[name])
        goal = min(max(round(share * n), 1), n - 1)
        missing = max(goal - len(groups[name] & held), 0)
        free = sorted(groups[name] - held - kept)
        random.Random(f"{seed} {name}").shuffle(free)
        held |= set(free[:missing])
        kept |= set(free[missing:])
    return held


def parse_args(argv=None):
    parser = lists.parser(__doc__, "folder")
    parser.add_argument(
        "--val",
        type=float,
        default=0.2,
        help="share of each class's groups for val.csv, between 0 and 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the groups (default: %(default)s)"
    )
    parser.add_argument(
        "--group",
        metavar="REGEX",
        help="its first parentheses are the group (default: each video its own)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if not 0 < args.val < 1:
        sys.exit(f"--val {args.val:g}: expected a share between 0 and 1")
    pattern = compile_group(args.group)
    videos = lists.Videos(args.videos, args.out)
    given = find_splits(args.videos, videos.names)
    files = read_names(args.videos, each_once(videos.names), given, pattern)
    groups = {}
    for file in files:
        groups.setdefault(file.kind, set()).add(file.group)
    if given:
        check_given(args.videos, files, given)
    else:
        held = draw(groups, args.val, args.seed)
        files = [file._replace(split="val" if file.group in held else "train") for file in files]
        if not held:
            sys.exit(
                f"{args.videos}: expected a class of two groups or more to draw val.csv from, "
                "found none (--group)"
            )

    classes = sorted(groups)
    sides = {name: set() for name in classes}
    for file in files:
        sides[file.kind].add(file.split)
    if lone := [name for name in classes if not {"train", "val"} <= sides[name]]:
        print(f"{len(lone)} classes are not in both train and val: {name_some(lone)}")
    if empty := empty_classes(args.videos, given, classes):
        print(f"no classes, as no {', '.join(lists.EXTENSIONS)} was found in: {name_some(empty)}")

    numbers = {name: i for i, name in enumerate(classes)}
    rows = {"train": [], "val": [], "test": []}
    for file in files:
        path = videos.path(file.name)
        rows[file.split].append(lists.Row(path, numbers[file.kind], file.name, file.name))
    if not rows["test"]:
        del rows["test"]
    lists.write(args.out, rows, classes, folder=args.videos)


if __name__ == "__main__":
    main()
