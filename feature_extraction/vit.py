"""DINO ViT-B/16 and DINOv2 ViT-L/14 with registers in timm's architectures; the only module that imports timm.

The feature is the class token after the last layer norm, as the originals return it, not normalised. Pictures are
prepared as in the originals' evaluation: short side 256, centre 224 (timm's own defaults are 248 for DINO and 518 for
DINOv2). Sources: Caron et al. 2021, arXiv 2104.14294; Oquab et al. 2023, arXiv 2304.07193; Darcet et al. 2023, arXiv
2309.16588.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from feature_extraction.preprocess import Preprocessing, in_micro_batches
from feature_extraction.weights import hub_file, load_weights, read_state_dict

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Architecture:
    """A vision transformer of timm."""

    title: str
    model: str
    """timm's name for it; its weights are the hub's timm/<model>."""
    dim: int
    """Width of the class token."""
    options: dict[str, Any] = field(default_factory=dict)
    """What differs from timm's defaults."""
    preprocess: Preprocessing = field(default=Preprocessing(256, 224, **IMAGENET))

    def weights(self, encoder: str) -> Path:
        """The hub's file; `ValueError` saying what was tried if it cannot be reached."""
        return hub_file(encoder, f"timm/{self.model}", "model.safetensors")

    @property
    def settings(self) -> dict[str, Any]:
        """What an encoder's identity records."""
        return {"model": self.model, "resize": self.preprocess.resize, "pixels": self.preprocess.pixels}


DINO = Architecture("DINO ViT-B/16", "vit_base_patch16_224.dino", 768)
DINOV2 = Architecture(
    "DINOv2 ViT-L/14 with registers", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, {"img_size": 224}
)


def create(model: str, **options: Any) -> nn.Module:
    """An architecture of timm without weights, on the meta device unless `options` say otherwise."""
    import timm

    with torch.device(options.pop("device", "meta")):
        return timm.create_model(model, pretrained=False, **options)


def timm_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict of torch.hub's DINO or DINOv2, or timm's, under the names and shapes of timm's `model`.

    torch.hub's DINO has timm's names. In DINOv2 the registers are called `register_tokens`; its position embedding
    [1, 1 + 37², D] counts the class token, and timm with registers adds that place to the class token itself; the mask
    token serves training only. Positions are resampled to the model's grid as DINOv2 does (bicubic, antialiased).
    """
    from timm.layers import resample_abs_pos_embed

    mapped = {key: value for key, value in state.items() if key != "mask_token"}
    if "register_tokens" in mapped:
        mapped["reg_token"] = mapped.pop("register_tokens")
        positions = mapped["pos_embed"]
        mapped["cls_token"] = mapped["cls_token"] + positions[:, :1]
        mapped["pos_embed"] = positions[:, 1:]
    if "pos_embed" in mapped:
        extra = 0 if getattr(model, "no_embed_class", False) else 1
        grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        mapped["pos_embed"] = resample_abs_pos_embed(mapped["pos_embed"], grid, num_prefix_tokens=extra)
    return mapped


class ViT:
    """A frozen vision transformer."""

    reads_images = True
    reads_captions = False

    def __init__(self, name: str, architecture: Architecture, weights: Path, device: torch.device) -> None:
        self.name = name
        self.dim = architecture.dim
        self.device = device
        self.preprocess = architecture.preprocess
        model = create(architecture.model, num_classes=0, **architecture.options)
        state = timm_state(read_state_dict(weights), model)
        self.network = load_weights(model, state, weights, architecture.title).to(device)

    @torch.inference_mode()
    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, dim] float32 of the images; the captions are not used."""
        return in_micro_batches(
            images, self.dim, self.device, lambda batch: self.network(self.preprocess(batch).to(self.device))
        )
