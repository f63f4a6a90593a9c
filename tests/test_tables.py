"""Tables of README.md: what is in the JSON files, and nothing else."""

from __future__ import annotations

import pytest

from benchmark import tables
from fastgda.core import ROOT

REPORT = {
    "queries": 3,
    "images": 100,
    "levels": [1, 10],
    "rows": [
        {
            "method": "untuned",
            "ftype": "pixel",
            "mAP": {"1": 0.1, "10": 0.2},
            "standard_error": {"1": 0.01, "10": 0.02},
        },
        {
            "method": "tuned",
            "ftype": "pixel",
            "checkpoint": "runs/paper.pth",
            "mAP": {"1": 0.3, "10": 0.4},
            "standard_error": {"1": 0.03, "10": 0.04},
            "gain": {"1": 0.2, "10": 0.2},
            "gain_standard_error": {"1": 0.005, "10": 0.006},
        },
        {"method": "chance", "mAP": {"1": 0.01, "10": 0.1}},
    ],
}


def test_a_line_for_each_method_and_the_paired_gain():
    lines = tables.evaluation_table(REPORT, tables.feature_name).splitlines()
    assert lines[0] == "|  | L = 1 | L = 10 |"
    assert lines[2:] == [
        "| untuned pixel | 0.100 ± 0.010 | 0.200 ± 0.020 |",
        "| **tuned pixel** | 0.300 ± 0.030 | 0.400 ± 0.040 |",
        "| gain, query by query | 0.200 ± 0.005 | 0.200 ± 0.006 |",
        "| chance | 0.010 | 0.100 |",
    ]


def test_recipes_are_told_apart_by_their_checkpoints():
    lines = tables.evaluation_table(REPORT, tables.recipe_name).splitlines()
    assert lines[3].startswith("| paper's recipe |")


def test_only_what_is_between_the_markers_changes():
    text = "a\n<!-- results -->\nold\n<!-- /results -->\nb\n"
    assert tables.with_results(text, "new") == "a\n<!-- results -->\nnew\n<!-- /results -->\nb\n"
    with pytest.raises(ValueError, match="markers"):
        tables.with_results("nothing", "new")


def test_the_readme_holds_the_tables_of_results():
    readme = (ROOT / "README.md").read_text()
    assert tables.with_results(readme, tables.results_block(ROOT / "results")) == readme


def test_times_are_those_of_all_images_in_a_unit_that_reads_well():
    row = {"queries": 1000, "exact_seconds": 200_000.0, "amortised_seconds": 150.0, "ratio": 1333.3}
    report = {"rows": [row | {"queries": 1}], "all_images": [row]}
    lines = tables.amortised_table(report, {"rows": [row | {"exact_seconds": 7_300.0}]}).splitlines()
    assert lines[2:] == ["| 1,000 | 2.31 days | 2.5 min | 1,333.3× | 2.03 h | 2.5 min | 1,333.3× |"]
    scale: dict = {f"{name}_seconds_per_image_and_query": 0.5 for name in ("exact", "amortised")}
    scale |= {"exact_days": 20_000.4, "amortised_days": 0.5, "query_gradient_days": {"50000": 3.25}}
    assert tables.scale_table(scale).splitlines()[2:] == [
        "| exact | 500 ms | 20,000.4 days |",
        "| amortised | 500 ms | 0.5 days |",
        "| gradients of the queries, 50,000 draws each |  | 3.2 days |",
    ]


def test_peers_and_forecasts():
    fitted = {"images": 1024, "ratio": 3.43, "largest_relative_difference": {"eigenvalues": 3e-6, "other": 7e-6}}
    sweep = {"config": {"queries": 8}, "ratio": {"shared": 1.84}, "largest_difference": 0.0}
    metric = {
        "config": {"queries": 110, "images": 118_287},
        "rows": [{"times_as_fast": 95.7, "largest_difference": 2e-16}],
    }
    assert tables.peers_table({"sizes": {"emoji": fitted}}, sweep, metric).splitlines()[1:] == [
        "| --- | --- | --: | --: |",
        "| EK-FAC factors from 1,024 images | Kronfluence | 3.4× | 7e-06 relative |",
        "| exact influence of 8 queries | a loop over the queries | 1.8× | none |",
        "| mAP(L) of 110 queries × 118,287 images | scikit-learn | 96× | 2e-16 |",
    ]
    row = {name: {"relative_error": error} for name, error in (("seconds", 0.191), ("memory", -0.05), ("disk", 0.0))}
    report = {"rows": [{"job": "training-2-workers"} | row]}
    assert tables.forecast_table(report).splitlines()[2] == "| training 2 workers | +19 % | -5 % | +0 % |"
