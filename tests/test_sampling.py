"""Samplers: the paper's pair statistics, blocks that estimate the same loss, labels read from the rankings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from fastgda.rankings import Rankings, from_scores, labels
from fastgda.sampling import BlockSampler, Outliers, PairSampler, relevance_table

IMAGES, CANDIDATES, QUERIES = 40, 9, 6


@pytest.fixture
def rankings(rng) -> Rankings:
    """6 queries, 9 candidates of 40 images."""
    return from_scores(rng.standard_normal((QUERIES, IMAGES)).astype(np.float32), keep=CANDIDATES)


def test_outliers_are_uniform_outside_the_candidates(rankings, rng):
    queries = rng.integers(QUERIES, size=60_000)
    drawn = Outliers(rankings, IMAGES).draw(queries, rng)
    counts = np.zeros((QUERIES, IMAGES))
    np.add.at(counts, (queries, drawn), 1)
    outside = labels(rankings, IMAGES) == 1
    np.put_along_axis(outside, rankings.rank.astype(int), False, axis=1)
    assert (counts[~outside] == 0).all()
    expected = len(queries) / QUERIES / (IMAGES - CANDIDATES)
    assert (np.abs(counts[outside] - expected) < 5 * np.sqrt(expected)).all()


def test_outliers_where_one_image_is_left(rng):
    rankings = from_scores(rng.standard_normal((3, 10)), keep=9)
    missing = [({*range(10)} - {*row.tolist()}).pop() for row in rankings.rank]
    assert Outliers(rankings, 10).draw(np.array([2, 0, 1]), rng).tolist() == [missing[2], missing[0], missing[1]]


def test_pairs_follow_the_papers_distribution(rankings):
    relevance = relevance_table(rankings, "score")
    sampler = PairSampler(rankings, IMAGES, relevance, batch_size=40_000, outlier_prob=0.1, seed=3)
    step = sampler.step(0)
    assert step.pairs is not None
    query, image = step.queries[step.pairs[0]], step.images[step.pairs[1]]
    table = labels(rankings, IMAGES)
    inside = np.isfinite(step.relevance)
    np.testing.assert_array_equal(step.label, table[query, image])
    assert all((image[row] in rankings.rank[query[row]]) == inside[row] for row in range(500))
    assert abs(1 - inside.mean() - 0.1) < 5 * np.sqrt(0.09 / 40_000)
    for values, kinds in ((query, QUERIES), (np.rint(step.label[inside] * CANDIDATES) - 1, CANDIDATES)):
        counts = np.bincount(values.astype(int), minlength=kinds)
        assert (np.abs(counts - counts.mean()) < 5 * np.sqrt(counts.mean())).all()
    place = np.rint(step.label[inside] * CANDIDATES).astype(int) - 1
    np.testing.assert_array_equal(step.relevance[inside], relevance[query[inside], place])
    assert sampler.steps_per_epoch == 1


def blocks(rankings, **options) -> BlockSampler:
    chosen = {"query_block": 4, "image_block": 12, "outlier_prob": 0.3, "seed": 1, **options}
    return BlockSampler(rankings, IMAGES, relevance_table(rankings, "score"), **chosen)


def test_block_holds_every_label_among_its_queries_and_images(rankings):
    table, relevance = labels(rankings, IMAGES), relevance_table(rankings, "score")
    for number in range(4):
        step = blocks(rankings).step(number)
        assert (np.diff(step.images) > 0).all() and step.label.shape == (step.queries.size, step.images.size)
        np.testing.assert_array_equal(step.label, table[np.ix_(step.queries, step.images)])
        for row, query in enumerate(step.queries):
            for column, image in enumerate(step.images):
                place = np.flatnonzero(rankings.rank[query] == image)
                expected = relevance[query, place[0]] if place.size else -np.inf
                assert step.relevance[row, column] == expected


def test_a_pass_visits_every_query_once(rankings):
    sampler = blocks(rankings)
    assert sampler.steps_per_epoch == 2
    for epoch in range(3):
        seen = np.concatenate([sampler.step(2 * epoch + block).queries for block in range(2)])
        assert sorted(seen) == list(range(QUERIES))


def test_weighted_blocks_estimate_the_papers_loss(rankings, rng):
    """The mean over blocks of sum(weight * value) is the expectation of the value over the paper's pairs."""
    values = rng.random((QUERIES, IMAGES))
    outlier_prob, count = 0.3, 12_000
    chance = np.full((QUERIES, IMAGES), outlier_prob / (IMAGES - CANDIDATES))
    np.put_along_axis(chance, rankings.rank.astype(int), (1 - outlier_prob) / CANDIDATES, axis=1)
    expected = (chance * values).sum() / QUERIES
    sampler = blocks(rankings, query_block=3, image_block=9)
    estimates = []
    for number in range(count):
        step = sampler.step(number)
        inside = values[np.ix_(step.queries, step.images)]
        estimates.append((step.weight * inside).sum() / step.queries.size / CANDIDATES)
    assert abs(np.mean(estimates) - expected) < 5 * np.std(estimates) / np.sqrt(count)


def test_steps_depend_on_seed_and_number_only(rankings):
    first = blocks(rankings).step(5)
    sampler = blocks(rankings)
    for number in (0, 3):
        sampler.step(number)
    again, other = sampler.step(5), blocks(rankings, seed=2).step(5)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.weight, again.weight)
    assert not np.array_equal(first.images, other.images)


def test_outliers_are_ignored_with_a_warning_where_all_images_are_ranked(rng, caplog):
    full = from_scores(rng.standard_normal((3, 10)))
    sampler = BlockSampler(
        full, 10, relevance_table(full, "rank"), query_block=2, image_block=6, outlier_prob=0.1, seed=0
    )
    assert "outlier_prob 0.1 is ignored" in caplog.text
    assert (sampler.step(0).label <= 1).all() and np.isfinite(sampler.step(0).relevance).all()


def test_relevance_tables(rankings):
    by_rank = relevance_table(rankings, "rank")
    np.testing.assert_allclose(by_rank[0], norm.ppf(1 - (np.arange(CANDIDATES) + 0.5) / CANDIDATES), atol=1e-6)
    by_score = relevance_table(rankings, "score")
    np.testing.assert_allclose(by_score.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(by_score.std(axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="found ranks only"):
        relevance_table(Rankings(rankings.rank), "score")
