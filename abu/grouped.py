"""Unlearning and amortised influence for layers that read several inputs, as in a joint attention (SD3).

The gradient of a layer is ∇W = Σ_positions gᵀa. In cross-attention a is the text itself, so the mean over draws of
(t, ε) may be taken on g alone [T, out], once for all layers: that is what `abu.amortised` stores. A joint attention
modulates the text's hidden states by t and, from the second block on, mixes them with the latents; a U-Net's text may
also pass a projection. Then a differs from layer to layer, and in the first case from draw to draw too, and only the
product can be averaged: [out, in] numbers of each layer are kept while an example's draws are summed. What stays
amortised is the pass through the network: it still scores every query, τ(ẑ, z) = ⟨Δθ_ẑ, ∇𝓛(z, θ0)⟩ to first order,
and with the squares of `abu.second_order` to second.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.amortised import Examples
from abu.curvature import Curvature
from abu.diffusion_loss import NoiseSchedule, at_least_float32
from abu.draws import DrawConfig
from abu.keyvalue import is_beginning
from abu.layers import GroupGradients, LayerGradients, add_to_weights, select_layers
from abu.second_order import random_signs, slope_and_signs
from abu.unlearn import query_batches

Changes = Mapping[str, Tensor]
"""Name of a layer -> matrices [..., out, in], the bias as last column."""


class WeightGradients:
    """Gradients of example losses with respect to the text key/value weights, averaged over draws."""

    def __init__(self, model: nn.Module, schedule: NoiseSchedule) -> None:
        self.engine, self.schedule = LayerGradients(model), schedule

    def of_query(self, query: Examples, draws: DrawConfig, rows: int) -> dict[str, Tensor]:
        """Name -> ∇W [1, out, in] of one example, the mean over all bins and draws, of which `rows` are taken at once.

        Raises `ValueError` naming the query if a loss is not finite.
        """
        total: dict[str, Tensor] = {}
        shared: dict[tuple[str, ...], GroupGradients] = {}
        for timesteps, noise in query_batches(draws, query, rows=rows):
            count = len(noise)
            latents, text = query.latents.expand(count, -1, -1, -1), query.text.repeat(count, 1, 1)
            groups, losses = self.engine(*self.schedule.noised(latents, noise, timesteps), timesteps, text)
            if not torch.isfinite(losses).all():
                raise ValueError(f"query {query.ids[0]}: expected finite losses, found {losses.tolist()}")
            for group in groups:
                if is_beginning(group.inputs, text):
                    # All rows read the same tokens, so that their gradients add up before the product.
                    before, outputs = shared.get(group.names), group.outputs.sum(0, keepdim=True)
                    outputs = before.outputs + outputs if before else outputs
                    shared[group.names] = replace(group, inputs=group.inputs[:1], outputs=outputs)
                else:
                    # More rows of one example are simply more of its positions.
                    inputs, outputs = (tensor.flatten(0, 1)[None] for tensor in (group.inputs, group.outputs))
                    _add(total, replace(group, inputs=inputs, outputs=outputs))
        for group in shared.values():
            _add(total, group)
        return {name: total[name] / (draws.bins * draws.draws) for name in self.engine.layers}

    def __call__(self, examples: Examples, draws: DrawConfig, runs: range = range(1)) -> dict[str, Tensor]:
        """Name -> ∇W [B, out, in] of each example, the mean over all bins, draws and runs."""
        total: dict[str, Tensor] = {}
        shared: dict[tuple[str, ...], GroupGradients] = {}
        for timesteps, noise, _ in _all_draws(examples, draws, runs):
            noisy, target = self.schedule.noised(examples.latents, noise, timesteps)
            for group in self.engine(noisy, target, timesteps, examples.text)[0]:
                if is_beginning(group.inputs, examples.text):
                    before = shared.get(group.names)
                    shared[group.names] = replace(group, outputs=before.outputs + group.outputs) if before else group
                else:
                    _add(total, group)
        for group in shared.values():
            _add(total, group)
        count = len(runs) * draws.bins * draws.draws
        return {name: total[name] / count for name in self.engine.layers}


def _add(total: dict[str, Tensor], group: GroupGradients) -> None:
    for name, matrix in _matrices(group):
        total[name] = total[name] + matrix if name in total else matrix


def _matrices(group: GroupGradients) -> Iterator[tuple[str, Tensor]]:
    product = group.outputs.mT @ at_least_float32(group.inputs)
    return zip(group.names, product.split(group.sizes, dim=1), strict=True)


def _all_draws(examples: Examples, draws: DrawConfig, runs: range) -> Iterator[tuple[Tensor, Tensor, tuple]]:
    for run in runs:
        for bin_index in range(draws.bins):
            for index, (timesteps, noise) in enumerate(examples.draws(draws, run, bin_index)):
                yield timesteps, noise, (run, bin_index, index)


def unlearning_steps(curvature: Curvature, gradients: Changes, step: float, images: int) -> dict[str, Tensor]:
    """Δθ = (α/N) F⁻¹∇𝓛(ẑ, θ0) of every query (eq. 1): name -> [Q, out, in]; `step` is α and `images` is N."""
    natural = curvature.natural_gradients(gradients)
    return {name: matrix * (step / images) for name, matrix in natural.items()}


def moved(model: nn.Module, changes: Changes) -> nn.Module:
    """A copy of `model` at θ0 + Δθ, for `changes` [out, in] of one query; `abu.influence.mean_losses` compares them."""
    result = copy.deepcopy(model)
    for name, layer in select_layers(result).items():
        add_to_weights(layer, changes[name])
    return result


def first_order_scores(
    gradients: WeightGradients,
    examples: Examples,
    changes: Changes,
    draws: DrawConfig,
    *,
    runs: range = range(1),
    batch_size: int = 8,
    progress: bool = True,
) -> Tensor:
    """⟨Δθ_ẑ, ∇𝓛(z, θ0)⟩ [Q, B] of every query, from `changes` [Q, out, in]; higher is more influential.

    `batch_size` examples keep the gradients of all layers in memory at once.
    """
    bar = _bar(examples.batches(batch_size), "first order", progress)
    return torch.cat([_along(changes, gradients(batch, draws, runs).items()) for batch in bar], dim=1)


def second_order_scores(
    gradients: WeightGradients,
    examples: Examples,
    changes: Changes,
    draws: DrawConfig,
    *,
    runs: range = range(1),
    batch_size: int = 8,
    progress: bool = True,
) -> Tensor:
    """⟨Δθ_ẑ, ∇𝓛(z, θ0)⟩ + E‖JΔθ_ẑ‖² / n [Q, B], as `first_order_scores`; the squares by one random sign in each draw.

    All layers' changes of the output are added up before they are squared: one step moves all of them.
    """
    parts = []
    for batch in _bar(examples.batches(batch_size), "second order", progress):
        terms = []
        for timesteps, noise, place in _all_draws(batch, draws, runs):
            noisy, target = gradients.schedule.noised(batch.latents, noise, timesteps)
            directions = partial(slope_and_signs, target=target, signs=random_signs(draws, batch, *place))
            first, along = (
                _along(changes, chain.from_iterable(map(_matrices, groups)))
                for groups in gradients.engine.products(noisy, timesteps, batch.text, directions)
            )
            terms.append(first + along.square())
        parts.append(torch.stack(terms).mean(0))
    return torch.cat(parts, dim=1)


def _bar(batches: list[Examples], name: str, progress: bool) -> Iterable[Examples]:
    return tqdm(batches, desc=name, unit="batch", mininterval=1.0, disable=not progress)


def _along(changes: Changes, gradients: Iterable[tuple[str, Tensor]]) -> Tensor:
    """⟨Δθ, ∇W⟩ [Q, B], over all layers: the names of `gradients` and their matrices [B, out, in]."""
    terms = [changes[name].to(matrix).flatten(1) @ matrix.flatten(1).mT for name, matrix in gradients]
    return torch.stack(terms).sum(0)
