"""What computes the pieces of a collection: gradients, both terms of the loss change, and first-order scores."""

from __future__ import annotations

from collections.abc import Iterator
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
from abu.collect_config import CollectConfig, MeasuredConfig, ScoreConfig, StepConfig
from abu.curvature import CHUNK
from abu.gradients import MADE_BY, compressed, load_gradients, pack, stored_vectors
from abu.plan import Collection, Piece
from abu.second_order import StepVectors, TrainingTerms, TwoFolds, loss_terms
from abu.stages import examples_of, folder_of, pass_counts, query_counts, query_plan
from abu.testbed import SPLITS, Testbed
from abu.tiles import MEMORY_GB, TYPES, QueryTiles
from fastgda.core import best_device, load_npz

BATCH = 64
"""Examples computed at once."""
SCORED_AT_ONCE = 64
"""Training images whose whitened gradients are in memory at once: 11 MB for each and run on the testbed."""


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
        batches = examples.batches(BATCH)
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
        self.curvature = testbed.load_curvature(self.device)
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
        examples = self.training.rows(piece.start, piece.stop)
        parts = [self._few(batch, int(piece.part)) for batch in examples.batches(BATCH)]
        return {name: torch.cat([part[name] for part in parts], -1).cpu().numpy() for name in parts[0]}

    def _few(self, examples: Examples, index: int) -> dict[str, torch.Tensor]:
        pooled, runs = [], []
        for run, half in enumerate(self.halves):
            terms = self.terms(examples, self.draws, RUNS * index + run)
            vectors = StepVectors.of_images(terms, examples.text, self.curvature, self.whole, self.folded)
            pooled.append(torch.stack(loss_terms(self.queries, vectors)))
            runs.append(torch.stack(loss_terms(half, vectors)))
        first, second = torch.stack(pooled).mean(0)
        first_runs, second_runs = torch.stack(runs, 1)
        return {"first": first, "second": second, "first_runs": first_runs, "second_runs": second_runs}

    def _queries(self) -> tuple[StepVectors, list[StepVectors]]:
        """(all queries, those of validation and test by run), in the order of the splits.

        They are filled in a few rows at a time: beside what `abu.room.step_memory` counts, no more is held than the
        output gradients of one piece.
        """
        every, judged = query_counts(self.testbed)
        kinds: tuple[Compression, ...] = (self.whole, self.folded)
        dtype, device = TYPES[self.config.query_bits], self.device
        pooled = [torch.empty(every, kind.size, dtype=dtype, device=device) for kind in kinds]
        halves = [torch.empty(RUNS, judged, kind.size, dtype=dtype, device=device) for kind in kinds]
        start = 0
        for split, gradients, text in self._gradients():
            rows = slice(start, start + len(text))
            for kind, means, runs in zip(kinds, pooled, halves, strict=True):
                found = torch.stack([sketched(run, text, self.curvature, kind) for run in gradients])
                means[rows] = found.mean(0).to(dtype)
                if split != "train":  # the first of the splits
                    runs[:, rows.start - every + judged : rows.stop - every + judged] = found.to(dtype)
            start = rows.stop
        (whole, folded), (whole_runs, folded_runs) = pooled, halves
        by_run = [StepVectors(w, [f]) for w, f in zip(whole_runs, folded_runs, strict=True)]
        return StepVectors(whole, [folded]), by_run

    def _gradients(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(split, g [runs, b, T, out], the mean over bins, tokens [b, T, in]) of a few queries after the others."""
        for split in SPLITS:
            examples = examples_of(self.testbed, split, self.device)
            for piece in query_plan(self.testbed, (split,)):
                path, text = Collection(folder_of(self.testbed)).path(piece), examples.text[piece.start : piece.stop]
                gradients = load_gradients(path, text, MADE_BY["query"]).mean(1)
                for some, tokens in zip(gradients.split(CHUNK, 1), text.split(CHUNK), strict=True):
                    yield split, some, tokens


class ScoreCollector:
    """Scores all queries against training images whose gradients are stored."""

    def __init__(
        self, testbed: Testbed, config: ScoreConfig, measure: str = "loss", memory_gb: float = MEMORY_GB
    ) -> None:
        self.testbed, self.config, self.device, self.measure = testbed, config, best_device(), measure
        self.curvature = testbed.load_curvature(self.device)
        self.sketch = Sketch.of(self.curvature, config.sketch, config.seed)
        self.training = testbed.training_examples(self.device)
        dtype = torch.bfloat16 if config.query_bits == 16 else None
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
            bits=config.query_bits,
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
