"""The training images as page and API know them: which ones there are, what is told of each, and how they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fastgda.attributor import Known
from fastgda.index import Index
from feature_extraction.sources import Pictures

SOME = 256
"""Images that are asked for a creator, to know whether any have one."""


class Collection(Protocol):
    """Training images by id. What is removed from it is gone from the next question on."""

    def __len__(self) -> int: ...

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """[n] bool: whether it holds each id."""

    def known(self, ids: np.ndarray) -> list[Known]:
        """Caption, creator, licence, ... of each id, never where it lies; `None` for one that it does not hold."""

    @property
    def has_creators(self) -> bool:
        """Whether it knows creators."""


@dataclass(frozen=True)
class Fixed:
    """A data folder's training images, all of them for as long as the server runs."""

    images: Pictures
    told: Sequence[dict[str, Any]]
    """[N] what is told of them besides the caption: creator and licence, or key, what their dataset calls them."""

    def __len__(self) -> int:
        return len(self.images)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """All true."""
        return np.ones(len(ids), dtype=bool)

    def known(self, ids: np.ndarray) -> list[Known]:
        """By row."""
        return [{"id": i, "caption": self.images.caption(i), **self.told[i]} for i in map(int, ids)]

    @property
    def has_creators(self) -> bool:
        """Whether any has one."""
        return any(known.get("creator") for known in self.told)


@dataclass(frozen=True)
class Live:
    """What a bundle's index holds at this moment."""

    index: Index

    def __len__(self) -> int:
        return len(self.index)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Asks the index's files."""
        return self.index.snapshot().contains(np.asarray(ids, dtype=np.int64))

    def known(self, ids: np.ndarray) -> list[Known]:
        """From the index's metadata."""
        return [known and {k: v for k, v in known.items() if k != "path"} for known in self.index.metadata(ids)]

    @property
    def has_creators(self) -> bool:
        """Whether any of the first has one."""
        return any((known or {}).get("creator") for known in self.known(self.index.snapshot().segments[0].ids[:SOME]))


class NoPictures:
    """Stands for pictures that are not at hand."""

    path = Path()
    fingerprint = ""
    keys: Sequence[str] = ()
    captions: Sequence[list[str]] = ()

    def __len__(self) -> int:
        return 0

    def image(self, row: int) -> Image.Image:
        """None is there."""
        raise ValueError(f"image {row}: expected a picture, found none at hand")

    def caption(self, row: int) -> str:
        """Nothing."""
        return ""
