r"""Stage 1: captions. An off-the-shelf image captioner describes a few frames of every video.

Reads   a manifest (train.csv) and its videos
Writes  train.captions.jsonl, one object per video, in the manifest's order:
            {"path": ..., "captions": ["a dog runs", ...]}, or
            {"path": ..., "captions": [], "error": why there are none}
        train.captions.json, what made them: model, prompt, beams, frames, the limit of tokens, a
        hash of the manifest's rows, and the sizes of some videos' files; with --labels, that they
        are labels, the column, the file of --classes, and the hash

    # CPU, the toy world: about 160 videos/s
    python caption.py --data data/train.csv --model data/toy/blip
    # one GPU, BLIP
    python caption.py --data data/train.csv
    torchrun --nproc_per_node=8 caption.py --data data/train.csv \
        --model Salesforce/blip2-opt-2.7b --batch-size 8
    # no model: the data set's own text
    python caption.py --data data/train.csv --labels --label-column caption

The frames lie at the mid-points of three equal parts of the video (`--frames`), so a video has
three captions; pretraining draws one at random per sample. The model is a name on the Hugging Face
hub, or a folder. BLIP, BLIP-2 (with OPT or T5) and GIT were tried, at small sizes with random
weights, with and without `--prompt`. Other image-to-text models of `transformers` may work: every
model has to caption two blank images before any video is opened. No remote code is run. With
`--labels` the caption is the label itself (a class number becomes text through `--classes`);
captions that a model made are replaced only with `--resume none`.

Run it again after a kill: it goes on where it stopped, and tries failed videos again. If one of
them succeeds this time, or fails for another reason, the file changes. Then saliency.py refuses to
go on with its old arrays and has to compute all of them again (--resume none). Each rank appends to
a part file of its own; when all are done rank 0 joins them. A caption may be an empty text, which
is no failure; a line at the end counts the videos whose captions are all empty. SIGTERM and Ctrl-C
finish the current batch first; the exit status is the signal's.

Where rows were added at the manifest's end, `--extend` captions those, and tries no failed videos,
so that saliency.py can keep its old rows. (`--labels` neither needs nor takes that flag, because it
always makes all captions again.) Captions that a model made with other settings, or of other rows
or videos, are refused (tgm/manifest.py says how replaced videos are noticed). Without the .json
only paths are compared. A model is known by its name alone: if its weights changed under the same
name, give --resume none.

Shapes: K frames of a video, and so captions; H W pixels.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tgm.arrays import companion
from tgm.captions import LABELS, CaptionFile, make_entry
from tgm.classes import read_names
from tgm.flags import Parser, add_video_flags, frame_count, positive_int
from tgm.manifest import read_manifest, require_files
from tgm.offline import (
    Item,
    add_run_flags,
    batches,
    join_machine,
    leave_ranks,
    parse_run_flags,
)
from tgm.quiet import quiet_libraries
from tgm.run import (
    RunError,
    launch,
    one_line_errors,
    part_of_rank,
    reason_of,
    torchrun_ranks,
    wait_for_ranks,
)
from tgm.video import VideoReader, segment_midpoints

TESTED = "tested with: BLIP, BLIP-2 with OPT or T5, GIT"

# ---- frames and their captions -------------------------------------------------------------------


def read_inputs(video, frames, processor, prompt, timeout):
    """The model's inputs for `frames` frames of a video: a mapping of tensors [K, ...]."""
    with VideoReader(video.path, timeout=timeout) as reader:
        start, end = reader.span(video)
        images = reader.read(segment_midpoints(start, end, frames))  # [K, H, W, 3]
    return model_inputs(processor, images, prompt)


def model_inputs(processor, images, prompt):
    """What the model takes for K images, each uint8 [H, W, 3]: a mapping of tensors [K, ...]."""
    from transformers import GitProcessor

    if not prompt:
        return processor(images=list(images), return_tensors="pt")
    inputs = processor(images=list(images), text=[prompt] * len(images), return_tensors="pt")
    if isinstance(processor, GitProcessor):
        inputs.pop("token_type_ids", None)  # its tokenizer makes them, its model refuses them
        for key in ("input_ids", "attention_mask"):
            # Without the last token, [SEP], which ends a text: the model has to go on from the
            # prompt. BLIP's `generate` drops it itself.
            inputs[key] = inputs[key][:, :-1]
    return inputs


@torch.inference_mode()
def describe(model, processor, items, device, dtype, beams, max_tokens):
    """Captions of a batch of videos: a list of K strings for each.

    items: Items whose value is what `model_inputs` made of a video's K frames; beams: of the beam
    search, 1 is greedy
    """
    inputs = {}
    for key in items[0].value:
        value = torch.cat([item.value[key] for item in items]).to(device)
        # pixels take the model's number type, token numbers stay integers
        inputs[key] = value.to(dtype) if value.is_floating_point() else value
    tokens = model.generate(**inputs, max_new_tokens=max_tokens, num_beams=beams, do_sample=False)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    texts = [" ".join(text.split()) for text in texts]  # no line breaks, no double spaces
    per_video = len(texts) // len(items)  # K
    return [texts[first : first + per_video] for first in range(0, len(texts), per_video)]


# ---- the model -----------------------------------------------------------------------------------


def load_model(name, device, dtype):
    """An image-to-text model of transformers, in evaluation mode, and its processor.

    name: on the Hugging Face hub, or a folder. RunError where it cannot be loaded, or lacks
    weights: transformers would draw those at random, print a table, and go on.
    """
    import transformers

    if name.count("/") > 1 and not os.path.isdir(name):
        raise RunError(
            f"--model {name}: cannot load it: no such folder (a name on the hub has at most one /)"
        )
    # tokenizers would warn once in every worker of the data loader
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()  # hints for programmers at every call of generate()
    try:
        with quiet_libraries():
            # The small configuration first: without a network each file is tried for half a
            # minute, so that failing at the first one saves minutes.
            transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
        # transformers does not list weights that are tied to those of another layer
        missing = sorted(report["missing_keys"])
        model = model.to(device)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # missing or damaged files, no network, unknown models, anything
        raise RunError(
            f"--model {name}: cannot load it: {reason_of(error)} (a folder, or a name on the "
            "Hugging Face hub; for the toy world: --model data/toy/blip)"
        ) from None
    if missing:
        raise RunError(
            f"--model {name}: {len(missing)} of its weights are not in its files, such as "
            f"{missing[0]}: its captions would be noise ({TESTED})"
        )
    version = [int(number) for number in transformers.__version__.split(".")[:2]]
    if model.config.model_type == "git" and version < [5, 19]:
        # There the cache of keys and values puts all words but the first at wrong positions, as it
        # counts the image's tokens, too.
        model.generation_config.use_cache = False
    return model.eval(), processor


def check_model(name, model, processor, prompt, describe_items):
    """Captions two blank images in one batch, one wide and one tall: a processor that keeps their
    shapes would fail at a batch of videos, too. RunError if it fails.

    describe_items(items): `describe` with this model
    """
    wide = np.full((1, 48, 64, 3), 127, np.uint8)
    tall = wide.swapaxes(1, 2)
    try:
        items = [
            Item(None, model_inputs(processor, images, prompt), None) for images in (wide, tall)
        ]
        texts = describe_items(items)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # inputs that a kind of model does not take raise anything
        flags = f"--prompt {prompt!r}" if prompt else "without --prompt"
        raise RunError(
            f"--model {name}: {type(model).__name__}, {flags}, cannot caption a blank image: "
            f"{reason_of(error)} ({TESTED})"
        ) from None
    if [len(captions) for captions in texts] != [1, 1]:  # an item is one image here
        raise RunError(
            f"--model {name}: {type(model).__name__} gives {texts} for two blank images, expected "
            "one text for each"
        )


# ---- labels as captions --------------------------------------------------------------------------


def label_captions(videos, classes):
    """Entries with one caption per video: the label itself or, with `classes`, the class whose
    number, from 0, the label is."""
    entries = []
    for video in videos:
        caption = video.label
        if classes is not None and caption is not None:
            # int() refuses "²", of which isdigit() is true, and more than 4300 digits
            is_number = caption.isdecimal() and len(caption) <= 4300
            if not is_number or int(caption) >= len(classes):
                raise RunError(
                    f"{video.name}: label {caption!r} is not a class number; --classes has lines "
                    f"for 0 to {len(classes) - 1} (without it the label itself is the caption)"
                )
            caption = classes[int(caption)]
        if not caption:
            raise RunError(
                f"{video.name}: has no label to use as its caption "
                "(--label-column picks another column)"
            )
        entries.append(make_entry(video, [caption]))
    return entries


def write_labels(captions, classes, resume):
    """Captions without a model, always made from the start: `claim` and `begin` get "none".
    --resume decides only whether captions that a model made, perhaps in hours, may be lost."""
    captions.claim("none", extend=False)
    if resume != "none":
        captions.refuse_to_replace()
    entries = label_captions(captions.videos, classes)  # may fail: before anything is removed
    captions.begin("none", note_sizes=False)
    captions.append(0, entries)
    captions.join()


# ---- the pass over the videos --------------------------------------------------------------------


def load_captioner(args, machine):
    """-> (the model's processor, a function from a batch of items to their captions)."""
    model, processor = load_model(args.model, machine.device, machine.dtype)
    describe_items = partial(
        describe,
        model,
        processor,
        device=machine.device,
        dtype=machine.dtype,
        beams=args.beams,
        max_tokens=args.max_tokens,
    )
    check_model(args.model, model, processor, args.prompt, describe_items)
    return processor, describe_items


def caption_videos(args, captions, machine, videos, processor, describe_items):
    """Appends the captions of this rank's videos to its part of the file, batch by batch."""
    read = partial(
        read_inputs,
        frames=args.frames,
        processor=processor,
        prompt=args.prompt,
        timeout=args.video_timeout,
    )
    for items in batches(machine, videos, read, args.batch_size, args.workers, args.max_steps):
        good = [item for item in items if item.error is None]
        texts = describe_items(good) if good else []
        entries = []
        for item, item_texts in zip(good, texts, strict=True):
            entries.append(make_entry(item.video, item_texts))
        for item in items:
            if item.error is not None:
                entries.append(make_entry(item.video, [], item.error))
        captions.append(machine.rank, entries)


# ---- the command ---------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="data/train.csv", help="the manifest")
    add_video_flags(parser)
    parser.add_argument(
        "--out", help="file to write (default: beside the manifest, train.captions.jsonl)"
    )
    model = parser.add_argument_group("captioner")
    model.add_argument(
        "--model",
        default="Salesforce/blip-image-captioning-base",
        help="name on the Hugging Face hub, or a folder",
    )
    model.add_argument(
        "--frames", type=frame_count, default=3, help="sampled frames, and so captions, per video"
    )
    model.add_argument(
        "--prompt",
        default="",
        help="text that the caption begins with (BLIP-2 with T5 returns only what follows it)",
    )
    model.add_argument(
        "--beams", type=positive_int, default=1, help="of the beam search; 1 is greedy"
    )
    model.add_argument(
        "--max-tokens", type=positive_int, default=30, help="tokens that the model adds, at most"
    )
    labels = parser.add_argument_group("captions without a model")
    labels.add_argument(
        "--labels", action="store_true", help="the label of each video is its caption"
    )
    labels.add_argument("--label-column", default="label", help="column that holds the label")
    labels.add_argument(
        "--classes", help="text file: its first line is the text of label 0, and so on"
    )
    add_run_flags(parser, batch_size=32)
    args = parse_run_flags(parser, argv)
    if args.labels:
        unused = ("model", "frames", "prompt", "beams", "max_tokens", "max_steps", "extend")
    else:
        unused = ("label_column", "classes")
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            other = "cannot be used with" if args.labels else "needs"
            parser.error(f"{flag} {other} --labels")
    return args


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    videos = read_manifest(args.data, args.root, args.label_column)
    path = Path(args.out) if args.out else companion(args.data, "captions.jsonl")
    if args.labels:
        if torchrun_ranks()[0] == 0:
            settings = {
                "model": LABELS,
                "label_column": args.label_column,
                "classes": args.classes,
            }
            captions = CaptionFile(path, videos, settings)
            classes = read_names(args.classes) if args.classes else None
            write_labels(captions, classes, args.resume)
        return
    settings = {
        "model": args.model,
        "frames": args.frames,
        "prompt": args.prompt,
        "beams": args.beams,
        "max_tokens": args.max_tokens,
    }
    captions = CaptionFile(path, videos, settings)
    machine = join_machine(args.device)
    if machine.rank == 0:
        require_files(videos, args.data)
        captions.claim(args.resume, args.extend)
    wait_for_ranks()  # until rank 0 has checked the old files; if it refuses, all ranks end here
    # From here to the next wait no rank writes or removes a file, so that `done` gives the same on
    # every rank, and all divide the same list.
    done = captions.done(args.resume, args.extend)
    todo = [video for video in videos if video.row not in done]
    mine = part_of_rank(todo, machine.rank, machine.ranks)
    # What can be checked without a video comes before any caption is written or removed.
    if mine:
        processor, describe_items = load_captioner(args, machine)
    wait_for_ranks()  # until every rank has chosen its videos and loaded its model
    if machine.rank == 0:
        captions.begin(args.resume)
    wait_for_ranks()  # until old files are removed
    if todo and machine.rank == 0:
        precision = str(machine.dtype).removeprefix("torch.")
        print(
            f"{args.model} on {machine.device}, {precision}: {len(videos)} videos, "
            f"{len(done)} done before, {machine.ranks} ranks"
        )
    if mine:
        caption_videos(args, captions, machine, mine, processor, describe_items)
    wait_for_ranks()  # until all parts are written
    if machine.rank == 0:
        captions.join()
    leave_ranks()


if __name__ == "__main__":
    launch(main)
