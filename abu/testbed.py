"""The testbeds: where their arrays live, the shapes of their source models and the recipes these are trained with."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.amortised import Examples
from abu.curvature import EKFAC
from abu.diffusion_loss import NoiseSchedule
from abu.encoded import LoadedPictures
from abu.models import (
    AutoencoderConfig,
    DiffusionConfig,
    SourceModel,
    initial_denoiser,
    load_source,
    noise_schedule,
)
from abu.sampler import Sampler
from abu.training import LoopConfig
from fastgda.core import ROOT, load_npy, manifest_path, read_manifest, require_file, sha256_file
from feature_extraction.minilm import MiniLM
from feature_extraction.readers import read_split, split_path

SPLITS = ("train", "val", "test")
JUDGED = ("val", "test")
"""Splits whose queries every retrained model is measured on."""
CAPTION_DROPOUT = 0.1
"""Share of the captions that training leaves out, so that sampling can be guided."""
GUIDANCE = 3.0
"""Weight of classifier-free guidance that queries are sampled with."""


@dataclass(frozen=True)
class Testbed:
    """One testbed: a dataset and the source model trained on it."""

    name: str
    autoencoder: AutoencoderConfig
    autoencoder_loop: LoopConfig
    diffusion: DiffusionConfig
    diffusion_loop: LoopConfig
    queries: dict[str, tuple[int, int]]
    """Split -> (number of queries, sets that each of its concepts is prompted in)."""
    root: Path = ROOT
    """Folder that holds `data/`, `weights/` and `runs/`."""

    @property
    def data(self) -> Path:
        """Training set, queries and rankings."""
        return self.root / "data" / self.name

    @property
    def parquet(self) -> Path:
        """Images and captions."""
        return self.data / "trainset/emoji.parquet"

    @property
    def source(self) -> Path:
        """Weights of the source model."""
        return self.root / "weights" / f"{self.name}_ldm"

    @property
    def curvature(self) -> Path:
        """The EK-FAC factors, beside the weights they belong to."""
        return self.source / "ekfac.safetensors"

    def check_curvature(self) -> None:
        """`ValueError` if the manifest of the factors says that they were fitted to other weights than the model's.

        Factors without a manifest, or fitted before it named the model, are taken as they are.
        """
        if not manifest_path(self.curvature).is_file():
            return
        fitted = read_manifest(self.curvature)["inputs"].get("denoiser")
        weights = sha256_file(require_file(self.source / "denoiser.safetensors"))
        if fitted not in (None, weights):
            raise ValueError(
                f"{self.curvature}: expected factors of the model {weights[:12]}…, found those of {fitted[:12]}…; "
                "fit them with: python -m abu.fisher fit"
            )

    def load_curvature(self, device: torch.device) -> EKFAC:
        """The EK-FAC factors; `ValueError` if they are missing, damaged or another model's."""
        self.check_curvature()
        return EKFAC.load(self.curvature).to(device)

    @property
    def runs(self) -> Path:
        """State of unfinished training runs."""
        return self.root / "runs" / self.name

    def load_source(self, device: torch.device) -> SourceModel:
        """The trained source model."""
        return load_source(self.source, device)

    @property
    def layout(self) -> str:
        """How features and rankings lie under `data` (`fastgda.dataset.layout`)."""
        return "emoji"

    @property
    def judged(self) -> tuple[str, ...]:
        """Splits whose queries retrained models are measured on."""
        return JUDGED

    @property
    def recipe(self) -> dict[str, Any]:
        """What a model of one seed is trained with."""
        return {"diffusion": asdict(self.diffusion), "loop": asdict(self.diffusion_loop)}

    @property
    def caption_dropout(self) -> float:
        """Share of the captions that training leaves out."""
        return CAPTION_DROPOUT

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels and target of the denoiser's loss."""
        return noise_schedule(self.diffusion)

    def training_files(self) -> dict[str, Path]:
        """Name -> file of all that a retrained model and its losses depend on, but for the recipe."""
        # captions by their file: token states differ by rounding from one processor to the next
        files = {"latents": self.data / "trainset/latents.npy", "captions": self.parquet}
        files |= {f"query_{split}": self.data / f"query_{split}/latents.npy" for split in self.judged}
        made_by = f"python -m abu.encode --mode {self.name}, python -m abu.sample --mode {self.name}"
        return {name: require_file(path, made_by) for name, path in files.items()}

    def score_files(self, split: str) -> dict[str, Path]:
        """Name -> file of what scores of a split's queries are made from."""
        files = {
            "training": self.data / "trainset/latents.npy",
            "queries": self.data / f"query_{split}/latents.npy",
            "model": self.source / "denoiser.safetensors",
        }
        return {name: require_file(path) for name, path in files.items()}

    def initial_denoiser(self, seed: int) -> nn.Module:
        """The untrained denoiser of a seed."""
        return initial_denoiser(self.diffusion, seed)

    def load_denoiser(self, device: torch.device) -> nn.Module:
        """The source model's denoiser."""
        return self.load_source(device).denoiser

    def sampler(self, device: torch.device) -> Sampler:
        """How the queries were sampled."""
        return Sampler.of(self.load_source(device), GUIDANCE)

    def training_pictures(self) -> LoadedPictures:
        """All training images with their first captions."""
        latents, text = self.load_arrays()
        return LoadedPictures(torch.from_numpy(latents), torch.from_numpy(text)[:, 0])

    def load_images(self) -> Tensor:
        """Training images [N, 3, P, P], uint8."""
        table = read_split(self.data, "data")
        rows = tqdm(range(len(table)), desc="images", unit="image", mininterval=1.0)
        arrays = [np.asarray(table.image(row)) for row in rows]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    @property
    def images(self) -> int:
        """N, the number of encoded training images; reads no more than the header of their latents."""
        made_by = f"python -m abu.encode --mode {self.name}"
        return len(load_npy(self.data / "trainset/latents.npy", (None,) * 4, mmap=True, made_by=made_by))

    def load_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(latents [N, c, h, w], token states [N, captions, T, d]) of the training set."""
        made_by = f"python -m abu.encode --mode {self.name}"
        latents = load_npy(self.data / "trainset/latents.npy", (None,) * 4, finite=True, made_by=made_by)
        text = load_npy(self.data / "trainset/text_embeddings.npy", (len(latents), None, None, None), made_by=made_by)
        return latents, text

    def training_examples(self, device: torch.device) -> Examples:
        """All training images: latents and token states of their first captions."""
        latents, text = self.load_arrays()
        tensors = [torch.from_numpy(array).to(device).float() for array in (latents, text[:, 0])]
        return Examples("train", list(range(len(latents))), *tensors)

    def query_captions(self, split: str) -> list[str]:
        """Prompts of one split's queries."""
        table = read_split(self.data, f"{split}_query")
        return [table.caption(row) for row in range(len(table))]

    def query_concepts(self, split: str) -> list[str]:
        """Concepts of one split's queries: those of one concept are not independent."""
        return read_split(self.data, f"{split}_query").concepts

    def query_sets(self, split: str) -> list[str]:
        """Creators that the prompts of one split's queries name."""
        return read_split(self.data, f"{split}_query").sets

    def training_sets(self) -> list[str]:
        """Creators of the training images."""
        return read_split(self.data, "data").sets

    def query_seeds(self, split: str) -> list[int]:
        """Seeds that the queries of one split were sampled with."""
        path = require_file(split_path(self.data, f"{split}_query"), f"python -m abu.sample --mode {self.name}")
        return pq.read_table(path, columns=["seed"])["seed"].to_pylist()

    def query_examples(self, split: str, device: torch.device) -> Examples:
        """The generated images of one split: stored latents, token states of their prompts (encoded where the folder
        has none).
        """
        folder, captions = self.data / f"query_{split}", self.query_captions(split)
        latents = load_npy(folder / "latents.npy", (len(captions), None, None, None), finite=True)
        stored = folder / "text_embeddings.npy"
        if stored.is_file():
            states = load_npy(stored, (len(captions), 1, None, self.diffusion.text_width), finite=True)
            text = torch.from_numpy(states)[:, 0].to(device)
        else:
            text = MiniLM(device=device).token_states(captions)
        return Examples(split, list(range(len(captions))), torch.from_numpy(latents).to(device).float(), text)


TESTBEDS = {
    "emoji": Testbed(
        "emoji",
        AutoencoderConfig(),
        LoopConfig(steps=2600, batch_size=64, learning_rate=1.5e-3, ema=0.999, bf16=True),
        DiffusionConfig(channels=(64, 128), prediction="v_prediction"),
        LoopConfig(steps=9_000, batch_size=64, learning_rate=1e-3, warmup=300, ema=0.9995),
        {"test": (110, 1), "val": (60, 1), "train": (1200, 1)},
    ),
    "emoji-mini": Testbed(
        "emoji-mini",
        AutoencoderConfig(latent_channels=16),
        LoopConfig(steps=3000, batch_size=64, learning_rate=1.5e-3, ema=0.999, bf16=True),
        DiffusionConfig(sample_size=4, latent_channels=16, channels=(48, 96), prediction="v_prediction"),
        LoopConfig(steps=1200, batch_size=64, learning_rate=2e-3, warmup=60, ema=0.99),
        {"test": (110, 3), "val": (60, 3), "train": (720, 9)},
    ),
}
"""`emoji` for the demo and the main results, `emoji-mini` for retraining experiments."""


def add_testbed_flags(parser: argparse.ArgumentParser, *others: str) -> None:
    """`--mode`, a testbed or one of `others`, and `--root`, which every command of the teacher takes."""
    modes = (*sorted(TESTBEDS), *others)
    parser.add_argument("--mode", choices=modes, default="emoji", help="which testbed (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder with data/, weights/ and runs/ (default: the repository)")


def testbed_from(args: argparse.Namespace) -> Testbed:
    """The testbed that the flags name."""
    testbed = TESTBEDS[args.mode]
    return testbed if args.root is None else replace(testbed, root=args.root)
