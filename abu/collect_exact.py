"""Collects exact influence of all queries of a split, in pieces that nothing can lose.

    python -m abu.collect_exact all --split test --dry_run                # time, memory and disk that it will need
    python -m abu.collect_exact all --split test --step 0.01              # every training image
    python -m fastgda.neighbours --ftype effnet --split train             # stage 1: each query's candidates
    python -m abu.collect_exact all --split train --candidates data/emoji/nn_effnet_train.npz --workers 2
    python -m abu.collect_exact all --protocol grid --timesteps 20 --captions 5 --flips     # the paper's for COCO
    python -m abu.collect_exact status --split train
    python -m benchmark.exact_rankings --split train                      # merges into influence_train.pkl or .npz

Stages: `unlearned` moves the weights for each query, `before` takes the losses of the images at θ0, `influence` those
at the moved weights; `all` is the three in turn. Pieces stand under data/emoji/cache/exact_<split>, or in --folder;
what exists is not computed again, and pieces of different settings, models, queries or candidates are never mixed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from abu.candidates import CandidateConfig
from abu.cluster import add_cluster_flags, cluster_from, run_plan, workers_here
from abu.exact_collection import (
    COMMAND,
    ExactCollector,
    ExactConfig,
    ExactPlan,
    PlanConfig,
    exact_plan,
    input_hashes,
)
from abu.exact_estimate import dry_run, require_room
from abu.loss_draws import LossDraws
from abu.plan import Collection
from abu.sweep import SweepConfig
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from abu.unlearn import UnlearnConfig
from fastgda.core import ROOT, command_line, command_parser, load_npz, manifest_path, read_manifest, sha256_file
from fastgda.flags import add_flags, from_flags

PARTS = {
    "unlearning": UnlearnConfig,
    "draws": LossDraws,
    "candidates": CandidateConfig,
    "sweep": SweepConfig,
    "plan": PlanConfig,
}
STILL = 0.5
"""Share of weights left in place above which a step is called too small for the weights' precision."""


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = command_parser(COMMAND, __doc__)
    made.add_argument("stage", choices=("all", "unlearned", "before", "influence", "status"))
    add_testbed_flags(made)
    made.add_argument("--split", choices=SPLITS, default="test", help="which queries (default: test)")
    for part in PARTS.values():
        add_flags(made, part)
    made.add_argument("--folder", type=Path, help="folder of the pieces (default: cache/exact_<split> beside the data)")
    add_cluster_flags(made)
    made.add_argument("--dry_run", action="store_true", help="print the time, memory and disk needed; store nothing")
    return made


def config_from(args: argparse.Namespace) -> ExactConfig:
    """The settings that the flags say."""
    return ExactConfig(split=args.split, **{name: from_flags(part, args) for name, part in PARTS.items()})


def folder_of(testbed: Testbed, split: str, folder: Path | None = None) -> Path:
    """Where the pieces of a split's queries are kept."""
    return folder or testbed.data / f"cache/exact_{split}"


def recorded_config(testbed: Testbed, collection: Collection, candidates: Path | None = None) -> ExactConfig:
    """The settings that the folder's pieces are made with; `candidates` says where that file is if it has been moved.

    `ValueError` naming the file of the candidates if it is missing or not the one that the pieces were made for.
    """
    manifest = read_manifest(collection.folder)
    config = ExactConfig.of(manifest["config"])
    named = config.candidates.candidates
    if named is None:
        return config
    # outside the repository a manifest keeps no more than the name
    places = [candidates] if candidates else [ROOT / named, testbed.data / named.name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(
            f"{places[0]}: expected the candidates of {collection.folder}, found nothing; say where with --candidates"
        )
    if sha256_file(path) not in manifest["inputs"].values():
        raise ValueError(f"{path}: expected the candidates that {collection.folder} was made for, found others")
    return replace(config, candidates=replace(config.candidates, candidates=path))


def print_status(collection: Collection, plan: ExactPlan) -> None:
    """What is done, the rate, the time left, and what failed."""
    for stage, pieces in plan.stages().items():
        print(collection.status(stage, pieces))
    for name, error in collection.failures().items():
        print(f"failed: {name}: {error}")


def require_done(collection: Collection, plan: ExactPlan, stage: str) -> None:
    """`ValueError` unless the stages that `stage` reads are whole."""
    if stage != "influence":
        return
    for name in ("unlearned", "before"):
        pieces = plan.stages()[name]
        found = len(pieces) - len(collection.missing(pieces))
        if found < len(pieces):
            raise ValueError(
                f"{collection.folder}: expected {len(pieces)} pieces of the stage {name}, found {found}; "
                f"make them with: {COMMAND} {name}"
            )


def warn_of_still_weights(collection: Collection, plan: ExactPlan) -> None:
    """Says for how many queries the step is too small for the precision of the weights."""
    shares = [float(load_npz(collection.path(piece), ("still",), COMMAND)["still"]) for piece in plan.unlearned()]
    many = [share for share in shares if share > STILL]
    if many:
        print(
            f"warning: {len(many)} of {len(shares)} queries leave more than half of the weights as they are (at most "
            f"{max(many):.0%}): the step is lost in their rounding; take a larger --step",
            file=sys.stderr,
        )


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    testbed, config = testbed_from(args), config_from(args)
    collection = Collection(folder_of(testbed, args.split, args.folder))
    if args.stage == "status" and manifest_path(collection.folder).is_file():
        config = recorded_config(testbed, collection, args.candidates)
    plan = exact_plan(testbed, config)
    if args.stage == "status":
        print_status(collection, plan)
        return
    build = partial(ExactCollector, testbed, config, collection.folder)
    cluster = cluster_from(args)
    workers = cluster.workers if cluster else 1
    collector, inputs = build(), input_hashes(testbed, config)
    collection.check(config.flat(), inputs)
    if args.dry_run:
        print(dry_run(collector, workers, here=workers_here(cluster)))
        return
    require_room(collector, workers, here=workers_here(cluster))
    collection.claim(config.flat(), inputs, COMMAND)
    for stage, pieces in plan.stages().items():
        if args.stage not in ("all", stage):
            continue
        require_done(collection, plan, stage)
        run_plan(build if cluster else lambda: collector, collection, pieces, cluster, unit=stage)
        if stage == "unlearned":
            warn_of_still_weights(collection, plan)


if __name__ == "__main__":
    sys.exit(main())
