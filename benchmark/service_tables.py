"""The tables of README.md that say how fast an index and an answer are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmark.markdown import markdown
from fastgda.index.plan import duration

Report = dict[str, Any]
DEPTHS = ("10", "100", "1000")
"""Values of k of recall@k that are shown."""
JUDGED_DEPTH = "100"
"""The k of recall@k by which structures are compared."""


def service_parts(results: Path) -> list[str]:
    """Paragraphs and tables of what was measured of them."""
    parts = []
    if (results / "scale/index.json").is_file():
        report = json.loads((results / "scale/index.json").read_text())
        queries = report["config"]["query_count"]
        parts += [
            f"Index structures on vectors like the ranker's embedding, on {report['environment']['cores']} cores "
            "(`python -m benchmark.index_scale`, all of them in its JSON): for each size the exact search and the "
            f"fastest that reach a recall@{JUDGED_DEPTH}, calibrated on other queries than the {queries:,} that are "
            "measured; one client, median and 99th percentile; RAM without mapped files, or all of it, their cached "
            "pages included, where it was bounded:",
            scale_table(report["pieces"]),
        ]
    if (results / "scale/projection.json").is_file():
        report = json.loads((results / "scale/projection.json").read_text())
        parts += [
            f"An index of {report['config']['images']:,} images, projected from these (`python -m "
            f"benchmark.index_projection`), at recall@k = {report['config']['wanted']:g}, assuming that "
            + "; ".join(report["assumptions"])
            + ":",
            projection_table(report["projections"]),
        ]
    if (results / "latency/answer.json").is_file():
        report = json.loads((results / "latency/answer.json").read_text())
        parts += [
            f"An answer of a warm bundle, {report['images']:,} images of {report['dim']} numbers, {report['factory']}, "
            f"the first {report['k']} with all that is known of them, on {report['environment']['cores']} cores: "
            "median milliseconds of a picture and, in brackets, the 99th percentile (`python -m "
            "benchmark.answer_speed`):",
            answer_table(report["ways"]),
        ]
    return parts


def scale_table(pieces: list[Report]) -> str:
    """For each width, size and goal the fastest structure, below exact search."""
    rows = []
    for dim, size in sorted({(piece["dim"], piece["size"]) for piece in pieces}, key=lambda at: (-at[0], at[1])):
        here = [piece for piece in pieces if (piece["dim"], piece["size"]) == (dim, size)]
        shown = [(piece, piece["goals"][0]) for piece in here if piece["factory"] == "Flat" and "goals" in piece]
        for wanted in sorted({goal["wanted"] for piece in here for goal in piece.get("goals", [])}):
            reached = list(reaching(here, wanted))
            if reached:
                shown.append(min(reached, key=lambda found: found[1]["latency_one_client"]["median_ms"]))
        rows += [[f"{size:,} x {dim}", *scale_line(*found)] for found in shown]
    names = ["vectors", "structure", *(f"recall@{depth}" for depth in DEPTHS), "ms (p99)", "clients: ms (p99)"]
    return markdown([*names, "RAM, MB", "disk, MB"], rows, left=2)


def reaching(pieces: list[Report], wanted: float) -> Iterator[tuple[Report, Report]]:
    """Pieces with the goal `wanted` that reached it on the measured queries, up to a standard error."""
    for piece in pieces:
        for goal in piece.get("goals", []):
            if goal["wanted"] == wanted and "failed" not in goal and piece["factory"] != "Flat":
                found = goal["recall"][JUDGED_DEPTH]
                if found["mean"] + found["standard_error"] >= wanted:
                    yield piece, goal


def structure_name(structure: Report) -> str:
    """What the tables call a `SegmentConfig`."""
    return structure["factory"] + (" on disk" if structure["on_disk"] else "")


def scale_line(piece: Report, goal: Report) -> list[str]:
    """What a structure reached and took."""
    recalls = [goal["recall"].get(depth) for depth in DEPTHS]
    one, many = goal["latency_one_client"], goal["latency_many_clients"]
    bounded = piece["peak_bytes"] is not None
    ram = piece["peak_bytes"] if bounded else piece["ram_bytes"]["RssAnon"]
    return [
        structure_name(piece["structure"]),
        *("" if found is None else f"{found['mean']:.3f}" for found in recalls),
        median_p99(one),
        f"{many['clients']}: {median_p99(many)}",
        f"{ram / 1e6:,.0f}" + (f" of {piece['limit_gb']:g} GB" if bounded else ""),
        f"{piece['disk_bytes'] / 1e6:,.0f}",
    ]


def projection_table(projections: list[Report]) -> str:
    """One line for each width and memory budget."""
    rows = [
        [
            f"{found['dim']}",
            f"{found['memory_gb']:g} GB",
            structure_name(found["structure"]),
            f"{found['ram_bytes'] / 1e9:.1f} ({found['ram_bytes_building'] / 1e9:.0f})",
            f"{found['disk_bytes'] / 1e9:,.0f}",
            f"{duration(found['training_seconds'])}, {duration(found['adding_seconds'])}",
            f"{found['nprobe']:,} of {found['visited'] / found['nprobe']:,.0f}",
            f"{found['depth']:,.0f}",
            f"{found['milliseconds_computing']:.1f}",
            f"{found['milliseconds_reading']:.1f}",
        ]
        for found in projections
    ]
    names = [
        "numbers",
        "memory",
        "structure",
        "RAM (building), GB",
        "disk, GB",
        "training, adding",
        "lists of codes",
        "re-ranked",
    ]
    return markdown([*names, "computing, ms", "reading, ms"], rows, left=3)


def answer_table(ways: Report) -> str:
    """One line for each way of asking."""
    names = list(next(iter(ways.values()))["parts"])
    rows = [
        [
            way,
            *(median_p99(found["parts"][name]) for name in names),
            f"{found['per_second']:.0f}",
        ]
        for way, found in ways.items()
    ]
    return markdown(["", *names, "pictures a second"], rows)


def median_p99(times: Report) -> str:
    """Milliseconds: the median and, in brackets, the 99th percentile."""
    return f"{times['median_ms']:.2f} ({times['p99_ms']:.2f})"
