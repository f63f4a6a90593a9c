"""Samplers: the paper's pair statistics, blocks that estimate the same loss, labels read from the rankings."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm

from fastgda.candidates import Outliers, fixed_subset, relevance_table
from fastgda.rankings import Rankings, candidate_labels, from_scores, labels
from fastgda.recipes import TrainConfig
from fastgda.sampling import BlockSampler, PairSampler, make_sampler

IMAGES, CANDIDATES, QUERIES = 40, 9, 6


@pytest.fixture
def rankings(rng) -> Rankings:
    """6 queries, 9 candidates of 40 images."""
    return from_scores(rng.standard_normal((QUERIES, IMAGES)).astype(np.float32), keep=CANDIDATES)


def test_outliers_are_uniform_outside_the_candidates(rankings, rng):
    queries = rng.integers(QUERIES, size=60_000)
    drawn = Outliers(rankings.rank, IMAGES).draw(queries, rng)
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
    assert Outliers(rankings.rank, 10).draw(np.array([2, 0, 1]), rng).tolist() == [missing[2], missing[0], missing[1]]


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
    with caplog.at_level("WARNING"):
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
    np.testing.assert_array_equal(
        relevance_table(rankings, "rank", 4), relevance_table(Rankings(rankings.rank[:, :4]), "rank")
    )
    with pytest.raises(ValueError, match="found ranks only"):
        relevance_table(Rankings(rankings.rank), "score")


SUBSET = 4


def test_fixed_subset_keeps_order_and_does_not_depend_on_the_number_of_queries(rankings):
    chosen = fixed_subset(rankings, SUBSET, seed=5)
    assert chosen.score is not None and rankings.score is not None
    for row, scores, whole, all_scores in zip(chosen.rank, chosen.score, rankings.rank, rankings.score, strict=True):
        places = [whole.tolist().index(image) for image in row]
        assert places == sorted(set(places)) and scores.tolist() == all_scores[places].tolist()
    np.testing.assert_array_equal(fixed_subset(rankings.rows(slice(0, 3)), SUBSET, seed=5).rank, chosen.rank[:3])
    assert not np.array_equal(fixed_subset(rankings, SUBSET, seed=6).rank, chosen.rank)


def expected_labels() -> np.ndarray:
    """[K] mean label of a candidate over all subsets that contain it, by enumeration."""
    found: list[list[int]] = [[] for _ in range(CANDIDATES)]
    for subset in combinations(range(CANDIDATES), SUBSET):
        for position, place in enumerate(subset):
            found[place].append(position + 1)
    return np.array([np.mean(positions) / SUBSET for positions in found])


def test_resampled_pairs_are_labelled_among_a_random_subset(rankings):
    sampler = PairSampler(
        rankings,
        IMAGES,
        relevance_table(rankings, "rank", SUBSET),
        batch_size=40_000,
        outlier_prob=0.1,
        seed=3,
        resample=SUBSET,
    )
    step = sampler.step(0)
    assert step.pairs is not None
    query, image = step.queries[step.pairs[0]], step.images[step.pairs[1]]
    inside = np.isfinite(step.relevance)
    places = np.argmax(rankings.rank[query] == image[:, None], axis=1)[inside]
    drawn = step.label[inside]
    assert set(drawn.tolist()) == set(candidate_labels(SUBSET).tolist())
    for place, expected in enumerate(expected_labels()):
        values = drawn[places == place]
        assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(values.size) + 1e-6
    by_label = dict(zip(candidate_labels(SUBSET).tolist(), sampler.relevance[0].tolist(), strict=True))
    assert [by_label[value] for value in drawn[:200].tolist()] == step.relevance[inside][:200].tolist()


@pytest.mark.parametrize("subset", ["resampled", "fixed"])
def test_blocks_of_subsets_estimate_the_expected_loss(rankings, rng, subset):
    """The mean over blocks of sum(weight * label * value) is its expectation over pairs and subsets."""
    values, outlier_prob, count = rng.random((QUERIES, IMAGES)), 0.3, 5000
    config = TrainConfig(
        sampling="blocks",
        query_block=3,
        image_block=9,
        outlier_prob=outlier_prob,
        random_subset_size=SUBSET,
        subset=subset,
    )
    if subset == "resampled":
        label, ids = expected_labels(), rankings.rank.astype(int)
    else:
        label, ids = candidate_labels(SUBSET), fixed_subset(rankings, SUBSET, config.seed).rank.astype(int)
    expected = (1 - outlier_prob) * (np.take_along_axis(values, ids, axis=1) * label).mean()
    outside = np.ones((QUERIES, IMAGES), dtype=bool)
    np.put_along_axis(outside, rankings.rank.astype(int), False, axis=1)
    expected += outlier_prob * values[outside].mean()
    sampler = make_sampler(config, rankings, IMAGES)
    estimates = []
    for number in range(count):
        step = sampler.step(number)
        inside = values[np.ix_(step.queries, step.images)]
        estimates.append((step.weight * step.label * inside).sum() / step.queries.size / SUBSET)
    assert abs(np.mean(estimates) - expected) < 5 * np.std(estimates) / np.sqrt(count)


@pytest.mark.parametrize("loss", ["bce", "score"])
def test_block_of_a_fixed_subset_knows_nothing_of_the_other_candidates(rankings, loss):
    config = TrainConfig(
        loss=loss, sampling="blocks", query_block=6, image_block=60, random_subset_size=SUBSET, subset="fixed"
    )
    chosen = fixed_subset(rankings, SUBSET, config.seed)
    relevance = relevance_table(chosen, "score" if loss == "score" else "rank")
    step = make_sampler(config, rankings, IMAGES).step(0)
    seen = set()
    for row, query in enumerate(step.queries):
        for column, image in enumerate(step.images):
            place = np.flatnonzero(chosen.rank[query] == image)
            found = step.weight[row, column] > 0, step.label[row, column], step.relevance[row, column]
            if place.size:
                known = relevance[query if loss == "score" else 0, place[0]]
                assert found == (True, candidate_labels(SUBSET)[place[0]], known)
            else:
                assert found == (image not in rankings.rank[query], 1, -np.inf)
            seen.add(found[0])
    assert seen == {True, False}


def test_resampled_relevance_is_that_of_the_image(rankings):
    config = TrainConfig(
        loss="score", sampling="blocks", query_block=6, image_block=60, random_subset_size=SUBSET, subset="resampled"
    )
    relevance = relevance_table(rankings, "score")
    step = make_sampler(config, rankings, IMAGES).step(1)
    for row, column in np.argwhere(np.isfinite(step.relevance)):
        query = step.queries[row]
        place = np.flatnonzero(rankings.rank[query] == step.images[column])[0]
        assert step.relevance[row, column] == relevance[query, place]
    assert (np.isfinite(step.relevance).sum(axis=1) <= SUBSET).all()


@pytest.mark.parametrize("sampling", ["pairs", "blocks"])
def test_subset_of_all_candidates_is_no_subset(rankings, sampling):
    config = TrainConfig(sampling=sampling, batch_size=50, query_block=3, image_block=12)
    whole = make_sampler(config, rankings, IMAGES).step(2)
    same = make_sampler(replace(config, random_subset_size=CANDIDATES), rankings, IMAGES).step(2)
    for name in ("queries", "images", "label", "relevance", "weight"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(same, name))
    with pytest.raises(ValueError, match="--random_subset_size: expected at most the 9 candidates, found 10"):
        make_sampler(replace(config, random_subset_size=CANDIDATES + 1), rankings, IMAGES)
