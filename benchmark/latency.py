"""Latency and storage of attribution methods: what one query costs on one machine that is warm.

    python -m benchmark.latency effnet+minilm tuned trak d-trak abu-plus exact --checkpoint weights/....pth
    python -m abu.query build && python -m benchmark.latency plain normalised finite-step       # the teachers

A query is a generated image with its prompt. Measured warm (models, features and kernels in memory, one query first),
median of several queries: features: encoding and N inner products; the ranker: its MLP as well; gradient methods: the
query's gradients, for JourneyTRAK its sampling as well, and N inner products in the projected space; the first-order
teachers: the query's gradients and their products with the stored ones of the training set, as `abu.query` takes them;
exact AbU+: the query's gradient, a step, and the loss of every training image, timed on some of them and scaled to N.
The teacher of a finite step keeps nothing that a new query could be multiplied with, and so costs as much as the exact
form. Storage is what must be kept for the training set. Writes results/latency/latency.json; lines of other methods
that were timed on the same machine stay.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abu.collect_config import CollectConfig
from abu.draws import DrawConfig
from abu.fisher import CurvatureConfig, fit_curvature
from abu.influence import mean_losses
from abu.plan import Piece
from abu.query import query_matrix
from abu.store import open_store
from abu.testbed import Testbed, testbed_from
from abu.unlearn import UnlearnConfig, moved_model, natural_step, query_gradient
from benchmark.gradient_methods import METHODS, SHARE
from benchmark.gradient_store import GradientWorker, load_store
from benchmark.kernels import Kernel
from benchmark.methods import COLLECTED, TUNED, is_teacher
from benchmark.retrain import add_judge_flags
from benchmark.teacher import TEACHERS
from fastgda.core import ROOT, best_device, command_line, command_parser, environment, save_json
from fastgda.dataset import layout, load_images, normalise
from fastgda.ranker import load_ranker
from feature_extraction.encoders import load_encoder
from feature_extraction.readers import read_split

SAMPLE = 128
"""Training images that the exact form is timed on."""


@dataclass(frozen=True)
class Cost:
    """What a method costs."""

    attribute: Callable[[int], object]
    """Attributes a test query by its number."""
    storage: int
    """Bytes kept of the training set."""
    scale: float = 1.0
    """What the measured time is multiplied with."""


def median_seconds(attribute: Callable[[int], object], queries: int) -> float:
    """Median wall time of a query, after one that is not counted."""
    attribute(0)
    times = []
    for query in range(1, queries + 1):
        began = time.perf_counter()
        attribute(query)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def feature_cost(testbed: Testbed, ftype: str, checkpoint: Path | None = None) -> Cost:
    """Retrieval with untuned features, or with a ranker on them."""
    encoder, table = load_encoder(ftype, best_device()), read_split(testbed.data, "test_query")
    images = load_images(layout("emoji", ftype, testbed.data))
    ranker = load_ranker(checkpoint, in_dim=images.shape[1]) if checkpoint else None
    vectors = normalise(images) if ranker is None else ranker.embed(images).numpy()

    def attribute(query: int) -> np.ndarray:
        feature = encoder.encode([table.image(query)], [table.caption(query)])
        vector = normalise(feature) if ranker is None else ranker.embed_queries(feature).numpy()
        return vector @ vectors.T

    return Cost(attribute, vectors.nbytes)


def gradient_cost(testbed: Testbed, method: str) -> Cost:
    """Methods on projected gradients; those of the training images must have been collected."""
    recipe, device = METHODS[method], best_device()
    stored, asked = recipe.stores(0)
    worker, training = GradientWorker(testbed, asked), load_store(testbed, stored, "training")
    if recipe.score != "inner":
        kernel = Kernel(training)
        training = kernel.matrix(recipe.ridge or SHARE * kernel.scale).float()
    matrix = training.to(device)

    def attribute(query: int) -> torch.Tensor:
        features = worker.compute(Piece("query", "test", query, query + 1))["features"]
        return torch.from_numpy(features).to(device) @ matrix.mT

    return Cost(attribute, training.nbytes)


def teacher_cost(testbed: Testbed) -> Cost:
    """The first-order teachers, which are scored together; what `python -m abu.query build` made is kept."""
    device = best_device()
    store, source, queries = open_store(testbed), testbed.load_source(device), testbed.query_examples("test", device)
    draws = CollectConfig().draws("test", len(source.schedule))

    def attribute(query: int) -> dict[str, np.ndarray]:
        return store.score(query_matrix(source, store, queries.rows(query, query + 1), draws, device), device)

    return Cost(attribute, sum(path.stat().st_size for path in store.folder.glob("*.npy")))


def exact_cost(testbed: Testbed) -> Cost:
    """AbU+ as the paper defines it; the factors and the latents are kept."""
    device, config = best_device(), UnlearnConfig()
    source = testbed.load_source(device)
    training, queries = testbed.training_examples(device), testbed.query_examples("test", device)
    curvature = fit_curvature(
        source.denoiser, source.schedule, training.latents[:SAMPLE], training.text[:SAMPLE], CurvatureConfig()
    )
    few, draws = training.rows(0, SAMPLE), DrawConfig(20, 1, antithetic=False)

    def attribute(query: int) -> torch.Tensor:
        one = queries.rows(query, query + 1)
        gradient = query_gradient(source.denoiser, source.schedule, curvature, one, config.draws(len(source.schedule)))
        moved = moved_model(source.denoiser, natural_step(curvature, gradient, config.size(len(training.ids))))
        return mean_losses([moved], source.schedule, few, draws, progress=False)

    storage = training.latents.nbytes + curvature.shared().eigenvalues.nbytes
    return Cost(attribute, storage, scale=len(training.ids) / len(few.ids))


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.latency", __doc__)
    known = f"{TUNED}, {', '.join([*COLLECTED, *METHODS])}, or feature types"
    parser.add_argument("methods", nargs="+", help=known)
    add_judge_flags(parser)
    parser.add_argument("--ftype", default="effnet+minilm", help="feature type of the tuned ranker")
    parser.add_argument("--checkpoint", type=Path, help="the tuned ranker")
    parser.add_argument("--name", help="what one method is called (default: as in benchmark.methods)")
    parser.add_argument("--queries", type=int, default=10, help="queries that are timed (default: 10)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/latency/latency.json")
    args = parser.parse_args(argv)
    testbed, rows = testbed_from(args), []
    available = len(testbed.query_captions("test")) - 1
    if not 1 <= args.queries <= available:
        raise ValueError(f"--queries: expected 1 to {available}, found {args.queries}")
    if args.name is not None and len(args.methods) > 1:
        raise ValueError(f"--name: expected one method beside it, found {len(args.methods)}")
    for method in args.methods:
        if method == TUNED:
            if args.checkpoint is None:
                raise ValueError("tuned: expected --checkpoint with it, found none")
            cost = feature_cost(testbed, args.ftype, args.checkpoint)
        elif method in TEACHERS:
            cost = teacher_cost(testbed)
        elif is_teacher(method):
            cost = exact_cost(testbed)
        else:
            cost = gradient_cost(testbed, method) if method in METHODS else feature_cost(testbed, method)
        seconds = cost.scale * median_seconds(cost.attribute, args.queries)
        name = args.name or (f"{TUNED}-{args.ftype}" if method == TUNED else method)
        rows.append({"method": name, "seconds": seconds, "storage": cost.storage, "scale": cost.scale})
        print(f"{name:24s} {1000 * seconds:10.1f} ms  {cost.storage / 2**20:10.1f} MiB")
    about = {"mode": testbed.name, "images": testbed.images, "environment": environment()}
    save_json(args.output, about | {"rows": with_others(rows, about, args.output)})


def with_others(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """`rows`, after those of other methods in a report at `path` of the same images on the same machine."""
    if not path.is_file():
        return rows
    report, timed = json.loads(path.read_text()), {row["method"] for row in rows}
    if any(report[name] != value for name, value in about.items()):
        return rows
    return [row for row in report["rows"] if row["method"] not in timed] + rows


if __name__ == "__main__":
    sys.exit(main())
