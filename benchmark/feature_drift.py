"""What half precision does to features and to mAP(L): two extractions of the same pictures, compared.

    python -m feature_extraction.extract --ftype effnet+minilm --bf16 --out runs/bf16
    python -m benchmark.feature_drift --other runs/bf16/effnet+minilm --checkpoint weights/emoji_effnet+minilm.pth

Drift of a feature: 1 - cosine between the two extractions, mean and maximum over all pictures of a split. Drift of
mAP(L): the difference on the same test queries, with its standard error over them, for the untuned feature and for the
ranker; queries and training images both come from the extraction that is judged.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgda.core import ROOT, command_line, command_parser, environment, load_npy, save_json
from fastgda.dataset import (
    FTYPES,
    MODES,
    Layout,
    default_levels,
    layout,
    load_images,
    load_split,
    normalise,
    unreadable,
)
from fastgda.flags import add_flags, from_flags
from fastgda.metrics import embedding_retrieval, standard_error
from fastgda.ranker import load_ranker

ROWS = 4096
"""Features compared at a time."""


@dataclass(frozen=True)
class DriftConfig:
    """The two extractions, and what judges them."""

    other: Path | None = None
    """Folder of the extraction in half precision."""
    mode: str = "emoji"
    """Layout and values of L: coco or emoji."""
    ftype: str | None = None
    """Feature type; by default the mode's."""
    data_dir: Path | None = None
    """Folder of the artifacts; by default data/<mode>."""
    feature_dir: Path | None = None
    """Folder of the extraction in full precision; by default <data_dir>/feats/<ftype>."""
    checkpoint: Path | None = None
    """Ranker; by default the untuned feature alone is judged."""
    topk_values: tuple[int, ...] = ()
    """Values of L; by default the mode's."""
    output: Path = ROOT / "results/speed/feature_drift.json"
    """JSON file."""

    def __post_init__(self) -> None:
        if self.other is None:
            raise ValueError("--other: expected the folder of the other extraction, found none")
        if self.mode not in MODES:
            raise ValueError(f"--mode: expected {' or '.join(MODES)}, found {self.mode}")


def feature_drift(first: Path, second: Path) -> dict[str, float]:
    """Mean and maximum of 1 - cosine over the rows of two feature files; a row of zeros in both has not turned."""
    one = load_npy(first, finite=True, mmap=True)
    other = load_npy(second, one.shape, finite=True, mmap=True)
    turned = []
    for start in range(0, len(one), ROWS):
        left, right = (rows[start : start + ROWS].astype(np.float64) for rows in (one, other))
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = (left * right).sum(axis=1) / np.where(lengths > 0, lengths, 1)
        turned.append(np.where(lengths > 0, 1 - cosine, 0.0))
    values = np.concatenate(turned)
    return {"images": len(values), "mean": float(values.mean()), "max": float(values.max())}


def precision_of(paths: Layout, checkpoint: Path | None, levels: tuple[int, ...]) -> dict[str, np.ndarray]:
    """AP(L) [Q, levels] of the test queries, untuned and tuned."""
    images = load_images(paths)
    test = load_split(paths, "test", images)
    embedded = {"untuned": [torch.from_numpy(normalise(rows)) for rows in (test.features, images)]}
    if checkpoint is not None:
        ranker = load_ranker(checkpoint, in_dim=images.shape[1])
        embedded["tuned"] = [ranker.embed_queries(test.features), ranker.embed(images)]
    return {
        name: embedding_retrieval(
            queries, stored, test.rankings, levels, precision_only=True, missing=unreadable(images)
        ).precision
        for name, (queries, stored) in embedded.items()
    }


def compare(config: DriftConfig) -> dict[str, Any]:
    """The report."""
    assert config.other is not None
    ftype = config.ftype or FTYPES[config.mode]
    first, second = (
        layout(config.mode, ftype, config.data_dir, folder) for folder in (config.feature_dir, config.other)
    )
    levels = config.topk_values or default_levels(config.mode, len(load_images(first)))
    features = {
        "data": feature_drift(first.images, second.images),
        "test_query": feature_drift(first.features("test"), second.features("test")),
    }
    before, after = (precision_of(paths, config.checkpoint, levels) for paths in (first, second))
    precision = {}
    for name, values in before.items():
        change = after[name] - values
        found = {"mAP": values.mean(axis=0), "change": change.mean(axis=0), "standard_error": standard_error(change)}
        precision[name] = {
            part: dict(zip(map(str, levels), numbers.tolist(), strict=True)) for part, numbers in found.items()
        }
    return {"ftype": ftype, "features": features, "mAP": precision}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.feature_drift", __doc__)
    add_flags(parser, DriftConfig)
    config = from_flags(DriftConfig, parser.parse_args(argv))
    found = compare(config)
    for split, drift in found["features"].items():
        print(f"{split}: 1 - cosine mean {drift['mean']:.1e}, max {drift['max']:.1e} over {drift['images']} pictures")
    for name, entry in found["mAP"].items():
        changes = ", ".join(f"mAP({level}) {value:+.4f}" for level, value in entry["change"].items())
        print(f"{name}: {changes}")
    save_json(config.output, {"config": asdict(config), **found, "environment": environment()})
    print(f"wrote {config.output}")


if __name__ == "__main__":
    sys.exit(main())
