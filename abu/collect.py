"""Collects the teacher's scores of all queries, in pieces that nothing can lose.

    python -m abu.collect curvature                    # EK-FAC factors of the source model; 2 minutes on two cores
    python -m abu.collect queries                      # whitened gradients of every query
    python -m abu.collect training --dry_run           # time, memory and disk that a pass will need
    python -m abu.collect training                     # one pass over the training set; --passes: several
    python -m abu.collect training --workers 4         # on four Ray workers; --address: on a running cluster
    python -m abu.collect status                       # what is done, what failed, the time left
    python -m benchmark.teacher                        # merges the scores into influence_{train,val,test}.npz

Each piece is written whole under data/emoji/cache/teacher; what exists is not computed again, and pieces of different
settings, models or queries are never mixed. Passes differ in their noise only: more of them make the teacher more
reliable.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from abu.amortised import RUNS, Examples, GradientEngine, QueryMatrix, Sketch, score_block
from abu.cluster import add_cluster_flags, cluster_from, run_plan
from abu.curvature import EKFAC
from abu.draws import DrawConfig
from abu.estimate import estimate
from abu.fisher import CurvatureConfig, fit_testbed
from abu.plan import Collection, Piece, cut
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from fastgda.core import best_device, command_line, load_npz, sha256_file

BATCH, QUERY_PIECE, TRAINING_PIECE = 64, 64, 256
"""Examples computed at once, and examples of a piece."""


@dataclass(frozen=True)
class CollectConfig:
    """How many draws the scores are averaged over."""

    bins: int = 5
    """Timestep bins; the normalised teacher is a mean of cosines over them."""
    training_draws: int = 2
    """Draws per timestep bin, run and pass for each training image: one antithetic pair."""
    query_draws: int = 8
    """Draws per bin and run for each training query."""
    judged_query_draws: int = 24
    """The same for validation and test queries, which judge the ranker."""
    sketch: int = 38_400
    """Numbers kept of each whitened gradient."""
    seed: int = 0
    bf16: bool = False

    def draws(self, part: str, timesteps: int) -> DrawConfig:
        """Draws of one run for a split of the queries or, with "training", for a pass over the training set."""
        per_bin = {"training": self.training_draws, "train": self.query_draws}.get(part, self.judged_query_draws)
        return DrawConfig(self.bins, per_bin, timesteps=timesteps, seed=self.seed)


def folder_of(testbed: Testbed) -> Path:
    """Where the pieces of a testbed are kept."""
    return testbed.data / "cache/teacher"


class Collector:
    """Computes the pieces of a collection."""

    def __init__(self, testbed: Testbed, config: CollectConfig) -> None:
        device = best_device()
        source = testbed.load_source(device)
        curvature = EKFAC.load(testbed.curvature).to(device)
        sketch = Sketch.of(curvature, config.sketch, config.seed)
        self.testbed, self.config, self.device = testbed, config, device
        self.engine = GradientEngine(source.denoiser, source.schedule, curvature, sketch, bf16=config.bf16)
        self._queries: tuple[QueryMatrix, list[QueryMatrix]] | None = None
        self._examples: dict[str, Examples] = {}

    def compute(self, piece: Piece) -> dict[str, np.ndarray]:
        """The arrays of a piece, see `query_arrays` and `training_arrays`."""
        arrays = self.query_arrays(piece) if piece.stage == "query" else self.training_arrays(piece)
        return {name: tensor.cpu().numpy() for name, tensor in arrays.items()}

    def query_arrays(self, piece: Piece) -> dict[str, torch.Tensor]:
        """vectors [runs, bins, B, sketch] (float16, scaled to norm one) and their norms."""
        batch = self.examples(piece.part).rows(piece.start, piece.stop)
        draws = self.config.draws(piece.part, len(self.engine.schedule))
        vectors = torch.stack([self.engine(batch, draws, run) for run in range(RUNS)])
        norms = vectors.norm(dim=-1, keepdim=True)
        return {"vectors": (vectors / norms).half(), "norms": norms}

    def training_arrays(self, piece: Piece) -> dict[str, torch.Tensor]:
        """plain, normalised [Q, B] for all queries with both runs pooled; for validation and test queries, with
        independent draws on both sides, plain_runs [runs, Q', B] and normalised_terms [runs, bins, Q', B] (float16),
        whose mean over bins is the normalised score.
        """
        pooled, halves = self.queries()
        draws = self.config.draws("training", len(self.engine.schedule))
        columns: dict[str, list[torch.Tensor]] = {}
        for low in range(piece.start, piece.stop, BATCH):
            batch = self.examples("training").rows(low, min(low + BATCH, piece.stop))
            vectors = [self.engine(batch, draws, RUNS * int(piece.part) + run) for run in range(RUNS)]
            plain, terms = score_block(pooled, torch.stack(vectors).mean(0))
            runs = [score_block(half, vector) for half, vector in zip(halves, vectors, strict=True)]
            found = {
                "plain": plain,
                "normalised": terms.mean(0),
                "plain_runs": torch.stack([plain for plain, _ in runs]),
                "normalised_terms": torch.stack([terms for _, terms in runs]).half(),
            }
            for name, tensor in found.items():
                columns.setdefault(name, []).append(tensor)
        return {name: torch.cat(parts, dim=-1) for name, parts in columns.items()}

    def examples(self, part: str) -> Examples:
        """A split's queries or, with "training", the training images; read when first needed."""
        if part not in self._examples:
            training = part == "training"
            read = self.testbed.training_examples if training else partial(self.testbed.query_examples, part)
            self._examples[part] = read(self.device)
        return self._examples[part]

    def queries(self) -> tuple[QueryMatrix, list[QueryMatrix]]:
        """(all queries with both runs pooled, the validation and test queries of each run)."""
        if self._queries is None:
            dtype = torch.bfloat16 if self.config.bf16 else None
            splits = {split: load_queries(self.testbed, split).to(self.device) for split in SPLITS}
            judged = torch.cat([splits[split] for split in SPLITS if split != "train"], dim=2)
            pooled = torch.cat([vectors.mean(0) for vectors in splits.values()], dim=1)
            self._queries = QueryMatrix.of(pooled, dtype), [QueryMatrix.of(half, dtype) for half in judged]
        return self._queries


def load_queries(testbed: Testbed, split: str) -> torch.Tensor:
    """Sketched gradients [runs, bins, Q, sketch] of a split."""
    parts = []
    for piece in query_plan(testbed, (split,)):
        path = Collection(folder_of(testbed)).path(piece)
        arrays = load_npz(path, ("vectors", "norms"), "python -m abu.collect queries")
        parts.append(torch.from_numpy(arrays["vectors"]).float() * torch.from_numpy(arrays["norms"]))
    return torch.cat(parts, dim=2)


def query_plan(testbed: Testbed, splits: tuple[str, ...] = SPLITS) -> list[Piece]:
    """Pieces of the queries' gradients."""
    counts = {split: len(testbed.query_captions(split)) for split in splits}
    return [piece for split, count in counts.items() for piece in cut("query", split, count, QUERY_PIECE)]


def training_plan(testbed: Testbed, passes: range) -> list[Piece]:
    """Pieces of the passes over the training set."""
    images = len(testbed.load_arrays()[0])
    return [piece for index in passes for piece in cut("pass", str(index), images, TRAINING_PIECE)]


def print_status(collection: Collection, testbed: Testbed) -> None:
    """What is done, the rate, the time left, and what failed."""
    print(collection.status("queries", query_plan(testbed)))
    started = sorted({int(path.name.split("_")[1]) for path in collection.folder.glob("pass_*.npz")})
    for index in started:
        print(collection.status(f"pass {index}", training_plan(testbed, range(index, index + 1))))
    for name, error in collection.failures().items():
        print(f"failed: {name}: {error}")


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = argparse.ArgumentParser(
        prog="python -m abu.collect",
        description="Collects the teacher's scores of all queries, in pieces that nothing can lose.",
        epilog="example: python -m abu.collect training --passes 4 --workers 2",
    )
    made.add_argument("stage", choices=("curvature", "queries", "training", "status"))
    add_testbed_flags(made)
    made.add_argument("--first_pass", type=int, default=0, help="number of the first pass; each has its own draws")
    made.add_argument("--passes", type=int, default=1, help="passes over the training set")
    made.add_argument("--sketch", type=int, default=CollectConfig.sketch, help="numbers kept of a gradient")
    made.add_argument("--bf16", action="store_true", help="bfloat16 matrix products")
    add_cluster_flags(made)
    made.add_argument("--dry_run", action="store_true", help="print the time, memory and disk needed; compute nothing")
    return made


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    testbed, config = testbed_from(args), CollectConfig(bf16=args.bf16, sketch=args.sketch)
    collection = Collection(folder_of(testbed))
    if args.stage == "curvature":
        fit_testbed(testbed, testbed.load_source(best_device()), CurvatureConfig(), testbed.curvature)
        return
    if args.stage == "status":
        print_status(collection, testbed)
        return
    files = {path.stem: path for path in (testbed.source / "denoiser.safetensors", testbed.curvature)}
    files |= {f"query_{split}": testbed.data / f"query_{split}/latents.npy" for split in SPLITS}
    collection.claim(config, {name: sha256_file(path) for name, path in files.items()})
    if args.stage == "queries":
        pieces = query_plan(testbed)
    else:
        pieces = training_plan(testbed, range(args.first_pass, args.first_pass + args.passes))
    build = partial(Collector, testbed, config)
    if args.dry_run:
        print(estimate(build(), collection, pieces, args.workers or 1))
        return
    run_plan(build, collection, pieces, cluster_from(args))


if __name__ == "__main__":
    sys.exit(main())
