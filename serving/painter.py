"""Generates a picture from a prompt and a seed with the testbed's source model, as the queries were generated."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from abu.models import load_source
from abu.sample import SampleConfig, sample_latents, to_images
from fastgda.core import best_device, sha256_file
from feature_extraction.minilm import MiniLM
from serving.limits import Turn


class Painter:
    """The source model with its text encoder. Safe to use from several threads: they take turns."""

    def __init__(self, folder: Path, device: torch.device | None = None, seconds: float = 60.0) -> None:
        """Loads the source model of `folder`; a thread waits at most `seconds` for its turn."""
        device = device or best_device()
        self.config = SampleConfig()
        self.model = load_source(folder, device)
        self.identity = sha256_file(folder / "denoiser.safetensors")
        self._text = MiniLM(device=device)
        self._turn = Turn(seconds)

    def paint(self, prompt: str, seed: int) -> Image.Image:
        """The picture of `prompt` and `seed`: the same each time, and a stored query's for its prompt and seed."""
        with self._turn():
            latents = sample_latents(self.model, self._text.token_states([prompt]), [seed], self.config)
            return to_images(self.model, latents)[0]
