"""The tables of README.md that say what retraining says of the methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmark.markdown import interval, markdown
from benchmark.table1 import (
    calibration_table,
    creators_table,
    effects_table,
    lds_table,
    nearest_table,
    pairs_table,
    table1,
)

Report = dict[str, Any]
LDS_STUDIES = {
    "layers": "layers, curvature",
    "damping": "damping, in mean eigenvalues",
    "strata": "timestep bins",
    "bins": "where all draws are taken",
    "draws": "draws of an image",
    "measured": "what is differentiated",
    "squares": "layers, curvature, of the squared output",
    "step": "finite step",
    "exact": "exact form",
}
"""What each study of `benchmark.lds_study` varies, in the order of the table."""


def read_lds_studies(results: Path) -> list[Report]:
    """The reports of `benchmark.lds_study` that there are."""
    paths = [results / "lds" / f"study_{name}.json" for name in LDS_STUDIES]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def lds_study_table(studies: list[Report]) -> str:
    """LDS of each variant."""
    rows = [
        [LDS_STUDIES[study["study"]], row["variant"], interval(row["lds"], row["interval"])]
        for study in studies
        for row in study["rows"]
    ]
    return markdown(["choice", "variant", "LDS"], rows, left=2)


def removal_parts(reports: dict[str, Report]) -> list[str]:
    """Table 1 and the comparison of rankers with their features and teachers, if there is a report of removals."""
    parts = []
    if "removal" in reports:
        removal = reports["removal"]
        queries = max(len(row["queries"]) for row in removal["rows"])
        parts += [
            f"Leave-K-out on `{removal['mode']}` (the paper's Table 1): rise of a query's loss in a model trained from "
            f"scratch without the K images that a method ranks first, over random removals of as many, up to {queries} "
            "queries of different concepts, 95 % bootstrap intervals over queries; beside it LDS, agreement on "
            "creators and the cost of a query (`python -m benchmark.removal`, `benchmark.latency`; `-selected`: λ "
            "chosen on validation queries, which changes nothing in the cost):",
            table1(reports),
        ]
        if pairs := pairs_table(removal):
            parts += [
                "The same query by query, ΔL of a ranker over that of its untuned feature, of teachers and of methods "
                "on gradients:",
                pairs,
            ]
    return parts


def judged_parts(reports: dict[str, Report], studies: list[Report]) -> list[str]:
    """Paragraphs and tables of what else retraining says of the methods, of the reports that there are."""
    parts = []
    if "lds" in reports:
        lds = reports["lds"]
        truth = "the mean of two trainings of each" if lds["truth"] == "both" else "one training of each"
        parts += [
            f"LDS of {lds['models']} models on random halves of `{lds['mode']}`, {truth}, with intervals over the "
            "queries' concepts (`python -m benchmark.lds`). z: a query's scores, standardised; exp(2 z) keeps their "
            "order and gives it the magnitudes of concentrated influence, which cosines lack. The ceiling is what the "
            "halves' true mean losses would reach:",
            lds_table(lds),
        ]
    if studies:
        parts += [
            "The teacher's choices by LDS of validation queries (`python -m benchmark.lds_study`): AbU+ to first order "
            f"but for one choice or two, {studies[0]['fixed']} unless it says otherwise; and steps of finite size, to "
            "second order in the loss and exactly:",
            lds_study_table(studies),
        ]
    if "creators" in reports:
        creators = reports["creators"]
        seeds = "one seed" if creators["models"] == 1 else f"{creators['models']} seeds"
        parts += [
            f"Leave-one-creator-out: summed influence of each of {len(creators['creators'])} creators against what its "
            f"removal does to a query, {seeds} (`python -m benchmark.creators`):",
            creators_table(creators),
        ]
    if "calibration" in reports:
        parts += [
            "Is influence what retraining changes? Rise of a query's loss in models without some images against the "
            "sum of their scores, in a unit fitted on validation queries: whole creators, random halves, and all "
            "models of leave-K-out; and the error of a creator's share (`python -m benchmark.calibration`):",
            calibration_table(reports["calibration"]),
        ]
    if "removal" in reports:
        parts += [
            "What the removals of each method change, and those at random: mean and standard error of ΔL, of the MSE "
            "between the pictures of one seed and of their similarity to the image encoder (`python -m "
            "benchmark.removal`). The reference is a mean over seeds, the models share one: what random removals seem "
            "to gain or lose is mostly the seed's, and only differences between rows say what was removed:",
            effects_table(reports["removal"]),
        ]
    if nearest := nearest_table(reports):
        parts += [
            "Teachers that see no more than the nearest images in an untuned feature, as the paper collects them for "
            "training queries (its Table 2), beside the same on all images:",
            nearest,
        ]
    return parts
