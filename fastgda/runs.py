"""What a training run is and where it stands: its identity and its checkpoint, so that only the same run goes on."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgda.core import atomic_path, first_difference
from fastgda.dataset import Split
from fastgda.recipes import TrainConfig


def identity(config: TrainConfig, levels: tuple[int, ...], images: np.ndarray, *splits: Split) -> dict[str, Any]:
    """What must be equal for a run to be continued: configuration, values of L, and a hash of the data."""
    return {"config": _plain(asdict(config)), "levels": list(levels), "data": _digest(images, *splits)}


def save_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes the state of the run, atomically."""
    with atomic_path(path) as temporary:
        torch.save({"identity": identity, **state}, temporary)


def load_checkpoint(path: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The state that was saved; `ValueError` naming the file if it is damaged or belongs to another run."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a checkpoint, found a damaged file; delete it ({error})") from error
    for part, wanted in identity.items():
        if (difference := first_difference(wanted, saved["identity"][part], part)) is not None:
            raise ValueError(f"{path}: expected a checkpoint of this run, found another: {difference}; delete it")
    return saved


def _digest(images: np.ndarray, *splits: Split) -> str:
    digest, arrays = hashlib.sha256(), [images]
    for split in splits:
        arrays += [split.features, split.rankings.rank]
        if split.rankings.score is not None:
            arrays.append(split.rankings.score)
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
