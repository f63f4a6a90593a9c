"""From projected gradients to scores: the kernels of TRAK and DAS, and plain inner products.

Φ [N, k] holds φ of the training images, φ(ẑ) is that of a query; λ is the ridge.

- TRAK (Park et al. 2023, eq. 13, with the loss itself as output, so that Q = 1; Zheng et al. 2024, eq. 5), JourneyTRAK
  and D-TRAK: τ(ẑ, z_i) = φ(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z_i); a mean over models where there are several.
- DAS (Lin et al. 2024, eq. 12): τ(ẑ, z_i) = (φ(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z_i) · r_i / (1 − h_i))², with r_i the residual of
  image i and h_i = φ(z_i)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z_i) its leverage.
- influence functions: τ = φ(ẑ)ᵀφ(z_i), the curvature being in φ.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that validation chooses among, as shares of the mean squared length of φ."""


class Kernel:
    """(ΦᵀΦ + λI)⁻¹ for any λ, from one eigendecomposition of the smaller of ΦᵀΦ and ΦΦᵀ, in float64."""

    def __init__(self, training: Tensor) -> None:
        """`training` is Φ [N, k]; `ValueError` if it is not finite or all zero."""
        phi = training.double()
        if not torch.isfinite(phi).all() or not phi.any():
            raise ValueError("projected gradients: expected finite numbers that are not all zero, found others")
        self.training, self.dual = phi, phi.shape[0] <= phi.shape[1]
        values, self.vectors = torch.linalg.eigh(phi @ phi.mT if self.dual else phi.mT @ phi)
        self.values = values.clamp(min=0)
        self.scale = float(phi.square().sum(1).mean())
        """Mean squared length of φ, which the grid of ridges is relative to."""

    def scores(self, queries: Tensor, ridge: float) -> Tensor:
        """φ(ẑ)ᵀ (ΦᵀΦ + λI)⁻¹ Φᵀ [Q, N], for φ(ẑ) [Q, k]."""
        inverse = self._inverse(ridge)
        if self.dual:
            # (ΦᵀΦ + λI)⁻¹ Φᵀ = Φᵀ (ΦΦᵀ + λI)⁻¹
            return (queries.double() @ self.training.mT @ self.vectors * inverse) @ self.vectors.mT
        return (queries.double() @ self.vectors * inverse) @ (self.training @ self.vectors).mT

    def matrix(self, ridge: float) -> Tensor:
        """Φ (ΦᵀΦ + λI)⁻¹ [N, k]: all of a score that does not depend on the query."""
        inverse = self._inverse(ridge)
        if self.dual:
            return (self.vectors * inverse) @ (self.vectors.mT @ self.training)
        return (self.training @ self.vectors * inverse) @ self.vectors.mT

    def leverage(self, ridge: float) -> Tensor:
        """h [N]."""
        inverse = self._inverse(ridge)
        if self.dual:
            return self.vectors.square() @ (self.values * inverse)
        return (self.training @ self.vectors).square() @ inverse

    def _inverse(self, ridge: float) -> Tensor:
        if not ridge > 0:
            raise ValueError(f"ridge: expected a positive number, found {ridge}")
        return 1 / (self.values + ridge)


def das_scores(kernel: Kernel, queries: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """DAS [Q, N], for φ(ẑ) [Q, k] and the training images' residuals [N]."""
    change = kernel.scores(queries, ridge) * residual.double() / (1 - kernel.leverage(ridge))
    return change.square()
