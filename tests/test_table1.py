"""Table 1 and Figure 1 from the judges' JSON files."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmark import image_rows, table1
from benchmark.removal import RANDOM


def effects(value):
    return {key: {"mean": value, "standard_error": 0.01} for key in ("delta_loss", "mse", "similarity")}


REPORTS = {
    "latency/latency.json": {"rows": [{"method": "tuned", "seconds": 0.0123, "storage": 3 * 2**20}]},
    "removal/removal.json": {
        "rows": [
            {"method": RANDOM, "K": 5} | effects(0.001),
            {"method": "tuned", "K": 5} | effects(0.02),
            {"method": "tuned", "K": 43} | effects(0.2),
        ]
    },
    "lds/lds.json": {
        "ceiling": {"lds": 0.7, "interval": [0.6, 0.8]},
        "rows": [
            {"method": "trak", "lds": 0.1, "interval": [0.05, 0.15]},
            {"method": "tuned", "lds": 0.3, "interval": [0.25, 0.35]},
        ],
    },
    "creators/creators.json": {"rows": [{"method": "tuned", "spearman": 0.4}]},
}


@pytest.fixture
def results(tmp_path):
    for name, report in REPORTS.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(json.dumps(report))
    return tmp_path


def test_each_method_has_a_line_with_what_was_measured(results, capsys):
    assert table1.main(["--results", str(results)]) == 0
    lines = (results / "table1.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:5] == ["method", "latency, ms", "storage, MiB", "LDS", "creators"]
    assert cells[0][5:] == [f"{name}, K = {k}" for k in (5, 43) for name in ("ΔL", "MSE", "similarity")]
    assert [line[0] for line in cells[2:]] == ["tuned", "trak", RANDOM, "ceiling of the LDS"]
    assert cells[2][1:6] == ["12.3", "3.0", "0.300 [0.250, 0.350]", "0.400", "0.0200 ± 0.0100"]
    assert cells[4][8:] == ["", "", ""]
    assert {len(line) for line in cells} == {11}
    assert Image.open(results / "throughput.png").width > 100
    assert table1.main(["--results", str(results), "--level", "7"]) == 2
    assert "--level: expected one of [5, 43], found 7" in capsys.readouterr().err


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
