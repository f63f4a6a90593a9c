"""The work of scoring any source's training pictures, cut into pieces: each query's step, then scores tile by tile.

A piece of the second stage is made for a tile of queries and a shard of the training pictures that any of them needs: a
picture that several need goes through the network once. Pieces depend on settings and inputs, never on workers.

    steps_<query>.npz                 Δθ of eq. 1, layer by layer: change_<i> [out, in] float32; still, the share of
                                      weights that rounding leaves where they are
    scores_<tile>_<start>.npz         scores [P] float32 of the tile's wanted pairs, query by query, ids ascending

Exact scores are the same bits in any tile and shard (`abu.sweep`). Those of an expansion are the same up to float32's
rounding: pictures in another batch, or queries in another product, may be summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from abu.candidates import CandidateConfig, candidate_lists
from abu.draws import DrawConfig
from abu.encoded import LATENTS, TEXT, EncodedPictures
from abu.exact_collection import ExactPiece, ExactPlan, recorded_hash
from abu.grouped import Changes, WeightGradients, first_order_scores, second_order_scores, unlearning_steps
from abu.influence import loss_change
from abu.kronfluence_files import load_curvature
from abu.layers import select_layers
from abu.loss_draws import TrainingImages
from abu.pipelines import denoiser_inputs, open_source, source_hashes
from abu.plan import Collection
from abu.score_config import CutConfig, ScoreConfig
from abu.source import PaperSettings
from abu.sweep import Sweep, SweepConfig
from abu.unlearn import still_weights
from fastgda.core import best_device, load_npz, manifest_path, require_file, sha256_file

COMMAND = "python -m abu.score"
AMORTISED = {"first-order": first_order_scores, "second-order": second_order_scores}
"""What one pass over the training pictures gives for all queries of a tile."""


@dataclass(frozen=True)
class ScoreJob:
    """What is scored, as a worker is told."""

    source: str
    trainset: Path
    queries: Path
    curvature: Path
    folder: Path
    """Of the pieces."""
    query: tuple[int, ...] | None = None
    """Numbers of the queries; all without them."""
    config: ScoreConfig = field(default_factory=ScoreConfig)
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    cut: CutConfig = field(default_factory=CutConfig)


@dataclass(frozen=True)
class ScorePlan(ExactPlan):
    """All pieces."""

    shared: bool
    """Whether all queries have the same list."""

    def unlearned(self) -> list[ExactPiece]:
        """One piece for each query."""
        return [replace(piece, stage="steps") for piece in super().unlearned()]

    def influence(self) -> list[ExactPiece]:
        """Scores, tile by tile."""
        return [replace(piece, stage="scores") for piece in super().influence()]

    def stages(self) -> dict[str, list[ExactPiece]]:
        """Name -> pieces, in the order in which they are computed."""
        return {"steps": self.unlearned(), "scores": self.influence()}

    def wanted(self, tile: int, ids: np.ndarray) -> np.ndarray:
        """[queries of the tile, ids]: which pairs are scored."""
        queries = self.tile(tile)
        if self.shared:
            return np.ones((len(queries), len(ids)), bool)
        return np.stack([np.isin(ids, self.lists[query]) for query in queries])


@dataclass(frozen=True)
class ScoreInputs:
    """Pictures and plan of a job, mapped from their files; the source itself is not read."""

    training: EncodedPictures
    queries: EncodedPictures
    query: list[int]
    settings: PaperSettings
    plan: ScorePlan

    @staticmethod
    def of(job: ScoreJob) -> ScoreInputs:
        """`ValueError` naming a file that is missing or does not fit, or a flag that asks for what is not there."""
        training, queries = EncodedPictures.open(job.trainset), EncodedPictures.open(job.queries, "query")
        settings = job.config.resolved_for(training, job.trainset)
        query = list(range(len(queries)) if job.query is None else job.query)
        if outside := [row for row in query if not 0 <= row < len(queries)]:
            raise ValueError(f"--query: expected ids 0..{len(queries) - 1}, found {outside[0]}")
        if len(set(query)) < len(query):
            raise ValueError(f"--query: expected each query once, found {query}")
        lists = picture_lists(job, query, len(queries), len(training))
        return ScoreInputs(training, queries, query, settings, ScorePlan(job.cut, lists, _shared(job)))

    def manifest(self, job: ScoreJob) -> dict:
        """Everything that the numbers depend on, besides the files of `input_hashes`."""
        chosen = asdict(self.settings) | {"change": job.config.change, "protocol": job.config.protocol}
        stop = len(self.training) if job.config.stop is None else job.config.stop
        chosen |= {"seed": job.config.seed, "start": job.config.start, "stop": stop, "query": self.query}
        return chosen | asdict(job.cut) | asdict(job.candidates) | {"candidates": not _shared(job)}


def _shared(job: ScoreJob) -> bool:
    return job.candidates.candidates is None


def picture_lists(job: ScoreJob, query: Sequence[int], queries: int, images: int) -> np.ndarray:
    """[Q, K] training pictures of each chosen query; one row in memory where all have the same."""
    start, stop = job.config.start, images if job.config.stop is None else job.config.stop
    if not 0 <= start < stop <= images:
        raise ValueError(f"--start, --stop: expected a range within 0..{images}, found {start}..{stop}")
    lists = candidate_lists(job.candidates, queries, images)
    if not _shared(job):
        if (start, stop) != (0, images):
            raise ValueError(f"--start, --stop: expected the whole range beside --candidates, found {start}..{stop}")
        return lists[list(query)]
    row = lists[0]
    row = row[(row >= start) & (row < stop)]
    if not len(row):
        raise ValueError(f"--subset: expected a picture of it within {start}..{stop}, found none")
    return np.broadcast_to(row, (len(query), len(row)))


def input_hashes(job: ScoreJob) -> dict[str, str]:
    """Name -> SHA-256 of everything that scores are computed from, wherever it lies.

    The training captions' token states count with their size only unless a manifest has their hash: COCO's are 186 GB.
    """
    found, text = source_hashes(job.source), job.trainset / TEXT
    found[f"trainset/{TEXT}"] = recorded_hash(text) if manifest_path(text).is_file() else f"{text.stat().st_size} bytes"
    files = {"trainset": [LATENTS], "queries": [LATENTS, TEXT]}
    for folder, names in files.items():
        found |= {f"{folder}/{name}": recorded_hash(getattr(job, folder) / name) for name in names}
    factors = sorted(job.curvature.glob("*.safetensors")) if job.curvature.is_dir() else [job.curvature]
    found |= {f"curvature/{path.name}": sha256_file(require_file(path)) for path in factors}
    if job.candidates.candidates is not None:
        found["candidates"] = sha256_file(require_file(job.candidates.candidates))
    return found


class ScoreCollector:
    """Computes pieces; each worker holds one."""

    def __init__(self, job: ScoreJob, device: torch.device | None = None) -> None:
        """`ValueError` if pictures, queries or factors are not those of the source."""
        self.job, self.device, self.inputs = job, device or best_device(), ScoreInputs.of(job)
        self.plan, self.settings, self.collection = self.inputs.plan, self.inputs.settings, Collection(job.folder)
        self.source = open_source(job.source, self.device)
        expected = denoiser_inputs(self.source.denoiser)
        for folder, pictures in ((job.trainset, self.inputs.training), (job.queries, self.inputs.queries)):
            pictures.require_fit(folder, *expected)
        self.layers = select_layers(self.source.denoiser)
        self.curvature = load_curvature(job.curvature).for_layers(self.layers).to(self.device)
        self.gradients = WeightGradients(self.source.denoiser, self.source.schedule)
        self._tile: tuple[int, np.ndarray, dict[str, Tensor]] = (-1, np.empty(0), {})

    @property
    def exact(self) -> bool:
        """Whether loss changes are measured."""
        return self.job.config.change == "exact"

    @cached_property
    def query_draws(self) -> DrawConfig:
        """Draws of a query's gradient."""
        per_bin = -(-self.settings.query_draws // self.settings.timesteps)
        return DrawConfig(self.settings.timesteps, per_bin, timesteps=len(self.source.schedule), seed=self._seed)

    @property
    def _seed(self) -> int:
        return self.job.config.seed

    @cached_property
    def sweep(self) -> Sweep:
        """The exact form's losses."""
        training = self.inputs.training
        views = tuple(np.split(training.latents, training.views))
        draws = self.job.config.loss_draws(self.settings)
        images, rows = TrainingImages(views, training.text), SweepConfig(self.job.cut.batch)
        return Sweep(self.source.denoiser, self.source.schedule, images, draws, rows)

    def compute(self, piece: ExactPiece) -> dict[str, np.ndarray]:
        """The arrays of a piece."""
        stages: dict[str, Callable[[ExactPiece], dict[str, np.ndarray]]]
        stages = {"steps": self.steps, "scores": self.scores}
        return stages[piece.stage](piece)

    def gradient(self, row: int, draws: DrawConfig) -> dict[str, Tensor]:
        """Name -> ∇𝓛(ẑ, θ0) [1, out, in] of a query of the folder."""
        return self.gradients.of_query(self.inputs.queries.examples([row], self.device), draws, self.job.cut.batch)

    def step(self, gradient: Changes) -> dict[str, Tensor]:
        """Name -> Δθ [1, out, in]."""
        return unlearning_steps(self.curvature, gradient, self.settings.step, self.settings.images)

    def steps(self, piece: ExactPiece) -> dict[str, np.ndarray]:
        """Δθ of one query, and the share of weights that rounding leaves where they are."""
        change = self.step(self.gradient(self.inputs.query[piece.start], self.query_draws))
        change = {name: change[name][0] for name in self.layers}
        arrays = {f"change_{i}": matrix.float().cpu().numpy() for i, matrix in enumerate(change.values())}
        return arrays | {"still": np.array(still_weights(self.source.denoiser, change))}

    def scores(self, piece: ExactPiece) -> dict[str, np.ndarray]:
        """τ of the wanted pairs of a tile's queries and a shard of its pictures."""
        if self._tile[0] != piece.tile:
            self._tile = (piece.tile, self.plan.tile_images(piece.tile), self._changes(piece.tile))
        ids = self._tile[1][piece.start : piece.stop]
        wanted = self.plan.wanted(piece.tile, ids)
        return {"scores": self.pair_scores(ids, self._tile[2], wanted)[wanted].astype(np.float32)}

    def pair_scores(self, ids: np.ndarray, changes: Changes, wanted: np.ndarray) -> np.ndarray:
        """τ [Q, B] of the steps `changes` [Q, out, in] on the pictures `ids`, where `wanted` [Q, B].

        The mean over captions and draws, the maximum over views. Raises `ValueError` naming a picture whose score is
        not finite.
        """
        found = self._measured(ids, changes, wanted) if self.exact else self._expanded(ids, changes)
        if len(bad := np.argwhere(~np.isfinite(found) & wanted)):
            query, column = bad[0]
            raise ValueError(f"training picture {ids[column]}: expected finite scores, found {found[query, column]}")
        return found

    def _measured(self, ids: np.ndarray, changes: Changes, wanted: np.ndarray) -> np.ndarray:
        moves = [{name: matrix[row] for name, matrix in changes.items()} for row in range(len(wanted))]
        needed = np.concatenate([np.ones((1, len(ids)), bool), wanted])
        losses = self.sweep.losses(ids.tolist(), [None, *moves], needed)
        return loss_change(losses[:1], losses[1:])

    def _expanded(self, ids: np.ndarray, changes: Changes) -> np.ndarray:
        schedule, settings, batch = self.source.schedule, self.settings, self.job.cut.batch
        draws = DrawConfig(settings.timesteps, 1, timesteps=len(schedule), seed=self._seed)
        amortised, views = AMORTISED[self.job.config.change], []
        for view in range(settings.views):
            total = torch.zeros((), device=self.device)
            for caption in range(settings.captions):
                examples = self.inputs.training.examples(ids.tolist(), self.device, view=view, caption=caption)
                total = total + amortised(self.gradients, examples, changes, draws, batch_size=batch, progress=False)
            views.append(total / settings.captions)
        return torch.stack(views).amax(0).cpu().numpy()

    def _changes(self, tile: int) -> dict[str, Tensor]:
        """Name -> Δθ [Q, out, in] of a tile's queries."""
        keys = tuple(f"change_{i}" for i in range(len(self.layers)))
        pieces = self.plan.unlearned()
        found = [load_npz(self.collection.path(pieces[query]), keys, COMMAND) for query in self.plan.tile(tile)]
        return {
            name: torch.from_numpy(np.stack([arrays[key] for arrays in found])).to(self.device)
            for name, key in zip(self.layers, keys, strict=True)
        }


def merged(collection: Collection, plan: ScorePlan) -> np.ndarray:
    """τ [Q, K] float32 of every query on its own list, in the list's order; `ValueError` naming a piece of others."""
    result = np.empty(plan.lists.shape, np.float32)
    pieces: dict[int, list[ExactPiece]] = {}
    for piece in plan.influence():
        pieces.setdefault(piece.tile, []).append(piece)
    for tile, parts in pieces.items():
        ids, queries = plan.tile_images(tile), plan.tile(tile)
        scores: list[list[np.ndarray]] = [[] for _ in queries]
        for piece in parts:
            counts = plan.wanted(tile, ids[piece.start : piece.stop]).sum(1)
            found = load_npz(collection.path(piece), ("scores",), COMMAND)["scores"]
            if found.shape != (counts.sum(),):
                raise ValueError(
                    f"{collection.path(piece)}: expected scores [{counts.sum()}], found {list(found.shape)}"
                )
            for row, part in enumerate(np.split(found, np.cumsum(counts)[:-1])):
                scores[row].append(part)
        for query, shards in zip(queries, scores, strict=True):
            # pieces hold a query's pictures by id, ascending
            result[query, np.argsort(plan.lists[query])] = np.concatenate(shards)
    return result
