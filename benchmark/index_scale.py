"""Recall, latency, memory and disk of index structures at several sizes, on vectors like a real embedding's.

    python -m feature_extraction.extract && python -m benchmark.index_scale --sizes 14297 118287 1000000 --dims 768 256
    python -m benchmark.index_scale --sizes 10000000 --dims 768 --factories IVF{lists},PQ64x4fs --on_disk --limit_gb 1.5
    python -m benchmark.index_scale --dry_run    # memory, disk and training time of each piece that is missing

The vectors are made up after the ranker's embedding of the training features, the queries after that of generated
images (`benchmark.synthetic`). Writes results/scale/index.json, where pieces of other sizes, dimensions and factories
stay. Each (dimension, size, factory) is a piece under runs/scale that is kept; after Ctrl-C the same command goes on
from the last whole piece. What is measured runs in a process of its own, for its memory; with --limit_gb in a control
group that has no more than that, the pages of mapped files included, so that what does not fit is read from disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from abu.room import require_disk, require_memory
from benchmark.index_measure import CALIBRATED_ON, DEPTHS
from benchmark.memory_limit import limited
from benchmark.synthetic import Statistics, Synthetic, exact_neighbours, keep
from fastgda.core import (
    ROOT,
    command_line,
    command_parser,
    environment,
    load_npy,
    save_json,
    save_npz,
    sha256_file,
)
from fastgda.flags import add_flags, from_flags
from fastgda.index import Index, SegmentConfig, Source, recommend
from fastgda.index.journal import exclusive
from fastgda.index.plan import duration, estimate, measured_flops, usual_lists
from fastgda.index.source import NpyRows
from fastgda.ranker import load_ranker

FACTORIES = (
    "Flat",
    "SQfp16",
    "SQ8",
    "HNSW32,SQ8",
    "IVF{lists},SQ8",
    "IVF{lists},PQ64x4fs",
    "OPQ64_256,IVF{lists},PQ64",
)


@dataclass(frozen=True)
class ScaleConfig:
    """What is measured."""

    features: Path = ROOT / "data" / "emoji" / "feats" / "effnet+minilm" / "data_feats.npy"
    """.npy file of the training images' features."""
    queries: Path = ROOT / "data" / "emoji" / "feats" / "effnet+minilm" / "test_query_feats.npy"
    """.npy file of generated images' features."""
    checkpoint: Path = ROOT / "weights" / "emoji_effnet+minilm.pth"
    """Ranker whose embedding of both is imitated."""
    tuned: bool = True
    """Imitate the ranker's embedding; otherwise the features as they are."""
    sizes: tuple[int, ...] = (14_297, 118_287, 1_000_000)
    """Numbers of vectors."""
    dims: tuple[int, ...] = (768, 256)
    """Widths, at most the embedding's."""
    factories: tuple[str, ...] = FACTORIES
    """FAISS factory strings; {lists} is a power of two, about four times the root of the size. Also: auto."""
    query_count: int = 1200
    """Queries to measure; a sixth as many others calibrate."""
    goals: tuple[float, ...] = (0.95, 0.99)
    """Values of recall@k that the index is calibrated to, one after the other."""
    k: int = 100
    """k of calibration and of the latencies."""
    clients: int = 4
    """Clients at once in the second measurement of latency."""
    memory_gb: float = 1.5
    """Memory budget of the factory auto."""
    on_disk: bool = False
    """Leave inverted lists on disk."""
    limit_gb: float = 0.0
    """Memory that the measured process may have, page cache included, in GB; 0: all. Needs root (control groups)."""
    work: Path = ROOT / "runs" / "scale"
    """Folder of pieces, of the vectors and of the index under construction."""
    output: Path = ROOT / "results" / "scale" / "index.json"
    """The report."""

    def __post_init__(self) -> None:
        if min((*self.sizes, *self.dims, self.query_count - 23, self.k, self.clients, len(self.goals))) < 1:
            raise ValueError("sizes, dims, k, clients, goals: expected positive numbers, and at least 24 queries")


def structure_for(config: ScaleConfig, factory: str, size: int, dim: int) -> SegmentConfig:
    """What `factory` stands for at this size."""
    if factory == "auto":
        return recommend(size, dim, config.memory_gb * 1e9).config
    on_disk = config.on_disk and "IVF" in factory and "fs" not in factory
    return SegmentConfig(factory.format(lists=usual_lists(size)), stored_as(size), on_disk)


def stored_as(size: int) -> Literal["float16", "float32"]:
    """The numbers of stored vectors, of the index and of the rows that it is built from."""
    return "float32" if size <= 1_000_000 else "float16"


def build_piece(rows: NpyRows, structure: SegmentConfig, folder: Path, made_from: str) -> float:
    """Builds the index in `folder`; seconds taken."""
    start = time.perf_counter()
    source = Source([rows], inputs={"embedding": made_from})
    Index.create(folder, source, structure, ranker="none", command="python -m benchmark.index_scale").snapshot()
    return time.perf_counter() - start


def run_piece(config: ScaleConfig, rows: NpyRows, factory: str, truth: Path, made_from: str) -> dict[str, Any]:
    """Builds, measures in a fresh process, and deletes one index."""
    size, dim = rows.shape
    folder = config.work / "index"
    if folder.exists():
        shutil.rmtree(folder)
    structure = structure_for(config, factory, size, dim)
    piece = {"size": size, "dim": dim, "factory": structure.factory, "structure": asdict(structure)}
    cost = estimate(structure, size, dim, measured_flops())
    piece["estimate"] = asdict(cost)
    require_disk(config.work, math.ceil(cost.disk))
    try:
        require_memory(math.ceil(max(cost.ram, cost.build_ram)), structure.factory)
        piece["build_seconds"] = build_piece(rows, structure, folder, made_from)
    except ValueError as error:
        return {**piece, "failed": str(error)}
    options = json.dumps({"k": config.k, "goals": config.goals, "clients": config.clients})
    command = [sys.executable, "-m", "benchmark.index_measure", str(folder), str(truth), options]
    if config.limit_gb:
        forget_pages(folder)
    with limited(config.limit_gb) as group:
        done = subprocess.run([*group.prefix, *command], cwd=ROOT, stdout=subprocess.PIPE)
        peak = group.peak()
    if config.limit_gb and done.returncode == -signal.SIGKILL:
        shutil.rmtree(folder)
        failed = f"expected to need at most {config.limit_gb:g} GB, found that it was killed for more"
        return {**piece, "failed": failed, "limit_gb": config.limit_gb}
    done.check_returncode()
    found = json.loads(done.stdout)
    shutil.rmtree(folder)
    return {**piece, **found, "limit_gb": config.limit_gb, "peak_bytes": peak}


def forget_pages(folder: Path) -> None:
    """Puts the files in `folder` out of the page cache: a control group is charged for pages that it reads first."""
    os.sync()
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_embedding(config: ScaleConfig) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """(training images [N, D], queries [Q, D], hashes of what they were made from)."""
    images, queries = (load_npy(path, (None, None), finite=True) for path in (config.features, config.queries))
    inputs = {"features": sha256_file(config.features), "queries": sha256_file(config.queries)}
    if not config.tuned:
        return images, queries, inputs
    ranker = load_ranker(config.checkpoint, in_dim=images.shape[1])
    inputs |= {"ranker": sha256_file(config.checkpoint)}
    return ranker.embed(images).numpy(), ranker.embed_queries(queries).numpy(), inputs


@dataclass(frozen=True)
class Plan:
    """Where the pieces are kept, and what they depend on."""

    config: ScaleConfig
    inputs: dict[str, str]
    """Hashes of what the vectors imitate."""

    @property
    def made_from(self) -> str:
        """One name for all that the vectors depend on."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()

    @property
    def count(self) -> int:
        """Queries, those that calibrate included."""
        return self.config.query_count + self.config.query_count // (CALIBRATED_ON - 1)

    def truth(self, size: int, dim: int) -> Path:
        """The file of queries and their exact neighbours."""
        return self.config.work / f"truth_{size}x{dim}_{self.made_from[:8]}_{self.count}.npz"

    def rows(self, size: int, dim: int) -> Path:
        """The file of vectors while their indexes are built."""
        return self.config.work / f"rows_{size}x{dim}_{self.made_from[:8]}.npy"

    def piece(self, size: int, dim: int, factory: str) -> tuple[Path, dict[str, Any]]:
        """(file of a measured index, what it depends on)."""
        config = self.config
        key: dict[str, Any] = {
            **self.inputs,
            "counts": [config.query_count, config.k, config.clients],
            "goals": list(config.goals),
        }
        if config.limit_gb:
            key |= {"pages": "forgotten before the measurement"}
        key |= {"limit_gb": config.limit_gb, "structure": asdict(structure_for(config, factory, size, dim))}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return config.work / f"{size}x{dim}_{digest[:12]}.json", key


def forecast(plan: Plan) -> None:
    """Prints what each missing piece will need."""
    config, flops = plan.config, measured_flops()
    for dim in config.dims:
        for size in config.sizes:
            for factory in config.factories:
                if plan.piece(size, dim, factory)[0].is_file():
                    continue
                structure = structure_for(config, factory, size, dim)
                cost = estimate(structure, size, dim, flops)
                print(
                    f"{size:>11,} x {dim:<5} {structure.factory:<28} RAM {cost.ram / 1e9:.2f} GB, "
                    f"{cost.build_ram / 1e9:.2f} GB building, disk {cost.disk / 1e9:.2f} GB, "
                    f"training {duration(cost.training_seconds)}, adding {duration(cost.adding_seconds)}"
                )


def run(plan: Plan, embedding: np.ndarray, asked: np.ndarray) -> dict[str, Any]:
    """All pieces, those on disk reused; the report. `embedding` [N, D] and `asked` [Q, D] are imitated."""
    config, pieces = plan.config, []
    for dim in config.dims:
        statistics = Statistics.of(embedding, asked, dim)
        for size in config.sizes:
            rows, truth, kept = Synthetic(statistics, size), plan.truth(size, dim), plan.rows(size, dim)
            if not truth.is_file():
                queries = rows.queries(plan.count)
                save_npz(truth, queries=queries, truth=exact_neighbours(rows, queries, min(max(DEPTHS), size)))
            for factory in config.factories:
                path, key = plan.piece(size, dim, factory)
                if not path.is_file():
                    found = run_piece(config, keep(rows, kept, stored_as(size)), factory, truth, plan.made_from)
                    save_json(path, {"key": key, "piece": found})
                pieces.append(json.loads(path.read_text())["piece"])
                print(summary(pieces[-1]), flush=True)
            kept.unlink(missing_ok=True)
    return {"config": asdict(config), "inputs": plan.inputs, "pieces": pieces, "environment": environment()}


def joined(report: dict[str, Any], output: Path) -> dict[str, Any]:
    """The report with the pieces of an earlier one of the same vectors that it lacks."""
    if not output.is_file():
        return report
    earlier = json.loads(output.read_text())
    if earlier["inputs"] != report["inputs"]:
        return report

    def name(piece: dict[str, Any]) -> str:
        return json.dumps([piece["size"], piece["dim"], piece["structure"], piece.get("limit_gb", 0.0)])

    found = {name(piece): piece for piece in (*earlier["pieces"], *report["pieces"])}
    return report | {"pieces": sorted(found.values(), key=lambda piece: (-piece["dim"], piece["size"]))}


def summary(piece: dict[str, Any]) -> str:
    """One line for each goal."""
    head = f"{piece['size']:>11,} x {piece['dim']:<5} {piece['factory']:<28}"
    if "failed" in piece:
        return f"{head} {piece['failed']}"
    lines = []
    for goal in piece["goals"]:
        line = f"{head} {goal['wanted']:g}: "
        if "failed" in goal:
            lines.append(line + goal["failed"])
            continue
        recalls = " ".join(f"@{k} {value['mean']:.3f}" for k, value in goal["recall"].items())
        one, many = goal["latency_one_client"], goal["latency_many_clients"]
        line += f"recall {recalls}  {one['median_ms']:.2f} ms (p99 {one['p99_ms']:.2f}), {many['clients']} clients "
        line += f"{many['median_ms']:.2f} ms (p99 {many['p99_ms']:.2f})  "
        ram = piece["ram_bytes"]["RssAnon"] if piece["peak_bytes"] is None else piece["peak_bytes"]
        lines.append(line + f"RAM {ram / 1e6:,.0f} MB  disk {piece['disk_bytes'] / 1e6:,.0f} MB")
    return "\n".join(lines)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    assert __doc__ is not None
    parser = command_parser("python -m benchmark.index_scale", __doc__)
    add_flags(parser, ScaleConfig)
    parser.add_argument("--dry_run", action="store_true", help="print what missing pieces will need; build none")
    args = parser.parse_args(argv)
    config = from_flags(ScaleConfig, args)
    config.work.mkdir(parents=True, exist_ok=True)
    embedding, asked, inputs = load_embedding(config)
    plan = Plan(config, inputs)
    if args.dry_run:
        forecast(plan)
        return
    with exclusive(config.work / "index.lock", wait=False):
        save_json(config.output, joined(run(plan, embedding, asked), config.output))
    print(f"wrote {config.output}")


if __name__ == "__main__":
    sys.exit(main())
