"""What the teacher needs of a source model, and the constants that the paper used with its two.

Four sources fill the protocol: the testbed's (`abu.models`), the COCO model (`abu.coco`) and any folder that diffusers
saved (`abu.pipelines`), Stable Diffusion among them. `abu.pipelines.open_source` tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from abu.diffusion_loss import NoiseSchedule


class Source(Protocol):
    """A text-to-image model whose loss the teacher differentiates."""

    @property
    def denoiser(self) -> nn.Module:
        """Called as `denoiser(noisy, timesteps, text).sample`, with timesteps as places in the schedule and everything
        that a caption conditions as one tensor [B, T, d] (see `abu.conditioning`). Its text key/value projections are
        those that `abu.layers.select_layers(denoiser, "cross-attn-kv")` gives."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels and target of its loss."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""


@dataclass(frozen=True)
class PaperSettings:
    """What the paper unlearned and scored with (section 4 and its appendix)."""

    images: int
    """N of eq. 1."""
    step: float
    """α of eq. 1. The Newton step, which multiplies F⁻¹∇𝓛, is α/N: Stable Diffusion's 0.002 is α, and is divided by
    N = 400 M."""
    query_draws: int
    """Draws of (t, ε) for the gradient of a query."""
    timesteps: int
    """Equally spaced timesteps at which a training image's loss is compared."""
    captions: int
    """Captions of each training image that the loss is averaged over."""
    candidates: int
    """Nearest neighbours of the query that influence is computed on."""
    views: int = 2
    """Unflipped and flipped; τ is the larger of both."""


COCO = PaperSettings(118_287, 0.01, 50_000, 20, 5, 10_000)
STABLE_DIFFUSION = PaperSettings(400_000_000, 0.002, 4_000, 10, 1, 100_000)
"""Stable Diffusion v1.4, trained on LAION."""
SETTINGS = {"coco": COCO, "stable-diffusion": STABLE_DIFFUSION}
