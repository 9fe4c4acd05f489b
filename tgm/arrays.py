"""Arrays and captions that stand beside a manifest: row i of every array is line i of the manifest.
Needs numpy and manifest.py.

    text, about = open_array("data/train.text.npy", videos, remedy="python saliency.py")

Arrays are memory-mapped .npy files, pre-filled with NaN; a row that stays NaN is a video that
failed. The .json beside each array holds what made it and a hash of the manifest's rows, so that a
stale file is refused. Whoever writes a file holds its lock (FILE.lock) meanwhile.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None
import numpy as np

from tgm.manifest import (
    ManifestError,
    changed_rows,
    describe_change,
    file_sizes,
    manifest_hash,
    renewed_sizes,
)

HELD = []  # open lock files of this process


def grown_from(videos, about):
    """Of how many rows a file was made whose .json is `about`, if rows were added at the
    manifest's end since; else 0.
    """
    count = about.get("videos", 0) if isinstance(about, dict) else 0
    return (
        count
        if 0 < count < len(videos) and about.get("manifest") == manifest_hash(videos[:count])
        else 0
    )


def file_hash(path, lines=None):
    """16 hex digits that change with the file's contents, or with those of its first `lines`
    lines.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in (
            iter(lambda: file.read(1 << 20), b"")
            if lines is None
            else itertools.islice(file, lines)
        ):
            digest.update(block)
    return digest.hexdigest()[:16]


def companion(manifest, kind):
    """The file of that kind beside a manifest: companion("data/train.csv", "text.npy") is
    data/train.text.npy.
    """
    return Path(manifest).with_suffix(f".{kind}")


def hold(path):
    """Keeps other processes from writing `path` until `release` or until this one ends, however it
    ends: by a lock on PATH.lock, a file that is removed then. ManifestError if another process has
    it. Where locks do not work, nothing is locked."""
    lock = os.path.abspath(f"{path}.lock")
    try:
        while fcntl:
            file = open(lock, "a")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(lock) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                # not one just removed
                HELD.append(file)
                return
    except BlockingIOError:
        raise ManifestError(
            f"{path}: another process is writing it: wait for its end, or write elsewhere (--out)"
        ) from None
    except OSError:  # a file system without locks
        pass


@atexit.register
def release():
    """Lets go of all that this process holds; its end does, too."""
    while HELD:
        file = HELD.pop()
        Path(file.name).unlink(missing_ok=True)
        file.close()


def is_held(path):
    """Whether another process holds `path`."""
    try:
        with open(f"{path}.lock") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):  # nobody, or no locks
        pass
    return False


def refuse_foreign(path, is_ours, remedy="--out writes elsewhere"):
    """ManifestError if there is something at `path` that is_ours(path) does not know: it is not to
    be overwritten. An empty file may be. An OSError or an error of parsing in is_ours means no."""
    path = Path(path)
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder, where a file is to be written ({remedy})")
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        ours = is_ours(path)
    except (OSError, ValueError, EOFError, SyntaxError):
        ours = False
    if not ours:
        raise ManifestError(
            f"{path}: is there, and is none of the files that this command writes: not overwritten ({remedy})"
        )


def is_about(path):
    """Whether this is a .json that tells what an array or captions were made of."""
    about = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(about, dict) and "manifest" in about


def is_array(path):
    """Whether this is an array as `create_array` makes it, going by its .json or, as a kill may
    have left it without one, its header.
    """
    with contextlib.suppress(OSError, ValueError):
        if is_about(path.with_suffix(".json")):
            return True
    return np.lib.format.open_memmap(path, mode="r").dtype.kind == "f"  # never unpickles


def refuse_foreign_array(path):
    """ManifestError if `path` or the .json beside it is there and is not an array's of ours."""
    refuse_foreign(path, is_array)
    refuse_foreign(path.with_suffix(".json"), is_about)


def write_about(path, about):
    """Writes a .json, one entry a line, aside and renamed."""
    aside = path.with_name(path.name + ".new")
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
    try:
        aside.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ManifestError(f"{path}: cannot be written ({error.strerror})") from None


def open_array(path, videos, remedy, **expect):
    """Open a companion array: -> (read-only memory map [N, ...] of floats, the contents of the
    .json beside it).

    Refused, as a ManifestError that ends in "make it with: {remedy}": missing, unreadable or
    truncated; not N rows of floats or not the "shape" its .json says; of another manifest
    ("manifest" is not manifest_hash(videos)); made with other settings (`expect`: values the .json
    must hold, such as captions=hash); of videos that were replaced since (`changed_rows`); or by
    CLIP with an activation that the .json does not tell. And, while another process writes it.
    `describe_gaps` says how many rows are made."""
    path = Path(path)

    def fail(reason, remedy=remedy):
        raise ManifestError(" ".join(f"{path}: {reason}; make it with: {remedy}".split()))

    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except OSError as error:
        fail(
            f"{os.path.basename(error.filename or path)} cannot be read ({error.strerror or error})"
        )
    except (ValueError, EOFError, SyntaxError) as error:
        fail(f"cannot be read ({error})")
    if not isinstance(meta, dict):
        fail("its .json holds no settings")
    if is_held(path):
        raise ManifestError(f"{path}: another process is writing it: wait for its end")
    if count := grown_from(videos, meta):
        fail(
            f"has the first {count} of {len(videos)} rows of the manifest",
            again(remedy, "--extend"),
        )
    if meta.get("manifest") != manifest_hash(videos):
        fail("is of another manifest")
    if array.dtype.kind != "f" or array.ndim == 0 or len(array) != len(videos):
        fail(
            f"expected {len(videos)} rows of floats, found {array.dtype} of shape {list(array.shape)}"
        )
    for key, value in {"shape": list(array.shape), **expect}.items():
        if meta.get(key) != json.loads(json.dumps(value)):
            fail(f"expected {key} {value!r}, its .json says {meta.get(key)!r}")
    if changed := {
        row: sizes
        for row, sizes in changed_rows(videos, meta).items()
        if filled(array[row : row + 1])[0]
    }:
        fail(describe_change(videos, changed), again(remedy, "--resume none"))
    if "clip" in meta and "activation" not in meta:
        # Of a time when 19 of open_clip's weights, OpenAI's among them, ran with the wrong one.
        fail("its .json does not tell CLIP's activation", f"{remedy} --resume none")
    return array, meta


def again(remedy, flag):
    """A remedy's commands, each with one flag more."""
    return " && ".join(f"{command} {flag}" for command in remedy.split(" && "))


def describe_gaps(path, there):
    """A line to print for an array of which some rows are not made, else "". there:
    `filled(array)`, bool [N].
    """
    made = int(np.sum(there))
    if made == len(there):
        return ""
    return f"{path}: {made} of {len(there)} rows are made; the rest failed or are still to do, and are left out"


def read_captions(path, videos, remedy):
    """The captions that caption.py wrote: a list of strings for each row, empty where it failed.
    ManifestError, ending in "make it with: {remedy}", where the file is missing, damaged, of
    another manifest, or of videos that were replaced since.

    Paths are compared row by row; start and end through the hash in the .json beside it, and
    replaced videos through the sizes there. Captions of other origin may lack the .json: then paths
    have to do."""
    path = Path(path)

    def fail(reason, remedy=remedy):
        raise ManifestError(" ".join(f"{path}: {reason}; make it with: {remedy}".split())) from None

    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        captions = [[str(text) for text in entry["captions"]] for entry in entries]
        names = [entry["path"] for entry in entries]
    except OSError as error:
        fail(f"cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError) as error:
        fail(f"is damaged ({error})")
    if names != [video.name for video in videos]:
        if names == [video.name for video in videos[: len(entries)]]:
            fail(
                f"has the first {len(entries)} of {len(videos)} rows of the manifest",
                again(remedy, "--extend"),
            )
        fail("is of another manifest", again(remedy, "--resume none"))
    about = read_about(path.with_suffix(".json"))
    if about is None:
        return captions
    if about.get("manifest") != manifest_hash(videos):
        fail("is of another manifest (other start or end)", again(remedy, "--resume none"))
    if changed := {
        row: sizes for row, sizes in changed_rows(videos, about).items() if captions[row]
    }:
        fail(describe_change(videos, changed), again(remedy, "--resume none"))
    return captions


def read_about(path):
    """What a .json of ours says, as a dict; None if it is missing, damaged or no dict."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def create_array(path, shape, dtype, about, head=None):
    """Writes an array of NaN, after its first rows `head` if given, and then `about` and the shape
    to the .json beside it. ManifestError if that is impossible, such as on a full disk: all its
    space is taken now, and none when rows are filled in."""
    about_path = path.with_suffix(".json")
    aside = path.with_name(path.name + ".new")
    kept = 0 if head is None else len(head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
            )
            for start in range(0, kept, 4096):
                file.write(head[start : start + 4096].tobytes())
            empty = np.full(shape[1:], np.nan, dtype).tobytes()
            for start in range(kept, shape[0], 4096):
                file.write(empty * min(4096, shape[0] - start))
        if head is None:
            # an array without its json is not an array: a kill here leaves nothing half-made
            about_path.unlink(missing_ok=True)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a read-only disk this fails as well
            aside.unlink(missing_ok=True)
        raise ManifestError(f"{path}: cannot be written ({error.strerror})") from None
    write_about(about_path, about | {"shape": list(shape)})


def create_or_resume(path, videos, shape, about, resume, rank, barrier):
    """The float16 array [len(videos), *shape] at `path`, filled with NaN where it is new, writable,
    mapped, held by rank 0; `about`, a hash of the manifest and the sizes of some files land in the
    .json beside it.

    An array that is there must carry the same `about`, and no row of it may be of a video that was
    replaced since, else a ManifestError names the command that remakes it. resume: "none" starts
    again; "auto" goes on; "extend" also takes an array of the manifest's first rows, and adds the
    rest. An entry of `about` may be a function of the number of rows, to tell what it was for
    fewer."""
    if rank == 0:
        create_or_check(path, videos, shape, about, resume)
    barrier()
    return open_rows(path)


def create_or_check(path, videos, shape, about, resume):
    """`create_or_resume`, the part of rank 0."""

    def about_first(count):
        values = {key: value(count) if callable(value) else value for key, value in about.items()}
        return (
            {"manifest": manifest_hash(videos[:count]), "videos": count}
            | values
            | {"shape": [count, *shape]}
        )

    def write(head):
        create_array(
            path,
            (len(videos), *shape),
            np.float16,
            about_first(len(videos)) | {"files": file_sizes(videos)},
            head,
        )

    refuse_foreign_array(path)
    hold(path)
    old = read_about(path.with_suffix(".json")) if resume != "none" and path.exists() else None
    if old is None:
        return write(None)
    count = grown_from(videos, old)
    if count and resume != "extend":
        raise ManifestError(
            f"{path}: has the first {count} of {len(videos)} rows of the manifest: --extend computes the rest"
        )
    expected = about_first(count or len(videos))
    if different := [key for key in expected if old.get(key) != expected[key]]:
        raise ManifestError(
            f"{path}: made with another {', '.join(different)}; --resume none remakes it"
        )
    array = open_rows(path)
    changed = changed_rows(videos, old)
    if stale := {row: sizes for row, sizes in changed.items() if filled(array[row : row + 1])[0]}:
        raise ManifestError(f"{path}: {describe_change(videos, stale)}; --resume none remakes it")
    if count:
        return write(array[:count])
    files = renewed_sizes(videos, old)
    if old.get("files") != files:
        # files that were missing or broken when they were tried have been put in
        write_about(path.with_suffix(".json"), old | {"files": files})


def fill(array, row, value):
    """Writes value [K, ...] to the first K of array[row], the first of them last, so that
    `filled` tells a row from half of one.
    """
    for part in reversed(range(len(value))):
        array[row, part] = value[part]


def filled(array):
    """Which rows of an array [N, K, ...] `fill` has written, bool [N]."""
    return ~np.isnan(array[(slice(None), 0) + (-1,) * (array.ndim - 2)])


def open_rows(path):
    """An array of ours, mapped, to fill rows in; ManifestError if it is damaged or cannot be
    written to.
    """
    try:
        return np.load(path, mmap_mode="r+", allow_pickle=False)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be opened to write ({error.strerror})") from None
    except (ValueError, EOFError, SyntaxError) as error:
        raise ManifestError(f"{path}: cannot be read ({error}); --resume none remakes it") from None
