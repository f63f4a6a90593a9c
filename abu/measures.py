"""Measured functions: what is differentiated where it is not the loss, as in D-TRAK and DAS.

D-TRAK (Zheng et al. 2024, section 3) attributes with the gradient of another function of the output f_θ(x_t, c, t) than
the loss; DAS (Lin et al. 2025) with that of its mean element, weighted by the training image's own error:

    square     mean of f²                  D-TRAK's choice, L_Square
    average    mean of f                   L_Avg, and the g of DAS
    l1, l2     ‖f‖_1, ‖f‖_2                L_1-norm, L_2-norm
    linf       max |f|                     L_∞-norm

The output f is what the model predicts, ε or v. Where we depart from both: the gradients are whitened by the EK-FAC
factors of the loss and not by their own second moments (GᵀG + λI), and taken for the key/value layers only.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from abu.diffusion_loss import at_least_float32
from abu.keyvalue import OutputGradients

Measure = Literal["loss", "square", "average", "l1", "l2", "linf"]
MEASURES: tuple[str, ...] = get_args(Measure)


def measured(name: str, output: Tensor) -> Tensor:
    """The measured function of outputs [B, ...]: [B]."""
    flat = at_least_float32(output).flatten(1)
    match name:
        case "square":
            return flat.square().mean(1)
        case "average":
            return flat.mean(1)
        case "l1":
            return flat.abs().sum(1)
        case "l2":
            return flat.square().sum(1).sqrt()
        case "linf":
            return flat.abs().amax(1)
    raise ValueError(f"measure: expected one of {', '.join(MEASURES[1:])}, found {name!r}")


class MeasuredGradients(OutputGradients):
    """Gradients at the outputs of the key/value layers of a measured function instead of the loss."""

    def __init__(self, model: nn.Module, measure: str) -> None:
        super().__init__(model)
        measured(measure, torch.ones(1, 1))
        self.measure = measure

    def __call__(self, noisy: Tensor, target: Tensor, timesteps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(g [B, T, Σ out] of each example's measured function, its loss [B])."""
        losses: list[Tensor] = []

        def slope(output: Tensor) -> tuple[Tensor, ...]:
            found = at_least_float32(output)
            losses.append((found - at_least_float32(target)).square().flatten(1).mean(1))
            with torch.enable_grad():
                leaf = found.requires_grad_()
                return torch.autograd.grad(measured(self.measure, leaf).sum(), leaf)

        return self.products(noisy, timesteps, text, slope)[0], losses[0]


def gradients_of(model: nn.Module, measure: str = "loss") -> OutputGradients:
    """What computes gradients of the loss or of a measured function."""
    return OutputGradients(model) if measure == "loss" else MeasuredGradients(model, measure)
