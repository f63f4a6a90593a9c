"""Attribution methods that multiply gradients of queries and training images, as recipes over one store.

| method | f | φ | score | source |
| --- | --- | --- | --- | --- |
| trak | loss | k = 16,384 | kernel | Park et al. 2023; Zheng et al. 2024, eq. 5 |
| journey-trak | loss along the sampling | k = 16,384 | kernel | Georgiev et al. 2023, section 3 |
| d-trak | mean square of the prediction | k = 32,768 | kernel, λ = 500 | Zheng et al. 2024, section 4 |
| das | mean of the prediction | k = 32,768, unit length in each bin | squared, residual, leverage | Lin et al. 2024 |
| abu | loss | key/value layers, diagonal Fisher | inner product | Wang et al. 2024, first order |
| abu-plus | loss | key/value layers, EK-FAC | inner product | Wang et al. 2025, first order |
| ekfac | loss | all Linear and Conv2d layers, EK-FAC | inner product | Mlodozeniec et al. 2025 |

Projections and λ are those that the FastGDA paper states (one model). Where it states no λ, a share of the mean squared
length of φ stands in; `--select` chooses on validation queries, because the paper's scale of f need not be ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from abu.cluster import ClusterConfig
from abu.testbed import JUDGED, Testbed
from benchmark.gradient_store import StoreConfig, collect, foresee, load_store
from benchmark.kernels import GRID, Kernel, das_scores
from benchmark.projected import FeatureConfig

SHARE = 1e-2
"""λ as a share of the mean squared length of φ, where the paper states none."""


@dataclass(frozen=True)
class Method:
    """What a method multiplies, and how."""

    features: FeatureConfig
    score: Literal["kernel", "das", "inner"] = "kernel"
    ridge: float | None = None
    """λ that the paper states."""
    journey: bool = False

    def stores(self, model: int) -> tuple[StoreConfig, StoreConfig]:
        """(store of the training images, store of the queries) of one model."""
        training = StoreConfig(self.features, model)
        return training, replace(training, journey=self.journey)


METHODS: dict[str, Method] = {
    "trak": Method(FeatureConfig()),
    "journey-trak": Method(FeatureConfig(), journey=True),
    "d-trak": Method(FeatureConfig("square", projection=32_768), ridge=500.0),
    "das": Method(FeatureConfig("mean", projection=32_768, normalised=True), "das"),
    "abu": Method(FeatureConfig(layers="cross-attn-kv", curvature="diagonal", projection=32_768), "inner"),
    "abu-plus": Method(FeatureConfig(layers="cross-attn-kv", curvature="ekfac", projection=32_768), "inner"),
    "ekfac": Method(FeatureConfig(curvature="ekfac", projection=32_768), "inner"),
}


def collect_method(testbed: Testbed, method: Method, models: int, split: str, cluster: ClusterConfig | None) -> None:
    """Computes the gradients that are missing for the queries of a split."""
    for store, splits in _stores(method, models, split):
        collect(testbed, store, cluster, splits)


def foresee_method(testbed: Testbed, method: Method, models: int, split: str, workers: int) -> list[str]:
    """A line for each store: what its missing gradients need."""
    found = [(store.name, foresee(testbed, store, workers, at)) for store, at in _stores(method, models, split)]
    return [f"{name}: {'nothing is missing' if needed is None else needed}" for name, needed in found]


def method_scores(
    testbed: Testbed, method: Method, models: int, split: str, ridge: float | None = None
) -> tuple[np.ndarray, float | None]:
    """(scores [Q, N] float32, the λ used): means over models. λ is `ridge`, else the paper's, else relative."""
    members = [_Member(testbed, method, index, split) for index in _indices(models)]
    if method.score == "inner":
        return _mean([member.inner() for member in members]), None
    chosen = method.ridge if ridge is None else ridge
    used = SHARE * members[0].kernel.scale if chosen is None else chosen
    return _mean([member.scores(used) for member in members]), used


def select_ridge(
    testbed: Testbed, method: Method, models: int, judge: Callable[[np.ndarray], dict[str, Any]]
) -> tuple[float, list[dict[str, float]]]:
    """(the λ of the grid with the best LDS on the validation queries, the LDS of each λ and of the paper's)."""
    members = [_Member(testbed, method, index, "val") for index in _indices(models)]
    ridges = [share * members[0].kernel.scale for share in GRID]
    ridges += [] if method.ridge is None else [method.ridge]
    table = [
        {"ridge": ridge, "lds": judge(_mean([member.scores(ridge) for member in members]))["lds"]}
        for ridge in sorted(ridges)
    ]
    return max(table, key=lambda row: row["lds"])["ridge"], table


class _Member:
    """One model's projected gradients."""

    def __init__(self, testbed: Testbed, method: Method, model: int, split: str) -> None:
        training, queries = method.stores(model)
        self.method = method
        self.training, self.queries = load_store(testbed, training, "training"), load_store(testbed, queries, split)
        if method.score != "inner":
            self.kernel = Kernel(self.training)
        if method.score == "das":
            self.residual = load_store(testbed, training, "training", "residual")

    def inner(self) -> Tensor:
        return self.queries @ self.training.mT

    def scores(self, ridge: float) -> Tensor:
        if self.method.score == "das":
            return das_scores(self.kernel, self.queries, self.residual, ridge)
        return self.kernel.scores(self.queries, ridge)


def _indices(models: int) -> range:
    """The source model alone, or the models trained on everything."""
    if models < 1:
        raise ValueError(f"--models: expected at least 1, found {models}")
    return range(1) if models == 1 else range(1, models + 1)


def _stores(method: Method, models: int, split: str) -> list[tuple[StoreConfig, tuple[str, ...]]]:
    """Each store with the splits whose queries it needs: training images lie with the judged queries."""
    found: dict[tuple[StoreConfig, tuple[str, ...]], None] = {}
    for index in _indices(models):
        training, queries = method.stores(index)
        found |= {(training, JUDGED): None, (queries, JUDGED if split in JUDGED else (split,)): None}
    return list(found)


def _mean(scores: list[Tensor]) -> np.ndarray:
    return torch.stack(scores).mean(0).float().cpu().numpy()
