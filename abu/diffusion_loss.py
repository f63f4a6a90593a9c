"""The diffusion loss 𝓛(z, θ) = E_{t,ε} ‖target − f_θ(x_t, c, t)‖², mean over elements (paper, section 3.1; w_t = 1).

What is noised, and what the model predicts, is its parametrisation; nothing else depends on it:

    epsilon         x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε      target ε
    v_prediction    the same                           target √ᾱ_t ε − √(1 − ᾱ_t) x_0  (Salimans and Ho 2022, eq. 11)
    flow            x_t = (1 − σ_t) x_0 + σ_t ε        target ε − x_0  (Lipman et al. 2023; the sign is diffusers')
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels and the parametrisation that a model was trained with."""

    levels: Tensor
    """ᾱ_t [timesteps], falling; for flow matching σ_t, rising. A timestep is a place in it: 0 has the least noise."""
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {PREDICTIONS}, found {self.prediction!r}")

    def __len__(self) -> int:
        return len(self.levels)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target), both [B, c, h, w], for integer `timesteps` [B]."""
        level = self.levels.to(latents)[timesteps].view(-1, 1, 1, 1)
        if self.prediction == "flow":
            return (1 - level) * latents + level * noise, noise - latents
        signal, deviation = level.sqrt(), (1 - level).sqrt()
        target = noise if self.prediction == "epsilon" else signal * noise - deviation * latents
        return signal * latents + deviation * noise, target


def example_losses(model: nn.Module, noisy: Tensor, target: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Loss of each example [B], in float32 or better: the mean over elements of the squared error."""
    predicted = model(noisy, timesteps, text).sample
    return (at_least_float32(predicted) - at_least_float32(target)).square().flatten(1).mean(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is in float64: losses and gradients are never summed in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
