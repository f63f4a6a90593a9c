"""An index built by Ray workers: the files of a build in one process, whoever dies on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from index_world import IDS, N, vectors
from ray_nodes import two_nodes

from fastgda.cluster import ClusterConfig
from fastgda.core import save_npy
from fastgda.index import Index, SegmentConfig, Source, segment
from fastgda.index.__main__ import main
from fastgda.index.workers import on_workers
from fastgda.ranker import Ranker, RankerConfig, save_ranker

FILES = ("index.faiss", "vectors.npy", "ids.npy", "order.npy")


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two nodes with one processor each."""
    with two_nodes() as both:
        yield both


class Deadly:
    """The vectors of the small world; a worker that reads from row `at` on is killed once, or fails, if it is told."""

    def __init__(self, order: Path, at: int) -> None:
        self.order, self.at, self.driver = order, at, os.getpid()
        self.shape = vectors().shape

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice) and rows.start >= self.at and os.getpid() != self.driver and self.order.is_file():
            if self.order.read_text() == "fail":
                raise ValueError("a disk is gone")
            self.order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return vectors()[rows]


def contents(index: Path, number: int = 0) -> dict[str, bytes]:
    return {name: (index / "segments" / f"{number:06d}" / name).read_bytes() for name in FILES}


def test_command_on_workers_writes_the_bytes_of_one_process(nodes, tmp_path: Path) -> None:
    """With a ranker, and several files of which rows are left out; rebuilding too."""
    torch.manual_seed(0)
    save_ranker(tmp_path / "r.pth", Ranker(RankerConfig(in_dim=16, hidden_sizes=(8,), out_feat_dim=8)).eval())
    features = vectors().copy()
    features[[3, 150]] = 0
    for name, part in zip("ab", np.split(features, [100]), strict=True):
        save_npy(tmp_path / f"{name}.npy", part)
    build = ["--vectors", str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), "--checkpoint", str(tmp_path / "r.pth")]
    build += ["--factory", "IVF8,PQ4x4", "--store", "float16"]
    workers = ["--workers", "2", "--threads", "1"]
    assert main(["build", str(tmp_path / "one"), *build, "--shards", "2"]) == 0
    assert main(["build", str(tmp_path / "many"), *build, *workers]) == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert Index(tmp_path / "many").snapshot().segments[0].config.shards == 2
    for name, more in (("one", []), ("many", workers)):
        assert main(["remove", str(tmp_path / name), "--ids", "7", "8"]) == 0
        assert main(["rebuild", str(tmp_path / name), *more]) == 0
    assert contents(tmp_path / "many", 1) == contents(tmp_path / "one", 1)


def test_killed_worker_is_replaced_and_whole_shards_are_kept(nodes, tmp_path: Path, monkeypatch) -> None:
    config = SegmentConfig("IVF8,SQ8", shards=4)
    build = on_workers(ClusterConfig(workers=2, threads=1))
    order = tmp_path / "order"
    source = Source([Deadly(order, at=N // 2)], IDS)
    order.write_text("fail")
    with pytest.raises(ValueError, match=r"shard_0000[23]\.faiss: expected a shard after 3 attempts.*a disk is gone"):
        Index.create(tmp_path / "x", source, config, ranker="none", command="test", build=build)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x" / "building").glob("shard_*")}
    assert sorted(made) == ["shard_00000.faiss", "shard_00001.faiss"]
    order.write_text("die")
    merged: dict[str, int] = {}

    def merge(folder: Path, *rest, **more) -> None:
        merged.update({path.name: path.stat().st_mtime_ns for path in folder.glob("shard_*")})
        real(folder, *rest, **more)

    real = segment._merge
    monkeypatch.setattr(segment, "_merge", merge)
    Index.create(tmp_path / "x", source, config, ranker="none", command="test", build=build)
    assert not order.exists(), "a worker was killed"
    assert made.items() <= merged.items() and len(merged) == 4
    Index.create(tmp_path / "one", source, config, ranker="none", command="test")
    assert contents(tmp_path / "x") == contents(tmp_path / "one")


def test_what_cannot_be_merged_is_refused_before_it_is_built(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(segment, "build_shard", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match="shards: expected a factory that can be merged"):
        Index.create(
            tmp_path / "x", Source([vectors()]), SegmentConfig("HNSW8", shards=2), ranker="none", command="test"
        )
