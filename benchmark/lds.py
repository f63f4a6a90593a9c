"""Linear datamodelling score (Park et al. 2023, TRAK, section 2; D-TRAK for diffusion): do scores predict retraining?

    python -m benchmark.retrain halves --models 64           # and `again`, for the ceiling
    python -m benchmark.lds data/emoji-mini/scores/*.npy     # [Q, N] each; prints the table, writes results/lds/

M models are trained on random halves S_m of the training set. For one query the score is the Spearman correlation over
the models between the loss of the query under model m and −Σ_{i ∈ S_m} score_i; the LDS is the mean over queries. How
far from 1 even the truth would be is measured by training the same halves again with other seeds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from abu.plan import Collection
from abu.testbed import Testbed, testbed_from
from benchmark.retrain import add_judge_flags, again, collection_of, load_losses, random_halves
from benchmark.retrainer import RetrainConfig
from benchmark.scores import load_scores
from fastgda.core import ROOT, command_line, environment, save_json
from fastgda.metrics import bootstrap_interval, standard_error
from feature_extraction.readers import read_split

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


def seen_by(removed: list[np.ndarray], images: int) -> np.ndarray:
    """Which images each model saw, bool [M, N]."""
    seen = np.ones((len(removed), images), bool)
    for row, ids in zip(seen, removed, strict=True):
        row[ids] = False
    return seen


@dataclass(frozen=True)
class Judge:
    """The models trained on halves, as judges of the queries of one split."""

    testbed: Testbed
    split: str = "test"
    models: int = 64

    @cached_property
    def collection(self) -> Collection:
        """The retrained models."""
        return collection_of(self.testbed, RetrainConfig())

    @cached_property
    def concepts(self) -> list[str]:
        """Of the queries: those of one concept are not independent."""
        return read_split(self.testbed.data, f"{self.split}_query").concepts

    @cached_property
    def seen(self) -> np.ndarray:
        """Which images each model saw, bool [M, N]."""
        halves = random_halves(self.testbed.images, self.models)
        return seen_by([np.asarray(job.removed) for job in halves], self.testbed.images)

    @cached_property
    def losses(self) -> np.ndarray:
        """Losses [M, Q] of the queries."""
        return load_losses(self.collection, random_halves(self.testbed.images, self.models), self.split)

    def __call__(self, scores: np.ndarray) -> dict[str, Any]:
        """LDS of scores [Q, N]: mean over queries, bootstrap interval over their concepts, each query's, whether the
        sign looks wrong.
        """
        values = lds(scores, self.seen, self.losses)
        mean, error = float(values.mean()), float(standard_error(values, self.concepts))
        return {
            "lds": mean,
            "interval": bootstrap_interval(values, self.concepts).tolist(),
            "probable_sign_error": bool(mean < SIGN_ERROR * error),
            "per_query": values.tolist(),
        }

    def ceiling(self) -> float | None:
        """See `ceiling`; `None` while the halves have not been trained again."""
        second = again(random_halves(self.testbed.images, self.models))
        if self.collection.missing(second):
            return None
        return ceiling(self.losses, load_losses(self.collection, second, self.split))


def lds_line(name: str, row: dict[str, Any]) -> str:
    """A method's line of the table."""
    low, high = row["interval"]
    warning = "  far below zero: are low scores the influential ones?" if row["probable_sign_error"] else ""
    return f"{name:24s} {row['lds']:+.4f}  [{low:+.4f}, {high:+.4f}]{warning}"


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.lds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scores", type=Path, nargs="+", help="arrays [Q, N] of a method, higher = more influential")
    add_judge_flags(parser)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="which queries (default: test)")
    parser.add_argument("--models", type=int, default=64, help="models trained on halves (default: 64)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/lds/lds.json")
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    judge, rows = Judge(testbed, args.split, args.models), []
    for path in args.scores:
        rows.append({"method": path.stem} | judge(load_scores(path, testbed, args.split)))
        print(lds_line(path.stem, rows[-1]))
    report = {"split": args.split, "models": args.models, "rows": rows, "environment": environment()}
    report["ceiling"] = judge.ceiling()
    if report["ceiling"] is not None:
        print(f"{'ceiling':24s} {report['ceiling']:+.4f}")
    save_json(args.output, report)


if __name__ == "__main__":
    sys.exit(main())
