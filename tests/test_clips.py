"""Which frames make a clip or a view: known answers, and real files through the views."""
import numpy as np
import pytest
import torch
from test_video import pictures, write

import clips
from manifest import Video
from video import VideoError, read_frames


def test_clip_times_lie_in_the_span_and_the_last_moment_repeats():
    assert clips.clip_times(2, 12, 10, 4, 5, 0.0).tolist() == pytest.approx([2, 2.5, 3, 3.5])
    assert clips.clip_times(2, 12, 10, 4, 5, 1.0).tolist() == pytest.approx([10, 10.5, 11, 11.5])  # the window is 2 s wide
    assert clips.clip_times(2, 12, 10, 4, 5, 0.5)[0] == pytest.approx(6)
    short = clips.clip_times(1, 1.4, 10, 4, 2, 0.7)
    assert short.tolist() == pytest.approx([1, 1.2, 1.35, 1.35])  # 0.35: inside the last frame


def test_center_crop():
    frames = np.arange(2 * 4 * 10 * 3, dtype=np.uint8).reshape(2, 4, 10, 3)
    cut, box = clips.center_crop(frames, 4)
    assert np.array_equal(cut, frames[:, :, 3:7]) and box == pytest.approx((0.3, 0, 0.7, 1))
    cut, box = clips.center_crop(frames.swapaxes(1, 2), 4)
    assert cut.shape == (2, 4, 4, 3) and box == pytest.approx((0, 0.3, 1, 0.7))


def test_uniform_times_take_one_of_each_part():
    assert clips.uniform_times(2, 10, 30, 4, 0.5).tolist() == [3, 5, 7, 9]
    assert clips.uniform_times(0, 8, 30, 4, np.array([0, 0.25, 0.5, 0.75])).tolist() == [0, 2.5, 5, 7.5]
    assert clips.uniform_times(0, 8, 4, 4, 1.0)[-1] == 8 - 0.125  # inside the last frame
    both = np.sort(np.concatenate([clips.uniform_times(0, 8, 30, 4, where) for where in (0.25, 0.75)]))
    assert both.tolist() == (np.arange(8) + 0.5).tolist()  # two clips interleave


def test_side_crops():
    frames = np.arange(2 * 4 * 10 * 3, dtype=np.uint8).reshape(2, 4, 10, 3)
    cut = clips.side_crops(frames, 4, 3)
    assert cut.shape == (3, 2, 4, 4, 3)
    for got, left in zip(cut, (0, 3, 6)):
        assert np.array_equal(got, frames[:, :, left:left + 4])
    upright = clips.side_crops(frames.swapaxes(1, 2), 4, 3)
    assert np.array_equal(upright, cut.swapaxes(2, 3))
    assert np.array_equal(clips.side_crops(frames, 4, 1)[0], frames[:, :, 3:7])
    assert len(clips.side_crops(frames[:, :, :4], 4, 3)) == 3  # a square: the same three times


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_views_are_clips_times_crops_in_that_order(tmp_path, sampling):
    path = write(tmp_path / "a.mp4", pictures(60), fps=30)
    bad = Video(str(tmp_path / "gone.mp4"), None, None, None, 7, "gone.mp4")
    views = clips.Views([Video(path, None, None, None, 3, "a.mp4"), bad], 4, 48, 3, clips=2, crops=3, sampling=sampling)
    row, got, error = views[0]
    assert (row, error, got.shape, got.dtype) == (3, None, (6, 3, 4, 48, 48), torch.uint8)
    for i, where in enumerate((0.25, 0.75)):
        times = clips.clip_times(0, 2, 30, 4, 3, where) if sampling == "dense" else clips.uniform_times(0, 2, 30, 4, where)
        frames = read_frames(path, times, 48)                                                # [4, 48, 64, 3]
        for j, left in enumerate((0, 8, 16)):
            assert np.array_equal(got[3 * i + j].permute(1, 2, 3, 0), frames[:, :, left:left + 48])
    row, got, error = views[1]
    assert (row, got) == (7, None) and "gone.mp4" in error


def test_a_broken_video_gives_its_place_to_the_same_other():
    class Some(clips.TrainingClips):
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
    with pytest.raises(VideoError, match="3.mp4: and nine videos"):
        some[0, 3]
