"""Amortised AbU+: one pass over the training set scores every query.

The unlearning step is tiny, so to first order the loss change is τ(ẑ, z) = ⟨Δθ_ẑ, ∇𝓛(z, θ0)⟩ ∝ ⟨P∇𝓛(ẑ), P∇𝓛(z)⟩ with
P = F^(-1/2), the whitening of the EK-FAC eigenbasis. Two teachers come out of the same pass:

- plain:       ⟨mean_b q_b, mean_b g_b⟩,  the first-order form of the paper's AbU+;
- normalised:  Σ_b w_b ⟨q_b / ‖q_b‖, g_b / ‖g_b‖⟩,  a cosine in each timestep bin b, as DAS normalises gradients,

with q_b, g_b the whitened gradients of query and training image, averaged over the draws in bin b, and w_b the weights
of the bins. Whitened gradients [out, in] are folded to `sketch` numbers with random signs (count sketch): inner
products stay unbiased and their error is about ‖q‖‖g‖ / √sketch. Two independent runs of all draws (training side and
query side) are kept apart to the end, so that the reliability of the teacher is measured and not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from abu.curvature import CHUNK, DiagonalFisher
from abu.diffusion_loss import NoiseSchedule, at_least_float32
from abu.draws import DrawConfig, draw
from abu.measures import gradients_of
from fastgda.core import keyed_generator

RUNS = 2
"""Independent halves of the draws."""
PIECE = 8192
"""Numbers of a vector that are summed in a type narrower than float32."""
SMALLEST = 1e-12
"""Norm below which a gradient counts as zero."""


class Compression(Protocol):
    """Whitening of rotated gradients [B, out, in] to vectors [B, size] that keep inner products, more or less."""

    @property
    def size(self) -> int:
        """Numbers that are kept of a gradient."""

    def __call__(self, rotated: Tensor) -> Tensor:
        """Vectors [B, size] of rotated gradients [B, out, in]."""


@dataclass(frozen=True)
class Sketch:
    """Whitening and folding of rotated gradients [out, in] to vectors of `size` numbers."""

    factor: Tensor
    """random sign / √(S + λ), [out · in]."""
    size: int

    @staticmethod
    def of(curvature: DiagonalFisher, size: int | None = None, seed: int = 0) -> Sketch:
        """Folds to all numbers by default; raises `ValueError` unless `size` divides the number of weights."""
        damped = curvature.damped()
        size = size or damped.numel()
        if damped.numel() % size:
            raise ValueError(f"sketch: expected a divisor of the {damped.numel()} weights, found {size}")
        bits = torch.randint(0, 2, damped.shape, generator=keyed_generator("sketch", seed))
        signs = (2 * bits - 1).to(damped)
        return Sketch((signs / damped.sqrt()).flatten(), size)

    def __call__(self, rotated: Tensor) -> Tensor:
        """Sketches [B, size] of rotated gradients [B, out, in]."""
        parts = rotated.flatten(1).view(len(rotated), -1, self.size)
        first, *others = self.factor.view(-1, self.size)
        total = parts[:, 0] * first
        for index, factor in enumerate(others, start=1):
            total.addcmul_(parts[:, index], factor)
        return total


def sketched(gradients: Tensor, text: Tensor, curvature: DiagonalFisher, sketch: Compression) -> Tensor:
    """Whitened, compressed weight gradients [B, size], from output gradients g [B, T, out] and tokens a [B, T, in]."""
    found = gradients.new_empty(len(gradients), sketch.size)
    pieces = (tensor.split(CHUNK) for tensor in (found, gradients, text))
    for rows, g, a in zip(*pieces, strict=True):
        rows.copy_(sketch(curvature.rotated_gradients(g, a)))
    return found


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

    def batches(self, size: int) -> list[Examples]:
        """Slices of `size`, the last one shorter."""
        return [self.rows(start, start + size) for start in range(0, len(self.ids), size)]

    def draws(self, config: DrawConfig, run: int, bin_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(timesteps [B], noise [B, c, h, w]) of every draw in one bin, where and as the latents are."""
        shape = tuple(self.latents.shape[1:])
        for index in range(config.draws):
            timesteps, noise = draw(config, self.role, self.ids, run, bin_index, index, shape)
            yield timesteps.to(self.latents.device), noise.to(self.latents)


def require_finite(values: Tensor, name: str, examples: Examples, bin_index: int) -> None:
    """`ValueError` naming the first example whose `values` [B, ...] are not all finite: NaN would be stored unseen."""
    good = torch.isfinite(values).view(len(values), -1).all(1)
    if not good.all():
        example = examples.ids[int((~good).nonzero()[0])]
        raise ValueError(
            f"{examples.role} example {example}, timestep bin {bin_index}: expected a finite {name}, "
            "found NaN or infinity"
        )


class MeanGradients:
    """Gradients at the outputs of the key/value layers, averaged over draws within each timestep bin."""

    def __init__(
        self, model: torch.nn.Module, schedule: NoiseSchedule, *, bf16: bool = False, measure: str = "loss"
    ) -> None:
        self.gradients = gradients_of(model, measure)
        self.schedule, self.bf16 = schedule, bf16

    def __call__(self, examples: Examples, config: DrawConfig, run: int) -> Tensor:
        """g [bins, B, T, out] of one run of draws (a does not depend on t, so the mean may be taken here)."""
        return torch.stack([self.of_bin(examples, config, run, index) for index in range(config.bins)])

    def of_bin(self, examples: Examples, config: DrawConfig, run: int, bin_index: int) -> Tensor:
        """g [B, T, out] of one timestep bin."""
        return self.with_losses(examples, config, run, bin_index)[0]

    def with_losses(self, examples: Examples, config: DrawConfig, run: int, bin_index: int) -> tuple[Tensor, Tensor]:
        """(g [B, T, out], mean losses [B]) of one timestep bin; `ValueError` if an example's are not finite."""
        device = examples.latents.device
        total: Tensor | None = None
        loss_sum = torch.zeros(len(examples.ids), device=device)
        for timesteps, noise in examples.draws(config, run, bin_index):
            noisy, target = self.schedule.noised(examples.latents, noise, timesteps)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                gradients, losses = self.gradients(noisy, target, timesteps, examples.text)
            total = gradients if total is None else total + gradients
            loss_sum += losses.float()
        assert total is not None
        require_finite(loss_sum, "loss", examples, bin_index)
        require_finite(total, "gradient", examples, bin_index)
        return total / config.draws, loss_sum / config.draws


@dataclass(frozen=True)
class QueryMatrix:
    """Sketched gradients of all queries, ready to be multiplied with those of training images."""

    normalised: Tensor
    """q_b / ‖q_b‖, [bins, Q, sketch]; float32 or, for products in half the time, bfloat16."""
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

    @staticmethod
    def joined(parts: Sequence[QueryMatrix]) -> QueryMatrix:
        """The queries of all parts, one after the other."""
        return QueryMatrix(
            torch.cat([part.normalised for part in parts], dim=1), torch.cat([part.plain for part in parts])
        )


def inner_products(queries: Tensor, vectors: Tensor) -> Tensor:
    """Inner products [Q, B] of `queries` [Q, size] and `vectors` [B, size], float32 or better.

    Numbers are multiplied in the type of `queries`. With one narrower than float32 they are summed piece by piece, so
    that their sum is not rounded to it: ranks within a few significant bits would be ties.
    """
    if queries.dtype in (torch.float32, torch.float64):
        return queries @ vectors.to(queries.dtype).mT
    total = torch.zeros(len(queries), len(vectors), device=queries.device)
    for left, right in zip(queries.split(PIECE, 1), vectors.to(queries.dtype).split(PIECE, 1), strict=True):
        total += left @ right.mT
    return total


def score_block(queries: QueryMatrix, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of B training images with sketched gradients [bins, B, sketch].

    Returns (plain [Q, B], the normalised teacher's term of each bin [bins, Q, B]), float32 or better.
    """
    plain = inner_products(queries.plain, vectors.mean(0))
    # One product a bin: a batched one would first copy queries that do not lie side by side. Images are not scaled to
    # norm one but their products are, which moves fewer bytes.
    terms = [
        inner_products(query, image) / at_least_float32(image.norm(dim=-1)).clamp(min=SMALLEST)
        for query, image in zip(queries.normalised, vectors, strict=True)
    ]
    return plain, torch.stack(terms)
