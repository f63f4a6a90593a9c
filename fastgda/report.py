"""A report of `fastgda.evaluation` as text, as CSV and as JSON."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from fastgda.core import atomic_path, save_json


def save_report(document: dict[str, Any], output: Path, *, released: bool = False) -> tuple[Path, ...]:
    """Writes `output`, with or without such a suffix, as .csv (one line per method and L) and .json (everything).

    `released`: the .csv is the table of the only tuned ranker as the released code writes it, and that of all methods
    goes to <output>_methods.csv.
    """
    # any other dot belongs to the name: results/v1.2
    stem = output.stem if output.suffix in (".csv", ".json") else output.name
    table, full = output.with_name(f"{stem}.csv"), output.with_name(f"{stem}.json")
    first: tuple[Path, ...] = ()
    if released:
        save_released(document, table)
        first, table = (table,), output.with_name(f"{stem}_methods.csv")
    lines: list[dict[str, Any]] = []
    for row in document["rows"]:
        for level, value in row["mAP"].items():
            low, high = row.get("interval", {}).get(level, ("", ""))
            lines.append(
                {
                    **_named(row, level),
                    "mAP": value,
                    "standard_error": row.get("standard_error", {}).get(level, ""),
                    "low": low,
                    "high": high,
                    "overlap": row.get("overlap", {}).get(level, ""),
                    "spearman": row.get("spearman", ""),
                    **{f"recall@{k}": found for k, found in row.get("recall", {}).get(level, {}).items()},
                    **{f"NDCG@{k}": found for k, found in row.get("ndcg", {}).get(level, {}).items()},
                }
            )
    _write_lines(table, lines)
    rows = [{key: value for key, value in row.items() if key != "queries"} for row in document["rows"]]
    save_json(full, document | {"rows": rows})
    return *first, table, full


def save_released(document: dict[str, Any], path: Path) -> None:
    """Writes the released code's table of the only tuned ranker: k, mAP (k), std_err, six decimals each.

    Its error divides by the number of queries (`standard_error`, elsewhere, by one less).
    """
    (row,) = (row for row in document["rows"] if row["method"] == "tuned")
    lines = []
    for level in sorted(map(int, row["mAP"])):
        values = np.array(row["per_query"][str(level)])
        error = float(values.std() / math.sqrt(len(values)))
        lines.append({"k": level, "mAP (k)": f"{values.mean():.6f}", "std_err": f"{error:.6f}"})
    _write_lines(path, lines)


def save_per_query(document: dict[str, Any], path: Path) -> None:
    """Writes a CSV of one line for each method, query and L, of a report that was evaluated with `per_query`."""
    lines = [
        {**_named(row, entry["L"]), **{key: value for key, value in entry.items() if key != "L"}}
        for row in document["rows"]
        for entry in row.get("queries", [])
    ]
    _write_lines(path, lines)


def format_table(document: dict[str, Any]) -> str:
    """The report as text: mAP(L) ± standard error of each method."""
    levels = [str(level) for level in document["levels"]]
    lines = [["method", "feature", *(f"mAP({level})" for level in levels), "Spearman"]]
    for row in document["rows"]:
        errors = row.get("standard_error", {})
        cells = [_cell(row["mAP"].get(level), errors.get(level)) for level in levels]
        lines.append([row["method"], row.get("ftype") or "", *cells, _cell(row.get("spearman"), None)])
    for row in document["rows"]:
        if "gain" in row:
            cells = [_cell(row["gain"][level], row["gain_standard_error"][level]) for level in levels]
            lines.append(["tuned - untuned", row["ftype"], *cells, ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    head = f"{document['split']} split: {document['queries']} queries, {document['images']} training images"
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([head, *text])


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _named(row: dict[str, Any], level: str) -> dict[str, Any]:
    return {
        "method": row["method"],
        "ftype": row.get("ftype") or "",
        "checkpoint": row.get("checkpoint", ""),
        "L": level,
    }


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(lines)
