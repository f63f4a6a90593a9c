"""Table 1 and Figure 1 from the judges' JSON files."""

from __future__ import annotations

import json

import pytest
from demo_world import retrained
from PIL import Image

from benchmark import figures, image_rows, judged_tables, table1
from benchmark.removal_effects import RANDOM
from fastgda.core import save_json


def judged(method: str, lds: float, interval: list[float]) -> dict:
    """A row of benchmark.lds."""
    return {"method": method, "lds": lds, "interval": interval, "sharpened": {"lds": lds / 2, "interval": interval}}


def effects(value, excess=None):
    found = {key: {"mean": value, "standard_error": 0.01} for key in ("delta_loss", "mse", "similarity")}
    if excess is not None:
        found["delta_loss"] |= {"excess": excess, "excess_interval": [excess - 0.1, excess + 0.1]}
    return {"queries": [0, 3]} | found


REPORTS = {
    "latency/latency.json": {"rows": [{"method": "tuned", "seconds": 0.0123, "storage": 3 * 2**20}]},
    "removal/removal.json": {
        "mode": "emoji-mini",
        "rows": [
            {"method": RANDOM, "K": 5, "delta_loss": effects(0.001)["delta_loss"], "queries": [0, 3]},
            {"method": "tuned", "K": 5} | effects(0.02, 0.019),
            {"method": "tuned", "K": 43} | effects(0.2, 0.15),
            {"method": "plain-knn", "K": 43} | effects(0.3, 0.25),
        ],
        "pairs": [
            {"first": "plain", "second": "tuned-pixel", "K": 5, "queries": [0, 3]}
            | {"difference": 0.01, "interval": [-0.02, 0.04]},
            {"first": "tuned-pixel", "second": "pixel", "K": 43, "queries": [0, 3]}
            | {"difference": 0.03, "interval": [0.01, 0.05]},
            {"first": "plain", "second": "pixel", "K": 43, "queries": [0, 3]}
            | {"difference": 0.03, "interval": [0.01, 0.05]},
            {"first": "d-trak-selected", "second": "tuned-pixel", "K": 43, "queries": [0, 3]}
            | {"difference": -0.02, "interval": [-0.04, 0.01]},
            {"first": "tuned-pixel", "second": "minilm", "K": 43, "queries": [0, 3]}
            | {"difference": 0.03, "interval": [0.01, 0.05]},
        ],
    },
    "calibration/calibration.json": {
        "rows": [
            {
                "method": "tuned",
                "groups": {
                    "creators": {"slope": 1.1, "r_squared": 0.5, "absolute_error": 0.04, "interval": [0.03, 0.05]},
                    "43 images": {"slope": 0.9, "r_squared": 0.25},
                },
            }
        ],
        "baselines": {"images in the training set": {"absolute_error": 0.1, "interval": [0.08, 0.12]}},
    },
    "lds/lds.json": {
        "mode": "emoji-mini",
        "models": 64,
        "truth": "both",
        "ceiling": {"lds": 0.7, "interval": [0.6, 0.8], "models": 16},
        "rows": [
            judged("trak", 0.1, [0.05, 0.15]),
            judged("tuned", 0.3, [0.25, 0.35]),
            judged("plain", 0.2, [0.15, 0.25]),
        ],
    },
    "creators/creators.json": {
        "creators": ["a", "b"],
        "models": 3,
        "ceiling": {"spearman": 0.95, "reliability": 0.7, "one_seed": {"spearman": 0.8, "top1": 0.9}},
        "rows": [
            {"method": "tuned"}
            | {"spearman": 0.4, "spearman_interval": [0.3, 0.5], "top1": 0.6, "top1_interval": [0.5, 0.7]}
        ],
    },
}


@pytest.fixture
def results(tmp_path):
    for name, report in REPORTS.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(json.dumps(report))
    return tmp_path


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_each_method_has_a_line_with_what_was_measured(results):
    assert table1.main(["--results", str(results)]) == 0
    found = cells((results / "table1.md").read_text())
    assert found[0][:3] == ["method", "ΔL over random, K = 5", "ΔL over random, K = 43"]
    assert found[0][3:] == ["MSE, K = 43", "similarity, K = 43", "LDS", "creators", "latency, ms", "storage, MiB"]
    assert [line[0] for line in found[2:]] == ["plain-knn", "tuned", RANDOM]
    assert found[3][1:5] == [
        "0.0190 [-0.0810, 0.1190]",
        "0.1500 [0.0500, 0.2500]",
        "0.2000 ± 0.0100",
        "0.2000 ± 0.0100",
    ]
    assert found[3][5:] == ["0.300 [0.250, 0.350]", "0.400", "12.3", "3.0"]
    assert found[2][1:5] == ["", "0.2500 [0.1500, 0.3500]", "0.3000 ± 0.0100", "0.3000 ± 0.0100"]
    assert found[4][1:] == [""] * 8, "random removals were made of five images only"
    assert {len(line) for line in found} == {9}
    assert Image.open(results / "removal/throughput_43.png").width > 100


def test_another_ridge_costs_what_the_papers_does(results):
    removals = json.loads((results / "removal/removal.json").read_text())
    removals["rows"] += [{"method": f"{name}-selected", "K": 43} | effects(0.1, 0.05) for name in ("trak", "das")]
    save_json(results / "removal/removal.json", removals)
    timed = [{"method": name, "seconds": s, "storage": 2**20} for name, s in (("trak", 0.5), ("das-selected", 0.25))]
    timed.append({"method": "das", "seconds": 0.75, "storage": 2**20})
    save_json(results / "latency/latency.json", {"rows": timed})
    reports = table1.read_reports(results)
    found = {line[0]: line[-2:] for line in cells(table1.table1(reports))}
    assert found["trak-selected"] == found["trak"] == ["500.0", "1.0"]
    assert (found["das-selected"], found["das"]) == (["250.0", "1.0"], ["750.0", "1.0"])
    _, names = table1.throughput_figure(reports, 43).axes[0].get_legend_handles_labels()
    assert names == ["trak-selected", "das-selected"]


def test_the_readme_says_what_retraining_says(results):
    reports = table1.read_reports(results)
    parts = judged_tables.removal_parts(reports) + judged_tables.judged_parts(reports, [])
    assert cells(parts[3])[2:] == [
        ["tuned-pixel over plain", "-0.0100 [-0.0400, 0.0200], 2 queries", ""],
        ["tuned-pixel over pixel", "", "0.0300 [0.0100, 0.0500], 2 queries"],
        ["tuned-pixel over d-trak-selected", "", "0.0200 [-0.0100, 0.0400], 2 queries"],
    ]
    bound = "ceiling, from 16 halves trained twice"
    assert [line.split("|")[1].strip() for line in parts[5].splitlines()[2:]] == ["tuned", "plain", "trak", bound]
    assert "64 models on random halves of `emoji-mini`, the mean of two trainings" in parts[4]
    assert cells(parts[7])[2:] == [
        ["tuned", "0.400 [0.300, 0.500]", "0.600 [0.500, 0.700]"],
        ["ceiling", "0.950", ""],
        ["one seed for the others", "0.800", "0.900"],
    ]
    assert cells(parts[9]) == [
        ["", "creators: slope, R²", "43 images: slope, R²", "error of a share"],
        ["---", "--:", "--:", "--:"],
        ["tuned", "1.10, 0.50", "0.90, 0.25", "0.040 [0.030, 0.050]"],
        ["images in the training set", "", "", "0.100 [0.080, 0.120]"],
    ]
    assert cells(parts[11])[2:] == [
        ["5", "tuned", *["0.0200 ± 0.0100"] * 3],
        ["5", RANDOM, "0.0010 ± 0.0100", "", ""],
        ["43", "plain-knn", *["0.3000 ± 0.0100"] * 3],
        ["43", "tuned", *["0.2000 ± 0.0100"] * 3],
    ]
    assert cells(parts[13])[2:] == [
        ["plain", "", "0.200 [0.150, 0.250]"],
        ["plain-knn", "0.2500 [0.1500, 0.3500]", ""],
    ]
    (results / "removal/removal.json").unlink()
    assert judged_tables.removal_parts(table1.read_reports(results)) == []
    assert len(judged_tables.judged_parts(table1.read_reports(results), [])) == 6
    assert table1.throughput_figures(table1.read_reports(results)) == {}


def test_studies_stand_in_one_table(tmp_path):
    rows = [{"variant": "all ekfac", "lds": 0.3, "interval": [0.2, 0.4]}]
    save_json(tmp_path / "lds/study_step.json", {"study": "step", "fixed": "passes", "rows": rows})
    save_json(tmp_path / "lds/study_layers.json", {"study": "layers", "fixed": "20 draws", "rows": rows})
    studies = judged_tables.read_lds_studies(tmp_path)
    text, table = judged_tables.judged_parts({}, studies)
    assert "20 draws unless it says otherwise" in text
    assert table.splitlines()[2:] == [
        "| layers, curvature | all ekfac | 0.300 [0.200, 0.400] |",
        "| finite step | all ekfac | 0.300 [0.200, 0.400] |",
    ]


def test_without_any_report_the_command_says_what_it_wants(tmp_path, capsys):
    assert table1.main(["--results", str(tmp_path)]) == 2
    assert "expected latency/latency.json or removal/removal.json" in capsys.readouterr().err


def test_rows_of_images_stand_below_each_other():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    sheet = image_rows.sheet([("query", [red], blue), ("method", [blue, blue, red], None)])
    step = image_rows.SIDE + image_rows.GAP
    left, centre = image_rows.TEXT, image_rows.SIDE // 2
    assert sheet.getpixel((left + centre, centre)) == (255, 0, 0)
    assert sheet.getpixel((left + 2 * step + centre, step + centre)) == (255, 0, 0)
    assert sheet.getpixel((left + 3 * step + 2 * image_rows.GAP + centre, centre)) == (0, 0, 255)
    assert sheet.getpixel((left + step + centre, centre)) == (255, 255, 255)


def test_a_sheet_of_removals_has_a_row_for_each_method():
    sheets = figures.removal_sheets(retrained())
    assert list(sheets) == [2, 9]
    kept, step, left, centre = retrained(), image_rows.SIDE + image_rows.GAP, image_rows.TEXT, image_rows.SIDE // 2
    assert sheets[9].getpixel((left + 2 * step + centre, centre)) == tuple(kept.references[2, 0, 0])
    assert sheets[9].getpixel((left + 2 * step + centre, step + centre)) == tuple(kept.removals[3].picture[0, 0])
    assert sheets[9].getpixel((left + centre, step + centre)) == (255, 255, 255)
