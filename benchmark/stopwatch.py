"""Times both forms of influence on one world, shard by shard: what `benchmark.amortised_speed` reports."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from abu.amortised import Examples, MeanGradients, QueryMatrix, Sketch, score_block, sketched
from abu.curvature import Curvature
from abu.draws import DrawConfig
from abu.influence import mean_losses
from abu.layers import select_layers
from abu.second_order import StepVectors, TrainingTerms, TwoFolds, loss_change_at, loss_terms
from abu.testbed import testbed_from
from abu.tiles import TYPES
from abu.unlearn import UnlearnConfig, moved_model, natural_step
from benchmark.worlds import World, coco_world, emoji_world
from fastgda.core import save_json, save_npz

T = TypeVar("T")
BATCH = 64


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed."""

    architecture: Literal["emoji", "coco"] = "emoji"
    """The testbed's model, or COCO's shapes with random weights."""
    images: int = 0
    """Training images; 0: all of the testbed, 48 of COCO."""
    shard: int = 0
    """Training images that are timed at once; 0: 512, of COCO 16."""
    bins: int = 5
    """Timestep bins."""
    draws: int = 4
    """Draws of (t, ε) in each bin for a training image: 20 together, as in the paper."""
    queries: tuple[int, ...] = (1, 10, 100, 1_000, 2_000)
    """Numbers of queries."""
    exact_queries: tuple[int, ...] = (1, 2, 4)
    """Numbers of queries that the exact form is timed with."""
    query_draws: int = 8
    """Draws in each bin for a query's gradient."""
    order: Literal[1, 2] = 1
    """Terms of the loss change in the amortised form."""
    sketch: int = 33_792
    """Numbers kept of a gradient; the largest divisor of the number of weights up to this. For squares an eighth."""
    query_bits: Literal[16, 32] = 32
    """Of the second order: bits of a query's numbers, and of the products."""
    step: float = UnlearnConfig.step
    """α of eq. 1."""

    def __post_init__(self) -> None:
        if min((*self.queries, *self.exact_queries, self.bins, self.draws, self.query_draws, self.sketch)) < 1:
            raise ValueError("queries, exact_queries, bins, draws, query_draws and sketch: expected positive numbers")
        if len(set(self.exact_queries)) < 2:
            raise ValueError(f"exact_queries: expected at least two numbers, found {list(self.exact_queries)}")

    @property
    def training_draws(self) -> DrawConfig:
        """Draws of the training images."""
        return DrawConfig(self.bins, self.draws)

    def world(self, args: argparse.Namespace, device: torch.device) -> World:
        """Model, images and queries."""
        if self.architecture == "coco":
            return coco_world(self.images or 48, max(self.exact_queries), device)
        return emoji_world(testbed_from(args), self.images, device)


def divisor(total: int, wanted: int) -> int:
    """The largest divisor of `total` that is at most `wanted`."""
    return max(size for size in range(1, min(wanted, total) + 1) if total % size == 0)


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """(seconds, result)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


class Stopwatch:
    """Times both forms on one world."""

    def __init__(self, world: World, config: SpeedConfig) -> None:
        self.world, self.config = world, config
        self.engine = MeanGradients(world.denoiser, world.schedule)
        weights = world.curvature.eigenvalues.numel()
        self.sketch = Sketch.of(world.curvature, divisor(weights, config.sketch))
        if config.order == 2:
            self.terms = TrainingTerms(world.denoiser, world.schedule)
            self.folds = TwoFolds.of(world.curvature, weights // divisor(weights, max(1, config.sketch // 8)))

    def gradients(self, examples: Examples, draws: DrawConfig) -> Tensor:
        """g [bins, B, T, out]."""
        return torch.cat([self.engine(batch, draws, 0) for batch in examples.batches(BATCH)], 1)

    def query_gradients(self, count: int) -> tuple[float, Tensor]:
        """(seconds, g [bins, count, T, out]) of the first queries; both forms need them."""
        draws = DrawConfig(self.config.bins, self.config.query_draws)
        return timed(lambda: self.gradients(self.world.queries.rows(0, count), draws))

    def unlearned(self, gradients: Tensor) -> tuple[float, list[torch.nn.Module]]:
        """(seconds, the models θ_{−ẑ}) of queries with gradients g [bins, Q, T, out]."""
        curvature, step = self.world.curvature, self.config.step
        text = self.world.queries.text[: gradients.shape[1]]

        def build() -> list[torch.nn.Module]:
            rotated = curvature.rotated_gradients(gradients.mean(0), text)
            layers = select_layers(self.world.denoiser)
            factors = Curvature((curvature,), 1).for_layers(layers)
            return [
                moved_model(self.world.denoiser, natural_step(factors, (gradient,), step / self.world.images))
                for gradient in rotated
            ]

        return timed(build)

    def query_matrix(self, gradients: Tensor, count: int) -> QueryMatrix:
        """The matrix of `count` queries: those with gradients g [bins, Q, T, out], then random ones."""
        text = self.world.queries.text[: gradients.shape[1]]
        own = torch.stack([sketched(g, text, self.world.curvature, self.sketch) for g in gradients])[:, :count]
        missing = (len(own), count - own.shape[1], own.shape[2])
        return QueryMatrix.of(torch.cat([own, torch.randn(missing, device=own.device)], 1))

    def step_vectors(self, gradients: Tensor, count: int) -> StepVectors:
        """The same for the second order."""
        text = self.world.queries.text[: gradients.shape[1]]
        dtype = TYPES[self.config.query_bits]
        found = []
        for compression in (self.sketch, self.folds):
            own = sketched(gradients.mean(0), text, self.world.curvature, compression)[:count].to(dtype)
            found.append(torch.cat([own, torch.randn(count - len(own), own.shape[1], device=own.device, dtype=dtype)]))
        return StepVectors(found[0], [found[1]])

    def query_sides(self, gradients: Tensor) -> dict[int, QueryMatrix] | dict[int, StepVectors]:
        """What training images are multiplied with, for every number of queries."""
        most = max(self.config.queries)
        if self.config.order == 2:
            vectors = self.step_vectors(gradients, most)
            (folded,) = vectors.folded
            return {n: StepVectors(vectors.whole[:n], [folded[:n]]) for n in self.config.queries}
        matrix = self.query_matrix(gradients, most)
        return {n: QueryMatrix(matrix.normalised[:, :n], matrix.plain[:n]) for n in self.config.queries}

    def exact(self, examples: Examples, models: list[torch.nn.Module]) -> tuple[float, Tensor]:
        """(seconds, loss changes [Q, B])."""

        def change() -> Tensor:
            everyone = [self.world.denoiser, *models]
            losses = mean_losses(everyone, self.world.schedule, examples, self.config.training_draws, progress=False)
            return losses[1:] - losses[0]

        return timed(change)

    def second_order(self, examples: Examples, queries: dict[int, StepVectors]) -> tuple[dict[str, Any], Tensor]:
        """(seconds of each part, loss changes [Q, B] of the last number of queries), batch by batch."""
        rows, draws = [], self.config.training_draws
        parts, products = {"gradients": 0.0, "compression": 0.0}, {str(count): 0.0 for count in queries}
        for batch in examples.batches(BATCH):
            spent, found = timed(partial(self.terms, batch, draws, 0))
            parts["gradients"] += spent
            compressed = partial(
                StepVectors.of_images, found, batch.text, self.world.curvature, self.sketch, self.folds
            )
            spent, vectors = timed(compressed)
            parts["compression"] += spent
            for count, side in queries.items():
                spent, terms = timed(partial(loss_terms, side, vectors))
                products[str(count)] += spent
            rows.append(loss_change_at(*terms, self.config.step, self.world.images))
        return parts | {"products": products}, torch.cat(rows, 1)

    def score(self, examples: Examples, queries: Any) -> tuple[dict[str, Any], Tensor]:
        """(seconds of each part, scores) of the amortised form, with `query_sides`."""
        return (self.second_order if self.config.order == 2 else self.amortised)(examples, queries)

    def amortised(self, examples: Examples, matrices: dict[int, QueryMatrix]) -> tuple[dict[str, Any], Tensor]:
        """(seconds of each part, plain scores [Q, B] of the largest matrix)."""
        seconds, gradients = timed(lambda: self.gradients(examples, self.config.training_draws))
        found: dict[str, Any] = {"gradients": seconds}

        def compressed() -> Tensor:
            return torch.stack([sketched(g, examples.text, self.world.curvature, self.sketch) for g in gradients])

        found["compression"], vectors = timed(compressed)
        found["products"] = {}
        for count, matrix in matrices.items():
            found["products"][str(count)], (plain, _) = timed(partial(score_block, matrix, vectors))
        return found, plain


def collect(watch: Stopwatch, folder: Path) -> None:
    """Times the queries and every shard whose file does not exist."""
    config, world = watch.config, watch.world
    size = config.shard or (16 if config.architecture == "coco" else 512)
    starts = range(0, len(world.training.ids), size)
    if all((folder / f"shard_{start:06d}.json").is_file() for start in starts):
        return
    own = min(max(config.queries), len(world.queries.ids))
    watch.gradients(world.training.rows(0, 8), DrawConfig(config.bins, 1))
    query_seconds, gradients = watch.query_gradients(own)
    few = gradients[:, : max(config.exact_queries)]
    unlearn_seconds, models = watch.unlearned(few)
    rates = {"gradient": query_seconds / own, "unlearn": unlearn_seconds / len(models), "queries": own}
    if not (folder / "queries.json").is_file():
        save_json(folder / "queries.json", rates)
    sides = watch.query_sides(gradients)
    for start in tqdm(starts, desc="shards", unit="shard"):
        path = folder / f"shard_{start:06d}.json"
        if path.is_file():
            continue
        batch = world.training.rows(start, start + size)
        found, scores = watch.score(batch, sides)
        exact, change = {}, torch.empty(0)
        for count in config.exact_queries:
            exact[str(count)], change = watch.exact(batch, models[:count])
        shared = min(len(change), len(scores))
        save_npz(path.with_suffix(".npz"), exact=change[:shared].numpy(), amortised=scores[:shared].cpu().numpy())
        save_json(path, {"images": len(batch.ids), "amortised": found, "exact": exact})
