"""Unlearning a query: a few natural-gradient steps up its loss, on the text key/value weights (paper, eq. 1).

    θ_{k+1} = θ_k + (α/N) F⁻¹ ∇𝓛(ẑ, θ_k)        θ_{−ẑ} = θ_K

The paper takes one step; with more, the gradient is taken anew at the moved weights, from draws of its own, while F
stays that of θ0. α is `step`, N the number of training images. As a Newton step, η = `step` takes the place of α/N.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from abu.amortised import Examples
from abu.curvature import Curvature
from abu.diffusion_loss import NoiseSchedule, at_least_float32
from abu.draws import DrawConfig, draw
from abu.layers import LayerGradients, add_to_weights, select_layers

ROWS = 64
"""Draws of a query whose gradients are taken at once."""
Change: TypeAlias = dict[str, Tensor]
"""Name of a key/value layer -> what is added to its weights [out, in], the last column to its bias if it has one."""


STEP = 0.1
"""α of the testbed's teacher: losses change by about one part in a hundred (`python -m benchmark.exact`)."""


@dataclass(frozen=True)
class UnlearnConfig:
    """How a query is unlearned."""

    step: float = STEP
    """α of eq. 1, which is divided by N; with --newton η, which is not."""
    steps: int = 1
    """Steps, each along the gradient at the weights that the last one left."""
    query_draws: int = 10
    """Draws of (t, ε) in each of ten timestep bins, for the gradient of one step."""
    newton: bool = False
    """Move by step · F⁻¹∇𝓛, without dividing by N."""
    images: int | None = None
    """N of eq. 1 (default: the number of training images at hand)."""

    def __post_init__(self) -> None:
        for name in ("step", "steps", "query_draws", "images"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name}: expected a positive number, found {value}")

    def size(self, images: int) -> float:
        """α/N, or η."""
        return self.step if self.newton else self.step / (self.images or images)

    def draws(self, timesteps: int) -> DrawConfig:
        """Draws of one step's gradient."""
        return DrawConfig(draws=self.query_draws, timesteps=timesteps)


def query_gradient(
    model: nn.Module,
    schedule: NoiseSchedule,
    curvature: Curvature,
    query: Examples,
    draws: DrawConfig,
    runs: range = range(1),
) -> tuple[Tensor, ...]:
    """U_Bᵀ ∇𝓛(ẑ, θ) U_A [out, in] of one query for each group of layers, averaged over all bins, draws and runs.

    Raises `ValueError` naming the query if a loss is not finite.
    """
    engine = LayerGradients(model)
    curvature = curvature.for_layers(engine.layers)
    totals = tuple(torch.zeros_like(group.eigenvalues) for group in curvature.groups)
    for timesteps, noise in query_batches(draws, query, runs):
        rows = len(noise)
        latents, text = query.latents.expand(rows, -1, -1, -1), query.text.repeat(rows, 1, 1)
        groups, losses = engine(*schedule.noised(latents, noise, timesteps), timesteps, text)
        if not torch.isfinite(losses).all():
            bad = int(timesteps[~torch.isfinite(losses)][0])
            raise ValueError(f"{query.role} query {query.ids[0]}: expected a finite loss at timestep {bad}, found none")
        for total, factors, group in zip(totals, curvature.groups, groups, strict=True):
            if factors.names != group.names:
                raise ValueError(f"curvature: expected factors of {group.names} together, found {factors.names}")
            # All rows belong to one example, so their positions are simply more of its positions.
            g, a = (at_least_float32(t).flatten(0, 1)[None] for t in (group.outputs, group.inputs))
            total += factors.rotated_gradients(g, a)[0]
    count = len(runs) * draws.bins * draws.draws
    return tuple(total / count for total in totals)


def query_batches(
    draws: DrawConfig, query: Examples, runs: range = range(1), rows: int = ROWS
) -> Iterator[tuple[Tensor, Tensor]]:
    """(timesteps [≤ rows], noise [≤ rows, c, h, w]): all draws of one query, always cut in the same way."""
    shape, device = tuple(query.latents.shape[1:]), query.latents.device
    places = [(run, b, index) for run in runs for b in range(draws.bins) for index in range(draws.draws)]
    for start in range(0, len(places), rows):
        found = [draw(draws, query.role, query.ids, *place, shape) for place in places[start : start + rows]]
        timesteps, noise = (torch.cat(parts) for parts in zip(*found, strict=True))
        yield timesteps.to(device), noise.to(query.latents)


def natural_step(curvature: Curvature, gradient: tuple[Tensor, ...], size: float) -> Change:
    """size · F⁻¹∇𝓛 layer by layer, from a gradient in the eigenbases."""
    change: Change = {}
    for group, rotated in zip(curvature.groups, gradient, strict=True):
        natural = group.natural_gradient(rotated) * size
        change |= dict(zip(group.names, natural.split(group.sizes), strict=True))
    return change


def unlearn(
    model: nn.Module,
    schedule: NoiseSchedule,
    curvature: Curvature,
    query: Examples,
    config: UnlearnConfig,
    images: int,
) -> Change:
    """θ_{−ẑ} − θ0; `images` is the number of training images. Step k takes run k of the query's draws."""
    curvature = curvature.for_layers(select_layers(model))
    draws, total = config.draws(len(schedule)), Change()
    for index in range(config.steps):
        moved = moved_model(model, total) if total else model
        gradient = query_gradient(moved, schedule, curvature, query, draws, range(index, index + 1))
        step = natural_step(curvature, gradient, config.size(images))
        total = {name: total[name] + change if total else change for name, change in step.items()}
    return total


def moved_model(model: nn.Module, change: Change) -> nn.Module:
    """A copy of `model` with `change` added to its weights."""
    moved = copy.deepcopy(model)
    for name, layer in select_layers(moved).items():
        add_to_weights(layer, change[name])
    return moved


def still_weights(model: nn.Module, change: Change) -> float:
    """Share of the key/value weights that `change` is too small to move: rounding leaves them as they are."""
    layers = select_layers(model)
    still = count = 0
    for name, layer in layers.items():
        weight = layer.weight.flatten(1)
        moved = weight + change[name][:, : weight.shape[1]].to(weight)
        still, count = still + int((moved == weight).sum()), count + weight.numel()
    return still / count
