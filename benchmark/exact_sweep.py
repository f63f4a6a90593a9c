"""What the shared sweep saves against one plain loop per query, and when bfloat16 changes the ranks.

    python -m benchmark.exact_sweep --queries 8 --images 128          # results/speed/exact_sweep.json
    python -m benchmark.exact_sweep --bf16 --queries 8 --images 256   # results/speed/exact_bf16.json

The plain loop takes one query at a time: the losses of every image at θ0 and at θ_{−ẑ}, in batches of images, each
timestep by itself. Both sides use the same model, images, timesteps, noise and number of threads, and must find the
same loss changes; each runs several times in turn, and medians are compared. `shared_without_prefix` runs the modules
before the first moved layer for every query. Peak memory is that of a process which runs one side only, beside what it
had before. The bfloat16 part ranks the images by the loss change under autocast and in float32, for several
step sizes: Spearman per query with its standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from abu.amortised import Examples
from abu.influence import ExactInfluence, exact_influence, mean_losses
from abu.loss_draws import LossDraws
from abu.peak import forget_peak, peak_bytes
from abu.sweep import Sweep, SweepConfig
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from abu.unlearn import Change, UnlearnConfig, moved_model, natural_step, query_gradient
from fastgda.core import ROOT, best_device, command_line, command_parser, environment, save_json
from fastgda.flags import add_flags, from_flags
from fastgda.metrics import spearman, standard_error
from fastgda.rankings import from_scores


@dataclass(frozen=True)
class SweepBenchmark:
    """What is measured."""

    queries: int = 8
    """The first so many test queries."""
    images: int = 128
    """The first so many training images."""
    repeats: int = 3
    """Runs of each side."""
    steps: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """Step sizes α of the bfloat16 part; the timing takes the paper's 0.01."""
    threads: int = 1
    """Threads of both sides."""


def query_changes(exact: ExactInfluence, testbed: Testbed, count: int, steps: tuple[float, ...]) -> list[list[Change]]:
    """θ_{−ẑ} − θ0 [steps][queries]; one gradient of each query serves every step size."""
    queries = testbed.query_examples("test", exact.sweep.device)
    draws = exact.unlearning.draws(len(exact.schedule))
    gradients = [
        query_gradient(exact.model, exact.schedule, exact.curvature, queries.rows(i, i + 1), draws)
        for i in range(count)
    ]
    images = len(exact.images)
    return [[natural_step(exact.curvature, gradient, step / images) for gradient in gradients] for step in steps]


def plain_loop(exact: ExactInfluence, examples: Examples, changes: list[Change]) -> np.ndarray:
    """τ [Q, B], one query after the other."""
    draws, rows = exact.sweep.draws.stratified(len(exact.schedule)), []
    for change in changes:
        models = [exact.model, moved_model(exact.model, change)]
        before, after = mean_losses(models, exact.schedule, examples, draws, progress=False)
        rows.append((after - before).numpy())
    return np.stack(rows)


def sides(exact: ExactInfluence, testbed: Testbed, config: SweepBenchmark) -> dict[str, Callable[[], np.ndarray]]:
    """Name -> computation of τ [Q, B]."""
    examples = testbed.training_examples(exact.sweep.device).rows(0, config.images)
    whole = Sweep(exact.model, exact.schedule, exact.images, exact.sweep.draws, exact.sweep.config)
    (changes,) = query_changes(exact, testbed, config.queries, (exact.unlearning.step,))
    for sweep in (exact.sweep, whole):
        sweep.losses([0], [None])
    whole.prefix = []
    return {
        "plain": lambda: plain_loop(exact, examples, changes),
        "shared": lambda: exact_influence(exact.sweep, examples.ids, changes),
        "shared_without_prefix": lambda: exact_influence(whole, examples.ids, changes),
    }


def measure_speed(exact: ExactInfluence, testbed: Testbed, config: SweepBenchmark) -> dict:
    """Medians of both sides, their ratio, and how far their results are apart."""
    work, found = sides(exact, testbed, config), {}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(config.repeats):
        for name, compute in work.items():
            began = time.perf_counter()
            found[name] = compute()
            seconds[name].append(round(time.perf_counter() - began, 3))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    order = spearman(found["plain"], from_scores(found["shared"]).rank)
    return {
        "seconds": seconds,
        "ratio": {name: round(medians["plain"] / median, 3) for name, median in medians.items()},
        "largest_difference": float(np.abs(found["plain"] - found["shared"]).max()),
        "deviation": float(found["plain"].std()),
        "spearman": round(float(order.min()), 6),
        "batch": {"rows": exact.sweep.rows, "groups": exact.sweep.groups, "shared_modules": exact.sweep.prefix},
    }


def measure_memory(argv: list[str], side: str) -> dict[str, int]:
    """Peak bytes of a process that computes one side once, and its bytes just before that."""
    command = [sys.executable, "-m", "benchmark.exact_sweep", *argv, "--side", side]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the {side} side: expected it to run, found: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_bf16(exact: ExactInfluence, testbed: Testbed, config: SweepBenchmark) -> list[dict]:
    """One row for each step size: how far bfloat16 keeps the order of the images."""
    half = Sweep(exact.model, exact.schedule, exact.images, exact.sweep.draws, replace(exact.sweep.config, bf16=True))
    rows, ids = [], list(range(config.images))
    for step, changes in zip(config.steps, query_changes(exact, testbed, config.queries, config.steps), strict=True):
        precise, rough = (exact_influence(sweep, ids, changes) for sweep in (exact.sweep, half))
        order = spearman(rough, from_scores(precise).rank)
        rows.append(
            {
                "step": step,
                "spearman": round(float(order.mean()), 4),
                "standard_error": round(float(standard_error(order)), 4),
                "change": float(precise.std()),
                "error": float((rough - precise).std()),
            }
        )
        print(rows[-1])
    return rows


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.exact_sweep", __doc__)
    add_testbed_flags(parser)
    add_flags(parser, SweepBenchmark)
    parser.add_argument("--bf16", action="store_true", help="measure what bfloat16 does to the ranks")
    parser.add_argument("--side", choices=("plain", "shared"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file to write (default: in results/speed)")
    args = parser.parse_args(argv)
    config, testbed = from_flags(SweepBenchmark, args), testbed_from(args)
    torch.set_num_threads(config.threads)
    exact = ExactInfluence.of(testbed, UnlearnConfig(), LossDraws(), SweepConfig(), best_device())
    if args.side:
        compute = sides(exact, testbed, config)[args.side]
        before = forget_peak()
        compute()
        print(json.dumps({"peak": max(before, peak_bytes()), "before": before}))
        return
    report: dict = {"config": vars(config)}
    if args.bf16:
        report["rows"] = measure_bf16(exact, testbed, config)
    else:
        report |= measure_speed(exact, testbed, config)
        given = sys.argv[1:] if argv is None else argv
        report["memory_bytes"] = {side: measure_memory(given, side) for side in ("plain", "shared")}
        print({name: report[name] for name in ("seconds", "ratio", "largest_difference", "spearman", "memory_bytes")})
    name = "exact_bf16.json" if args.bf16 else "exact_sweep.json"
    save_json(args.output or testbed.root / "results/speed" / name, report | {"environment": environment()})


if __name__ == "__main__":
    sys.exit(main())
