"""Checkpoints: reads VideoMAE's official files, Hugging Face's folders and our own; writes our own
and Hugging Face's folders. Needs model.py; its command line needs the rest of tgm/, too.

    notes = load_pretrained(model, "videomae.pth")  # a VideoMAE or a VideoViT, of any clip size
    print(summary_of(notes))                        # encoder loaded; not used: decoder (63 keys)
    save_checkpoint(path, model=model.state_dict(), args=vars(args))

    # a checkpoint of pretrain.py or finetune.py as a folder for Hugging Face's transformers
    python -m tgm.checkpoints --export runs/finetune/best.pt --out hf

Keys are VideoMAE's: "encoder.blocks.0.…", "decoder.blocks.0.…" for the autoencoder, "blocks.0.…"
for the classifier. Position tables are in no file: the models compute them.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import EPS, MEAN, STD, VideoMAE, VideoViT

State = dict[str, Tensor]

HF_KEYS = [  # (ours, Hugging Face's); VideoViT's keys with "encoder." before them
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
SPLIT = ("query", "key", "value")  # Hugging Face cuts attn.qkv in these
DECODER = ("decoder.", "encoder_to_decoder.", "mask_token")
CLASSIFIER = ("fc_norm.", "head.")
PARTS = {  # that a file may lack, or a model leave
    "decoder": DECODER,
    "contrastive head": ("contrastive.",),
    "final norm": ("norm.", "fc_norm."),
    "classifier": ("head.",),
}
MOST_PROBLEMS = 8  # listed of a file that does not fit


# ---- reading a file ------------------------------------------------------------------------------


class Ignored:
    """Stands for numpy's scalars while a checkpoint is opened. VideoMAE's optimiser state holds its
    learning rates as such; nobody here reads them, so nothing of numpy's has to be let in."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


SAFE = [  # what torch.load lets in besides tensors: all of it inert
    argparse.Namespace,  # VideoMAE's flags
    (Ignored, "numpy.dtype"),
    (Ignored, "numpy.core.multiarray.scalar"),  # as numpy 1 calls it
    (Ignored, "numpy._core.multiarray.scalar"),  # as numpy 2 calls it
]


def read_checkpoint(path: str | Path) -> State:
    """File or folder -> {key: tensor} under VideoMAE's names, those of VideoViT with "encoder."
    before them. ValueError, one line with the file, where there is none that can be read safely."""
    file = weights_file(Path(path))
    if not file.is_file():
        raise ValueError(f"{file}: no checkpoint there")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            with torch.serialization.safe_globals(SAFE):
                state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("model", state.get("module", state))  # DeepSpeed says "module"
        state = {key: tensor.detach() for key, tensor in state.items()}
    except Exception as error:  # garbage makes the parsers raise anything
        reason = type(error).__name__
        raise ValueError(f"{file}: no checkpoint that can be read safely ({reason})") from None
    return join_qkv(official_names(state), file)


def weights_file(path: Path) -> Path:
    """The file with the weights: `path` itself, or the one in a Hugging Face folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    return path


def official_names(state: State) -> State:
    """The tensors of any layout under VideoMAE's names, but query, key and value still apart."""
    if "embeddings.patch_embeddings.projection.weight" in state:  # a bare VideoMAEModel
        state = {"videomae." + key: tensor for key, tensor in state.items()}
    pairs = [(theirs, ours) for ours, theirs in HF_KEYS]
    # transformers 5 calls these query.bias and value.bias in memory, but writes q_bias and v_bias
    pairs += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]
    named = {}
    for key, tensor in state.items():
        key = rename(key, pairs)
        if key.startswith(("patch_embed.", "blocks.", "norm.", "head.")):  # the fine-tuning layout
            key = "encoder." + key
        named[key] = tensor
    return named


def rename(key: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key


def join_qkv(state: State, file: Path) -> State:
    """Joins Hugging Face's query, key and value weights; ValueError where one of them is
    missing."""
    for query in [key for key in state if key.endswith(".query.weight")]:
        parts = []
        for part in SPLIT:
            key = query.replace("query", part)
            if key not in state:
                raise ValueError(f"{file}: has {query} but no {key}")
            parts.append(state.pop(key))
        state[query.replace("query", "qkv")] = torch.cat(parts)
    return state


def head_classes(path: str | Path) -> int:
    """How many classes the classifier in `path` has; ValueError if there is none, or no
    checkpoint."""
    head = read_checkpoint(path).get("encoder.head.weight")
    if head is None:
        raise ValueError(f"{path}: holds no classifier")
    return len(head)


def saved_args(path: str | Path) -> dict[str, Any]:
    """The flags that pretrain.py or finetune.py kept in their checkpoint; {} for anybody else's, or
    none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["args"]
    except Exception:  # other people's files are load_pretrained's to judge
        return {}
    return saved if isinstance(saved, dict) else {}


# ---- loading a file into a model -----------------------------------------------------------------


class Fit(NamedTuple):
    """How a model takes a file."""

    state: State  # the file's tensors under the model's names
    optional: Sequence[tuple[str, ...]]  # parts of the model that the file may lack as a whole
    unused: tuple[str, ...]  # beginnings of keys that the model leaves


def fit_autoencoder(state: State) -> Fit:
    """How VideoMAE takes a file; keys begin with "encoder." or are the decoder's."""
    optional = [("contrastive.",), DECODER, ("encoder.norm.",)]  # a bare encoder may lack its norm
    fine_tuned = "encoder.head.weight" in state and "encoder.norm.weight" not in state
    if fine_tuned:  # fc_norm becomes the final norm
        state = {key.replace("fc_norm", "norm"): tensor for key, tensor in state.items()}
        return Fit(state, optional, unused=("encoder.head.",))
    # a pretraining checkpoint, or a bare encoder
    return Fit(state, optional, unused=())


def fit_classifier(state: State, new_head: bool) -> Fit:
    """How VideoViT takes a file; keys that are not the decoder's begin with "encoder."."""
    state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    pretrained = not any(key.startswith(CLASSIFIER) for key in state)
    if pretrained:  # fc_norm is new, and the pretraining's norm is left
        return Fit(state, [CLASSIFIER], unused=("norm.", "contrastive.", *DECODER))
    if new_head and "head.weight" in state:  # fine-tuned, for other classes
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
        return Fit(state, [("head.",)], unused=())
    # fine-tuned, for the same classes
    return Fit(state, [], unused=())


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
    state = read_checkpoint(path)
    if isinstance(model, VideoViT):
        fit = fit_classifier(state, new_head)
    else:
        fit = fit_autoencoder(state)
    own = model.state_dict()
    missing = [key for key in own if key not in fit.state]
    unused = [key for key in fit.state if key not in own]
    absent = ()  # the optional parts of which the file has nothing
    for part in fit.optional:
        if not any(key.startswith(part) for key in fit.state):
            absent += part

    problems = wrong_heads(model, path)
    for key, tensor in fit.state.items():
        if key in own and tensor.shape != own[key].shape:
            problems.append(f"{key}: file {list(tensor.shape)}, model {list(own[key].shape)}")
    problems += [f"missing {key}" for key in missing if not key.startswith(absent)]
    problems += [f"unexpected {key}" for key in unused if not key.startswith(fit.unused)]
    if problems:
        if len(problems) > MOST_PROBLEMS:  # a file of another size: every key
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
        raise ValueError(f"{path} does not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(fit.state, strict=False)
    return [f"missing {key}" for key in missing] + [f"unused {key}" for key in unused]


def wrong_heads(model: VideoMAE | VideoViT, folder: Path) -> list[str]:
    """[what is wrong] if a Hugging Face folder's model has another number of heads, which leaves no
    trace in the shapes; else []."""
    file = folder / "config.json"
    if not file.is_file():
        return []
    try:
        heads = json.loads(file.read_text()).get("num_attention_heads")
    except (ValueError, AttributeError):
        return ["its config.json cannot be read"]
    if heads in (None, model.config["heads"]):
        return []
    return [f"num_attention_heads: file {heads}, model {model.config['heads']}"]


def summary_of(notes: list[str]) -> str:
    """What `load_pretrained` returned, in words: "encoder loaded; not used: decoder (63 keys)"."""
    if not notes:
        return "every key loaded"
    counts = {"unused": Counter(), "missing": Counter()}
    for note in notes:
        kind, key = note.split(" ", 1)
        key = key.removeprefix("encoder.")
        part = next(name for name, beginnings in PARTS.items() if key.startswith(beginnings))
        counts[kind][part] += 1
    sentences = ["encoder loaded"]
    for kind, words in (("unused", "not used"), ("missing", "new, as the file has none")):
        listed = [f"{part} ({number} keys)" for part, number in counts[kind].items()]
        if listed:
            sentences.append(f"{words}: {', '.join(listed)}")
    return "; ".join(sentences)


# ---- writing -------------------------------------------------------------------------------------


def save_checkpoint(path: Path, **content: Any) -> None:
    """torch.save(content, path), written aside and renamed: whatever happens, `path` is a whole
    checkpoint, this one or the last. OSError, with the path and the reason, if it cannot be."""
    temporary = path.with_name(path.name + ".new")
    try:
        # given the name alone, torch keeps the reason of a failure to itself
        with open(temporary, "wb") as file:
            torch.save(content, file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch's own hides it
        if not isinstance(cause, OSError):
            raise
        message = f"cannot be written, the last checkpoint is kept ({cause.strerror})"
        raise OSError(cause.errno, message, str(path)) from None


def save_huggingface(
    model: VideoMAE | VideoViT, folder: str | Path, classes: Sequence[str] | None = None
) -> None:
    """Write a folder that transformers' from_pretrained opens: config.json, model.safetensors and
    preprocessor_config.json, which AutoImageProcessor and pipelines want.

    VideoMAE (but its contrastive head) becomes VideoMAEForPreTraining, VideoViT becomes
    VideoMAEForVideoClassification. classes: the names of a VideoViT's classes, in the order of its
    outputs (None: their numbers); ValueError unless there is one for each.

    transformers fixes the epsilon of decoder.norm and fc_norm at 1e-5, ours is 1e-6: equal outputs
    need those two set by hand."""
    folder = Path(folder)
    config = huggingface_config(model)
    if isinstance(model, VideoViT):
        config |= huggingface_classes(model.head.out_features, classes)
    processor = huggingface_processor(model.config["image_size"])
    folder.mkdir(parents=True, exist_ok=True)
    state = huggingface_state(model)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def huggingface_config(model: VideoMAE | VideoViT) -> dict[str, Any]:
    c = model.config
    return {
        "model_type": "videomae",
        "architectures": ["VideoMAEForPreTraining"],
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


def huggingface_classes(outputs: int, classes: Sequence[str] | None) -> dict[str, Any]:
    """The entries of config.json that a classifier has besides."""
    names = [str(name) for name in (range(outputs) if classes is None else classes)]
    if len(set(names)) != outputs or len(names) != outputs:
        raise ValueError(f"classes: expected {outputs} different names, found {len(names)}")
    return {
        "architectures": ["VideoMAEForVideoClassification"],
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def huggingface_processor(image_size: int) -> dict[str, Any]:
    """What preprocessor_config.json says: the middle square, normalised as by model.normalize."""
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
    """The tensors under Hugging Face's names, qkv cut in three."""
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
    state = read_checkpoint(path)
    saved = saved_args(path)
    if not {"size", "frames", "image_size"} <= saved.keys():
        raise ValueError(f"{path}: not a checkpoint of pretrain.py or finetune.py")
    shape = {"frames": saved["frames"], "image_size": saved["image_size"]}
    if "encoder.head.weight" in state:
        classes = saved["classes"]
        model = VideoViT(saved["size"], len(classes), **shape)
    else:
        classes = None
        model = VideoMAE(saved["size"], text_dim=saved["text_dim"], **shape)
    load_pretrained(model, path)
    save_huggingface(model, folder, classes)
    return model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from tgm.flags import Parser

    parser = Parser(description=__doc__)
    parser.add_argument(
        "--export", type=Path, required=True, metavar="FILE", help="our checkpoint, to be converted"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder to write for transformers"
    )
    return parser.parse_args(argv)


def run(argv: list[str] | None = None) -> None:
    from tgm.run import RunError

    args = parse_args(argv)
    if args.out.is_file() or weights_file(args.out).is_file():
        raise RunError(f"--out {args.out}: is there already; remove it, or write elsewhere")
    try:
        model = export(args.export, args.out)
    except ValueError as error:
        raise RunError(f"--export {error}") from None
    opened = "VideoMAEForPreTraining.from_pretrained"
    if isinstance(model, VideoViT):
        opened = 'pipeline("video-classification", model=...)'
    print(f"{args.out}: transformers opens it with {opened}")


def main(argv: list[str] | None = None) -> None:
    from tgm.run import one_line_errors

    one_line_errors(run)(argv)


if __name__ == "__main__":
    main()
