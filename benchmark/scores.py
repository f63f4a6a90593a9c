"""Score files: one array [Q, N] for the queries of one split, higher = more influential, and what it was made from.

A file is `.npy`, or `.npz` with `scores` and optionally `train_ids` [N] and `query_ids` [Q], the rows that its columns
and rows belong to; what `abu.score` writes for all images and queries is one, too. Its manifest, where it has one,
names the hashes of the training set, the queries and the model; scores of another model or dataset are refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.retrainable import Retrainable
from fastgda.core import (
    load_npy,
    load_npz,
    manifest_path,
    read_manifest,
    require_file,
    save_npy,
    sha256_file,
    write_manifest,
)

COLUMNS, FROM_ABU = ("scores", "query_ids", "train_ids"), ("influence", "queries", "ids")
"""Members of an archive: scores, ids of the queries and of the images; and what `abu.score` calls them."""
ABU_INPUTS = {
    "training": ("trainset/latents.npy",),
    "queries": ("queries/latents.npy",),
    "model": ("denoiser.safetensors", "model.bin"),
}
"""What its manifest calls the files of `score_inputs`."""


def score_inputs(testbed: Retrainable, split: str) -> dict[str, str]:
    """Hashes of what scores are made from."""
    return {name: sha256_file(path) for name, path in testbed.score_files(split).items()}


def score_path(testbed: Retrainable, method: str, split: str) -> Path:
    """Where the scores of a method are kept: those of the test queries under its own name."""
    return testbed.data / "scores" / (f"{method}.npy" if split == "test" else f"{split}/{method}.npy")


def save_scores(
    testbed: Retrainable, method: str, split: str, scores: np.ndarray, config: Any, command: str, **inputs: str
) -> Path:
    """Writes the scores of a method with their manifest; returns the path."""
    path = score_path(testbed, method, split)
    save_npy(path, scores.astype(np.float32))
    write_manifest(path, config, command=command, inputs=score_inputs(testbed, split) | inputs)
    return path


def by_method(paths: Iterable[Path]) -> dict[str, Path]:
    """Method -> its score file, which is called like it; `ValueError` if two files have one name."""
    found: dict[str, Path] = {}
    for path in paths:
        if found.setdefault(path.stem, path) != path:
            raise ValueError(f"{path}: expected a method of another name, found {found[path.stem]} before it")
    return found


def load_scores(path: Path, testbed: Retrainable, split: str) -> np.ndarray:
    """Scores [Q, N] float64 in the order of the testbed's queries and training images.

    `ValueError` naming the file if it is damaged, of another shape, not finite, equal for all images of a query, has
    ids that are not the testbed's, or was made from another model, training set or queries.
    """
    shape = (len(testbed.query_captions(split)), testbed.images)
    wanted = score_inputs(testbed, split) if manifest_path(path).is_file() else {}
    return read_scores(path, shape, wanted, f"{testbed.name}, {split} queries")


def read_scores(path: Path, shape: tuple[int, int], wanted: dict[str, str], whose: str) -> np.ndarray:
    """`load_scores` for any Q and N; `wanted`: hashes of what they must be made from, `whose`: what errors call it."""
    scores = _with_ids(path, shape) if zipfile.is_zipfile(require_file(path)) else load_npy(path, shape)
    if not (np.issubdtype(scores.dtype, np.floating) or np.issubdtype(scores.dtype, np.integer)):
        raise ValueError(f"{path}: expected numbers, found {scores.dtype}")
    if not np.isfinite(scores).all():
        row = int(np.argwhere(~np.isfinite(scores))[0][0])
        raise ValueError(f"{path}: expected finite numbers, found NaN or infinity (first in row {row})")
    constant = (scores == scores[:, :1]).all(1)
    if constant.any():
        raise ValueError(
            f"{path}: expected scores that differ, found the same for all images in row {constant.argmax()}"
        )
    if manifest_path(path).is_file():
        made_from = read_manifest(path)["inputs"]
        for name, value in wanted.items():
            for found in (made_from[key] for key in (name, *ABU_INPUTS.get(name, ())) if key in made_from):
                if found != value:
                    raise ValueError(
                        f"{path}: expected scores of this testbed ({whose}), "
                        f"found another {name}: SHA-256 {found[:12]}…, not {value[:12]}…"
                    )
    return scores.astype(np.float64)


def _with_ids(path: Path, shape: tuple[int, int]) -> np.ndarray:
    arrays = load_npz(path, (), optional=(*COLUMNS, *FROM_ABU))
    name, *id_names = FROM_ABU if FROM_ABU[0] in arrays else COLUMNS
    if name not in arrays:
        raise ValueError(f"{path}: expected an array called {COLUMNS[0]} or {FROM_ABU[0]}, found neither")
    scores = arrays[name]
    if scores.shape != shape:
        raise ValueError(f"{path}: expected shape {list(shape)}, found {list(scores.shape)}")
    for axis, ids in enumerate(id_names):
        if ids not in arrays:
            continue
        found, wanted = arrays[ids], np.arange(shape[axis])
        if found.shape != wanted.shape or not np.array_equal(np.sort(found), wanted):
            unknown = np.setdiff1d(found, wanted)
            what = f"{unknown[0]}" if len(unknown) else f"{len(np.unique(found))} different ones"
            raise ValueError(f"{path}: expected {ids} 0 to {shape[axis] - 1}, each once, found {what}")
        scores = np.take(scores, np.argsort(found), axis)
    return scores
