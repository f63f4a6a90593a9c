"""Extraction on Ray Data workers: the same bytes as one process, also after a part was made before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray_nodes import two_nodes
from small_world import rows, write_table

from fastgda.core import read_manifest
from feature_extraction import cluster, extraction
from feature_extraction.extract import main as extract
from feature_extraction.extraction import ExtractConfig


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two nodes with two processors in all."""
    with two_nodes() as both:
        yield both


def command(source: Path, out: Path, *more: str) -> list[str]:
    common = ["--ftype", "pixel", "--device", "cpu", "--shard_rows", "4", "--max_corrupt", "0.2"]
    return [*common, "--source", str(source), "--out", str(out), *more]


def test_workers_write_the_bytes_of_one_process(nodes, tmp_path: Path, files_in) -> None:
    table = rows(22)
    table[5]["image"] = b"no picture"
    write_table(tmp_path / "pictures.parquet", table)
    source, one, many = tmp_path / "pictures.parquet", tmp_path / "one", tmp_path / "many"
    assert extract(command(source, one)) == 0
    # the first half was made earlier, by a process of its own
    assert extract(command(source, many, "--shards", "2", "--shard", "0")) == 0
    assert extract(command(source, many, "--workers", "2", "--threads", "1")) == 0
    assert files_in(many) == files_in(one)
    for name in ("data_feats.npy", "data_skipped.json"):
        assert (many / "pixel" / name).read_bytes() == (one / "pixel" / name).read_bytes()


def test_too_many_unreadable_pictures_stop_the_workers(nodes, tmp_path: Path, capsys) -> None:
    table = rows(8)
    for number in range(4):
        table[number]["image"] = b"no picture"
    write_table(tmp_path / "pictures.parquet", table)
    assert extract(command(tmp_path / "pictures.parquet", tmp_path / "out", "--workers", "1", "--threads", "1")) == 2
    assert "at most 20.00% unreadable pictures" in capsys.readouterr().err
    assert not (tmp_path / "out/pixel/data_feats.npy").exists()


def test_drift_is_measured_where_shards_are_written(tmp_path: Path, monkeypatch, files_in) -> None:
    """Not by each worker; and it is recorded although the shards were made before."""
    write_table(tmp_path / "pictures.parquet", rows(6))
    half = command(tmp_path / "pictures.parquet", tmp_path, "--bf16")
    assert extract([*half, "--shards", "1", "--shard", "0"]) == 0
    monkeypatch.setattr(extraction, "drift", lambda *_: pytest.fail("measured again"))
    config = ExtractConfig(ftype="pixel", source=tmp_path / "pictures.parquet", device="cpu", bf16=True)
    worker = cluster.ShardWorker(config, "pixel", "data", torch.get_num_threads())
    assert worker({"start": np.array([0])})["features"].shape == (1, 6, 768)
    assert extract([*half, "--workers", "1", "--threads", "1"]) == 0
    found = read_manifest(tmp_path / "pixel")["drift"]["pixel"]
    assert found == pytest.approx({"images": 6, "mean": 0, "max": 0}, abs=1e-12)
    assert files_in(tmp_path / "pixel") == ["data_feats.npy", "manifest.json"]


def test_workers_ask_for_a_gpu_only_if_they_are_to_use_it(nodes, tmp_path: Path, monkeypatch) -> None:
    write_table(tmp_path / "pictures.parquet", rows(4))
    asked = []

    def map_batches(dataset, worker, **options):
        asked.append(options["num_gpus"])
        raise ValueError("enough")

    monkeypatch.setattr(ray.data.Dataset, "map_batches", map_batches)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    common = ["--ftype", "pixel", "--source", str(tmp_path / "pictures.parquet"), "--out", str(tmp_path)]
    for device in (["--device", "cpu"], []):
        assert extract([*common, "--workers", "1", "--threads", "1", *device]) == 2
    assert asked == [0, 1]


def test_workers_and_shards_exclude_each_other(tmp_path: Path, capsys) -> None:
    for more in (["--shards", "2", "--shard", "0"], ["--merge"], ["--workers", "0"]):
        assert extract(command(tmp_path, tmp_path, "--workers", "2", *more)) == 2
        assert "--workers: expected" in capsys.readouterr().err
