"""Collects the teacher's scores for all queries, in resumable pieces.

    python -m abu.collect curvature        # EK-FAC factors of the source model; about 4 minutes on two cores
    python -m abu.collect queries          # whitened gradients of every query
    python -m abu.collect training         # one pass over the training set; --first_pass, --passes: further ones
    python -m benchmark.teacher            # merges them into influence_{train,val,test}.npz

Each piece is written atomically under data/emoji/cache/teacher; what exists is not computed again, and pieces of
different settings, models or queries are never mixed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from abu.amortised import RUNS, Examples, GradientEngine, QueryMatrix, Sketch, score_block
from abu.curvature import EKFAC, CurvatureConfig, fit_curvature
from abu.draws import DrawConfig
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from fastgda.core import (
    best_device,
    command_line,
    load_npz,
    manifest_difference,
    manifest_path,
    save_npz,
    sha256_file,
    write_manifest,
)

SHARD = 256


@dataclass(frozen=True)
class CollectConfig:
    """How many draws the scores are averaged over."""

    bins: int = 5
    """Timestep bins; the normalised teacher is a mean of cosines over them."""
    training_draws: int = 2
    """Draws per timestep bin, run and pass for each training image: one antithetic pair."""
    query_draws: int = 8
    """Draws per bin and run for each training query."""
    judged_query_draws: int = 40
    """The same for validation and test queries, which judge the ranker."""
    sketch: int = 38_400
    """Numbers kept of each whitened gradient."""
    seed: int = 0
    bf16: bool = False


def query_piece(folder: Path, split: str, start: int) -> Path:
    """Gradients of one shard of queries."""
    return folder / f"query_{split}_{start:06d}.npz"


def training_piece(folder: Path, index: int, start: int) -> Path:
    """Scores of one shard of training images in one pass."""
    return folder / f"pass_{index}_{start:06d}.npz"


def claim(testbed: Testbed, folder: Path, config: CollectConfig) -> None:
    """Marks `folder` as holding pieces of these settings, model and queries; `ValueError` if it holds others."""
    inputs = {path.stem: sha256_file(path) for path in (testbed.source / "denoiser.safetensors", testbed.curvature)}
    inputs |= {f"query_{split}": sha256_file(testbed.data / f"query_{split}/latents.npy") for split in SPLITS}
    if not manifest_path(folder).is_file():
        if any(folder.glob("*.npz")):
            raise ValueError(f"{folder}: expected a manifest beside the pieces, found none; delete the folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, config, command="python -m abu.collect", inputs=inputs)
    difference = manifest_difference(folder, config, inputs)
    if difference is not None:
        raise ValueError(f"{folder}: expected pieces of the same settings ({difference}); delete the folder")


def collect_queries(engine: GradientEngine, testbed: Testbed, folder: Path, config: CollectConfig) -> None:
    """Writes vectors [runs, bins, B, sketch] (float16, scaled to norm one with `norms`) of every query shard."""
    device = engine.sketch.factor.device
    for split in SPLITS:
        examples = testbed.query_examples(split, device)
        draws = config.query_draws if split == "train" else config.judged_query_draws
        for start in tqdm(range(0, len(examples.ids), 64), desc=f"queries {split}", unit="shard"):
            path = query_piece(folder, split, start)
            if path.is_file():
                continue
            batch = examples.rows(start, start + 64)
            drawing = DrawConfig(config.bins, draws, timesteps=len(engine.schedule), seed=config.seed)
            vectors = torch.stack([engine(batch, drawing, run) for run in range(RUNS)])
            norms = vectors.norm(dim=-1, keepdim=True)
            save_npz(path, vectors=(vectors / norms).half().cpu().numpy(), norms=norms.cpu().numpy())


def load_queries(folder: Path, split: str, count: int) -> torch.Tensor:
    """Sketched gradients [runs, bins, Q, sketch] of a split."""
    parts = []
    for start in range(0, count, 64):
        piece = load_npz(query_piece(folder, split, start), ("vectors", "norms"), "python -m abu.collect queries")
        parts.append(torch.from_numpy(piece["vectors"]).float() * torch.from_numpy(piece["norms"]))
    return torch.cat(parts, dim=2)


def collect_training(
    engine: GradientEngine,
    examples: Examples,
    queries: dict[str, torch.Tensor],
    folder: Path,
    config: CollectConfig,
    index: int,
) -> None:
    """Pass `index` over the training set: writes the scores of every shard, see `training_piece`.

    Arrays: plain, normalised [Q, B] for all queries with both runs pooled; for validation and test queries, with
    independent draws on both sides, plain_runs [runs, Q', B] and normalised_terms [runs, bins, Q', B] (float16), whose
    mean over bins is the normalised score.
    """
    dtype = torch.bfloat16 if config.bf16 else None
    pooled = QueryMatrix.of(torch.cat([vectors.mean(0) for vectors in queries.values()], dim=1), dtype)
    judged = torch.cat([queries[split] for split in SPLITS if split != "train"], dim=2)
    halves = [QueryMatrix.of(judged[run], dtype) for run in range(RUNS)]
    drawing = DrawConfig(config.bins, config.training_draws, timesteps=len(engine.schedule), seed=config.seed)
    starts = [s for s in range(0, len(examples.ids), SHARD) if not training_piece(folder, index, s).is_file()]
    for start in tqdm(starts, desc=f"training pass {index}", unit="shard"):
        columns: dict[str, list[torch.Tensor]] = {}
        for low in range(start, min(start + SHARD, len(examples.ids)), 64):
            batch = examples.rows(low, min(low + 64, start + SHARD))
            vectors = [engine(batch, drawing, RUNS * index + run) for run in range(RUNS)]
            plain, terms = score_block(pooled, (vectors[0] + vectors[1]) / 2)
            columns.setdefault("plain", []).append(plain)
            columns.setdefault("normalised", []).append(terms.mean(0))
            runs = [score_block(half, vector) for half, vector in zip(halves, vectors, strict=True)]
            columns.setdefault("plain_runs", []).append(torch.stack([plain for plain, _ in runs]))
            columns.setdefault("normalised_terms", []).append(torch.stack([terms for _, terms in runs]).half())
        save_npz(
            training_piece(folder, index, start),
            **{name: torch.cat(parts, dim=-1).cpu().numpy() for name, parts in columns.items()},
        )


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m abu.collect", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("curvature", "queries", "training"))
    add_testbed_flags(parser)
    parser.add_argument("--first_pass", type=int, default=0, help="number of the first pass; each has its own draws")
    parser.add_argument("--passes", type=int, default=1, help="passes over the training set")
    parser.add_argument("--sketch", type=int, default=CollectConfig.sketch, help="numbers kept of a gradient")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products")
    args = parser.parse_args(argv)
    testbed, device, config = testbed_from(args), best_device(), CollectConfig(bf16=args.bf16, sketch=args.sketch)
    source = testbed.load_source(device)
    folder = testbed.data / "cache/teacher"
    if args.stage == "curvature":
        examples, settings = testbed.training_examples(device), CurvatureConfig()
        factors = fit_curvature(source.denoiser, source.schedule, examples.latents, examples.text, settings)
        factors.save(testbed.curvature)
        inputs = {"denoiser": sha256_file(testbed.source / "denoiser.safetensors")}
        write_manifest(testbed.curvature, settings, command="python -m abu.collect curvature", inputs=inputs)
        return
    claim(testbed, folder, config)
    factors = EKFAC.load(testbed.curvature).to(device)
    engine = GradientEngine(source.denoiser, source.schedule, factors, Sketch.of(factors, config.sketch, config.seed))
    if args.stage == "queries":
        collect_queries(engine, testbed, folder, config)
        return
    counts = {split: len(testbed.query_captions(split)) for split in SPLITS}
    queries = {split: load_queries(folder, split, count) for split, count in counts.items()}
    examples = testbed.training_examples(device)
    for index in range(args.first_pass, args.first_pass + args.passes):
        collect_training(engine, examples, queries, folder, config, index)


if __name__ == "__main__":
    sys.exit(main())
