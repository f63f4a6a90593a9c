"""Recall, latency, memory and disk of index structures at several sizes, on vectors like a real embedding's.

    python -m benchmark.index_scale --embedding data/emoji/feats/effnet+minilm/data_feats.npy \\
        --queries data/emoji/feats/effnet+minilm/test_query_feats.npy --sizes 14297 118287 1000000 --dims 768 256

Writes results/scale/index.json. Each (dimension, size, factory) is a piece under runs/scale that is kept; after Ctrl-C
the same command goes on from the last whole piece. What is measured runs in a process of its own, for its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.synthetic import Statistics, Synthetic, exact_neighbours
from fastgda.core import (
    ROOT,
    command_line,
    command_parser,
    environment,
    load_npy,
    load_npz,
    save_json,
    save_npz,
    sha256_file,
)
from fastgda.flags import add_flags, from_flags
from fastgda.index import Index, SegmentConfig, Source, recommend
from fastgda.index.backend import set_threads
from fastgda.index.calibrate import calibrate, recall

FACTORIES = (
    "Flat",
    "SQfp16",
    "SQ8",
    "HNSW32,SQ8",
    "IVF{lists},SQ8",
    "IVF{lists},PQ64x4fs",
    "OPQ64_256,IVF{lists},PQ64",
)
DEPTHS = (10, 100, 1000)
"""Values of k of recall@k."""


@dataclass(frozen=True)
class ScaleConfig:
    """What is measured."""

    embedding: Path = ROOT / "data" / "emoji" / "feats" / "effnet+minilm" / "data_feats.npy"
    """.npy file of training embeddings (or features) whose statistics are imitated."""
    queries: Path = ROOT / "data" / "emoji" / "feats" / "effnet+minilm" / "test_query_feats.npy"
    """.npy file of generated images in the same embedding."""
    sizes: tuple[int, ...] = (14_297, 118_287, 1_000_000)
    """Numbers of vectors."""
    dims: tuple[int, ...] = (768, 256)
    """Widths, at most the embedding's."""
    factories: tuple[str, ...] = FACTORIES
    """FAISS factory strings; {lists} is a power of two, about four times the root of the size. Also: auto."""
    query_count: int = 400
    """Queries: half for calibration, half to measure."""
    recall: float = 0.95
    """Recall@k that calibration aims at."""
    k: int = 100
    """k of calibration and of the latencies."""
    clients: int = 4
    """Clients at once in the second measurement of latency."""
    memory_gb: float = 1.5
    """Memory budget of the factory auto."""
    on_disk: bool = False
    """Leave inverted lists on disk."""
    work: Path = ROOT / "runs" / "scale"
    """Folder of pieces and of the index under construction."""
    output: Path = ROOT / "results" / "scale" / "index.json"
    """The report."""

    def __post_init__(self) -> None:
        if min((*self.sizes, *self.dims, self.query_count - 7, self.k, self.clients)) < 1:
            raise ValueError("sizes, dims, k and clients: expected positive numbers, and at least 8 queries")


def structure_for(config: ScaleConfig, factory: str, size: int, dim: int) -> SegmentConfig:
    """What `factory` stands for at this size."""
    if factory == "auto":
        return recommend(size, dim, config.memory_gb * 1e9).config
    lists = 2 ** max(2, round(np.log2(4 * np.sqrt(size))))
    store: Any = "float32" if size <= 1_000_000 else "float16"
    on_disk = config.on_disk and "IVF" in factory and "fs" not in factory
    return SegmentConfig(factory.format(lists=lists), store, on_disk)


def build_piece(config: ScaleConfig, rows: Synthetic, structure: SegmentConfig, folder: Path) -> float:
    """Builds the index in `folder`; seconds taken."""
    start = time.perf_counter()
    source = Source([rows], inputs={"embedding": sha256_file(config.embedding)})
    Index.create(folder, source, structure, ranker="none", command="python -m benchmark.index_scale").snapshot()
    return time.perf_counter() - start


def measure(folder: Path, work: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Calibrates the index in `folder` and measures it; runs in a process that did not build it."""
    held = load_npz(work, ("queries", "truth"))
    queries, truth = held["queries"], held["truth"]
    before = memory()
    index = Index(folder, verify=False)
    k = min(config["k"], len(index))
    try:
        calibration = calibrate(index, queries[::2], k, config["recall"])
    except ValueError as error:
        calibration = {"failed": str(error)}
    asked, expected = queries[1::2], truth[1::2]
    recalls = {}
    for depth in (depth for depth in DEPTHS if depth <= truth.shape[1]):
        reached = recall(index.search(asked, depth).ids, expected[:, :depth])
        recalls[str(depth)] = {
            "mean": float(reached.mean()),
            "standard_error": float(reached.std() / len(reached) ** 0.5),
        }
    one = latencies(index, asked, k, clients=1, threads=os.cpu_count() or 1)
    many = latencies(index, asked, k, clients=config["clients"], threads=1)
    used = memory()
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "calibration": calibration,
        "recall": recalls,
        "latency_one_client": one,
        "latency_many_clients": many,
        "ram_bytes": {name: used[name] - before.get(name, 0) for name in used},
        "disk_bytes": files,
    }


def latencies(index: Index, queries: np.ndarray, k: int, *, clients: int, threads: int) -> dict[str, float]:
    """Milliseconds of single queries with so many clients at once, each on so many threads, after one warm round."""
    taken: list[float] = []
    lock = threading.Lock()

    def ask(row: int) -> None:
        start = time.perf_counter()
        index.search(queries[row : row + 1], k)
        seconds = time.perf_counter() - start
        with lock:
            taken.append(1000 * seconds)

    with ThreadPoolExecutor(clients, initializer=set_threads, initargs=(threads,)) as pool:
        list(pool.map(ask, range(len(queries))))
        taken.clear()
        start = time.perf_counter()
        list(pool.map(ask, range(len(queries))))
        rate = len(queries) / (time.perf_counter() - start)
    median, late = np.percentile(taken, [50, 99])
    return {"clients": clients, "median_ms": float(median), "p99_ms": float(late), "queries_per_second": rate}


def memory() -> dict[str, int]:
    """Bytes in memory now, by what backs them: RssAnon is the index's own, RssFile pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


def run_piece(config: ScaleConfig, rows: Synthetic, factory: str, truth: Path) -> dict[str, Any]:
    """Builds, measures in a fresh process, and deletes one index."""
    size, dim = rows.shape
    folder = config.work / "index"
    if folder.exists():
        shutil.rmtree(folder)
    structure = structure_for(config, factory, size, dim)
    piece = {"size": size, "dim": dim, "factory": structure.factory, "structure": asdict(structure)}
    try:
        piece["build_seconds"] = build_piece(config, rows, structure, folder)
    except ValueError as error:
        return {**piece, "failed": str(error)}
    options = json.dumps({"k": config.k, "recall": config.recall, "clients": config.clients})
    done = subprocess.run(
        [sys.executable, "-m", "benchmark.index_scale", "--measure", str(folder), str(truth), options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    shutil.rmtree(folder)
    return {**piece, **json.loads(done.stdout)}


def run(config: ScaleConfig) -> dict[str, Any]:
    """All pieces, those on disk reused; the report."""
    key: dict[str, Any] = {"embedding": sha256_file(config.embedding), "queries": sha256_file(config.queries)}
    key |= {"counts": [config.query_count, config.k, config.clients], "recall": config.recall}
    embedding, asked = (load_npy(path, (None, None), finite=True) for path in (config.embedding, config.queries))
    pieces = []
    for dim in config.dims:
        statistics = Statistics.of(embedding, asked, dim)
        for size in config.sizes:
            rows = Synthetic(statistics, size)
            truth = config.work / f"truth_{size}x{dim}_{key['embedding'][:8]}_{config.query_count}.npz"
            if not truth.is_file():
                queries = rows.queries(config.query_count)
                save_npz(truth, queries=queries, truth=exact_neighbours(rows, queries, min(max(DEPTHS), size)))
            for factory in config.factories:
                name = f"{size}x{dim}_{factory}".translate(str.maketrans("{},", "___"))
                path = config.work / f"{name}.json"
                held = json.loads(path.read_text()) if path.is_file() else {}
                settings = {**key, "structure": asdict(structure_for(config, factory, size, dim))}
                if held.get("key") != settings:
                    held = {"key": settings, "piece": run_piece(config, rows, factory, truth)}
                    save_json(path, held)
                pieces.append(held["piece"])
                print(summary(held["piece"]), flush=True)
    return {"config": asdict(config), "inputs": key, "pieces": pieces, "environment": environment()}


def summary(piece: dict[str, Any]) -> str:
    """One line."""
    head = f"{piece['size']:>11,} x {piece['dim']:<5} {piece['factory']:<28}"
    if "failed" in piece:
        return f"{head} {piece['failed']}"
    recalls = " ".join(f"@{k} {value['mean']:.3f}" for k, value in piece["recall"].items())
    one, many, memory_used = piece["latency_one_client"], piece["latency_many_clients"], piece["ram_bytes"]["RssAnon"]
    return (
        f"{head} recall {recalls}  {one['median_ms']:.2f} ms (p99 {one['p99_ms']:.2f}), {many['clients']} clients "
        f"{many['median_ms']:.2f} ms (p99 {many['p99_ms']:.2f})  RAM {memory_used / 1e6:,.0f} MB  "
        f"disk {piece['disk_bytes'] / 1e6:,.0f} MB"
    )


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    assert __doc__ is not None
    parser = command_parser("python -m benchmark.index_scale", __doc__)
    add_flags(parser, ScaleConfig)
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "TRUTH", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        folder, truth, options = args.measure
        print(json.dumps(measure(Path(folder), Path(truth), json.loads(options))))
        return
    config = from_flags(ScaleConfig, args)
    save_json(config.output, run(config))
    print(f"wrote {config.output}")


if __name__ == "__main__":
    sys.exit(main())
