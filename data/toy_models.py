"""Trains the tiny BLIP and the tiny CLIP of the toy world, and writes them as the real ones are
distributed.

    data/toy/blip    a transformers folder: AutoModelForImageTextToText and AutoProcessor open it
    data/toy/clip    an open_clip folder:
                     open_clip.create_model_from_pretrained("local-dir:data/toy/clip") opens it

    python data/toy.py --train-models          both, in about an hour on two cores
    python data/toy_models.py --only clip      one of them

Both see single frames of the split "images" of the toy world, drawn as they are needed, never a
frame of train or val. One word-level vocabulary serves both. In CLIP's loss, images whose captions
coincide share their positives: with 48 captions and batches of 128 most batches hold several of
each, and treating those as negatives teaches the model to tell twins apart."""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import toy
from tqdm import tqdm

FOLDER = Path(__file__).parent / "toy"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# [SEP] is last: open_clip reads the text's feature at the token of highest index, which must be the
# end of the text.
VOCABULARY = ["[PAD]", "a", *toy.COLOURS, *toy.SHAPES, "[UNK]", "[MASK]", "[DEC]", "[CLS]", "[SEP]"]
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "layers": 3,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": len(VOCABULARY),
            "hf_tokenizer_name": "toy",
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "size": 64,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def batches(seed, size, steps):
    """Yields `steps` batches of (images float [B, 3, 64, 64] normalised, captions) from the
    split "images".
    """
    rng = np.random.default_rng(seed)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for step in range(steps):
        scenes = [toy.scene(seed, "images", step * size + index) for index in range(size)]
        frames = np.concatenate(
            [toy.render(sc, [rng.uniform(0, toy.FRAMES / toy.FPS)])[0] for sc in scenes]
        )
        yield (
            (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - mean) / std,
            [sc.caption for sc in scenes],
        )


def train(model, loss_fn, seed, steps, batch, lr, name):
    """AdamW, 5 % warm-up, cosine to zero; loss_fn(images, captions) -> (loss, accuracy in [0,
    1]).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    progress = tqdm(batches(seed, batch, steps), name, steps, mininterval=5)
    for step, (images, captions) in enumerate(progress):
        rise = min(1.0, (step + 1) / (0.05 * steps))
        turn = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * rise * turn
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = loss_fn(images, captions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
    return model.eval()


def make_tokenizer():
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(VOCABULARY)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})  # BLIP's start of a text
    return tokenizer


def train_clip(folder, seed, steps, batch=128, lr=7e-4):
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=1) + "\n")
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")

    def loss_fn(images, captions):
        logits = model.get_logits(images, tokenize(captions))[0]  # [B, B]
        same = torch.tensor([[a == b for b in captions] for a in captions])
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, same.gather(1, logits.argmax(1, keepdim=True)).float().mean().item()

    train(model, loss_fn, seed, steps, batch, lr, "clip")
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    # float32: --image-size interpolates it
    state["visual.positional_embedding"] = model.visual.positional_embedding.data
    save_file(state, folder / "open_clip_model.safetensors")


def train_blip(folder, seed, steps, batch=128, lr=7e-4):
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    tokenizer = make_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    size = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    model = BlipForConditionalGeneration(
        BlipConfig(
            vision_config=dict(
                size, num_hidden_layers=3, image_size=64, patch_size=8, initializer_range=0.05
            ),  # its own is 1e-10
            text_config=dict(
                size,
                num_hidden_layers=2,
                encoder_hidden_size=128,
                vocab_size=len(tokenizer),
                max_position_embeddings=16,
                bos_token_id=token("[DEC]"),
                eos_token_id=token("[SEP]"),
                sep_token_id=token("[SEP]"),
                pad_token_id=token("[PAD]"),
                initializer_range=0.05,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            projection_dim=128,
            image_text_hidden_size=128,
        )
    )
    # shapes need places; its own is 1e-10
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.3)
    model.scaffold = torch.nn.Linear(128, len(toy.COLOURS) * len(toy.SHAPES))
    classes = {
        f"a {colour} {shape}": index
        for index, (colour, shape) in enumerate(itertools.product(toy.COLOURS, toy.SHAPES))
    }

    def loss_fn(images, captions):
        text = tokenizer(captions, padding=True, return_tensors="pt")
        text.input_ids[:, 0] = token("[DEC]")
        labels = text.input_ids.masked_fill(text.input_ids == token("[PAD]"), -100)
        out = model(
            pixel_values=images,
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            labels=labels,
        )
        right = (
            ((out.logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] < 0))
            .all(1)
            .float()
            .mean()
            .item()
        )
        # The captioning loss alone learns colours at once and shapes hardly at all; BLIP's own
        # training has a contrastive loss on the image features beside it. Here a classifier of the
        # mean patch does that work, and is thrown away.
        logits = model.scaffold(out.image_embeds[:, 1:].mean(1))
        return out.loss + F.cross_entropy(
            logits, torch.tensor([classes[caption] for caption in captions])
        ), right

    train(model.train(), loss_fn, seed, steps, batch, lr, "blip")
    del model.scaffold
    model.half().save_pretrained(folder)
    image_processor = BlipImageProcessor(
        size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD
    )
    BlipProcessor(image_processor, tokenizer).save_pretrained(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("clip", "blip"), help="train one of the two")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets blip/ and clip/")
    parser.add_argument(
        "--steps", type=int, help="optimiser steps (default: 2400 for clip, 4000 for blip)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, function, steps in (("clip", train_clip, 2400), ("blip", train_blip, 4000)):
        if args.only in (None, name):
            torch.manual_seed(args.seed)
            function(args.out / name, args.seed, args.steps or steps)


if __name__ == "__main__":
    main()
