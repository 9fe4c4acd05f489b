"""Real clips through every stage, with the tiny models: what matters is that each decodes and
nothing breaks.
"""

import csv
import json

import numpy as np
import pytest
from conftest import BLIP, CLIP, SHARED, run

VIDEOS = SHARED / "videos"
pytestmark = pytest.mark.skipif(
    not (VIDEOS / "clips.csv").exists(), reason="../shared/videos is not here"
)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """All clips, and eight a class of the labelled ones, as manifests outside the folder of the
    clips.
    """
    folder = tmp_path_factory.mktemp("real")
    with open(VIDEOS / "clips.csv", newline="") as file:
        names = [line["path"] for line in csv.DictReader(file)]
    write = lambda name, header, rows: (folder / name).write_text("\n".join([header, *rows]) + "\n")
    write("clips.csv", "path", [f"{VIDEOS}/{name}" for name in names])
    for split in ("train", "val"):
        with open(VIDEOS / f"cctv_{split}.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        picked = [
            line
            for label in ("fight", "calm")
            for line in [row for row in lines if row["label"] == label][:8]
        ]
        write(
            f"cctv_{split}.csv",
            "path,label",
            [f"{VIDEOS}/{line['path']},{line['label']}" for line in picked],
        )
    for name in ("clips.csv", "cctv_train.csv"):
        run("caption.py", "--data", name, "--model", BLIP, "--workers", 2, cwd=folder)
        run(
            "saliency.py",
            "--data",
            name,
            "--clip",
            CLIP,
            "--moments",
            4,
            "--workers",
            2,
            cwd=folder,
        )
    return folder


def test_every_clip_is_captioned_and_scored(manifests):
    entries = [
        json.loads(line) for line in (manifests / "clips.captions.jsonl").read_text().splitlines()
    ]
    assert len(entries) == 51 and [entry.get("error") for entry in entries] == [None] * 51
    assert all(len(entry["captions"]) == 3 and all(entry["captions"]) for entry in entries)
    saliency = np.load(manifests / "clips.saliency.npy")
    assert (
        saliency.shape == (51, 3, 4, 8, 8)
        and np.isfinite(saliency).all()
        and (np.ptp(saliency, (3, 4)) > 0).all()
    )


def test_every_clip_whose_codec_has_vectors_has_a_motion_field(manifests):
    with open(VIDEOS / "clips.csv", newline="") as file:
        codecs = [line["codec"] for line in csv.DictReader(file)]
    assert set(codecs) == {"h264", "mpeg4", "hevc"}
    run("saliency.py", "--data", "clips.csv", "--cue", "motion", "--workers", 2, cwd=manifests)
    field = np.load(manifests / "clips.motion.npy").astype(np.float32)
    assert field.shape == (51, 32, 2, 14, 14)
    for of_video, codec in zip(field, codecs):
        assert np.isnan(of_video).all() if codec == "hevc" else np.isfinite(of_video).all()
        assert codec == "hevc" or 1e-3 < np.abs(of_video).mean() < 2  # frame widths a second


def test_the_strip_of_a_real_clip(manifests):
    run("masking.py", "--data", "clips.csv", "--row", 9, "--out", "strip.png", cwd=manifests)
    assert (manifests / "strip.png").stat().st_size > 50_000


def test_pretraining_probe_and_fine_tuning_on_labelled_clips(manifests):
    run(
        "pretrain.py",
        *(
            "--data cctv_train.csv --size tiny --stride 2 --batch-size 8 "
            "--epochs 2 --flip --workers 2 --out run"
        ).split(),
        cwd=manifests,
    )
    run(
        "linprobe.py",
        *"--checkpoint run/checkpoint.pt --data cctv_train.csv --test cctv_val.csv".split(),
        cwd=manifests,
    )
    result = json.loads((manifests / "run/probe/label.json").read_text())
    assert (result["train"], result["test"], result["classes"], result["unreadable"]) == (
        16,
        16,
        2,
        0,
    )
    assert result["majority"] == 0.5 and 0 <= result["linear"] <= 1
    run(
        "finetune.py",
        *(
            "--checkpoint run/checkpoint.pt --data cctv_train.csv "
            "--val cctv_val.csv --batch-size 4 --epochs 1 --warmup-epochs 0 "
            "--views 2 3 --workers 2 --out tuned"
        ).split(),
        cwd=manifests,
    )
    result = json.loads((manifests / "tuned/test.json").read_text())
    assert (result["videos"], result["classes"], result["unreadable"], result["majority"]) == (
        16,
        2,
        0,
        0.5,
    )
