"""The benchmark of answers: one small run, and what its numbers mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_world import write_bundle

from benchmark.answer_speed import main, measure
from fastgda.attributor import Timings


def test_parts_are_those_of_the_requests() -> None:
    asked: list[int] = []

    def ask(number: int) -> Sequence[Timings]:
        asked.append(number)
        return [Timings(0.001, 0.002, 0.003 + (number == 3), 0.004)] * 2

    found = measure(ask, 0.05, callers=2)
    assert asked[0] == 0 and len(set(asked[1:])) == len(asked[1:]), "each request is made by one caller"
    assert found["pictures"] == 2 * (len(asked) - 1)
    medians = {name: row["median_ms"] for name, row in found["parts"].items()}
    assert medians == pytest.approx({"encode": 1, "embed": 2, "search": 3, "metadata": 4, "total": 10})
    assert found["parts"]["search"]["p99_ms"] >= 3


def test_a_bundle_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "emoji"
    write_bundle(folder, 36)
    flags = ["--data_dir", str(folder), "--k", "5", "--seconds", "0.2", "--batch", "2"]
    assert main([str(folder / "bundle"), *flags, "--output", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["images"], report["factory"], report["encoder"]) == (35, "Flat", "pixel")
    assert list(report["ways"]) == ["one caller", "4 callers", "batches of 2"]
    for way in report["ways"].values():
        parts = way["parts"]
        assert way["pictures"] > 0 and way["per_second"] > 0
        assert parts["total"]["median_ms"] >= parts["search"]["median_ms"] > 0
    assert "one caller" in capsys.readouterr().out
    assert main([str(folder / "bundle"), *flags, "--k", "0"]) == 2
