"""Building an index: what an interrupted build goes on with, and what it takes while it runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from index_world import IDS, N, build, queries, source, vectors

from fastgda.core import read_manifest, save_npy
from fastgda.index import FlatIndex, Index, SegmentConfig, Source, segment, store
from fastgda.index.__main__ import main
from fastgda.index.backend import Structure
from fastgda.index.plan import estimate


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


@pytest.mark.parametrize(
    "config", [SegmentConfig(), SegmentConfig("IVF8,SQ8"), SegmentConfig("IVF8,SQ8", on_disk=True, shards=2)], ids=str
)
def test_disk_never_holds_more_than_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: SegmentConfig
) -> None:
    merge, most = segment._merge, 0

    def measured(folder: Path, *rest, **options) -> None:
        nonlocal most
        merge(folder, *rest, **options)
        most = sum(path.stat().st_size for path in folder.iterdir() if "metadata" not in path.name)

    monkeypatch.setattr(segment, "_merge", measured)
    array = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
    Index.create(tmp_path / "x", Source([array]), config, ranker="none", command="test")
    assert 0.9 < most / estimate(config, 20_000, 32, 1e9).disk < 1.02


def test_training_vectors_are_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In numpy's memory; what FAISS takes itself is estimated."""
    array = np.random.default_rng(0).normal(size=(30_000, 64)).astype(np.float32)
    given = Source([array])
    train = Structure.train

    def measured(structure: Structure, sample: np.ndarray) -> None:
        assert tracemalloc.get_traced_memory()[1] < 1.4 * sample.nbytes
        train(structure, sample)

    monkeypatch.setattr(Structure, "train", measured)
    monkeypatch.setattr("fastgda.index.source.BLOCK", 1024)
    tracemalloc.start()
    segment._trained(tmp_path / "t.faiss", given, SegmentConfig("IVF8,SQ8", "float16"), None)
    tracemalloc.stop()
    cost = estimate(SegmentConfig("IVF8,SQ8"), 30_000, 64, 1e9)
    assert cost.build_ram > cost.ram + 2 * array.nbytes, "the sample, and FAISS's copies of it"


def test_large_additions_stay_on_disk_like_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "x", SegmentConfig("IVF8,SQ8", on_disk=True, shards=2), range(150))
    monkeypatch.setattr(store, "EXACT_ADDITION", 100)
    index.add(source(range(150, N)), command="test")
    added = index.snapshot().segments[1]
    assert added.config == SegmentConfig("IVF8,SQ8", on_disk=True, shards=2)
    assert (added.folder / "lists.ivfdata").is_file() and added.held < 10_000
    found = Index(tmp_path / "x").search(queries(), 10)
    assert np.array_equal(found.ids, FlatIndex.build(vectors(), IDS).search(queries(), 10).ids)
