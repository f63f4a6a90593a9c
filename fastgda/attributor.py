"""Attribution by retrieval: a query's features are embedded and the training images of the highest score returned.

This package knows features only. `serving.Attributor` puts a frozen encoder in front, so that pictures and prompts go
in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, from_numpy

from fastgda.dataset import normalise, unreadable
from fastgda.index import Embedder, FlatIndex, Index, Neighbours
from fastgda.metrics import put_last

Known = dict[str, Any] | None
"""What is known of a training image: id, caption, creator, licence, path, url, as far as the index holds them."""


class Searchable(Protocol):
    """An index: `FlatIndex` in memory, or `Index` on disk."""

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """The `k` training images of the highest inner product with each of `queries` [Q, E]."""

    def __len__(self) -> int: ...


class Untuned:
    """The features before any training, L2-normalised: scores are their cosines."""

    def embed(self, features: np.ndarray) -> Tensor:
        """[N, D] -> [N, D] of unit length (a zero row stays zero)."""
        return from_numpy(normalise(np.asarray(features, dtype=np.float32)))

    def embed_queries(self, features: np.ndarray) -> Tensor:
        """The same as `embed`."""
        return self.embed(features)


@dataclass(frozen=True)
class Timings:
    """Seconds of one attribution. In a batch each query bears an equal share of the whole."""

    encode: float
    """From picture and prompt to features; 0 where features were given."""
    embed: float
    """From features to embedding."""
    search: float
    """In the index."""
    metadata: float
    """Looking up what is known of the images found."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.encode + self.embed + self.search + self.metadata


@dataclass(frozen=True)
class Attribution:
    """The most influential training images of one query."""

    ids: np.ndarray
    """[k] int64 training ids, most influential first."""
    scores: np.ndarray
    """[k] float32, descending."""
    metadata: tuple[Known, ...]
    """[k] what is known of each; `None` where the index holds no metadata."""
    timings: Timings


class FeatureAttributor:
    """An embedder and the index of the training set under it. Safe to use from several threads at once."""

    def __init__(self, embedder: Embedder, index: Searchable) -> None:
        """`embedder` must be the one that made the index."""
        self.embedder = embedder
        self.index = index

    @classmethod
    def build(cls, features: np.ndarray, embedder: Embedder) -> FeatureAttributor:
        """Embeds and indexes the features [N, D] of the training images; row = id.

        A row of zeros stands for a picture that could not be read. It is left out: a ranker would embed it somewhere.
        """
        ids = np.flatnonzero(~unreadable(features))
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
        return self.attribute_batch(features[None], k, encode_seconds)[0]

    def attribute_batch(self, features: np.ndarray, k: int, encode_seconds: float = 0.0) -> list[Attribution]:
        """The same for each row of features [Q, D]; `encode_seconds` is for all of them."""
        if features.ndim != 2:
            raise ValueError(f"features: expected shape [Q, D], found {list(features.shape)}")
        if len(features) == 0:
            return []
        clock = Clock()
        queries = self.embedder.embed_queries(features).cpu().numpy()
        embed = clock.lap()
        while True:
            found = self.index.search(queries, k)
            search = clock.lap()
            if not isinstance(self.index, Index):
                known: list[Known] = [None] * found.ids.size
                break
            known = self.index.metadata(found.ids.ravel())
            if None not in known:
                break
            # an image was removed since the search began: an opt-out holds for answers under way too
        share = 1 / len(features)
        timings = Timings(encode_seconds * share, embed * share, search * share, clock.lap() * share)
        return [
            Attribution(ids, scores, tuple(known[row * k : (row + 1) * k]), timings)
            for row, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True))
        ]


def all_scores(embedder: Embedder, queries: np.ndarray, images: np.ndarray) -> np.ndarray:
    """[Q, N] scores of all training images; one that could not be read, a row of zeros, comes last."""
    scores = (embedder.embed_queries(queries) @ embedder.embed(images).T).cpu().numpy()
    put_last(scores, unreadable(images))
    return scores


class Clock:
    """Seconds between one `lap` and the next."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()

    def lap(self) -> float:
        """Seconds since the last call, or since the clock was made."""
        before, self._last = self._last, self._now()
        return self._last - before
