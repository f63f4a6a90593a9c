"""The linear datamodelling score on planted models, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmark import lds
from benchmark.retrain import random_halves, without_creators
from benchmark.retrainer import Retraining
from fastgda.metrics import bootstrap_interval


@pytest.fixture
def planted():
    """Losses that fall by the true influence of each image seen, plus noise: (influence, seen, losses, again)."""
    random = np.random.default_rng(0)
    influence = random.normal(size=(7, 60))
    jobs = random_halves(60, 40)
    seen = lds.seen_by([np.asarray(job.removed) for job in jobs], 60)
    losses, again = (5 - influence @ seen.T + random.normal(size=(7, 40)) for _ in range(2))
    return influence, seen, losses.T, again.T


def test_correlation_is_scipys_with_ties():
    first, second = np.random.default_rng(1).integers(0, 6, size=(2, 5, 30)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(lds.correlate(first, second), expected, atol=1e-12)


def test_true_influence_scores_high_its_opposite_low_and_noise_nothing(planted):
    influence, seen, losses, again = planted
    found = lds.lds(influence, seen, losses).mean()
    assert found > 0.9
    np.testing.assert_allclose(lds.lds(-influence, seen, losses).mean(), -found)
    noise = np.random.default_rng(2).normal(size=(50, *influence.shape))
    assert abs(np.mean([lds.lds(scores, seen, losses).mean() for scores in noise])) < 0.05
    concepts = ["a", "a", "b", "c", "d", "e", "f"]
    once, twice = (lds.ceiling(losses, again, concepts, truth) for truth in ("halves", "both"))
    assert found - 0.03 < once["lds"] < twice["lds"] < 1
    assert once["lds"] == pytest.approx(lds.correlate(losses.T, again.T).mean() ** 0.5)
    assert once["interval"][0] < once["lds"] < once["interval"][1]
    assert twice["lds"] == pytest.approx((2 * once["reliability"] / (1 + once["reliability"])) ** 0.5)
    both = lds.lds(influence, seen, (losses + again) / 2).mean()
    assert found < both < twice["lds"] + 0.03


def test_losses_of_noise_have_no_ceiling():
    losses, again = np.random.default_rng(4).normal(size=(2, 64, 200))
    found = lds.ceiling(losses, again, [f"{i}" for i in range(200)])
    assert abs(found["reliability"]) < 0.05 and found["lds"] < 0.2


def test_scores_of_the_wrong_shape_or_not_finite_are_refused(planted):
    influence, seen, losses, _ = planted
    with pytest.raises(ValueError, match=r"expected finite numbers \[7, 60\], found \[7, 59\]"):
        lds.lds(influence[:, 1:], seen, losses)
    influence[0, 0] = np.nan
    with pytest.raises(ValueError, match="expected finite numbers"):
        lds.lds(influence, seen, losses)


def test_halves_are_halves_and_differ():
    jobs = random_halves(61, 5)
    assert {len(job.removed) for job in jobs} == {31}
    assert len({job.name for job in jobs}) == 5
    assert random_halves(61, 5) == jobs
    assert random_halves(61, 3) == jobs[:3]


def test_each_creator_is_removed_once_per_seed():
    jobs = without_creators(["a", "b", "a", "c"], 2)
    assert [job.removed for job in jobs[::2]] == [(0, 2), (1,), (3,)]
    assert [job.seed for job in jobs] == [0, 1] * 3


def test_equal_removals_share_a_model():
    assert Retraining((1, 2), 0).name == Retraining((1, 2), 0).name != Retraining((1, 3), 0).name
    assert Retraining((1, 2), 0).name != Retraining((1, 2), 1).name


def test_the_interval_holds_the_mean():
    values = np.random.default_rng(3).normal(0.3, 0.1, size=40)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert 0.03 < high - low < 0.1


def test_sharpened_scores_keep_their_order_whatever_their_scale():
    scores = np.random.default_rng(0).normal(size=(3, 50))
    found = lds.sharpened(scores)
    assert np.array_equal(np.argsort(found, 1), np.argsort(scores, 1)) and (found > 0).all()
    np.testing.assert_allclose(lds.sharpened(5 * scores - 2), found)
    assert (found.max(1) / found.mean(1) > 5).all()
