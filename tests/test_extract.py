"""The extraction command: layout, order, resuming, skipping, damaged and missing input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import rows, write_data, write_table

from fastgda.core import read_manifest, verify_artifact
from feature_extraction import extraction as module
from feature_extraction.encoders import Pixel, load_encoder
from feature_extraction.extract import main
from feature_extraction.readers import read_split

FILES = ["data_feats.npy", "manifest.json", "test_query_feats.npy", "train_query_feats.npy", "val_query_feats.npy"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "emoji")
    return tmp_path / "emoji"


def run(data: Path, *flags: str) -> int:
    """The command on the small testbed."""
    return main(["--data_dir", str(data), "--ftype", "pixel", *flags])


def stamps(folder: Path) -> dict[str, int]:
    """Modification times of the feature files."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def test_layout_order_and_manifest(data: Path, files_in) -> None:
    assert run(data, "--shard_rows", "7") == 0
    folder = data / "feats" / "pixel"
    assert files_in(folder) == FILES
    manifest = verify_artifact(folder)
    assert manifest["config"]["ftype"] == "pixel"
    assert set(manifest["inputs"]) == {"data", "train_query", "val_query", "test_query"}
    for split, count in (("data", 36), ("train_query", 4), ("val_query", 4), ("test_query", 4)):
        table = read_split(data, split)
        expected = np.concatenate([Pixel().encode([table.image(row)], [""]) for row in range(count)])
        found = np.load(folder / f"{split}_feats.npy", allow_pickle=False)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("shard_rows", [1, 5, 36, 1000])
def test_files_do_not_depend_on_the_shards(data: Path, tmp_path: Path, shard_rows: int) -> None:
    assert run(data, "--shard_rows", str(shard_rows), "--splits", "data", "--out", str(tmp_path / "a")) == 0
    assert run(data, "--splits", "data", "--out", str(tmp_path / "b")) == 0
    name = "pixel/data_feats.npy"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_composition_comes_from_its_parts(data: Path) -> None:
    assert main(["--data_dir", str(data), "--ftype", "minilm+pixel", "--splits", "data", "--device", "cpu"]) == 0
    table = read_split(data, "data")
    expected = load_encoder("minilm+pixel", torch.device("cpu")).encode(
        [table.image(row) for row in range(36)], [table.caption(row) for row in range(36)]
    )
    found = np.load(data / "feats" / "minilm+pixel" / "data_feats.npy", allow_pickle=False)
    assert np.allclose(found, expected, atol=1e-5)
    assert np.load(data / "feats" / "minilm" / "data_feats.npy").shape == (36, 384)
    before = stamps(data / "feats" / "pixel")
    assert main(["--data_dir", str(data), "--ftype", "pixel+minilm", "--splits", "data"]) == 0
    assert stamps(data / "feats" / "pixel") == before, "parts that are up to date are used as they are"


def test_second_run_skips_and_a_changed_split_is_redone(data: Path, capsys) -> None:
    run(data)
    folder = data / "feats" / "pixel"
    before = stamps(folder)
    assert run(data) == 0
    assert stamps(folder) == before
    assert "up to date" in capsys.readouterr().out
    write_table(data / "query_val" / "queries.parquet", rows(6, start=3))
    assert run(data) == 0
    after = stamps(folder)
    assert {name for name in after if after[name] != before[name]} == {"val_query_feats.npy"}
    assert np.load(folder / "val_query_feats.npy").shape == (6, 768)
    assert set(read_manifest(folder)["inputs"]) == {"data", "train_query", "val_query", "test_query"}


def test_a_truncated_file_is_redone(data: Path) -> None:
    run(data)
    path = data / "feats" / "pixel" / "test_query_feats.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert run(data) == 0
    assert path.read_bytes() == whole


def test_splits_join_one_manifest(data: Path) -> None:
    run(data, "--splits", "data")
    run(data, "--splits", "test_query")
    assert set(verify_artifact(data / "feats" / "pixel")["inputs"]) == {"data", "test_query"}


def test_features_of_another_encoder_are_removed(data: Path, monkeypatch: pytest.MonkeyPatch, files_in) -> None:
    run(data)
    folder = data / "feats" / "pixel"
    changed = {"ftype": "pixel", "parts": {"pixel": {"dim": 768, "pixels": 17}}}
    monkeypatch.setattr(module, "identity", lambda *_: changed)
    assert run(data, "--splits", "data") == 0
    assert files_in(folder) == ["data_feats.npy", "manifest.json"]
    assert read_manifest(folder)["config"] == changed


class Interrupting(Pixel):
    """The pixel encoder, with Ctrl-C after a number of batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.seen = 0

    def encode(self, images, captions):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += len(images)
        return super().encode(images, captions)


def test_interrupted_run_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch, files_in) -> None:
    run(data, "--out", str(data / "whole"))
    first, second = Interrupting(3), Interrupting(-1)
    monkeypatch.setattr(module, "load_encoder", lambda *_: first)
    assert run(data, "--shard_rows", "8") == 130
    folder = data / "feats" / "pixel"
    assert not (folder / "data_feats.npy").exists()
    assert not (folder / "manifest.json").exists()
    assert sum(name.endswith(".npy") for name in files_in(folder)) == 3
    monkeypatch.setattr(module, "load_encoder", lambda *_: second)
    assert run(data, "--shard_rows", "8") == 0
    assert second.seen == 36 + 3 * 4 - 3 * 8
    assert files_in(folder) == FILES
    for name in FILES:
        if name.endswith(".npy"):
            assert (folder / name).read_bytes() == (data / "whole" / "pixel" / name).read_bytes()


def test_full_disk_leaves_no_feature_file(data: Path, disk_limit, files_in, capsys) -> None:
    with disk_limit(50_000):
        assert run(data, "--shard_rows", "8") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert [name for name in files_in(data / "feats") if not name.startswith("pixel/.shards") and "." in name] == []
    assert run(data, "--shard_rows", "8") == 0
    assert files_in(data / "feats" / "pixel") == FILES


def test_dry_run_writes_nothing(data: Path, capsys) -> None:
    assert main(["--data_dir", str(data), "--ftype", "minilm+pixel", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "36 images" in out and "nothing written" in out
    total = 4 * (36 + 12) * 2 * (384 + 768)
    assert f"{total / 1e6:.1f} MB" in out.splitlines()[-1]
    assert not (data / "feats").exists()
    run(data)
    capsys.readouterr()
    assert run(data, "--dry_run") == 0
    assert capsys.readouterr().out.count("up to date") == 4


def test_missing_split_names_the_command_before_any_work(data: Path, capsys) -> None:
    (data / "query_val" / "queries.parquet").unlink()
    assert run(data) == 2
    error = capsys.readouterr().err
    assert "query_val/queries.parquet" in error and "python -m abu.sample" in error
    assert not (data / "feats").exists()
    assert run(data, "--splits", "data", "test_query") == 0


def test_damaged_picture_is_named(data: Path, capsys) -> None:
    table = rows(5)
    table[3]["image"] = b"not a picture"
    write_table(data / "query_test" / "queries.parquet", table)
    assert run(data) == 2
    assert "query_test/queries.parquet, id 3: expected an image" in capsys.readouterr().err
    assert not (data / "feats" / "pixel" / "test_query_feats.npy").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--ftype", "dino3"], "ftype 'dino3'"),
        (["--splits", "train"], "--splits train"),
        (["--splits"], "--splits"),
        (["--shard_rows", "0"], "--shard_rows 0"),
        (["--device", "cuda:99"], "--device cuda:99: not available"),
        (["--weights", "x.pth"], "--weights x.pth"),
    ],
)
def test_wrong_flags_exit_with_one_line(data: Path, capsys, flags: list[str], complaint: str) -> None:
    assert run(data, *flags) == 2
    error = capsys.readouterr().err
    assert complaint in error and len(error.strip().splitlines()) == 1


def test_manifest_is_plain_json(data: Path) -> None:
    run(data, "--splits", "data")
    manifest = json.loads((data / "feats" / "pixel" / "manifest.json").read_text())
    assert manifest["command"] == "python -m feature_extraction.extract --mode emoji --ftype pixel"
    assert manifest["files"]["data_feats.npy"]["bytes"] == 128 + 36 * 768 * 4
