"""The exact index against plain numpy, and its file against damage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastgda.core import manifest_path
from fastgda.index import FlatIndex


@pytest.mark.parametrize("k", [1, 7, 50])
def test_search_equals_sorting_all_inner_products(rng: np.random.Generator, k: int) -> None:
    data, queries = rng.normal(size=(50, 9)), rng.normal(size=(6, 9))
    scores = queries @ data.T
    found = FlatIndex.build(data).search(queries, k)
    order = np.argsort(-scores, axis=1)[:, :k]
    assert found.ids.dtype == np.int64
    assert np.array_equal(found.ids, order)
    assert np.allclose(found.scores, np.take_along_axis(scores, order, 1), atol=1e-5)


def test_ids_are_the_callers(rng: np.random.Generator) -> None:
    data = rng.normal(size=(20, 4)).astype(np.float32)
    ids = np.arange(20) * 3_000_000_000 + 5
    plain, named = FlatIndex.build(data), FlatIndex.build(data, ids)
    assert np.array_equal(named.search(data, 5).ids, ids[plain.search(data, 5).ids])


def test_threads_get_the_same_answers(rng: np.random.Generator) -> None:
    index, queries = FlatIndex.build(rng.normal(size=(300, 8))), rng.normal(size=(40, 8))
    expected = index.search(queries, 10).ids
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: index.search(queries[row : row + 1], 10).ids[0], range(40)))
    assert np.array_equal(np.stack(found), expected)


def test_saved_index_answers_the_same(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.normal(size=(30, 5)).astype(np.float32)
    index = FlatIndex.build(data, np.arange(100, 130))
    index.save(tmp_path / "x.index", command="test")
    loaded = FlatIndex.load(tmp_path / "x.index")
    assert (len(loaded), loaded.dim) == (30, 5)
    before, after = index.search(data, 30), loaded.search(data, 30)
    assert np.array_equal(before.ids, after.ids) and np.array_equal(before.scores, after.scores)


def test_damaged_missing_and_unknown_files_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "x.index"
    with pytest.raises(ValueError, match=r"x\.index: expected a file"):
        FlatIndex.load(path)
    FlatIndex.build(rng.normal(size=(30, 5))).save(path, command="test")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="expected SHA-256"):
        FlatIndex.load(path)
    path.write_bytes(whole)
    manifest_path(path).unlink()
    with pytest.raises(ValueError, match=r"x\.index\.manifest\.json: expected a file"):
        FlatIndex.load(path)


def test_full_disk_leaves_nothing(tmp_path: Path, rng: np.random.Generator, disk_limit, files_in) -> None:
    index = FlatIndex.build(rng.normal(size=(4000, 64)))
    with disk_limit(100_000), pytest.raises(OSError):
        index.save(tmp_path / "x.index", command="test")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: FlatIndex.build(np.zeros(4)), r"embeddings: expected shape \[\*, \*\], found \[4\]"),
        (lambda: FlatIndex.build(np.full((2, 2), np.nan)), "embeddings: expected finite"),
        (lambda: FlatIndex.build(np.ones((2, 2)), np.array([1, 1])), "each id once"),
        (lambda: FlatIndex.build(np.ones((2, 2)), np.array([1.0, 2.0])), "expected 2 integers"),
        (lambda: FlatIndex.build(np.ones((2, 2))).search(np.ones((1, 3)), 1), r"queries: expected shape \[\*, 2\]"),
        (lambda: FlatIndex.build(np.ones((2, 2))).search(np.ones((1, 2)), 3), "k = 3: expected 1 to 2"),
        (lambda: FlatIndex.build(np.ones((2, 2))).search(np.ones((1, 2)), 0), "k = 0: expected 1 to 2"),
    ],
)
def test_wrong_arguments_are_refused(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()
