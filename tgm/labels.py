"""Labels of a manifest, as numbers of classes. Needs checkpoints.py, manifest.py and run.py."""

import hashlib
import json
from pathlib import Path

import torch

from tgm.checkpoints import head_classes, settings_folder
from tgm.manifest import ManifestError, Videos, manifest_hash, read_manifest, require_files
from tgm.run import list_names


def read_labelled(manifest: str, root: str | None, column: str) -> Videos:
    """The videos of a manifest; ManifestError if a video has no label, or if no file exists."""
    videos = read_manifest(manifest, root, column)
    require_files(videos, manifest)
    for video in videos:
        if video.label is None:
            raise ManifestError(f"{manifest}: {video.name} has no label in the column {column!r}")
    return videos


def class_names(manifest: str, videos: Videos) -> list[str]:
    """The distinct labels, sorted: numbers first, by their value. ManifestError if all
    videos have the same label: then there is nothing to learn."""
    names = sorted({video.label for video in videos}, key=class_order)
    if len(names) == 1:
        raise ManifestError(f"{manifest}: all its videos have one label, {names[0]!r}")
    return names


def trained_classes(checkpoint: str, saved: dict, videos: Videos, say=print) -> list[str]:
    """The classes of a trained classifier, in the order of its outputs: the names that were saved
    with it. Other people's checkpoints may have no names, or the labels may not use them: then the
    labels are the numbers of the outputs.

    saved: what `checkpoints.saved_args` reads. ValueError if it has no names and the file holds no
    classifier."""
    names = saved.get("classes")
    if names is None:
        return [str(number) for number in range(head_classes(checkpoint))]
    is_huggingface = (settings_folder(Path(checkpoint)) / "config.json").is_file()
    labels = {video.label for video in videos}
    numbers = [str(number) for number in range(len(names))]
    if is_huggingface and labels.isdisjoint(names) and labels <= set(numbers):
        say(f"note: the labels are taken as numbers of the {len(names)} classes, not as names")
        return numbers
    return names


def class_order(name: str):
    """The sorting key of `class_names`: (kind, number, name). "10" comes after "9"; the name orders
    "1" and "01", which are the same number."""
    if name.isdecimal() and len(name) <= 4300:  # int() refuses more digits
        return 0, int(name), name
    return 1, 0, name


def number_labels(manifest: str, videos: Videos, names: list[str], say=print) -> torch.Tensor:
    """The class number of each video, int64 [N]: the place of its label in `names`, or -1 if it is
    not there; say(text) lists such labels. ManifestError if no label is there."""
    class_of = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([class_of.get(video.label, -1) for video in videos])
    if (labels < 0).all():
        known = list_names(names, 8)
        raise ManifestError(f"{manifest}: none of its labels is among the classes {known}")
    unknown = sorted({video.label for video in videos} - class_of.keys(), key=class_order)
    if unknown:
        say(
            f"{manifest}: classes that are not among the {len(names)} trained count as wrong: "
            f"{list_names(unknown, 20)}"
        )
    return labels


def labels_hash(videos: Videos) -> str:
    """16 hex digits that change when a row's path, start, end or label does."""
    digest = hashlib.sha256(manifest_hash(videos).encode())
    for video in videos:
        digest.update(json.dumps(video.label).encode() + b"\n")
    return digest.hexdigest()[:16]
