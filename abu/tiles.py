"""Query gradients in any number: the matrix that training gradients are multiplied with, tile by tile.

A query takes (bins + 1) · size numbers. Where all of them do not fit into the memory budget they lie in an unnamed
temporary file that is mapped, and only a tile of them is read at a time; scores do not depend on the tiles.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from abu.amortised import QueryMatrix, score_block
from abu.compress import Quantised

MEMORY_GB = 4.0
"""Default budget."""
TYPES = {8: torch.int8, 16: torch.bfloat16, 32: torch.float32}
"""Bits of a number -> how it is kept."""


def tiles(count: int, bytes_each: int, budget: float) -> list[slice]:
    """Cuts `count` queries so that a tile needs at most `budget` bytes; `ValueError` if not even one query fits."""
    rows = int(budget // bytes_each)
    if rows < 1:
        raise ValueError(
            f"--memory_gb: expected at least {bytes_each / 2**30:.3f} for one query, found {budget / 2**30:.3f}"
        )
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


class QueryTiles:
    """Gradients of Q queries, normalised as scores need them."""

    def __init__(
        self,
        parts: Iterable[Tensor],
        count: int,
        *,
        bins: int,
        size: int,
        images: int,
        budget: float = MEMORY_GB * 2**30,
        bits: int = 32,
        folder: Path | None = None,
    ) -> None:
        """`parts` are vectors [bins, q, size], `count` queries together; `images` are scored at a time.

        `bits` is 32, 16 (bfloat16, products too) or 8. What exceeds half the budget is kept in a file in `folder`, by
        default the system's place for temporary files.
        """
        if bits not in TYPES:
            raise ValueError(f"bits: expected {', '.join(map(str, TYPES))}, found {bits}")
        self.bins, self.bits = bins, bits
        kept = (bins + 1) * size * bits // 8
        working = 4 * (bins + 1) * size + 4 * (2 * bins + 2) * images
        self.mapped = kept * count > budget / 2
        self.tiles = tiles(count, working, budget / 2)
        self.codes = self._empty((count, bins + 1, size), folder)
        self.scales = torch.ones(count, bins + 1, 1)
        start = 0
        for part in parts:
            matrix = QueryMatrix.of(part)
            rows = torch.cat([matrix.normalised, matrix.plain[None]]).movedim(0, 1).float().cpu()
            stop = start + len(rows)
            if bits == 8:
                found = Quantised.of(rows)
                rows, self.scales[start:stop] = found.codes, found.scales
            self.codes[start:stop] = rows
            start = stop
        if start != count:
            raise ValueError(f"queries: expected {count}, found {start}")

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def bytes_each(self) -> int:
        """Bytes that a query takes."""
        return self.codes[:1].nbytes + (self.scales[:1].nbytes if self.bits == 8 else 0)

    def matrices(self, device: torch.device) -> Iterator[tuple[slice, QueryMatrix]]:
        """Tile by tile: (its rows, its matrix on `device`)."""
        for rows in self.tiles:
            codes = self.codes[rows]
            vectors = Quantised(codes, self.scales[rows]).vectors() if self.bits == 8 else codes
            normalised, plain = vectors.to(device).movedim(1, 0).split([self.bins, 1])
            yield rows, QueryMatrix(normalised, plain[0])

    def score(
        self, vectors: Tensor, weights: tuple[float, ...] | None = None, errors: Tensor | None = None
    ) -> dict[str, Tensor]:
        """plain and normalised scores [Q, B] of training images with vectors [bins, B, size], on the CPU.

        `weights` are those of the bins in the normalised score, equal by default. With the root of their mean losses,
        `errors` [bins, B], also das: mean_b (r_b cos_b)² with r = errors / ‖errors‖ over the bins, the squared
        first-order change of the output (DAS, Lin et al. 2025) for gradients of `average`; the leverage in its
        denominator is left out, as in their accelerated form.
        """
        names = ("plain", "normalised") if errors is None else ("plain", "normalised", "das")
        scores = {name: torch.empty(len(self), vectors.shape[1]) for name in names}
        shares = torch.tensor(weights or (1 / self.bins,) * self.bins, device=vectors.device)
        for rows, matrix in self.matrices(vectors.device):
            plain, terms = score_block(matrix, vectors)
            scores["plain"][rows] = plain.cpu()
            scores["normalised"][rows] = torch.einsum("b,bqn->qn", shares.to(terms), terms).cpu()
            if errors is not None:
                share = torch.nn.functional.normalize(errors, dim=0)[:, None]
                scores["das"][rows] = (share * terms).square().mean(0).cpu()
        return scores

    def _empty(self, shape: tuple[int, ...], folder: Path | None) -> Tensor:
        if not self.mapped:
            return torch.empty(shape, dtype=TYPES[self.bits])
        # numpy has no bfloat16: its bytes are mapped as integers
        kind = {8: np.int8, 16: np.int16, 32: np.float32}[self.bits]
        with tempfile.TemporaryFile(dir=folder) as file:
            array = np.memmap(file, dtype=kind, mode="w+", shape=shape)
        return torch.from_numpy(array).view(TYPES[self.bits])
