"""One call for every denoiser: model(noisy, timesteps, text).sample, whatever its arguments are called.

`text` is one tensor [B, T, d], which the whole teacher slices, stores and maps as it is. What a caption conditions
besides its token states travels in further rows of it: a pooled embedding of P numbers (SD3; for SDXL with the six
numbers of size and crop behind it) fills ⌈P/d⌉ rows after the T tokens, and zeros fill the last one. Token states that
are all zero are padding; a denoiser that takes an attention mask gets it from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE_AND_CROP = 6
"""Numbers of SDXL's `time_ids`."""


def pack_text(tokens: Tensor, pooled: Tensor | None = None) -> Tensor:
    """Token states [..., T, d] with the pooled embedding [..., P] in further rows."""
    if pooled is None:
        return tokens
    width = tokens.shape[-1]
    rows = F.pad(pooled, (0, -pooled.shape[-1] % width)).unflatten(-1, (-1, width))
    return torch.cat([tokens, rows.to(tokens)], dim=-2)


def unpack_text(text: Tensor, pooled: int) -> tuple[Tensor, Tensor]:
    """(token states [B, T, d], the `pooled` numbers [B, P]) of what `pack_text` made."""
    count = text.shape[1] + -pooled // text.shape[2]
    if count < 1:
        raise ValueError(f"text: expected token states before a pooled embedding of {pooled}, found {[*text.shape]}")
    return text[:, :count], text[:, count:].flatten(1)[:, :pooled]


@dataclass(frozen=True)
class Conditioning:
    """What a diffusers denoiser is called with."""

    latents: str
    """Its name for the noisy latents."""
    kind: str = "tokens"
    """"tokens" alone, with "pooled_projections" (SD3), or with "text_time" (SDXL)."""
    pooled: int = 0
    """P, the numbers carried besides the tokens."""
    masked: bool = False
    """Whether padding is masked."""

    @staticmethod
    def of(model: nn.Module, config: Mapping[str, Any]) -> Conditioning:
        """Read from the arguments of `model.forward` and its configuration; `ValueError` if it wants anything else."""
        name, parameters = type(model).__name__, inspect.signature(model.forward).parameters
        latents = next((n for n in ("sample", "hidden_states") if n in parameters), None)
        if latents is None or not {"timestep", "encoder_hidden_states"} <= parameters.keys():
            raise ValueError(
                f"{name}: expected a denoiser of latents, timestep and encoder_hidden_states, "
                f"found one of {', '.join(parameters)}"
            )
        kind, pooled = "tokens", 0
        if "pooled_projections" in parameters:
            kind, pooled = "pooled_projections", int(config["pooled_projection_dim"])
        elif config.get("addition_embed_type") == "text_time":
            kind = "text_time"
            embedded = SIZE_AND_CROP * config["addition_time_embed_dim"]
            pooled = config["projection_class_embeddings_input_dim"] - embedded + SIZE_AND_CROP
        known = {latents, "timestep", "encoder_hidden_states", "pooled_projections"}
        extra = [
            *(p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD),
            *(["addition_embed_type"] if config.get("addition_embed_type") not in (None, "text_time") else []),
            *(n for n in ("class_embed_type", "use_additional_conditions", "guidance_embeds") if config.get(n)),
        ]
        if unknown := [name for name in extra if name not in known]:
            raise ValueError(f"{name}: expected conditioning on text only, found also {', '.join(unknown)}")
        # A UNet takes a mask too, but Stable Diffusion never masks its padding.
        masked = latents == "hidden_states" and "encoder_attention_mask" in parameters
        return Conditioning(latents, kind, pooled, masked)

    def arguments(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> dict[str, Any]:
        """The arguments of one call."""
        tokens, pooled = unpack_text(text, self.pooled) if self.pooled else (text, None)
        found: dict[str, Any] = {self.latents: noisy, "timestep": timesteps, "encoder_hidden_states": tokens}
        if self.kind == "pooled_projections":
            found["pooled_projections"] = pooled
        elif self.kind == "text_time":
            assert pooled is not None
            embeds, ids = pooled.split([self.pooled - SIZE_AND_CROP, SIZE_AND_CROP], dim=1)
            found["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": ids}
        if self.masked:
            found["encoder_attention_mask"] = (tokens.abs().amax(-1) > 0).to(tokens)
        return found


@dataclass(frozen=True)
class Prediction:
    """What a denoiser returns."""

    sample: Tensor
    """[B, c, h, w]."""


class TextDenoiser(nn.Module):
    """A denoiser behind the call that the teacher makes."""

    times: Tensor | None

    def __init__(self, model: nn.Module, conditioning: Conditioning, times: Tensor | None = None) -> None:
        """`times` [timesteps] is what the model is told for each place in the schedule, if not the place itself."""
        super().__init__()
        self.model, self.conditioning = model, conditioning
        self.register_buffer("times", times, persistent=False)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Prediction:
        """The prediction [B, c, h, w] for `noisy` [B, c, h, w], integer `timesteps` [B] and packed `text`."""
        told = timesteps if self.times is None else self.times[timesteps]
        predicted = self.model(**self.conditioning.arguments(noisy, told, text), return_dict=False)[0]
        # Models that also predict a variance (PixArt) have it in further channels.
        return Prediction(predicted[:, : noisy.shape[1]])
