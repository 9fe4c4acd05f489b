"""HMDB51: 6,766 clips of 51 actions, from films and the web. Writes the manifests of one of its
three splits.

Videos       hmdb51_org.rar, from the Serre Lab, Brown University ("HMDB: a large human motion
             database"): one rar a class.
Annotations  test_train_splits.rar, the same page: testTrainMulti_7030_splits/CLASS_test_splitN.txt,
             a file a class and split. Licence: Creative Commons Attribution 4.0.

    python data/hmdb51.py --videos /disk/hmdb51 \\
        --annotations /disk/testTrainMulti_7030_splits --split 1

writes data/hmdb51/train.csv (3,570 rows), val.csv (the official test clips, 1,530 rows: there are
no validation clips) and classes.txt, in alphabetical order. Videos lie in class folders or side by
side; files re-encoded under the same names serve.

Confusing: a line is "FILE.avi 1 " with a space at its end; 1 is training, 2 test, 0 neither (each
split uses 5,100 of the 6,766 clips). File names hold #, &, ;, brackets, commas, two dots in a row;
shells and space-separated lists trip over them."""

import os
import sys
from pathlib import Path

import lists

SPLITS = {"1": "train", "2": "val"}


def parse_args(argv=None):
    parser = lists.parser(__doc__, "hmdb51")
    parser.add_argument(
        "--annotations",
        default="data/hmdb51/annotations",
        help="folder of the CLASS_test_splitN.txt (default: %(default)s)",
    )
    parser.add_argument(
        "--split", type=int, choices=(1, 2, 3), default=1, help="which official split (default: 1)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    ending = f"_test_split{args.split}.txt"
    # "[!.]": not macOS's "._CLASS_test_split1.txt"
    paths = sorted(
        Path(args.annotations).glob(f"[!.]*{ending}"), key=lambda path: path.name[: -len(ending)]
    )
    if not paths:
        sys.exit(
            f"{args.annotations}: expected CLASS{ending} in it, found none "
            "(--annotations sets the folder)"
        )
    classes = [path.name[: -len(ending)] for path in paths]
    videos = lists.Videos(args.videos, args.out, classes)
    splits = {"train": [], "val": []}
    odd = []
    for label, (path, name) in enumerate(zip(paths, classes, strict=True)):
        count = {"train": 0, "val": 0}
        for where, line in lists.read_lines(path):
            file, number = (line.rsplit(None, 1) + [""])[:2]  # file names may hold spaces
            lists.expect(number in ("0", "1", "2"), where, "'FILE.avi 0', '1' or '2'", repr(line))
            if split := SPLITS.get(number):
                row = lists.Row(
                    videos.find(os.path.splitext(file)[0], name),
                    label,
                    where,
                    wanted=f"{name}/{file}",
                )
                splits[split].append(row)
                count[split] += 1
        if count != {"train": 70, "val": 30}:
            odd.append(f"{name} {count['train']} + {count['val']}")
    if odd:
        print(
            f"warning: {len(odd)} classes do not list 70 training and 30 test clips: "
            f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}"
        )
    lists.write(args.out, splits, classes, folder=args.videos)


if __name__ == "__main__":
    main()
