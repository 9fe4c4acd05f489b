"""Models as they are published, without downloading any: open_clip's own tables of weights, and
transformers' classes with random weights in small sizes, saved as the real ones are."""

import json
import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import toy
import toy_models
import transformers as hf
from conftest import BLIP, CLIP, ENVIRONMENT, ROOT, SHARED, run

import caption
from tgm import clip as clip_models
from tgm.run import RunError

# ---- open_clip


def is_plain(name):
    """Whether the image tower of open_clip's model is a plain vision transformer, by its
    configuration.
    """
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    special = "timm_model_name" in vision or vision.get("attentional_pool", False)
    return not special and isinstance(vision["layers"], int)


PUBLISHED = open_clip.list_pretrained()
PLAIN = [(name, tag) for name, tag in PUBLISHED if is_plain(name)]
OTHER = [(name, tag) for name, tag in PUBLISHED if not is_plain(name)]


@pytest.fixture
def no_weights(monkeypatch):
    """open_clip builds models as it does, but of two blocks, on the meta device and without
    weights, tokenizers, and Hugging Face's towers."""

    class TextTower(torch.nn.Module):
        def __init__(self, *_, **__):
            super().__init__()
            self.vocab_size = self.context_length = 1

    whole = open_clip.get_model_config

    def shallow(name):
        config = whole(name)
        for tower in ("vision_cfg", "text_cfg"):
            if isinstance(config[tower].get("layers"), int):
                config[tower]["layers"] = 2
        return config

    monkeypatch.setattr(open_clip.factory, "get_model_config", shallow)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "weights")
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(open_clip.model, "HFTextEncoder", TextTower)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_: None)
    with torch.device("meta"):
        yield


def test_every_published_weight_meets_its_activation(no_weights):
    """The activation in every block of the model that load_clip builds is that of open_clip's table
    of weights. One entry there contradicts its model's configuration: refused, with the name that
    brings its own."""
    assert len(PLAIN) > 90 and ("ViT-B-16", "openai") in PLAIN
    refused = []
    turned = 0
    for name, tag in PLAIN:
        quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        try:
            model, _ = clip_models.load_clip(name, tag, None, "meta")
        except RunError as error:
            refused.append((name, tag, str(error)))
            continue
        expected = open_clip.transformer.QuickGELU if quick else torch.nn.GELU
        found = {type(block.mlp.gelu) for block in model.visual.transformer.resblocks}
        if isinstance(model, open_clip.model.CLIP):
            found |= {type(block.mlp.gelu) for block in model.transformer.resblocks}
        assert found == {expected}, (name, tag)
        assert clip_models.activation_of(model) == expected.__name__
        turned += quick and not open_clip.get_model_config(name).get("quick_gelu", False)
    assert turned == 19  # that open_clip itself would build with the other
    ((name, tag, line),) = refused
    assert (name, tag) == ("roberta-ViT-B-32", "laion2b_s12b_b32k")
    assert "--clip hf-hub:laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k" in line


def test_other_towers_are_refused_before_anything_is_downloaded(monkeypatch):
    """Convolutional ones, timm's, and CoCa's with its attentional pooler."""

    def download(*_, **__):
        raise AssertionError("downloads")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    names = sorted({name for name, _ in OTHER})
    assert len(names) > 50 and {"coca_ViT-B-32", "coca_ViT-L-14", "RN50", "ViT-B-16-SigLIP"} <= set(
        names
    )
    tags = dict(OTHER)
    for name in names:
        with pytest.raises(RunError, match="plain vision transformer, without attentional pooling"):
            clip_models.load_clip(name, tags[name], None, "cpu")


def test_a_wrong_image_size_is_refused_before_anything_is_downloaded(monkeypatch):
    def download(*_, **__):
        raise AssertionError("downloads")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    monkeypatch.setattr(open_clip, "create_model", download)
    for clip, tag, patch in (("ViT-B-16", "openai", 16), ("ViT-L-14", "openai", 14), (CLIP, "", 8)):
        with pytest.raises(RunError) as error:
            clip_models.load_clip(clip, tag, 100, "cpu")
        assert str(error.value) == (
            f"--image-size 100: expected a multiple of the model's patch size, {patch}"
        )


def test_coca_leaves_no_array(copy):
    line = run(
        "saliency.py",
        *"--clip coca_ViT-B-32 --pretrained laion2b_s13b_b90k --out x".split(),
        cwd=copy,
        fails=True,
    )
    assert "attentional pooling" in line and not list(copy.glob("x.*"))


@pytest.fixture
def bare(tmp_path):
    """The toy CLIP without its weights."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in (ROOT / "data/toy/clip").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_random_weights_of_clip_are_refused(copy, bare, monkeypatch):
    base = ("saliency.py", "--workers", 0, "--out", "x")
    line = run(*base, "--clip", f"local-dir:{bare}", cwd=copy, fails=True)
    assert line.startswith(f"--clip local-dir:{bare}: cannot load it: Required pretrained weights")
    line = run(*base, "--pretrained", "", cwd=copy, fails=True)
    assert (
        "neither a file nor one of open_clip's tags for this model: openai, laion400m_e31" in line
    )

    def fetch(name, filename=None, **_):
        # the configuration was downloaded once, the weights were not
        if filename != "open_clip_config.json":
            raise FileNotFoundError("no network")
        return bare / filename

    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", fetch)
    line = run(*base, "--clip", "hf-hub:some/clip", cwd=copy, fails=True)
    assert line.startswith("--clip hf-hub:some/clip: cannot load it: Required pretrained weights")
    assert not list(copy.glob("x.*"))


def test_wrong_names_of_clip_are_one_short_line(copy):
    base = ("saliency.py", "--workers", 0, "--out", "x")
    assert "near to it are ViT-B-16" in run(*base, "--clip", "ViT-B-17", cwd=copy, fails=True)
    line = run(*base, "--clip", "local-dir:nowhere", cwd=copy, fails=True)
    assert "cannot load it" in line and "nowhere/open_clip_config.json" in line
    line = run(*base, "--clip", CLIP, "--image-size", 60, cwd=copy, fails=True)
    assert line == "--image-size 60: expected a multiple of the model's patch size, 8"
    (copy / "file.pt").write_bytes(b"not weights")
    line = run(*base, "--pretrained", "file.pt", cwd=copy, fails=True)
    assert (
        line.startswith("--clip ViT-B-16 --pretrained file.pt: cannot load it: ")
        and len(line) < 500
    )
    assert not list(copy.glob("x.*"))


def test_another_image_size_of_weights_in_float16(tmp_path):
    """Published weights are often float16, which open_clip cannot interpolate; float32 ones give
    what it gives.
    """
    expected = open_clip.create_model(CLIP, force_image_size=96)
    model, _ = clip_models.load_clip(CLIP, None, 96, "cpu")
    assert model.visual.grid_size == expected.visual.grid_size == (
        12,
        12,
    ) and model.visual.image_size == (96, 96)
    assert torch.equal(model.visual.positional_embedding, expected.visual.positional_embedding)
    from safetensors.torch import save_file

    folder = tmp_path / "half"
    folder.mkdir()
    for path in (ROOT / "data/toy/clip").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    state = {
        key: value.half().contiguous()
        for key, value in open_clip.create_model(CLIP).state_dict().items()
    }
    save_file(state, folder / "open_clip_model.safetensors")
    half, _ = clip_models.load_clip(f"local-dir:{folder}", None, 96, "cpu")
    table = half.visual.positional_embedding
    assert table.dtype == torch.float32 and torch.allclose(
        table, expected.visual.positional_embedding, atol=1e-3
    )


def test_the_activation_is_recorded_and_asked_for(copy):
    for kind in ("text", "saliency"):
        path = copy / f"data/train.{kind}.json"
        about = json.loads(path.read_text())
        assert about.pop("activation") == "GELU"
        path.write_text(json.dumps(about))
    base = ("saliency.py", "--clip", CLIP, "--moments", 8, "--workers", 0)
    expected = (
        "made with activation None, not 'GELU': give the earlier settings again, or --resume none"
    )
    assert expected in run(*base, cwd=copy, fails=True)
    remedy = "make it with: python saliency.py --data data/train.csv --resume none"
    line = run(
        "pretrain.py",
        *"--size tiny --device cpu --mask text --workers 0".split(),
        cwd=copy,
        fails=True,
    )
    assert "does not tell CLIP's activation" in line and line.endswith(remedy)
    run(*base, "--resume", "none", cwd=copy)
    assert json.loads((copy / "data/train.saliency.json").read_text())["activation"] == "GELU"


def test_texts_are_unit_length_under_bf16():
    model, tokenizer = clip_models.load_clip(CLIP, None, None, "cpu")
    texts = [f"a {colour} {shape}" for colour in toy.COLOURS for shape in toy.SHAPES]
    with torch.autocast("cpu", torch.bfloat16):
        embedded = clip_models.embed_texts(model, tokenizer, texts, "cpu")
    assert not any(embedding.requires_grad for embedding in embedded.values())
    lengths = torch.stack([embedded[text].double().norm() for text in texts])
    assert (lengths - 1).abs().max() < 1e-6


# ---- transformers

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZE, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
OPT = {
    **SIZE,
    "ffn_dim": 64,
    "vocab_size": 30,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 30,
    "bos_token_id": 1,
}
# as flan-t5
T5 |= {
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 20,
    "tie_word_embeddings": False,
}
SQUARE = {"height": 32, "width": 32}


def blip2(folder, text):
    qformer = hf.Blip2QFormerConfig(
        **SIZE, intermediate_size=64, encoder_hidden_size=32, vocab_size=30
    )
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=25,
    )
    hf.Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor = hf.Blip2Processor(
        hf.BlipImageProcessor(size=SQUARE), toy_models.make_tokenizer(), num_query_tokens=4
    )
    processor.save_pretrained(folder)


def instructblip(folder):
    qformer = hf.InstructBlipQFormerConfig(
        **SIZE, intermediate_size=64, encoder_hidden_size=32, vocab_size=30
    )
    config = hf.InstructBlipConfig(
        vision_config=hf.InstructBlipVisionConfig(**VISION).to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=hf.OPTConfig(**OPT).to_dict(),
        num_query_tokens=4,
        image_token_index=25,
    )
    hf.InstructBlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizers = toy_models.make_tokenizer(), toy_models.make_tokenizer()
    hf.InstructBlipProcessor(
        hf.BlipImageProcessor(size=SQUARE), *tokenizers, num_query_tokens=4
    ).save_pretrained(folder)


def bert_tokenizer():
    path = SHARED / "vocab/bert-base-uncased.txt"
    if not path.exists():
        pytest.skip(f"no {path}")
    return hf.BertTokenizerFast(
        vocab={word: index for index, word in enumerate(path.read_text().split())}
    )


def git(folder):
    tokenizer = bert_tokenizer()
    config = hf.GitConfig(
        vision_config=hf.GitVisionConfig(**VISION).to_dict(),
        **SIZE,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    hf.GitForCausalLM(config).save_pretrained(folder)
    hf.GitProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE), tokenizer
    ).save_pretrained(folder)


def encoder_decoder(folder):
    tokenizer = bert_tokenizer()
    decoder = hf.BertConfig(
        **SIZE,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        is_decoder=True,
        add_cross_attention=True,
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**VISION), decoder
    )
    config.decoder_start_token_id = tokenizer.cls_token_id
    config.pad_token_id = tokenizer.pad_token_id
    hf.VisionEncoderDecoderModel(config).save_pretrained(folder)
    hf.ViTImageProcessor(size=SQUARE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llava(folder):
    tokenizer = toy_models.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**SIZE, intermediate_size=64, vocab_size=40),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


MAKE = {
    "blip2-opt": lambda folder: blip2(folder, hf.OPTConfig(**OPT)),
    "blip2-t5": lambda folder: blip2(folder, hf.T5Config(**T5)),
    "git": git,
    "encoder-decoder": encoder_decoder,
    "llava": llava,
    "instructblip": instructblip,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(kind): the folder of a small captioner of that kind with random weights."""

    def make(kind):
        if kind == "blip":
            return BLIP
        folder = tmp_path_factory.getbasetemp() / f"model-{kind}"
        if not folder.exists():
            torch.manual_seed(0)
            MAKE[kind](folder)
        return folder

    return make


def captions_of(folder):
    lines = (folder / "val.captions.jsonl").read_text().splitlines()
    return [json.loads(line)["captions"] for line in lines]


@pytest.fixture
def videos(world, tmp_path):
    """A folder with val.csv, four videos of the world, and no captions."""
    names = [f"{world}/data/videos/val/0000{row}.mp4" for row in range(4)]
    (tmp_path / "val.csv").write_text("path\n" + "\n".join(names) + "\n")
    return tmp_path


@pytest.mark.parametrize("prompt", ["", "a red"])
@pytest.mark.parametrize("kind", ["blip", "blip2-opt", "blip2-t5", "git"])
def test_the_captioners_that_are_claimed(videos, models, kind, prompt):
    """Each with and without a prompt and with beams; every caption goes on from the prompt where
    the model repeats it.
    """
    flags = (
        "--model",
        models(kind),
        *"--workers 0 --max-tokens 5 --beams 2".split(),
        "--prompt",
        prompt,
    )
    assert "4 videos captioned, 0 failed" in run(
        "caption.py", "--data", "val.csv", *flags, cwd=videos
    )
    made = captions_of(videos)
    assert [len(of_video) for of_video in made] == [3] * 4
    if kind != "blip2-t5":
        assert all(text.startswith(prompt) for of_video in made for text in of_video)


def test_git_goes_on_from_its_prompt(videos, models):
    """Greedy decoding of GIT written out, from [CLS] and the prompt's tokens, without the [SEP]
    that would end the text.
    """
    model, processor = caption.load_model(str(models("git")), "cpu", torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    inputs = caption.model_inputs(processor, images, "a red")
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert words == ["[CLS]", "a", "red"] and "token_type_ids" not in inputs
    items = [caption.Item(None, inputs)]
    (made,) = caption.describe(model, processor, items, "cpu", torch.float32, 1, 4)
    with torch.no_grad():
        for image, text in zip(inputs["pixel_values"], made, strict=True):
            tokens = inputs["input_ids"][:1]
            for _ in range(4):
                logits = model(input_ids=tokens, pixel_values=image[None]).logits[:, -1]
                tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
            assert text == processor.tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    "kind, prompt",
    [
        ("encoder-decoder", ""),
        ("encoder-decoder", "a red"),
        ("llava", ""),
        ("llava", "a red"),
        ("instructblip", ""),
    ],
)
def test_other_models_end_in_one_line_before_any_video_is_opened(
    videos, models, kind, prompt, monkeypatch
):
    monkeypatch.setattr(caption, "VideoReader", None)
    line = run(
        "caption.py",
        "--data",
        "val.csv",
        "--model",
        models(kind),
        "--workers",
        0,
        "--prompt",
        prompt,
        cwd=videos,
        fails=True,
    )
    assert "cannot caption a blank image: " in line and line.endswith(
        "(tested with: BLIP, BLIP-2 with OPT or T5, GIT)"
    )
    assert (f"--prompt {prompt!r}" if prompt else "without --prompt") in line
    assert [path.name for path in videos.iterdir()] == ["val.csv"]  # nothing is left behind


def test_a_captioner_without_all_its_weights_is_refused(videos, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    folder.mkdir()
    for path in (ROOT / "data/toy/blip").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    gone = "text_decoder.bert.encoder.layer.1.output.dense.weight"
    del state[gone]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "caption.py",
            "--data",
            "val.csv",
            "--model",
            folder,
            "--workers",
            "0",
        ],
        cwd=videos,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    lines = [
        line
        for line in done.stderr.replace("\r", "\n").splitlines()
        if line and not line.startswith("Loading weights")
    ]
    assert len(lines) == 1 and f"1 of its weights are not in its files, such as {gone}" in lines[0]
    assert sorted(path.name for path in videos.iterdir()) == ["part", "val.csv"]


def test_damaged_captioners_are_refused(videos, tmp_path):
    """Another shape than the configuration says, half a file, no configuration, an unknown kind."""
    source = ROOT / "data/toy/blip"
    for name, spoil in {
        "shape": lambda folder: (folder / "config.json").write_text(
            (source / "config.json").read_text().replace('"vocab_size": 19', '"vocab_size": 33')
        ),
        "half": lambda folder: (folder / "model.safetensors").write_bytes(
            (source / "model.safetensors").read_bytes()[:-5000]
        ),
        "none": lambda folder: (folder / "config.json").unlink(),
        "kind": lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        spoil(folder)
        line = run(
            "caption.py",
            "--data",
            "val.csv",
            "--model",
            folder,
            "--workers",
            0,
            cwd=videos,
            fails=True,
        )
        assert line.startswith(f"--model {folder}: cannot load it: ") and len(line) < 600, line
    assert not list(videos.glob("val.captions*"))


def test_a_failed_load_leaves_what_was_there(copy):
    """Neither a .json that refuses the next model, nor old captions thrown away by --resume
    none.
    """
    old = (copy / "data/val.captions.jsonl").read_bytes()
    about = (copy / "data/val.captions.json").read_bytes()
    for flags in (("--model", "nowhere"), ("--model", CLIP.removeprefix("local-dir:"))):
        line = run(
            "caption.py", "--data", "data/val.csv", *flags, "--resume", "none", cwd=copy, fails=True
        )
        assert "cannot load it" in line
        assert (copy / "data/val.captions.jsonl").read_bytes() == old and (
            copy / "data/val.captions.json"
        ).read_bytes() == about
    run(
        "caption.py",
        *"--data data/val.csv --model nowhere --out new.jsonl".split(),
        cwd=copy,
        fails=True,
    )
    assert "24 videos captioned" in run(
        "caption.py",
        "--data",
        "data/val.csv",
        "--model",
        BLIP,
        "--out",
        "new.jsonl",
        "--workers",
        0,
        cwd=copy,
    )
    # Labels that do not serve, likewise.
    run(
        "caption.py",
        *"--data data/val.csv --labels --label-column path".split(),
        "--classes",
        os.devnull,
        "--resume",
        "none",
        cwd=copy,
        fails=True,
    )
    assert (copy / "data/val.captions.jsonl").read_bytes() == old and (
        copy / "data/val.captions.json"
    ).read_bytes() == about


def test_without_a_network_two_lines(copy):
    """The hub's own retries, five for every file, are one line; the waits between them are left
    out here.
    """
    for stage, flags in (("caption", ["--out", "x.jsonl"]), ("saliency", ["--out", "x"])):
        code = (
            f"import time; time.sleep = lambda _: None; import {stage}; "
            f"{stage}.main(['--data', 'data/val.csv', *{flags}])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=copy,
            text=True,
            capture_output=True,
            timeout=120,
            env=ENVIRONMENT
            | {
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": "http://127.0.0.1:1",
                "PYTHONPATH": str(ROOT),
                "HF_HOME": str(copy / "cache"),
            },
        )
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and len(lines) == 2, done.stderr
        assert lines[0].startswith("the Hugging Face hub did not give a file, trying again")
        assert "cannot load it" in lines[1]
    assert not list(copy.glob("x*"))
