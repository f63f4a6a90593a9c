"""Building an index: what an interrupted build goes on with, and what it takes while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from index_world import queries, vectors

from fastgda.core import read_manifest, save_npy
from fastgda.index import FlatIndex, Index, segment
from fastgda.index.__main__ import main


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch):
    """`with cut_off():` stops a build when all shards are there and the merge begins."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    @contextmanager
    def stopping() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(segment, "_merge", stop)
            yield

    return stopping


def test_interrupted_build_does_not_go_on_with_another_embedding(tmp_path: Path, cut_off) -> None:
    save_npy(tmp_path / "f.npy", 7 * vectors())
    build = ["build", str(tmp_path / "x"), "--vectors", str(tmp_path / "f.npy"), "--factory", "IVF8,SQ8"]
    with cut_off():
        assert main(build) == 130
    assert main([*build, "--unit"]) == 0
    (built,) = Index(tmp_path / "x", ranker="cosine").snapshot().segments
    assert np.allclose(np.linalg.norm(built.vectors, axis=1), 1, atol=1e-5)


def test_files_of_one_name_are_told_apart(tmp_path: Path, cut_off) -> None:
    """By their order too: the same files in another order are another build."""
    paths = [tmp_path / folder / "f.npy" for folder in "ab"]
    for path, part in zip(paths, np.split(vectors(), 2), strict=True):
        save_npy(path, part)
    build = ["build", str(tmp_path / "x"), "--factory", "IVF8,SQ8", "--vectors"]
    with cut_off():
        assert main([*build, *map(str, paths[::-1])]) == 130
    assert main([*build, *map(str, paths)]) == 0
    index = Index(tmp_path / "x")
    expected = FlatIndex.build(vectors()).search(queries(), 5)
    assert np.array_equal(index.search(queries(), 5).ids, expected.ids)
    inputs = read_manifest(index.snapshot().segments[0].folder)["inputs"]
    assert list(inputs) == ["f.npy", "f.npy (2)"] and len(set(inputs.values())) == 2
