"""Where the pieces of a collection lie, and how its stages are cut into them: what every reader of them must know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from abu.amortised import Examples
from abu.collect_config import CollectConfig, ScoreConfig, Settings
from abu.gradients import MADE_BY
from abu.plan import Collection, Piece, Stage, cut
from abu.testbed import SPLITS, Testbed
from fastgda.core import manifest_path, read_manifest, relative, require_file, sha256_file

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


def query_counts(testbed: Testbed) -> tuple[int, int]:
    """(all queries, those of validation and test, whose runs are kept apart)."""
    counts = {split: len(testbed.query_captions(split)) for split in SPLITS}
    return sum(counts.values()), sum(counts.values()) - counts["train"]


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


def whole_passes(testbed: Testbed, measure: str = "loss", wanted: int | None = None) -> int:
    """How many passes, counted from the first, have all their pieces, or the `wanted` number of them.

    `ValueError` if there is none, or fewer than wanted.
    """
    collection, count = Collection(folder_of(testbed, measure)), 0
    while not collection.missing(training_plan(testbed, range(count, count + 1))):
        count += 1
    if not count:
        raise ValueError(
            f"{collection.folder}: expected the pieces of a whole pass, found {len(started_passes(collection.folder))} "
            "begun; collect it with: python -m abu.collect training"
        )
    if wanted is not None and not 1 <= wanted <= count:
        raise ValueError(f"--passes: expected 1..{count}, as many as are collected, found {wanted}")
    return wanted or count


@dataclass(frozen=True)
class Claim:
    """What the pieces of one stage are made from, and where they lie."""

    collection: Collection
    settings: Settings
    inputs: dict[str, str]
    """File -> SHA-256."""
    command: str

    def check(self) -> None:
        """`ValueError` if the folder holds other pieces; writes nothing."""
        self.collection.check(self.settings, self.inputs)

    def write(self) -> None:
        """Marks the folder as holding these pieces; `ValueError` if it holds others."""
        self.collection.claim(self.settings, self.inputs, self.command)


def claim_of(testbed: Testbed, config: Settings, measure: str = "loss") -> Claim:
    """The claim of the stage whose settings these are.

    `ValueError` if scores or steps would be made with factors or gradients of another model, other examples or other
    draws, or before the gradients of all queries are there.
    """
    inputs, command = gradient_inputs(testbed), "" if measure == "loss" else f" --measure {measure}"
    if isinstance(config, CollectConfig):
        return Claim(
            Collection(folder_of(testbed, measure)), config, inputs, f"python -m abu.collect training{command}"
        )
    testbed.check_curvature()
    require_own_gradients(testbed, inputs, measure)
    inputs |= hashes(testbed, [testbed.curvature])
    if isinstance(config, ScoreConfig):
        return Claim(
            Collection(scores_folder(testbed, measure)), config, inputs, f"python -m abu.collect scores{command}"
        )
    return Claim(Collection(steps_folder(testbed)), config, inputs, "python -m abu.collect steps")


def gradient_inputs(testbed: Testbed) -> dict[str, str]:
    """File -> SHA-256 of everything that gradients are computed from; a second for a few hundred MB."""
    trainset = [testbed.data / f"trainset/{name}.npy" for name in ("latents", "text_embeddings")]
    for path in trainset:
        require_file(path, f"python -m abu.encode --mode {testbed.name}")
    queries = [testbed.data / f"query_{split}/latents.npy" for split in SPLITS]
    return hashes(testbed, [testbed.source / "denoiser.safetensors", *trainset, *queries])


def hashes(testbed: Testbed, files: list[Path]) -> dict[str, str]:
    """File -> SHA-256."""
    return {input_name(testbed, path): sha256_file(require_file(path)) for path in files}


def input_name(testbed: Testbed, path: Path) -> str:
    """A file's name in manifests: its path from the testbed's root, for several of its files are called latents.npy."""
    return path.relative_to(testbed.root).as_posix() if path.is_relative_to(testbed.root) else relative(path)


def require_own_gradients(testbed: Testbed, inputs: dict[str, str], measure: str = "loss") -> None:
    """`ValueError` naming the difference unless the stored gradients are of `inputs` and of the queries' usual draws.

    Scores and steps record the numbers of these draws in their own settings, and so must not be made from others.
    """
    folder = folder_of(testbed, measure)
    if not manifest_path(folder).is_file():
        raise ValueError(f"{folder}: expected gradients, found none; collect them with: {MADE_BY['query']}")
    manifest = read_manifest(folder)
    usual = {name: getattr(CollectConfig, name) for name in ("bins", "query_draws", "judged_query_draws")}
    for field, wanted in (("config", usual), ("inputs", inputs)):
        for name, value in wanted.items():
            found = manifest[field].get(name)
            if found != value:
                raise ValueError(
                    f"{folder}: expected gradients of the model, examples and draws that are used now, found others "
                    f"({field}.{name} is {found!r}, wanted {value!r}); delete the folder to collect anew"
                )
