"""The teacher's rankings: the one place that turns scores into rankings and rankings into labels.

    python -m fastgda.rankings convert data/coco/influence_train.pkl data/coco/influence_train.npz    # a released file

One sign everywhere: scores[query, image], higher = more influential. A ranking lists training images, most influential
first. A label is the normalised rank pi of the paper (section 3.3), in {1/K, ..., 1}: 1/K is the most influential of K
candidates; images outside the candidates ("outliers") have pi = 1.

Files: `.npz` with `rank` [Q, K] and optionally `score` [Q, K], or the released pickles
`{"random" | "fixed": {"rank": [Q, K], ...}}`. Their scores are `influence` [Q, N], by training id, or
`influence_subset` [Q, K], in the order of the query's candidates, whose places in descending order are
`rank_influence_subset` [Q, K]. Pickles go through an allow-list.
"""

from __future__ import annotations

import logging
import math
import pickle
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgda.core import atomic_path, command_line, command_parser, load_npz, require_file, save_npz

logger = logging.getLogger(__name__)

ALLOWED_GLOBALS = frozenset(
    {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    }
)
"""What a pickled numpy array refers to under pickle protocols 0 to 5; nothing else may be named by a ranking file."""

RELEASED_KEYS = ("random", "fixed")
REFUSED = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError),
    *(OverflowError, MemoryError),
)
"""What unpickling raises for a damaged or hostile file, depending on its bytes."""


@dataclass(frozen=True)
class Rankings:
    """Rankings of Q queries, K training images each."""

    rank: np.ndarray
    """[Q, K] integer ids of training images, most influential first."""
    score: np.ndarray | None = None
    """[Q, K] influence of those images, descending within a row; absent where only ranks are known."""

    def __post_init__(self) -> None:
        if self.rank.ndim != 2 or not np.issubdtype(self.rank.dtype, np.integer):
            raise ValueError(f"expected rank [Q, K] of integers, found {self.rank.dtype} {list(self.rank.shape)}")
        if self.score is not None and self.score.shape != self.rank.shape:
            raise ValueError(f"expected score {list(self.rank.shape)} like rank, found {list(self.score.shape)}")

    @property
    def queries(self) -> int:
        """Q."""
        return self.rank.shape[0]

    @property
    def candidates(self) -> int:
        """K."""
        return self.rank.shape[1]

    def rows(self, index: slice | np.ndarray) -> Rankings:
        """The rankings of some of the queries."""
        return Rankings(self.rank[index], None if self.score is None else self.score[index])

    def first(self, count: int) -> Rankings:
        """The first `count` candidates of every query; `ValueError` if there are fewer."""
        if not 1 <= count <= self.candidates:
            raise ValueError(f"expected 1..{self.candidates} candidates, as many as are ranked, found {count}")
        if count == self.candidates:
            return self
        return Rankings(self.rank[:, :count].copy(), None if self.score is None else self.score[:, :count].copy())


def load_rankings(path: str | Path, images: int, *, made_by: str = "") -> Rankings:
    """Reads and checks a ranking file of either kind.

    images: N, the number of training images. Raises `ValueError` naming the file if it is missing, damaged or hostile,
    if an id is outside 0..N-1 or repeated within a row, or if scores are not finite and descending.
    """
    path = require_file(path, made_by)
    try:
        rankings = _read_npz(path) if zipfile.is_zipfile(path) or path.suffix == ".npz" else _read_pickle(path)
        check(rankings, images)
        if rankings.rank.dtype.itemsize > 4:
            # the released files hold int64: 400 MB for 5,000 x 10,000 ids
            rankings = Rankings(rankings.rank.astype(np.int32), rankings.score)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return rankings


def save_rankings(path: str | Path, rankings: Rankings) -> None:
    """Writes `.npz`: ids as int16 where they fit, else int32; scores as float16.

    Scores are divided by the power of two that brings their root mean square into [1, 2), because influences as small
    as 1e-8 do not exist in float16; their unit is therefore arbitrary, and common to the file.
    """
    if str(path)[-4:] != ".npz":
        raise ValueError(f"{path}: expected a name ending in .npz")
    small = rankings.rank.size == 0 or rankings.rank.max() <= np.iinfo(np.int16).max
    arrays: dict[str, Any] = {"rank": rankings.rank.astype(np.int16 if small else np.int32)}
    if rankings.score is not None:
        score = rankings.score.astype(np.float64)
        spread = math.sqrt(np.mean(score**2)) if score.size else 0.0
        scaled = score / 2.0 ** math.floor(math.log2(spread)) if spread else score
        limit = float(np.finfo(np.float16).max)
        arrays["score"] = np.clip(scaled, -limit, limit).astype(np.float16)
    save_npz(path, **arrays)


def save_released(path: str | Path, **arrays: np.ndarray) -> None:
    """Writes a pickle in the released form, `{"random": {"rank": [Q, K], ...}}`: numpy arrays in a dictionary."""
    if str(path)[-4:] != ".pkl":
        raise ValueError(f"{path}: expected a name ending in .pkl")
    assert arrays["rank"].ndim == 2 and all(isinstance(array, np.ndarray) for array in arrays.values())
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        pickle.dump({RELEASED_KEYS[0]: arrays}, handle, protocol=4)


def check(rankings: Rankings, images: int) -> None:
    """`ValueError` unless ids lie in 0..images-1, differ within each row, and scores are finite and descending."""
    rank, score = rankings.rank, rankings.score
    if rank.size == 0:
        raise ValueError(f"expected at least one query and one candidate, found rank {list(rank.shape)}")
    if rank.min() < 0 or rank.max() >= images:
        raise ValueError(f"expected training ids 0 to {images - 1}, found {rank.min()} to {rank.max()}")
    seen = np.zeros(images, dtype=bool)
    for query, row in enumerate(rank):
        seen[:] = False
        seen[row] = True
        if np.count_nonzero(seen) != row.size:
            ids, counts = np.unique(row, return_counts=True)
            raise ValueError(f"expected distinct ids in a row, found {ids[counts > 1][0]} twice in row {query}")
    if score is not None:
        bad = ~np.isfinite(score).all(axis=1)
        if bad.any():
            raise ValueError(f"expected finite scores, found NaN or infinity in row {int(np.argmax(bad))}")
        bad = (score[:, 1:] > score[:, :-1]).any(axis=1)
        if bad.any():
            raise ValueError(f"expected scores in descending order, found an increase in row {int(np.argmax(bad))}")


def top(scores: np.ndarray, count: int | None = None) -> np.ndarray:
    """[Q, count] ids of the highest scores [Q, N], highest first, equal scores by ascending id; all N by default."""
    size = scores.shape[1]
    count = size if count is None else count
    if not 1 <= count <= size:
        raise ValueError(f"expected a number of images in 1..{size}, found {count}")
    if not np.isfinite(scores).all():
        raise ValueError("expected finite scores, found NaN or infinity")
    found = np.empty((len(scores), count), dtype=np.int32)
    for row, out in zip(scores, found, strict=True):
        if count == size:
            out[:] = _descending(row)
            continue
        threshold = np.partition(row, size - count)[size - count]
        above = np.flatnonzero(row > threshold)
        # the images at the threshold come last, lowest ids first, so a stable order of the rest is the whole order
        ids = np.concatenate([above, np.flatnonzero(row == threshold)[: count - above.size]])
        out[:] = ids[_descending(row[ids])]
    return found


def from_scores(scores: np.ndarray, keep: int | None = None) -> Rankings:
    """Rankings of the `keep` highest scores (all by default) of scores [Q, N], ties by ascending id."""
    rank = top(scores, keep)
    return Rankings(rank, np.take_along_axis(scores, rank, axis=1))


def labels(rankings: Rankings, images: int) -> np.ndarray:
    """[Q, images] normalised ranks pi: (position + 1) / K for candidates, 1 for outliers; float32."""
    table = np.ones((rankings.queries, images), dtype=np.float32)
    np.put_along_axis(table, rankings.rank.astype(np.int64), candidate_labels(rankings.candidates)[None], axis=1)
    return table


def candidate_labels(candidates: int) -> np.ndarray:
    """[K] normalised ranks 1/K, ..., 1 of the candidates in their order; float32."""
    return (np.arange(1, candidates + 1) / candidates).astype(np.float32)


def popularity(rankings: Rankings, images: int) -> np.ndarray:
    """[images] the baseline that ignores the query: 1 - mean label over the queries, higher = more influential."""
    gain = np.broadcast_to(1.0 - candidate_labels(rankings.candidates), rankings.rank.shape)
    return np.bincount(rankings.rank.ravel(), gain.ravel(), minlength=images) / rankings.queries


def _descending(row: np.ndarray) -> np.ndarray:
    if row.dtype != np.float32:
        return np.argsort(-row, kind="stable")
    # (score, id) packed into one integer each: numpy sorts integers 20 times faster than it argsorts stably
    bits = (0.0 - row).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    keys = ordered << np.uint64(32) | np.arange(row.size, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)


def _read_npz(path: Path) -> Rankings:
    arrays = load_npz(path, ("rank",))
    with np.load(path, allow_pickle=False) as archive:
        scored = "score" in archive
    if scored:
        arrays |= load_npz(path, ("score",))
    return Rankings(arrays["rank"], arrays.get("score"))


def _read_pickle(path: Path) -> Rankings:
    try:
        with open(path, "rb") as handle:
            content = _ArrayUnpickler(handle).load()
    except REFUSED as error:
        raise ValueError(f"expected a pickle of numpy arrays and containers, found: {error}") from error
    keys = [key for key in RELEASED_KEYS if isinstance(content, dict) and key in content]
    inner = content[keys[0]] if keys else None
    if not isinstance(inner, dict) or not isinstance(inner.get("rank"), np.ndarray):
        raise ValueError("expected {'random' or 'fixed': {'rank': array [Q, K]}}, found another structure")
    rank = inner["rank"]
    score = _released_score(inner, rank)
    if score is not None and not (np.isfinite(score).all() and (score[:, 1:] <= score[:, :-1]).all()):
        logger.warning("%s: influence is ignored, because it does not descend in the order of rank", path)
        score = None
    return Rankings(rank, score)


def _released_score(arrays: dict[str, Any], rank: np.ndarray) -> np.ndarray | None:
    # in the order of rank, float32
    whole = "influence" in arrays
    influence = arrays.get("influence" if whole else "influence_subset")
    order = rank if whole else arrays.get("rank_influence_subset")
    if not (isinstance(influence, np.ndarray) and isinstance(order, np.ndarray)):
        return None
    if influence.ndim != 2 or len(influence) != len(rank) or influence.dtype.kind not in "iuf":
        return None
    if order.ndim != 2 or order.shape != rank.shape or order.dtype.kind not in "iu":
        return None
    if order.size == 0 or order.min() < 0 or order.max() >= influence.shape[1]:
        return None
    return np.take_along_axis(influence, order, axis=1).astype(np.float32)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        with warnings.catch_warnings():
            # pickles written under numpy 1 name numpy.core, which numpy 2 still resolves
            warnings.simplefilter("ignore", DeprecationWarning)
            return super().find_class(module, name)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Converts a released ranking pickle to `.npz`, with its scores where it holds them."""
    parser = command_parser("python -m fastgda.rankings", __doc__)
    convert = parser.add_subparsers(required=True).add_parser("convert", help=main.__doc__, description=main.__doc__)
    add = convert.add_argument
    add("source", type=Path, help="released pickle (influence_train.pkl, influence_test.pkl, nn_dino.pkl)")
    add("target", type=Path, help=".npz file to write")
    add("--images", type=int, default=118_287, help="number of training images (default: COCO's)")
    args = parser.parse_args(argv)
    rankings = load_rankings(args.source, args.images)
    save_rankings(args.target, rankings)
    scored = "with scores" if rankings.score is not None else "ranks only"
    print(f"{args.target}: {rankings.queries} queries, {rankings.candidates} candidates each, {scored}")


if __name__ == "__main__":
    sys.exit(main())
