"""From a ranker's score to the teacher's: ranks alone lose how concentrated influence is.

The teacher's score t of a training image is predicted from the ranker's score s by a monotone step function, least
squares on queries with the teacher's scores of all images (isotonic regression), read off between its steps by linear
interpolation. So as not to depend on single images, pairs (s, t) are first averaged in bins of neighbouring s, few in a
bin at the top of the ranking, where influence is, and more and more below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

SMALLEST, GROWTH = 20, 1.1
"""Pairs in the bin of the highest scores, and how much larger each following bin is."""


@dataclass(frozen=True)
class Magnitude:
    """A monotone map from scores to influence, in the unit of the teacher's scores."""

    scores: np.ndarray
    """[B] mean score of each bin, ascending."""
    influence: np.ndarray
    """[B] influence predicted there, never falling."""
    deviation: np.ndarray
    """[B] standard deviation of the teacher's scores around it."""

    def __post_init__(self) -> None:
        sizes = {np.shape(self.scores), np.shape(self.influence), np.shape(self.deviation)}
        if len(sizes) != 1 or np.ndim(self.scores) != 1 or np.size(self.scores) == 0:
            raise ValueError(f"expected three lists of one length, found {sorted(sizes)}")
        if not all(np.isfinite(values).all() for values in (self.scores, self.influence, self.deviation)):
            raise ValueError("expected finite numbers, found NaN or infinity")
        if (np.diff(self.scores) <= 0).any() or (np.diff(self.influence) < 0).any() or (self.deviation < 0).any():
            raise ValueError("expected ascending scores, influence that never falls and deviations of at least 0")

    @classmethod
    def fit(cls, scores: np.ndarray, influence: np.ndarray) -> Magnitude:
        """Fits pairs (ranker's score, teacher's score) of any shape, the same for both."""
        scores, influence = np.ravel(scores).astype(np.float64), np.ravel(influence).astype(np.float64)
        if scores.shape != influence.shape or scores.size == 0:
            raise ValueError(f"expected pairs, found {scores.size} scores and {influence.size} influences")
        order = np.argsort(-scores, kind="stable")
        scores, influence = scores[order], influence[order]
        starts = bin_starts(scores)
        sizes = np.diff([*starts, len(scores)])
        centres, means = (np.add.reduceat(values, starts) / sizes for values in (scores, influence))
        fitted = isotonic_regression(means, weights=sizes, increasing=False).x
        around = np.add.reduceat((influence - np.repeat(fitted, sizes)) ** 2, starts) / sizes
        return cls(centres[::-1], fitted[::-1], np.sqrt(around)[::-1])

    def predict(self, scores: np.ndarray) -> np.ndarray:
        """Influence predicted for `scores` of any shape; beyond the fitted range, that of its end."""
        return np.interp(scores, self.scores, self.influence)

    def spread(self, scores: np.ndarray) -> np.ndarray:
        """Standard deviation of the teacher's scores around `predict`."""
        return np.interp(scores, self.scores, self.deviation)


def bin_starts(scores: np.ndarray) -> np.ndarray:
    """First places of the bins of descending `scores`; equal scores are never parted."""
    starts, size, place = [0], float(SMALLEST), SMALLEST
    # a last bin of fewer than its due joins the one before
    while place + round(size * GROWTH) <= len(scores):
        size *= GROWTH
        first = int(np.searchsorted(-scores, -scores[place], side="left"))
        if first > starts[-1]:
            starts.append(first)
        place += round(size)
    return np.array(starts)
