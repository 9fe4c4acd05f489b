"""EPIC-Kitchens-100 and -55: long egocentric videos of kitchens, cut into narrated actions, each a
verb and a noun.

Videos       P01_01.MP4, ...: "EPIC-KITCHENS-55" and "EPIC-KITCHENS-100 extension" at
             data.bris.ac.uk (University of Bristol), fetched by the download script at
             epic-kitchens.github.io. Licence: CC BY-NC 4.0, non-commercial.
Annotations  the GitHub repositories epic-kitchens/epic-kitchens-100-annotations
             (EPIC_100_train.csv, EPIC_100_validation.csv, EPIC_100_verb_classes.csv,
             EPIC_100_noun_classes.csv, EPIC_100_unseen_participant_ids_validation.csv) and
             epic-kitchens/epic-kitchens-55-annotations (EPIC_train_action_labels.csv,
             EPIC_verb_classes.csv, EPIC_noun_classes.csv). Which of the two is read depends on what
             the folder holds.

    python data/epic.py --videos /disk/EPIC-KITCHENS \\
        --annotations /disk/epic-kitchens-100-annotations --task verb

writes train.csv, val.csv with start and end in seconds, the label (97 verbs or 300 nouns in
EPIC-100; --task action: pairs), the columns participant and narration, and classes.txt; with
--unseen also val_unseen.csv, the part of val.csv from kitchens without training videos. The
narration can serve as caption (caption.py --labels --label-column narration).

--task action numbers the pairs (verb, noun) of the training annotations in order; pairs that occur
in validation alone follow after them: no classifier knows these, so they count as wrong, and the
script says how many there are.

Confusing: the labels of the test sets are secret. EPIC-55 has no validation list: its usual
hold-out is the kitchens P26 and up (--val-from). Verbs and nouns are numbered differently in the
two. Frame numbers are those of the extracted frames, 60 a second in EPIC-55 whatever the video's
rate, so the time stamps are read instead. Segments overlap, and one stretch of video may be
narrated more than once: rows are duplicates only if their narration_id (uid) is the same."""

import os
import re
import sys

import lists

STAMP = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
COLUMNS = (
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "narration",
    "verb_class",
    "noun_class",
)


def to_seconds(stamp, where):
    match = STAMP.fullmatch(stamp.strip())
    lists.expect(match, where, "a time HH:MM:SS.ss", repr(stamp))
    hours, minutes, seconds = match.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def read_classes(path, number, name):
    """The names of a file of verb or noun classes, in the order of their numbers."""
    lines = lists.read_csv(path, number, name)
    for i, (where, fields) in enumerate(lines):
        lists.expect(
            lists.integer(fields[number], where, "a class number") == i,
            where,
            f"class {i}",
            fields[number],
        )
    return [fields[name] for _, fields in lines]


def parse_args(argv=None):
    parser = lists.parser(__doc__, "epic")
    parser.add_argument(
        "--annotations",
        default="data/epic/annotations",
        help="folder of the csv files, of EPIC-100 or -55",
    )
    parser.add_argument(
        "--task", choices=("verb", "noun", "action"), default="verb", help="what the label is"
    )
    parser.add_argument(
        "--val-from",
        type=int,
        metavar="N",
        help="EPIC-55: validate on the kitchens PN and up (default: 26)",
    )
    parser.add_argument("--unseen", action="store_true", help="EPIC-100: also write val_unseen.csv")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    def find(*names):
        return lists.first_of(args.annotations, *names)

    first = find("EPIC_100_train.csv", "EPIC_train_action_labels.csv")
    if os.path.basename(first) == "EPIC_100_train.csv":
        if args.val_from is not None:
            sys.exit("--val-from is for EPIC-Kitchens-55: EPIC-100 has a validation list")
        read = {
            split: lists.read_csv(path, "narration_id", *COLUMNS)
            for split, path in (("train", first), ("val", find("EPIC_100_validation.csv")))
        }
        verbs, nouns = (
            read_classes(find(f"EPIC_100_{kind}_classes.csv"), "id", "key")
            for kind in ("verb", "noun")
        )
    else:
        if args.unseen:
            sys.exit(
                "--unseen is for EPIC-Kitchens-100: in EPIC-55 all kitchens of val.csv are unseen"
            )
        border, read = 26 if args.val_from is None else args.val_from, {"train": [], "val": []}
        for where, fields in lists.read_csv(first, "uid", *COLUMNS):
            number = lists.integer(fields["participant_id"][1:], where, "a participant such as P01")
            read["val" if number >= border else "train"].append((where, fields))
        verbs, nouns = (
            read_classes(find(f"EPIC_{kind}_classes.csv"), f"{kind}_id", "class_key")
            for kind in ("verb", "noun")
        )

    keys = {}  # the labels of every row: a verb, a noun, or a pair
    for split, lines in read.items():
        keys[split] = []
        for where, fields in lines:
            verb, noun = (
                lists.integer(fields[f"{kind}_class"], where, f"a {kind} class")
                for kind in ("verb", "noun")
            )
            lists.expect(verb < len(verbs), where, f"a verb class below {len(verbs)}", verb)
            lists.expect(noun < len(nouns), where, f"a noun class below {len(nouns)}", noun)
            keys[split].append({"verb": verb, "noun": noun, "action": (verb, noun)}[args.task])
    if args.task == "action":
        known, unknown = sorted(set(keys["train"])), sorted(set(keys["val"]) - set(keys["train"]))
        numbers = {pair: i for i, pair in enumerate(known + unknown)}
        classes = [f"{verbs[verb]} {nouns[noun]}" for verb, noun in numbers]
        lost = sum(numbers[key] >= len(known) for key in keys["val"])
        print(
            f"{len(known)} actions in training; {lost} validation rows have one of "
            f"{len(unknown)} others, numbered from {len(known)}, which count as wrong"
        )
    else:
        classes = verbs if args.task == "verb" else nouns
        numbers = {i: i for i in range(len(classes))}

    videos, splits, empty = lists.Videos(args.videos, args.out), {}, 0
    for split, lines in read.items():
        splits[split] = []
        for (where, fields), key in zip(lines, keys[split], strict=True):
            start, end = (
                to_seconds(fields[f"{name}_timestamp"], where) for name in ("start", "stop")
            )
            if end <= start:
                empty += 1
                continue
            person, video = fields["participant_id"], fields["video_id"]
            splits[split].append(
                lists.Row(
                    videos.find(video),
                    numbers[key],
                    where,
                    f"{person}/videos/{video}.MP4",
                    start,
                    end,
                    (person, fields["narration"]),
                    fields.get("narration_id") or fields["uid"],
                )
            )
    print(f"{empty} segments end at or before their start: left out")
    if args.unseen:
        path = find("EPIC_100_unseen_participant_ids_validation.csv")
        people = {fields["participant_id"] for _, fields in lists.read_csv(path, "participant_id")}
        splits["val_unseen"] = [row for row in splits["val"] if row.extra[0] in people]
    lists.write(
        args.out,
        splits,
        classes,
        ("participant", "narration"),
        folder=args.videos,
        within=("val_unseen",),
    )


if __name__ == "__main__":
    main()
