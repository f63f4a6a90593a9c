"""Mean gradients at the outputs of the key/value layers, kept on disk: the store that queries are scored with.

The gradient of an example for all layers together is gᵀa, with g [T, out] the mean over draws of the gradients at the
layers' outputs and a [T, in] the text tokens, which no draw changes. What is kept is g at the tokens that are no
padding, T·out numbers instead of out·in, so that curvature, damping, normalisation and queries can be changed without
another pass through the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from abu.amortised import Compression, Examples, sketched
from abu.curvature import DiagonalFisher
from abu.plan import Piece
from fastgda.core import load_npz

MADE_BY = {"query": "python -m abu.collect queries", "pass": "python -m abu.collect training"}
"""Stage of a piece -> the command that computes it."""


def pack(gradients: Tensor, text: Tensor) -> dict[str, np.ndarray]:
    """Arrays of a piece, from g [..., B, T, out] and the tokens a [B, T, in].

    `gradients` [..., tokens, out] float16 holds the examples one after the other, each divided by its `scales`
    [..., B] float32, its largest number; where a token is all zeros, g is left out, for it meets nothing but zeros.
    """
    scales = gradients.abs().amax((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    kept = (gradients / scales[..., None, None])[..., text.abs().amax(-1) > 0, :]
    return {"gradients": kept.half().cpu().numpy(), "scales": scales.float().cpu().numpy()}


def unpack(arrays: dict[str, np.ndarray], text: Tensor) -> Tensor:
    """The inverse of `pack`: g [..., B, T, out] float32, zero at padding; `ValueError` unless the tokens match."""
    kept, mask = torch.from_numpy(arrays["gradients"]).to(text.device), text.abs().amax(-1) > 0
    if kept.shape[-2] != int(mask.sum()):
        raise ValueError(f"gradients: expected {int(mask.sum())} tokens that are no padding, found {kept.shape[-2]}")
    gradients = torch.zeros(*kept.shape[:-2], *mask.shape, kept.shape[-1], device=text.device)
    gradients[..., mask, :] = kept.float()
    return gradients * torch.from_numpy(arrays["scales"]).to(text.device)[..., None, None]


def load_gradients(path: Path, text: Tensor, made_by: str) -> Tensor:
    """g [..., B, T, out] of a piece on disk, for the tokens of its examples."""
    arrays = load_npz(path, ("gradients", "scales"), made_by)
    try:
        return unpack(arrays, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def stored_vectors(
    path: Path, piece: Piece, examples: Examples, curvature: DiagonalFisher, compression: Compression
) -> Tensor:
    """Whitened, compressed gradients [runs, bins, B, size] of a stored piece, whose `examples` these are."""
    gradients = load_gradients(path, examples.text, MADE_BY[piece.stage])
    return compressed(gradients, examples.text, curvature, compression)


def compressed(gradients: Tensor, text: Tensor, curvature: DiagonalFisher, compression: Compression) -> Tensor:
    """Whitened, compressed gradients [runs, bins, B, size], from g [runs, bins, B, T, out] and tokens a [B, T, in]."""
    flat = [sketched(g, text, curvature, compression) for g in gradients.flatten(0, 1)]
    return torch.stack(flat).unflatten(0, gradients.shape[:2])
