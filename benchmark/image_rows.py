"""Rows of images as in the paper's Figures 7 to 9: what each method finds for a query, and what is left without it.

    python -m benchmark.image_rows data/emoji-mini/scores/{effnet+minilm,tuned,normalised}.npy --queries 0 5 9

For each query one picture, one row for each score file: its most influential training images and, where the models of
`benchmark.removal run` are there, the image generated from the query's seed after the row's top K were removed. The
first row shows the query and the image that a reference model generates from the same seed. Writes
results/removal/rows_<query>.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from abu.models import Autoencoder
from abu.plan import Collection
from abu.testbed import Testbed, testbed_from
from benchmark.losses import collection_of
from benchmark.removal import judged_queries, levels_of, removed_by
from benchmark.retrain import add_judge_flags, references
from benchmark.retrainer import LATENTS, RetrainConfig, Retraining, decoded
from benchmark.scores import by_method, load_scores
from fastgda.core import ROOT, atomic_path, best_device, command_line, command_parser, load_npz
from fastgda.rankings import top
from feature_extraction.readers import read_split

SIDE, GAP, TEXT = 64, 4, 150
"""Pixels of an image, between images, and of the column of names."""


def regenerated(collection: Collection, job: Retraining, query: int, autoencoder: Autoencoder) -> Image.Image | None:
    """The query sampled again from its seed by a stored model; `None` if the model or its pictures are not there."""
    if collection.missing([job]):
        return None
    arrays = load_npz(collection.path(job), (), optional=(LATENTS,))
    if LATENTS not in arrays:
        return None
    return Image.fromarray(decoded(autoencoder.decode, arrays[LATENTS][query], torch.device("cpu")))


def sheet(rows: list[tuple[str, list[Image.Image], Image.Image | None]]) -> Image.Image:
    """Rows of (name, images, image at the right edge or none), one below the other."""
    columns = max(len(images) for _, images, _ in rows)
    step = SIDE + GAP
    picture = Image.new("RGB", (TEXT + (columns + 1) * step + 3 * GAP, len(rows) * step + GAP), "white")
    pen = ImageDraw.Draw(picture)
    for line, (name, images, last) in enumerate(rows):
        top_edge = GAP + line * step
        pen.text((GAP, top_edge + SIDE // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            picture.paste(image.resize((SIDE, SIDE)), (TEXT + column * step, top_edge))
        if last is not None:
            picture.paste(last.resize((SIDE, SIDE)), (TEXT + columns * step + 2 * GAP, top_edge))
    return picture


def draw_rows(
    testbed: Testbed,
    paths: list[Path],
    output: Path,
    chosen: list[int] | None = None,
    count: int = 8,
    level: int | None = None,
) -> None:
    """Writes rows_<query>.png into `output` for the chosen queries: one row of `count` images for each score file."""
    scores = {name: load_scores(path, testbed, "test") for name, path in by_method(paths).items()}
    training, queries = read_split(testbed.data, "data"), read_split(testbed.data, "test_query")
    chosen = chosen or judged_queries(testbed)[:3]
    if not all(0 <= query < len(queries) for query in chosen):
        raise ValueError(f"--queries: expected 0 to {len(queries) - 1}, found {chosen}")
    collection = collection_of(testbed, RetrainConfig())
    autoencoder = testbed.load_source(best_device()).autoencoder.cpu()
    level = level or levels_of(len(training))[2]
    for query in chosen:
        reference = regenerated(collection, references(1)[0], query, autoencoder)
        rows = [(queries.caption(query)[:24], [queries.image(query)], reference)]
        for name, values in scores.items():
            found = [training.image(int(i)) for i in top(values[query : query + 1], count)[0]]
            left = regenerated(collection, Retraining(removed_by(values, query, level), 0), query, autoencoder)
            rows.append((name, found, left))
        path = output / f"rows_{query}.png"
        with atomic_path(path) as temporary:
            sheet(rows).save(temporary)
        print(path)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.image_rows", __doc__)
    parser.add_argument("scores", type=Path, nargs="+", help="score files [Q, N], one row each")
    add_judge_flags(parser)
    parser.add_argument("--queries", type=int, nargs="+", help="test queries (default: three of benchmark.removal)")
    parser.add_argument("--count", type=int, default=8, help="training images of a row (default: 8)")
    parser.add_argument("--level", type=int, help="K of the removal at the right (default: 3.4 %% of the images)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/removal", help="folder of the pictures")
    args = parser.parse_args(argv)
    draw_rows(testbed_from(args), args.scores, args.output, args.queries, args.count, args.level)


if __name__ == "__main__":
    sys.exit(main())
