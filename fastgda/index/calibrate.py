"""How thoroughly an index must search to find what exact search finds, measured on real queries.

Generated images lie beside the training images, not among them, so recall on held-out training vectors says little.
Settings are chosen on every second query and judged on the others.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from fastgda.index.backend import as_vectors, check_k
from fastgda.index.snapshot import Settings, Snapshot
from fastgda.index.store import Index

RANDOM_READ = 4.0
"""A byte of a stored vector, read here and there, costs about as much as so many bytes of codes read in order."""
GRAPH_DEGREE = 64
"""Codes compared for each vertex that a graph search visits."""
DEPTHS = tuple(64 ** (step / 36) for step in range(37))
"""Re-rank depths that are tried, in multiples of k: up to 64, each an eighth more than the one before."""
FINENESS = 16
"""Between a breadth that suffices and one that does not, the search for the narrowest ends at this part of it."""


def recall(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[Q] share of `truth` [Q, k] among `found` [Q, n]."""
    return np.array([np.isin(wanted, row).mean() for wanted, row in zip(truth, found, strict=True)])


def calibrate(
    index: Index, queries: np.ndarray, k: int, wanted: float, truth: np.ndarray | None = None
) -> dict[str, Any]:
    """The cheapest settings whose recall@k reaches `wanted` on half of `queries` [Q, D]; kept in the index's manifest.

    One standard error below the mean must reach `wanted`, so that the other half does too more often than not. Cost is
    bytes read: codes of the lists visited, and `RANDOM_READ` times the stored vectors of the candidates. `truth` [Q, k]
    are the ids that `Snapshot.exact` finds, where they are known already. Returns the settings with the recall on the
    other half and its standard error. Raises `ValueError` if no settings suffice.
    """
    snapshot = index.snapshot()
    vectors = as_vectors("queries", queries, snapshot.dim)
    check_k(k, snapshot.live)
    if len(vectors) < 4:
        raise ValueError(f"queries: expected at least 4, found {len(vectors)}")
    if not 0 < wanted <= 1:
        raise ValueError(f"recall {wanted}: expected a share above 0, up to 1")
    if truth is None:
        truth = snapshot.exact(vectors, k).ids
    if truth.shape != (len(vectors), k):
        raise ValueError(f"truth: expected shape {(len(vectors), k)}, found {truth.shape}")
    choosing, judging = slice(0, None, 2), slice(1, None, 2)
    settings = choose(snapshot, vectors[choosing], truth[choosing], wanted)
    measured = recall(snapshot.search(vectors[judging], k, settings).ids, truth[judging])
    calibration = {
        **asdict(settings),
        "wanted": wanted,
        "recall": float(measured.mean()),
        "standard_error": _standard_error(measured),
        "queries_chosen_on": len(vectors[choosing]),
        "queries_judged_on": len(measured),
        "images": snapshot.live,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    index.set_calibration(calibration, snapshot)
    return calibration


def choose(snapshot: Snapshot, queries: np.ndarray, truth: np.ndarray, wanted: float) -> Settings:
    """The cheapest settings that reach the recall `wanted` of the exact neighbours `truth` [Q, k] of `queries` [Q, D].

    Raises `ValueError` with the best recall if no settings do.
    """
    k = truth.shape[1]
    depths = sorted({min(snapshot.live, max(k, round(factor * k))) for factor in DEPTHS})
    best, sufficient = 0.0, list[tuple[float, int, int]]()

    def suffices(nprobe: int) -> bool:
        nonlocal best
        places = truth_places(snapshot, queries, truth, Settings(nprobe, depths[-1], k))
        for depth in depths:
            reached = (places < depth).mean(1)
            best = max(best, float(reached.mean()))
            if reached.mean() - _standard_error(reached) >= wanted:
                sufficient.append((cost(snapshot, Settings(nprobe, depth, k)), nprobe, depth))
                return True
        return False

    failing = 0
    for nprobe in _breadths(snapshot):
        if sufficient and cost(snapshot, Settings(nprobe, depths[0], k)) >= min(sufficient)[0]:
            break
        if not suffices(nprobe):
            failing = nprobe
    if not sufficient:
        raise ValueError(
            f"recall {wanted}: expected settings that reach it, found {best:.4f} at best; "
            "rebuild with a finer factory, or ask for less"
        )
    enough = min(nprobe for _, nprobe, _ in sufficient)
    while enough - failing > max(1, enough // FINENESS):
        between = (failing + enough) // 2
        failing, enough = (failing, between) if suffices(between) else (between, enough)
    _, nprobe, depth = min(sufficient)
    return Settings(nprobe, depth, k)


def truth_places(snapshot: Snapshot, queries: np.ndarray, truth: np.ndarray, settings: Settings) -> np.ndarray:
    """[Q, k] place of each true neighbour among the candidates of its segment, best first; infinite if not there.

    Re-ranking is exact, so those in the first `depth` places are what a search of that depth finds.
    """
    places = np.full(truth.shape, np.inf)
    for number, segment in enumerate(snapshot.segments):
        rows, _ = snapshot.candidates(number, queries, settings.depth, settings.k, settings.nprobe)
        ids = np.where(rows >= 0, segment.ids[rows], -1)
        for out, wanted, found in zip(places, truth, ids, strict=True):
            order = np.argsort(found, kind="stable")
            at = order[np.minimum(np.searchsorted(found, wanted, sorter=order), len(found) - 1)]
            out[:] = np.where(found[at] == wanted, at, out)
    return places


def cost(snapshot: Snapshot, settings: Settings) -> float:
    """Bytes that one search reads, by the rule in `calibrate`."""
    total = 0.0
    for segment in snapshot.segments:
        lists, rows = segment.structure.lists, len(segment)
        visited = float(rows)
        if lists:
            visited = rows * min(1.0, settings.nprobe / lists) + lists
        elif segment.structure.widest:
            visited = min(rows, settings.nprobe * GRAPH_DEGREE)
        total += visited * segment.structure.code_bytes()
        if segment.config.reranks:
            total += RANDOM_READ * min(rows, settings.depth) * segment.vectors[0].nbytes
    return total


def _breadths(snapshot: Snapshot) -> list[int]:
    """Values of nprobe to try first: powers of two up to everything."""
    widest = max(segment.structure.widest for segment in snapshot.segments)
    return sorted({min(2**power, max(widest, 1)) for power in range(widest.bit_length() + 1)})


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
