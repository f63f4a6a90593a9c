"""Where the pieces of a collection lie, and how its stages are cut into them: what every reader of them must know."""

from __future__ import annotations

from pathlib import Path

import torch

from abu.amortised import Examples
from abu.collect_config import ScoreConfig, Settings, StepConfig
from abu.plan import Collection, Piece, Stage, cut
from abu.testbed import SPLITS, Testbed
from fastgda.core import relative, require_file, sha256_file

QUERY_PIECE, TRAINING_PIECE = 64, 256
"""Examples of a piece."""


def folder_of(testbed: Testbed, measure: str = "loss") -> Path:
    """Where the gradients of a testbed are kept; those of each measured function have their own place."""
    return testbed.data / ("cache/teacher" if measure == "loss" else f"cache/teacher_{measure}")


def steps_folder(testbed: Testbed) -> Path:
    """Where the two terms of the loss change are kept."""
    return folder_of(testbed) / "steps"


def scores_folder(testbed: Testbed, measure: str = "loss") -> Path:
    """Where the scores are kept."""
    return folder_of(testbed, measure) / "scores"


def examples_of(testbed: Testbed, part: str, device: torch.device) -> Examples:
    """A split's queries or, with "training", the training images."""
    return testbed.training_examples(device) if part == "training" else testbed.query_examples(part, device)


def pass_counts(passes: int) -> list[int]:
    """Numbers of passes that reliability is measured at: 1, 2, 4, … and all."""
    return sorted({2**k for k in range(passes.bit_length())} | {passes})


def query_plan(testbed: Testbed, splits: tuple[str, ...] = SPLITS) -> list[Piece]:
    """Pieces of the queries' gradients."""
    counts = {split: len(testbed.query_captions(split)) for split in splits}
    return [piece for split, count in counts.items() for piece in cut("query", split, count, QUERY_PIECE)]


def training_plan(testbed: Testbed, passes: range) -> list[Piece]:
    """Pieces of the passes over the training set."""
    images = testbed.images
    return [piece for index in passes for piece in cut("pass", str(index), images, TRAINING_PIECE)]


def step_plan(testbed: Testbed, passes: range) -> list[Piece]:
    """Pieces of the passes that keep both terms of the loss change."""
    return [piece for index in passes for piece in cut("step", str(index), testbed.images, TRAINING_PIECE)]


def score_plan(testbed: Testbed, passes: int) -> list[Piece]:
    """Pieces of the scores made from the first `passes` passes."""
    return cut("scores", str(passes), testbed.images, TRAINING_PIECE)


def started_passes(folder: Path, stage: Stage = "pass") -> list[int]:
    """Numbers of the passes that have at least one piece."""
    return sorted({int(path.name.split("_")[1]) for path in folder.glob(f"{stage}_*_*.npz")})


def whole_passes(testbed: Testbed, measure: str = "loss") -> int:
    """How many passes, counted from the first, have all their pieces; `ValueError` if there is none."""
    collection, count = Collection(folder_of(testbed, measure)), 0
    while not collection.missing(training_plan(testbed, range(count, count + 1))):
        count += 1
    if not count:
        raise ValueError(
            f"{collection.folder}: expected the pieces of a whole pass, found {len(started_passes(collection.folder))} "
            "begun; collect it with: python -m abu.collect training"
        )
    return count


def claimed(testbed: Testbed, config: Settings, measure: str = "loss") -> Collection:
    """The folder of the gradients or scores of these settings; `ValueError` if it holds others."""
    files = [testbed.source / "denoiser.safetensors"]
    files += [testbed.data / f"query_{split}/latents.npy" for split in SPLITS]
    folder, command = folder_of(testbed, measure), "python -m abu.collect training"
    if isinstance(config, ScoreConfig):
        files.append(testbed.curvature)
        folder, command = scores_folder(testbed, measure), "python -m abu.collect scores"
    if isinstance(config, StepConfig):
        files.append(testbed.curvature)
        folder, command = steps_folder(testbed), "python -m abu.collect steps"
    command += "" if measure == "loss" else f" --measure {measure}"
    collection = Collection(folder)
    collection.claim(config, {relative(path): sha256_file(path) for path in map(require_file, files)}, command)
    return collection
