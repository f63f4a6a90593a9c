"""The latent diffusion model trained on MSCOCO that the paper attributes (section 4.1), from its released weights.

`data/coco/model.bin` is the state dict of a U-Net on latents [4, 16, 16] of Stable Diffusion 2's autoencoder, with 77
token states of 1,024 numbers from its text encoder; ε-prediction on DDPM's linear schedule of 1,000 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from abu.diffusion_loss import NoiseSchedule
from fastgda.core import require_file
from feature_extraction.weights import load_weights, read_state_dict

SHAPE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
}
"""Arguments of diffusers' UNet2DConditionModel."""
TIMESTEPS = 1000


@dataclass(frozen=True)
class CocoSource:
    """The model and its schedule."""

    denoiser: nn.Module
    schedule: NoiseSchedule

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.denoiser.parameters()).device


def build_coco() -> nn.Module:
    """The untrained denoiser."""
    return UNet2DConditionModel(**SHAPE)


def load_coco(path: Path, device: torch.device) -> CocoSource:
    """Reads the released weights, float32 in evaluation mode, frozen; `ValueError` naming the first that differs."""
    state = read_state_dict(require_file(path))
    with torch.device("meta"):
        model = build_coco()
    denoiser = load_weights(model, state, path, "the COCO model, a UNet2DConditionModel").to(device)
    return CocoSource(denoiser, NoiseSchedule(DDPMScheduler(TIMESTEPS).alphas_cumprod, "epsilon"))
