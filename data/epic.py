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
from typing import NamedTuple

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


class Segment(NamedTuple):
    where: str  # place in the annotations, "file:line"
    id: str
    participant: str
    video: str
    start: float  # seconds
    end: float
    narration: str
    verb: int
    noun: int

    def key(self, task):
        """What is numbered as the label: a verb, a noun, or a pair."""
        return {"verb": self.verb, "noun": self.noun, "action": (self.verb, self.noun)}[task]


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


def read_segments(lines, id_column, verbs, nouns):
    """The Segments of a csv's lines, and how many were left out because they end at or before
    their start."""
    segments = []
    for where, fields in lines:
        lists.expect(fields[id_column], where, f"a {id_column}", "")
        verb = lists.integer(fields["verb_class"], where, "a verb class")
        noun = lists.integer(fields["noun_class"], where, "a noun class")
        lists.expect(verb < len(verbs), where, f"a verb class below {len(verbs)}", verb)
        lists.expect(noun < len(nouns), where, f"a noun class below {len(nouns)}", noun)
        segment = Segment(
            where=where,
            id=fields[id_column],
            participant=fields["participant_id"],
            video=fields["video_id"],
            start=to_seconds(fields["start_timestamp"], where),
            end=to_seconds(fields["stop_timestamp"], where),
            narration=fields["narration"],
            verb=verb,
            noun=noun,
        )
        if segment.end > segment.start:
            segments.append(segment)
    return segments, len(lines) - len(segments)


def read_100(find):
    """{"train", "val": lines of the csv}, the names of the verbs and of the nouns, of EPIC-100.
    find(*names): the path of the first of these that is there."""
    lines = {}
    for split, name in (("train", "train"), ("val", "validation")):
        lines[split] = lists.read_csv(find(f"EPIC_100_{name}.csv"), "narration_id", *COLUMNS)
    verbs = read_classes(find("EPIC_100_verb_classes.csv"), "id", "key")
    nouns = read_classes(find("EPIC_100_noun_classes.csv"), "id", "key")
    return lines, verbs, nouns


def read_55(find, val_from):
    """The same of EPIC-55, whose training list is divided: kitchens from P{val_from} validate."""
    lines = {"train": [], "val": []}
    for where, fields in lists.read_csv(find("EPIC_train_action_labels.csv"), "uid", *COLUMNS):
        number = lists.integer(fields["participant_id"][1:], where, "a participant such as P01")
        lines["val" if number >= val_from else "train"].append((where, fields))
    verbs = read_classes(find("EPIC_verb_classes.csv"), "verb_id", "class_key")
    nouns = read_classes(find("EPIC_noun_classes.csv"), "noun_id", "class_key")
    return lines, verbs, nouns


def number_classes(task, segments, verbs, nouns):
    """{key: label}, and the classes' names in this order. segments: {split: [Segment]}."""
    if task != "action":
        names = verbs if task == "verb" else nouns
        return {number: number for number in range(len(names))}, names
    in_training = {segment.key(task) for segment in segments["train"]}
    in_val = {segment.key(task) for segment in segments["val"]}
    known = sorted(in_training)
    unknown = sorted(in_val - in_training)
    lost = sum(segment.key(task) not in in_training for segment in segments["val"])
    print(
        f"{len(known)} actions in training; {lost} validation rows have one of "
        f"{len(unknown)} others, numbered from {len(known)}, which count as wrong"
    )
    pairs = known + unknown
    numbers = {pair: number for number, pair in enumerate(pairs)}
    return numbers, [f"{verbs[verb]} {nouns[noun]}" for verb, noun in pairs]


def make_row(segment, label, videos):
    return lists.Row(
        path=videos.find(segment.video),
        label=label,
        where=segment.where,
        wanted=f"{segment.participant}/videos/{segment.video}.MP4",
        start=segment.start,
        end=segment.end,
        extra=(segment.participant, segment.narration),
        id=segment.id,
    )


def parse_args(argv=None):
    parser = lists.parser(__doc__, "epic")
    parser.add_argument(
        "--annotations",
        default="data/epic/annotations",
        help="folder of the csv files, of EPIC-100 or -55 (default: %(default)s)",
    )
    parser.add_argument(
        "--task",
        choices=("verb", "noun", "action"),
        default="verb",
        help="what the label is (default: %(default)s)",
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
        id_column = "narration_id"
        lines, verbs, nouns = read_100(find)
    else:
        if args.unseen:
            sys.exit(
                "--unseen is for EPIC-Kitchens-100: in EPIC-55 all kitchens of val.csv are unseen"
            )
        id_column = "uid"
        lines, verbs, nouns = read_55(find, 26 if args.val_from is None else args.val_from)

    segments = {}
    empty = 0
    for split in lines:
        segments[split], left_out = read_segments(lines[split], id_column, verbs, nouns)
        empty += left_out
    if empty:
        print(f"{empty} segments end at or before their start: left out")
    numbers, classes = number_classes(args.task, segments, verbs, nouns)

    videos = lists.Videos(args.videos, args.out)
    splits = {}
    for split in segments:
        splits[split] = [
            make_row(segment, numbers[segment.key(args.task)], videos)
            for segment in segments[split]
        ]
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
