"""What judges read of retrained models: losses of the queries, from the models' own files or from an export of them.

    python -m benchmark.retrain export              # results/retrain/losses.npz, of all models in the cache
    python -m benchmark.retrain restore             # the other way, so that models trained later join them
    python -m benchmark.lds scores.npy              # in a clone without data: from the export

The export holds the name, the removed images (one bit an image), the seed and the losses of every model; concepts and
sets of the queries, sets of the training images; its manifest the recipe and the hashes of training set, queries and
source model, so that scores of others are refused as they are beside the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from abu.plan import Collection
from benchmark.retrainable import JUDGED_MODE, Retrainable
from benchmark.retrainer import RetrainConfig, Retraining
from benchmark.scores import load_scores, read_scores, score_inputs
from fastgda.core import (
    load_npz,
    manifest_difference,
    read_manifest,
    save_npz,
    sha256_file,
    write_manifest,
)


def folder_of(testbed: Retrainable) -> Path:
    """Where the retrained models' results are kept."""
    return testbed.data / "cache/retrain"


def export_path(testbed: Retrainable) -> Path:
    """Where their losses are exported to."""
    suffix = "" if testbed.name == JUDGED_MODE else f"_{testbed.name}"
    return testbed.root / f"results/retrain/losses{suffix}.npz"


def settings_of(testbed: Retrainable, config: RetrainConfig) -> dict[str, Any]:
    """The recipe that models are trained and measured with."""
    settings = asdict(config) | testbed.recipe
    settings["loop"].pop("seed")
    return settings


def collection_of(testbed: Retrainable, config: RetrainConfig) -> Collection:
    """The folder of a testbed's retrained models; `ValueError` if it was made with another recipe or other queries."""
    collection = Collection(folder_of(testbed))
    inputs = {name: sha256_file(path) for name, path in testbed.training_files().items()}
    collection.claim(settings_of(testbed, config), inputs, command="python -m benchmark.retrain")
    return collection


class Losses(Protocol):
    """What judges ask of the models, wherever their losses are kept."""

    @property
    def images(self) -> int:
        """N, the number of training images."""

    @property
    def recipe(self) -> dict[str, Any]:
        """What the models are trained and measured with."""

    def made_from(self, split: str) -> dict[str, str]:
        """Hashes of what scores of the queries of a split are made from (`benchmark.scores.score_inputs`)."""

    def concepts(self, split: str) -> list[str]:
        """Concepts of the queries of a split."""

    def sets(self, split: str) -> list[str]:
        """Creators of the queries of a split or, with "training", of the training images."""

    def jobs(self) -> list[Retraining]:
        """All models that are there, in the order of their names."""

    def missing(self, jobs: Sequence[Retraining]) -> list[Retraining]:
        """Models whose losses are not there."""

    def of(self, jobs: Sequence[Retraining], split: str) -> np.ndarray:
        """Losses [models, Q] of the queries of a split under each model; `ValueError` if a model is missing."""

    def scores(self, path: Path, split: str) -> np.ndarray:
        """A score file for these images and queries (`benchmark.scores.load_scores`)."""


def open_losses(testbed: Retrainable) -> Losses:
    """Those of the models in the cache or, where it has none, of the export."""
    cached = any(folder_of(testbed).glob("without_*.npz"))
    if not cached and export_path(testbed).is_file():
        return ExportedLosses(testbed)
    return CachedLosses(testbed)


@dataclass(frozen=True)
class CachedLosses:
    """Of the models' own files, beside the testbed's data."""

    testbed: Retrainable

    @cached_property
    def collection(self) -> Collection:
        """The retrained models."""
        return collection_of(self.testbed, RetrainConfig())

    @property
    def images(self) -> int:
        """See `Losses`."""
        return self.testbed.images

    @property
    def recipe(self) -> dict[str, Any]:
        """See `Losses`."""
        return settings_of(self.testbed, RetrainConfig())

    def made_from(self, split: str) -> dict[str, str]:
        """See `Losses`."""
        return score_inputs(self.testbed, split)

    def concepts(self, split: str) -> list[str]:
        """See `Losses`."""
        return self.testbed.query_concepts(split)

    def sets(self, split: str) -> list[str]:
        """See `Losses`."""
        return self.testbed.training_sets() if split == "training" else self.testbed.query_sets(split)

    def jobs(self) -> list[Retraining]:
        """See `Losses`."""
        files = sorted(self.collection.folder.glob("without_*_seed_*.npz"))
        removed = [load_npz(path, ("removed",))["removed"] for path in files]
        return [Retraining(tuple(ids.tolist()), seed_of(path.name)) for path, ids in zip(files, removed, strict=True)]

    def missing(self, jobs: Sequence[Retraining]) -> list[Retraining]:
        """See `Losses`."""
        return self.collection.missing(jobs)

    def of(self, jobs: Sequence[Retraining], split: str) -> np.ndarray:
        """See `Losses`."""
        key, made_by = f"losses_{split}", "python -m benchmark.retrain restore, or reference, halves, again or creators"
        return np.stack([load_npz(self.collection.path(job), (key,), made_by)[key] for job in jobs])

    def scores(self, path: Path, split: str) -> np.ndarray:
        """See `Losses`."""
        return load_scores(path, self.testbed, split)


class ExportedLosses:
    """Of an export, without the testbed's data; `ValueError` if it was made with another recipe."""

    def __init__(self, testbed: Retrainable) -> None:
        self.testbed, self.path = testbed, export_path(testbed)
        manifest = read_manifest(self.path)
        self.recipe = settings_of(testbed, RetrainConfig())
        difference = manifest_difference(self.path, self.recipe, manifest["inputs"])
        if difference is not None:
            raise ValueError(f"{self.path}: expected the losses of the recipe of now, found others ({difference})")
        self.inputs: dict[str, str] = manifest["inputs"]
        judged = [f"{name}_{split}" for name in ("losses", "concepts", "sets") for split in testbed.judged]
        columns = ("names", "removed", "images", "sets_training", *judged)
        self.arrays = load_npz(self.path, columns, "python -m benchmark.retrain export")
        self.rows = {name: row for row, name in enumerate(self.arrays["names"].tolist())}

    @property
    def images(self) -> int:
        """See `Losses`."""
        return int(self.arrays["images"])

    def made_from(self, split: str) -> dict[str, str]:
        """See `Losses`."""
        return {"training": self.inputs["training"], "queries": self.inputs[split], "model": self.inputs["model"]}

    def concepts(self, split: str) -> list[str]:
        """See `Losses`."""
        return self.arrays[f"concepts_{split}"].tolist()

    def sets(self, split: str) -> list[str]:
        """See `Losses`."""
        return self.arrays[f"sets_{split}"].tolist()

    @cached_property
    def models(self) -> dict[str, Retraining]:
        """Name -> model; `ValueError` if one does not lack the images that its name says."""
        removed = np.unpackbits(self.arrays["removed"], axis=1, count=self.images)
        found = {}
        for name, bits in zip(self.rows, removed, strict=True):
            found[name] = Retraining(tuple(np.flatnonzero(bits).tolist()), seed_of(name))
            if found[name].name != name:
                raise ValueError(f"{self.path}: expected {name} to lack the images of its name, found others")
        return found

    def jobs(self) -> list[Retraining]:
        """See `Losses`."""
        return list(self.models.values())

    def missing(self, jobs: Sequence[Retraining]) -> list[Retraining]:
        """See `Losses`."""
        return [job for job in jobs if job.name not in self.models]

    def of(self, jobs: Sequence[Retraining], split: str) -> np.ndarray:
        """See `Losses`."""
        missing = self.missing(jobs)
        if missing:
            raise ValueError(f"{self.path}: expected {len(jobs)} models, found no {missing[0].name}")
        return self.arrays[f"losses_{split}"][[self.rows[job.name] for job in jobs]]

    def scores(self, path: Path, split: str) -> np.ndarray:
        """See `Losses`."""
        shape = (len(self.concepts(split)), self.images)
        return read_scores(path, shape, self.made_from(split), f"{self.testbed.name}, {split} queries")


def seed_of(name: str) -> int:
    """The seed in the name of a retrained model's file."""
    return int(Path(name).stem.rsplit("_", 1)[1])


def export_losses(testbed: Retrainable) -> Path:
    """Writes the export of all models in the cache, and of those of an earlier export of the same data that the cache
    lacks; returns its path. `ValueError` if the cache has none, or if the earlier export is of other data.
    """
    cached, path = CachedLosses(testbed), export_path(testbed)
    files = sorted(cached.collection.folder.glob("without_*_seed_*.npz"))
    if not files:
        raise ValueError(f"{cached.collection.folder}: expected retrained models, found none")
    names = [f"losses_{split}" for split in testbed.judged]
    models: dict[str, dict[str, np.ndarray]] = {}
    if path.is_file():
        export = _own_export(testbed)
        for job in export.jobs():
            losses = {name: export.arrays[name][export.rows[job.name]] for name in names}
            models[job.name] = {"removed": np.asarray(job.removed, np.int32), **losses}
    models |= {file.name: load_npz(file, ("removed", *names)) for file in files}
    found = [models[name] for name in sorted(models)]
    bits = np.zeros((len(found), cached.images), bool)
    for row, arrays in zip(bits, found, strict=True):
        row[arrays["removed"]] = True
    columns = {
        "names": np.array(sorted(models)),
        "removed": np.packbits(bits, axis=1),
        "images": np.array(cached.images),
        "sets_training": np.array(cached.sets("training")),
    }
    for split in testbed.judged:
        columns[f"losses_{split}"] = np.stack([arrays[f"losses_{split}"] for arrays in found])
        columns[f"concepts_{split}"] = np.array(cached.concepts(split))
        columns[f"sets_{split}"] = np.array(cached.sets(split))
    inputs = _judged_inputs(testbed)
    save_npz(path, compress=True, **columns)
    settings = settings_of(testbed, RetrainConfig())
    write_manifest(path, settings, command="python -m benchmark.retrain export", inputs=inputs, mode=testbed.name)
    return path


def restore_losses(testbed: Retrainable) -> int:
    """Puts the exported models that the cache lacks into it and returns how many these were.

    Models trained on everything are left out: what is wanted of them are weights and pictures, which are not exported.
    `ValueError` if the export is of other data than the testbed's.
    """
    export, collection = _own_export(testbed), collection_of(testbed, RetrainConfig())
    lacking = [job for job in collection.missing(export.jobs()) if job.removed]
    for job in lacking:
        row = export.rows[job.name]
        arrays = {f"losses_{split}": export.arrays[f"losses_{split}"][row] for split in testbed.judged}
        save_npz(collection.path(job), compress=False, removed=np.asarray(job.removed, np.int32), **arrays)
    return len(lacking)


def _own_export(testbed: Retrainable) -> ExportedLosses:
    """The export, if it is of this testbed's data."""
    export = ExportedLosses(testbed)
    for name, value in _judged_inputs(testbed).items():
        if export.inputs[name] != value:
            raise ValueError(
                f"{export.path}: expected losses of this testbed, found another {name}: "
                f"SHA-256 {export.inputs[name][:12]}…, not {value[:12]}…; "
                "where models of this testbed are to be exported, delete it"
            )
    return export


def _judged_inputs(testbed: Retrainable) -> dict[str, str]:
    """Hashes of what was judged: "training", "model", and the queries by split."""
    inputs: dict[str, str] = {}
    for split in testbed.judged:
        hashes = score_inputs(testbed, split)
        inputs |= {"training": hashes["training"], "model": hashes["model"], split: hashes["queries"]}
    return inputs
