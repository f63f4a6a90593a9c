"""Encoded pictures in the released layout, mapped from disk: what the teacher reads of a training set or of queries.

    latents.npy           [V·N, c, h, w]   unflipped (view 0), then flipped (view 1) where there are both
    text_embeddings.npy   [N, C, T, d]     token states of each picture's captions, packed (`abu.conditioning`)

COCO's are [2·118287, 4, 16, 16] and [118287, 5, 77, 1024], 186 GB in float32, so nothing is read before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from abu.amortised import Examples
from fastgda.core import load_npy

LATENTS, TEXT = "latents.npy", "text_embeddings.npy"
MADE_BY = "python -m abu.encode_pictures"


class TrainingPictures(Protocol):
    """What a denoiser is trained on."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of the latents."""

    def __len__(self) -> int: ...

    def drawn(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, c, h, w] and token states [B, T, d] of the pictures `rows` [B], as a training step sees them."""


@dataclass(frozen=True)
class LoadedPictures:
    """Pictures of one view and one caption each, in memory."""

    latents: Tensor
    """[N, c, h, w]."""
    text: Tensor
    """[N, T, d]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return tuple(self.latents.shape[1:])

    def __len__(self) -> int:
        """N."""
        return len(self.latents)

    def drawn(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `TrainingPictures`; nothing is random."""
        return self.latents[rows], self.text[rows]


@dataclass(frozen=True)
class EncodedPictures:
    """The arrays of a folder."""

    role: str
    """Keys the pictures' noise: "train", or the split of the queries."""
    latents: np.ndarray
    """[V·N, c, h, w]."""
    text: np.ndarray
    """[N, C, T, d]."""

    @staticmethod
    def open(folder: Path, role: str = "train") -> EncodedPictures:
        """Maps the files of `folder`; `ValueError` naming the one that is missing or whose shape does not fit."""
        text = load_npy(folder / TEXT, (None,) * 4, mmap=True, writable=False, made_by=MADE_BY)
        latents = load_npy(folder / LATENTS, (None,) * 4, mmap=True, writable=False, made_by=MADE_BY)
        if len(latents) not in (len(text), 2 * len(text)) or not len(text):
            raise ValueError(
                f"{folder / LATENTS}: expected latents of the {len(text)} pictures of {TEXT}, or of each unflipped and "
                f"flipped, found {len(latents)}"
            )
        return EncodedPictures(role, latents, text)

    def __len__(self) -> int:
        """N."""
        return len(self.text)

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of the latents."""
        return tuple(self.latents.shape[1:])

    @property
    def views(self) -> int:
        """1, or 2 with the flipped pictures."""
        return len(self.latents) // len(self.text)

    @property
    def captions(self) -> int:
        """C."""
        return self.text.shape[1]

    def require_fit(self, folder: Path, latent_shape: tuple[int, int, int], width: int) -> None:
        """`ValueError` naming the file of `folder` unless latents are (c, h, w) and token states `width` numbers."""
        if tuple(self.latents.shape[1:]) != latent_shape:
            raise ValueError(
                f"{folder / LATENTS}: expected latents {list(latent_shape)}, which the source's denoiser was made for, "
                f"found {list(self.latents.shape[1:])}"
            )
        if self.text.shape[3] != width:
            raise ValueError(
                f"{folder / TEXT}: expected token states of {width} numbers, which the source's denoiser reads, "
                f"found {self.text.shape[3]}"
            )

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(latents, token states), still mapped from the files: to be read, never written to."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.latents), torch.from_numpy(self.text)

    def drawn(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `TrainingPictures`: a view and a caption at random for each of them, whichever pictures they are."""
        views, captions = (
            torch.randint(count, rows.shape, generator=generator).numpy() for count in (self.views, self.captions)
        )
        places = rows.numpy()
        latents, text = self.latents[places + views * len(self)], self.text[places, captions]
        return torch.from_numpy(latents), torch.from_numpy(text)

    def examples(self, ids: Sequence[int], device: torch.device, *, view: int = 0, caption: int = 0) -> Examples:
        """Pictures of one view with one of their captions, in float32. Each view and caption has noise of its own."""
        for name, index, count in (("view", view, self.views), ("caption", caption, self.captions)):
            if not 0 <= index < count:
                raise ValueError(f"{name}: expected 0..{count - 1}, found {index}")
        if outside := [row for row in ids if not 0 <= row < len(self)]:
            raise ValueError(f"pictures: expected ids 0..{len(self) - 1}, found {outside[0]}")
        rows = np.asarray(ids, dtype=np.int64)
        arrays = self.latents[rows + view * len(self)], self.text[rows, caption]
        latents, text = (torch.from_numpy(np.ascontiguousarray(array)).to(device).float() for array in arrays)
        role = f"{self.role}-view{view}-caption{caption}" if view or caption else self.role
        return Examples(role, list(ids), latents, text)
