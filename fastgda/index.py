"""Nearest-neighbour index over embeddings; the only module that imports faiss.

Embeddings are calibrated: a higher inner product of query and training embedding means more influential, so retrieval
is a maximum-inner-product search.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgda.core import atomic_path, require_file, verify_artifact, write_manifest

try:
    import faiss
except ImportError as error:
    raise ImportError("faiss is not installed; pip install 'fastgda[cpu]' or 'fastgda[gpu]'") from error


@dataclass(frozen=True)
class Neighbours:
    """The result of a search."""

    ids: np.ndarray
    """[Q, k] int64 training ids, most influential first."""
    scores: np.ndarray
    """[Q, k] float32 inner products, descending."""


class FlatIndex:
    """Exact inner-product search. Searching from several threads at once is safe; adding is not offered."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def build(cls, embeddings: np.ndarray, ids: np.ndarray | None = None) -> FlatIndex:
        """An index of embeddings [N, D] under int64 `ids` [N], by default 0..N-1."""
        vectors = _vectors("embeddings", embeddings, None)
        labels = np.arange(len(vectors)) if ids is None else np.asarray(ids)
        if labels.shape != (len(vectors),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"ids: expected {len(vectors)} integers, found {labels.dtype} {list(labels.shape)}")
        if len(np.unique(labels)) != len(labels):
            raise ValueError("ids: expected each id once, found repeated ones")
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        index.add_with_ids(vectors, labels.astype(np.int64))
        return cls(index)

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._index.d

    def __len__(self) -> int:
        return self._index.ntotal

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """The `k` training images of the highest inner product with each of `queries` [Q, D]."""
        vectors = _vectors("queries", queries, self.dim)
        if not 1 <= k <= len(self):
            raise ValueError(f"k = {k}: expected 1 to {len(self)}, the number of images in the index")
        scores, ids = self._index.search(vectors, k)
        return Neighbours(ids.astype(np.int64, copy=False), scores)

    def save(self, path: str | Path, *, command: str, inputs: dict[str, str] | None = None) -> None:
        """Writes the index atomically, and its manifest with the hashes of `inputs`."""
        path = Path(path)
        with atomic_path(path) as temporary:
            temporary.write_bytes(faiss.serialize_index(self._index).tobytes())
        config = {"kind": "flat", "metric": "inner product", "images": len(self), "dim": self.dim}
        write_manifest(path, config, command=command, inputs=inputs)

    @classmethod
    def load(cls, path: str | Path) -> FlatIndex:
        """Reads an index whose bytes match its manifest; `ValueError` if it is missing or damaged."""
        path = require_file(path)
        verify_artifact(path)
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: expected a faiss index, found another file") from error
        return cls(index)


def _vectors(name: str, array: np.ndarray, dim: int | None) -> np.ndarray:
    vectors = np.ascontiguousarray(array, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] < 1 or (dim is not None and vectors.shape[1] != dim):
        raise ValueError(f"{name}: expected shape [*, {dim or '*'}], found {list(vectors.shape)}")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    return vectors
