"""UCF101: 13,320 short clips of 101 actions, cut from 2,500 YouTube videos. Writes the manifests of
one of its three splits.

Videos       UCF101.rar, from the Center for Research in Computer Vision, University of Central
             Florida ("UCF101").
Annotations  "The Train/Test Splits for Action Recognition on UCF101", the same page: classInd.txt,
             trainlist01.txt to 03, testlist01.txt to 03. Terms: as on that page; the paper
             (CRCV-TR-12-01) is to be cited.

    python data/ucf101.py --videos /disk/UCF-101 --annotations /disk/ucfTrainTestlist --split 1

writes data/ucf101/train.csv (9,537 rows for split 1), val.csv (the official test list, 3,783 rows:
there is no validation list) and classes.txt. Videos lie in class folders or side by side; files
re-encoded under the same names (.mp4, ...) serve too.

Confusing: class HandstandPushups holds files named v_HandStandPushups_*, so the class is taken from
the list's folder, never from the file's name. Numbers start at 1 in classInd.txt, at 0 here. The
test lists carry no number. Clips of one source video share a group (g08); the official splits keep
groups apart, a random split would not."""

import os

import lists


def read_list(path, classes, videos):
    """The rows of a trainlist ("Class/file.avi 1") or testlist ("Class/file.avi")."""
    numbers = {name.casefold(): number for number, name in enumerate(classes)}
    rows = []
    for where, line in lists.read_lines(path):
        name, _, number = line.partition(" ")
        folder, _, file = name.rpartition("/")
        lists.expect(file, where, "'CLASS/FILE.avi', in training lists with a number", repr(line))
        lists.expect(
            folder.casefold() in numbers, where, "a class of classInd.txt as the folder", repr(name)
        )
        label = numbers[folder.casefold()]
        if number:
            found = lists.integer(number, where, "'CLASS/FILE.avi NUMBER'")
            lists.expect(
                found == label + 1,
                where,
                f"number {label + 1}, that of {classes[label]} in classInd.txt",
                found,
            )
        rows.append(
            lists.Row(videos.find(os.path.splitext(file)[0], folder), label, where, wanted=name)
        )
    return rows


def read_classes(path):
    """The names in classInd.txt ("1 ApplyEyeMakeup"), in the order of their numbers, which count
    from 1.
    """
    names = []
    for where, line in lists.read_lines(path):
        number, _, name = line.partition(" ")
        lists.expect(number.isdecimal() and name.strip(), where, "'NUMBER NAME'", repr(line))
        lists.expect(int(number) == len(names) + 1, where, f"number {len(names) + 1}", number)
        names.append(name.strip())
    lists.expect(names, path, "lines 'NUMBER NAME'", "")
    return names


def parse_args(argv=None):
    parser = lists.parser(__doc__, "ucf101")
    parser.add_argument(
        "--annotations",
        default="data/ucf101/annotations",
        help="folder of classInd.txt and the lists (default: %(default)s)",
    )
    parser.add_argument(
        "--split", type=int, choices=(1, 2, 3), default=1, help="which official split (default: 1)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    classes = read_classes(lists.first_of(args.annotations, "classInd.txt"))
    videos = lists.Videos(args.videos, args.out, classes)
    splits = {
        split: read_list(
            lists.first_of(args.annotations, f"{name}0{args.split}.txt"), classes, videos
        )
        for split, name in (("train", "trainlist"), ("val", "testlist"))
    }
    lists.write(args.out, splits, classes, folder=args.videos)


if __name__ == "__main__":
    main()
