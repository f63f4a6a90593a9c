"""The report of leave-K-out: a row for each method and K, and what an earlier report adds to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.removal_effects import EFFECTS, RANDOM, Plan, Reference, RemovalEffects
from benchmark.reports import load_report
from benchmark.retrainer import Retraining
from fastgda.metrics import bootstrap_interval, standard_error
from serving.retrained import Retrained

MADE_BY = "python -m benchmark.removal report"


def pictures_path(report: Path) -> Path:
    """Where the pictures of a report's models are: pictures.npz beside removal.json, which the demo shows."""
    return report.with_name("pictures.npz" if report.stem == "removal" else f"{report.stem}_pictures.npz")


def summarise(plan: Plan, effects: RemovalEffects) -> list[dict[str, Any]]:
    """One row for each method and K of a plan whose models are all there (`whole`): its models, mean and standard error
    of each effect that all of them have, and the excess of each over random removals (`add_excess`).
    """
    groups: dict[tuple[str, int], dict[int, list[Retraining]]] = {}
    for (method, query, count), jobs in plan.items():
        groups.setdefault((method, count), {})[query] = jobs
    rows = []
    for (method, count), by_query in groups.items():
        found = [[effects.of(job, query) for job in jobs] for query, jobs in by_query.items()]
        row: dict[str, Any] = {"method": method, "K": count, "queries": list(by_query)}
        row["models"] = [[job.name for job in jobs] for jobs in by_query.values()]
        rows.append(row | effect_columns(found))
    add_excess(rows)
    return rows


def effect_columns(found: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Mean, standard error and per_query of each effect that all models have; `found` holds, for each query, what
    `RemovalEffects.of` says of each of its models.
    """
    columns: dict[str, Any] = {}
    for key in EFFECTS:
        if all(key in effect for each in found for effect in each):
            values = np.array([[np.mean([effect[key] for effect in each])] for each in found])
            columns[key] = {"mean": float(values.mean()), "standard_error": float(standard_error(values)[0])}
            columns[key]["per_query"] = values[:, 0].tolist()
    return columns


def add_excess(rows: list[dict[str, Any]]) -> None:
    """Puts into each row by how much its effects exceed those of the random removals of the same K and queries, on the
    mean and with a bootstrap interval over queries.
    """
    nulls = {row["K"]: row for row in rows if row["method"] == RANDOM}
    for row in rows:
        null = nulls.get(row["K"], {"queries": ()})
        if row["method"] == RANDOM or row["queries"] != null["queries"]:
            continue
        for key in EFFECTS:
            if key in row and key in null:
                excess = np.subtract(row[key]["per_query"], null[key]["per_query"])
                row[key] |= {"excess": float(excess.mean()), "excess_interval": bootstrap_interval(excess).tolist()}


def effects_of(row: dict[str, Any]) -> set[str]:
    """What was measured of a row's models."""
    return {key for key in EFFECTS if key in row}


@dataclass(frozen=True)
class Earlier:
    """A report that is added to."""

    report: dict[str, Any]
    pictures: Retrained | None
    """Those beside it, if there are any."""

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any]) -> Earlier:
        """That at `path`; `ValueError` if it is damaged, or differs from `identity` in what its numbers rest on."""
        report = load_report(path, identity, MADE_BY)
        try:
            if len(report["queries"]) != len(report["reference_loss"]):
                raise ValueError(f"{path}: expected a reference loss for each query")
            for row in report["rows"]:
                if len(row["models"]) != len(row["queries"]) or not effects_of(row):
                    raise ValueError(f"{path}: expected models of each query and an effect, found none of some")
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a report of {MADE_BY}, found a damaged one ({error})") from error
        beside = pictures_path(path)
        kept = Retrained.load(beside) if beside.is_file() else None
        if kept is not None and len(kept.captions) != len(report["queries"]):
            raise ValueError(
                f"{beside}: expected pictures of the report's {len(report['queries'])} queries, found "
                f"{len(kept.captions)}"
            )
        return cls(report, kept)

    @property
    def reference(self) -> Reference:
        """What its models were compared with."""
        queries, pictures = self.report["queries"], self.pictures
        images = {} if pictures is None else dict(zip(queries, pictures.references, strict=True))
        return Reference(dict(zip(queries, self.report["reference_loss"], strict=True)), images)

    def with_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Its rows and these, the smallest K first: where both have a method and a K, these, unless the same models had
        pictures then and have none now.
        """
        new = {(row["method"], row["K"]): row for row in rows}
        found = []
        for old in self.report["rows"]:
            row = new.pop((old["method"], old["K"]), old)
            same = row["models"] == old["models"]
            found.append(old if same and effects_of(row) < effects_of(old) else row)
        found = sorted([*found, *new.values()], key=lambda row: row["K"])
        add_excess(found)
        return found

    def with_pictures(self, drawn: Retrained, rows: list[dict[str, Any]]) -> Retrained:
        """The pictures of all `rows`, which `with_rows` returned: new ones where `drawn` has them, and its own."""
        old = {(row["method"], row["K"]) for row in self.report["rows"] if row in rows}
        kept = [one for one in self.pictures.removals if (one.method, one.removed) in old] if self.pictures else []
        new = [one for one in drawn.removals if (one.method, one.removed) not in old]
        return replace(drawn, removals=(*kept, *new))


def paired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each two methods and each K the mean difference of their ΔL over the queries, with a bootstrap interval;
    `rows` are those of `summarise`.
    """
    found = []
    for first, second in combinations((row for row in rows if row["method"] != RANDOM), 2):
        if first["K"] != second["K"] or len(first["queries"]) < 2:
            continue
        change = np.subtract(first["delta_loss"]["per_query"], second["delta_loss"]["per_query"])
        pair = {"first": first["method"], "second": second["method"], "K": first["K"], "queries": first["queries"]}
        found.append(pair | {"difference": float(change.mean()), "interval": bootstrap_interval(change).tolist()})
    return found


def removal_line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    cells = (f"{key} {row[key]['mean']:+.4f} ± {row[key]['standard_error']:.4f}" for key in EFFECTS if key in row)
    return f"{row['method']:24s} K = {row['K']:4d}, {len(row['queries'])} queries  " + "  ".join(cells)
