"""Stages 1 and 2 on real files: what they write, going on after a kill, ranks, failures,
refusals.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import BLIP, CLIP, run
from safetensors.torch import load_file, save_file

import caption
import saliency
from tgm import clip
from tgm.arrays import file_hash
from tgm.captions import CaptionFile, make_entry
from tgm.manifest import Video
from tgm.run import RunError
from tgm.video import read_frames, segment_midpoints


def entries(folder, split="train"):
    return [
        json.loads(line)
        for line in (folder / f"data/{split}.captions.jsonl").read_text().splitlines()
    ]


# ---- captions


def test_captions_in_the_manifests_order(world):
    names = [line.split(",")[0] for line in (world / "data/train.csv").read_text().splitlines()[1:]]
    made = entries(world)
    assert [entry["path"] for entry in made] == names
    assert all(len(entry["captions"]) == 3 for entry in made) and not list(
        (world / "data").glob("*.part-*")
    )
    about = json.loads((world / "data/train.captions.json").read_text())
    assert about["model"] == BLIP and about["frames"] == 3


def test_captions_go_on_after_a_kill_and_share_work_over_ranks(world, copy):
    expected = (copy / "data/train.captions.jsonl").read_text()
    (copy / "data/train.captions.jsonl").unlink()
    half = [json.dumps({"row": row} | entry) for row, entry in enumerate(entries(world))][:10]
    part = copy / "data/train.captions.jsonl.part-1"
    part.write_text("\n".join(half) + '\n{"row": 11, "path": "vid')  # the kill cut the last line
    out = run("caption.py", "--model", BLIP, "--workers", 0, "--batch-size", 4, cwd=copy, ranks=2)
    assert "32 videos, 10 done before, 2 ranks" in out
    assert (copy / "data/train.captions.jsonl").read_text() == expected
    # again: nothing to do
    assert "32 videos captioned, 0 failed" in run("caption.py", "--model", BLIP, cwd=copy)


def test_a_bad_video_is_recorded_and_tried_again(copy):
    (copy / "bad.mp4").write_bytes(b"not a video")
    manifest = copy / "bad.csv"
    manifest.write_text("path\nbad.mp4\ndata/videos/train/00001.mp4\nmissing.mp4\n")
    assert "1 videos captioned, 2 failed" in run(
        "caption.py", "--data", manifest, "--model", BLIP, "--workers", 1, cwd=copy
    )
    made = [json.loads(line) for line in (copy / "bad.captions.jsonl").read_text().splitlines()]
    assert [len(entry["captions"]) for entry in made] == [0, 3, 0]
    assert made[0]["error"].startswith(f"{copy}/bad.mp4: ") and "missing.mp4" in made[2]["error"]
    (copy / "bad.mp4").write_bytes((copy / "data/videos/train/00002.mp4").read_bytes())
    assert "2 videos captioned, 1 failed" in run(
        "caption.py", "--data", manifest, "--model", BLIP, "--workers", 0, cwd=copy
    )
    out = run(
        "saliency.py", "--data", manifest, "--clip", CLIP, "--workers", 0, "--moments", 2, cwd=copy
    )
    assert "1 videos without captions" in out and "2 of 3 videos" in out
    assert np.isnan(np.load(copy / "bad.saliency.npy")).reshape(3, -1).all(1).tolist() == [
        False,
        False,
        True,
    ]


def test_prompt_beams_and_other_frames(copy):
    run(
        "caption.py",
        "--data",
        "data/val.csv",
        "--model",
        BLIP,
        "--frames",
        1,
        "--beams",
        3,
        "--prompt",
        "a red",
        *"--max-tokens 4 --resume none --workers 0".split(),
        cwd=copy,
    )
    texts = [text for entry in entries(copy, "val") for text in entry["captions"]]
    assert len(texts) == 24 and all(text.startswith("a red ") for text in texts)


def test_the_blip2_family(copy):
    """A BLIP-2 of a few thousand random weights, saved as the published ones are: every video
    gets its three captions.
    """
    import toy_models
    import transformers as hf

    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = hf.Blip2VisionConfig(**size, intermediate_size=64, image_size=32, patch_size=16)
    qformer = hf.Blip2QFormerConfig(
        **size, intermediate_size=64, encoder_hidden_size=32, vocab_size=30
    )
    text = hf.OPTConfig(
        **size, ffn_dim=64, vocab_size=30, max_position_embeddings=64, word_embed_proj_dim=32
    )
    config = hf.Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=25,
    )
    hf.Blip2ForConditionalGeneration(config).save_pretrained(copy / "blip2")
    processor = hf.BlipImageProcessor(size={"height": 32, "width": 32})
    hf.Blip2Processor(processor, toy_models.make_tokenizer(), num_query_tokens=4).save_pretrained(
        copy / "blip2"
    )
    run(
        "caption.py",
        "--data",
        "data/val.csv",
        "--model",
        copy / "blip2",
        *"--resume none --workers 0 --max-tokens 5".split(),
        cwd=copy,
    )
    assert [len(entry["captions"]) for entry in entries(copy, "val")] == [3] * 24
    assert all(
        set(text.split()) <= set(toy_models.VOCABULARY)
        for entry in entries(copy, "val")
        for text in entry["captions"]
    )


def test_labels_as_captions(copy):
    flags = ("--labels", "--label-column", "caption")
    run("caption.py", *flags, "--resume", "none", cwd=copy)
    with open(copy / "data/train.csv", newline="") as file:
        row = list(csv.DictReader(file))[3]
    assert entries(copy)[3]["captions"] == [row["caption"]]
    (copy / "ids.csv").write_text("path,label\na b.mp4,1\nc.mp4,0\n")
    (copy / "names.txt").write_text("a dog\na cat\n")
    run("caption.py", "--data", "ids.csv", "--labels", "--classes", "names.txt", cwd=copy)
    assert [
        json.loads(line)["captions"]
        for line in (copy / "ids.captions.jsonl").read_text().splitlines()
    ] == [["a cat"], ["a dog"]]
    (copy / "ids.csv").write_text("path,label\na b.mp4,2\n")
    assert "label '2' is not a class number; --classes has lines for 0 to 1" in run(
        "caption.py",
        *"--data ids.csv --labels --classes names.txt".split(),
        cwd=copy,
        fails=True,
    )
    (copy / "ids.csv").write_text("path\na b.mp4\n")
    assert "has no label" in run(
        "caption.py", "--data", "ids.csv", "--labels", cwd=copy, fails=True
    )


def test_labels_replace_a_models_captions_only_when_told_to(copy):
    path, about = copy / "data/train.captions.jsonl", copy / "data/train.captions.json"
    part = copy / "data/train.captions.jsonl.part-0"
    before = path.read_bytes()
    refusal = (
        "data/train.captions.jsonl: has captions of another origin; --resume none replaces them"
    )
    assert run("caption.py", "--labels", cwd=copy, fails=True) == refusal
    part.write_bytes(json.dumps({"row": 0} | entries(copy)[0]).encode())
    path.unlink()  # a pass that was stopped
    assert run("caption.py", "--labels", cwd=copy, fails=True) == refusal
    assert part.exists() and json.loads(about.read_text())["model"] == BLIP
    path.write_bytes(before)
    about.unlink()  # somebody else's captions
    assert run("caption.py", "--labels", cwd=copy, fails=True) == refusal
    assert path.read_bytes() == before and not about.exists()
    run("caption.py", "--labels", "--resume", "none", cwd=copy)
    assert json.loads(about.read_text())["model"] == "labels" and not part.exists()
    made = path.read_bytes()
    run("caption.py", "--labels", cwd=copy)  # labels may be replaced by labels
    assert path.read_bytes() == made != before


def test_captions_of_another_manifest_without_a_json_are_not_replaced(copy):
    path = copy / "data/train.captions.jsonl"
    (copy / "data/train.captions.json").unlink()
    lines = path.read_text().splitlines()
    foreign = json.dumps({"path": "theirs.mp4", "captions": ["a caption"]})
    path.write_text("\n".join([lines[0], foreign, *lines[2:]]) + "\n")
    before = path.read_bytes()
    assert run("caption.py", "--model", BLIP, cwd=copy, fails=True) == (
        "data/train.captions.jsonl: has captions of theirs.mp4, which is not row 1 (from 0) of the "
        "manifest: --out writes elsewhere; --resume none replaces them"
    )
    assert path.read_bytes() == before
    path.write_text("\n".join(lines) + "\n")  # of this manifest: they are kept
    run("caption.py", "--model", BLIP, cwd=copy)
    assert entries(copy) == [json.loads(line) for line in lines]
    assert not (copy / "data/train.captions.json").exists()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--labels", "--model", "x"), "--model cannot be used with --labels"),
        (("--labels", "--frames", 2), "--frames cannot be used with --labels"),
        (("--labels", "--prompt", "x"), "--prompt cannot be used with --labels"),
        (("--labels", "--beams", 2), "--beams cannot be used with --labels"),
        (("--labels", "--max-tokens", 2), "--max-tokens cannot be used with --labels"),
        (("--labels", "--max-steps", 2), "--max-steps cannot be used with --labels"),
        (("--labels", "--extend"), "--extend cannot be used with --labels"),
        (("--classes", "x.txt"), "--classes needs --labels"),
        (("--label-column", "x"), "--label-column needs --labels"),
    ],
)
def test_flags_of_the_other_kind_of_captions_are_refused(tmp_path, flags, expected):
    assert expected in run("caption.py", *flags, cwd=tmp_path, fails=True)


def test_class_names_as_editors_write_them(tmp_path):
    (tmp_path / "ids.csv").write_text("path,label\na.mp4,0\nb.mp4,1\n")
    names = tmp_path / "names.txt"
    names.write_text("\ufeffa dog\r\na\u2028cat\r\n", encoding="utf-8")
    command = ("caption.py", "--data", "ids.csv", "--labels", "--classes", "names.txt")
    run(*command, cwd=tmp_path)
    made = (tmp_path / "ids.captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["captions"] for line in made] == [["a dog"], ["a\u2028cat"]]
    (tmp_path / "ids.csv").write_text("path,label\na.mp4,\u00b2\n", encoding="utf-8")
    assert run(*command, cwd=tmp_path, fails=True) == (
        f"a.mp4: label {chr(0xB2)!r} is not a class number; --classes has lines for 0 to 1 "
        "(without it the label itself is the caption)"
    )
    (tmp_path / "ids.csv").write_text(f"path,label\na.mp4,{'1' * 5000}\n")  # int() refuses it
    assert "is not a class number" in run(*command, cwd=tmp_path, fails=True)


def test_the_reason_of_the_last_failure_is_kept(copy):
    manifest = copy / "bad.csv"
    manifest.write_text("path\nbad.mp4\ndata/videos/train/00001.mp4\n")
    command = ("caption.py", "--data", manifest, "--model", BLIP, "--workers", 0)

    def reason():
        run(*command, cwd=copy)
        return json.loads((copy / "bad.captions.jsonl").read_text().splitlines()[0])["error"]

    first = reason()
    (copy / "bad.mp4").write_bytes(b"not a video")
    second = reason()
    assert "No such file" in first and "No such file" not in second


def test_captions_without_a_json_get_none(copy):
    """The others were made by nobody knows whom: a .json would tell that this model made them."""
    path, about = copy / "data/train.captions.jsonl", copy / "data/train.captions.json"
    made = entries(copy)
    for entry in made[1:]:
        entry["captions"] = ["somebody's"]
    made[0] = {"path": made[0]["path"], "captions": [], "error": "?"}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in made))
    about.unlink()
    run("caption.py", "--model", BLIP, "--workers", 0, cwd=copy)
    assert len(entries(copy)[0]["captions"]) == 3 and entries(copy)[1:] == made[1:]
    assert not about.exists()
    run("caption.py", "--model", BLIP, "--workers", 0, "--resume", "none", cwd=copy)
    assert json.loads(about.read_text())["model"] == BLIP


@pytest.mark.parametrize(
    "line",
    [
        "1",
        "null",
        '{"captions": []}',
        '{"path": "a.mp4", "captions": "a dog"}',
        '{"path": "a.mp4", "captions": [3, null]}',
    ],
)
def test_a_line_that_is_no_entry_is_refused(copy, line):
    path = copy / "data/train.captions.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = line
    path.write_text("\n".join(lines) + "\n")
    for about in (True, False):
        assert run("caption.py", "--model", BLIP, cwd=copy, fails=True) == (
            "data/train.captions.jsonl: line 5 is not a video's captions; "
            "--resume none makes the file again"
        )
        if about:
            (copy / "data/train.captions.json").unlink()
    assert "is damaged" in run("saliency.py", "--clip", CLIP, cwd=copy, fails=True)


@pytest.mark.parametrize("name", ["x.json", "."])
def test_captions_take_any_name_that_does_not_end_in_json(tmp_path, name):
    with pytest.raises(RunError) as error:
        CaptionFile(tmp_path / name if name != "." else Path("."), [], {})
    path = "." if name == "." else tmp_path / name
    assert str(error.value) == (
        f"--out {path}: expected a name that ends in .jsonl, or in anything but .json: what made "
        "the captions is written to the same name with .json"
    )
    assert CaptionFile(tmp_path / "x.txt", [], {}).about_path == tmp_path / "x.json"


def test_captions_refuse(copy):
    assert "python data/toy.py" in run("caption.py", cwd=copy / "data", fails=True, process=True)
    assert run("caption.py", "--model", BLIP, "--frames", 2, cwd=copy, fails=True) == (
        "data/train.captions.jsonl: made with frames 3, not 2: give the earlier settings again, or --resume "
        "none remakes it"
    )
    (copy / "data/train.captions.json").unlink()  # without it, rows are still compared by path
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert run("caption.py", "--model", BLIP, cwd=copy, fails=True).startswith(
        "data/train.captions.jsonl: has captions of videos/train/00000.mp4, which is not row 0"
    )
    run("caption.py", "--model", BLIP, "--workers", 0, "--resume", "none", cwd=copy)
    assert [entry["path"] for entry in entries(copy)] == [
        line.split(",")[0] for line in reversed(lines[1:])
    ]
    line = run("caption.py", "--model", copy / "nowhere", "--resume", "none", cwd=copy, fails=True)
    assert line.endswith(
        "/nowhere: cannot load it: no such folder (a name on the hub has at most one /)"
    )


# ---- saliency


def test_text_embeddings_are_the_captions_unit_length(world):
    text = np.load(world / "data/train.text.npy")
    assert text.shape == (32, 3, 128) and text.dtype == np.float16
    assert np.allclose(np.linalg.norm(text.astype(np.float32), axis=-1), 1, atol=2e-3)
    model, tokenizer = open_clip.create_model(CLIP).eval(), open_clip.get_tokenizer(CLIP)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(entries(world)[5]["captions"]), normalize=True)
    assert np.allclose(text[5], expected, atol=1e-3)


def reference(visual, images, dense):
    """Patch embeddings written out head by head and token by token, independently of
    saliency.py.
    """
    x, blocks, path = visual._embeds(images), visual.transformer.resblocks, 0
    for number, block in enumerate(blocks, 1):
        y, heads, width = block.ln_1(x), block.attn.num_heads, x.shape[-1]
        qkv, out = y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias, torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            q = qkv[..., :width][..., part]
            k = qkv[..., width : 2 * width][..., part]
            v = qkv[..., 2 * width :][..., part]
            if dense == "value":
                out[..., part] = v
            if dense == "self":
                for a in (q, k):
                    for i in range(x.shape[1]):
                        weight = torch.softmax(
                            (a[:, i : i + 1] * a).sum(-1) / (width / heads) ** 0.5, -1
                        )
                        out[:, i, part] += (weight[..., None] * v).sum(1)
        out = out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        if number > {"value": len(blocks) - 1, "self": len(blocks) // 2}.get(dense, len(blocks)):
            path = path + out
        x = block(x)
    x = visual.ln_post((x if dense == "last" else path)[:, 1:]) @ visual.proj
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("dense", saliency.DENSE)
def test_saliency_is_the_cosine_of_patch_and_text(world, tmp_path, dense):
    run(
        "saliency.py",
        "--data",
        world / "data/val.csv",
        "--clip",
        CLIP,
        "--moments",
        4,
        "--dense",
        dense,
        "--workers",
        0,
        "--out",
        tmp_path / "x",
    )
    maps = np.load(tmp_path / "x.saliency.npy")
    text = np.load(tmp_path / "x.text.npy").astype(np.float32)
    assert maps.shape == (24, 3, 4, 8, 8) and maps.dtype == np.float16
    model = open_clip.create_model(CLIP).eval()
    frames = read_frames(world / "data/videos/val/00007.mp4", segment_midpoints(0, 2.0, 4))
    images = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        patches = reference(model.visual, images, dense).numpy()  # [S, 64, D]
    expected = np.einsum("spd,kd->ksp", patches, text[7]).reshape(3, 4, 8, 8)
    assert np.abs(maps[7] - expected).max() < 3e-3
    assert json.loads((tmp_path / "x.saliency.json").read_text())["dense"] == dense


def test_last_is_open_clips_own(world):
    visual = open_clip.create_model(CLIP).eval().visual
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        own = torch.nn.functional.normalize(own["image_intermediates"][0] @ visual.proj, dim=-1)
        assert torch.allclose(saliency.patch_features(visual, images, "last"), own, atol=1e-5)


def test_saliency_goes_on_and_ranks_fill_their_own_rows(world, copy):
    path = copy / "data/train.saliency.npy"
    expected = np.load(path)
    array = np.load(path, mmap_mode="r+")
    array[5:20] = np.nan
    array.flush()
    out = run("saliency.py", "--clip", CLIP, "--moments", 8, "--workers", 0, cwd=copy, ranks=2)
    # of rows 5 to 19, the even ones
    assert "32 of 32 videos" in out and "7 to do on rank 0 of 2" in out
    assert (
        np.array_equal(np.load(path)[:5], expected[:5])
        and np.abs(np.load(path) - expected).max() < 2e-3
    )


def test_a_larger_image_gives_a_finer_grid(world, tmp_path):
    run(
        "saliency.py",
        "--data",
        world / "data/val.csv",
        "--clip",
        CLIP,
        *"--moments 1 --image-size 96 --workers 0 --max-steps 1 --batch-size 4".split(),
        "--out",
        tmp_path / "x",
    )
    maps = np.load(tmp_path / "x.saliency.npy")
    assert maps.shape == (24, 3, 1, 12, 12)
    # --max-steps 1
    assert np.isfinite(maps).reshape(24, -1).all(1).tolist() == [True] * 4 + [False] * 20


def test_saliency_refuses(copy):
    base = ("saliency.py", "--clip", CLIP, "--moments", 8)
    assert (
        "made with dense 'self', not 'last': give the earlier settings again, or --resume none"
        in run(*base, "--dense", "last", cwd=copy, fails=True, process=True)
    )
    lines = (copy / "data/train.csv").read_text().splitlines()
    (copy / "data/train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert "is of another manifest; make it with: python caption.py" in run(
        *base, cwd=copy, fails=True
    )
    (copy / "data/train.captions.jsonl").unlink()
    assert run(*base, cwd=copy, fails=True).endswith(
        "make it with: python caption.py --data data/train.csv"
    )
    base = ("saliency.py", "--data", "data/val.csv", "--clip")
    line = run(*base, "ViT-Z-99", cwd=copy, fails=True)
    assert "cannot load it: no such model in open_clip; names near to it are ViT-" in line
    line = run(*base, "qqqqqqqqqq", cwd=copy, fails=True)
    assert line.endswith("cannot load it: no such model in open_clip; no name is near to it")
    # who gives a folder knows how to
    line = run(*base, "local-dir:nowhere", cwd=copy, fails=True)
    assert "cannot load it: " in line and "toy" not in line


@pytest.mark.parametrize("form", ["folder", "file"])
def test_other_weights_under_the_same_name_are_refused(copy, monkeypatch, form):
    """Of a folder and of a file. Arrays from before their hash was kept go on."""
    weights = copy / "clip/open_clip_model.safetensors"
    shutil.copytree(CLIP.removeprefix("local-dir:"), copy / "clip")
    flags = ("--clip", "local-dir:clip")
    if form == "file":
        flags = ("--clip", "ViT-B/16", "--pretrained", weights)
        own, _ = saliency.load_clip(CLIP, None, None, "cpu")
        tokenizer = open_clip.get_tokenizer(CLIP)
        monkeypatch.setattr(saliency, "load_clip", lambda *_: (own, tokenizer))
    base = ("saliency.py", *flags, "--moments", 2, "--workers", 0, "--out", "x")
    run(*base, "--max-steps", 1, "--batch-size", 4, cwd=copy)
    abouts = [copy / f"x.{kind}.json" for kind in ("text", "saliency")]
    about = json.loads(abouts[0].read_text())
    assert about["weights"] == file_hash(weights)
    assert about["clip"] == ("local-dir:clip" if form == "folder" else "ViT-B-16")
    assert "8 of 32 videos" in run(*base, "--max-steps", 1, "--batch-size", 4, cwd=copy)
    state = load_file(weights)
    state["logit_scale"] = state["logit_scale"] + 1
    save_file(state, weights)
    line = run(*base, cwd=copy, fails=True)
    assert (
        line
        == "x.text.npy: made with other weights: give the earlier settings again, or --resume none remakes it"
    )
    for path in abouts:
        older = json.loads(path.read_text())
        del older["weights"]
        path.write_text(json.dumps(older))
    before = [path.read_text() for path in abouts]
    out = run(*base, "--max-steps", 1, "--batch-size", 4, cwd=copy)
    assert "12 of 32 videos" in out
    assert [path.read_text() for path in abouts] == before


def test_published_weights_have_no_file():
    assert clip.local_weights("ViT-B/16", "openai") is None
    assert clip.local_weights("hf-hub:some/clip", "openai") is None
    assert clip.plain_name("hf-hub:some/clip") == "hf-hub:some/clip"


def test_the_full_size_towers_patches():
    """ViT-B-16 with random weights: the grid and width that the default writes; a convolutional
    tower is refused.
    """
    model = open_clip.create_model("ViT-B-16", pretrained=None).eval()
    with torch.no_grad():
        patches = saliency.patch_features(model.visual, torch.randn(1, 3, 224, 224), "self")
    assert patches.shape == (1, 196, 512) and torch.allclose(
        patches.norm(dim=-1), torch.ones(1, 196), atol=1e-5
    )
    assert tuple(model.visual.grid_size) == (14, 14)
    with pytest.raises(RunError, match="plain vision transformer"):
        saliency.load_clip("RN50", None, None, "cpu")


def test_a_removed_array_is_made_again(copy):
    """The text embeddings alone were deleted: no row stays empty beside the finished maps."""
    flags = ("saliency.py", "--clip", CLIP, "--moments", 8, "--workers", 0)
    before = np.load(copy / "data/train.text.npy")
    (copy / "data/train.text.npy").unlink()
    assert "32 of 32 videos" in run(*flags, cwd=copy)
    assert np.array_equal(np.load(copy / "data/train.text.npy"), before)


def test_the_last_reason_of_a_failure_is_kept(copy):
    (copy / "few.csv").write_text("path\ndata/videos/train/00000.mp4\nbad.mp4\n")
    flags = ("caption.py", "--data", "few.csv", "--model", BLIP, "--workers", 0)
    run(*flags, cwd=copy)
    assert "No such file" in (copy / "few.captions.jsonl").read_text().splitlines()[1]
    (copy / "bad.mp4").write_bytes(b"no video at all")
    run(*flags, cwd=copy)
    assert "Invalid data" in (copy / "few.captions.jsonl").read_text().splitlines()[1]


def test_an_array_that_is_half_made_is_counted_as_half_made(copy):
    """The maps are finished, the text embeddings were deleted and are made again for 4 videos."""
    flags = ("saliency.py", "--clip", CLIP, "--moments", 8, "--workers", 0)
    (copy / "data/train.text.npy").unlink()
    assert "4 of 32 videos" in run(*flags, "--batch-size", 4, "--max-steps", 1, cwd=copy)
    assert "32 of 32 videos" in run(*flags, cwd=copy)


def test_labels_of_a_manifest_that_has_grown(copy):
    """The command that each refusal names works, and the arrays of the old rows are kept."""
    lines = (copy / "data/train.csv").read_text().splitlines(keepends=True)
    (copy / "data/few.csv").write_text("".join(lines[:5]))
    data = ("--data", "data/few.csv")
    column = ("--label-column", "caption")
    texts = ("saliency.py", *data, "--clip", CLIP, "--moments", 2, "--workers", 0)
    run("caption.py", *data, "--labels", *column, cwd=copy)
    run(*texts, cwd=copy)
    before = np.load(copy / "data/few.saliency.npy")
    (copy / "data/few.csv").write_text("".join(lines[:8]))
    assert run(*texts, "--extend", cwd=copy, fails=True) == (
        "data/few.captions.jsonl: has the first 4 of 7 rows of the manifest; make it with: python "
        "caption.py --labels --label-column caption --data data/few.csv"
    )
    for extend in ([], ["--extend"]):
        assert run("caption.py", *data, "--model", BLIP, *extend, cwd=copy, fails=True) == (
            "data/few.captions.jsonl: these captions are labels: make them again with --labels "
            "--label-column caption, in seconds, or replace them by a model's with --resume none"
        )
    run("caption.py", "--labels", *data, *column, cwd=copy)
    assert "7 of 7 videos" in run(*texts, "--extend", cwd=copy)
    assert np.array_equal(np.load(copy / "data/few.saliency.npy")[:4], before)
    (copy / "data/few.csv").write_text("".join([lines[0], *lines[2:5]]))
    assert run(*texts, cwd=copy, fails=True).endswith(
        "of another manifest; make it with: python caption.py --labels --label-column caption "
        "--data data/few.csv --resume none"
    )


def test_a_text_beside_the_json_of_captions_is_not_overwritten(copy):
    (copy / "data/train.captions.txt").write_text("mine")
    out = ("--out", "data/train.captions.txt", "--resume", "none")
    line = run("caption.py", "--labels", *out, cwd=copy, fails=True)
    assert "is none of the files that this command writes" in line
    assert (copy / "data/train.captions.txt").read_text() == "mine"


def test_captions_that_change_while_clip_is_loaded_are_noticed(copy, monkeypatch):
    load = saliency.load_clip
    path = copy / "data/train.captions.jsonl"

    def load_meanwhile(*args):
        path.write_text(path.read_text().replace("a ", "another "))
        return load(*args)

    before = (copy / "data/train.text.npy").read_bytes()
    monkeypatch.setattr(saliency, "load_clip", load_meanwhile)
    line = run("saliency.py", "--clip", CLIP, "--resume", "none", cwd=copy, fails=True)
    assert line == f"{path.relative_to(copy)}: was made again meanwhile: run this command again"
    assert (copy / "data/train.text.npy").read_bytes() == before


def test_videos_whose_captions_are_all_empty_are_counted(copy, monkeypatch):
    """An empty caption is the model's answer: it is kept, and not asked for again."""
    lines = (copy / "data/train.csv").read_text().splitlines(keepends=True)
    (copy / "data/few.csv").write_text("".join(lines[:4]))
    answers = [["", "a dog", ""], ["", "", ""], ["a cat", "a dog", "a cat"]]
    monkeypatch.setattr(caption, "describe", lambda *_, **__: answers)
    monkeypatch.setattr(caption, "check_model", lambda *_: None)
    command = ("caption.py", "--data", "data/few.csv", "--model", BLIP, "--workers", 0)
    note = (
        "note: of 1 videos all captions are empty, and an empty caption cannot guide a mask: "
        "try another --prompt or --model, with --resume none"
    )
    for _ in range(2):
        out = run(*command, cwd=copy).splitlines()
        assert out[-2:] == ["data/few.captions.jsonl: 3 videos captioned, 0 failed", note]
        assert [entry["captions"] for entry in entries(copy, "few")] == answers
    answers[1] = ["a bird"] * 3
    assert note not in run(*command, "--resume", "none", cwd=copy)


def test_class_names_may_begin_with_a_mark_and_labels_are_decimal(copy):
    (copy / "ids.csv").write_text("path,label\na.mp4,0\n")
    (copy / "names.txt").write_text("a dog\n", encoding="utf-8-sig")
    flags = ("caption.py", "--data", "ids.csv", "--labels", "--classes", "names.txt")
    run(*flags, cwd=copy)
    line = (copy / "ids.captions.jsonl").read_text()
    assert json.loads(line)["captions"] == ["a dog"]
    (copy / "ids.csv").write_text("path,label\na.mp4,\u00b2\n", encoding="utf-8")
    assert "is not a class number; --classes has lines for 0 to 0" in run(
        *flags, cwd=copy, fails=True
    )


@pytest.mark.parametrize("text, line", [("", 1), ("cat\n \ndog\n", 2)])
def test_an_empty_line_of_classes_is_named(tmp_path, text, line):
    (tmp_path / "ids.csv").write_text("path,label\na.mp4,0\n")
    (tmp_path / "names.txt").write_text(text)
    command = ("caption.py", "--data", "ids.csv", "--labels", "--classes", "names.txt")
    assert run(*command, cwd=tmp_path, fails=True) == (
        f"--classes names.txt:{line}: expected a class name, found none"
    )


def test_parts_of_a_name_with_brackets_are_found_and_no_others(tmp_path):
    videos = [Video("a.mp4", "1", None, None, row=0, name="a.mp4")]
    ours, other = (
        CaptionFile(tmp_path / f"{name}.captions.jsonl", videos, {"model": "m"})
        for name in ("train[1]", "train1")
    )
    for file in (ours, other):
        file.append(0, [make_entry(videos[0], ["a dog"])])
        assert [part.name for part in file.parts()] == [f"{file.path.name}.part-0"]
    ours.join()
    assert ours.path.exists() and not ours.parts() and len(other.parts()) == 1
