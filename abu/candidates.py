"""The training images that exact influence is computed on: the candidates of every query (paper, section 3.2).

Stage 1 of the paper's collection gives each query K candidates, its nearest neighbours in an off-the-shelf feature:

    python -m fastgda.neighbours --ftype effnet --split train --k 1200     # data/emoji/nn_effnet_train.npz

Any `.npz` with `rank` [Q, K] serves: rankings of another method, or neighbours found in an index of LAION's size. Of
each list a random share can be taken, as the paper does there (K = 100,000, of which 20 %); of the full training set,
the same share serves all queries. An image that several queries need is evaluated at θ0 once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgda.core import load_npz


@dataclass(frozen=True)
class CandidateConfig:
    """Which training images a query's influence is computed on."""

    candidates: Path | None = None
    """File with `rank` [queries, K], the candidates of each query (default: the whole training set)."""
    k: int | None = None
    """Only the first K of each list."""
    subset: float = 1.0
    """Random share of each list."""
    subset_seed: int = 0
    """Seed of that choice."""

    def __post_init__(self) -> None:
        if not 0 < self.subset <= 1:
            raise ValueError(f"--subset: expected a share in (0, 1], found {self.subset}")
        if self.k is not None and (self.k < 1 or self.candidates is None):
            raise ValueError(f"--k: expected a positive number beside --candidates, found {self.k}")


def candidate_lists(config: CandidateConfig, queries: int, images: int) -> np.ndarray:
    """[Q, K] int64 ids of every query's candidates, each once.

    Raises `ValueError` naming the file if it has other queries, too few candidates, ids out of range or ids twice.
    """
    if config.candidates is None:
        every = np.arange(images)
        if config.subset < 1:
            every = _subset(every, config, "all")
        return np.broadcast_to(every, (queries, len(every)))
    path = config.candidates
    lists = load_npz(path, ("rank",), made_by="python -m fastgda.neighbours")["rank"]
    if lists.ndim != 2 or not np.issubdtype(lists.dtype, np.integer) or not lists.size:
        raise ValueError(f"{path}: expected rank [Q, K] of integers, found {lists.dtype} {list(lists.shape)}")
    if len(lists) != queries:
        raise ValueError(f"{path}: expected candidates of {queries} queries, found {len(lists)}")
    count = lists.shape[1] if config.k is None else config.k
    if count > lists.shape[1]:
        raise ValueError(f"{path}: expected at least {count} candidates of each query, found {lists.shape[1]}")
    lists = lists[:, :count].astype(np.int64)
    if lists.min() < 0 or lists.max() >= images:
        raise ValueError(f"{path}: expected training ids 0..{images - 1}, found {lists.min()} to {lists.max()}")
    ordered = np.sort(lists, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if twice.any():
        raise ValueError(f"{path}: expected each candidate once, found one twice in row {int(np.argmax(twice))}")
    if config.subset < 1:
        return np.stack([_subset(row, config, query) for query, row in enumerate(lists)])
    return lists


def _subset(ids: np.ndarray, config: CandidateConfig, query: int | str) -> np.ndarray:
    """A random share of `ids` in their order, the same whatever other queries there are."""
    key = 0 if query == "all" else 1 + int(query)
    count = max(1, round(config.subset * len(ids)))
    places = np.random.default_rng((config.subset_seed, key)).choice(len(ids), count, replace=False)
    return ids[np.sort(places)]
