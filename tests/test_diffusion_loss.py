"""Noise and targets against diffusers' scheduler; the loss against its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from abu.diffusion_loss import NoiseSchedule, at_least_float32, example_losses
from abu.models import SCALED_LINEAR, DiffusionConfig, noise_schedule


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_diffusers(prediction):
    scheduler = DDPMScheduler(1000, **SCALED_LINEAR)
    latents, noise = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 17, 500, 999])
    noisy, target = noise_schedule(DiffusionConfig(prediction=prediction)).noised(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, expected)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="found 'x0'"):
        NoiseSchedule(torch.ones(3), "x0")


def test_the_loss_is_the_mean_square_of_each_example():
    predicted, target = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    class Fixed(torch.nn.Module):
        def forward(self, *inputs):
            return SimpleNamespace(sample=predicted)

    losses = example_losses(Fixed(), predicted, target, torch.zeros(3), torch.zeros(3))
    expected = [((predicted[i] - target[i]) ** 2).mean().item() for i in range(3)]
    assert losses.tolist() == pytest.approx(expected)


def test_half_precision_is_widened_and_float64_kept():
    assert at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
