"""Which frames make a clip or a view: known answers, and real files through the views."""

import numpy as np
import pytest
import torch
from test_video import pictures, write

from tgm import sampling
from tgm.manifest import Video
from tgm.sampling import Views
from tgm.video import VideoError, read_frames


def test_clip_times_lie_in_the_span_and_the_last_moment_repeats():
    assert sampling.clip_times(2, 12, 10, 4, 5, 0.0).tolist() == pytest.approx([2, 2.5, 3, 3.5])
    # the window is 2 s wide
    assert sampling.clip_times(2, 12, 10, 4, 5, 1.0).tolist() == pytest.approx([10, 10.5, 11, 11.5])
    assert sampling.clip_times(2, 12, 10, 4, 5, 0.5)[0] == pytest.approx(6)
    short = sampling.clip_times(1, 1.4, 10, 4, 2, 0.7)
    assert short.tolist() == pytest.approx([1, 1.2, 1.35, 1.35])  # 0.35: inside the last frame


def test_center_crop():
    frames = np.arange(2 * 4 * 10 * 3, dtype=np.uint8).reshape(2, 4, 10, 3)
    cut, box = sampling.center_crop(frames, 4)
    assert np.array_equal(cut, frames[:, :, 3:7]) and box == pytest.approx((0.3, 0, 0.7, 1))
    cut, box = sampling.center_crop(frames.swapaxes(1, 2), 4)
    assert cut.shape == (2, 4, 4, 3) and box == pytest.approx((0, 0.3, 1, 0.7))


def test_uniform_times_take_one_of_each_part():
    assert sampling.uniform_times(2, 10, 30, 4, 0.5).tolist() == [3, 5, 7, 9]
    assert sampling.uniform_times(0, 8, 30, 4, np.array([0, 0.25, 0.5, 0.75])).tolist() == [
        0,
        2.5,
        5,
        7.5,
    ]
    assert sampling.uniform_times(0, 8, 4, 4, 1.0)[-1] == 8 - 0.125  # inside the last frame
    both = np.sort(
        np.concatenate([sampling.uniform_times(0, 8, 30, 4, where) for where in (0.25, 0.75)])
    )
    assert both.tolist() == (np.arange(8) + 0.5).tolist()  # two clips interleave


def test_side_crops():
    frames = np.arange(2 * 4 * 10 * 3, dtype=np.uint8).reshape(2, 4, 10, 3)
    cut = sampling.side_crops(frames, 4, 3)
    assert cut.shape == (3, 2, 4, 4, 3)
    for got, left in zip(cut, (0, 3, 6)):
        assert np.array_equal(got, frames[:, :, left : left + 4])
    upright = sampling.side_crops(frames.swapaxes(1, 2), 4, 3)
    assert np.array_equal(upright, cut.swapaxes(2, 3))
    assert np.array_equal(sampling.side_crops(frames, 4, 1)[0], frames[:, :, 3:7])
    assert len(sampling.side_crops(frames[:, :, :4], 4, 3)) == 3  # a square: the same three times


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_views_are_clips_times_crops_in_that_order(tmp_path, sampling):
    path = write(tmp_path / "a.mp4", pictures(60), fps=30)
    bad = Video(str(tmp_path / "gone.mp4"), None, None, None, 7, "gone.mp4")
    views = Views(
        [Video(path, None, None, None, 3, "a.mp4"), bad],
        4,
        48,
        3,
        clips=2,
        crops=3,
        sampling=sampling,
    )
    row, got, error = views[0]
    assert (row, error, got.shape, got.dtype) == (3, None, (6, 3, 4, 48, 48), torch.uint8)
    numbers = {
        "dense": ([0, 3, 6, 9], [48, 51, 54, 57]),
        "uniform": ([0, 15, 30, 45], [7, 22, 37, 52]),
    }[sampling]  # of 60 frames
    for i in range(2):
        times = np.array(numbers[i]) / 30
        frames = read_frames(path, times, 48)  # [4, 48, 64, 3]
        for j, left in enumerate((0, 8, 16)):
            assert np.array_equal(
                got[3 * i + j].permute(1, 2, 3, 0), frames[:, :, left : left + 48]
            )
    row, got, error = views[1]
    assert (row, got) == (7, None) and "gone.mp4" in error


def test_a_broken_video_gives_its_place_to_the_same_other():
    class Some(sampling.TrainingClips):
        def sample(self, epoch, row, rng):
            if row in bad:
                raise VideoError(f"{row}: broken")
            return {"row": row, "epoch": epoch}

    videos, bad = [Video(f"{row}.mp4", None, None, None, row, "") for row in range(20)], {3, 4}
    some, rows = Some(videos, np.arange(20), seed=0), range(20)
    assert some[2, 5] == {"row": 5, "epoch": 2, "failed": -1}
    first = some[2, 3]
    assert first["failed"] == 3 and first["row"] not in bad and some[2, 3] == first
    assert len({some[epoch, 3]["row"] for epoch in range(20)}) > 5
    bad = set(rows)
    with pytest.raises(VideoError, match="^3: broken; and nine videos"):
        some[0, 3]


def videomae_dense(total, clip_len, rate, segments):
    """The frames of VideoMAE's dense test clips, from the description of its kinetics.py: every
    rate-th frame, the last one repeated up to clip_len; then windows of clip_len that start evenly,
    rounded down."""
    kept = list(range(0, total, rate))
    kept += [kept[-1]] * (clip_len - len(kept))
    step = (len(kept) - clip_len) / (segments - 1)
    return [kept[int(k * step + 1e-9) : int(k * step + 1e-9) + clip_len] for k in range(segments)]


def videomae_uniform(total, parts):
    """The frames of VideoMAE's two uniform test clips, from the description of its ssv2.py: the
    beginnings and the middles of the parts, sorted, dealt out in turn."""
    part = total / parts
    numbers = sorted(
        [int(part * i) for i in range(parts)] + [int(part / 2 + part * i) for i in range(parts)]
    )
    return [numbers[0::2], numbers[1::2]]


def frames_on_screen(times, fps):
    return np.floor(times * fps + 1e-3).astype(int).tolist()


@pytest.mark.parametrize("fps", [30, 25, 24000 / 1001])
def test_test_clips_are_videomaes(fps):
    for total in (300, 299, 250, 97, 64, 63, 40, 5, 1):
        for segments, rate in ((5, 4), (2, 4), (10, 2)):
            found = sampling.view_times(0, total / fps, fps, 16, rate, segments, "dense")
            assert frames_on_screen(found, fps) == videomae_dense(total, 16, rate, segments), (
                total,
                segments,
                rate,
            )
    for total in (300, 97, 48, 40, 33):
        assert frames_on_screen(
            sampling.view_times(0, total / fps, fps, 16, 4, 2, "uniform"), fps
        ) == videomae_uniform(total, 16)
    ten_seconds = sampling.view_times(0, 10, 30, 16, 4, 5, "dense")
    assert (
        frames_on_screen(ten_seconds[:, 0], 30) == [0, 56, 116, 176, 236]
        and frames_on_screen(ten_seconds[-1], 30)[-1] == 296
    )
    later = sampling.view_times(3, 13, 30, 16, 4, 5, "dense")  # an action within a longer video
    assert np.allclose(later, ten_seconds + 3)


def test_one_test_clip_is_the_middle_one():
    assert sampling.view_times(2, 12, 10, 4, 5, 1, "dense").tolist() == [
        sampling.clip_times(2, 12, 10, 4, 5, 0.5).tolist()
    ]
    assert sampling.view_times(2, 10, 30, 4, 5, 1, "uniform").tolist() == [[3, 5, 7, 9]]


def test_multi_scale_crops_lie_at_thirteen_places():
    """The sides of the pairs, and the places in quarters of the room, each as often as the
    others.
    """
    torch.manual_seed(0)
    height, width, draws = 240, 320, 20_000
    places, sides = {}, {}
    for _ in range(draws):
        top, left, h, w = sampling.multi_scale_crop(height, width)
        assert 0 <= top <= height - h and 0 <= left <= width - w
        sides[h, w] = sides.get((h, w), 0) + 1
        if h < 200:  # a whole short side has no room: its places coincide
            down, right = top // ((height - h) // 4), left // ((width - w) // 4)
            assert (top, left) == (down * ((height - h) // 4), right * ((width - w) // 4))
            places[down, right] = places.get((down, right), 0) + 1
    lengths = [240, 210, 180, 158]
    assert set(sides) == {
        (lengths[i], lengths[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1
    }
    corners_and_sides = {(i, j) for i in (0, 2, 4) for j in (0, 2, 4)}
    quarters = {(i, j) for i in (1, 3) for j in (1, 3)}
    assert set(places) == corners_and_sides | quarters
    for counts in (places, sides):
        expected = sum(counts.values()) / len(counts)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize("height, width, size", [(40, 60, 16), (90, 50, 112), (33, 64, 33)])
def test_a_resized_crop_is_torchvisions(height, width, size):
    from torchvision.transforms.v2 import functional

    torch.manual_seed(0)
    frames = torch.randint(256, (4, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for box in [(3, 5, 30, 21), (0, 0, 33, 33), (0, 0, height, width)]:
        theirs = functional.resized_crop(frames, *box, [size, size], antialias=True)
        ours = sampling.resized_crop(frames, box, size)
        assert (ours.int() - theirs.int()).abs().max() <= 1
        if torch.__version__ >= (2, 14):  # torch 2.8 scales channels that lie apart less exactly
            assert torch.equal(ours, theirs)


def test_few_failures_are_said_and_none_where_all_fail(capsys):
    class Some(sampling.TrainingClips):
        def sample(self, epoch, row, rng):
            if row in bad:
                raise VideoError(f"{row}: broken")
            return {"row": row}

    some = Some([], np.arange(20), seed=0)
    bad = set(range(10))
    assert [some[0, row]["failed"] for row in range(20)] == [*range(10), *[-1] * 10]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "skipped: 0: broken",
        "skipped: 1: broken",
        "skipped: 2: broken; further ones are only counted",
    ]
    bad = set(range(20))
    some = Some([], np.arange(20), seed=0)
    with pytest.raises(
        VideoError, match="^5: broken; and nine videos drawn in its place cannot be read either"
    ):
        some[0, 5]
    assert capsys.readouterr().err == ""
