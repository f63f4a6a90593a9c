"""What an encoder costs and what half precision does to its features, measured on a few pictures."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from feature_extraction.encoders import Encoder
from feature_extraction.shards import encode_rows
from feature_extraction.sources import Pictures

SAMPLE = 64
"""Pictures that are measured."""


@dataclass(frozen=True)
class Drift:
    """How far features turned: 1 - cosine between the features of the same picture from two encoders."""

    images: int
    mean: float
    max: float

    def __str__(self) -> str:
        return f"cosine drift on {self.images} pictures: mean {self.mean:.1e}, max {self.max:.1e}"


def drift(encoder: Encoder, reference: Encoder, table: Pictures, images: int = SAMPLE) -> Drift:
    """The drift of `encoder` against `reference` on pictures spread evenly over `table`; unreadable ones count as 0."""
    rows = np.unique(np.linspace(0, len(table) - 1, min(images, len(table))).astype(int)).tolist()
    angles = [_angle(encoder, reference, table, range(row, row + 1)) for row in rows]
    return Drift(len(rows), float(np.mean(angles)), float(np.max(angles)))


def _angle(encoder: Encoder, reference: Encoder, table: Pictures, row: range) -> float:
    (found, expected) = (encode_rows(each, table, row)[0][0].astype(np.float64) for each in (encoder, reference))
    lengths = np.linalg.norm(found) * np.linalg.norm(expected)
    return float(1 - found @ expected / lengths) if lengths else 0.0


def seconds_per_image(encoder: Encoder, table: Pictures) -> float:
    """Time of one image, from the second of two runs over up to 64 images (the first warms up)."""
    rows = range(min(SAMPLE, len(table)))
    encode_rows(encoder, table, rows)
    start = time.perf_counter()
    encode_rows(encoder, table, rows)
    return (time.perf_counter() - start) / len(rows)
