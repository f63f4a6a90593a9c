"""The projection to hundreds of millions of images, from a made-up report of smaller indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.index_projection import main, measured, structure
from benchmark.service_tables import projection_table

FACTORY = "OPQ64_256,IVF65536_HNSW32,PQ64"


def piece(size: int, factory: str, nprobe: int, depth: int, milliseconds: float, limit_gb: float = 0) -> dict[str, Any]:
    goal = {
        "wanted": 0.95,
        "calibration": {"nprobe": nprobe, "depth": depth},
        "latency_one_client": {"median_ms": milliseconds},
    }
    estimate = {"training_seconds": 100.0, "adding_seconds": 50.0}
    return {
        "size": size,
        "dim": 256,
        "factory": factory,
        "estimate": estimate,
        "limit_gb": limit_gb,
        "build_seconds": 300.0,
        "goals": [{"wanted": 0.99, "failed": "no settings"}, goal],
    }


@pytest.fixture
def pieces() -> list[dict[str, Any]]:
    """Ten times the images: twice the lists visited, of 2.5 times the codes, and half the vectors re-ranked."""
    return [
        piece(10_000_000, "OPQ64_256,IVF16384,PQ64", 8, 150, 9.0, limit_gb=1.5),
        piece(10_000_000, "OPQ64_256,IVF4096,PQ64", 99, 999, 99.0),
        piece(10_000_000, "IVF16384,PQ64x4fs", 99, 999, 99.0),
        piece(1_000_000, "OPQ64_256,IVF4096,PQ64", 4, 300, 1.0),
        {"size": 100_000, "dim": 256, "factory": "OPQ64_256,IVF1024,PQ64", "failed": "no room"},
    ]


def test_measured_indexes_are_those_of_the_structure(pieces: list[dict[str, Any]]) -> None:
    found = measured(pieces, FACTORY, 256, 0.95)
    assert [index.size for index in found] == [1_000_000, 10_000_000]
    assert [index.depth for index in found] == [300, 150] and found[1].build_ratio == 2
    assert [index.visited for index in found] == pytest.approx([4e6 / 4096, 8e7 / 16384])
    assert structure(FACTORY) == structure("OPQ64_256,IVF4096,PQ64") != structure("IVF4096,PQ64")
    with pytest.raises(ValueError, match=r"recall 0.99: expected two measured sizes or more, .*, found \[\]"):
        measured(pieces, FACTORY, 256, 0.99)
    pieces[3]["limit_gb"] = 1.5
    with pytest.raises(ValueError, match=r"without --limit_gb, found \[1000000, 10000000\]"):
        measured(pieces, FACTORY, 256, 0.95)


def test_projection_follows_the_power_of_the_measured(
    tmp_path: Path, pieces: list[dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    report, out = tmp_path / "index.json", tmp_path / "projection.json"
    report.write_text(json.dumps({"pieces": pieces}))
    run = ["--report", str(report), "--output", str(out), "--dims", "256", "--images", "1000000000"]
    assert main([*run, "--memory_gb", "16", "640"]) == 0
    printed = json.loads(out.read_text())
    small, large = printed["projections"]
    assert (small["structure"]["on_disk"], large["structure"]["on_disk"]) == (True, False)
    for found in (small, large):
        assert found["structure"]["factory"].startswith("OPQ64_256,IVF131072_HNSW32")
        assert found["nprobe"] == 16, "of 7,629 codes: five times as many codes for ten times the images, rounded up"
        assert found["visited"] == pytest.approx(16 * 1e9 / 131072)
        assert found["depth"] == 150, "never fewer than in the largest"
        assert found["milliseconds_computing"] == pytest.approx(found["visited"] / (4e6 / 4096)), "as in the smaller"
    assert small["milliseconds_reading"] > large["milliseconds_reading"] == pytest.approx(15 + 150 * 512 / 2e6)
    assert "1,000,000,000 images" in capsys.readouterr().out
    table = projection_table(printed["projections"])
    assert len(table.splitlines()) == 4 and "on disk" in table
    pieces[0]["goals"][1]["calibration"]["nprobe"] = 3  # 1.9 times the codes for ten times the images
    report.write_text(json.dumps({"pieces": pieces}))
    assert main([*run, "--memory_gb", "640"]) == 0
    assert json.loads(out.read_text())["projections"][0]["nprobe"] == 3, "two would hold the codes"
    assert main([*run, "--images", "1000"]) == 2
    assert "expected an index with inverted lists" in capsys.readouterr().err
