"""Which index for how many images: a recommendation with its reasons, and what an index costs before it is built."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from fastgda.index.backend import EXACT, Structure
from fastgda.index.segment import SegmentConfig

EXACT_LIMIT = 1_200_000
"""Images up to which every vector is compared with the query."""
SCAN_RATE = 20e9
"""Bytes of float32 vectors a second that exact search compares with one query; two idle cores took 10 to 20 ms for 363
MB."""
GRAPH = "HNSW32,SQ8"
"""Of seven structures of 118,287 x 768 calibrated to recall@100 = 0.99 the fastest: 0.82 ms on two cores, where exact
search took 18 ms and inverted lists 1.3 or more (results/scale/index.json)."""
LIST_SHARE = 0.8
"""Share of the memory that codes may take; the rest is for queries, re-ranking and the process."""
GRAPH_LISTS = 65_536
"""Inverted lists from which the nearest centroids are found by a graph instead of a scan."""
OVERHEAD = 300e6
"""Bytes of a process before it loads an index: Python, torch, FAISS."""
ID_BYTES = 48
"""Bytes for each image while building: its id, row and place, and the hash by which training vectors are chosen."""


@dataclass(frozen=True)
class Recommendation:
    """An index for a number of images, a width and a memory budget."""

    config: SegmentConfig
    reasons: tuple[str, ...]
    """Why, one sentence each."""


@dataclass(frozen=True)
class Estimate:
    """What an index costs."""

    bytes_per_vector: int
    """In the searched structure."""
    ram: float
    """Bytes in memory while searching; stored vectors and metadata are read from disk through the page cache."""
    build_ram: float
    """Bytes in memory during the build, at most: while training, indexing a shard or merging."""
    disk: float
    """Bytes of the index's files, the most during the build."""
    training_vectors: int
    training_seconds: float
    """On this machine, from its speed in matrix products."""
    adding_seconds: float
    """Of all vectors, likewise; where they come from takes its own time."""


def recommend(images: int, dim: int, memory_budget: float, latency: float | None = None) -> Recommendation:
    """The index for `images` vectors of `dim` numbers within `memory_budget` bytes of memory.

    Exact up to about a million images, unless a scan takes more than `latency` seconds a query on two cores.
    """
    if images < 1 or dim < 1 or memory_budget <= 0 or (latency is not None and latency <= 0):
        raise ValueError(
            f"expected positive images, dim, memory and latency, found {images}, {dim}, {memory_budget:g} and {latency}"
        )
    room = LIST_SHARE * memory_budget
    if images <= EXACT_LIMIT:
        scan = 4 * dim * images / SCAN_RATE
        if latency is not None and scan > latency:
            if Structure.create(GRAPH, dim).code_bytes() * images <= room:
                return Recommendation(
                    SegmentConfig(GRAPH, "float32"),
                    (
                        f"comparing all takes about {1000 * scan:.1f} ms a query, {1000 * latency:g} ms are wanted",
                        f"a graph over one byte a number fits {_of(room)}; calibrate sets how far a query goes in it",
                        "candidates are re-ranked with the stored float32 vectors",
                    ),
                )
            return _compressed(images, dim, room)
        for factory, size, why in (
            (EXACT, 4, "full precision fits: scores are exact"),
            ("SQfp16", 2, "half precision fits; candidates are re-ranked with the stored float32 vectors"),
            ("SQ8", 1, "one byte a number fits; candidates are re-ranked with the stored float32 vectors"),
        ):
            if size * dim * images <= room:
                read = f"every query reads all {size * dim * images / 1e6:,.0f} MB, fine up to about a million images"
                return Recommendation(SegmentConfig(factory, "float32"), (f"{why} {_of(room)}", read))
    return _compressed(images, dim, room)


def usual_lists(images: int) -> int:
    """Inverted lists for so many images: a power of two, about 4 sqrt(images)."""
    return 2 ** min(20, max(4, round(math.log2(4 * math.sqrt(images)))))


def estimate(config: SegmentConfig, images: int, dim: int, flops: float, metadata: float = 0.0) -> Estimate:
    """What `config` costs for `images` vectors of `dim` numbers on a machine of `flops` operations a second.

    `metadata`: bytes of its files.

    Training is on min(images, max(65,536, 64 · lists)) vectors.
    """
    structure = Structure.create(config.factory, dim)
    code, stored = structure.code_bytes(), images * dim * np.dtype(config.store).itemsize
    codes = code * images
    sample = structure.training_size(images)
    shard = codes / config.shards
    parts = codes * (config.shards > 1 or config.on_disk)
    merged = 0.0 if config.on_disk or config.shards == 1 else codes + shard
    busiest = max(4.0 * sample * dim + structure.training_bytes(sample), shard, merged)
    return Estimate(
        bytes_per_vector=code,
        ram=OVERHEAD + structure.fixed_bytes() + (0 if config.on_disk else codes) + images,
        build_ram=OVERHEAD + structure.fixed_bytes() + busiest + ID_BYTES * images,
        disk=stored + codes + parts + 16 * images + 2 * structure.fixed_bytes() + metadata,
        training_vectors=sample,
        training_seconds=structure.training_flops(sample) / flops,
        adding_seconds=images * structure.adding_flops() / flops,
    )


def measured_flops(size: int = 1024, repeats: int = 8) -> float:
    """Multiplications and additions a second in float32 matrix products of `size` x `size`, in the best of some."""
    matrix = np.ones((size, size), dtype=np.float32)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        taken.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(taken)


def describe(config: SegmentConfig, images: int, dim: int, cost: Estimate) -> str:
    """The estimate as a table for reading."""
    rows = [
        ("images", f"{images:,} x {dim}"),
        ("factory", config.factory + (f", re-ranked with {config.store}" if config.reranks else "")),
        ("inverted lists", "on disk" if config.on_disk else "in memory"),
        ("shards", f"{config.shards}"),
        ("bytes per vector", f"{cost.bytes_per_vector} searched, {dim * np.dtype(config.store).itemsize} stored"),
        ("RAM", f"{cost.ram / 1e9:.2f} GB searching, {cost.build_ram / 1e9:.2f} GB building"),
        ("disk", f"{cost.disk / 1e9:.2f} GB, metadata included where it was given"),
        ("training", f"{cost.training_vectors:,} vectors, about {duration(cost.training_seconds)}"),
        ("adding", f"about {duration(cost.adding_seconds)} on this machine, shared by workers"),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def _compressed(images: int, dim: int, room: float) -> Recommendation:
    """OPQ, inverted lists and product quantiser, as fine as memory allows, else with the lists on disk."""
    lists = usual_lists(images)
    quantiser = f"IVF{lists}_HNSW32" if lists >= GRAPH_LISTS else f"IVF{lists}"
    sizes = [size for size in (64, 48, 32, 16, 8, 4, 2, 1) if size <= max(1, dim // 4)]
    kept = [size for size in sizes if 2 * size >= sizes[0]]
    fixed = 4 * lists * min(dim, 4 * sizes[0]) + images
    fitting = [size for size in kept if (size + 8) * images + fixed <= room]
    size = fitting[0] if fitting else sizes[0]
    width = min(4 * size, dim // size * size)
    factory = f"OPQ{size}_{width},{quantiser},PQ{size}"
    total = (size + 8) * images
    reasons = [
        f"{images:,} images: comparing all of them with a query takes too long or does not fit {_of(room)}",
        f"{lists:,} inverted lists, about 4 sqrt(images); calibrate sets how many a query visits",
        f"{size} bytes of code per image and 8 of row number; candidates are re-ranked with stored vectors, from disk",
        "those are float16, whose rounding changes about one of the 100 nearest among ten million",
    ]
    if not fitting:
        reasons.append(f"codes of {total / 1e9:.1f} GB do not fit {_of(room)}, so the inverted lists stay on disk")
    shards = max(1, math.ceil(2 * total / room)) if not fitting else 1
    if shards > 1:
        reasons.append(f"{shards} shards, so that one shard under construction takes at most half the memory")
    return Recommendation(SegmentConfig(factory, "float16", not fitting, shards), tuple(reasons))


def _of(room: float) -> str:
    return f"in {room / 1e9:.2f} GB, {LIST_SHARE:.0%} of the memory given"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
