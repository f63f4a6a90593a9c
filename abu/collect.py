"""Collects the teacher's scores of all queries, in pieces that nothing can lose.

    python -m abu.collect curvature                    # EK-FAC factors of the source model; 2 minutes on two cores
    python -m abu.collect queries                      # gradients of every query
    python -m abu.collect steps                        # loss change after a finite step, one pass; --passes: several
    python -m abu.collect training --dry_run           # time, memory and disk that a pass will need
    python -m abu.collect training                     # one pass over the training set; --passes: several
    python -m abu.collect training --workers 4         # on four Ray workers; --address: on a running cluster
    python -m abu.collect scores                       # every query with every image, from all passes there are
    python -m abu.collect scores --query_bits 16 --memory_gb 36    # in 15 GB of memory, nothing on disk
    python -m abu.collect training --measure square    # D-TRAK's gradients, in a folder of their own
    python -m abu.collect status                       # what is done, what failed, the time left
    python -m benchmark.teacher                        # merges the scores into influence_{train,val,test}.npz

There are two ways from the queries' gradients to scores. `steps` scores every query with both terms of the loss change
as it goes (`abu.second_order`): the teacher of the testbed. `training` keeps the mean gradients of the training images,
and `scores` multiplies them with any queries: the first order alone, for steps that are infinitely small.

Each piece is written whole under data/emoji/cache/teacher; what exists is not computed again, and pieces of different
settings, models or queries are never mixed. Passes differ in their noise only: more of them make the teacher more
reliable. They keep gradients and not scores, so that new queries, or another curvature, cost no new pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from abu.amortised import (
    RUNS,
    Compression,
    Examples,
    MeanGradients,
    QueryMatrix,
    Sketch,
    score_block,
    sketched,
)
from abu.cluster import add_cluster_flags, cluster_from, run_plan
from abu.collect_config import CollectConfig, MeasuredConfig, RoundedScoreConfig, ScoreConfig, StepConfig
from abu.curvature import EKFAC
from abu.estimate import estimate
from abu.fisher import CurvatureConfig, fit_testbed
from abu.gradients import MADE_BY, compressed, load_gradients, pack, stored_vectors
from abu.measures import MEASURES
from abu.plan import Collection, Piece, Stage, cut
from abu.second_order import StepVectors, TrainingTerms, TwoFolds, loss_terms
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from abu.tiles import MEMORY_GB, QueryTiles
from fastgda.core import best_device, command_line, load_npz, relative, require_file, sha256_file

BATCH, QUERY_PIECE, TRAINING_PIECE = 64, 64, 256
"""Examples computed at once, and examples of a piece."""
SHOWN = 10
"""Failures that status prints."""
SCORED_AT_ONCE = 64
"""Training images whose whitened gradients are in memory at once: 11 MB for each and run on the testbed."""


def folder_of(testbed: Testbed, measure: str = "loss") -> Path:
    """Where the gradients of a testbed are kept; those of each measured function have their own place."""
    return testbed.data / ("cache/teacher" if measure == "loss" else f"cache/teacher_{measure}")


def steps_folder(testbed: Testbed) -> Path:
    """Where the two terms of the loss change are kept."""
    return folder_of(testbed) / "steps"


def scores_folder(testbed: Testbed, measure: str = "loss") -> Path:
    """Where the scores are kept."""
    return folder_of(testbed, measure) / "scores"


class GradientCollector:
    """Computes gradients: the pieces of queries and passes."""

    def __init__(self, testbed: Testbed, config: CollectConfig) -> None:
        self.testbed, self.config, self.device = testbed, config, best_device()
        source = testbed.load_source(self.device)
        source.denoiser.to(memory_format=torch.channels_last)
        self.measure = config.measure if isinstance(config, MeasuredConfig) else "loss"
        self.engine = MeanGradients(source.denoiser, source.schedule, bf16=config.bf16, measure=self.measure)
        self._examples: dict[str, Examples] = {}

    def compute(self, piece: Piece) -> dict[str, np.ndarray]:
        """Mean output gradients [runs, bins, B, T, out] as `abu.gradients.pack` keeps them; for measured functions also
        the mean losses [runs, bins, B] of the same draws.
        """
        if piece.examples not in self._examples:
            self._examples[piece.examples] = examples_of(self.testbed, piece.examples, self.device)
        examples = self._examples[piece.examples].rows(piece.start, piece.stop)
        draws = self.config.draws(piece.examples, len(self.engine.schedule))
        first = RUNS * int(piece.part) if piece.stage == "pass" else 0
        batches = [examples.rows(low, low + BATCH) for low in range(0, len(examples.ids), BATCH)]
        found = [
            [
                [self.engine.with_losses(batch, draws, first + run, index) for batch in batches]
                for index in range(draws.bins)
            ]
            for run in range(RUNS)
        ]
        gradients, losses = (
            torch.stack([torch.stack([torch.cat([part[kind] for part in parts]) for parts in run]) for run in found])
            for kind in (0, 1)
        )
        arrays = pack(gradients, examples.text)
        return arrays if self.measure == "loss" else arrays | {"losses": losses.cpu().numpy()}


class StepCollector:
    """Scores all queries against training images by both terms of the loss change after a step of finite size."""

    def __init__(self, testbed: Testbed, config: StepConfig) -> None:
        self.testbed, self.config, self.device = testbed, config, best_device()
        self.curvature = EKFAC.load(testbed.curvature).to(self.device)
        self.whole, self.folded = Sketch.of(self.curvature), TwoFolds.of(self.curvature, config.fold, config.seed)
        source = testbed.load_source(self.device)
        source.denoiser.to(memory_format=torch.channels_last)
        self.terms = TrainingTerms(source.denoiser, source.schedule)
        self.draws = config.drawn(len(source.schedule))
        self.training = testbed.training_examples(self.device)
        self.queries, self.halves = self._queries()

    def compute(self, piece: Piece) -> dict[str, np.ndarray]:
        """first, second [Q, B] (see `loss_terms`) of all queries, with the draws of both runs on both sides; for
        validation and test queries, with independent draws on both sides, first_runs and second_runs [runs, Q', B].
        """
        parts = [
            self._few(self.training.rows(low, min(low + BATCH, piece.stop)), int(piece.part))
            for low in range(piece.start, piece.stop, BATCH)
        ]
        return {name: torch.cat([part[name] for part in parts], -1).cpu().numpy() for name in parts[0]}

    def _few(self, examples: Examples, index: int) -> dict[str, torch.Tensor]:
        pooled, runs = [], []
        for run, half in enumerate(self.halves):
            gradients, products = self.terms(examples, self.draws, RUNS * index + run)
            vectors = StepVectors(
                sketched(gradients, examples.text, self.curvature, self.whole),
                [sketched(product, examples.text, self.curvature, self.folded) for product in products],
            )
            pooled.append(torch.stack(loss_terms(self.queries, vectors)))
            runs.append(torch.stack(loss_terms(half, vectors)))
        first, second = torch.stack(pooled).mean(0)
        first_runs, second_runs = torch.stack(runs, 1)
        return {"first": first, "second": second, "first_runs": first_runs, "second_runs": second_runs}

    def _queries(self) -> tuple[StepVectors, list[StepVectors]]:
        """(all queries, those of validation and test by run), in the order of the splits."""
        pooled, halves = [], []
        for compression in (self.whole, self.folded):
            runs = {split: torch.cat(list(self._vectors(split, compression)), 1) for split in SPLITS}
            pooled.append(torch.cat([run.mean(0) for run in runs.values()]))
            halves.append(torch.cat([run for split, run in runs.items() if split != "train"], 1))
        return StepVectors(pooled[0], [pooled[1]]), [
            StepVectors(whole, [folded]) for whole, folded in zip(*halves, strict=True)
        ]

    def _vectors(self, split: str, compression: Compression) -> Iterator[torch.Tensor]:
        """Whitened gradients [runs, q, size] of a split, the mean over bins, piece by piece."""
        examples = examples_of(self.testbed, split, self.device)
        for piece in query_plan(self.testbed, (split,)):
            path, rows = Collection(folder_of(self.testbed)).path(piece), examples.rows(piece.start, piece.stop)
            gradients = load_gradients(path, rows.text, MADE_BY["query"]).mean(1)
            yield torch.stack([sketched(run, rows.text, self.curvature, compression) for run in gradients])


class ScoreCollector:
    """Scores all queries against training images whose gradients are stored."""

    def __init__(
        self, testbed: Testbed, config: ScoreConfig, measure: str = "loss", memory_gb: float = MEMORY_GB
    ) -> None:
        self.testbed, self.config, self.device, self.measure = testbed, config, best_device(), measure
        self.curvature = EKFAC.load(testbed.curvature).to(self.device)
        self.sketch = Sketch.of(self.curvature, config.sketch, config.seed)
        self.training = testbed.training_examples(self.device)
        bits = config.query_bits if isinstance(config, RoundedScoreConfig) else 32
        dtype = torch.bfloat16 if bits == 16 else None
        judged = [
            [QueryMatrix.of(half, dtype) for half in part]
            for split in SPLITS
            if split != "train"
            for part in self.queries(split)
        ]
        self.halves = [QueryMatrix.joined(parts) for parts in zip(*judged, strict=True)]
        plan = query_plan(testbed)
        count = sum(piece.stop - piece.start for piece in plan)
        self.pooled = QueryTiles(
            (part.mean(0) for split in SPLITS for part in self.queries(split)),
            count,
            bins=len(self.halves[0].normalised),
            size=self.sketch.size,
            images=SCORED_AT_ONCE,
            budget=memory_gb * 2**30,
            bits=bits,
            folder=folder_of(testbed, measure),
        )

    def compute(self, piece: Piece) -> dict[str, np.ndarray]:
        """plain, normalised [Q, B] for all queries, with all passes and both runs pooled; for validation and test
        queries, with independent draws on both sides, plain_runs [counts, runs, Q', B] and normalised_terms
        [counts, runs, bins, Q', B] (float16), whose weighted mean over bins is the normalised score, from the first 1,
        2, 4, … passes as `counts` says. For the measured function `average` also das [Q, B].
        """
        examples = self.training.rows(piece.start, piece.stop)
        sources = [Piece("pass", str(index), piece.start, piece.stop) for index in range(int(piece.part))]
        gradients = [load_gradients(self.path(source), examples.text, MADE_BY["pass"]) for source in sources]
        errors = None
        if self.measure == "average":
            losses = [load_npz(self.path(source), ("losses",))["losses"].mean(0) for source in sources]
            errors = torch.from_numpy(np.mean(losses, 0)).to(self.device).sqrt()
        found = []
        for start in range(0, len(examples.ids), SCORED_AT_ONCE):
            rows = slice(start, start + SCORED_AT_ONCE)
            some = [gradient[:, :, rows] for gradient in gradients]
            found.append(self.score(some, examples.text[rows], None if errors is None else errors[:, rows]))
        return {name: torch.cat([part[name] for part in found], -1).cpu().numpy() for name in found[0]}

    def score(
        self, gradients: list[torch.Tensor], text: torch.Tensor, errors: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The arrays of `compute` for a few images, from their gradients [runs, bins, B, T, out] in each pass."""
        plain_runs, terms = [], []
        for count in self.counts(len(gradients)):
            # whitening is linear, so that draws are averaged before it
            mean = torch.stack(gradients[:count]).mean(0)
            vectors = compressed(mean, text, self.curvature, self.sketch)
            found = [score_block(half, run) for half, run in zip(self.halves, vectors, strict=True)]
            plain_runs.append(torch.stack([plain for plain, _ in found]))
            terms.append(torch.stack([term for _, term in found]).half())
        return self.pooled.score(vectors.mean(0), self.config.bin_weights, errors) | {
            "plain_runs": torch.stack(plain_runs),
            "normalised_terms": torch.stack(terms),
        }

    def counts(self, passes: int) -> list[int]:
        """Numbers of passes that the runs are compared at."""
        return pass_counts(passes) if self.config.growth else [passes]

    def path(self, piece: Piece) -> Path:
        """Where a piece of gradients lies."""
        return Collection(folder_of(self.testbed, self.measure)).path(piece)

    def queries(self, split: str) -> Iterator[torch.Tensor]:
        """Whitened, sketched gradients [runs, bins, q, sketch] of a split, piece by piece."""
        examples = examples_of(self.testbed, split, self.device)
        for piece in query_plan(self.testbed, (split,)):
            rows = examples.rows(piece.start, piece.stop)
            yield stored_vectors(self.path(piece), piece, rows, self.curvature, self.sketch)


def examples_of(testbed: Testbed, part: str, device: torch.device) -> Examples:
    """A split's queries or, with "training", the training images."""
    return testbed.training_examples(device) if part == "training" else testbed.query_examples(part, device)


def pass_counts(passes: int) -> list[int]:
    """Numbers of passes that reliability is measured at: 1, 2, 4, … and all."""
    return sorted({2**k for k in range(passes.bit_length())} | {passes})


def query_plan(testbed: Testbed, splits: tuple[str, ...] = SPLITS) -> list[Piece]:
    """Pieces of the queries' gradients."""
    counts = {split: len(testbed.query_captions(split)) for split in splits}
    return [piece for split, count in counts.items() for piece in cut("query", split, count, QUERY_PIECE)]


def training_plan(testbed: Testbed, passes: range) -> list[Piece]:
    """Pieces of the passes over the training set."""
    images = testbed.images
    return [piece for index in passes for piece in cut("pass", str(index), images, TRAINING_PIECE)]


def step_plan(testbed: Testbed, passes: range) -> list[Piece]:
    """Pieces of the passes that keep both terms of the loss change."""
    return [piece for index in passes for piece in cut("step", str(index), testbed.images, TRAINING_PIECE)]


def score_plan(testbed: Testbed, passes: int) -> list[Piece]:
    """Pieces of the scores made from the first `passes` passes."""
    return cut("scores", str(passes), testbed.images, TRAINING_PIECE)


def started_passes(folder: Path, stage: Stage = "pass") -> list[int]:
    """Numbers of the passes that have at least one piece."""
    return sorted({int(path.name.split("_")[1]) for path in folder.glob(f"{stage}_*_*.npz")})


def whole_passes(testbed: Testbed, measure: str = "loss") -> int:
    """How many passes, counted from the first, have all their pieces; `ValueError` if there is none."""
    collection, count = Collection(folder_of(testbed, measure)), 0
    while not collection.missing(training_plan(testbed, range(count, count + 1))):
        count += 1
    if not count:
        raise ValueError(
            f"{collection.folder}: expected the pieces of a whole pass, found {len(started_passes(collection.folder))} "
            "begun; collect it with: python -m abu.collect training"
        )
    return count


def print_status(testbed: Testbed, measure: str = "loss") -> None:
    """What is done, the rate, the time left, and what failed."""
    collection, scores = Collection(folder_of(testbed, measure)), Collection(scores_folder(testbed, measure))
    print(collection.status("queries", query_plan(testbed)))
    for index in started_passes(collection.folder):
        print(collection.status(f"pass {index}", training_plan(testbed, range(index, index + 1))))
    steps = Collection(steps_folder(testbed))
    for index in started_passes(steps.folder, "step"):
        print(steps.status(f"steps, pass {index}", step_plan(testbed, range(index, index + 1))))
    for passes in sorted({int(path.name.split("_")[1]) for path in scores.folder.glob("scores_*.npz")}):
        print(scores.status(f"scores of {passes} passes", score_plan(testbed, passes)))
    failures = collection.failures() | steps.failures() | scores.failures()
    for name, error in list(failures.items())[:SHOWN]:
        print(f"failed: {name}: {error}")
    if len(failures) > SHOWN:
        print(f"failed: {len(failures) - SHOWN} more; see failed.jsonl in {collection.folder}")


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = argparse.ArgumentParser(
        prog="python -m abu.collect",
        description="Collects the teacher's scores of all queries, in pieces that nothing can lose.",
        epilog="example: python -m abu.collect training --passes 4 --workers 2",
    )
    made.add_argument("stage", choices=("curvature", "queries", "steps", "training", "scores", "status"))
    add_testbed_flags(made)
    made.add_argument("--first_pass", type=int, default=0, help="number of the first pass; each has its own draws")
    made.add_argument("--passes", type=int, help="passes over the training set (default: 1; of scores: all there are)")
    made.add_argument(
        "--sketch", type=int, default=ScoreConfig.sketch, help="numbers that scores keep of a gradient (default: all)"
    )
    made.add_argument("--measure", choices=MEASURES, default="loss", help="what is differentiated (default: loss)")
    made.add_argument(
        "--fold", type=int, default=StepConfig.fold, help="of steps: numbers of a gradient added to one for squares"
    )
    made.add_argument(
        "--memory_gb", type=float, default=MEMORY_GB, help="of scores: memory for the queries' gradients (default: 4)"
    )
    made.add_argument(
        "--query_bits", type=int, choices=(8, 16, 32), default=32, help="of scores: bits of a query's numbers"
    )
    made.add_argument("--no_growth", action="store_true", help="of scores: compare the runs with all passes only")
    made.add_argument("--bf16", action="store_true", help="gradients under bfloat16 autocast")
    add_cluster_flags(made)
    made.add_argument("--dry_run", action="store_true", help="print the time, memory and disk needed; compute nothing")
    return made


def claimed(testbed: Testbed, config: CollectConfig | ScoreConfig | StepConfig, measure: str = "loss") -> Collection:
    """The folder of the gradients or scores of these settings; `ValueError` if it holds others."""
    files = [testbed.source / "denoiser.safetensors"]
    files += [testbed.data / f"query_{split}/latents.npy" for split in SPLITS]
    folder, command = folder_of(testbed, measure), "python -m abu.collect training"
    if isinstance(config, ScoreConfig):
        files.append(testbed.curvature)
        folder, command = scores_folder(testbed, measure), "python -m abu.collect scores"
    if isinstance(config, StepConfig):
        files.append(testbed.curvature)
        folder, command = steps_folder(testbed), "python -m abu.collect steps"
    command += "" if measure == "loss" else f" --measure {measure}"
    collection = Collection(folder)
    collection.claim(config, {relative(path): sha256_file(path) for path in map(require_file, files)}, command)
    return collection


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    testbed = testbed_from(args)
    if args.stage == "curvature":
        fit_testbed(testbed, testbed.load_source(best_device()), CurvatureConfig(), testbed.curvature)
        return
    if args.stage == "status":
        print_status(testbed, args.measure)
        return
    build: Callable[[], GradientCollector | ScoreCollector | StepCollector]
    passes = range(args.first_pass, args.first_pass + (args.passes or 1))
    if args.stage == "scores":
        scoring = ScoreConfig(args.sketch, growth=not args.no_growth)
        if args.query_bits != 32:
            scoring = RoundedScoreConfig(args.sketch, growth=not args.no_growth, query_bits=args.query_bits)
        pieces = score_plan(testbed, args.passes or whole_passes(testbed, args.measure))
        collection = claimed(testbed, scoring, args.measure)
        build = partial(ScoreCollector, testbed, scoring, args.measure, args.memory_gb)
    elif args.stage == "steps":
        step = StepConfig(fold=args.fold)
        pieces = step_plan(testbed, passes)
        collection, build = claimed(testbed, step), partial(StepCollector, testbed, step)
    else:
        config = CollectConfig(bf16=args.bf16)
        if args.measure != "loss":
            config = MeasuredConfig(bf16=args.bf16, measure=args.measure)
        pieces = query_plan(testbed) if args.stage == "queries" else training_plan(testbed, passes)
        collection, build = claimed(testbed, config, args.measure), partial(GradientCollector, testbed, config)
    if args.dry_run:
        print(estimate(build(), collection, pieces, args.workers or 1))
        return
    run_plan(build, collection, pieces, cluster_from(args))


if __name__ == "__main__":
    sys.exit(main())
