"""Retrains a testbed's diffusion model from scratch without some training images: the judge of every attribution.

    python -m benchmark.retrain halves --models 64          # on random halves of the training set, for the LDS
    python -m benchmark.retrain reference --models 4        # on all images, with several seeds
    python -m benchmark.retrain creators --models 2         # without each creator in turn
    python -m benchmark.retrain status                      # how many models are done, models per hour

A model is trained with the recipe of the reference model; what is kept of it is the loss of every validation and test
query, the same draws of (t, ε) for all models, and the test queries sampled again with their seeds. A model is named by
the images that it did not see and by its seed, so that two methods which remove the same images share it.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch

from abu.cluster import add_cluster_flags, cluster_from, run_plan
from abu.draws import DrawConfig
from abu.influence import mean_losses
from abu.models import SourceModel, build_denoiser, noise_schedule
from abu.plan import Collection
from abu.sample import SampleConfig, sample_latents
from abu.testbed import TESTBEDS, Testbed
from abu.train_diffusion import diffusion_loss
from abu.training import train
from fastgda.core import best_device, command_line, load_npz, sha256_file
from feature_extraction.readers import read_split

JUDGED = ("val", "test")


@dataclass(frozen=True)
class RetrainConfig:
    """What is measured on a retrained model."""

    bins: int = 10
    draws: int = 10
    """Draws of (t, ε) in each timestep bin for the loss of a query."""


@dataclass(frozen=True)
class Retraining:
    """One model to train."""

    removed: tuple[int, ...]
    """Ids of the training images that it does not see, ascending."""
    seed: int
    """Of initial weights, order and noise."""

    @property
    def name(self) -> str:
        """Its file."""
        digest = hashlib.sha256(np.asarray(self.removed, np.int64).tobytes()).hexdigest()[:12]
        return f"without_{len(self.removed):05d}_{digest}_seed_{self.seed}.npz"


class Retrainer:
    """Trains models and measures them."""

    def __init__(self, testbed: Testbed, config: RetrainConfig) -> None:
        self.testbed, self.config, self.device = testbed, config, best_device()
        latents, text = testbed.load_arrays()
        self.latents, self.text = torch.from_numpy(latents), torch.from_numpy(text)[:, 0]
        self.queries = {split: testbed.query_examples(split, self.device) for split in JUDGED}
        self.seeds = {split: testbed.query_seeds(split) for split in JUDGED}
        self.autoencoder = testbed.load_source(self.device).autoencoder

    def compute(self, job: Retraining) -> dict[str, np.ndarray]:
        """removed [R]; for each split losses_<split> [Q]; latents_test [Q, c, h, w], the queries sampled again."""
        kept = np.setdiff1d(np.arange(len(self.latents)), job.removed)
        loop = replace(self.testbed.diffusion_loop, seed=job.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            model = build_denoiser(self.testbed.diffusion)
        schedule = noise_schedule(self.testbed.diffusion)
        loss = diffusion_loss(self.latents[kept], self.text[kept], schedule, self.device)
        folder = self.testbed.runs / "retrain" / job.name.removesuffix(".npz")
        train(model, loss, len(kept), loop, folder, device=self.device, progress=False)
        model.eval().requires_grad_(False)
        draws = DrawConfig(self.config.bins, self.config.draws)
        found: dict[str, np.ndarray] = {"removed": np.asarray(job.removed, np.int32)}
        for split, queries in self.queries.items():
            found[f"losses_{split}"] = mean_losses([model], schedule, queries, draws, progress=False)[0].numpy()
        source = SourceModel(model, self.autoencoder, self.testbed.diffusion, self.testbed.autoencoder)
        test = self.queries["test"]
        found["latents_test"] = sample_latents(source, test.text, self.seeds["test"], SampleConfig()).cpu().numpy()
        shutil.rmtree(folder)
        return found


def random_halves(images: int, models: int, seed: int = 0) -> list[Retraining]:
    """Models trained on independent random halves of the training set, each with its own seed."""
    jobs = []
    for index in range(models):
        order = np.random.default_rng([seed, index]).permutation(images)
        jobs.append(Retraining(tuple(int(i) for i in np.sort(order[images // 2 :])), seed=1000 + index))
    return jobs


def references(models: int) -> list[Retraining]:
    """Models trained on everything."""
    return [Retraining((), seed) for seed in range(models)]


def without_creators(sets: list[str], models: int) -> list[Retraining]:
    """For each creator, models trained without its images; `sets` is the training set's column."""
    names = np.asarray(sets)
    removed = [tuple(int(i) for i in np.flatnonzero(names == name)) for name in dict.fromkeys(sets)]
    return [Retraining(ids, seed) for ids in removed for seed in range(models)]


def collection_of(testbed: Testbed, config: RetrainConfig) -> Collection:
    """The folder of a testbed's retrained models; `ValueError` if it was made with another recipe or other queries."""
    collection = Collection(testbed.data / "cache/retrain")
    settings = asdict(config) | {"diffusion": asdict(testbed.diffusion), "loop": asdict(testbed.diffusion_loop)}
    settings["loop"].pop("seed")
    files = {"latents": testbed.data / "trainset/latents.npy"}
    files |= {f"query_{split}": testbed.data / f"query_{split}/latents.npy" for split in JUDGED}
    collection.claim(settings, {name: sha256_file(path) for name, path in files.items()})
    return collection


def load_losses(collection: Collection, jobs: list[Retraining], split: str) -> np.ndarray:
    """Losses [models, Q] of the queries of a split under each model."""
    key = f"losses_{split}"
    made_by = "python -m benchmark.retrain"
    return np.stack([load_npz(collection.path(job), (key,), made_by)[key] for job in jobs])


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.retrain", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("halves", "reference", "creators", "status"))
    parser.add_argument("--mode", choices=sorted(TESTBEDS), default="emoji-mini", help="testbed (default: emoji-mini)")
    parser.add_argument("--models", type=int, default=64, help="models; for creators, models of each (default: 64)")
    add_cluster_flags(parser)
    args = parser.parse_args(argv)
    testbed, config = TESTBEDS[args.mode], RetrainConfig()
    collection, table = collection_of(testbed, config), read_split(testbed.data, "data")
    plans: dict[str, Callable[[int], list[Retraining]]] = {
        "halves": partial(random_halves, len(table)),
        "reference": references,
        "creators": partial(without_creators, table.sets),
    }
    if args.what == "status":
        for title, plan in plans.items():
            print(collection.status(title, plan(args.models)))
        return
    run_plan(
        partial(Retrainer, testbed, config), collection, plans[args.what](args.models), cluster_from(args), "model"
    )


if __name__ == "__main__":
    sys.exit(main())
