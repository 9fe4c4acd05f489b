"""video.py against an independent plain decode: every file is made here with PyAV, or is one of
the real clips.
"""

import csv
import itertools
import os
import pickle
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tgm import video as V
from tgm.manifest import Video

REAL = Path(__file__).parents[2] / "shared" / "videos"


# ---- making and plainly decoding videos ----------------------------------------------------------


def pictures(count, height=96, width=128):
    """A drifting random texture: every frame differs from every other."""
    texture = np.random.default_rng(0).integers(
        0, 256, (height // 8 + 1, width // 8 + 60, 3), np.uint8
    )
    texture = texture.repeat(8, 0).repeat(8, 1)[:height]
    return [texture[:, 3 * i % 400 : 3 * i % 400 + width] for i in range(count)]


def write(
    path,
    images,
    codec="libx264",
    fps=30,
    pix_fmt="yuv420p",
    options=None,
    b_frames=None,
    pts=None,
    tick=None,
    rotation=None,
    tags=None,
    muxer=None,
):
    with av.open(str(path), "w", options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if tick:
            stream.codec_context.time_base = tick
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a rotation")
            stream.set_display_rotation(rotation)
        if tags:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if tags:
                frame = frame.reformat(
                    format=pix_fmt, dst_colorspace=tags[0], dst_color_range=tags[1]
                )
            if pts:
                frame.pts, frame.time_base = pts[index], tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return str(path)


def decode(path, counted=False):
    """Every frame in display order: seconds since the first, RGB. `counted`: the container has
    no presentation times.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        times, images = [], []
        for index, frame in enumerate(container.decode(stream)):
            times.append(
                index / float(stream.average_rate)
                if counted
                else float(frame.pts * stream.time_base)
            )
            images.append(frame.to_ndarray(format="rgb24"))
        return np.array(times) - times[0], images, min(0.499 * float(stream.time_base), 5e-4)


def assert_reads(path, wanted, counted=False):
    """reader.read equals the plain decode, bit for bit, at the given times."""
    times, images, tolerance = decode(path, counted)
    read = V.read_frames(path, wanted)
    assert read.dtype == np.uint8 and read.shape == (len(wanted), *images[0].shape)
    for time, image in zip(wanted, read, strict=True):
        expected = images[max(0, np.flatnonzero(times <= time + tolerance).max(initial=0))]
        assert np.array_equal(image, expected), f"{path} at {time}"


def random_times(duration, seed, draws=4):
    """Unordered, repeated, before the beginning and past the end; and a clip at stride 4."""
    rng = np.random.default_rng(seed)
    yield from (
        np.r_[rng.uniform(-0.3, duration + 0.3, 7).repeat(2), rng.uniform(0, duration)]
        for _ in range(draws)
    )
    yield rng.uniform(0, duration / 2) + np.arange(16) * 4 / 30
    yield from rng.uniform(0, duration, (draws, 1))


X265 = {"x265-params": "log-level=none:keyint=40:bframes=4:pools=none:frame-threads=1"}
FILES = {  # name: (what to write, container has no presentation times)
    "gop250.mp4": (dict(options={"g": "250", "bf": "3"}), False),
    "gop12.mp4": (dict(options={"g": "12", "bf": "3"}), False),
    "gop12.ts": (dict(options={"g": "12", "bf": "3"}), False),
    "gop12.mkv": (dict(options={"g": "12", "bf": "2"}), False),
    "opengop.mp4": (
        dict(
            options={"g": "20", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-pyramid=normal"}
        ),
        False,
    ),
    "opengop.ts": (
        dict(
            options={"g": "20", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-pyramid=normal"}
        ),
        False,
    ),
    "refresh.mp4": (dict(options={"x264-params": "intra-refresh=1:keyint=30"}), False),
    "hevc10.mp4": (dict(codec="libx265", pix_fmt="yuv420p10le", options=X265), False),
    "mpeg4.avi": (dict(codec="mpeg4", b_frames=2), True),
    "h264.avi": (dict(options={"bf": "2"}), True),
    "vp9.webm": (dict(codec="libvpx-vp9", options={"cpu-used": "8", "lag-in-frames": "8"}), False),
    "fragments.mp4": (dict(muxer={"movflags": "frag_keyframe+empty_moov"}), False),
    "late.mp4": (dict(tick=Fraction(1, 600), pts=[3000 + 20 * i for i in range(120)]), False),
    "variable.mp4": (
        dict(
            tick=Fraction(1, 600),
            b_frames=2,
            pts=np.random.default_rng(3).integers(5, 60, 120).cumsum().tolist(),
        ),
        False,
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write(folder / name, pictures(120), **how) for name, (how, _) in FILES.items()}


@pytest.fixture(scope="module")
def gop250(files):
    return files["gop250.mp4"]


# ---- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_read_equals_plain_decoding(files, name):
    duration = decode(files[name], FILES[name][1])[0][-1]
    for times in random_times(duration, seed=1):
        assert_reads(files[name], times, FILES[name][1])


@pytest.mark.parametrize("name", ["gop250.mp4", "gop12.mkv", "mpeg4.avi", "hevc10.mp4", "late.mp4"])
def test_time_k_over_fps_is_frame_k(files, name):
    _, images, _ = decode(files[name])
    with V.VideoReader(files[name]) as reader:
        assert reader.fps == 30 and reader.duration == pytest.approx(4, abs=0.002)
        for k, frame in zip(
            range(0, 120, 7), reader.read(np.arange(0, 120, 7) / reader.fps), strict=True
        ):
            assert np.array_equal(frame, images[k])
        just_before = reader.read([20 / 30 - 0.002, 1e9, -5])
    assert all(
        np.array_equal(frame, images[k]) for frame, k in zip(just_before, (19, -1, 0), strict=True)
    )


@pytest.mark.parametrize("name, codec", [("a.mpg", "mpeg2video"), ("b.mpg", "mpeg1video")])
def test_small_frames_of_an_mpeg_program_stream(tmp_path, name, codec):
    """Several share one pts, which libav then makes up, another one after a seek."""
    still = [np.full((64, 96, 3), 4 * k, np.uint8) for k in range(60)]
    path = write(tmp_path / name, still, codec=codec, fps=25, options={"g": "12", "bf": "2"})
    with V.VideoReader(path) as reader:
        assert reader.duration == pytest.approx(2.4)
        plain = [reader.picture(frame) for _, frame in reader.frames()]
        wanted = np.array([1.44, 0.24, 1.94, 2.16, 2.39])
        for time, image in zip(wanted, reader.read(wanted), strict=True):
            k = int(25 * time + 0.01)
            assert np.array_equal(image, plain[k]), time
            assert not np.array_equal(plain[k], plain[k - 1])  # the grey tells them apart
    assert np.array_equal(V.read_frames(path, [1.44])[0], plain[36])


def write_with_sound(path, sound_seconds, first=0):
    """60 pictures in 2.4 s, from the second `first` on, and a sound of so many seconds, or none."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        sound = out.add_stream("aac", rate=16000) if sound_seconds else None
        for k in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 4 * k, np.uint8), "rgb24")
            frame.pts, frame.time_base = 25 * first + k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for k in range(int(sound_seconds * 16000 / 1024)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * k
            out.mux(sound.encode(frame))
        if sound:
            out.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("name", ["a.flv", "a.mkv", "a.mp4"])
def test_sound_that_lasts_longer_than_the_picture(tmp_path, name):
    path = write_with_sound(tmp_path / name, sound_seconds=8)
    if name == "a.mkv":  # as files of other programs, which have no tag DURATION
        data = path.read_bytes()
        assert data.count(b"DURATION") == 2
        path.write_bytes(data.replace(b"DURATION", b"XURATION"))
    with V.VideoReader(path) as reader:
        assert reader.duration == pytest.approx(2.4, abs=0.05)
        assert abs(reader.read([2.3, 5])[:, 0, 0, 0].astype(int) - [4 * 57, 4 * 59]).max() < 9


def test_an_flv_that_begins_late(tmp_path):
    path = write_with_sound(tmp_path / "a.flv", sound_seconds=0, first=100)
    with V.VideoReader(path) as reader:
        assert reader.duration == pytest.approx(2.4, abs=0.05)
        assert abs(reader.read([0.4, 2.0])[:, 0, 0, 0].astype(int) - [40, 200]).max() < 9


def test_only_what_is_needed_is_decoded(files, monkeypatch):
    """The quick way is taken, skips pictures, and seeks between distant times; else it would
    merely be right.
    """
    plain = []
    with V.VideoReader(files["gop12.mkv"]) as reader:
        assert [len(run) for run in reader._runs([0.1, 0.2, 2.5, 2.6, 3.9])] == [2, 2, 1]
    with V.VideoReader(files["gop250.mp4"]) as reader:
        assert [len(run) for run in reader._runs([0.1, 0.2, 2.5, 2.6, 3.9])] == [5]
    monkeypatch.setattr(
        V.VideoReader, "_decode_plainly", lambda self, times: plain.append(times) or iter(())
    )
    for name in ("gop250.mp4", "gop12.mp4", "gop12.mkv", "gop12.ts", "hevc10.mp4"):
        images = decode(files[name])[1]
        with V.VideoReader(files[name]) as reader:  # MPEG-TS first lands a key frame too late
            for k in range(0, 120, 3 if name == "gop12.mp4" else 17):
                assert np.array_equal(reader.read([(k + 0.5) / 30])[0], images[k])
                assert not plain


def test_one_frame(tmp_path):
    path = write(tmp_path / "one.mp4", pictures(1))
    with V.VideoReader(path) as reader:
        assert reader.duration == pytest.approx(1 / 30, abs=1e-4)
    assert_reads(path, [0, 0.01, 5])


def test_odd_size(tmp_path):
    path = write(tmp_path / "odd.mp4", pictures(8, 53, 75), pix_fmt="yuv444p")
    assert_reads(path, [0.1, 0])
    assert V.read_frames(path, [0]).shape == (1, 53, 75, 3)


def test_size(tmp_path, gop250):
    assert V.read_frames(gop250, [1.0], size=48).shape == (1, 48, 64, 3)
    assert V.read_frames(gop250, [1.0], size=97).shape == (1, 97, 129, 3)
    squashed = V.read_frames(gop250, [1.0, 2.0], size=(12, 16))
    assert squashed.shape == (2, 12, 16, 3)
    stripes = np.zeros((96, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    path = write(tmp_path / "stripes.mp4", [stripes], options={"qp": "4"})
    # aliasing would make it black or white
    small = V.read_frames(path, [0], size=(24, 32)).astype(int)
    assert np.abs(small[:, :, 1:-1] - 128).max() < 16


@pytest.mark.parametrize("rotation, turns", [(90, 1), (180, 2), (-90, 3)])
def test_rotation(tmp_path, rotation, turns):
    path = write(tmp_path / "turned.mp4", pictures(8), rotation=rotation)
    expected = np.rot90(decode(path)[1][3], turns)
    assert np.array_equal(V.read_frames(path, [0.1])[0], expected)
    with V.VideoReader(path) as reader:
        _, frame = list(reader.frames())[3]
        picture = reader.picture(frame)
    assert np.array_equal(picture, expected) and picture.flags.c_contiguous
    shape = (1, 64, 48, 3) if turns % 2 else (1, 48, 64, 3)
    assert V.read_frames(path, [0.1], size=48).shape == shape
    assert V.read_frames(path, [0.1], size=(30, 20)).shape == (1, 30, 20, 3)


@pytest.mark.parametrize(
    "matrix, transform",
    [
        (
            (0, 1, -1, 0),
            lambda image: np.rot90(image, -1),
        ),  # what a phone held upright writes: a quarter turn clockwise
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),  # a front camera's mirror image
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    ],
)
def test_display_matrix_in_the_header(tmp_path, matrix, transform):
    path = write(tmp_path / "matrix.mp4", pictures(8))
    data = bytearray(Path(path).read_bytes())
    # version 0: the matrix a b u c d v x y w, 16.16 and 2.30 fixed point
    at = data.index(b"tkhd") + 44
    assert data[at : at + 4] == struct.pack(">i", 1 << 16)
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(data)
    assert np.array_equal(V.read_frames(path, [0.1])[0], transform(decode(path)[1][3]))


@pytest.mark.parametrize(
    "orientation, transform",
    [
        (1, lambda image: image),
        (2, lambda image: image[:, ::-1]),
        (6, lambda image: np.rot90(image, -1)),
    ],
)
def test_pictures_with_exif(tmp_path, orientation, transform):
    """A frame may have side data of a type that PyAV does not know. EXIF orientations: 2 is
    mirrored, 6 is to be turned clockwise.
    """
    path = write(tmp_path / "a.mkv", pictures(4), codec="mjpeg", pix_fmt="yuvj420p")
    tag = struct.pack("<HHII", 0x112, 3, 1, orientation)
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 1) + tag + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif

    def with_exif(packet):
        data = bytes(packet)
        new = av.Packet(data[:2] + segment + data[2:])
        new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
        new.is_keyframe = True
        return new

    new = remux(path, tmp_path / "exif.mkv", change=with_exif)
    assert np.array_equal(V.read_frames(new, [0.1])[0], transform(decode(path)[1][3]))


def test_frames_before_the_first_displayed_are_left_out(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(12), codec="mpeg4", fps=10, options={"g": "6"})

    def without_key(packet):
        packet.is_keyframe = packet.pts > 0 and packet.is_keyframe
        return packet

    new = remux(path, tmp_path / "late.mp4", change=without_key)
    with V.VideoReader(new) as reader:
        times = [seconds for seconds, _ in reader.frames()]
        first, last = reader.read([0, reader.duration])
        assert reader.duration == pytest.approx(0.6)
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert np.array_equal(first, decode(path)[1][6])
    assert np.array_equal(last, decode(path)[1][11])


@pytest.mark.parametrize("size", [0, -1, (0, 5), (5, 5, 3), [48]])
def test_a_size_that_no_picture_has_is_not_the_files_fault(gop250, size):
    with pytest.raises(ValueError, match="^size: expected pixels, "):
        V.read_frames(gop250, [1.0], size=size)


def test_a_bug_is_not_taken_for_a_file_to_be_decoded_plainly(gop250, monkeypatch):
    def bug(self, run):
        raise IndexError("a bug")

    monkeypatch.setattr(V.VideoReader, "_packets_for", bug)
    with pytest.raises(IndexError, match="a bug"):
        V.read_frames(gop250, [1.0])


def test_time_that_is_up_is_not_waited_for_again(gop250, monkeypatch):
    opened = []
    original = V.VideoReader._open
    monkeypatch.setattr(V.VideoReader, "_open", lambda self: opened.append(1) or original(self))
    with V.VideoReader(gop250) as reader:
        reader._timeout = 0
        with pytest.raises(V.VideoError) as error:
            reader.read([1.0])
    assert len(opened) == 1
    assert str(error.value) == (
        f"{gop250}: reading it takes more than 0 s (the stages' --video-timeout allows more)"
    )


@pytest.mark.parametrize("matrix", ["ITU709", "ITU601"])
@pytest.mark.parametrize("full_range", [False, True])
def test_colour(tmp_path, matrix, full_range):
    """Pure colours come back pure, whichever matrix and range the stream declares."""
    from av.video.reformatter import ColorRange, Colorspace

    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [90, 160, 40]], np.uint8
    )
    images = [np.broadcast_to(colour, (720, 1280, 3)) for colour in colours]
    tags = Colorspace[matrix], ColorRange.JPEG if full_range else ColorRange.MPEG
    path = write(
        tmp_path / "colour.mp4", images, options={"qp": "4", "preset": "ultrafast"}, tags=tags
    )
    for size in (None, 64):
        read = V.read_frames(path, np.arange(6) / 30, size)[:, 20:40, 20:40].astype(int)
        assert np.abs(read - colours[:, None, None]).max() <= 5


def test_edit_list(tmp_path):
    """Frames an mp4's edit list cuts off are not displayed, and time counts from the first that
    is.
    """
    path = write(tmp_path / "cut.mp4", pictures(60), options={"g": "250", "bf": "3"})
    data = bytearray(Path(path).read_bytes())
    # one entry: duration in the film's 1/1000 s, media time in the track's 1/15360 s
    at = data.index(b"elst") + 12
    data[at : at + 8] = struct.pack(">ii", 1000, 20 * 512 + 1024)
    Path(path).write_bytes(data)
    times, images, _ = decode(path)
    assert len(images) == 30
    assert_reads(path, [0, 0.5, 0.95, 0.1])
    assert_reads(path, [1.4])


# ---- what cannot be read -------------------------------------------------------------------------


def remux(path, new, change=None, **options):
    """Copies a video's packets into another file, each as change(packet) returns it."""
    with av.open(str(path)) as source, av.open(str(new), "w", options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet = change(packet) if change else packet
                packet.stream = stream
                out.mux(packet)
    return str(new)


def refuse(path, reason, times=(0.5,)):
    with pytest.raises(V.VideoError) as error:
        V.read_frames(path, times)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and reason in message and "\n" not in message
    assert str(pickle.loads(pickle.dumps(error.value))) == message  # crosses from a loader's worker


def test_errors(tmp_path, gop250):
    refuse(str(tmp_path / "missing.mp4"), "No such file")
    refuse(str(tmp_path), "directory")
    for name, content in {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 99,
        "headless.mp4": Path(gop250).read_bytes()[:20000],
    }.items():
        (tmp_path / name).write_bytes(content)
        refuse(
            str(tmp_path / name), "no video stream" if name == "headless.mp4" else "Invalid data"
        )
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    refuse(str(tmp_path / "sound.mp4"), "no video stream")


def test_what_a_caller_asks_wrongly_is_not_blamed_on_the_file(gop250):
    with V.VideoReader(gop250) as reader:
        for times, size in (([], None), ([np.nan], None), ([[0]], None), ([0], (256,))):
            with pytest.raises(ValueError, match="^times: |^size: "):
                reader.read(times, size)
        with pytest.raises(ValueError, match="vectors=True"):
            reader.read_vectors([0])
    with V.VideoReader(gop250, vectors=True) as reader:
        for times in ([], [np.nan]):
            with pytest.raises(ValueError, match="^times: "):
                reader.read_vectors(times)
        # two times on one frame count once, and a time past the end is moved there
        found = reader.read_vectors([0.20001, 0.20002, 1e9])
        assert [vectors.time for vectors in found] == [0.20001, reader.duration + 1]


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_truncated(tmp_path, gop250, name):
    whole = Path(
        remux(
            gop250,
            tmp_path / f"whole{name}",
            **({"movflags": "faststart"} if name.endswith("mp4") else {}),
        )
    )
    (tmp_path / name).write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    assert np.array_equal(V.read_frames(tmp_path / name, [0.5]), V.read_frames(gop250, [0.5]))
    for times in ([0.5, 3.5], [3.9], [99]):
        refuse(str(tmp_path / name), "truncated", times)


@pytest.mark.parametrize("name, limit", [("gop250.mp4", 4), ("mpeg4.avi", 4)])
def test_corrupt(tmp_path, files, name, limit):
    data = bytearray(Path(files[name]).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    (tmp_path / name).write_bytes(data)
    assert np.array_equal(V.read_frames(tmp_path / name, [0.2]), V.read_frames(files[name], [0.2]))
    refuse(str(tmp_path / name), "", [0.2, limit])


def test_nothing_stays_open(tmp_path, files):
    def handles():
        return sorted(
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        )

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to count open files in")
    (tmp_path / "headless.mp4").write_bytes(Path(files["gop250.mp4"]).read_bytes()[:20000])
    before = handles()
    for name in ("gop250.mp4", "mpeg4.avi"):
        V.read_frames(files[name], [0.5])
        with pytest.raises(ValueError):
            V.read_frames(files[name], [])
    with pytest.raises(V.VideoError) as error:
        V.read_frames(tmp_path / "headless.mp4", [0])
    assert handles() == before, error  # which holds the traceback, and so the reader


def test_span_and_midpoints(gop250):
    def row(start, end):
        return Video(gop250, None, start, end, 0, "x.mp4")

    with V.VideoReader(gop250) as reader:
        assert reader.span(row(None, None)) == (0, 4)
        assert reader.span(row(1, 2.5)) == (1, 2.5)
        assert reader.span(row(3, 99)) == (3, 4)
        with pytest.raises(V.VideoError, match="starts at 4 s"):
            reader.span(row(4, 5))
    assert V.segment_midpoints(1, 4, 3).tolist() == [1.5, 2.5, 3.5]
    assert V.segment_midpoints(0, 1, 1).dtype == np.float64


# ---- real clips ----------------------------------------------------------------------------------


def real_clips():
    if not (REAL / "clips.csv").is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no real clips at {REAL}"))]
    with open(REAL / "clips.csv", newline="") as file:
        return [row["path"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", real_clips())
def test_real_clip(name):
    path = str(REAL / name)
    with V.VideoReader(path) as reader:
        times = np.random.default_rng(len(name)).uniform(0, reader.duration, 6)
        if name.endswith("pancake.mkv"):  # its sound is longer than its 310 frames
            assert reader.duration == pytest.approx(310 / 30, abs=1e-3)
    times, counted = np.sort(times), name.endswith(".avi")
    read, expected = V.read_frames(path, times), []
    with av.open(
        path
    ) as container:  # a plain decode that keeps only the frame on screen at each time
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        tolerance = min(0.499 * float(stream.time_base), 5e-4)
        first = None
        latest = None
        todo = list(times)
        for index, frame in enumerate(itertools.chain(container.decode(stream), [None])):
            first = first if index else frame.pts
            shown = (
                np.inf
                if frame is None
                else index / float(stream.average_rate)
                if counted
                else float((frame.pts - first) * stream.time_base)
            )
            while todo and todo[0] + tolerance < shown:
                expected.append(latest.to_ndarray(format="rgb24"))
                todo.pop(0)
            if not todo:
                break
            latest = frame
    assert np.array_equal(read, expected)


# ---- long files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_hours(tmp_path_factory):
    """An H.264 file of two hours at 30 frames/s: 900 copies of one group of pictures of eight
    seconds.
    """
    folder = tmp_path_factory.mktemp("long")
    part = write(folder / "part.mp4", pictures(240), options={"g": "240", "bf": "2"})
    with av.open(part) as source, av.open(str(folder / "long.mp4"), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [
            (bytes(packet), packet.pts, packet.dts, packet.is_keyframe)
            for packet in source.demux(stream)
            if packet.size
        ]
        step = round(240 / 30 / stream.time_base)
        for index in range(900):
            for data, pts, dts, key in packets:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = copy, stream.time_base, key
                packet.pts, packet.dts = pts + index * step, dts + index * step
                out.mux(packet)
    return str(folder / "long.mp4"), decode(part)[1]


def test_a_segment_deep_in_a_long_file_is_read_like_one_at_its_start(two_hours, monkeypatch):
    path, images = two_hours
    decoded = []

    def count(self):
        packets = original(self)
        for packet in packets:
            decoded.append(packet.pts)
            yield packet

    original = V.VideoReader._packets
    monkeypatch.setattr(V.VideoReader, "_packets", count)
    needed = []
    for start in (1.0, 7100.0 + 5):
        with V.VideoReader(path) as reader:
            assert reader.duration == pytest.approx(7200, abs=0.1)
            decoded.clear()
            times = start + np.arange(8) / 10 + 0.01
            frames = reader.read(times)
            needed.append(len(decoded))
        assert all(
            np.array_equal(frame, images[int(round(time * 30 - 0.3)) % 240])
            for frame, time in zip(frames, times, strict=True)
        )
    assert max(needed) < 300  # what lies before the segment's own key frame is not read


def test_libavs_log_is_silent_though_another_library_sets_its_level(tmp_path, caplog):
    """As older versions of torchvision do when they are imported. The exception has the reason."""
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        for _ in range(2):
            with pytest.raises(V.VideoError, match="moov atom not found"):
                V.VideoReader(tmp_path / "bad.mp4")
    finally:
        av.logging.set_level(level)
    assert caplog.records == []
