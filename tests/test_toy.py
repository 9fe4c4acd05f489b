"""The toy world is what it says, and its tiny models are good enough to stand for the real ones."""

import csv
import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
import toy_models
import toy_report
from conftest import BLIP, CLIP, ROOT, run

import caption
import masking
import model as models
import saliency
from tgm import clip as clip_models
from tgm.manifest import ManifestError
from tgm.offline import Item
from tgm.sampling import clip_times
from tgm.video import read_frames, segment_midpoints

TINY = models.SIZES["tiny"]
MANIFESTS = ("train", "val", "probe")


@pytest.fixture(scope="module")
def scenes():
    """{split: 2,500 scenes}."""
    return {split: [toy.scene(0, split, row) for row in range(2500)] for split in toy.SPLITS}


@pytest.fixture(scope="module")
def drawn():
    """120 scenes of val.csv, and where both things are seen in a clip, bool [120, 2, 8, 64, 64]."""
    times = clip_times(0, 2, toy.FPS, TINY["frames"], TINY["stride"], 0.5)
    scenes = [toy.scene(0, "val", row) for row in range(120)]
    return scenes, np.stack([toy.render(sc, times)[1] for sc in scenes])


def alone(thing, action, seconds, **changes):
    """The thing doing `action` in the middle of an empty scene, masks [T, 64, 64] and frames."""
    middle = np.array((32.0, 32.0))
    thing = dataclasses.replace(thing, action=action, centre=middle, **changes)
    still = dataclasses.replace(toy.scene(0, "val", 0), camera=np.zeros(2))
    frames, masks = toy.render(still, seconds, [thing])
    return thing, masks[0], frames


def centroids(masks):
    """[T, 2] x, y."""
    return np.array([np.argwhere(mask).mean(0)[::-1] for mask in masks])


def association(pairs):
    """Chi squared of independence, over its degrees of freedom: about 1 for independent columns."""
    first, second = (sorted(set(column)) for column in zip(*pairs))
    counts = np.array([[pairs.count((a, b)) for b in second] for a in first], float)
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    return ((counts - expected) ** 2 / expected).sum() / ((len(first) - 1) * (len(second) - 1))


# ---- the scene function


def test_a_scene_is_a_function_of_its_arguments():
    draw = lambda *arguments: toy.render(toy.scene(*arguments), [0.3, 1.2])
    first, second = draw(0, "train", 3), draw(0, "train", 3)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    others = [(0, split, 3) for split in ("val", "probe", "images")]
    for other in (*others, (1, "train", 3), (0, "train", 4)):
        assert not np.array_equal(first[0], draw(*other)[0])


@pytest.mark.parametrize("action", toy.ACTIONS)
def test_actions_do_what_their_names_say(action):
    """At the speed that the thing has: measured on what is drawn."""
    actor = toy.scene(0, "val", 0).actor
    times = np.arange(toy.FRAMES) / toy.FPS
    thing, masks, frames = alone(
        actor, action, times, shape="circle", speed=9.0, phase=0.0, angle=0.0
    )
    centre = centroids(masks)
    right, down = centre[-1] - centre[0]
    if action in toy.DIRECTIONS:
        along = np.dot((right, down), toy.DIRECTIONS[action])
        assert ("left" in action, "right" in action) == (right < -9, right > 9)
        assert ("up" in action, "down" in action) == (down < -9, down > 9)
        assert along == pytest.approx(9 * times[-1], abs=1) and min(abs(right), abs(down)) < 0.3
    elif action in toy.SWINGS:
        path = np.abs(np.diff(centre, axis=0)).sum(0)
        axis = ("swing sideways", "swing up and down").index(action)
        assert path[axis] == pytest.approx(9 * times[-1], rel=0.15) and path[1 - axis] < 0.5
        assert np.ptp(centre[:, axis]) < 8
    else:
        assert np.ptp(centre, axis=0).max() < 0.5
        bright = masks & (frames.max(-1) > 0.8 * thing.tint.max())
        x, y = (centroids(bright) - centre).T
        turned = np.unwrap(np.arctan2(y, x))  # y points down: clockwise is positive
        velocity = (turned[-1] - turned[0]) / times[-1]
        assert np.sign(velocity) == {"spin left": -1, "spin right": 1}[action]
        radii = np.hypot(*(np.argwhere(masks[0])[:, ::-1] - centre[0]).T)
        assert abs(velocity) * radii.mean() == pytest.approx(9, rel=0.1)


def test_a_thing_without_speed_stands_still():
    actor = toy.scene(0, "val", 0).actor
    for action in toy.ACTIONS:
        _, masks, frames = alone(actor, action, [0.0, 0.7, 1.9], speed=0.0)
        assert (masks == masks[0]).all() and (frames == frames[0]).all()


def test_objects_keep_a_habit_of_place_in_training_alone(scenes):
    for split in toy.SPLITS:
        pairs = [(sc.actor.shape, sc.name) for sc in scenes[split]]
        home = np.mean([toy.SHAPES.index(shape) == toy.SCENES.index(name) for shape, name in pairs])
        if split == "train":
            assert home == pytest.approx(0.75 + 0.25 / 6, abs=0.02)
        else:
            assert home == pytest.approx(1 / 6, abs=0.02) and association(pairs) < 2.4
    for split in MANIFESTS:
        assert {sc.actor.shape for sc in scenes[split]} == set(toy.SHAPES)
        assert {sc.actor.action for sc in scenes[split]} == set(toy.ACTIONS)
        assert {sc.name for sc in scenes[split]} == set(toy.SCENES)


def test_nothing_else_tells_the_labels(scenes):
    """Chi squared over its degrees of freedom is about 1; home scenes in training make it 300."""
    assert association([(sc.actor.shape, sc.name) for sc in scenes["train"]]) > 200
    for split in MANIFESTS:
        for sc in scenes[split]:
            assert sc.bystander.action != sc.actor.action
        pairs = {
            "colours": [(sc.actor.colour, sc.bystander.colour) for sc in scenes[split]],
            "shapes": [(sc.actor.shape, sc.bystander.shape) for sc in scenes[split]],
            "actor": [(sc.actor.colour, sc.actor.shape) for sc in scenes[split]],
            "bystander": [(sc.bystander.colour, sc.bystander.shape) for sc in scenes[split]],
            "bystander's scene": [(sc.bystander.colour, sc.name) for sc in scenes[split]],
            "colour": [(sc.actor.colour, sc.actor.action) for sc in scenes[split]],
            "object": [(sc.actor.shape, sc.actor.action) for sc in scenes[split]],
            "scene": [(sc.name, sc.actor.action) for sc in scenes[split]],
            "mover": [(fastest(sc)[0], sc.actor.action) for sc in scenes[split]],
        }
        for name, pair in pairs.items():
            assert association(pair) < 2.4, (split, name)


def test_the_bystander_is_as_large_and_as_bright(scenes):
    things = {name: [getattr(sc, name) for sc in scenes["val"]] for name in ("actor", "bystander")}
    for measure in (lambda thing: thing.radius, lambda thing: thing.tint.mean()):
        measured = {name: [measure(thing) for thing in of] for name, of in things.items()}
        actor, bystander = (np.quantile(of, (0.1, 0.5, 0.9)) for of in measured.values())
        assert np.allclose(actor, bystander, rtol=0.06)
    light = {True: [], False: []}
    for thing in things["actor"][:200]:
        for striped, of in light.items():
            _, masks, frames = alone(thing, thing.action, [1.0], striped=striped)
            of.append(frames[masks].mean())
    assert np.mean(light[True]) == pytest.approx(np.mean(light[False]), rel=0.02)
    assert np.std(light[True]) == pytest.approx(np.std(light[False]), rel=0.05)


def fastest(sc):
    """Who moves most, and how much faster than the next."""
    speeds = {"actor": sc.actor.speed, "bystander": sc.bystander.speed}
    speeds["camera"] = np.hypot(*sc.camera)
    order = sorted(speeds, key=speeds.get)
    return order[-1], speeds[order[-1]] / max(speeds[order[-2]], 1e-9)


def test_in_half_of_the_videos_the_actor_does_not_move_most(scenes):
    for split in MANIFESTS:
        movers = Counter(fastest(sc)[0] for sc in scenes[split])
        for name, share in (("actor", 0.5), ("bystander", 0.25), ("camera", 0.25)):
            assert movers[name] / 2500 == pytest.approx(share, abs=0.02)
        assert min(fastest(sc)[1] for sc in scenes[split]) > 1.2
        assert all(7 <= sc.actor.speed <= 10 for sc in scenes[split])


def test_one_frame_tells_the_actor_from_the_bystander():
    """Down the middle of a square the actor's tones change once, the bystander's three times."""
    for row in range(50):
        sc = toy.scene(0, "val", row)
        for thing, changes in ((sc.actor, 1), (sc.bystander, 3)):
            _, _, frames = alone(thing, "move left", [1.0], speed=0.0, shape="square", angle=0.0)
            tones = frames[0, 23:41, 32].max(-1) > 0.8 * thing.tint.max()  # short of its edges
            assert np.abs(np.diff(tones.astype(int))).sum() == changes


# ---- what of it the masks see


def test_the_actor_covers_a_tenth_and_touches_a_third_of_the_tokens_at_most(drawn):
    _, masks = drawn
    grid = TINY["image_size"] // TINY["patch"]
    edges = np.round(np.linspace(0, toy.SIZE, grid + 1)).astype(int)
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    for index in (0, 1):
        slices = masks[:, index].reshape(120, -1, TINY["tubelet"], 64, 64)
        patches = itertools.product(parts, parts)
        touched = [slices[..., rows, columns].any((2, 3, 4)) for rows, columns in patches]
        share = np.mean(touched, 0)  # [120, t]
        area = slices.mean((2, 3, 4))
        assert area.mean() == pytest.approx(0.11, abs=0.01)
        assert np.quantile(area, 0.05) > 0.08 and area.max() < 0.15
        assert 0.24 < share.mean() < 0.3 and (share <= 1 / 3).mean() > 0.9 and share.max() < 0.42


def test_a_text_mask_hides_the_actor_and_leaves_context(drawn):
    _, masks = drawn
    grid = models.Encoder("tiny").grid
    assert grid == (4, 6, 6)
    actor = torch.tensor(masks[:, 0], dtype=torch.float32)
    actor = F.adaptive_avg_pool3d(actor, grid)  # the share of each token that the actor covers
    hidden = masking.make_mask("text", 0.6, 120, grid, saliency=actor).view(120, *grid)
    assert ((actor * hidden).sum((1, 2, 3)) / actor.sum((1, 2, 3))).min() > 0.98
    assert (~hidden).sum((2, 3)).eq(15).all()


# ---- the files


def test_the_files_hold_what_was_drawn(world):
    for split, count in (("train", 32), ("val", 24), ("probe", 32)):
        with open(world / f"data/{split}.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        masks = np.unpackbits(np.load(world / f"data/{split}.masks.npy"), axis=-1)
        bystanders = np.unpackbits(np.load(world / f"data/{split}.bystander.npy"), axis=-1)
        assert len(lines) == len(masks) == len(bystanders) == count
        assert list(lines[0]) == ["path", "label", "object", "scene", "caption", "bystander"]
        for row in (0, 11, 23):
            sc = toy.scene(0, split, row)
            times = np.arange(toy.FRAMES) / toy.FPS
            frames, (actor, bystander) = toy.render(sc, times)
            line = lines[row]
            assert line["label"] == sc.actor.action
            assert (line["object"], line["scene"]) == (sc.actor.shape, sc.name)
            assert line["caption"] == f"a {sc.actor.colour} {sc.actor.shape}"
            assert line["bystander"] == f"a {sc.bystander.colour} {sc.bystander.shape}"
            assert np.array_equal(masks[row], actor) and np.array_equal(bystanders[row], bystander)
            assert not (actor & bystander).any()
            decoded = read_frames(world / "data" / line["path"], times).astype(float)
            assert np.abs(decoded - frames).mean() < 6  # H.264 with halved colour


def test_masks_are_what_the_things_paint():
    """A pixel is the thing's where removing the thing changes it."""
    sc = toy.scene(0, "val", 5)
    frames, (actor, bystander) = toy.render(sc, [0.5, 1.5])
    without_actor, (rest,) = toy.render(sc, [0.5, 1.5], [sc.bystander])
    empty, none = toy.render(sc, [0.5, 1.5], [])
    assert len(none) == 0
    changed = (frames != without_actor).any(-1)
    assert (actor & ~changed).mean() < 1e-3
    assert (changed & ~actor).sum() < 0.25 * actor.sum()  # the half-transparent edge
    assert (bystander == rest & ~actor).all()
    assert (rest & ~(without_actor != empty).any(-1)).mean() < 1e-3


def test_the_world_is_the_same_each_time(world, tmp_path):
    toy.write_world(tmp_path, 32, 1, workers=2)
    for path in sorted(tmp_path.glob("videos/train/*.mp4")):
        assert path.read_bytes() == (world / "data/videos/train" / path.name).read_bytes()
    assert (tmp_path / "train.csv").read_bytes() == (world / "data/train.csv").read_bytes()


def test_a_world_that_is_made_again_is_not_whole_until_the_end(tmp_path, monkeypatch):
    toy.write_world(tmp_path, 2, 2, workers=1)
    whole = {f"{split}.masks.npy" for split in ("train", "probe", "val")}
    assert whole <= {path.name for path in tmp_path.iterdir()}
    own = (tmp_path / "val.csv").read_text()
    (tmp_path / "val.csv").write_text("path\nmine.mp4\n")
    with pytest.raises(ManifestError):
        toy.write_world(tmp_path, 2, 2, seed=1, workers=1)
    assert whole <= {path.name for path in tmp_path.iterdir()}  # refused: nothing is lost
    (tmp_path / "val.csv").write_text(own)
    monkeypatch.setattr(toy, "write_split", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy.write_world(tmp_path, 2, 2, seed=1, workers=1)
    assert not list(tmp_path.glob("*.npy"))


# ---- the tiny models


def test_the_models_see_no_video_of_a_manifest():
    """Their split has scenes of its own; an image has the captions of the things in it."""
    assert len(set(toy.SPLITS.values())) == 4
    rng = np.random.default_rng(0)
    for row in range(20):
        sc = toy.scene(0, "images", row)
        captions = {"both": [sc.actor.caption, sc.bystander.caption], "actor": [sc.actor.caption]}
        captions |= {"bystander": [sc.bystander.caption], "neither": ["nothing"]}
        for kind, expected in captions.items():
            image, made = toy_models.draw_image(0, row, rng, [kind])
            assert made == expected and image.shape == (64, 64, 3)
    drawn = [toy_models.draw_image(0, row, rng, toy_models.CLIP_IMAGES)[1] for row in range(500)]
    counts = Counter("nothing" if texts == ["nothing"] else len(texts) for texts in drawn)
    for kind in (1, 2):
        assert counts[kind] / 500 == pytest.approx(0.4, abs=0.06)
    assert counts["nothing"] / 500 == pytest.approx(0.2, abs=0.05)


def test_scores_of_known_maps():
    masks = np.zeros((1, toy.FRAMES, 64, 64), np.uint8)
    masks[:, :, 16:48, 16:32] = 1  # 4 x 2 patches of 8 x 8
    masks[:, :, 19:20, 32:40] = 1  # and a line through the middle of another
    packed = np.packbits(masks, axis=-1)
    truth = np.zeros((1, 2, 4, 8, 8))
    truth[..., 2:6, 2:4] = 1
    # the line is pointed at, but is not half of its patch
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


def test_what_a_guess_gets_that_knows_one_thing(tmp_path):
    head = "path,label,object,scene,caption,bystander\n"
    line = "x,{},{},{},a {} thing,a red ring\n"
    train = [("spin", "ring", "sky", "red")] * 3 + [("swing", "moon", "sky", "blue")] * 2
    train += [("spin", "moon", "dots", "blue")]
    val = [("swing", "ring", "sky", "blue"), ("spin", "moon", "sky", "red")]
    val += [("spin", "moon", "dots", "white")]
    for split, lines in (("probe", train), ("val", val)):
        text = head + "".join(line.format(*values) for values in lines)
        (tmp_path / f"{split}.csv").write_text(text)
    guess = lambda column, given: toy_report.usual_label(tmp_path, column, given)
    assert guess("object", "scene") == pytest.approx(2 / 3)  # ring, (moon), moon
    assert guess("label", "colour") == pytest.approx(2 / 3)  # swing, spin, never seen
    assert guess("object", "colour") == 0


def test_the_scene_says_nothing_of_a_held_out_object(tmp_path):
    """A guess by home scenes gets 0.79 of train.csv and no more than chance of val.csv, whichever
    split it was learnt on."""
    files = {}
    for split in ("train", "probe", "val"):
        lines = ["object,scene,caption"]
        for row in range(1500):
            sc = toy.scene(0, split, row)
            lines.append(f"{sc.actor.shape},{sc.name},{sc.actor.caption}")
        files[split] = "\n".join(lines)

    def guess(learnt_on, tested_on):
        (tmp_path / "probe.csv").write_text(files[learnt_on])
        (tmp_path / "val.csv").write_text(files[tested_on])
        return toy_report.usual_label(tmp_path, "object", "scene")

    assert guess("probe", "val") == pytest.approx(1 / 6, abs=0.03)
    assert guess("train", "val") == pytest.approx(1 / 6, abs=0.03)
    assert guess("train", "train") == pytest.approx(0.75 + 0.25 / 6, abs=0.03)


def test_the_tiny_blip_captions_held_out_videos():
    """Drawn, not decoded, to afford enough of them: three moments of 200 videos of val.csv."""
    model, processor = caption.load_model(BLIP, "cpu", torch.float32)
    scenes = [toy.scene(0, "val", row) for row in range(200)]
    items = []
    for sc in scenes:
        frames, _ = toy.render(sc, segment_midpoints(0, 2.0, 3))
        inputs = processor(images=list(frames), return_tensors="pt")
        items.append(Item(None, inputs))
    made = caption.describe(model, processor, items, "cpu", torch.float32, beams=1, max_tokens=30)
    right = [text == sc.actor.caption for sc, texts in zip(scenes, made) for text in texts]
    assert len(right) == 600 and np.mean(right) >= 0.9


def test_caption_match(world):
    with open(world / "data/val.csv", newline="") as file:
        truth = [line["caption"] for line in csv.DictReader(file)]
    lines = (world / "data/val.captions.jsonl").read_text().splitlines()
    made = [json.loads(line)["captions"] for line in lines]
    right = sum(text == true for texts, true in zip(made, truth) for text in texts)
    assert toy_report.caption_match(world / "data") == pytest.approx(right / 72) and right > 48


@torch.inference_mode()
def test_the_tiny_clip_finds_what_the_caption_names():
    """Either thing, by its own caption, in two moments of 100 drawn videos of val.csv."""
    clip, tokenizer = clip_models.load_clip(CLIP, "openai", None, "cpu")
    mean = torch.tensor(clip.visual.image_mean)[:, None, None]
    std = torch.tensor(clip.visual.image_std)[:, None, None]
    scenes = [toy.scene(0, "val", row) for row in range(100)]
    maps = {"actor": [], "bystander": []}
    for sc in scenes:
        frames, _ = toy.render(sc, segment_midpoints(0, 2.0, 2))
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        patches = saliency.patch_features(clip.visual, (frames / 255 - mean) / std, "self")
        for name, of in maps.items():
            text = clip.encode_text(tokenizer([getattr(sc, name).caption]), normalize=True)[0]
            of.append((patches @ text).view(1, 2, 8, 8).numpy())
    times = np.arange(toy.FRAMES) / toy.FPS
    masks = np.packbits([toy.render(sc, times)[1] for sc in scenes], axis=-1)  # [100, 2, 20, 64, 8]
    masks = {"actor": masks[:, 0], "bystander": masks[:, 1]}
    for name, other in (("actor", "bystander"), ("bystander", "actor")):
        pointing, auc, chance = toy_report.score_saliency(np.stack(maps[name]), masks[name])
        assert pointing >= 0.85 and auc >= 0.80 and chance < 0.25, (name, pointing, auc)
        assert toy_report.score_saliency(np.stack(maps[name]), masks[other])[0] < 0.25


def test_the_tiny_clip_finds_the_actor_in_decoded_videos(world):
    masks, bystander = (np.load(world / f"data/val.{name}.npy") for name in ("masks", "bystander"))
    maps = np.load(world / "data/val.saliency.npy")
    pointing, auc, chance = toy_report.score_saliency(maps, masks)
    assert pointing >= 0.8 and auc >= 0.75 and chance < 0.25
    assert toy_report.score_saliency(maps, bystander)[0] < 0.3


def test_the_models_can_be_remade(tmp_path):
    """Two steps of training write folders that the stages can open."""
    run("data/toy_models.py", "--steps", 2, "--out", tmp_path)
    run("data/toy.py", "--train", 2, "--val", 1, "--workers", 1, cwd=tmp_path)
    run("caption.py", "--model", tmp_path / "blip", "--workers", 0, cwd=tmp_path)
    run("saliency.py", "--clip", f"local-dir:{tmp_path}/clip", "--workers", 0, cwd=tmp_path)
    lines = (tmp_path / "data/train.captions.jsonl").read_text().splitlines()
    assert len(json.loads(lines[1])["captions"]) == 3
    assert np.load(tmp_path / "data/train.saliency.npy").shape == (2, 3, 16, 8, 8)
    for file in (ROOT / "data/toy").rglob("*.safetensors"):
        assert file.stat().st_size < 4e6


def test_manifests_of_other_people_stay(tmp_path):
    (tmp_path / "data").mkdir()
    own = tmp_path / "data/val.csv"
    own.write_text("path,label\nmine.mp4,cat\n")
    few = ("--train", 1, "--val", 1, "--workers", 1)
    line = run("data/toy.py", *few, cwd=tmp_path, process=True, fails=True)
    assert line.startswith("data/val.csv: ") and line.endswith("(--out writes elsewhere)")
    assert own.read_text() == "path,label\nmine.mp4,cat\n"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["val.csv"]
    own.unlink()
    for _ in range(2):  # its own files it writes again
        run("data/toy.py", *few, cwd=tmp_path, process=True)
