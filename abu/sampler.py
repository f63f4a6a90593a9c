"""Generates latents from noise: DDIM with classifier-free guidance, one seed an image, for any denoiser of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abu.models import SourceModel, sampling_schedule
from fastgda.core import keyed_generator


@dataclass(frozen=True)
class Sampler:
    """All of a text-to-image model but its denoiser."""

    shape: tuple[int, int, int]
    """(c, h, w) of the latents."""
    schedule: Any
    """diffusers' DDIMScheduler: the deterministic schedule over the model's noise levels."""
    guidance: float
    """Weight w of ε_∅ + w (ε_c − ε_∅)."""
    decode: Callable[[Tensor], Tensor]
    """Pixels [B, 3, P, P] in [-1, 1] of latents [B, c, h, w]."""
    empty: Tensor | None = None
    """Token states [T, d] of the empty caption ∅; all zero by default."""

    @staticmethod
    def of(source: SourceModel, guidance: float) -> Sampler:
        """That of a testbed's source model."""
        config = source.config
        shape = (config.latent_channels, config.sample_size, config.sample_size)
        return Sampler(shape, sampling_schedule(config), guidance, source.autoencoder.decode)

    @torch.inference_mode()
    def latents(self, denoiser: nn.Module, text: Tensor, seeds: list[int], steps: int) -> Tensor:
        """Latents [B, c, h, w] for token states [B, T, d] on the denoiser's device; an image's noise depends on its
        seed only.
        """
        noise = [torch.randn(self.shape, generator=keyed_generator("query", seed)) for seed in seeds]
        latents = torch.stack(noise).to(text.device)
        empty = torch.zeros_like(text) if self.empty is None else self.empty.to(text).expand_as(text)
        both = torch.cat([empty, text])
        self.schedule.set_timesteps(steps)
        for timestep in self.schedule.timesteps:
            unguided, conditional = denoiser(latents.repeat(2, 1, 1, 1), timestep, both).sample.chunk(2)
            guided = unguided + self.guidance * (conditional - unguided)
            latents = self.schedule.step(guided, timestep, latents).prev_sample
        return latents
