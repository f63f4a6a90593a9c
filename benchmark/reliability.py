"""How reliable the teacher is with N draws for each training image, and how many draws a wanted reliability needs.

    python -m abu.collect steps --passes 4
    python -m benchmark.reliability --reliability 0.8       # results/teacher/draws_finite-step_emoji.{json,png}
    python -m benchmark.reliability --teacher first-order   # of the scores of `python -m abu.collect scores`

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

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from abu.stages import folder_of, pass_counts, steps_folder, whole_passes
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from abu.unlearn import STEP
from benchmark.drawing import plt, save_figure
from benchmark.finite_step import draws_per_run, run_teachers, whole_step_passes
from benchmark.teacher import TEACHERS, measure, run_scores
from fastgda.core import command_line, command_parser, environment, read_manifest, save_json
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


@dataclass(frozen=True)
class Measured:
    """What reliability is measured on."""

    runs: dict[str, np.ndarray]
    """Teacher -> scores [counts, runs, Q, N] of validation and test queries, after 1, 2, 4, … passes and all."""
    draws: list[int]
    """Draws of a training image and run, for each count."""
    query_draws: int
    """Draws of a query and run."""


def first_order(testbed: Testbed, passes: int | None, queries: int) -> Measured:
    """The teachers of `benchmark.teacher`."""
    passes = passes or whole_passes(testbed)
    config = read_manifest(folder_of(testbed))["config"]
    return Measured(
        {teacher: run_scores(testbed, passes, teacher, queries) for teacher in TEACHERS},
        [config["bins"] * config["training_draws"] * count for count in pass_counts(passes)],
        config["bins"] * config["judged_query_draws"],
    )


def finite_step(testbed: Testbed, passes: int | None, queries: int) -> Measured:
    """Those of `benchmark.finite_step`."""
    counts = pass_counts(passes or whole_step_passes(testbed))
    config = read_manifest(steps_folder(testbed))["config"]
    found = [run_teachers(testbed, count, STEP, queries) for count in counts]
    return Measured(
        {teacher: np.stack([runs[teacher] for runs in found]) for teacher in found[0]},
        [draws_per_run(testbed, count) for count in counts],
        config["query_bins"] * config["judged_query_draws"],
    )


ORDERS: dict[str, Callable[[Testbed, int | None, int], Measured]] = {
    "finite-step": finite_step,
    "first-order": first_order,
}


def report(testbed: Testbed, order: str, passes: int | None, wanted: float) -> tuple[dict[str, Any], Figure]:
    """Measures, fits and answers for the teachers of one order."""
    queries = len(testbed.query_captions("val")) + len(testbed.query_captions("test"))
    measured = ORDERS[order](testbed, passes, queries)
    levels = default_levels("emoji", testbed.images)
    rows, fitted, answers = {}, {}, {}
    for teacher, runs in measured.runs.items():
        rows[teacher] = measure(runs, teacher, measured.draws, levels)
        fitted[teacher] = curves(rows[teacher], levels, testbed.images)
        answers[teacher] = [answer(name, curve, wanted, measured.draws[-1]) for name, curve in fitted[teacher].items()]
        for found in answers[teacher]:
            print(f"{teacher:11s} {sentence(found)}")
    found = {"teacher": order, "images": testbed.images, "queries": queries}
    found |= {"query_draws_per_run": measured.query_draws, "rows": rows, "answers": answers}
    return found, figure(rows, fitted, wanted)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.reliability", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--teacher", choices=ORDERS, default="finite-step", help="whose scores (default: finite-step)")
    parser.add_argument("--passes", type=int, help="the scores made from so many passes (default: all whole passes)")
    parser.add_argument("--reliability", type=float, default=0.8, help="wanted value (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.reliability < 1:
        raise ValueError(f"--reliability: expected a number between 0 and 1, found {args.reliability}")
    testbed = testbed_from(args)
    found, drawing = report(testbed, args.teacher, args.passes, args.reliability)
    stem = testbed.root / "results/teacher" / f"draws_{args.teacher}_{testbed.name}"
    save_json(stem.with_suffix(".json"), found | {"environment": environment()})
    save_figure(drawing, stem.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
