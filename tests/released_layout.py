"""Writes the released data's layout at any size, planted so that a known ranker is optimal.

    PYTHONPATH=. python tests/released_layout.py FOLDER   # 118,287 x 1280 features, 5,000 x 10,000 rankings; 3 GB

The teacher's score is the cosine in a few hidden directions of the feature. Two ReLU units carry each direction through
the hidden layers, one for each sign, so the released architecture can represent the teacher exactly.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastgda.dataset import normalise
from fastgda.ranker import Ranker, RankerConfig, save_ranker

FTYPE = "dino+clip_text"
BLOCK = 4096
"""Rows made at a time."""


@dataclass(frozen=True)
class ReleasedSize:
    """Sizes of the released MSCOCO data."""

    images: int = 118_287
    dim: int = 1280
    train_queries: int = 5000
    candidates: int = 10_000
    test_queries: int = 110
    hidden: int = 8
    """Directions of the feature that the teacher sees."""
    width: int = 768
    """Hidden size and output size of the ranker."""


def write_released(folder: Path, size: ReleasedSize, seed: int = 0) -> Ranker:
    """Writes feats/, influence_{train,test}.pkl and weights/<ftype>.pth under `folder`; returns the optimal ranker."""
    random = np.random.default_rng(seed)
    map_ = np.linalg.qr(random.standard_normal((size.dim, size.hidden)))[0].astype(np.float32)
    features = folder / "feats" / FTYPE
    features.mkdir(parents=True)
    hidden = {
        name: _write_features(features / f"{name}.npy", count, map_, random)
        for name, count in (
            ("data_feats", size.images),
            ("train_query_feats", size.train_queries),
            ("test_query_feats", size.test_queries),
        )
    }
    train = _train_ranks(hidden["train_query_feats"], hidden["data_feats"], size.candidates, random)
    places = np.broadcast_to(np.arange(size.candidates), train.shape)
    _write_pickle(
        folder / "influence_train.pkl", {"rank": train, "influence_subset": -places, "rank_influence_subset": places}
    )
    influence = hidden["test_query_feats"] @ hidden["data_feats"].T
    rank = np.argsort(-influence, axis=1)
    _write_pickle(folder / "influence_test.pkl", {"rank": rank, "influence": influence})
    ranker = optimal_ranker(map_, size.width)
    save_ranker(folder / "weights" / f"{FTYPE}.pth", ranker)
    return ranker


def optimal_ranker(map_: np.ndarray, width: int) -> Ranker:
    """The ranker whose embedding is the feature's image under `map_` [D, hidden], which takes 2 * hidden <= width."""
    dim, hidden = map_.shape
    ranker = Ranker(RankerConfig(dim, (width, width, width), width)).eval()
    weights = ranker.mlp.state_dict()
    for value in weights.values():
        value.zero_()
    directions, unit = torch.from_numpy(map_.T), torch.eye(2 * hidden)
    weights["layers.0.weight"][: 2 * hidden] = torch.cat([directions, -directions])
    for name in ("layers.1.weight", "layers.2.weight"):
        weights[name][: 2 * hidden, : 2 * hidden] = unit
    weights["output_layer.weight"][:hidden, : 2 * hidden] = unit[:hidden] - unit[hidden:]
    ranker.mlp.load_state_dict(weights)
    return ranker


def _write_features(path: Path, count: int, map_: np.ndarray, random: np.random.Generator) -> np.ndarray:
    # returns the unit vectors [count, hidden] that the teacher compares
    file = np.lib.format.open_memmap(path, "w+", np.float32, (count, len(map_)))
    hidden = np.empty((count, map_.shape[1]), dtype=np.float32)
    for start in range(0, count, BLOCK):
        rows = random.standard_normal(file[start : start + BLOCK].shape, dtype=np.float32)
        file[start : start + BLOCK] = rows
        hidden[start : start + BLOCK] = normalise(rows @ map_)
    file.flush()
    return hidden


def _train_ranks(queries: np.ndarray, images: np.ndarray, candidates: int, random: np.random.Generator) -> np.ndarray:
    # half the candidates from the top, half at random, so that the ranking spans the whole range as a K-NN list does
    rank = np.empty((len(queries), candidates), dtype=np.int64)
    for query, row in zip(queries, rank, strict=True):
        score = images @ query
        split = np.argpartition(-score, candidates // 2)
        others = random.choice(split[candidates // 2 :], candidates - candidates // 2, replace=False)
        chosen = np.concatenate([split[: candidates // 2], others])
        row[:] = chosen[np.argsort(-score[chosen], kind="stable")]
    return rank


def _write_pickle(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as handle:
        pickle.dump({"random": {name: np.ascontiguousarray(array) for name, array in arrays.items()}}, handle)


if __name__ == "__main__":
    write_released(Path(sys.argv[1]), ReleasedSize())
