"""The map from scores to influence against scikit-learn, and the rule of credit against what it must keep."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from fastgda.credit import FLOOR, LEVEL, Credit, coded, dense, teacher_shares
from fastgda.magnitude import SMALLEST, Magnitude, bin_starts
from fastgda.rankings import Rankings, from_scores


def world(rng: np.random.Generator, queries: int, images: int = 400) -> tuple[np.ndarray, Rankings, list[str]]:
    """Scores, and a teacher whose scores are exp(3 score) - 1 with noise; three creators."""
    scores = rng.normal(size=(queries, images)).astype(np.float32)
    influence = np.exp(2 * scores) - 1 + rng.normal(scale=0.5, size=scores.shape)
    return scores, from_scores(influence.astype(np.float32)), [("ann", "bob", "cyn")[i % 7 % 3] for i in range(images)]


def test_map_is_isotonic_regression_of_the_bins(rng: np.random.Generator) -> None:
    scores = rng.normal(size=3000)
    influence = np.where(scores > 1, 5 * (scores - 1), 0) + rng.normal(size=3000)
    fitted = Magnitude.fit(scores, influence)
    order = np.argsort(-scores)
    starts = [*bin_starts(scores[order]).tolist(), 3000]
    parts = [order[a:b] for a, b in pairwise(starts)]
    sizes = [len(part) for part in parts]
    assert sizes[0] == SMALLEST and sum(sizes) == 3000 and min(sizes) == SMALLEST
    centres, means = (np.array([values[part].mean() for part in parts]) for values in (scores, influence))
    oracle = IsotonicRegression(out_of_bounds="clip").fit(centres, means, sample_weight=sizes)
    assert np.allclose(fitted.predict(centres), oracle.predict(centres))
    assert np.allclose(fitted.influence, oracle.predict(fitted.scores))
    assert (np.diff(fitted.predict(np.linspace(-9, 9, 999))) >= 0).all()
    expected = np.sqrt(np.mean((influence[parts[0]] - oracle.predict(centres[:1])) ** 2))
    assert fitted.spread(np.array([99.0]))[0] == pytest.approx(expected)


def test_equal_scores_are_in_one_bin() -> None:
    scores = np.repeat([3.0, 2.0, 1.0], [5, 500, 300])
    starts = bin_starts(scores)
    assert starts.tolist() == [0, 5, 505]
    constant = Magnitude.fit(np.ones(50), np.arange(50.0))
    assert constant.predict(np.array([0.0, 2.0])).tolist() == [24.5, 24.5]


def test_shares_are_positive_influence_by_creator() -> None:
    magnitude = Magnitude(np.array([0.0, 1.0]), np.array([-1.0, 3.0]), np.array([0.0, 0.0]))
    rule = Credit(magnitude, width=2.0, depth=4)
    # influence 3, 2, 1, -1; the fifth lies beyond the depth
    scores, creators = np.array([1.0, 0.75, 0.5, 0.0, 1.0]), ["a", "b", "a", "b", "c"]
    found = rule.shares(scores, creators)
    assert [(row.creator, row.images) for row in found] == [("a", 2), ("b", 2)]
    assert [row.share for row in found] == pytest.approx([4 / 6, 2 / 6])
    assert found[0].high - found[0].low == pytest.approx(2 * 2 * FLOOR)
    assert rule.shares(np.array([0.0, -5.0]), ["a", "b"]) == ()
    assert rule.shares(np.array([1.0]), [None])[0].creator == "unknown"


def test_shares_keep_what_the_rule_promises(rng: np.random.Generator) -> None:
    scores, teacher, creators = world(rng, 20)
    rule = Credit.fit(scores, teacher, creators, depth=50)
    first = np.argsort(-scores[0])
    row, names = scores[0][first], [creators[i] for i in first]
    found = {share.creator: share for share in rule.shares(row, names)}
    assert sum(share.share for share in found.values()) == pytest.approx(1)
    assert all(0 <= share.low <= share.share <= share.high <= 1 for share in found.values())
    # the unit of influence does not matter
    scaled = replace(rule.magnitude, influence=8 * rule.magnitude.influence, deviation=8 * rule.magnitude.deviation)
    again = {share.creator: share for share in replace(rule, magnitude=scaled).shares(row, names)}
    assert all(again[name].share == pytest.approx(found[name].share) for name in found)
    assert all(again[name].low == pytest.approx(found[name].low) for name in found)
    # who is split in two splits her share
    parted = rule.shares(row, [name + str(place % 2) if name == "ann" else name for place, name in enumerate(names)])
    halves = sum(share.share for share in parted if share.creator.startswith("ann"))
    assert halves == pytest.approx(found["ann"].share)
    # images without predicted influence change nothing
    assert rule.magnitude.predict(np.array([-9.0]))[0] <= 0
    more = rule.shares(np.append(row[:10], [-9.0] * 5), names[:10] + ["zoe"] * 5)
    assert {s.creator: s.share for s in more if s.share} == pytest.approx(
        {s.creator: s.share for s in rule.shares(row[:10], names[:10]) if s.share}
    )


def test_variance_is_that_of_random_influences(rng: np.random.Generator) -> None:
    """sigma by the delta method against drawing the influences."""
    magnitude = Magnitude(np.array([0.0, 1.0]), np.array([1.0, 10.0]), np.array([0.2, 0.4]))
    scores, codes = rng.random(60), np.arange(60) % 3
    shares, sigma = Credit(magnitude, 1.0, 60).estimate(scores, codes, 3)
    drawn = magnitude.predict(scores) + magnitude.spread(scores) * rng.normal(size=(20_000, 60))
    parts = np.stack([drawn[:, codes == c].sum(1) for c in range(3)], 1) / drawn.sum(1, keepdims=True)
    assert np.allclose(shares, parts.mean(0), atol=1e-3) and np.allclose(sigma, parts.std(0), rtol=0.05)


def test_intervals_hold_the_teachers_shares(rng: np.random.Generator) -> None:
    """On fresh queries of the same kind all of a query's intervals hold as often as they say."""
    scores, teacher, creators = world(rng, 200)
    rule = Credit.fit(scores, teacher, creators, depth=50)
    fresh, truth, _ = world(rng, 400)
    codes, names = coded(creators)
    wanted, held = teacher_shares(truth, codes, 3, 50), []
    for row, expected in zip(fresh, wanted, strict=True):
        first = np.argsort(-row)[:50]
        shares = rule.shares(row[first], [creators[i] for i in first])
        held.append(all(share.low <= expected[names.index(share.creator)] <= share.high for share in shares))
    assert abs(np.mean(held) - LEVEL) < 0.05


def test_intervals_are_no_narrower_for_a_map_that_follows_its_own_noise(rng: np.random.Generator) -> None:
    """Few queries and a teacher without any signal: on its own queries the map looks better than it is."""
    scores = rng.normal(size=(20, 60))
    noise = from_scores(rng.normal(size=(20, 60)).astype(np.float32) ** 8)
    creators = [str(image % 3) for image in range(60)]
    rule = Credit.fit(scores, noise, creators, depth=60)
    codes, names = coded(creators)
    held = []
    for seed in range(200):
        fresh = np.random.default_rng(seed)
        truth = teacher_shares(from_scores(fresh.normal(size=(1, 60)).astype(np.float32) ** 8), codes, 3, 60)[0]
        row = np.sort(fresh.normal(size=60))[::-1]
        shares = rule.shares(row, [creators[i] for i in fresh.permutation(60)])
        held.append(all(share.low <= truth[names.index(share.creator)] <= share.high for share in shares))
    assert np.mean(held) > LEVEL - 0.1


def test_one_query_says_nothing_of_intervals(rng: np.random.Generator) -> None:
    scores, teacher, creators = world(rng, 1)
    with pytest.raises(ValueError, match="expected scores of 2 queries, found 1"):
        Credit.fit(scores, teacher, creators)


def test_teachers_shares_follow_its_own_ranking() -> None:
    teacher = from_scores(np.array([[1.0, 3.0, -2.0, 2.0], [-1.0, -1.0, -1.0, -1.0]], dtype=np.float32))
    codes = np.array([0, 0, 1, 1])
    assert np.allclose(teacher_shares(teacher, codes, 2, 3), [[4 / 6, 2 / 6], [0.0, 0.0]])
    assert dense(teacher, 4)[0].tolist() == [1, 3, -2, 2]
    with pytest.raises(ValueError, match="ranks only"):
        dense(Rankings(teacher.rank), 4)
    with pytest.raises(ValueError, match="all 5 images"):
        dense(teacher, 5)


def test_rule_is_saved_and_guarded(rng: np.random.Generator, tmp_path: Path) -> None:
    scores, teacher, creators = world(rng, 5)
    rule = Credit.fit(scores, teacher, creators, ranker="a" * 64, fitted_on="5 queries")
    rule.save(tmp_path / "credit.json")
    again = Credit.load(tmp_path / "credit.json", ranker="a" * 64)
    assert again.shares(scores[0], creators) == rule.shares(scores[0], creators) and again.fitted_on == "5 queries"
    with pytest.raises(ValueError, match="expected the credit rule of ranker bbbb"):
        Credit.load(tmp_path / "credit.json", ranker="b" * 64)
    text = (tmp_path / "credit.json").read_text()
    for damaged in (text[:50], "[]", "{}", text.replace('"influence": [', '"influence": [1e9, '), '"x"'):
        (tmp_path / "credit.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"credit.json: expected a credit rule"):
            Credit.load(tmp_path / "credit.json")
    document = json.loads(text)
    document["magnitude"]["scores"][0] = float("nan")
    (tmp_path / "credit.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="finite"):
        Credit.load(tmp_path / "credit.json")
