"""model.py against transformers' VideoMAE, against written-out references, and its own promises
(CPU, 30 s).
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as M
from model import VideoMAE, VideoViT, info_nce, patchify, unpatchify
from tgm import checkpoints
from tgm.checkpoints import load_pretrained, save_huggingface
from tgm.run import one_line_errors

torch.set_num_threads(1)
NANO = dict(
    M.SIZES["tiny"],
    frames=4,
    image_size=32,
    patch=16,
    width=24,
    depth=2,
    heads=2,
    decoder_width=12,
    decoder_depth=1,
    decoder_heads=3,
)


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    """A size for tests: 2 x 2 x 2 tokens, head widths that differ between encoder and decoder."""
    monkeypatch.setitem(M.SIZES, "nano", NANO)
    torch.manual_seed(0)


def randomize(model, seed=0):
    """Weights of no special value anywhere, so that no bias or norm hides behind a zero or a
    one.
    """
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim:  # not logit_scale
            p.data = 0.15 * torch.randn(p.shape, generator=g) + (
                "norm" in name and name.endswith("weight")
            )
    return model


def random_video(model, batch=2, seed=1):
    c, g = model.config, torch.Generator().manual_seed(seed)
    shape = (batch, 3, c["frames"], c["image_size"], c["image_size"])
    return M.normalize(torch.randint(0, 256, shape, generator=g, dtype=torch.uint8))


def random_mask(model, batch=2, visible=None, seed=2):
    n, g = math.prod(model.grid), torch.Generator().manual_seed(seed)
    visible = visible or n // 4 + 1
    return torch.rand(batch, n, generator=g).argsort(1) >= visible


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (
        (a - b).abs().max() / b.abs().max()
    ).item()


# --- parity with transformers ---


def import_transformers():
    """transformers, unless it is a version that loses VideoMAE's biases: see save_huggingface, and
    pull request 48675 of transformers."""
    transformers = pytest.importorskip("transformers")
    version = Version(transformers.__version__)
    if Version("5.5.1") <= version < Version("5.18"):
        pytest.skip(f"transformers {version} loses the biases of VideoMAE's attention")
    return transformers


def hf_model(cls, config):
    """The class at our sizes, its two hard-coded epsilons (1e-5) set to the official 1e-6, as
    our docstring says.
    """
    transformers = import_transformers()
    hf = getattr(transformers, cls)(transformers.VideoMAEConfig(**config)).eval()
    return official_eps(hf)


def official_eps(hf):
    for m in hf.modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 1e-6
    return hf


def hf_config(model, **extra):
    c = model.config
    return dict(
        image_size=c["image_size"],
        patch_size=c["patch"],
        num_frames=c["frames"],
        tubelet_size=2,
        hidden_size=c["width"],
        num_hidden_layers=c["depth"],
        num_attention_heads=c["heads"],
        intermediate_size=4 * c["width"],
        decoder_hidden_size=c["decoder_width"],
        decoder_num_hidden_layers=c["decoder_depth"],
        decoder_num_attention_heads=c["decoder_heads"],
        decoder_intermediate_size=4 * c["decoder_width"],
        layer_norm_eps=1e-6,
        **extra,
    )


def ours_in_hf(name):
    """Parameter name of transformers -> ours, written out independently of HF_KEYS; None
    where ours is fused.
    """
    for a, b in (
        ("videomae.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
        ("videomae.encoder.layer", "encoder.blocks"),
        ("videomae.layernorm", "encoder.norm"),
        ("decoder.decoder_layers", "decoder.blocks"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("attention.attention.query.bias", "attn.q_bias"),
        ("attention.attention.value.bias", "attn.v_bias"),
        ("attention.attention", "attn"),
        ("classifier", "head"),
    ):
        name = name.replace(a, b)
    return name


def copy_weights(hf, ours, prefix=""):
    state = {ours_in_hf(k): v for k, v in hf.state_dict().items()}
    for key in [k for k in state if k.endswith("attn.query.weight")]:
        parts = [state.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        state[key.replace("query", "qkv")] = torch.cat(parts)
    state = {k.removeprefix(prefix): v for k, v in state.items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all(k.startswith("contrastive.") for k in missing)


@pytest.mark.parametrize("size", ["nano", "tiny"])
def test_loss_and_every_gradient_equal_transformers(size):
    ours = VideoMAE(size)
    hf = randomize(hf_model("VideoMAEForPreTraining", hf_config(ours, use_mean_pooling=False)))
    copy_weights(hf, ours)
    video, mask = random_video(ours), random_mask(ours)
    theirs = hf(video.transpose(1, 2), bool_masked_pos=mask).loss
    loss = ours(video, mask).loss_mae
    close(loss, theirs)
    loss.backward()
    theirs.backward()
    gradients = dict(ours.named_parameters())
    checked = set()
    for name, p in hf.named_parameters():
        name, part = ours_in_hf(name), None
        for i, piece in enumerate(("query", "key", "value")):
            if name.endswith(f"attn.{piece}.weight"):
                name, part = name.replace(piece, "qkv"), i
        grad = gradients[name].grad
        close(grad if part is None else grad.chunk(3)[part], p.grad, 2e-5)
        checked.add(name)
    assert checked == {k for k in gradients if not k.startswith("contrastive.")}


def test_base_loss_equals_transformers():
    ours = VideoMAE("base")
    hf = hf_model("VideoMAEForPreTraining", hf_config(ours, use_mean_pooling=False))
    copy_weights(hf, ours)
    video, mask = random_video(ours, 1), random_mask(ours, 1, visible=160)
    with torch.no_grad():
        close(
            ours(video, mask, num_visible=160).loss_mae,
            hf(video.transpose(1, 2), bool_masked_pos=mask).loss,
        )


def test_classifier_equals_transformers():
    ours = VideoViT("nano", classes=5)
    hf = randomize(
        hf_model(
            "VideoMAEForVideoClassification", hf_config(ours, use_mean_pooling=True, num_labels=5)
        )
    )
    copy_weights(hf, ours, "encoder.")
    video = random_video(ours)
    close(ours.eval()(video), hf(video.transpose(1, 2)).logits)


@pytest.mark.parametrize("size", ["small", "base"])
def test_published_sizes_classify_as_transformers_does_both_ways(tmp_path, size):
    """16 x 224 x 224: their random weights through our loader, and ours through their
    from_pretrained.
    """
    ours = VideoViT(size, classes=11).eval()
    hf = hf_model(
        "VideoMAEForVideoClassification", hf_config(ours, use_mean_pooling=True, num_labels=11)
    ).eval()
    video = random_video(ours, 1)
    for model in (hf.classifier, ours.head):
        torch.nn.init.normal_(model.weight, std=0.05)
    with torch.no_grad():
        hf.save_pretrained(tmp_path / "theirs")
        assert load_pretrained(ours, tmp_path / "theirs") == []
        close(ours(video), hf(video.transpose(1, 2)).logits)
        randomized = VideoViT(size, classes=11).eval()
        torch.nn.init.normal_(randomized.head.weight, std=0.05)
        save_huggingface(randomized, tmp_path / "ours")
        back = type(hf).from_pretrained(tmp_path / "ours").eval()
        official_eps(back)
        close(randomized(video), back(video.transpose(1, 2)).logits)


def test_huggingface_folder_there_and_back(tmp_path):
    transformers = import_transformers()
    mae = randomize(VideoMAE("nano", text_dim=7))
    vit = randomize(VideoViT("nano", classes=5)).eval()
    video, mask = random_video(mae), random_mask(mae)
    for model, cls, folder in (
        (mae, "VideoMAEForPreTraining", tmp_path / "mae"),
        (vit, "VideoMAEForVideoClassification", tmp_path / "vit"),
    ):
        save_huggingface(model, folder)
        hf, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
            info
        )
        assert (
            type(hf).__name__
            == json.loads((folder / "config.json").read_text())["architectures"][0]
        )
        assert hf.config.layer_norm_eps == 1e-6
        official_eps(hf)
        with torch.no_grad():
            if model is mae:
                close(
                    hf(video.transpose(1, 2), bool_masked_pos=mask).loss, mae(video, mask).loss_mae
                )
            else:
                close(hf(video.transpose(1, 2)).logits, vit(video))
                assert hf.config.num_labels == 5
        # what transformers itself writes is read back, q_bias or query.bias alike
        hf.save_pretrained(tmp_path / "again")
        torch.save(hf.state_dict(), tmp_path / "memory.bin")
        for source in (folder, tmp_path / "again", tmp_path / "memory.bin"):
            back = VideoMAE("nano", text_dim=7) if model is mae else VideoViT("nano", classes=5)
            report = load_pretrained(back, source)
            kept_out = {"missing contrastive.proj.weight", "missing contrastive.logit_scale"}
            assert set(report) == (kept_out if model is mae else set())
            for key, value in model.state_dict().items():
                assert key.startswith("contrastive.") or torch.equal(
                    value, back.state_dict()[key]
                ), key


def test_bare_huggingface_encoder_loads(tmp_path):
    mae = VideoMAE("nano")
    hf = randomize(hf_model("VideoMAEModel", hf_config(mae, use_mean_pooling=False)))
    hf.save_pretrained(tmp_path)
    report = load_pretrained(mae, tmp_path)
    assert (
        all(
            r.startswith(
                (
                    "missing decoder.",
                    "missing contrastive.",
                    "missing mask_token",
                    "missing encoder_to_",
                )
            )
            for r in report
        )
        and "missing mask_token" in report
    )
    video = random_video(mae)
    close(mae.encode(video), hf(video.transpose(1, 2)).last_hidden_state)


def test_bare_huggingface_encoder_without_a_norm(tmp_path):
    """VideoMAEModel as its configuration has it by default: the classifier's norm is elsewhere,
    so the file has none.
    """
    mae = VideoMAE("nano")
    hf = randomize(hf_model("VideoMAEModel", hf_config(mae, use_mean_pooling=True)))
    hf.save_pretrained(tmp_path)
    assert {"missing encoder.norm.weight", "missing encoder.norm.bias"} <= set(
        load_pretrained(mae, tmp_path)
    )
    video = random_video(mae)
    expected = F.layer_norm(hf(video.transpose(1, 2)).last_hidden_state, (24,), eps=1e-6)
    close(mae.encode(video), expected)
    vit = VideoViT("nano", classes=3)
    assert load_pretrained(vit, tmp_path) == [
        "missing fc_norm.weight",
        "missing fc_norm.bias",
        "missing head.weight",
        "missing head.bias",
    ]


# --- the official checkpoints ---


def official_keys(D=768, depth=12, E=384, decoder_depth=4, P=1536):
    keys = {
        "encoder.patch_embed.proj.weight": (D, 3, 2, 16, 16),
        "encoder.patch_embed.proj.bias": (D,),
        "encoder.norm.weight": (D,),
        "encoder.norm.bias": (D,),
        "encoder_to_decoder.weight": (E, D),
        "mask_token": (1, 1, E),
        "decoder.norm.weight": (E,),
        "decoder.norm.bias": (E,),
        "decoder.head.weight": (P, E),
        "decoder.head.bias": (P,),
    }
    for part, width, n in (("encoder", D, depth), ("decoder", E, decoder_depth)):
        for i in range(n):
            keys |= {
                f"{part}.blocks.{i}.{name}": shape
                for name, shape in {
                    "norm1.weight": (width,),
                    "norm1.bias": (width,),
                    "norm2.weight": (width,),
                    "norm2.bias": (width,),
                    "attn.q_bias": (width,),
                    "attn.v_bias": (width,),
                    "attn.qkv.weight": (3 * width, width),
                    "attn.proj.weight": (width, width),
                    "attn.proj.bias": (width,),
                    "mlp.fc1.weight": (4 * width, width),
                    "mlp.fc1.bias": (4 * width,),
                    "mlp.fc2.weight": (width, 4 * width),
                    "mlp.fc2.bias": (width,),
                }.items()
            }
    return keys


@pytest.mark.parametrize(
    "size, shape",
    [
        ("small", (384, 12, 192, 4)),
        ("base", (768, 12, 384, 4)),
        ("large", (1024, 24, 512, 12)),
        ("huge", (1280, 32, 640, 12)),
    ],
)
def test_keys_and_shapes_are_the_official_ones(size, shape):
    with torch.device("meta"):
        own = {k: tuple(v.shape) for k, v in VideoMAE(size).state_dict().items()}
        vit = {k: tuple(v.shape) for k, v in VideoViT(size, classes=400).state_dict().items()}
    assert (
        own.pop("contrastive.proj.weight") == (512, shape[0])
        and own.pop("contrastive.logit_scale") == ()
    )
    official = official_keys(*shape)
    assert own == official
    fine_tuned = {
        k.removeprefix("encoder."): v
        for k, v in official.items()
        if k.startswith("encoder.") and not k.startswith("encoder.norm.")
    }
    D = shape[0]
    assert vit == fine_tuned | {
        "fc_norm.weight": (D,),
        "fc_norm.bias": (D,),
        "head.weight": (400, D),
        "head.bias": (400,),
    }


def test_heads_are_the_official_ones():  # they leave no trace in the shapes
    heads = {
        name: (c["heads"], c["decoder_heads"])
        for name, c in M.SIZES.items()
        if name not in ("tiny", "nano")
    }
    assert heads == {"small": (6, 3), "base": (12, 6), "large": (16, 8), "huge": (16, 8)}


def official_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g) for k, s in official_keys(24, 2, 12, 1).items()}


@pytest.mark.parametrize("wrap", ["model", "module"])
def test_official_pretraining_file(tmp_path, wrap):
    state, file = official_state(), tmp_path / "official.pth"
    # as VideoMAE saves it
    torch.save({wrap: state, "epoch": 1600, "args": argparse.Namespace(lr=1.5e-4)}, file)
    mae, vit = VideoMAE("nano"), VideoViT("nano", classes=3)
    assert set(load_pretrained(mae, file)) == {
        "missing contrastive.proj.weight",
        "missing contrastive.logit_scale",
    }
    assert all(torch.equal(mae.state_dict()[k], v) for k, v in state.items())
    report = load_pretrained(vit, file)
    unused = {
        f"unused {k.removeprefix('encoder.')}"
        for k in state
        if k.startswith(("decoder.", "encoder.norm.", "mask_token", "encoder_to"))
    }
    missing = {
        f"missing {k}" for k in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    }
    assert set(report) == unused | missing
    assert torch.equal(vit.blocks[1].attn.qkv.weight, state["encoder.blocks.1.attn.qkv.weight"])


def test_our_checkpoint_and_fine_tuned_layout(tmp_path):
    mae, vit = randomize(VideoMAE("nano")), randomize(VideoViT("nano", classes=3))
    torch.save(
        {"model": mae.state_dict(), "optimizer": {"x": torch.ones(1)}, "step": 3},
        tmp_path / "mae.pt",
    )
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pt")
    back = VideoMAE("nano", frames=8, image_size=64)  # positions are computed: another grid loads
    assert load_pretrained(back, tmp_path / "mae.pt") == []
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in mae.state_dict().items())
    again = VideoViT("nano", classes=3)
    assert load_pretrained(again, tmp_path / "vit.pt") == []
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in vit.state_dict().items())
    assert "unused contrastive.proj.weight" in load_pretrained(again, tmp_path / "mae.pt")
    # Of a fine-tuned file the autoencoder takes the blocks, and fc_norm for its final norm.
    report = load_pretrained(mae, tmp_path / "vit.pt")
    assert {"unused encoder.head.weight", "unused encoder.head.bias", "missing mask_token"} <= set(
        report
    )
    assert all(
        r.startswith(
            (
                "unused encoder.head.",
                "missing decoder.",
                "missing encoder_to_",
                "missing mask",
                "missing contr",
            )
        )
        for r in report
    )
    for key, value in vit.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(
                value, mae.state_dict()["encoder." + key.replace("fc_norm", "norm")]
            ), key


def test_huggingface_classifier_of_the_first_token(tmp_path):
    """use_mean_pooling off: the final norm stands where fc_norm is otherwise."""
    mae = VideoMAE("nano")
    config = hf_config(mae, use_mean_pooling=False, num_labels=3)
    hf = randomize(hf_model("VideoMAEForVideoClassification", config))
    hf.save_pretrained(tmp_path)
    notes = load_pretrained(mae, tmp_path)
    assert {"unused encoder.head.weight", "unused encoder.head.bias"} <= set(notes)
    video = random_video(mae)
    close(mae.encode(video), hf.videomae(video.transpose(1, 2)).last_hidden_state)
    vit = VideoViT("nano", classes=3)
    head = vit.head.weight.clone()
    assert set(load_pretrained(vit, tmp_path, new_head=True)) == {
        "unused norm.weight",
        "unused norm.bias",
        "missing fc_norm.weight",
        "missing fc_norm.bias",
        "missing head.weight",
        "missing head.bias",
    }
    assert torch.equal(vit.head.weight, head)
    assert torch.equal(vit.blocks[1].mlp.fc1.bias, mae.encoder.blocks[1].mlp.fc1.bias)
    with pytest.raises(ValueError, match="missing fc_norm.weight"):
        load_pretrained(vit, tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix):
    state = randomize(VideoViT("nano", classes=3)).state_dict()
    torch.save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / "w.pt")
    vit = VideoViT("nano", classes=3)
    assert load_pretrained(vit, tmp_path / "w.pt") == []
    assert torch.equal(vit.head.weight, state["head.weight"])
    assert checkpoints.head_classes(tmp_path / "w.pt") == 3


def test_a_fine_tuned_file_without_its_head(tmp_path):
    state = randomize(VideoViT("nano", classes=3)).state_dict()
    torch.save({k: t for k, t in state.items() if not k.startswith("head.")}, tmp_path / "h.pt")
    mae, vit = VideoMAE("nano"), VideoViT("nano", classes=5)
    load_pretrained(mae, tmp_path / "h.pt")
    assert torch.equal(mae.encoder.norm.weight, state["fc_norm.weight"])
    notes = load_pretrained(vit, tmp_path / "h.pt", new_head=True)
    assert notes == ["missing head.weight", "missing head.bias"]
    with pytest.raises(ValueError, match="missing head.weight; missing head.bias"):
        load_pretrained(vit, tmp_path / "h.pt")


def test_class_names_of_a_huggingface_folder(tmp_path):
    vit = VideoViT("nano", classes=3)
    save_huggingface(vit, tmp_path, ["run", "jump", "wave"])
    found = checkpoints.saved_args(tmp_path)
    assert found["classes"] == ["run", "jump", "wave"]
    assert checkpoints.saved_args(tmp_path / "model.safetensors") == found
    config = json.loads((tmp_path / "config.json").read_text())
    for names in (
        {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        {"0": "run", "1": "run", "2": "wave"},
        {"1": "run", "2": "jump", "3": "wave"},
        ["run", "jump", "wave"],
        {},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": names}))
        assert "classes" not in checkpoints.saved_args(tmp_path), names


def test_a_new_head_for_other_classes(tmp_path):
    old, new = randomize(VideoViT("nano", classes=3)), VideoViT("nano", classes=7)
    torch.save({"model": old.state_dict()}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"head.weight: file \[3, 24\], model \[7, 24\]"):
        load_pretrained(new, tmp_path / "old.pt")
    head = new.head.weight.clone()
    assert load_pretrained(new, tmp_path / "old.pt", new_head=True) == [
        "missing head.weight",
        "missing head.bias",
    ]
    assert torch.equal(new.head.weight, head) and torch.equal(
        new.fc_norm.weight, old.fc_norm.weight
    )
    assert checkpoints.head_classes(tmp_path / "old.pt") == 3
    torch.save({"model": VideoMAE("nano").state_dict()}, tmp_path / "mae.pt")
    assert "unused mask_token" in load_pretrained(new, tmp_path / "mae.pt", new_head=True)
    with pytest.raises(ValueError, match="holds no classifier"):
        checkpoints.head_classes(tmp_path / "mae.pt")


def test_saved_args(tmp_path):
    torch.save({"model": {}, "args": {"size": "tiny"}}, tmp_path / "ours.pt")
    torch.save({"model": {}, "args": argparse.Namespace(size=1)}, tmp_path / "official.pt")
    (tmp_path / "bad.pt").write_bytes(b"no")
    assert checkpoints.saved_args(tmp_path / "ours.pt") == {"size": "tiny"}
    assert [
        checkpoints.saved_args(tmp_path / name) for name in ("official.pt", "bad.pt", "gone.pt")
    ] == [{}] * 3 and checkpoints.saved_args("none") == {}


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_a_contrastive_head_of_another_clip_stays_new(tmp_path):
    old = VideoMAE("nano", text_dim=512)
    torch.save({"model": old.state_dict()}, tmp_path / "old.pt")
    new = VideoMAE("nano", text_dim=128)
    head = new.contrastive.proj.weight.clone()
    notes = load_pretrained(new, tmp_path / "old.pt")
    assert checkpoints.summary_of(notes) == "encoder loaded; new: contrastive head (2 keys)"
    assert torch.equal(new.contrastive.proj.weight, head)
    assert torch.equal(new.mask_token, old.mask_token)


def test_what_a_folder_says_of_its_size(tmp_path):
    save_huggingface(VideoMAE("nano", frames=4, image_size=32), tmp_path / "hf")
    assert checkpoints.saved_args(tmp_path / "hf") == {
        "frames": 4,
        "image_size": 32,
        "size": "nano",
    }
    for text in ("[]", "{", '{"image_size": [224, 224], "hidden_size": 7}'):
        (tmp_path / "hf/config.json").write_text(text)
        assert checkpoints.saved_args(tmp_path / "hf") == {}


@pytest.mark.parametrize("args", [{"size": 224}, {"classes": 400}, {"frames": "16"}, [], None])
def test_args_of_another_program_are_not_ours(tmp_path, args):
    torch.save({"model": {}, "args": args}, tmp_path / "odd.pt")
    assert checkpoints.saved_args(tmp_path / "odd.pt") == {}


def test_too_little_memory_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    torch.save({}, tmp_path / "whole.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError, match="whole.pt: too little memory to read it"):
        checkpoints.read_checkpoint(tmp_path / "whole.pt")


def test_refusals_load_nothing(tmp_path, monkeypatch):
    mae, file = VideoMAE("nano"), tmp_path / "bad.pt"
    before = {k: v.clone() for k, v in mae.state_dict().items()}

    def refused(match, target=mae, path=file):
        with pytest.raises(ValueError, match=match) as error:
            load_pretrained(target, path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    refused("no checkpoint", path=tmp_path / "absent.pt")
    refused("no checkpoint", path=tmp_path)  # a folder without weights
    for garbage in (b"", b"\x00garbage" * 99, b"PK\x03\x04 truncated"):
        file.write_bytes(garbage)
        refused("no checkpoint")
    (tmp_path / "bad.safetensors").write_bytes(b"garbage" * 9)
    refused("no checkpoint", path=tmp_path / "bad.safetensors")
    for content in ([1, 2], {"model": {"a": 1}}, {"model": [torch.ones(1)]}, torch.ones(2)):
        torch.save(content, file)
        refused("no checkpoint")
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "owned"))
    torch.save({"model": Payload()}, file)
    refused("no checkpoint")
    assert not (
        tmp_path / "owned"
    ).exists()  # the payload works, as the last line of this test shows

    state = official_state()
    torch.save(
        {"model": state | {"mask_token": torch.ones(1, 1, 13), "encoder.norm.bias": torch.ones(9)}},
        file,
    )
    message = refused("does not fit VideoMAE")
    assert "mask_token: file [1, 1, 13], model [1, 1, 12]" in message
    assert "encoder.norm.bias: file [9], model [24]" in message
    for gone in ("encoder.blocks.1.attn.q_bias", "decoder.norm.bias", "mask_token"):
        # not even part of the decoder
        torch.save({k: v for k, v in state.items() if k != gone}, file)
        refused(f"missing {gone}")
    torch.save(state | {"encoder.blocks.2.attn.q_bias": torch.ones(24)}, file)
    refused("unexpected encoder.blocks.2.attn.q_bias")
    refused("unexpected blocks.2.attn.q_bias", VideoViT("nano"))
    torch.save(state | {"contrastive.logit_scale": torch.ones(())}, file)
    refused("missing contrastive.proj.weight")
    torch.save(
        {
            k.removeprefix("encoder."): v
            for k, v in VideoViT("nano", classes=3).state_dict().items()
            if k != "fc_norm.bias"
        },
        file,
    )
    refused("missing fc_norm.bias", VideoViT("nano", classes=3))
    refused(r"head.bias: file \[3\], model \[4\]", VideoViT("nano", classes=4))
    save_huggingface(mae, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"num_attention_heads": 4}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    refused("num_attention_heads: file 4", path=tmp_path / "hf")
    refused("num_attention_heads: file 4", path=tmp_path / "hf/model.safetensors")
    torch.save(load_file(tmp_path / "hf/model.safetensors"), tmp_path / "hf/pytorch_model.bin")
    refused("num_attention_heads: file 4", path=tmp_path / "hf/pytorch_model.bin")
    config |= {"num_attention_heads": 2, "decoder_num_attention_heads": 4}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    refused("decoder_num_attention_heads: file 4, model 3", path=tmp_path / "hf")
    del config["num_attention_heads"]  # then transformers takes 12
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    refused("num_attention_heads: file 12, model 2", path=tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text("[]")
    refused("its config.json cannot be read", path=tmp_path / "hf")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/model.safetensors.index.json").write_text("{}")
    refused("its weights are in several files", path=tmp_path / "shards")
    torch.save(state, file)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", denied)
        message = refused("cannot be read")
    assert message == f"{file}: cannot be read (Permission denied)"

    assert all(torch.equal(v, mae.state_dict()[k]) for k, v in before.items())
    torch.save({"model": Payload()}, file)
    torch.load(file, weights_only=False)
    assert (tmp_path / "owned").exists()


# --- tokens, targets, losses ---


def test_patchify_order_and_inverse():
    video = torch.arange(2 * 3 * 4 * 32 * 48).reshape(2, 3, 4, 32, 48)
    cubes = patchify(video, 2, 16)
    assert cubes.shape == (2, 2 * 2 * 3, 1536)
    t, h, w, dt, y, x, c = 1, 0, 2, 1, 5, 7, 2  # one number of one cube, by hand
    assert (
        cubes[1, (t * 2 + h) * 3 + w, ((dt * 16 + y) * 16 + x) * 3 + c]
        == video[1, c, 2 + dt, 5, 32 + 7]
    )
    assert torch.equal(unpatchify(cubes, (2, 2, 3), 2, 16), video)


def test_normalize():
    video = torch.zeros(1, 3, 2, 2, 2, dtype=torch.uint8)
    video[:, 1] = 255
    expected = torch.tensor([-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225])
    assert M.normalize(video).dtype == torch.float32
    close(M.normalize(video), expected.view(1, 3, 1, 1, 1).expand(1, 3, 2, 2, 2), 1e-6)


@pytest.mark.parametrize("frames, image_size", [(8, 96), (32, 32), (4, 160)])
def test_encode_equals_a_dense_convolution_and_sees_only_the_visible(frames, image_size):
    mae = randomize(VideoMAE("nano", frames, image_size))
    assert mae.grid == (
        frames // 2,
        image_size // 16,
        image_size // 16,
    ) and mae.num_tokens == math.prod(mae.grid)
    video, mask = random_video(mae), random_mask(mae)
    conv = mae.encoder.patch_embed["proj"]
    x = F.conv3d(video, conv.weight, conv.bias, stride=(2, 16, 16)).flatten(2).transpose(1, 2)
    n = torch.arange(mae.num_tokens).double()
    for j in range(24):
        angle = n / 10000 ** (2 * (j // 2) / 24)
        x[:, :, j] += (angle.cos() if j % 2 else angle.sin()).float()
    x = x[~mask].reshape(2, -1, 24)
    for block in mae.encoder.blocks:
        x = block(x)
    close(
        mae.encode(video, mask),
        F.layer_norm(x, (24,), mae.encoder.norm.weight, mae.encoder.norm.bias, 1e-6),
    )
    cubes = patchify(video)
    cubes[mask] = 1e6
    assert torch.equal(mae.encode(unpatchify(cubes, mae.grid), mask), mae.encode(video, mask))
    assert mae.encode(video).shape == (2, mae.num_tokens, 24)
    assert torch.isfinite(mae(video, mask).loss_mae)
    vit = VideoViT("nano", 3, frames, image_size)
    assert vit.eval()(video).shape == (2, 3)


def test_loss_ignores_visible_targets(monkeypatch):
    mae = randomize(VideoMAE("nano"))
    video, mask = random_video(mae), random_mask(mae)
    prediction = torch.randn(2, int(mask[0].sum()), 1536)
    monkeypatch.setattr(mae, "decode", lambda tokens, seen, hidden: prediction)
    loss = mae(video, mask).loss_mae
    cubes = patchify(video)
    cubes[~mask] += torch.randn_like(cubes[~mask])
    assert torch.equal(mae(unpatchify(cubes, mae.grid), mask).loss_mae, loss)
    cubes[mask] += torch.randn_like(cubes[mask])
    assert not torch.equal(mae(unpatchify(cubes, mae.grid), mask).loss_mae, loss)


def test_decoding_some_of_the_masked_tokens(monkeypatch):
    """The decoder sees the visible and the chosen tokens alone: the same as attention over all with
    the others barred, and the loss is the mean over the chosen."""
    mae = randomize(VideoMAE("tiny"))
    video, mask = random_video(mae), random_mask(mae)
    hidden = mask.nonzero()[:, 1].view(2, -1)
    decoded = torch.stack([row[torch.randperm(len(row))[:20]] for row in hidden])
    loss = mae(video, mask, decoded=decoded).loss_mae
    barred = mask.scatter(1, decoded, False)  # [B,N]
    cubes, (seen, every) = patchify(video, 2, 8), M.split_mask(mask)
    target, plain = mae.pixel_targets(cubes)[0], F.scaled_dot_product_attention
    tokens = mae.encoder.encode_cubes(cubes, seen)
    order = torch.cat([seen, every], 1)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v: plain(q, k, v, attn_mask=~barred.gather(1, order)[:, None, None, :]),
    )
    prediction = torch.zeros_like(target).scatter(
        1, every[..., None].expand(-1, -1, target.shape[-1]), mae.decode(tokens, seen, every)
    )
    monkeypatch.undo()
    errors = (prediction - target).square().mean(-1)
    by_hand = sum(errors[row, token] for row in range(2) for token in decoded[row]) / 40
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    whole = mae(video, mask)
    assert torch.equal(
        mae(video, mask, decoded=hidden).loss_mae, whole.loss_mae
    ) and whole.loss_mae.item() != pytest.approx(loss.item(), rel=1e-5)
    shuffled = mae(video, mask, decoded=hidden[:, torch.randperm(hidden.shape[1])]).loss_mae
    assert shuffled.item() == pytest.approx(whole.loss_mae.item(), rel=1e-5)
    with pytest.raises(RuntimeError, match="some of these tokens are not masked"):
        mae(video, mask, decoded=torch.arange(20).expand(2, -1))


def test_trivial_predictor_scores_one():
    mae = VideoMAE("nano")
    for p in mae.decoder.head.parameters():
        nn.init.zeros_(p)
    # per colour 512 numbers of unbiased variance 1: their mean square is 511 / 512
    assert mae(random_video(mae), random_mask(mae)).loss_mae.item() == pytest.approx(
        511 / 512, rel=1e-4
    )
    flat = torch.full((1, 3, 4, 32, 32), 0.3)  # a cube of one colour has deviation 0: no NaN
    assert mae(flat, random_mask(mae, 1)).loss_mae.item() == pytest.approx(0, abs=1e-2)


def test_reconstruct_borrows_only_mean_and_deviation():
    mae = randomize(VideoMAE("nano")).eval()
    video, mask = random_video(mae), random_mask(mae)
    picture, pixels = patchify(mae.reconstruct(video, mask)), patchify(video.double())
    std, mean = torch.tensor(M.STD).double().repeat(512), torch.tensor(M.MEAN).double().repeat(512)
    pixels = (pixels * std + mean).float()
    close(picture[~mask], pixels[~mask])
    seen, hidden = M.split_mask(mask)
    with torch.no_grad():
        prediction = mae.decode(mae.encode(video, mask), seen, hidden)
    truth = pixels[mask].view(-1, 512, 3)
    expected = prediction.view(-1, 512, 3) * truth.std(1, keepdim=True) + truth.mean(
        1, keepdim=True
    )
    close(picture[mask].view(-1, 512, 3), expected.clamp(0, 1), 1e-4)


def nce_by_hand(video, text, scale):
    video, text = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    total, B = 0.0, len(video)
    for a, b in ((video, text), (text, video)):
        for i in range(B):
            logits = [scale * float(a[i] @ b[j]) for j in range(B)]
            log_sum = math.log(sum(math.exp(x) for x in logits))
            positives = [j for j in range(B) if float(text[i] @ text[j]) > 0.999]
            total += sum(log_sum - logits[j] for j in positives) / len(positives)
    return total / (2 * B)


def test_info_nce_equals_a_double_loop_also_with_shared_captions():
    video, text = torch.randn(6, 5), torch.randn(6, 5)
    alone = info_nce(video, text, 10.0)
    assert alone.item() == pytest.approx(nce_by_hand(video.double(), text.double(), 10.0), rel=1e-5)
    text[3], text[5] = 2 * text[0], text[0] + 1e-4  # the same caption thrice
    expected = nce_by_hand(video.double(), text.double(), 10.0)
    assert info_nce(video, text, 10.0).item() == pytest.approx(expected, rel=1e-5)
    assert alone.item() != pytest.approx(expected, rel=1e-2)
    same = text[:1].expand(6, 5)  # one caption for all: nothing to tell apart
    assert info_nce(video[:1].expand(6, 5), same, 10.0).item() == pytest.approx(
        math.log(6), rel=1e-5
    )


def test_contrastive_head_uses_the_mean_of_visible_tokens_and_a_limited_temperature():
    mae = randomize(VideoMAE("nano", text_dim=5))
    assert mae.contrastive.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    video, mask, text = random_video(mae, 4), random_mask(mae, 4), torch.randn(4, 5).half()
    z = mae.encode(video, mask).mean(1) @ mae.contrastive.proj.weight.T
    out = mae(video, mask, text)
    close(out.loss_nce, info_nce(z, text.float(), 1 / 0.07))
    assert mae(video, mask).loss_nce is None and torch.equal(
        mae(video, mask).loss_mae, out.loss_mae
    )
    mae.contrastive.logit_scale.data.fill_(50.0)
    mae.contrastive.limit_temperature()
    close(mae(video, mask, text).loss_nce, info_nce(z, text.float(), 100.0))


def test_nce_detach_leaves_the_encoder_alone():
    grads = {}
    for name, detach, with_text in (
        ("plain", False, False),
        ("monitored", True, True),
        ("joint", False, True),
    ):
        mae = randomize(VideoMAE("nano", text_dim=5, nce_detach=detach))
        out = mae(
            random_video(mae, 4),
            random_mask(mae, 4),
            torch.ones(4, 5).tril() if with_text else None,
        )
        (out.loss_mae + (out.loss_nce if with_text else 0)).backward()
        grads[name] = {k: p.grad for k, p in mae.named_parameters()}
    for key in grads["plain"]:
        if key.startswith("contrastive."):
            assert grads["plain"][key] is None and grads["monitored"][key].abs().sum() > 0
            assert torch.equal(grads["monitored"][key], grads["joint"][key])
        else:
            assert torch.equal(grads["plain"][key], grads["monitored"][key]), key
    assert not torch.equal(grads["plain"]["encoder.norm.bias"], grads["joint"]["encoder.norm.bias"])


def rank_main(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    M.SIZES["nano"] = NANO
    mae = randomize(VideoMAE("nano", text_dim=5))
    ddp = nn.parallel.DistributedDataParallel(mae)
    video, mask, text = torch.load(folder / "batch.pt")
    rows = slice(3 * rank, 3 * rank + 3)
    out = ddp(video[rows], mask[rows], text[rows])
    (out.loss_mae + out.loss_nce).backward()
    losses = torch.stack(out).detach()
    torch.distributed.all_reduce(losses)
    torch.save(
        (losses / 2, {k: p.grad for k, p in mae.named_parameters()}), folder / f"rank{rank}.pt"
    )
    # no thread of theirs is to want the interpreter while it shuts down: that ends in SIGABRT
    del (out, ddp)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_with_the_whole_batch(tmp_path):
    mae = randomize(VideoMAE("nano", text_dim=5))
    video, mask, text = random_video(mae, 6), random_mask(mae, 6), torch.randn(6, 5)
    text[4] = text[1]  # a caption shared across the ranks
    torch.save((video, mask, text), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(rank_main, (tmp_path,), nprocs=2)
    out = mae(video, mask, text)
    (out.loss_mae + out.loss_nce).backward()
    for rank in range(2):
        losses, grads = torch.load(tmp_path / f"rank{rank}.pt")
        close(losses, torch.stack(out).detach())
        for key, p in mae.named_parameters():
            close(grads[key], p.grad, 3e-5)


# --- how it is run ---


def test_masks_of_unequal_rows_are_refused():
    mae = VideoMAE("nano")
    video, mask = random_video(mae), random_mask(mae, visible=3)
    unequal = mask.clone()
    unequal[1, mask[1].nonzero()[0]] = False
    for bad, visible in ((unequal, None), (unequal, 3), (mask, 4)):
        with pytest.raises(RuntimeError, match="not every row keeps"):
            mae(video, bad, num_visible=visible)
    with pytest.raises(ValueError, match="expected a batch of .3, 4, 32, 32"):
        mae(video[:, :, :2], mask)
    for kwargs in (dict(frames=5), dict(image_size=40)):
        with pytest.raises(ValueError, match="expected a positive multiple of (2|16)"):
            VideoMAE("nano", **kwargs)


def test_masks_of_another_shape_and_without_a_side_are_refused():
    mae = VideoMAE("nano")
    video, mask = random_video(mae), random_mask(mae)
    for wrong in (mask[:, :-1], mask[:1], torch.cat([mask, mask], dim=1)):
        for call in (mae, mae.encode, mae.reconstruct):
            with pytest.raises(ValueError, match="expected .* .clips, tokens."):
                call(video, wrong)
    for wrong in (torch.ones_like(mask), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match="some must be masked and some not"):
            mae(video, wrong)
    with pytest.raises(ValueError, match="expected uint8, got torch.float32"):
        M.normalize(video)
    for frames in (0, -2):
        with pytest.raises(ValueError, match=f"frames {frames}: expected a positive multiple of 2"):
            VideoMAE("nano", frames=frames)


def test_bfloat16_autocast_keeps_losses_in_float32():
    mae = randomize(VideoMAE("tiny", text_dim=16))
    video, mask, text = random_video(mae, 4), random_mask(mae, 4), torch.randn(4, 16)
    full = mae(video, mask, text)
    with torch.autocast("cpu", torch.bfloat16):
        half = mae(video, mask, text)
    for a, b in zip(half, full, strict=True):
        assert (
            a.dtype == torch.float32
            and a.item() == pytest.approx(b.item(), rel=2e-2)
            and a.item() != b.item()
        )
    with torch.autocast("cpu", torch.bfloat16):
        target = mae.pixel_targets(patchify(video))[0]
        nce = mae.contrastive(mae.encode(video, mask), text)
    assert target.dtype == nce.dtype == torch.float32


def test_checkpointing_changes_no_gradient():
    grads = []
    calls = []
    for on in (False, True):
        calls.clear()
        mae = randomize(VideoMAE("nano"))
        mae.set_checkpointing(on)
        mae.encoder.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        mae.decoder.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        mae(random_video(mae), random_mask(mae)).loss_mae.backward()
        assert len(calls) == (4 if on else 2)  # recomputed in the backward pass
        grads.append(
            [p.grad for k, p in mae.named_parameters() if not k.startswith("contrastive.")]
        )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_to_one_graph_when_told_the_count():
    mae = randomize(VideoMAE("nano", text_dim=5))
    video, mask, text = random_video(mae), random_mask(mae, visible=3), torch.randn(2, 5)
    # a read of the device would break the graph
    compiled = torch.compile(mae, fullgraph=True, backend="aot_eager")
    for decoded in (None, mask.nonzero()[:, 1].view(2, -1)[:, 1:4]):
        fast = compiled(video, mask, text, 3, decoded)
        plain = mae(video, mask, text, decoded=decoded)
        for a, b in zip(fast, plain, strict=True):
            close(a, b)


def test_drop_path_grows_linearly_and_keeps_the_mean():
    vit = VideoViT("tiny", classes=3, drop_path=0.4)
    assert [b.drop_path for b in vit.blocks] == pytest.approx([0, 0.2, 0.4])
    x = torch.ones(4000, 3, 2)
    dropped = vit.blocks[2].train().drop_branch(x)
    kept = dropped[:, 0, 0] > 0
    assert torch.equal(dropped[kept], x[kept] / 0.6) and torch.equal(dropped[~kept], 0 * x[~kept])
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert torch.equal(vit.blocks[2].eval().drop_branch(x), x)
    assert torch.equal(vit.blocks[0].train().drop_branch(x), x)
    vit.blocks[2].drop_path = 0.1
    factors = vit.blocks[2].train().drop_branch(torch.ones(200, 1, 1, dtype=torch.bfloat16))
    assert factors.unique().tolist() == [0, pytest.approx(1 / 0.9, abs=1e-6)]


def test_the_classifiers_logits_are_float32_under_autocast():
    """In bf16 numbers between 4 and 8 are 1/32 apart; the tokens before the head are as they were."""
    torch.manual_seed(0)
    vit = VideoViT("tiny", classes=400).eval()
    torch.nn.init.normal_(vit.head.weight)
    video = torch.randn(2, 3, 8, 48, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = vit(video)
        tokens = vit.encode_cubes(vit.to_cubes(video))
    assert logits.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(logits, vit.head(vit.fc_norm(tokens.mean(1))))
    assert not torch.equal(logits, logits.bfloat16().float())


def test_initialisation_is_videomaes():
    mae, vit = VideoMAE("tiny"), VideoViT("tiny", classes=50)
    weight = mae.encoder.blocks[0].mlp.fc1.weight  # Xavier-uniform
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert 0 < mae.mask_token.abs().max() <= 0.02
    assert all(
        (p == 0).all()
        for k, p in mae.named_parameters()
        if k.endswith("bias") and "patch_embed" not in k
    )
    assert 0 < vit.head.weight.abs().max() < 2e-4


def test_cost_counts():
    from torch.utils.flop_counter import FlopCounterMode

    mae = VideoMAE("tiny")
    # torch 2.8 does not count the CPU's fused attention
    from torch.nn.attention import SDPBackend, sdpa_kernel

    video, mask = random_video(mae, 1), random_mask(mae, 1, visible=28)
    for decoded, count in ((None, None), (mask.nonzero()[None, :18, 1], 18)):
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            mae(video, mask, num_visible=28, decoded=decoded)
        assert counter.get_total_flops() / 2 == sum(M.count_flops(mae, 28, count))
    with torch.device("meta"):
        base = VideoMAE("base")
    assert M.count_flops(base, 1568)[0] / 1e9 == pytest.approx(180, abs=1)  # VideoMAE's model zoo
    done = subprocess.run([sys.executable, M.__file__], capture_output=True, text=True, check=True)
    base = next(line for line in done.stdout.splitlines() if line.startswith("base"))
    for text in ("94.", "1568", "(160)", "(392)", "(632)"):
        assert text in base


# --- what others write, and what others read ---


def official_file(path, numpy_module, **more):
    """A checkpoint as VideoMAE's own code writes it: its schedule puts numpy numbers into the
    optimiser's state. numpy_module: what numpy 1 or 2 calls the module of its scalars."""
    state = official_state()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["lr"] = np.float64(1.5e-4)
    optimizer.param_groups[0]["lr_scale"] = np.float32(0.75)
    args = argparse.Namespace(lr=np.float64(1e-3), epochs=np.int64(800), amp=np.bool_(True))
    content = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 800, "args": args}
    torch.save(content | more, path)
    rewrite_pickle(path, b"numpy._core.multiarray", numpy_module)
    return state


def rewrite_pickle(path, old, new):
    """Replaces bytes in the pickle inside a file that torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            archive.writestr(name, data)


@pytest.mark.parametrize("numpy_module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_official_checkpoints_with_numpys_numbers_load(tmp_path, numpy_module):
    file = tmp_path / "checkpoint-799.pth"
    state = official_file(file, numpy_module)
    mae = VideoMAE("nano")
    report = load_pretrained(mae, file)
    assert report == ["missing contrastive.logit_scale", "missing contrastive.proj.weight"]
    assert all(torch.equal(mae.state_dict()[key], value) for key, value in state.items())
    assert checkpoints.saved_args(file) == {}


def test_beyond_numpys_numbers_nothing_is_let_in(tmp_path, monkeypatch):
    file = tmp_path / "bad.pth"
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "owned"))
    official_file(file, b"numpy.core.multiarray", scaler=Payload())
    with pytest.raises(ValueError, match="no checkpoint that can be read safely"):
        load_pretrained(VideoMAE("nano"), file)
    assert not (tmp_path / "owned").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "owned").exists()  # so the payload was live

    for other in (np.ones(2), np.random.default_rng(0), np.array(None, dtype=object)):
        torch.save({"model": official_state(), "extra": other}, file)
        with pytest.raises(ValueError, match="no checkpoint that can be read safely"):
            load_pretrained(VideoMAE("nano"), file)
    # another function of the module whose scalars are let in
    official_file(file, b"numpy.core.multiarray")
    rewrite_pickle(file, b"multiarray\nscalar", b"multiarray\nfromfile")
    with pytest.raises(ValueError, match="no checkpoint that can be read safely"):
        load_pretrained(VideoMAE("nano"), file)
    # keys that are no names, a head of no width, and parts that do not belong together
    state = official_state()
    torch.save({0: torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="expected named tensors"):
        load_pretrained(VideoMAE("nano"), file)
    torch.save({"model": state | {"head.weight": torch.tensor(1.0)}}, file)
    with pytest.raises(ValueError, match="holds no classifier"):
        checkpoints.head_classes(file)
    parts = {
        f"x.{name}.weight": torch.zeros(2, width)
        for name, width in zip(("query", "key", "value"), (2, 2, 3))
    }
    torch.save({"model": state | parts}, file)
    with pytest.raises(ValueError, match="x.query.weight has another shape than key and value"):
        load_pretrained(VideoMAE("nano"), file)
    # a number is no weight
    torch.save({"model": official_state() | {"mask_token": np.float64(1)}}, file)
    with pytest.raises(ValueError, match="no checkpoint that can be read safely"):
        load_pretrained(VideoMAE("nano"), file)
    allowed = torch.serialization.get_safe_globals()  # ours are there only while a file is opened
    assert not [one for one in allowed if one in checkpoints.SAFE]


def test_a_bias_of_keys_changes_nothing_and_is_left_out(tmp_path):
    """Some versions of transformers train one."""
    mae = randomize(VideoMAE("nano"))
    save_huggingface(mae, tmp_path)
    file = tmp_path / "model.safetensors"
    state = {}  # as transformers 5.5.1 to 5.17 write it
    for name, value in load_file(file).items():
        state[name.replace("q_bias", "query.bias").replace("v_bias", "value.bias")] = value
        if name.endswith("q_bias"):
            state[name.replace("q_bias", "key.bias")] = torch.randn_like(value)
    assert len(state) == len(load_file(file)) + 3  # two blocks of the encoder, one of the decoder
    save_file(state, file)
    back = VideoMAE("nano")
    assert set(load_pretrained(back, tmp_path)) == {
        "missing contrastive.proj.weight",
        "missing contrastive.logit_scale",
    }
    video, mask = random_video(mae), random_mask(mae)
    close(back(video, mask).loss_mae, mae(video, mask).loss_mae)
    # the same attention with such a bias, written out
    attention = mae.encoder.blocks[0].attn
    x = torch.randn(2, 5, 24)
    q, k, v = F.linear(x, attention.qkv.weight).chunk(3, dim=-1)
    q, k, v = (
        part.unflatten(-1, (2, 12)).transpose(1, 2)
        for part in (q + attention.q_bias, k + torch.randn(24), v + attention.v_bias)
    )
    mixed = (q @ k.transpose(-2, -1) / 12**0.5).softmax(dim=-1) @ v
    close(attention(x), attention.proj(mixed.transpose(1, 2).flatten(2)))


def test_a_folder_without_one_of_its_keys_says_which(tmp_path):
    mae = VideoMAE("nano")
    save_huggingface(mae, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    gone = "videomae.encoder.layer.1.attention.attention.key.weight"
    del state[gone]
    save_file(state, file)
    with pytest.raises(ValueError) as error:
        load_pretrained(mae, tmp_path)
    name = "encoder.blocks.1.attn"
    assert str(error.value) == f"{file}: has {name}.query.weight but no {name}.key.weight"


def test_a_file_of_another_size_is_refused_in_a_line_that_can_be_read(tmp_path):
    torch.save({"model": VideoViT("nano", 3).state_dict()}, tmp_path / "nano.pt")
    with pytest.raises(ValueError) as error:
        load_pretrained(VideoViT("tiny", 3), tmp_path / "nano.pt")
    first, *others = str(error.value).split("; ")
    expected = "does not fit VideoViT: blocks.0.norm1.weight: file [24], model [96]"
    assert first == f"{tmp_path / 'nano.pt'} {expected}"
    wrong = 31 + 13  # nano's 32 keys, but the head's bias fits; and tiny's third block
    assert len(others) == 8 and others[-1] == f"and {wrong - 8} more"


def test_notes_in_words(tmp_path):
    torch.save({"model": VideoMAE("nano").state_dict()}, tmp_path / "mae.pt")
    torch.save({"model": VideoViT("nano", classes=3).state_dict()}, tmp_path / "vit.pt")
    torch.save({"model": official_state()}, tmp_path / "official.pth")

    def words(model, name, **options):
        return checkpoints.summary_of(load_pretrained(model, tmp_path / name, **options))

    assert words(VideoMAE("nano"), "mae.pt") == "every key loaded"
    # 13 keys of one block, norm and head with weight and bias, encoder_to_decoder, mask_token
    decoder = "decoder (19 keys)"
    head = "contrastive head (2 keys)"
    new = "new"
    classifier = f"{new}: final norm (2 keys), classifier (2 keys)"
    unused = f"not used: {decoder}, {head}, final norm (2 keys)"
    found = words(VideoViT("nano", classes=3), "mae.pt")
    assert found.split("; ")[::2] == ["encoder loaded", classifier]
    assert sorted(found.split("; ")[1][10:].split(", ")) == sorted(unused[10:].split(", "))
    assert words(VideoMAE("nano"), "official.pth") == f"encoder loaded; {new}: {head}"
    found = words(VideoViT("nano", classes=7), "vit.pt", new_head=True)
    assert found == f"encoder loaded; {new}: classifier (2 keys)"
    found = words(VideoMAE("nano"), "vit.pt")
    assert found.startswith("encoder loaded; not used: classifier (2 keys); new: ")
    assert decoder in found and head in found


def frames_of(config, seed=5):
    shape = (config["frames"], config["image_size"], config["image_size"], 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def in_our_layout(frames):
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None]


def test_huggingfaces_processor_normalises_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    for model in (VideoMAE("nano"), VideoViT("nano", classes=3)):
        folder = tmp_path / type(model).__name__
        save_huggingface(model, folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert type(processor).__name__.startswith("VideoMAEImageProcessor")
        frames = frames_of(model.config)
        theirs = processor(list(frames), return_tensors="pt")["pixel_values"]
        close(theirs.transpose(1, 2), M.normalize(in_our_layout(frames)), 1e-6)
        wide = list(np.zeros((4, 64, 100, 3), np.uint8))
        assert processor(wide, return_tensors="pt")["pixel_values"].shape == (1, 4, 3, 32, 32)


def takes_frames(pipeline):
    """Whether a pipeline of transformers takes frames as numbers; that of 5.0 takes files alone."""
    return hasattr(pipeline, "video_processor")


def test_huggingfaces_pipeline_classifies_a_clip_by_name(tmp_path):
    transformers = import_transformers()
    names = ["arm wrestling", "tai chi", "zumba", "abseiling", "yoga"]
    vit = randomize(VideoViT("nano", classes=5)).eval()
    save_huggingface(vit, tmp_path, names)
    classify = transformers.pipeline("video-classification", model=str(tmp_path))
    if not takes_frames(classify):
        pytest.skip("the pipeline of this transformers takes files alone")
    assert classify.model.config.label2id == {name: i for i, name in enumerate(names)}
    official_eps(classify.model)
    # as numbers: this transformers decodes files by torchcodec alone
    frames = frames_of(vit.config)
    found = classify(frames)
    with torch.no_grad():
        expected = vit(M.normalize(in_our_layout(frames))).softmax(-1)[0]
    assert [one["label"] for one in found] == [names[i] for i in expected.argsort(descending=True)]
    for one in found:
        assert one["score"] == pytest.approx(expected[names.index(one["label"])].item(), rel=1e-4)
    assert max(expected) > 1.2 * min(expected)


def test_names_that_do_not_fit_the_head_are_refused(tmp_path):
    vit = VideoViT("nano", classes=3)
    for names in (["a", "b"], ["a", "b", "a"], ["a", "b", "c", "d"], ["a", "b", "c", "a"]):
        with pytest.raises(ValueError) as error:
            save_huggingface(vit, tmp_path / "hf", names)
        found = f"found {len(names)} names, {len(set(names))} of them different"
        assert str(error.value) == f"classes: expected 3 different names, {found}"
    assert not (tmp_path / "hf").exists()


def test_our_checkpoints_are_exported_by_a_command(tmp_path):
    transformers = import_transformers()
    vit = randomize(VideoViT("tiny", classes=2, frames=4, image_size=64)).eval()
    args = {"size": "tiny", "frames": 4, "image_size": 64, "classes": ["calm", "fight"]}
    torch.save({"model": vit.state_dict(), "args": args, "step": 3}, tmp_path / "best.pt")
    out = run("tgm.checkpoints", "--export", tmp_path / "best.pt", "--out", tmp_path / "vit")
    opened = 'pipeline("video-classification", model=...)'
    assert out == f"{tmp_path}/vit: transformers opens it with {opened}\n"
    classify = transformers.pipeline("video-classification", model=str(tmp_path / "vit"))
    official_eps(classify.model)
    if takes_frames(classify):
        frames = frames_of(vit.config)
        best = classify(frames, top_k=1)[0]
        with torch.no_grad():
            expected = vit(M.normalize(in_our_layout(frames))).softmax(-1)[0]
        assert best["label"] == args["classes"][int(expected.argmax())]
        assert best["score"] == pytest.approx(expected.max().item(), rel=1e-4)

    mae = randomize(VideoMAE("tiny", text_dim=7))
    args = {"size": "tiny", "frames": 8, "image_size": 32, "text_dim": 7}
    torch.save({"model": mae.state_dict(), "args": args}, tmp_path / "checkpoint.pt")
    out = run(
        "tgm.checkpoints",
        "--export",
        tmp_path / "checkpoint.pt",
        "--out",
        tmp_path / "mae",
        process=True,
    )
    assert "VideoMAEForPreTraining.from_pretrained" in out
    back = VideoMAE("tiny", text_dim=7)
    load_pretrained(back, tmp_path / "mae")
    assert torch.equal(back.encoder_to_decoder.weight, mae.encoder_to_decoder.weight)


def test_exports_that_cannot_be_end_in_one_line(tmp_path):

    def export(file, out):
        return run("tgm.checkpoints", "--export", file, "--out", out, fails=True)

    torch.save({"model": official_state()}, tmp_path / "official.pth")
    line = export(tmp_path / "official.pth", tmp_path / "hf")
    assert (
        line == f"--export {tmp_path}/official.pth: not a checkpoint of pretrain.py or finetune.py"
    )
    assert export("gone.pt", tmp_path / "hf") == (
        "--export gone.pt: no checkpoint there (pretrain.py writes runs/NAME/checkpoint.pt)"
    )
    (tmp_path / "file").write_text("mine")
    save_huggingface(VideoMAE("nano"), tmp_path / "full")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/model.safetensors.index.json").touch()
    for taken in ("file", "full", "shards"):
        line = export(tmp_path / "official.pth", tmp_path / taken)
        assert (
            line == f"--out {tmp_path}/{taken}: already exists; remove it, or choose another folder"
        )
    args = {"size": "nano", "frames": 4, "image_size": 32}
    torch.save({"model": VideoMAE("nano").state_dict(), "args": args}, tmp_path / "part.pt")
    line = export(tmp_path / "part.pt", tmp_path / "hf")
    assert line == f"--export {tmp_path}/part.pt: not a checkpoint of pretrain.py or finetune.py"
    args["text_dim"] = 512
    args["size"] = "giant"
    torch.save({"model": VideoMAE("nano").state_dict(), "args": args}, tmp_path / "part.pt")
    line = export(tmp_path / "part.pt", tmp_path / "hf")
    assert line == f"--export {tmp_path}/part.pt: not a checkpoint of pretrain.py or finetune.py"
    args["size"] = "nano"
    torch.save({"model": VideoMAE("nano").state_dict(), "args": args}, tmp_path / "mae.pt")
    assert "Not a directory" in export(tmp_path / "mae.pt", tmp_path / "file/hf")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # as on a full disk
    try:
        line = export(tmp_path / "mae.pt", tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert line.startswith(f"{tmp_path}/hf/model.safetensors: cannot be written (")
    assert not list((tmp_path / "hf").iterdir())
    line = run("tgm.checkpoints", "--export", tmp_path / "mae.pt", fails=True)
    assert "the following arguments are required: --out" in line


def test_a_checkpoint_that_cannot_be_written_is_an_error_with_its_reason(tmp_path):
    path = tmp_path / "gone/checkpoint.pt"
    with pytest.raises(FileNotFoundError) as error:
        checkpoints.save_checkpoint(path, step=1)
    reason = "cannot be written, the last checkpoint is kept (No such file or directory)"
    assert (error.value.strerror, error.value.filename) == (reason, str(path))

    @one_line_errors
    def main(_):
        checkpoints.save_checkpoint(path, step=1)

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == f"{path}: {reason}"

    class Broken:
        def __reduce__(self):
            raise RuntimeError("a bug, not a disk")

    path.parent.mkdir()
    checkpoints.save_checkpoint(path, step=1)
    with pytest.raises(RuntimeError, match="a bug, not a disk"):
        checkpoints.save_checkpoint(path, step=Broken())
    assert torch.load(path, weights_only=True) == {"step": 1} and os.listdir(path.parent) == [
        path.name
    ]


def test_what_the_stages_write_is_exported(copy):
    transformers = import_transformers()
    tiny = ("--size", "tiny", "--batch-size", 8, "--max-steps", 1, "--workers", 0)
    run("pretrain.py", *tiny, "--out", "pre", cwd=copy)
    run(
        "finetune.py",
        *tiny,
        *"--views 1 1 --checkpoint pre/checkpoint.pt --out ft".split(),
        cwd=copy,
    )
    run("tgm.checkpoints", "--export", "pre/checkpoint.pt", "--out", "hf/pre", cwd=copy)
    run("tgm.checkpoints", "--export", "ft/checkpoint.pt", "--out", "hf/ft", cwd=copy)
    hf = transformers.VideoMAEForPreTraining.from_pretrained(copy / "hf/pre")
    saved = torch.load(copy / "pre/checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(hf.mask_token, saved["mask_token"])
    classify = transformers.pipeline("video-classification", model=str(copy / "hf/ft"))
    if not takes_frames(classify):
        return
    found = classify(np.zeros((8, 32, 32, 3), np.uint8), top_k=8)
    lines = (copy / "data/train.csv").read_text().splitlines()
    column = lines[0].split(",").index("label")
    assert {one["label"] for one in found} == {line.split(",")[column] for line in lines[1:]}


# --- the contrastive loss: samples of one video, and the temperature ---


def nce_by_pairs(video, text, scale, positive):
    """InfoNCE pair by pair; positive(i, j) says which pairs belong together."""
    video, text = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    total = 0.0
    for one, other in ((video, text), (text, video)):
        for i in range(len(one)):
            logits = [scale * (one[i] @ other[j]).item() for j in range(len(other))]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            positives = [j for j in range(len(other)) if positive(i, j)]
            total += sum(log_sum - logits[j] for j in positives) / len(positives)
    return total / (2 * len(video))


def test_info_nce_takes_samples_of_one_video_for_positives():
    video, text = torch.randn(6, 5), torch.randn(6, 5)
    rows = [7, 7, 7, 10**9, 4, 4]
    expected = nce_by_pairs(video.double(), text.double(), 10.0, lambda i, j: rows[i] == rows[j])
    loss = info_nce(video, text, 10.0, torch.tensor(rows))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # each sample for itself
    assert info_nce(video, text, 10.0).item() != pytest.approx(expected, rel=1e-2)
    # the same caption as well: 3 with 4, 4 with 3 and with the other of its video
    text[3] = text[4]
    pairs = {(3, 4), (4, 3)}
    expected = nce_by_pairs(
        video.double(), text.double(), 10.0, lambda i, j: rows[i] == rows[j] or (i, j) in pairs
    )
    assert info_nce(video, text, 10.0, torch.tensor(rows)).item() == pytest.approx(
        expected, rel=1e-5
    )
    # alone: nothing to tell apart
    assert info_nce(video[:1], text[:1], 10.0, torch.tensor([3])).item() == 0
    # one video alone, four times
    same = info_nce(video[:1].expand(4, 5), text[:4], 10.0, torch.full((4,), 3))
    own = (10 * F.normalize(text[:4], dim=-1) @ F.normalize(video[0], dim=0)).double()
    assert same.item() == pytest.approx(
        ((own.logsumexp(0) - own.mean()) + math.log(4)).item() / 2, rel=1e-5
    )


def test_info_nce_is_its_own_positive_whatever_the_product_says(monkeypatch):
    """TF32 may compute a cosine of 0.998 of a text with itself; without a positive, 0 / 0
    follows.
    """
    video, text = torch.randn(4, 5), torch.randn(4, 5)
    expected = nce_by_pairs(video.double(), text.double(), 10.0 * 0.99**2, lambda i, j: i == j)
    normalize = F.normalize
    monkeypatch.setattr(M.F, "normalize", lambda x, dim: 0.99 * normalize(x, dim=dim))
    assert info_nce(video, text, 10.0).item() == pytest.approx(expected, rel=1e-5)


def test_a_temperature_at_its_limit_comes_back():
    """The limit is set on the parameter after the step; in the forward pass its gradient would
    be 0 beyond it.
    """
    head = M.ContrastiveHead(8, 5)
    head.logit_scale.data.fill_(6.0)
    tokens, text = torch.randn(4, 3, 8), torch.randn(4, 5)  # no match: a high 1 / temperature costs
    optimizer = torch.optim.SGD([head.logit_scale], lr=1e-3)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        head(tokens, text).backward()
        assert head.logit_scale.grad.item() > 0
        optimizer.step()
        head.limit_temperature()
        values.append(head.logit_scale.item())
    assert (
        values[0] == pytest.approx(math.log(100))
        and values[1] < values[0]
        and values[2] < values[1]
    )
    head.logit_scale.data.fill_(-1.0)
    head.limit_temperature()
    assert head.logit_scale.item() == 0


def nce_of_rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    video, text, rows = torch.load(folder / "batch.pt")
    part = slice(3 * rank, 3 * rank + 3)
    own = video[part].clone().requires_grad_()
    loss = info_nce(own, text[part], 10.0, rows[part])
    loss.backward()
    torch.save(
        (loss.detach(), info_nce(video[part], text[part], 10.0), own.grad),
        folder / f"rank{rank}.pt",
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_samples_of_one_video_on_two_ranks(tmp_path):
    video, text, rows = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([7, 1, 7, 1, 5, 7])
    torch.save((video, text, rows), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(nce_of_rank, (tmp_path,), nprocs=2)
    whole = video.clone().requires_grad_()
    loss = info_nce(whole, text, 10.0, rows)
    loss.backward()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert (ranks[0][0] + ranks[1][0]).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    assert (ranks[0][1] + ranks[1][1]).item() / 2 == pytest.approx(
        info_nce(video, text, 10.0).item(), rel=1e-5
    )
    close(torch.cat([ranks[0][2], ranks[1][2]]) / 2, whole.grad)
