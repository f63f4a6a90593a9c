"""Where the vectors of an index come from: files larger than memory, read and embedded a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from torch import Tensor

from fastgda.core import load_npy, sha256_file
from fastgda.dataset import normalise, unreadable
from fastgda.index.backend import as_ids, as_vectors
from fastgda.index.metadata import count_rows, read_tables, stored_ids, without_metadata
from fastgda.ranker import load_ranker

BLOCK = 8192
"""Rows held in memory at a time."""
AS_THEY_ARE, COSINE = "none", "cosine"
"""What stands for the ranker's hash where vectors are indexed as they are, or at unit length."""


class Embedder(Protocol):
    """What scores by an inner product: `embed_queries(q) @ embed(z).T`, higher = more influential. See `Ranker`."""

    def embed(self, features: np.ndarray) -> Tensor:
        """[N, D] features of training images -> [N, E]."""

    def embed_queries(self, features: np.ndarray) -> Tensor:
        """[Q, D] features of queries -> [Q, E]."""


class Rows(Protocol):
    """An array [N, D] that need not be in memory: numpy's memory maps, or rows made when asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        """Some rows: a slice, or ascending row numbers."""


Embed = Callable[[np.ndarray], np.ndarray]


class NpyRows:
    """Rows of a `.npy` file, mapped; another process gets its path, not its contents."""

    def __init__(self, path: Path) -> None:
        """`ValueError` naming the file if it is missing, damaged or no matrix."""
        self.path = path
        self.array = load_npy(path, (None, None), mmap=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""
        return self.array.shape

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        return self.array[rows]

    def __reduce__(self) -> tuple[type[NpyRows], tuple[Path]]:
        return NpyRows, (self.path.absolute(),)


class Kept:
    """Some ascending rows of an array, read when asked for."""

    def __init__(self, array: Rows, rows: np.ndarray) -> None:
        self._array = array
        self._rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, D)."""
        return len(self._rows), self._array.shape[1]

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        return np.asarray(self._array[self._rows[rows]])


def kept_tables(tables: Iterable[pa.Table], rows: np.ndarray) -> Iterator[pa.Table]:
    """The ascending `rows` of consecutive `tables`."""
    first = 0
    for table in tables:
        inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(table))]
        yield table.take(pa.array(inside - first))
        first += len(table)


class Vectors:
    """The vectors of a source, in a stream: what another process needs to build a shard."""

    def __init__(self, arrays: Sequence[Rows], embed: Embed | None = None) -> None:
        """`embed` maps features to embeddings; by default rows are taken as they are."""
        self.arrays = arrays
        self.starts = np.cumsum([0, *(array.shape[0] for array in arrays)])
        if len(self) == 0:
            raise ValueError("vectors: expected at least one training image, found none")
        if len({array.shape[1:] for array in arrays}) != 1 or len(arrays[0].shape) != 2:
            raise ValueError(f"vectors: expected files of one width, found {[list(array.shape) for array in arrays]}")
        self.embed = embed
        self.dim = self.rows(0, 1).shape[1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Embeddings [stop - start, E], float32, of consecutive rows."""
        parts = []
        for array, first in zip(self.arrays, self.starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, array.shape[0])
            if low < high:
                parts.append(np.asarray(array[low:high], dtype=np.float32))
        return self._embedded(parts, start)

    def take(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first in `rows`, embeddings) of ascending row numbers, `BLOCK` at a time."""
        for begin in range(0, len(rows), BLOCK):
            some, parts = rows[begin : begin + BLOCK], []
            for array, first, last in zip(self.arrays, self.starts, self.starts[1:], strict=False):
                inside = some[(some >= first) & (some < last)] - first
                if len(inside):
                    parts.append(np.asarray(array[inside], dtype=np.float32))
            yield begin, self._embedded(parts, int(some[0]))

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, embeddings) of rows start..stop-1, `BLOCK` rows at a time."""
        for first in range(start, stop, BLOCK):
            yield first, self.rows(first, min(first + BLOCK, stop))

    def _embedded(self, parts: list[np.ndarray], first: int) -> np.ndarray:
        vectors = as_vectors(f"vectors from row {first}", np.concatenate(parts))
        return vectors if self.embed is None else as_vectors("embeddings", self.embed(vectors))


class Source(Vectors):
    """Vectors with their ids and metadata, in a stream."""

    def __init__(
        self,
        arrays: Sequence[Rows],
        ids: np.ndarray | None = None,
        embed: Embed | None = None,
        tables: Callable[[], Iterator[pa.Table]] | None = None,
        inputs: dict[str, str] | None = None,
        left_out: int = 0,
    ) -> None:
        """`ids` by default count from 0; `embed` maps features to embeddings.

        `inputs`: name -> hash of each file, in order. `left_out`: rows that are not among these because their pictures
        could not be read.
        """
        super().__init__(arrays, embed)
        self.ids = as_ids("ids", np.arange(len(self)) if ids is None else ids, len(self))
        self._tables = tables
        self.inputs = inputs or {}
        self.left_out = left_out

    @classmethod
    def from_files(cls, vectors: Sequence[Path], metadata: Sequence[Path] = (), embed: Embed | None = None) -> Source:
        """Vectors of `.npy` files in order, with Parquet files whose rows are in the same order.

        Ids are the metadata's column `id`, else 0, 1, 2, ... A row of zeros stands for a picture that could not be
        read; it is left out, and the others keep their ids. Raises `ValueError` naming a file that is missing, damaged
        or of another number of rows.
        """
        arrays = [NpyRows(path) for path in vectors]
        total = sum(array.shape[0] for array in arrays)
        if metadata and (found := count_rows(metadata)) != total:
            names = " ".join(map(str, metadata))
            raise ValueError(f"{names}: expected {total} rows, as many as vectors, found {found}")
        ids = stored_ids(metadata)
        readable = [np.flatnonzero(~unreadable(array.array)) for array in arrays]
        starts = np.cumsum([0, *(array.shape[0] for array in arrays)])
        rows = np.concatenate([part + start for part, start in zip(readable, starts, strict=False)])
        if total and not len(rows):
            names = " ".join(map(str, vectors))
            raise ValueError(f"{names}: expected pictures that could be read, found rows of zeros only")
        inputs: dict[str, str] = {}
        for path in (*vectors, *metadata):
            inputs[_unused(path.name, inputs)] = sha256_file(path)
        tables = (lambda: kept_tables(read_tables(metadata), rows)) if metadata else None
        pairs = zip(arrays, readable, strict=True)
        kept = [array if len(part) == array.shape[0] else Kept(array, part) for array, part in pairs]
        return cls(kept, rows if ids is None else ids[rows], embed, tables, inputs, total - len(rows))

    def tables(self) -> Iterator[pa.Table]:
        """The metadata, a piece at a time."""
        return without_metadata(len(self)) if self._tables is None else self._tables()

    def vectors(self) -> Vectors:
        """Without ids and metadata."""
        return Vectors(self.arrays, self.embed)


def load_embedding(checkpoint: Path | None, unit: bool) -> tuple[Embed, Embed, str]:
    """(training rows -> embeddings, query rows -> embeddings, what identifies the two).

    A ranker is identified by its file's SHA-256; without one, rows are taken as they are, or put at unit length.
    """
    if checkpoint is None:
        embed = normalise if unit else _unchanged
        return embed, embed, COSINE if unit else AS_THEY_ARE
    if unit:
        raise ValueError("unit: expected it without a checkpoint, found both; a ranker's embeddings have unit length")
    ranker = load_ranker(checkpoint)

    def check(rows: np.ndarray) -> np.ndarray:
        if rows.shape[1] != ranker.config.in_dim:
            raise ValueError(f"{checkpoint}: expected features of {ranker.config.in_dim}, found {rows.shape[1]}")
        return rows

    return (
        lambda rows: ranker.embed(check(rows)).cpu().numpy(),
        lambda rows: ranker.embed_queries(check(rows)).cpu().numpy(),
        sha256_file(checkpoint),
    )


def _unused(name: str, names: Container[str]) -> str:
    """`name`, numbered where it is among `names` already: files of several folders may share it."""
    return next(other for other in chain([name], (f"{name} ({n})" for n in count(2))) if other not in names)


def _unchanged(rows: np.ndarray) -> np.ndarray:
    return rows
