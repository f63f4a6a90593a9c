"""Projected gradients on disk: collected in pieces that nothing can lose, by one process or Ray workers.

data/<mode>/cache/projected/<name>/ holds pieces of the training set ("pass_0_…") and of the validation and test
queries ("query_…"), each with `features` [B, k] and `residual` [B]; <name>-train those of the training queries, which
only a teacher needs. A piece that exists is never computed again, and pieces of other settings, models or queries are
refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abu.amortised import Examples
from abu.cluster import ClusterConfig, run_plan
from abu.curvature import Curvature
from abu.estimate import Estimate, estimate
from abu.fisher import CurvatureConfig, fit_testbed
from abu.kronfluence_files import load_curvature
from abu.models import SourceModel, sampling_schedule
from abu.plan import Collection, Piece, cut
from abu.sample import SampleConfig
from abu.stages import examples_of
from abu.testbed import JUDGED, Testbed
from benchmark.projected import FeatureConfig, ProjectedGradients
from benchmark.retrain import load_reference, reference_file
from fastgda.core import best_device, keyed_generator, load_npz, manifest_difference, require_file, sha256_file

PIECE = 64
"""Examples of a piece."""


@dataclass(frozen=True)
class StoreConfig:
    """What is kept in one folder."""

    features: FeatureConfig
    model: int = 0
    """0 is the source model; m > 0 the m-th model of `python -m benchmark.retrain reference`."""
    journey: bool = False
    """Queries' gradients along the way on which they were sampled (JourneyTRAK); no training images."""
    steps: int = 10
    """Sampling steps of that way, evenly spaced over the sampler's."""

    @property
    def name(self) -> str:
        """Its folder."""
        f = self.features
        parts = [f.measure, f.layers, f.curvature, str(f.projection), f"{f.bins}x{f.draws}"]
        parts += [f"queries_{f.query_draws}"] * (f.query_draws != FeatureConfig.query_draws)
        parts += [f"damping_{f.damping:g}"] * (f.curvature != "none")
        parts += ["normalised"] * f.normalised + ["journey"] * self.journey + [f"model_{self.model}"] * (self.model > 0)
        return "-".join(parts if f.only is None else [*parts, f"bin_{f.only}"])

    @property
    def settings(self) -> dict[str, Any]:
        """What the folder's manifest says: the usual damping where nothing is damped, and nothing of a choice of bins
        where there is none, as before there was one.
        """
        found = asdict(self)
        if self.features.curvature == "none":
            found["features"]["damping"] = FeatureConfig.damping
        if self.features.only is None:
            del found["features"]["only"]
        return found


class GradientWorker:
    """Computes pieces of one folder."""

    def __init__(self, testbed: Testbed, config: StoreConfig) -> None:
        self.testbed, self.config, self.device = testbed, config, best_device()
        self.source = load_member(testbed, config.model, self.device)
        curvature = load_factors(testbed, config, self.source)
        self.engine = ProjectedGradients(self.source.denoiser, self.source.schedule, config.features, curvature)
        self._examples: dict[str, Examples] = {}

    def compute(self, piece: Piece) -> dict[str, np.ndarray]:
        """features [B, k] and, but for a journey, residual [B]."""
        if piece.examples not in self._examples:
            self._examples[piece.examples] = examples_of(self.testbed, piece.examples, self.device)
        examples = self._examples[piece.examples].rows(piece.start, piece.stop)
        settings = self.config.features
        if self.config.journey:
            seeds = self.testbed.query_seeds(piece.examples)[piece.start : piece.stop]
            way = sampling_journey(self.source, examples.text, seeds, SampleConfig(), self.config.steps)
            found = self.engine.journey(examples, *way, settings.query_draws, settings.seed)
            return {"features": found.float().cpu().numpy()}
        draws = settings.draws_of(piece.examples, len(self.source.schedule))
        features, residual = self.engine(examples, draws)
        return {"features": features.float().cpu().numpy(), "residual": residual.float().cpu().numpy()}


@torch.inference_mode()
def sampling_journey(
    source: SourceModel, text: Tensor, seeds: list[int], config: SampleConfig, steps: int
) -> tuple[Tensor, Tensor]:
    """(E[x_0 | x_t] [S, B, c, h, w], timesteps [S]) at `steps` evenly spaced steps of the sampler, guided as it is."""
    shape = (source.config.latent_channels, source.config.sample_size, source.config.sample_size)
    noise = [torch.randn(shape, generator=keyed_generator("query", seed)) for seed in seeds]
    latents, schedule = torch.stack(noise).to(source.device), sampling_schedule(source.config)
    schedule.set_timesteps(config.steps)
    kept = set(np.linspace(0, config.steps - 1, steps).round().astype(int).tolist())
    both = torch.cat([torch.zeros_like(text), text])
    predicted, timesteps = [], []
    for index, timestep in enumerate(schedule.timesteps):
        empty, conditional = source.denoiser(latents.repeat(2, 1, 1, 1), timestep, both).sample.chunk(2)
        step = schedule.step(empty + config.guidance * (conditional - empty), timestep, latents)
        if index in kept:
            predicted.append(step.pred_original_sample)
            timesteps.append(timestep)
        latents = step.prev_sample
    return torch.stack(predicted), torch.stack(timesteps)


def load_member(testbed: Testbed, model: int, device: torch.device) -> SourceModel:
    """The source model, or the same with the weights of a model trained again on everything."""
    source = testbed.load_source(device)
    if model:
        source.denoiser.load_state_dict(load_reference(testbed, model - 1, source.denoiser))
    return source


def factors_folder(testbed: Testbed, config: StoreConfig) -> Path:
    """Where the factors of a curvature are kept."""
    f = config.features
    return testbed.data / "cache/curvature" / f"{f.curvature}-{f.layers}"


def load_factors(testbed: Testbed, config: StoreConfig, source: SourceModel) -> Curvature | None:
    """The curvature that the gradients are whitened with, fitted where it is not on disk; its damping is replaced."""
    f = config.features
    if f.curvature == "none":
        return None
    if config.model:
        raise ValueError(f"{config.name}: expected the source model for a method with curvature, found another")
    wanted, folder = CurvatureConfig(f.curvature, f.layers), factors_folder(testbed, config)
    inputs = {"denoiser": sha256_file(testbed.source / "denoiser.safetensors")}
    if manifest_difference(folder, wanted, inputs) is not None:
        fit_testbed(testbed, source, wanted, folder)
    found = load_curvature(folder)
    groups = tuple(replace(group.to(source.device), damping=f.damping) for group in found.groups)
    return replace(found, groups=groups)


def claimed(testbed: Testbed, config: StoreConfig, splits: tuple[str, ...] = JUDGED) -> Collection:
    """The folder; `ValueError` if it holds pieces of other settings, another model or other queries."""
    name = config.name if splits == JUDGED else f"{config.name}-{'-'.join(splits)}"
    collection = Collection(testbed.data / "cache/projected" / name)
    weights = reference_file(testbed, config.model - 1) if config.model else testbed.source / "denoiser.safetensors"
    files = {"model": weights, "training": testbed.data / "trainset/latents.npy"}
    files |= {f"query_{split}": testbed.data / f"query_{split}/latents.npy" for split in splits}
    inputs = {name: sha256_file(require_file(path)) for name, path in files.items()}
    collection.claim(config.settings, inputs, command="python -m benchmark.methods")
    return collection


def plan_of(testbed: Testbed, config: StoreConfig, splits: tuple[str, ...] = JUDGED) -> list[Piece]:
    """All pieces of a folder; the training images' lie beside those of the judged queries."""
    plan = [piece for split in splits for piece in cut("query", split, len(testbed.query_captions(split)), PIECE)]
    return plan if config.journey or splits != JUDGED else plan + cut("pass", "0", testbed.images, PIECE)


def collect(
    testbed: Testbed, config: StoreConfig, cluster: ClusterConfig | None, splits: tuple[str, ...] = JUDGED
) -> None:
    """Computes what is missing. Factors are fitted first, by this process: workers only read them."""
    collection, plan = claimed(testbed, config, splits), plan_of(testbed, config, splits)
    if collection.missing(plan):
        load_factors(testbed, config, load_member(testbed, config.model, best_device()))
        run_plan(partial(GradientWorker, testbed, config), collection, plan, cluster)


def foresee(testbed: Testbed, config: StoreConfig, workers: int, splits: tuple[str, ...] = JUDGED) -> Estimate | None:
    """Time, memory and disk that the missing pieces need; `None` if none is missing."""
    collection, plan = claimed(testbed, config, splits), plan_of(testbed, config, splits)
    if not collection.missing(plan):
        return None
    return estimate(GradientWorker(testbed, config), collection, plan, workers)


def load_store(testbed: Testbed, config: StoreConfig, part: str, key: str = "features") -> Tensor:
    """features [B, k] or residual [B] of a split or, with "training", of the training set."""
    splits = JUDGED if part in (*JUDGED, "training") else (part,)
    collection = claimed(testbed, config, splits)
    pieces = [piece for piece in plan_of(testbed, config, splits) if piece.examples == part]
    made_by = "python -m benchmark.methods"
    arrays = [load_npz(collection.path(piece), (key,), made_by)[key] for piece in pieces]
    return torch.from_numpy(np.concatenate(arrays))
