"""Measures one index for `benchmark.index_scale`, in a process that did not build it.

    python -m benchmark.index_measure FOLDER TRUTH OPTIONS    # prints JSON

TRUTH is an .npz file of `queries` [Q, D] and `truth` [Q, n], their exact neighbours; OPTIONS JSON of `k`, `goals` and
`clients` (see `benchmark.index_scale.ScaleConfig`).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastgda.core import load_npz
from fastgda.index import Index
from fastgda.index.backend import set_threads
from fastgda.index.calibrate import calibrate, recall

DEPTHS = (10, 100, 1000)
"""Values of k of recall@k."""
CALIBRATED_ON = 7
"""One query in so many calibrates."""
BUDGET, LEAST = 30.0, 100
"""Seconds for a measurement of latency, and single queries that it takes however long they last."""


def measure(folder: Path, work: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Calibrates the index in `folder` to each goal and measures it; runs in a process that did not build it."""
    held = load_npz(work, ("queries", "truth"))
    queries, truth = held["queries"], held["truth"]
    few = len(queries) // CALIBRATED_ON
    before = memory()
    index = Index(folder, verify=False)
    k = min(config["k"], len(index))
    # of the vectors as they are stored, which may be rounded
    nearest = index.snapshot().exact(queries[:few], k).ids
    goals = [measure_goal(index, queries, truth, nearest, wanted, config["clients"]) for wanted in config["goals"]]
    used = memory()
    return {
        "goals": goals,
        "ram_bytes": {name: used[name] - before.get(name, 0) for name in used},
        "disk_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def measure_goal(
    index: Index, queries: np.ndarray, truth: np.ndarray, nearest: np.ndarray, wanted: float, clients: int
) -> dict[str, Any]:
    """Recall at every depth and latencies, calibrated to recall@k `wanted` on the first n queries.

    `nearest` [n, k] are their exact neighbours among the stored vectors.
    """
    few, k = nearest.shape
    try:
        calibration = calibrate(index, queries[:few], k, wanted, nearest)
    except ValueError as error:
        return {"wanted": wanted, "failed": str(error)}
    asked, expected = queries[few:], truth[few:]
    recalls = {}
    for depth in (depth for depth in DEPTHS if depth <= truth.shape[1]):
        reached = recall(index.search(asked, depth).ids, expected[:, :depth])
        recalls[str(depth)] = {
            "mean": float(reached.mean()),
            "standard_error": float(reached.std() / len(reached) ** 0.5),
        }
    return {
        "wanted": wanted,
        "calibration": calibration,
        "recall": recalls,
        "latency_one_client": latencies(index, asked, k, clients=1, threads=os.cpu_count() or 1),
        "latency_many_clients": latencies(index, asked, k, clients=clients, threads=1),
    }


def latencies(index: Index, queries: np.ndarray, k: int, *, clients: int, threads: int) -> dict[str, float]:
    """Milliseconds of single queries with so many clients at once, each on so many threads, after a few warm ones.

    As many of the queries as are answered within `BUDGET` seconds, at least `LEAST`.
    """
    taken: list[float] = []
    lock = threading.Lock()

    def ask(row: int) -> None:
        if len(taken) >= LEAST and time.perf_counter() - began > BUDGET:
            return
        start = time.perf_counter()
        index.search(queries[row : row + 1], k)
        seconds = time.perf_counter() - start
        with lock:
            taken.append(1000 * seconds)

    with ThreadPoolExecutor(clients, initializer=set_threads, initargs=(threads,)) as pool:
        began = time.perf_counter()
        list(pool.map(ask, range(min(LEAST, len(queries)))))
        taken.clear()
        began = time.perf_counter()
        list(pool.map(ask, range(len(queries))))
        rate = len(taken) / (time.perf_counter() - began)
    median, late = np.percentile(taken, [50, 99])
    return {
        "clients": clients,
        "queries": len(taken),
        "median_ms": float(median),
        "p99_ms": float(late),
        "queries_per_second": rate,
    }


def memory() -> dict[str, int]:
    """Bytes in memory now, by what backs them: RssAnon is the index's own, RssFile pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


def main() -> None:
    """Command line: see the module's docstring."""
    folder, truth, options = sys.argv[1:]
    print(json.dumps(measure(Path(folder), Path(truth), json.loads(options))))


if __name__ == "__main__":
    main()
