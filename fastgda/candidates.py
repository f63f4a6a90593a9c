"""What the samplers know of a query's candidates: a subset of them, their relevance, and the images outside them."""

from __future__ import annotations

import logging
from statistics import NormalDist

import numpy as np

from fastgda.rankings import Rankings

logger = logging.getLogger(__name__)


class Outliers:
    """Draws training images outside the candidates of a query, uniformly and without rejection."""

    def __init__(self, candidates: np.ndarray, images: int) -> None:
        """candidates [Q, K]: distinct ids in a row, in any order. images: N."""
        queries, self.candidates = candidates.shape
        self.outside = images - self.candidates
        # place j of a sorted row has (id_j - j) outsiders below it; adding a multiple of the row number makes the
        # table ascend as a whole, so that one searchsorted serves pairs of any queries
        kind = np.dtype(np.int32 if queries * (self.outside + 1) < 2**31 else np.int64)
        below = np.sort(candidates, axis=1).astype(kind, copy=False)
        below -= np.arange(self.candidates, dtype=kind)
        below += (np.arange(queries) * (self.outside + 1)).astype(kind)[:, None]
        self.below = below.ravel()

    def draw(self, queries: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """[P] query rows -> [P] ids of images that are not among their candidates."""
        if queries.size == 0:
            return np.empty(0, dtype=np.int64)
        which = random.integers(self.outside, size=queries.shape)
        keys = (queries * (self.outside + 1) + which).astype(self.below.dtype)
        return which + np.searchsorted(self.below, keys, side="right") - queries * self.candidates


def usable_outlier_prob(candidates: int, images: int, outlier_prob: float) -> float:
    """`outlier_prob`, or 0 with a warning where the candidates are all the training images."""
    if outlier_prob and candidates == images:
        logger.warning("outlier_prob %s is ignored: the rankings cover all %d images", outlier_prob, images)
        return 0.0
    return outlier_prob


def fixed_subset(rankings: Rankings, size: int, seed: int) -> Rankings:
    """`size` random candidates of each query in the order of its ranking, the same however many queries there are."""
    places = np.stack(
        [
            np.sort(np.random.default_rng((seed, query)).choice(rankings.candidates, size, replace=False))
            for query in range(rankings.queries)
        ]
    )
    score = None if rankings.score is None else np.take_along_axis(rankings.score, places, axis=1)
    return Rankings(np.take_along_axis(rankings.rank, places, axis=1), score)


def relevance_table(rankings: Rankings, target: str, size: int | None = None) -> np.ndarray:
    """Standardised influence of the candidates in their order: [Q, K] from `score`s, or [1, size] from `rank`s alone.

    `score`: (score - mean) / deviation of each query. `rank`: the normal quantile of the rank among `size` candidates
    (K by default), which is what a normally distributed score would give and is untouched by heavy tails.
    """
    if target == "score":
        if rankings.score is None:
            raise ValueError("--loss, --target: expected training rankings with the teacher's scores, found ranks only")
        score = rankings.score.astype(np.float32)
        deviation = score.std(axis=1, keepdims=True)
        return (score - score.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-12)
    normal, count = NormalDist(), size or rankings.candidates
    return np.array([[normal.inv_cdf(1 - (place + 0.5) / count) for place in range(count)]], dtype=np.float32)
