"""A testbed of a few latents on disk, on which models train in a moment: for tests of the judges of attribution."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from abu.models import Autoencoder, AutoencoderConfig, DiffusionConfig, SourceModel, build_denoiser, save_source
from abu.sample import QUERY_SCHEMA
from abu.testbed import TESTBEDS, Testbed
from abu.training import LoopConfig
from fastgda.core import save_npy
from feature_extraction.emoji import SCHEMA

IMAGES, QUERIES, SETS = 30, {"train": 2, "val": 3, "test": 4}, ("noto", "twemoji", "openmoji")


def small_testbed(root: Path) -> Testbed:
    """`emoji-mini` with a model of few weights, trained for a few steps, its data under `root`."""
    return replace(
        TESTBEDS["emoji-mini"],
        autoencoder=AutoencoderConfig(latent_channels=2, channels=(8, 8, 8)),
        diffusion=DiffusionConfig(
            sample_size=4, latent_channels=2, channels=(16, 16), heads=2, prediction="v_prediction"
        ),
        diffusion_loop=LoopConfig(steps=3, batch_size=8, learning_rate=2e-3, warmup=1, ema=0.5),
        root=root,
    )


def write_small_testbed(root: Path) -> Testbed:
    """Writes its random latents, captions of three sets, queries and untrained source model."""
    testbed, random = small_testbed(root), np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser, autoencoder = build_denoiser(testbed.diffusion), Autoencoder(testbed.autoencoder)
        save_source(SourceModel(denoiser, autoencoder, testbed.diffusion, testbed.autoencoder), testbed.source)
    save_npy(testbed.data / "trainset/latents.npy", random.normal(size=(IMAGES, 2, 4, 4)).astype(np.float32))
    save_npy(testbed.data / "trainset/text_embeddings.npy", random.normal(size=(IMAGES, 1, 16, 384)).astype(np.float16))
    rows = [
        {"key": f"{i}", "licence": "", "creator": "", **_row(i, f"thing {i}", SETS[i % len(SETS)])}
        for i in range(IMAGES)
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), testbed.parquet)
    for split, count in QUERIES.items():
        folder = testbed.data / f"query_{split}"
        save_npy(folder / "latents.npy", random.normal(size=(count, 2, 4, 4)).astype(np.float32))
        rows = [{**_row(i, f"{split} {i}", SETS[i % len(SETS)]), "seed": i} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows, QUERY_SCHEMA), folder / "queries.parquet")
        save_npy(folder / "text_embeddings.npy", random.normal(size=(count, 1, 16, 384)).astype(np.float32))
    return testbed


def _row(index: int, concept: str, name: str) -> dict:
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (8 * index % 256, 100, 50)).save(picture, "PNG")
    return {
        "id": index,
        "image": picture.getvalue(),
        "captions": [f"{concept}, {name} style"],
        "concept": concept,
        "set": name,
    }
