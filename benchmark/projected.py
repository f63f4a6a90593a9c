"""Projected gradients of training images and queries: what TRAK and its kin, and influence functions, multiply.

    φ(z) = Pᵀ W ∇_θ f(z, θ),        f averaged over (t, ε) in equal timestep bins

f is the diffusion loss (TRAK, JourneyTRAK, influence functions), the mean square of the prediction (D-TRAK) or its mean
(DAS); θ the weights of all Linear and Conv2d layers, biases included, or of fewer; W = 1, or F^(-1/2) in the basis of
a curvature, so that φᵀφ is an influence. P is a count sketch (Charikar et al. 2002; Weinberger et al. 2009): a random
sign for each weight, then folding to k numbers. Inner products stay unbiased with the variance of a dense projection,
at a cost that does not depend on k: the papers' dense signs would take 10¹¹ multiplications for an image.

No autograd graph is built per example: a layer's gradient is Σ gᵀa over positions and draws, one batched product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from abu.amortised import Examples
from abu.curvature import Curvature
from abu.diffusion_loss import NoiseSchedule, at_least_float32
from abu.draws import DrawConfig
from abu.layers import LayerGradients, LayerPattern
from fastgda.core import keyed_generator

Measure = Literal["loss", "square", "mean"]
EXAMPLES = 8
"""Examples whose gradients [weights] are in memory at once."""


@dataclass(frozen=True)
class FeatureConfig:
    """What is differentiated, and how it is projected."""

    measure: Measure = "loss"
    """f: the diffusion loss, the mean square of the prediction, or its mean."""
    layers: LayerPattern = "all"
    """Layers whose weights count."""
    curvature: Literal["none", "diagonal", "ekfac"] = "none"
    """F whose inverse root multiplies the gradient."""
    damping: float = 0.1
    """Its damping as a share of the mean eigenvalue of a layer; without a curvature of no effect."""
    projection: int = 16_384
    """k; without projection where there are no more weights."""
    bins: int = 10
    """Timestep bins."""
    draws: int = 2
    """Draws of (t, ε) in each bin for a training image."""
    query_draws: int = 4
    """The same for a query."""
    normalised: bool = False
    """Whether the gradient of each bin is brought to length one before the mean over bins (DAS)."""
    seed: int = 0
    only: int | None = None
    """The one bin that all draws are taken in, as many as all bins have together."""

    def __post_init__(self) -> None:
        if self.measure not in ("loss", "square", "mean") or self.projection < 1 or not self.damping > 0:
            raise ValueError(
                "expected measure loss, square or mean, a positive projection and damping, "
                f"found {self.measure!r}, {self.projection} and {self.damping}"
            )
        if self.only is not None and not 0 <= self.only < self.bins:
            raise ValueError(f"expected a bin from 0 to {self.bins - 1}, found {self.only}")

    @property
    def places(self) -> range:
        """Bins that draws are taken in."""
        return range(self.bins) if self.only is None else range(self.only, self.only + 1)

    def draws_of(self, part: str, timesteps: int) -> DrawConfig:
        """Draws of a split of the queries or, with "training", of the training set."""
        count = self.draws if part == "training" else self.query_draws
        count *= self.bins // len(self.places)
        return DrawConfig(self.bins, count, timesteps=timesteps, seed=self.seed)


class Projector:
    """Pᵀ: rows of `width` numbers to `size`, with signs from the seed; the identity up to signs if width ≤ size."""

    def __init__(self, width: int, size: int, seed: int, device: torch.device) -> None:
        self.size = min(size, width)
        bits = torch.randint(0, 2, (width,), generator=keyed_generator("projection", seed, width))
        self.signs = (2 * bits - 1).to(device, torch.float32)
        self.padding = -width % self.size

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, width] -> [B, size]."""
        signed = nn.functional.pad(rows * self.signs.to(rows.dtype), (0, self.padding))
        return signed.view(len(rows), -1, self.size).sum(1)


class ProjectedGradients:
    """φ of examples under one model."""

    def __init__(
        self, model: nn.Module, schedule: NoiseSchedule, config: FeatureConfig, curvature: Curvature | None = None
    ) -> None:
        """`curvature` must be there if, and only if, the configuration names one."""
        assert (curvature is None) == (config.curvature == "none")
        self.engine, self.schedule, self.config = LayerGradients(model, config.layers), schedule, config
        self.device = next(model.parameters()).device
        self.whitening = {}
        if curvature is not None:
            groups = curvature.for_layers(self.engine.layers).groups
            self.whitening = {group.names: (group, group.damped().rsqrt()) for group in groups}
        self.projector: Projector | None = None

    def __call__(self, examples: Examples, draws: DrawConfig, run: int = 0) -> tuple[Tensor, Tensor]:
        """(φ [B, k], residual [B]: root of the mean squared error, averaged over the draws).

        The error is that of the prediction; for the measure "square", the prediction itself.
        """
        parts = [self._few(batch, draws, run) for batch in examples.batches(EXAMPLES)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def journey(self, examples: Examples, predicted: Tensor, timesteps: Tensor, draws: int, seed: int) -> Tensor:
        """φ [B, k] along the way on which queries were sampled (JourneyTRAK: Georgiev et al. 2023, section 3).

        `predicted` [S, B, c, h, w] is E[x_0 | x_t] at the sampler's `timesteps` [S]: f_t is the loss of that estimate,
        noised again to t with `draws` draws of ε.
        """
        rows = []
        for low in range(0, len(examples.ids), EXAMPLES):
            few = examples.rows(low, low + EXAMPLES)
            batch = [
                (step.repeat(len(few.ids)), _noise(seed, few, int(step), k), clean)
                for step, clean in zip(timesteps, predicted[:, low : low + EXAMPLES], strict=True)
                for k in range(draws)
            ]
            rows.append(self._project(self._gradients(few, batch)[0]))
        return torch.cat(rows)

    def _few(self, examples: Examples, draws: DrawConfig, run: int) -> tuple[Tensor, Tensor]:
        places = range(draws.bins) if self.config.only is None else self.config.places
        bins = [[(t, e, examples.latents) for t, e in examples.draws(draws, run, index)] for index in places]
        if not self.config.normalised:
            bins = [[draw for drawn in bins for draw in drawn]]
        total, residual = torch.zeros(()), torch.zeros(())
        for drawn in bins:
            gradient, error = self._gradients(examples, drawn)
            if self.config.normalised:
                gradient = nn.functional.normalize(gradient, dim=1)
            total, residual = total + gradient / len(bins), residual + error / len(bins)
        return self._project(total), residual

    def _gradients(self, examples: Examples, drawn: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(W∇f [B, weights] as the mean over draws (t, ε, x_0), residual [B])."""
        count, device = len(drawn), self.device
        timesteps, noise, clean = (torch.cat(parts).to(device) for parts in zip(*drawn, strict=True))
        text = examples.text.repeat(count, 1, 1)
        noisy, target = self.schedule.noised(clean, noise.to(clean), timesteps)
        errors = None
        if self.config.measure == "square":
            target = torch.zeros_like(target)
        elif self.config.measure == "mean":
            with torch.no_grad():
                output = self.engine.model(noisy, timesteps, text).sample
            errors = (output - target).square().flatten(1).mean(1)
            # The gradient of mean((f - c)²) at c = f - 1/2 is that of mean(f).
            target = output - 0.5
        groups, losses = self.engine(noisy, target, timesteps, text)
        errors = losses if errors is None else errors
        columns = []
        for group in groups:
            g, a = (_by_example(tensor, count) for tensor in (group.outputs, at_least_float32(group.inputs)))
            gradient = g.mT @ a / count
            if self.whitening:
                factor, root = self.whitening[group.names]
                gradient = factor.rotate(gradient) * root
            columns.append(gradient.flatten(1))
        return torch.cat(columns, 1), errors.sqrt().view(count, -1).mean(0)

    def _project(self, gradients: Tensor) -> Tensor:
        if self.projector is None:
            width = gradients.shape[1]
            self.projector = Projector(width, self.config.projection, self.config.seed, gradients.device)
        return self.projector(gradients)


def _by_example(tensor: Tensor, draws: int) -> Tensor:
    """[draws · B, T, d] -> [B, draws · T, d]."""
    return tensor.unflatten(0, (draws, -1)).transpose(0, 1).flatten(1, 2)


def _noise(seed: int, examples: Examples, step: int, draw: int) -> Tensor:
    """ε [B, c, h, w] of a step of the way."""
    shape = tuple(examples.latents.shape[1:])
    keys = [("journey", examples.role, seed, example, step, draw) for example in examples.ids]
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key)) for key in keys])
