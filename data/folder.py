r"""Any videos of your own, in one folder a class: ROOT/CLASS/*.mp4 (or mkv, webm, avi, mov),
nested deeper if you like.

    python data/folder.py --videos ROOT --out data/mine
    python data/folder.py --videos ROOT --out data/mine --val 0.2 --seed 0 --group '(.*?)(_c\d+)?$'

writes train.csv, val.csv and classes.txt (alphabetical) into data/mine. Within each class, `--val`
of its groups go to val.csv, drawn by the seed, at least one and never all, where it has two. A
group is what must not be torn apart, such as the clips cut from one recording: clips of one scene
on both sides make accuracies meaningless. `--group` is a regular expression, searched in the file's
name without extension; its first parentheses are the group. The one above leaves a number of the
clip at the name's end out: UCF's v_Archery_g01_c02 and v_Archery_g01_c03 are one group, and a name
without such a number, holiday, is a group of its own. A name in which it finds nothing is refused.
Without --group every file is a group of its own.

If ROOT holds nothing but train/ and val/ (or validation/, or test/), these are the split, with the
classes inside. A test/ beside a val/ becomes test.csv.
"""

import os
import random
import re
import sys

import lists

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def draw(groups, share, seed):
    """The groups that go to validation. groups: {class: {group}}, a group may be in several
    classes. share: of each class.
    """
    held, kept = set(), set()
    for name in sorted(groups):
        free = sorted(groups[name] - held - kept)
        random.Random(f"{seed} {name}").shuffle(free)
        wanted = min(max(round(share * len(groups[name])), 1), len(groups[name]) - 1) - len(
            groups[name] & held
        )
        held |= set(free[: max(wanted, 0)])
        kept |= set(free[max(wanted, 0) :])
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
        help="its first parentheses are the group (default: each file its own)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if not 0 < args.val < 1:
        sys.exit(f"--val {args.val:g}: expected a share between 0 and 1")
    try:
        pattern = re.compile(args.group or "")
    except re.error as error:
        sys.exit(f"--group {args.group!r}: is no regular expression ({error})")
    if args.group and not pattern.groups:
        sys.exit(f"--group {args.group!r}: expected parentheses around what names the group")
    videos = lists.Videos(args.videos, args.out)
    tops = {name.split(os.sep)[0] for name in videos.names if os.sep in name}
    given = "train" in tops and len(tops) > 1 and tops <= set(SPLITS)
    files = []  # (path, split or None, class, group)
    loose = 0
    for name in videos.names:
        split, *rest = name.split(os.sep) if given else [None, *name.split(os.sep)]
        if len(rest) < 2:
            loose += 1
            continue
        match = pattern.search(os.path.splitext(rest[-1])[0])
        if args.group and (match is None or match[1] is None):
            sys.exit(
                f"{os.path.join(args.videos, name)}: --group {args.group!r} finds no group in its "
                r"name: make optional what some names lack, as in '(.*?)(_c\d+)?$'"
            )
        files.append((name, SPLITS.get(split), rest[0], match[1] if args.group else name))
    if loose:
        print(f"{loose} videos are in no class folder: left out")
    if not files:
        sys.exit(
            f"{args.videos}: expected videos in class folders ({', '.join(lists.EXTENSIONS)}), "
            "found none (--videos)"
        )
    groups = {}
    for _, _, name, group in files:
        groups.setdefault(name, set()).add(group)
    if given:
        only_test = not any(split == "val" for _, split, _, _ in files)
        files = [
            (name, "val" if only_test and split == "test" else split, *rest)
            for name, split, *rest in files
        ]
        homes = {}
        for name, split, _, group in files:
            other, home = homes.setdefault(group, (name, split))
            if home != split:
                sys.exit(
                    f"{os.path.join(args.videos, name)}: group {group!r} is in {split}, but also "
                    f"in {home} ({other})"
                )
    else:
        held = draw(groups, args.val, args.seed)
        files = [
            (name, "val" if group in held else "train", *rest, group)
            for name, _, *rest, group in files
        ]
    classes = sorted(groups)
    sides = {}
    for _, split, name, _ in files:
        sides.setdefault(name, set()).add(split)
    if lone := [name for name in classes if not {"train", "val"} <= sides[name]]:
        more = ", ..." if len(lone) > 10 else ""
        print(f"{len(lone)} classes are not in both train and val: {', '.join(lone[:10])}{more}")
    splits = {}
    numbers = {name: i for i, name in enumerate(classes)}
    for name, split, kind, _ in files:
        splits.setdefault(split, []).append(lists.Row(videos.path(name), numbers[kind], name, name))
    if "val" not in splits:
        sys.exit(
            f"{args.videos}: expected a class of two groups or more to draw val.csv from, found "
            "none (--group)"
        )
    splits = {split: splits[split] for split in ("train", "val", "test") if split in splits}
    lists.write(args.out, splits, classes, folder=args.videos)


if __name__ == "__main__":
    main()
