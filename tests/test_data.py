"""The data set scripts: small files in the official formats, empty videos, and the manifests
that come out, read back.
"""

import csv
import json
import os
import re
import time

import kinetics
import lists
import pytest
from conftest import ROOT, run

from tgm.manifest import read_manifest

FOREIGN = "is there, and is none of the files that this command writes: not overwritten (--out writes elsewhere)"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def put(path, *lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


def rows(path, root=None):
    """[(path relative to root, label, start, end)] of a manifest; each path must lead to a file."""
    videos = read_manifest(path)
    assert all(os.path.isfile(video.path) for video in videos)
    root = os.path.realpath(root or path.parent.parent / "videos")
    return [
        (os.path.relpath(os.path.realpath(v.path), root), v.label, v.start, v.end) for v in videos
    ]


def column(path, name):
    with open(path, newline="", encoding="utf-8") as file:
        return [row[name] for row in csv.DictReader(file)]


@pytest.fixture
def script(tmp_path):
    """Runs a script with --videos videos --annotations lists --out out in a folder of the test's
    own.
    """

    def call(name, *args, fails=False, annotations=True):
        official = ("--annotations", "lists") if annotations else ()
        return run(
            f"data/{name}.py",
            "--videos",
            "videos",
            *official,
            "--out",
            "out",
            *args,
            cwd=tmp_path,
            fails=fails,
        )

    return call


# ---- Kinetics ------------------------------------------------------------------------------------

HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


def kinetics_lists(folder):
    put(
        folder / "lists/train.csv",
        HEADER,
        "abseiling,-3B32lodo2M,59,69,train,0",
        '"air drumming",_d_bcJuKJQNs,40,50,train,0',
        "abseiling,0_-x,5,15,train,0",
        "abseiling,-3B32lodo2M,59,69,train,0",
        "abseiling,gone,1,11,train,0",
        '"massaging person\'s head",flat,0,10,train,0',
    )
    put(
        folder / "lists/validate.csv",
        HEADER.replace(",is_cc", ""),
        '"air drumming",vvv,100,110,validate',
    )
    put(folder / "lists/test.csv", HEADER, "abseiling,ttt,100,110,test,0")


def test_kinetics_official(script, tmp_path):
    kinetics_lists(tmp_path)
    touch(
        tmp_path / "videos",
        "train/abseiling/-3B32lodo2M_000059_000069.mp4",
        "train/air_drumming/_d_bcJuKJQNs_000040_000050.mkv",
        "train/abseiling/0_-x.webm",
        "flat_000000_000010.mp4",
        "val/air drumming/vvv_000100_000110.mp4",
        "val/air drumming/vvv_000100_000110.webm",
        "test/ttt_000100_000110.mp4",
        "train/abseiling/gone.mp4.part",
    )
    printed = script("kinetics")
    assert rows(tmp_path / "out/train.csv") == [
        ("train/abseiling/-3B32lodo2M_000059_000069.mp4", "0", None, None),
        ("train/air_drumming/_d_bcJuKJQNs_000040_000050.mkv", "1", None, None),
        ("train/abseiling/0_-x.webm", "0", None, None),
        ("flat_000000_000010.mp4", "2", None, None),
    ]
    assert rows(tmp_path / "out/val.csv") == [
        ("val/air drumming/vvv_000100_000110.mp4", "1", None, None)
    ]
    assert rows(tmp_path / "out/test.csv") == [("test/ttt_000100_000110.mp4", "0", None, None)]
    assert column(tmp_path / "out/train.csv", "class") == [
        "abseiling",
        "air drumming",
        "abseiling",
        "massaging person's head",
    ]
    assert (
        column(tmp_path / "out/train.csv", "path")[0]
        == "../videos/train/abseiling/-3B32lodo2M_000059_000069.mp4"
    )
    assert (
        tmp_path / "out/classes.txt"
    ).read_text() == "abseiling\nair drumming\nmassaging person's head\n"
    assert (tmp_path / "out/missing-train.txt").read_text() == "abseiling/gone_000001_000011.mp4\n"
    assert not (tmp_path / "out/missing-val.txt").exists()
    assert (
        "out/train.csv: 4 rows, 3 classes, 1 videos missing (missing-train.txt), 1 duplicates"
        in printed
    )
    assert "out/val.csv: 1 rows, 1 classes, 0 videos missing, 0 duplicates" in printed
    assert printed.endswith(
        "next, to check the files, in the repository's folder: "
        f"python -m tgm.prepare {tmp_path}/out/train.csv, and so on\n"
    )
    assert not list((tmp_path / "out").glob("*.new"))


def test_kinetics_600_has_csv_files_with_another_ending(script, tmp_path):
    """The CVD Foundation's train.txt and val.txt; another list in the folder is left alone."""
    kinetics_lists(tmp_path)
    (tmp_path / "lists/train.csv").rename(tmp_path / "lists/train.txt")
    (tmp_path / "lists/validate.csv").rename(tmp_path / "lists/val.txt")
    put(tmp_path / "lists/train_list.txt", "a.mp4 0")
    (tmp_path / "lists/val_notes.txt").mkdir()
    touch(
        tmp_path / "videos",
        "flat_000000_000010.mp4",
        "vvv_000100_000110.mp4",
        "ttt_000100_000110.mp4",
    )
    script("kinetics")
    for split in ("train", "val", "test"):
        assert len(rows(tmp_path / f"out/{split}.csv")) == 1


def test_nothing_is_written_beside_a_file_that_is_none_of_ours(script, tmp_path):
    kinetics_lists(tmp_path)
    touch(
        tmp_path / "videos",
        "flat_000000_000010.mp4",
        "vvv_000100_000110.mp4",
        "ttt_000100_000110.mp4",
    )
    toy = "path,label,object,scene,caption,bystander"
    names = "abseiling\nair drumming\nmassaging person's head"
    for name, line in (
        ("val.csv", "mine"),
        ("train.csv", toy),
        ("classes.txt", "mine"),
        ("missing-train.txt", "mine"),
    ):
        path = tmp_path / "out" / name
        put(path, line)
        assert script("kinetics", fails=True) == f"out/{name}: {FOREIGN}"
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
        assert path.read_text() == f"{line}\n"
        path.unlink()
    put(tmp_path / "out/classes.txt", names)  # what would be written
    put(tmp_path / "out/val.csv", end="")
    script("kinetics")
    # beside a csv of ours the text files are ours
    put(tmp_path / "out/classes.txt", "old")
    script("kinetics")
    assert (tmp_path / "out/classes.txt").read_text() == f"{names}\n"
    assert column(tmp_path / "out/val.csv", "class") == ["air drumming"]


def test_kinetics_untrimmed(script, tmp_path):
    put(
        tmp_path / "lists/train.csv",
        HEADER,
        "abseiling,aaa,59,69,train,0",
        "abseiling,aaa,80,90,train,0",
        "diving,bbb,0,10,train,0",
    )
    touch(tmp_path / "videos", "aaa.mp4", "bbb_000000_000010.mp4")
    script("kinetics", "--untrimmed")
    assert rows(tmp_path / "out/train.csv") == [
        ("aaa.mp4", "0", 59, 69),
        ("aaa.mp4", "0", 80, 90),
        ("bbb_000000_000010.mp4", "1", None, None),
    ]
    printed = script("kinetics")  # ID.mp4 is the clip itself: its two rows are one
    assert rows(tmp_path / "out/train.csv") == [
        ("aaa.mp4", "0", None, None),
        ("bbb_000000_000010.mp4", "1", None, None),
    ]
    assert "2 rows, 2 classes, 0 videos missing, 1 duplicates" in printed


def test_kinetics_untrimmed_names_the_missing_videos(script, tmp_path):
    """By the name of the whole video, once, however many of its clips are missing."""
    put(
        tmp_path / "lists/train.csv",
        HEADER,
        "abseiling,aaa,59,69,train,0",
        "abseiling,gone,1,11,train,0",
        "diving,gone,20,30,train,0",
    )
    touch(tmp_path / "videos", "aaa.mp4")
    printed = script("kinetics", "--untrimmed")
    assert (tmp_path / "out/missing-train.txt").read_text() == "gone.mp4\n"
    assert "1 rows, 1 classes, 1 videos missing (missing-train.txt), 0 duplicates" in printed
    put(tmp_path / "train.txt", "aaa.mp4 0")
    line = script("kinetics", "--list", "train.txt", "--untrimmed", annotations=False, fails=True)
    assert line == (
        "--untrimmed goes with --annotations: the lines of --list have no start and end"
    )


def test_a_split_without_videos_on_disk(script, tmp_path):
    """It is left out if others have videos, but never train."""
    kinetics_lists(tmp_path)
    touch(tmp_path / "videos", "flat.mp4", "vvv.mp4")
    printed = script("kinetics")
    assert printed.startswith(
        "warning: test: none of its 1 videos is on disk: looked first for "
        "videos/abseiling/ttt_000100_000110.mp4 (--videos sets the folder): test.csv is not written (an older one stays as it is)\n"
    )
    assert rows(tmp_path / "out/train.csv") == [("flat.mp4", "2", None, None)]
    assert rows(tmp_path / "out/val.csv") == [("vvv.mp4", "1", None, None)]
    assert not (tmp_path / "out/test.csv").exists()
    (tmp_path / "videos/flat.mp4").unlink()
    assert script("kinetics", fails=True) == (
        "train: none of its 5 videos is on disk: looked first for "
        "videos/abseiling/-3B32lodo2M_000059_000069.mp4 (--videos sets the folder)"
    )
    # a split by itself
    line = script("kinetics", "--annotations", "lists/test.csv", annotations=False, fails=True)
    assert line == (
        "test: none of its 1 videos is on disk: looked first for "
        "videos/abseiling/ttt_000100_000110.mp4 (--videos sets the folder)"
    )


def test_a_split_that_is_left_out_is_not_kept_with_other_classes(script, tmp_path):
    kinetics_lists(tmp_path)
    touch(tmp_path / "videos", "flat.mp4", "vvv.mp4", "ttt.mp4")
    script("kinetics")
    (tmp_path / "videos/ttt.mp4").unlink()
    put(tmp_path / "names.txt", "air drumming", "abseiling", "massaging person's head")
    assert script("kinetics", "--classes", "names.txt", fails=True) == (
        "out/test.csv: is of an earlier run with other classes: delete it (or --out writes elsewhere)"
    )


def test_kinetics_classes_and_files(script, tmp_path):
    kinetics_lists(tmp_path)
    put(tmp_path / "names.txt", "zumba", "air drumming", "abseiling", "massaging person's head")
    touch(tmp_path / "videos", "vvv.mp4")
    script(
        "kinetics",
        "--annotations",
        "lists/validate.csv",
        "--classes",
        "names.txt",
        annotations=False,
    )
    assert rows(tmp_path / "out/val.csv") == [("vvv.mp4", "1", None, None)]
    assert not (tmp_path / "out/train.csv").exists()
    put(tmp_path / "names.txt", "zumba")
    line = script(
        "kinetics",
        "--annotations",
        "lists/validate.csv",
        "--classes",
        "names.txt",
        annotations=False,
        fails=True,
    )
    assert (
        line == "lists/validate.csv:2: expected a label that --classes names, found 'air drumming'"
    )
    for names, message in (
        (("zumba", "", "air drumming"), "2: expected a class name, found nothing"),
        (("zumba", "a", "zumba "), "3: expected each name once, found 'zumba' again (line 1)"),
        ((), "1: expected a class name, found nothing"),
    ):
        put(tmp_path / "names.txt", *names)
        line = script("kinetics", "--classes", "names.txt", fails=True)
        assert line == f"--classes names.txt:{message}"


def test_kinetics_splits_one_after_the_other(script, tmp_path):
    """Into one folder, where both number the classes alike."""
    kinetics_lists(tmp_path)
    touch(tmp_path / "videos", "flat.mp4", "vvv.mp4")
    put(tmp_path / "names.txt", "abseiling", "air drumming", "massaging person's head")
    for split in ("train", "validate"):
        script(
            "kinetics",
            "--annotations",
            f"lists/{split}.csv",
            "--classes",
            "names.txt",
            annotations=False,
        )
    assert rows(tmp_path / "out/train.csv") == [("flat.mp4", "2", None, None)]
    assert rows(tmp_path / "out/val.csv") == [("vvv.mp4", "1", None, None)]
    # of itself, this list would number its one class 0
    line = script("kinetics", "--annotations", "lists/validate.csv", annotations=False, fails=True)
    assert line == (
        "out/train.csv: is of an earlier run with other classes: delete it (or --out writes elsewhere)"
    )
    assert rows(tmp_path / "out/val.csv") == [("vvv.mp4", "1", None, None)]


def test_kinetics_lists(script, tmp_path):
    put(
        tmp_path / "k400_train.csv",
        "/elsewhere/air drumming/a b, c_000001_000011.mp4 1",
        "abseiling/-x.mp4 0",
        "noext 2",
        "abseiling/-x.mp4 0",
    )
    put(tmp_path / "k400_val.txt", "v.mp4 0")
    touch(
        tmp_path / "videos",
        "air drumming/a b, c_000001_000011.mp4",
        "-x.mp4",
        "noext.mkv",
        "v.mp4",
        "abseiling/v2.mp4",
    )
    printed = script("kinetics", "--list", "k400_train.csv", "k400_val.txt", annotations=False)
    assert rows(tmp_path / "out/train.csv") == [
        ("air drumming/a b, c_000001_000011.mp4", "1", None, None),
        ("-x.mp4", "0", None, None),
        ("noext.mkv", "2", None, None),
    ]
    assert rows(tmp_path / "out/val.csv") == [("v.mp4", "0", None, None)]
    assert (
        column(tmp_path / "out/train.csv", "class") == ["1", "0", "2"] and "1 duplicates" in printed
    )
    put(tmp_path / "names.txt", "abseiling", "air drumming", "archery")
    (tmp_path / "out/val.csv").unlink()  # its classes were numbers
    script("kinetics", "--list", "k400_train.csv", "--classes", "names.txt", annotations=False)
    assert column(tmp_path / "out/train.csv", "class") == ["air drumming", "abseiling", "archery"]
    put(tmp_path / "names.txt", "abseiling", "air drumming")
    line = script(
        "kinetics",
        "--list",
        "k400_train.csv",
        "--classes",
        "names.txt",
        annotations=False,
        fails=True,
    )
    assert line == "k400_train.csv:3: expected a label that --classes names, found 2"
    put(tmp_path / "k400_train.csv", "")
    line = script(
        "kinetics", "--list", "k400_val.txt", "k400_train.csv", annotations=False, fails=True
    )
    assert line == (
        "k400_train.csv: expected lines 'PATH LABEL', separated by a space, the label an integer, "
        "found nothing"
    )


@pytest.mark.parametrize(
    "name, line, message",
    [
        (
            "train.txt",
            "a/frames_dir 300 1",
            "train.txt:2: expected 'PATH LABEL', separated by a space, the label an integer, found "
            "'a/frames_dir 300 1': a list of frames ('PATH FRAMES LABEL')",
        ),
        (
            "train.txt",
            "a.mp4,1",
            "train.txt:2: expected 'PATH LABEL', separated by a space, the label an integer, found 'a.mp4,1'",
        ),
        (
            "train.txt",
            "a.mp4 0 -1",
            "train.txt:2: expected 'PATH LABEL', separated by a space, the label an integer, found "
            "'a.mp4 0 -1'",
        ),
        (
            "all.txt",
            "v.mp4 1",
            "all.txt: expected a file name with one of train, val, test in it, found all.txt",
        ),
        ("train.txt", "my clip 12.mp4 3", None),
    ],
)
def test_kinetics_list_errors(script, tmp_path, name, line, message):
    put(tmp_path / name, "v.mp4 0", line)
    touch(tmp_path / "videos", "v.mp4", "my clip 12.mp4")
    if message is None:
        script("kinetics", "--list", name, annotations=False)
        assert rows(tmp_path / "out/train.csv")[1] == ("my clip 12.mp4", "3", None, None)
    else:
        assert script("kinetics", "--list", name, annotations=False, fails=True) == message


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "abseiling,x,59,69,tset,0",
            "lists/train.csv:3: expected the split train, val, validate or test, found 'tset'",
        ),
        (
            "abseiling,x,fifty,69,train,0",
            "lists/train.csv:3: expected time_start in whole seconds, found 'fifty'",
        ),
        (",x,59,69,train,0", "lists/train.csv:3: expected a label, found nothing"),
        (
            "abseiling,x,69,59,train,0",
            "lists/train.csv:3: expected time_end after time_start, found 69 to 59",
        ),
        (
            "abseiling,x,59",
            "lists/train.csv:3: expected 6 fields (label,youtube_id,time_start,time_end,split,is_cc), found 3",
        ),
        (
            "diving,aaa,59,69,train,0",
            "lists/train.csv:3: ../videos/aaa.mp4 is of class 'diving', but of 'abseiling' at lists/train.csv:2",
        ),
        (
            "abseiling,aaa,59,69,test,0",
            "lists/train.csv:3: ../videos/aaa.mp4 is in test, but also in train (lists/train.csv:2): "
            "take it out of one of the two",
        ),
        ('"abseiling,x,59,69,train,0', "lists/train.csv:3: expected csv (unexpected end of data)"),
    ],
)
def test_kinetics_errors(script, tmp_path, line, message):
    put(tmp_path / "lists/train.csv", HEADER, "abseiling,aaa,59,69,train,0", line)
    touch(tmp_path / "videos", "aaa.mp4")
    assert script("kinetics", fails=True) == message
    assert not (tmp_path / "out/train.csv").exists()


@pytest.mark.parametrize("folder", ["clips", "train/abseiling"])
def test_kinetics_replacements_of_broken_clips(script, tmp_path, folder):
    put(
        tmp_path / "lists/train.csv", HEADER, "abseiling,aaa,59,69,train,0", "diving,b,0,10,train,0"
    )
    copies = ("zzz", "replacement/replacement_for_corrupted_k400")
    name = "aaa_000059_000069.mp4"
    touch(tmp_path / "videos", *(f"{copy}/{name}" for copy in (folder, *copies)), "b.mp4")
    script("kinetics")
    assert rows(tmp_path / "out/train.csv")[0][0] == f"{copies[1]}/{name}"


def test_an_older_split_that_stays_is_named(script, tmp_path):
    """Here the test split, whose list is gone. Videos that are not on disk are in no split."""
    for split, key in (("train", "a"), ("val", "b"), ("test", "c")):
        gone = f"diving,gone,0,10,{split},0"
        put(tmp_path / f"lists/{split}.csv", HEADER, f"diving,{key},0,10,{split},0", gone)
        touch(tmp_path / "videos", f"{key}.mp4")
    assert "earlier run" not in script("kinetics", "--untrimmed")
    (tmp_path / "lists/test.csv").unlink()
    out = script("kinetics", "--untrimmed")
    assert "note: out/test.csv is of an earlier run, and stays as it is\n" in out


def test_kinetics_clips_of_two_classes_in_one_video(script, tmp_path):
    """As in the official Kinetics-600: ID.mp4 may be either clip, but a whole video serves both."""
    put(
        tmp_path / "lists/train.csv",
        HEADER,
        "diving,aaa,1,11,train,0",
        "yoga,aaa,20,30,train,0",
        "yoga,ddd,2,12,train,0",
        "yoga,ddd,40,50,train,0",
    )
    put(tmp_path / "lists/test.csv", "youtube_id,time_start,time_end,split", "x,0,10,test")
    touch(tmp_path / "videos", "aaa.mp4", "ddd.mp4")
    out = script("kinetics")
    assert "warning: lists/test.csv: has no labels and is left out" in out
    assert "warning: 1 files, such as ../videos/aaa.mp4, are left out" in out
    assert rows(tmp_path / "out/train.csv") == [("ddd.mp4", "1", None, None)]
    missing = (tmp_path / "out/missing-train.txt").read_text().splitlines()
    assert missing == ["diving/aaa_000001_000011.mp4", "yoga/aaa_000020_000030.mp4"]
    (tmp_path / "videos/diving").mkdir()
    (tmp_path / "videos/aaa.mp4").rename(tmp_path / "videos/diving/aaa.mp4")
    script("kinetics", "--untrimmed")
    assert rows(tmp_path / "out/train.csv") == [
        ("diving/aaa.mp4", "0", 1, 11),
        ("diving/aaa.mp4", "1", 20, 30),
        ("ddd.mp4", "1", 2, 12),
        ("ddd.mp4", "1", 40, 50),
    ]


def test_kinetics_splits_are_words_of_a_file_name():
    for name, splits in {
        "k400_latest_train.csv": {"train"},
        "interval_TRAINING.txt": {"train"},
        "validate.csv": {"val"},
        "kinetics400-test.csv": {"test"},
        "train_and_val.csv": {"train", "val"},
        "trainval.csv": {"train", "val"},
        "valtest.csv": {"val", "test"},
        "minitrain.csv": {"train"},
        "contest.csv": set(),
    }.items():
        assert kinetics.splits_in(name) == splits, name


def test_kinetics_what_is_not_there(script, tmp_path):
    assert script("kinetics", fails=True) == (
        "lists: no such file or folder (--annotations sets the folder or the files)"
    )
    put(tmp_path / "lists/notes.csv", "x")
    assert script("kinetics", fails=True) == (
        "lists: expected train.csv, val.csv or validate.csv in it, found none "
        "(--annotations sets the folder or the files)"
    )
    put(tmp_path / "lists/test.csv", "youtube_id,time_start,time_end,split", "x,0,10,test")
    line = script("kinetics", "--annotations", "lists/test.csv", fails=True)
    assert line == (
        "lists/test.csv:1: has no labels and cannot be used: leave it out of --annotations"
    )
    put(tmp_path / "lists/test.csv", HEADER)
    put(tmp_path / "lists/train.csv", HEADER, "abseiling,x,0,10,train,0")
    assert (
        script("kinetics", fails=True)
        == "lists/test.csv: expected lines after the header, found nothing"
    )
    (tmp_path / "lists/test.csv").unlink()
    assert (
        script("kinetics", fails=True)
        == "videos: no such folder (--videos sets the folder of the videos)"
    )
    (tmp_path / "videos").mkdir()
    assert script("kinetics", fails=True) == (
        "train: none of its 1 videos is on disk: looked first for "
        "videos/abseiling/x_000000_000010.mp4 (--videos sets the folder)"
    )
    touch(tmp_path / "videos", "x.mp4")
    # the official train.csv is not to be lost
    line = script("kinetics", "--out", "lists", fails=True)
    assert line == f"lists/train.csv: {FOREIGN}"
    put(tmp_path / "lists/train.csv", "path,label", "a,b")
    assert script("kinetics", fails=True) == (
        "lists/train.csv:1: expected the columns label,youtube_id,time_start,time_end, found "
        "path,label (without youtube_id,time_start,time_end)"
    )
    (tmp_path / "lists/train.csv").write_bytes(b"label\n\xff")
    assert script("kinetics", fails=True) == "lists/train.csv:2: expected UTF-8 text"


# ---- Something-Something v2 ----------------------------------------------------------------------

NUMBERS = {
    "Approaching something with your camera": "0",
    "Holding something next to something": "1",
    "Pretending to put something on a surface": "2",
}


def entry(key, template, *words):
    text = re.sub(r"\[[^]]*\]", lambda _: words[0], template).lower()
    return {"id": key, "label": text, "template": template, "placeholders": list(words)}


def write_ssv2(folder, prefix=""):
    held = entry("78687", "Holding [something] next to [something]", "potato") | {
        "label": 'holding "a potato", next to it'
    }
    train = [
        held,
        entry("2", "Pretending to put [something] on a surface", "a \u00e9"),
        held,
        entry("9", "Approaching [something] with your camera", "x"),
    ]
    for name, contents in (
        ("labels", NUMBERS),
        ("train", train),
        ("validation", [entry("5", "Approaching [something] with your camera", "a cup")]),
    ):
        put(
            folder / f"lists/{prefix}{name}.json",
            json.dumps(contents, ensure_ascii=False, indent=1),
        )
    touch(folder / "videos", "78687.webm", "2.webm", "5.mp4", "7.webm")


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2(script, tmp_path, prefix):
    write_ssv2(tmp_path, prefix)
    put(tmp_path / f"lists/{prefix}test.json", json.dumps([{"id": "7"}]))
    answer = "7;Approaching [something] with your camera"
    put(tmp_path / "lists/test-answers.csv", answer, end="\r\n")
    printed = script("ssv2")
    assert rows(tmp_path / "out/train.csv") == [
        ("78687.webm", "1", None, None),
        ("2.webm", "2", None, None),
    ]
    assert rows(tmp_path / "out/val.csv") == [("5.mp4", "0", None, None)]
    assert rows(tmp_path / "out/test.csv") == [("7.webm", "0", None, None)]
    assert column(tmp_path / "out/train.csv", "caption") == [
        'holding "a potato", next to it',
        "pretending to put a \u00e9 on a surface",
    ]
    assert column(tmp_path / "out/train.csv", "class") == [
        "Holding something next to something",
        "Pretending to put something on a surface",
    ]
    assert column(tmp_path / "out/test.csv", "caption") == [
        "Approaching something with your camera"
    ]
    assert (tmp_path / "out/classes.txt").read_text().splitlines() == list(NUMBERS)
    assert (tmp_path / "out/missing-train.txt").read_text() == "9.webm\n"
    assert (
        "out/train.csv: 2 rows, 2 classes, 1 videos missing (missing-train.txt), 1 duplicates"
        in printed
    )
    run(
        "caption.py",
        *"--data out/train.csv --labels --label-column caption".split(),
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "out/train.captions.jsonl").read_text().splitlines()[0])[
        "captions"
    ] == (['holding "a potato", next to it'])
    run(
        "caption.py",
        *"--data out/val.csv --labels --classes out/classes.txt".split(),
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "out/val.captions.jsonl").read_text())["captions"] == (
        ["Approaching something with your camera"]
    )


def test_ssv2_answers_without_their_list(script, tmp_path):
    write_ssv2(tmp_path)
    touch(tmp_path / "videos", "78687.webm", "5.webm")
    put(tmp_path / "lists/test-answers.csv", "7;Approaching something with your camera")
    (tmp_path / "lists/test.json").unlink(missing_ok=True)
    out = script("ssv2")
    assert "note: lists/test-answers.csv has no test.json beside it" in out
    assert (tmp_path / "out/val.csv").exists() and not (tmp_path / "out/test.csv").exists()


def test_ssv2_errors(script, tmp_path):
    assert script("ssv2", fails=True) == (
        "lists: expected labels.json or something-something-v2-labels.json in it, found none "
        "(--annotations sets the folder)"
    )
    write_ssv2(tmp_path)
    train = tmp_path / "lists/train.json"
    put(train, json.dumps([entry("1", "Eating [something]", "soup")]))
    assert script("ssv2", fails=True) == (
        "lists/train.json: entry 1: expected a template that labels.json numbers, found "
        "'Eating something'"
    )
    put(train, json.dumps([{"id": "1"}]))
    assert (
        script("ssv2", fails=True)
        == "lists/train.json: entry 1: expected the keys id, label, template, found id"
    )
    for label in (None, ["a", "cup"], "", " "):
        held = entry("1", "Holding [something] next to [something]", "x") | {"label": label}
        put(train, json.dumps([held]))
        assert script("ssv2", fails=True) == (
            f"lists/train.json: entry 1: expected a text as the label, found {label!r}"
        )
    put(train, "[", '{"id": }]')
    assert script("ssv2", fails=True) == "lists/train.json:2: expected json (Expecting value)"
    put(train, "{}")
    assert script("ssv2", fails=True) == "lists/train.json: expected a json list, found dict"
    put(tmp_path / "lists/labels.json", json.dumps({"a": "0", "b": "2"}))
    assert (
        script("ssv2", fails=True)
        == "lists/labels.json: expected the numbers 0 to 1, once each, found others"
    )
    write_ssv2(tmp_path)
    put(tmp_path / "lists/test.json", json.dumps([{"id": "7"}]))
    put(tmp_path / "lists/test-answers.csv", "8;Approaching something with your camera")
    assert (
        script("ssv2", fails=True)
        == "lists/test.json: entry 1: expected an id that test-answers.csv has, found '7'"
    )
    put(tmp_path / "lists/test-answers.csv", "8,Approaching")
    assert (
        script("ssv2", fails=True)
        == "lists/test-answers.csv:1: expected 'ID;TEMPLATE', found '8,Approaching'"
    )


def test_200000_rows_take_ten_times_as_long_as_20000(script, tmp_path, monkeypatch):
    """Not a hundred times, as if each row were compared with all others. The factor of three leaves
    room for a busy machine and its caches."""
    write_ssv2(tmp_path)
    template = "Approaching [something] with your camera"
    seconds = {}
    for rows in (20_000, 200_000):
        entries = [entry(str(i), template, "a cup") for i in range(rows)]
        put(tmp_path / "lists/train.json", json.dumps(entries))
        put(tmp_path / "lists/validation.json", json.dumps([entry(str(rows), template, "a cup")]))
        names = [f"{i}.webm" for i in range(0, rows + 1, 2)]
        monkeypatch.setattr(lists, "list_videos", lambda folder, names=names: names)
        before = time.process_time()
        printed = script("ssv2")
        seconds[rows] = time.process_time() - before
    assert seconds[200_000] < 3 * 10 * seconds[20_000], seconds
    assert (
        "out/train.csv: 100000 rows, 1 classes, 100000 videos missing (missing-train.txt), 0 duplicates"
        in printed
    )
    video = read_manifest(tmp_path / "out/train.csv")[-1]
    assert (video.name, video.label) == ("../videos/199998.webm", "0")


# ---- UCF101 --------------------------------------------------------------------------------------


def write_ucf(folder, *more, split=1):
    put(
        folder / "lists/classInd.txt",
        "1 ApplyEyeMakeup",
        "2 HandstandPushups",
        "3 YoYo",
        end="\r\n",
    )
    put(
        folder / f"lists/trainlist0{split}.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1",
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 2",
        "YoYo/v_YoYo_g09_c02.avi 3",
        *more,
        end="\r\n",
    )
    put(
        folder / f"lists/testlist0{split}.txt",
        "HandstandPushups/v_HandStandPushups_g01_c04.avi",
        "YoYo/v_YoYo_g01_c01.avi",
        end="\r\n",
    )


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("flat", [True, False])
def test_ucf101(script, tmp_path, split, flat):
    write_ucf(tmp_path, "YoYo/v_YoYo_g09_c02.avi 3", split=split)
    names = [
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "HandStandPushups/v_HandStandPushups_g08_c01.avi",
        "YoYo/v_YoYo_g09_c02.mp4",
        "HandStandPushups/v_HandStandPushups_g01_c04.avi",
    ]
    names = [os.path.basename(name) for name in names] if flat else names
    touch(tmp_path / "videos", *names)
    printed = script("ucf101", "--split", split)
    assert rows(tmp_path / "out/train.csv") == [
        (name, str(label), None, None) for label, name in enumerate(names[:3])
    ]
    assert rows(tmp_path / "out/val.csv") == [(names[3], "1", None, None)]
    assert column(tmp_path / "out/val.csv", "class") == ["HandstandPushups"]
    assert (tmp_path / "out/classes.txt").read_text() == "ApplyEyeMakeup\nHandstandPushups\nYoYo\n"
    assert (tmp_path / "out/missing-val.txt").read_text() == "YoYo/v_YoYo_g01_c01.avi\n"
    assert "out/train.csv: 3 rows, 3 classes, 0 videos missing, 1 duplicates" in printed


def test_ucf101_errors(script, tmp_path):
    write_ucf(tmp_path)
    touch(tmp_path / "videos", "v_YoYo_g09_c02.avi", "v_YoYo_g01_c01.avi")
    for line, message in (
        ("YoYo/v_YoYo_g09_c03.avi 2", "expected number 3, that of YoYo in classInd.txt, found 2"),
        ("YoYo/v_YoYo_g09_c03.avi x", "expected 'CLASS/FILE.avi NUMBER', found 'x'"),
        (
            "v_YoYo_g09_c03.avi",
            "expected a class of classInd.txt as the folder, found 'v_YoYo_g09_c03.avi'",
        ),
        (
            "NoNo/v_YoYo_g09_c03.avi",
            "expected a class of classInd.txt as the folder, found 'NoNo/v_YoYo_g09_c03.avi'",
        ),
    ):
        write_ucf(tmp_path, line)
        assert script("ucf101", fails=True) == f"lists/trainlist01.txt:4: {message}"
    write_ucf(tmp_path, "YoYo/v_YoYo_g01_c01.avi 3")  # a wrong split
    assert script("ucf101", fails=True) == (
        "lists/testlist01.txt:2: ../videos/v_YoYo_g01_c01.avi is in val, but also in train "
        "(lists/trainlist01.txt:4): take it out of one of the two"
    )
    put(tmp_path / "lists/classInd.txt", "1 ApplyEyeMakeup", "HandstandPushups")
    assert (
        script("ucf101", fails=True)
        == "lists/classInd.txt:2: expected 'NUMBER NAME', found 'HandstandPushups'"
    )
    put(tmp_path / "lists/classInd.txt", "1 ApplyEyeMakeup", "3 HandstandPushups")
    assert script("ucf101", fails=True) == "lists/classInd.txt:2: expected number 2, found 3"
    put(tmp_path / "lists/classInd.txt", "1 YoYo")
    assert script("ucf101", "--split", 2, fails=True) == (
        "lists: expected trainlist02.txt in it, found none (--annotations sets the folder)"
    )


# ---- HMDB51 --------------------------------------------------------------------------------------

ODD = [
    "#437_How_To_Ride_A_Bike_ride_bike_f_cm_np1_ri_med_0.avi",
    "Tom & J; (x) [y]..{z}, 'q'_0.avi",
    'a "b".avi',
]


@pytest.mark.parametrize("split", [1, 2, 3])
def test_hmdb51(script, tmp_path, split):
    put(
        tmp_path / f"lists/brush_hair_test_split{split}.txt",
        *(f"{name} 1 " for name in ODD),
        "unused.avi 0 ",
        "same.avi 2 ",
        "same.avi 2 ",
    )
    put(
        tmp_path / f"lists/wave_test_split{split}.txt",
        "same.avi 2 ",
        "w.avi 1 ",
        "only_in_brush_hair.avi 1 ",
    )
    touch(
        tmp_path / "videos",
        *(f"brush_hair/{name}" for name in ODD),
        "unused.avi",
        "brush_hair/same.avi",
        "wave/same.avi",
        "w.avi",
        "brush_hair/only_in_brush_hair.avi",
    )
    printed = script("hmdb51", "--split", split)
    assert rows(tmp_path / "out/train.csv") == [
        *((f"brush_hair/{name}", "0", None, None) for name in ODD),
        ("w.avi", "1", None, None),
    ]
    assert rows(tmp_path / "out/val.csv") == [
        ("brush_hair/same.avi", "0", None, None),
        ("wave/same.avi", "1", None, None),
    ]
    assert (tmp_path / "out/missing-train.txt").read_text() == "wave/only_in_brush_hair.avi\n"
    assert (tmp_path / "out/classes.txt").read_text() == "brush_hair\nwave\n"
    assert (
        "warning: 2 classes do not list 70 training and 30 test clips: brush_hair 3 + 2, wave 2 + 1\n"
        in printed
    )
    assert "out/val.csv: 2 rows, 2 classes, 0 videos missing, 1 duplicates" in printed


def test_hmdb51_counts_and_errors(script, tmp_path):
    assert script("hmdb51", fails=True) == (
        "lists: expected CLASS_test_split1.txt in it, found none (--annotations sets the folder)"
    )
    path = tmp_path / "lists/wave_test_split1.txt"
    put(path, *(f"{i}.avi {1 if i < 70 else 2} " for i in range(100)), "u.avi 0 ")
    touch(tmp_path / "videos", *(f"wave/{i}.avi" for i in range(100)))
    assert "warning" not in script("hmdb51")
    assert len(rows(tmp_path / "out/train.csv")) == 70 and len(rows(tmp_path / "out/val.csv")) == 30
    put(path, "a.avi 1 ", "a.avi 3 ")
    assert (
        script("hmdb51", fails=True)
        == "lists/wave_test_split1.txt:2: expected 'FILE.avi 0', '1' or '2', found 'a.avi 3'"
    )
    put(path, "a.avi")
    assert (
        script("hmdb51", fails=True)
        == "lists/wave_test_split1.txt:1: expected 'FILE.avi 0', '1' or '2', found 'a.avi'"
    )


# ---- Diving48 ------------------------------------------------------------------------------------


def dive(name, label):
    return {"vid_name": name, "label": label, "start_frame": 0, "end_frame": 125}


def test_diving48(script, tmp_path):
    put(
        tmp_path / "lists/Diving48_vocab.json",
        json.dumps([["Back", "15som", "05Twis", "FREE"], ["Forward", "NoSom", "NoTwis", "PIKE"]]),
    )
    for version, label in (("", 1), ("V2_", 0)):
        put(
            tmp_path / f"lists/Diving48_{version}train.json",
            json.dumps([dive("_8Vy3dlHg2w_00000", label), dive("lost", 1)]),
        )
        put(tmp_path / f"lists/Diving48_{version}test.json", json.dumps([dive("-x_00001", 1)]))
    touch(tmp_path / "videos", "rgb/_8Vy3dlHg2w_00000.mp4", "rgb/-x_00001.mp4")
    printed = script("diving48")
    assert rows(tmp_path / "out/train.csv") == [("rgb/_8Vy3dlHg2w_00000.mp4", "0", None, None)]
    assert rows(tmp_path / "out/val.csv") == [("rgb/-x_00001.mp4", "1", None, None)]
    assert column(tmp_path / "out/train.csv", "class") == ["Back 15som 05Twis FREE"]
    assert (
        tmp_path / "out/missing-train.txt"
    ).read_text() == "lost.mp4\n" and "1 rows, 1 classes, 1 videos missing" in printed
    script("diving48", "--v1")
    assert rows(tmp_path / "out/train.csv") == [("rgb/_8Vy3dlHg2w_00000.mp4", "1", None, None)]

    put(tmp_path / "lists/Diving48_V2_train.json", json.dumps([dive("a", 2)]))
    assert script("diving48", fails=True) == (
        "lists/Diving48_V2_train.json: entry 1: expected a label below 2, the classes of the "
        "vocabulary, found 2"
    )
    (tmp_path / "lists/Diving48_V2_train.json").unlink()
    assert script("diving48", fails=True) == (
        "lists: has version 1 alone, whose labels are noisy: expected Diving48_V2_train.json "
        "(--v1 reads version 1 all the same)"
    )
    put(tmp_path / "lists/Diving48_vocab.json", json.dumps([["Back"], "Forward"]))
    assert script("diving48", "--v1", fails=True) == (
        "lists/Diving48_vocab.json: entry 2: expected a list of attributes, found 'Forward'"
    )


# ---- EPIC-Kitchens -------------------------------------------------------------------------------

EPIC_100 = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
EPIC_55 = (
    "uid,participant_id,video_id,narration,start_timestamp,stop_timestamp,start_frame,stop_frame,verb,verb_class,noun,"
    "noun_class,all_nouns,all_noun_classes"
)


def write_epic_100(folder):
    put(
        folder / "lists/EPIC_100_train.csv",
        EPIC_100,
        "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,open door,open,1,door,1,['door'],[1]",
        "P01_01_1,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,open fridge,open,1,fridge,2,['fridge'],[2]",
        "P01_01_1,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,open fridge,open,1,fridge,2,['fridge'],[2]",
        "P01_01_2,P01,P01_01,00:00:01.089,00:00:05.00,00:00:05.00,8,202,nothing,open,1,fridge,2,['fridge'],[2]",
        "P02_101_3,P02,P02_101,01:00:01,01:02:03.45,01:02:04.5,1,2,\"take tap, and door\",take,0,tap,0,\"['tap', 'door']\","
        '"[0, 1]"',
        "P09_01_0,P09,P09_01,00:00:01,00:00:02.00,00:00:03.00,1,2,lost,take,0,tap,0,['tap'],[0]",
    )
    put(
        folder / "lists/EPIC_100_validation.csv",
        EPIC_100,
        "P01_11_0,P01,P01_11,00:00:00.560,00:00:00.00,00:00:01.89,1,113,open door,open,1,door,1,['door'],[1]",
        "P18_01_5,P18,P18_01,00:00:00.560,00:00:02.00,00:00:04.00,1,113,take door,take,0,door,1,['door'],[1]",
    )
    put(
        folder / "lists/EPIC_100_verb_classes.csv",
        "id,key,instances,category",
        "0,take,\"['take', 'grab']\",retrieve",
        "1,open,['open'],access",
    )
    put(
        folder / "lists/EPIC_100_noun_classes.csv",
        "id,key,instances,category",
        "0,tap,['tap'],a",
        "1,door,['door'],b",
        "2,fridge,['fridge'],c",
    )
    put(
        folder / "lists/EPIC_100_unseen_participant_ids_validation.csv",
        "participant_id",
        "P18",
        "P32",
    )
    touch(
        folder / "videos",
        "P01/videos/P01_01.MP4",
        "P02/P02_101.mp4",
        "P01_11.Mp4",
        "P18/videos/P18_01.MP4",
    )


@pytest.mark.parametrize(
    "task, train, val, classes",
    [
        ("verb", "110", "10", ["take", "open"]),
        ("noun", "120", "11", ["tap", "door", "fridge"]),
        ("action", "120", "13", ["take tap", "open door", "open fridge", "take door"]),
    ],
)
def test_epic_100(script, tmp_path, task, train, val, classes):
    write_epic_100(tmp_path)
    printed = script("epic", "--task", task, "--unseen")
    assert rows(tmp_path / "out/train.csv") == [
        ("P01/videos/P01_01.MP4", train[0], 0.14, 3.37),
        ("P01/videos/P01_01.MP4", train[1], 0.14, 3.37),
        ("P02/P02_101.mp4", train[2], 3723.45, 3724.5),
    ]
    assert rows(tmp_path / "out/val.csv") == [
        ("P01_11.Mp4", val[0], 0, 1.89),
        ("P18/videos/P18_01.MP4", val[1], 2, 4),
    ]
    assert rows(tmp_path / "out/val_unseen.csv") == [("P18/videos/P18_01.MP4", val[1], 2, 4)]
    assert column(tmp_path / "out/train.csv", "narration") == [
        "open door",
        "open fridge",
        "take tap, and door",
    ]
    assert column(tmp_path / "out/train.csv", "participant") == ["P01", "P01", "P02"]
    assert column(tmp_path / "out/val.csv", "class") == [classes[int(label)] for label in val]
    assert (tmp_path / "out/classes.txt").read_text().splitlines() == classes
    assert (tmp_path / "out/missing-train.txt").read_text() == "P09/videos/P09_01.MP4\n"
    assert "1 segments end at or before their start: left out" in printed
    assert "1 videos missing (missing-train.txt), 1 duplicates" in printed
    if task == "action":
        assert (
            "3 actions in training; 1 validation rows have one of 1 others, numbered from 3, which count as wrong"
            in printed
        )


def test_epic_unseen_of_another_task(script, tmp_path):
    write_epic_100(tmp_path)
    script("epic", "--task", "verb", "--unseen")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert script("epic", "--task", "noun", fails=True) == (
        "out/val_unseen.csv: is of an earlier run with other classes: delete it "
        "(or --out writes elsewhere)"
    )
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    script("epic", "--task", "verb")  # the same classes
    script("epic", "--task", "noun", "--unseen")
    assert [row[1] for row in rows(tmp_path / "out/val_unseen.csv")] == ["1"]
    put(tmp_path / "lists/EPIC_100_unseen_participant_ids_validation.csv", "participant_id", "P32")
    assert script("epic", "--unseen", fails=True) == (
        "val_unseen: has no rows: check the annotations, and the flags that choose its rows"
    )


def test_epic_actions_of_segments_without_length(script, tmp_path):
    """They are left out before actions are numbered and counted."""
    write_epic_100(tmp_path)
    line = "{},P01,P01_11,0,00:00:0{},00:00:02,1,2,x,{},{},{},{},[],[]"
    for split, start in (("train", 2), ("validation", 3)):
        with open(tmp_path / f"lists/EPIC_100_{split}.csv", "a") as file:
            file.write(line.format("P01_11_8", start, "open", 1, "tap", 0) + "\n")
    assert (
        "3 actions in training; 1 validation rows have one of 1 others, numbered from 3, which count as wrong"
        in script("epic", "--task", "action")
    )
    assert (tmp_path / "out/classes.txt").read_text().splitlines() == [
        "take tap",
        "open door",
        "open fridge",
        "take door",
    ]


def test_epic_55(script, tmp_path):
    put(
        tmp_path / "lists/EPIC_train_action_labels.csv",
        EPIC_55,
        "0,P01,P01_01,open door,00:00:00.14,00:00:03.37,8,202,open,1,door,0,['door'],[0]",
        "1,P25,P25_01,take door,00:00:04.00,00:00:05.00,8,202,take,0,door,0,['door'],[0]",
        "2,P26,P26_01,take door,00:00:04.00,00:00:05.00,8,202,take,0,door,0,['door'],[0]",
    )
    put(
        tmp_path / "lists/EPIC_verb_classes.csv",
        "verb_id,class_key,verbs",
        "0,take,['take']",
        "1,open,['open']",
    )
    put(
        tmp_path / "lists/EPIC_noun_classes.csv",
        "noun_id,class_key,nouns",
        "0,door,\"['door', 'door:kitchen']\"",
    )
    touch(tmp_path / "videos", "P01/P01_01.MP4", "P25/P25_01.MP4", "P26/P26_01.MP4")
    assert "at or before their start" not in script("epic")  # there are none
    assert rows(tmp_path / "out/train.csv") == [
        ("P01/P01_01.MP4", "1", 0.14, 3.37),
        ("P25/P25_01.MP4", "0", 4, 5),
    ]
    assert rows(tmp_path / "out/val.csv") == [("P26/P26_01.MP4", "0", 4, 5)]
    script("epic", "--val-from", 25)
    assert [row[0] for row in rows(tmp_path / "out/val.csv")] == [
        "P25/P25_01.MP4",
        "P26/P26_01.MP4",
    ]
    assert script("epic", "--val-from", 99, fails=True) == (
        "val: has no rows: check the annotations, and the flags that choose its rows"
    )
    assert script("epic", "--unseen", fails=True) == (
        "--unseen is for EPIC-Kitchens-100: in EPIC-55 all kitchens of val.csv are unseen"
    )


def test_epic_errors(script, tmp_path):
    assert script("epic", fails=True) == (
        "lists: expected EPIC_100_train.csv or EPIC_train_action_labels.csv in it, found none (--annotations sets the folder)"
    )
    write_epic_100(tmp_path)
    assert (
        script("epic", "--val-from", 26, fails=True)
        == "--val-from is for EPIC-Kitchens-55: EPIC-100 has a validation list"
    )
    for fields, message in (
        ("0:0:1,00:00:03,8,202,x,open,1,door,1", "expected a time HH:MM:SS.ss, found '0:0:1'"),
        ("00:00:01,00:00:03,8,202,x,open,2,door,1", "expected a verb class below 2, found 2"),
        ("00:00:01,00:00:03,8,202,x,open,1,door,-1", "expected a noun class, found '-1'"),
    ):
        put(
            tmp_path / "lists/EPIC_100_validation.csv",
            EPIC_100,
            f"P01_11_0,P01,P01_11,0,{fields},[],[]",
        )
        assert script("epic", fails=True) == f"lists/EPIC_100_validation.csv:2: {message}"
    put(
        tmp_path / "lists/EPIC_100_validation.csv",
        EPIC_100,
        ",P01,P01_11,0,00:00:01,00:00:03,8,202,x,open,1,door,1,[],[]",
    )
    assert (
        script("epic", fails=True)
        == "lists/EPIC_100_validation.csv:2: expected a narration_id, found nothing"
    )
    put(tmp_path / "lists/EPIC_100_verb_classes.csv", "id,key", "0,take", "2,open")
    assert (
        script("epic", fails=True) == "lists/EPIC_100_verb_classes.csv:3: expected class 1, found 2"
    )


# ---- any folder ----------------------------------------------------------------------------------


def test_folder(script, tmp_path):
    touch(
        tmp_path / "videos",
        *(f"walk/deep/v_g{g:02d}_c{c}.mp4" for g in range(5) for c in range(3)),
        "run, fast/a.MOV",
        "run, fast/b [1].webm",
        "one/x.mkv",
        "loose.mp4",
        "walk/notes.txt",
        "walk/.mp4",
        "train/\u00e9.avi",
        "train/z.avi",
        "swim/a.mpg",
        "swim/b.mpg",
        ".Trash-1000/files/c.mp4",
    )
    os.mkdir(os.fsencode(tmp_path / "videos/caf") + b"\xe9")
    # the second finds an empty group in names that do not begin with a digit
    for group in (r"(.*)_c\d+$|(?P<rest>.*)", r"(\d*)"):
        printed = script("folder", "--val", 0.4, "--group", group, fails=True, annotations=False)
        assert "finds no group in its name" in printed
    printed = script("folder", "--val", 0.4, annotations=False)
    train, val = rows(tmp_path / "out/train.csv"), rows(tmp_path / "out/val.csv")
    assert not set(train) & set(val) and len(train) + len(val) == 20 and len(val) == 8
    assert {name.split("/")[0]: label for name, label, *_ in train} == {
        "one": "0",
        "run, fast": "1",
        "train": "2",
        "walk": "3",
    }
    # every class with two files has both sides
    assert {label for _, label, *_ in val} == {"1", "2", "3"}
    assert (tmp_path / "out/classes.txt").read_text() == "one\nrun, fast\ntrain\nwalk\n"
    assert "1 videos are in no class folder: left out" in printed
    assert "1 classes are not in both train and val: one\n" in printed
    assert "no classes, as no .mp4, .mkv, .webm, .avi, .mov was found in: caf?, swim\n" in printed
    script("folder", "--val", 0.4, annotations=False)
    assert rows(tmp_path / "out/val.csv") == val
    drawn = set()
    for seed in range(1, 4):
        script("folder", "--val", 0.4, "--seed", seed, annotations=False)
        drawn.add(tuple(rows(tmp_path / "out/val.csv")))
    assert len(drawn - {tuple(val)}) == 3


def test_folder_groups(script, tmp_path):
    touch(
        tmp_path / "videos",
        *(f"walk/v_g{g:02d}_c{c}.mp4" for g in range(5) for c in range(g + 1)),
        "sit/v_g00_c9.mp4",
        "sit/v_g07_c0.mp4",
    )
    for seed in range(5):
        script("folder", "--group", r"(.*)_c\d+$", "--seed", seed, annotations=False)
        sides = [
            {re.search("g..", name)[0] for name, *_ in rows(tmp_path / f"out/{split}.csv")}
            for split in ("train", "val")
        ]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == {
            "g00",
            "g01",
            "g02",
            "g03",
            "g04",
            "g07",
        }
        # one group of each class
        assert {row[1] for row in rows(tmp_path / "out/val.csv")} == {"0", "1"}


def test_folder_given_split(script, tmp_path):
    touch(
        tmp_path / "videos",
        "train/a/1_c1.mp4",
        "train/b/2_c1.mp4",
        "validation/a/3_c1.mp4",
        "test/b/4_c1.mp4",
    )
    printed = script("folder", "--group", "(.*)_c", annotations=False)
    assert [rows(tmp_path / f"out/{split}.csv") for split in ("train", "val", "test")] == [
        [("train/a/1_c1.mp4", "0", None, None), ("train/b/2_c1.mp4", "1", None, None)],
        [("validation/a/3_c1.mp4", "0", None, None)],
        [("test/b/4_c1.mp4", "1", None, None)],
    ]
    assert "1 classes are not in both train and val: b" in printed and "no classes" not in printed
    touch(tmp_path / "videos", "validation/b/2_c7.mp4")
    assert script("folder", "--group", "(.*)_c", annotations=False, fails=True) == (
        "videos/validation/b/2_c7.mp4: group '2' is in val, but also in train (train/b/2_c1.mp4)"
    )
    script("folder", annotations=False)
    (tmp_path / "videos/validation").rename(tmp_path / "other")
    # the only other folder is the test set, which serves as val
    script("folder", annotations=False)
    assert rows(tmp_path / "out/val.csv") == [("test/b/4_c1.mp4", "1", None, None)]


def test_folder_with_a_split_that_is_not_understood(script, tmp_path):
    """The names of splits do not become classes."""
    for tops, found in (
        (("train", "valid"), "train/, valid/"),
        (("train",), "train/"),
        (("Train", "testing"), "Train/, testing/"),
        (("Train",), "Train/"),
        (("val", "test"), "test/, val/"),
        (("train", "val", "more"), "train/, val/, more/"),
        (("train", "a", "b", "c", "d", "e"), "train/, a/, b/, c/, d/, ..."),
    ):
        root = f"of {' '.join(tops)}"
        touch(tmp_path / root, *(f"{top}/{kind}/1.mp4" for top in tops for kind in "AB"))
        line = script("folder", "--videos", root, annotations=False, fails=True)
        assert line == (
            f"{root}: found {found}: expected class folders alone, or train/ with val/ (or "
            "validation/, test/) alone and the class folders in these (rename a class that is "
            "called like a split)"
        )
        assert not (tmp_path / "out").exists()
    touch(tmp_path / "videos", "train/1.mp4", "valid/2.mp4")  # no class folders at all
    assert script("folder", annotations=False, fails=True).startswith(
        "videos: found train/, valid/"
    )


def test_folder_given_split_with_videos_in_no_class_folder(script, tmp_path):
    for root, names, where in (
        ("a", ("train/A/1.mp4", "train/B/2.mp4", "test/3.mp4"), "test/"),
        ("b", ("train/A/1.mp4", "val/2.mp4", "test/A/3.mp4"), "val/"),
        ("c", ("train/1.mp4", "val/A/2.mp4"), "train/"),
        ("d", ("train/A/1.mp4", "val/2.mp4", "validation/3.mp4"), "val/ and validation/"),
    ):
        touch(tmp_path / root, *names)
        assert script("folder", "--videos", root, annotations=False, fails=True) == (
            f"{root}: found no videos in class folders in {where}: expected CLASS/*.mp4 in train/ "
            "and in val/ (or validation/, test/)"
        )
        assert not (tmp_path / "out").exists()


def test_folder_takes_a_video_with_two_extensions_once(script, tmp_path):
    touch(
        tmp_path / "videos",
        *(f"a/{i}.{extension}" for i in range(10) for extension in ("mov", "webm")),
        *(f"b/{i}.mp4" for i in range(10)),
        "b/0.avi",
    )
    printed = script("folder", "--val", 0.5, annotations=False)
    assert "11 files are left out: the same video is there with another extension" in printed
    both = rows(tmp_path / "out/train.csv") + rows(tmp_path / "out/val.csv")
    assert sorted(name for name, *_ in both) == sorted(
        [f"a/{i}.webm" for i in range(10)] + [f"b/{i}.mp4" for i in range(10)]
    )


def test_folder_errors(script, tmp_path):
    (tmp_path / "videos").mkdir()
    line = script("folder", annotations=False, fails=True)
    assert (
        line
        == "videos: expected videos in class folders (.mp4, .mkv, .webm, .avi, .mov), found none "
        "(--videos sets the folder)"
    )
    assert (
        script("folder", "--val", 1, annotations=False, fails=True)
        == "--val 1: expected a share between 0 and 1"
    )
    assert script("folder", "--group", "(", annotations=False, fails=True).startswith(
        "--group '(': is no regular expression ("
    )
    assert script("folder", "--group", "x", annotations=False, fails=True) == (
        "--group 'x': expected parentheses around what names the group"
    )
    touch(tmp_path / "videos", os.fsdecode(b"a/\xff.mp4"), "a/b.mp4", "a/c.mp4")
    assert script("folder", annotations=False, fails=True).endswith(
        "a name that is not UTF-8: rename the file"
    )
    root = tmp_path / "other"
    touch(root, os.fsdecode(b"\xff/1.mp4"), os.fsdecode(b"\xff/2.mp4"))
    assert script("folder", "--videos", "other", annotations=False, fails=True) == (
        r"'\udcff/1.mp4': a name that is not UTF-8: rename the file"
    )
    touch(tmp_path / "mine", "a/1.mp4", "a/2.mp4")
    wrong = ("--videos", "mine", "--out", os.fsdecode(b"\xff"))
    assert script("folder", *wrong, annotations=False, fails=True) == (
        r"'\udcff': a name that is not UTF-8: rename the file"
    )


# ---- what they share -----------------------------------------------------------------------------


def test_links(script, tmp_path):
    """Linked folders are followed, loops of links are not, and paths hold where the output
    folder is itself a link.
    """
    touch(tmp_path / "disk", "a/1.mp4", "b/2.mp4")
    touch(tmp_path / "videos", "a/3.mp4")
    (tmp_path / "videos/b").symlink_to(tmp_path / "disk/b")
    (tmp_path / "videos/a/loop").symlink_to(tmp_path / "videos")
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "far/away")
    assert script("folder", annotations=False, fails=True) == (
        "videos: expected a class of two groups or more to draw val.csv from, found none (--group)"
    )
    touch(tmp_path / "videos", "a/4.mp4")
    script("folder", annotations=False)
    found = [
        video.path
        for split in ("train", "val")
        for video in read_manifest(tmp_path / f"out/{split}.csv")
    ]
    assert len(found) == 3 and all(map(os.path.isfile, found))
    assert all(not os.path.isabs(path) for path in column(tmp_path / "out/train.csv", "path"))


def test_links_that_lead_nowhere_and_unreadable_folders(script, tmp_path, monkeypatch):
    touch(tmp_path / "videos", "a/1.mp4", "a/2.mp4", "a/locked/3.mp4")
    (tmp_path / "videos/a/4.mp4").symlink_to("gone.mp4")
    (tmp_path / "videos/a/5.mp4").symlink_to("5.mp4")
    (tmp_path / "videos/a/6.mp4").symlink_to("1.mp4")
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    printed = script("folder", annotations=False)
    assert (
        "warning: videos/a/locked: cannot be read (Permission denied): nothing of it is listed\n"
        in printed
    )
    found = [*column(tmp_path / "out/train.csv", "path"), *column(tmp_path / "out/val.csv", "path")]
    assert sorted(found) == ["../videos/a/1.mp4", "../videos/a/2.mp4", "../videos/a/6.mp4"]


def test_files_that_macos_leaves_beside_the_real_ones(script, tmp_path):
    """A file ._NAME is neither a video nor a list."""
    touch(tmp_path / "videos", "a/1.mp4", "a/._1.mp4", "a/2.mp4", "._a/3.mp4")
    assert "no classes" not in script("folder", annotations=False)
    found = [*column(tmp_path / "out/train.csv", "path"), *column(tmp_path / "out/val.csv", "path")]
    assert sorted(found) == ["../videos/a/1.mp4", "../videos/a/2.mp4"]
    put(tmp_path / "lists/a_test_split1.txt", "1.avi 1", "2.avi 2")
    (tmp_path / "lists/._a_test_split1.txt").write_bytes(b"\0\5\x16\7\xff")
    script("hmdb51", "--out", "hmdb51")
    assert (tmp_path / "hmdb51/classes.txt").read_text() == "a\n"
    put(tmp_path / "lists/train.csv", HEADER, "abseiling,1,0,10,train,0")
    for name in ("._train.csv", "._train.txt"):
        (tmp_path / "lists" / name).write_bytes(b"youtube_id\xff")
    script("kinetics", "--out", "kinetics")
    assert rows(tmp_path / "kinetics/train.csv") == [("a/1.mp4", "0", None, None)]


@pytest.mark.parametrize(
    "name, defaults",
    [
        ("folder", ["data/folder/videos", "data/folder", "0.2", "0"]),
        ("kinetics", ["data/kinetics/videos", "data/kinetics", "data/kinetics/annotations"]),
        ("epic", ["data/epic/videos", "data/epic", "data/epic/annotations", "verb"]),
        ("ucf101", ["data/ucf101/videos", "data/ucf101", "data/ucf101/annotations", "1"]),
        ("hmdb51", ["data/hmdb51/videos", "data/hmdb51", "data/hmdb51/annotations", "1"]),
        ("ssv2", ["data/ssv2/videos", "data/ssv2", "data/ssv2/annotations"]),
        ("diving48", ["data/diving48/videos", "data/diving48", "data/diving48/annotations"]),
    ],
)
def test_help_says_the_defaults(name, defaults, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    printed = run(f"data/{name}.py", "--help")
    for default in defaults:
        assert f"(default: {default})" in printed


def test_run_as_a_user_does(tmp_path):
    touch(tmp_path / "videos", "a/1.mp4", "a/2.mp4")
    out = run("data/folder.py", "--videos", "videos", "--out", "out", cwd=tmp_path, process=True)
    assert "out/train.csv: 1 rows, 1 classes, 0 videos missing, 0 duplicates" in out
    line = run(
        "data/kinetics.py",
        "--videos",
        "videos",
        "--out",
        "out",
        cwd=tmp_path,
        process=True,
        fails=True,
    )
    assert line == (
        "data/kinetics/annotations: no such file or folder "
        "(--annotations sets the folder or the files)"
    )


def test_the_example_of_group_takes_any_name(script, tmp_path):
    """The regular expression that folder.py's docstring shows, on names of UCF's kind and on
    ordinary ones.
    """
    example = re.search(r"--group '(.*)'", (ROOT / "data/folder.py").read_text())[1]
    names = [
        "v_Archery_g01_c02",
        "v_Archery_g01_c03",
        "v_Archery_g02_c01",
        "holiday",
        "IMG_1234",
        "my clip (2)",
    ]
    groups = [re.search(example, name)[1] for name in names]
    assert groups == [
        "v_Archery_g01",
        "v_Archery_g01",
        "v_Archery_g02",
        "holiday",
        "IMG_1234",
        "my clip (2)",
    ]
    touch(tmp_path / "videos", *(f"{kind}/{name}.mp4" for kind in ("a", "b") for name in names))
    script("folder", "--val", 0.4, "--group", example, annotations=False)
    both = [
        {os.path.basename(row[0]) for row in rows(tmp_path / f"out/{split}.csv")}
        for split in ("train", "val")
    ]
    assert not both[0] & both[1] and len(both[0] | both[1]) == len(names)
    together = {"v_Archery_g01_c02.mp4", "v_Archery_g01_c03.mp4"}
    assert together <= both[0] or together <= both[1]
    assert "make optional what some names lack" in script(
        "folder", "--group", r"(.*)_c\d+$", annotations=False, fails=True
    )


# ---- the toy world's models ----------------------------------------------------------------------


def test_toy_models_go_to_out(tmp_path, monkeypatch):
    import toy_models

    calls = []
    monkeypatch.setattr(toy_models, "main", calls.append)
    run("data/toy.py", "--train-models", "--seed", 3, "--out", tmp_path)
    run("data/toy.py", "--train-models")
    assert calls == [
        ["--seed", "3", "--out", f"{tmp_path}/toy"],
        ["--seed", "0", "--out", "data/toy"],
    ]


@pytest.mark.parametrize("steps", [0, -1])
def test_toy_models_need_a_step(tmp_path, steps):
    line = run("data/toy_models.py", "--steps", steps, "--out", tmp_path, fails=True)
    assert line.endswith(
        f"argument --steps: expected 1 to 2147483647, found {steps} (--help lists the flags)"
    )
    assert not list(tmp_path.iterdir())
