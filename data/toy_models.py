"""Trains the tiny BLIP and the tiny CLIP of the toy world, and writes them as the real ones are.

    data/toy/blip    a transformers folder: AutoModelForImageTextToText and AutoProcessor open it
    data/toy/clip    an open_clip folder: create_model_from_pretrained("local-dir:data/toy/clip")

    python data/toy.py --train-models          both, in about 45 minutes on one core
    python data/toy_models.py --only clip      one of them

Both see single frames of the split "images" of the toy world, drawn as they are needed: never a
frame of a manifest, never a mask. The captioner sees the actor beside its bystander, and learns to
name the actor. CLIP sees both, either or neither of them, with the captions of all that it sees: an
image and a text belong together if the text names any thing in the image. (Treating equal captions
as negatives would teach it to tell twins apart: there are 36 captions, and a batch holds most of
them.) An empty scene is captioned "nothing". Without it, CLIP says one of the colours wherever it
sees no other, and the patches of that colour do not match its name.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import toy
from tqdm import tqdm

from tgm.flags import Parser, positive_int, seed_number

FOLDER = Path(__file__).parent / "toy"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# [SEP] is last: open_clip reads the text's feature at the token of highest index, which must be
# the end of the text.
VOCABULARY = ["[PAD]", "a", *toy.COLOURS, *toy.SHAPES, "[UNK]", "[MASK]", "[DEC]", "[CLS]", "[SEP]"]
VISION = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 3, "head_width": 32}
TEXT = {
    "context_length": 8,
    "vocab_size": len(VOCABULARY),
    "hf_tokenizer_name": "toy",
    "width": 64,
    "heads": 2,
    "layers": 2,
}
# what CLIP's images show, each as often as it stands here
CLIP_IMAGES = ("both", "both", "actor", "bystander", "neither")
CLIP_CONFIG = {
    "model_cfg": {"embed_dim": 128, "vision_cfg": VISION, "text_cfg": TEXT},
    "preprocess_cfg": {
        "size": 64,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def draw_image(seed, row, rng, kinds):
    """One image of the split "images", of a random one of `kinds`: uint8 [64, 64, 3], and the
    captions of the things in it."""
    sc = toy.scene(seed, "images", row)
    shown = {
        "both": (sc.actor, sc.bystander),
        "actor": (sc.actor,),
        "bystander": (sc.bystander,),
        "neither": (),
    }
    things = shown[rng.choice(kinds)]
    captions = [thing.caption for thing in things]
    frames, _ = toy.render(sc, [rng.uniform(0, toy.FRAMES / toy.FPS)], things)
    return frames[0], captions or ["nothing"]  # no word of the vocabulary: [UNK]


def batches(seed, size, steps, kinds):
    """Yields `steps` batches: images float [B, 3, 64, 64] normalised, and the captions of each."""
    rng = np.random.default_rng(seed)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for step in range(steps):
        drawn = [draw_image(seed, step * size + index, rng, kinds) for index in range(size)]
        images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
        yield (images / 255 - mean) / std, [captions for _, captions in drawn]


def train(model, loss_fn, name, images, steps, lr):
    """AdamW, 5 % warm-up, cosine to zero; loss_fn(images, captions) -> (loss, accuracy)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    progress = tqdm(images, name, steps, mininterval=5)
    for step, (pictures, captions) in enumerate(progress):
        rise = min(1.0, (step + 1) / (0.05 * steps))
        optimizer.param_groups[0]["lr"] = lr * rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = loss_fn(pictures, captions)
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
    choose = np.random.default_rng(seed)

    def loss_fn(images, captions):
        texts = [of_image[choose.integers(len(of_image))] for of_image in captions]
        logits = model.get_logits(images, tokenize(texts))[0]  # [B images, B texts]
        fits = torch.tensor([[text in of_image for text in texts] for of_image in captions]).float()
        to_text = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
        to_image = F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
        right = fits.gather(1, logits.argmax(1, keepdim=True)).mean().item()
        return (to_text + to_image) / 2, right

    train(model, loss_fn, "clip", batches(seed, batch, steps, CLIP_IMAGES), steps, lr)
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    # float32, as --image-size interpolates it
    state["visual.positional_embedding"] = model.visual.positional_embedding.data
    save_file(state, folder / "open_clip_model.safetensors")


def train_blip(folder, seed, steps, batch=128, lr=1e-3):
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    tokenizer = make_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    size["initializer_range"] = 0.05  # its own is 1e-10
    vision = size | {"num_hidden_layers": 3, "image_size": 64, "patch_size": 8}
    text = size | {"num_hidden_layers": 2, "encoder_hidden_size": 128, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": 16, "hidden_dropout_prob": 0.0}
    text |= {"attention_probs_dropout_prob": 0.0, "bos_token_id": token("[DEC]")}
    text |= {"eos_token_id": token("[SEP]"), "sep_token_id": token("[SEP]")}
    text |= {"pad_token_id": token("[PAD]")}
    sizes = {"projection_dim": 128, "image_text_hidden_size": 128}
    config = BlipConfig(vision_config=vision, text_config=text, **sizes)
    model = BlipForConditionalGeneration(config)
    places = model.vision_model.embeddings.position_embedding
    torch.nn.init.normal_(places, std=0.3)  # shapes need places; its own is 1e-10
    colours, shapes = list(toy.COLOURS), list(toy.SHAPES)
    model.scaffold = torch.nn.Linear(128, len(colours) + len(shapes))

    def loss_fn(images, captions):
        captions = [of_image[0] for of_image in captions]  # the actor's
        text = tokenizer(captions, padding=True, return_tensors="pt")
        text.input_ids[:, 0] = token("[DEC]")
        labels = text.input_ids.masked_fill(text.input_ids == token("[PAD]"), -100)
        words = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
        out = model(pixel_values=images, labels=labels, **words)
        right = (out.logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] < 0)
        # The captioning loss alone learns colours at once and shapes hardly at all; BLIP's own
        # training has a contrastive loss on the image features beside it. Here two classifiers of
        # the mean patch do that work, and are thrown away.
        logits = model.scaffold(out.image_embeds[:, 1:].mean(1))
        colour = torch.tensor([colours.index(caption.split()[1]) for caption in captions])
        shape = torch.tensor([shapes.index(caption.split()[2]) for caption in captions])
        loss = out.loss + F.cross_entropy(logits[:, : len(colours)], colour)
        loss = loss + F.cross_entropy(logits[:, len(colours) :], shape)
        return loss, right.all(1).float().mean().item()

    train(model.train(), loss_fn, "blip", batches(seed, batch, steps, ["both"]), steps, lr)
    del model.scaffold
    model.half().save_pretrained(folder)
    image_processor = BlipImageProcessor(
        size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD
    )
    BlipProcessor(image_processor, tokenizer).save_pretrained(folder)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--only", choices=("clip", "blip"), help="train one of the two")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that gets blip/ and clip/")
    parser.add_argument(
        "--steps", type=positive_int, help="optimiser steps (default: 3000 for clip, 3600 for blip)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the images and the weights")
    args = parser.parse_args(argv)
    for name, function, steps in (("clip", train_clip, 3000), ("blip", train_blip, 3600)):
        if args.only in (None, name):
            torch.manual_seed(args.seed)
            function(args.out / name, args.seed, args.steps or steps)


if __name__ == "__main__":
    main()
