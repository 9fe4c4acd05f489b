"""What a trained contrastive head is good for: naming classes without a label (zero-shot), and
finding videos by text and texts by video (retrieval).

Stands alone.

    correct = zero_shot(video, classes, labels)     bool [N, 5]: right in the first 1 to 5 guesses
    to_text, to_video = retrieval(video, text)      FirstHits: rank of the first right answer
    to_text.recall(5), to_text.chance(5)

Both take unit vectors of one space: a video's is the projected mean of its tokens, a text's is
CLIP's. Videos that could not be read have a row of NaN: they are never found, and find nothing.

Shapes: N videos, K captions, C classes, E embedding, Q queries, A answers to choose from.
"""

from math import comb

import numpy as np

BLOCK = 1024  # queries compared with all answers at once


def zero_shot(video: np.ndarray, classes: np.ndarray, labels: np.ndarray, k: int = 5) -> np.ndarray:
    """Whether the class of each video is among its 1, 2, ... k most similar ones.

    video: float [N, E]; classes: float [C, E]; labels: int [N], -1 for a class that has no
    embedding. Returns bool [N, k]; -1 and NaN, of a video or of its class, count as wrong. Of
    equally similar classes the right one is ranked last, so that a head for which all classes are
    equal gets no hit."""
    correct = np.zeros((len(video), k), bool)
    # a label of -1 takes the last class here; it is wrong anyway
    finite_class = np.isfinite(classes).all(1)[labels]
    known = np.flatnonzero(np.isfinite(video).all(1) & (labels >= 0) & finite_class)
    similar = video[known] @ classes.T  # [known, C]
    right = similar[np.arange(len(known)), labels[known]]
    before = (similar >= right[:, None]).sum(1) - 1  # the right one itself is not before it
    correct[known] = before[:, None] < np.arange(1, k + 1)
    return correct


class FirstHits:
    """The rank of the first right answer of every query.

    ranks: float [Q], from 1; infinite for a query without a right answer. right: int [Q], how many
    answers are right. answers: how many there are in all."""

    def __init__(self, ranks: np.ndarray, right: np.ndarray, answers: int):
        self.ranks = ranks
        self.right = right
        self.answers = answers

    def recall(self, k: int) -> float:
        """The share of queries with a right answer among the first k."""
        return float((self.ranks <= k).mean())

    def median(self) -> float:
        """The median rank; infinite if half of the queries have none."""
        return float(np.median(self.ranks))

    def chance(self, k: int) -> float:
        """Recall at k of an order drawn at random."""
        k = min(k, self.answers)
        every = comb(self.answers, k)
        missed = [comb(self.answers - int(right), k) / every for right in self.right]
        return float(1 - np.mean(missed))


def rank_of_first(similar: np.ndarray, right: np.ndarray) -> FirstHits:
    """similar: float [Q, A], NaN where an answer cannot be compared; right: bool [Q, A]. An answer
    that is as similar as the best right one, but wrong, comes before it."""
    similar = np.where(np.isfinite(similar), similar, -np.inf)
    best = np.where(right, similar, -np.inf).max(1)  # [Q]
    before = ((similar >= best[:, None]) & ~right).sum(1)
    ranks = np.where(np.isfinite(best), 1.0 + before, np.inf)
    return FirstHits(ranks, right.sum(1), similar.shape[1])


def search(queries: np.ndarray, answers: np.ndarray, right: np.ndarray) -> FirstHits:
    """`rank_of_first` of queries [Q, E] among answers [A, E], without all similarities at once."""
    ranks = []
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        ranks.append(rank_of_first(queries[block] @ answers.T, right[block]).ranks)
    return FirstHits(np.concatenate(ranks), right.sum(1), len(answers))


def retrieval(video: np.ndarray, text: np.ndarray) -> tuple[FirstHits, FirstHits]:
    """The hits from videos to texts, and from texts to videos.

    video: float [N, E]; text: float [N, K, E], NaN where a video has fewer captions, but not
    everywhere. Texts that are equal count once, and each is right for every video that has it."""
    texts, of_caption = np.unique(text.reshape(-1, text.shape[-1]), axis=0, return_inverse=True)
    of_caption = of_caption.reshape(text.shape[:2])  # [N, K]: which of the texts
    owns = np.zeros((len(video), len(texts)), bool)
    np.put_along_axis(owns, of_caption, True, axis=1)
    given = np.isfinite(texts).all(1)
    owns = owns[:, given]
    texts = texts[given]
    described = owns.any(1)  # a video without a caption asks nothing, but may be found wrongly
    return search(video[described], texts, owns[described]), search(texts, video, owns.T)
