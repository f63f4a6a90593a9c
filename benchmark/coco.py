"""MSCOCO with the released model, to be trained again: `--mode coco` of `benchmark.retrain`, `removal` and `lds`.

Files are those of the release (README, "Files of the released data"). Token states, 93 GB in float16, are mapped and
read a batch at a time; a picture is flipped at random and has one of its captions at random, both keyed by (seed, step)
like everything else in a step.

The recipe is the one that is known of the released model: 200 epochs, batches of 128, learning rate 1e-4, random flips
(Wang et al. 2024, arXiv 2406.09408, section 4.1 and appendix), shape and schedule of the release. Ours, as nothing is
said of them: AdamW without weight decay, 500 steps of warm-up and a cosine (`abu.training`), gradients clipped to norm
1, averaged weights (decay 0.9999), bfloat16 autocast, no caption left out. A model without some images takes as many
steps as one with all of them.

Only test queries are judged, each a concept of its own; there are no creators. The released queries come without seeds,
so that the number of a query is its seed, and pictures of retrained models are compared with those of the reference
models from the same seed: guided with weight 7.5 towards the empty caption's states as the released queries, but by 50
steps of DDIM instead of 1,000 of DDPM. Both, autoencoder and empty caption, need Stable Diffusion 2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from abu.amortised import Examples
from abu.coco import CocoModel, coco_sampling_schedule, coco_schedule, initial_coco, load_coco, read_model
from abu.diffusion_loss import NoiseSchedule
from abu.encoded import LATENTS, TEXT, EncodedPictures
from abu.pipelines import PipelineEncoder
from abu.sampler import Sampler
from abu.training import LoopConfig
from fastgda.core import ROOT, require_file
from fastgda.dataset import RANK, layout
from fastgda.rankings import load_rankings
from feature_extraction.sources import read_coco

COCO = "coco"
EPOCHS, BATCH_SIZE, LEARNING_RATE = 200, 128, 1e-4
GUIDANCE = 7.5
PIPELINE = "stabilityai/stable-diffusion-2"
DOWNLOAD = RANK[COCO]
"""The command that fetches the release."""


@dataclass(frozen=True)
class Coco:
    """The release under `root`; fills `benchmark.retrainable.Retrainable`."""

    root: Path = ROOT
    bf16: bool = True
    compile: bool = False
    pipeline: str | None = None
    """Stable Diffusion 2: a folder that diffusers saved, or its name on the hub. None: no pictures."""

    name = layout = COCO
    judged = ("test",)
    caption_dropout = 0.0

    @property
    def data(self) -> Path:
        """The released files."""
        return self.root / "data" / COCO

    @property
    def runs(self) -> Path:
        """State of unfinished training runs."""
        return self.root / "runs" / COCO

    @property
    def model(self) -> CocoModel:
        """Shape of the denoiser and settings of its training."""
        return read_model(self.data / "model.bin")

    @property
    def images(self) -> int:
        """N."""
        return len(self.training_pictures())

    @property
    def diffusion_loop(self) -> LoopConfig:
        """The recipe in the module's docstring, but for what `model.json` says; `ValueError` if that is no setting."""
        settings = self.model.training
        batch = settings.get("batch_size", BATCH_SIZE)
        loop = LoopConfig(round(EPOCHS * self.images / batch), batch, LEARNING_RATE, warmup=500, ema=0.9999)
        try:
            return replace(loop, **settings, bf16=self.bf16, compile=self.compile)
        except TypeError as error:
            raise ValueError(f"{self.data / 'model.json'}: expected settings of training, found {error}") from error

    @property
    def recipe(self) -> dict[str, Any]:
        """What a model of one seed is trained with; compiling it changes no more than rounding."""
        return {"denoiser": self.model.denoiser, "loop": asdict(replace(self.diffusion_loop, compile=False))}

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels and target of the loss."""
        return coco_schedule()

    def training_files(self) -> dict[str, Path]:
        """Files that retrained models and their losses depend on; `ValueError` naming one that does not fit.

        Token states are too large to be hashed: the captions stand for them.
        """
        annotations = self.data / "trainset/annotations/captions_train2017.json"
        files = {
            "latents": self.data / "trainset" / LATENTS,
            "captions": annotations,
            "model": self.data / "model.bin",
            **{f"query_{split}": self.data / f"query_{split}" / LATENTS for split in self.judged},
        }
        for path in files.values():
            require_file(path, DOWNLOAD)
        listed = len(read_coco(annotations))
        if listed != self.images:
            text = self.data / "trainset" / TEXT
            raise ValueError(f"{text}: expected captions of the {listed} images of {annotations}, found {self.images}")
        return files

    def score_files(self, split: str) -> dict[str, Path]:
        """Files that scores of a split's queries are made from."""
        files = {
            "training": self.data / "trainset" / LATENTS,
            "queries": self.data / f"query_{split}" / LATENTS,
            "model": self.data / "model.bin",
        }
        return {name: require_file(path, DOWNLOAD) for name, path in files.items()}

    def initial_denoiser(self, seed: int) -> nn.Module:
        """The untrained denoiser of a seed."""
        return initial_coco(self.model, seed)

    def load_denoiser(self, device: torch.device) -> nn.Module:
        """The released model's."""
        return load_coco(require_file(self.data / "model.bin", DOWNLOAD), device).denoiser

    def training_pictures(self) -> EncodedPictures:
        """The training set, mapped; `ValueError` unless every picture is there unflipped and flipped."""
        pictures = self._open("trainset", "train")
        if pictures.views != 2:
            raise ValueError(
                f"{self.data / 'trainset' / LATENTS}: expected latents of {2 * len(pictures)} pictures, unflipped and "
                f"then flipped, found {len(pictures.latents)}"
            )
        return pictures

    def query_examples(self, split: str, device: torch.device) -> Examples:
        """The generated images of a split with their prompts."""
        queries = self._open(f"query_{split}", split)
        return queries.examples(range(len(queries)), device)

    def query_captions(self, split: str) -> list[str]:
        """Prompts of a split's queries, one a line in `captions.txt`."""
        path = require_file(self.data / f"query_{split}/captions.txt", DOWNLOAD)
        lines, count = path.read_text(encoding="utf-8", errors="replace").splitlines(), len(self.query_seeds(split))
        if len(lines) != count:
            raise ValueError(
                f"{path}: expected a line for each of the {count} queries of {LATENTS}, found {len(lines)}"
            )
        return lines

    def query_concepts(self, split: str) -> list[str]:
        """The queries' numbers: each is a concept of its own."""
        return [f"{row}" for row in self.query_seeds(split)]

    def query_sets(self, split: str) -> list[str]:
        """Nobody's."""
        return [""] * len(self.query_seeds(split))

    def training_sets(self) -> list[str]:
        """Nobody's."""
        return [""] * self.images

    def query_seeds(self, split: str) -> list[int]:
        """The queries' numbers."""
        return list(range(len(self._open(f"query_{split}", split))))

    def sampler(self, device: torch.device) -> Sampler | None:
        """`None` without a pipeline; `ValueError` if it is not there, or not that of the queries' token states."""
        if self.pipeline is None:
            return None
        try:
            encoder = PipelineEncoder(self.pipeline, device)
        except ValueError as error:
            raise ValueError(
                f"--pipeline: expected {PIPELINE} (vae, text_encoder, tokenizer) to be downloaded, in the cache of the "
                f"hub or a folder; leave the flag out for ΔL alone; found: {error}"
            ) from error
        shape = self.model.latent_shape
        empty = encoder.text([""], 8 * shape[1])[0]
        wanted = list(self._open("query_test", "test").text.shape[2:])
        if list(empty.shape) != wanted:
            raise ValueError(f"{self.pipeline}: expected token states {wanted} of a caption, found {list(empty.shape)}")
        return Sampler(shape, coco_sampling_schedule(), GUIDANCE, encoder.decode, empty)

    def influence(self, split: str) -> np.ndarray:
        """The released influence [Q, N] on every training image, AbU+'s; where a file has ranks alone, their order."""
        path = layout(COCO, "", self.data).ranking(split)
        found = load_rankings(path, self.images, made_by=DOWNLOAD)
        if found.candidates != self.images:
            raise ValueError(f"{path}: expected influence on all {self.images} images, found it on {found.candidates}")
        places = np.broadcast_to(-np.arange(self.images, dtype=np.float32), found.rank.shape)
        scores = np.empty(found.rank.shape, np.float32)
        np.put_along_axis(scores, found.rank, places if found.score is None else found.score, axis=1)
        return scores

    def _open(self, folder: str, role: str) -> EncodedPictures:
        place = self.data / folder
        for name in (LATENTS, TEXT):
            require_file(place / name, DOWNLOAD)
        pictures = EncodedPictures.open(place, role)
        pictures.require_fit(place, self.model.latent_shape, self.model.text_width)
        return pictures
