"""Leave-K-out: removes the images that a method finds most influential, retrains, and looks whether the query is lost.

    python -m benchmark.retrain reference --models 4
    python -m benchmark.removal run data/emoji-mini/scores/*.npy --workers 2      # trains the models; resumable
    python -m benchmark.removal run data/emoji-mini/scores/*.npy --dry_run        # how many are missing, hours left
    python -m benchmark.removal report data/emoji-mini/scores/*.npy     # prints the table, writes results/removal/
    python -m benchmark.removal run data/coco/scores/*.npy --mode coco --queries 110 --references 0 --workers 8

For a query ẑ and its K most influential training images the model is trained from scratch without them (paper, section
4.1). Reported: ΔL, the rise of the query's loss over the mean of the reference models, which are trained on everything
(with --references 0 over that of the source model itself, the paper's reference); MSE, the mean squared difference
between the image generated from the query's seed and that of the reference model (pixels in [0, 1]); similarity, the
cosine of the two images in the image encoder's space (1 = the same picture). MSCOCO has ΔL alone without --pipeline.
Random removals are the null; each row also says by how much a method exceeds it, query by query. The smallest K is
trained first for all methods. The report holds the methods and K whose models are all there; with fewer --queries it
needs fewer. The models' pictures are in pictures.npz beside it, for the demo.

The testbed prompts each concept in several sets one after the other, and what such queries lose is much the same; so
there is one query for each concept, of the set that has had fewest so far (`one_per_concept`). MSCOCO's are all judged.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from abu.plan import Collection
from abu.sampler import Sampler
from benchmark.coco import COCO
from benchmark.losses import collection_of
from benchmark.retrain import add_training_flags, models_done, references, train_models
from benchmark.retrainable import Retrainable, add_retrainable_flags, retrainable_from
from benchmark.retrainer import RetrainConfig, Retraining
from benchmark.scores import load_scores
from fastgda.core import ROOT, best_device, command_line, command_parser, environment, load_npz, save_json
from fastgda.dataset import COCO_LEVELS
from fastgda.metrics import bootstrap_interval, standard_error
from fastgda.rankings import top
from feature_extraction.encoders import load_encoder
from serving.retrained import Removal, Retrained

FRACTIONS = (0.004, 0.0085, 0.034, 0.1)
"""K as shares of the training set: the paper's 500, 1,000 and 4,000 of 118,287, and a tenth."""
RANDOM = "random removal"
EFFECTS = ("delta_loss", "mse", "similarity")


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


Plan = dict[tuple[str, int, int], list[Retraining]]
"""(method, query, K) -> the models trained for it."""


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


class Effects:
    """What a removal does to a query, measured on stored models."""

    def __init__(self, testbed: Retrainable, collection: Collection, config: RemovalConfig) -> None:
        self.collection, self.device = collection, best_device()
        self.sampler = testbed.sampler(self.device)
        self.names = EFFECTS[:1] if self.sampler is None else EFFECTS
        """What is measured: ΔL alone where pictures are not wanted."""
        stored = [self._load(job) for job in references(config.references)]
        self.loss = np.mean([arrays["losses_test"] for arrays in stored], axis=0)
        if self.sampler is not None:
            self.encoder = load_encoder(config.encoder, self.device)
            self.images = self._decode(self.sampler, stored[0]["latents_test"])
            self.features = self._features(self.images)

    def of(self, job: Retraining, query: int) -> dict[str, float]:
        """Each effect of `names` of one model for one query."""
        change, image = self._found(job, query)
        found = {"delta_loss": change}
        if image is not None:
            found["mse"] = float(((image - self.images[query]) ** 2).mean())
            found["similarity"] = float(self._features(image[None])[0] @ self.features[query])
        return found

    def drawn(self, plan: Plan, captions: list[str]) -> Retrained:
        """Pictures of the plan's queries by the reference model and, of each removal, by the first of its models;
        `captions` are those of all test queries.
        """
        queries = list(dict.fromkeys(query for _, query, _ in plan))
        removals = []
        for (method, query, count), jobs in plan.items():
            change, image = self._found(jobs[0], query)
            assert image is not None
            removals.append(Removal(queries.index(query), method, count, change, _bytes(image)))
        return Retrained(tuple(captions[query] for query in queries), _bytes(self.images[queries]), tuple(removals))

    def _found(self, job: Retraining, query: int) -> tuple[float, np.ndarray | None]:
        """ΔL and, where pictures are wanted, the image [h, w, 3] of one model for one query."""
        arrays = self._load(job)
        change = float(arrays["losses_test"][query] - self.loss[query])
        if self.sampler is None:
            return change, None
        return change, self._decode(self.sampler, arrays["latents_test"][query : query + 1])[0]

    def _load(self, job: Retraining) -> dict[str, np.ndarray]:
        keys = ("losses_test",) if self.sampler is None else ("losses_test", "latents_test")
        return load_npz(self.collection.path(job), keys, "python -m benchmark.removal run")

    @torch.inference_mode()
    def _decode(self, sampler: Sampler, latents: np.ndarray) -> np.ndarray:
        pixels = sampler.decode(torch.from_numpy(latents).to(self.device))
        return ((pixels + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()

    def _features(self, images: np.ndarray) -> np.ndarray:
        pictures = [Image.fromarray(image) for image in _bytes(images)]
        features = self.encoder.encode(pictures, [""] * len(pictures))
        return features / np.linalg.norm(features, axis=1, keepdims=True)


def _bytes(images: np.ndarray) -> np.ndarray:
    return (255 * images).round().astype(np.uint8)


def summarise(plan: Plan, effects: Effects) -> list[dict[str, Any]]:
    """One row for each method and K of a plan whose models are all there (`whole`): mean and standard error of each
    effect, and its excess over the random removals of the same K with a bootstrap interval over queries.
    """
    groups: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for (method, query, count), jobs in plan.items():
        found = [effects.of(job, query) for job in jobs]
        mean = {key: float(np.mean([effect[key] for effect in found])) for key in effects.names}
        groups.setdefault((method, count), {})[query] = mean
    rows = []
    for (method, count), values in groups.items():
        row: dict[str, Any] = {"method": method, "K": count, "queries": list(values)}
        null = groups.get((RANDOM, count), {})
        for key in effects.names:
            column = np.array([[value[key]] for value in values.values()])
            row[key] = {"mean": float(column.mean()), "standard_error": float(standard_error(column)[0])}
            row[key]["per_query"] = column[:, 0].tolist()
            if method != RANDOM and null:
                excess = column[:, 0] - [null[query][key] for query in values]
                row[key] |= {"excess": float(excess.mean()), "excess_interval": bootstrap_interval(excess).tolist()}
        rows.append(row)
    return rows


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


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    testbed, config = retrainable_from(args), removal_config(args)
    collection = collection_of(testbed, RetrainConfig())
    scores = {path.stem: load_scores(path, testbed, "test") for path in args.scores}
    plan = removal_plan(scores, judged_queries(testbed, config.queries), testbed.images, config)
    if args.what == "run":
        jobs = models_of(plan, config)
        if not args.dry_run:
            train_models(testbed, collection, jobs, args)
        print(models_done(collection, "removals", jobs))
        return
    effects, plan = Effects(testbed, collection, config), whole(plan, collection)
    if not plan:
        raise ValueError(f"{collection.folder}: expected all models of a method and a K, found those of none")
    rows = summarise(plan, effects)
    print(*map(removal_line, rows), sep="\n")
    report = {"mode": testbed.name, "config": asdict(config), "rows": rows, "pairs": paired(rows)}
    save_json(args.output, report | {"environment": environment()})
    if effects.sampler is not None:
        effects.drawn(plan, testbed.query_captions("test")).save(args.output.with_name("pictures.npz"))


if __name__ == "__main__":
    sys.exit(main())
