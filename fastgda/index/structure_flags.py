"""Command-line flags of what an index is built as, shared by all commands that build one."""

from __future__ import annotations

import argparse
from typing import Literal

from fastgda.cluster import add_cluster_flags, cluster_from
from fastgda.index.plan import recommend
from fastgda.index.segment import BuildShards, SegmentConfig, one_by_one
from fastgda.index.workers import on_workers

AUTO = "auto"


def add_structure_flags(parser: argparse.ArgumentParser, default: str | None = AUTO) -> None:
    """Adds them; `default` is the factory's."""
    add = parser.add_argument
    add("--factory", default=default, help=f"FAISS factory string, or {AUTO}: by size and memory (default: {default})")
    add("--memory_gb", type=float, default=4.0, help="memory that searching may take, for auto (default: 4)")
    add(
        "--latency_ms", type=float, help="milliseconds that a query may take, for auto (default: exact where it can be)"
    )
    add("--store", choices=("float16", "float32"), help="numbers of the stored vectors (default: as recommended)")
    add("--shards", type=int, default=0, help="parts built one by one and merged (default: as recommended)")
    add("--on_disk", action=argparse.BooleanOptionalAction, help="leave inverted lists on disk (default: as needed)")
    add("--seed", type=int, default=0, help="of the choice of training vectors")
    add_cluster_flags(parser)


def structure_from(args: argparse.Namespace, images: int, dim: int) -> tuple[SegmentConfig, tuple[str, ...]]:
    """(what to build, why): the recommendation, where a flag does not say otherwise."""
    latency = None if args.latency_ms is None else args.latency_ms / 1e3
    advice = recommend(images, dim, args.memory_gb * 1e9, latency)
    chosen, reasons = advice.config, advice.reasons
    if args.factory != AUTO:
        chosen, reasons = SegmentConfig(args.factory, chosen.store), ("the factory is as asked for",)
    store: Literal["float16", "float32"] = args.store or chosen.store
    on_disk = chosen.on_disk if args.on_disk is None else args.on_disk
    return SegmentConfig(chosen.factory, store, on_disk, shards_from(args, chosen), args.seed), reasons


def shards_from(args: argparse.Namespace, chosen: SegmentConfig) -> int:
    """As asked for; else as chosen, and one for each worker at least."""
    return args.shards or max(chosen.shards, args.workers or 1)


def builder_from(args: argparse.Namespace) -> BuildShards:
    """What makes the shards: this process, or Ray workers."""
    cluster = cluster_from(args)
    return one_by_one if cluster is None else on_workers(cluster)
