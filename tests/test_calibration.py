"""Calibration of summed scores on planted losses, to which every removed image adds its influence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.calibration import Judge, error_of_shares, removals_of, shares, slope_and_fit
from benchmark.creators import PROMPT
from benchmark.retrain import random_halves, references, without_creators
from benchmark.retrainer import Retraining

IMAGES, MODELS, REFERENCES = 30, 2, 3
SETS = [("ann", "bob", "cyn")[image % 3] for image in range(IMAGES)]


class Planted:
    """Losses of models to which every removed image adds its influence, in units of `unit`."""

    images = IMAGES

    def __init__(self, unit: float = 0.25) -> None:
        random = np.random.default_rng(0)
        self.influence = {split: random.normal(size=(count, IMAGES)) for split, count in (("val", 6), ("test", 8))}
        self.recipe: dict[str, Any] = {"unit": unit}
        self.unit = unit
        self.extra = [Retraining((1, 4, 7), 0), Retraining((2, 3, 9), 1), Retraining((5,), 0)]
        self.known = [*references(REFERENCES), *without_creators(SETS, MODELS), *random_halves(IMAGES, 4), *self.extra]

    def made_from(self, split: str) -> dict[str, str]:
        return {"queries": split}

    def concepts(self, split: str) -> list[str]:
        return [f"{split} {row // 2}" for row in range(len(self.influence[split]))]

    def sets(self, split: str) -> list[str]:
        return SETS if split == "training" else [SETS[row % 3] for row in range(len(self.influence[split]))]

    def jobs(self) -> list[Retraining]:
        return self.known

    def missing(self, jobs: Sequence[Retraining]) -> list[Retraining]:
        return [job for job in jobs if job not in self.known]

    def of(self, jobs: Sequence[Retraining], split: str) -> np.ndarray:
        influence = self.unit * self.influence[split]
        return np.stack([3 + influence[:, list(job.removed)].sum(1) for job in jobs])

    def scores(self, path: Path, split: str) -> np.ndarray:
        return self.influence[split]


def test_true_influence_adds_up_in_every_group() -> None:
    stored = Planted()
    judge = Judge(stored, MODELS, REFERENCES)
    unit = judge.unit(stored.influence["val"])
    assert unit == pytest.approx(stored.unit)
    rows = judge.rows(unit * stored.influence["test"])
    assert {name: row["models"] for name, row in rows.items()} == {
        "creators": 6,
        "1 images": 1,
        "3 images": 2,
        "halves": 4,
    }
    for row in rows.values():
        assert row["slope"] == pytest.approx(1) and row["r_squared"] == pytest.approx(1)
    assert rows["creators"]["absolute_error"] == pytest.approx(0)


class Seeded(Planted):
    """Each seed has an offset of its own, far above what removals do."""

    def of(self, jobs: Sequence[Retraining], split: str) -> np.ndarray:
        queries = len(self.influence[split])
        offsets = np.random.default_rng(3).normal(scale=20, size=(REFERENCES, queries))
        mean = offsets.mean(0)
        return super().of(jobs, split) + [offsets[job.seed] if job.seed < REFERENCES else mean for job in jobs]


def test_a_model_is_compared_with_the_one_of_its_seed() -> None:
    stored, plain = Seeded(), Planted()
    judge, expected = Judge(stored, MODELS, REFERENCES), Judge(plain, MODELS, REFERENCES)
    assert judge.unit(stored.influence["val"]) == pytest.approx(plain.unit)
    influence = plain.unit * plain.influence["test"]
    for name, row in expected.rows(influence).items():
        found = judge.rows(influence)[name]
        assert found["slope"] == pytest.approx(row["slope"]) and found["r_squared"] == pytest.approx(row["r_squared"])


def test_scores_of_noise_predict_nothing_and_their_sign_counts() -> None:
    stored = Planted()
    judge = Judge(stored, MODELS, REFERENCES)
    noise = np.random.default_rng(1).normal(size=stored.influence["test"].shape)
    assert all(row["r_squared"] < 0.3 for row in judge.rows(stored.unit * noise).values())
    turned = judge.rows(-stored.unit * stored.influence["test"])["halves"]
    assert turned["slope"] == pytest.approx(-1) and turned["r_squared"] < -1


def test_rules_that_do_not_look_are_reported() -> None:
    found = Judge(Planted(), MODELS, REFERENCES).baselines()
    assert PROMPT in found and len(found) == 3 and all(0 < row["absolute_error"] < 1 for row in found.values())


def test_removals_are_those_of_no_other_plan() -> None:
    stored = Planted()
    planned = [*without_creators(SETS, 1), *random_halves(IMAGES, 4)]
    assert removals_of(stored, planned) == {1: [stored.extra[2]], 3: stored.extra[:2]}


def test_shares_and_their_error() -> None:
    assert shares(np.array([[3.0, -1.0, 1.0], [-1.0, 0.0, -2.0]])).tolist() == [[0.75, 0, 0.25], [0, 0, 0]]
    found = error_of_shares(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]]), ["a", "b"])
    assert found["absolute_error"] == 0.5 and found["interval"][0] <= 0.5 <= found["interval"][1]


def test_slope_is_that_of_least_squares(rng: np.random.Generator) -> None:
    predicted = rng.normal(size=(5, 40))
    observed = 2 * predicted + rng.normal(size=predicted.shape)
    found = slope_and_fit(predicted, observed)
    assert found["slope"] == pytest.approx(np.polyfit(predicted.ravel(), observed.ravel(), 1)[0])
    assert found["correlation"] == pytest.approx(np.corrcoef(predicted.ravel(), observed.ravel())[0, 1])
