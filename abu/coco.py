"""The latent diffusion model trained on MSCOCO that the paper attributes (section 4.1), from its released weights.

`data/coco/model.bin` is the state dict of a U-Net on latents [4, 16, 16] of Stable Diffusion 2's autoencoder, with 77
token states of 1,024 numbers from its text encoder; ε-prediction on DDPM's linear schedule of 1,000 steps. A model of
another size says so in `model.json` beside it:

    {"denoiser": {"block_out_channels": [32, 32, 32, 32]}, "training": {"steps": 20}}

with arguments of diffusers' UNet2DConditionModel in the place of the published ones, and settings of its training
(`benchmark.coco`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import nn

from abu.diffusion_loss import NoiseSchedule
from abu.models import seeded
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


@dataclass(frozen=True)
class CocoModel:
    """What `model.json` says."""

    denoiser: dict[str, Any] = field(default_factory=lambda: dict(SHAPE))
    """Arguments of diffusers' UNet2DConditionModel."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of its training other than the usual ones."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return self.denoiser["in_channels"], self.denoiser["sample_size"], self.denoiser["sample_size"]

    @property
    def text_width(self) -> int:
        """Numbers of a token state."""
        return self.denoiser["cross_attention_dim"]


def read_model(path: Path) -> CocoModel:
    """The model in `path`, by `model.json` beside it; the published one where there is none.

    `ValueError` naming the file if it holds anything else.
    """
    path = path.with_suffix(".json")
    if not path.is_file():
        return CocoModel()
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found a damaged document ({error})") from error
    parts = ("denoiser", "training")
    if not isinstance(content, dict) or not all(k in parts and isinstance(v, dict) for k, v in content.items()):
        raise ValueError(f'{path}: expected {{"denoiser": {{…}}, "training": {{…}}}}, found {str(content)[:80]}')
    return CocoModel(SHAPE | content.get("denoiser", {}), content.get("training", {}))


def build_coco(model: CocoModel = CocoModel()) -> nn.Module:
    """The untrained denoiser; `ValueError` if there is none of that shape."""
    try:
        return UNet2DConditionModel(**model.denoiser)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected arguments of UNet2DConditionModel, found {model.denoiser} ({error})") from error


def initial_coco(model: CocoModel, seed: int) -> nn.Module:
    """The untrained denoiser of a seed."""
    return seeded(lambda: build_coco(model), seed)


def coco_schedule() -> NoiseSchedule:
    """Noise levels and target of its loss."""
    return NoiseSchedule(DDPMScheduler(TIMESTEPS).alphas_cumprod, "epsilon")


def coco_sampling_schedule() -> DDIMScheduler:
    """The deterministic schedule over the same levels; x_0 is clipped to [-1, 1], as for the released queries."""
    return DDIMScheduler(TIMESTEPS, clip_sample=True)


def load_coco(path: Path, device: torch.device) -> CocoSource:
    """Reads the released weights, float32 in evaluation mode, frozen; `ValueError` naming the first that differs."""
    state = read_state_dict(require_file(path))
    with torch.device("meta"):
        model = build_coco(read_model(path))
    denoiser = load_weights(model, state, path, "the COCO model, a UNet2DConditionModel").to(device)
    return CocoSource(denoiser, coco_schedule())
