"""CLIP ViT-B/32 with OpenAI's weights: pictures and captions; the only module that imports open_clip.

Features are the projections of both towers before normalisation, as the released data holds them. Source: Radford et
al. 2021, arXiv 2103.00020; the architecture has OpenAI's approximation of GELU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from feature_extraction.preprocess import Preprocessing, in_micro_batches
from feature_extraction.weights import hub_file, load_weights, read_state_dict

WIDTH = 512
MODEL = "ViT-B-32-quickgelu"
TITLE = "CLIP ViT-B/32"
REPO = "timm/vit_base_patch32_clip_224.openai"
PREPROCESS = Preprocessing(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
RECORDED = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's state dict holds beside the weights."""


def default_weights(encoder: str) -> Path:
    """The hub's file of OpenAI's weights; `ValueError` saying what was tried if it cannot be reached."""
    return hub_file(encoder, REPO, "open_clip_model.safetensors")


def load_model(weights: Path, config: dict[str, Any] | None = None) -> nn.Module:
    """Both towers; `config` (by default ViT-B/32's) has open_clip's keys. `ValueError` if the file holds others."""
    import open_clip

    config = config or open_clip.get_model_config(MODEL)
    state = {key: value for key, value in read_state_dict(weights).items() if key not in RECORDED}
    return load_weights(open_clip.CLIP(**config), state, weights, TITLE)


class CLIPImage:
    """Frozen image tower: 512 numbers, not normalised."""

    name = "clip"
    dim = WIDTH
    reads_images = True
    reads_captions = False

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.device = device
        self.network = load_model(weights).get_submodule("visual").to(device)

    @torch.inference_mode()
    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, 512] float32 of the images; the captions are not used."""
        return in_micro_batches(
            images, self.dim, self.device, lambda batch: self.network(PREPROCESS(batch).to(self.device))
        )


class CLIPText:
    """Frozen text tower: 512 numbers, not normalised; captions are cut at 77 tokens."""

    name = "clip_text"
    dim = WIDTH
    reads_images = False
    reads_captions = True

    def __init__(self, weights: Path, device: torch.device) -> None:
        import open_clip

        self.device = device
        model = load_model(weights)
        del model.visual
        self.network = model.to(device)
        self.tokenizer = open_clip.tokenizer.SimpleTokenizer()

    @torch.inference_mode()
    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, 512] float32 of the captions; the images are not used."""
        if not captions:
            return np.zeros((0, self.dim), np.float32)
        tokens = self.tokenizer(captions).to(self.device)
        return self.network.encode_text(tokens).float().cpu().numpy()  # type: ignore[operator]
