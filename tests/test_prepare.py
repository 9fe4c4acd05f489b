"""`python -m tgm.prepare MANIFEST`: the check finds every planted fault, and re-encoded copies
show the same at the same times.
"""

import csv
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT, run
from test_video import pictures, write

from tgm import prepare
from tgm.manifest import read_manifest
from tgm.run import RunError
from tgm.video import VideoReader, read_frames


def problems(path):
    with open(path, newline="") as file:
        return {int(line["row"]): line["problem"] for line in csv.DictReader(file)}


def test_every_planted_fault_among_200_files_is_found(tmp_path):
    good = write(tmp_path / "good.mp4", pictures(20), fps=10)
    long = write(tmp_path / "long.mp4", pictures(70), fps=10)
    data, planted, lines = open(good, "rb").read(), {}, ["path,label,start,end"]
    (tmp_path / "v").mkdir()
    for row in range(200):
        name, span = f"v/{row:03d}, a.mp4", ","
        target = tmp_path / name
        kind = {
            7: "missing",
            23: "empty",
            42: "noise",
            77: "half",
            101: "folder",
            130: "audio",
            150: "short",
            170: "outside",
            199: "missing",
        }.get(row)
        os.link(long, target) if kind not in ("missing", "short", "folder") else None
        if kind in ("empty", "noise", "half", "audio"):
            target.unlink()
        if kind == "empty":
            target.write_bytes(b"")
        if kind == "noise":
            target.write_bytes(np.random.default_rng(0).bytes(5000))
        if kind == "half":
            target.write_bytes(data[: len(data) // 2])
        if kind == "folder":
            target.mkdir()
        if kind == "short":
            os.link(good, target)
        if kind == "audio":
            import av

            with av.open(str(target), "w") as container:
                stream = container.add_stream("aac", rate=8000, layout="mono")
                sound = av.AudioFrame.from_ndarray(
                    np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
                )
                sound.rate = 8000
                for packet in [*stream.encode(sound), *stream.encode(None)]:
                    container.mux(packet)
        if kind == "outside":
            span = "8,9"
        if kind and kind != "short":  # which is no problem
            planted[row] = kind if kind in ("missing", "outside") else "broken"
        lines.append(f'"{name}",x,{span}')
    lines.append('"v/000, a.mp4",x,1.5,2')  # a second row of the first file: a short part
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    line = run(
        "tgm.prepare",
        tmp_path / "all.csv",
        "--good",
        tmp_path / "sub.csv",
        cwd=tmp_path,
        fails=True,
        process=True,
    )
    assert line == f"8 of 201 rows cannot be used: {tmp_path / 'all.check.csv'}"
    assert problems(tmp_path / "all.check.csv") == planted
    kept = read_manifest(tmp_path / "sub.csv")
    assert (
        len(kept) == 193
        and all(os.path.exists(video.path) for video in kept)
        and kept[-1].start == 1.5
    )


def test_the_summary(tmp_path):
    write(tmp_path / "a.mp4", pictures(70), fps=10)
    write(tmp_path / "b.avi", pictures(140, 48, 64), codec="mpeg4", fps=20)
    (tmp_path / "two.csv").write_text("path\na.mp4\nb.avi\n")
    out = run("tgm.prepare", "two.csv", "--workers", 1, cwd=tmp_path)
    for part in (
        "2 rows in 2 files",
        "shortest 7.00 s, median 7.00 s, longest 7.00 s",
        "h264 1",
        "mpeg4 1",
        "128x96 1",
        "64x48 1",
        "10 1",
        "20 1",
        "problems    none",
    ):
        assert part in out, part
    assert "repeated" not in out and problems(tmp_path / "two.check.csv") == {}
    # again, over the report of before
    out = run("tgm.prepare", "two.csv", "--workers", 1, "--stride", 5, cwd=tmp_path)
    assert (
        "\nclips       1 of 2 rows are usable, but shorter than a clip, which spans 76 frames "
        "(--frames 16 --stride 5): their last frame is repeated\n" in out
    )
    assert (
        "\nproblems    none\ntwo.check.csv: 0 rows\n" in out
        and problems(tmp_path / "two.check.csv") == {}
    )
    assert "none.csv:1: expected" in run("tgm.prepare", "none.csv", cwd=tmp_path, fails=True)


@pytest.mark.parametrize("frames, is_short", [(60, True), (61, False), (63, False)])
def test_a_row_is_short_if_the_last_frame_of_a_clip_is_not_in_it(tmp_path, frames, is_short):
    """16 frames of stride 4 span 61."""
    write(tmp_path / "a.mp4", pictures(frames, 16, 16))
    (tmp_path / "one.csv").write_text("path\na.mp4\n")
    out = run("tgm.prepare", "one.csv", "--workers", 1, cwd=tmp_path)
    assert ("clips       1 of 1 rows are usable, but shorter" in out) == is_short


def test_the_time_limit_of_a_check(tmp_path):
    write(tmp_path / "a.mp4", pictures(5), fps=10)
    (tmp_path / "one.csv").write_text("path\na.mp4\n")
    flags = ("tgm.prepare", "one.csv", "--workers", 1, "--video-timeout")
    assert "1 of 1 rows cannot be used" in run(*flags, 1e-9, cwd=tmp_path, fails=True)
    assert "reading it takes more than 1e-09 s" in (tmp_path / "one.check.csv").read_text()
    assert "problems    none" in run(*flags, 100, cwd=tmp_path)


def test_a_manifest_that_can_be_read_only_once_is_refused(tmp_path):
    write(tmp_path / "a.mp4", pictures(5), fps=10)
    for flags in (("--good", "good.csv"), ("--reencode", "small"), ()):
        read_end, write_end = os.pipe()
        os.write(write_end, b"path\na.mp4\n")
        os.close(write_end)
        pipe = f"/dev/fd/{read_end}"
        line = run("tgm.prepare", pipe, "--root", ".", *flags, cwd=tmp_path, fails=True)
        os.close(read_end)
        assert line == (
            f"{pipe}: expected a file, found a pipe, which can be read only once: write the "
            "manifest to a file first"
        )


def test_a_new_manifest_needs_no_root(tmp_path):
    (tmp_path / "v").mkdir()
    write(tmp_path / "v/a.mp4", pictures(5), fps=10)
    (tmp_path / "all.csv").write_text("path\na.mp4\n")
    flags = ("tgm.prepare", "all.csv", "--root", "v", "--workers", 1)
    out = run(*flags, "--good", "good.csv", cwd=tmp_path)
    assert "\ngood.csv: 1 rows (give no --root with it)\n" in out
    assert run("tgm.prepare", "good.csv", "--workers", 1, cwd=tmp_path)
    out = run(*flags, "--reencode", "small", cwd=tmp_path)
    assert out == "small/all.csv: 1 of 1 files (give no --root with it)\n"
    out = run("tgm.prepare", "good.csv", "--reencode", "small", "--workers", 1, cwd=tmp_path)
    assert out == "small/good.csv: 1 of 1 files\n"


def test_the_good_rows_are_those_of_the_manifest_that_was_checked(tmp_path, monkeypatch):
    """Also where it grows meanwhile. Absolute names stay, and a folder may be a link."""
    (tmp_path / "v").mkdir()
    path = write(tmp_path / "v/a.mp4", pictures(5), fps=10)
    manifest = tmp_path / "all.csv"
    manifest.write_text(f"path,label\nv/b.mp4,1\nv/a.mp4,2\n{path},3\n")
    (tmp_path / "deep/real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/real")
    check = prepare.check_files

    def grows(args, videos):
        manifest.write_text("path,label\nv/new.mp4,0\n" + manifest.read_text().split("\n", 1)[1])
        return check(args, videos)

    monkeypatch.setattr(prepare, "check_files", grows)
    flags = ("--workers", 1, "--good", tmp_path / "link/good.csv")
    line = run("tgm.prepare", manifest, *flags, fails=True)
    assert line == f"1 of 3 rows cannot be used: {tmp_path / 'all.check.csv'}"
    good = (tmp_path / "deep/real/good.csv").read_text().splitlines()
    assert good == ["path,label", "../../v/a.mp4,2", f"{path},3"]
    assert all(os.path.exists(video.path) for video in read_manifest(tmp_path / "link/good.csv"))


def test_paths_that_go_up_from_a_link_stay_right(tmp_path):
    (tmp_path / "disk/k400").mkdir(parents=True)
    (tmp_path / "disk/videos").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/k400").symlink_to(tmp_path / "disk/k400")
    write(tmp_path / "disk/videos/a.mp4", pictures(5), fps=10)
    (tmp_path / "data/k400/all.csv").write_text("path\n../videos/a.mp4\n")
    flags = ("--workers", 1, "--good", "good/all.csv")
    assert "good/all.csv: 1 rows" in run("tgm.prepare", "data/k400/all.csv", *flags, cwd=tmp_path)
    assert (tmp_path / "good/all.csv").read_text().split() == ["path", "../disk/videos/a.mp4"]


def test_a_manifest_without_good_rows_is_not_written(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    (tmp_path / "all.csv").write_text("path\nbad.mp4\n")
    flags = ("tgm.prepare", "all.csv", "--workers", 1, "--good")
    line = run(*flags, "all.check.csv", cwd=tmp_path, fails=True)
    assert line == "--good all.check.csv: the report of the check goes there"
    assert "1 of 1 rows cannot be used" in run(*flags, "good.csv", cwd=tmp_path, fails=True)
    assert not (tmp_path / "good.csv").exists() and (tmp_path / "all.check.csv").exists()


def test_two_re_encodings_into_one_folder_are_refused(tmp_path):
    write(tmp_path / "a.mp4", pictures(5), fps=10)
    (tmp_path / "one.csv").write_text("path\na.mp4\n")
    (tmp_path / "out").mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tgm import arrays; "
        "arrays.hold('out/one.csv'); print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(ROOT)]
    flags = ("tgm.prepare", "one.csv", "--reencode", "out", "--workers", 1)
    with subprocess.Popen(
        words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        line = run(*flags, cwd=tmp_path, fails=True)
        assert line == (
            "out/one.csv: another process is writing it: wait for its end, or name another folder "
            "(--reencode)"
        )
        holder.communicate(b"\n")
    assert "1 of 1 files" in run(*flags, cwd=tmp_path)
    assert "--good belongs to a check" in run(*flags, "--good", "g.csv", cwd=tmp_path, fails=True)


@pytest.mark.parametrize(
    "name, how",
    [
        ("plain.mp4", {}),
        ("turned.mp4", {"rotation": 90}),
        ("b.avi", {"codec": "mpeg4", "b_frames": 2}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        (
            "uneven.mkv",
            {
                "pts": np.cumsum(np.random.default_rng(0).integers(1, 6, 60)).tolist(),
                "tick": Fraction(1, 50),
            },
        ),
    ],
)
def test_re_encoded_it_shows_the_same_at_the_same_times(tmp_path, name, how):
    path = write(tmp_path / name, pictures(60, 98, 130), **how)
    target = str(tmp_path / "out" / "x.mp4")
    assert prepare.reencode(path, target, 64) is None and os.listdir(tmp_path / "out") == ["x.mp4"]
    with VideoReader(path) as source, VideoReader(target) as copy:
        assert copy.duration == pytest.approx(source.duration, abs=1e-3)
        times = np.random.default_rng(1).uniform(0, source.duration, 20)
        got = copy.read(times)
        assert min(got.shape[1:3]) == 64 and got.shape[2] % 2 == 0
        assert (got.shape[1] > got.shape[2]) == (name == "turned.mp4")
        differences = np.abs(source.read(times, got.shape[1:3]).astype(int) - got).mean((1, 2, 3))
        keys = [packet.pts for packet in copy._packets() if packet.is_keyframe]
    other = np.abs(np.roll(got, 1, 0).astype(int) - got).mean((1, 2, 3))
    # the right frame each time
    assert differences.max() < 14 and other.min() > 2 * differences.max(), (
        differences.max(),
        other.min(),
    )
    assert len(keys) <= 5


def held_and_copied(short, path, times):
    """Writes a video to `path` whose last frame stays on screen `times` as long, and re-encodes it
    -> (path, the copy's path)."""
    with av.open(short) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        last = max(packets, key=lambda packet: packet.pts)
        last.duration *= times
        for packet in packets:
            packet.stream = stream
        out.mux(packets)
        shown = float(last.duration * last.time_base)
    with av.open(str(path)) as written:
        packets = [packet for packet in written.demux(video=0) if packet.size]
        last = max(packets, key=lambda packet: packet.pts)
        if float(last.duration * last.time_base) != pytest.approx(shown, rel=0.1):
            pytest.skip(f"PyAV {av.__version__} writes another duration of the last frame")
    target = str(path.parent / "out/long.mp4")
    assert prepare.reencode(str(path), target, 64) is None
    return path, target


def test_a_last_frame_that_stays_on_screen_stays_in_the_copy(tmp_path):
    short = write(tmp_path / "short.mp4", pictures(10), fps=10, b_frames=0)
    path, target = held_and_copied(short, tmp_path / "long.mp4", 40)
    with VideoReader(path) as source, VideoReader(target) as copy:
        assert source.duration == pytest.approx(4.9, abs=0.01)
        assert copy.duration == pytest.approx(4.9, abs=0.01)
        assert copy.fps == pytest.approx(source.fps, rel=0.03)  # of 10 frames in 4.9 seconds
        times = [0.85, 0.95, 2.5, 4.8]
        got = copy.read(times)
        expected = source.read(times, got.shape[1:3]).astype(int)
        assert np.abs(expected - got).mean((1, 2, 3)).max() < 14


def test_a_last_frame_that_stays_leaves_the_frame_rate_of_a_header(tmp_path):
    """In an mkv it is not what follows from the number of frames."""
    short = write(tmp_path / "short.mp4", pictures(38))
    path, target = held_and_copied(short, tmp_path / "long.mkv", 120)
    with VideoReader(path) as source, VideoReader(target) as copy:
        assert source.duration > 4 and copy.duration == pytest.approx(source.duration, abs=2e-3)
        assert copy.fps == pytest.approx(source.fps, rel=0.02) == pytest.approx(30, rel=0.02)


def test_a_file_that_is_cut_off_is_not_re_encoded(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(120), options={"g": "10"})
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    error = prepare.reencode(path, str(tmp_path / "out/a.mp4"), 64)
    assert error.startswith(f"{path}: truncated: ") and error.endswith(
        "of the 4.00 s in its header"
    )
    assert not list((tmp_path / "out").iterdir())


def test_a_manifest_of_copies_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    write(tmp_path / "in/a b.mp4", pictures(20), fps=10)
    write(tmp_path / "in/deep/a b.avi", pictures(20), codec="mpeg4", fps=10)
    (tmp_path / "in/bad.mp4").write_bytes(b"bad")
    (tmp_path / "in/some.csv").write_text(
        'path,label,start,end,more\na b.mp4,x,0.5,1,"p, q"\ndeep/a b.avi,y,,,\na '
        "b.mp4,z,1,2,\nbad.mp4,w,,,\n"
    )
    flags = (
        "tgm.prepare",
        tmp_path / "in/some.csv",
        "--reencode",
        tmp_path / "out",
        "--short-side",
        32,
        "--workers",
        1,
    )
    assert "1 files could not be re-encoded" in run(*flags, fails=True)
    assert (tmp_path / "out/some.csv").read_text().splitlines() == [
        "path,label,start,end,more",
        'a b.mp4,x,0.5,1,"p, q"',
        "deep/a b_avi.mp4,y,,,",
        "a b.mp4,z,1,2,",
        "bad.mp4,w,,,",
    ]
    made = tmp_path / "out/a b.mp4"
    assert read_frames(made, [0.7]).shape[1] == 32 and not list((tmp_path / "out").rglob("*.new*"))
    before = made.stat().st_mtime_ns
    (tmp_path / "out/deep/a b_avi.mp4").unlink()
    shutil.copy(tmp_path / "in/a b.mp4", tmp_path / "in/bad.mp4")
    assert "3 of 3 files" in run(*flags)
    assert made.stat().st_mtime_ns == before and (tmp_path / "out/deep/a b_avi.mp4").exists()
    assert "--good" not in os.listdir(tmp_path)


def test_names_that_lead_out_of_the_folder_stay_inside(tmp_path):
    (tmp_path / "a").mkdir()
    path = write(tmp_path / "v.mp4", pictures(5), fps=10)
    (tmp_path / "a/x.csv").write_text(f"path\n../v.mp4\n{path}\n")
    shutil.copy(tmp_path / "v.mp4", tmp_path / "a/v.mp4")
    run("tgm.prepare", tmp_path / "a/x.csv", "--reencode", tmp_path / "out/in", "--workers", 1)
    made = {
        os.path.relpath(file, tmp_path / "out/in") for file in (tmp_path / "out").rglob("*.mp4")
    }
    assert made == {"v.mp4", path.lstrip("/")}
    (tmp_path / "a/x.csv").write_text("path\n../v.mp4\nv.mp4\n")
    folder = tmp_path / "a"
    line = run("tgm.prepare", folder / "x.csv", "--reencode", tmp_path / "b", fails=True)
    assert line == (
        f"{folder}/x.csv: the copies of {folder}/../v.mp4 and {folder}/v.mp4 would both be "
        f"{tmp_path}/b/v.mp4: rename one of the two videos, in the manifest as well"
    )


def test_two_ways_to_write_the_path_of_a_video_make_one_copy(tmp_path):
    write(tmp_path / "a.mp4", pictures(5), fps=10)
    (tmp_path / "x.csv").write_text("path,start\na.mp4,\n./a.mp4,0.1\n")
    out = run("tgm.prepare", "x.csv", "--reencode", "b", "--workers", 1, cwd=tmp_path)
    assert out == "b/x.csv: 1 of 1 files\n"
    assert (tmp_path / "b/x.csv").read_text().split() == ["path,start", "a.mp4,", "a.mp4,0.1"]
    assert sorted(os.listdir(tmp_path / "b")) == ["a.mp4", "x.csv"]


@pytest.mark.parametrize(
    "name, folder, reason",
    [
        ("a.mp4", "a.mp4.new.mp4", "cannot be written (Is a directory)"),
        ("a.mp4", "a.mp4", "is a folder, where the copy of {source} is to be written"),
        ("n" * 250 + ".mp4", None, "cannot be written (File name too long)"),
    ],
)
def test_a_copy_that_cannot_be_written_is_no_fault_of_the_source(tmp_path, name, folder, reason):
    source = write(tmp_path / "source.mp4", pictures(5), fps=10)
    (tmp_path / "out").mkdir()
    if folder:
        (tmp_path / "out" / folder).mkdir()
    target = f"{tmp_path}/out/{name}"
    with pytest.raises(RunError) as error:
        prepare.reencode(source, target, 64)
    assert str(error.value) == f"{target}: {reason.format(source=source)}"


@pytest.mark.parametrize(
    "height, width, short_side, size",
    [
        (53, 75, 256, (52, 74)),
        (75, 53, 256, (74, 52)),
        (500, 500, 251, (250, 250)),
        (500, 999, 251, (250, 502)),
        (720, 1280, 256, (256, 456)),  # 455.1, to the nearest even number
        (1, 9, 256, (2, 8)),
    ],
)
def test_copies_are_no_larger_than_the_image_and_the_short_side(height, width, short_side, size):
    image = np.zeros((height, width, 3), np.uint8)
    assert prepare.encoded_size(image, short_side) == size


def test_a_copy_of_odd_size_in_a_folder_with_a_colon(tmp_path, monkeypatch):
    path = write(tmp_path / "odd.mp4", pictures(3, 53, 75), pix_fmt="yuv444p")
    monkeypatch.chdir(tmp_path)
    assert prepare.reencode(path, "a:b/x.mp4", 256) is None
    assert read_frames("a:b/x.mp4", [0]).shape == (1, 52, 74, 3)
