"""Amortised AbU+: one pass over the training set scores every query.

The unlearning step is tiny, so to first order the loss change is τ(ẑ, z) = ⟨Δθ_ẑ, ∇𝓛(z, θ0)⟩ ∝ ⟨P∇𝓛(ẑ), P∇𝓛(z)⟩ with
P = F^(-1/2), the whitening of the EK-FAC eigenbasis. Two teachers come out of the same pass:

- plain:       ⟨mean_b q_b, mean_b g_b⟩,  the first-order form of the paper's AbU+;
- normalised:  mean_b ⟨q_b / ‖q_b‖, g_b / ‖g_b‖⟩,  a cosine in each timestep bin b, as DAS normalises gradients,

with q_b, g_b the whitened gradients of query and training image, averaged over the draws in bin b. Whitened gradients
[out, in] are folded to `sketch` numbers with random signs (count sketch): inner products stay unbiased and their error
is about ‖q‖‖g‖ / √sketch. Two independent runs of all draws (training side and query side) are kept apart to the end,
so that the reliability of the teacher is measured and not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from abu.curvature import DiagonalFisher
from abu.diffusion_loss import NoiseSchedule, at_least_float32
from abu.draws import DrawConfig, draw
from abu.keyvalue import OutputGradients
from fastgda.core import keyed_generator

RUNS = 2
"""Independent halves of the draws."""
CHUNK = 8
"""Examples whose gradients [out, in] are in memory at once."""


@dataclass(frozen=True)
class Sketch:
    """Whitening and folding of rotated gradients [out, in] to vectors of `size` numbers."""

    factor: Tensor
    """random sign / √(S + λ), [out · in]."""
    size: int

    @staticmethod
    def of(curvature: DiagonalFisher, size: int, seed: int = 0) -> Sketch:
        """Raises `ValueError` unless `size` divides the number of weights."""
        damped = curvature.damped()
        if damped.numel() % size:
            raise ValueError(f"sketch: expected a divisor of the {damped.numel()} weights, found {size}")
        bits = torch.randint(0, 2, damped.shape, generator=keyed_generator("sketch", seed))
        signs = (2 * bits - 1).to(damped)
        return Sketch((signs / damped.sqrt()).flatten(), size)

    def __call__(self, rotated: Tensor) -> Tensor:
        """Sketches [B, size] of rotated gradients [B, out, in]."""
        return (rotated.flatten(1) * self.factor).view(len(rotated), -1, self.size).sum(1)


@dataclass(frozen=True)
class Examples:
    """Images whose gradients are wanted."""

    role: str
    """Keys their noise: "train", or the split of the queries."""
    ids: list[int]
    latents: Tensor
    """[B, c, h, w], standardised."""
    text: Tensor
    """Token states [B, T, d]."""

    def rows(self, start: int, stop: int) -> Examples:
        """A slice."""
        return Examples(self.role, self.ids[start:stop], self.latents[start:stop], self.text[start:stop])

    def draws(self, config: DrawConfig, run: int, bin_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(timesteps [B], noise [B, c, h, w]) of every draw in one bin, where and as the latents are."""
        shape = tuple(self.latents.shape[1:])
        for index in range(config.draws):
            timesteps, noise = draw(config, self.role, self.ids, run, bin_index, index, shape)
            yield timesteps.to(self.latents.device), noise.to(self.latents)


class GradientEngine:
    """Whitened, sketched gradients of examples, one vector per timestep bin."""

    def __init__(
        self,
        model: torch.nn.Module,
        schedule: NoiseSchedule,
        curvature: DiagonalFisher,
        sketch: Sketch,
        *,
        bf16: bool = False,
    ) -> None:
        self.gradients = OutputGradients(model)
        curvature.require_fit(self.gradients.layers)
        self.schedule = schedule
        self.curvature, self.sketch, self.bf16 = curvature, sketch, bf16

    def output_gradients(self, examples: Examples, config: DrawConfig, run: int, bin_index: int) -> Tensor:
        """g [B, T, out], the mean over the draws of one bin (a does not depend on t, so the mean may be taken here)."""
        device = examples.latents.device
        total: Tensor | None = None
        for timesteps, noise in examples.draws(config, run, bin_index):
            noisy, target = self.schedule.noised(examples.latents, noise, timesteps)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                gradients = self.gradients(noisy, target, timesteps, examples.text)[0]
            total = gradients if total is None else total + gradients
        assert total is not None
        return total / config.draws

    def __call__(self, examples: Examples, config: DrawConfig, run: int) -> Tensor:
        """Sketched gradients [bins, B, sketch] of one run of draws."""
        vectors = []
        for bin_index in range(config.bins):
            gradients = self.output_gradients(examples, config, run, bin_index)
            # A few examples at a time: their weight gradients stay in the processor's cache.
            pieces = zip(gradients.split(CHUNK), examples.text.split(CHUNK), strict=True)
            vectors.append(torch.cat([self.sketch(self.curvature.rotated_gradients(g, a)) for g, a in pieces]))
        return torch.stack(vectors)


@dataclass(frozen=True)
class QueryMatrix:
    """Sketched gradients of all queries, ready to be multiplied with those of training images."""

    normalised: Tensor
    """q_b / ‖q_b‖, [bins, Q, sketch]."""
    plain: Tensor
    """mean_b q_b scaled to norm one, [Q, sketch]."""

    @staticmethod
    def of(vectors: Tensor, dtype: torch.dtype | None = None) -> QueryMatrix:
        """From sketched gradients [bins, Q, sketch]; `dtype` is that of the products, the vectors' own by default."""
        dtype = dtype or vectors.dtype
        plain = vectors.mean(0)
        return QueryMatrix(
            torch.nn.functional.normalize(vectors, dim=-1).to(dtype),
            torch.nn.functional.normalize(plain, dim=-1).to(dtype),
        )


def score_block(queries: QueryMatrix, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of B training images with sketched gradients [bins, B, sketch].

    Returns (plain [Q, B], the normalised teacher's term of each bin [bins, Q, B]), float32 or better.
    """
    dtype = queries.plain.dtype
    unit = torch.nn.functional.normalize(vectors, dim=-1).to(dtype)
    plain = queries.plain @ vectors.mean(0).to(dtype).mT
    return at_least_float32(plain), at_least_float32(torch.bmm(queries.normalised, unit.mT))
