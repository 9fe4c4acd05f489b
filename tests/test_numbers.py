"""Numbers gone wrong, and data at its edges: each has a defined end."""

import json

import numpy as np
import open_clip
import pytest
import torch
from conftest import BLIP, CLIP, run

import finetune
import pretrain
import saliency
from tgm import clip as clip_models

TINY = ("--size", "tiny", "--epochs", 1, "--warmup-epochs", 0, "--workers", 0, "--picture-every", 0)


def last(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


def broken_gradient(value):
    """Adds nothing to a number, and NaN to its gradient: sqrt at 0."""
    return value + (value * 0).sqrt()


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(copy, monkeypatch, script):
    model = pretrain.models.VideoMAE if script == "pretrain" else finetune.models.VideoViT
    forward = model.forward
    run(f"{script}.py", *TINY[:8], "--batch-size", 8, "--max-steps", 1, "--out", "run", cwd=copy)
    before = (copy / "run/checkpoint.pt").read_bytes()
    monkeypatch.setattr(
        model,
        "forward",
        lambda self, *args, **rest: (
            pretrain.models.MAEOutput(*map(broken_gradient, forward(self, *args, **rest)))
            if script == "pretrain"
            else broken_gradient(forward(self, *args, **rest))
        ),
    )
    line = run(
        f"{script}.py",
        *TINY[:8],
        *"--batch-size 8 --max-steps 3 --resume auto --out run".split(),
        cwd=copy,
        fails=True,
    )
    assert (
        line.startswith(
            "step 2: the loss or its gradient is not finite; the last checkpoint is kept. Its batch: "
        )
        and line.count(".mp4") == 8
    )
    assert (copy / "run/checkpoint.pt").read_bytes() == before


def test_text_that_is_not_finite(copy):
    """Another video takes the sample's place."""
    array = np.load(copy / "data/train.text.npy", mmap_mode="r+")
    array[[4, 9], :, 5] = np.inf
    array.flush()
    flags = (*TINY, "--batch-size", 16, "--mask", "tube")
    run("pretrain.py", *flags, "--max-bad", 0.1, cwd=copy)
    assert last(copy / "runs/tube")["skipped"] == 2
    assert np.isfinite(last(copy / "runs/tube")["loss_nce"])
    line = run("pretrain.py", *flags, "--max-bad", 0, "--out", "strict", cwd=copy, fails=True)
    assert line.startswith("2 of 32 videos cannot be read, more than --max-bad 0.0: videos/train/")


def test_saliency_that_is_not_finite(copy):
    """Of CLIP: the row stays empty, with a line that says so. In an array that is there: another
    video takes the sample's place.
    """
    array = np.load(copy / "data/train.saliency.npy", mmap_mode="r+")
    array[4, :, 3, 2, 2], array[9, :, 1, 1, 0] = np.nan, np.inf
    array.flush()
    run("pretrain.py", *TINY, "--batch-size", 16, "--mask", "text", "--max-bad", 0.1, cwd=copy)
    assert last(copy / "runs/text")["skipped"] == 2 and np.isfinite(
        last(copy / "runs/text")["loss_mae"]
    )
    line = run(
        "pretrain.py",
        *TINY,
        *"--batch-size 16 --mask text --out strict".split(),
        cwd=copy,
        fails=True,
    )
    assert line.startswith("2 of 32 videos cannot be read, more than --max-bad 0.05: videos/train/")


def test_clip_that_gives_nan(copy, monkeypatch):
    features = saliency.patch_features

    def spoilt(visual, images, dense):
        made = features(visual, images, dense)
        made[2 * 8] = np.nan  # the third video's first moment
        return made

    monkeypatch.setattr(saliency, "patch_features", spoilt)
    out = run(
        "saliency.py",
        "--clip",
        CLIP,
        *"--moments 8 --batch-size 16 --workers 0 --out x".split(),
        cwd=copy,
    )
    assert "30 of 32 videos" in out
    assert np.flatnonzero(np.isnan(np.load(copy / "x.saliency.npy")[:, 0, 0, 0, 0])).tolist() == [
        2,
        18,
    ]
    monkeypatch.undo()
    assert "2 to do" in run(
        "saliency.py",
        "--clip",
        CLIP,
        *"--moments 8 --batch-size 16 --workers 0 --out x".split(),
        cwd=copy,
    )
    assert np.isfinite(np.load(copy / "x.saliency.npy")).all()


def test_saliency_that_is_all_equal_masks_at_random(copy):
    """No map prefers anything: the text mask is the random one of each slice, from the sample's
    own noise.
    """
    mask = pretrain.masking.make_mask(
        "text",
        0.6,
        200,
        (4, 4, 4),
        saliency=torch.full((200, 4, 4, 4), 0.25),
        generator=torch.Generator().manual_seed(0),
    )
    assert (mask.view(200, 4, 16).sum(2) == 9).all()
    assert ((mask.float().mean(0) - 9 / 16).abs() < 4 * (9 / 16 * 7 / 16 / 200) ** 0.5).all()
    array = np.load(copy / "data/train.saliency.npy", mmap_mode="r+")
    array[:] = 0.25
    array.flush()
    run("pretrain.py", *TINY, "--batch-size", 16, "--mask", "text", cwd=copy)
    assert np.isfinite(last(copy / "runs/text")["loss_mae"])


def test_captions_that_are_empty_or_a_thousand_words_long(copy):
    """CLIP's tokenizer cuts a text; an empty one is a text too. A list without captions is a
    video that is left out.
    """
    path = copy / "data/train.captions.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    words = " ".join(f"red circle {number}" for number in range(334))
    entries[0]["captions"] = [""] * 3
    entries[1]["captions"] = [words] * 3
    entries[2]["captions"] = []
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    out = run("saliency.py", "--clip", CLIP, "--moments", 8, "--workers", 0, "--out", "x", cwd=copy)
    assert "1 videos without captions" in out and "31 of 32 videos" in out
    text = np.load(copy / "x.text.npy").astype(np.float32)
    assert np.isfinite(np.delete(text, 2, 0)).all() and np.isnan(text[2]).all()
    assert np.abs(np.linalg.norm(text[:2], axis=-1) - 1).max() < 1e-3
    tokenizer = open_clip.get_tokenizer(CLIP)
    model, _ = clip_models.load_clip(CLIP, None, None, "cpu")
    tokens = tokenizer([words, " ".join(words.split()[:400])])
    # only its beginning counts
    assert tokens.shape == (2, model.context_length) and torch.equal(*tokens)
    with torch.inference_mode():
        assert np.allclose(
            model.encode_text(tokens, normalize=True)[0].numpy(), text[1, 0], atol=1e-3
        )
    assert "31 of 32 videos usable" in run(
        "pretrain.py", *TINY, "--batch-size", 8, "--companions", "x", "--out", "run", cwd=copy
    )


def test_a_batch_of_one(copy):
    """Contrast needs others: among one the contrastive loss is 0, and the rest learns;
    fine-tuning, captions, saliency, probes work.
    """
    run(
        "pretrain.py",
        *TINY,
        *"--batch-size 1 --max-steps 3 --log-every 1 --mask text".split(),
        cwd=copy,
    )
    assert (
        last(copy / "runs/text")["loss_nce"] == 0 and 0.5 < last(copy / "runs/text")["loss_mae"] < 2
    )
    run(
        "finetune.py",
        *TINY[:8],
        *"--batch-size 1 --repeat 1 --max-steps 2 --views 1 1".split(),
        cwd=copy,
    )
    assert json.loads((copy / "runs/finetune/test.json").read_text())["videos"] == 24
    run(
        "caption.py",
        "--data",
        "data/train.csv",
        "--model",
        BLIP,
        *"--batch-size 1 --out c.jsonl --workers 0".split(),
        cwd=copy,
    )
    assert (copy / "c.jsonl").read_text() == (copy / "data/train.captions.jsonl").read_text()
    run(
        "saliency.py",
        "--clip",
        CLIP,
        *"--moments 8 --batch-size 1 --workers 0 --out one".split(),
        cwd=copy,
    )
    assert (
        np.abs(
            np.load(copy / "one.saliency.npy").astype(float)
            - np.load(copy / "data/train.saliency.npy")
        ).max()
        < 2e-3
    )
    run(
        "linprobe.py",
        *(
            "--checkpoint none --size tiny --batch-size 1 --epochs 2 --seeds 1 "
            "--workers 0 --out probe"
        ).split(),
        cwd=copy,
    )
    assert 0 <= json.loads((copy / "probe/label.json").read_text())["linear"] <= 1


def test_classes_of_one_video_and_numbers_with_gaps(copy):
    """Classes are those that occur in training, numbers in the order of numbers: 3, 20, 100 are
    the classes 0, 1, 2.
    """
    lines = (copy / "data/train.csv").read_text().splitlines()
    names = [line.split(",")[0] for line in lines[1:9]]
    labels = [100, 3, 3, 3, 20, 20, 20, 20]  # one video of class 100
    (copy / "data/few.csv").write_text(
        "path,label\n" + "".join(f"{name},{label}\n" for name, label in zip(names, labels))
    )
    flags = (
        "--data",
        "data/few.csv",
        "--val",
        "data/few.csv",
        *TINY[:8],
        *"--batch-size 4 --views 1 1".split(),
    )
    run("finetune.py", *flags, cwd=copy)
    saved = torch.load(copy / "runs/finetune/checkpoint.pt", weights_only=True)
    assert (
        saved["args"]["classes"] == ["3", "20", "100"]
        and saved["model"]["head.weight"].shape[0] == 3
    )
    rows = [
        line.split(",")
        for line in (copy / "runs/finetune/per_class.csv").read_text().splitlines()[1:]
    ]
    assert [(row[0], row[1]) for row in rows] == [("3", "3"), ("20", "4"), ("100", "1")]
    assert json.loads((copy / "runs/finetune/test.json").read_text())["majority"] == 0.5
