"""Manifests, and the arrays and captions beside them: what is read, and every refusal."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tgm import arrays as A
from tgm import manifest as M


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
    with pytest.raises(M.ManifestError, match=r"none\.csv:1: .*path.*No such file"):
        M.read_manifest(tmp_path / "none.csv")
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
        (lambda path, meta: path.unlink(), "train.saliency.npy cannot be read (No such file"),
        (
            lambda path, meta: path.with_suffix(".json").unlink(),
            "train.saliency.json cannot be read (No such file",
        ),
        (lambda path, meta: path.with_suffix(".json").write_text("{"), "cannot be read"),
        (lambda path, meta: path.with_suffix(".json").write_text("[]"), "holds no settings"),
        (lambda path, meta: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
        (lambda path, meta: path.write_bytes(path.read_bytes()[:9]), "cannot be read"),
        (lambda path, meta: path.write_bytes(b""), "cannot be read"),
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
    assert message.endswith("; make it with: python saliency.py --data data/train.csv")


# ---- captions


def test_read_captions(tmp_path):
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
    path.write_text("\n".join(reversed(lines)) + "\n")
    assert "is of another manifest" in refused()
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
