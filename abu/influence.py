"""Exact influence: unlearn the query, measure how much each training image's loss rises (paper, eqs. 1 and 2).

    τ(ẑ, z) = 𝓛(z, θ_{−ẑ}) − 𝓛(z, θ0), the same (t, ε) in both terms; the larger of the views' τ where there are two

`abu.unlearn` moves the weights, `abu.sweep` takes the losses, with noise that depends on the training image only: the
losses at θ0 are computed once for all queries, and a subset of the images gets the losses that the full set gets.
`mean_losses` is the plain form, for any models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.amortised import Examples, require_finite
from abu.curvature import Curvature
from abu.diffusion_loss import NoiseSchedule, example_losses
from abu.draws import DrawConfig
from abu.kronfluence_files import load_curvature
from abu.layers import select_layers
from abu.loss_draws import LossDraws, TrainingImages, open_images
from abu.sweep import Sweep, SweepConfig
from abu.testbed import Testbed
from abu.unlearn import Change, UnlearnConfig, unlearn

SHARD = 256
"""Images whose noised inputs are in memory at once."""


@dataclass(frozen=True)
class ExactInfluence:
    """Everything that exact influence is computed with."""

    model: nn.Module
    schedule: NoiseSchedule
    curvature: Curvature
    sweep: Sweep
    unlearning: UnlearnConfig

    @staticmethod
    def of(
        testbed: Testbed, unlearning: UnlearnConfig, draws: LossDraws, config: SweepConfig, device: torch.device
    ) -> ExactInfluence:
        """`ValueError` if the factors are not the model's, or if there are fewer views or captions than drawn."""
        source = testbed.load_source(device)
        sweep = Sweep(source.denoiser, source.schedule, training_images(testbed), draws, config)
        curvature = model_curvature(testbed, source.denoiser)
        return ExactInfluence(source.denoiser, source.schedule, curvature, sweep, unlearning)

    @property
    def images(self) -> TrainingImages:
        """The training set."""
        return self.sweep.images

    def unlearned(self, query: Examples) -> Change:
        """θ_{−ẑ} − θ0 of one query."""
        return unlearn(self.model, self.schedule, self.curvature, query, self.unlearning, len(self.images))


def training_images(testbed: Testbed) -> TrainingImages:
    """The testbed's training set, mapped from its files."""
    return open_images(testbed.data / "trainset", f"python -m abu.encode --mode {testbed.name}")


def model_curvature(testbed: Testbed, model: nn.Module) -> Curvature:
    """The testbed's factors for `model`; `ValueError` if they are those of other layers, shapes or weights."""
    layers = select_layers(model)
    curvature = load_curvature(testbed.curvature).for_layers(layers)
    testbed.check_curvature()
    weight = next(iter(layers.values())).weight
    groups = tuple(group.to(weight.dtype).to(weight.device) for group in curvature.groups)
    return Curvature(groups, curvature.examples)


def exact_influence(
    sweep: Sweep, ids: Sequence[int], changes: Sequence[Change], *, progress: bool = False
) -> np.ndarray:
    """τ [queries, ids], float64, higher = more influential; `changes` are θ_{−ẑ} − θ0 of each query."""
    parts = []
    starts = range(0, len(ids), SHARD)
    for start in tqdm(starts, desc="influence", unit="shard", disable=not progress):
        losses = sweep.losses(ids[start : start + SHARD], [None, *changes])
        parts.append(loss_change(losses[:1], losses[1:]))
    return np.concatenate(parts, axis=1)


def loss_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """τ [...] from losses [..., views]: the larger change of the views."""
    return (after - before).max(axis=-1)


def all_draws(config: DrawConfig, examples: Examples, run: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(timesteps [B], noise [B, c, h, w]) of every draw of one run."""
    for bin_index in range(config.bins):
        yield from examples.draws(config, run, bin_index)


@torch.inference_mode()
def mean_losses(
    models: list[nn.Module],
    schedule: NoiseSchedule,
    examples: Examples,
    draws: DrawConfig,
    *,
    runs: range = range(1),
    batch_size: int = 128,
    progress: bool = True,
) -> Tensor:
    """𝓛(z, θ) [models, B] for each model, averaged over the same draws; models share the noise.

    `ValueError` naming the example if a loss is not finite.
    """
    results = torch.zeros(len(models), len(examples.ids), dtype=torch.float64)
    count = len(runs) * draws.bins * draws.draws
    total = len(models) * len(examples.ids) * count
    bar = tqdm(total=total, desc="losses", unit="loss", unit_scale=True, mininterval=1.0, disable=not progress)
    for start in range(0, len(examples.ids), batch_size):
        batch = examples.rows(start, start + batch_size)
        for run in runs:
            for timesteps, noise in all_draws(draws, batch, run):
                noisy, target = schedule.noised(batch.latents, noise, timesteps)
                for index, model in enumerate(models):
                    losses = example_losses(model, noisy, target, timesteps, batch.text)
                    require_finite(losses, "loss", batch, int(timesteps[0]) * draws.bins // draws.timesteps)
                    results[index, start : start + batch_size] += losses.double().cpu()
                    bar.update(len(batch.ids))
    bar.close()
    return results / count
