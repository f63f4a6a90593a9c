"""Tables of how fast an index and an answer are: what is in the JSON files, and the fastest that reach the recall."""

from __future__ import annotations

from typing import Any

from benchmark.service_tables import answer_table, scale_table, service_parts
from fastgda.core import save_json


def goal(wanted: float, recall: float, median: float) -> dict[str, Any]:
    depths = {depth: {"mean": recall, "standard_error": 0.001} for depth in ("10", "100")}
    times = {"median_ms": median, "p99_ms": 2 * median}
    many = {"clients": 4, "median_ms": 3 * median, "p99_ms": 4 * median}
    return {"wanted": wanted, "recall": depths, "latency_one_client": times, "latency_many_clients": many}


def piece(factory: str, goals: list[dict[str, Any]], on_disk: bool = False, **changes: Any) -> dict[str, Any]:
    return {
        "size": 1000,
        "dim": 8,
        "factory": factory,
        "structure": {"factory": factory, "on_disk": on_disk},
        "goals": goals,
        "ram_bytes": {"RssAnon": 5e6},
        "disk_bytes": 7e6,
        "peak_bytes": None,
        "limit_gb": 0.0,
    } | changes


PIECES = [
    piece("Flat", [goal(0.95, 1.0, 9.0), goal(0.99, 1.0, 9.0)]),
    piece("fast", [goal(0.95, 0.96, 1.0), goal(0.99, 0.98, 1.5)]),
    piece("sound", [goal(0.95, 0.97, 2.0), goal(0.99, 0.9895, 3.0)]),
    piece("late", [goal(0.95, 0.97, 4.0), {"wanted": 0.99, "failed": "found 0.98 at best"}]),
    {"size": 10, "dim": 8, "factory": "large", "failed": "needs 30 GB of memory"},
    piece("far", [goal(0.95, 0.95, 5.0)], size=10, on_disk=True, peak_bytes=2e6, limit_gb=1.5),
]


def test_the_fastest_that_reach_a_recall_stand_below_exact_search() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scale_table(PIECES).splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["10 x 8", "far on disk"],
        ["1,000 x 8", "Flat"],
        ["1,000 x 8", "fast"],
        ["1,000 x 8", "sound"],
    ]
    assert rows[0][7] == "2 of 1.5 GB"
    assert rows[3][2:] == ["0.990", "0.990", "", "3.00 (6.00)", "4: 9.00 (12.00)", "5", "7"]


def test_answers_part_by_part(tmp_path) -> None:
    parts = {"encode": {"median_ms": 10.0, "p99_ms": 12.0}, "total": {"median_ms": 11.0, "p99_ms": 14.5}}
    ways = {"one caller": {"parts": parts, "per_second": 90.4}}
    assert answer_table(ways).splitlines()[2] == "| one caller | 10.00 (12.00) | 11.00 (14.50) | 90 |"
    assert service_parts(tmp_path) == []
    report = {"images": 14_000, "dim": 768, "factory": "Flat", "k": 100, "ways": ways, "environment": {"cores": 2}}
    save_json(tmp_path / "latency/answer.json", report)
    found = {"config": {"query_count": 1200}, "environment": {"cores": 2}, "pieces": PIECES}
    save_json(tmp_path / "scale/index.json", found)
    text, table, answers, _ = service_parts(tmp_path)
    assert "the 1,200 that are measured" in text and table == scale_table(PIECES)
    assert "14,000 images of 768 numbers, Flat, the first 100" in answers
