"""Motion fields: vectors of known motion through real encoders, their rasterisation by hand,
RAFT's units, and the stage.
"""

import json
from fractions import Fraction
from types import SimpleNamespace

import masks
import numpy as np
import pytest
import torch
import toy
from conftest import run
from test_video import write

from tgm import cues, motion
from tgm.video import VideoError, VideoReader, segment_midpoints

FPS, HEIGHT, WIDTH = 25, 96, 160


def panning(count, velocity, seed=0):
    """A smooth random texture that moves by `velocity` whole pixels a frame, x and y."""
    rng = np.random.default_rng(seed)
    big = torch.from_numpy(rng.random((1, 3, HEIGHT + 300, WIDTH + 300)))
    for _ in range(3):
        big = torch.nn.functional.avg_pool2d(big, 5, 1, padding=2)
    big = (big[0] - big.mean()) / big.std() * 45 + 128
    big = big.clamp(0, 255).byte().permute(1, 2, 0).numpy()
    dx, dy = velocity
    return [
        big[150 - dy * t : 150 - dy * t + HEIGHT, 150 - dx * t : 150 - dx * t + WIDTH]
        for t in range(count)
    ]


def pan(path, velocity=(3, -2), count=24, **how):
    return write(path, panning(count, velocity), fps=FPS, **how)


def read(path, count=24):
    with VideoReader(path, vectors=True) as reader:
        return reader.read_vectors(np.arange(count) / FPS)


def pixels(frame):
    """The velocities of a frame's vectors, in pixels per frame: [n, 2]."""
    return frame.shift / frame.seconds[:, None] * (WIDTH, HEIGHT) / FPS


ONE_REFERENCE = {"refs": "1", "bf": "0"}
B_FRAMES = {"refs": "1", "bf": "3", "x264-params": "b-adapt=0:b-pyramid=none"}
PYRAMID = {"refs": "1", "bf": "3", "x264-params": "b-adapt=0:b-pyramid=normal"}
ENCODED = {
    "h264.mp4": {"options": ONE_REFERENCE},
    "b.mp4": {"options": B_FRAMES},
    "pyramid.mp4": {"options": PYRAMID},
    "annexb.ts": {"options": PYRAMID},
    "pyramid.mkv": {"options": PYRAMID},
    "h264.avi": {"options": ONE_REFERENCE},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"qscale": "3"}},
    "qpel.mp4": {"codec": "mpeg4", "options": {"flags": "+qpel"}},
    "b.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4b.mp4": {"codec": "mpeg4", "b_frames": 2},
    "mpeg2.ts": {"codec": "mpeg2video", "b_frames": 2},
    "flv1.flv": {"codec": "flv"},
}


@pytest.mark.parametrize("name", ENCODED)
def test_a_pan_comes_back_as_its_velocity(tmp_path, name):
    """Every frame's median vector, whatever it refers to, and the field away from the border,
    where new texture comes in.
    """
    frames = read(pan(tmp_path / name, **ENCODED[name]))
    # libav keeps no vectors of MPEG-4's B pictures
    assert len(frames) >= (6 if name in ("b.avi", "mpeg4b.mp4") else 20)
    for frame in frames:
        assert np.abs(np.median(pixels(frame), 0) - (3, -2)).max() < 0.3, frame.time
        assert (frame.blocks[:, :2] < frame.blocks[:, 2:]).all() and frame.blocks.min() >= 0
    field = motion.codec_field(frames, segment_midpoints(0, 24 / FPS, 4), 0.3, 8)
    assert field.shape == (4, 2, 8, 8) and field.dtype == np.float32
    inner = field[:, :, 1:-1, 1:-1].transpose(0, 2, 3, 1) * (WIDTH, HEIGHT) / FPS
    assert np.abs(inner - (3, -2)).mean() < 0.15


def test_b_pictures_look_both_ways(tmp_path):
    """Vectors of both directions, each with the seconds to its own reference: I b b b P and I b
    B b P in steps of a frame.
    """
    for name, options, expected in (
        ("b.mp4", B_FRAMES, {1: (1, 3), 2: (2, 2), 3: (3, 1), 4: (4,)}),
        ("p.mp4", PYRAMID, {1: (1, 1), 2: (2, 2), 3: (1, 1), 4: (4,)}),
        ("p.ts", PYRAMID, {1: (1, 1), 2: (2, 2), 3: (1, 1), 4: (4,)}),
    ):
        frames = {
            round(frame.time * FPS): frame for frame in read(pan(tmp_path / name, options=options))
        }
        assert 0 not in frames  # the key frame
        for index, steps in expected.items():
            assert set(np.rint(frames[index].seconds * FPS).astype(int).tolist()) == set(steps), (
                name,
                index,
            )


def test_the_field_is_of_the_frame_as_displayed(tmp_path):
    for rotation, expected in ((90, (-2, -3)), (180, (-3, 2)), (-90, (2, 3))):
        # anticlockwise: right becomes up, up becomes left
        frames = read(pan(tmp_path / "turned.mp4", options=ONE_REFERENCE, rotation=rotation))
        wide, high = (HEIGHT, WIDTH) if rotation != 180 else (WIDTH, HEIGHT)
        for frame in frames:
            velocity = frame.shift / frame.seconds[:, None] * (wide, high) / FPS
            assert np.abs(np.median(velocity, 0) - expected).max() < 0.3
    # And the blocks move with it: the upper left quarter of the stored picture pans, the rest
    # stands still.
    images = [still.copy() for still in panning(24, (0, 0), 1)]
    for image, moving in zip(images, panning(24, (3, 0)), strict=True):
        image[:48, :80] = moving[:48, :80]
    moving = {
        90: (slice(5, 7), slice(1, 3)),
        180: (slice(5, 7), slice(5, 7)),
        -90: (slice(1, 3), slice(5, 7)),
    }
    for rotation, (rows, columns) in moving.items():
        path = write(
            tmp_path / "quarter.mp4", images, fps=FPS, options=ONE_REFERENCE, rotation=rotation
        )
        speed = (
            np.linalg.norm(motion.codec_field(read(path), np.array([0.5]), 0.5, 8)[0], axis=0)
            * WIDTH
            / FPS
        )  # [8, 8]
        assert np.abs(speed[rows, columns] - 3).max() < 0.5
        speed[rows, columns] = 0
        assert np.median(speed) < 0.1 and (speed[:4, :4].mean() < 0.2 or speed[4:, 4:].mean() < 0.2)
        for other in set(moving) - {rotation}:
            assert speed[moving[other]].max() < 1


@pytest.mark.parametrize(
    "name, how, codec",
    [
        ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, "mjpeg"),
        ("b.mp4", {"codec": "libx265"}, "hevc"),
        ("c.webm", {"codec": "libvpx-vp9"}, "vp9"),
        ("d.mp4", {"options": {"g": "1"}}, "h264"),
        ("e.mp4", {"count": 1}, "h264"),
    ],
)
def test_codecs_without_vectors_say_so(tmp_path, name, how, codec):
    path = pan(tmp_path / name, **{"count": 5} | how)
    with pytest.raises(
        VideoError, match=f"{name}: no motion vectors in its {codec} stream; --flow raft"
    ):
        read(path, 5)


def test_frames_are_the_same_with_vectors(tmp_path):
    path = pan(tmp_path / "a.mp4", options=PYRAMID)
    with VideoReader(path) as plain, VideoReader(path, vectors=True) as reader:
        assert np.array_equal(plain.read([0, 0.2, 0.9]), reader.read([0, 0.2, 0.9]))


# ---- vectors to fields


def vectors(time, *rows, seconds=0.1):
    """Rows of x0, y0, x1, y1, dx, dy."""
    rows = np.array(rows, np.float32)
    return SimpleNamespace(
        time=time,
        blocks=rows[:, :4],
        shift=rows[:, 4:],
        seconds=np.full(len(rows), seconds, np.float32),
    )


def test_paint_shares_blocks_out_by_area():
    # half over the first of 2 x 2 cells, half over the second
    block = np.array([[0.25, 0, 0.75, 0.25]], np.float32)
    total = motion.paint(block, np.array([[0.2, -0.4]], np.float32), np.array([0.5], np.float32), 2)
    area = 0.25 * 0.25
    assert (
        np.allclose(total[:, 0], np.array([[0.2, 0.2], [-0.4, -0.4], [0.5, 0.5]]) * area)
        and not total[:, 1].any()
    )
    outside = motion.paint(
        np.array([[-0.5, -0.5, 2.0, 2.0]], np.float32),
        np.ones((1, 2), np.float32),
        np.ones(1, np.float32),
        4,
    )
    assert np.allclose(outside, 1 / 16)


def test_the_field_is_total_displacement_over_total_time():
    whole = (0, 0, 1, 1)
    frames = [
        vectors(0.0, (*whole, 0.1, 0)),
        vectors(0.1, (*whole, 0.5, 0.2), seconds=0.3),
        vectors(0.9, (*whole, 9, 9)),
    ]
    field = motion.codec_field(frames, np.array([0.05]), 0.2, 4)
    assert np.allclose(field[0, 0], 0.6 / 0.4) and np.allclose(field[0, 1], 0.2 / 0.4)
    halves = [vectors(0.0, (0, 0, 0.5, 1, 0.1, 0), (0.5, 0, 1, 1, -0.1, 0.05))]
    field = motion.codec_field(halves, np.array([0.0]), 0.2, 4)[0]
    assert np.allclose(field[0], [[1, 1, -1, -1]] * 4) and np.allclose(
        field[1], [[0, 0, 0.5, 0.5]] * 4
    )


def test_gaps_are_filled_from_the_nearest_moment():
    field = np.full((5, 2, 2, 2), np.nan, np.float32)
    field[1, :, 0, 0], field[4, :, 0, 0] = 1, 4
    field[2, :, 0, 1] = 7
    filled = motion.fill_in_time(field)
    assert filled[:, 0, 0, 0].tolist() == [1, 1, 1, 4, 4] and filled[:, 1, 0, 1].tolist() == [7] * 5
    # never known: the moment's median
    assert filled[:, 0, 1, 1].tolist() == [np.median([a, 7]) for a in (1, 1, 1, 4, 4)]
    tie = np.full((3, 2, 1, 1), np.nan, np.float32)
    tie[0], tie[2] = 1, 3
    assert motion.fill_in_time(tie)[1, 0, 0, 0] == 1  # the earlier
    assert not np.isnan(motion.fill_in_time(np.full((2, 2, 2, 2), np.nan))).any()


def test_one_wild_vector_does_not_show():
    calm = [
        (x / 16, y / 16, (x + 1) / 16, (y + 1) / 16, 0.01, 0) for x in range(16) for y in range(16)
    ]
    wild = [row[:4] + (5, 5) if i == 100 else row for i, row in enumerate(calm)]
    field = motion.codec_field([vectors(0, *wild)], np.array([0.0]), 0.1, 8)
    assert np.allclose(field[0, 0], 0.1) and np.allclose(field[0, 1], 0)


# ---- RAFT


def test_pairs_of_frames():
    times, apart = motion.pair_times(np.array([0.0, 1.0, 2.0]), 0.0, 2.0, 30.0)
    assert apart == pytest.approx(0.1) and np.allclose(times[:, 1] - times[:, 0], apart)
    assert times[0, 0] == 0 and times[1].tolist() == pytest.approx(
        [0.95 + 1 / 60, 1.05 + 1 / 60], abs=1 / 59
    )
    assert times.min() >= 0 and times.max() < 2.0
    assert np.allclose(times * 30, np.rint(times * 30))  # on frames
    assert motion.pair_times(np.array([1.0]), 0.0, 2.0, 4.0)[1] == 0.25  # at least one frame apart


@pytest.mark.parametrize("frames, step", [(2, 1), (3, 2), (4, 3), (5, 3)])
@pytest.mark.parametrize("first", [0, 60])
def test_pairs_of_frames_of_a_very_short_span(frames, step, first):
    """Both frames are in it, and the seconds between them are those between what is read."""
    start = first / 30
    end = (first + frames) / 30
    times, apart = motion.pair_times(np.array([(start + end) / 2]), start, end, 30.0)
    assert apart == pytest.approx(step / 30)
    assert times[0, 1] - times[0, 0] == pytest.approx(apart)
    numbers = np.rint(times[0] * 30) - first
    assert numbers.min() >= 0 and numbers.max() <= frames - 1


def test_raft_field_is_in_frame_sizes_per_second():
    class Flow(torch.nn.Module):
        def forward(self, first, second):
            assert first.min() == -1 and second.max() == 1
            flow = torch.tensor([16.0, -8.0])[:, None, None].expand(2, 64, 128).clone()
            flow[:, :, 64:] = 0
            return [None, torch.stack([flow, 2 * flow])]

    pairs = torch.zeros(2, 2, 3, 64, 128, dtype=torch.uint8)
    pairs[:, 1] = 255
    field = motion.raft_field(Flow(), pairs, torch.tensor([0.1, 0.5]), 4)
    assert field.shape == (2, 2, 4, 4)
    assert torch.allclose(field[0, 0, 0], torch.tensor([1.25, 1.25, 0, 0])) and torch.allclose(
        field[0, 1, 3], torch.tensor([-1.25, -1.25, 0, 0])
    )
    assert torch.allclose(field[1, 0, 0], torch.tensor([0.5, 0.5, 0, 0]))


@pytest.fixture(scope="module")
def raft(tmp_path_factory):
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft.pth"
    torch.save(raft_small().state_dict(), path)
    return path


def test_a_field_that_is_not_finite_is_no_row(world, tmp_path, raft, capsys):
    state = torch.load(raft)
    torch.save({name: value * torch.nan for name, value in state.items()}, tmp_path / "nan.pth")
    flags = ("--data", world / "data/val.csv", "--cue", "motion", "--flow", "raft", "--grid", 4)
    flags += ("--flow-weights", tmp_path / "nan.pth", "--moments", 1, "--image-size", 128)
    flags += ("--batch-size", 1, "--max-steps", 1, "--workers", 0, "--out", tmp_path / "x")
    out = run("saliency.py", *flags)
    assert "its motion has numbers that are not finite" in out and "0 of 24 videos" in out


def test_the_stage_with_raft(world, tmp_path, raft):
    """Random weights: what is written is what torchvision's own model says of the two frames."""
    run(
        "saliency.py",
        "--data",
        world / "data/val.csv",
        "--cue",
        "motion",
        "--flow",
        "raft",
        "--flow-weights",
        raft,
        *("--moments 2 --grid 4 --image-size 128 --batch-size 2 --max-steps 1 --workers 0").split(),
        "--out",
        tmp_path / "x",
    )
    field = np.load(tmp_path / "x.motion.npy")
    assert (
        field.shape == (24, 2, 2, 4, 4)
        and np.isfinite(field[:2]).all()
        and np.isnan(field[2:]).all()
    )
    model = motion.load_raft(raft, "cpu")
    with VideoReader(world / "data/videos/val/00001.mp4") as reader, torch.no_grad():
        pair = torch.from_numpy(reader.read([0.5, 0.6], (128, 128))).permute(0, 3, 1, 2) / 127.5 - 1
        flow = model(pair[:1], pair[1:])[-1][0]
    expected = flow.unflatten(1, (4, 32)).unflatten(3, (4, 32)).mean((2, 4)) / 128 / 0.1
    assert np.allclose(field[1, 0], expected, rtol=2e-3, atol=2e-3)


def test_raft_weights_that_do_not_load(copy, raft, monkeypatch):
    base = ("saliency.py", "--cue", "motion", "--flow", "raft", "--workers", 0)
    (copy / "bad.pth").write_bytes(b"not weights")
    assert "cannot load bad.pth" in run(*base, "--flow-weights", "bad.pth", cwd=copy, fails=True)
    torch.save({"x": torch.zeros(1)}, copy / "other.pth")
    line = run(*base, "--flow-weights", "other.pth", cwd=copy, fails=True)
    assert "cannot load other.pth" in line and "Missing key(s) in state_dict" in line
    assert "cannot load gone.pth" in run(*base, "--flow-weights", "gone.pth", cwd=copy, fails=True)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda *_, **__: (_ for _ in ()).throw(OSError("no network")),
    )
    line = run(*base, cwd=copy, fails=True)
    assert "cannot load the published weights: no network" in line and "--flow-weights FILE" in line


# ---- the stage


@pytest.mark.parametrize("rate, count", [(Fraction(30000, 1001), 60), (Fraction(25), 24)])
def test_every_frame_of_a_video_is_asked_for_once(tmp_path, monkeypatch, rate, count):
    """60 frames at 30000/1001 fps last 2.002 s, which rounding makes a little more."""
    path = write(tmp_path / "a.mp4", panning(count, (1, 0)), fps=rate)
    asked = []
    monkeypatch.setattr(
        VideoReader, "read_vectors", lambda self, times: asked.append(times * float(rate)) or []
    )
    monkeypatch.setattr(motion, "codec_field", lambda *_: np.zeros(1, np.float32))
    video = SimpleNamespace(path=path, start=None, end=None)
    cues.read_codec_field(video, moments=4, window=2 * count, grid=4, timeout=30)
    assert np.allclose(asked[0], np.arange(count))


def test_the_toy_worlds_field(world):
    """The direction on the object of moving actions, against the truth; every number finite."""
    right = []
    for split, count in (("train", 32), ("val", 24)):
        field = np.load(world / f"data/{split}.motion.npy")
        assert (
            field.shape == (count, 16, 2, 8, 8)
            and field.dtype == np.float16
            and np.isfinite(field).all()
        )
        scenes = [toy.scene(0, split, row) for row in range(count)]
        found = masks.field_error(field, scenes)
        right += [share for share, _, n in found.values() for _ in range(n)]
        assert found["static"][0] > 0.85 and found["static"][1] < 0.6
    assert len(right) > 15 and np.mean(right) >= 0.8
    about = json.loads((world / "data/val.motion.json").read_text())
    assert (about["flow"], about["moments"], about["grid"], about["window"]) == ("codec", 16, 8, 5)


def test_ranks_fill_their_own_rows_and_settings_are_held(copy):
    path = copy / "data/train.motion.npy"
    expected = np.load(path)
    array = np.load(path, mmap_mode="r+")
    array[5:20] = np.nan
    array.flush()
    base = ("saliency.py", "--cue", "motion", "--grid", 8, "--workers", 0)
    out = run(*base, "--moments", 16, cwd=copy, ranks=2)
    assert "32 of 32 videos" in out and "7 to do on rank 0 of 2" in out
    assert np.array_equal(np.load(path), expected)
    expected = "made with moments 16, not 8: give the earlier settings again, or --resume none"
    assert expected in run(*base, "--moments", 8, cwd=copy, fails=True)


def test_a_part_of_a_longer_video(tmp_path):
    """Rows with start and end see their own part alone: still, then to the right, then to the
    left.
    """
    images = panning(1, (0, 0)) * 30 + panning(30, (3, 0)) + panning(30, (-3, 0))
    write(
        tmp_path / "long.mp4",
        images,
        fps=FPS,
        options={**ONE_REFERENCE, "g": "30", "keyint_min": "30"},
    )
    (tmp_path / "parts.csv").write_text(
        "path,start,end\nlong.mp4,,1.1\nlong.mp4,1.3,2.3\nlong.mp4,2.6,3.5\n"
    )
    run(
        "saliency.py",
        *"--data parts.csv --cue motion --moments 3 --grid 4 --workers 0".split(),
        cwd=tmp_path,
    )
    field = np.load(tmp_path / "parts.motion.npy").astype(np.float32)[..., 1:-1, 1:-1] * WIDTH / FPS
    assert (
        np.abs(field[:, :, 0].mean((1, 2, 3)) - (0, 3, -3)).max() < 0.3
        and np.abs(field[:, :, 1]).mean() < 0.5
    )


def test_failures_are_named_and_leave_their_rows_empty(copy):
    pan(copy / "j.avi", codec="mjpeg", pix_fmt="yuvj420p", count=5)
    (copy / "some.csv").write_text("path\nj.avi\ndata/videos/train/00001.mp4\ngone.mp4\n")
    assert "1 of 3 videos" in run(
        "saliency.py", "--data", "some.csv", "--cue", "motion", "--workers", 0, cwd=copy
    )
    assert np.isnan(np.load(copy / "some.motion.npy")).reshape(3, -1).all(1).tolist() == [
        True,
        False,
        True,
    ]
    (copy / "none.csv").write_text("path\nj.avi\n")
    assert "none of its videos gave a row" in run(
        "saliency.py", "--data", "none.csv", "--cue", "motion", "--workers", 0, cwd=copy, fails=True
    )


def test_flags_that_contradict(copy, capsys):
    import saliency

    for flags, reason in (
        (["--flow", "raft"], "--flow is for --cue motion"),
        (["--grid", "28"], "--grid is for --cue motion"),
        (["--window", "3"], "--window is for --cue motion"),
        (["--cue", "motion", "--dense", "last"], "--dense is for --cue text"),
        (
            ["--clip", "local-dir:x", "--pretrained", "openai"],
            "--pretrained is not for --clip local-dir:x, which brings its own weights",
        ),
        (["--cue", "motion", "--clip", "RN50"], "--clip is for --cue text and --cue classes"),
        (["--cue", "motion", "--flow-weights", "x"], "--flow-weights is for --flow raft"),
        (["--cue", "motion", "--flow", "raft", "--window", "3"], "--window is for --flow codec"),
        (["--cue", "motion", "--image-size", "64"], "--image-size is for --cue text and --flow"),
        (
            ["--cue", "motion", "--flow", "raft", "--image-size", "100"],
            "--image-size of --flow raft: expected a multiple of 8, at least 128",
        ),
        (
            ["--cue", "motion", "--flow", "raft", "--image-size", "132"],
            "--image-size of --flow raft: expected a multiple of 8, at least 128",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            saliency.parse_args(flags)
        assert stop.value.code == 2 and reason in capsys.readouterr().err


BASELINE = {"profile": "baseline"}
ZEROLATENCY = {"tune": "zerolatency"}


@pytest.mark.parametrize(
    "options, least, most",
    [
        ({"refs": "1"}, 0.95, 1.05),
        ({"refs": "3"}, 0.95, 1.3),
        (BASELINE | {"refs": "1"}, 0.95, 1.05),
        (BASELINE | {"refs": "4"}, 1.3, 2.2),
        (ZEROLATENCY | {"refs": "1"}, 0.95, 1.05),
        (ZEROLATENCY | {"refs": "4"}, 1.3, 2.2),
    ],
)
def test_speeds_with_several_references_are_off_as_measured(tmp_path, options, least, most):
    """The vectors of a stream do not tell which picture they mean: too fast without B pictures,
    in the right direction always.
    """
    rng = np.random.default_rng(1)
    velocity = np.array((3, -2))
    images = [
        (image + rng.normal(0, 10, image.shape)).clip(0, 255).astype(np.uint8)
        for image in panning(36, velocity)
    ]
    frames = read(write(tmp_path / "a.mp4", images, fps=FPS, options=options), 36)
    field = motion.codec_field(frames, segment_midpoints(0, 36 / FPS, 4), 5 / FPS, 8)
    inner = field[:, :, 1:-1, 1:-1].transpose(0, 2, 3, 1) * (WIDTH, HEIGHT) / FPS
    mean = inner.mean((0, 1, 2))
    assert least < mean @ velocity / (velocity @ velocity) < most
    assert mean @ velocity / np.linalg.norm(mean) / np.linalg.norm(velocity) > 0.99
