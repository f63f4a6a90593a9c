"""Collects the teacher's scores of all queries, in pieces that nothing can lose.

    python -m abu.collect curvature                    # EK-FAC factors of the source model; 2 minutes on two cores
    python -m abu.collect queries                      # gradients of every query
    python -m abu.collect steps                        # loss change after a finite step, one pass; --passes: several
    python -m abu.collect training --dry_run           # time, memory and disk that a pass will need
    python -m abu.collect training                     # one pass over the training set; --passes: several
    python -m abu.collect training --workers 4         # on four Ray workers; --address: on a running cluster
    python -m abu.collect scores                       # every query with every image, from all passes there are
    python -m abu.collect scores --query_bits 16 --memory_gb 36    # in 15 GB of memory, nothing on disk
    python -m abu.collect training --measure square    # D-TRAK's gradients, in a folder of their own
    python -m abu.collect status                       # what is done, what failed, the time left
    python -m benchmark.teacher                        # merges the scores into influence_{train,val,test}.npz

There are two ways from the queries' gradients to scores. `steps` scores every query with both terms of the loss change
as it goes (`abu.second_order`): the teacher of the testbed. `training` keeps the mean gradients of the training images,
and `scores` multiplies them with any queries: the first order alone, for steps that are infinitely small.

Each piece is written whole under data/emoji/cache/teacher; what exists is not computed again, and pieces of different
settings, models or queries are never mixed. Their numbers do not depend on order, workers or kills, but for float32's
rounding where a worker has another number of threads. Passes differ in their noise only: more of them make the teacher
more reliable. They keep gradients and not scores, so that new queries, or another curvature, cost no new pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from abu.cluster import Worker, add_cluster_flags, cluster_from, run_plan, workers_here
from abu.collect_config import CollectConfig, MeasuredConfig, ScoreConfig, Settings, StepConfig
from abu.collectors import GradientCollector, ScoreCollector, StepCollector
from abu.estimate import estimate
from abu.fisher import CurvatureConfig, fit_testbed
from abu.measures import MEASURES
from abu.plan import Collection, Piece
from abu.room import piece_bytes, require_disk, require_step_memory
from abu.stages import (
    claim_of,
    folder_of,
    query_plan,
    score_plan,
    scores_folder,
    started_passes,
    step_plan,
    steps_folder,
    training_plan,
    whole_passes,
)
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from abu.tiles import MEMORY_GB
from fastgda.core import best_device, command_line, command_parser

SHOWN = 10
"""Failures that status prints."""


def print_status(testbed: Testbed, measure: str = "loss") -> None:
    """What is done, the rate, the time left, and what failed."""
    collection, scores = Collection(folder_of(testbed, measure)), Collection(scores_folder(testbed, measure))
    print(collection.status("queries", query_plan(testbed)))
    for index in started_passes(collection.folder):
        print(collection.status(f"pass {index}", training_plan(testbed, range(index, index + 1))))
    steps = Collection(steps_folder(testbed))
    for index in started_passes(steps.folder, "step"):
        print(steps.status(f"steps, pass {index}", step_plan(testbed, range(index, index + 1))))
    for passes in sorted({int(path.name.split("_")[1]) for path in scores.folder.glob("scores_*.npz")}):
        print(scores.status(f"scores of {passes} passes", score_plan(testbed, passes)))
    failures = collection.failures() | steps.failures() | scores.failures()
    for name, error in list(failures.items())[:SHOWN]:
        print(f"failed: {name}: {error}")
    if len(failures) > SHOWN:
        print(f"failed: {len(failures) - SHOWN} more; see failed.jsonl in {collection.folder}")


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = command_parser(
        "python -m abu.collect",
        "Collects the teacher's scores of all queries, in pieces that nothing can lose.",
        epilog="example: python -m abu.collect training --passes 4 --workers 2",
    )
    made.add_argument("stage", choices=("curvature", "queries", "steps", "training", "scores", "status"))
    add_testbed_flags(made)
    made.add_argument("--first_pass", type=int, default=0, help="number of the first pass; each has its own draws")
    made.add_argument("--passes", type=int, help="passes over the training set (default: 1; of scores: all there are)")
    made.add_argument(
        "--sketch", type=int, default=ScoreConfig.sketch, help="numbers that scores keep of a gradient (default: all)"
    )
    made.add_argument("--measure", choices=MEASURES, default="loss", help="what is differentiated (default: loss)")
    made.add_argument(
        "--fold", type=int, default=StepConfig.fold, help="of steps: numbers of a gradient added to one for squares"
    )
    made.add_argument(
        "--memory_gb", type=float, default=MEMORY_GB, help="of scores: memory for the queries' gradients (default: 4)"
    )
    made.add_argument(
        "--query_bits",
        type=int,
        choices=(8, 16, 32),
        default=32,
        help="of scores and steps: bits of a query's numbers; 16 is fastest where the processor has bfloat16",
    )
    made.add_argument("--no_growth", action="store_true", help="of scores: compare the runs with all passes only")
    made.add_argument("--bf16", action="store_true", help="gradients under bfloat16 autocast")
    add_cluster_flags(made)
    made.add_argument("--dry_run", action="store_true", help="print the time, memory and disk needed; compute nothing")
    return made


def planned(args: argparse.Namespace, testbed: Testbed) -> tuple[Settings, list[Piece], Callable[[], Worker]]:
    """(settings, pieces, what builds a worker for them) of the stage that the flags ask for."""
    for name, least in (("passes", 1), ("first_pass", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected at least {least}, found {value}")
    passes = range(args.first_pass, args.first_pass + (args.passes or 1))
    if args.stage == "scores":
        scoring = ScoreConfig(args.sketch, growth=not args.no_growth, query_bits=args.query_bits)
        pieces = score_plan(testbed, whole_passes(testbed, args.measure, args.passes))
        return scoring, pieces, partial(ScoreCollector, testbed, scoring, args.measure, args.memory_gb)
    if args.stage == "steps":
        step = StepConfig(fold=args.fold, query_bits=args.query_bits)
        return step, step_plan(testbed, passes), partial(StepCollector, testbed, step)
    config = CollectConfig(bf16=args.bf16)
    if args.measure != "loss":
        config = MeasuredConfig(bf16=args.bf16, measure=args.measure)
    pieces = query_plan(testbed) if args.stage == "queries" else training_plan(testbed, passes)
    return config, pieces, partial(GradientCollector, testbed, config)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    if args.stage == "steps" and args.measure != "loss":
        raise ValueError(f"--measure: expected loss for steps, found {args.measure}")
    testbed = testbed_from(args)
    if args.stage == "curvature":
        fit_testbed(testbed, testbed.load_source(best_device()), CurvatureConfig(), testbed.curvature)
        return
    if args.stage == "status":
        print_status(testbed, args.measure)
        return
    cluster = cluster_from(args)
    config, pieces, build = planned(args, testbed)
    claim = claim_of(testbed, config, args.measure)
    claim.check()
    if isinstance(config, StepConfig):
        require_step_memory(testbed, config, workers_here(cluster))
    collection = claim.collection
    if args.dry_run:
        print(estimate(build(), collection, pieces, args.workers or 1, here=workers_here(cluster)))
        return
    require_disk(collection.folder, piece_bytes(testbed, config, collection.missing(pieces)))
    claim.write()
    run_plan(build, collection, pieces, cluster)


if __name__ == "__main__":
    sys.exit(main())
