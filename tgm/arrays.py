"""Arrays and captions that stand beside a manifest: row i of every array is line i of the manifest.
Needs numpy and manifest.py.

    text, about = open_array("data/train.text.npy", videos, remedy="python saliency.py")

Arrays are memory-mapped .npy files, pre-filled with NaN; a row that stays NaN is a video that
failed. The .json beside each array holds what made it and a hash of the manifest's rows, so that a
stale file is refused. Whoever writes a file holds its lock (FILE.lock) meanwhile.

Three parts: locks, and files that are not ours; reading; writing.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None
import numpy as np

from tgm.manifest import (
    FilePath,
    ManifestError,
    Video,
    describe_change,
    file_sizes,
    manifest_hash,
    renewed_sizes,
)

HELD = []  # open lock files of this process
CHUNK = 1 << 20  # bytes read at once
ROWS = 4096  # rows of an array written at once
UNREADABLE = (ValueError, EOFError, SyntaxError)  # what numpy and json raise for damaged files


def companion(manifest: FilePath, kind: str) -> Path:
    """The file of that kind beside a manifest: companion("data/train.csv", "text.npy") is
    data/train.text.npy.
    """
    return Path(manifest).with_suffix(f".{kind}")


def file_hash(path: FilePath, lines: int | None = None) -> str:
    """16 hex digits that change with the file's contents, or with those of its first `lines`
    lines.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if lines is None:
            while block := file.read(CHUNK):
                digest.update(block)
        else:
            for line in itertools.islice(file, lines):
                digest.update(line)
    return digest.hexdigest()[:16]


# ---- locks ---------------------------------------------------------------------------------------


def hold(path: FilePath) -> None:
    """Keeps other processes from writing `path` until `release` or until this one ends, however it
    ends: by a lock on PATH.lock, a file that is removed then. ManifestError if another process has
    it. Where locks do not work, nothing is locked."""
    if fcntl is None:
        return
    lock = os.path.abspath(f"{path}.lock")
    try:
        while True:
            file = open(lock, "a")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_open_as(file, lock):
                HELD.append(file)
                return
            file.close()  # its holder removed it before it was locked here: try again
    except BlockingIOError:
        raise ManifestError(
            f"{path}: another process is writing it: wait for its end, or write elsewhere (--out)"
        ) from None
    except OSError:  # a file system without locks
        pass


def is_open_as(file, path):
    """Whether an open file is the one that stands at `path` by now."""
    return os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


@atexit.register
def release() -> None:
    """Lets go of all that this process holds; its end does, too."""
    while HELD:
        file = HELD.pop()
        Path(file.name).unlink(missing_ok=True)
        file.close()


def is_held(path: FilePath) -> bool:
    """Whether another process holds `path`."""
    if fcntl is None:
        return False
    try:
        with open(f"{path}.lock") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file: nobody holds it; or no locks
        pass
    return False


# ---- files that are not ours ---------------------------------------------------------------------


def refuse_foreign(
    path: FilePath, is_ours: Callable[[Path], bool], remedy: str = "--out writes elsewhere"
) -> None:
    """ManifestError if there is something at `path` that is_ours(path) does not know: it is not to
    be overwritten. An empty file may be. An OSError or an error of parsing in is_ours means no."""
    path = Path(path)
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder, where a file is to be written ({remedy})")
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        ours = is_ours(path)
    except (OSError, *UNREADABLE):
        ours = False
    if not ours:
        raise ManifestError(
            f"{path}: is there, and is none of the files that this command writes: "
            f"not overwritten ({remedy})"
        )


def refuse_foreign_array(path: Path) -> None:
    """ManifestError if `path` or the .json beside it is there and is not an array's of ours."""
    refuse_foreign(path, is_array)
    refuse_foreign(path.with_suffix(".json"), is_about)


def is_about(path: Path) -> bool:
    """Whether this is a .json that tells what an array or captions were made of."""
    about = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(about, dict) and ("manifest" in about or "prompts" in about)


def is_array(path: Path) -> bool:
    """Whether this is an array as `create_array` makes it, going by its .json or, as a kill may
    have left it without one, its header.
    """
    with contextlib.suppress(OSError, ValueError):
        if is_about(path.with_suffix(".json")):
            return True
    return np.lib.format.open_memmap(path, mode="r").dtype.kind == "f"  # never unpickles


# ---- the .json beside a file ---------------------------------------------------------------------


def read_about(path: Path) -> dict | None:
    """What a .json of ours says; None if it is missing, damaged or no dict."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def write_about(path: Path, about: dict) -> None:
    """Writes a .json, one entry per line, aside and renamed. ManifestError if that fails."""
    aside = path.with_name(path.name + ".new")
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
    try:
        aside.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ManifestError(f"{path}: cannot be written ({error.strerror})") from None


def grown_from(videos: Sequence[Video], about: dict) -> int:
    """How many rows the manifest had when the file was made that `about`, its .json, tells of, if
    rows were only added at the end since; else 0."""
    count = about.get("videos", 0)
    if 0 < count < len(videos) and about.get("manifest") == manifest_hash(videos, count):
        return count
    return 0


# ---- reading -------------------------------------------------------------------------------------


def make_it_with(path, reason, remedy):
    """The ManifestError of a file that cannot be read, with the commands that make it."""
    return ManifestError(" ".join(f"{path}: {reason}; make it with: {remedy}".split()))


def with_flag(remedy, flag):
    """A remedy's commands, each with one flag more."""
    return " && ".join(f"{command} {flag}" for command in remedy.split(" && "))


def first_rows(count, videos):
    """The reason why a file is refused that was made before rows were added to the manifest."""
    return f"has the first {count} of {len(videos)} rows of the manifest"


def open_array(
    path: FilePath, videos: Sequence[Video], remedy: str, **expect
) -> tuple[np.ndarray, dict]:
    """Open a companion array: -> (read-only memory map [N, ...] of floats, the contents of the
    .json beside it).

    Refused, as a ManifestError that ends in "make it with: {remedy}": missing, unreadable or
    truncated; not N rows of floats or not the "shape" its .json says; of another manifest
    ("manifest" is not manifest_hash(videos)); made with other settings (`expect`: values the .json
    must hold, such as captions=hash); of videos that were replaced since (`changed_rows`); or by
    CLIP with an activation that the .json does not tell. And, while another process writes it.
    `describe_gaps` says how many rows are made."""
    path = Path(path)
    array, about = load_array(path, remedy)
    if is_held(path):
        raise ManifestError(f"{path}: another process is writing it: wait for its end")
    count = grown_from(videos, about)
    if count:
        raise make_it_with(path, first_rows(count, videos), with_flag(remedy, "--extend"))
    if about.get("manifest") != manifest_hash(videos):
        raise make_it_with(path, "is of another manifest", remedy)
    shape = list(array.shape)
    if array.dtype.kind != "f" or array.ndim == 0 or len(array) != len(videos):
        reason = f"expected {len(videos)} rows of floats, found {array.dtype} of shape {shape}"
        raise make_it_with(path, reason, remedy)
    for key, value in {"shape": shape, **expect}.items():
        if about.get(key) != json.loads(json.dumps(value)):
            reason = f"expected {key} {value!r}, its .json says {about.get(key)!r}"
            raise make_it_with(path, reason, remedy)
    change = describe_change(videos, about, lambda row: is_filled(array[row]))
    if change:
        raise make_it_with(path, change, with_flag(remedy, "--resume none"))
    if "clip" in about and "activation" not in about:
        # 19 of open_clip's weights, OpenAI's among them, may have run with the wrong one
        reason = "its .json does not tell CLIP's activation"
        raise make_it_with(path, reason, f"{remedy} --resume none")
    return array, about


def load_array(path, remedy):
    """-> (read-only memory map, the contents of the .json), not checked against each other."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except OSError as error:
        name = os.path.basename(error.filename or path)
        reason = f"{name} cannot be read ({error.strerror or error})"
        raise make_it_with(path, reason, remedy) from None
    except UNREADABLE as error:
        raise make_it_with(path, f"cannot be read ({error})", remedy) from None
    if not isinstance(about, dict):
        raise make_it_with(path, "its .json holds no settings", remedy)
    return array, about


def describe_gaps(path: FilePath, there: np.ndarray) -> str:
    """A line to print for an array of which some rows are not made, else "". there:
    `filled(array)`, bool [N].
    """
    made = int(np.sum(there))
    if made == len(there):
        return ""
    return (
        f"{path}: {made} of {len(there)} rows are made; "
        "the rest failed or are still to do, and are left out"
    )


def read_captions(path: FilePath, videos: Sequence[Video], remedy: str) -> list[list[str]]:
    """The captions that caption.py wrote: a list of strings for each row, empty where it failed.
    ManifestError, ending in "make it with: {remedy}", where the file is missing, damaged, of
    another manifest, or of videos that were replaced since.

    Paths are compared row by row; start and end through the hash in the .json beside it, and
    replaced videos through the sizes there. Captions of other origin may lack the .json: then paths
    have to do."""
    path = Path(path)
    about = read_about(path.with_suffix(".json"))
    of_labels = about is not None and about.get("model") == "labels"
    if of_labels:
        remedy = remedy.replace("caption.py", "caption.py --labels", 1)
    from_start = with_flag(remedy, "--resume none")
    names = []
    captions = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:  # not splitlines(), which also cuts at U+2028, inside a caption
                entry = json.loads(line)
                if not isinstance(entry["captions"], list):
                    raise TypeError(f"line {len(names) + 1}: its captions are no list")
                names.append(entry["path"])
                captions.append([str(text) for text in entry["captions"]])
    except OSError as error:
        raise make_it_with(path, f"cannot be read ({error.strerror})", remedy) from None
    except (ValueError, KeyError, TypeError) as error:
        raise make_it_with(path, f"is damaged ({error})", remedy) from None
    expected = [video.name for video in videos]
    if names != expected:
        if names == expected[: len(names)]:
            reason = first_rows(len(names), videos)
            if of_labels:  # --labels makes all captions again, and takes no --extend
                reason += " (give --label-column and --classes as before)"
                raise make_it_with(path, reason, remedy)
            raise make_it_with(path, reason, with_flag(remedy, "--extend"))
        raise make_it_with(path, "is of another manifest", from_start)
    if about is None:
        return captions
    if about.get("manifest") != manifest_hash(videos):
        raise make_it_with(path, "is of another manifest (other start or end)", from_start)
    change = describe_change(videos, about, lambda row: bool(captions[row]))
    if change:
        raise make_it_with(path, change, from_start)
    return captions


# ---- writing -------------------------------------------------------------------------------------


def origin(videos: Sequence[Video], count: int, settings: dict) -> dict:
    """What a .json says of a file made of the manifest's first `count` rows with `settings`."""
    return {"manifest": manifest_hash(videos, count), "videos": count} | settings


def rows_of_before(path: FilePath, videos: Sequence[Video], about: dict, extend: bool) -> int:
    """How many of the manifest's rows a file was made for that is gone on with: all of them, or
    fewer where rows were added at the end. The latter needs `extend`, else it is a ManifestError.
    about: the .json beside the file."""
    count = grown_from(videos, about)
    if count and not extend:
        raise ManifestError(f"{path}: {first_rows(count, videos)}: --extend adds the rest")
    return count or len(videos)


def refuse_other_origin(
    path: FilePath,
    videos: Sequence[Video],
    about: dict,
    expected: dict,
    is_made: Callable[[int], bool],
) -> None:
    """ManifestError unless a file can be gone on with: its .json, `about`, says what is expected,
    and no video of a row that is made was replaced since."""
    different = [key for key, value in expected.items() if about.get(key) != value]
    if different:
        names = ", ".join(different)
        raise ManifestError(f"{path}: made with another {names}; --resume none remakes it")
    change = describe_change(videos, about, is_made)
    if change:
        raise ManifestError(f"{path}: {change}; --resume none remakes it")


def ensure_array(
    path: Path,
    videos: Sequence[Video],
    shape: tuple[int, ...],
    settings: dict,
    resume: str,
    captions: FilePath | None = None,
) -> None:
    """Sees to it that there is a float16 array [len(videos), *shape] at `path` to fill in rows, NaN
    where it is new, and holds its lock. For one process, rank 0; `open_rows` maps the array.

    resume: "none" makes it again; "auto" goes on with one that is there; "extend" also takes one of
    the manifest's first rows, and adds the rest. The array must then be of the same settings and
    captions, and no row of it of a video that was replaced since; else a ManifestError says how to
    remake it.
    settings, captions: what the .json says besides the manifest; of the captions' file, a hash of
    the lines that the array depends on."""

    def about_rows(count):
        of_captions = {} if captions is None else {"captions": file_hash(captions, count)}
        return origin(videos, count, of_captions | settings | {"shape": [count, *shape]})

    def write(head):
        about = about_rows(len(videos)) | {"files": file_sizes(videos)}
        create_array(path, (len(videos), *shape), np.float16, about, head)

    refuse_foreign_array(path)
    hold(path)
    about_path = path.with_suffix(".json")
    old = None
    if resume != "none" and path.exists():
        old = read_about(about_path)
    if old is None:
        write(None)
        return
    count = rows_of_before(path, videos, old, extend=resume == "extend")
    array = open_rows(path)
    refuse_other_origin(path, videos, old, about_rows(count), lambda row: is_filled(array[row]))
    if count < len(videos):
        write(array[:count])
        return
    files = renewed_sizes(videos, old)
    if old.get("files") != files:
        # files that were missing or broken when they were tried have been put in
        write_about(about_path, old | {"files": files})


def create_array(
    path: Path, shape: Sequence[int], dtype, about: dict, head: np.ndarray | None = None
) -> None:
    """Writes an array of NaN, after its first rows `head` if given, and then `about` and the shape
    to the .json beside it. ManifestError if that is impossible, such as on a full disk: all its
    space is taken now, and none when rows are filled in."""
    about_path = path.with_suffix(".json")
    aside = path.with_name(path.name + ".new")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    kept = 0 if head is None else len(head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, kept, ROWS):
                file.write(head[start : start + ROWS].tobytes())
            empty = np.full(shape[1:], np.nan, dtype).tobytes()
            for start in range(kept, shape[0], ROWS):
                file.write(empty * min(ROWS, shape[0] - start))
        if head is None:
            # an array without its json is not an array: a kill here leaves nothing half-made
            about_path.unlink(missing_ok=True)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a read-only disk this fails as well
            aside.unlink(missing_ok=True)
        raise ManifestError(f"{path}: cannot be written ({error.strerror})") from None
    write_about(about_path, about | {"shape": list(shape)})


def open_rows(path: FilePath) -> np.memmap:
    """An array of ours, mapped, to fill rows in; ManifestError if it is damaged or cannot be
    written to.
    """
    try:
        return np.load(path, mmap_mode="r+", allow_pickle=False)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be opened to write ({error.strerror})") from None
    except UNREADABLE as error:
        raise ManifestError(f"{path}: cannot be read ({error}); --resume none remakes it") from None


def fill(array: np.ndarray, row: int, value: np.ndarray) -> None:
    """Writes value [K, ...] to the first K of array[row], the first of them last, so that
    `filled` tells a row from half of one.
    """
    for part in reversed(range(len(value))):
        array[row, part] = value[part]


def filled(array: np.ndarray) -> np.ndarray:
    """Which rows of an array [N, K, ...] `fill` has written, bool [N]."""
    written_last = (slice(None), 0) + (-1,) * (array.ndim - 2)
    return ~np.isnan(array[written_last])


def is_filled(row: np.ndarray) -> bool:
    """`filled` of a single row [K, ...]."""
    return bool(filled(row[None])[0])
