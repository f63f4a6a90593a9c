"""Output gradients of the key/value layers against autograd on the weights themselves."""

from __future__ import annotations

import pytest
import torch
from tiny_teacher import tiny_teacher
from torch import nn

from abu.diffusion_loss import example_losses
from abu.keyvalue import OutputGradients, key_value_layers


def test_weight_gradients_of_every_layer_and_example():
    tiny = tiny_teacher(4)
    timesteps = torch.tensor([10, 300, 600, 990])
    noise = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noisy, target = tiny.schedule.noised(tiny.training.latents, noise, timesteps)
    gradients, losses = OutputGradients(tiny.denoiser)(noisy, target, timesteps, tiny.training.text)

    layers = list(key_value_layers(tiny.denoiser).values())
    weights = [layer.weight.requires_grad_() for layer in layers]
    for example in range(4):
        expected_loss = example_losses(tiny.denoiser, noisy, target, timesteps, tiny.training.text)[example]
        expected = torch.autograd.grad(expected_loss, weights)
        found = (gradients[example].double().mT @ tiny.training.text[example]).split([len(w) for w in weights])
        assert losses[example].item() == pytest.approx(expected_loss.item(), rel=1e-6)
        for mine, theirs in zip(found, expected, strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-8)


def test_layers_are_the_cross_attention_projections_only():
    names = list(key_value_layers(tiny_teacher(1).denoiser))
    assert len(names) == 14
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in names)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match=r"'cross-attn-kv' \(attn2.*found none in Sequential"):
        key_value_layers(nn.Sequential(nn.Linear(2, 2)))
