"""A diffusion model of a few thousand weights with random data, for exact tests of the teacher in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from abu.amortised import Examples
from abu.curvature import EKFAC
from abu.diffusion_loss import NoiseSchedule
from abu.fisher import CurvatureConfig, fit_curvature
from abu.models import DiffusionConfig, build_denoiser, noise_schedule


@dataclass(frozen=True)
class TinyTeacher:
    """Model, noise schedule, training images and one query, all float64 on the CPU."""

    denoiser: nn.Module
    schedule: NoiseSchedule
    training: Examples
    query: Examples

    def curvature(self) -> EKFAC:
        """EK-FAC factors from one draw of every training image."""
        curvature = fit_curvature(
            self.denoiser,
            self.schedule,
            self.training.latents,
            self.training.text,
            CurvatureConfig(draws=1),
            batch_size=8,
        ).shared()
        assert isinstance(curvature, EKFAC)
        return curvature


def tiny_teacher(images: int = 24, seed: int = 0, prediction: str = "v_prediction") -> TinyTeacher:
    """16-channel layers on 4×4 latents, 3 tokens of 6 numbers, the last of every second caption padding."""
    config = DiffusionConfig(sample_size=4, latent_channels=2, channels=(16, 16), heads=2, text_width=6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = build_denoiser(config).double().eval().requires_grad_(False)
        latents = torch.randn(images + 1, 2, 4, 4, dtype=torch.float64)
        text = torch.randn(images + 1, 3, 6, dtype=torch.float64)
    text[::2, -1] = 0
    training = Examples("train", list(range(images)), latents[:images], text[:images])
    query = Examples("test", [0], latents[images:], text[images:])
    if prediction == "flow":
        schedule = NoiseSchedule(torch.linspace(0.001, 1, 1000), "flow")
    else:
        schedule = noise_schedule(replace(config, prediction=prediction))
    return TinyTeacher(denoiser, schedule, training, query)
