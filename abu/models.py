"""Source models: the testbed's latent diffusion model, built from diffusers parts.

An autoencoder maps an RGB image of P pixels to latents of P/8 with `latent_channels` channels: the image is folded
2×2 into 12 channels (which spares the costly full resolution on a CPU) and an `AutoencoderKL` of three levels does the
rest. Latents are standardised per channel with the mean and deviation over the training set.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abu.diffusion_loss import NoiseSchedule
from fastgda.core import atomic_path, require_file, save_json

SCALED_LINEAR: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Stable Diffusion's noise levels."""
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the testbed's autoencoder."""

    latent_channels: int = 8
    channels: tuple[int, ...] = (32, 64, 96)
    fold: int = 2
    """Side of the pixel blocks that become channels."""


@dataclass(frozen=True)
class DiffusionConfig:
    """Shape of the testbed's denoiser: cross-attention to the caption's tokens at every level."""

    sample_size: int = 8
    latent_channels: int = 8
    channels: tuple[int, ...] = (96, 128)
    layers_per_block: int = 1
    heads: int = 4
    text_width: int = 384
    timesteps: int = 1000
    prediction: str = "epsilon"
    """What the denoiser predicts: "epsilon" or "v_prediction"."""


class Autoencoder(nn.Module):
    """Folded `AutoencoderKL` with per-channel standardisation of its latents."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()) -> None:
        super().__init__()
        self.config = config
        levels = len(config.channels)
        self.kl = AutoencoderKL(
            in_channels=3 * config.fold**2,
            out_channels=3 * config.fold**2,
            latent_channels=config.latent_channels,
            block_out_channels=config.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=8,
        )
        self.register_buffer("mean", torch.zeros(1, config.latent_channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, config.latent_channels, 1, 1))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, c, P/8, P/8] of the raw latents of `images` [B, 3, P, P] in [-1, 1]."""
        folded = F.pixel_unshuffle(images, self.config.fold)
        distribution = self.kl.encode(folded).latent_dist
        return distribution.mean, distribution.logvar

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Images [B, 3, P, P] of raw latents."""
        return F.pixel_shuffle(self.kl.decode(raw).sample, self.config.fold)

    def encode(self, images: Tensor) -> Tensor:
        """Standardised latents [B, c, P/8, P/8] (the posterior's mean)."""
        return (self.posterior(images)[0] - self.mean) / self.deviation

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, P, P] in [-1, 1] of standardised latents."""
        return self.reconstruct(latents * self.deviation + self.mean).clamp(-1, 1)


def build_denoiser(config: DiffusionConfig) -> UNet2DConditionModel:
    """An untrained noise predictor ε_θ(x_t, c, t)."""
    levels = len(config.channels)
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=config.text_width,
        # diffusers reads this as the number of heads while num_attention_heads is unset
        attention_head_dim=config.heads,
        norm_num_groups=16,
    )


def initial_denoiser(config: DiffusionConfig, seed: int) -> UNet2DConditionModel:
    """The untrained noise predictor of a seed."""
    return seeded(lambda: build_denoiser(config), seed)


def seeded(build: Callable[[], Model], seed: int) -> Model:
    """What `build` makes from a seed; torch's global generator is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def noise_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The DDPM schedule that the model is trained with (scaled-linear)."""
    scheduler = DDPMScheduler(config.timesteps, **SCALED_LINEAR)
    return NoiseSchedule(scheduler.alphas_cumprod, config.prediction)


def sampling_schedule(config: DiffusionConfig) -> DDIMScheduler:
    """The deterministic DDIM schedule over the same noise levels."""
    return DDIMScheduler(
        config.timesteps,
        **SCALED_LINEAR,
        prediction_type=config.prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@dataclass
class SourceModel:
    """A trained text-to-image model: what queries are sampled from and what the teacher unlearns."""

    denoiser: UNet2DConditionModel
    autoencoder: Autoencoder
    config: DiffusionConfig
    autoencoder_config: AutoencoderConfig

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels and target of the denoiser's loss."""
        return noise_schedule(self.config)

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.denoiser.parameters()).device


def save_module(module: nn.Module, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Weights as safetensors, floating-point tensors in `dtype`."""
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)


def load_module(module: nn.Module, path: Path) -> None:
    """Fills `module` strictly from what `save_module` wrote; `ValueError` names the file and what does not fit."""
    try:
        module.load_state_dict(load_file(require_file(path)), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: expected weights of {type(module).__name__}, found others ({error})") from error


def save_source(model: SourceModel, folder: Path) -> tuple[Path, ...]:
    """Writes `config.json`, `autoencoder.safetensors` and `denoiser.safetensors` (fp16) into `folder`."""
    files = (folder / "config.json", folder / "autoencoder.safetensors", folder / "denoiser.safetensors")
    save_json(files[0], {"diffusion": asdict(model.config), "autoencoder": asdict(model.autoencoder_config)})
    save_module(model.autoencoder, files[1])
    save_module(model.denoiser, files[2])
    return files


def load_source(folder: str | Path, device: torch.device) -> SourceModel:
    """Reads a folder that `save_source` wrote; weights become float32 on `device`, in evaluation mode."""
    folder = Path(folder)
    path = require_file(folder / "config.json", "python -m abu.train_diffusion")
    try:
        config = json.loads(path.read_text())
        diffusion = DiffusionConfig(**_tuples(config["diffusion"]))
        shape = AutoencoderConfig(**_tuples(config["autoencoder"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a source model's configuration, found something else ({error})") from error
    model = SourceModel(build_denoiser(diffusion), Autoencoder(shape), diffusion, shape)
    load_module(model.autoencoder, folder / "autoencoder.safetensors")
    load_module(model.denoiser, folder / "denoiser.safetensors")
    for module in (model.autoencoder, model.denoiser):
        module.to(device).eval().requires_grad_(False)
    return model


def _tuples(values: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
