"""The work of collecting exact influence, cut into pieces: unlearn each query, losses at θ0, losses at every θ_{−ẑ}.

Pieces of the third stage are made for a tile of queries and a shard of the images that any of them needs, so that what
the queries share is shared (see `abu.sweep`); the plan depends on settings, queries and candidates, never on workers.

    unlearned_<query>.npz              θ_{−ẑ} − θ0, layer by layer: change_<i> [out, in] float32
    before_<start>.npz                 losses [B, views] float64 at θ0, of images start … of all that are needed
    influence_<tile>_<start>.npz       query, image [P] and change [P, views] float32, the pairs in a fixed order
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from abu.amortised import Examples
from abu.candidates import CandidateConfig, candidate_lists
from abu.influence import ExactInfluence, training_images
from abu.layers import matrix_shape, select_layers
from abu.loss_draws import LossDraws
from abu.plan import Collection
from abu.stages import input_name
from abu.sweep import SweepConfig
from abu.testbed import Testbed
from abu.unlearn import Change, UnlearnConfig, still_weights
from fastgda.core import best_device, load_npz, manifest_path, read_manifest, require_file, sha256_file

COMMAND = "python -m abu.collect_exact"
TILED = ("influence", "scores")
"""Stages whose pieces belong to a tile of queries; the second is `abu.score_collection`'s."""
Part = TypeVar("Part")


@dataclass(frozen=True)
class PlanConfig:
    """How the work is cut."""

    tile: int = 16
    """Queries evaluated in one sweep; their key/value weights are in memory together."""
    shard: int = 128
    """Images of a piece; their noised inputs are in memory together."""

    def __post_init__(self) -> None:
        for name in ("tile", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class ExactConfig:
    """Everything that the numbers of a collection depend on."""

    split: str = "test"
    unlearning: UnlearnConfig = field(default_factory=UnlearnConfig)
    draws: LossDraws = field(default_factory=LossDraws)
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def flat(self) -> dict:
        """Field by field, for the manifest."""
        parts = (self.unlearning, self.draws, self.candidates, self.sweep, self.plan)
        return {"split": self.split} | {name: value for part in parts for name, value in asdict(part).items()}

    @staticmethod
    def of(found: dict) -> ExactConfig:
        """The inverse of `flat`, of what a manifest holds."""
        path = found["candidates"]
        found = found | {"candidates": None if path is None else Path(path)}

        def part(cls: type[Part]) -> Part:
            return cls(**{entry.name: found[entry.name] for entry in fields(cls)})  # type: ignore[arg-type]

        parts = part(UnlearnConfig), part(LossDraws), part(CandidateConfig), part(SweepConfig), part(PlanConfig)
        return ExactConfig(found["split"], *parts)


@dataclass(frozen=True)
class ExactPiece:
    """One file."""

    stage: str
    """"unlearned", "before" or "influence"."""
    start: int
    """The query, or the first image in the order of their ids."""
    stop: int
    tile: int = 0

    @property
    def name(self) -> str:
        """Its file."""
        tile = f"{self.tile:05d}_" if self.stage in TILED else ""
        return f"{self.stage}_{tile}{self.start:08d}.npz"


@dataclass(frozen=True)
class ExactPlan:
    """All pieces of a collection."""

    config: PlanConfig
    lists: np.ndarray = field(repr=False)
    """[Q, K] candidates."""

    @property
    def queries(self) -> int:
        """Q."""
        return len(self.lists)

    @cached_property
    def needed(self) -> np.ndarray:
        """Ids, ascending, of the images that any query needs."""
        return distinct(self.lists)

    def tile(self, index: int) -> range:
        """Queries of a tile."""
        return range(index * self.config.tile, min((index + 1) * self.config.tile, self.queries))

    def tile_images(self, index: int) -> np.ndarray:
        """Ids, ascending, of the images that a query of the tile needs."""
        queries = self.tile(index)
        return distinct(self.lists[queries.start : queries.stop])

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-self.queries // self.config.tile)

    def unlearned(self) -> list[ExactPiece]:
        """One piece for each query."""
        return [ExactPiece("unlearned", query, query + 1) for query in range(self.queries)]

    def before(self) -> list[ExactPiece]:
        """Losses at θ0."""
        return self._shards("before", len(self.needed), 0)

    def influence(self) -> list[ExactPiece]:
        """Loss changes, tile by tile."""
        sizes = [len(self.tile_images(index)) for index in range(self.tiles)]
        return [piece for tile, size in enumerate(sizes) for piece in self._shards("influence", size, tile)]

    def stages(self) -> dict[str, list[ExactPiece]]:
        """Name -> pieces, in the order in which they are computed."""
        return {"unlearned": self.unlearned(), "before": self.before(), "influence": self.influence()}

    def _shards(self, stage: str, total: int, tile: int) -> list[ExactPiece]:
        size = self.config.shard
        return [ExactPiece(stage, start, min(start + size, total), tile) for start in range(0, total, size)]


def distinct(lists: np.ndarray) -> np.ndarray:
    """Distinct ids, ascending, of [Q, K]; equal rows that are one row in memory are read once."""
    return np.unique(lists[:1] if lists.strides[0] == 0 else lists)


class ExactCollector:
    """Computes pieces; each worker holds one."""

    def __init__(self, testbed: Testbed, config: ExactConfig, folder: Path) -> None:
        self.testbed, self.config, self.device = testbed, config, best_device()
        self.collection = Collection(folder)
        self.plan = exact_plan(testbed, config)
        self.exact = ExactInfluence.of(testbed, config.unlearning, config.draws, config.sweep, self.device)
        self.layers = list(self.exact.sweep.layers)
        self._tile: tuple[int, list[Change]] = (-1, [])

    @cached_property
    def queries(self) -> Examples:
        """The split's queries."""
        return self.testbed.query_examples(self.config.split, self.device)

    def compute(self, piece: ExactPiece) -> dict[str, np.ndarray]:
        """The arrays of a piece."""
        stages: dict[str, Callable[[ExactPiece], dict[str, np.ndarray]]]
        stages = {"unlearned": self.unlearned, "before": self.before, "influence": self.influence}
        return stages[piece.stage](piece)

    def unlearned(self, piece: ExactPiece) -> dict[str, np.ndarray]:
        """θ_{−ẑ} − θ0 of one query, and the share of weights that rounding leaves where they are."""
        query = self.queries.rows(piece.start, piece.stop)
        change = self.exact.unlearned(query)
        arrays = {f"change_{i}": change[name].float().cpu().numpy() for i, name in enumerate(self.layers)}
        return arrays | {"still": np.array(still_weights(self.exact.model, change))}

    def before(self, piece: ExactPiece) -> dict[str, np.ndarray]:
        """Losses at θ0."""
        ids = self.plan.needed[piece.start : piece.stop]
        return {"losses": self.exact.sweep.losses(ids.tolist(), [None])[0]}

    def influence(self, piece: ExactPiece) -> dict[str, np.ndarray]:
        """Loss changes of the pairs (query of the tile, image of the shard) that are wanted."""
        queries = self.plan.tile(piece.tile)
        ids = self.plan.tile_images(piece.tile)[piece.start : piece.stop]
        needed = np.stack([np.isin(ids, self.plan.lists[query]) for query in queries])
        after = self.exact.sweep.losses(ids.tolist(), self._changes(piece.tile), needed)
        rows, columns = np.nonzero(needed)
        return {
            "query": (queries.start + rows).astype(np.int32),
            "image": ids[columns].astype(np.int64),
            "change": (after - self._before(ids))[rows, columns].astype(np.float32),
        }

    def _changes(self, tile: int) -> list[Change]:
        if self._tile[0] != tile:
            self._tile = (tile, [self._change(query) for query in self.plan.tile(tile)])
        return self._tile[1]

    def _change(self, query: int) -> Change:
        path = self.collection.path(ExactPiece("unlearned", query, query + 1))
        arrays = load_npz(path, tuple(f"change_{i}" for i in range(len(self.layers))), COMMAND)
        return {name: torch.from_numpy(arrays[f"change_{i}"]).to(self.device) for i, name in enumerate(self.layers)}

    def _before(self, ids: np.ndarray) -> np.ndarray:
        """Stored losses [B, views] at θ0."""
        places = np.searchsorted(self.plan.needed, ids)
        found = np.empty((len(ids), self.config.draws.views))
        for piece in self.plan.before():
            inside = (places >= piece.start) & (places < piece.stop)
            if inside.any():
                losses = load_npz(self.collection.path(piece), ("losses",), COMMAND)["losses"]
                found[inside] = losses[places[inside] - piece.start]
        return found


def input_hashes(testbed: Testbed, config: ExactConfig) -> dict[str, str]:
    """File -> SHA-256 of everything that a collection is computed from."""
    trainset, queries = testbed.data / "trainset", testbed.data / f"query_{config.split}"
    files = [testbed.source / "denoiser.safetensors", testbed.curvature, queries / "latents.npy"]
    files += [trainset / "latents.npy", trainset / "text_embeddings.npy"]
    flipped = trainset / "latents_flipped.npy"
    files += [flipped] if config.draws.flips and flipped.is_file() else []
    files += [config.candidates.candidates] if config.candidates.candidates else []
    return {input_name(testbed, path): recorded_hash(require_file(path)) for path in files}


def recorded_hash(path: Path) -> str:
    """The hash in the file's own manifest where its size is still the same: text of COCO's size takes long to read."""
    if manifest_path(path).is_file():
        entry = read_manifest(path)["files"].get(path.name)
        if entry and entry["bytes"] == path.stat().st_size:
            return entry["sha256"]
    return sha256_file(path)


def exact_plan(testbed: Testbed, config: ExactConfig) -> ExactPlan:
    """The plan, after checking candidates, views and captions against the training set."""
    images = training_images(testbed)
    images.check(config.draws)
    queries = len(testbed.query_captions(config.split))
    return ExactPlan(config.plan, candidate_lists(config.candidates, queries, len(images)))


def change_bytes(model: nn.Module) -> int:
    """Bytes of one query's θ_{−ẑ} − θ0 in float32."""
    shapes = [matrix_shape(layer) for layer in select_layers(model).values()]
    return 4 * sum(out * width for out, width in shapes)


def disk_bytes(plan: ExactPlan, config: ExactConfig, model: nn.Module) -> int:
    """Bytes of all pieces together."""
    pair = 4 + 8 + 4 * config.draws.views
    return plan.queries * change_bytes(model) + 8 * config.draws.views * len(plan.needed) + pair * plan.lists.size
