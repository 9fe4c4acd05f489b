"""Files under stages 1 and 2 and the check: replaced and missing videos, outputs that are not ours,
full disks and shared memory, signals, several ranks and nodes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import BLIP, CLIP, ENVIRONMENT, ROOT, outputs, run

from tgm import arrays as A
from tgm import manifest as M
from tgm.run import part_of_rank

STAGES = {
    "captions": ("caption.py", "--data", "data/train.csv", "--model", BLIP, "--workers", 0),
    "text": (
        "saliency.py",
        "--data",
        "data/train.csv",
        "--clip",
        CLIP,
        "--moments",
        8,
        "--workers",
        0,
    ),
    "motion": (
        "saliency.py",
        *"--data data/train.csv --cue motion --moments 16 --grid 8 --workers 0".split(),
    ),
}


def videos_of(folder, name="train"):
    return M.read_manifest(folder / f"data/{name}.csv")


def start(command, cwd, environment=(), launcher=()):
    words = [sys.executable, *launcher, *map(str, command)]
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=ENVIRONMENT | dict(environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def children(process):
    return list(
        map(
            int,
            subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            ).stdout.split(),
        )
    )


def wait_until(condition, process, seconds=90):
    until = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.05)


# ---- videos replaced under the same names, and the same names in another folder


def test_which_rows_are_looked_at():
    assert M.sampled_rows(3) == [0, 1, 2] and M.sampled_rows(100) == list(range(100))
    rows = M.sampled_rows(1_000_000)
    assert (
        len(set(rows)) == 100
        and rows[0] == 0
        and rows[-1] == 999_999
        and set(np.diff(rows)) == {10_101}
    )


def test_sizes_tell_replaced_files_from_missing_ones(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(b"x" * (10 + number))
    (tmp_path / "a.csv").write_text("path\n" + "".join(f"{number}.mp4\n" for number in range(5)))
    videos = M.read_manifest(tmp_path / "a.csv")
    about = {"videos": 5, "files": M.file_sizes(videos)}
    assert about["files"] == [10, 11, 12, 13, None] and M.changed_rows(videos, about) == {}
    (tmp_path / "1.mp4").write_bytes(b"y" * 11)  # of the same size: not noticed, as said
    (tmp_path / "2.mp4").write_bytes(b"y" * 99)
    (tmp_path / "3.mp4").unlink()
    (tmp_path / "4.mp4").write_bytes(b"y")  # was missing
    assert M.changed_rows(videos, about) == {2: (12, 99)}
    assert M.renewed_sizes(videos, about) == [10, 11, 99, 13, 1]
    shutil.copytree(tmp_path, tmp_path / "b")
    elsewhere = M.read_manifest(tmp_path / "a.csv", root=tmp_path / "b")
    assert M.file_sizes(elsewhere) == M.file_sizes(videos)
    (tmp_path / "b/0.mp4").write_bytes(b"another video")
    assert M.file_sizes(elsewhere) != M.file_sizes(videos)


def test_a_toy_world_made_again_with_another_seed_is_noticed_by_all_that_hangs_off_it(tmp_path):
    world = ("data/toy.py", "--train", 6, "--val", 4, "--workers", 1)
    run(*world, cwd=tmp_path, process=True)
    for stage in STAGES.values():
        run(*stage, cwd=tmp_path)
    videos = videos_of(tmp_path)
    A.open_array(tmp_path / "data/train.saliency.npy", videos, "")
    run(*world, "--seed", 1, cwd=tmp_path, process=True)
    for name, stage in STAGES.items():
        line = run(*stage, cwd=tmp_path, fails=True)
        assert (
            "videos have changed since it was made: data/videos/train/00000.mp4 had " in line
            and "--resume none" in line
        ), (name, line)
    for kind in ("text", "saliency", "motion"):
        with pytest.raises(
            M.ManifestError,
            match=(
                "videos have changed since it was made.*; make it with: one && two --resume none$"
            ),
        ):
            A.open_array(tmp_path / f"data/train.{kind}.npy", videos, "one && two")
    assert "videos have changed" in run(
        "pretrain.py", "--mask", "text", "--size", "tiny", "--workers", 0, cwd=tmp_path, fails=True
    )
    before = (tmp_path / "data/train.captions.jsonl").read_text()
    for stage in STAGES.values():
        run(*stage, "--resume", "none", cwd=tmp_path)
    assert (tmp_path / "data/train.captions.jsonl").read_text() != before
    A.open_array(tmp_path / "data/train.saliency.npy", videos, "")


def test_the_same_videos_in_another_folder_are_the_same_and_others_are_not(copy):
    names = [video.name for video in videos_of(copy)]
    for name in names:
        for folder in ("same", "other"):
            (copy / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy / "data" / name, copy / folder / name)
    os.utime(copy / "same" / names[0], (0, 0))
    with open(copy / "other" / names[31], "ab") as file:
        file.write(b"a byte more")
    for stage in STAGES.values():
        run(*stage, "--root", "same", cwd=copy)
        line = run(*stage, "--root", "other", cwd=copy, fails=True)
        assert f"videos have changed since it was made: other/{names[31]} had " in line


def test_a_video_that_failed_may_be_put_right(copy):
    """Only rows that are made can be stale; and the .json then knows the new size."""
    names = [video.name for video in videos_of(copy)][:3]
    (copy / "data/few.csv").write_text(
        "path\n" + "".join(f"{name}\n" for name in (names[0], "bad.mp4", names[2]))
    )
    (copy / "data/bad.mp4").write_bytes(b"not a video")
    stages = [(stage[0], "--data", "data/few.csv", *stage[3:]) for stage in STAGES.values()]
    for stage in stages:
        run(*stage, cwd=copy)
    about = json.loads((copy / "data/few.motion.json").read_text())
    assert about["files"][1] == 11 and A.filled(np.load(copy / "data/few.motion.npy")).tolist() == [
        True,
        False,
        True,
    ]
    shutil.copy(copy / "data" / names[1], copy / "data/bad.mp4")
    for stage in stages:
        # since the captions are others
        run(*stage, *(("--resume", "none") if "--clip" in stage else ()), cwd=copy)
    size = os.stat(copy / "data/bad.mp4").st_size
    for kind in ("captions", "motion", "saliency"):
        assert json.loads((copy / f"data/few.{kind}.json").read_text())["files"][1] == size
    assert A.filled(np.load(copy / "data/few.motion.npy")).all()


def test_captions_of_other_times_are_refused(copy):
    name = videos_of(copy)[0].name
    spans = copy / "data/spans.csv"
    spans.write_text(f"path,start,end\n{name},0,1\n{name},1,2\n")
    run("caption.py", "--data", spans, *STAGES["captions"][3:], cwd=copy)
    path = copy / "data/spans.captions.jsonl"
    assert len(A.read_captions(path, M.read_manifest(spans), "")) == 2
    spans.write_text(f"path,start,end\n{name},0,1\n{name},0.5,2\n")
    line = run("saliency.py", "--data", spans, *STAGES["text"][3:], cwd=copy, fails=True)
    assert line == (
        f"{path}: is of another manifest (other start or end); make it with: python "
        f"caption.py --data {spans} --resume none"
    )
    assert "another manifest" in run(
        "caption.py", "--data", spans, *STAGES["captions"][3:], cwd=copy, fails=True
    )


def test_a_model_that_cannot_be_loaded_leaves_nothing_to_refuse_the_next(copy):
    (copy / "data/few.csv").write_text("path\n" + videos_of(copy)[0].name + "\n")
    assert "cannot load it" in run(
        "caption.py", "--data", "data/few.csv", "--model", copy / "nowhere", cwd=copy, fails=True
    )
    assert "1 videos captioned" in run(
        "caption.py", "--data", "data/few.csv", *STAGES["captions"][3:], cwd=copy
    )


# ---- what is said of missing videos, gaps, and rows that two manifests share


def test_where_no_video_is_there_the_folder_is_named_before_anything_is_loaded(copy):
    (copy / "away").mkdir()
    shutil.move(copy / "data/train.csv", copy / "away/train.csv")
    name = M.read_manifest(copy / "away/train.csv")[0].name
    expected = (
        f"away/train.csv: none of its 32 videos is there: searched {copy}/away for {name} "
        f"and so on; "
        f"--root FOLDER sets where relative paths start"
    )
    for command in (
        ("caption.py", "--data", "away/train.csv", "--model", "nowhere"),
        ("saliency.py", "--data", "away/train.csv", "--cue", "motion"),
        ("tgm.prepare", "away/train.csv"),
        ("tgm.prepare", "away/train.csv", "--reencode", "small"),
    ):
        assert run(*command, cwd=copy, fails=True) == expected
    assert os.listdir(copy / "away") == ["train.csv"]
    run("caption.py", "--data", "away/train.csv", "--labels", cwd=copy)  # needs no videos
    assert run("tgm.prepare", "away/train.csv", "--root", "data", "--workers", 1, cwd=copy)
    (copy / "away/train.csv").write_text("path\n/no/a.mp4\n")
    assert run(
        "caption.py",
        *"--data away/train.csv --model nowhere --resume none".split(),
        cwd=copy,
        fails=True,
    ) == (
        "away/train.csv: none of its 1 videos is there, the first being /no/a.mp4: correct "
        "the paths in the manifest"
    )


def test_a_half_made_array_is_described():
    assert A.describe_gaps("x.npy", np.array([True, False, True])) == (
        "x.npy: 2 of 3 rows are made; the rest failed or are still to do, and are left out"
    )
    assert A.describe_gaps("x.npy", np.ones(3, bool)) == ""


def test_rows_that_two_manifests_share(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.csv").write_text("path,start,end\nx.mp4,0,1\nx.mp4,1,2\ny.mp4,,\n")
    (tmp_path / "sub/b.csv").write_text(
        "path,start,end,label\n../x.mp4,1,2,w\n../y.mp4,,1,w\nz.mp4,,,w\n../y.mp4,,,v\n"
    )
    a, b = M.read_manifest(tmp_path / "a.csv"), M.read_manifest(tmp_path / "sub/b.csv")
    assert M.shared_rows(a, b) == 2 and M.shared_rows(b, a) == 2 and M.shared_rows(a, a) == 3
    assert M.shared_rows(a, M.read_manifest(tmp_path / "a.csv", root=tmp_path / "sub")) == 0


# ---- outputs that are not ours


def test_nothing_that_is_not_ours_is_overwritten(copy):
    video = videos_of(copy)[0].name
    (copy / "link.csv").symlink_to("data/train.csv")
    (copy / "train.json").write_text('[{"id": 1}]')
    (copy / "notes.motion.npy").write_text("notes")
    (copy / "x.saliency.json").write_text('{"mine": 1}')
    with open(copy / "data/train.check.csv", "w") as file:
        file.write("my,own\n")
    kept = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    caption = ("caption.py", "--data", "data/train.csv", "--model", BLIP, "--workers", 0, "--out")
    motion = ("saliency.py", *STAGES["motion"][1:], "--out")
    text = ("saliency.py", *STAGES["text"][1:], "--out")
    ours = "is there, and is none of the files that this command writes: not overwritten"
    for resume in ("auto", "none"):
        for command, expected in (
            ((*caption, "data/train.csv"), f"data/train.csv: {ours} (--out writes elsewhere)"),
            ((*caption, "link.csv"), f"link.csv: {ours}"),
            ((*caption, f"data/{video}"), f"data/{video}: {ours}"),
            ((*caption, "data"), "data: is a folder"),
            ((*caption, "train.jsonl"), f"train.json: {ours}"),
            ((*caption, "new.json"), "--out new.json: expected a name that ends in .jsonl"),
            ((*caption, "."), "--out .: expected a name that ends in .jsonl"),
            ((*caption, "data/train.motion.jsonl"), f"data/train.motion.json: {ours}"),
            (
                (*caption, "data/train.csv/x.jsonl"),
                "--out data/train.csv: is a file, expected a folder",
            ),
            ((*motion, "notes"), f"notes.motion.npy: {ours}"),
            ((*text, "x"), f"x.saliency.json: {ours}"),
            (
                (*motion, "data/"),
                "--out data/: is a folder; give what the files' names begin with, such as "
                "--out data/train",
            ),
        ):
            assert run(*command, "--resume", resume, cwd=copy, fails=True).startswith(expected)
    assert run(
        "caption.py",
        *"--data data/train.csv --labels --out data/train.csv".split(),
        cwd=copy,
        fails=True,
    ).startswith(f"data/train.csv: {ours}")
    for flags, expected in (
        ((), f"data/train.check.csv: {ours} (move it away)"),
        (
            ("--reencode", "data"),
            "--reencode data: the copy of data/videos/train/00000.mp4 would be the video "
            "data/videos/train/00000.mp4 itself",
        ),
        (("--reencode", "link.csv"), "--reencode link.csv: is a file, expected a folder"),
    ):
        assert run(
            "tgm.prepare", "data/train.csv", *flags, "--workers", 1, cwd=copy, fails=True
        ).startswith(expected)
    (copy / "data/train.check.csv").unlink()
    assert run(
        "tgm.prepare", "data/train.csv", "--good", "data/val.csv", cwd=copy, fails=True
    ).startswith("data/val.csv: exists already: not overwritten (--good names another file")
    assert run(
        "tgm.prepare", "data/train.csv", "--good", "data/train.csv", cwd=copy, fails=True
    ).startswith("data/train.csv: exists already: not overwritten (--good names another file")
    (copy / "small").mkdir()
    shutil.copy(copy / "data/val.csv", copy / "small/train.csv")
    assert run(
        "tgm.prepare", "data/train.csv", "--reencode", "small", cwd=copy, fails=True
    ).startswith(f"small/train.csv: {ours}")
    assert run(
        "tgm.prepare",
        "data/train.csv",
        "--root",
        "data",
        "--reencode",
        "data",
        cwd=copy,
        fails=True,
    ).startswith("--reencode data: the copy")
    (copy / "small/train.csv").unlink()
    assert os.listdir(copy / "small") == []
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    del kept[copy / "data/train.check.csv"]
    assert after == kept


def test_numbers_out_of_range_are_refused(copy):
    for flags in (
        ("--moments", 0),
        ("--cue", "motion", "--window", "nan"),
        ("--cue", "motion", "--window", -1),
    ):
        assert "expected " in run(
            "saliency.py", "--data", "data/train.csv", *flags, cwd=copy, fails=True
        )
    assert "expected 1 to 1024, found 0" in run(
        "tgm.prepare", "data/train.csv", "--workers", 0, cwd=copy, fails=True
    )


# ---- disks that are full or cannot be written to, and shared memory that is full


def mounted(cwd, mounts, command):
    """Runs a command where the folders of {folder: options} are small disks of its own, filled
    from FOLDER.from if that is there.
    """
    script = ""
    for folder, options in mounts.items():
        script += (
            f"mount -t tmpfs -o {options} tmpfs {folder} && if [ -e {folder}.from ]; then cp -a "
            f"{folder}.from/. {folder}; fi && "
        )
        if "nr_inodes" in options:  # a sign to make it read-only
            script += f"mount -o remount,ro {folder} && "
    words = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script + 'exec "$@"',
        "sh",
        sys.executable,
        *map(str, command),
    ]
    began = time.time()
    done = subprocess.run(
        words, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=120
    )
    return done, time.time() - began


@pytest.fixture
def disks(copy):
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    )
    if tried.returncode != 0:
        pytest.skip("small disks need root")
    (copy / "disk").mkdir()
    return copy


READ_ONLY = "size=1m,nr_inodes=1k"


@pytest.mark.parametrize("name", ["captions", "motion"])
def test_full_shared_memory_is_one_line_and_no_hang(disks, name):
    command = [
        ROOT / STAGES[name][0],
        *STAGES[name][1:-1],
        1,
        "--resume",
        "none",
        *(("--moments", 100) if name == "motion" else ()),
    ]
    done, _ = mounted(disks, {"/dev/shm": "size=64k"}, command)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    if torch.__version__ < (2, 14) and "exited unexpectedly" in line:
        assert "shared memory: docker run --shm-size=16g" in line  # torch 2.8 does not tell more
        return
    assert line == (
        "a decoding process found no room in shared memory (/dev/shm): give the container "
        "more (docker run --shm-size=16g), "
        "or lower --batch-size or --workers; --workers 0 needs none"
    )


def test_captions_on_a_full_disk_and_on_one_that_cannot_be_written_to(disks):
    command = [ROOT / "caption.py", *STAGES["captions"][1:], "--out", "disk/x.jsonl"]
    for size, expected in (
        (
            "4k",
            "disk/x.jsonl.part-0: cannot be written (No space left on device): the captions "
            "up to here are kept",
        ),
        (
            "8k",
            "disk/x.jsonl: cannot be written (No space left on device): the new captions "
            "are kept in x.jsonl.part-*",
        ),
    ):
        # the .json, and with 8k all captions in a part
        done, _ = mounted(disks, {"disk": f"size={size}"}, command)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1] == expected
    done, _ = mounted(disks, {"disk": READ_ONLY}, command)
    assert (
        done.returncode == 1
        and done.stderr == "--out disk: nothing can be written there (Read-only file system)\n"
    )


def test_arrays_on_a_full_disk_and_on_one_that_cannot_be_written_to(disks):
    command = [ROOT / "saliency.py", *STAGES["motion"][1:], "--out", "disk/x"]
    done, _ = mounted(disks, {"disk": "size=64k"}, command)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "disk/x.motion.npy: cannot be written (No space left on device)"
    ]
    done, _ = mounted(disks, {"disk": READ_ONLY}, command)
    assert (
        done.returncode == 1
        and done.stderr == "--out disk: nothing can be written there (Read-only file system)\n"
    )
    code = (
        "import sys, pathlib, numpy; sys.path.insert(0, sys.argv[1]); from tgm import "
        "arrays, manifest\n"
        "try: arrays.create_array(pathlib.Path('disk/x.npy'), (4, 4), numpy.float16, {})\n"
        "except manifest.ManifestError as error: print(error)"
    )
    done, _ = mounted(disks, {"disk": READ_ONLY}, ["-c", code, ROOT])
    assert done.stdout == "disk/x.npy: cannot be written (Read-only file system)\n", done.stderr


def test_the_check_prints_before_it_cannot_write_its_report(disks):
    shutil.copytree(disks / "data", disks / "disk.from", symlinks=True)
    done, _ = mounted(
        disks,
        {"disk": READ_ONLY.replace("1m", "30m")},
        ["-m", "tgm.prepare", "disk/train.csv", "--workers", 1, "--good", "good.csv"],
    )
    assert (
        done.returncode == 1
        and "disk/train.csv: 32 rows in 32 files" in done.stdout
        and "problems    none" in done.stdout
        and "good.csv: 32 rows" in done.stdout  # another folder, so it is written
    )
    assert (
        done.stderr.splitlines()[-1]
        == "disk/train.check.csv: cannot be written (Read-only file system)"
    )


def test_re_encoding_onto_a_full_disk_is_one_line(disks):
    command = ["-m", "tgm.prepare", "data/train.csv", "--reencode", "disk", "--workers", 2]
    done, _ = mounted(disks, {"disk": "size=32k"}, command)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("disk/videos/train/0") and line.endswith(
        ".mp4: cannot be written (No space left on device)"
    )


# ---- signals

SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import {module}
from tgm import video
import tgm.run
{more}
seconds = {seconds}
read = video.VideoReader.span
def slow(self, row):
    open("loading", "w").close()
    time.sleep(seconds)
    return read(self, row)
video.VideoReader.span = slow
tgm.run.launch({module}.main)
"""


def slow_script(folder, module, seconds, more=""):
    """A stage whose every video takes some seconds more to read."""
    path = folder / f"slow_{module}.py"
    path.write_text(SLOW.format(root=str(ROOT), module=module, seconds=seconds, more=more))
    return path


@pytest.mark.parametrize("name, number", [("captions", signal.SIGTERM), ("motion", signal.SIGINT)])
def test_what_follows_a_stopped_stage_does_not_run(copy, name, number):
    """`a && b`, as a shell has it: b never runs; the next run finishes what was begun."""
    stage = STAGES[name]
    output = copy / ("data/train.captions.jsonl" if name == "captions" else "data/train.motion.npy")
    expected = output.read_bytes()
    output.unlink()
    script = slow_script(copy, stage[0].removesuffix(".py"), 0.2)
    words = [sys.executable, str(script), *map(str, stage[1:-1]), "1", "--batch-size", "1"]
    shell = subprocess.Popen(
        ["bash", "-c", '"$@" && touch after', "bash", *words],
        cwd=copy,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def begun():
        if name == "motion":
            return output.exists() and A.filled(np.load(output)).any()
        return any("captions" in path.read_text() for path in copy.glob("data/*.part-0"))

    wait_until(begun, shell)
    os.kill(children(shell)[0], number)
    out, errors = shell.communicate(timeout=60)
    assert shell.returncode in (128 + number, -number), errors
    assert (
        "Traceback" not in errors
        and f"{number.name}: stopped; the same command goes on" in errors
        and "run it again" not in out
    )
    assert not (copy / "after").exists()
    run(*stage, cwd=copy)
    assert output.read_bytes() == expected


@pytest.mark.parametrize(
    "module, flags, number",
    [
        ("caption", ("--model", BLIP), signal.SIGINT),
        ("saliency", ("--cue", "motion"), signal.SIGTERM),
    ],
)
def test_a_run_that_is_stuck_in_loading_ends_by_the_first_signal(copy, module, flags, number):
    """Each video takes an hour; the patience of 300 seconds is cut to 2."""
    script = slow_script(copy, module, 3600, "tgm.run.GRACE = 2")
    process = start(
        (script, "--data", "data/train.csv", *flags, "--workers", 1, "--out", copy / "new.jsonl"),
        copy,
    )
    wait_until((copy / "loading").exists, process)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -number and "Traceback" not in errors, errors
    assert (
        f"{number.name}: ending after this batch" in errors
        and f"{number.name}: no progress in 2 seconds" in errors
    )


@pytest.mark.parametrize(
    "flags, number",
    [((), signal.SIGTERM), ((), signal.SIGINT), (("--reencode", "small"), signal.SIGTERM)],
)
def test_a_check_and_a_re_encoding_end_by_the_signal_with_their_processes(copy, flags, number):
    """The whole group is told, as by Ctrl-C; files in the works take an hour."""
    script = copy / "slow.py"
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tgm import prepare
from tgm.run import launch
for name in ("read", "_convert"):
    before = getattr(prepare.VideoReader, name)
    def slow(self, *args, before=before):
        if self.path.endswith(("1.mp4", "9.mp4")):
            open({str(copy)!r} + "/busy", "w")
            time.sleep(3600)
        return before(self, *args)
    setattr(prepare.VideoReader, name, slow)
launch(prepare.main)
""")
    process = start((script, "data/train.csv", *flags, "--workers", 2), copy)

    def made():
        paths = (copy / "small").rglob("*.mp4")
        return sorted(path.name for path in paths if ".new" not in path.name)

    expected = [f"{row:05d}.mp4" for row in (0, 2, 3, 4, 5, 6, 7, 8)] if flags else []
    wait_until(lambda: (copy / "busy").exists() and made() == expected, process)
    time.sleep(1)
    workers = children(process)
    assert len(workers) == 2
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -number and "Traceback" not in errors, errors
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    assert not (copy / "data/train.check.csv").exists() and not list((copy / "data").glob("*.new*"))
    if flags:
        assert (
            not list((copy / "small").rglob("*.new*")) and not (copy / "small/train.csv").exists()
        )
        assert made() == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies_in_the_midst_of_a_check_is_named(copy, workers):
    """As by a crash in a decoder, or for lack of memory."""
    script = copy / "dies.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tgm import prepare
from tgm.run import launch
read = prepare.VideoReader.read
def dies(self, times):
    if self.path.endswith("00003.mp4"):
        os._exit(11)
    return read(self, times)
prepare.VideoReader.read = dies
launch(prepare.main)
""")
    process = start((script, "data/train.csv", "--workers", workers), copy)
    _, errors = process.communicate(timeout=60)
    line = errors.splitlines()[-1]
    message = "checking: a process ended in the midst of a file (out of memory?"
    assert process.returncode == 1
    if workers == 1:
        assert line == f"{message}): data/videos/train/00003.mp4"
    else:
        named = int(line.split(" or one of the next files")[0][-9:-4])
        assert line == (
            f"{message} lower --workers): data/videos/train/{named:05d}.mp4 or one of the next "
            "files; --workers 1 says which"
        )
        assert named <= 3


# ---- several ranks, and several nodes


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8])
def test_parts_of_ranks_are_contiguous_and_cover_what_is_left(ranks):
    """Of 1,000 rows of an array, of which others are done already."""
    todo = np.flatnonzero(np.random.default_rng(0).random(1000) < 0.3).tolist()
    for rows in (todo, todo[:5], todo[:0], list(range(1000))):
        parts = [part_of_rank(rows, rank, ranks) for rank in range(ranks)]
        assert [
            row for part in parts for row in part
        ] == rows  # in order: no rank's rows lie among another's
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def rows_of_part(folder, rank):
    lines = (folder / f"data/train.captions.jsonl.part-{rank}").read_text().splitlines()
    return [json.loads(line)["row"] for line in lines if line]


def test_ranks_take_contiguous_rows_when_a_run_with_gaps_is_gone_on_with(copy):
    path = copy / "data/train.captions.jsonl"
    expected = path.read_text()
    lines = expected.splitlines()
    path.unlink()
    for rank, rows in enumerate(((0, 1, 2, 3), (16, 17, 18, 19), (9, 30))):
        # as three ranks left it
        text = "".join(json.dumps({"row": row} | json.loads(lines[row])) + "\n" for row in rows)
        path.with_name(f"{path.name}.part-{rank}").write_text(text)
    command = (*STAGES["captions"], "--batch-size", 4)
    assert "18 of 32 videos tried: run it again to go on" in run(
        *command, "--max-steps", 1, cwd=copy, ranks=2
    )
    # left are 22 rows: 4 to 8, 10 to 15, and 20 to 29, 31
    assert rows_of_part(copy, 0) == [0, 1, 2, 3] + [4, 5, 6, 7] and rows_of_part(copy, 1) == [
        16,
        17,
        18,
        19,
    ] + [20, 21, 22, 23]
    assert "32 videos captioned, 0 failed" in run(*command, cwd=copy)
    assert (copy / "data/train.captions.jsonl").read_text() == expected


RACE = """
import os, sys, time
sys.path.insert(0, {root!r})
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers import BlipForConditionalGeneration, BlipProcessor
import {module}
import tgm.captions
import tgm.run
read = {owner}.{function}
slow = [os.environ["RANK"] == "1"]
def late(*args):
    if slow.pop() if slow else False:
        time.sleep(8)
    return read(*args)
{owner}.{function} = late
tgm.run.launch({module}.main)
"""


@pytest.mark.parametrize(
    "module, owner, function, name",
    [
        ("caption", "tgm.captions.CaptionFile", "done", "captions"),
        ("saliency", "saliency", "filled", "motion"),
    ],
)
def test_a_rank_that_reads_late_what_is_done_sees_what_the_others_saw(
    copy, module, owner, function, name
):
    """Rank 1 looks 8 seconds late; rank 0 must not have written rows by then, else they would
    divide other rows.
    """
    output = copy / ("data/train.captions.jsonl" if name == "captions" else "data/train.motion.npy")
    expected = output.read_bytes()
    output.unlink()
    (copy / "late.py").write_text(
        RACE.format(root=str(ROOT), module=module, owner=owner, function=function)
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = start(
        (copy / "late.py", *STAGES[name][1:], "--batch-size", 1), copy, launcher=launcher
    )
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert ("32 videos captioned, 0 failed" if name == "captions" else ": 32 of 32 videos") in out
    assert output.read_bytes() == expected


def two_nodes(copy, command, port, restarts):
    """Two torchrun agents on this machine, each with one rank."""
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        f"--max-restarts={restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=test",
    )
    return [start(command, copy, launcher=launcher) for _ in range(2)]


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("name", ["captions", "text"])
def test_two_nodes_and_a_restart(copy, name):
    """A rank is killed in the midst: both agents start their ranks again, and the end is the
    same, bit for bit.
    """
    stage = STAGES[name]
    output = copy / (
        "data/train.captions.jsonl" if name == "captions" else "data/train.saliency.npy"
    )
    expected = output.read_bytes()
    output.unlink()
    script = slow_script(copy, stage[0].removesuffix(".py"), 0.3)
    nodes = two_nodes(copy, (script, *stage[1:], "--batch-size", 1), free_port(), restarts=1)

    def begun():
        if name == "captions":
            return all(
                path.exists() and '"captions"' in path.read_text()
                for path in (copy / f"data/train.captions.jsonl.part-{r}" for r in (0, 1))
            )
        return output.exists() and A.filled(np.load(output))[[0, 16]].all()

    wait_until(begun, nodes[0])
    os.kill(children(nodes[1])[0], signal.SIGKILL)
    results = outputs(nodes, timeout=180)
    assert [node.returncode for node in nodes] == [0, 0], results
    assert any("2 ranks" in out or "rank 0 of 2" in out for out, _ in results)
    assert output.read_bytes() == expected


def test_told_to_stop_two_ranks_and_torchrun_end_with_an_error(copy):
    (copy / "data/train.motion.npy").unlink()
    script = slow_script(copy, "saliency", 0.3)
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=2",
    )
    process = start((script, *STAGES["motion"][1:], "--batch-size", 1), copy, launcher=launcher)
    output = copy / "data/train.motion.npy"
    wait_until(lambda: output.exists() and A.filled(np.load(output)).any(), process)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode != 0 and errors.count("SIGTERM: stopped; the same command goes on") == 2
    ), errors
    assert 0 < A.filled(np.load(output)).sum() < 32
