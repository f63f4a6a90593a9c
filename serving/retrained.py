"""Pictures of models that were trained again without a query's most influential images: what is lost without them.

`benchmark.removal report` writes the file for the stored queries that it has models of; the page shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastgda.core import load_npz, save_npz

KEYS = ("captions", "references", "queries", "methods", "removed", "changes", "pictures")


@dataclass(frozen=True)
class Removal:
    """One picture: what a model draws for a query without the images that a method finds most influential."""

    query: int
    """Place in `Retrained.captions`."""
    method: str
    removed: int
    """K."""
    change: float
    """Rise of the query's loss, over that of models trained on everything."""
    picture: np.ndarray
    """[P, P, 3] uint8."""


@dataclass(frozen=True)
class Retrained:
    """The queries' pictures by the whole model and by those trained again."""

    captions: tuple[str, ...]
    """Prompts of the queries."""
    references: np.ndarray
    """[Q, P, P, 3] uint8, the pictures of a model trained on everything, of the same seeds."""
    removals: tuple[Removal, ...]

    def __post_init__(self) -> None:
        shape = (len(self.captions), *self.references.shape[1:])
        one = shape[1:]
        if self.references.shape != shape or len(one) != 3 or one[2] != 3 or not self.captions:
            raise ValueError(f"expected pictures [{len(self.captions)}, P, P, 3], found {list(self.references.shape)}")
        for removal in self.removals:
            if not 0 <= removal.query < len(self.captions):
                raise ValueError(f"expected queries 0 to {len(self.captions) - 1}, found {removal.query}")
            if removal.picture.shape != one or not np.isfinite(removal.change) or removal.removed < 1:
                raise ValueError(
                    f"{removal.method}: expected a picture {list(one)}, a finite change and K of at least 1, found "
                    f"{list(removal.picture.shape)}, {removal.change} and {removal.removed}"
                )

    def of(self, query: int) -> list[Removal]:
        """The removals of a query, the smallest K first, in the order of their methods."""
        found = [removal for removal in self.removals if removal.query == query]
        return sorted(found, key=lambda removal: removal.removed)

    def image(self, query: int) -> Image.Image:
        """A query's picture by the model trained on everything."""
        return Image.fromarray(self.references[query])

    def save(self, path: str | Path) -> None:
        """Writes one `.npz` file."""

        def column(name: str) -> list:
            return [getattr(removal, name) for removal in self.removals]

        pictures: Sequence[np.ndarray] = column("picture")
        save_npz(
            path,
            captions=np.array(self.captions),
            references=self.references,
            queries=np.array(column("query"), np.int64),
            methods=np.array(column("method"), np.str_),
            removed=np.array(column("removed"), np.int64),
            changes=np.array(column("change"), np.float64),
            pictures=np.stack(pictures) if pictures else np.empty((0, *self.references.shape[1:]), np.uint8),
        )

    @classmethod
    def load(cls, path: str | Path) -> Retrained:
        """Reads what `save` wrote; `ValueError` naming the file if it is missing, damaged or contradicts itself."""
        arrays = load_npz(path, KEYS, "python -m benchmark.removal report")
        kinds = {"captions": "U", "references": "u", "queries": "i", "methods": "U", "removed": "i", "changes": "f"}
        for name, kind in (kinds | {"pictures": "u"}).items():
            if arrays[name].dtype.kind != kind or (kind == "u" and arrays[name].dtype != np.uint8):
                raise ValueError(f"{path}: expected another type of numbers in {name}, found {arrays[name].dtype}")
        columns = [arrays[name].tolist() for name in ("queries", "methods", "removed", "changes")]
        lengths = [len(column) for column in (*columns, arrays["pictures"])]
        if len(set(lengths)) != 1:
            raise ValueError(f"{path}: expected columns of one length, found {lengths}")
        rows = tuple(Removal(*row) for row in zip(*columns, arrays["pictures"], strict=True))
        try:
            return cls(tuple(arrays["captions"].tolist()), arrays["references"], rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
