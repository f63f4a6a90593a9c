"""The paper's Table 1 on the testbed, and Figure 1, from the JSON files that the judges wrote.

    python -m benchmark.table1              # results/table1.md, results/throughput.png

A line for each method: latency of one query and storage (`benchmark.latency`), ΔL, MSE and similarity after removing
its top K (`benchmark.removal`), LDS (`benchmark.lds`), agreement on creators (`benchmark.creators`). What has not been
measured is left empty. Figure 1 draws ΔL against queries a second. Table 2 of the paper (a teacher that sees only
nearest neighbours) is the lines whose names end in "-knn".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmark.figures import plt, save_figure
from benchmark.removal import RANDOM
from benchmark.tables import markdown, number
from fastgda.core import ROOT, atomic_path, command_line

SOURCES = {
    "latency": "latency/latency.json",
    "removal": "removal/removal.json",
    "lds": "lds/lds.json",
    "creators": "creators/creators.json",
}
Row = dict[str, Any]


def read_reports(results: Path) -> dict[str, Row]:
    """Name -> report, of those that exist; `ValueError` if none does."""
    found = {name: results / path for name, path in SOURCES.items() if (results / path).is_file()}
    if not found:
        raise ValueError(f"{results}: expected {' or '.join(SOURCES.values())}, found none of them")
    return {name: json.loads(path.read_text()) for name, path in found.items()}


def rows_by_method(report: Row | None) -> dict[str, Row]:
    """Method -> its row; a method that has one for each K is left out."""
    return {row["method"]: row for row in (report or {"rows": []})["rows"] if "K" not in row}


def removals_by_method(report: Row | None) -> dict[str, dict[int, Row]]:
    """Method -> K -> its row."""
    found: dict[str, dict[int, Row]] = {}
    for row in (report or {"rows": []})["rows"]:
        found.setdefault(row["method"], {})[row["K"]] = row
    return found


def levels_of(removals: dict[str, dict[int, Row]]) -> list[int]:
    """The values of K, ascending."""
    return sorted({level for rows in removals.values() for level in rows})


def table1(reports: dict[str, Row]) -> str:
    """The table as Markdown, the best LDS first, methods without one last."""
    latency, lds, creators = (rows_by_method(reports.get(name)) for name in ("latency", "lds", "creators"))
    removals = removals_by_method(reports.get("removal"))
    levels = levels_of(removals)
    methods = list(dict.fromkeys([*lds, *removals, *latency]))
    methods.sort(key=lambda method: -lds[method]["lds"] if method in lds else 1.0)
    header = ["method", "latency, ms", "storage, MiB", "LDS", "creators"]
    header += [f"{name}, K = {level}" for level in levels for name in ("ΔL", "MSE", "similarity")]
    lines = []
    for method in methods:
        cost = latency.get(method)
        line = [
            method,
            *(["", ""] if cost is None else [f"{1e3 * cost['seconds']:.1f}", f"{cost['storage'] / 2**20:.1f}"]),
        ]
        line.append(interval(lds[method]["lds"], lds[method]["interval"]) if method in lds else "")
        line.append(number(creators[method]["spearman"]) if method in creators else "")
        for level in levels:
            row = removals.get(method, {}).get(level)
            effects = ("delta_loss", "mse", "similarity")
            line += [effect(row[key]) for key in effects] if row else [""] * len(effects)
        lines.append(line)
    if (bound := (reports.get("lds") or {}).get("ceiling")) is not None:
        cell = interval(bound["lds"], bound["interval"])
        lines.append(["ceiling of the LDS", "", "", cell, *[""] * (len(header) - 4)])
    return markdown(header, lines)


def interval(value: float, bounds: list[float]) -> str:
    """A number with its bootstrap interval."""
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def effect(value: Row) -> str:
    """Mean and standard error, with four digits: effects of small K are small."""
    return f"{value['mean']:.4f} ± {value['standard_error']:.4f}"


def throughput_figure(reports: dict[str, Row], level: int) -> Figure:
    """Figure 1: ΔL after removing the top K against queries a second."""
    latency, removals = rows_by_method(reports["latency"]), removals_by_method(reports["removal"])
    figure, axis = plt.subplots(figsize=(6, 4))
    for method, rows in removals.items():
        if level not in rows:
            continue
        value = rows[level]["delta_loss"]
        if method == RANDOM:
            axis.axhline(value["mean"], color="grey", linestyle="--", label="random removal")
        elif method in latency:
            rate = 1 / latency[method]["seconds"]
            axis.errorbar(rate, value["mean"], value["standard_error"], marker="o")
            axis.annotate(method, (rate, value["mean"]), textcoords="offset points", xytext=(6, 4))
    axis.set(xscale="log", xlabel="queries a second, one machine", ylabel=f"ΔL after removing the top {level}")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    return figure


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.table1", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the judges' JSON files")
    parser.add_argument("--level", type=int, help="K of the figure (default: the largest)")
    args = parser.parse_args(argv)
    reports = read_reports(args.results)
    with atomic_path(args.results / "table1.md") as temporary:
        temporary.write_text(table1(reports) + "\n")
    print(args.results / "table1.md")
    if {"latency", "removal"} <= reports.keys():
        levels = levels_of(removals_by_method(reports["removal"]))
        if args.level is not None and args.level not in levels:
            raise ValueError(f"--level: expected one of {levels}, found {args.level}")
        save_figure(throughput_figure(reports, args.level or levels[-1]), args.results / "throughput.png")


if __name__ == "__main__":
    sys.exit(main())
