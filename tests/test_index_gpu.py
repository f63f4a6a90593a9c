"""When FAISS works on a GPU, and what it is given then; the GPU itself is played by the processor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from index_world import build, exhaustive, queries, vectors

from fastgda.index import Index, SegmentConfig, backend
from fastgda.index.backend import Structure


class Gpu:
    """What the GPU build of FAISS adds."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.copied: list[bool] = []
        self.clustered = self.searched = 0
        patch.setattr(faiss, "StandardGpuResources", SimpleNamespace, raising=False)
        patch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
        patch.setattr(faiss, "get_num_gpus", lambda: count, raising=False)
        patch.setattr(faiss, "index_cpu_to_gpu", self.copy, raising=False)
        patch.setattr(faiss, "index_cpu_to_all_gpus", self.assignment, raising=False)

    def copy(self, resources, device: int, index: faiss.Index, options) -> SimpleNamespace:
        self.copied.append(options.useFloat16)

        def search(*asked, **more):
            self.searched += 1
            return index.search(*asked, **more)

        return SimpleNamespace(search=search)

    def assignment(self, index: faiss.Index) -> faiss.Index:
        self.clustered += 1
        return index


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "PCA8,IVF8,PQ4x4"])
def test_training_assigns_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    """Exact assignment there gives the structure of exact assignment here."""
    plain, fast = Structure.create(factory, 16), Structure.create(factory, 16)
    plain.train(vectors())
    gpu = Gpu(monkeypatch)
    fast.train(vectors())
    assert gpu.clustered == 1
    for name, structure in (("a", plain), ("b", fast)):
        structure.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("config", "copied"),
    [
        (SegmentConfig(), [False]),
        (SegmentConfig("IVF8,SQ8"), [False]),
        (SegmentConfig("PCA8,IVF8,PQ4"), [True]),
        (SegmentConfig("IVF8,SQ8", on_disk=True), []),
        (SegmentConfig("HNSW8"), []),
        (SegmentConfig("SQ8"), []),
        (SegmentConfig("IVF8,PQ4x4fs"), []),
    ],
    ids=str,
)
def test_structures_that_a_gpu_knows_are_searched_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: SegmentConfig, copied: list[bool]
) -> None:
    expected = build(tmp_path / "x", config).search(queries(), 5, exhaustive())
    gpu = Gpu(monkeypatch)
    index = Index(tmp_path / "x")
    assert np.array_equal(index.search(queries(), 5, exhaustive()).ids, expected.ids)
    assert gpu.copied == copied and bool(gpu.searched) == bool(copied)
    monkeypatch.setattr(backend, "GPU_LIMIT", 4)
    gpu.searched = 0
    index.search(queries(), 5, exhaustive())
    assert gpu.searched == 0, "a GPU refuses as many"


def test_without_a_gpu_nothing_is_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, count=0)
    build(tmp_path / "x", SegmentConfig("IVF8,SQ8")).search(queries(), 5)
    assert (gpu.clustered, gpu.copied, gpu.searched) == (0, [], 0)


def test_a_structure_that_a_gpu_cannot_hold_is_searched_here(tmp_path: Path, monkeypatch, caplog) -> None:
    index = build(tmp_path / "x", SegmentConfig())
    expected = index.search(queries(), 5).ids

    def refuse(*_) -> None:
        raise RuntimeError("out of memory")

    Gpu(monkeypatch)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse, raising=False)
    assert np.array_equal(Index(tmp_path / "x").search(queries(), 5).ids, expected)
    assert "searching on the processor; on the GPU: out of memory" in caplog.text
