"""How reliable the teacher is with N draws for each training image, and how many draws a wanted reliability needs.

    python -m abu.collect scores
    python -m benchmark.reliability --reliability 0.8       # results/teacher/reliability_draws.{json,png}

Two runs with independent draws on both sides score the same validation and test queries; each is judged by the other:
Spearman over all images and mAP(L) (`benchmark.teacher.reliability`), for the first 1, 2, 4, … passes. Through the
points goes

    r(N) = r_0 + (r_∞ − r_0) N / (N + c)

with r_0 what chance gives (0 for Spearman) and r_∞ ≤ 1: a mean over N draws whose noise variance is c times the
signal's correlates with another one by N / (N + c) (Spearman-Brown), times what the queries' own draws, which do not
grow, leave of it. With fewer than three points r_∞ is 1. Where r_∞ stays below the wanted value, draws of training
images alone do not reach it. The shipped rankings pool both runs, so that they are as reliable as r(2N).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from abu.stages import folder_of, pass_counts, whole_passes
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from benchmark.figures import plt, save_figure
from benchmark.teacher import TEACHERS, measure, run_scores
from fastgda.core import command_line, environment, read_manifest, save_json
from fastgda.dataset import default_levels
from fastgda.metrics import chance

SPEARMAN = "spearman"


@dataclass(frozen=True)
class Curve:
    """r(N), fitted."""

    chance: float
    """r_0."""
    ceiling: float
    """r_∞."""
    half: float
    """c: the draws at which half of the way is gone."""

    def __call__(self, draws: float | np.ndarray) -> Any:
        """Reliability with so many draws for each training image and run."""
        return self.chance + (self.ceiling - self.chance) * draws / (draws + self.half)

    def needed(self, wanted: float) -> int | None:
        """The smallest number of draws with r(N) ≥ `wanted`; `None` where no number has."""
        if wanted <= self.chance:
            return 1
        if wanted >= self.ceiling:
            return None
        share = (wanted - self.chance) / (self.ceiling - self.chance)
        # rounding must not turn an exact solution into one draw more
        return max(1, math.ceil(self.half * share / (1 - share) - 1e-9))


def fit(draws: list[int], values: list[float], expected: float) -> Curve:
    """The least-squares curve through reliabilities `values` at `draws`; `expected` is what chance gives."""
    x, y = np.array(draws, float), np.array(values, float)
    if len(x) != len(y) or not len(x) or not np.isfinite(y).all():
        raise ValueError(f"expected a finite reliability for each number of draws, found {values} for {draws}")
    free = len(x) >= 3

    def curve(parameters: np.ndarray) -> Curve:
        ceiling = 1 / (1 + math.exp(-parameters[1])) if free else 1.0
        return Curve(expected, expected + (1 - expected) * ceiling, math.exp(parameters[0]))

    start = np.array([math.log(np.median(x)), 1.0]) if free else np.array([math.log(np.median(x))])
    found = least_squares(lambda parameters: curve(parameters)(x) - y, start, bounds=(-20, 20))
    return curve(found.x)


def curves(rows: list[dict], levels: tuple[int, ...], images: int) -> dict[str, Curve]:
    """Metric -> fitted curve, for the rows of `benchmark.teacher.measure`."""
    draws = [row["draws_per_run"] for row in rows]
    found = {SPEARMAN: fit(draws, [row["spearman"] for row in rows], 0.0)}
    for level in levels:
        values = [row["mAP"][str(level)] for row in rows]
        found[f"mAP({level})"] = fit(draws, values, chance(level, images))
    return found


def answer(name: str, curve: Curve, wanted: float, collected: int) -> dict[str, Any]:
    """What the report says of one metric."""
    needed = curve.needed(wanted)
    return {
        "metric": name,
        "wanted": wanted,
        "draws_needed": needed,
        "ceiling": round(curve.ceiling, 4),
        "draws_at_half": round(curve.half, 2),
        "collected": collected,
        "predicted_pooled": round(float(curve(2 * collected)), 4),
    }


def sentence(found: dict[str, Any]) -> str:
    """The answer in words."""
    head = f"{found['metric']}: with {found['collected']} draws a run, pooled {found['predicted_pooled']:.3f}; "
    if found["draws_needed"] is None:
        return head + f"{found['wanted']:g} is above the ceiling {found['ceiling']:.3f}: queries need draws as well"
    return head + f"{found['draws_needed']} draws are needed for {found['wanted']:g}"


def figure(rows: dict[str, list[dict]], fitted: dict[str, dict[str, Curve]], wanted: float) -> Figure:
    """Points and curves of each teacher."""
    drawing, axes = plt.subplots(1, len(rows), figsize=(4.5 * len(rows), 3.2), sharey=True, squeeze=False)
    for axis, (teacher, points) in zip(axes[0], rows.items(), strict=True):
        draws = np.array([row["draws_per_run"] for row in points])
        grid = np.geomspace(draws.min() / 2, 20 * draws.max(), 100)
        for index, (name, curve) in enumerate(fitted[teacher].items()):
            level = name[4:-1]
            values = [row["spearman"] if name == SPEARMAN else row["mAP"][level] for row in points]
            errors = [0.0 if name == SPEARMAN else row["standard_error"][level] for row in points]
            axis.errorbar(draws, values, errors, fmt="o", color=f"C{index}", markersize=4)
            axis.plot(grid, curve(grid), color=f"C{index}", linewidth=1, label=name)
        axis.axhline(wanted, color="black", linestyle="--", linewidth=1)
        axis.set(title=teacher, xscale="log", xlabel="draws per training image and run", ylabel="one run for the other")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return drawing


def report(testbed: Testbed, passes: int, wanted: float) -> tuple[dict[str, Any], Figure]:
    """Measures, fits and answers for both teachers."""
    config = read_manifest(folder_of(testbed))["config"]
    tests = len(testbed.query_captions("val")) + len(testbed.query_captions("test"))
    draws = [config["bins"] * config["training_draws"] * count for count in pass_counts(passes)]
    levels = default_levels("emoji", testbed.images)
    rows, fitted, answers = {}, {}, {}
    for teacher in TEACHERS:
        rows[teacher] = measure(run_scores(testbed, passes, teacher, tests), teacher, draws, levels)
        fitted[teacher] = curves(rows[teacher], levels, testbed.images)
        answers[teacher] = [answer(name, curve, wanted, draws[-1]) for name, curve in fitted[teacher].items()]
        for found in answers[teacher]:
            print(f"{teacher:11s} {sentence(found)}")
    query_draws = config["bins"] * config["judged_query_draws"]
    found = {"passes": passes, "queries": tests, "query_draws_per_run": query_draws, "rows": rows, "answers": answers}
    return found, figure(rows, fitted, wanted)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmark.reliability", description=__doc__, formatter_class=shown)
    add_testbed_flags(parser)
    parser.add_argument("--passes", type=int, help="the scores made from so many passes (default: all whole passes)")
    parser.add_argument("--reliability", type=float, default=0.8, help="wanted value (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.reliability < 1:
        raise ValueError(f"--reliability: expected a number between 0 and 1, found {args.reliability}")
    testbed = testbed_from(args)
    found, drawing = report(testbed, args.passes or whole_passes(testbed), args.reliability)
    folder = testbed.root / "results/teacher"
    save_json(folder / "reliability_draws.json", found | {"environment": environment()})
    save_figure(drawing, folder / "reliability_draws.png")


if __name__ == "__main__":
    sys.exit(main())
