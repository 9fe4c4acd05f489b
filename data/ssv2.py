"""Something-Something v2: 220,847 clips of people doing basic things with objects, in 174 classes
such as "Pushing something from left to right". Objects vary freely within a class, so motion
decides.

Videos       20bn-something-something-v2-00, -01, ..., from Qualcomm ("Something-Something v2
             Dataset", registration), joined and unpacked: ID.webm. Licence: that of the download
             form, for research.
Annotations  the label archive, the same page: labels.json, train.json, validation.json, test.json,
             test-answers.csv; older copies call them something-something-v2-labels.json,
             -train.json, -validation.json, -test.json.

    python data/ssv2.py --videos /disk/20bn-something-something-v2 --annotations /disk/labels

writes data/ssv2/train.csv (168,913 rows), val.csv (24,777), test.csv (27,157, where test.json and
its answers are there), and classes.txt. What the person wrote goes to the column caption, which
stage 1 can use instead of BLIP's:

    python caption.py --data data/ssv2/train.csv --labels --label-column caption

Confusing: "label" in train.json is that text ("holding potato next to vicks vaporub bottle"); the
class is "template" without its brackets ("Holding something next to something"), which labels.json
numbers, as strings. test.json has ids alone; its answers, "ID;TEMPLATE" without a header, hold no
text, so there the caption is the class."""

import os

import lists

PREFIX = "something-something-v2-"


def plain(template):
    """A template as labels.json has it: something, not [something]."""
    return template.replace("[", "").replace("]", "")


def read_split(path, numbers, videos):
    rows = []
    for where, entry in lists.read_entries(path, "id", "label", "template"):
        name = plain(str(entry["template"]))
        lists.expect(name in numbers, where, "a template that labels.json numbers", repr(name))
        caption = entry["label"]
        lists.expect(
            isinstance(caption, str) and caption.strip(),
            where,
            "a text as the label",
            repr(caption),
        )
        stem = str(entry["id"])
        rows.append(
            lists.Row(videos.find(stem), numbers[name], where, f"{stem}.webm", extra=(caption,))
        )
    return rows


def read_test(path, answers, numbers, videos):
    names = {}
    for where, line in lists.read_lines(answers):
        stem, _, name = plain(line).partition(";")
        lists.expect(stem.isdigit() and name, where, "'ID;TEMPLATE'", repr(line))
        lists.expect(name in numbers, where, "a template that labels.json numbers", repr(name))
        names[stem] = name
    rows = []
    for where, entry in lists.read_entries(path, "id"):
        stem = str(entry["id"])
        lists.expect(
            stem in names, where, f"an id that {os.path.basename(answers)} has", repr(stem)
        )
        rows.append(
            lists.Row(
                videos.find(stem), numbers[names[stem]], where, f"{stem}.webm", extra=(names[stem],)
            )
        )
    return rows


def parse_args(argv=None):
    parser = lists.parser(__doc__, "ssv2")
    parser.add_argument(
        "--annotations",
        default="data/ssv2/annotations",
        help="folder of labels.json and the rest (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    def find(name):
        return lists.first_of(args.annotations, name, PREFIX + name)

    path = find("labels.json")
    numbers = {
        name: lists.integer(number, f"{path}: {name!r}", "a class number")
        for name, number in lists.read_json(path, dict).items()
    }
    lists.expect(
        sorted(numbers.values()) == list(range(len(numbers))),
        path,
        f"the numbers 0 to {len(numbers) - 1}, once each",
        "others",
    )
    videos = lists.Videos(args.videos, args.out)
    splits = {
        split: read_split(find(f"{name}.json"), numbers, videos)
        for split, name in (("train", "train"), ("val", "validation"))
    }
    answers = os.path.join(args.annotations, "test-answers.csv")
    tests = [os.path.join(args.annotations, name) for name in ("test.json", PREFIX + "test.json")]
    has_list = any(map(os.path.exists, tests))
    if os.path.exists(answers) and has_list:
        splits["test"] = read_test(find("test.json"), answers, numbers, videos)
    elif os.path.exists(answers):
        print(f"note: {answers} has no test.json beside it: no test split is written")
    lists.write(
        args.out, splits, sorted(numbers, key=numbers.get), ("caption",), folder=args.videos
    )


if __name__ == "__main__":
    main()
