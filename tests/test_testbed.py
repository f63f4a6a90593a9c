"""The shipped ranker on the built testbed: the README's numbers, above its floor, chance at chance.

Needs the features that `bash scripts/quickstart.sh --no-serve` extracts; skipped where they do not exist yet.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastgda.core import ROOT
from fastgda.dataset import default_levels, layout, load_images
from fastgda.evaluation import Candidate, evaluate
from fastgda.metrics import average_precision, chance, standard_error
from fastgda.rankings import load_rankings

FTYPE = "effnet+minilm"
PATHS = layout("emoji", FTYPE)
pytestmark = pytest.mark.skipif(not PATHS.images.is_file(), reason="features not built: scripts/quickstart.sh")


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """Method -> row of a fresh evaluation of the shipped ranker on the test queries."""
    checkpoint = ROOT / "weights" / f"emoji_{FTYPE}.pth"
    return {row["method"]: row for row in evaluate([Candidate(FTYPE, PATHS, (checkpoint,))], "test")["rows"]}


def test_the_readmes_numbers_come_out_again(rows):
    report = json.loads((ROOT / "results/ranker/features.json").read_text())
    stored = {row["method"]: row for row in report["rows"] if row.get("ftype") == FTYPE}
    for method in ("untuned", "tuned"):
        # features of another processor differ in their last digits
        assert rows[method]["mAP"] == pytest.approx(stored[method]["mAP"], abs=0.005)


def test_tuning_gains_clearly_on_concepts_it_never_saw(rows):
    for level, gain in rows["tuned"]["gain"].items():
        assert gain > 5 * rows["tuned"]["gain_standard_error"][level]
    assert all(rows["tuned"]["mAP"][level] > rows["popularity"]["mAP"][level] for level in rows["tuned"]["mAP"])


def test_random_scores_are_at_chance():
    images = len(load_images(PATHS))
    levels = default_levels("emoji", images)
    rank = load_rankings(PATHS.ranking("test"), images).rank[:, : max(levels)]
    scores = np.random.default_rng(0).random((len(rank), images), dtype=np.float32)
    found = average_precision(scores, rank, levels)
    expected = [chance(level, images) for level in levels]
    assert (np.abs(found.mean(0) - expected) < 5 * standard_error(found)).all()
