"""The toy world is what it says, and its tiny models are good enough to stand for the real ones."""

import csv
import json

import numpy as np
import pytest
import torch
import toy
import toy_report
from conftest import BLIP, ROOT, run

import caption
from tgm.video import read_frames, segment_midpoints


def test_a_scene_is_a_function_of_its_arguments():
    a = toy.render(toy.scene(0, "train", 3), [0.3, 1.2])
    b = toy.render(toy.scene(0, "train", 3), [0.3, 1.2])
    assert all(np.array_equal(x, y) for x, y in zip(a, b))
    assert not np.array_equal(a[0], toy.render(toy.scene(0, "val", 3), [0.3, 1.2])[0])
    assert not np.array_equal(a[0], toy.render(toy.scene(1, "train", 3), [0.3, 1.2])[0])


@pytest.mark.parametrize("action", toy.ACTIONS)
def test_actions_do_what_their_names_say(action):
    row = next(row for row in range(1000) if toy.scene(0, "train", row).action == action)
    sc = toy.scene(0, "train", row)
    _, masks = toy.render(sc, np.arange(toy.FRAMES) / toy.FPS)
    y, x = (np.array([np.nonzero(mask)[axis].mean() for mask in masks]) for axis in (0, 1))
    area, (right, down) = masks.sum((1, 2)), (x[-1] - x[0], y[-1] - y[0])
    if action.startswith("move"):
        along = {"move left": -right, "move right": right, "move up": -down, "move down": down}[
            action
        ]
        assert along > 6 and min(abs(right), abs(down)) < 4
    else:
        assert max(abs(right), abs(down)) < 8
    if action == "grow":
        assert area[-1] > 2 * area[0]
    if action == "shrink":
        assert area[0] > 2 * area[-1]
    assert (sc.spin != 0) == (action == "spin") and bool(sc.shake.any()) == (action == "shake")


def test_half_of_the_cameras_drift_and_three_of_four_objects_are_at_home():
    scenes = [toy.scene(0, "train", row) for row in range(800)]
    assert np.mean([sc.camera.any() for sc in scenes]) == pytest.approx(0.5, abs=0.06)
    home = [toy.SCENES.index(sc.scene) == toy.SHAPES.index(sc.shape) for sc in scenes]
    assert np.mean(home) == pytest.approx(0.75 + 0.25 / 8, abs=0.05)
    images = [toy.scene(0, "images", row) for row in range(800)]
    assert (
        np.mean([toy.SCENES.index(sc.scene) == toy.SHAPES.index(sc.shape) for sc in images]) < 0.2
    )
    assert {sc.shape for sc in scenes} == set(toy.SHAPES) and {sc.action for sc in scenes} == set(
        toy.ACTIONS
    )


def test_the_files_hold_what_was_drawn(world):
    with open(world / "data/val.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    masks = np.unpackbits(np.load(world / "data/val.masks.npy"), axis=-1)
    assert len(lines) == len(masks) == 24
    for row in (0, 11, 23):
        sc = toy.scene(0, "val", row)
        times = np.arange(toy.FRAMES) / toy.FPS
        drawn, mask = toy.render(sc, times)
        assert (
            lines[row]["label"] == sc.action
            and lines[row]["object"] == sc.shape
            and lines[row]["caption"] == sc.caption
        )
        assert np.array_equal(masks[row], mask)
        decoded = read_frames(world / "data" / lines[row]["path"], times).astype(float)
        assert np.abs(decoded - drawn).mean() < 6  # H.264 with halved colour


def test_the_world_is_the_same_each_time(world, tmp_path):
    toy.write_world(tmp_path, 32, 1, workers=2)
    for path in sorted(tmp_path.glob("videos/train/*.mp4")):
        assert path.read_bytes() == (world / "data/videos/train" / path.name).read_bytes()
    assert (tmp_path / "train.csv").read_bytes() == (world / "data/train.csv").read_bytes()


def test_scores_of_known_maps():
    masks = np.zeros((1, toy.FRAMES, 64, 64), np.uint8)
    masks[:, :, 16:48, 16:32] = 1  # 4 x 2 patches of 8 x 8
    masks[:, :, 19:20, 32:40] = 1  # and a line through the middle of another
    packed, truth = np.packbits(masks, axis=-1), np.zeros((1, 2, 4, 8, 8))
    truth[..., 2:6, 2:4] = 1
    # the line is pointed at, but not half of its patch
    assert toy_report.score_saliency(truth, packed) == (1.0, 1.0, 9 / 64)
    assert toy_report.score_saliency(-truth, packed)[:2] == (0.0, 0.0)
    line = truth.copy()
    line[..., 2, 4] = 2
    pointing, auc, _ = toy_report.score_saliency(line, packed)
    assert pointing == 1.0 and auc == pytest.approx(1 - 1 / 56)
    rng = np.random.default_rng(0)
    scores = [toy_report.score_saliency(rng.random((1, 2, 4, 8, 8)), packed) for _ in range(200)]
    pointing, auc, _ = np.mean(scores, 0)
    assert pointing == pytest.approx(9 / 64, abs=0.03) and auc == pytest.approx(0.5, abs=0.02)


def test_the_tiny_blip_captions_held_out_videos():
    """Drawn, not decoded, to afford enough of them: three moments of 200 videos of val.csv."""
    model, processor = caption.load_model(BLIP, "cpu", torch.float32)
    scenes = [toy.scene(0, "val", row) for row in range(200)]
    items = [
        (
            None,
            processor(
                images=list(toy.render(sc, segment_midpoints(0, 2.0, 3))[0]), return_tensors="pt"
            ),
            None,
        )
        for sc in scenes
    ]
    made = caption.describe(model, processor, items, "cpu", torch.float32, beams=1, max_tokens=30)
    assert np.mean([text == sc.caption for sc, texts in zip(scenes, made) for text in texts]) >= 0.9


def test_caption_match(world):
    with open(world / "data/val.csv", newline="") as file:
        truth = [line["caption"] for line in csv.DictReader(file)]
    made = [
        json.loads(line)["captions"]
        for line in (world / "data/val.captions.jsonl").read_text().splitlines()
    ]
    right = sum(text == true for texts, true in zip(made, truth) for text in texts)
    assert toy_report.caption_match(world / "data") == pytest.approx(right / 72) and right > 48


def test_the_tiny_clip_finds_the_object(world):
    masks = np.load(world / "data/val.masks.npy")
    pointing, auc, chance = toy_report.score_saliency(
        np.load(world / "data/val.saliency.npy"), masks
    )
    assert pointing >= 0.85 and auc >= 0.80 and chance < 0.3


def test_the_models_can_be_remade(tmp_path):
    """Two steps of training write folders that the stages can open."""
    run("data/toy_models.py", "--steps", 2, "--out", tmp_path)
    run("data/toy.py", "--train", 2, "--val", 1, "--workers", 1, cwd=tmp_path)
    run("caption.py", "--model", tmp_path / "blip", "--workers", 0, cwd=tmp_path)
    run("saliency.py", "--clip", f"local-dir:{tmp_path}/clip", "--workers", 0, cwd=tmp_path)
    assert (
        len(
            json.loads((tmp_path / "data/train.captions.jsonl").read_text().splitlines()[1])[
                "captions"
            ]
        )
        == 3
    )
    assert np.load(tmp_path / "data/train.saliency.npy").shape == (2, 3, 16, 8, 8)
    for file in (ROOT / "data/toy").rglob("*.safetensors"):
        assert file.stat().st_size < 4e6
