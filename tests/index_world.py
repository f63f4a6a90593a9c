"""A small index: 300 clustered vectors of unit length under ids that are neither small nor in order."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastgda.dataset import normalise
from fastgda.index import Index, SegmentConfig, Settings, Source

N, DIM = 300, 16
IDS = np.random.default_rng(7).permutation(N) * 3_000_000_017 + 11


@cache
def vectors() -> np.ndarray:
    """[N, DIM] float32."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(6, DIM))
    return normalise(centres[random.integers(6, size=N)] + 0.7 * random.normal(size=(N, DIM))).astype(np.float32)


@cache
def queries() -> np.ndarray:
    """[12, DIM] float32, near some of the vectors."""
    return normalise(vectors()[::25] + 0.1 * np.random.default_rng(2).normal(size=(12, DIM))).astype(np.float32)


def creator(row: int) -> str:
    """Ten creators with images all over the rows."""
    return f"creator {row % 10}"


def metadata(rows: range = range(N)) -> pa.Table:
    """Ids and what is known of each row, captions as the readers of the testbed keep them."""
    return pa.table(
        {
            "id": IDS[rows.start : rows.stop],
            "captions": [[f"picture {row}", "another caption"] for row in rows],
            "creator": [creator(row) for row in rows],
            "path": [f"{row}.png" for row in rows],
        }
    )


def source(rows: range = range(N)) -> Source:
    """Some of the images."""
    table = metadata(rows)
    empty = pa.nulls(len(rows), pa.string())
    known = pa.table(
        {
            "caption": pa.array([captions[0] for captions in table["captions"].to_pylist()]),
            "creator": table["creator"],
            "licence": empty,
            "path": table["path"],
            "url": empty,
        }
    )
    part = slice(rows.start, rows.stop)
    return Source([vectors()[part]], IDS[part], tables=lambda: iter([known]))


def build(path: Path, config: SegmentConfig, rows: range = range(N)) -> Index:
    """An index of some of the images."""
    return Index.create(path, source(rows), config, ranker="none", command="test")


def exhaustive() -> Settings:
    """Visits and re-ranks everything."""
    return Settings(nprobe=N, depth=N, k=1)
