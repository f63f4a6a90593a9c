"""AbC: CLIP and DINO tuned for attribution by customisation, an affine map on the frozen feature.

Source: Wang, Efros, Zhu, Zhang, *Evaluating Data Attribution for Text-to-Image Models*, ICCV 2023, arXiv 2306.09345.
A released checkpoint (weights/mapper/<backbone>_tuned.pth) holds two maps, `real_mapper` for training images and
`synth_mapper` for generated ones: f(x) = (W φ(x) + b) / ‖W φ(x) + b‖, W [D, D] and b [D], or, in an ablation, one
factor per channel, `weights` [1, D]. A model with a hidden layer is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from feature_extraction.weights import read_state_dict


class Backbone(Protocol):
    """The frozen encoder below the map."""

    @property
    def name(self) -> str:
        """Its ftype."""

    @property
    def dim(self) -> int:
        """D."""

    @property
    def network(self) -> nn.Module | None:
        """What computes its features."""

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, D] float32."""


class AbC:
    """One of the two maps on its backbone."""

    reads_images = True
    reads_captions = False

    def __init__(self, backbone: Backbone, checkpoint: Path, query: bool) -> None:
        """`query` takes the map of generated images. `ValueError` naming `checkpoint` if it holds other weights."""
        self.name = f"abc_{backbone.name}"
        self.dim = backbone.dim
        self.backbone = backbone
        self.network = backbone.network
        side = "synth_mapper" if query else "real_mapper"
        state = {
            key.removeprefix(f"{side}."): value.float()
            for key, value in read_state_dict(checkpoint).items()
            if key.startswith(f"{side}.")
        }
        shapes = {key: list(value.shape) for key, value in state.items()}
        if shapes == {"weight": [self.dim, self.dim], "bias": [self.dim]}:
            self.matrix, self.bias = state["weight"], state["bias"]
        elif shapes == {"weights": [1, self.dim]}:
            self.matrix, self.bias = state["weights"][0].diag(), torch.zeros(self.dim)
        else:
            raise ValueError(
                f"{checkpoint}: expected {side}.weight [{self.dim}, {self.dim}] and {side}.bias [{self.dim}], "
                f"or {side}.weights [1, {self.dim}], found {shapes or f'nothing called {side}'}"
            )

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, D] float32 of unit length; the captions are not used.

        The map is float32 where the backbone runs in half precision, too: it lies on the CPU and costs next to nothing.
        """
        features = torch.from_numpy(self.backbone.encode(images, captions))
        with torch.autocast("cpu", enabled=False):
            return F.normalize(F.linear(features, self.matrix, self.bias), dim=1).numpy()
