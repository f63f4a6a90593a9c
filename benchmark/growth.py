"""Peak memory of both forms of influence, and how time grows with images, queries and workers.

Each measurement runs in a process of its own, whose peak resident memory counts from when model, images and the
queries' gradients are in place; a process that has no more than these is the base line. Workers are processes that
share the images and the processors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from abu.peak import forget_peak, peak_bytes
from benchmark.stopwatch import SpeedConfig, Stopwatch, timed
from fastgda.core import ROOT, best_device, save_json

GRIDS = {"emoji": ((64, 128, 256), (1, 8, 64)), "coco": ((8, 16, 32), (1, 4, 64))}
"""Architecture -> (images, queries), varied one at a time from the fewest images and the middle number of queries.

The exact form keeps a model for each query and gets no more than that.
"""
WORKERS = (1, 2)
FORMS = ("base", "exact", "amortised")


def child(options: dict[str, Any]) -> dict[str, float]:
    """One measurement, in this process: {seconds, peak_bytes}."""
    torch.set_num_threads(options["threads"])
    args = argparse.Namespace(mode=options["mode"], root=Path(options["root"]) if options["root"] else None)
    images, queries = options["images"], options["queries"]
    config = SpeedConfig(
        architecture=options["architecture"], images=images, draws=1, query_draws=1, exact_queries=(1, max(2, queries))
    )
    watch = Stopwatch(config.world(args, best_device()), config)
    _, gradients = watch.query_gradients(min(queries, len(watch.world.queries.ids)))
    seconds = 0.0
    forget_peak()
    if options["form"] == "exact":
        _, models = watch.unlearned(gradients)
        seconds, _ = watch.exact(watch.world.training, models)
    if options["form"] == "amortised":
        matrix = watch.query_matrix(gradients, queries)
        seconds, _ = timed(lambda: watch.amortised(watch.world.training, {queries: matrix}))
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def start(options: dict[str, Any]) -> subprocess.Popen:
    """Runs `child` in a process of its own."""
    command = [sys.executable, "-m", "benchmark.growth", json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options["threads"])}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict[str, float]:
    """What it measured; `ValueError` if it failed."""
    printed, _ = process.communicate()
    if process.returncode:
        raise ValueError(f"measurement: expected it to end well, found exit status {process.returncode}")
    return json.loads(printed.splitlines()[-1])


def plan(architecture: str, threads: int) -> list[dict[str, Any]]:
    """Every measurement: form, images, queries, workers."""
    numbers, asked = GRIDS[architecture]
    few, most = numbers[0], asked[1]
    found: list[dict[str, Any]] = [{"form": "base", "images": few, "queries": 1, "workers": 1}]
    for form in FORMS[1:]:
        found += [{"form": form, "images": images, "queries": most, "workers": 1} for images in numbers]
        allowed = [queries for queries in asked if form == "amortised" or queries <= most]
        found += [{"form": form, "images": few, "queries": q, "workers": 1} for q in allowed if q != most]
        found += [{"form": form, "images": numbers[-1], "queries": most, "workers": w} for w in WORKERS[1:]]
    return [row | {"threads": max(1, threads // row["workers"])} for row in found]


def growth(architecture: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All measurements, those on disk reused."""
    rows = []
    for row in plan(architecture, torch.get_num_threads()):
        name = "_".join(str(value) for value in (architecture, args.mode, *row.values()))
        path = work / "growth" / f"{name}.json"
        if not path.is_file():
            save_json(path, row | measure(architecture, args, row))
        rows.append(json.loads(path.read_text()))
        print(rows[-1])
    base = rows[0]["peak_bytes"]
    return {"base_bytes": base, "rows": [r | {"above_base_bytes": r["peak_bytes"] - base} for r in rows[1:]]}


def measure(architecture: str, args: argparse.Namespace, row: dict[str, Any]) -> dict[str, float]:
    """One row: the images are split over the workers, which run at once; the slowest counts, memory adds up."""
    share = row["images"] // row["workers"]
    common = {"architecture": architecture, "mode": args.mode, "root": str(args.root or "")}
    processes = [start(row | common | {"images": share}) for _ in range(row["workers"])]
    found = [finish(process) for process in processes]
    return {
        "seconds": max(one["seconds"] for one in found),
        "peak_bytes": sum(one["peak_bytes"] for one in found),
    }


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
