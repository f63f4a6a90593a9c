"""How well one ranking of the training set retrieves the top of another: mAP(L) of the paper's section 4.1, and others.

AP(L) of a query: the L most influential images of the ground truth are the positives, every other training image is
a negative, and average precision is taken over the whole ranking of the training set, tied scores counted together
as scikit-learn does. mAP(L) is its mean over queries.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgda.rankings import Rankings, top

TILE = 64
"""Queries scored at a time; 64 x 118,287 float32 scores are 30 MB."""


@dataclass(frozen=True)
class Retrieval:
    """Agreement of a method's ranking with the ground truth, query by query."""

    levels: tuple[int, ...]
    """The values of L."""
    precision: np.ndarray
    """[Q, levels] average precision AP(L)."""
    overlap: np.ndarray | None = None
    """[Q, levels] share of the true top L found among the method's top L."""
    spearman: np.ndarray | None = None
    """[Q] rank correlation over the images that the ground truth ranks."""
    cutoffs: tuple[int, ...] = ()
    """The values of k."""
    recall: np.ndarray | None = None
    """[Q, levels, cutoffs] share of the true top L found among the method's first k."""
    ndcg: np.ndarray | None = None
    """[Q, levels, cutoffs] NDCG@k with gains that fall linearly over the true top L."""


def average_precision(scores: np.ndarray, positives: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """AP(L) of scores [Q, N] with the first L columns of positives [Q, >= max L] as positives: [Q, levels], float64.

    AP = (1/L) sum over positives p of #{positives scoring >= s_p} / #{images scoring >= s_p}, which is scikit-learn's
    `average_precision_score`, ties included. Only counts above the L positives are needed, so the scores are sorted
    by value (vectorised in numpy) and never argsorted: 0.5 ms for 118,287 images.
    """
    check_levels(levels, positives.shape[1], scores.shape[1])
    if not np.isfinite(scores).all():
        raise ValueError(f"expected finite scores, found NaN or infinity in query {_first_bad(scores)}")
    if len(scores) != len(positives):
        raise ValueError(f"expected as many queries in scores as in positives, found {len(scores)}, {len(positives)}")
    # float16 has no vectorised sort on most processors
    scores = scores.astype(np.float32) if scores.dtype == np.float16 else scores
    workers = min(torch.get_num_threads(), len(scores))

    def one(query: int) -> list[float]:
        return _row_precision(scores[query], positives[query], levels)

    if workers < 2:
        return np.array([one(query) for query in range(len(scores))])
    with ThreadPoolExecutor(workers) as pool:
        return np.array(list(pool.map(one, range(len(scores)))))


def _row_precision(row: np.ndarray, ids: np.ndarray, levels: Sequence[int]) -> list[float]:
    found = row[ids[: max(levels)]]
    place = np.argsort(found)
    found = found[place]
    images_above = row.size - np.searchsorted(np.sort(row), found)
    values = []
    for level in levels:
        chosen = np.flatnonzero(place < level)
        hits = found[chosen]
        # of equal hits each counts from the first, as all of them score at least as high
        first = np.flatnonzero(np.r_[True, hits[1:] != hits[:-1]])
        positives_above = np.repeat(level - first, np.diff(np.r_[first, level]))
        values.append(float(np.mean(positives_above / images_above[chosen])))
    return values


def chance(level: int, images: int) -> float:
    """Expected AP(L) of a uniformly random order of N images.

    Position k holds a positive with probability L/N, and the k-1 before it hold (k-1)(L-1)/(N-1) others on average:
    E[AP] = (1/N) sum_k (1/k) (1 + (k-1)(L-1)/(N-1)) = (1/N) (H_N + (L-1)/(N-1) (N - H_N)), H_N the harmonic number.
    """
    harmonic = float(np.sum(1.0 / np.arange(1, images + 1)))
    others = (level - 1) / (images - 1) if images > 1 else 0.0
    return (harmonic + others * (images - harmonic)) / images


def standard_error(values: np.ndarray, groups: Sequence[Hashable] | None = None) -> np.ndarray:
    """Standard error of the mean over axis 0 (sample deviation over sqrt(Q)); NaN for a single query or group.

    Queries that share an entry of `groups` [Q], for instance their concept, are not taken as independent: with r_g the
    sum of the residuals of group g of G, the error is sqrt(G / (G - 1) sum_g r_g^2) / Q (Liang and Zeger 1986).
    """
    if groups is None:
        if len(values) < 2:
            return np.full(np.shape(values)[1:], math.nan)
        return np.std(values, axis=0, ddof=1) / math.sqrt(len(values))
    sums, sizes = _group_sums(values - np.mean(values, axis=0), groups)
    if len(sizes) < 2:
        return np.full(np.shape(values)[1:], math.nan)
    return np.sqrt(len(sizes) / (len(sizes) - 1) * (sums**2).sum(0)) / len(values)


def _group_sums(values: np.ndarray, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """(sums [G, ...] of values [Q, ...] over each group, in the order of their first members; members of each)."""
    place = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    member = np.array([place[group] for group in groups])
    if len(member) != len(values):
        raise ValueError(f"groups: expected one for each of {len(values)} queries, found {len(member)}")
    sums = np.zeros((len(place), *np.shape(values)[1:]))
    np.add.at(sums, member, values)
    return sums, np.bincount(member)


def spearman(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[Q] Spearman correlation of scores [Q, N] with the rankings truth [Q, K], over the K ranked images.

    Tied scores share their mean rank. NaN where the scores of a query are constant.
    """
    places = np.arange(truth.shape[1], dtype=np.float64)
    places -= places.mean()
    values = []
    for row, ids in zip(scores, truth, strict=True):
        _, inverse, counts = np.unique(row[ids], return_inverse=True, return_counts=True)
        mean_rank = np.cumsum(counts) - (counts - 1) / 2
        ranks = mean_rank[inverse] - mean_rank[inverse].mean()
        norm = np.linalg.norm(ranks) * np.linalg.norm(places)
        values.append(-float(ranks @ places / norm) if norm else math.nan)
    return np.array(values)


def overlap(scores: np.ndarray, truth: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """[Q, levels] share of the true top L (first L columns of truth) among the L highest of scores [Q, N]."""
    check_levels(levels, truth.shape[1], scores.shape[1])
    found = top(scores, max(levels))
    place = np.empty(scores.shape[1], dtype=np.int64)
    values = np.empty((len(scores), len(levels)))
    for query, (mine, true) in enumerate(zip(found, truth, strict=True)):
        place[:] = scores.shape[1]
        place[mine] = np.arange(mine.size)
        values[query] = [np.mean(place[true[:level]] < level) for level in levels]
    return values


def recall_and_ndcg(
    scores: np.ndarray, truth: np.ndarray, levels: Sequence[int], cutoffs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(recall@k, NDCG@k) of scores [Q, N], each [Q, levels, cutoffs], against the true top L (first L of truth).

    Recall@k = share of the true top L among the first k. DCG@k = sum over places i <= k of gain / log2(i + 1), with the
    gain 1 - j/L of the image at place j = 0, 1, ... of the truth, 0 beyond L; NDCG divides by its largest value. Images
    of tied scores share the mean gain of their places, as in scikit-learn's `ndcg_score`.
    """
    check_levels(levels, truth.shape[1], scores.shape[1])
    if not cutoffs or not all(1 <= cutoff <= scores.shape[1] for cutoff in cutoffs):
        raise ValueError(f"expected every k of recall@k in 1..{scores.shape[1]}, found {list(cutoffs)}")
    rows = [_row_cutoffs(row, ids, levels, cutoffs) for row, ids in zip(scores, truth, strict=True)]
    found = np.array(rows).reshape(len(scores), 2, len(levels), len(cutoffs))
    return found[:, 0], found[:, 1]


def _row_cutoffs(row: np.ndarray, ids: np.ndarray, levels: Sequence[int], cutoffs: Sequence[int]) -> np.ndarray:
    deepest = max(cutoffs)
    place = np.full(row.size, row.size)
    place[ids[: max(levels)]] = np.arange(max(levels))
    chosen = np.flatnonzero(row >= np.partition(row, row.size - deepest)[row.size - deepest])
    _, group, counts = np.unique(-row[chosen], return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    discounts = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(2, max(deepest, *levels) + 2)))]
    places_in, discount_in = (
        np.array([np.diff(total[np.minimum(ends, cutoff)], prepend=0.0) for cutoff in cutoffs]).T
        for total in (np.arange(deepest + 1.0), discounts)
    )
    values = np.empty((2, len(levels), len(cutoffs)))
    for at, level in enumerate(levels):
        gains = np.maximum(0.0, 1 - place[chosen] / level)
        values[0, at] = np.bincount(group, gains > 0) / counts @ places_in / level
        ideal = np.cumsum((1 - np.arange(level) / level) * np.diff(discounts)[:level])
        values[1, at] = np.bincount(group, gains) / counts @ discount_in / ideal[np.minimum(cutoffs, level) - 1]
    return values


def bootstrap_interval(
    values: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    share: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """[2, ...] percentile bootstrap interval of the mean over axis 0, the queries; NaN for a single query or group.

    Queries are drawn with replacement, `draws` times; the interval holds the middle `share` of the means. Those that
    share an entry of `groups` [Q], for instance their concept, are drawn together: as many groups as there are.
    """
    sums, sizes = _group_sums(values, range(len(values)) if groups is None else groups)
    if len(sizes) < 2:
        return np.full((2, *np.shape(values)[1:]), math.nan)
    counts = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    totals = np.reshape(counts @ sizes, (draws, *[1] * (np.ndim(values) - 1)))
    means = np.tensordot(counts, sums, axes=1) / totals
    return np.quantile(means, [(1 - share) / 2, (1 + share) / 2], axis=0)


def score_retrieval(
    scores: np.ndarray, truth: Rankings, levels: Sequence[int], cutoffs: Sequence[int] = ()
) -> Retrieval:
    """All the metrics of scores [Q, N] against the ground truth; those at k where there are `cutoffs`."""
    return Retrieval(
        tuple(levels),
        average_precision(scores, truth.rank, levels),
        overlap(scores, truth.rank, levels),
        spearman(scores, truth.rank),
        tuple(cutoffs),
        *(recall_and_ndcg(scores, truth.rank, levels, cutoffs) if cutoffs else (None, None)),
    )


def embedding_retrieval(
    queries: Tensor,
    images: Tensor,
    truth: Rankings,
    levels: Sequence[int],
    cutoffs: Sequence[int] = (),
    *,
    precision_only: bool = False,
    missing: np.ndarray | None = None,
) -> Retrieval:
    """The metrics of the dot products of queries [Q, D] and images [N, D], a tile of queries at a time.

    missing [N]: mask of images that come last, because they could not be read.
    """
    parts = []
    for start in range(0, len(queries), TILE):
        scores = (queries[start : start + TILE] @ images.T).float().cpu().numpy()
        if missing is not None:
            put_last(scores, missing)
        tile = truth.rows(slice(start, start + TILE))
        if precision_only:
            parts.append(Retrieval(tuple(levels), average_precision(scores, tile.rank, levels)))
        else:
            parts.append(score_retrieval(scores, tile, levels, cutoffs))
    return joined(parts)


def put_last(scores: np.ndarray, missing: np.ndarray) -> None:
    """Puts the images of the mask `missing` [N] together behind all others of scores [Q, N], in place."""
    if missing.any():
        scores[:, missing] = np.nextafter(scores.min(axis=1, keepdims=True), scores.dtype.type(-np.inf))


def joined(parts: Sequence[Retrieval]) -> Retrieval:
    """The metrics of several groups of queries as those of one."""

    def together(name: str) -> np.ndarray | None:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    fields = {name: together(name) for name in ("overlap", "spearman", "recall", "ndcg")}
    precision = np.concatenate([part.precision for part in parts])
    return Retrieval(parts[0].levels, precision, cutoffs=parts[0].cutoffs, **fields)


def check_levels(levels: Sequence[int], candidates: int, images: int) -> None:
    """`ValueError` unless every L lies between 1 and both the ranked candidates and the training images."""
    limit = min(candidates, images)
    bad = [level for level in levels if not 1 <= level <= limit]
    if bad or not levels:
        raise ValueError(f"expected every L of mAP(L) in 1..{limit}, found {list(levels)}")


def _first_bad(scores: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(scores).all(axis=1)))
