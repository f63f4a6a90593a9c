"""A collection of gradients small enough for several test modules: 24 images in pieces of 8, 7 queries, 2 draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_collect

from abu import collect, stages
from abu.draws import DrawConfig

IMAGES, QUERIES = 24, {"train": 2, "val": 2, "test": 3}


def few_draws(config: collect.CollectConfig, part: str, timesteps: int) -> DrawConfig:
    """Two draws in each bin, whatever the part: one antithetic pair."""
    return DrawConfig(config.bins, 2, timesteps=timesteps, seed=config.seed)


@contextmanager
def small_collection(root: Path, passes: int = 1) -> Iterator[Path]:
    """Collects curvature, queries and passes in `root`; inside, plans are cut into small pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_collect, "IMAGES", IMAGES)
        patch.setattr(test_collect, "QUERIES", QUERIES)
        patch.setattr(stages, "TRAINING_PIECE", 8)
        patch.setattr(collect.CollectConfig, "draws", few_draws)
        test_collect.write_testbed(root)
        for stage in ("curvature", "queries"):
            assert collect.main([stage, "--root", str(root)]) == 0
        assert collect.main(["training", "--root", str(root), "--passes", str(passes)]) == 0
        yield root
