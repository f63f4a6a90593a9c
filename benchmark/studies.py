"""The paper's studies of section 4 as lists of settings, and their figures.

    features   every feature before and after tuning
    losses     the losses of the ranker
    queries    the number of training queries
    outliers   the share of pairs with an image outside the candidates
    subset     the candidates per query, resampled in every step or fixed
    budget     many queries with few candidates against few with many, at one number of rankings' entries

In the figures' order: the paper's figure 3 holds `features` and `losses`, figure 4 `queries` and `outliers`, figure 5
`subset` and `budget`. Its figure 6 shows the same for Stable Diffusion.

A setting says what differs from the base recipe. Fewer queries are visited more often, so that all settings take about
as many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastgda.losses import HEADS
from fastgda.recipes import TrainConfig

OUTLIER_PROBS = (0.0, 0.1, 0.25, 0.5, 0.75)
QUERY_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
SUBSET_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
BUDGET = 16
"""The fixed budget is this part of all entries of the rankings."""
FIGURES = {
    "figure3_features_losses": ("features", "losses"),
    "figure4_queries_outliers": ("queries", "outliers"),
    "figure5_subset_budget": ("subset", "budget"),
}
LABELS = {
    "features": "feature",
    "losses": "loss",
    "outliers": "share of outliers",
    "queries": "training queries",
    "subset": "candidates per query",
    "budget": "training queries (candidates per query in inverse proportion)",
}


@dataclass(frozen=True)
class Setting:
    """One point of a study."""

    x: float | str
    """Its place in the figure."""
    series: str = ""
    """Its line in the figure, where there are several."""
    ftype: str | None = None
    """Feature type, where it is not the base's."""
    queries: int | None = None
    """Training queries; all by default."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` that differ from the base."""


@dataclass(frozen=True)
class Problem:
    """What the settings depend on."""

    base: TrainConfig
    queries: int
    """All training queries."""
    candidates: int
    """K, all candidates of a query."""
    ftypes: Sequence[str]
    """Features to compare."""


def features(problem: Problem) -> list[Setting]:
    """One setting for each feature."""
    return [Setting(name, ftype=name) for name in problem.ftypes]


def losses(problem: Problem) -> list[Setting]:
    """Every loss; those that model a rank start from the paper's scale, and `score` where cosines span its deviations.

    The heads of the ordinal loss share the dimension of the embedding, so that all losses retrieve in the same space.
    """
    settings = []
    for name in ("bce", "mse", "ordinal", "score", "listwise"):
        changes: dict[str, Any] = {"loss": name}
        if name != problem.base.loss:
            changes |= {"init_scale": -3.0 if name == "score" else TrainConfig.init_scale}
        if name in HEADS:
            changes |= {"out_feat_dim": -(-problem.base.out_feat_dim // HEADS[name])}
        settings.append(Setting(name, changes=changes))
    return settings


def outliers(problem: Problem) -> list[Setting]:
    """Shares of outliers."""
    return [Setting(share, changes={"outlier_prob": share}) for share in OUTLIER_PROBS]


def queries(problem: Problem) -> list[Setting]:
    """Numbers of training queries."""
    return [_fewer_queries(problem, share) for share in QUERY_SHARES]


def subset(problem: Problem) -> list[Setting]:
    """Candidates per query, both ways of choosing them."""
    return [
        # all candidates are no subset, however chosen: the base's run
        Setting(size, kind, changes={"random_subset_size": size, "subset": kind} if size < problem.candidates else {})
        for kind in ("resampled", "fixed")
        for size in (max(1, round(share * problem.candidates)) for share in SUBSET_SHARES)
    ]


def budget(problem: Problem) -> list[Setting]:
    """Queries x candidates = all entries of the rankings / BUDGET."""
    settings = []
    for share in QUERY_SHARES:
        size = max(1, round(problem.candidates / (BUDGET * share)))
        settings.append(_fewer_queries(problem, share, random_subset_size=size, subset="fixed"))
    return settings


STUDIES: dict[str, Callable[[Problem], list[Setting]]] = {
    "features": features,
    "losses": losses,
    "outliers": outliers,
    "queries": queries,
    "subset": subset,
    "budget": budget,
}


def draw(documents: Sequence[dict[str, Any]]) -> Figure:
    """mAP(L) against what each study varies: mean and range over the seeds; dotted, the untuned feature."""
    figure = Figure(figsize=(5.5 * len(documents), 3.6))
    axes = figure.subplots(1, len(documents), squeeze=False)[0]
    for axis, document in zip(axes, documents, strict=True):
        _draw_study(axis, document)
    return figure


def _draw_study(axis: Axes, document: dict[str, Any]) -> None:
    runs = document["runs"]
    names = list(dict.fromkeys(run["x"] for run in runs))
    named = isinstance(names[0], str)
    for color, level in enumerate(map(str, document["levels"])):
        for style, series in enumerate(dict.fromkeys(run["series"] for run in runs)):
            points = {
                x: [run["mAP"][level] for run in runs if run["x"] == x and run["series"] == series] for x in names
            }
            means = np.array([np.mean(values) for values in points.values()])
            ends = [[min(values) for values in points.values()], [max(values) for values in points.values()]]
            spread = np.maximum(0, [means - ends[0], ends[1] - means])
            axis.errorbar(
                range(len(names)) if named else names,
                means,
                spread,
                fmt="o" if named else ("o-", "s--")[style],
                color=f"C{color}",
                label=f"L = {level} {series}".strip(),
            )
        untuned = [next(run["untuned"][level] for run in runs if run["x"] == x) for x in names]
        label = None if color else "untuned"
        axis.plot(range(len(names)) if named else names, untuned, "_" if named else ":", color=f"C{color}", label=label)
    if named:
        axis.set_xticks(range(len(names)), names, rotation=20)
    elif document["study"] != "outliers":
        axis.set_xscale("log", base=2)
        axis.set_xticks(names, [f"{x:,}" for x in names])
    axis.set(xlabel=LABELS[document["study"]], ylabel="test mAP(L)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _fewer_queries(problem: Problem, share: float, **changes: Any) -> Setting:
    count, base = max(1, round(share * problem.queries)), problem.base
    longer = {name: max(1, round(getattr(base, name) / share)) for name in ("epochs", "val_every")}
    return Setting(count, queries=count, changes={**longer, **changes})
