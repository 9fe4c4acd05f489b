"""Manifests, and the arrays and captions beside them: what is read, and every refusal."""

import errno
import json
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from tgm import arrays as A
from tgm import manifest as M
from tgm import prepare, preview


def manifest(tmp_path, text, **options):
    path = tmp_path / "train.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return M.read_manifest(path, **options)


def test_manifest(tmp_path):
    text = (
        "\ufeffpath,source,label,end,start\na b.mp4,x,running,2.5,1\n"
        '"c,d.mp4",y,,,\n/abs/e.mp4,z,"a ""b""",,3\n\n\n'
    )
    rows = list(manifest(tmp_path, text))
    assert rows == [
        M.Video(str(tmp_path / "a b.mp4"), "running", 1.0, 2.5, 0, "a b.mp4"),
        M.Video(str(tmp_path / "c,d.mp4"), None, None, None, 1, "c,d.mp4"),
        M.Video("/abs/e.mp4", 'a "b"', 3.0, None, 2, "/abs/e.mp4"),
    ]
    rows = manifest(tmp_path, text.replace("\n", "\r\n"), root="/videos", label_column="source")
    assert [row.path for row in rows] == ["/videos/a b.mp4", "/videos/c,d.mp4", "/abs/e.mp4"]
    assert [row.label for row in rows] == ["x", "y", "z"]
    assert manifest(tmp_path, "path\nx.mp4")[0][1:] == (None, None, None, 0, "x.mp4")
    rows = manifest(tmp_path, "path,label\nx.mp4, a dog\ny.mp4,a dog \nz.mp4, \n")
    assert [row.label for row in rows] == ["a dog", "a dog", None]


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ("", 1, "column 'path'"),
        ("label,start\nx,1\n", 1, "column 'path'"),
        ("path,path\na,b\n", 1, "one column 'path'"),
        ("path,label\n", 1, "at least one video"),
        ("path,label\na,x\nb\n", 3, "2 fields (path,label), found 1"),
        ("path\na\nb,c\n", 3, "1 fields"),
        ("path,label\na,x\n ,y\n", 3, "a path"),
        ("path\na\n\nb\n", 3, "1 fields"),
        ("path,start\na,x\n", 2, "start in seconds, 0 or more, found 'x'"),
        ("path,start\na,-1\n", 2, "found '-1'"),
        ("path,start\na,1_5\n", 2, "found '1_5'"),
        ("path,end\na,nan\n", 2, "end in seconds"),
        ("path,end\na,inf\n", 2, "end in seconds"),
        ("path,start,end\na,1,2\nb,2,2\n", 3, "end after start, found 2 to 2"),
        ("path,end\na,0\n", 2, "end after start"),
        (b"path\na\n\xff\xfe\n", 3, "UTF-8"),
        ('path\na\n"b"c\n', 3, "csv"),
    ],
)
def test_manifest_errors(tmp_path, text, line, reason):
    with pytest.raises(M.ManifestError) as error:
        manifest(tmp_path, text)
    message = str(error.value)
    assert (
        message.startswith(f"{tmp_path / 'train.csv'}:{line}: expected ")
        and reason in message
        and "\n" not in message
    )


def test_manifest_missing(tmp_path):
    with pytest.raises(
        M.ManifestError,
        match=r"none\.csv:1: .*path.*cannot be read \(No such file .*\) \(the toy world: python data/toy",
    ):
        M.read_manifest(tmp_path / "none.csv")
    with pytest.raises(M.ManifestError, match=r":1: .*path.*cannot be read \(Is a directory\)$"):
        M.read_manifest(tmp_path)
    with pytest.raises(M.ManifestError, match="train.csv:1: expected a column 'object'"):
        manifest(tmp_path, "path,label\na,x\n", label_column="object")


def test_manifest_hash(tmp_path):
    def digest(text):
        return M.manifest_hash(manifest(tmp_path, text))

    one = digest("path,label,start\na,x,1\nb,y,2\n")
    assert len(one) == 16 and int(one, 16)
    assert one == digest("path,start,more\na,1.0,\nb,2,\n")
    assert one == M.manifest_hash(manifest(tmp_path, "path,start\na,1\nb,2\n", root="/elsewhere"))
    others = [
        digest(text)
        for text in (
            "path,start\nb,2\na,1\n",
            "path,start\na,1\nb,3\n",
            "path,start\na,1\n",
            "path,end\na,1\nb,2\n",
            "path,end\na,1\nb,3\n",
            "path,start\na,1\nc,2\n",
        )
    ]
    assert len({one, *others}) == 7


@pytest.mark.skipif(sys.version_info < (3, 11), reason="csv refuses a zero byte before 3.11")
def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path):
    videos = manifest(tmp_path, "path\na\0b.mp4\n")
    assert M.file_sizes(videos) == [None]


def test_companion():
    assert A.companion("data/train.csv", "saliency.npy") == Path("data/train.saliency.npy")
    assert A.companion("data/v1.train.csv", "captions.jsonl") == Path(
        "data/v1.train.captions.jsonl"
    )


@pytest.fixture
def saved(tmp_path):
    videos = manifest(tmp_path, "path\na\nb\n")
    path = A.companion(tmp_path / "train.csv", "saliency.npy")
    np.save(path, np.arange(12, dtype=np.float16).reshape(2, 6))
    meta = {
        "manifest": M.manifest_hash(videos),
        "captions": None,
        "shape": [2, 6],
        "model": "clip",
        "flags": {},
    }
    path.with_suffix(".json").write_text(json.dumps(meta))
    return path, videos, meta


def test_open_array(saved):
    path, videos, meta = saved
    array, found = A.open_array(path, videos, "make me", captions=None, model="clip")
    assert found == meta and isinstance(array, np.memmap) and not array.flags.writeable
    assert array.dtype == np.float16 and array.tolist() == np.arange(12).reshape(2, 6).tolist()


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda path, meta: path.unlink(), "train.saliency.npy: cannot be read (No such file"),
        (
            lambda path, meta: path.with_suffix(".json").unlink(),
            "its .json cannot be read (No such file or directory): delete train.saliency.npy",
        ),
        (
            lambda path, meta: path.with_suffix(".json").write_text("{"),
            "its .json is damaged: delete train.saliency.npy and train.saliency.json",
        ),
        (
            lambda path, meta: path.with_suffix(".json").write_text("[]"),
            "its .json is damaged: delete train.saliency.npy and train.saliency.json",
        ),
        (lambda path, meta: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
        (lambda path, meta: path.write_bytes(path.read_bytes()[:9]), "cannot be read"),
        (lambda path, meta: path.write_bytes(b""), "cannot be read"),
        (
            lambda path, meta: path.write_bytes(path.read_bytes().replace(b"}", b" ")),
            "cannot be read (",
        ),
        (lambda path, meta: path.write_bytes(pickle.dumps([1, 2])), "cannot be read"),
        (
            lambda path, meta: np.save(path, np.array([{}, {}], object), allow_pickle=True),
            "cannot be read",
        ),
        (lambda path, meta: np.save(path, np.zeros((3, 6), np.float16)), "expected 2 rows"),
        (
            lambda path, meta: np.save(path, np.zeros((2, 6), np.int64)),
            "expected 2 rows of floats, found int64",
        ),
        (lambda path, meta: np.save(path, np.float16(1)), "expected 2 rows"),
        (lambda path, meta: np.save(path, np.zeros((2, 5), np.float16)), "expected shape [2, 5]"),
        (lambda path, meta: meta.update(manifest="0" * 16), "is of another manifest"),
        (
            lambda path, meta: meta.update(captions="beef"),
            "expected captions 'cafe', its .json says 'beef'",
        ),
    ],
)
def test_open_array_refusals(saved, spoil, reason):
    path, videos, meta = saved
    meta["captions"] = "cafe"
    kept = json.dumps(meta)
    path.with_suffix(".json").write_text(kept)
    spoil(path, meta)
    if json.dumps(meta) != kept:
        path.with_suffix(".json").write_text(json.dumps(meta))
    with pytest.raises(M.ManifestError) as error:
        A.open_array(path, videos, "python saliency.py --data data/train.csv", captions="cafe")
    message = str(error.value)
    assert reason in message and "\n" not in message
    remedy = "; make it with: python saliency.py --data data/train.csv"
    if ": delete " in reason:
        # saliency.py would not overwrite an array of which it cannot tell that it is ours
        with pytest.raises(M.ManifestError, match="is none of the files that this command writes"):
            A.refuse_foreign_array(path)
    elif "No such file" not in reason:
        remedy += " --resume none"  # without it, what is there would be refused
    assert message.endswith(remedy)


def test_an_array_that_is_being_written_is_not_called_missing(saved):
    path, videos, _ = saved
    path.with_suffix(".json").unlink()  # between the array and its .json
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tgm import arrays; "
        "arrays.hold(sys.argv[2]); print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(ROOT), str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(M.ManifestError, match="another process is writing it: wait for its"):
            A.open_array(path, videos, "make me")
        holder.communicate(b"\n")


# ---- locks


def test_a_lock_that_cannot_be_taken_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(M.ManifestError, match="x.npy.lock: cannot be made .No such file"):
        A.hold(tmp_path / "none" / "x.npy")
    (tmp_path / "y.npy.lock").mkdir()
    with pytest.raises(M.ManifestError) as error:
        A.hold(tmp_path / "y.npy")
    assert str(error.value) == (
        f"{tmp_path}/y.npy.lock: cannot be locked (Is a directory): delete it if nothing writes "
        f"{tmp_path}/y.npy, or write elsewhere (--out)"
    )

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(A.fcntl, "lockf", no_locks)
    A.hold(tmp_path / "x.npy")
    assert capsys.readouterr().err == (
        f"{tmp_path}/x.npy: this file system has no locks: start nothing else that writes this "
        "file\n"
    )
    assert A.HELD == []


def test_a_lock_that_was_deleted_meanwhile_is_not_taken_from_its_new_holder(tmp_path):
    A.hold(tmp_path / "x.npy")
    lock = tmp_path / "x.npy.lock"
    lock.unlink()
    lock.write_text("another's")
    A.release()
    assert lock.exists() and A.HELD == []


def test_arrays_without_a_json_are_ours_only_if_nothing_is_filled_in(tmp_path):
    videos = M.Videos(str(tmp_path), [f"{i}.mp4" for i in range(3)], *[[None] * 3] * 3)
    path = tmp_path / "x.npy"
    np.save(path, np.full((3, 2, 4), np.nan, np.float16))  # what a kill leaves
    A.ensure_array(path, videos, (2, 4), {}, "auto")
    A.open_rows(path)[1] = 1
    path.with_suffix(".json").unlink()
    kept = path.read_bytes()
    for resume in ("auto", "none"):
        with pytest.raises(M.ManifestError, match="none of the files that this command writes"):
            A.ensure_array(path, videos, (2, 4), {}, resume)
    assert path.read_bytes() == kept
    A.release()


def test_an_array_that_its_json_does_not_describe_is_refused(tmp_path):
    videos = M.Videos(str(tmp_path), [f"{i}.mp4" for i in range(3)], *[[None] * 3] * 3)
    path = tmp_path / "x.npy"
    A.ensure_array(path, videos, (2, 4), {"grid": (1, 2)}, "auto")
    A.ensure_array(path, videos, (2, 4), {"grid": (1, 2)}, "auto")  # a tuple is a list in the .json
    for shape, dtype in (((2, 2, 4), np.float16), ((3, 2, 4), np.float32)):
        np.save(path, np.zeros(shape, dtype))
        with pytest.raises(M.ManifestError, match="is not as its .json says; --resume none rem"):
            A.ensure_array(path, videos, (2, 4), {"grid": (1, 2)}, "auto")
    A.release()


def test_what_is_written_aside_goes_with_any_error(tmp_path):
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), A.written_aside(tmp_path / "x", "wb") as file:
            file.write(b"gigabytes")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_to_ask_for_a_lock_does_not_end_it(tmp_path):
    """POSIX ends a lock as soon as its process closes any open file of it."""
    path = tmp_path / "x.npy"
    A.hold(path)
    assert not A.is_held(path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tgm import arrays; "
        "print(arrays.is_held(sys.argv[2]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(path)], capture_output=True, text=True
    )
    A.release()
    assert other.stdout == "True\n", other.stderr


# ---- writing


def test_an_array_is_written_in_small_pieces(tmp_path):
    shape = (100, 200_000)  # 40 MB, 400 kB per row
    head = np.ones((10, 200_000), np.float16)
    tracemalloc.start()
    A.create_array(tmp_path / "x.npy", shape, np.float16, {}, head)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert array.shape == shape and A.filled(array[:, None]).tolist() == [True] * 10 + [False] * 90
    assert (array[:10] == 1).all() and np.isnan(array[10:]).all()
    assert peak < 20_000_000


def test_where_an_array_cannot_be_written_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    A.create_array(path, (2, 3), np.float16, {"manifest": "old"})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(M.ManifestError, match="x.json: cannot be written .No space left on device"):
        A.write_about(path.with_suffix(".json"), {"manifest": "new"})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_csv_that_cannot_be_parsed_is_not_ours(tmp_path):
    path = tmp_path / "x.check.csv"
    path.write_text("a" * 200_000)  # longer than a field may be
    with pytest.raises(M.ManifestError, match="not overwritten"):
        A.refuse_foreign(path, prepare.is_report)


def test_sizes_of_missing_videos_stay_when_rows_are_added(tmp_path):
    names = [f"{row}.mp4" for row in range(201)]
    for row, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * (row + 1))
    (tmp_path / "few.csv").write_text("path\n" + "\n".join(names[:3]) + "\n")
    (tmp_path / "all.csv").write_text("path\n" + "\n".join(names) + "\n")
    few, more = (M.read_manifest(tmp_path / f"{name}.csv") for name in ("few", "all"))
    about = {"videos": 3, "files": M.file_sizes(few)}
    (tmp_path / "0.mp4").unlink()
    assert M.renewed_sizes(few, about) == [1, 2, 3]
    sizes = M.renewed_sizes(more, about)
    assert len(sizes) == 100 and sizes[0] == 1 and sizes[-1] == 201
    assert M.renewed_sizes(few, {"videos": 3, "files": None}) == [None, 2, 3]


# ---- captions


def test_read_captions(tmp_path, monkeypatch):
    videos = [
        M.Video(name, None, None, None, row, name) for row, name in enumerate(("a.mp4", "b c.mp4"))
    ]
    path = tmp_path / "x.captions.jsonl"

    def refused():
        with pytest.raises(M.ManifestError) as error:
            A.read_captions(path, videos, "python caption.py --data x.csv")
        return str(error.value)

    assert refused().startswith(f"{path}: cannot be read (No such file") and refused().endswith(
        "make it with: python caption.py --data x.csv"
    )
    lines = [
        '{"path": "a.mp4", "captions": ["a dog", "a cat"]}',
        '{"path": "b c.mp4", "captions": [], "error": "no"}',
    ]
    path.write_text("\n".join(lines) + "\n")
    assert A.read_captions(path, videos, "") == [["a dog", "a cat"], []]
    path.write_text("\ufeff" + "\n".join(lines) + "\n")  # a byte order mark
    assert A.read_captions(path, videos, "") == [["a dog", "a cat"], []]
    path.with_suffix(".json").write_text('{"v_1": {"duration": 3.0}}')  # of another program
    assert A.read_captions(path, videos, "") == [["a dog", "a cat"], []]
    path.with_suffix(".json").unlink()
    monkeypatch.setattr(A, "is_held", lambda held: held == path)
    assert refused() == f"{path}: another process is writing it: wait for its end"
    assert A.text_commands(tmp_path / "x.csv", videos).startswith("python saliency.py ")
    monkeypatch.undo()
    path.write_text("\n".join(reversed(lines)) + "\n")
    assert "is of another manifest" in refused()
    path.write_text("")
    assert "is of another manifest" in refused() and refused().endswith("--resume none")
    for damaged in (
        lines[0],
        "\n".join([lines[0], lines[1][:20]]),
        "\n".join([lines[0], '{"path": "b c.mp4"}']),
    ):
        path.write_text(damaged)
        assert (
            "has the first 1 of 2 rows" in refused()
            and refused().endswith("--extend")
            or "is damaged" in refused()
        )


def test_captions_of_other_programs(tmp_path):
    """JSON allows characters inside a string that str.splitlines takes for ends of lines."""
    videos = [M.Video("a.mp4", None, None, None, 0, "a.mp4")]
    path = tmp_path / "x.captions.jsonl"
    for character in "\u2028\u2029\u0085":
        path.write_text(f'{{"path": "a.mp4", "captions": ["a{character}dog"]}}\n', encoding="utf-8")
        assert A.read_captions(path, videos, "") == [[f"a{character}dog"]]
        with open(path, "a") as file:
            file.write('{"path": "b.mp4", "captions": [], "error": "broken"}\n')
        assert preview.why_uncaptioned(path, 1) == "broken"
    path.write_text('{"path": "a.mp4", "captions": "a dog"}\n')  # not a caption for each letter
    with pytest.raises(M.ManifestError, match="is damaged .line 1: its captions are no list"):
        A.read_captions(path, videos, "")


def test_an_extension_that_was_killed_before_its_json_goes_on(tmp_path):
    path = tmp_path / "x.npy"
    few = M.Videos(str(tmp_path), [f"{i}.mp4" for i in range(3)], *[[None] * 3] * 3)
    videos = M.Videos(str(tmp_path), [f"{i}.mp4" for i in range(5)], *[[None] * 5] * 3)
    A.ensure_array(path, few, (2, 4), {}, "auto")
    A.open_rows(path)[:] = 7
    about = path.with_suffix(".json").read_text()
    A.ensure_array(path, videos, (2, 4), {}, "extend")
    whole = path.with_suffix(".json").read_text()
    assert whole != about
    path.with_suffix(".json").write_text(about)
    with pytest.raises(M.ManifestError, match="the first 3 of 5 rows of the manifest: --extend"):
        A.ensure_array(path, videos, (2, 4), {}, "auto")
    A.ensure_array(path, videos, (2, 4), {}, "extend")
    assert path.with_suffix(".json").read_text() == whole
    array = A.map_array(path)
    assert (array[:3] == 7).all() and np.isnan(array[3:]).all()
    A.release()
