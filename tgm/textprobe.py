"""What the contrastive head of a checkpoint of pretrain.py knows of a test set: the classes of its
videos, without a labelled one (zero-shot), and which text belongs to which video (retrieval). Needs
arrays.py, checkpoints.py, classes.py, clip.py, evaluation.py, manifest.py and run.py; the
mathematics is in zeroshot.py.

    head = find_head("runs/text/checkpoint.pt")
    result = probe_head(head, features, videos, "data/val.csv")
    print_head(result)

A video's embedding is the head's projection of its feature, the mean of its tokens, in the space of
CLIP's texts. Both measures need an array beside the test manifest: val.classes.npy, val.text.npy.

Shapes: N videos, D width of the encoder, E of CLIP's embeddings, C classes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tgm.arrays import (
    companion,
    describe_gaps,
    file_hash,
    filled,
    open_array,
    read_about,
    text_commands,
)
from tgm.checkpoints import read_checkpoint, saved_args
from tgm.classes import open_classes
from tgm.clip import FOLDER, plain_name
from tgm.evaluation import bootstrap
from tgm.manifest import ManifestError, Video
from tgm.run import list_names
from tgm.zeroshot import FirstHits, retrieval, zero_shot

RECALL_AT = (1, 5, 10)
# of a .json: the model that embedded texts
CLIP_KEYS = ("clip", "pretrained", "weights", "activation")


class TextHead(NamedTuple):
    """A contrastive head that was trained with captions."""

    weight: np.ndarray  # float32 [E, D]
    monitored: bool  # --nce-weight 0: its gradient was not passed on to the encoder
    about: dict  # the .json of the text array it was trained with; {} if that is gone


def find_head(checkpoint: str | Path) -> TextHead | None:
    """The head of a checkpoint, if its pretraining had captions, also with --nce-weight 0 (then it
    is `monitored`). None for an untrained encoder ("none"), for files that pretrain.py did not
    write, and for a pretraining without text."""
    saved = saved_args(checkpoint)
    if "nce_weight" not in saved:
        return None
    # identity: {file: hash of its .json, or None if the training had no such file}
    for path, digest in saved.get("identity", {}).items():
        if path.endswith(".text.npy") and digest is not None:
            weight = read_checkpoint(checkpoint)["contrastive.proj.weight"].float().numpy()
            return TextHead(weight, saved["nce_weight"] == 0, text_about(path, digest))
    return None


def text_about(path: str, digest: str) -> dict:
    """What the .json of a text array says, if it still has the hash `digest`, else {}."""
    path = Path(path).with_suffix(".json")
    if not path.is_file() or file_hash(path) != digest:
        return {}
    return read_about(path) or {}


def project(head: TextHead, features: np.ndarray) -> np.ndarray:
    """features [N, D] -> unit vectors [N, E]; NaN for a video that could not be read."""
    embedding = np.asarray(features, np.float32) @ head.weight.T
    return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)


def comparable(about: dict, key: str) -> str | None:
    """An entry of a .json about CLIP. Two ways of writing a folder or a model's name become
    equal."""
    value = about.get(key)
    if key != "clip" or value is None:
        return value
    if value.startswith(FOLDER):
        return FOLDER + os.path.realpath(value.removeprefix(FOLDER))
    return plain_name(value)


def clip_flags(head: TextHead) -> str:
    """The flags of saliency.py for the CLIP that a head was trained with, as far as known."""
    if not head.about:
        return "--clip NAME (that of the training)"
    flags = f"--clip {head.about.get('clip')}"
    if head.about.get("pretrained"):
        flags += f" --pretrained {head.about['pretrained']}"
    return flags


def refuse_other_clip(path: Path, head: TextHead, width: int, about: dict, command: str) -> None:
    """ManifestError if an array of texts, `width` wide, is not of the CLIP the head was trained
    with, as far as the text array of its training is still there to tell. command: of saliency.py,
    which makes the array."""
    remedy = f"make it again with: {command} {clip_flags(head)} --resume none"
    if width != len(head.weight):
        raise ManifestError(
            f"{path}: has {width} dimensions, the checkpoint's head {len(head.weight)}: {remedy}"
        )
    if not head.about:
        return
    for key in CLIP_KEYS:
        if key == "weights" and None in (about.get(key), head.about.get(key)):
            continue  # there is no hash of published weights, nor in old .json files
        if comparable(about, key) != comparable(head.about, key):
            made = f"made with {key} {about.get(key)}, the checkpoint's head was trained with"
            reason = f"{made} {head.about.get(key)}"
            if key == "weights":  # hashes tell a user nothing
                reason = "made with other weights of CLIP than the checkpoint's head"
            raise ManifestError(f"{path}: {reason}: {remedy}")


# ---- the two measures ----------------------------------------------------------------------------


def probe_head(
    head: TextHead | None,
    features: np.ndarray,
    videos: Sequence[Video],
    manifest: str | Path,
    seed: int = 0,
) -> dict:
    """The entries of both measures, for the result of a probe. A measure that cannot be taken has
    none; a line says why.

    features: [N, D] of the test videos; manifest: theirs, beside which the arrays of texts stand"""
    if head is None:
        print("no zero-shot, no retrieval: the checkpoint has no head that captions trained")
        return {}
    if not head.about:
        print(
            "note: the text array of the training is not there, or was made again: that texts are "
            "of the same CLIP as the checkpoint's is not known"
        )
    embedding = project(head, features)
    result = {"monitored_head": head.monitored}
    try:
        result |= probe_zero_shot(head, embedding, videos, manifest, seed)
    except ManifestError as error:
        print(f"no zero-shot: {error}")
    try:
        result |= probe_retrieval(head, embedding, videos, manifest)
    except ManifestError as error:
        print(f"no retrieval: {error}")
    return result


def probe_zero_shot(
    head: TextHead, embedding: np.ndarray, videos: Sequence[Video], manifest: str | Path, seed: int
) -> dict:
    """Zero-shot accuracy. The labels are names of the array, or, if none of them is, numbers of its
    lines, from 0. embedding: [N, E] of the videos. ManifestError if there is no array of names, or
    if it does not fit the head or the labels."""
    path = companion(manifest, "classes.npy")
    remedy = f"python saliency.py --data {manifest} --cue classes --classes FILE"
    classes, about = open_classes(path, remedy)
    refuse_other_clip(path, head, classes.shape[1], about, remedy)
    number = {name: index for index, name in enumerate(about["names"])}
    found = {video.label for video in videos}
    if not found & number.keys():  # the labels may be the classes' numbers
        number = {str(index): index for index in range(len(classes))}
        from_1 = {str(index + 1) for index in range(len(classes))}
        if found <= from_1 and str(len(classes)) in found:
            raise ManifestError(
                f"{path}: the labels are numbers from 1 to {len(classes)}, but its classes count "
                "from 0"
            )
    unknown = sorted(found - number.keys())
    labels = np.array([number.get(video.label, -1) for video in videos])
    if (labels < 0).all():
        raise ManifestError(f"{path}: none of the labels is among its names")
    if unknown:
        print(f"{path}: labels without a name there count as wrong: {list_names(unknown, 20)}")
    correct = zero_shot(embedding, classes, labels)  # [N, 5]
    return {
        "zero_shot": float(correct[:, 0].mean()),
        "zero_shot_bootstrap": bootstrap(correct[:, 0], seed=seed),
        "zero_shot_top5": float(correct[:, -1].mean()),
        "zero_shot_top5_bootstrap": bootstrap(correct[:, -1], seed=seed),
        "zero_shot_classes": len(classes),
    }


def probe_retrieval(
    head: TextHead, embedding: np.ndarray, videos: Sequence[Video], manifest: str | Path
) -> dict:
    """Retrieval over the captions. ManifestError if there is no array of them, or if it does not
    fit the head or the manifest. embedding: [N, E] of the videos"""
    path = companion(manifest, "text.npy")
    remedy = text_commands(manifest, videos)
    captions = companion(manifest, "captions.jsonl")  # if they were remade, the array is stale
    expect = {"captions": file_hash(captions)} if captions.exists() else {}
    text, about = open_array(path, videos, remedy, **expect)
    refuse_other_clip(path, head, text.shape[-1], about, f"python saliency.py --data {manifest}")
    is_made = filled(text)
    if not is_made.any():
        raise ManifestError(f"{path}: no row of it is made; make it with: {remedy}")
    if not is_made.all():
        print(describe_gaps(path, is_made))
    to_text, to_video = retrieval(embedding, np.asarray(text, np.float32))
    return {"video_to_text": summary(to_text), "text_to_video": summary(to_video)}


def summary(hits: FirstHits) -> dict:
    """Recall, its chance and the median rank, for the result's .json."""
    median = hits.median()
    entries = {"queries": len(hits.ranks), "answers": hits.answers}
    for most in RECALL_AT:
        entries[f"recall_{most}"] = hits.recall(most)
        entries[f"chance_{most}"] = hits.chance(most)
    entries["median_rank"] = median if np.isfinite(median) else None
    return entries


def print_head(result: dict) -> None:
    """Prints both measures as a table, chance in brackets."""
    mark = " (monitored head)" if result.get("monitored_head") else ""
    if "zero_shot" in result:
        classes = result["zero_shot_classes"]
        print(f"zero-shot of {classes} classes, chance in brackets{mark}")
        for name, key, most in (("top-1", "zero_shot", 1), ("top-5", "zero_shot_top5", 5)):
            low, high = result[f"{key}_bootstrap"]
            chance = min(1, most / classes)
            accuracy = f"{result[key]:.3f} ({chance:.3f})"
            print(f"  {name:<16}{accuracy:<16}95 % over videos: {low:.3f} to {high:.3f}")
    if "video_to_text" in result:
        columns = "".join(f"{f'recall at {most}':<16}" for most in RECALL_AT)
        print(f"{f'retrieval{mark}':<28}{columns}median rank of the first right answer")
        for name, key in (("video to text", "video_to_text"), ("text to video", "text_to_video")):
            found = result[key]
            cells = [
                f"{found[f'recall_{most}']:.3f} ({found[f'chance_{most}']:.3f})"
                for most in RECALL_AT
            ]
            median = "none" if found["median_rank"] is None else f"{found['median_rank']:g}"
            columns = "".join(f"{cell:<16}" for cell in cells)
            print(f"  {name:<26}{columns}{median} of {found['answers']}")
