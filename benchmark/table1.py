"""The paper's Table 1 on the testbed, and Figure 1, from the JSON files that the judges wrote.

    python -m benchmark.table1              # results/table1.md, results/removal/throughput_<K>.png

A line for each method: ΔL after removing its top K over that of random removals, MSE and similarity at the K of most
methods (`benchmark.removal`), LDS (`benchmark.lds`), agreement on creators (`benchmark.creators`), latency of one query
and storage (`benchmark.latency`). What has not been measured is left empty. Figure 1 draws ΔL against queries a second.
`benchmark.tables` puts the tables into README.md. Table 2 of the paper (a teacher that sees only nearest neighbours)
compares the lines whose names end in "-knn" with the others.
"""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmark.drawing import Figure, plt, save_figure
from benchmark.gradient_methods import METHODS
from benchmark.markdown import interval, markdown, number
from benchmark.methods import NEAREST, SELECTED, TUNED, is_teacher
from benchmark.removal_effects import EFFECTS, RANDOM
from fastgda.core import ROOT, atomic_path, command_line, command_parser

SOURCES = {
    "latency": "latency/latency.json",
    "removal": "removal/removal.json",
    "lds": "lds/lds.json",
    "creators": "creators/creators.json",
    "calibration": "calibration/calibration.json",
}
Row = dict[str, Any]


def read_reports(results: Path) -> dict[str, Row]:
    """Name -> report, of those that exist."""
    found = {name: results / path for name, path in SOURCES.items() if (results / path).is_file()}
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


def widest_level(removals: dict[str, dict[int, Row]]) -> int | None:
    """The K at which most methods were judged, the largest of those; `None` if none was."""
    judged = [level for rows in removals.values() for level in rows]
    return max(judged, key=lambda level: (judged.count(level), level), default=None)


def cost_of(method: str, latency: dict[str, Row]) -> Row | None:
    """The row of `latency` that says what a query costs; another λ ("-selected") costs what the paper's does where it
    was not timed itself.
    """
    return latency.get(method) or latency.get(method.removesuffix(SELECTED))


def table1(reports: dict[str, Row]) -> str:
    """The table as Markdown: the largest excess of ΔL at the K of most methods first, then by LDS."""
    latency, lds, creators = (rows_by_method(reports.get(name)) for name in ("latency", "lds", "creators"))
    removals = removals_by_method(reports.get("removal"))
    levels, widest = levels_of(removals), widest_level(removals)
    # the others are in the table of LDS
    methods = list(dict.fromkeys([*removals, *latency]))

    def order(method: str) -> tuple[float, float]:
        row = {} if widest is None else removals.get(method, {}).get(widest, {})
        unknown = float("-inf")
        return -row.get("delta_loss", {}).get("excess", unknown), -lds.get(method, {}).get("lds", unknown)

    header = ["method", *(f"ΔL over random, K = {level}" for level in levels)]
    header += [] if widest is None else [f"MSE, K = {widest}", f"similarity, K = {widest}"]
    header += ["LDS", "creators", "latency, ms", "storage, MiB"]
    lines = []
    for method in sorted(methods, key=order):
        found, cost = removals.get(method, {}), cost_of(method, latency)
        line = [method, *(excess(found.get(level)) for level in levels)]
        if widest is not None:
            line += effects_of(found.get(widest, {}))[1:]
        line.append(interval(lds[method]["lds"], lds[method]["interval"]) if method in lds else "")
        line.append(number(creators[method]["spearman"]) if method in creators else "")
        line += ["", ""] if cost is None else [f"{1e3 * cost['seconds']:.1f}", f"{cost['storage'] / 2**20:.1f}"]
        lines.append(line)
    return markdown(header, lines)


def effects_table(report: Row) -> str:
    """ΔL itself, MSE and similarity of each method at each K, the smallest K first."""
    lines = [
        [str(row["K"]), row["method"], *effects_of(row)]
        for row in sorted(report["rows"], key=lambda row: (row["K"], -row["delta_loss"]["mean"]))
    ]
    return markdown(["K", "method", "ΔL", "MSE", "similarity"], lines, left=2)


def pairs_table(report: Row) -> str | None:
    """By how much a ranker's ΔL exceeds that of its untuned feature, of teachers and of methods on gradients; `None`
    without such pairs.
    """
    found: dict[tuple[str, str], dict[int, str]] = {}
    for pair in report["pairs"]:
        first, second, sign = pair["first"], pair["second"], 1
        if second.startswith(f"{TUNED}-"):
            first, second, sign = second, first, -1
        slow = is_teacher(second) or second.removesuffix(SELECTED) in METHODS
        if first.startswith(f"{TUNED}-") and (first.endswith(f"-{second}") or slow):
            bounds = sorted(sign * bound for bound in pair["interval"])
            cell = f"{interval(sign * pair['difference'], bounds, 4)}, {len(pair['queries'])} queries"
            found.setdefault((first, second), {})[pair["K"]] = cell
    if not found:
        return None
    levels = sorted({level for cells in found.values() for level in cells})
    lines = [[f"{a} over {b}", *(cells.get(level, "") for level in levels)] for (a, b), cells in found.items()]
    return markdown(["", *(f"K = {level}" for level in levels)], lines)


def lds_table(report: Row) -> str:
    """LDS of each method, the best first, and that of its order alone (`benchmark.lds.sharpened`); the ceiling."""
    lines = []
    for row in sorted(report["rows"], key=lambda row: -row["lds"]):
        order = row["sharpened"]
        lines.append([row["method"], interval(row["lds"], row["interval"]), interval(order["lds"], order["interval"])])
    if (bound := report["ceiling"]) is not None:
        twice = f"ceiling, from {bound['models']} halves trained twice"
        lines.append([twice, interval(bound["lds"], bound["interval"]), ""])
    return markdown(["", "LDS", "LDS of exp(2 z)"], lines)


def creators_table(report: Row) -> str:
    """Agreement of each method on creators, the best first; the ceiling, and what one seed says of the others."""
    rows = sorted(report["rows"], key=lambda row: -row["spearman"])
    lines = [
        [row["method"], *(interval(row[key], row[f"{key}_interval"]) for key in ("spearman", "top1"))] for row in rows
    ]
    if (bound := report["ceiling"]) is not None:
        one = bound["one_seed"]
        lines.append(["ceiling", number(bound["spearman"]), ""])
        lines.append(["one seed for the others", number(one["spearman"]), number(one["top1"])])
    return markdown(["", "Spearman over creators", "same first creator"], lines)


def calibration_table(report: Row) -> str:
    """Slope and R^2 of each method on each group of removals, and the error of its shares beside simpler rules'."""
    groups = list(dict.fromkeys(name for row in report["rows"] for name in row["groups"]))
    header = ["", *(f"{name}: slope, R²" for name in groups), "error of a share"]
    lines = []
    for row in report["rows"]:
        cells = [row["groups"].get(name) for name in groups]
        fits = [f"{cell['slope']:.2f}, {cell['r_squared']:.2f}" if cell else "" for cell in cells]
        lines.append([row["method"], *fits, error_of_share(row["groups"]["creators"])])
    for name, row in report["baselines"].items():
        lines.append([name, *("" for _ in groups), error_of_share(row)])
    return markdown(header, lines)


def error_of_share(row: Row) -> str:
    """With its interval."""
    return interval(row["absolute_error"], row["interval"])


def nearest_table(reports: dict[str, Row]) -> str | None:
    """Teachers on nearest images beside the same on all (the paper's Table 2); `None` if none was judged."""
    lds, removals = rows_by_method(reports.get("lds")), removals_by_method(reports.get("removal"))
    nearest = [method for method in dict.fromkeys([*removals, *lds]) if method.endswith(NEAREST)]
    names = [name for method in nearest for name in (method.removesuffix(NEAREST), method)]
    levels = levels_of({name: removals[name] for name in names if name in removals})
    lines = []
    for name in names:
        line = [name, *(excess(removals.get(name, {}).get(level)) for level in levels)]
        lines.append([*line, interval(lds[name]["lds"], lds[name]["interval"]) if name in lds else ""])
    if not lines:
        return None
    return markdown(["", *(f"ΔL over random, K = {level}" for level in levels), "LDS"], lines)


def excess(row: Row | None) -> str:
    """By how much ΔL exceeds that of random removals, with its interval; nothing if that is not known."""
    value = (row or {}).get("delta_loss", {})
    return interval(value["excess"], value["excess_interval"], 4) if "excess" in value else ""


def effects_of(row: Row) -> list[str]:
    """Mean and standard error of each effect, with four digits, since effects of small K are small; empty where it was
    not measured.
    """
    values = [row.get(key) for key in EFFECTS]
    return [f"{value['mean']:.4f} ± {value['standard_error']:.4f}" if value else "" for value in values]


def throughput_figures(reports: dict[str, Row]) -> dict[int, Figure]:
    """K -> Figure 1; none while removals or latency have not been measured."""
    if not {"latency", "removal"} <= reports.keys():
        return {}
    return {level: throughput_figure(reports, level) for level in levels_of(removals_by_method(reports["removal"]))}


def throughput_figure(reports: dict[str, Row], level: int) -> Figure:
    """Figure 1: ΔL after removing the top K against queries a second."""
    latency, removals = rows_by_method(reports["latency"]), removals_by_method(reports["removal"])
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    judged = [(method, rows[level]["delta_loss"]) for method, rows in removals.items() if level in rows]
    judged.sort(key=lambda row: -row[1]["mean"])
    marks = cycle(f"C{colour}{marker}" for marker in "os^" for colour in range(10))
    for method, value in judged:
        if method == RANDOM:
            axis.axhline(value["mean"], color="grey", linestyle="--", label=RANDOM)
        elif (cost := cost_of(method, latency)) is not None:
            axis.errorbar(1 / cost["seconds"], value["mean"], value["standard_error"], fmt=next(marks), label=method)
    axis.set(xscale="log", xlabel="queries a second, one machine", ylabel=f"ΔL after removing the top {level}")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", title="largest ΔL first", fontsize="small")
    return figure


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.table1", __doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the judges' JSON files")
    args = parser.parse_args(argv)
    reports = read_reports(args.results)
    if not reports:
        raise ValueError(f"{args.results}: expected {' or '.join(SOURCES.values())}, found none of them")
    with atomic_path(args.results / "table1.md") as temporary:
        temporary.write_text(table1(reports) + "\n")
    print(args.results / "table1.md")
    for level, figure in throughput_figures(reports).items():
        save_figure(figure, args.results / f"removal/throughput_{level}.png")


if __name__ == "__main__":
    sys.exit(main())
