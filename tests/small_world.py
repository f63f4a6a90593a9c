"""A small testbed in a folder: synthetic pictures in two sets, queries, rankings and a ranker over real features."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw

from fastgda.ranker import Ranker, RankerConfig, save_ranker
from fastgda.rankings import from_scores, save_rankings

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle")
SETS = ("flat", "outline")


def draw(colour: str, shape: str, style: str) -> Image.Image:
    """One 64 px picture."""
    picture = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(picture)
    paint = {"fill": colour} if style == "flat" else {"outline": colour, "width": 5}
    if shape == "circle":
        pen.ellipse((8, 8, 56, 56), **paint)  # type: ignore[arg-type]
    elif shape == "square":
        pen.rectangle((10, 10, 54, 54), **paint)  # type: ignore[arg-type]
    else:
        pen.polygon([(32, 8), (56, 56), (8, 56)], **paint)  # type: ignore[arg-type]
    return picture


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def rows(count: int, start: int = 0) -> list[dict]:
    """`count` rows of a table, ids from 0, beginning with the `start`-th combination of colour, shape and style."""
    combinations = [(colour, shape, style) for style in SETS for shape in SHAPES for colour in COLOURS]
    made = []
    for number in range(count):
        colour, shape, style = combinations[(start + number) % len(combinations)]
        caption = f"{colour} {shape}, {style} style"
        picture = png(draw(colour, shape, style))
        entry = {"id": number, "image": picture, "captions": [caption], "concept": f"{colour} {shape}", "set": style}
        made.append(entry)
    return made


def write_table(path: Path, table: list[dict]) -> None:
    """Writes rows as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), path)


def write_data(folder: Path, images: int = 36, queries: int = 4) -> None:
    """Writes the training set and the three query sets."""
    write_table(folder / "trainset" / "emoji.parquet", rows(images))
    for start, split in enumerate(("train", "val", "test")):
        write_table(folder / f"query_{split}" / "queries.parquet", rows(queries, start=7 * start))


def write_rankings(folder: Path, images: int, queries: int) -> None:
    """Writes random rankings for the test queries."""
    scores = np.random.default_rng(1).normal(size=(queries, images)).astype(np.float32)
    save_rankings(folder / "influence_test.npz", from_scores(scores))


def write_ranker(path: Path, width: int) -> Ranker:
    """Writes and returns an untrained ranker of features of `width` numbers."""
    torch.manual_seed(0)
    ranker = Ranker(RankerConfig(in_dim=width, hidden_sizes=(32,), out_feat_dim=16))
    save_ranker(path, ranker)
    return ranker.eval()
