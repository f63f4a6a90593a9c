"""Is influence what retraining changes? Sums of scores against the loss of models trained without those images.

    python -m benchmark.methods minilm --influence finite-step               # and the same with --split val
    python -m benchmark.calibration data/emoji-mini/scores/minilm-influence.npy

The effect of removing images on a query is the rise of its loss over the model that was trained on everything with the
same seed; of halves, whose seeds are others, over the mean of several. A method predicts it by the sum of its scores
over these images, in a unit of its own: one factor for all queries, fitted by least squares on the validation queries
(scores/val/<name>.npy) and the removals of whole creators. Judged on the test queries: every creator
(`benchmark.retrain creators`, mean over seeds), every stored removal of K images (`benchmark.removal run`; each model
judged by all queries, most of which it does not concern), and random halves. Reported are the slope of observed on
predicted effects (1 where influence adds up), R^2 and Pearson's correlation; for creators also the error of shares, the
positive part of each effect over the sum of all, beside those of rules that know less. Writes
results/calibration/calibration.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abu.testbed import testbed_from
from benchmark.creators import PROMPT, by_creator, load_effects, named_by_prompt
from benchmark.lds import seen_by
from benchmark.losses import Losses, open_losses
from benchmark.reports import foundation
from benchmark.retrain import add_judge_flags, loss_changes, random_halves, without_creators
from benchmark.retrainer import Retraining
from benchmark.scores import by_method
from fastgda.core import ROOT, command_line, command_parser, environment, save_json
from fastgda.metrics import bootstrap_interval

SIZES = "images in the training set"


def slope_and_fit(predicted: np.ndarray, observed: np.ndarray) -> dict[str, float]:
    """Slope of `observed` on `predicted`, R^2 of `predicted` as they are, correlation; arrays of one shape."""
    x, y = predicted.ravel(), observed.ravel()
    covariance = np.cov(x, y)
    return {
        "slope": float(covariance[0, 1] / covariance[0, 0]),
        "r_squared": float(1 - ((y - x) ** 2).mean() / y.var()),
        "correlation": float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])),
    }


def shares(effects: np.ndarray) -> np.ndarray:
    """Positive parts of effects [Q, creators] over their sum; zero where none is positive."""
    positive = np.maximum(effects, 0)
    total = positive.sum(1, keepdims=True)
    return np.divide(positive, total, out=np.zeros_like(positive), where=total > 0)


def error_of_shares(found: np.ndarray, truth: np.ndarray, concepts: list[str]) -> dict[str, Any]:
    """Mean absolute error of shares [Q, creators], with a bootstrap interval over the queries' concepts."""
    error = np.abs(found - truth).mean(1)
    return {"absolute_error": float(error.mean()), "interval": bootstrap_interval(error, concepts).tolist()}


def removals_of(stored: Losses, planned: Sequence[Retraining]) -> dict[int, list[Retraining]]:
    """K -> the stored models without K images, but for those trained on everything and those that lack the same images
    as a model of another plan.
    """
    known = {job.removed for job in planned}
    found: dict[int, list[Retraining]] = {}
    for job in stored.jobs():
        if job.removed and job.removed not in known:
            found.setdefault(len(job.removed), []).append(job)
    return dict(sorted(found.items()))


class Judge:
    """What retraining says of each group of removals."""

    def __init__(self, stored: Losses, models: int, count: int) -> None:
        self.stored, self.sets = stored, stored.sets("training")
        self.effects = {split: load_effects(stored, split, models, count) for split in ("val", "test")}
        halves = random_halves(stored.images, 64)
        planned = [*without_creators(self.sets, models), *halves]
        self.groups = {
            f"{k} images": jobs for k, jobs in removals_of(stored, planned).items() if k < stored.images // 2
        }
        lacking = set(stored.missing(halves))
        self.groups["halves"] = [job for job in halves if job not in lacking]
        self.observed = {name: loss_changes(stored, jobs, count, "test") for name, jobs in self.groups.items() if jobs}

    def unit(self, scores: np.ndarray) -> float:
        """Loss of one unit of scores [Q, N] of the validation queries."""
        effects = self.effects["val"]
        predicted = by_creator(scores, self.sets, effects.names)
        return float((predicted * effects.mean).sum() / (predicted**2).sum())

    def rows(self, influence: np.ndarray) -> dict[str, dict[str, Any]]:
        """Group -> its figures, for influence [Q, N] on the test queries in units of the loss."""
        effects = self.effects["test"]
        predicted = by_creator(influence, self.sets, effects.names)
        found: dict[str, dict[str, Any]] = {"creators": slope_and_fit(predicted, effects.mean)}
        found["creators"] |= {"models": effects.change[..., 0].size}
        found["creators"] |= error_of_shares(shares(predicted), shares(effects.mean), self.stored.concepts("test"))
        for name, observed in self.observed.items():
            removed = ~seen_by([np.asarray(job.removed) for job in self.groups[name]], self.stored.images)
            found[name] = slope_and_fit(removed @ influence.T, observed) | {"models": len(observed)}
        return found

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Errors of the shares of rules that do not look at the picture."""
        effects, concepts = self.effects["test"], self.stored.concepts("test")
        truth = shares(effects.mean)
        sizes = [self.sets.count(name) / len(self.sets) for name in effects.names]
        known = {
            PROMPT: named_by_prompt(self.stored.sets("test"), effects.names),
            SIZES: np.tile(sizes, (len(truth), 1)),
            "mean of the validation queries": np.tile(shares(self.effects["val"].mean).mean(0), (len(truth), 1)),
        }
        return {name: error_of_shares(found, truth, concepts) for name, found in known.items()}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.calibration", __doc__)
    parser.add_argument("scores", type=Path, nargs="+", help="arrays [Q, N] of the test queries")
    add_judge_flags(parser)
    parser.add_argument("--models", type=int, default=3, help="seeds of each creator's removal (default: 3)")
    parser.add_argument("--references", type=int, default=4, help="models trained on everything (default: 4)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/calibration/calibration.json")
    args = parser.parse_args(argv)
    testbed, files = testbed_from(args), by_method(args.scores)
    stored = open_losses(testbed)
    judge, rows = Judge(stored, args.models, args.references), []
    for name, path in files.items():
        unit = judge.unit(stored.scores(path.parent / "val" / path.name, "val"))
        groups = judge.rows(unit * stored.scores(path, "test"))
        rows.append({"method": name, "unit": unit, "groups": groups})
        for group, row in groups.items():
            print(f"{name:30s} {group:12s} slope {row['slope']:+.3f}  R^2 {row['r_squared']:+.3f}", end="")
            print(f"  error of a share {row['absolute_error']:.4f}" if "absolute_error" in row else "")
    baselines = judge.baselines()
    print(*(f"{name:43s} error of a share {row['absolute_error']:.4f}" for name, row in baselines.items()), sep="\n")
    rests_on = {"mode": testbed.name, "models": args.models, "references": args.references}
    rests_on |= foundation(stored, "test")
    save_json(args.output, rests_on | {"rows": rows, "baselines": baselines, "environment": environment()})


if __name__ == "__main__":
    sys.exit(main())
