"""Linear datamodelling score (Park et al. 2023, TRAK, section 2; D-TRAK for diffusion): do scores predict retraining?

    python -m benchmark.retrain halves --models 64
    python -m benchmark.lds scores/*.npy                  # [Q, N] each; prints the table, writes results/lds/

M models are trained on random halves S_m of the training set. For one query the score is the Spearman correlation over
the models between the loss of the query under model m and −Σ_{i ∈ S_m} score_i; the LDS is the mean over queries. How
far from 1 even the truth would be is measured by training the same halves again with other seeds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from abu.testbed import TESTBEDS
from benchmark.retrain import RetrainConfig, collection_of, load_losses, random_halves
from fastgda.core import ROOT, command_line, environment, load_npy, save_json
from fastgda.metrics import standard_error

SECOND_SEED = 100_000
"""Added to the seeds of the halves when they are trained again."""
SIGN_ERROR = -3.0
"""A mean LDS this many standard errors below zero is probably a sign error."""


def correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman correlation of each row of `first` [Q, M] with the same row of `second`; ties get mean ranks."""
    ranks = [rankdata(values, axis=1) for values in (first, second)]
    centred = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    norms = [np.linalg.norm(values, axis=1) for values in centred]
    return (centred[0] * centred[1]).sum(axis=1) / np.maximum(norms[0] * norms[1], np.finfo(float).tiny)


def lds(scores: np.ndarray, seen: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """LDS of each query [Q], from scores [Q, N], which images each model saw (bool [M, N]) and losses [M, Q]."""
    expected = (losses.shape[1], seen.shape[1])
    if scores.shape != expected or not np.isfinite(scores).all():
        raise ValueError(f"scores: expected finite numbers [{expected[0]}, {expected[1]}], found {list(scores.shape)}")
    return correlate(-scores.astype(np.float64) @ seen.T, losses.T)


def ceiling(losses: np.ndarray, again: np.ndarray) -> float:
    """LDS that the true mean loss of each half would reach, from two trainings of the same halves [M, Q].

    With reliability r, the correlation between the two trainings, one training correlates with its own expectation by
    √r (attenuation).
    """
    return float(np.sqrt(np.clip(correlate(losses.T, again.T), 0, 1)).mean())


def bootstrap(values: np.ndarray, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [Q] over queries."""
    rows = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    low, high = np.quantile(values[rows].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def seen_by(removed: list[np.ndarray], images: int) -> np.ndarray:
    """Which images each model saw, bool [M, N]."""
    seen = np.ones((len(removed), images), bool)
    for row, ids in zip(seen, removed, strict=True):
        row[ids] = False
    return seen


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.lds", description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path, nargs="+", help="arrays [Q, N] of a method, higher = more influential")
    parser.add_argument("--mode", choices=sorted(TESTBEDS), default="emoji-mini", help="testbed (default: emoji-mini)")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="which queries (default: test)")
    parser.add_argument("--models", type=int, default=64, help="models trained on halves (default: 64)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/lds/lds.json")
    args = parser.parse_args(argv)
    testbed = TESTBEDS[args.mode]
    collection = collection_of(testbed, RetrainConfig())
    images = len(testbed.load_arrays()[0])
    halves = random_halves(images, args.models)
    seen = seen_by([np.asarray(job.removed) for job in halves], images)
    losses = load_losses(collection, halves, args.split)
    rows = []
    for path in args.scores:
        values = lds(load_npy(path, (losses.shape[1], images), finite=True), seen, losses)
        mean, error = float(values.mean()), float(standard_error(values[:, None])[0])
        low, high = bootstrap(values)
        rows.append({"method": path.stem, "lds": mean, "interval": [low, high], "per_query": values.tolist()})
        print(f"{path.stem:24s} {mean:+.4f}  [{low:+.4f}, {high:+.4f}]")
        if error and mean / error < SIGN_ERROR:
            print(f"{path}: LDS far below zero: are low scores the influential ones?", file=sys.stderr)
    report = {"split": args.split, "models": args.models, "rows": rows, "environment": environment()}
    again = [replace(job, seed=job.seed + SECOND_SEED) for job in halves]
    if not collection.missing(again):
        report["ceiling"] = ceiling(losses, load_losses(collection, again, args.split))
        print(f"{'ceiling':24s} {report['ceiling']:+.4f}")
    save_json(args.output, report)


if __name__ == "__main__":
    sys.exit(main())
