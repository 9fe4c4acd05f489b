"""Bad files: each ends in one reason, none takes anything else down. Planted ones through every
stage, and seeded damage at random.
"""

import csv
import json
import multiprocessing
import os

import numpy as np
import pytest
from conftest import BLIP, CLIP, run
from test_video import pictures, write

from tgm import prepare, video
from tgm.video import VideoError, VideoReader


def plant(folder):
    """Writes bad files of every kind that comes to mind into a folder: {name: whether a frame
    can be had of it}.
    """
    good = open(
        write(folder / "good.mp4", pictures(30, 64, 64), fps=10, options={"g": "10"}), "rb"
    ).read()
    rng, files = np.random.default_rng(0), {}

    def put(name, data, readable=False):
        (folder / name).write_bytes(data)
        files[name] = readable

    for tenth in range(1, 10):
        put(f"cut{tenth}.mp4", good[: len(good) * tenth // 10])  # the index is at the end
    flipped = bytearray(good)
    for place in rng.integers(1000, len(good) - 2000, 60):
        flipped[place] ^= 255
    put("flipped.mp4", flipped)
    put("zeroed.mp4", good[:1500] + bytes(4000) + good[5500:])
    put("noise.mp4", rng.bytes(5000))
    put("empty.mp4", b"")
    put("text.mp4", b"path,label\na.mp4,1\n" * 50)
    put("picture.mp4", b"\x89PNG\r\n\x1a\n" + bytes(100))
    put("playlist.mp4", b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:1/a.ts\n")
    put(
        "index.mp4",
        good[: good.rindex(b"stsz") + 4] + b"\xff" * 12 + good[good.rindex(b"stsz") + 16 :],
    )
    put("wrong.avi", good, True)  # the name does not matter
    put("twice.mp4", good + good, True)  # the second is not looked at
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "nowhere.mp4")
    files |= {"folder.mp4": False, "loop.mp4": False, "dangling.mp4": False, "gone.mp4": False}
    huge = bytearray(
        open(
            write(
                folder / "mjpeg.avi", pictures(5, 64, 64), codec="mjpeg", pix_fmt="yuvj420p", fps=10
            ),
            "rb",
        ).read()
    )
    place = -1
    while (place := huge.find(b"\xff\xc0\x00\x11\x08", place + 1)) >= 0:
        huge[place + 5 : place + 9] = (
            b"\x75\x30\x75\x30"  # 30,000 x 30,000 pixels: 2.7 GB a picture
        )
    put("huge.avi", huge)
    put(
        "one.mp4",
        open(write(folder / "single.mp4", pictures(1, 64, 64), fps=10), "rb").read(),
        True,
    )
    pts = [-7, -3, 0, 4, 9, 13, 20]
    put(
        "negative.mkv",
        open(
            write(folder / "n.mkv", pictures(7, 64, 64), pts=pts, tick=prepare.Fraction(1, 10)),
            "rb",
        ).read(),
        True,
    )
    os.mkfifo(folder / "pipe.mp4")  # to open it would wait for somebody to write
    files["pipe.mp4"] = False
    if os.geteuid():
        put("forbidden.mp4", good)
        (folder / "forbidden.mp4").chmod(0)
    for name in ("good.mp4", "mjpeg.avi", "single.mp4", "n.mkv"):
        (folder / name).unlink()
    return files


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return folder, plant(folder)


def test_each_bad_file_has_one_reason(planted):
    folder, files = planted
    for name, readable in files.items():
        found = prepare.probe(str(folder / name))
        assert (found.error is None) == readable, (name, found)
        assert found.error is None or "\n" not in found.error and len(found.error) < 300
        if not readable:
            with (
                pytest.raises(VideoError, match=f"^{folder / name}: "),
                VideoReader(folder / name) as reader,
            ):
                reader.read([0, reader.duration / 2, reader.duration])


def test_every_stage_survives_them_and_the_rest_is_untouched(planted, world, tmp_path):
    """Good and bad files mixed: what the stages write for the good ones equals a run without the
    bad ones, bit for bit.
    """
    folder, files = planted
    bad = [name for name, readable in files.items() if not readable]
    with open(world / "data/train.csv", newline="") as file:
        good = [
            (str(world / "data" / line["path"]), line["label"]) for line in csv.DictReader(file)
        ][:16]
    mixed = []
    for index in range(max(len(good), len(bad))):
        mixed += [(str(folder / bad[index]), "bad")] if index < len(bad) else []
        mixed += [good[index]] if index < len(good) else []
    kept = [index for index, (_, label) in enumerate(mixed) if label != "bad"]
    for name, rows in (("mixed", mixed), ("good", good)):
        (tmp_path / f"{name}.csv").write_text(
            "path,label\n"
            + "".join(f"{path},{label.replace('bad', 'spin')}\n" for path, label in rows)
        )
        for stage in (
            ("caption.py", "--model", BLIP),
            ("saliency.py", "--clip", CLIP, "--moments", 2),
            ("saliency.py", "--cue", "motion", "--moments", 4, "--grid", 4),
        ):
            run(
                stage[0],
                "--data",
                f"{name}.csv",
                *stage[1:],
                "--batch-size",
                1,
                "--workers",
                1,
                cwd=tmp_path,
            )
    texts = {
        name: [
            json.loads(line)
            for line in (tmp_path / f"{name}.captions.jsonl").read_text().splitlines()
        ]
        for name in ("mixed", "good")
    }
    assert [texts["mixed"][index] for index in kept] == texts["good"]
    assert all(
        ("error" in entry) == (index not in kept) for index, entry in enumerate(texts["mixed"])
    )
    for kind in ("text", "saliency", "motion"):
        whole, alone = (np.load(tmp_path / f"{name}.{kind}.npy") for name in ("mixed", "good"))
        assert (
            np.array_equal(whole[kept], alone)
            and np.isnan(np.delete(whole, kept, 0)).all()
            and np.isfinite(alone).all()
        )

    tiny = "--size tiny --batch-size 4 --epochs 1 --warmup-epochs 0 --workers 1".split()
    out = run(
        "pretrain.py",
        "--data",
        "mixed.csv",
        *tiny,
        *"--mask text --picture-every 0 --out text".split(),
        cwd=tmp_path,
    )
    assert f"16 of {len(mixed)} videos usable" in out
    run(
        "pretrain.py",
        "--data",
        "mixed.csv",
        *tiny,
        *(
            "--mask tube --nce-weight 0 --companions none --max-bad 1 --picture-every 0 --out tube"
        ).split(),
        cwd=tmp_path,
    )
    last = json.loads((tmp_path / "tube/log.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] > 10 and np.isfinite(last["loss_mae"])
    run(
        "finetune.py",
        "--data",
        "mixed.csv",
        "--val",
        "mixed.csv",
        *tiny,
        *"--max-bad 1 --views 1 1 --out tuned".split(),
        cwd=tmp_path,
    )
    assert json.loads((tmp_path / "tuned/test.json").read_text())["unreadable"] == len(bad)
    for name in ("mixed", "good"):
        run(
            "linprobe.py",
            "--checkpoint",
            "tube/checkpoint.pt",
            "--data",
            f"{name}.csv",
            *"--test good.csv --seeds 1 --batch-size 1 --workers 1".split(),
            "--out",
            name,
            cwd=tmp_path,
        )
    results = [
        json.loads((tmp_path / name / "label.json").read_text()) for name in ("mixed", "good")
    ]
    assert results[0]["unreadable"] == len(bad) and results[0]["train"] == results[1]["train"] == 16
    assert all(results[0][key] == results[1][key] for key in ("linear", "knn", "majority"))


def test_a_video_that_takes_too_long_is_given_up(world, copy, tmp_path, monkeypatch):
    """The clock is looked at between packets, and not stopped by the second way of decoding;
    every stage has the flag.
    """
    path = write(
        tmp_path / "long.mp4",
        pictures(300, 64, 64),
        fps=10,
        options={"g": "1000", "sc_threshold": "0"},
    )
    now = [0.0]
    # each look at the clock is a second
    monkeypatch.setattr(video, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    with VideoReader(path, timeout=900) as reader:
        assert reader.read([29.0]).shape == (1, 64, 64, 3)
        with pytest.raises(VideoError, match=f"^{path}: reading it takes more than 900 s"):
            reader.read([29.0])
    with VideoReader(path, timeout=20) as reader, pytest.raises(VideoError, match="more than 20 s"):
        reader.read([29.0])
    monkeypatch.undo()
    for args in (
        ("saliency.py", "--data", "data/train.csv", "--clip", CLIP, "--out", "none"),
        ("saliency.py", "--data", "data/train.csv", "--cue", "motion", "--out", "none"),
    ):
        assert "none of its videos gave a row" in run(
            *args, "--workers", 0, "--video-timeout", 1e-9, cwd=copy, fails=True
        )
    line = run(
        "caption.py",
        "--data",
        "data/train.csv",
        "--model",
        BLIP,
        *"--resume none --workers 0 --video-timeout 1e-9".split(),
        cwd=copy,
        fails=True,
    )
    assert (
        line
        == "data/train.captions.jsonl: none of the videos could be captioned; the reasons are in it"
    )
    assert all(
        "more than 1e-09 s (the stages' --video-timeout allows more)" in json.loads(line)["error"]
        for line in (copy / "data/train.captions.jsonl").read_text().splitlines()
    )
    assert "no video has a caption" in run(
        "saliency.py",
        "--data",
        "data/train.csv",
        "--clip",
        CLIP,
        "--out",
        "other",
        cwd=copy,
        fails=True,
    )
    assert (
        not np.isfinite(np.load(copy / "none.saliency.npy")).any()
        and not np.isfinite(np.load(copy / "none.motion.npy")).any()
    )
    bare = ("pretrain.py", "--mask", "tube", "--nce-weight", 0, "--companions", "no")
    line = run(
        *bare,
        *"--size tiny --batch-size 4 --workers 0 --video-timeout 1e-9".split(),
        cwd=copy,
        fails=True,
    )
    assert "nine videos drawn in its place cannot be read" in line
    line = run(
        "finetune.py",
        *"--size tiny --batch-size 4 --workers 0 --video-timeout 1e-9".split(),
        cwd=copy,
        fails=True,
    )
    assert "nine videos drawn in its place cannot be read" in line
    assert "0 readable videos" in run(
        "linprobe.py",
        *"--checkpoint none --size tiny --workers 0 --video-timeout 1e-9".split(),
        cwd=copy,
        fails=True,
    )


# ---- damage at random


SOURCES = {
    "h264.mp4": {"options": {"g": "12"}},
    "h264.mkv": {"options": {"g": "12"}},
    "h264.ts": {"options": {"g": "12"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 2},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


def damage(data, rng):
    """A copy of a file's bytes: cut, with some bits flipped, a stretch zeroed, its header
    overwritten, or a piece left out.
    """
    data, kind = bytearray(data), rng.integers(5)
    a, b = sorted(rng.integers(0, len(data), 2))
    if kind == 0:
        return data[:b]
    if kind == 1:
        for place in rng.integers(0, len(data), rng.integers(1, 40)):
            data[place] ^= 1 << int(rng.integers(8))
    if kind == 2:
        data[a : a + 3000] = bytes(len(data[a : a + 3000]))
    if kind == 3:
        a = int(rng.integers(min(2000, len(data))))
        data[a : a + 32] = rng.bytes(len(data[a : a + 32]))
    return data[:a] + data[b:] if kind == 4 else data


def try_one(job):
    """What reading a damaged file came to, in a process of its own: "ok" or "VideoError" for
    frames, and for vectors.
    """
    source, path, seed = job
    with open(source, "rb") as file:
        data = damage(file.read(), np.random.default_rng(seed))
    with open(path, "wb") as file:
        file.write(data)
    outcome = []
    for vectors in (False, True):
        try:
            with VideoReader(path, vectors) as reader:
                frames = (
                    reader.read_vectors(np.arange(40) / 10)
                    if vectors
                    else reader.read(np.linspace(0, 3.9, 8), (32, 32))
                )
            assert vectors or frames.shape == (8, 32, 32, 3)
            outcome.append("ok")
        except VideoError as error:
            assert str(error).startswith(path) and "\n" not in str(error)
            outcome.append("VideoError")
    return outcome


def fuzz(folder, count):
    sources = {
        name: write(folder / name, pictures(40, 64, 80), fps=10, **how)
        for name, how in SOURCES.items()
    }
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(
        1
    ) as pool:  # a crash of libav would end this process alone: then get() waits
        for seed in range(count):
            name = list(sources)[seed % len(sources)]
            outcomes.append(
                pool.apply_async(
                    try_one, ((sources[name], str(folder / f"damaged.{name}"), seed),)
                ).get(timeout=60)
            )
    assert len(outcomes) == count and {"ok", "VideoError"} == {
        outcome for pair in outcomes for outcome in pair
    }
    return outcomes


def test_a_hundred_damaged_files(tmp_path):
    fuzz(tmp_path, 100)


@pytest.mark.slow
def test_two_thousand_damaged_files(tmp_path):
    outcomes = fuzz(tmp_path, 2000)
    print(sum(frames == "ok" for frames, _ in outcomes), "of 2000 gave frames")
