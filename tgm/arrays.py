"""Arrays and captions that stand beside a manifest: row i of every array belongs to row i of the
manifest. Needs numpy and manifest.py.

    text, about = open_array("data/train.text.npy", videos, remedy="python saliency.py")

Arrays are memory-mapped .npy files, pre-filled with NaN; a row of NaN is not made yet, or its video
failed. The .json beside each array, `about` in the code, tells what made it, so that a stale file
is refused. For train.text.npy it is train.text.json, with entries such as

    manifest, videos    a hash of the manifest's rows, and their number
    files               the sizes of up to 100 of the videos
    captions            a hash of the captions
    shape               [N, K, D]
    clip, weights, ...  the settings

Whoever writes a file holds its lock (FILE.lock) meanwhile.

Shapes: N rows of the manifest, K parts of a row, such as one per caption.

Parts: locks; files that are not ours; the .json; reading; writing.
"""

import atexit
import contextlib
import csv
import errno
import hashlib
import itertools
import json
import os
import sys
import time
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

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
    manifest_hash,
    renewed_sizes,
)

HELD = []  # open lock files of this process
PATIENCE = 0.3  # seconds in which a lock that is taken is tried again
# errors of a file system without locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
BLOCK = 1 << 24  # bytes of an array written at once
# entries of a .json that are hashes, which tell a user nothing ("manifest" is one, too)
HASHES = ("captions", "classes", "weights")
DERIVED = ("videos", "shape", "names")  # entries that follow from others
NEWER = ("weights",)  # entries that an older .json may lack: then they are not compared
# What a damaged file raises: ValueError from json and numpy, the others from numpy, which parses an
# array's header as Python.
UNREADABLE = (ValueError, EOFError, SyntaxError, tokenize.TokenError)


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
        # hashlib.file_digest needs Python 3.11
        pieces = iter(lambda: file.read(1 << 20), b"") if lines is None else file
        for piece in itertools.islice(pieces, lines):
            digest.update(piece)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def written_aside(path: FilePath, mode: str = "w") -> Iterator[IO]:
    """Opens PATH.new to be written, and renames it to `path` at the end, so that `path` is never
    half-written. Makes the folder if needed. mode: "w" for UTF-8 text, "wb" for bytes.

    ManifestError if it cannot be written, such as on a full disk; then `path` stays as it was."""
    aside = Path(f"{path}.new")
    as_text = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, **as_text) as file:
            yield file
        aside.replace(path)
    except BaseException as error:  # also a signal: PATH.new may be gigabytes
        with contextlib.suppress(OSError):  # on a read-only disk this fails as well
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ManifestError(f"{path}: cannot be written ({error.strerror})") from None
        raise


# ---- locks ---------------------------------------------------------------------------------------


def hold(path: FilePath, elsewhere: str = "write elsewhere (--out)") -> None:
    """Keeps other processes from writing `path` until `release` or until this process ends, by a
    lock on PATH.lock. ManifestError if another process has the lock, or if PATH.lock cannot be
    written. A kill leaves the file PATH.lock, but not the lock. On a file system without locks,
    nothing is locked, and a line says so.

    elsewhere: how the user writes to another place, for the messages"""
    if fcntl is None:
        return
    lock = os.path.abspath(f"{path}.lock")
    latest = time.monotonic() + PATIENCE
    try:
        while True:
            file = open(lock, "a")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Another process writes, or asks by `is_held`, which takes no time.
                file.close()
                if time.monotonic() > latest:
                    raise
                time.sleep(0.02)
                continue
            if is_open_as(file, lock):
                HELD.append(file)
                return
            # Between open and lockf the process that held the lock removed the file: what is locked
            # here is the removed file, which others cannot see. Try again.
            file.close()
    except BlockingIOError:
        raise ManifestError(
            f"{path}: another process is writing it: wait for its end, or {elsewhere}"
        ) from None
    except OSError as error:
        if not os.path.exists(lock):
            raise ManifestError(f"{lock}: cannot be made ({error.strerror}): {elsewhere}") from None
        if error.errno not in NO_LOCKS:
            raise ManifestError(
                f"{lock}: cannot be locked ({error.strerror}): delete it if nothing writes "
                f"{path}, or {elsewhere}"
            ) from None
        print(
            f"{path}: this file system has no locks: start nothing else that writes this file",
            file=sys.stderr,
        )


def is_open_as(file, path):
    """Whether an open file is the one that has the name `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@atexit.register
def release() -> None:
    """Gives up every lock of this process; so does its end."""
    while HELD:
        file = HELD.pop()
        if is_open_as(file, file.name):  # else it was deleted, and may be another process's by now
            Path(file.name).unlink(missing_ok=True)
        file.close()


def is_held(path: FilePath) -> bool:
    """Whether another process holds `path`."""
    lock = f"{path}.lock"
    if fcntl is None or any(is_open_as(file, lock) for file in HELD):
        # A lock of this process must not be tried. POSIX locks belong to the process: closing any
        # open file of PATH.lock ends it.
        return False
    try:
        with open(lock) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file: nobody holds it; or no locks
        pass
    return False


def refuse_held(path: FilePath) -> None:
    """ManifestError while another process holds `path`."""
    if is_held(path):
        raise ManifestError(f"{path}: another process is writing it: wait for its end")


# ---- files that are not ours ---------------------------------------------------------------------


def refuse_foreign(
    path: FilePath, is_ours: Callable[[Path], bool], remedy: str = "--out writes elsewhere"
) -> None:
    """ManifestError if there is a file at `path` that must not be overwritten: it is not empty, and
    is_ours(path) says no. An OSError or an error of parsing in is_ours means no."""
    path = Path(path)
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder, where a file is to be written ({remedy})")
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        ours = is_ours(path)
    except (OSError, csv.Error, *UNREADABLE):
        ours = False
    if not ours:
        raise ManifestError(
            f"{path}: is there, and is none of the files that this command writes: "
            f"not overwritten ({remedy})"
        )


def refuse_foreign_array(path: Path) -> None:
    """ManifestError if `path` or the .json beside it exists and is not of an array of ours."""
    remedy = "--out writes elsewhere"
    if not path.with_suffix(".json").exists():
        remedy = f"it has no .json: if it is an old array, delete {path.name}; or {remedy}"
    refuse_foreign(path, is_array, remedy)
    refuse_foreign(path.with_suffix(".json"), is_about)


def is_about(path: Path) -> bool:
    """Whether this is a .json that tells what an array or captions were made of."""
    about = json.loads(path.read_text(encoding="utf-8"))
    # prompts: of the embedded class names, which have no manifest
    return isinstance(about, dict) and ("manifest" in about or "prompts" in about)


def is_array(path: Path) -> bool:
    """Whether this is an array as `create_array` makes it: it has a .json, or, as a kill may have
    left it, none and nothing but NaN (a thousand of its numbers are looked at).
    """
    with contextlib.suppress(OSError, ValueError):
        if is_about(path.with_suffix(".json")):
            return True
    array = map_array(path)
    if array.dtype.kind != "f":
        return False
    return bool(np.isnan(array.reshape(-1)[:: array.size // 1000 + 1]).all())


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
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
    with written_aside(path) as file:
        file.write("{\n" + lines + "\n}\n")


def rows_before_growth(videos: Sequence[Video], about: dict) -> int:
    """How many rows the manifest had when a file was made, if rows were only added at its end since
    then; else 0. about: the contents of the file's .json."""
    count = about.get("videos", 0)
    if not isinstance(count, int):  # edited by hand
        return 0
    if 0 < count < len(videos) and about.get("manifest") == manifest_hash(videos, count):
        return count
    return 0


# ---- reading -------------------------------------------------------------------------------------


def map_array(path: FilePath, mode: str = "r") -> np.memmap:
    """The array of a .npy file, memory-mapped. Refuses a file that holds pickled objects."""
    return np.lib.format.open_memmap(path, mode=mode)


def make_it_with(path, reason, remedy):
    """Returns the ManifestError of a file that cannot be read. Its text ends with the commands that
    make the file; error.remedy holds them for `text_commands`."""
    error = ManifestError(" ".join(f"{path}: {reason}; make it with: {remedy}".split()))
    error.remedy = remedy
    return error


def describe_growth(count, videos):
    """For messages: a file was made when the manifest had its first `count` rows only."""
    return f"has the first {count} of {len(videos)} rows of the manifest"


def open_array(
    path: FilePath, videos: Sequence[Video], remedy: str, **expect
) -> tuple[np.ndarray, dict]:
    """Open a companion array: -> (read-only memory map [N, ...] of floats, the contents of the
    .json beside it).

    ManifestError while another process writes the array. ManifestError, ending in "make it with:
    {remedy}", if the array
        is missing, unreadable or truncated,
        was made before rows were added to the manifest, or for another manifest,
        is not N rows [K, ...] of floats, or of another shape than its .json says,
        was made with other settings (`expect`: what its .json must hold, such as captions=hash),
        was made of videos that were replaced since (`describe_change`),
        was made by CLIP, and its .json does not say with which activation.
    `describe_gaps` says how many rows are made."""
    path = Path(path)
    refuse_held(path)
    array, about = load_array(path, remedy)
    count = rows_before_growth(videos, about)
    if count:
        raise make_it_with(path, describe_growth(count, videos), f"{remedy} --extend")
    # An array that is refused below cannot be continued. If the remedy is "python caption.py ... &&
    # python saliency.py ...", the flag is for the last command, which makes this array.
    make_again = f"{remedy} --resume none"
    if about.get("manifest") != manifest_hash(videos):
        raise make_it_with(path, "is of another manifest", make_again)
    shape = list(array.shape)
    if array.dtype.kind != "f" or array.ndim < 2 or len(array) != len(videos):
        reason = f"expected {len(videos)} rows of floats, found {array.dtype} of shape {shape}"
        raise make_it_with(path, reason, make_again)
    for key, value in {"shape": shape, **expect}.items():
        if about.get(key) != json.loads(json.dumps(value)):  # a tuple becomes a list, as there
            reason = f"expected {key} {value!r}, its .json says {about.get(key)!r}"
            raise make_it_with(path, reason, make_again)
    change = describe_change(videos, about, lambda row: is_filled(array[row]))
    if change:
        raise make_it_with(path, change, make_again)
    if "clip" in about and "activation" not in about:
        # 19 of open_clip's weights, OpenAI's among them, may have run with the wrong one
        raise make_it_with(path, "its .json does not tell CLIP's activation", make_again)
    return array, about


def load_array(path, remedy):
    """-> (read-only memory map, the contents of the .json), not checked against each other."""
    try:
        array = map_array(path)
        path.with_suffix(".json").read_bytes()  # the reason, if that fails
    except OSError as error:
        # of the array, or of the .json beside it
        of_json = "its .json " if error.filename and error.filename.endswith(".json") else ""
        reason = f"{of_json}cannot be read ({error.strerror or error})"
        if of_json and isinstance(error, FileNotFoundError):
            reason += f": delete {path.name}"  # see below
        raise make_it_with(path, reason, remedy) from None
    except UNREADABLE as error:
        reason = f"cannot be read ({error})"
        raise make_it_with(path, reason, f"{remedy} --resume none") from None
    about = read_about(path.with_suffix(".json"))
    if about is None:
        # Only the .json tells that an array is ours: without it, the commands do not overwrite it.
        reason = f"its .json is damaged: delete {path.name} and {path.stem}.json"
        raise make_it_with(path, reason, remedy)
    return array, about


def describe_gaps(path: FilePath, is_made: np.ndarray) -> str:
    """A line to print for an array of which some rows are not made, else "". is_made:
    `filled(array)`, bool [N].
    """
    made = np.count_nonzero(is_made)
    if made == len(is_made):
        return ""
    return (
        f"{path}: {made} of {len(is_made)} rows are made; "
        "the rest failed or are still to do, and are left out"
    )


def label_flags(about: dict) -> str:
    """The flags with which caption.py makes captions of labels again. about: the contents of their
    .json."""
    flags = "--labels"
    if about.get("label_column", "label") != "label":
        flags += f" --label-column {about['label_column']}"
    if about.get("classes"):
        flags += f" --classes {about['classes']}"
    return flags


def read_captions(path: FilePath, videos: Sequence[Video], remedy: str) -> list[list[str]]:
    """The captions that caption.py wrote: a list of strings for each row, empty where it failed.
    ManifestError while another process writes the file. ManifestError, ending in "make it with:
    {remedy}", where it is missing, damaged, of another manifest, or of videos that were replaced
    since.

    Paths are compared row by row, start and end by the hash in the .json beside it, and replaced
    videos by the sizes there. Captions that another program wrote may lack the .json: then only the
    paths are compared."""
    path = Path(path)
    about = read_about(path.with_suffix(".json"))
    of_labels = about is not None and about.get("model") == "labels"
    if of_labels:
        remedy = remedy.replace("caption.py", f"caption.py {label_flags(about)}", 1)
    refuse_held(path)
    from_start = f"{remedy} --resume none"
    names = []
    captions = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:  # not splitlines(), which also cuts at U+2028, inside a caption
                entry = json.loads(line)
                texts = entry["captions"]
                if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                    raise TypeError("its captions are no list of texts")
                names.append(entry["path"])
                captions.append(texts)
    except OSError as error:
        raise make_it_with(path, f"cannot be read ({error.strerror})", remedy) from None
    except KeyError as error:
        reason = f"is damaged (line {len(names) + 1}: no {error})"
        raise make_it_with(path, reason, remedy) from None
    except (ValueError, TypeError) as error:
        reason = f"is damaged (line {len(names) + 1}: {error})"
        raise make_it_with(path, reason, remedy) from None
    expected = [video.name for video in videos]
    if names != expected:
        if names and names == expected[: len(names)]:
            reason = describe_growth(len(names), videos)
            if of_labels:  # --labels makes all captions again, and takes no --extend
                if "label_column" not in about:  # an older file
                    reason += " (give --label-column and --classes as before)"
                raise make_it_with(path, reason, remedy)
            raise make_it_with(path, reason, f"{remedy} --extend")
        raise make_it_with(path, "is of another manifest", from_start)
    if about is None or "manifest" not in about:  # none, or one of another program
        return captions
    if about.get("manifest") != manifest_hash(videos):
        raise make_it_with(path, "is of another manifest (other start or end)", from_start)
    change = describe_change(videos, about, lambda row: bool(captions[row]))
    if change:
        raise make_it_with(path, change, from_start)
    return captions


def text_commands(manifest: FilePath, videos: Sequence[Video], out: str = "") -> str:
    """The commands that make a manifest's arrays of text and saliency. caption.py is one of them
    only if captions are missing or stale, and are not being written: its default model need not be
    the one that made them. out: " --out PREFIX" for arrays that are not the manifest's own."""
    saliency = f"python saliency.py --data {manifest}{out}"
    captions = companion(manifest, "captions.jsonl")
    if is_held(captions):
        return saliency
    try:
        read_captions(captions, videos, f"python caption.py --data {manifest}")
    except ManifestError as error:
        return f"{error.remedy} && {saliency}"
    return saliency


# ---- writing -------------------------------------------------------------------------------------


def origin(videos: Sequence[Video], count: int, settings: dict) -> dict:
    """What a .json says of a file made for the manifest's first `count` rows with `settings`."""
    return {"manifest": manifest_hash(videos, count), "videos": count} | settings


def rows_of_before(path: FilePath, videos: Sequence[Video], about: dict, extend: bool) -> int:
    """The number of rows of a file that is to be continued. If rows were added to the manifest
    since, these are the rows that it had, with `extend`; a ManifestError without. In all other
    cases they are len(videos), also for a file of another manifest: call `refuse_other_origin`
    next. about: the contents of the .json."""
    count = rows_before_growth(videos, about)
    if count and not extend:
        raise ManifestError(f"{path}: {describe_growth(count, videos)}: --extend adds the rest")
    return count or len(videos)  # not grown, or of another manifest


def describe_setting(key: str, about: dict, expected: dict) -> str:
    """An entry of a .json that is not what is expected, for a message."""
    if key == "manifest":
        return "another manifest"
    text = f"{key} {about.get(key)!r}, not {expected[key]!r}"
    return f"other {key}" if key in HASHES or len(text) > 100 else text


def refuse_other_origin(
    path: FilePath,
    videos: Sequence[Video],
    about: dict,
    expected: dict,
    is_made: Callable[[int], bool],
) -> None:
    """ManifestError unless a file can be continued: its .json, `about`, says what is expected, and
    no video of a row that is made was replaced since. Entries of NEWER may be missing."""
    as_saved = json.loads(json.dumps(expected))  # a tuple becomes a list, as there
    about = {key: as_saved.get(key) for key in NEWER} | about
    different = [key for key, value in as_saved.items() if about.get(key) != value]
    if different:
        causes = [key for key in different if key not in DERIVED] or different
        changes = "; ".join(describe_setting(key, about, as_saved) for key in causes)
        raise ManifestError(
            f"{path}: made with {changes}: give the earlier settings again, or --resume none "
            "remakes it"
        )
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
    """Makes or keeps a float16 array [len(videos), *shape] at `path`, and holds its lock. New rows
    are NaN; `open_rows` maps the array to fill them in. For one process, rank 0.

    resume: "none" always makes a new array. "auto" keeps one that exists with its .json, and is an
        error if the manifest has grown since; an array without a .json, which a kill left before
        any row was filled in, is made again. "extend" is like "auto", but adds the new rows if the
        manifest has grown. An array that is kept must be of the same settings and captions, and
        none of its rows of a video that was replaced since; else a ManifestError says how to
        remake it.
    settings, captions: what the .json says besides the manifest; of the captions' file, a hash of
    the lines that the array depends on."""

    def about_rows(count):
        of_captions = {} if captions is None else {"captions": file_hash(captions, count)}
        return origin(videos, count, of_captions | settings | {"shape": [count, *shape]})

    def create(head=None):
        about = about_rows(len(videos)) | {"files": renewed_sizes(videos, old or {})}
        create_array(path, (len(videos), *shape), np.float16, about, head)

    refuse_foreign_array(path)
    hold(path)
    about_path = path.with_suffix(".json")
    old = None
    if resume != "none" and path.exists():
        old = read_about(about_path)
    if old is None:
        create()
        return
    count = rows_of_before(path, videos, old, extend=resume == "extend")
    array = open_rows(path)
    # A kill may have left an array that has the new rows already, and the .json of the old ones.
    has_grown = count < len(videos) and list(array.shape) == [len(videos), *shape]
    as_said = has_grown or list(array.shape) == old.get("shape")
    if array.dtype != np.float16 or not as_said:
        raise ManifestError(f"{path}: is not as its .json says; --resume none remakes it")
    refuse_other_origin(path, videos, old, about_rows(count), lambda row: is_filled(array[row]))
    if count < len(videos):
        create(array[:count])
        return
    files = renewed_sizes(videos, old)
    if old.get("files") != files:
        # files that were missing or broken when they were tried are there now
        write_about(about_path, old | {"files": files})


def create_array(
    path: Path, shape: Sequence[int], dtype, about: dict, head: np.ndarray | None = None
) -> None:
    """Writes an array of NaN, after its first rows `head` if given, and then `about` and the shape
    to the .json beside it. ManifestError if it cannot be written: NaN takes all the space that the
    array needs, so a full disk is noticed here, not while rows are filled in."""
    about_path = path.with_suffix(".json")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    empty = np.full(shape[1:], np.nan, dtype).tobytes()
    rows = max(1, BLOCK // max(1, len(empty)))  # written at once
    kept = 0 if head is None else len(head)
    with written_aside(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, kept, rows):
            file.write(head[start : start + rows].tobytes())
        for start in range(kept, shape[0], rows):
            file.write(empty * min(rows, shape[0] - start))
        if head is None:
            file.flush()  # a full disk must not cost the .json of the old array
            # A kill before the new .json is written must not leave the old one beside a new array.
            # With `head` the old .json is still right about the first rows: --extend goes on.
            about_path.unlink(missing_ok=True)
    write_about(about_path, about | {"shape": list(shape)})


def open_rows(path: FilePath) -> np.memmap:
    """An array of ours, mapped, to fill rows in; ManifestError if it is damaged or cannot be
    written to.
    """
    try:
        return map_array(path, "r+")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be opened to write ({error.strerror})") from None
    except UNREADABLE as error:
        raise ManifestError(f"{path}: cannot be read ({error}); --resume none remakes it") from None


def fill(array: np.ndarray, row: int, value: np.ndarray) -> None:
    """Writes value[K - 1], ..., value[0] to array[row], in this order, each from its front to its
    end. `filled` looks at the end of part 0, so it tells a row from half of one.
    """
    for part in reversed(range(len(value))):
        array[row, part] = value[part]


def filled(array: np.ndarray) -> np.ndarray:
    """Which rows of an array [N, K, ...] `fill` has written, bool [N]."""
    # array[:, 0, -1, ..., -1]: the number of each row that is written last
    written_last = (slice(None), 0) + (-1,) * (array.ndim - 2)
    return ~np.isnan(array[written_last])


def is_filled(row: np.ndarray) -> bool:
    """`filled` of a single row [K, ...]."""
    return bool(filled(row[None])[0])
