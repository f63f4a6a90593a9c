"""Exact influence: unlearn the query, measure how much each training image's loss rises (paper, eqs. 1 and 2).

    θ_{−ẑ} = θ0 + (α/N) F⁻¹ ∇𝓛(ẑ, θ0)        τ(ẑ, z) = 𝓛(z, θ_{−ẑ}) − 𝓛(z, θ0), the same (t, ε) in both terms

Noise is keyed by the training image, so the baseline losses are computed once for all queries, and a subset of the
images gets the losses that the full set gets, up to the rounding of differently shaped matrix products. Only sums over
timesteps of float32 losses are subtracted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.amortised import Examples
from abu.curvature import DiagonalFisher
from abu.diffusion_loss import NoiseSchedule, example_losses
from abu.draws import DrawConfig
from abu.keyvalue import OutputGradients, key_value_layers
from abu.layers import add_to_weights


@dataclass(frozen=True)
class UnlearnConfig:
    """The unlearning step."""

    step: float = 0.01
    """α of eq. 1, which is divided by N."""
    draws: int = 10
    """Draws of (t, ε) in each timestep bin for the query's gradient."""


def query_gradient(
    model: nn.Module,
    schedule: NoiseSchedule,
    curvature: DiagonalFisher,
    query: Examples,
    draws: DrawConfig,
    runs: int = 1,
) -> Tensor:
    """U_Bᵀ ∇𝓛(ẑ, θ0) U_A [out, in] of one query, averaged over all bins, draws and runs."""
    engine = OutputGradients(model)
    curvature.require_fit(engine.layers)
    total = torch.zeros_like(curvature.eigenvalues)
    for run in range(runs):
        for timesteps, noise in all_draws(draws, query, run):
            gradients = engine(*schedule.noised(query.latents, noise, timesteps), timesteps, query.text)[0]
            total += curvature.rotated_gradients(gradients, query.text)[0]
    return total / (runs * draws.bins * draws.draws)


def all_draws(config: DrawConfig, examples: Examples, run: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(timesteps [B], noise [B, c, h, w]) of every draw of one run."""
    for bin_index in range(config.bins):
        yield from examples.draws(config, run, bin_index)


def unlearn(model: nn.Module, curvature: DiagonalFisher, gradient: Tensor, step: float, images: int) -> nn.Module:
    """A copy of `model` at θ_{−ẑ}; `gradient` [out, in] in the eigenbasis, `images` is N."""
    moved = copy.deepcopy(model)
    delta = curvature.natural_gradient(gradient) * (step / images)
    for layer, change in zip(key_value_layers(moved).values(), delta.split(curvature.sizes), strict=True):
        add_to_weights(layer, change)
    return moved


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
    """𝓛(z, θ) [models, B] for each model, averaged over the same draws; models share the noise."""
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
                    results[index, start : start + batch_size] += losses.double().cpu()
                    bar.update(len(batch.ids))
    bar.close()
    return results / count
