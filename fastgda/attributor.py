"""Attribution by retrieval: a query's features are embedded and the training images of the highest score returned.

The encoder that makes the features is the caller's: this package knows features only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, from_numpy

from fastgda.dataset import normalise
from fastgda.index import Embedder, FlatIndex, Neighbours


class Searchable(Protocol):
    """An index: `FlatIndex` in memory, or `Index` on disk."""

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """The `k` training images of the highest inner product with each of `queries` [Q, E]."""


class Untuned:
    """The features before any training, L2-normalised: scores are their cosines."""

    def embed(self, features: np.ndarray) -> Tensor:
        """[N, D] -> [N, D] of unit length (a zero row stays zero)."""
        return from_numpy(normalise(np.asarray(features, dtype=np.float32)))

    def embed_queries(self, features: np.ndarray) -> Tensor:
        """The same as `embed`."""
        return self.embed(features)


@dataclass(frozen=True)
class Attribution:
    """The most influential training images of one query."""

    ids: np.ndarray
    """[k] int64 training ids, most influential first."""
    scores: np.ndarray
    """[k] float32, descending."""
    encode_seconds: float
    """Time from picture and prompt to features; 0 where features were given."""
    embed_seconds: float
    """Time from features to embedding."""
    search_seconds: float
    """Time of the search in the index."""


class Attributor:
    """An embedder and the index of the training set under it. Safe to use from several threads at once."""

    def __init__(self, embedder: Embedder, index: Searchable) -> None:
        """`embedder` must be the one that made the index."""
        self.embedder = embedder
        self.index = index

    @classmethod
    def build(cls, features: np.ndarray, embedder: Embedder) -> Attributor:
        """Embeds and indexes the features [N, D] of the training images; row = id.

        A row of zeros stands for a picture that could not be read. It is left out: a ranker would embed it somewhere.
        """
        ids = np.flatnonzero(np.any(features, axis=1))
        if len(ids) == 0:
            raise ValueError("features: expected at least one training image, found none")
        return cls(embedder, FlatIndex.build(embedder.embed(features[ids]).cpu().numpy(), ids))

    def attribute(self, features: np.ndarray, k: int, encode_seconds: float = 0.0) -> Attribution:
        """The `k` most influential training images for the features [D] of one query.

        `encode_seconds` is passed through to the result. Raises `ValueError` unless 1 <= k <= N and the features are
        one row of finite numbers.
        """
        if features.ndim != 1:
            raise ValueError(f"features: expected shape [D] of one query, found {list(features.shape)}")
        start = time.perf_counter()
        query = self.embedder.embed_queries(features[None]).cpu().numpy()
        embedded = time.perf_counter()
        found = self.index.search(query, k)
        stop = time.perf_counter()
        return Attribution(found.ids[0], found.scores[0], encode_seconds, embedded - start, stop - embedded)
