"""Names of classes as texts: PREFIX.classes.npy, which saliency.py --cue classes writes and with
which linprobe.py compares videos. Needs arrays.py, clip.py, manifest.py, offline.py and run.py.

    names = read_names("data/val.objects.txt")
    array = embed_names(model, tokenizer, names, ["a video of {}."], device)   float16 [C, D]
    classes, about = open_classes(path, "python saliency.py ...")              float32 [C, D]

Row i is line i of the file of names. The .json beside the array holds the names, a hash of their
file, the prompts, and what else embedded them.

Shapes: C classes, P prompts, D embedding.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tgm.arrays import (
    UNREADABLE,
    file_hash,
    hold,
    load_array,
    make_it_with,
    map_array,
    read_about,
    refuse_foreign_array,
    refuse_held,
    refuse_other_origin,
    write_about,
    written_aside,
)
from tgm.clip import clip_settings, embed_texts, load_clip
from tgm.manifest import ManifestError
from tgm.offline import Machine, autocast
from tgm.run import RunError


def read_names(path: str | Path) -> list[str]:
    """The lines of a text file, stripped; blank lines may stand at its end. RunError for a file
    that cannot be read, one without names, and an empty or repeated name."""
    try:
        # utf-8-sig skips the byte order mark that Excel writes. splitlines() would also break lines
        # at rare characters, such as U+2028, which may be part of a name.
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except OSError as error:
        raise RunError(f"--classes {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RunError(f"--classes {path}: expected UTF-8 text, a class name per line") from None
    number_of = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            raise RunError(f"--classes {path}:{number}: expected a class name, found none")
        if name in number_of:
            raise RunError(
                f"--classes {path}:{number}: {name!r} is in line {number_of[name]} already"
            )
        number_of[name] = number
    return list(number_of)


def embed_names(
    model: torch.nn.Module,
    tokenizer: Callable,
    names: Sequence[str],
    prompts: Sequence[str],
    device: torch.device | str,
) -> np.ndarray:
    """The mean of a class's texts, which are the prompts with its name in the place of {}: float16
    [C, D], unit length."""
    texts_of_class = {}
    for name in names:
        texts_of_class[name] = [prompt.replace("{}", name) for prompt in prompts]
    embedded = embed_texts(model, tokenizer, chain.from_iterable(texts_of_class.values()), device)
    means = []
    for texts in texts_of_class.values():
        means.append(torch.stack([embedded[text] for text in texts]).mean(0))
    return F.normalize(torch.stack(means), dim=-1).half().numpy()


def make_classes(
    path: Path,
    names_file: str,
    prompts: Sequence[str],
    clip: str,
    pretrained: str,
    machine: Machine,
    resume: str,
) -> None:
    """Embeds the names in a file and writes the array; all of saliency.py --cue classes. For one
    process. clip, pretrained: as for `load_clip`."""
    names = read_names(names_file)
    model, tokenizer = load_clip(clip, pretrained, None, machine.device)
    settings = clip_settings(clip, pretrained, model)
    settings |= {"prompts": prompts, "classes": file_hash(names_file), "names": names}
    if claim_classes(path, settings, resume):
        with autocast(machine):
            array = embed_names(model, tokenizer, names, prompts, machine.device)
        for name, row in zip(names, array, strict=True):
            if not np.isfinite(row).all():
                raise RunError(f"--clip {clip}: embeds {name!r} with numbers that are not finite")
        write_classes(path, array, settings)
    print(f"{path}: {len(names)} classes, {len(prompts)} prompts, {clip}")


def claim_classes(path: Path, settings: dict, resume: str) -> bool:
    """Whether the array at `path` is still to be made; holds its lock. ManifestError if another
    program's file has that name or, unless resume is "none", an array of other settings, or a
    damaged one."""
    refuse_foreign_array(path)
    hold(path)
    about = read_about(path.with_suffix(".json"))
    if resume == "none" or about is None or not path.exists():
        return True
    refuse_other_origin(path, (), about, settings, is_made=bool)  # no videos: is_made is not asked
    try:
        map_array(path)
    except (OSError, *UNREADABLE) as error:
        raise ManifestError(f"{path}: cannot be read ({error}); --resume none remakes it") from None
    return False


def write_classes(path: Path, array: np.ndarray, settings: dict) -> None:
    """Writes the array, if `claim_classes` said that it is to be made, and its .json."""
    # In this order a kill or a full disk leaves a .json alone, or no file: then the array is to be
    # made. An array alone would count as somebody else's, and the old array beside the new .json
    # as one of the new settings.
    path.unlink(missing_ok=True)
    write_about(path.with_suffix(".json"), settings | {"shape": list(array.shape)})
    # not np.save, which does not tell why a disk refuses to be written to
    header = np.lib.format.header_data_from_array_1_0(array)
    with written_aside(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())


def open_classes(path: Path, remedy: str) -> tuple[np.ndarray, dict]:
    """-> (the embeddings, float32 [C, D]; the contents of the .json, "names" among them).
    ManifestError, ending in "make it with: {remedy}", if the array is missing or damaged."""
    refuse_held(path)
    array, about = load_array(path, remedy)
    names = about.get("names", ())
    if array.ndim != 2 or about.get("shape") != list(array.shape) or len(names) != len(array):
        raise make_it_with(path, "is no array of classes, or damaged", f"{remedy} --resume none")
    return array.astype(np.float32), about
