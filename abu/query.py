"""Scores new queries with the stored training gradients, at the cost of their own gradients.

    python -m abu.query build                                               # once: the store; a minute on two cores
    python -m abu.query score --image cat.png --prompt "cat face, noto style"
    python -m abu.query score --split val                                   # a split of the testbed's queries
    python -m abu.query score --latents new.npy --prompts new.txt           # [Q, c, h, w], and a prompt a line

`score` writes the scores of both teachers [Q, N] and prints the first training images of each query. The queries' own
gradients take as many draws as those that judge the ranker (--draws).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from abu.amortised import RUNS, Examples, MeanGradients, QueryMatrix
from abu.collect_config import CollectConfig
from abu.collectors import BATCH
from abu.curvature import EKFAC
from abu.draws import DrawConfig
from abu.models import SourceModel
from abu.stages import whole_passes
from abu.store import GradientStore, StoreConfig, open_store, unit_vectors
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from abu.tiles import MEMORY_GB, tiles
from fastgda.core import ROOT, best_device, command_line, command_parser, load_npy, require_file, save_npz
from fastgda.flags import add_flags, from_flags
from feature_extraction.minilm import MiniLM
from feature_extraction.readers import read_split

ROLE = "new"
"""Keys the noise of queries that belong to no split."""


def query_matrix(
    source: SourceModel, store: GradientStore, examples: Examples, draws: DrawConfig, device: torch.device
) -> QueryMatrix:
    """The matrix of new queries, their gradients pooled over both runs as in `abu.collect scores`."""
    curvature = EKFAC.load(store.testbed.curvature).to(device)
    compression, engine = store.config.of(curvature), MeanGradients(source.denoiser, source.schedule)
    parts = []
    for batch in tqdm(examples.batches(BATCH), desc="query gradients", unit="batch"):
        gradients = torch.stack([engine(batch, draws, run) for run in range(RUNS)]).mean(0)
        units, norms = unit_vectors(gradients, batch.text, curvature, compression)
        parts.append((units, norms))
    units, norms = (torch.cat(kind, 1) for kind in zip(*parts, strict=True))
    plain = (units * norms[..., None]).mean(0)
    # ‖mean_b w_b‖ over all directions is not kept; a factor common to a query's scores does not change its ranking
    return QueryMatrix(units, torch.nn.functional.normalize(plain, dim=-1))


def encode_image(source: SourceModel, path: Path, device: torch.device) -> torch.Tensor:
    """Standardised latents [1, c, h, w] of a picture, on white and resized to the model's size."""
    side = 8 * source.config.sample_size
    try:
        with Image.open(require_file(path)) as file:
            rgba = file.convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a picture, found something else ({error})") from error
    white = Image.new("RGBA", rgba.size, "white")
    image = Image.alpha_composite(white, rgba).convert("RGB")
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
    with torch.inference_mode():
        return source.autoencoder.encode(pixels).clone()


def examples_from(args: argparse.Namespace, testbed: Testbed, source: SourceModel, device: torch.device) -> Examples:
    """The queries that the flags name; `ValueError` unless they name them in one way."""
    given = [name for name in ("split", "image", "latents") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of --split, --image and --latents, found {' and '.join(given) or 'none'}")
    if args.split is not None:
        return testbed.query_examples(args.split, device)
    if args.image is not None:
        if args.prompt is None:
            raise ValueError("--image: expected --prompt with it, found none")
        return new_examples(encode_image(source, args.image, device), [args.prompt], device)
    prompts = require_file(args.prompts).read_text().splitlines() if args.prompts else []
    shape = (source.config.latent_channels, source.config.sample_size, source.config.sample_size)
    latents = load_npy(args.latents, (len(prompts), *shape), finite=True)
    return new_examples(torch.from_numpy(latents).to(device).float(), prompts, device)


def new_examples(latents: torch.Tensor, prompts: list[str], device: torch.device) -> Examples:
    """Queries that belong to no split."""
    return Examples(ROLE, list(range(len(prompts))), latents, MiniLM(device=device).token_states(prompts))


def run_build(args: argparse.Namespace) -> None:
    """Writes the store."""
    testbed = testbed_from(args)
    store = GradientStore(testbed, from_flags(StoreConfig, args), whole_passes(testbed, wanted=args.passes))
    store.build(best_device())
    size = sum(path.stat().st_size for path in store.folder.glob("*.npy"))
    print(f"{store.folder}: {testbed.images} images, {store.passes} passes, {size / 2**20:.0f} MiB")


def run_score(args: argparse.Namespace) -> None:
    """Scores and prints."""
    testbed, device = testbed_from(args), best_device()
    store, source = open_store(testbed), testbed.load_source(device)
    source.denoiser.to(memory_format=torch.channels_last)
    examples = examples_from(args, testbed, source, device)
    draws = DrawConfig(CollectConfig.bins, args.draws, timesteps=len(source.schedule), seed=CollectConfig.seed)
    each = 4 * (draws.bins + 1) * store.config.of(testbed.load_curvature(device)).size
    parts = [
        store.score(query_matrix(source, store, examples.rows(rows.start, rows.stop), draws, device), device)
        for rows in tiles(len(examples.ids), each, args.memory_gb * 2**30)
    ]
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not all(np.isfinite(found).all() for found in scores.values()):
        raise ValueError("queries: expected finite gradients, found NaN or infinity")
    save_npz(args.output, compress=False, **scores)
    images = read_split(testbed.data, "data") if testbed.parquet.is_file() else None
    for query, row in enumerate(scores[args.teacher][: args.shown]):
        print(f"query {query}:")
        for place in np.argsort(-row, kind="stable")[: args.top].tolist():
            print(f"{place:8d}  {row[place]:+.4f}  {images.caption(place) if images else ''}".rstrip())
    print(f"{args.output}: {', '.join(f'{name} {list(found.shape)}' for name, found in scores.items())}")


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m abu.query", __doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    build = stages.add_parser(
        "build",
        help="compress the stored training gradients for new queries",
        epilog="example: python -m abu.query build --compression truncate --size 24576 --bits 8",
    )
    add_testbed_flags(build)
    add_flags(build, StoreConfig)
    build.add_argument("--passes", type=int, help="the first so many passes (default: all whole ones)")
    build.set_defaults(run=run_build)
    query = stages.add_parser(
        "score",
        help="score new queries",
        epilog='example: python -m abu.query score --image heart.png --prompt "red heart, noto style"',
    )
    add_testbed_flags(query)
    query.add_argument("--split", choices=SPLITS, help="queries of the testbed")
    query.add_argument("--image", type=Path, help="a picture; with --prompt")
    query.add_argument("--prompt", help="what the picture was generated from")
    query.add_argument("--latents", type=Path, help=".npy file of standardised latents [Q, c, h, w]; with --prompts")
    query.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    query.add_argument(
        "--draws", type=int, default=CollectConfig.judged_query_draws, help="draws per bin and run (default: 24)"
    )
    query.add_argument(
        "--memory_gb", type=float, default=MEMORY_GB, help="memory for the queries' gradients (default: %(default)s)"
    )
    query.add_argument("--teacher", choices=("normalised", "plain"), default="normalised", help="whose order is shown")
    query.add_argument("--top", type=int, default=20, help="training images that are printed for a query")
    query.add_argument("--shown", type=int, default=3, help="queries that are printed")
    query.add_argument(
        "--output", type=Path, default=ROOT / "runs/scores.npz", help="the scores (default: %(default)s)"
    )
    query.set_defaults(run=run_score)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
