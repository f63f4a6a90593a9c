"""Pipelines of a few thousand random weights, saved as diffusers saves them, and their losses written out anew."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from abu.amortised import Examples
from abu.conditioning import pack_text
from abu.pipelines import PipelineSource, load_pipeline

CPU = torch.device("cpu")
TOKENS, WIDTH, POOLED = 3, 6, 10
UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": POOLED + 6 * 4,
}
TRANSFORMER: dict[str, Any] = {
    "sample_size": 4,
    "patch_size": 1,
    "in_channels": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
}
KINDS = ("epsilon", "v_prediction", "flow", "pixart", "sdxl")
MORE = ("auraflow", "sana")


def save_part(module: Any, folder: Path, part: str) -> None:
    """Adds one part to a pipeline's folder and its index."""
    module.save_pretrained(folder / part)
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {"_class_name": "StableDiffusionPipeline"}
    index.write_text(json.dumps({**parts, part: ["diffusers", type(module).__name__]}))


def save_tiny(folder: Path, kind: str) -> Path:
    """A denoiser and a scheduler, without encoders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, scheduler = _parts(kind)
    save_part(model, folder, "unet" if isinstance(model, UNet2DConditionModel) else "transformer")
    save_part(scheduler, folder, "scheduler")
    return folder


def save_tiny_diffusion(folder: Path, latent_channels: int, width: int, tokens: int) -> Path:
    """A whole tiny Stable Diffusion: words are spelled out of a vocabulary of letters, `tokens` of them a caption."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 8}
    sizes: dict[str, Any] = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(words)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(latent_channels=latent_channels, **small, **levels)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=width, max_position_embeddings=tokens, **sizes, **ids))
        unet = UNet2DConditionModel(
            **UNET | {"in_channels": latent_channels, "out_channels": latent_channels, "cross_attention_dim": width}
        )
    tokenizer = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=tokens
    )
    scheduler = DDPMScheduler(1000, prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **extras).save_pretrained(folder)
    return folder


def _parts(kind: str) -> tuple[Any, Any]:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "flow":
        # the first block has a second attention, among latents, as SD3.5 has
        special = {"dual_attention_layers": (0,), "qk_norm": "rms_norm", "pos_embed_max_size": 4, "num_layers": 3}
        text = {"joint_attention_dim": WIDTH, "caption_projection_dim": 8, "pooled_projection_dim": POOLED}
        return SD3Transformer2DModel(**TRANSFORMER, **special, **text, out_channels=2), flow
    if kind == "auraflow":
        sizes = {"num_mmdit_layers": 2, "num_single_dit_layers": 1, "pos_embed_max_size": 16}
        text = {"joint_attention_dim": WIDTH, "caption_projection_dim": 8}
        return AuraFlowTransformer2DModel(**TRANSFORMER, **sizes, **text, out_channels=2), flow
    if kind == "sana":
        heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8}
        options = {"num_layers": 2, "caption_channels": WIDTH, "timestep_scale": 0.5}
        return SanaTransformer2DModel(**TRANSFORMER, **heads, **options, out_channels=2), flow
    if kind == "pixart":
        model = PixArtTransformer2DModel(
            **TRANSFORMER,
            num_layers=2,
            out_channels=4,
            cross_attention_dim=8,
            caption_channels=WIDTH,
            norm_num_groups=2,
            use_additional_conditions=False,
        )
        return model, DDPMScheduler(1000)
    if kind == "sdxl":
        return UNet2DConditionModel(**UNET, **TEXT_TIME), DDPMScheduler(1000)
    return UNet2DConditionModel(**UNET), DDIMScheduler(1000, beta_schedule="scaled_linear", prediction_type=kind)


@dataclass(frozen=True)
class TinyPipeline:
    """A loaded pipeline in float64 with training images, all of one width of packed text, and one query."""

    kind: str
    source: PipelineSource
    training: Examples
    query: Examples
    tokens: Tensor
    pooled: Tensor

    def losses(self, noise: Tensor, timesteps: Tensor) -> Tensor:
        """𝓛 of each training image [B], by diffusers' model and scheduler called directly."""
        x, count = self.training.latents, len(noise)
        tokens, pooled = self.tokens[:count], self.pooled[:count]
        model, scheduler = getattr(self.source.denoiser, "model", self.source.denoiser), _parts(self.kind)[1]
        mask = torch.ones(tokens.shape[:2], dtype=torch.float64)
        mask[::2, -1] = 0
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            times = scheduler.timesteps[[999 - int(t) for t in timesteps]]
            noisy, target, told = scheduler.scale_noise(x, times, noise), noise - x, times.double()
            if self.kind == "flow":
                predicted = model(noisy, tokens, pooled, told).sample
            elif self.kind == "sana":
                predicted = model(noisy, tokens, told * 0.5, encoder_attention_mask=mask).sample
            else:
                predicted = model(noisy, tokens, (times * 1e-3).double()).sample
        elif self.kind == "pixart":
            noisy, target = scheduler.add_noise(x, noise, timesteps), noise
            predicted = model(noisy, tokens, timesteps, encoder_attention_mask=mask).sample[:, :2]
        else:
            noisy, velocity = (f(x, noise, timesteps) for f in (scheduler.add_noise, scheduler.get_velocity))
            target = velocity if self.kind == "v_prediction" else noise
            added = {"text_embeds": pooled[:, :POOLED], "time_ids": pooled[:, POOLED:]}
            predicted = model(noisy, timesteps, tokens, added_cond_kwargs=added).sample
        return F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)


def tiny_pipeline(folder: Path, kind: str, images: int = 8) -> TinyPipeline:
    """Saved, loaded and put into float64; the last token of every second caption is padding."""
    source = load_pipeline(save_tiny(folder, kind), CPU)
    source.denoiser.double()
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(images + 1, *size, dtype=torch.float64, generator=generator)

    latents, tokens = random(2, 4, 4), random(TOKENS, WIDTH)
    tokens[::2, -1] = 0
    pooled = random({"flow": POOLED, "sdxl": POOLED + 6}.get(kind, 0))
    text = pack_text(tokens, pooled if pooled.numel() else None)
    training = Examples("train", list(range(images)), latents[:images], text[:images])
    query = Examples("test", [0], latents[images:], text[images:])
    return TinyPipeline(kind, source, training, query, tokens[:images], pooled[:images])
