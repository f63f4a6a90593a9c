"""Smaller stand-ins for whitened gradients: the largest eigen-directions, and 8 bits instead of 32.

A score is an inner product of whitened gradients w = (U_Bᵀ ∇W U_A) / √(S + λ), with as many numbers as there are
weights. Three ways to keep fewer, which can be combined: `abu.amortised.Sketch` folds all of them with random signs
(unbiased, noisy), `Truncation` keeps some of them (no noise, but blind to the rest), `Quantised` keeps each to 8 bits.
What each costs in rank is measured by `python -m benchmark.compression`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abu.curvature import DiagonalFisher

LARGEST = 127
"""Largest code of a number in 8 bits."""


@dataclass(frozen=True)
class Truncation:
    """Whitening of the eigen-directions that are expected to contribute most to inner products."""

    places: Tensor
    """[size] in the flattened matrix [out · in], ascending."""
    factor: Tensor
    """1 / √(S + λ) at these places."""

    @staticmethod
    def of(curvature: DiagonalFisher, size: int, contribution: Tensor | None = None) -> Truncation:
        """Keeps the `size` places of the largest `contribution` [out, in], by default of E[w²] = S / (S + λ).

        S is the second moment of single draws' gradients, most of which is noise; a contribution that was measured on
        stored mean gradients (`signal`) chooses better. Raises `ValueError` unless `size` directions exist.
        """
        damped = curvature.damped()
        if not 0 < size <= damped.numel():
            raise ValueError(f"truncation: expected 1 to {damped.numel()} directions, found {size}")
        expected = curvature.eigenvalues / damped if contribution is None else contribution
        places = expected.flatten().topk(size).indices.sort().values
        return Truncation(places, damped.flatten()[places].rsqrt())

    @property
    def size(self) -> int:
        """Directions that are kept."""
        return len(self.places)

    def __call__(self, rotated: Tensor) -> Tensor:
        """Vectors [B, size] of rotated gradients [B, out, in]."""
        return rotated.flatten(1)[:, self.places] * self.factor


class SignalSums:
    """What two independent runs of draws agree on in each eigen-direction: E[w w'] over examples and timestep bins.

    Noise of the draws is independent between the runs and averages out, so this is the second moment of the gradients'
    expectation, which alone carries influence.
    """

    def __init__(self, curvature: DiagonalFisher) -> None:
        self.curvature, self.count = curvature, 0
        self.total = torch.zeros_like(curvature.eigenvalues)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Adds rotated gradients [B, out, in] of the same examples in two runs."""
        self.total += (first * second).sum(0)
        self.count += len(first)

    def contribution(self) -> Tensor:
        """E[w w'] [out, in]."""
        return self.total / self.curvature.damped() / max(self.count, 1)


@dataclass(frozen=True)
class Quantised:
    """Vectors in 8 bits: the nearest multiples of each one's largest number / 127."""

    codes: Tensor
    """int8 [..., D]."""
    scales: Tensor
    """[..., 1]."""

    @staticmethod
    def of(vectors: Tensor) -> Quantised:
        """Of vectors [..., D]; an error of at most half a step in each number."""
        scales = vectors.abs().amax(-1, keepdim=True) / LARGEST
        steps = vectors / scales.clamp(min=torch.finfo(vectors.dtype).tiny)
        return Quantised(steps.round().to(torch.int8), scales)

    def vectors(self) -> Tensor:
        """What they stand for, in the type of the scales."""
        return self.codes.to(self.scales.dtype) * self.scales
