"""Diving48: 17,000 clips of competitive dives in 48 classes, which differ in take-off, turns,
twists and position alone.

Videos       Diving48_rgb.tar.gz, from the Statistical Visual Computing Laboratory, UC San Diego
             (project RESOUND), unpacked: rgb/NAME.mp4. Terms: as on that page; the paper (RESOUND,
             ECCV 2018) is to be cited.
Annotations  Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json, the same page.

    python data/diving48.py --videos /disk/diving48/rgb --annotations /disk/diving48

writes data/diving48/train.csv, val.csv (the official test list: there is no validation list) and
classes.txt, where a class is its four attributes, such as "Back 15som 05Twis FREE". Each file is
one dive, so its frame numbers are not needed.

Confusing: version 1 (Diving48_train.json, Diving48_test.json) names mostly the same videos, with
labels that are known to be noisy, and results on the two cannot be compared. It is read with --v1
alone.
"""

import os
import sys

import lists


def parse_args(argv=None):
    parser = lists.parser(__doc__, "diving48")
    parser.add_argument(
        "--annotations",
        default="data/diving48/annotations",
        help="folder of the json files (default: %(default)s)",
    )
    parser.add_argument("--v1", action="store_true", help="read the noisy labels of version 1")
    return parser.parse_args(argv)


def read_list(path, classes, videos):
    rows = []
    for where, entry in lists.read_entries(path, "vid_name", "label"):
        label = lists.integer(entry["label"], where, "a label from 0")
        lists.expect(
            label < len(classes),
            where,
            f"a label below {len(classes)}, the classes of the vocabulary",
            label,
        )
        name = str(entry["vid_name"])
        rows.append(lists.Row(videos.find(name), label, where, wanted=f"{name}.mp4"))
    return rows


def main(argv=None):
    args = parse_args(argv)
    version = "Diving48_" if args.v1 else "Diving48_V2_"
    if (
        not args.v1
        and not os.path.exists(os.path.join(args.annotations, f"{version}train.json"))
        and os.path.exists(os.path.join(args.annotations, "Diving48_train.json"))
    ):
        sys.exit(
            f"{args.annotations}: has version 1 alone, whose labels are noisy: expected "
            f"Diving48_V2_train.json (--v1 reads version 1 all the same)"
        )
    path = lists.first_of(args.annotations, "Diving48_vocab.json")
    classes = []
    for i, words in enumerate(lists.read_json(path, list), 1):
        lists.expect(
            isinstance(words, list) and words and all(isinstance(word, str) for word in words),
            f"{path}: entry {i}",
            "a list of attributes",
            repr(words),
        )
        classes.append(" ".join(words))
    videos = lists.Videos(args.videos, args.out)
    splits = {
        split: read_list(lists.first_of(args.annotations, f"{version}{name}.json"), classes, videos)
        for split, name in (("train", "train"), ("val", "test"))
    }
    lists.write(args.out, splits, classes, folder=args.videos)


if __name__ == "__main__":
    main()
