"""How far `--dry_run` is from what a collection then needs: time, memory and disk, predicted and measured.

    python -m abu.collect queries
    python -m benchmark.forecast                                  # results/speed/forecast.json; 10 minutes on two cores
    python -m benchmark.forecast --jobs training steps --images 4096

Each job predicts first, then computes the first images for real, in a process of its own; two Ray workers where the
job's name says so. Memory is the peak of the resident memory of the processes that compute, sampled five times a
second. Time is counted from the first process being asked to the last piece on disk, model loading and the start of Ray
included, which a prediction leaves out: the fewer images, the more of it shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from abu.candidates import CandidateConfig
from abu.cluster import ClusterConfig, run_plan
from abu.collect_config import CollectConfig, StepConfig
from abu.collectors import GradientCollector, StepCollector
from abu.estimate import Estimate, estimate
from abu.exact_collection import ExactCollector, ExactConfig, exact_plan
from abu.exact_estimate import dry_run
from abu.plan import Collection
from abu.stages import step_plan, training_plan
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from fastgda.core import ROOT, command_line, command_parser, environment, save_json
from fastgda.flags import add_flags, from_flags

JOBS = ("training", "training-2-workers", "steps", "exact")
INTERVAL = 0.2
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class ForecastConfig:
    """What is predicted and measured."""

    images: int = 2_048
    """The first so many training images; the exact form takes an eighth."""
    queries: int = 8
    """Queries of the exact form."""
    query_bits: int = 32
    """Bits of a number in the products of steps."""


@dataclass(frozen=True)
class Job:
    """A collection of the first images, not begun."""

    predict: Callable[[], Estimate]
    compute: Callable[[], None]


def prepare(name: str, testbed: Testbed, config: ForecastConfig, folder: Path) -> Job:
    """The job called `name`, with its pieces in `folder`."""
    cluster = ClusterConfig(workers=2) if name.endswith("2-workers") else None
    if name == "exact":
        return exact_job(testbed, config, folder)
    build: Callable[[], Any]
    if name == "steps":
        build, cut = partial(StepCollector, testbed, StepConfig(query_bits=config.query_bits)), step_plan
    else:
        build, cut = partial(GradientCollector, testbed, CollectConfig()), training_plan
    folder.mkdir(parents=True, exist_ok=True)
    collection = Collection(folder)
    pieces = [piece for piece in cut(testbed, range(1)) if piece.stop <= config.images]
    workers = cluster.workers if cluster else 1
    return Job(
        lambda: estimate(build(), collection, pieces, workers), lambda: run_plan(build, collection, pieces, cluster)
    )


def exact_job(testbed: Testbed, config: ForecastConfig, folder: Path) -> Job:
    """Exact influence of the first test queries on random images, the same ones for all."""
    whole = ExactConfig(split="test", candidates=CandidateConfig(subset=config.images / 8 / testbed.images))
    plan = exact_plan(testbed, whole)
    few = replace(plan, lists=np.repeat(plan.lists[:1], config.queries, 0))
    collector = ExactCollector(testbed, whole, folder)
    collector.plan = few

    def compute() -> None:
        for pieces in few.stages().values():
            run_plan(lambda: collector, collector.collection, pieces)

    return Job(lambda: dry_run(collector, 1), compute)


def child(name: str, part: str, folder: Path, testbed: Testbed, config: ForecastConfig) -> None:
    """Predicts or computes in this process, and prints what came out."""
    job = prepare(name, testbed, config, folder)
    if part == "compute":
        began = time.perf_counter()
        job.compute()
        print(json.dumps({"seconds": time.perf_counter() - began}))
        return
    found = job.predict()
    print(json.dumps({"seconds": found.seconds, "memory": found.memory, "disk": found.disk}))


def computing_memory(process: psutil.Process) -> int:
    """Resident bytes of Ray's workers under `process`, or of itself where it has none."""
    actors = [p.memory_info().rss for p in process.children(recursive=True) if p.name().startswith("ray::")]
    return sum(actors) if actors else process.memory_info().rss


def watched(command: list[str]) -> dict[str, float]:
    """What a child printed, with the peak of its memory; `ValueError` if it failed."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        peak = 0
        while process.poll() is None:
            # a process may end between being listed and being looked at
            with suppress(psutil.NoSuchProcess):
                peak = max(peak, computing_memory(psutil.Process(process.pid)))
            time.sleep(INTERVAL)
        assert process.stdout is not None
        printed = process.stdout.read().splitlines()
        if process.returncode:
            errors.seek(0)
            raise ValueError(f"{' '.join(command)}: expected it to end well, found: {errors.read().strip()[-300:]}")
    return json.loads(printed[-1]) | {"peak": peak}


def compare(name: str, command: list[str], work: Path) -> dict[str, Any]:
    """One row of the report."""
    shutil.rmtree(work, ignore_errors=True)
    predicted, found = (watched([*command, "--child", f"{name} {part}"]) for part in ("predict", "compute"))
    measured = {
        "seconds": found["seconds"],
        "memory": found["peak"],
        "disk": sum(path.stat().st_size for path in work.glob("*.npz")),
    }
    shutil.rmtree(work)
    row: dict[str, Any] = {"job": name}
    for key, value in measured.items():
        row[key] = {"predicted": round(predicted[key], 3), "measured": round(value, 3)}
        row[key]["relative_error"] = round(predicted[key] / value - 1, 3)
    print(row)
    return row


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.forecast", __doc__)
    add_testbed_flags(parser)
    add_flags(parser, ForecastConfig)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="what is measured (default: all)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    testbed, config = testbed_from(args), from_flags(ForecastConfig, args)
    if args.child:
        name, part = args.child.split()
        child(name, part, testbed.root / "runs/forecast" / name, testbed, config)
        return
    command = [sys.executable, "-m", "benchmark.forecast", *(sys.argv[1:] if argv is None else argv)]
    rows = [compare(name, command, testbed.root / "runs/forecast" / name) for name in args.jobs]
    report = {"config": vars(config), "rows": rows, "environment": environment()}
    save_json(testbed.root / "results/speed/forecast.json", report)


if __name__ == "__main__":
    sys.exit(main())
