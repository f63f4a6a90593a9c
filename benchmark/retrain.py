"""Retrains a diffusion model from scratch without some of its training images: the judge of every attribution.

    python -m benchmark.retrain halves --models 64 --workers 2   # on random halves of the training set, for the LDS
    python -m benchmark.retrain again --models 64 --workers 2    # the same halves with other seeds: the LDS's ceiling
    python -m benchmark.retrain reference --models 4             # on all images, with several seeds
    python -m benchmark.retrain creators --models 3              # without each creator in turn, with several seeds
    python -m benchmark.retrain status                           # how many models are done, models per hour
    python -m benchmark.retrain export                           # all losses in one file (`benchmark.losses`)
    python -m benchmark.retrain restore                          # models of that file that are not here count as done
    python -m benchmark.retrain halves --mode coco --workers 8   # the released MSCOCO model (`benchmark.coco`)

A model is trained with the recipe of the reference model; what is kept of it is the loss of every validation and test
query (of MSCOCO there are test queries only), the same draws of (t, ε) for all models, and the test queries sampled
again with their seeds; of a model trained on everything also its weights. A model is named by the images that it did
not see and by its seed, so that two methods which remove the same images share it.

On a CPU a model is trained by one thread, with `--workers` as many at once as there are processors: small layers gain
little from a second thread, and sums over one thread are the same bit for bit wherever the model is trained. On GPUs
each worker has one; `--together 16` trains sixteen small models at once in this process (`benchmark.together`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from abu.cluster import add_cluster_flags, cluster_from, run_plan
from abu.plan import Collection
from abu.testbed import Testbed, add_testbed_flags
from benchmark.losses import Losses, collection_of, export_losses, folder_of, restore_losses
from benchmark.retrainable import JUDGED_MODE, Retrainable, add_retrainable_flags, retrainable_from
from benchmark.retrainer import SECONDS, SOURCE, WEIGHT, RetrainConfig, Retrainer, Retraining, forget_training
from benchmark.together import run_together
from fastgda.core import command_line, command_parser, load_npz

SECOND_SEED = 100_000
"""Added to the seeds of the halves when they are trained again."""
MODELS = {"halves": 64, "again": 64, "reference": 4, "creators": 3}
"""Plan -> models that are trained by default; for creators, of each."""


def random_halves(images: int, models: int, seed: int = 0) -> list[Retraining]:
    """Models trained on independent random halves of the training set, each with its own seed."""
    jobs = []
    for index in range(models):
        order = np.random.default_rng([seed, index]).permutation(images)
        jobs.append(Retraining(tuple(int(i) for i in np.sort(order[images // 2 :])), seed=1000 + index))
    return jobs


def again(halves: list[Retraining]) -> list[Retraining]:
    """The same images with other seeds."""
    return [replace(job, seed=job.seed + SECOND_SEED) for job in halves]


def references(models: int) -> list[Retraining]:
    """Models trained on everything; for none of them the source model itself, the paper's reference. `ValueError` if
    their number is negative.
    """
    if models < 0:
        raise ValueError(f"models trained on everything: expected at least 0, found {models}")
    return [Retraining((), seed) for seed in range(models)] or [SOURCE]


def loss_changes(stored: Losses, jobs: Sequence[Retraining], count: int, split: str) -> np.ndarray:
    """Rise of the loss [models, Q] under each model over the one trained on everything with the same seed.

    Models of one seed share initial weights, order and noise, which make more of a difference than a few images. For
    seeds beyond the first `count` it is the rise over the mean of these; for none of them over the source model.
    """
    everything = stored.of(references(count), split)
    mean = everything.mean(0)
    return stored.of(jobs, split) - np.stack([everything[job.seed] if job.seed < count else mean for job in jobs])


def without_creators(sets: list[str], models: int) -> list[Retraining]:
    """For each creator, models trained without its images; `sets` is the training set's column."""
    names = np.asarray(sets)
    removed = [tuple(int(i) for i in np.flatnonzero(names == name)) for name in dict.fromkeys(sets)]
    return [Retraining(ids, seed) for ids in removed for seed in range(models)]


def reference_file(testbed: Testbed, seed: int) -> Path:
    """The results of the model trained on everything with a seed."""
    return folder_of(testbed) / Retraining((), seed).name


def load_reference(testbed: Testbed, seed: int, model: nn.Module) -> dict[str, Tensor]:
    """Its weights, as a state dict for `model`."""
    names = [WEIGHT + name for name in model.state_dict()]
    made_by = f"python -m benchmark.retrain reference --models {seed + 1}"
    arrays = load_npz(reference_file(testbed, seed), tuple(names), made_by)
    return {name.removeprefix(WEIGHT): torch.from_numpy(array).float() for name, array in arrays.items()}


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say where models are trained."""
    add_cluster_flags(parser)
    parser.add_argument("--together", type=int, default=1, help="models at once in this process, on a GPU (default: 1)")


def train_models(
    testbed: Retrainable, collection: Collection, jobs: list[Retraining], args: argparse.Namespace
) -> None:
    """Trains the missing models where `add_training_flags` says."""
    cluster = cluster_from(args)
    if args.together < 1 or (args.together > 1 and cluster is not None):
        raise ValueError("--together: expected at least 1, and no --workers or --address beside it")
    if args.together > 1:
        retrainer = Retrainer(testbed, RetrainConfig())
        run_plan(lambda: retrainer, collection, [job for job in jobs if job == SOURCE], None, "model")
        run_together(retrainer, collection, [job for job in jobs if job != SOURCE], args.together)
    else:
        run_plan(partial(Retrainer, testbed, RetrainConfig()), collection, jobs, cluster, "model")
    for job in jobs:
        forget_training(testbed, job)


def plans_of(testbed: Retrainable) -> dict[str, Callable[[int], list[Retraining]]]:
    """Name -> the models of a plan, given how many are wanted; without the creators' where there are not several."""
    sets = testbed.training_sets()
    plans: dict[str, Callable[[int], list[Retraining]]] = {
        "halves": partial(random_halves, len(sets)),
        "again": lambda models: again(random_halves(len(sets), models)),
        "reference": references,
    }
    return plans if len(set(sets)) < 2 else {**plans, "creators": partial(without_creators, sets)}


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    """`--mode`, a testbed and by default the small one, and `--root`."""
    add_testbed_flags(parser)
    parser.set_defaults(mode=JUDGED_MODE)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.retrain", __doc__)
    parser.add_argument("what", choices=(*MODELS, "status", "export", "restore"))
    add_retrainable_flags(parser)
    defaults = ", ".join(f"{name} {count}" for name, count in MODELS.items())
    parser.add_argument("--models", type=int, help=f"models; for creators, models of each (default: {defaults})")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    if args.models is not None and args.models < 1:
        raise ValueError(f"--models: expected at least 1, found {args.models}")
    testbed, config = retrainable_from(args), RetrainConfig()
    if args.what == "export":
        print(export_losses(testbed))
        return
    if args.what == "restore":
        print(f"{restore_losses(testbed)} models restored")
        return
    collection, plans = collection_of(testbed, config), plans_of(testbed)
    if args.what == "status":
        for title, plan in plans.items():
            print(models_done(collection, title, plan(args.models or MODELS[title])))
        for name, error in collection.failures().items():
            print(f"failed: {name}: {error}")
        return
    if args.what not in plans:
        raise ValueError(f"{args.what}: expected one of {', '.join(plans)} for {testbed.name}, which names no creators")
    jobs = plans[args.what](args.models or MODELS[args.what])
    train_models(testbed, collection, jobs, args)
    print(models_done(collection, args.what, jobs))


def models_done(collection: Collection, title: str, jobs: list[Retraining]) -> str:
    """One line: models done, models an hour over the last ones that were trained here, the hours left at that rate."""
    missing = set(collection.missing(jobs))
    done = {job: load_npz(collection.path(job), (), optional=(SECONDS,)) for job in jobs if job not in missing}
    left, rate = len(missing), collection.rate([job for job, arrays in done.items() if SECONDS in arrays])
    line = f"{title}: {len(jobs) - left} of {len(jobs)} models"
    if rate:
        line += f", {3600 * rate:.0f} models an hour"
        line += f", {left / rate / 3600:.1f} h left at that rate" if left else ""
    return line


if __name__ == "__main__":
    sys.exit(main())
