"""Leave-K-out: removes the images that a method finds most influential, retrains, and looks whether the query is lost.

    python -m benchmark.retrain reference --models 4
    python -m benchmark.removal run data/emoji-mini/scores/*.npy --workers 2      # trains the models; resumable
    python -m benchmark.removal run data/emoji-mini/scores/*.npy --dry_run        # how many are missing, hours left
    python -m benchmark.removal report data/emoji-mini/scores/*.npy     # prints the table, writes results/removal/
    python -m benchmark.removal report data/emoji-mini/scores/mine.npy --add      # keeps what the report has of others
    python -m benchmark.removal run data/coco/scores/*.npy --mode coco --queries 110 --references 0 --workers 8

For a query ẑ and its K most influential training images the model is trained from scratch without them (paper, section
4.1). Reported: ΔL, the rise of the query's loss over the mean of the reference models, which are trained on everything
(with --references 0 over that of the source model itself, the paper's reference); MSE, the mean squared difference
between the image generated from the query's seed and that of the reference model (pixels in [0, 1]); similarity, the
cosine of the two images in the image encoder's space (1 = the same picture). MSCOCO has ΔL alone without --pipeline.
Random removals are the null; each row also says by how much a method exceeds it, query by query. The smallest K is
trained first for all methods. The report holds the methods and K whose models are all there; with fewer --queries it
needs fewer. The models' pictures are in pictures.npz beside it, for the demo; those of a report that is not called
removal.json in <name>_pictures.npz.

Models that `benchmark.retrain restore` brought back count as trained and say what ΔL is, but have no pictures. With
--add the report keeps its rows of other methods, and of the same models where their pictures are no longer there; new
models are compared with the reference that it was made with. One of another model, recipe, data or configuration is
refused.

The testbed prompts each concept in several sets one after the other, and what such queries lose is much the same; so
there is one query for each concept, of the set that has had fewest so far (`one_per_concept`). MSCOCO's are all judged.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abu.plan import Collection
from benchmark.coco import COCO
from benchmark.losses import CachedLosses, collection_of
from benchmark.removal_effects import RANDOM, Plan, RemovalEffects
from benchmark.removal_report import Earlier, paired, pictures_path, removal_line, summarise
from benchmark.reports import add_add_flag, foundation
from benchmark.retrain import add_training_flags, models_done, references, train_models
from benchmark.retrainable import Retrainable, add_retrainable_flags, retrainable_from
from benchmark.retrainer import RetrainConfig, Retraining
from benchmark.scores import by_method, load_scores
from fastgda.core import ROOT, command_line, command_parser, environment, save_json
from fastgda.dataset import COCO_LEVELS
from fastgda.rankings import top

FRACTIONS = (0.004, 0.0085, 0.034, 0.1)
"""K as shares of the training set: the paper's 500, 1,000 and 4,000 of 118,287, and a tenth."""


@dataclass(frozen=True)
class RemovalConfig:
    """Which removals are compared."""

    queries: int = 20
    """One test query for each of the first so many concepts."""
    seeds: int = 1
    """Models trained for each removal."""
    references: int = 4
    """Models trained on everything, whose mean is the reference; 0 for the source model itself."""
    null: int = 4
    """Random removals for each K, judged by every query."""
    levels: tuple[int, ...] = ()
    """Values of K; by default the paper's for MSCOCO, `FRACTIONS` of the training set otherwise."""
    encoder: str = "effnet"
    """Image encoder of the similarity: "effnet", or "clip" and others where their weights are."""

    def __post_init__(self) -> None:
        if min(self.queries, self.seeds) < 1 or min(self.references, self.null) < 0:
            raise ValueError(
                "--queries, --seeds: expected at least 1; --references, --null: at least 0; found "
                f"{self.queries}, {self.seeds}, {self.references} and {self.null}"
            )

    def levels_for(self, images: int) -> tuple[int, ...]:
        """The values of K, ascending; `ValueError` if one leaves nothing to train on."""
        levels = tuple(sorted(self.levels or levels_of(images)))
        if not 0 < levels[0] <= levels[-1] < images:
            raise ValueError(f"--levels: expected to remove 1 to {images - 1} of {images} images, found {levels}")
        return levels


def levels_of(images: int) -> tuple[int, ...]:
    """The values of K for a training set."""
    return tuple(max(1, round(share * images)) for share in FRACTIONS)


def removed_by(scores: np.ndarray, query: int, count: int) -> tuple[int, ...]:
    """Ids, ascending, of the `count` images that `scores` [Q, N] rank first for `query`."""
    return tuple(int(i) for i in np.sort(top(scores[query : query + 1], count)[0]))


def random_removal(images: int, count: int, draw: int) -> tuple[int, ...]:
    """The null: `count` random ids, ascending; the same for every query, so that its models serve all of them."""
    random = np.random.default_rng([count, draw])
    return tuple(int(i) for i in np.sort(random.choice(images, count, replace=False)))


def one_per_concept(concepts: list[str], sets: list[str]) -> list[int]:
    """One row for each concept, in the order of their first rows: the first one whose set has been taken least often so
    far, so that all sets appear among few queries. Both arguments are columns of a split's queries.
    """
    rows: dict[str, list[int]] = {}
    for row, concept in enumerate(concepts):
        rows.setdefault(concept, []).append(row)
    taken, chosen = Counter[str](), []
    for candidates in rows.values():
        chosen.append(min(candidates, key=lambda row: taken[sets[row]]))
        taken[sets[chosen[-1]]] += 1
    return chosen


def judged_queries(testbed: Retrainable, count: int | None = None) -> list[int]:
    """Numbers of the test queries that stand for the first `count` concepts (default: all); `ValueError` if there are
    not so many.
    """
    chosen = one_per_concept(testbed.query_concepts("test"), testbed.query_sets("test"))
    if count is not None and not 1 <= count <= len(chosen):
        raise ValueError(f"--queries: expected 1 to {len(chosen)}, the concepts of the test queries, found {count}")
    return chosen[:count]


def removal_plan(scores: dict[str, np.ndarray], queries: list[int], images: int, config: RemovalConfig) -> Plan:
    """All models that the comparison needs for these queries, the smallest K first."""
    plan: Plan = {}
    for count in config.levels_for(images):
        null = [random_removal(images, count, draw) for draw in range(config.null)]
        for query in queries:
            if null:
                plan[RANDOM, query, count] = [Retraining(ids, seed) for ids in null for seed in range(config.seeds)]
            for method, array in scores.items():
                ids = removed_by(array, query, count)
                plan[method, query, count] = [Retraining(ids, seed) for seed in range(config.seeds)]
    return plan


def whole(plan: Plan, collection: Collection) -> Plan:
    """The methods and K of a plan whose models are all there.

    A part of the queries does not count: a method that was never trained for shares models with others on easy ones.
    """
    lacking = {(method, count) for (method, _, count), jobs in plan.items() if collection.missing(jobs)}
    return {key: jobs for key, jobs in plan.items() if (key[0], key[2]) not in lacking}


def models_of(plan: Plan, config: RemovalConfig) -> list[Retraining]:
    """The models of a plan in the order of training, each once: references first, then the smallest K."""
    return list(dict.fromkeys([*references(config.references), *(job for group in plan.values() for job in group)]))


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = command_parser("python -m benchmark.removal", __doc__)
    made.add_argument("what", choices=("run", "report"))
    made.add_argument("scores", type=Path, nargs="+", help="arrays [Q, N] of a method, higher = more influential")
    add_retrainable_flags(made)
    add_removal_flags(made)
    made.add_argument("--output", type=Path, default=ROOT / "results/removal/removal.json")
    add_training_flags(made)
    made.add_argument("--dry_run", action="store_true", help="count the models that are missing; train none")
    add_add_flag(made)
    return made


def add_removal_flags(made: argparse.ArgumentParser) -> None:
    """Flags that say which removals are compared."""
    default = RemovalConfig()
    made.add_argument("--queries", type=int, default=default.queries, help="test queries, one for each concept")
    made.add_argument("--seeds", type=int, default=default.seeds, help="models trained for each removal")
    made.add_argument("--null", type=int, default=default.null, help="random removals for each K")
    made.add_argument(
        "--references", type=int, default=default.references, help="models trained on everything; 0: the source model"
    )
    made.add_argument(
        "--levels",
        type=int,
        nargs="+",
        default=(),
        help="values of K (default: 0.4 to 10 %% of the images; coco: 500 1000 4000)",
    )
    made.add_argument("--encoder", default=default.encoder, help="image encoder of the similarity (default: effnet)")


def removal_config(args: argparse.Namespace) -> RemovalConfig:
    """What `add_removal_flags` read."""
    levels = tuple(args.levels) or (COCO_LEVELS if args.mode == COCO else ())
    return RemovalConfig(args.queries, args.seeds, args.references, args.null, levels, args.encoder)


def report_foundation(testbed: Retrainable, queries: list[int], config: RemovalConfig) -> dict[str, Any]:
    """What the numbers of a report rest on; its K are those of its rows."""
    compared = asdict(config)
    del compared["levels"]
    rests_on = {"mode": testbed.name, "config": compared, "queries": queries}
    return rests_on | foundation(CachedLosses(testbed), "test")


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    testbed, config = retrainable_from(args), removal_config(args)
    collection = collection_of(testbed, RetrainConfig())
    scores = {name: load_scores(path, testbed, "test") for name, path in by_method(args.scores).items()}
    queries = judged_queries(testbed, config.queries)
    plan = removal_plan(scores, queries, testbed.images, config)
    if args.what == "run":
        jobs = models_of(plan, config)
        if not args.dry_run:
            train_models(testbed, collection, jobs, args)
        print(models_done(collection, "removals", jobs))
        return
    rests_on = report_foundation(testbed, queries, config)
    earlier = Earlier.load(args.output, rests_on) if args.add else None
    reference = None if earlier is None else earlier.reference
    effects = RemovalEffects(testbed, collection, queries, config.references, config.encoder, reference)
    plan = whole(plan, collection)
    if not plan:
        raise ValueError(f"{collection.folder}: expected all models of a method and a K, found those of none")
    rows = summarise(plan, effects)
    print(*map(removal_line, rows), sep="\n")
    pictured = {(row["method"], row["K"]) for row in rows if "mse" in row}
    plan = {key: jobs for key, jobs in plan.items() if (key[0], key[2]) in pictured}
    drawn = effects.drawn(plan, testbed.query_captions("test")) if effects.sampler is not None else None
    if earlier is not None:
        rows = earlier.with_rows(rows)
        drawn = earlier.with_pictures(drawn, rows) if drawn is not None else None
    if drawn is not None:
        drawn.save(pictures_path(args.output))
    compared = {"reference_loss": [effects.reference.loss[query] for query in queries]}
    report = rests_on | compared | {"rows": rows, "pairs": paired(rows), "environment": environment()}
    save_json(args.output, report)


if __name__ == "__main__":
    sys.exit(main())
