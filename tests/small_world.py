"""A small testbed in a folder: synthetic pictures in two sets, queries, rankings and a ranker over real features."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw

from abu.models import (
    Autoencoder,
    AutoencoderConfig,
    DiffusionConfig,
    SourceModel,
    build_denoiser,
    save_source,
)
from fastgda.core import sha256_file
from fastgda.credit import Credit
from fastgda.magnitude import Magnitude
from fastgda.ranker import Ranker, RankerConfig, save_ranker
from fastgda.rankings import from_scores, save_rankings
from feature_extraction.extract import main as extract
from serving.bundle import main as bundle_command

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
        made.append(entry | {"creator": f"{style} studio", "licence": "CC0-1.0"})
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


def write_rankings(folder: Path, images: int, queries: int, splits: Sequence[str] = ("test",)) -> None:
    """Writes random rankings for the queries of some splits."""
    for seed, split in enumerate(reversed(splits), 1):
        scores = np.random.default_rng(seed).normal(size=(queries, images)).astype(np.float32)
        save_rankings(folder / f"influence_{split}.npz", from_scores(scores))


def write_source(folder: Path) -> None:
    """Writes an untrained source model of 16 px pictures."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(latent_channels=4, channels=(8, 16))
    config = DiffusionConfig(sample_size=4, latent_channels=4, channels=(16, 16), heads=2)
    save_source(SourceModel(build_denoiser(config), Autoencoder(shape), config, shape), folder)


def write_credit(path: Path, ranker: Path) -> None:
    """Writes a credit rule for the scores of the ranker in file `ranker`: influence rises from 0 to 5."""
    magnitude = Magnitude(np.array([-1.0, 1.0]), np.array([0.0, 5.0]), np.array([0.1, 0.1]))
    Credit(magnitude, 1.0, 10, sha256_file(ranker), "nothing").save(path)


def write_ranker(path: Path, width: int) -> Ranker:
    """Writes and returns an untrained ranker of features of `width` numbers."""
    torch.manual_seed(0)
    ranker = Ranker(RankerConfig(in_dim=width, hidden_sizes=(32,), out_feat_dim=16))
    save_ranker(path, ranker)
    return ranker.eval()


def write_bundle(folder: Path, images: int = 36) -> Path:
    """Writes a training set whose last picture cannot be read, its `pixel` features, a ranker and a bundle of them."""
    write_data(folder, images)
    table = rows(images)
    table[-1]["image"] = b"no picture"
    write_table(folder / "trainset" / "emoji.parquet", table)
    write_ranker(folder / "ranker.pth", 768)
    options = ["--ftype", "pixel", "--splits", "data", "--device", "cpu", "--max_corrupt", "0.1"]
    assert extract(["--data_dir", str(folder), *options]) == 0
    write_credit(folder / "credit.json", folder / "ranker.pth")
    assert build_bundle(folder, folder / "bundle") == 0
    return folder / "bundle"


def build_bundle(folder: Path, out: Path, **changes: object) -> int:
    """Runs the command that makes a bundle of what `write_bundle` wrote."""
    values = {
        "features": folder / "feats" / "pixel",
        "checkpoint": folder / "ranker.pth",
        "metadata": folder / "trainset" / "emoji.parquet",
        "credit": folder / "credit.json",
    } | changes
    flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    return bundle_command(["build", str(out), *flags])
