"""Reports of judges: JSON with a row for each method, to which rows of further methods are added.

The environment that a report names is that of its last addition; what it rests on is the same for all rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmark.losses import Losses
from fastgda.core import first_difference, require_file


def foundation(stored: Losses, split: str) -> dict[str, Any]:
    """What numbers about the queries of a split rest on, whatever is measured: the model, its data and its recipe."""
    return {"inputs": stored.made_from(split), "recipe": stored.recipe}


def load_report(path: Path, rests_on: dict[str, Any], made_by: str) -> dict[str, Any]:
    """The report at `path`, which `made_by` wrote; `ValueError` naming what is missing or damaged, or the first place
    where it rests on something else than `rests_on`.
    """
    try:
        report = json.loads(require_file(path, f"{made_by} without --add").read_text())
        found = {key: report[key] for key in rests_on}
        if not all(isinstance(row["method"], str) for row in report["rows"]):
            raise TypeError("a method without a name")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a report of {made_by}, found a damaged one ({error})") from error
    for key, wanted in json.loads(json.dumps(rests_on)).items():
        if (difference := first_difference(wanted, found[key], key)) is not None:
            raise ValueError(f"{path}: expected a report of the same, found another: {difference}")
    return report


def with_rows(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The earlier rows and these, one for each method: these stand in the place of earlier ones, the others follow."""
    return list({row["method"]: row for row in [*earlier, *rows]}.values())


def add_add_flag(parser: argparse.ArgumentParser) -> None:
    """`--add`."""
    parser.add_argument(
        "--add", action="store_true", help="keep the other methods' rows of the report at --output (default: replace)"
    )
