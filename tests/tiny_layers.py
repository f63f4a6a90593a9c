"""A denoiser in float64 with a layer of every kind that curvature is estimated for, and its gradients by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abu.diffusion_loss import NoiseSchedule, example_losses
from abu.draws import DrawConfig, draw

GROUPS = {
    ("conv_in",): (4, 19),
    ("down",): (6, 24),
    ("time",): (6, 2),
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"): (18, 6),
    ("attn1.to_out.0",): (6, 7),
    ("attn2.to_q",): (6, 6),
    ("attn2.to_k", "attn2.to_v"): (12, 5),
    ("attn2.to_out.0",): (6, 7),
    ("head",): (8, 7),
}
"""Layers that read the same input -> (their output widths together, input width with the column of the bias)."""
NAMES = [name for group in GROUPS for name in group]


class TinyAttention(nn.Module):
    """One head, with a residual; named as in diffusers."""

    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x [B, T, width], source [B, S, source]."""
        weights = torch.softmax(self.to_q(x) @ self.to_k(source).mT, dim=-1)
        return x + self.to_out[0](weights @ self.to_v(source))


class TinyDenoiser(nn.Module):
    """Noise of latents [B, 2, 4, 4]: convolutions (padding, stride, no bias), time, self- and cross-attention, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, (2, 3), stride=2, padding=(0, 1), bias=False)
        self.time = nn.Linear(1, 6)
        self.attn1 = TinyAttention(6, 6)
        self.attn2 = TinyAttention(6, 5)
        self.head = nn.Linear(6, 8)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> SimpleNamespace:
        """As a diffusers model: an object with the prediction as `sample`."""
        x = self.down(F.silu(self.conv_in(noisy))) + self.time(timesteps[:, None].to(noisy) / 1000)[:, :, None, None]
        x = F.silu(x).flatten(2).mT
        x = self.attn2(self.attn1(x, x), text)
        return SimpleNamespace(sample=F.pixel_shuffle(self.head(x).mT.unflatten(2, (2, 2)), 2))


@dataclass(frozen=True)
class TinyLayers:
    """The model, its training images and one draw of noise for each."""

    denoiser: TinyDenoiser
    schedule: NoiseSchedule
    latents: Tensor
    text: Tensor

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noisy, target, timesteps, text) of the draws that `fit_curvature` makes."""
        config = DrawConfig(bins=1, draws=1, antithetic=False)
        timesteps, noise = draw(config, "curvature", list(range(len(self.latents))), 0, 0, 0, (2, 4, 4))
        return *self.schedule.noised(self.latents, noise.double(), timesteps), timesteps, self.text

    def weight_gradients(self) -> dict[str, Tensor]:
        """Name -> ∇W [N, out, in] of each example's loss, the bias as last column, by autograd on the parameters."""
        layers = {name: self.denoiser.get_submodule(name) for name in NAMES}
        parameters = {f"{name}.{kind}": p for name, layer in layers.items() for kind, p in layer.named_parameters()}
        for parameter in parameters.values():
            parameter.requires_grad_()
        losses = example_losses(self.denoiser, *self.batch())
        rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
        self.denoiser.requires_grad_(False)
        stacked = {key: torch.stack(parts) for key, *parts in zip(parameters, *rows, strict=True)}
        result = {}
        for name in NAMES:
            columns = [stacked[f"{name}.weight"].flatten(2)]
            if f"{name}.bias" in stacked:
                columns.append(stacked[f"{name}.bias"][:, :, None])
            result[name] = torch.cat(columns, dim=-1)
        return result


def tiny_layers(images: int = 24, seed: int = 0) -> TinyLayers:
    """Random weights and data; three tokens of five numbers, none of them padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = TinyDenoiser().double().eval().requires_grad_(False)
        latents = torch.randn(images, 2, 4, 4, dtype=torch.float64)
        text = torch.randn(images, 3, 5, dtype=torch.float64)
    return TinyLayers(denoiser, NoiseSchedule(torch.linspace(0.99, 0.01, 1000)), latents, text)
