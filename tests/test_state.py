"""State on disk: manifests that grow, files that another process writes, arrays and models that
carry code.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import BLIP, CLIP, ENVIRONMENT, ROOT, run

from tgm import arrays as A
from tgm import manifest as M

STAGES = {
    "captions": ("caption.py", "--model", BLIP, "--workers", 0, "--batch-size", 1),
    "saliency": ("saliency.py", "--clip", CLIP, "--moments", 2, "--workers", 0, "--batch-size", 1),
    "motion": (
        "saliency.py",
        *"--cue motion --moments 2 --grid 4 --workers 0 --batch-size 1".split(),
    ),
}


def make(name, cwd, *flags, **how):
    return run(STAGES[name][0], "--data", "data/few.csv", *STAGES[name][1:], *flags, cwd=cwd, **how)


def few(copy, rows):
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/few.csv").write_text(
        "\n".join([lines[0], *(lines[1 + row] for row in rows)]) + "\n"
    )


# ---- manifests that grow


def test_a_manifest_that_has_grown_is_told_with_the_command(copy):
    few(copy, range(5))
    for name in STAGES:
        make(name, copy)
    few(copy, range(12))
    for name in ("captions", "motion"):
        assert "has the first 5 of 12 rows of the manifest: --extend" in make(
            name, copy, fails=True
        )
    assert "7 of 12 videos tried: run it again to go on" in make(
        "captions", copy, "--extend", "--max-steps", 2
    )
    # the captions of an extension that has only begun are still the old ones
    assert make("saliency", copy, fails=True).endswith(
        "has the first 5 of 12 rows of the manifest; make it with: python caption.py --data "
        "data/few.csv --extend"
    )
    assert run(
        "pretrain.py",
        *"--data data/few.csv --size tiny --mask text".split(),
        cwd=copy,
        fails=True,
    ).endswith(
        "rows of the manifest; make it with: python caption.py --data data/few.csv --extend "
        "&& python saliency.py --data data/few.csv --extend"
    )
    # other rows: what is named is what works
    few(copy, range(1, 5))
    line = run("pretrain.py", "--data", "data/few.csv", "--size", "tiny", cwd=copy, fails=True)
    remedy = line.split("; make it with: ")[1]
    assert remedy == (
        "python caption.py --data data/few.csv --resume none "
        "&& python saliency.py --data data/few.csv --resume none"
    )
    captions, saliency = [command.split()[1:] for command in remedy.split(" && ")]
    run(*captions, "--model", BLIP, "--workers", 0, cwd=copy)
    run(*saliency, "--clip", CLIP, "--workers", 0, cwd=copy)
    trial = ("--size", "tiny", "--batch-size", 2, "--max-steps", 1, "--workers", 0)
    assert "4 of 4 videos usable" in run("pretrain.py", "--data", "data/few.csv", *trial, cwd=copy)


@pytest.mark.parametrize("killed", [False, True])
def test_extended_it_is_what_it_is_made_at_once(copy, killed):
    few(copy, range(12))
    for name in STAGES:
        make(name, copy)
    kinds = ("text", "saliency", "motion")
    whole = {kind: np.load(copy / f"data/few.{kind}.npy") for kind in kinds}
    texts = (copy / "data/few.captions.jsonl").read_text()
    few(copy, range(5))
    for name in STAGES:
        make(name, copy, "--resume", "none")
    few(copy, range(12))
    marked = np.load(copy / "data/few.motion.npy", mmap_mode="r+")
    marked[2] = 7  # is not computed again
    marked.flush()
    for name in STAGES:
        if killed:  # as by kill -9: begun, a row or two are there
            make(name, copy, "--extend", "--max-steps", 2)
        make(name, copy, *(["--extend"] if not killed else []))
    assert (copy / "data/few.captions.jsonl").read_text() == texts
    whole["motion"][2] = 7
    for kind in kinds:
        assert np.array_equal(np.load(copy / f"data/few.{kind}.npy"), whole[kind])
        assert json.loads((copy / f"data/few.{kind}.json").read_text())["videos"] == 12
    A.open_array(
        copy / "data/few.saliency.npy",
        M.read_manifest(copy / "data/few.csv"),
        "",
        captions=A.file_hash(copy / "data/few.captions.jsonl"),
    )


def test_extend_refuses_what_did_not_only_grow(copy):
    few(copy, range(5))
    for name in STAGES:
        make(name, copy)
    few(copy, [1, 0, 2, 3, 4, 5, 6])
    assert "made with another manifest" in make("captions", copy, "--extend", fails=True)
    assert "made with another manifest" in make("motion", copy, "--extend", fails=True)
    few(copy, range(7))
    assert "made with prompt '', not 'a'" in make(
        "captions", copy, "--extend", "--prompt", "a", fails=True
    )
    assert "made with grid 4, not 5" in make("motion", copy, "--extend", "--grid", 5, fails=True)
    make("captions", copy, "--extend")
    path = copy / "data/few.captions.jsonl"
    # an old row's caption
    path.write_text(path.read_text().replace('"captions": ["', '"captions": ["oh, ', 1))
    assert "made with other captions" in make("saliency", copy, "--extend", fails=True)
    for name in STAGES:
        with pytest.raises(AssertionError, match="^2"):  # argparse's exit
            make(name, copy, "--extend", "--resume", "none")


def test_extend_leaves_failures_alone(copy):
    lines = (copy / "data/train.csv").read_text().splitlines()
    gone = re.sub("[0-9]+.mp4", "gone.mp4", lines[1])
    (copy / "data/few.csv").write_text("\n".join([lines[0], gone, *lines[2:4]]) + "\n")
    make("captions", copy)
    first = (copy / "data/few.captions.jsonl").read_text()
    with open(copy / "data/few.csv", "a") as file:
        file.write(lines[4] + "\n")
    make("captions", copy, "--extend")
    again = (copy / "data/few.captions.jsonl").read_text()
    assert (
        again.startswith(first)
        and len(again.splitlines()) == 4
        and "error" in json.loads(again.splitlines()[0])
    )


# ---- two processes


def test_a_file_is_one_process_to_write(tmp_path):
    path = tmp_path / "x.npy"
    code = (
        "import signal, sys, time; sys.path.insert(0, sys.argv[1]); from tgm import arrays; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # not ignored, as in a job of a shell
        "arrays.hold(sys.argv[2]); print('held', flush=True); time.sleep(60)"
    )

    def begin():
        return subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = begin()
    assert (
        first.stdout.readline() == "held\n"
        and A.is_held(path)
        and not A.is_held(tmp_path / "y.npy")
    )
    second = begin()
    assert second.wait(30) == 1 and "x.npy: another process is writing it" in second.stderr.read()
    with pytest.raises(M.ManifestError, match="another process is writing it"):
        A.hold(path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not A.is_held(path) and (tmp_path / "x.npy.lock").exists()
    A.hold(path)
    assert begin().wait(30) == 1
    A.release()
    assert not (tmp_path / "x.npy.lock").exists()
    third = begin()
    assert third.stdout.readline() == "held\n"
    third.send_signal(signal.SIGINT)  # an end that Python sees takes the lock's file away
    assert third.wait(30) == -signal.SIGINT
    assert not (tmp_path / "x.npy.lock").exists()


def test_stages_that_write_the_same_or_read_what_is_written_are_refused(copy):
    paths = [
        "data/train.captions.jsonl",
        "data/train.saliency.npy",
        "runs/text/checkpoint.pt",
        "runs/tuned/checkpoint.pt",
        "runs/probe/features",
    ]
    for folder in ("text", "tuned", "probe"):
        (copy / "runs" / folder).mkdir(parents=True)
    texts = ("--data", "data/train.csv", "--clip", CLIP, "--moments", 8)
    (copy / "mine.jsonl").write_bytes((copy / paths[0]).read_bytes())
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from tgm import arrays; "
        "[arrays.hold(p) for p in sys.argv[2:]]; print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), *paths], cwd=copy, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        tiny = ("--size", "tiny", "--batch-size", 8, "--workers", 0)
        tries = [
            ("caption.py", "--data", "data/train.csv", "--model", BLIP),
            ("saliency.py", *texts),  # the captions are being written
            ("saliency.py", *texts, "--captions", "mine.jsonl"),
            ("pretrain.py", "--mask", "text", *tiny),  # the saliency is being written
            ("pretrain.py", "--mask", "tube", "--out", "runs/text", *tiny),
            ("finetune.py", "--out", "runs/tuned", *tiny),
            ("linprobe.py", "--checkpoint", "none", "--size", "tiny", "--out", "runs/probe"),
        ]
        expected = [paths[0], paths[0], paths[1], paths[1], *paths[2:]]
        for args, path in zip(tries, expected, strict=True):
            assert run(*args, cwd=copy, fails=True).startswith(
                f"{path}: another process is writing it: wait for its end"
            )
        # another array of the same manifest
        run(
            "saliency.py", "--cue", "motion", "--moments", 16, "--grid", 8, "--workers", 0, cwd=copy
        )
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "args",
    [
        ("caption.py", "--data", "data/train.csv", "--model", BLIP),
        (
            "saliency.py",
            *"--data data/train.csv --cue motion --moments 16 --grid 8".split(),
        ),
        ("linprobe.py", "--checkpoint", "none", "--size", "tiny", "--out", "probe"),
    ],
)
def test_told_to_stop_a_stage_ends_after_its_batch(copy, args, number):
    """A slow decoder gives the time to be told in the midst."""
    for name in (
        "train.captions.jsonl",
        "train.captions.json",
        "train.motion.npy",
        "train.motion.json",
    ):
        (copy / "data" / name).unlink()
    (copy / "sitecustomize.py").write_text(
        "import sys, time\nsys.path.insert(0, sys.argv[0])\nimport importlib.abc\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom tgm import video\nvideo.VideoReader.span_ "
        f"= video.VideoReader.span\n"
        "def span(self, row):\n    time.sleep(0.3)\n    return self.span_(row)\n"
        "video.VideoReader.span = span\n"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / args[0]),
            *map(str, args[1:]),
            "--batch-size",
            "1",
            "--workers",
            "1",
        ],
        cwd=copy,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(copy)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def done():
        parts = (copy / "data").glob("*.part-0")
        arrays = [*copy.glob("data/train.motion.npy"), *copy.glob("probe/train.features.npy")]
        return any(path.read_text().strip() for path in parts) or any(
            np.isfinite(np.load(path)).any() for path in arrays
        )

    until = time.time() + 60
    while not done():
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -number and "Traceback" not in errors, errors
    assert f"{number.name}: ending after this batch; once more ends at once" in errors


# ---- files that carry code


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-ran",)


def test_an_array_of_objects_is_never_unpickled(copy, monkeypatch):
    monkeypatch.chdir(copy)
    np.save("evil.npy", np.array([Payload()] * 32, dtype=object), allow_pickle=True)
    about = json.loads((copy / "data/train.saliency.json").read_text())
    for kind in ("saliency", "motion"):
        shutil.copy("evil.npy", f"data/train.{kind}.npy")
    assert "train.saliency.npy: cannot be read" in run(
        "pretrain.py", "--mask", "text", "--size", "tiny", cwd=copy, fails=True
    )
    assert "train.saliency.npy: cannot be read" in run(
        "saliency.py",
        "--clip",
        CLIP,
        "--moments",
        about["moments"],
        "--workers",
        0,
        cwd=copy,
        fails=True,
    )
    assert "train.motion.npy: cannot be read" in run(
        "saliency.py", "--cue", "motion", "--moments", 16, "--grid", 8, cwd=copy, fails=True
    )
    run(
        "linprobe.py",
        *"--checkpoint none --size tiny --seeds 1 --workers 0 --out probe".split(),
        cwd=copy,
    )
    shutil.copy("evil.npy", "probe/train.features.npy")
    assert "train.features.npy: cannot be read" in run(
        "linprobe.py",
        *"--checkpoint none --size tiny --out probe".split(),
        cwd=copy,
        fails=True,
    )
    assert not os.path.exists("payload-ran")
    with open("evil.npy", "rb") as file:  # it would have run
        np.load(file, allow_pickle=True)
    assert os.path.exists("payload-ran")


def test_weights_that_carry_code_are_refused_by_every_flag_that_takes_a_file(copy, monkeypatch):
    monkeypatch.chdir(copy)
    torch.save({"model": Payload()}, "evil.pt")
    tiny = ("--size", "tiny", "--workers", 0)
    for args in (
        ("pretrain.py", "--mask", "tube", "--init", "evil.pt", *tiny),
        ("finetune.py", "--checkpoint", "evil.pt", *tiny),
        ("finetune.py", "--checkpoint", "evil.pt", "--test-only", *tiny),
        ("linprobe.py", "--checkpoint", "evil.pt", *tiny),
    ):
        assert "evil.pt: no checkpoint that can be read safely" in run(*args, cwd=copy, fails=True)
    (copy / "runs/tube").mkdir(parents=True)
    shutil.copy("evil.pt", "runs/tube/checkpoint.pt")
    assert "no checkpoint that can be read safely" in run(
        "pretrain.py", "--mask", "tube", "--resume", "auto", *tiny, cwd=copy, fails=True
    )
    assert "evil.pt" in run(
        "saliency.py",
        *"--cue motion --flow raft --flow-weights evil.pt --out raft".split(),
        cwd=copy,
        fails=True,
    )
    assert "evil.pt" in run(
        "saliency.py",
        *"--clip ViT-S-32 --pretrained evil.pt --out clip".split(),
        cwd=copy,
        fails=True,
    )
    assert not os.path.exists("payload-ran")
    torch.load("evil.pt", weights_only=False)
    assert os.path.exists("payload-ran")


def test_a_captioner_that_asks_for_its_own_code_is_refused(copy):
    shutil.copytree(BLIP, copy / "blip")
    config = json.loads((copy / "blip/config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForImageTextToText": "evil.Model",
            "AutoProcessor": "evil.P",
        },
    }
    (copy / "blip/config.json").write_text(json.dumps(config))
    (copy / "blip/evil.py").write_text(
        f"open({str(copy / 'payload-ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
        f"class P: pass\n"
    )
    (copy / "data/train.captions.jsonl").unlink()
    (copy / "data/train.captions.json").unlink()
    line = run(
        "caption.py", "--data", "data/train.csv", "--model", copy / "blip", cwd=copy, fails=True
    )
    assert (
        line.startswith(f"--model {copy / 'blip'}: cannot load it")
        and not (copy / "payload-ran").exists()
    )


def test_no_source_file_runs_strings():
    """No shell, no eval, no exec, no pickle in what users run."""
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / "data").glob("*.py"),
        *(ROOT / "experiments").glob("*.py"),
        *(ROOT / "tgm").glob("*.py"),
    ]:
        found = re.findall(
            r"(?<![\w.])(?:eval|exec)\(|os\.system|os\.popen|shell=True|import pickle|"
            r"allow_pickle=True|weights_only=False|trust_remote_code=True",
            path.read_text(),
        )
        assert not found, (path, found)
