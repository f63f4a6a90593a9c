"""A planted problem: the teacher sees a linear map of the features, so a linear ranker can be perfect."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastgda.core import save_npy
from fastgda.dataset import Split, normalise
from fastgda.rankings import Rankings, from_scores, save_rankings

LEVELS = (6, 12, 48)


def planted(
    *, images: int = 600, dim: int = 24, hidden: int = 4, queries: int = 150, candidates: int = 120, seed: int = 0
) -> tuple[np.ndarray, dict[str, Split]]:
    """(images [N, D], splits): influence is the cosine in `hidden` of the feature's directions, the rest misleads.

    Rankings of the train split hold half their candidates from the top and half at random; the others are complete.
    """
    random = np.random.default_rng(seed)
    features = random.standard_normal((images, dim)).astype(np.float32)
    map_ = np.linalg.qr(random.standard_normal((dim, hidden)))[0].astype(np.float32)
    splits = {}
    for split, count in (("train", queries), ("val", 20), ("test", 30)):
        asked = random.standard_normal((count, dim)).astype(np.float32)
        scores = normalise(asked @ map_) @ normalise(features @ map_).T
        rankings = from_scores(scores)
        if split == "train":
            rankings = candidates_only(rankings, candidates, random)
        splits[split] = Split(asked, rankings)
    return features, splits


def candidates_only(full: Rankings, candidates: int, random: np.random.Generator) -> Rankings:
    """Half the candidates from the top, half at random among the others, in the order of the full ranking."""
    assert full.score is not None
    others = full.candidates - candidates // 2
    places = np.array(
        [
            np.r_[
                : candidates // 2,
                candidates // 2 + np.sort(random.permutation(others)[: candidates - candidates // 2]),
            ]
            for _ in range(full.queries)
        ]
    )
    return Rankings(np.take_along_axis(full.rank, places, 1), np.take_along_axis(full.score, places, 1))


def write_planted(folder: Path, ftype: str = "planted", **options: int) -> tuple[np.ndarray, dict[str, Split]]:
    """Writes the problem in the layout of the artifacts and returns it."""
    images, splits = planted(**options)
    save_npy(folder / "feats" / ftype / "data_feats.npy", images)
    for name, split in splits.items():
        save_npy(folder / "feats" / ftype / f"{name}_query_feats.npy", split.features)
        save_rankings(folder / f"influence_{name}.npz", split.rankings)
    return images, splits
