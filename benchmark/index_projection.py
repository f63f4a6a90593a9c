"""An index of hundreds of millions of images, projected from the ones that were measured.

    python -m benchmark.index_scale --sizes 1000000 --dims 768 256 --factories OPQ64_256,IVF{lists},PQ64
    python -m benchmark.index_scale --sizes 10000000 --dims 768 256 --factories OPQ64_256,IVF{lists},PQ64 --limit_gb 1.5
    python -m benchmark.index_projection --images 400000000 --memory_gb 16 64    # results/scale/projection.json

What it is, memory, disk and time are those of `python -m fastgda.index plan`, the time multiplied by what the build of
the largest measured index took of its own estimate. The codes that a query visits and the vectors that it re-ranks
follow the power of the number of images that joins the two largest indexes of the same structure, calibrated to the
same recall; no fewer lists are visited than in the largest. Computing takes as long for every code and vector as in the
largest whose memory was not bounded; each vector is read from disk, and where lists are there each of them. The report
says what is assumed.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgda.core import ROOT, command_line, command_parser, environment, require_file, save_json
from fastgda.flags import add_flags, from_flags
from fastgda.index import recommend
from fastgda.index.backend import Structure
from fastgda.index.plan import duration, estimate, measured_flops, usual_lists


@dataclass(frozen=True)
class ProjectionConfig:
    """What is projected, and what is assumed of the machine."""

    images: int = 400_000_000
    """Images of the index."""
    dims: tuple[int, ...] = (768, 256)
    """Widths of the vectors."""
    memory_gb: tuple[float, ...] = (16.0, 64.0)
    """Memory budgets, in GB."""
    wanted: float = 0.95
    """The recall to which the measured indexes were calibrated."""
    workers: int = 16
    """Processes that add vectors, each on as many cores as this machine has."""
    access_us: float = 100.0
    """Assumed: microseconds of a read from disk, one after the other."""
    read_gb: float = 2.0
    """Assumed: GB a second that are read from disk."""
    report: Path = ROOT / "results" / "scale" / "index.json"
    """The measured indexes."""
    output: Path = ROOT / "results" / "scale" / "projection.json"
    """Where the projection is written."""

    def __post_init__(self) -> None:
        if min((self.images, self.workers, self.access_us, self.read_gb, *self.dims, *self.memory_gb)) <= 0:
            raise ValueError("images, dims, memory_gb, workers, access_us, read_gb: expected positive numbers")


class Measured(NamedTuple):
    """An index that was built and calibrated."""

    size: int
    nprobe: int
    visited: float
    """Codes in the lists that one query visits."""
    depth: int
    """Vectors that it re-ranks."""
    milliseconds: float
    """Median of one query, one client."""
    bounded: bool
    """Whether its memory was, so that these hold reads from disk."""
    build_ratio: float
    """Seconds of the build by those estimated."""


def measured(pieces: list[dict[str, Any]], factory: str, dim: int, wanted: float) -> list[Measured]:
    """The indexes of the structure of `factory` with about 4 √size lists, ascending; `ValueError` if fewer than two
    or none whose memory was not bounded.
    """
    found = {}
    for piece in pieces:
        lists = re.search(r"IVF(\d+),", piece["factory"])
        if piece["dim"] != dim or lists is None or structure(piece["factory"]) != structure(factory):
            continue
        if int(lists[1]) != usual_lists(piece["size"]):
            continue
        for goal in piece.get("goals", []):
            if goal["wanted"] == wanted and "failed" not in goal:
                settings, cost = goal["calibration"], piece["estimate"]
                found[piece["size"]] = Measured(
                    piece["size"],
                    settings["nprobe"],
                    settings["nprobe"] * piece["size"] / int(lists[1]),
                    settings["depth"],
                    goal["latency_one_client"]["median_ms"],
                    piece.get("limit_gb", 0.0) > 0,
                    piece["build_seconds"] / (cost["training_seconds"] + cost["adding_seconds"]),
                )
    if len(found) < 2 or all(index.bounded for index in found.values()):
        raise ValueError(
            f"{structure(factory)}, {dim} numbers, recall {wanted:g}: expected two measured sizes or more, one of them "
            f"without --limit_gb, found {sorted(found)}; python -m benchmark.index_scale"
        )
    return [found[size] for size in sorted(found)]


def structure(factory: str) -> str:
    """The factory string without the number of its lists and how the nearest of them are found."""
    return re.sub(r"IVF\d+(_HNSW\d+)?,", "IVF,", factory)


def growth(smaller: Measured, larger: Measured, value: str) -> float:
    """The exponent of the number of images with which `value` grew from one index to a larger one; at least 0."""
    ratio = getattr(larger, value) / getattr(smaller, value)
    return max(0.0, math.log(ratio) / math.log(larger.size / smaller.size))


def project(
    config: ProjectionConfig, pieces: list[dict[str, Any]], dim: int, memory_gb: float, flops: float
) -> dict[str, Any]:
    """The index of `config.images` vectors within a memory budget, what a query does in it and how long it takes.

    `pieces` are those of `benchmark.index_scale`; `flops` as `fastgda.index.plan.estimate` takes it.
    """
    plan = recommend(config.images, dim, memory_gb * 1e9)
    cost = estimate(plan.config, config.images, dim, flops)
    lists = Structure.create(plan.config.factory, dim).lists
    if not lists:
        raise ValueError(
            f"{config.images:,} images: expected an index with inverted lists, found {plan.config.factory}"
        )
    *_, smaller, largest = found = measured(pieces, plan.config.factory, dim, config.wanted)
    *_, whole = (index for index in found if not index.bounded)
    times = config.images / largest.size
    powers = {name: growth(smaller, largest, name) for name in ("visited", "depth")}
    grown, depth = (getattr(largest, name) * times**power for name, power in powers.items())
    probes = max(largest.nprobe, math.ceil(grown * lists / config.images))
    visited = probes * config.images / lists
    work = max(visited / whole.visited, depth / whole.depth) * whole.milliseconds
    reads = depth + probes * plan.config.on_disk
    read_bytes = (
        depth * dim * np.dtype(plan.config.store).itemsize + plan.config.on_disk * visited * cost.bytes_per_vector
    )
    waiting = reads * config.access_us / 1e3 + read_bytes / config.read_gb / 1e6
    return {
        "dim": dim,
        "memory_gb": memory_gb,
        "structure": asdict(plan.config),
        "measured": [smaller._asdict(), largest._asdict()],
        "powers": powers,
        "nprobe": probes,
        "visited": visited,
        "depth": depth,
        "milliseconds_computing": work,
        "milliseconds_reading": waiting,
        "ram_bytes": cost.ram,
        "ram_bytes_building": cost.build_ram,
        "disk_bytes": cost.disk,
        "training_seconds": cost.training_seconds * largest.build_ratio,
        "adding_seconds": cost.adding_seconds * largest.build_ratio / config.workers,
    }


def assumptions(config: ProjectionConfig) -> list[str]:
    """What the projection takes for granted, for the reader."""
    return [
        f"vectors like those measured; recall@k = {config.wanted:g} needs visited codes and re-ranked vectors that "
        "grow with the number of images by the power that joins the two largest measured indexes, and as many lists at "
        "least as in the largest",
        "a code or vector costs as much as in the largest index that was measured without a bound on its memory, the "
        "one that grows more counting for all (an upper bound: not all of a query's time grows)",
        f"reads from disk come one after the other, {config.access_us:g} µs each and {config.read_gb:g} GB a second, "
        "none from the cache",
        f"the build takes longer than estimated by as much as the largest measured one did; {config.workers} workers "
        "add vectors, one trains; vectors are there already",
    ]


def line(found: dict[str, Any]) -> str:
    """One projection for reading."""
    made = found["structure"]
    return (
        f"{found['dim']:>5} numbers, {found['memory_gb']:g} GB: {made['factory']}, "
        f"{'lists on disk' if made['on_disk'] else 'lists in memory'}, {made['shards']} shards\n"
        f"      RAM {found['ram_bytes'] / 1e9:.1f} GB ({found['ram_bytes_building'] / 1e9:.1f} building), disk "
        f"{found['disk_bytes'] / 1e9:,.0f} GB, training "
        f"{duration(found['training_seconds'])}, adding {duration(found['adding_seconds'])}\n"
        f"      a query visits {found['nprobe']} lists of {found['visited'] / found['nprobe']:,.0f} codes, re-ranks "
        f"{found['depth']:,.0f} vectors: {found['milliseconds_computing']:.1f} ms, reading "
        f"{found['milliseconds_reading']:.1f} ms"
    )


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    assert __doc__ is not None
    parser = command_parser("python -m benchmark.index_projection", __doc__)
    add_flags(parser, ProjectionConfig)
    config = from_flags(ProjectionConfig, parser.parse_args(argv))
    report = json.loads(require_file(config.report, "python -m benchmark.index_scale").read_text())
    flops = measured_flops()
    rows = [project(config, report["pieces"], dim, memory, flops) for dim in config.dims for memory in config.memory_gb]
    print("\n".join([f"{config.images:,} images", *map(line, rows), "assuming:", *assumptions(config)]))
    save_json(
        config.output,
        {
            "config": asdict(config),
            "assumptions": assumptions(config),
            "projections": rows,
            "environment": environment(),
        },
    )
    print(f"wrote {config.output}")


if __name__ == "__main__":
    sys.exit(main())
