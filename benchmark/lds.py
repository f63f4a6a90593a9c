"""Linear datamodelling score (Park et al. 2023, TRAK, section 2; D-TRAK for diffusion): do scores predict retraining?

    python -m benchmark.retrain halves --models 64           # and `again`, for the ceiling
    python -m benchmark.lds data/emoji-mini/scores/*.npy     # [Q, N] each; prints the table, writes results/lds/
    python -m benchmark.lds data/emoji-mini/scores/mine.npy --add      # keeps what the report has of others

M models are trained on random halves S_m of the training set. For one query the score is the Spearman correlation over
the models between the loss of the query under model m and −Σ_{i ∈ S_m} score_i; the LDS is the mean over queries. How
far from 1 even the truth would be is measured by training the same halves again with other seeds; where that was done
the loss is the mean of both trainings, which has less noise (--truth).

Beside each score's own LDS stands that of its order with the magnitudes of concentrated influence (`sharpened`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import rankdata

from benchmark.losses import Losses, open_losses
from benchmark.reports import add_add_flag, foundation, load_report, with_rows
from benchmark.retrain import again, random_halves
from benchmark.retrainable import Retrainable, add_retrainable_flags, require_judged, retrainable_from
from benchmark.retrainer import Retraining
from benchmark.scores import by_method
from fastgda.core import ROOT, command_line, command_parser, environment, save_json
from fastgda.metrics import bootstrap_interval, standard_error

Truth = Literal["halves", "both"]
SHARPNESS = 2.0
"""k of `sharpened`; from 1 to 6 it changes little."""
FEW = 4
"""Fewer halves that were trained twice say nothing of the ceiling."""
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


def ceiling(losses: np.ndarray, again: np.ndarray, concepts: list[str], truth: Truth = "halves") -> dict[str, Any]:
    """LDS that the true mean loss of each half would reach, from two trainings of the same halves [M, Q].

    Their reliability r is the correlation between the two trainings, mean over queries, with a bootstrap interval over
    concepts. One training correlates with its own expectation by √r (attenuation), the mean of both by √(2r / (1 + r))
    (Spearman and Brown). The root is taken of the mean: of each query's own r it would be biased, as none is below 0.
    """
    values = correlate(losses.T, again.T)
    reliability, bounds = float(values.mean()), bootstrap_interval(values, concepts)

    def reached(r: np.ndarray | float) -> np.ndarray:
        r = np.clip(r, 0, 1)
        return np.sqrt(r if truth == "halves" else 2 * r / (1 + r))

    return {
        "lds": float(reached(reliability)),
        "interval": reached(bounds).tolist(),
        "reliability": reliability,
        "reliability_interval": bounds.tolist(),
    }


def seen_by(removed: list[np.ndarray], images: int) -> np.ndarray:
    """Which images each model saw, bool [M, N]."""
    seen = np.ones((len(removed), images), bool)
    for row, ids in zip(seen, removed, strict=True):
        row[ids] = False
    return seen


def sharpened(scores: np.ndarray) -> np.ndarray:
    """exp(k z) of scores [Q, N] standardised query by query: the same order, with a few images far above the others.

    The LDS adds scores up, so that it judges their magnitudes as much as their order. Influence is concentrated and
    cosines are not; their own LDS says little of the order that they give.
    """
    return np.exp(SHARPNESS * (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True))


@dataclass(frozen=True)
class Judge:
    """The models trained on halves, as judges of the queries of one split."""

    testbed: Retrainable
    split: str = "test"
    models: int = 64
    wanted: Truth | None = None
    """What scores are judged by: one training of each half, or the mean of two, which has less noise; by default the
    mean where the halves have been trained again."""

    @cached_property
    def stored(self) -> Losses:
        """The retrained models."""
        return open_losses(self.testbed)

    @cached_property
    def concepts(self) -> list[str]:
        """Of the queries: those of one concept are not independent."""
        return self.stored.concepts(self.split)

    @cached_property
    def halves(self) -> list[Retraining]:
        """The models."""
        return random_halves(self.stored.images, self.models)

    @cached_property
    def truth(self) -> Truth:
        """What scores are judged by."""
        if self.wanted is None:
            return "halves" if self.stored.missing(again(self.halves)) else "both"
        return self.wanted

    @cached_property
    def seen(self) -> np.ndarray:
        """Which images each model saw, bool [M, N]."""
        return seen_by([np.asarray(job.removed) for job in self.halves], self.stored.images)

    @cached_property
    def losses(self) -> np.ndarray:
        """Losses [M, Q] of the queries that scores are judged by."""
        first = self.stored.of(self.halves, self.split)
        return first if self.truth == "halves" else (first + self.stored.of(again(self.halves), self.split)) / 2

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

    def ceiling(self) -> dict[str, Any] | None:
        """See `ceiling`, from the halves that were trained again; `None` while these are fewer than `FEW`."""
        lacking = set(self.stored.missing(again(self.halves)))
        twice = [job for job in self.halves if not lacking.intersection(again([job]))]
        if len(twice) < FEW:
            return None
        first, second = (self.stored.of(jobs, self.split) for jobs in (twice, again(twice)))
        return ceiling(first, second, self.concepts, self.truth) | {"models": len(twice)}

    @property
    def foundation(self) -> dict[str, Any]:
        """What the numbers of a report rest on."""
        judged = {"mode": self.testbed.name, "split": self.split, "models": self.models, "truth": self.truth}
        return judged | foundation(self.stored, self.split)

    def report(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows with what they were judged by."""
        return self.foundation | {"ceiling": self.ceiling(), "rows": rows, "environment": environment()}


def judged_path(name: str, split: str) -> Path:
    """Where a report is written by default: that of the test queries under its own name."""
    return ROOT / f"results/{name}{'' if split == 'test' else f'_{split}'}.json"


def add_truth_flag(parser: argparse.ArgumentParser) -> None:
    """`--truth`."""
    parser.add_argument(
        "--truth",
        choices=get_args(Truth),
        help="judge by one training of each half or by the mean of both (default: both where there are two)",
    )


def lds_line(name: str, row: dict[str, Any]) -> str:
    """A method's line of the table."""
    low, high = row["interval"]
    warning = "  far below zero: are low scores the influential ones?" if row.get("probable_sign_error") else ""
    return f"{name:24s} {row['lds']:+.4f}  [{low:+.4f}, {high:+.4f}]{warning}"


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.lds", __doc__)
    parser.add_argument("scores", type=Path, nargs="+", help="arrays [Q, N] of a method, higher = more influential")
    add_retrainable_flags(parser)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="which queries (default: test)")
    parser.add_argument("--models", type=int, default=64, help="models trained on halves (default: 64)")
    add_truth_flag(parser)
    parser.add_argument("--output", type=Path, help="default: results/lds/lds[_<split>].json")
    add_add_flag(parser)
    args = parser.parse_args(argv)
    testbed = retrainable_from(args)
    require_judged(testbed, args.split)
    judge, rows = Judge(testbed, args.split, args.models, args.truth), []
    output = args.output or judged_path("lds/lds", args.split)
    earlier = load_report(output, judge.foundation, "python -m benchmark.lds")["rows"] if args.add else []
    for name, path in by_method(args.scores).items():
        scores = judge.stored.scores(path, args.split)
        rows.append({"method": name} | judge(scores) | {"sharpened": judge(sharpened(scores))})
        print(lds_line(name, rows[-1]) + f"  sharpened {rows[-1]['sharpened']['lds']:+.4f}")
    report = judge.report(with_rows(earlier, rows))
    if report["ceiling"] is not None:
        print(lds_line("ceiling", report["ceiling"]))
    save_json(output, report)


if __name__ == "__main__":
    sys.exit(main())
