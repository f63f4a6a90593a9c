"""Leaderboard: drop in a score file, get its LDS, leave-K-out and mAP against the teacher.

    python -m benchmark.leaderboard scores.npy                        # from what is stored: a few seconds
    python -m benchmark.leaderboard scores.npy --retrain --workers 2  # trains the models that leave-K-out wants
    python -m benchmark.leaderboard                                   # prints the board

scores.npy holds [Q, N], rows = test queries, columns = training images, higher = more influential (`benchmark.scores`
says what else a file may hold). Without --retrain the effect of removing a query's top K is that of the stored removal
of K images which shares most images with it; the share is reported, and says how much the number is worth. Results go
to results/leaderboard/<name>.json; the board shows those that rest on the same models, data, recipe and flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abu.plan import Collection
from benchmark.lds import Judge, lds_line
from benchmark.losses import collection_of
from benchmark.removal import (
    RemovalConfig,
    add_removal_flags,
    judged_queries,
    models_of,
    removal_config,
    removal_plan,
    removed_by,
)
from benchmark.removal_effects import RemovalEffects
from benchmark.removal_report import effect_columns, summarise
from benchmark.retrain import add_training_flags, train_models
from benchmark.retrainable import Retrainable, add_retrainable_flags, retrainable_from
from benchmark.retrainer import RetrainConfig, Retraining
from benchmark.scores import by_method, load_scores
from fastgda.core import (
    ROOT,
    command_line,
    command_parser,
    environment,
    first_difference,
    load_npz,
    save_json,
    sha256_file,
)
from fastgda.dataset import default_levels, layout
from fastgda.metrics import bootstrap_interval, score_retrieval
from fastgda.rankings import load_rankings

BOARD = "results/leaderboard"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredRemovals:
    """The retrainings without K images that are on disk."""

    jobs: list[Retraining]
    members: np.ndarray
    """Which images each lacks, bool [models, N]."""

    @staticmethod
    def of(collection: Collection, count: int, images: int) -> StoredRemovals:
        """All that lack `count` images, in the order of their names."""
        jobs, rows = [], []
        for path in sorted(collection.folder.glob(f"without_{count:05d}_*_seed_*.npz")):
            removed = load_npz(path, ("removed",))["removed"]
            jobs.append(Retraining(tuple(removed.tolist()), int(path.stem.rsplit("_", 1)[1])))
            rows.append(np.isin(np.arange(images), removed))
        return StoredRemovals(jobs, np.stack(rows) if rows else np.zeros((0, images), bool))

    def nearest(self, removed: tuple[int, ...]) -> tuple[list[Retraining], float]:
        """(the seeds of the removal that shares most images with `removed`, the share)."""
        shared = self.members[:, list(removed)].mean(1)
        best = self.jobs[int(shared.argmax())].removed
        return [job for job in self.jobs if job.removed == best], float(shared.max())


def nearest_effects(
    scores: np.ndarray, queries: list[int], collection: Collection, effects: RemovalEffects, config: RemovalConfig
) -> list[dict[str, Any]]:
    """A row for each K: effects of the stored removals nearest to each query's top K, and the share of its images."""
    rows: list[dict[str, Any]] = []
    for count in config.levels_for(scores.shape[1]):
        stored = StoredRemovals.of(collection, count, scores.shape[1])
        if not stored.jobs:
            continue
        found = [stored.nearest(removed_by(scores, query, count)) for query in queries]
        row: dict[str, Any] = {"K": count, "queries": queries, "shared": float(np.mean([share for _, share in found]))}
        each = [[effects.of(job, query) for job in jobs] for (jobs, _), query in zip(found, queries, strict=True)]
        rows.append(row | effect_columns(each))
    return rows


def retrieval(testbed: Retrainable, scores: np.ndarray) -> dict[str, Any] | None:
    """mAP(L) against the teacher's rankings of the test queries; `None` where there are none."""
    path = layout(testbed.layout, "", testbed.data).ranking("test")
    if not path.is_file():
        return None
    truth = load_rankings(path, scores.shape[1])
    if truth.queries != len(scores):
        raise ValueError(f"{path}: expected rankings of {len(scores)} test queries, found {truth.queries}")
    levels = default_levels(testbed.layout, scores.shape[1])
    found = score_retrieval(scores, truth, levels)
    concepts = testbed.query_concepts("test")
    keys = list(map(str, levels))
    return {
        "mAP": dict(zip(keys, found.precision.mean(0).tolist(), strict=True)),
        "interval": dict(zip(keys, bootstrap_interval(found.precision, concepts).T.tolist(), strict=True)),
    }


def judge_file(path: Path, testbed: Retrainable, args: argparse.Namespace) -> dict[str, Any]:
    """All that the stored models say of a score file, or new ones with `args.retrain`."""
    scores, config = load_scores(path, testbed, "test"), removal_config(args)
    collection, queries = collection_of(testbed, RetrainConfig()), judged_queries(testbed, config.queries)
    judge = Judge(testbed, "test", args.models)
    row: dict[str, Any] = {"method": path.stem, "scores": sha256_file(path)} | board_foundation(judge, config)
    row |= judge(scores) | {"ceiling": judge.ceiling(), "retrieval": retrieval(testbed, scores)}
    if args.retrain:
        plan = removal_plan({path.stem: scores}, queries, testbed.images, config)
        train_models(testbed, collection, models_of(plan, config), args)
    effects = RemovalEffects(testbed, collection, queries, config.references, config.encoder)
    if args.retrain:
        rows = summarise(plan, effects)
        removals = [found | {"shared": 1.0} for found in rows if found["method"] == path.stem]
    else:
        removals = nearest_effects(scores, queries, collection, effects, config)
    return row | {"removals": removals, "environment": environment()}


def board_foundation(judge: Judge, config: RemovalConfig) -> dict[str, Any]:
    """What the numbers of a row rest on: those of other rows can be compared with them only if it is the same."""
    return judge.foundation | {"config": asdict(config)}


def read_board(board: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a board that rest on the same, `wanted`; of the others a warning says what differs."""
    rows = []
    for path in sorted(board.glob("*.json")):
        try:
            row = json.loads(path.read_text())
            found = {key: row.get(key) for key in wanted}
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a row of the leaderboard, found a damaged one ({error})") from error
        if (difference := first_difference(json.loads(json.dumps(wanted)), found, path.stem)) is None:
            rows.append(row)
        else:
            log.warning("%s: left out, as it cannot be compared: %s", path, difference)
    return rows


def board_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The board, the best LDS first."""
    lines = []
    for row in sorted(rows, key=lambda row: -row["lds"]):
        cells = [f"K = {r['K']}: ΔL {r['delta_loss']['mean']:+.4f} ({r['shared']:.0%})" for r in row["removals"]]
        cells += [f"mAP({level}) {value:.3f}" for level, value in (row["retrieval"] or {"mAP": {}})["mAP"].items()]
        lines.append("  ".join([lds_line(row["method"], row), *cells]))
    return lines


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.leaderboard", __doc__)
    parser.add_argument("scores", type=Path, nargs="*", help="score files [Q, N]; none: print the board")
    add_retrainable_flags(parser)
    parser.add_argument("--models", type=int, default=64, help="models trained on halves (default: 64)")
    parser.add_argument("--retrain", action="store_true", help="train what leave-K-out wants, not the nearest stored")
    add_removal_flags(parser)
    parser.add_argument("--board", type=Path, default=ROOT / BOARD, help="folder of the results")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    testbed = retrainable_from(args)
    for name, path in by_method(args.scores).items():
        save_json(args.board / f"{name}.json", judge_file(path, testbed, args))
    wanted = board_foundation(Judge(testbed, "test", args.models), removal_config(args))
    rows = read_board(args.board, wanted)
    if not rows:
        raise ValueError(f"{args.board}: expected results of {testbed.name}, found none; name a score file")
    print(*board_lines(rows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
