"""tgm/zeroshot.py against answers that are known."""

import itertools
import json
import resource

import numpy as np
import pytest

from tgm import arrays, classes, zeroshot
from tgm.manifest import ManifestError
from tgm.zeroshot import FirstHits, rank_of_first, retrieval, zero_shot

EYE = np.eye(6, dtype=np.float32)


def test_zero_shot_of_equal_and_permuted_embeddings():
    labels = np.arange(6)
    assert zero_shot(EYE, EYE, labels).all()
    found = zero_shot(EYE, np.roll(EYE, 1, 0), labels)  # every class is another's
    assert not found.any()  # five classes are as similar as the right one, and come before it
    tilted = EYE + 0.5 * np.roll(EYE, 1, 1)  # the second guess of each is the next class
    found = zero_shot(tilted, EYE, (labels + 1) % 6)
    assert (found == (False, True, True, True, True)).all()


def test_zero_shot_where_all_classes_are_alike_knows_none():
    same = np.ones((4, 6), np.float32)
    assert not zero_shot(same, same[:3], np.array([0, 1, 2, 0]))[:, :2].any()
    assert zero_shot(same, same[:3], np.array([0, 1, 2, 0]))[:, 2:].all()  # of three classes


def test_zero_shot_counts_what_cannot_be_right_as_wrong():
    video = EYE[:3].copy()
    video[1] = np.nan
    found = zero_shot(video, EYE, np.array([0, 1, -1]))
    assert found.tolist() == [[True] * 5, [False] * 5, [False] * 5]
    classes = EYE.copy()
    classes[2] = np.nan  # a class that is not finite is wrong, and does not harm the others
    found = zero_shot(EYE[:3], classes, np.array([0, 1, 2]))
    assert found.tolist() == [[True] * 5, [True] * 5, [False] * 5]
    # a class that never occurs only takes part in the choice
    assert zero_shot(video[:1], EYE, np.array([0])).all()


def test_retrieval_of_its_own_captions():
    text = np.stack([EYE, EYE], 1)  # [6, 2, 6]: the same caption twice is one text
    to_text, to_video = retrieval(EYE, text)
    assert to_text.answers == to_video.answers == 6
    for ranks in (to_text, to_video):
        assert (ranks.ranks == 1).all() and ranks.recall(1) == 1 and ranks.median() == 1
        assert ranks.chance(1) == pytest.approx(1 / 6) and ranks.chance(10) == 1


def test_retrieval_of_permuted_captions():
    # video i is most like text i, then i + 1, ...; its own is i + 2: rank 3
    similar = np.array([[6 - (a - i) % 6 for a in range(6)] for i in range(6)], np.float32)
    to_text, to_video = retrieval(similar, np.roll(EYE, 2, 1)[:, None])
    assert (to_text.ranks == 3).all() and to_text.recall(1) == 0 and to_text.recall(5) == 1
    assert (to_video.ranks == 3).all() and to_video.median() == 3


def test_videos_with_one_caption_count_as_one_answer():
    text = EYE[[0, 0, 1, 2]][:, None]  # two videos have the same caption
    video = EYE[[3, 0, 1, 2]]  # the first is like none of the texts
    to_text, to_video = retrieval(video, text)
    assert to_text.answers == 3 and to_video.answers == 4
    assert to_text.ranks.tolist() == [3, 1, 1, 1]
    assert to_video.ranks.tolist() == [1, 1, 1]  # the second video answers for both
    assert sorted(to_video.right) == [1, 1, 2]


def test_videos_that_failed_and_captions_that_are_not_there():
    video = EYE[:3].copy()
    video[0] = np.nan
    text = np.stack([EYE[:3], np.full((3, 6), np.nan, np.float32)], 1)
    text[2] = np.nan  # the third video has no caption at all
    to_text, to_video = retrieval(video, text)
    assert to_text.ranks.tolist() == [np.inf, 1] and to_text.median() == np.inf
    assert sorted(to_video.ranks) == [1, np.inf] and to_video.recall(10) == 0.5


def test_blocks_of_queries_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    video = rng.normal(size=(7, 6)).astype(np.float32)
    text = EYE[rng.integers(6, size=(7, 2))]
    whole = retrieval(video, text)
    monkeypatch.setattr(zeroshot, "BLOCK", 2)
    for one, other in zip(whole, retrieval(video, text), strict=True):
        assert np.array_equal(one.ranks, other.ranks) and np.array_equal(one.right, other.right)


def test_ties_count_against_the_right_answer():
    found = rank_of_first(np.ones((2, 4), np.float32), np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool))
    assert found.ranks.tolist() == [4, 3]


def test_chance_is_what_random_orders_give():
    rng = np.random.default_rng(0)
    right = np.array([1, 2, 5])
    ranks = FirstHits(np.ones(3), right, 8)
    for k in (1, 5):
        drawn = [
            [min(rng.permutation(8)[:count]) < k for count in right.tolist()] for _ in range(4000)
        ]
        assert ranks.chance(k) == pytest.approx(np.mean(drawn), abs=0.015)
    orders = list(itertools.permutations(range(4)))
    exact = np.mean([min(order[:2]) < 2 for order in orders])  # two right ones of four, k = 2
    assert FirstHits(np.ones(1), np.array([2]), 4).chance(2) == pytest.approx(exact)


# ---- the array of classes ------------------------------------------------------------------------


def test_classes_that_could_not_be_written_can_be_made_again(tmp_path):
    """A full disk while they are made again leaves nothing that the next run refuses."""
    path = tmp_path / "val.classes.npy"
    old = {"prompts": ["a {}"], "names": ["cat", "dog"]}
    new = {"prompts": ["the {}"], "names": ["cat", "dog"]}
    array = np.random.default_rng(0).random((2, 4000)).astype(np.float16)
    try:
        assert classes.claim_classes(path, old, "auto")
        classes.write_classes(path, array, old)
        assert not classes.claim_classes(path, old, "auto")
        assert classes.claim_classes(path, new, "none")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
        try:
            with pytest.raises(ManifestError, match="cannot be written .File too large."):
                classes.write_classes(path, array, new)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for resume in ("auto", "none"):
            assert classes.claim_classes(path, new, resume)
        classes.write_classes(path, 2 * array, new)
        assert np.array_equal(np.load(path), 2 * array)
        assert json.loads(path.with_suffix(".json").read_text()) == new | {"shape": [2, 4000]}
        assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".lock", ".npy"]
    finally:
        arrays.release()
