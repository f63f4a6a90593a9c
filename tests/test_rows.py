"""Scattered rows of a mapped file are those of the file, asked for ahead or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastgda.core import save_npy
from fastgda.index import rows
from fastgda.index.rows import ScatteredRows


@pytest.mark.parametrize("ahead", [0, 1 << 30])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scattered_rows(tmp_path: Path, rng: np.random.Generator, monkeypatch, ahead: int, dtype: type) -> None:
    monkeypatch.setattr(rows, "ASK_AHEAD", ahead)
    array: np.ndarray = rng.normal(size=(500, 37)).astype(dtype)
    save_npy(tmp_path / "x.npy", array)
    scattered = ScatteredRows(tmp_path / "x.npy", (500, 37))
    for wanted in (np.array([0, 3, 3, 499]), np.arange(500), np.array([499]), np.zeros(0, np.int64)):
        found = scattered.take(wanted)
        assert found.dtype == np.float32 and np.array_equal(found, array[wanted].astype(np.float32))
    with pytest.raises(IndexError):
        scattered.take(np.array([500]))


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_npy(tmp_path / "x.npy", np.zeros((5, 2), np.float32))
    with pytest.raises(ValueError, match=r"x.npy: expected shape \[5, 3\]"):
        ScatteredRows(tmp_path / "x.npy", (5, 3))
