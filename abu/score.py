"""Scores training pictures of any source model for queries: by an expansion of the loss change, or the exact one.

    python -m abu.score --source data/coco/model.bin --trainset data/coco/trainset --curvature data/coco/ekfac_fisher \\
        --queries data/coco/query_test --output scores.npz --query 0 1 2 --stop 1000
    python -m abu.score --source sd-v1-4/ --trainset laion-encoded --curvature sd-ekfac --queries generated \\
        --settings stable-diffusion --output scores.npz --change exact --protocol grid --candidates neighbours.npz \\
        --k 100000 --subset 0.2 --dry_run
    python -m abu.score … --workers 4                  # on four Ray workers; --address: on a running cluster
    python -m abu.score … --status                     # what is done, what failed, the time left

`--trainset` and `--queries` are folders that abu.encode_pictures wrote (or the released ones), `--curvature` what
abu.fisher fit wrote for the same source. A picture's loss is averaged over timesteps and its captions; of its
unflipped and flipped view the larger score counts. To first or second order in the step, one pass over the pictures
serves a --tile of queries; exact, each pair costs its own losses.

Pieces stand in --folder; what exists is not computed again, and pieces of different settings or inputs are never mixed.
At the end they are merged into --output: influence [Q, K], higher is more influential, of the training pictures
ids [K], or with --candidates ids [Q, K], for the queries [Q].
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from abu.candidates import CandidateConfig
from abu.cluster import add_cluster_flags, cluster_from, run_stages, workers_here
from abu.collect_exact import print_status, warn_of_still_weights
from abu.plan import Collection
from abu.score_collection import COMMAND, ScoreCollector, ScoreInputs, ScoreJob, input_hashes, merged
from abu.score_config import CutConfig, ScoreConfig
from abu.score_estimate import dry_run, require_room
from fastgda.core import command_line, command_parser, save_npz, write_manifest
from fastgda.flags import add_flags, from_flags


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = command_parser(COMMAND, __doc__)
    made.add_argument("--source", required=True, help="COCO's model.bin, or a pipeline of diffusers")
    made.add_argument("--trainset", type=Path, required=True, help="folder of the encoded training pictures")
    made.add_argument("--queries", type=Path, required=True, help="folder of the encoded queries")
    made.add_argument("--query", type=int, nargs="+", help="numbers of the queries (default: all)")
    made.add_argument("--curvature", type=Path, required=True, help="folder of the factors")
    made.add_argument("--output", type=Path, required=True, help="the .npz file")
    made.add_argument("--folder", type=Path, help="folder of the pieces (default: OUTPUT_pieces beside the output)")
    made.add_argument("--top", type=int, default=10, help="training pictures to print (default: %(default)s)")
    for part in (ScoreConfig, CandidateConfig, CutConfig):
        add_flags(made, part)
    add_cluster_flags(made)
    made.add_argument("--dry_run", action="store_true", help="print the time, memory and disk needed; store nothing")
    made.add_argument("--status", action="store_true", help="print what is done, the rate and the time left")
    return made


def job_from(args: argparse.Namespace) -> ScoreJob:
    """What the flags say, with whole paths: workers may run elsewhere."""
    folder = args.folder or args.output.with_name(f"{args.output.stem}_pieces")
    candidates = from_flags(CandidateConfig, args)
    if candidates.candidates is not None:
        candidates = replace(candidates, candidates=candidates.candidates.resolve())
    return ScoreJob(
        str(Path(args.source).resolve()) if Path(args.source).exists() else args.source,
        args.trainset.resolve(),
        args.queries.resolve(),
        args.curvature.resolve(),
        folder.resolve(),
        tuple(args.query) if args.query else None,
        from_flags(ScoreConfig, args),
        candidates,
        from_flags(CutConfig, args),
    )


def print_top(query: list[int], influence: np.ndarray, ids: np.ndarray, top: int) -> None:
    """The most influential pictures of each query."""
    for number, row, pictures in zip(query, influence, np.broadcast_to(ids, influence.shape), strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        print(f"query {number}:", *(f"{pictures[place]} ({row[place]:+.2e})" for place in best))


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    job = job_from(args)
    inputs, collection = ScoreInputs.of(job), Collection(job.folder)
    plan, cluster = inputs.plan, cluster_from(args)
    if args.status:
        print_status(collection, plan)
        return
    settings, hashes = inputs.manifest(job), input_hashes(job)
    collection.check(settings, hashes)
    workers, here = cluster.workers if cluster else 1, workers_here(cluster)
    if args.dry_run:
        print(dry_run(ScoreCollector(job), workers, cluster.threads if cluster else None, here=here))
        return
    if any(collection.missing(pieces) for pieces in plan.stages().values()):
        # The driver of a cluster only checks what it is given: the accelerator is its workers'.
        collector = ScoreCollector(job, torch.device("cpu") if cluster else None)
        require_room(collector, workers, here=here)
        collection.claim(settings, hashes, COMMAND)
        build = partial(ScoreCollector, job) if cluster else lambda: collector
        run_stages(build, collection, plan.stages(), cluster)
    if job.config.change == "exact":
        warn_of_still_weights(collection, plan)
    influence = merged(collection, plan)
    ids = plan.lists[0] if plan.shared else plan.lists
    save_npz(args.output, compress=False, influence=influence, ids=ids, queries=np.array(inputs.query))
    write_manifest(args.output, settings, command=COMMAND, inputs=hashes)
    print_top(inputs.query, influence, ids, args.top)


if __name__ == "__main__":
    sys.exit(main())
