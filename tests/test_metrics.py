"""Metrics against scikit-learn, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, sem, spearmanr
from sklearn.metrics import average_precision_score, ndcg_score

from fastgda.metrics import (
    average_precision,
    bootstrap_interval,
    chance,
    embedding_retrieval,
    overlap,
    recall_and_ndcg,
    score_retrieval,
    spearman,
    standard_error,
)
from fastgda.rankings import from_scores


def oracle(scores, positives, levels):
    table = np.zeros((len(scores), len(levels)))
    for query, row in enumerate(scores):
        for column, level in enumerate(levels):
            truth = np.zeros(len(row))
            truth[positives[query, :level]] = 1
            table[query, column] = average_precision_score(truth, row)
    return table


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_average_precision_equals_scikit_learn(rng, values, kind):
    for _ in range(8):
        images = int(rng.integers(2, 60))
        scores = rng.integers(values, size=(3, images)).astype(kind)
        positives = np.argsort(rng.random((3, images)), axis=1)
        levels = sorted({1, images // 2, images})
        found = average_precision(scores, positives, levels)
        np.testing.assert_allclose(found, oracle(scores, positives, levels), atol=1e-12)


def test_average_precision_on_many_images_in_threads(rng):
    scores = rng.standard_normal((4, 20_000)).astype(np.float32)
    positives = from_scores(scores + rng.standard_normal(scores.shape), keep=700).rank
    expected = oracle(scores, positives, (80, 170, 680))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found = average_precision(scores, positives, (80, 170, 680))
            np.testing.assert_allclose(found, expected, atol=1e-12)
    finally:
        torch.set_num_threads(threads)


def test_perfect_and_worst_order():
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert average_precision(scores, np.array([[0, 1]]), (2,)).item() == 1
    assert average_precision(scores, np.array([[3, 2]]), (2,)).item() == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_chance_is_the_mean_over_random_orders(rng):
    scores = rng.random((4000, 40))
    positives = np.broadcast_to(np.arange(12), (4000, 12))
    found = average_precision(scores, positives, (1, 5, 12))
    error = standard_error(found)
    expected = [chance(level, 40) for level in (1, 5, 12)]
    assert (np.abs(found.mean(axis=0) - expected) < 4 * error).all()
    assert chance(1, 2) == pytest.approx(0.75)
    assert chance(7, 7) == pytest.approx(1)


def test_standard_error(rng):
    values = rng.random((9, 3))
    np.testing.assert_allclose(standard_error(values), sem(values, axis=0))
    assert np.isnan(standard_error(values[:1])).all()


@pytest.mark.parametrize("ranked", [50, 20])
def test_spearman_equals_scipy(rng, ranked):
    truth = from_scores(rng.standard_normal((5, 50)), keep=ranked).rank
    scores = rng.integers(12, size=(5, 50)).astype(np.float32)
    expected = [spearmanr(row[ids], -np.arange(ranked)).statistic for row, ids in zip(scores, truth, strict=True)]
    np.testing.assert_allclose(spearman(scores, truth), expected, atol=1e-12)
    assert np.isnan(spearman(np.ones((1, 50)), truth[:1])).all()


def test_overlap_against_sets(rng):
    scores = rng.standard_normal((4, 60)).astype(np.float32)
    truth = from_scores(scores + rng.standard_normal(scores.shape), keep=30).rank
    for column, level in enumerate((1, 7, 30)):
        mine = np.argsort(-scores, axis=1)[:, :level]
        expected = [len({*a.tolist()} & {*b[:level].tolist()}) / level for a, b in zip(mine, truth, strict=True)]
        np.testing.assert_allclose(overlap(scores, truth, (1, 7, 30))[:, column], expected)


@pytest.mark.parametrize("values", [2, 5, 10_000])
def test_ndcg_equals_scikit_learn_and_recall_the_sets(rng, values):
    levels, cutoffs = (1, 7, 20), (1, 5, 20, 60)
    scores = rng.integers(values, size=(4, 60)).astype(np.float32)
    truth = np.argsort(rng.random((4, 60)), axis=1)[:, :30]
    recall, ndcg = recall_and_ndcg(scores, truth, levels, cutoffs)
    for query, row in enumerate(scores):
        for at, level in enumerate(levels):
            gain = np.zeros(60)
            gain[truth[query, :level]] = 1 - np.arange(level) / level
            for column, k in enumerate(cutoffs):
                expected = ndcg_score(gain[None], row[None], k=k)
                assert ndcg[query, at, column] == pytest.approx(expected, abs=1e-12)
                orders = [np.lexsort((rng.random(60), -row))[:k] for _ in range(1 if values == 10_000 else 400)]
                shares = [np.isin(order, truth[query, :level]).sum() / level for order in orders]
                error = np.std(shares) / np.sqrt(len(shares))
                assert abs(recall[query, at, column] - np.mean(shares)) <= 5 * error + 1e-12


@pytest.mark.parametrize("cutoffs", [(), (0,), (5, 41)])
def test_cutoffs_out_of_range(cutoffs):
    with pytest.raises(ValueError, match=r"every k of recall@k in 1\.\.40"):
        recall_and_ndcg(np.zeros((1, 40)), np.arange(30)[None], (3,), cutoffs)


def test_bootstrap_interval_is_scipys(rng):
    values = rng.exponential(size=(80, 2))
    found = bootstrap_interval(values, draws=20_000)
    expected = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    spread = sem(values, axis=0)
    np.testing.assert_allclose(found[0], expected.low, atol=0.05 * spread.max())
    np.testing.assert_allclose(found[1], expected.high, atol=0.05 * spread.max())
    np.testing.assert_array_equal(bootstrap_interval(values), bootstrap_interval(values))
    assert np.isnan(bootstrap_interval(values[:1])).all()


def test_missing_images_share_the_last_place(rng):
    queries, images = rng.standard_normal((5, 6)).astype(np.float32), rng.standard_normal((50, 6)).astype(np.float32)
    truth = from_scores(rng.standard_normal((5, 50)))
    missing = np.isin(np.arange(50), [3, 17])
    scores = queries @ images.T
    scores[:, missing] = -99
    expected = score_retrieval(scores, truth, (3, 9), (4, 50))
    tensors = torch.from_numpy(queries), torch.from_numpy(images)
    found = embedding_retrieval(*tensors, truth, (3, 9), (4, 50), missing=missing)
    for name in ("precision", "overlap", "spearman", "recall", "ndcg"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_queries_of_a_group_are_drawn_together(rng):
    groups = ["a", "b", "a", "c", "c", "c", "d", "e"]
    values = rng.standard_normal((8, 2))
    names = sorted(set(groups))
    members = {name: [row for row, group in enumerate(groups) if group == name] for name in names}
    means = []
    for counts in np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=500):
        rows = [row for name, count in zip(names, counts, strict=True) for row in members[name] * count]
        means.append(values[rows].mean(0))
    expected = np.quantile(means, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(bootstrap_interval(values, groups, draws=500), expected)
    np.testing.assert_allclose(bootstrap_interval(values, list("abcdefgh")), bootstrap_interval(values))

    residuals = values - values.mean(0)
    sums = np.array([residuals[rows].sum(0) for rows in members.values()])
    np.testing.assert_allclose(standard_error(values, groups), np.sqrt(5 / 4 * (sums**2).sum(0)) / 8)
    np.testing.assert_allclose(standard_error(values, list("abcdefgh")), sem(values, axis=0))
    # copies of a query add nothing
    np.testing.assert_allclose(
        standard_error(values.repeat(3, 0), np.arange(8).repeat(3).tolist()), sem(values, axis=0)
    )
    assert np.isnan(bootstrap_interval(values, ["a"] * 8)).all() and np.isnan(standard_error(values, ["a"] * 8)).all()
    with pytest.raises(ValueError, match="groups: expected one for each of 8 queries, found 2"):
        bootstrap_interval(values, ["a", "b"])


def test_embeddings_in_tiles_equal_scores_at_once(rng, monkeypatch):
    queries, images = rng.standard_normal((11, 6)), rng.standard_normal((50, 6))
    truth = from_scores(rng.standard_normal((11, 50)))
    whole = score_retrieval((queries @ images.T).astype(np.float32), truth, (3, 9), (4, 50))
    monkeypatch.setattr("fastgda.metrics.TILE", 4)
    tiled = embedding_retrieval(torch.from_numpy(queries), torch.from_numpy(images), truth, (3, 9), (4, 50))
    for name in ("precision", "overlap", "spearman", "recall", "ndcg"):
        np.testing.assert_allclose(getattr(tiled, name), getattr(whole, name), atol=1e-9)
    quick = embedding_retrieval(torch.from_numpy(queries), torch.from_numpy(images), truth, (3, 9), precision_only=True)
    np.testing.assert_array_equal(quick.precision, tiled.precision)


@pytest.mark.parametrize("levels", [(), (0,), (31,), (5, 31)])
def test_levels_out_of_range(levels):
    with pytest.raises(ValueError, match=r"every L of mAP\(L\) in 1\.\.30"):
        average_precision(np.zeros((1, 40)), np.arange(30)[None], levels)


def test_scores_that_are_not_finite():
    scores = np.zeros((3, 5))
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="in query 1"):
        average_precision(scores, np.zeros((3, 1), int), (1,))
