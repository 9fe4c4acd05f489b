"""Stage 1: captions. An off-the-shelf image captioner describes three key frames of every video,
once.

Reads   a manifest (train.csv), its videos
Writes  train.captions.jsonl, one object a video, in the manifest's order:
            {"path": ..., "captions": ["a dog runs", ...]}, or
            {"path": ..., "captions": [], "error": why there are none}
        train.captions.json, what made them: model, prompt, beams, frames, and a hash of the
        manifest's rows

    # CPU, the toy world: about 160 videos/s
    python caption.py --data data/train.csv --model data/toy/blip
    # one GPU, BLIP
    python caption.py --data data/train.csv
    torchrun --nproc_per_node=8 caption.py --data data/train.csv --model Salesforce/blip2-opt-2.7b --batch-size 8
    # no model: the data set's own text
    python caption.py --data data/train.csv --labels --label-column template

The frames lie at the mid-points of three equal parts of the video (`--frames`), so a video has
three captions; pretraining draws one at random per sample. BLIP, BLIP-2 (with OPT or T5) and GIT
were tried, at small sizes with random weights, with and without `--prompt`; the name is one on the
Hugging Face hub, or a folder. Other image-to-text models of `transformers` may work: every model
has to caption a blank image before any video is opened. No remote code is run. With `--labels` the
caption is the label itself, once (a class number becomes text through `--classes`).

Run it again after a kill: it goes on where it stopped, and tries failed videos anew. Each rank
appends to a part file of its own; when all are done rank 0 joins them. Where rows were added at the
manifest's end, `--extend` describes those alone. SIGTERM and Ctrl-C end it by that signal after the
batch in hand. Captions of other rows, times, models or videos (tgm/manifest.py says how replaced
videos are noticed) are refused, with the command that remakes them."""

import contextlib
import datetime
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from tgm.arrays import (
    companion,
    grown_from,
    hold,
    is_about,
    read_about,
    refuse_foreign,
    write_about,
)
from tgm.flags import (
    Parser,
    add_machine_flags,
    add_video_flags,
    frame_count,
    positive_int,
)
from tgm.loading import make_loader, patient
from tgm.manifest import (
    ManifestError,
    changed_rows,
    describe_change,
    manifest_hash,
    read_manifest,
    renewed_sizes,
    require_files,
)
from tgm.run import (
    RunError,
    StopSignal,
    choose_device,
    join_ranks,
    launch,
    make_folder,
    one_line_errors,
    part_of_rank,
    quiet_libraries,
    reason_of,
    torchrun_ranks,
    wait_for_ranks,
)
from tgm.video import VideoError, VideoReader, segment_midpoints


class KeyFrames(Dataset):
    """Item i is (video, inputs of the model for its K frames, None) or (video, None, why it
    failed).
    """

    def __init__(self, videos, frames, processor, prompt, timeout):
        self.videos = videos
        self.frames = frames
        self.processor = processor
        self.prompt = prompt
        self.timeout = timeout

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        video = self.videos[index]
        try:
            with VideoReader(video.path, timeout=self.timeout) as reader:
                images = reader.read(
                    segment_midpoints(*reader.span(video), self.frames)
                )  # [K, H, W, 3]
        except VideoError as error:
            return video, None, str(error)
        return video, model_inputs(self.processor, images, self.prompt), None


def model_inputs(processor, images, prompt):
    """What the model takes for K images, each uint8 [H, W, 3]: a mapping of tensors [K, ...]."""
    from transformers import GitProcessor

    if not prompt:
        return processor(images=list(images), return_tensors="pt")
    inputs = processor(images=list(images), text=[prompt] * len(images), return_tensors="pt")
    if isinstance(processor, GitProcessor):
        inputs.pop("token_type_ids", None)  # a tokenizer's habit: GIT has none
        for key in ("input_ids", "attention_mask"):
            # without the token that ends a text: the caption goes on from here
            inputs[key] = inputs[key][:, :-1]
    return inputs


def load_model(name, device, dtype):
    """An image-to-text model of transformers, in evaluation mode, and its processor.

    name: on the Hugging Face hub, or a folder. RunError where it cannot be loaded, or lacks
    weights: transformers would draw those at random, print a table, and go on.
    """
    import transformers

    # tokenizers would warn once in every decoding process
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()  # hints for programmers at every call of generate()
    try:
        with quiet_libraries():
            # One small file first: without a network its retries take half a minute, those of all
            # files several.
            transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
        missing = sorted(report["missing_keys"])  # without those that are tied to others
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
            f"{missing[0]}: what it says would be noise (tried to work: BLIP, BLIP-2 with OPT or T5, "
            "GIT)"
        )
    return model.eval(), processor


def try_model(name, model, processor, prompt, device, dtype, beams, max_tokens):
    """Captions two blank images, one wide and one tall, as videos will be; RunError if it fails."""
    wide = np.full((1, 48, 64, 3), 127, np.uint8)
    try:
        items = [
            (None, model_inputs(processor, images, prompt), None)
            for images in (wide, wide.swapaxes(1, 2))
        ]
        texts = describe(model, processor, items, device, dtype, beams, max_tokens)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # inputs that a kind of model does not take raise anything
        flags = f"--prompt {prompt!r}" if prompt else "without --prompt"
        raise RunError(
            f"--model {name}: {type(model).__name__}, {flags}, cannot caption a blank image: "
            f"{reason_of(error)} (tried to work: BLIP, BLIP-2 with OPT or T5, GIT)"
        ) from None
    if [len(of_item) for of_item in texts] != [1, 1]:
        raise RunError(
            f"--model {name}: {type(model).__name__} gives {texts} for two blank images, expected "
            "one text for each"
        )


@torch.inference_mode()
def describe(model, processor, items, device, dtype, beams, max_tokens):
    """Captions of a batch of KeyFrames items: a list of K strings for each."""
    inputs = {}
    for key in items[0][1]:
        value = torch.cat([inputs_of[key] for _, inputs_of, _ in items]).to(device)
        inputs[key] = value.to(dtype) if value.is_floating_point() else value
    tokens = model.generate(**inputs, max_new_tokens=max_tokens, num_beams=beams, do_sample=False)
    texts = [
        " ".join(text.split()) for text in processor.batch_decode(tokens, skip_special_tokens=True)
    ]
    each = len(texts) // len(items)
    return [texts[i * each : (i + 1) * each] for i in range(len(items))]


def part_files(out):
    return sorted(out.parent.glob(out.name + ".part-*"))


def read_lines(out):
    """What the joined file and the parts beside it hold: (row, object) of every line, but not of
    one that a kill cut off.
    """
    for path in (out, *part_files(out)):
        if not path.exists():
            continue
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            # only the parts say it: line i of the joined file is row i
            row = entry.pop("row", number)
            yield row, entry


def read_entries(out, videos):
    """The objects of `read_lines` that are of this manifest, {row: object}; a caption of any
    attempt wins over a failure.
    """
    entries = {}
    for row, entry in read_lines(out):
        if row >= len(videos) or entry["path"] != videos[row].name:
            continue
        if entry["captions"] or row not in entries:
            entries[row] = entry
    return entries


def append(path, text):
    """Adds text to the end of a file. RunError, with the reason, if that cannot be."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}): the captions up to here are kept"
        ) from None


def write_joined(out, entries, videos):
    """Writes the joined file, line i for row i, once every row has been tried; the parts go."""
    if len(entries) < len(videos):
        print(f"{len(entries)} of {len(videos)} videos tried: run it again to go on")
        return
    temporary = out.with_name(out.name + ".new")
    try:
        temporary.write_text(
            "".join(json.dumps(entries[video.row]) + "\n" for video in videos), encoding="utf-8"
        )
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"{out}: cannot be written ({error.strerror}): what it would hold is in {out.name}.part-*"
        ) from None
    for path in part_files(out):
        path.unlink()
    failed = sum(not entry["captions"] for entry in entries.values())
    if failed == len(videos):
        raise RunError(f"{out}: none of the videos could be captioned; the reasons are in it")
    print(f"{out}: {len(videos) - failed} videos captioned, {failed} failed")


def read_classes(path):
    """The lines of a text file of class names; None without one."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise RunError(f"--classes {path}: expected UTF-8 text, a class name per line") from None


def label_captions(videos, classes):
    """One caption a video: its label, or the line of `classes` that its integer label names."""
    entries = {}
    for video in videos:
        text = video.label
        if classes is not None and text is not None:
            if not text.isdigit() or int(text) >= len(classes):
                raise RunError(
                    f"{video.name}: label {text!r} is not a line of --classes, 0 to {len(classes) - 1}"
                )
            text = classes[int(text)]
        if not text:
            raise RunError(
                f"{video.name}: has no label to use as its caption (--label-column picks another column)"
            )
        entries[video.row] = {"path": video.name, "captions": [text]}
    return entries


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="data/train.csv", help="the manifest")
    add_video_flags(parser)
    parser.add_argument(
        "--out", help="file to write (default: beside the manifest, train.captions.jsonl)"
    )
    model = parser.add_argument_group("captioner")
    model.add_argument(
        "--model", default="Salesforce/blip-image-captioning-base", help="hub name or folder"
    )
    model.add_argument(
        "--frames", type=frame_count, default=3, help="key frames, and so captions, a video"
    )
    model.add_argument(
        "--prompt",
        default="",
        help="text that the caption continues (BLIP-2 with T5 leaves it out)",
    )
    model.add_argument("--beams", type=positive_int, default=1, help="beam search; 1 is greedy")
    model.add_argument("--max-tokens", type=positive_int, default=30, help="longest caption")
    labels = parser.add_argument_group("captions without a model")
    labels.add_argument(
        "--labels", action="store_true", help="the label of each video is its caption"
    )
    labels.add_argument("--label-column", default="label", help="column that holds the label")
    labels.add_argument("--classes", help="text file: line i is the text of integer label i")
    run = parser.add_argument_group("run")
    add_machine_flags(run)
    run.add_argument("--batch-size", type=positive_int, default=32, help="videos a batch")
    run.add_argument(
        "--max-steps", type=positive_int, help="stop after this many batches, for a trial"
    )
    run.add_argument("--resume", choices=("auto", "none"), default="auto", help="none: start anew")
    run.add_argument(
        "--extend",
        action="store_true",
        help="rows were added at the manifest's end: describe those",
    )
    args = parser.parse_args(argv)
    if args.extend and args.resume == "none":
        parser.error("--extend keeps what --resume none throws away")
    return args


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    try:
        videos = read_manifest(args.data, args.root, args.label_column)
    except ManifestError as error:
        sys.exit(
            f"{error}"
            + ("" if Path(args.data).exists() else " (the toy world: python data/toy.py)")
        )
    rank, ranks, local = torchrun_ranks()
    if ranks > 1:
        # ranks only wait for one another, at the start and at the end of work of very different
        # length
        join_ranks("gloo", timeout=datetime.timedelta(days=7))
    device, _ = choose_device(args.device, local)
    dtype = (
        torch.float32
        if device.type == "cpu"
        else torch.bfloat16
        if torch.cuda.is_bf16_supported()
        else torch.float16
    )

    out = Path(args.out) if args.out else companion(args.data, "captions.jsonl")
    about = {
        "manifest": manifest_hash(videos),
        "videos": len(videos),
        "model": "labels" if args.labels else args.model,
    }
    if not args.labels:
        about |= {
            "frames": args.frames,
            "prompt": args.prompt,
            "beams": args.beams,
            "max_tokens": args.max_tokens,
        }
    if rank == 0:
        prepare(out, about, args, videos)
    wait_for_ranks()
    again = starts_again(out, args)
    done = {}
    if not again:
        entries = read_entries(out, videos)
        done = {row for row, entry in entries.items() if entry["captions"] or args.extend}
    mine = part_of_rank([video for video in videos if video.row not in done], rank, ranks)
    # All that may fail comes before anything is written or removed: a model that does not serve
    # leaves no trace.
    if args.labels:
        entries = label_captions(videos, read_classes(args.classes))
    elif mine:
        model, processor = load_model(args.model, device, dtype)
        try_model(
            args.model, model, processor, args.prompt, device, dtype, args.beams, args.max_tokens
        )
    # all have read what there is: what one of them writes would change the others' parts
    wait_for_ranks()
    if rank == 0:
        begin(out, about, args, videos, again)
    wait_for_ranks()

    if args.labels:
        if rank == 0:
            write_joined(out, entries, videos)
        return
    if mine:
        if rank == 0:
            print(
                f"{args.model} on {device}, {str(dtype)[6:]}: {len(videos)} videos, {len(done)} done before, {ranks} ranks"
            )
        stop = StopSignal(then="ending after this batch")
        part = Path(f"{out}.part-{rank}")
        append(part, "\n")  # ends the line that a kill may have cut off
        frames = KeyFrames(mine, args.frames, processor, args.prompt, args.video_timeout)
        loader = make_loader(frames, args.batch_size, args.workers)
        with tqdm(total=len(mine), unit="video", disable=rank > 0) as bar:
            for step, items in enumerate(patient(loader), 1):
                good = [item for item in items if item[2] is None]
                texts = iter(
                    describe(model, processor, good, device, dtype, args.beams, args.max_tokens)
                    if good
                    else ()
                )
                lines = []
                for video, _, error in items:
                    entry = {"captions": [], "error": error} if error else {"captions": next(texts)}
                    lines.append(json.dumps({"row": video.row, "path": video.name, **entry}) + "\n")
                append(part, "".join(lines))
                bar.update(len(items))
                if step == args.max_steps or stop.name:
                    break
        if stop.name:  # every rank that is told ends for itself: its captions are on the disk
            print(f"{stop.name}: stopped; the same command goes on", file=sys.stderr)
            stop.end()
        stop.at_once()
    wait_for_ranks()
    if rank == 0:
        write_joined(out, read_entries(out, videos), videos)
    if ranks > 1:
        dist.destroy_process_group()


def is_captions(path):
    """Whether this is a file of captions, by its first line."""
    with open(path, encoding="utf-8") as file:
        entry = json.loads(file.readline(1 << 20))
    return isinstance(entry, dict) and "captions" in entry


def prepare(out, about, args, videos):
    """Before any work: refuses to overwrite what is not ours, and to go on with captions of another
    manifest or model, or of videos that were replaced since."""
    path = out.with_suffix(".json")
    if path == out:
        raise RunError(
            f"--out {out}: expected a name that ends in .jsonl, as {path.name} holds what made the captions"
        )
    if not args.labels:
        require_files(videos, args.data)
    make_folder(out.parent)
    refuse_foreign(out, is_captions)
    refuse_foreign(path, is_about)
    hold(out)
    if not starts_again(out, args):
        refuse_other_captions(out, read_about(path) or {}, about, args, videos)


def starts_again(out, args):
    """Whether nothing of what is there is kept: as asked, or because there is no caption yet."""
    return (
        args.resume == "none"
        or args.labels
        or not any(entry["captions"] for _, entry in read_lines(out))
    )


def begin(out, about, args, videos, again):
    """Says what makes the captions, in the .json beside them. again: those that there are go."""
    path = out.with_suffix(".json")
    old = {} if again else read_about(path) or {}
    if again:
        for file in (out, *part_files(out)):
            file.unlink(missing_ok=True)
    if not args.labels:  # labels are the manifest's, whatever the videos are
        about = about | {"files": renewed_sizes(videos, old)}
    write_about(path, about)


def refuse_other_captions(out, old, about, args, videos):
    """RunError unless captions that were begun under `old`, the .json beside them, may be gone
    on with under `about`.
    """
    if not old:
        return
    remedy = f"python caption.py --data {args.data} --resume none (and the flags you want)"
    count = grown_from(videos, old)
    if count and not args.extend:
        raise RunError(
            f"{out}: has the first {count} of {len(videos)} rows of the manifest: --extend describes the rest"
        )
    of_rows = ("manifest", "videos") if count else ()
    keys = (old.keys() | about.keys()) - {"files", *of_rows}
    different = sorted(key for key in keys if old.get(key) != about.get(key))
    if different:
        raise RunError(
            f"{out}: these captions are of another manifest or model (another {', '.join(different)}); remake them with: {remedy}"
        )
    entries = read_entries(out, videos)
    stale = {}
    for row, sizes in changed_rows(videos, old).items():
        if row in entries and entries[row]["captions"]:
            stale[row] = sizes
    if stale:
        raise RunError(
            f"{out}: {describe_change(videos, stale)}; remake the captions with: {remedy}"
        )


if __name__ == "__main__":
    launch(main)
