"""Tables of README.md: what is in the JSON files, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark import tables
from fastgda.core import ROOT, save_json

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


TRAINING: dict[str, Any] = {
    "device": "cpu",
    "threads": 2,
    "target_mAP": 0.4321,
    "config": {"plain_seconds": 1200.0},
    "images": 118_287,
    "training_queries": 4900,
    "candidates": 10_000,
    "environment": {"gpu": "NVIDIA H100"},
    "contenders": {
        "plain loop": {
            "seconds_to_target": 1200.0,
            "times_as_fast": 1.0,
            "pairs_per_second": 9_876.4,
            "matrix_products": {"all": 0.254, "aten::addmm": 0.2},
        },
        "blocks_bf16": {
            "seconds_to_target": None,
            "times_as_fast": None,
            "pairs_per_second": 1_234_567.0,
            "matrix_products": {"all": 0.8},
        },
    },
}
EXTRACTION = {
    "config": {"ftype": "effnet"},
    "images": 512,
    "threads": 2,
    "rows": {
        "plain loop": {"images_per_second": 40.04, "times_as_fast": 1.0},
        "shards, float32": {"images_per_second": 90.06, "times_as_fast": 2.249},
    },
}
DRIFT = {
    "ftype": "effnet",
    "features": {"data": {"images": 1000, "mean": 1.2e-5, "max": 3.4e-4}},
    "mAP": {
        "untuned": {"change": {"5": 0.0001, "10": -0.00021}, "standard_error": {"5": 0.0002, "10": 0.0003}},
        "tuned": {"change": {"5": 0.0, "10": 0.002}, "standard_error": {"5": 0.0004, "10": 0.0005}},
    },
}


def run_of(x: float | str, tuned: float, *, series: str = "", ftype: str = "both", untuned: float = 0.1) -> dict:
    both = {name: {"5": value, "10": 2 * value} for name, value in (("mAP", tuned), ("untuned", untuned))}
    return {"x": x, "series": series, "ftype": ftype, **both}


def study(name: str, *runs: dict, **more: Any) -> dict[str, Any]:
    document = {"study": name, "levels": [5, 10], "seeds": 2, "changed_from_the_best_recipe": {}, "runs": runs}
    return document | more


def test_training_by_contender():
    assert tables.training_table(TRAINING).splitlines() == [
        "|  | time to the target | times as fast | pairs per second | matrix products |",
        "| --- | --: | --: | --: | --: |",
        "| plain loop | 20 min | 1.0× | 9,876 | 25 % |",
        "| blocks bf16 | not reached |  | 1,234,567 | 80 % |",
    ]
    assert tables.machine(TRAINING) == "2 cores"
    assert tables.machine(TRAINING | {"device": "cuda:0"}) == "one NVIDIA H100"


def test_extraction_and_half_precision():
    assert tables.extraction_table(EXTRACTION).splitlines()[2:] == [
        "| plain loop | 40.0 | 1.00× |",
        "| shards, float32 | 90.1 | 2.25× |",
    ]
    assert tables.drift_table(DRIFT).splitlines() == [
        "|  | L = 5 | L = 10 |",
        "| --- | --: | --: |",
        "| untuned | +0.0001 ± 0.0002 | -0.0002 ± 0.0003 |",
        "| tuned | +0.0000 ± 0.0004 | +0.0020 ± 0.0005 |",
    ]


def test_studies_are_means_over_seeds_below_their_untuned_feature():
    runs = run_of("one", 0.2, ftype="one"), run_of("two", 0.3, ftype="two", untuned=0.15)
    again = run_of("one", 0.4, ftype="one"), run_of("two", 0.5, ftype="two", untuned=0.15)
    assert tables.study_table(study("features", *runs, *again)).splitlines()[2:] == [
        "| untuned one | 0.100 | 0.200 |",
        "| one | 0.300 | 0.600 |",
        "| untuned two | 0.150 | 0.300 |",
        "| two | 0.400 | 0.800 |",
    ]
    sizes = run_of(1024, 0.2, series="resampled"), run_of(1024, 0.3, series="fixed")
    assert tables.study_table(study("subset", *sizes)).splitlines() == [
        "| candidates per query | L = 5 | L = 10 |",
        "| --- | --: | --: |",
        "| untuned both | 0.100 | 0.200 |",
        "| 1,024 resampled | 0.200 | 0.400 |",
        "| 1,024 fixed | 0.300 | 0.600 |",
    ]


def test_what_was_not_measured_is_not_mentioned(tmp_path):
    save_json(tmp_path / "ranker/features.json", REPORT)
    alone = tables.results_block(tmp_path)
    save_json(tmp_path / "speed/ranker_coco.json", TRAINING)
    save_json(tmp_path / "speed/extraction.json", EXTRACTION)
    save_json(tmp_path / "speed/feature_drift.json", DRIFT)
    base = {"changed_from_the_best_recipe": {"epochs": 12, "hidden_sizes": [384]}, "seeds": 1}
    save_json(tmp_path / "studies/queries.json", study("queries", run_of(75, 0.2), **base))
    save_json(tmp_path / "studies/losses.json", study("losses", run_of("bce", 0.2), run_of("bce", 0.3)))
    found = tables.results_block(tmp_path)[len(alone) :].split("\n\n")[1:]
    parts = [part for part in found if not part.startswith("<")]
    assert found[0].startswith("<details>\n<summary>The paper's studies") and found[-1] == "</details>"
    assert len(found) - len(parts) == 4
    assert parts[0].startswith("The paper's studies")
    assert parts[1] == "Losses, means over 2 seeds:"
    assert parts[3] == "Queries, one seed; the base is the best recipe but for `epochs`, `hidden_sizes`:"
    assert "mAP(L) is 0.432, the best of a plain loop in 20 min, on 2 cores; 118,287 images" in parts[5]
    assert "effnet features from 512 images on 2 cores" in parts[7]
    assert "1,000 training images by 1 − cosine = 1.2e-05 on average, 3.4e-04 at most" in parts[9]
    assert len(parts) == 11


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
