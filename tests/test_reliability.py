"""Reliability against the number of draws: the fit on known curves and on simulated noise."""

from __future__ import annotations

import numpy as np
import pytest

from benchmark.reliability import Curve, fit


def test_the_fit_finds_the_curve_it_was_made_with():
    truth = Curve(0.05, 0.9, 40.0)
    draws = [10, 20, 40, 80, 160]
    found = fit(draws, list(truth(np.array(draws))), 0.05)
    assert (found.ceiling, found.half) == (pytest.approx(0.9, abs=1e-3), pytest.approx(40, rel=1e-2))
    needed = found.needed(0.8)
    assert needed is not None and found(needed) >= 0.8 > found(needed - 1)
    assert found.needed(0.95) is None
    assert found.needed(0.01) == 1


def test_two_points_are_fitted_with_a_ceiling_of_one():
    found = fit([10, 20], [10 / 40, 20 / 50], 0.0)
    assert found.ceiling == 1.0
    assert found.half == pytest.approx(30, rel=1e-3)
    assert found.needed(0.5) in (30, 31)
    with pytest.raises(ValueError, match="expected a finite reliability"):
        fit([10], [float("nan")], 0.0)


def test_prediction_holds_for_more_draws_of_simulated_scores():
    """Scores = signal + noise / √N, with noise variance 60: the correlation of two runs is N / (N + 60)."""
    random = np.random.default_rng(0)
    signal = random.normal(size=20_000)

    def measured(draws):
        first, second = signal + random.normal(size=(2, signal.size)) * np.sqrt(60 / draws)
        return float(np.corrcoef(first, second)[0, 1])

    found = fit([10, 20, 40], [measured(n) for n in (10, 20, 40)], 0.0)
    assert found(160) == pytest.approx(measured(160), abs=0.08)
