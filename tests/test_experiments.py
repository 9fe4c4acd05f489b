"""The measurements of experiments/: known answers, and that the scripts print their tables."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import masks
import numpy as np
import pytest
import torch
import toy
from conftest import ROOT, run
from test_motion import FPS, HEIGHT, ONE_REFERENCE, WIDTH, pan

from tgm.manifest import Video


@pytest.fixture(scope="module")
def scenes():
    return [toy.scene(0, "val", row) for row in range(40)]


def test_the_true_field_has_no_error(scenes):
    field = np.zeros((40, 4, 2, 8, 8), np.float32)
    for row, sc in enumerate(scenes):
        field[row] = sc.camera[:, None, None] / toy.SIZE
        _, (mask, _) = toy.render(sc, (np.arange(4) + 0.5) / 2)
        on = mask.reshape(4, 8, 8, 8, 8).mean((2, 4)) >= 0.5
        field[row].swapaxes(0, 1)[:, on] = sc.actor.travel[:, None] / toy.SIZE
    found = masks.field_error(field, scenes)
    assert sum(n for _, _, n in found.values()) == sum(map(masks.moves, scenes)) > 10
    for right, error, _ in found.values():
        assert right == 1 and error < 1e-5
    backwards = masks.field_error(-field, scenes)
    assert all(
        right == 0 and error == pytest.approx(2, abs=1e-5) for right, error, _ in backwards.values()
    )


def test_share_and_constancy_of_known_masks(scenes):
    everything = torch.ones(40, 512, dtype=torch.bool)
    nothing = torch.zeros(40, 512, dtype=torch.bool)
    left = nothing.view(40, 8, 8, 8).clone()
    left[..., :4] = True
    for thing in (0, 1):
        true = np.stack([toy.render(sc, np.arange(16) / 10)[1][thing] for sc in scenes])
        seen = masks.render_things(scenes)[:, thing]
        assert (masks.hidden_share(everything, seen) == 1).all()
        assert (masks.hidden_share(nothing, seen) == 0).all()
        assert np.allclose(
            masks.hidden_share(left.flatten(1), seen),
            true[..., :32].sum((1, 2, 3)) / true.sum((1, 2, 3)),
        )
    assert (masks.constancy(nothing, scenes) == 1).all()
    assert np.isnan(masks.constancy(everything, scenes)).all()
    alternate = nothing.view(40, 8, 64).clone()
    # every other slice sees all, the rest nothing: of 28 pairs 6 agree, 16 do not, 6 see nothing
    alternate[:, ::2] = True
    assert np.allclose(masks.constancy(alternate.flatten(1), scenes), 6 / 22)


def test_points_stay_on_the_actor(scenes):
    for sc in scenes[:12]:
        _, (drawn, _) = toy.render(sc, masks.SLICES)
        at = masks.actor_points(sc)
        assert at.shape[0] == 8 and at.shape[1] > 100
        x, y = at.astype(int).transpose(2, 0, 1)
        # but for those in pixels that the edge cuts
        assert drawn[np.arange(8)[:, None], y, x].mean() > 0.93


def test_the_true_field_explains_the_pictures(tmp_path):
    video = Video(pan(tmp_path / "pan.mp4", options=ONE_REFERENCE), None, None, None, 0, "pan.mp4")
    field = np.zeros((1, 4, 2, 4, 4), np.float16)
    assert masks.warp_error(field, [video], 0.1) == [1.0]
    field[:, :, 0], field[:, :, 1] = 3 * FPS / WIDTH, -2 * FPS / HEIGHT
    assert masks.warp_error(field, [video], 0.1)[0] < 0.5
    assert masks.warp_error(-field, [video], 0.1)[0] > 0.9
    assert masks.warp_error(field * np.float16(np.nan), [video], 0.1) == []


def test_the_tables(world):
    data = ("--data", "data/val.csv")
    out = run("experiments/masks.py", *data, "--field", "again=data/val", cwd=world)
    assert out.count("| beside the manifest | ") == out.count("| again | ") == 2
    assert len([line for line in out.splitlines() if line.startswith("| 0.75 | motion")]) == 4
    actor, bystander = (
        {name: float(value) for name, value in re.findall(r"\| 0.6 \| (\S+) \| (\S+)", table)}
        for table in out.split("### ")[2:4]
    )
    assert actor.keys() == bystander.keys() == set(masks.masking.MASKS)
    assert actor["tube"] < 0.9
    assert actor["text"] > actor["tube"] > actor["text-inverse"]
    assert bystander["text"] < actor["text"]
    out = run("experiments/masks.py", "--warp", *data, cwd=world)
    assert "| beside the manifest | 24 of 24 |" in out


def test_refusals(world):
    data = ("--data", "data/val.csv")
    line = run("experiments/masks.py", *data, "--field", "x=nowhere", cwd=world, fails=True)
    assert line.endswith(
        "make it with: python saliency.py --data data/val.csv --cue motion --grid 8"
    )
    line = run("experiments/masks.py", "--data", "data/train.csv", cwd=world, fails=True)
    assert line == "data/train.csv: is not the val.csv that data/toy.py writes with seed 0"


# ---- scripts that are seldom run -----------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("*.py")))
def test_scripts_use_names_that_their_modules_have(name):
    """gpu.py needs a GPU, others take hours: nobody would notice soon that a name has gone."""
    script = importlib.import_module(name)
    tree = ast.parse(Path(script.__file__).read_text())
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in used:
        owner = getattr(script, node.value.id, None) if isinstance(node.value, ast.Name) else None
        if inspect.ismodule(owner) and getattr(owner, "__file__", None):
            assert hasattr(owner, node.attr), f"{name}.py:{node.lineno}: {owner.__name__}"
