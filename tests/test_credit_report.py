"""The report on the credit rule, on a small world whose teacher follows the features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_world import write_data, write_ranker

from benchmark import credit
from fastgda.attributor import all_scores
from fastgda.core import load_npy, sha256_file
from fastgda.credit import Credit
from fastgda.ranker import load_ranker
from fastgda.rankings import from_scores, save_rankings
from feature_extraction.extract import main as extract

IMAGES, QUERIES = 36, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose teacher's scores are five times the ranker's, with a little noise."""
    folder = tmp_path_factory.mktemp("world") / "emoji"
    write_data(folder, IMAGES, QUERIES)
    write_ranker(folder / "ranker.pth", 768)
    assert extract(["--data_dir", str(folder), "--ftype", "pixel", "--device", "cpu"]) == 0
    ranker, random = load_ranker(folder / "ranker.pth"), np.random.default_rng(0)
    images = ranker.embed(load_npy(folder / "feats/pixel/data_feats.npy"))
    for split in ("val", "test"):
        queries = ranker.embed_queries(load_npy(folder / f"feats/pixel/{split}_query_feats.npy"))
        scores = 5 * (queries @ images.T).numpy() + random.normal(scale=0.01, size=(QUERIES, IMAGES))
        save_rankings(folder / f"influence_{split}.npz", from_scores(scores.astype(np.float32)))
    return folder


def run(data: Path, out: Path, *more: str) -> int:
    paths = ["--checkpoint", str(data / "ranker.pth"), "--data_dir", str(data), "--output", str(out)]
    return credit.main([*paths, "--ftype", "pixel", "--depth", "10", *more])


def test_a_perfect_ranker_is_reported_as_one(data: Path, tmp_path: Path, capsys) -> None:
    assert run(data, tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    tuned = report["magnitude"]["tuned"]
    assert tuned["r_squared"] > 0.95 and abs(tuned["slope"] - 1) < 0.1
    assert sum(group["pairs"] for group in tuned["groups"]) >= QUERIES * IMAGES - 4
    assert all(abs(group["predicted"] - group["observed"]) < 0.5 for group in tuned["groups"])
    shares = report["shares"]
    assert report["creators"] == ["flat studio", "outline studio"]
    assert shares["tuned, influence predicted"]["absolute_error"] < 0.03
    assert shares["tuned, influence predicted"]["absolute_error"] < shares["untuned, images counted"]["absolute_error"]
    assert report["intervals"]["all_of_a_query"] > 0.5 and abs(report["concentration"]["predicted"] - 10) < 3
    rule = Credit.load(data / "ranker.credit.json", ranker=sha256_file(data / "ranker.pth"))
    assert rule.depth == 10 and "12 validation queries" in rule.fitted_on
    assert "intervals hold" in capsys.readouterr().out


def test_intervals_are_counted_by_query_and_by_share() -> None:
    truth = np.array([[0.6, 0.4, 0.0], [0.1, 0.9, 0.0]])
    shares = np.array([[0.5, 0.5, 0.0], [0.8, 0.2, 0.0]])
    found = credit.intervals_report(shares - 0.1, shares + 0.15, shares, truth)
    assert found["all_of_a_query"] == 0.5 and found["shares"] == pytest.approx(4 / 6)
    assert found["large_shares"] == pytest.approx(2 / 3) and found["largest_predicted"] == 0.5


def test_concentration_counts_equal_credits() -> None:
    credits = np.array([[1.0, 1, 1, 0], [5, 0, 0, -1], [0, 0, -2, 0]])
    assert credit.concentration(credits).tolist() == [3, 1, 0]


def test_unreadable_pictures_are_never_first(data: Path) -> None:
    images = load_npy(data / "feats/pixel/data_feats.npy").copy()
    images[4] = 0
    scores = all_scores(load_ranker(data / "ranker.pth"), images[:3], images)
    assert (scores.argmin(1) == 4).all()


def test_rankings_without_scores_are_refused(data: Path, tmp_path: Path, capsys) -> None:
    own = tmp_path / "influence_test.npz"
    rank = np.load(data / "influence_val.npz")["rank"]
    original = (data / "influence_val.npz").read_bytes()
    np.savez(data / "influence_val.npz", rank=rank)
    try:
        assert run(data, own) == 2
        assert "expected rankings with the teacher's scores" in capsys.readouterr().err
    finally:
        (data / "influence_val.npz").write_bytes(original)
