"""The diffusion loss 𝓛(z, θ) = E_{t,ε} ‖target − f_θ(x_t, c, t)‖², mean over elements (paper, section 3.1; w_t = 1).

The target is ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho 2022, eq. 11); nothing else depends on which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels and the parametrisation that a model was trained with."""

    alphas_cumprod: Tensor
    """ᾱ_t [timesteps]."""
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {PREDICTIONS}, found {self.prediction!r}")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, target), both [B, c, h, w], for integer `timesteps` [B]."""
        alpha = self.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        signal, deviation = alpha.sqrt(), (1 - alpha).sqrt()
        target = noise if self.prediction == "epsilon" else signal * noise - deviation * latents
        return signal * latents + deviation * noise, target


def example_losses(model: nn.Module, noisy: Tensor, target: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Loss of each example [B], in float32 or better: the mean over elements of the squared error."""
    predicted = model(noisy, timesteps, text).sample
    return (at_least_float32(predicted) - at_least_float32(target)).square().flatten(1).mean(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is in float64: losses and gradients are never summed in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
