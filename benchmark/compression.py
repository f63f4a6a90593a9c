"""What compression of the gradients costs in rank: its scores against the uncompressed ones, query by query.

    python -m abu.collect queries && python -m abu.collect training
    python -m benchmark.compression                 # results/teacher/compression.{json,png}; minutes on two cores

The same stored gradients are compressed in each way and size: count sketch, the eigen-directions with the largest
S / (S + λ), those with the largest E[w w'] between two independent runs ("signal", `abu.compress`), each with queries
in 32 and in 8 bits; "none" is the whole whitened gradient. Norms are those of the whole gradient, as in `abu.store`.
Reported for each teacher: Spearman and overlap of the top L with the uncompressed scores, mean and standard error over
queries, and the bytes of a query (all bins and their mean) and of a training image (all bins, 16 bits).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from abu.amortised import Compression, QueryMatrix, Sketch
from abu.collect_config import CollectConfig
from abu.compress import Quantised, SignalSums, Truncation
from abu.curvature import CHUNK, EKFAC, DiagonalFisher
from abu.gradients import load_gradients
from abu.plan import Collection
from abu.stages import folder_of, query_plan, whole_passes
from abu.store import GradientStore, StoreConfig
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from benchmark.drawing import plt, save_figure
from fastgda.core import best_device, command_line, command_parser, environment, save_json
from fastgda.dataset import default_levels
from fastgda.flags import add_flags, from_flags
from fastgda.metrics import overlap, spearman, standard_error
from fastgda.rankings import from_scores

TEACHERS = ("plain", "normalised")


@dataclass(frozen=True)
class CompressionConfig:
    """What is compared."""

    sizes: tuple[int, ...] = (1_536, 3_072, 6_144, 12_288, 24_576)
    """Numbers that are kept of a gradient in each timestep bin."""
    queries: int = 24
    """The first so many test queries."""
    images: int = 4_096
    """The first so many training images."""
    passes: int = 0
    """The first so many passes; 0: all whole ones."""
    signal_images: int = 512
    """Images that the signal is measured on; they are the last ones, so that others are judged where there are more."""


@dataclass(frozen=True)
class Way:
    """One compression."""

    name: str
    size: int
    compression: Compression


class Whole:
    """No compression: the whitened gradient."""

    def __init__(self, curvature: DiagonalFisher) -> None:
        self.factor = curvature.damped().rsqrt().flatten()
        self.size = len(self.factor)

    def __call__(self, rotated: Tensor) -> Tensor:
        """[B, out · in] of rotated gradients [B, out, in]."""
        return rotated.flatten(1) * self.factor


def units(gradients: Tensor, text: Tensor, curvature: DiagonalFisher, ways: list[Way]) -> Iterator[list[Tensor]]:
    """For each chunk of examples the vectors [bins, b, size] of every way, the first being the whole gradient.

    Each comes from the same rotated gradients and keeps the norm of the whole one: divide by `norms_of` the first.
    """
    for start in range(0, len(text), CHUNK):
        a = text[start : start + CHUNK]
        rotated = [curvature.rotated_gradients(g[start : start + CHUNK], a) for g in gradients]
        yield [torch.stack([way.compression(of_bin) for of_bin in rotated]) for way in ways]


def signal(store: GradientStore, text: Tensor, curvature: DiagonalFisher, images: int) -> Tensor:
    """E[w w'] [out, in] over the last pieces of the first pass that hold at least `images` images."""
    sums, folder = SignalSums(curvature), Collection(folder_of(store.testbed))
    for piece in reversed(store.plan):
        tokens = text[piece.start : piece.stop]
        first, second = load_gradients(folder.path(piece), tokens, "python -m abu.collect training")
        for one, other in zip(first, second, strict=True):
            for start in range(0, len(tokens), CHUNK):
                rows = slice(start, start + CHUNK)
                sums.add(*(curvature.rotated_gradients(g[rows], tokens[rows]) for g in (one, other)))
        images -= len(tokens)
        if images <= 0:
            break
    return sums.contribution()


def query_vectors(
    testbed: Testbed, count: int, curvature: DiagonalFisher, ways: list[Way], device: torch.device
) -> list[QueryMatrix]:
    """The matrix of the first `count` test queries for every way."""
    examples, folder = testbed.query_examples("test", device), Collection(folder_of(testbed))
    parts: list[list[Tensor]] = [[] for _ in ways]
    for piece in query_plan(testbed, ("test",)):
        tokens = examples.text[piece.start : piece.stop]
        gradients = load_gradients(folder.path(piece), tokens, "python -m abu.collect queries").mean(0)
        kept = max(0, min(count, piece.stop) - piece.start)
        for chunk in units(gradients[:, :kept], tokens[:kept], curvature, ways):
            norms = chunk[0].norm(dim=-1, keepdim=True)
            plain_norm = chunk[0].mean(0).norm(dim=-1, keepdim=True)
            for found, vectors in zip(parts, chunk, strict=True):
                found.append(torch.cat([vectors / norms, (vectors.mean(0) / plain_norm)[None]]))
    joined = [torch.cat(found, 1) for found in parts]
    return [QueryMatrix(rows[:-1], rows[-1]) for rows in joined]


def eight_bits(queries: QueryMatrix) -> QueryMatrix:
    """The same after rounding to 8 bits."""
    return QueryMatrix(Quantised.of(queries.normalised).vectors(), Quantised.of(queries.plain).vectors())


def all_scores(
    testbed: Testbed, config: CompressionConfig, passes: int, device: torch.device
) -> tuple[list[Way], dict[tuple[int, int], dict[str, np.ndarray]]]:
    """(ways, (way's place, bits of the queries) -> teacher -> scores [Q, images])."""
    curvature = EKFAC.load(testbed.curvature).to(device)
    store = GradientStore(testbed, StoreConfig(), passes)
    text = testbed.training_examples(device).text
    measured = signal(store, text, curvature, config.signal_images)
    ways = [Way("none", curvature.eigenvalues.numel(), Whole(curvature))]
    for size in config.sizes:
        ways.append(Way("sketch", size, Sketch.of(curvature, size)))
        ways.append(Way("spectrum", size, Truncation.of(curvature, size)))
        ways.append(Way("signal", size, Truncation.of(curvature, size, measured)))
    queries = query_vectors(testbed, config.queries, curvature, ways, device)
    asked = {(place, 32): matrix for place, matrix in enumerate(queries)}
    asked |= {(place, 8): eight_bits(matrix) for place, matrix in enumerate(queries)}
    parts: dict[tuple[int, int], dict[str, list[Tensor]]] = {key: {t: [] for t in TEACHERS} for key in asked}
    pieces = [piece for piece in store.plan if piece.start < config.images]
    for piece in tqdm(pieces, desc="training images", unit="piece"):
        tokens = text[piece.start : piece.stop]
        for chunk in units(store.pooled(piece, tokens), tokens, curvature, ways):
            norms = chunk[0].norm(dim=-1, keepdim=True)
            for (place, bits), matrix in asked.items():
                vectors = chunk[place]
                found = parts[place, bits]
                found["plain"].append(matrix.plain @ vectors.mean(0).mT)
                found["normalised"].append(torch.bmm(matrix.normalised, (vectors / norms).mT).mean(0))
    joined = {
        key: {name: torch.cat(rows, 1).cpu().numpy()[:, : config.images] for name, rows in found.items()}
        for key, found in parts.items()
    }
    return ways, joined


def rank_error(scores: np.ndarray, truth: np.ndarray, levels: tuple[int, ...]) -> dict[str, Any]:
    """Spearman and top-L overlap of scores [Q, N] with those of the uncompressed gradients."""
    expected = from_scores(truth).rank
    order, shared = spearman(scores, expected), overlap(scores, expected, levels)
    shared_error = standard_error(shared)
    return {
        "spearman": round(float(order.mean()), 5),
        "spearman_error": round(float(standard_error(order)), 5),
        "spearman_min": round(float(order.min()), 5),
        "overlap": {str(level): round(float(v), 4) for level, v in zip(levels, shared.mean(0), strict=True)},
        "overlap_error": {str(level): round(float(v), 4) for level, v in zip(levels, shared_error, strict=True)},
    }


def compare(testbed: Testbed, config: CompressionConfig, device: torch.device) -> dict[str, Any]:
    """The report."""
    passes = config.passes or whole_passes(testbed)
    ways, scores = all_scores(testbed, config, passes, device)
    truth = scores[0, 32]
    images, bins = truth["plain"].shape[1], CollectConfig.bins
    levels, rows = default_levels("emoji", images), []
    for (place, bits), found in scores.items():
        way = ways[place]
        row: dict[str, Any] = {
            "compression": way.name,
            "size": way.size,
            "query_bits": bits,
            "bytes_per_query": (bins + 1) * way.size * bits // 8,
            "bytes_per_image": bins * way.size * 2,
        }
        rows.append(row | {name: rank_error(found[name], truth[name], levels) for name in TEACHERS})
        shown = ", ".join(f"{name} {rows[-1][name]['spearman']:.4f}" for name in TEACHERS)
        print(f"{way.name:9s} {way.size:7d} numbers, {bits:2d}-bit queries: {shown}")
    return {"config": asdict(config) | {"passes": passes, "images": images}, "rows": rows}


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Spearman with the uncompressed scores against the bytes of a training image."""
    drawing, axes = plt.subplots(1, len(TEACHERS), figsize=(4.5 * len(TEACHERS), 3.2), sharey=True)
    for axis, teacher in zip(axes, TEACHERS, strict=True):
        for name in ("sketch", "spectrum", "signal"):
            for bits, style in ((32, "-o"), (8, "--x")):
                chosen = [row for row in rows if row["compression"] == name and row["query_bits"] == bits]
                x = [row["bytes_per_image"] / 1024 for row in chosen]
                y = [row[teacher]["spearman"] for row in chosen]
                label = f"{name}, {bits}-bit queries"
                axis.plot(x, y, style, color=f"C{('sketch', 'spectrum', 'signal').index(name)}", label=label)
        axis.set(title=teacher, xscale="log", xlabel="KiB per training image", ylabel="Spearman with uncompressed")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return drawing


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.compression", __doc__)
    add_testbed_flags(parser)
    add_flags(parser, CompressionConfig)
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    report = compare(testbed, from_flags(CompressionConfig, args), best_device())
    folder: Path = testbed.root / "results/teacher"
    save_json(folder / "compression.json", {"testbed": testbed.name} | report | {"environment": environment()})
    save_figure(figure(report["rows"]), folder / "compression.png")


if __name__ == "__main__":
    sys.exit(main())
