"""Trains one model without some images and measures it: the recipe of the reference model, in one process.

What is kept of a model is the loss of every judged query, the same draws of (t, ε) for all models, and the test queries
sampled again with their seeds where pictures are wanted; of a model trained on everything also its weights.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from abu.draws import DrawConfig
from abu.influence import mean_losses
from abu.sample import SampleConfig
from abu.train_diffusion import diffusion_loss
from abu.training import train
from benchmark.retrainable import Retrainable
from fastgda.core import best_device

WEIGHT = "weight."
"""Begins the names of the arrays that hold weights."""
LATENTS = "latents_test"
"""The test queries sampled again; not there where a model was restored from an export, which holds losses only."""
SECONDS = "seconds"
"""What its training took; nor is this."""


@dataclass(frozen=True)
class RetrainConfig:
    """What is measured on a retrained model."""

    bins: int = 10
    draws: int = 10
    """Draws of (t, ε) in each timestep bin for the loss of a query."""
    sampling_steps: int = SampleConfig.steps
    """Steps of the sampler for the queries' images."""
    seed: int = 1_000_003
    """Of the draws: none that a teacher differentiates, whose seed is 0."""

    @property
    def judged_draws(self) -> DrawConfig:
        """The (t, ε) that the loss of a query is the mean over."""
        return DrawConfig(self.bins, self.draws, seed=self.seed)


@dataclass(frozen=True)
class Retraining:
    """One model to train."""

    removed: tuple[int, ...]
    """Ids of the training images that it does not see, ascending."""
    seed: int
    """Of initial weights, order and noise."""

    @property
    def name(self) -> str:
        """Its file."""
        digest = hashlib.sha256(np.asarray(self.removed, np.int64).tobytes()).hexdigest()[:12]
        return f"without_{len(self.removed):05d}_{digest}_seed_{self.seed}.npz"


@dataclass(frozen=True)
class Untrained(Retraining):
    """The source model itself, which generated the queries: measured as it is."""

    @property
    def name(self) -> str:
        """Its file."""
        return "source.npz"


SOURCE = Untrained((), seed=0)


def run_folder(testbed: Retrainable, job: Retraining) -> Path:
    """State of a model's training until its result is stored."""
    return testbed.runs / "retrain" / job.name.removesuffix(".npz")


def forget_training(testbed: Retrainable, job: Retraining) -> None:
    """Deletes that state."""
    shutil.rmtree(run_folder(testbed, job), ignore_errors=True)


class Retrainer:
    """Trains models and measures them."""

    def __init__(self, testbed: Retrainable, config: RetrainConfig) -> None:
        self.testbed, self.config, self.device = testbed, config, best_device()
        torch.set_num_threads(1)
        self.pictures, self.loop, self.schedule = testbed.training_pictures(), testbed.diffusion_loop, testbed.schedule
        self.queries = {split: testbed.query_examples(split, self.device) for split in testbed.judged}
        self.seeds = testbed.query_seeds("test")
        self.sampler = testbed.sampler(self.device)
        self.measured: Retraining | None = None
        """The last job, whose state is still there."""

    def compute(self, job: Retraining) -> dict[str, np.ndarray]:
        """removed [R]; for each split losses_<split> [Q]; latents_test [Q, c, h, w] float16, the queries sampled
        again, where pictures are wanted; seconds, what it took; weights in float16 if it was trained on everything.

        The state of its training is kept until the next call, by which time the caller has stored the result.
        """
        began = time.perf_counter()
        if self.measured is not None:
            forget_training(self.testbed, self.measured)
            self.measured = None
        model = self.testbed.load_denoiser(self.device) if job == SOURCE else self.trained(job)
        draws = self.config.judged_draws
        losses = {
            f"losses_{split}": mean_losses([model], self.schedule, queries, draws, progress=False)[0].numpy()
            for split, queries in self.queries.items()
        }
        latents = None
        if self.sampler is not None:
            text = self.queries["test"].text
            latents = self.sampler.latents(model, text, self.seeds, self.config.sampling_steps)
        self.measured = job
        return model_arrays(job, model, losses, latents) | {SECONDS: np.array(time.perf_counter() - began)}

    def trained(self, job: Retraining) -> nn.Module:
        """The model of `job`, in evaluation mode and frozen; goes on where it was interrupted."""
        kept = torch.from_numpy(kept_images(job, len(self.pictures)))
        model = self.testbed.initial_denoiser(job.seed)
        loss = diffusion_loss(self.pictures, self.schedule, self.device, kept, self.testbed.caption_dropout)
        loop, folder = replace(self.loop, seed=job.seed), run_folder(self.testbed, job)
        train(model, loss, len(self.pictures), loop, folder, device=self.device, progress=False)
        return model.eval().requires_grad_(False)


def model_arrays(
    job: Retraining, model: nn.Module, losses: dict[str, np.ndarray], latents: Tensor | None
) -> dict[str, np.ndarray]:
    """What is kept of a model; `latents`: the test queries sampled again, where pictures are wanted."""
    found = {"removed": np.asarray(job.removed, np.int32), **losses}
    if latents is not None:
        found[LATENTS] = latents.half().cpu().numpy()
    if not job.removed and job != SOURCE:
        found |= {WEIGHT + name: value.half().cpu().numpy() for name, value in model.state_dict().items()}
    return found


@torch.inference_mode()
def decoded(decode: Callable[[Tensor], Tensor], latents: np.ndarray, device: torch.device) -> np.ndarray:
    """The picture [P, P, 3] uint8 of a query's stored latents [c, h, w]."""
    pixels = decode(torch.from_numpy(latents[None]).to(device))[0]
    return ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def kept_images(job: Retraining, images: int) -> np.ndarray:
    """Ids of the images that a model sees; `ValueError` unless those removed are some of the training set's."""
    removed = np.asarray(job.removed, np.int64)
    inside = ((removed >= 0) & (removed < images)).all()
    if len(np.unique(removed)) != len(removed) or len(removed) >= images or not inside:
        raise ValueError(
            f"{job.name}: expected to remove fewer than {images} different images with ids 0 to {images - 1}, "
            f"found {len(removed)} with ids {removed.min(initial=images)} to {removed.max(initial=-1)}"
        )
    return np.setdiff1d(np.arange(images), removed)
