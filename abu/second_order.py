"""Amortised AbU+ to second order: how much each training image's loss rises after an unlearning step of finite size.

With w = F⁻¹∇𝓛(ẑ, θ0), the step Δθ = (α/N) w (eq. 1) moves the output f of a training image by JΔθ, J its Jacobian, and

    τ(ẑ, z) = 𝓛(z, θ0 + Δθ) − 𝓛(z, θ0) ≈ (α/N) ⟨w, ∇𝓛(z)⟩ + (α/N)² E_{t,ε} ‖J w‖² / n        (n elements in f)

which is exact where f is linear in the weights that are moved (Gauss-Newton). The first term is `abu.amortised`'s and
has either sign: of the images that a query draws on, some lie on the side that the step moves away from and some on the
other, and their losses fall. The second is what every one of them loses because its output is changed at all; at steps
that are still small against the loss it decides who is at the top. It needs no more passes than the first: for random
signs v, E_v ⟨w, Jᵀv⟩² = ‖J w‖² (Hutchinson), and Jᵀv costs a backward pass that no query changes.

Products are taken between whitened gradients, F^(-1/2) on both sides. The first order uses all their numbers. For the
squares they are folded to fewer (`abu.amortised.Sketch`), twice, with independent signs: the product of the two folded
inner products is the square on average, where the square of one would be too large by what folding adds to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from abu.amortised import Compression, Examples, Sketch, inner_products, require_finite, sketched
from abu.curvature import DiagonalFisher
from abu.diffusion_loss import NoiseSchedule, at_least_float32
from abu.draws import DrawConfig
from abu.keyvalue import OutputGradients
from fastgda.core import keyed_generator

Array = TypeVar("Array", np.ndarray, Tensor)


def loss_change_at(first: Array, second: Array, step: float, images: int) -> Array:
    """τ after a step of α = `step` from both terms [..., Q, B], for N = `images`.

    `first` is ⟨w, ∇𝓛(z)⟩ and `second` E ‖J w‖² / n.
    """
    size = step / images
    return size * first + size**2 * second


def random_signs(draws: DrawConfig, examples: Examples, run: int, bin_index: int, index: int) -> Tensor:
    """v [B, c, h, w] / √n of one draw: signs keyed as its noise is, so that they are the same in any batch."""
    shape, rows = examples.latents.shape[1:], []
    for example in examples.ids:
        generator = keyed_generator("signs", examples.role, draws.seed, example, run, bin_index, index)
        rows.append(torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    signs = torch.stack(rows).to(examples.latents)
    return signs / signs[0].numel() ** 0.5


class TrainingTerms:
    """What training images contribute, whatever the query: ∇𝓛(z), averaged over draws, and Jᵀv of every draw."""

    def __init__(self, model: nn.Module, schedule: NoiseSchedule) -> None:
        self.engine, self.schedule = OutputGradients(model), schedule

    def __call__(self, examples: Examples, draws: DrawConfig, run: int) -> tuple[Tensor, list[Tensor]]:
        """(g [B, T, out] of the mean loss; g of Jᵀv/√n, draw by draw) for one run, all bins.

        `ValueError` naming the example if one is not finite.
        """
        slopes, products = [], []
        for bin_index in range(draws.bins):
            for index, (timesteps, noise) in enumerate(examples.draws(draws, run, bin_index)):
                noisy, target = self.schedule.noised(examples.latents, noise, timesteps)
                signs = random_signs(draws, examples, run, bin_index, index)
                directions = partial(slope_and_signs, target=target, signs=signs)
                slope, product = self.engine.products(noisy, timesteps, examples.text, directions)
                require_finite(slope, "gradient", examples, bin_index)
                require_finite(product, "product with random signs", examples, bin_index)
                slopes.append(slope)
                products.append(product)
        return torch.stack(slopes).mean(0), products


def slope_and_signs(output: Tensor, target: Tensor, signs: Tensor) -> list[Tensor]:
    """Directions of the output whose Jᵀv are the loss's gradient and the random one of the squares."""
    error = at_least_float32(output) - at_least_float32(target)
    return [error * (2 / error[0].numel()), signs]


@dataclass(frozen=True)
class TwoFolds:
    """Whitening and folding, twice with independent signs, side by side."""

    first: Sketch
    second: Sketch

    @staticmethod
    def of(curvature: DiagonalFisher, fold: int, seed: int = 0) -> TwoFolds:
        """Adds up `fold` numbers to one; `ValueError` unless it divides their number."""
        weights = curvature.eigenvalues.numel()
        if weights % fold:
            raise ValueError(f"--fold: expected a divisor of the {weights} weights, found {fold}")
        return TwoFolds(*(Sketch.of(curvature, weights // fold, 2 * seed + part) for part in range(2)))

    @property
    def size(self) -> int:
        """Numbers that are kept of a gradient."""
        return self.first.size + self.second.size

    def __call__(self, rotated: Tensor) -> Tensor:
        """Vectors [B, size] of rotated gradients [B, out, in]."""
        return torch.cat([self.first(rotated), self.second(rotated)], dim=1)


@dataclass(frozen=True)
class StepVectors:
    """Whitened gradients of queries or training images."""

    whole: Tensor
    """Of the loss, [B, weights]."""
    folded: list[Tensor]
    """What the squares are made of, [B, size] of `TwoFolds`: for queries the same gradients again, for training images
    Jᵀv/√n of every draw."""

    @staticmethod
    def of_images(
        terms: tuple[Tensor, list[Tensor]],
        text: Tensor,
        curvature: DiagonalFisher,
        whole: Compression,
        folded: Compression,
    ) -> StepVectors:
        """Of training images with token states `text` [B, T, in], from what `TrainingTerms` found."""
        slopes, products = terms
        return StepVectors(
            sketched(slopes, text, curvature, whole),
            [sketched(product, text, curvature, folded) for product in products],
        )


def loss_terms(queries: StepVectors, images: StepVectors) -> tuple[Tensor, Tensor]:
    """(first, second) [Q, B] of `loss_change_at` for every query and training image."""
    first = inner_products(queries.whole, images.whole)
    (folded,) = queries.folded
    second = torch.zeros_like(first)
    for vectors in images.folded:
        halves = zip(folded.chunk(2, 1), vectors.chunk(2, 1), strict=True)
        left, right = (inner_products(query, image) for query, image in halves)
        second += left * right
    return first, second / len(images.folded)
