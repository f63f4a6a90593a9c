"""Vectors and queries like those of a real embedding, in any number, drawn when asked for.

Synthetic vectors: a row of the embedding, reduced to `dim` principal directions, plus normal noise with the covariance
that rows have about their nearest neighbour, then unit length; every row of the embedding becomes a cluster. Queries:
the same about random vectors of the index, the noise scaled so that the median cosine of a query and its nearest
vector is that of the given query file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from abu.room import require_disk
from fastgda.core import atomic_path
from fastgda.dataset import normalise
from fastgda.index import FlatIndex
from fastgda.index.snapshot import best_of
from fastgda.index.source import BLOCK, NpyRows

SPREAD_ROWS = 4096
"""Rows of the embedding from which the covariance about nearest neighbours is estimated."""


@dataclass(frozen=True)
class Statistics:
    """What is imitated of an embedding, in its `dim` principal directions."""

    centres: np.ndarray
    """[C, dim] its rows."""
    root: np.ndarray
    """[dim, dim], a root of the covariance of rows about their nearest neighbour (halved: both scatter)."""
    query_cosine: float
    """Median cosine of a real query and its nearest row."""

    @classmethod
    def of(cls, embedding: np.ndarray, queries: np.ndarray, dim: int) -> Statistics:
        """From rows [C, D] and queries [Q, D] at unit length."""
        rows, asked = (normalise(np.asarray(part, dtype=np.float32)) for part in (embedding, queries))
        if dim > rows.shape[1]:
            raise ValueError(f"dims: expected at most {rows.shape[1]}, the embedding's width, found {dim}")
        directions = np.linalg.eigh(rows.T @ rows)[1][:, ::-1][:, :dim]
        rows, asked = normalise(rows @ directions), normalise(asked @ directions)
        index = FlatIndex.build(rows)
        some = rows[np.linspace(0, len(rows) - 1, min(SPREAD_ROWS, len(rows))).astype(int)]
        apart = some - rows[index.search(some, 2).ids[:, 1]]
        values, vectors = np.linalg.eigh(apart.T @ apart / (2 * len(apart)))
        root = (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)
        return cls(rows, root, float(np.median(index.search(asked, 1).scores)))


@dataclass(frozen=True)
class Synthetic:
    """Rows [size, dim] that are drawn when asked for: block i depends on the statistics and i only."""

    statistics: Statistics
    size: int
    _kept: dict[int, np.ndarray] = field(default_factory=dict)
    """The last block drawn."""

    @property
    def shape(self) -> tuple[int, int]:
        """(size, dim)."""
        return self.size, self.statistics.centres.shape[1]

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        wanted = np.arange(*rows.indices(self.size)) if isinstance(rows, slice) else rows
        out = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        for number in np.unique(wanted // BLOCK):
            inside = wanted // BLOCK == number
            out[inside] = self._block(int(number))[wanted[inside] % BLOCK]
        return out

    def _block(self, number: int) -> np.ndarray:
        if number not in self._kept:
            self._kept.clear()
            self._kept[number] = self._draw(np.random.default_rng((0, number)))
        return self._kept[number]

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        centres, root = self.statistics.centres, self.statistics.root
        noise = random.standard_normal((BLOCK, self.shape[1]), dtype=np.float32) @ root.T
        return normalise(centres[random.integers(len(centres), size=BLOCK)] + noise)

    def queries(self, count: int) -> np.ndarray:
        """[count, dim] queries about random rows, at the distance of real ones.

        With noise ε of mean square m² about a unit vector the expected cosine is near 1/√(1 + s² m²) = c.
        """
        random = np.random.default_rng((1, 0))
        rows = self[np.sort(random.integers(self.size, size=count))]
        noise = random.standard_normal(rows.shape, dtype=np.float32) @ self.statistics.root.T
        power = float((noise**2).sum(1).mean())
        scale = np.sqrt(max(self.statistics.query_cosine**-2 - 1, 0) / max(power, 1e-12))
        return normalise(rows + np.float32(scale) * noise)


def keep(rows: Synthetic, path: Path, dtype: str) -> NpyRows:
    """The rows as a file of `dtype`, written unless it is there: to read them is several times faster than to draw."""
    if not path.is_file():
        require_disk(path.parent, rows.size * rows.shape[1] * np.dtype(dtype).itemsize)
        with atomic_path(path) as temporary:
            out = open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=rows.shape)
            for start in tqdm(range(0, rows.size, BLOCK), desc="drawing", unit="block"):
                out[start : start + BLOCK] = rows[start : start + BLOCK]
            out.flush()
    return NpyRows(path)


def exact_neighbours(rows: Synthetic, queries: np.ndarray, k: int) -> np.ndarray:
    """[Q, k] ids of the exact neighbours, nearest first, block by block."""
    ids, scores = np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
    for start in tqdm(range(0, rows.size, BLOCK), desc="exact search", unit="block"):
        block = rows[start : start + BLOCK]
        products = queries @ block.T
        names = np.broadcast_to(np.arange(start, start + len(block)), products.shape)
        best = best_of(np.concatenate([ids, names], 1), np.concatenate([scores, products], 1), k)
        ids, scores = best.ids, best.scores
    return ids
