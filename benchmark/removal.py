"""Leave-K-out: removes the images that a method finds most influential, retrains, and looks whether the query is lost.

    python -m benchmark.retrain reference --models 4
    python -m benchmark.removal run scores/*.npy           # trains the models; resumable
    python -m benchmark.removal report scores/*.npy        # prints the table, writes results/removal/

For a query ẑ and its K most influential training images the model is trained from scratch without them (paper, section
4.1). Reported: ΔL, the rise of the query's loss over the mean of the reference models; MSE, the mean squared difference
between the image generated from the query's seed and that of the reference model (pixels in [0, 1]); similarity, the
cosine of the two images in the image encoder's space (1 = the same picture). Random removals are the null.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from abu.cluster import add_cluster_flags, cluster_from, run_plan
from abu.models import Autoencoder
from abu.plan import Collection
from abu.testbed import TESTBEDS, Testbed
from benchmark.retrain import RetrainConfig, Retrainer, Retraining, collection_of, references
from fastgda.core import ROOT, best_device, command_line, environment, load_npy, load_npz, save_json
from fastgda.metrics import standard_error
from fastgda.rankings import top
from feature_extraction.encoders import load_encoder

FRACTIONS = (0.004, 0.0085, 0.034, 0.1)
"""K as shares of the training set: the paper's 500, 1,000 and 4,000 of 118,287, and a tenth."""
RANDOM = "random"
EFFECTS = ("delta_loss", "mse", "similarity")


@dataclass(frozen=True)
class RemovalConfig:
    """Which removals are compared."""

    queries: int = 20
    """The first so many test queries."""
    seeds: int = 1
    """Models trained for each removal."""
    references: int = 4
    """Models trained on everything, whose mean is the reference."""
    null: int = 2
    """Random removals for each query and K."""


def levels_of(images: int) -> tuple[int, ...]:
    """The values of K for a training set."""
    return tuple(max(1, round(share * images)) for share in FRACTIONS)


def removed_by(scores: np.ndarray, query: int, count: int) -> tuple[int, ...]:
    """Ids, ascending, of the `count` images that `scores` [Q, N] rank first for `query`."""
    return tuple(int(i) for i in np.sort(top(scores[query : query + 1], count)[0]))


def random_removal(images: int, query: int, count: int, draw: int) -> tuple[int, ...]:
    """The null: `count` random ids, ascending."""
    random = np.random.default_rng([query, count, draw])
    return tuple(int(i) for i in np.sort(random.choice(images, count, replace=False)))


Plan = dict[tuple[str, int, int], list[Retraining]]
"""(method, query, K) -> the models trained for it."""


def removal_plan(scores: dict[str, np.ndarray], images: int, config: RemovalConfig) -> Plan:
    """All models that the comparison needs, the smallest K first."""
    plan: Plan = {}
    for count in levels_of(images):
        for query in range(config.queries):
            null = [random_removal(images, query, count, draw) for draw in range(config.null)]
            plan[RANDOM, query, count] = [Retraining(ids, seed) for ids in null for seed in range(config.seeds)]
            for method, array in scores.items():
                ids = removed_by(array, query, count)
                plan[method, query, count] = [Retraining(ids, seed) for seed in range(config.seeds)]
    return plan


class Effects:
    """What a removal does to a query, measured on stored models."""

    def __init__(self, testbed: Testbed, collection: Collection, config: RemovalConfig) -> None:
        self.collection, self.device = collection, best_device()
        self.autoencoder: Autoencoder = testbed.load_source(self.device).autoencoder
        self.encoder = load_encoder("effnet", self.device)
        stored = [self._load(job) for job in references(config.references)]
        self.loss = np.mean([arrays["losses_test"] for arrays in stored], axis=0)
        self.images = self._decode(stored[0]["latents_test"])
        self.features = self._features(self.images)

    def of(self, job: Retraining, query: int) -> dict[str, float]:
        """delta_loss, mse and similarity of one model for one query."""
        arrays = self._load(job)
        image = self._decode(arrays["latents_test"][query : query + 1])
        feature = self._features(image)[0]
        return {
            "delta_loss": float(arrays["losses_test"][query] - self.loss[query]),
            "mse": float(((image[0] - self.images[query]) ** 2).mean()),
            "similarity": float(feature @ self.features[query]),
        }

    def _load(self, job: Retraining) -> dict[str, np.ndarray]:
        keys = ("losses_test", "latents_test")
        return load_npz(self.collection.path(job), keys, "python -m benchmark.removal run")

    @torch.inference_mode()
    def _decode(self, latents: np.ndarray) -> np.ndarray:
        pixels = self.autoencoder.decode(torch.from_numpy(latents).to(self.device))
        return ((pixels + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()

    def _features(self, images: np.ndarray) -> np.ndarray:
        pictures = [Image.fromarray((255 * image).round().astype(np.uint8)) for image in images]
        features = self.encoder.encode(pictures, [""] * len(pictures))
        return features / np.linalg.norm(features, axis=1, keepdims=True)


def summarise(plan: Plan, effects: Effects) -> list[dict[str, Any]]:
    """One row for each method and K: mean over queries and standard error of each effect."""
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for (method, query, count), jobs in plan.items():
        found = [effects.of(job, query) for job in jobs]
        mean = {key: float(np.mean([effect[key] for effect in found])) for key in EFFECTS}
        groups.setdefault((method, count), []).append(mean)
    rows = []
    for (method, count), values in groups.items():
        row: dict[str, Any] = {"method": method, "K": count}
        for key in EFFECTS:
            column = np.array([[value[key]] for value in values])
            row[key] = {"mean": float(column.mean()), "standard_error": float(standard_error(column)[0])}
            row[key]["per_query"] = column[:, 0].tolist()
        rows.append(row)
    return rows


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.removal", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("scores", type=Path, nargs="+", help="arrays [Q, N] of a method, higher = more influential")
    parser.add_argument("--mode", choices=sorted(TESTBEDS), default="emoji-mini", help="testbed (default: emoji-mini)")
    parser.add_argument("--queries", type=int, default=RemovalConfig.queries, help="the first so many test queries")
    parser.add_argument("--seeds", type=int, default=RemovalConfig.seeds, help="models trained for each removal")
    parser.add_argument("--output", type=Path, default=ROOT / "results/removal/removal.json")
    add_cluster_flags(parser)
    args = parser.parse_args(argv)
    testbed, config = TESTBEDS[args.mode], RemovalConfig(args.queries, args.seeds)
    collection = collection_of(testbed, RetrainConfig())
    images, queries = len(testbed.load_arrays()[0]), len(testbed.query_captions("test"))
    scores = {path.stem: load_npy(path, (queries, images), finite=True) for path in args.scores}
    plan = removal_plan(scores, images, config)
    jobs = list(dict.fromkeys(job for group in plan.values() for job in group))
    if args.what == "run":
        build = partial(Retrainer, testbed, RetrainConfig())
        run_plan(build, collection, references(config.references) + jobs, cluster_from(args), "model")
        return
    rows = summarise(plan, Effects(testbed, collection, config))
    for row in rows:
        cells = (f"{key} {row[key]['mean']:+.4f} ± {row[key]['standard_error']:.4f}" for key in EFFECTS)
        print(f"{row['method']:24s} K = {row['K']:4d}  " + "  ".join(cells))
    save_json(args.output, {"config": vars(config), "rows": rows, "environment": environment()})


if __name__ == "__main__":
    sys.exit(main())
