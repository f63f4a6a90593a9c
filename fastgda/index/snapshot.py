"""An index as it was at one moment: segments, removed rows and settings, none of which changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastgda.index.backend import Neighbours
from fastgda.index.journal import State
from fastgda.index.segment import Segment
from fastgda.index.source import BLOCK

Stamp = tuple[int, int, int, int]
"""Inode and time of the manifest, size and time of the journal: differs after every change."""
LIST_FRACTION, GRAPH_BREADTH = 32, 128
"""Before calibration: one inverted list in 32 is visited, and efSearch of a graph is 128."""
CANDIDATES = 1 << 20
"""Candidates of all queries together that a search holds at a time, at some 70 bytes each."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly to search."""

    nprobe: int
    """Inverted lists visited; efSearch in a graph; without effect where all rows are scanned."""
    depth: int
    """Candidates that are re-ranked with the stored vectors when `k` are asked for; in proportion for more."""
    k: int

    def candidates(self, k: int) -> int:
        """Candidates to re-rank for `k` results."""
        return max(k, self.depth, math.ceil(self.depth * k / self.k))


@dataclass(frozen=True)
class Snapshot:
    """See the module's docstring. Searching from several threads at once is safe."""

    stamp: Stamp
    """Of the files it was read from."""
    state: State
    segments: tuple[Segment, ...]
    dead: tuple[np.ndarray, ...]
    """For each segment [n] bool: removed rows."""
    gone: tuple[int, ...]
    """For each segment the number of removed rows."""
    calibration: dict[str, Any] | None
    """What `calibrate` stored, with the fields of `Settings`."""

    @classmethod
    def make(cls, stamp: Stamp, state: State, segments: tuple[Segment, ...], calibration: dict | None) -> Snapshot:
        """Marks the rows of `segments` that `state` removed."""
        dead = []
        for segment in segments:
            mask = np.zeros(len(segment), dtype=bool)
            rows = segment.find(state.removed)
            mask[rows[rows >= 0]] = True
            dead.append(mask)
        gone = tuple(int(mask.sum()) for mask in dead)
        return cls(stamp, state, segments, tuple(dead), gone, calibration)

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self.segments[0].structure.dim

    @property
    def largest(self) -> Segment:
        """The segment with most rows, whose structure others are built like."""
        return max(self.segments, key=len)

    @property
    def total(self) -> int:
        """Rows stored, removed ones included."""
        return sum(map(len, self.segments))

    @property
    def live(self) -> int:
        """Images that can be found."""
        return self.total - sum(self.gone)

    @property
    def settings(self) -> Settings:
        """The calibrated settings, or cautious ones."""
        if self.calibration is not None:
            return Settings(**{entry.name: self.calibration[entry.name] for entry in fields(Settings)})
        lists = max(segment.structure.lists for segment in self.segments)
        return Settings(nprobe=max(8, lists // LIST_FRACTION) if lists else GRAPH_BREADTH, depth=1000, k=100)

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """[n] bool: whether each id can be found."""
        found = np.zeros(len(ids), dtype=bool)
        for segment, dead in zip(self.segments, self.dead, strict=True):
            rows = segment.find(ids)
            found |= (rows >= 0) & ~dead[rows]
        return found

    def ids_of_creator(self, creator: str) -> np.ndarray:
        """Ids [n], ascending, of the images of `creator` that can be found."""
        parts = []
        for segment, dead in zip(self.segments, self.dead, strict=True):
            rows = segment.metadata.rows_of_creator(creator)
            parts.append(segment.ids[rows[~dead[rows]]])
        return np.sort(np.concatenate(parts))

    def metadata(self, ids: np.ndarray) -> list[dict[str, Any] | None]:
        """What is known of each id; `None` for one that cannot be found."""
        known: list[dict[str, Any] | None] = [None] * len(ids)
        for segment, dead in zip(self.segments, self.dead, strict=True):
            rows = segment.find(ids)
            places = np.flatnonzero((rows >= 0) & ~dead[rows])
            for place, row in zip(places, segment.metadata.rows(rows[places]), strict=True):
                known[place] = row
        return known

    def search(self, queries: np.ndarray, k: int, settings: Settings) -> Neighbours:
        """The `k` <= live best of each query [Q, D]: approximate candidates of every segment, scored exactly."""
        at_once = max(1, CANDIDATES // settings.candidates(k))
        if len(queries) > at_once:
            starts = range(0, len(queries), at_once)
            parts = [self.search(queries[start : start + at_once], k, settings) for start in starts]
            return Neighbours(
                np.concatenate([part.ids for part in parts]), np.concatenate([part.scores for part in parts])
            )
        ids, scores = [], []
        for place, segment in enumerate(self.segments):
            depth = settings.candidates(k) if segment.config.reranks else k
            rows, found = self.candidates(place, queries, depth, k, settings.nprobe)
            scores.append(segment.exact_scores(queries, rows) if segment.config.reranks else found)
            ids.append(np.where(rows >= 0, segment.ids[rows], -1))
        best = best_of(np.concatenate(ids, 1), np.concatenate(scores, 1), k)
        if np.isneginf(best.scores).any():
            raise ValueError(f"k = {k}: expected a structure that reaches as many images, found one that does not")
        return best

    def candidates(
        self, place: int, queries: np.ndarray, depth: int, needed: int, nprobe: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, approximate scores) [Q, depth] of segment `place`, best first, without removed rows; -1 past the end.

        Asks FAISS for more until `depth` remain after removed rows are dropped, and visits more inverted lists where
        fewer than `needed` remain in those visited.
        """
        segment, dead = self.segments[place], self.dead[place]
        total, live = len(segment), len(segment) - self.gone[place]
        if live == 0:
            return np.full((len(queries), 1), -1), np.full((len(queries), 1), -np.inf, dtype=np.float32)
        depth, needed = min(depth, live), min(needed, live)
        fetch = min(total, math.ceil(depth * total / live))
        while True:
            scores, rows = segment.structure.search(queries, fetch, nprobe)
            kept = (rows >= 0) & ~dead[rows]
            counts = kept.sum(1)
            ended = (rows[:, -1] < 0) | (fetch == total)
            if (~ended & (counts < depth)).any():
                fetch = min(total, 2 * fetch)
            elif (counts < needed).any() and nprobe < segment.structure.widest:
                nprobe = min(2 * nprobe, segment.structure.widest)
            else:
                break
        order = np.argsort(~kept, axis=1, kind="stable")[:, :depth]
        kept = np.take_along_axis(kept, order, 1)
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return np.where(kept, rows, -1), np.where(kept, scores, np.float32(-np.inf))

    def exact(self, queries: np.ndarray, k: int) -> Neighbours:
        """The `k` best of each query by comparing it with every stored vector, a block at a time."""
        ids = np.empty((len(queries), 0), dtype=np.int64)
        scores = np.empty((len(queries), 0), dtype=np.float32)
        for segment, dead in zip(self.segments, self.dead, strict=True):
            for start in range(0, len(segment), BLOCK):
                stop = min(start + BLOCK, len(segment))
                products = queries @ np.asarray(segment.vectors[start:stop], dtype=np.float32).T
                products[:, dead[start:stop]] = -np.inf
                names = np.broadcast_to(segment.ids[start:stop], products.shape)
                best = best_of(np.concatenate([ids, names], 1), np.concatenate([scores, products], 1), k)
                ids, scores = best.ids, best.scores
        return Neighbours(ids, scores)


def best_of(ids: np.ndarray, scores: np.ndarray, k: int) -> Neighbours:
    """The `k` highest of `scores` [Q, N] in each row with their `ids` [Q, N], descending; equal ones in order of id."""
    if scores.shape[1] > 4 * k:
        kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        ids, scores = np.take_along_axis(ids, kept, 1), np.take_along_axis(scores, kept, 1)
    order = np.lexsort((ids, -scores))[:, :k]
    return Neighbours(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))
