"""Credit: how much of an image's influences belongs to each creator.

The rule. Of the first `depth` images of the ranking, an image's credit is the influence that its score predicts
(magnitude.py), where that is positive; all others have none. A creator's share is the sum of her images' credits
divided by the sum of all. It follows that shares are at least 0 and sum to 1, do not depend on the unit of influence,
and that a creator who is split in two splits her share. The teacher's own shares, which these predict, come from the
same rule with the teacher's ranking and scores.

Shares c carry intervals by conformal prediction. With independent deviations d_i of the influences t_i,
sigma_c^2 = sum_i d_i^2 (1[i in c] - share_c)^2 / (sum_i t_i)^2; the interval is share_c -+ width (sigma_c + FLOOR).
`width` is a quantile over queries of the largest |teacher's share - share| / (sigma + FLOOR) of any creator, measured
on each half of the queries under the map of the other half. So *all* intervals of an image hold the teacher's shares
for `LEVEL` of images: pooled over creators the same level would be reached by the many shares near zero.
benchmark/credit.py measures how often they do on other queries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgda.core import require_file, save_json
from fastgda.magnitude import Magnitude
from fastgda.rankings import Rankings, top

LEVEL, FLOOR = 0.9, 0.01
DEPTH = 100
UNKNOWN = "unknown"
"""The creator of images of whom none is known."""


@dataclass(frozen=True)
class Share:
    """What one creator is credited with."""

    creator: str
    share: float
    """From 0 to 1."""
    low: float
    high: float
    """Of its interval; the intervals of all creators hold the teacher's shares for 9 of 10 images."""
    images: int
    """Images of the creator among the first `depth`."""


@dataclass(frozen=True)
class Credit:
    """The rule with its fitted parts, for one ranker."""

    magnitude: Magnitude
    width: float
    """Of the intervals, in units of sigma."""
    depth: int = DEPTH
    """Images that can have credit."""
    ranker: str = ""
    """What identifies the ranker whose scores it maps: the SHA-256 of its file."""
    fitted_on: str = ""
    """Queries it was fitted on, in words."""

    def __post_init__(self) -> None:
        if self.depth < 1 or not (np.isfinite(self.width) and self.width >= 0):
            raise ValueError(
                f"expected a depth of at least 1 and a width of at least 0, found {self.depth}, {self.width}"
            )

    @classmethod
    def fit(
        cls,
        scores: np.ndarray,
        teacher: Rankings,
        creators: Sequence[str | None],
        *,
        depth: int = DEPTH,
        ranker: str = "",
        fitted_on: str = "",
    ) -> Credit:
        """Fits ranker's `scores` [Q, N] of all images, whose creators are given, to the teacher's; `ValueError` for
        fewer than two queries. Queries of one concept should follow each other: the halves are those of the rows.
        """
        influence = dense(teacher, scores.shape[1])
        if len(scores) != teacher.queries or len(scores) < 2:
            raise ValueError(f"expected scores of {max(2, teacher.queries)} queries, found {len(scores)}")
        depth = min(depth, scores.shape[1])
        codes, names = coded(creators)
        truth = teacher_shares(teacher, codes, len(names), depth)
        largest = np.empty(len(scores))
        for held in np.array_split(np.arange(len(scores)), 2):
            others = np.delete(np.arange(len(scores)), held)
            rule = cls(Magnitude.fit(scores[others], influence[others]), 1.0, depth)
            for query in held:
                ids = top(scores[query : query + 1], depth)[0]
                found, sigma = rule.estimate(scores[query, ids], codes[ids], len(names))
                largest[query] = (np.abs(found - truth[query]) / (sigma + FLOOR)).max()
        # the quantile that split conformal prediction takes of so many queries
        width = np.quantile(largest, min(1.0, LEVEL * (1 + 1 / len(scores))))
        return cls(Magnitude.fit(scores, influence), float(width), depth, ranker, fitted_on)

    def estimate(self, scores: np.ndarray, codes: np.ndarray, creators: int) -> tuple[np.ndarray, np.ndarray]:
        """(shares [creators], sigma [creators]) for the scores of the first images, codes[i] the creator of i."""
        scores, codes = scores[: self.depth], codes[: self.depth]
        credit = np.maximum(self.magnitude.predict(scores), 0)
        total = credit.sum()
        if total == 0:
            return np.zeros(creators), np.zeros(creators)
        shares = np.bincount(codes, credit, creators) / total
        variance = self.magnitude.spread(scores) ** 2
        own = np.bincount(codes, variance, creators)
        others = np.maximum(variance.sum() - own, 0)
        return shares, np.sqrt(own * (1 - shares) ** 2 + others * shares**2) / total

    def interval(self, shares: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lower, upper) ends of the intervals for shares and their sigma, of any shape."""
        reach = self.width * (sigma + FLOOR)
        return np.maximum(shares - reach, 0), np.minimum(shares + reach, 1)

    def shares(self, scores: np.ndarray, creators: Sequence[str | None]) -> tuple[Share, ...]:
        """Shares, largest first, for the scores of one query's first images (descending) and their creators.

        Creators without any of these images have no share and are not listed; empty if no image has positive influence.
        """
        codes, names = coded(creators[: self.depth])
        found, sigma = self.estimate(np.asarray(scores), codes, len(names))
        if not found.any():
            return ()
        low, high = self.interval(found, sigma)
        images = np.bincount(codes, minlength=len(names))
        columns = (column.tolist() for column in (found, low, high, images))
        rows = [Share(*row) for row in zip(names, *columns, strict=True)]
        return tuple(sorted(rows, key=lambda row: (-row.share, row.creator)))

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        save_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path, *, ranker: str | None = None) -> Credit:
        """Reads what `save` wrote; `ValueError` if it is damaged or belongs to another ranker."""
        path = require_file(path, "python -m benchmark.credit")
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            parts = {name: np.array(values, dtype=np.float64) for name, values in fields.pop("magnitude").items()}
            credit = cls(Magnitude(**parts), **fields)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: expected a credit rule, found something else ({error})") from error
        if ranker is not None and credit.ranker != ranker:
            raise ValueError(
                f"{path}: expected the credit rule of ranker {ranker[:12]}…, found that of {credit.ranker[:12]}…; "
                "fit it again: python -m benchmark.credit"
            )
        return credit


def credit_path(checkpoint: Path) -> Path:
    """Where the credit rule of the ranker in file `checkpoint` is kept."""
    return checkpoint.with_suffix(".credit.json")


def dense(teacher: Rankings, images: int) -> np.ndarray:
    """[Q, images] the teacher's scores by image; `ValueError` unless it scored all images."""
    if teacher.score is None:
        raise ValueError("expected rankings with the teacher's scores, found ranks only")
    if teacher.candidates != images:
        raise ValueError(f"expected scores of all {images} images, found {teacher.candidates} candidates")
    influence = np.empty(teacher.rank.shape, dtype=np.float32)
    np.put_along_axis(influence, teacher.rank.astype(np.int64), teacher.score.astype(np.float32), axis=1)
    return influence


def coded(creators: Sequence[str | None]) -> tuple[np.ndarray, list[str]]:
    """(code of each image's creator, names by code)."""
    names = sorted({creator or UNKNOWN for creator in creators})
    place = {name: code for code, name in enumerate(names)}
    return np.array([place[creator or UNKNOWN] for creator in creators], dtype=np.int64), names


def teacher_shares(teacher: Rankings, codes: np.ndarray, creators: int, depth: int) -> np.ndarray:
    """[Q, creators] shares under the teacher's own ranking and scores; zero where no score is positive."""
    assert teacher.score is not None
    found = np.zeros((teacher.queries, creators))
    for row, ids, scores in zip(found, teacher.rank[:, :depth], teacher.score[:, :depth], strict=True):
        credit = np.maximum(scores.astype(np.float64), 0)
        if total := credit.sum():
            row[:] = np.bincount(codes[ids], credit, creators) / total
    return found
