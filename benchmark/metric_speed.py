"""mAP(L) of all test queries at COCO's size: time, and difference, against scikit-learn.

    python -m benchmark.metric_speed            # 110 queries x 118,287 images, L = 500, 1,000, 4,000

Scores are random, correlated with the ground truth, once all different and once rounded so that many are tied.
scikit-learn is called as it is meant to be: `average_precision_score` for each query and L. Both sides alternate; the
medians count.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from fastgda.core import ROOT, command_line, command_parser, environment, save_json
from fastgda.dataset import COCO_LEVELS
from fastgda.flags import add_flags, from_flags
from fastgda.metrics import average_precision


@dataclass(frozen=True)
class MetricConfig:
    """Sizes and repeats."""

    queries: int = 110
    """Test queries."""
    images: int = 118_287
    """Training images."""
    levels: tuple[int, ...] = COCO_LEVELS
    """Values of L."""
    repeats: int = 3
    """Timed runs of each side."""
    output: Path = ROOT / "results/speed/metric.json"
    """JSON file."""

    def __post_init__(self) -> None:
        if min(self.queries, self.repeats, *self.levels) < 1 or max(self.levels) > self.images:
            raise ValueError(f"--levels: expected 1..{self.images}, and queries and repeats of at least 1")


def scikit_learn(scores: np.ndarray, positives: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """[Q, levels] average precision."""
    values = np.empty((len(scores), len(levels)))
    for query, row in enumerate(scores):
        for at, level in enumerate(levels):
            truth = np.zeros(len(row), dtype=np.int8)
            truth[positives[query, :level]] = 1
            values[query, at] = average_precision_score(truth, row)
    return values


def compare(config: MetricConfig, decimals: int | None) -> dict[str, Any]:
    """One row of the report; scores rounded to `decimals`."""
    random = np.random.default_rng(0)
    truth = random.standard_normal((config.queries, config.images), dtype=np.float32)
    scores = truth + random.standard_normal(truth.shape, dtype=np.float32)
    scores = scores if decimals is None else scores.round(decimals)
    positives = np.argsort(-truth, axis=1)[:, : max(config.levels)]
    seconds: dict[str, list[float]] = {"ours": [], "scikit-learn": []}
    for _ in range(config.repeats):
        ours, took = _timed(lambda: average_precision(scores, positives, config.levels))
        seconds["ours"].append(took)
        theirs, took = _timed(lambda: scikit_learn(scores, positives, config.levels))
        seconds["scikit-learn"].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "decimals": decimals,
        "seconds": medians,
        "times_as_fast": medians["scikit-learn"] / medians["ours"],
        "largest_difference": float(np.abs(ours - theirs).max()),
        "mAP": dict(zip(map(str, config.levels), ours.mean(axis=0).tolist(), strict=True)),
    }


def _timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    found = function()
    return found, time.perf_counter() - start


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.metric_speed", __doc__)
    add_flags(parser, MetricConfig)
    config = from_flags(MetricConfig, parser.parse_args(argv))
    rows = [compare(config, decimals) for decimals in (None, 1)]
    for row in rows:
        kind = "all scores different" if row["decimals"] is None else "tied scores"
        print(f"{kind}: {row['times_as_fast']:.1f} times as fast, differs by {row['largest_difference']:.1e}")
    document = {"config": asdict(config), "threads": torch.get_num_threads(), "rows": rows}
    save_json(config.output, {**document, "environment": environment()})
    print(f"wrote {config.output}")


if __name__ == "__main__":
    sys.exit(main())
