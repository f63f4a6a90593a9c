"""The speed benchmarks in small: both sides agree, and the reports hold what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import LEVELS, planted, write_planted
from small_world import rows as pictures
from small_world import write_table

from benchmark import extraction_speed, feature_drift, metric_speed, ranker_speed
from benchmark.plain_loop import Pairs, PlainLoop
from fastgda.core import save_npy
from fastgda.recipes import TrainConfig
from feature_extraction.encoders import Pixel, load_encoder
from feature_extraction.sources import open_source

TINY = TrainConfig(hidden_sizes=(8,), out_feat_dim=8, batch_size=64, outlier_prob=0.3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_pairs_of_the_plain_loop_are_the_papers():
    images, splits = planted(images=60, candidates=20, queries=10)
    ranks = splits["train"].rankings.rank
    np.random.seed(0)
    pairs, inside = Pairs(images, splits["train"], 0.0), Pairs(images, splits["train"], 0.5)
    assert len(pairs) == 200
    for index in (0, 19, 20, 137):
        query, place = divmod(index, 20)
        asked, stored, label = pairs[index]
        np.testing.assert_array_equal(asked, splits["train"].features[query])
        np.testing.assert_array_equal(stored, images[ranks[query, place]])
        assert label == (place + 1) / 20
    drawn = [inside[45] for _ in range(400)]
    row = {image: number for number, image in enumerate(map(bytes, images))}
    ids = [row[bytes(stored.numpy())] for _, stored, _ in drawn]
    outside = [image for image in ids if image != ranks[2, 5]]
    assert 150 < len(outside) < 250 and set(outside).isdisjoint(ranks[2])
    labels = {(image == ranks[2, 5], label) for image, (_, _, label) in zip(ids, drawn, strict=True)}
    assert labels == {(True, 6 / 20), (False, 1.0)}


def test_plain_loop_learns_the_planted_problem():
    images, splits = planted()
    config = replace(TINY, hidden_sizes=(), out_feat_dim=16, dropout=0.0, lr=0.01, init_scale=-8.0, batch_size=512)
    loop = PlainLoop(images, splits["train"], config, 0, torch.device("cpu"))
    pairs = [count for _, count in zip(range(80), loop.steps(), strict=False)]
    scores = (loop.ranker.embed_queries(splits["val"].features) @ loop.ranker.embed(images).T).numpy()
    top = splits["val"].rankings.rank[:, :12]
    assert pairs == [512] * 80
    assert np.take_along_axis(scores, top, axis=1).mean() - scores.mean() > 0.3


def test_ranker_speed_reports_every_contender(tmp_path: Path):
    write_planted(tmp_path / "data", "effnet+minilm")
    command = ["--data_dir", str(tmp_path / "data"), "--topk_values", *map(str, LEVELS), "--plain_seconds", "0.2"]
    size = ["--hidden_sizes", "8", "--out_feat_dim", "8", "--batch_size", "64", "--query_block", "16"]
    output = tmp_path / "speed.json"
    more = ["--first_seconds", "0.1", "--loader_workers", "0", "--device", "cpu", "--output", str(output)]
    assert ranker_speed.main([*command, *size, *more]) == 0
    report = json.loads(output.read_text())
    assert report["device"] == "cpu"
    assert list(report["contenders"]) == ["plain loop", "pairs", "blocks", "blocks_bf16", "listwise", "best"]
    plain = report["contenders"]["plain loop"]
    assert report["target_mAP"] == max(point["mAP"] for point in plain["curve"][1:]) and plain["times_as_fast"] == 1
    for found in report["contenders"].values():
        assert found["pairs_per_second"] > 0 and 0 < found["matrix_products"]["all"] <= 1
        reached = [point["seconds"] for point in found["curve"][1:] if point["mAP"] >= report["target_mAP"]]
        assert found["seconds_to_target"] == (reached[0] if reached else None)
    assert ranker_speed.main([*command, "--contenders", "none"]) == 2


@pytest.mark.parametrize(("place", "waits"), [("cpu", 0), ("cuda:0", 4)])
def test_every_reading_of_the_clock_waits_for_cuda(monkeypatch, place, waits):
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    curve = ranker_speed.Curve()
    curve.run(iter([5, 5, 5]), 1e9, torch.device(place))
    assert (curve.steps, curve.pairs) == (3, 15) and waited == [torch.device(place)] * waits


def test_metric_speed_agrees_with_scikit_learn(tmp_path: Path):
    output = tmp_path / "metric.json"
    size = ["--queries", "3", "--images", "400", "--levels", "5", "40", "--repeats", "1"]
    assert metric_speed.main([*size, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["decimals"] for row in rows] == [None, 1]
    assert all(row["largest_difference"] < 1e-9 and row["times_as_fast"] > 0 for row in rows)
    assert metric_speed.main([*size, "--levels", "401"]) == 2


def test_extraction_speed_splits_the_time(tmp_path: Path):
    write_table(tmp_path / "pictures.parquet", pictures(6))
    output = tmp_path / "extraction.json"
    command = ["--ftype", "minilm", "--source", str(tmp_path / "pictures.parquet"), "--repeats", "1", "--bf16"]
    assert extraction_speed.main([*command, "--device", "cpu", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["images"] == 6 and report["device"] == "cpu"
    assert set(report["rows"]) == {"plain loop", "shards, float32", "shards, bfloat16"}
    for row in report["rows"].values():
        seconds = row["seconds"]
        assert min(seconds["write"], seconds["wait"], seconds["network"], seconds["prepare"]) > 0
        assert seconds["encode"] < seconds["total"] and seconds["network"] < seconds["encode"]
        assert row["images_per_second"] == pytest.approx(6 / seconds["total"])
    assert extraction_speed.main([*command, "--device", "cuda:99", "--output", str(output)]) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_networks_share_counts_every_call_once(tmp_path: Path, monkeypatch, whole: bool):
    """By a clock that the network's two parts advance by a second each, preparing a picture by two."""
    clock = [0.0]
    monkeypatch.setattr(extraction_speed, "now", lambda: clock[0])

    class Part(torch.nn.Module):
        def forward(self, x):
            clock[0] += 1
            return x

    class Encoder(Pixel):
        network = torch.nn.Sequential(Part(), Part())

        def encode(self, images, captions):
            for part in [self.network] if whole else self.network:
                part(torch.ones(1))
            clock[0] += 2 * len(images)
            return super().encode(images, captions)

    write_table(tmp_path / "pictures.parquet", pictures(6))
    for batch, share in ((1, 2 / 4), (3, 2 / 8)):
        found = extraction_speed.network_share(Encoder(), open_source(tmp_path / "pictures.parquet"), batch)
        assert found == pytest.approx(share)


def test_every_network_is_known(tmp_path: Path):
    """The packaged encoders'; those of test_clip.py and test_vit.py are looked at there."""
    write_table(tmp_path / "pictures.parquet", pictures(2))
    table = open_source(tmp_path / "pictures.parquet")
    for name in ("effnet", "minilm"):
        share = extraction_speed.network_share(load_encoder(name, torch.device("cpu")), table, 2)
        assert share is not None and 0 < share < 1
    assert extraction_speed.network_share(Pixel(), table, 2) is None


def test_drift_of_features_and_of_map(tmp_path: Path):
    images, splits = write_planted(tmp_path / "data")
    other = tmp_path / "other"
    turned = images.copy()
    turned[3] = 0
    turned[4, 0] += 1
    for name, rows in (("data_feats", turned), ("test_query_feats", 2 * splits["test"].features)):
        save_npy(other / f"{name}.npy", rows)
    output = tmp_path / "drift.json"
    command = ["--ftype", "planted", "--data_dir", str(tmp_path / "data"), "--topk_values", *map(str, LEVELS)]
    assert feature_drift.main([*command, "--other", str(other), "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    angle = 1 - images[4].astype(float) @ turned[4] / np.linalg.norm(images[4]) / np.linalg.norm(turned[4])
    assert report["features"]["data"]["max"] == pytest.approx(angle, rel=1e-4)
    assert report["features"]["data"]["mean"] == pytest.approx(angle / 600, rel=1e-4)
    assert report["features"]["test_query"]["max"] == pytest.approx(0, abs=1e-12)
    change = report["mAP"]["untuned"]["change"][str(LEVELS[0])]
    assert abs(change) < 0.05
    assert feature_drift.main(command) == 2
