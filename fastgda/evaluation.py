"""One table of untuned features, tuned rankers and baselines against the teacher's rankings (paper, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastgda.core import environment, manifest_path, read_manifest, relative, sha256_file
from fastgda.dataset import Layout, Split, default_levels, load_images, load_split, normalise, unreadable
from fastgda.metrics import (
    TILE,
    Retrieval,
    bootstrap_interval,
    chance,
    check_levels,
    embedding_retrieval,
    joined,
    put_last,
    score_retrieval,
    standard_error,
)
from fastgda.ranker import load_ranker
from fastgda.rankings import Rankings, load_rankings, popularity

CUTOFFS = (10, 100, 1000)
"""Values of k of recall@k and NDCG@k, where the training set has as many images."""


class Neighbours(Protocol):
    """What a search in an index returns: `fastgda.index.Neighbours`."""

    @property
    def ids(self) -> np.ndarray:
        """[Q, k] training ids, most influential first; -1 where an approximate search found fewer than k."""

    @property
    def scores(self) -> np.ndarray:
        """[Q, k] scores, descending."""


class Index(Protocol):
    """What is evaluated in the place of exact search: `fastgda.index.FlatIndex` and its kin."""

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """The `k` training images of the highest inner product with each of `queries` [Q, D]."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Candidate:
    """One feature type, and rankers trained on it."""

    ftype: str
    paths: Layout
    checkpoints: tuple[Path, ...] = ()
    index: Index | None = None
    """Index of the training images under the only checkpoint, or under the normalised feature where there is none."""
    depth: int | None = None
    """Neighbours asked of the index; all by default."""


def evaluate(
    candidates: Sequence[Candidate],
    split: str,
    levels: Sequence[int] | None = None,
    *,
    rank_file: Path | None = None,
    train_rank_file: Path | None = None,
    cutoffs: Sequence[int] | None = None,
    per_query: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """A JSON document with one row per method; `ValueError` naming the file where artifacts disagree.

    `levels`: values of L; the mode's where absent. `rank_file`: ground truth of `split`; the layout's own where absent.
    `cutoffs`: values of k of recall@k and NDCG@k. `per_query` adds every query's values, for `save_per_query`. The
    popularity baseline needs the training rankings and is left out where they do not exist. Every method ranks images
    whose features are zeros, because they could not be read, last.
    """
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        images = load_images(candidate.paths)
        queries = load_split(candidate.paths, split, images, rank_file)
        levels = tuple(levels or default_levels(candidate.paths.mode, len(images)))
        check_levels(levels, queries.rankings.candidates, len(images))
        cutoffs = tuple(cutoffs or [k for k in CUTOFFS if k <= len(images)] or [len(images)])
        rows += _feature_rows(candidate, images, queries, levels, cutoffs, device)
    assert levels is not None and cutoffs is not None
    truth = rank_file or candidates[0].paths.ranking(split)
    count, total = queries.queries, len(images)
    train_file = train_rank_file or candidates[0].paths.ranking("train")
    if train_file.is_file():
        score = popularity(load_rankings(train_file, total), total).astype(np.float32)[None]
        put_last(score, unreadable(images))
        found = score_retrieval(np.broadcast_to(score, (count, total)), queries.rankings, levels, cutoffs)
        rows.append(_row("popularity", None, found))
    elif train_rank_file is not None:
        raise ValueError(f"{train_file}: expected the training rankings, found nothing")
    rows.append({"method": "chance", "mAP": {str(level): chance(level, total) for level in levels}})
    reliability = teacher_reliability(truth)
    if reliability:
        rows.append({"method": "teacher's reliability", "mAP": reliability})
    if not per_query:
        rows = [{key: value for key, value in row.items() if key != "queries"} for row in rows]
    return {
        "split": split,
        "queries": count,
        "images": total,
        "levels": list(levels),
        "ground_truth": {"file": relative(truth), "sha256": sha256_file(truth)},
        "rows": rows,
        "environment": environment(),
    }


def teacher_reliability(rank_file: Path) -> dict[str, float]:
    """L -> mAP(L) of one run of the teacher against another, from the ranking's manifest; empty where not measured."""
    if not manifest_path(rank_file).is_file():
        return {}
    return {str(level): float(value) for level, value in read_manifest(rank_file).get("reliability", {}).items()}


def index_retrieval(
    index: Index,
    queries: np.ndarray,
    truth: Rankings,
    levels: Sequence[int],
    cutoffs: Sequence[int],
    depth: int,
    missing: np.ndarray,
) -> Retrieval:
    """The metrics of what `index` returns for embedded queries [Q, D], as of exact search.

    missing [N]: mask of images that could not be read. They and those that are not among the `depth` neighbours share
    the last place. Raises `ValueError` if the index holds ids that are no training image's.
    """
    parts = []
    for start in range(0, len(queries), TILE):
        found = index.search(queries[start : start + TILE], depth)
        if found.ids.max() >= len(missing):
            raise ValueError(f"--index: expected training ids below {len(missing)}, found {found.ids.max()}")
        scores = np.zeros((len(found.ids), len(missing)), dtype=np.float32)
        for row, ids, values in zip(scores, found.ids, found.scores, strict=True):
            returned = ids >= 0
            if returned.any():
                row[:] = np.nextafter(values[returned].min(), np.float32(-np.inf))
                row[ids[returned]] = values[returned]
                row[missing] = row.min()
        parts.append(score_retrieval(scores, truth.rows(slice(start, start + TILE)), levels, cutoffs))
    return joined(parts)


def _feature_rows(
    candidate: Candidate,
    images: np.ndarray,
    queries: Split,
    levels: tuple[int, ...],
    cutoffs: tuple[int, ...],
    device: torch.device | str,
) -> list[dict[str, Any]]:
    missing = unreadable(images)
    asked = torch.from_numpy(normalise(queries.features)).to(device)
    stored = torch.from_numpy(normalise(images)).to(device)
    untuned = embedding_retrieval(asked, stored, queries.rankings, levels, cutoffs, missing=missing)
    del stored
    rows = [_row("untuned", candidate.ftype, untuned)]
    for checkpoint in candidate.checkpoints:
        ranker = load_ranker(checkpoint, device, in_dim=images.shape[1])
        trained_on = ranker.info.get("ftype", candidate.ftype)
        if trained_on != candidate.ftype:
            raise ValueError(f"{checkpoint}: expected a ranker of {candidate.ftype}, found one of {trained_on}")
        asked = ranker.embed_queries(queries.features)
        tuned = embedding_retrieval(asked, ranker.embed(images), queries.rankings, levels, cutoffs, missing=missing)
        gain = tuned.precision - untuned.precision
        rows.append(
            _row("tuned", candidate.ftype, tuned)
            | {
                "checkpoint": relative(checkpoint),
                "checkpoint_sha256": sha256_file(checkpoint),
                "gain": _by_level(levels, gain.mean(axis=0)),
                "gain_standard_error": _by_level(levels, standard_error(gain)),
            }
        )
    if candidate.index is not None:
        rows.append(_index_row(candidate, asked.cpu().numpy(), queries.rankings, levels, cutoffs, missing))
    return rows


def _index_row(
    candidate: Candidate,
    asked: np.ndarray,
    truth: Rankings,
    levels: tuple[int, ...],
    cutoffs: tuple[int, ...],
    missing: np.ndarray,
) -> dict[str, Any]:
    index, images = candidate.index, len(missing)
    assert index is not None
    if len(candidate.checkpoints) > 1:
        raise ValueError(f"--index: expected at most one checkpoint with it, found {len(candidate.checkpoints)}")
    if not images - np.count_nonzero(missing) <= len(index) <= images:
        raise ValueError(f"--index: expected an index of the {images} training images, found one of {len(index)}")
    depth = min(candidate.depth or images, len(index))
    row = _row("index", candidate.ftype, index_retrieval(index, asked, truth, levels, cutoffs, depth, missing))
    named = {"checkpoint": relative(candidate.checkpoints[0])} if candidate.checkpoints else {}
    return row | {"depth": depth} | named


def _row(method: str, ftype: str | None, found: Retrieval) -> dict[str, Any]:
    assert found.overlap is not None and found.spearman is not None
    assert found.recall is not None and found.ndcg is not None
    interval = bootstrap_interval(found.precision)
    return {
        "method": method,
        "ftype": ftype,
        "mAP": _by_level(found.levels, found.precision.mean(axis=0)),
        "standard_error": _by_level(found.levels, standard_error(found.precision)),
        "interval": {str(level): [_finite(end) for end in interval[:, at]] for at, level in enumerate(found.levels)},
        "overlap": _by_level(found.levels, found.overlap.mean(axis=0)),
        "recall": _by_cutoff(found, found.recall.mean(axis=0)),
        "ndcg": _by_cutoff(found, found.ndcg.mean(axis=0)),
        "spearman": _finite(found.spearman.mean()),
        "per_query": {str(level): found.precision[:, at].tolist() for at, level in enumerate(found.levels)},
        "queries": _query_lines(found),
    }


def _query_lines(found: Retrieval) -> list[dict[str, Any]]:
    assert found.overlap is not None and found.spearman is not None
    assert found.recall is not None and found.ndcg is not None
    return [
        {
            "query": query,
            "L": str(level),
            "AP": float(found.precision[query, at]),
            "overlap": float(found.overlap[query, at]),
            "spearman": _finite(found.spearman[query]),
            **{f"recall@{k}": float(value) for k, value in zip(found.cutoffs, found.recall[query, at], strict=True)},
            **{f"NDCG@{k}": float(value) for k, value in zip(found.cutoffs, found.ndcg[query, at], strict=True)},
        }
        for query in range(len(found.precision))
        for at, level in enumerate(found.levels)
    ]


def _by_cutoff(found: Retrieval, values: np.ndarray) -> dict[str, dict[str, float | None]]:
    return {str(level): _by_level(found.cutoffs, row) for level, row in zip(found.levels, values, strict=True)}


def _by_level(levels: Sequence[int], values: np.ndarray) -> dict[str, float | None]:
    return {str(level): _finite(value) for level, value in zip(levels, values, strict=True)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
