"""Samples query images: DDIM, 50 steps, classifier-free guidance, one stored seed per image.

    python -m abu.sample                 # query_train (1,200), query_val (60), query_test (110); about 8 minutes
    python -m abu.sample --grid results/source_model/samples.png     # prompts × sets, to look at

Prompts are "<concept>, <set> style". Concepts drawn in at least three sets are split three ways before anything is
sampled, by their words without small ones, so that no split shares a concept with another.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from abu.models import SourceModel
from abu.sampler import Sampler
from abu.testbed import GUIDANCE, SPLITS, add_testbed_flags, testbed_from
from fastgda.core import (
    atomic_path,
    best_device,
    command_line,
    command_parser,
    manifest_difference,
    save_npy,
    sha256_file,
    write_manifest,
)
from feature_extraction.emoji import read_lock
from feature_extraction.minilm import MiniLM
from feature_extraction.readers import read_split

SMALL_WORDS = frozenset(["a", "and", "at", "by", "for", "in", "of", "on", "the", "to", "with"])
GRID_CONCEPTS = (
    *("red heart", "cat face", "rocket", "hot beverage", "umbrella", "grinning face"),
    *("palm tree", "guitar", "banana", "bicycle", "pizza", "crown"),
)
QUERY_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("concept", pa.string()),
        ("set", pa.string()),
        ("seed", pa.int64()),
    ]
)


@dataclass(frozen=True)
class SampleConfig:
    """How queries are drawn and sampled."""

    steps: int = 50
    guidance: float = GUIDANCE
    """Weight w of ε_∅ + w (ε_c − ε_∅); the empty caption is all-zero token states."""
    min_sets: int = 3
    """A concept must be drawn in this many sets to become a query."""
    seed: int = 0


@dataclass(frozen=True)
class Query:
    """One prompt and the seed of its noise."""

    concept: str
    set: str
    style: str
    seed: int

    @property
    def prompt(self) -> str:
        """The caption in the form of the training set's."""
        return f"{self.concept}, {self.style} style"


def concept_key(concept: str) -> frozenset[str]:
    """Words of a concept without small ones: concepts with the same key never fall into different splits."""
    return frozenset(concept.split()) - SMALL_WORDS


def choose_queries(
    concepts: list[str], sets: list[str], sizes: dict[str, tuple[int, int]], config: SampleConfig
) -> dict[str, list[Query]]:
    """Splits concepts and gives each its sets and seeds.

    `concepts` and `sets` are the training set's columns, `sizes` is the testbed's `queries`.
    """
    drawn_in: dict[frozenset[str], set[str]] = {}
    name_of: dict[frozenset[str], str] = {}
    for concept, name in zip(concepts, sets, strict=True):
        key = concept_key(concept)
        drawn_in.setdefault(key, set()).add(name)
        name_of.setdefault(key, concept)
    eligible = sorted(name_of[key] for key, names in drawn_in.items() if key and len(names) >= config.min_sets)
    needed = {split: math.ceil(count / per_concept) for split, (count, per_concept) in sizes.items()}
    if len(eligible) < sum(needed.values()):
        raise ValueError(f"expected {sum(needed.values())} concepts in {config.min_sets} sets, found {len(eligible)}")
    order = np.random.default_rng(config.seed).permutation(len(eligible))
    styles = read_lock()
    queries: dict[str, list[Query]] = {}
    start = 0
    for offset, (split, (count, per_concept)) in enumerate(sizes.items()):
        chosen = [eligible[row] for row in order[start : start + needed[split]]]
        start += needed[split]
        # Sets in turn, so that every creator has the same number of queries in every split.
        queries[split] = [
            Query(
                chosen[i // per_concept],
                styles[i % len(styles)].set,
                styles[i % len(styles)].style,
                1_000_000 * (offset + 1) + i,
            )
            for i in range(count)
        ]
    return queries


def sample_latents(model: SourceModel, text: Tensor, seeds: list[int], config: SampleConfig) -> Tensor:
    """Standardised latents [B, c, h, w] for token states [B, T, d]; each image's noise depends on its seed only."""
    sampler = Sampler.of(model, config.guidance)
    return sampler.latents(model.denoiser, text.to(model.device), seeds, config.steps)


def to_images(model: SourceModel, latents: Tensor) -> list[Image.Image]:
    """RGB images of standardised latents."""
    with torch.inference_mode():
        pixels = (model.autoencoder.decode(latents.to(model.device)) + 1) * 127.5
    arrays = pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def sample_queries(
    model: SourceModel, encoder: MiniLM, queries: list[Query], config: SampleConfig, batch_size: int = 64
) -> tuple[Tensor, Tensor, list[Image.Image]]:
    """(latents [Q, c, h, w], token states [Q, T, d], both on the CPU, images) of `queries`, in order."""
    latents, texts, images = [], [], []
    bar = tqdm(total=len(queries), desc="sample", unit="image")
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size]
        text = encoder.token_states([query.prompt for query in batch])
        latents.append(sample_latents(model, text, [query.seed for query in batch], config).cpu())
        texts.append(text.cpu())
        images += to_images(model, latents[-1])
        bar.update(len(batch))
    bar.close()
    return torch.cat(latents), torch.cat(texts), images


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def write_queries(
    folder: Path, queries: list[Query], latents: Tensor, text: Tensor, images: list[Image.Image]
) -> tuple[Path, Path]:
    """Writes `queries.parquet` and `latents.npy`, and beside them token states [Q, 1, T, d] that can be had again."""
    rows = [
        {
            "id": index,
            "image": png_bytes(image),
            "captions": [query.prompt],
            "concept": query.concept,
            "set": query.set,
            "seed": query.seed,
        }
        for index, (query, image) in enumerate(zip(queries, images, strict=True))
    ]
    parquet, array = folder / "queries.parquet", folder / "latents.npy"
    with atomic_path(parquet) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, QUERY_SCHEMA), temporary)
    save_npy(array, latents.numpy())
    save_npy(folder / "text_embeddings.npy", text[:, None].numpy())
    return parquet, array


def grid_concepts(known: Sequence[str], queries: Sequence[Query]) -> tuple[str, ...]:
    """Concepts to look at: those of `GRID_CONCEPTS` that the training set has, then the queries'."""
    common = set(known).intersection(GRID_CONCEPTS)
    asked = dict.fromkeys([*(c for c in GRID_CONCEPTS if c in common), *(query.concept for query in queries)])
    return tuple(asked)[: len(GRID_CONCEPTS)]


def sample_grid(model: SourceModel, encoder: MiniLM, config: SampleConfig, concepts: tuple[str, ...]) -> Image.Image:
    """Concepts down, sets across."""
    styles = read_lock()
    queries = [Query(concept, e.set, e.style, seed) for seed, concept in enumerate(concepts) for e in styles]
    *_, images = sample_queries(model, encoder, queries, config)
    side = images[0].width
    sheet = Image.new("RGB", (len(styles) * (side + 2), len(concepts) * (side + 2)), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % len(styles) * (side + 2), index // len(styles) * (side + 2)))
    return sheet


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m abu.sample", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--guidance", type=float, default=SampleConfig.guidance, help="classifier-free guidance weight")
    parser.add_argument("--seed", type=int, default=SampleConfig.seed, help="seed of the split into queries")
    parser.add_argument("--grid", type=Path, help="only draw a grid of prompts × sets into this PNG")
    args = parser.parse_args(argv)
    config = SampleConfig(guidance=args.guidance, seed=args.seed)
    testbed = testbed_from(args)
    model, encoder = testbed.load_source(best_device()), MiniLM()
    table = read_split(testbed.data, "data")
    queries = choose_queries(table.concepts, table.sets, testbed.queries, config)
    if args.grid:
        with atomic_path(args.grid) as temporary:
            sample_grid(model, encoder, config, grid_concepts(table.concepts, queries["test"])).save(temporary)
        return
    weights = [testbed.source / f"{part}.safetensors" for part in ("denoiser", "autoencoder")]
    inputs = {path.stem: sha256_file(path) for path in weights}
    for split in args.splits:
        folder = testbed.data / f"query_{split}"
        if manifest_difference(folder, config, inputs) is None:
            print(f"{folder}: up to date")
            continue
        latents, text, images = sample_queries(model, encoder, queries[split], config)
        files = write_queries(folder, queries[split], latents, text, images)
        write_manifest(folder, config, command=f"python -m abu.sample --mode {args.mode}", inputs=inputs, files=files)
        print(f"{folder}: {len(images)} queries")


if __name__ == "__main__":
    sys.exit(main())
