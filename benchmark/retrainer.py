"""Trains one model without some images and measures it: the recipe of the reference model, in one process.

What is kept of a model is the loss of every judged query, the same draws of (t, ε) for all models, and the test queries
sampled again with their seeds; of a model trained on everything also its weights.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from abu.draws import DrawConfig
from abu.influence import mean_losses
from abu.models import SourceModel, initial_denoiser, noise_schedule
from abu.sample import SampleConfig, sample_latents
from abu.testbed import Testbed
from abu.train_diffusion import diffusion_loss
from abu.training import train
from fastgda.core import best_device

JUDGED = ("val", "test")
"""Splits whose queries every retrained model is measured on."""
WEIGHT = "weight."
"""Begins the names of the arrays that hold weights."""


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


class Retrainer:
    """Trains models and measures them."""

    def __init__(self, testbed: Testbed, config: RetrainConfig) -> None:
        self.testbed, self.config, self.device = testbed, config, best_device()
        torch.set_num_threads(1)
        latents, text = testbed.load_arrays()
        self.latents, self.text = torch.from_numpy(latents), torch.from_numpy(text)[:, 0]
        self.queries = {split: testbed.query_examples(split, self.device) for split in JUDGED}
        self.seeds = {split: testbed.query_seeds(split) for split in JUDGED}
        self.autoencoder = testbed.load_source(self.device).autoencoder

    def compute(self, job: Retraining) -> dict[str, np.ndarray]:
        """removed [R]; for each split losses_<split> [Q]; latents_test [Q, c, h, w] float16, the queries sampled
        again; seconds, what it took; weights in float16 if nothing was removed.
        """
        began = time.perf_counter()
        kept = torch.from_numpy(kept_images(job, len(self.latents)))
        loop = replace(self.testbed.diffusion_loop, seed=job.seed)
        model = initial_denoiser(self.testbed.diffusion, job.seed)
        schedule = noise_schedule(self.testbed.diffusion)
        loss = diffusion_loss(self.latents, self.text, schedule, self.device, kept)
        folder = self.testbed.runs / "retrain" / job.name.removesuffix(".npz")
        train(model, loss, len(self.latents), loop, folder, device=self.device, progress=False)
        model.eval().requires_grad_(False)
        draws = self.config.judged_draws
        losses = {
            f"losses_{split}": mean_losses([model], schedule, queries, draws, progress=False)[0].numpy()
            for split, queries in self.queries.items()
        }
        source = SourceModel(model, self.autoencoder, self.testbed.diffusion, self.testbed.autoencoder)
        test = self.queries["test"]
        sampling = SampleConfig(steps=self.config.sampling_steps)
        found = model_arrays(job, model, losses, sample_latents(source, test.text, self.seeds["test"], sampling))
        shutil.rmtree(folder)
        return found | {"seconds": np.array(time.perf_counter() - began)}


def model_arrays(
    job: Retraining, model: nn.Module, losses: dict[str, np.ndarray], latents: Tensor
) -> dict[str, np.ndarray]:
    """What is kept of a trained model; `latents`: the test queries sampled again."""
    found = {"removed": np.asarray(job.removed, np.int32), **losses, "latents_test": latents.half().cpu().numpy()}
    if not job.removed:
        found |= {WEIGHT + name: value.half().cpu().numpy() for name, value in model.state_dict().items()}
    return found


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
