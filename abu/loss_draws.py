"""At which (caption, view, t, ε) the loss of a training image is taken, and the images that it is taken of.

Noise is keyed by (seed, training id, timestep, view, caption), never by a batch: the loss of an image under the source
model is the same number for every query, candidate set, order and worker. Two protocols choose the timesteps:

- stratified: random draws in equal bins of timesteps, antithetic pairs (see `abu.draws`);
- grid:       equally spaced timesteps, the middles of equal bins. 20 of them, 5 captions and both views are the paper's
              protocol for COCO, 10 timesteps and one caption that for Stable Diffusion.

A view is the image as it is (0) or flipped (1); τ is the larger loss change of the two (eq. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from abu.draws import DrawConfig, draw
from fastgda.core import keyed_generator, load_npy, require_file

ROLE = "train"


@dataclass(frozen=True)
class LossDraws:
    """Which draws the loss of a training image is averaged over."""

    protocol: Literal["stratified", "grid"] = "stratified"
    """Timesteps at random in equal bins, or equally spaced."""
    timesteps: int = 10
    """Bins, or equally spaced timesteps."""
    draws: int = 1
    """Draws of ε at each."""
    captions: int = 1
    """Captions of each image, from the first on."""
    flips: bool = False
    """See the images flipped as well, and take the larger loss change."""
    antithetic: bool = True
    """Draws 2k and 2k + 1 of a bin share a timestep and use ε and −ε (stratified)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("timesteps", "draws", "captions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, found {getattr(self, name)}")

    @property
    def views(self) -> int:
        """1, or 2 with flips."""
        return 1 + self.flips

    @property
    def per_caption(self) -> int:
        """Losses of one image with one caption."""
        return self.views * self.timesteps * self.draws

    @property
    def per_image(self) -> int:
        """Losses of one image."""
        return self.captions * self.per_caption

    def stratified(self, length: int) -> DrawConfig:
        """The draws of view 0 and caption 0 as the amortised form makes them, from `length` timesteps."""
        return DrawConfig(self.timesteps, self.draws, self.antithetic, length, self.seed)

    def of(self, image: int, caption: int, shape: tuple[int, ...], length: int) -> tuple[Tensor, Tensor]:
        """(timesteps, noise [·, *shape]) of one image with one caption, ordered by view, timestep and draw."""
        if self.protocol == "stratified":
            config = self.stratified(length)
            found = [
                draw(config, self._role(view, caption), [image], 0, index, number, shape)
                for view in range(self.views)
                for index in range(self.timesteps)
                for number in range(self.draws)
            ]
            timesteps, noise = zip(*found, strict=True)
            return torch.cat(timesteps), torch.cat(noise)
        middles = [(2 * index + 1) * length // (2 * self.timesteps) for index in range(self.timesteps)]
        spaced, rows = [], []
        for view in range(self.views):
            for index, middle in enumerate(middles):
                for number in range(self.draws):
                    key = (ROLE, "grid", self.seed, image, index, view, caption, number)
                    rows.append(torch.randn(shape, generator=keyed_generator(*key)))
                    spaced.append(middle)
        return torch.tensor(spaced), torch.stack(rows)

    @staticmethod
    def _role(view: int, caption: int) -> str:
        return ROLE if view == caption == 0 else f"{ROLE}-view{view}-caption{caption}"


@dataclass(frozen=True)
class TrainingImages:
    """Latents and token states of the training set; the arrays may be mapped from files larger than memory."""

    latents: tuple[np.ndarray, ...]
    """[N, c, h, w] for each view there is: unflipped, and flipped."""
    text: np.ndarray
    """[N, captions, T, d]."""

    def __len__(self) -> int:
        return len(self.text)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's latents."""
        return tuple(self.latents[0].shape[1:])

    def check(self, draws: LossDraws) -> None:
        """`ValueError` if there are fewer views or captions than `draws` needs."""
        if draws.views > len(self.latents):
            raise ValueError(
                "--flips: expected the latents of flipped images, found none; python -m abu.encode --flips"
            )
        if draws.captions > self.text.shape[1]:
            raise ValueError(f"--captions: expected at most {self.text.shape[1]}, found {draws.captions}")

    def check_ids(self, ids: Sequence[int] | np.ndarray, name: str) -> None:
        """`ValueError` naming the first id that is no training image's."""
        array = np.asarray(ids)
        bad = array[(array < 0) | (array >= len(self))]
        if bad.size:
            raise ValueError(f"{name}: expected training ids 0..{len(self) - 1}, found {bad.flat[0]}")

    def views(self, image: int, count: int) -> Tensor:
        """[count, c, h, w]."""
        return torch.from_numpy(np.stack([view[image] for view in self.latents[:count]]))

    def tokens(self, image: int, caption: int) -> Tensor:
        """[T, d]."""
        return torch.from_numpy(np.array(self.text[image, caption]))


def open_images(folder: Path, made_by: str) -> TrainingImages:
    """The training set in `folder`, mapped from `latents.npy` and `text_embeddings.npy`.

    Flipped latents follow the others in the same file, as in the released one, or stand in `latents_flipped.npy`.
    """
    text = load_npy(folder / "text_embeddings.npy", (None,) * 4, mmap=True, writable=False, made_by=made_by)
    path = require_file(folder / "latents.npy", made_by)
    latents, count = load_npy(path, (None,) * 4, finite=True, mmap=True), len(text)
    if len(latents) == 2 * count:
        return TrainingImages((latents[:count], latents[count:]), text)
    if len(latents) != count:
        raise ValueError(f"{path}: expected latents of {count} images or twice as many, found {len(latents)}")
    flipped = folder / "latents_flipped.npy"
    if not flipped.is_file():
        return TrainingImages((latents,), text)
    return TrainingImages((latents, load_npy(flipped, latents.shape, finite=True, mmap=True)), text)
