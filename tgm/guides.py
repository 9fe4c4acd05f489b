"""What pretrain.py reads beside the videos: the arrays of captions, saliency and motion, and which
videos have a row in each. Needs masking.py; of this folder arrays.py and manifest.py.

    videos, rows, arrays, identity = open_data("data/train.csv", "text", nce_weight=1.0)
"""

import hashlib
from pathlib import Path

import numpy as np

import masking
from tgm.arrays import companion, file_hash, filled, open_array, text_commands
from tgm.manifest import ManifestError, Videos, manifest_hash, read_manifest


def open_data(
    manifest: str,
    mask_name: str,
    nce_weight: float,
    root: str | None = None,
    companions: str | None = None,
) -> tuple[Videos, np.ndarray, dict, dict]:
    """-> videos of the manifest, rows to train on, the arrays of `open_arrays`, identity.

    identity: {name: fingerprint or None}, such as {"data/train.csv": its hash}. The checkpoint
    holds it, and a run goes on only if it is the same. companions: --companions. ManifestError if a
    file is missing or of another manifest, or if no video has a row in every array."""
    videos = read_manifest(manifest, root)
    prefix = Path(companions or Path(manifest).with_suffix(""))
    arrays = open_arrays(manifest, prefix, videos, mask_name, nce_weight)
    used = []
    usable = np.ones(len(videos), bool)
    identity = {manifest: manifest_hash(videos)}
    for kind, array in arrays.items():
        path = Path(f"{prefix}.{kind}.npy")
        identity[str(path)] = None
        if array is not None:
            used.append(str(path))
            usable &= filled(array)
            # small, and says what the array was made from
            identity[str(path)] = file_hash(path.with_suffix(".json"))
    rows = np.flatnonzero(usable)
    if len(rows) == 0:
        raise ManifestError(
            f"{manifest}: none of the {len(videos)} videos has a row in {' and '.join(used)}; what "
            "caption.py or saliency.py printed says why"
        )
    identity["usable videos"] = f"{len(rows)} ({hashlib.sha256(rows).hexdigest()[:16]})"
    return videos, rows, arrays, identity


def open_arrays(
    manifest: str, prefix: Path, videos: Videos, mask_name: str, nce_weight: float
) -> dict[str, np.ndarray | None]:
    """The arrays PREFIX.*.npy that the method needs: {"text", "saliency", "motion": a mapped array
    or None}. ManifestError says which command makes one that is missing or stale."""
    needed = masking.NEEDS[mask_name]
    captions = companion(manifest, "captions.jsonl")
    expected = {}  # what the .json of the text arrays must say
    out_flag = ""
    if prefix.absolute() != Path(manifest).with_suffix("").absolute():
        out_flag = f" --out {prefix}"  # their captions may be in any file: they are not compared
    elif captions.exists():  # if they were made again, the arrays are stale
        expected = {"captions": file_hash(captions)}
    command = text_commands(manifest, videos, out_flag)
    arrays = {"text": None, "saliency": None, "motion": None}
    if needed == "saliency":
        arrays["saliency"], _ = open_array(f"{prefix}.saliency.npy", videos, command, **expected)
    if needed == "motion":
        motion_command = f"python saliency.py --data {manifest}{out_flag} --cue motion"
        arrays["motion"], _ = open_array(f"{prefix}.motion.npy", videos, motion_command)
    text = Path(f"{prefix}.text.npy")
    if nce_weight > 0 or text.exists():  # with weight 0 it is used if it is there
        try:
            arrays["text"], _ = open_array(text, videos, command, **expected)
        except ManifestError as error:
            if needed == "saliency":
                raise
            remedy = "train without captions: --nce-weight 0"
            if text.exists():
                remedy = f"move {text} away and train without captions: --nce-weight 0"
            raise ManifestError(f"{error}; or {remedy}") from None
    return arrays
