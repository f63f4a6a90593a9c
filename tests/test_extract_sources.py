"""Extraction from COCO and other sources: order, unreadable pictures, several processes, half precision."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_world import png, rows, write_data, write_table
from test_sources import write_tar

from fastgda.core import read_manifest, verify_artifact
from feature_extraction.archives import ParquetPictures
from feature_extraction.encoders import Pixel, load_encoder
from feature_extraction.extract import main
from feature_extraction.extraction import ExtractConfig
from feature_extraction.measure import drift
from feature_extraction.readers import open_image, read_table
from feature_extraction.shards import encode_rows
from feature_extraction.sources import open_source


def write_coco(folder: Path, images: int = 12, queries: int = 3) -> list[dict]:
    """A small dataset in COCO's and the released layout; the annotations come in another order than the images."""
    table = rows(images)
    trainset = folder / "trainset"
    (trainset / "train2017").mkdir(parents=True)
    (trainset / "annotations").mkdir()
    ids = [1000 - 7 * row for row in range(images)]
    entries, annotations = [], []
    for row, name in enumerate(ids):
        (trainset / "train2017" / f"{name:012d}.png").write_bytes(table[row]["image"])
        entries.append({"id": name, "file_name": f"{name:012d}.png"})
        annotations += [{"image_id": name, "id": 9 - n, "caption": f"{table[row]['captions'][0]} {n}"} for n in (0, 1)]
    annotations = annotations[::2][::-1] + annotations[1::2]
    document = {"images": entries, "annotations": annotations}
    (trainset / "annotations" / "captions_train2017.json").write_text(json.dumps(document))
    for start, split in enumerate(("train", "test")):
        query = folder / f"query_{split}"
        (query / "images").mkdir(parents=True)
        pictures = rows(queries, start=5 * start)
        for row, entry in enumerate(pictures):
            (query / "images" / f"{row}.png").write_bytes(entry["image"])
        (query / "captions.txt").write_text("".join(f"{entry['captions'][0]}\n" for entry in pictures))
    return table


def expected_pixels(table: list[dict]) -> np.ndarray:
    return np.concatenate([Pixel().encode([open_image(entry["image"], "x")], [""]) for entry in table])


def coco(folder: Path, *flags: str) -> int:
    return main(["--mode", "coco", "--data_dir", str(folder), "--ftype", "pixel", *flags])


def features(folder: Path, ftype: str = "pixel", split: str = "data") -> np.ndarray:
    return np.load(folder / "feats" / ftype / f"{split}_feats.npy", allow_pickle=False)


def test_coco_in_the_released_layout(tmp_path: Path, files_in) -> None:
    table = write_coco(tmp_path)
    assert coco(tmp_path) == 0
    assert files_in(tmp_path / "feats" / "pixel") == [
        *("data_feats.npy", "manifest.json", "test_query_feats.npy", "train_query_feats.npy")
    ]
    assert np.array_equal(features(tmp_path), expected_pixels(table))
    assert np.array_equal(features(tmp_path, split="test_query"), expected_pixels(rows(3, start=5)))
    assert read_manifest(tmp_path / "feats" / "pixel")["skipped"] == {"data": 0, "train_query": 0, "test_query": 0}


def test_coco_joins_raw_parts_as_released(tmp_path: Path) -> None:
    table = write_coco(tmp_path)
    assert coco(tmp_path, "--ftype", "pixel+minilm", "--splits", "data", "--device", "cpu") == 0
    text = load_encoder("minilm").encode([], [f"{entry['captions'][0]} 0" for entry in table])
    found = features(tmp_path, "pixel+minilm")
    assert np.array_equal(found[:, :768], expected_pixels(table)), "not normalised"
    assert np.allclose(found[:, 768:], text, atol=1e-5), "the first caption's feature"
    assert read_manifest(tmp_path / "feats" / "pixel+minilm")["config"]["join"] == "raw"


def test_unreadable_pictures_are_listed_and_keep_their_rows(tmp_path: Path, capsys) -> None:
    table = write_coco(tmp_path)
    folder = tmp_path / "trainset" / "train2017"
    (folder / "000000000993.png").unlink()
    damaged = folder / "000000000951.png"
    damaged.write_bytes(damaged.read_bytes()[:80])
    assert coco(tmp_path, "--splits", "data") == 2
    assert "expected at most 1.00% unreadable pictures (--max_corrupt), found" in capsys.readouterr().err
    flags = ("--splits", "data", "--max_corrupt", "0.2", "--device", "cpu")
    assert coco(tmp_path, "--ftype", "pixel+minilm", *flags) == 0
    assert "2 unreadable pictures, their rows are zero" in capsys.readouterr().out
    expected = expected_pixels(table)
    expected[[1, 7]] = 0
    assert np.array_equal(features(tmp_path), expected)
    assert not features(tmp_path, "pixel+minilm")[[1, 7]].any(), "no part of it may be retrieved"
    assert features(tmp_path, "pixel+minilm")[[0, 2, 6, 8]].any(1).all()
    assert features(tmp_path, "minilm").any(1).all(), "its caption is there"
    for ftype in ("pixel", "pixel+minilm"):
        skipped = json.loads((tmp_path / "feats" / ftype / "data_skipped.json").read_text())
        assert [(entry["id"], entry["key"]) for entry in skipped] == [(1, "993"), (7, "951")]
        assert "found nothing" in skipped[0]["reason"] and "000000000951.png: expected" in skipped[1]["reason"]
        manifest = verify_artifact(tmp_path / "feats" / ftype)
        assert manifest["skipped"] == {"data": 2} and "data_skipped.json" in manifest["files"]
    damaged.write_bytes(table[7]["image"])
    (folder / "000000000993.png").write_bytes(table[1]["image"])
    assert coco(tmp_path, "--splits", "data") == 0
    assert np.array_equal(features(tmp_path), expected_pixels(table))
    assert not (tmp_path / "feats" / "pixel" / "data_skipped.json").exists()


def test_a_damaged_caption_stops_encoders_of_text_alone(tmp_path: Path, capsys) -> None:
    table = rows(4)
    members = [(f"{row}.png", entry["image"]) for row, entry in enumerate(table)]
    members += [(f"{row}.json", b'{"caption": "x"}' if row else b"{") for row in range(4)]
    write_tar(tmp_path / "t.tar", members)
    flags = ["--source", str(tmp_path / "t.tar"), "--out", str(tmp_path / "feats"), "--device", "cpu"]
    assert main([*flags, "--ftype", "pixel", "--max_corrupt", "0"]) == 0
    assert np.array_equal(features(tmp_path), expected_pixels(table))
    assert main([*flags, "--ftype", "pixel+minilm"]) == 2
    assert "t.tar, id 0 (0): expected a JSON record" in capsys.readouterr().err
    assert main([*flags, "--ftype", "pixel+minilm", "--max_corrupt", "0.5"]) == 0
    (skipped,) = json.loads((tmp_path / "feats" / "pixel+minilm" / "data_skipped.json").read_text())
    assert skipped["id"] == 0 and "expected a JSON record" in skipped["reason"]
    assert features(tmp_path, "pixel+minilm").any(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_write_the_bytes_of_one(tmp_path: Path, processes: int, capsys, files_in) -> None:
    write_data(tmp_path)
    common = ["--data_dir", str(tmp_path), "--ftype", "pixel+minilm", "--splits", "data", "--device", "cpu"]
    common += ["--shard_rows", "8"]
    assert main([*common, "--out", str(tmp_path / "one")]) == 0
    many = [*common, "--out", str(tmp_path / "many")]
    for process in reversed(range(1, processes)):
        assert main([*many, "--shards", str(processes), "--shard", str(process)]) == 0
    assert main([*many, "--merge"]) == 2
    assert "the first missing one begins at row 0" in capsys.readouterr().err
    assert main([*many, "--shards", str(processes), "--shard", "0"]) == 0
    assert not list((tmp_path / "many").rglob("*_feats.npy"))
    assert main([*many, "--merge"]) == 0
    for ftype in ("pixel", "minilm", "pixel+minilm"):
        name = f"{ftype}/data_feats.npy"
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        assert files_in(tmp_path / "many" / ftype) == ["data_feats.npy", "manifest.json"]


def test_merge_refuses_shards_of_other_ids(tmp_path: Path, capsys) -> None:
    write_data(tmp_path)
    common = ["--data_dir", str(tmp_path), "--ftype", "pixel", "--splits", "data", "--shard_rows", "8"]
    assert main([*common, "--shards", "1", "--shard", "0"]) == 0
    (shards,) = (tmp_path / "feats" / "pixel" / ".shards").iterdir()
    for suffix in (".npy", ".json"):
        shutil.copy(shards / f"000000008{suffix}", shards / f"000000016{suffix}")
    assert main([*common, "--merge"]) == 2
    assert "000000016.json: expected the ids {'first': 16, 'last': 23" in capsys.readouterr().err


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    table = rows(5)
    write_table(tmp_path / "mine" / "a.parquet", [{"image": entry["image"]} for entry in table[:3]])
    write_table(tmp_path / "mine" / "b.parquet", [{"image": entry["image"]} for entry in table[3:]])
    source = ["--source", str(tmp_path / "mine"), "--ftype", "pixel", "--out", str(tmp_path / "feats")]
    assert main(source) == 0
    assert np.array_equal(features(tmp_path), expected_pixels(table))
    assert main([*source, "--splits", "test_query"]) == 0
    assert np.array_equal(features(tmp_path, split="test_query"), expected_pixels(table))
    assert ExtractConfig(source=Path("laion"), ftype="clip").target.parts[-3:] == ("data", "laion", "feats")


def test_text_encoders_need_captions(tmp_path: Path, capsys) -> None:
    write_table(tmp_path / "a.parquet", [{"image": entry["image"]} for entry in rows(2)])
    assert main(["--source", str(tmp_path / "a.parquet"), "--ftype", "minilm", "--out", str(tmp_path)]) == 2
    assert "a.parquet: expected captions for an encoder of text, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--shards", "3"], "--shards 3 --shard None"),
        (["--shards", "3", "--shard", "3"], "--shards 3 --shard 3"),
        (["--shards", "2", "--shard", "1", "--merge"], "--merge: expected it without"),
        (["--max_corrupt", "2"], "--max_corrupt 2.0"),
        (["--source", "x", "--splits", "data", "test_query"], "--source is one"),
        (["--source", "no/such/place"], "no/such/place: expected COCO captions"),
    ],
)
def test_wrong_flags_exit_with_one_line(capsys, flags: list[str], complaint: str) -> None:
    assert main(["--ftype", "pixel", *flags]) == 2
    error = capsys.readouterr().err
    assert complaint in error and len(error.strip().splitlines()) == 1


def test_dry_run_counts_the_share_of_this_process(tmp_path: Path, capsys) -> None:
    write_coco(tmp_path)
    flags = ("--splits", "data", "--shard_rows", "5", "--dry_run")
    assert coco(tmp_path, *flags, "--shards", "3", "--shard", "2") == 0
    assert "data_feats.npy: 2 images" in capsys.readouterr().out
    assert not (tmp_path / "feats").exists()


class OneByOne(Pixel):
    """The pixel encoder, which says what it is given, and whether the next batch is then being read."""

    def __init__(self, reading: Event) -> None:
        self.reading = reading
        self.batches: list[int] = []
        self.overlapped: list[bool] = []

    def encode(self, images, captions):
        self.batches.append(len(images))
        self.overlapped.append(self.reading.wait(5 if len(self.batches) == 1 else 0))
        return super().encode(images, captions)


def test_the_next_batch_is_read_while_one_is_encoded(tmp_path: Path, monkeypatch) -> None:
    """Rows keep their order and what cannot be read is listed; every row group of a Parquet file is read once."""
    table = rows(150)
    for row in (3, 100):
        table[row]["image"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "t.parquet", row_group_size=40)
    groups, reading = [], Event()
    read_group = ParquetPictures._read_group

    def slow(self, number):
        groups.append(number)
        time.sleep(0.01)
        if number == 2:
            reading.set()
        return read_group(self, number)

    monkeypatch.setattr(ParquetPictures, "_read_group", slow)
    encoder = OneByOne(reading)
    found, skipped = encode_rows(encoder, open_source(tmp_path / "t.parquet"), range(150))
    assert encoder.batches == [63, 63, 22]
    assert encoder.overlapped[0], "rows 80 to 127 belong to the second batch"
    assert sorted(groups) == [0, 1, 2, 3]
    assert [entry["id"] for entry in skipped] == [3, 100]
    readable = [row for row in range(150) if row not in (3, 100)]
    assert np.array_equal(found[readable], expected_pixels([table[row] for row in readable]))
    assert not found[[3, 100]].any()


class Turned(Pixel):
    """The pixel encoder with its features turned by a known angle for one picture."""

    def encode(self, images, captions):
        features = super().encode(images, captions)
        if images and images[0].getpixel((32, 32)) == (255, 0, 0):
            other = np.zeros_like(features[0])
            other[0] = np.linalg.norm(features[0])
            features[0] = features[0] * np.cos(0.1) + other * np.sin(0.1)
        return features


def test_drift_is_one_minus_cosine(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", rows(3))
    found = drift(Turned(), Pixel(), open_source(tmp_path / "a.parquet"))
    red = Pixel().encode([open_image(rows(1)[0]["image"], "x")], [""])[0]
    assert red[0] == 0, "the direction it is turned to is a new one"
    assert found.images == 3
    assert found.max == pytest.approx(1 - np.cos(0.1), rel=1e-4)
    assert found.mean == pytest.approx(found.max / 3, rel=1e-4)


def test_half_precision_is_measured_and_recorded(tmp_path: Path, capsys) -> None:
    write_data(tmp_path)
    flags = ["--data_dir", str(tmp_path), "--ftype", "minilm", "--splits", "test_query", "--device", "cpu"]
    assert main([*flags, "--bf16"]) == 0
    assert "minilm, bfloat16 against float32: cosine drift on 4 pictures" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "feats" / "minilm")
    assert 0 < manifest["drift"]["minilm"]["mean"] <= manifest["drift"]["minilm"]["max"] < 0.01
    assert manifest["config"]["precision"] == "bfloat16" and manifest["command"].endswith(" --bf16")


def test_drift_outlives_the_process_that_measured_it(tmp_path: Path, capsys, files_in) -> None:
    """Measured by the first of two processes, recorded by the merge, kept by later runs and by a composition."""
    write_data(tmp_path)
    common = ["--data_dir", str(tmp_path), "--device", "cpu", "--shard_rows", "2", "--bf16"]
    text = [*common, "--ftype", "minilm", "--splits", "test_query"]
    for process in "01":
        assert main([*text, "--shards", "2", "--shard", process]) == 0
    assert capsys.readouterr().out.count("cosine drift") == 1
    assert main([*text, "--merge"]) == 0
    folder = tmp_path / "feats" / "minilm"
    drift = read_manifest(folder)["drift"]
    assert drift["minilm"]["images"] == 4 and drift["minilm"]["max"] > 0
    assert files_in(folder) == ["manifest.json", "test_query_feats.npy"]
    assert main([*common, "--ftype", "minilm+pixel", "--splits", "test_query"]) == 0
    assert read_manifest(tmp_path / "feats" / "minilm+pixel")["drift"]["minilm"] == drift["minilm"]
    assert main([*text[:-1], "train_query", "--shards", "1", "--shard", "0"]) == 0
    for note in folder.rglob("drift.json"):
        note.unlink()
    assert main([*text[:-1], "train_query", "--merge"]) == 0
    assert read_manifest(folder)["drift"] == drift, "what the manifest said before"


def test_the_testbeds_parquet_is_read_alike(tmp_path: Path) -> None:
    table = rows(6)
    write_table(tmp_path / "t.parquet", [table[row] for row in (3, 0, 5, 4, 1, 2)])
    ours, any_parquet = read_table(tmp_path / "t.parquet"), open_source(tmp_path / "t.parquet")
    assert list(any_parquet.captions) == ours.captions
    assert [png(any_parquet.image(row)) for row in range(6)] == [png(ours.image(row)) for row in range(6)]
