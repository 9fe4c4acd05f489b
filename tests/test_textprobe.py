"""Names of classes as an array, and what linprobe.py measures with a trained contrastive head:
known answers through the command line, and wrong uses.
"""

import json
import os
import shutil

import numpy as np
import open_clip
import pytest
import torch
import toy
import toy_report
from conftest import CLIP, run

from tgm import classes as tgm_classes
from tgm import textprobe
from tgm.checkpoints import read_checkpoint
from tgm.manifest import ManifestError

CLASSES = ("saliency.py", "--cue", "classes", "--clip", CLIP, "--classes", "names.txt")
COLOURS = [f"a {colour} {{}}" for colour in toy.COLOURS]
PRETRAIN = ("pretrain.py", "--size", "tiny", "--batch-size", 8, "--epochs", 1, "--workers", 0)
PROBE = ("linprobe.py", "--workers", 0, "--epochs", 2, "--seeds", 1, "--k", 5, "--clips", 1)
OBJECT = ("--label-column", "object")
NO_HEAD = "no zero-shot, no retrieval: the checkpoint has no head that captions trained"


def write_names(folder, names=toy.SHAPES):
    (folder / "names.txt").write_text("\n".join(names) + "\n\n")


# ---- the array of classes ------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [COLOURS, None, "templates"])
def test_the_array_is_the_mean_over_prompts_as_open_clip_embeds_them(copy, prompts):
    write_names(copy)
    if prompts == "templates":
        flags = ["--clip-templates"]
        texts = [
            [make(name) for make in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in toy.SHAPES
        ]
    elif prompts is None:
        flags = []
        texts = [[f"a video of {name}."] for name in toy.SHAPES]
    else:
        flags = ["--prompt", *prompts]
        texts = [[f"a {colour} {name}" for colour in toy.COLOURS] for name in toy.SHAPES]
    shutil.rmtree(copy / "data/videos", ignore_errors=True)
    (copy / "data/videos").unlink(missing_ok=True)  # it reads none
    out = run(*CLASSES, *flags, "--data", "data/val.csv", cwd=copy)
    assert out == f"data/val.classes.npy: 6 classes, {len(texts[0])} prompts, {CLIP}\n"
    array = np.load(copy / "data/val.classes.npy")
    assert array.shape == (6, 128) and array.dtype == np.float16
    assert np.allclose(np.linalg.norm(array.astype(np.float32), axis=1), 1, atol=2e-3)
    model, tokenizer = open_clip.create_model(CLIP).eval(), open_clip.get_tokenizer(CLIP)
    for row, of_class in zip(array, texts, strict=True):
        with torch.no_grad():
            mean = model.encode_text(tokenizer(of_class), normalize=True).mean(0)
        assert np.allclose(row, mean / mean.norm(), atol=1e-3)
    about = json.loads((copy / "data/val.classes.json").read_text())
    assert about["names"] == list(toy.SHAPES) and about["activation"] == "GELU"
    assert about["clip"] == CLIP and about["pretrained"] is None and len(about["classes"]) == 16
    assert len(about["prompts"]) == len(texts[0])


def test_the_array_is_kept_until_it_is_to_be_remade(copy):
    write_names(copy)
    path = copy / "data/train.classes.npy"
    run(*CLASSES, cwd=copy)
    first = path.read_bytes(), path.stat().st_mtime_ns
    run(*CLASSES, cwd=copy)
    assert first == (path.read_bytes(), path.stat().st_mtime_ns)
    line = run(*CLASSES, "--prompt", "a {}", cwd=copy, fails=True)
    assert line == (
        "data/train.classes.npy: made with prompts ['a video of {}.'], not ['a {}']: give the "
        "earlier settings again, or --resume none remakes it"
    )
    write_names(copy, toy.SHAPES[::-1])
    line = run(*CLASSES, cwd=copy, fails=True)
    assert line == (
        "data/train.classes.npy: made with other classes: give the earlier settings again, or "
        "--resume none remakes it"
    )
    run(*CLASSES, "--resume", "none", cwd=copy)
    path = copy / "data/train.classes.npy"
    path.write_bytes(path.read_bytes()[:100])
    line = run(*CLASSES, cwd=copy, fails=True)
    assert line.startswith("data/train.classes.npy: cannot be read (")
    assert line.endswith("); --resume none remakes it")
    run(*CLASSES, "--resume", "none", cwd=copy)
    rows = np.load(path)
    assert np.allclose(rows[::-1], np.frombuffer(first[0][-rows.nbytes :], "f2").reshape(6, 128))
    before = path.read_bytes()
    run(*CLASSES, "--out", "two", cwd=copy, ranks=2)
    assert (copy / "two.classes.npy").read_bytes() == before


def test_foreign_files_are_not_overwritten(copy):
    write_names(copy)
    (copy / "data/train.classes.json").write_text('{"mine": 1}')
    assert "not overwritten" in run(*CLASSES, "--resume", "none", cwd=copy, fails=True)
    (copy / "data/train.classes.json").unlink()
    (copy / "data/train.classes.npy").write_text("mine")
    assert "not overwritten" in run(*CLASSES, "--resume", "none", cwd=copy, fails=True)
    assert (copy / "data/train.classes.npy").read_text() == "mine"


@pytest.mark.parametrize(
    "content, line",
    [
        (b"", "--classes names.txt:1: expected a class name, found none"),
        (b" \n\n", "--classes names.txt:1: expected a class name, found none"),
        (b"a\n \nb\n", "--classes names.txt:2: expected a class name, found none"),
        (b"a\nb\n a \n", "--classes names.txt:3: 'a' is in line 1 already"),
        (b"\xff\xfe\x00", "--classes names.txt: expected UTF-8 text, a class name per line"),
        (None, "--classes names.txt: cannot be read (No such file or directory)"),
    ],
)
def test_names_that_are_refused(copy, content, line):
    if content is not None:
        (copy / "names.txt").write_bytes(content)
    assert run(*CLASSES, cwd=copy, fails=True) == line
    assert not (copy / "data/train.classes.npy").exists()


@pytest.mark.parametrize(
    "flags, line",
    [
        (("--prompt", "a thing"), "expected {} where the name goes, found 'a thing'"),
        (("--prompt", "{}", "--clip-templates"), "not allowed with argument --prompt"),
        (("--moments", 3), "--moments is for --cue text and --cue motion"),
        (("--extend",), "--extend is for --cue text and --cue motion"),
        (("--captions", "c.jsonl"), "--captions is for --cue text"),
        (("--flow", "raft"), "--flow is for --cue motion"),
        (("--cue", "text"), "--classes is for --cue classes"),
    ],
)
def test_flags_that_are_refused(copy, flags, line):
    write_names(copy)
    assert line in run(*CLASSES, *flags, cwd=copy, fails=True)
    line = run("saliency.py", "--cue", "classes", cwd=copy, fails=True)
    assert "--cue classes needs --classes FILE" in line
    line = run(*CLASSES, "--out", "data/", cwd=copy, fails=True)
    assert line.startswith("--out data/: is a folder")


# ---- what linprobe.py measures -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A world with an array of classes and a checkpoint of a few steps. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(world / "data", folder / "data", ignore=shutil.ignore_patterns("videos"))
    (folder / "data/videos").symlink_to(world / "data/videos")
    write_names(folder)
    run(*CLASSES, "--prompt", *COLOURS, "--data", "data/val.csv", cwd=folder)
    run(*PRETRAIN, cwd=folder)
    return folder


@pytest.fixture
def own(trained, tmp_path):
    """Such a world, to be written to."""
    folder = tmp_path / "own"
    shutil.copytree(trained, folder, symlinks=True)
    return folder


def probe(folder, *flags):
    """-> (what linprobe.py prints, its result)."""
    out = run(*PROBE, "--checkpoint", "runs/text/checkpoint.pt", *OBJECT, *flags, cwd=folder)
    return out, json.loads((folder / "runs/text/probe/object.json").read_text())


def rewrite(path, values):
    """Fills an array on the disk with other values."""
    array = np.load(path, mmap_mode="r+")
    array[:] = values
    array.flush()


def known_features(folder):
    """Puts a random feature in the place of every test video's -> what the head makes of them."""
    probe(folder)  # features of a copied folder are made again
    path = folder / "runs/text/probe/test.features.npy"
    features = np.random.default_rng(0).normal(size=np.load(path).shape).astype(np.float32)
    rewrite(path, features)
    state = read_checkpoint(folder / "runs/text/checkpoint.pt")
    video = features @ state["contrastive.proj.weight"].numpy().T
    return video / np.linalg.norm(video, axis=1, keepdims=True)


def labels(folder):
    lines = (folder / "data/val.csv").read_text().splitlines()
    return [toy.SHAPES.index(line.split(",")[2]) for line in lines[1:]]


def test_the_lines_follow_a_few_steps_of_pretraining(own):
    out, result = probe(own)
    assert "zero-shot of 6 classes, chance in brackets\n  top-1 " in out and "(0.167)" in out
    assert "video to text" in out and "text to video" in out and "monitored" not in out
    assert f"  top-1           {result['zero_shot']:.3f} (0.167)" in out
    low, high = result["zero_shot_bootstrap"]
    assert low <= result["zero_shot"] <= high and result["zero_shot_classes"] == 6
    assert result["text_to_video"]["answers"] == result["video_to_text"]["queries"] == 24
    assert result["monitored_head"] is False
    state = read_checkpoint(own / "runs/text/checkpoint.pt")  # written out
    features = np.load(own / "runs/text/probe/test.features.npy")
    similar = features @ state["contrastive.proj.weight"].numpy().T
    similar = similar @ np.load(own / "data/val.classes.npy").T.astype(np.float32)
    assert result["zero_shot"] == pytest.approx(np.mean(similar.argmax(1) == labels(own)))
    before = {split: (own / f"data/{split}.csv").read_text() for split in ("train", "val")}
    for split, text in before.items():  # the classes' numbers in their place
        for number, name in enumerate(toy.SHAPES):
            text = text.replace(f",{name},", f",{number},")
        (own / f"data/{split}.csv").write_text(text)
    assert probe(own)[1]["zero_shot"] == result["zero_shot"]
    for split, text in before.items():
        (own / f"data/{split}.csv").write_text(text)
    _, augmented = probe(own, "--augment", 1)  # of training videos alone
    keys = ("zero_shot", "video_to_text", "text_to_video")
    assert [result[key] for key in keys] == [augmented[key] for key in keys]


def test_equal_and_permuted_embeddings(own):
    video = known_features(own)
    rewrite(own / "data/val.text.npy", video[:, None])
    of_class = np.array(labels(own))
    classes = np.stack([video[of_class == number].mean(0) for number in range(6)])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    rewrite(own / "data/val.classes.npy", classes)
    _, result = probe(own)
    assert result["zero_shot"] == result["zero_shot_top5"] == 1.0
    for way in ("video_to_text", "text_to_video"):
        found = result[way]
        assert found["recall_1"] == found["recall_10"] == found["median_rank"] == 1
        assert found["chance_1"] == pytest.approx(1 / 24)
        assert found["chance_10"] == pytest.approx(10 / 24)
    rewrite(own / "data/val.text.npy", np.roll(video, 1, 0)[:, None])
    rewrite(own / "data/val.classes.npy", np.roll(classes, 1, 0))
    out, result = probe(own)
    assert result["zero_shot"] == 0 and "  top-1           0.000 (0.167)" in out
    for way in ("video_to_text", "text_to_video"):
        assert result[way]["recall_1"] == 0 and result[way]["median_rank"] > 1


def test_the_demos_table(own):
    """Of known embeddings: the head knows all, and its shuffled outputs about as much as chance."""
    video = known_features(own)
    rewrite(own / "data/val.text.npy", video[:, None])
    of_class = np.array(labels(own))
    classes = np.stack([video[of_class == number].mean(0) for number in range(6)])
    rewrite(own / "data/val.classes.npy", classes / np.linalg.norm(classes, axis=1)[:, None])
    probe(own)
    rows = list(toy_report.head_rows(own / "data", own / "runs"))
    assert [row[0] for row in rows] == [
        "object, top-1",
        *[
            f"{way}, recall at {most}"
            for way in ("video to text", "text to video")
            for most in (1, 5)
        ],
    ]
    assert [row[1] for row in rows] == [1.0] * 5
    assert all(row[2] < 0.5 for row in rows) and rows[0][3] == pytest.approx(1 / 6)
    assert [row[3] for row in rows[1:]] == pytest.approx([1 / 24, 5 / 24] * 2)


def test_ties_and_names(own):
    video = known_features(own)
    rewrite(own / "data/val.classes.npy", video[0])  # the same for all
    assert probe(own)[1]["zero_shot_top5"] == 0
    # two names of six, and one that never occurs: it takes part, the others' videos are wrong
    write_names(own, ["moon", "unicorn", "ring"])
    run(*CLASSES, "--data", "data/val.csv", "--resume", "none", cwd=own)
    of_class = np.array(labels(own))
    shapes = [toy.SHAPES.index("moon"), toy.SHAPES.index("ring")]
    moon, ring = (video[of_class == number].mean(0) for number in shapes)
    rewrite(own / "data/val.classes.npy", np.stack([moon, -moon - ring, ring]))
    out, result = probe(own)
    assert result["zero_shot"] == pytest.approx(np.isin(of_class, shapes).mean())
    assert result["zero_shot_classes"] == 3
    assert (
        "data/val.classes.npy: labels without a name there count as wrong: "
        "circle, cross, square, triangle\n" in out
    )


def number_labels(folder):
    """Writes numbers from 1 for the labels of both manifests -> {label: number}."""
    numbers = dict(zip(toy.SHAPES, "123456", strict=True))
    for split in ("train", "val"):
        path = folder / f"data/{split}.csv"
        text = path.read_text()
        for name, number in numbers.items():
            text = text.replace(f",{name},", f",{number},")
        path.write_text(text)
    return numbers


def test_labels_are_numbers_only_if_none_is_a_name(own):
    """Names that are numbers: a label without a name is unknown, and not the class of that place."""
    numbers = number_labels(own)
    for split in ("train", "val"):
        path = own / f"data/{split}.csv"
        path.write_text(path.read_text().replace(f",{numbers['moon']},", ",0,"))
    path = own / "data/val.classes.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"names": list(numbers.values())}))
    out, _ = probe(own)
    assert "data/val.classes.npy: labels without a name there count as wrong: 0\n" in out


def test_labels_that_count_from_1_are_not_taken_for_numbers_from_0(own):
    number_labels(own)
    assert (
        "no zero-shot: data/val.classes.npy: the labels are numbers from 1 to 6, but its classes "
        "count from 0\n" in probe(own)[0]
    )


def test_classes_that_are_not_finite(copy, own, monkeypatch):
    """They are not written; in an array that is there, their videos count as wrong."""
    write_names(copy)
    embed = tgm_classes.embed_names

    def spoilt(*args):
        array = embed(*args)
        array[1, 5] = np.inf
        return array

    monkeypatch.setattr(tgm_classes, "embed_names", spoilt)
    line = run(*CLASSES, cwd=copy, fails=True)
    assert line == f"--clip {CLIP}: embeds {toy.SHAPES[1]!r} with numbers that are not finite"
    assert not (copy / "data/train.classes.npy").exists()
    video = known_features(own)
    of_class = np.array(labels(own))
    classes = np.stack([video[of_class == number].mean(0) for number in range(6)])
    classes[2] = np.nan
    rewrite(own / "data/val.classes.npy", classes)
    assert probe(own)[1]["zero_shot_top5"] == pytest.approx((of_class != 2).mean())


def test_two_ranks_are_one(own):
    _, one = probe(own)
    shutil.rmtree(own / "runs/text/probe")
    flags = (*PROBE, "--checkpoint", "runs/text/checkpoint.pt", *OBJECT)
    out = run(*flags, cwd=own, ranks=2)
    two = json.loads((own / "runs/text/probe/object.json").read_text())
    assert out.count("video to text") == 1
    for way in ("video_to_text", "text_to_video"):
        assert two[way] == pytest.approx(one[way], abs=0.05)
    assert two["zero_shot"] == pytest.approx(one["zero_shot"], abs=0.05)


def test_without_a_trained_head_there_is_one_line(own):
    out = run(*PROBE, "--checkpoint", "none", "--size", "tiny", "--out", "p", *OBJECT, cwd=own)
    assert NO_HEAD in out.splitlines() and "retrieval" not in out.replace(NO_HEAD, "")
    state = read_checkpoint(own / "runs/text/checkpoint.pt")  # as others write it
    state = {key: value for key, value in state.items() if not key.startswith("contrastive.")}
    torch.save({"model": state}, own / "other.pt")
    flags = ("--size", "tiny", "--out", "q")
    out = run(*PROBE, "--checkpoint", "other.pt", *flags, *OBJECT, cwd=own)
    assert NO_HEAD in out.splitlines()
    (own / "data/train.text.npy").unlink()
    run(*PRETRAIN, "--nce-weight", 0, "--mask", "tube", "--out", "runs/bare", cwd=own)
    out = run(*PROBE, "--checkpoint", "runs/bare/checkpoint.pt", *OBJECT, cwd=own)
    assert NO_HEAD in out.splitlines()
    result = json.loads((own / "runs/bare/probe/object.json").read_text())
    assert not {"zero_shot", "video_to_text", "monitored_head"} & set(result)


def test_a_monitored_head_is_marked(own):
    run(*PRETRAIN, "--nce-weight", 0, "--mask", "tube", "--out", "runs/tube", cwd=own)
    out = run(*PROBE, "--checkpoint", "runs/tube/checkpoint.pt", *OBJECT, cwd=own)
    assert "zero-shot of 6 classes, chance in brackets (monitored head)" in out
    assert "retrieval (monitored head)" in out
    assert json.loads((own / "runs/tube/probe/object.json").read_text())["monitored_head"] is True


def test_a_models_two_names_are_one(tmp_path):
    about = {"clip": "ViT-B/16", "pretrained": "some/file.pt", "activation": "GELU"}
    head = textprobe.TextHead(np.eye(4), False, about)
    textprobe.refuse_other_clip(tmp_path, head, 4, about | {"clip": "ViT-B-16"}, "")
    with pytest.raises(ManifestError, match="made with pretrained some-file.pt"):
        other = about | {"pretrained": "some-file.pt"}
        textprobe.refuse_other_clip(tmp_path, head, 4, other, "")


def test_arrays_that_are_missing_or_do_not_serve_are_one_line(own):
    flags = ("--checkpoint", "runs/text/checkpoint.pt", "--label-column", "scene")
    out = run(*PROBE, *flags, cwd=own)
    assert (
        "no zero-shot: data/val.classes.npy: none of the labels is among its names"
        in out.splitlines()
    )
    path = own / "data/val.classes.json"
    about = json.loads(path.read_text())
    folder = os.path.relpath(CLIP.removeprefix("local-dir:"), own)  # the same one
    path.write_text(json.dumps(about | {"clip": f"local-dir:{folder}"}))
    assert "zero-shot of 6 classes" in probe(own)[0]
    path.write_text(json.dumps(about | {"clip": "ViT-B-16"}))
    command = "python saliency.py --data data/val.csv --cue classes --classes FILE"
    again = f"make it again with: {command} --clip {CLIP} --resume none"
    assert (
        "no zero-shot: data/val.classes.npy: made with clip ViT-B-16, the checkpoint's head was "
        f"trained with {CLIP}: {again}" in probe(own)[0].splitlines()
    )
    path.write_text(json.dumps(about | {"weights": "of another file"}))
    assert (
        "no zero-shot: data/val.classes.npy: made with other weights of CLIP than the checkpoint's "
        f"head: {again}" in probe(own)[0].splitlines()
    )
    older = {key: value for key, value in about.items() if key != "weights"}
    path.write_text(json.dumps(older))
    assert "zero-shot of 6 classes" in probe(own)[0]
    assert "note: the text array of the training" not in probe(own)[0]
    (own / "data/train.text.json").unlink()  # what the head was trained with cannot be told
    out = probe(own)[0]
    assert "zero-shot of 6 classes" in out
    assert "note: the text array of the training is not there, or was made again" in out
    np.save(own / "data/val.classes.npy", np.ones((6, 64), np.float16))
    path.write_text(json.dumps(about | {"shape": [6, 64]}))
    assert (
        "no zero-shot: data/val.classes.npy: has 64 dimensions, the checkpoint's head 128: "
        f"make it again with: {command} --clip NAME (that of the training) --resume none"
        in probe(own)[0].splitlines()
    )
    text = np.load(own / "data/val.text.npy")
    rewrite(own / "data/val.text.npy", np.where(np.arange(24)[:, None, None] < 4, text, np.nan))
    out, result = probe(own)
    assert "data/val.text.npy: 4 of 24 rows are made" in out
    assert result["video_to_text"]["queries"] == 4 and result["text_to_video"]["answers"] == 24
    rewrite(own / "data/val.text.npy", np.nan)
    assert "no retrieval: data/val.text.npy: no row of it is made; make it" in probe(own)[0]
    path.unlink()
    (own / "data/val.captions.jsonl").write_text("{}\n")  # remade since
    (own / "runs/text/probe/object.json").unlink()
    out, result = probe(own)
    assert not {"zero_shot", "video_to_text"} & set(result)
    lines = {line.split(":")[0]: line for line in out.splitlines()}
    assert lines["no zero-shot"].endswith(
        "make it with: python saliency.py --data data/val.csv --cue classes --classes FILE"
    )
    assert lines["no retrieval"].startswith("no retrieval: data/val.text.npy: expected captions ")
