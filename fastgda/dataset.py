"""Reads the artifacts that teacher and encoders leave on disk: features and rankings, checked against each other.

<data_dir>/feats/<ftype>/data_feats.npy                [N, D] training images
<data_dir>/feats/<ftype>/{train,val,test}_query_feats.npy   [Q, D] queries
<data_dir>/influence_{train,val,test}.npz (or .pkl)    rankings of the training images for those queries
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgda.core import ROOT, load_npy, rows_not_finite
from fastgda.rankings import Rankings, load_rankings

MODES = ("coco", "emoji")
EXTRACT = "python -m feature_extraction.extract"
RANK = {"coco": "bash scripts/download_data.sh", "emoji": "python -m benchmark.teacher"}
"""What makes the rankings of each mode."""
FTYPES = {"coco": "dino+clip_text", "emoji": "effnet+minilm"}
"""The feature type of each mode, where none is named."""
COCO_LEVELS = (500, 1000, 4000)
COCO_VALIDATION = (4900, 5000)
"""Rows of the released training queries that the paper validates on."""
ROWS_NAMED = 10
"""Damaged rows that an error names."""
LEVEL_FRACTIONS = (0.004, 0.0085, 0.034)
"""The paper's 500, 1,000 and 4,000 of 118,287, as shares of the training set."""


@dataclass(frozen=True)
class Split:
    """Queries of one split with the teacher's rankings for them."""

    features: np.ndarray
    """[Q, D] float32."""
    rankings: Rankings

    def __post_init__(self) -> None:
        if len(self.features) != self.rankings.queries:
            raise ValueError(
                f"expected as many queries in the features as in the rankings, found {len(self.features)} "
                f"and {self.rankings.queries}"
            )

    @property
    def queries(self) -> int:
        """Q."""
        return len(self.features)

    def rows(self, index: slice | np.ndarray) -> Split:
        """Some of the queries."""
        return Split(self.features[index], self.rankings.rows(index))


@dataclass(frozen=True)
class Layout:
    """Where a mode keeps its artifacts."""

    mode: str
    ftype: str
    data_dir: Path
    feature_dir: Path

    def ranking(self, split: str) -> Path:
        """The split's ranking file: `.npz`, or the released `.pkl` where only that exists."""
        path = self.data_dir / f"influence_{split}.npz"
        released = path.with_suffix(".pkl")
        return released if released.is_file() and not path.is_file() else path

    def features(self, split: str) -> Path:
        """The split's query features."""
        return self.feature_dir / f"{split}_query_feats.npy"

    @property
    def images(self) -> Path:
        """The features of the training images."""
        return self.feature_dir / "data_feats.npy"

    @property
    def extract(self) -> str:
        """The command that makes the features."""
        return f"{EXTRACT} --mode {self.mode} --ftype {self.ftype}"


def layout(mode: str, ftype: str, data_dir: Path | None = None, feature_dir: Path | None = None) -> Layout:
    """The layout of `mode`, with the folders that the command line names in the place of the usual ones."""
    data_dir = data_dir or ROOT / "data" / mode
    return Layout(mode, ftype, data_dir, feature_dir or data_dir / "feats" / ftype)


def load_images(paths: Layout) -> np.ndarray:
    """[N, D] float32 features of the training images, mapped from their file where it holds float32.

    `ValueError` if missing, damaged or not finite.
    """
    return _features(paths.images, None, paths.extract)


def load_split(paths: Layout, split: str, images: np.ndarray, rank_file: Path | None = None) -> Split:
    """The queries of `split`; `ValueError` naming the files if features, rankings and training images disagree."""
    feature_file, rank_file = paths.features(split), rank_file or paths.ranking(split)
    features = _features(feature_file, images.shape[1], paths.extract)
    rankings = load_rankings(rank_file, len(images), made_by=RANK[paths.mode])
    if len(features) != rankings.queries:
        raise ValueError(
            f"{rank_file}: expected rankings of {len(features)} queries, as many as {feature_file} has rows, "
            f"found {rankings.queries}"
        )
    return Split(features, rankings)


def default_levels(mode: str, images: int) -> tuple[int, ...]:
    """The values of L: the paper's for COCO, the same shares of the training set otherwise."""
    return COCO_LEVELS if mode == "coco" else tuple(max(1, round(share * images)) for share in LEVEL_FRACTIONS)


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """(training, validation): the last `count` queries become the validation split, where none is stored."""
    if not 0 < count < split.queries:
        raise ValueError(f"expected to hold out 1..{split.queries - 1} of {split.queries} queries, found {count}")
    return split.rows(slice(0, -count)), split.rows(slice(-count, None))


def hold_out_rows(split: Split, start: int, end: int) -> tuple[Split, Split]:
    """(training, validation): the queries before `start`, and those from `start` up to `end`."""
    if not 0 < start < end <= split.queries:
        raise ValueError(
            f"--val_start, --val_end: expected 0 < start < end <= the {split.queries} queries, found {start}, {end}"
        )
    return split.rows(slice(0, start)), split.rows(slice(start, end))


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows at unit length, so that dot products are cosines: the embedding of the untuned feature."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(np.float32).tiny)


def unreadable(features: np.ndarray) -> np.ndarray:
    """[N] mask of the rows of zeros, which stand for pictures that could not be read."""
    return ~np.any(features, axis=1)


def _features(path: Path, dimension: int | None, made_by: str) -> np.ndarray:
    shape: Sequence[int | None] = (None, dimension)
    features = load_npy(path, tuple(shape), mmap=True, made_by=made_by)
    if features.size == 0 or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"{path}: expected rows of float features, found {features.dtype} {list(features.shape)}")
    if bad := list(rows_not_finite(features)):
        shown = ", ".join(map(str, bad[:ROWS_NAMED])) + (", ..." if len(bad) > ROWS_NAMED else "")
        raise ValueError(f"{path}: expected finite numbers, found NaN or infinity in {len(bad)} rows: {shown}")
    return np.ascontiguousarray(features, dtype=np.float32)
