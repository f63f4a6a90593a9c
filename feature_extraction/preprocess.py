"""The picture preprocessing of DINO, DINOv2 and CLIP: short side resized, centre kept, channels standardised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LONGEST = 8
"""Longest picture, in short sides: what lies further out is cut off first. It cannot reach the centre, and a strip of
one pixel by fifty million would otherwise be resized to terabytes."""
MICRO_BATCH = 8
"""Images per forward pass on a CPU; more fall out of its cache (EfficientNet, 224 px: 12 ms each at 8, 25 at 32)."""


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a picture before an encoder sees it. On pictures of up to eight short sides it equals
    torchvision's Resize(bicubic), CenterCrop, ToTensor, Normalize, which the originals use."""

    resize: int
    """The short side after resizing, in pixels."""
    pixels: int
    """The side of the square that is kept, at most `resize`."""
    mean: tuple[float, float, float]
    """Of the channels red, green and blue in [0, 1]."""
    std: tuple[float, float, float]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> [B, 3, pixels, pixels] float32."""
        arrays = [np.asarray(self._square(image.convert("RGB"))) for image in images]
        batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return batch.sub_(mean).div_(std).contiguous()

    def _square(self, image: Image.Image) -> Image.Image:
        reach = LONGEST * min(image.size)
        if max(image.size) > reach:
            image = _centre(image, min(image.width, reach), min(image.height, reach))
        short = min(image.size)
        width, height = (int(self.resize * side / short) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return _centre(image, self.pixels, self.pixels)


def in_micro_batches(
    images: list[Image.Image], dim: int, device: torch.device, forward: Callable[[list[Image.Image]], Tensor]
) -> np.ndarray:
    """Features [B, dim] float32 of `images`: `forward` sees a few at a time on a CPU, all at once elsewhere.

    On a GPU, convolutions in float32 would by default be rounded to TF32 (10 bits of mantissa); here they are not.
    """
    parts = [np.zeros((0, dim), np.float32)]
    step = MICRO_BATCH if device.type == "cpu" else len(images) or 1
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for start in range(0, len(images), step):
            parts.append(forward(images[start : start + step]).float().cpu().numpy())
    return np.concatenate(parts)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
