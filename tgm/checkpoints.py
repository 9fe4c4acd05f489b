"""Checkpoints: reads VideoMAE's official files, Hugging Face's folders and our own files; writes
our own files and Hugging Face's folders. Needs model.py; the command needs other files of tgm/.

    notes = load_pretrained(model, "videomae.pth")  # a VideoMAE or a VideoViT, of any clip size
    print(summary_of(notes))
    # encoder loaded; new: contrastive head (2 keys)
    save_checkpoint(path, model=model.state_dict(), args=vars(args))

    # a checkpoint of pretrain.py or finetune.py as a folder for Hugging Face's transformers
    python -m tgm.checkpoints --export runs/finetune/best.pt --out hf

In this file all keys are those of VideoMAE's pretraining files: "encoder.blocks.0.…",
"decoder.blocks.0.…". A VideoViT has no prefix: "encoder.blocks.0.…" is "blocks.0.…" there.
`read_checkpoint` adds the prefix, `fit_classifier` removes it. Position tables are in no file,
because the models compute them.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import EPS, MEAN, SIZES, STD, VideoMAE, VideoViT

State = dict[str, Tensor]

# (ours, Hugging Face's): pieces of keys, replaced from top to bottom. A longer piece comes before
# one that is a part of it.
HF_KEYS = [
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."),
    ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    ("encoder.fc_norm.", "fc_norm."),
    ("encoder.head.", "classifier."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".attn.", ".attention.attention."),
]
SPLIT = ("query", "key", "value")  # Hugging Face's three parts of attn.qkv
DECODER = ("decoder.", "encoder_to_decoder.", "mask_token")
CONTRASTIVE = ("contrastive.",)  # only our own files have it
# What messages call the parts that a file may lack or a model may leave: beginnings of their keys.
PARTS = {
    "decoder": DECODER,
    "contrastive head": CONTRASTIVE,
    "final norm": ("norm.", "fc_norm."),
    "classifier": ("head.",),
}
HF_FILES = ("model.safetensors", "pytorch_model.bin")  # the weights in a Hugging Face folder
MOST_PROBLEMS = 8  # listed in the message about a file that does not fit
# the values of a Hugging Face configuration that does not give them
HF_DEFAULT_HEADS = {"num_attention_heads": 12, "decoder_num_attention_heads": 6}


# ---- reading a file ------------------------------------------------------------------------------


class Ignored:
    """Takes the place of numpy's numbers while a checkpoint is opened. The optimiser's state in
    VideoMAE's files has some. Nobody here reads them, so that no code of numpy need be allowed."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# What torch.load may build besides tensors. None of it can run code of the file's author.
SAFE = [
    argparse.Namespace,  # of VideoMAE's flags
    (Ignored, "numpy.dtype"),
    (Ignored, "numpy.core.multiarray.scalar"),  # as numpy 1 calls it
    (Ignored, "numpy._core.multiarray.scalar"),  # as numpy 2 calls it
]


def read_checkpoint(path: str | Path) -> State:
    """File or folder -> {key: tensor}, with keys as at the top of this file. ValueError, one line
    with the file, if there is no checkpoint that can be read safely."""
    file = weights_file(Path(path))
    return tensors_of(open_safely(file), file)


def weights_file(path: Path) -> Path:
    """The file with the weights: `path` itself, or the one in a Hugging Face folder."""
    for name in HF_FILES:
        if (path / name).is_file():
            return path / name
    return path


def settings_folder(path: Path) -> Path:
    """Where the config.json of a Hugging Face checkpoint is: in the folder, or beside its file."""
    return path.parent if path.name in HF_FILES else path


def expect_weights(file: Path) -> None:
    """ValueError if `file`, of `weights_file`, is missing, or a folder with weights in several
    files."""
    if list(file.glob("*.index.json")):
        raise ValueError(
            f"{file}: its weights are in several files, which cannot be read; write them into one "
            'with transformers: save_pretrained(folder, max_shard_size="100GB")'
        )
    if not file.is_file():
        raise ValueError(
            f"{file}: no checkpoint there (pretrain.py writes runs/NAME/checkpoint.pt)"
        )


def open_safely(file: Path) -> Any:
    """Everything that a file holds, without running code from it; ValueError as
    `read_checkpoint`."""
    expect_weights(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(SAFE):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the parsers raise anything
        if "allocate memory" in str(error):  # torch's RuntimeError: the file may be whole
            raise MemoryError(f"{file}: too little memory to read it") from None
        reason = type(error).__name__
        raise ValueError(f"{file}: no checkpoint that can be read safely ({reason})") from None


def tensors_of(content: Any, file: Path) -> State:
    """The weights in the content of a file, with keys as at the top of this file; ValueError as
    `read_checkpoint`."""
    state = content
    for key in ("model", "module"):  # DeepSpeed says "module"
        if isinstance(content, dict) and key in content:
            state = content[key]
            break
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{file}: no checkpoint that can be read safely (expected named tensors)")
    # Parameters would carry their gradients along.
    state = {key: tensor.detach() for key, tensor in state.items()}
    return join_qkv(official_names(state), file)


def official_names(state: State) -> State:
    """The tensors of any layout under VideoMAE's names; query, key and value are still
    separate."""
    # what DistributedDataParallel and torch.compile put before each key
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): state[key] for key in state}
    if "embeddings.patch_embeddings.projection.weight" in state:  # a bare VideoMAEModel
        state = {"videomae." + key: tensor for key, tensor in state.items()}
    pairs = [(theirs, ours) for ours, theirs in HF_KEYS]
    # transformers from 5.18 calls these query.bias and value.bias in memory, but writes q_bias and
    # v_bias; 5.5.1 to 5.17 write query.bias, value.bias and key.bias
    pairs += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]
    named = {}
    for key, tensor in state.items():
        key = rename(key, pairs)
        if key.endswith(".attn.key.bias"):  # softmax ignores it: see model.Attention
            continue
        if key.startswith(("patch_embed.", "blocks.", "norm.", "head.")):  # the fine-tuning layout
            key = "encoder." + key
        named[key] = tensor
    return named


def rename(key: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key


def join_qkv(state: State, file: Path) -> State:
    """Joins Hugging Face's query, key and value weights; ValueError where one of them is missing,
    or unlike the others."""
    for query in [key for key in state if key.endswith(".query.weight")]:
        parts = []
        for part in SPLIT:
            key = query.replace("query", part)
            if key not in state:
                raise ValueError(f"{file}: has {query} but no {key}")
            parts.append(state.pop(key))
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1 or () in shapes:
            raise ValueError(f"{file}: {query} has another shape than key and value, or none")
        state[query.replace("query", "qkv")] = torch.cat(parts)
    return state


def head_classes(path: str | Path) -> int:
    """How many classes the classifier in `path` has; ValueError if it has no classifier or cannot
    be read."""
    head = read_checkpoint(path).get("encoder.head.weight")
    if head is None or head.ndim != 2:
        raise ValueError(f"{path}: holds no classifier")
    return len(head)


def saved_args(path: str | Path) -> dict[str, Any]:
    """The flags that pretrain.py or finetune.py kept in their checkpoint; of a Hugging Face folder
    its size, frames and image_size, and its classes where they have names. {} for any other file,
    also for one that is missing or damaged: `load_pretrained` tells what is wrong with it."""
    file = settings_folder(Path(path)) / "config.json"
    if file.is_file():
        return args_of_config(file)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return {}
    return args_of(content)


def args_of(content: Any) -> dict[str, Any]:
    """The flags in the content of a file, {} if it has none of ours: other programs keep "args",
    too, but hardly with one of our sizes."""
    saved = content.get("args") if isinstance(content, dict) else None
    # a list, because it may be asked for anything, also what cannot be hashed
    is_ours = isinstance(saved, dict) and saved.get("size") in list(SIZES)
    return saved if is_ours else {}


def args_of_config(file: Path) -> dict[str, Any]:
    """What a config.json of Hugging Face says of our flags --size, --frames and --image-size, and
    the names of its classes."""
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    found = {"frames": config.get("num_frames"), "image_size": config.get("image_size")}
    found = {name: number for name, number in found.items() if isinstance(number, int)}
    shape = (config.get("hidden_size"), config.get("num_hidden_layers"))
    for size, ours in SIZES.items():
        if shape == (ours["width"], ours["depth"]):
            found["size"] = size
    classes = classes_of_config(config)
    if classes is not None:
        found["classes"] = classes
    return found


def classes_of_config(config: dict[str, Any]) -> list[str] | None:
    """The names of the classes in a config.json, in the order of the outputs; None if not every
    class has a name of its own."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    outputs = [str(number) for number in range(len(names))]
    if set(outputs) != names.keys():
        return None
    classes = [str(names[number]) for number in outputs]
    # transformers writes LABEL_0, LABEL_1, … where nobody named them
    is_named = classes[0] != "LABEL_0" and len(set(classes)) == len(classes)
    return classes if is_named else None


# ---- loading a file into a model -----------------------------------------------------------------


class Fit(NamedTuple):
    """How a model takes a file. Parts are given by the beginnings of their keys."""

    state: State  # the file's tensors under the model's names
    may_be_missing: Sequence[tuple[str, ...]]  # parts that the file may lack, but only as a whole
    may_be_unused: tuple[str, ...]  # beginnings of the file's keys that the model may leave


def fit_autoencoder(state: State, model: VideoMAE) -> Fit:
    """How a VideoMAE takes a file:

    pretrained       every key; the decoder, the contrastive head and the final norm may each be
                     missing (a Hugging Face VideoMAEModel may have no final norm)
    fine-tuned       the encoder, without the classifier. The file has no norm for single tokens,
                     so fc_norm becomes the final norm, though it was trained on the mean of the
                     tokens. (With use_mean_pooling off, Hugging Face's classifiers have the final
                     norm in the place of fc_norm.)

    A contrastive head of another width is left, and the model's stays new: it is of another CLIP,
    or of a run without captions, which never trained it."""
    head = state.get("contrastive.proj.weight")
    if head is not None and head.shape != model.contrastive.proj.weight.shape:
        state = {key: tensor for key, tensor in state.items() if not key.startswith(CONTRASTIVE)}
    may_be_missing = [CONTRASTIVE, DECODER, ("encoder.norm.",)]
    if "encoder.norm.weight" not in state:
        state = {key.replace("fc_norm", "norm"): tensor for key, tensor in state.items()}
    return Fit(state, may_be_missing, may_be_unused=("encoder.head.",))


def fit_classifier(state: State, new_head: bool) -> Fit:
    """How a VideoViT takes a file:

    pretrained                      the encoder without its final norm; fc_norm and head stay new
    fine-tuned, with new_head       all but the head, which stays new
    fine-tuned, without new_head    every key

    Hugging Face's classifiers with use_mean_pooling off classify the first token, which a VideoViT
    cannot do. With new_head they count as pretrained, without it they do not fit."""
    state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    if new_head:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    norm_and_head = ("fc_norm.", "head.")
    pretrained = not any(key.startswith(norm_and_head) for key in state)
    if pretrained:
        return Fit(state, [norm_and_head], may_be_unused=("norm.", *CONTRASTIVE, *DECODER))
    return Fit(state, [("head.",)] if new_head else [], may_be_unused=())


def load_pretrained(
    model: VideoMAE | VideoViT, path: str | Path, new_head: bool = False
) -> list[str]:
    """Load `path` into a VideoMAE or VideoViT, of any frames and image size.

    path: our checkpoint.pt, an official VideoMAE .pth, or a Hugging Face VideoMAE folder
    new_head: a VideoViT leaves the head of a fine-tuned file, for other classes

    Returns what was tolerated, such as ["missing head.bias", "unused norm.weight"]; `summary_of`
    says it in words. `fit_autoencoder` and `fit_classifier` say which parts may be missing or left.
    Whatever else does not fit raises ValueError, one line with keys and shapes, and nothing is
    loaded."""
    path = Path(path)
    return load_state(model, read_checkpoint(path), path, new_head)


def load_state(
    model: VideoMAE | VideoViT, state: State, path: Path, new_head: bool = False
) -> list[str]:
    """As `load_pretrained`, of tensors that were read from `path` before."""
    problems = wrong_heads(model, settings_folder(path), state)
    if isinstance(model, VideoViT):
        fit = fit_classifier(state, new_head)
    else:
        fit = fit_autoencoder(state, model)
    own = model.state_dict()
    missing = [key for key in own if key not in fit.state]
    unused = [key for key in fit.state if key not in own]
    # The parts of which the file has no key at all. If it has some keys of a part, the others are
    # reported below as missing.
    absent_prefixes = ()
    for part in fit.may_be_missing:
        if not any(key.startswith(part) for key in fit.state):
            absent_prefixes += part

    for key, tensor in fit.state.items():
        if key in own and tensor.shape != own[key].shape:
            problems.append(f"{key}: file {list(tensor.shape)}, model {list(own[key].shape)}")
    problems += [f"missing {key}" for key in missing if not key.startswith(absent_prefixes)]
    problems += [f"unexpected {key}" for key in unused if not key.startswith(fit.may_be_unused)]
    if problems:
        if len(problems) > MOST_PROBLEMS:  # in a file of another size every key is wrong
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
        raise ValueError(f"{path} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(fit.state, strict=False)
    return [f"missing {key}" for key in missing] + [f"unused {key}" for key in unused]


def wrong_heads(model: VideoMAE | VideoViT, folder: Path, state: State) -> list[str]:
    """Compares the numbers of heads with the config.json of a Hugging Face folder, since shapes do
    not show them. Returns the problems; none where there is no config.json."""
    file = folder / "config.json"
    if not file.is_file():
        return []
    try:
        config = HF_DEFAULT_HEADS | json.loads(file.read_text())
    except (ValueError, TypeError):
        return ["its config.json cannot be read"]
    expected = {"num_attention_heads": model.config["heads"]}
    with_decoder = any(key.startswith("decoder.") for key in state)
    if with_decoder and isinstance(model, VideoMAE):
        expected["decoder_num_attention_heads"] = model.config["decoder_heads"]
    problems = []
    for name, heads in expected.items():
        if config[name] != heads:
            problems.append(f"{name}: file {config[name]}, model {heads}")
    return problems


def summary_of(notes: list[str]) -> str:
    """What `load_pretrained` returned, in words, such as "encoder loaded; not used: classifier (2
    keys)"."""
    if not notes:
        return "every key loaded"
    counts = {"unused": Counter(), "missing": Counter()}
    for note in notes:
        kind, key = note.split(" ", 1)
        counts[kind][part_of(key)] += 1
    sentences = ["encoder loaded"]
    for kind, words in (("unused", "not used"), ("missing", "new")):
        listed = [f"{part} ({number} keys)" for part, number in counts[kind].items()]
        if listed:
            sentences.append(f"{words}: {', '.join(listed)}")
    return "; ".join(sentences)


def part_of(key: str) -> str:
    """The name in PARTS of the part that a key belongs to."""
    for name, beginnings in PARTS.items():
        if key.removeprefix("encoder.").startswith(beginnings):
            return name
    raise KeyError(key)


# ---- writing -------------------------------------------------------------------------------------


def save_checkpoint(path: Path, **content: Any) -> None:
    """Write `content` with torch.save into another file beside `path`, then rename that to `path`.
    So a program that is stopped, or a disk that is full, leaves the last checkpoint whole. (The
    file is not forced to the disk: a power cut may damage it.) OSError, with the path and the
    reason, if it cannot be written."""
    temporary = path.with_name(path.name + ".new")
    try:
        # Given an open file, not a name, torch passes on why a write failed.
        with open(temporary, "wb") as file:
            torch.save(content, file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        # torch's own RuntimeError hides the OSError that it came from
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        message = f"cannot be written, the last checkpoint is kept ({cause.strerror})"
        raise OSError(cause.errno, message, str(path)) from None


def save_huggingface(
    model: VideoMAE | VideoViT, folder: str | Path, classes: Sequence[str] | None = None
) -> None:
    """Write a folder that transformers' from_pretrained opens: config.json, model.safetensors and
    preprocessor_config.json, which AutoImageProcessor and pipelines need.

    A VideoMAE becomes a VideoMAEForPreTraining and loses its contrastive head; a VideoViT becomes a
    VideoMAEForVideoClassification. classes: the names of a VideoViT's classes, in the order of its
    outputs (None: their numbers); ValueError unless there is one for each.

    transformers 5.5.1 to 5.17 do not load the biases of attention from such folders, nor from
    VideoMAE's published ones, and list them as MISSING: use another version.

    transformers fixes the epsilon of decoder.norm and fc_norm at 1e-5, and ours is 1e-6: for equal
    outputs set those two by hand."""
    folder = Path(folder)
    config = huggingface_config(model)
    if isinstance(model, VideoViT):
        config |= huggingface_labels(model.head.out_features, classes)
    processor = huggingface_processor(model.config["image_size"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    aside = folder / "model.safetensors.new"
    try:
        save_file(huggingface_state(model), aside, metadata={"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        aside.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written ({error})") from None
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    aside.replace(file)  # last: where the weights are, the folder is whole


def huggingface_config(model: VideoMAE | VideoViT) -> dict[str, Any]:
    c = model.config
    architecture = "VideoMAEForPreTraining"
    if isinstance(model, VideoViT):
        architecture = "VideoMAEForVideoClassification"
    return {
        "model_type": "videomae",
        "architectures": [architecture],
        "layer_norm_eps": EPS,
        "use_mean_pooling": isinstance(model, VideoViT),
        "num_frames": c["frames"],
        "image_size": c["image_size"],
        "tubelet_size": c["tubelet"],
        "patch_size": c["patch"],
        "hidden_size": c["width"],
        "num_hidden_layers": c["depth"],
        "num_attention_heads": c["heads"],
        "intermediate_size": 4 * c["width"],
        "decoder_hidden_size": c["decoder_width"],
        "decoder_intermediate_size": 4 * c["decoder_width"],
        "decoder_num_hidden_layers": c["decoder_depth"],
        "decoder_num_attention_heads": c["decoder_heads"],
    }


def huggingface_labels(outputs: int, classes: Sequence[str] | None) -> dict[str, Any]:
    """The names of the classes, as config.json has them."""
    names = [str(name) for name in (range(outputs) if classes is None else classes)]
    different = len(set(names))
    if len(names) != outputs or different != outputs:
        raise ValueError(
            f"classes: expected {outputs} different names, "
            f"found {len(names)} names, {different} of them different"
        )
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def huggingface_processor(image_size: int) -> dict[str, Any]:
    """The content of preprocessor_config.json: the middle square of each frame, normalised as by
    `model.normalize`."""
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def huggingface_state(model: VideoMAE | VideoViT) -> State:
    """The tensors under Hugging Face's names, with qkv cut into three."""
    prefix = "encoder." if isinstance(model, VideoViT) else ""
    state = {}
    for key, tensor in model.state_dict(prefix=prefix).items():
        if key.startswith("contrastive."):
            continue
        name = rename(key, HF_KEYS)
        if ".qkv." in key:
            for part, piece in zip(SPLIT, tensor.chunk(3), strict=True):
                state[name.replace("qkv", part)] = piece.detach().cpu().contiguous()
        else:
            state[name] = tensor.detach().cpu().contiguous()
    return state


# ---- the command ---------------------------------------------------------------------------------


def export(path: str | Path, folder: str | Path) -> VideoMAE | VideoViT:
    """Write the checkpoint `path`, pretrain.py's or finetune.py's, as a Hugging Face folder, and
    return the model. ValueError, one line with the file, if it is neither's."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{path}: is a folder; expected a file of pretrain.py or finetune.py")
    content = open_safely(file)
    state = tensors_of(content, file)
    saved = args_of(content)
    fine_tuned = "encoder.head.weight" in state
    needed = {"size", "frames", "image_size", "classes" if fine_tuned else "text_dim"}
    if not needed <= saved.keys():
        raise ValueError(f"{path}: not a checkpoint of pretrain.py or finetune.py")
    shape = {"frames": saved["frames"], "image_size": saved["image_size"]}
    if fine_tuned:
        classes = saved["classes"]
        model = VideoViT(saved["size"], len(classes), **shape)
    else:
        classes = None
        model = VideoMAE(saved["size"], text_dim=saved["text_dim"], **shape)
    load_state(model, state, file)
    save_huggingface(model, folder, classes)
    return model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from tgm.flags import Parser

    parser = Parser(description=__doc__)
    parser.add_argument(
        "--export",
        type=Path,
        required=True,
        metavar="FILE",
        help="a checkpoint of pretrain.py or finetune.py",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to write"
    )
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    from tgm.run import RunError

    args = parse_args(argv)
    if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir())):
        raise RunError(f"--out {args.out}: already exists; remove it, or choose another folder")
    try:
        model = export(args.export, args.out)
    except ValueError as error:
        raise RunError(f"--export {error}") from None
    how_to_open = "VideoMAEForPreTraining.from_pretrained"
    if isinstance(model, VideoViT):
        how_to_open = 'pipeline("video-classification", model=...)'
    print(f"{args.out}: transformers opens it with {how_to_open}")


def main(argv: list[str] | None = None) -> None:
    from tgm.run import one_line_errors

    one_line_errors(run)(argv)


if __name__ == "__main__":
    main()
