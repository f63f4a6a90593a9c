"""Readers of pictures with captions: the testbed's Parquet files, and one safe way to open an image.

A table's row order is its id order, so that row i of a feature file belongs to id i.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from fastgda.core import require_file, sha256_file

MAX_PIXELS = 50_000_000
COLUMNS = ("id", "image", "captions", "concept", "set")
SPLITS = ("data", "train_query", "val_query", "test_query")

# the size is checked here; for good, because warnings.catch_warnings around each call is not safe in threads
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def open_image(source: bytes | str | Path, name: str = "") -> Image.Image:
    """A whole RGB image, upright by its EXIF tag, transparent parts on white.

    The size is read from the header before any pixel is decoded. `name` is what errors call an image given as
    bytes. Raises `ValueError` if it is no image, is truncated, or has no pixels or more than 50 megapixels.
    """
    if not isinstance(source, bytes):
        name = name or str(source)
        require_file(source)
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: expected at most {MAX_PIXELS / 1e6:.0f} megapixels, found more ({error})") from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise ValueError(f"{name}: expected an image (PNG, JPEG, WebP, GIF, ...), found something else") from error
    with picture:
        return plain(picture, name)


def plain(picture: Image.Image, name: str) -> Image.Image:
    """The same of a picture that Pillow has opened, or that was made in memory; `picture` itself is left as it is."""
    if min(picture.size) < 1:
        raise ValueError(f"{name}: expected an image, found one of {picture.width} x {picture.height} pixels")
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"{name}: expected at most {MAX_PIXELS / 1e6:.0f} megapixels, "
            f"found {picture.width} x {picture.height} = {picture.width * picture.height / 1e6:.1f}"
        )
    try:
        picture.load()
        return _on_white(ImageOps.exif_transpose(picture))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"{name}: expected a whole image, found a damaged or truncated one ({error})") from error


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow would cut 16 bits off at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    paper = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(paper, layer).convert("RGB")


@dataclass(frozen=True)
class ImageTable:
    """Pictures with captions; row i has id i."""

    path: Path
    """The file they came from."""
    encoded: list[bytes]
    """Image files (PNG) as bytes."""
    captions: list[list[str]]
    """At least one caption for each image."""
    concepts: list[str]
    sets: list[str]
    """The creator's style, for instance "noto"."""

    def __len__(self) -> int:
        return len(self.encoded)

    def image(self, row: int) -> Image.Image:
        """The decoded picture of `row`."""
        return open_image(self.encoded[row], f"{self.path}, id {row}")

    def caption(self, row: int) -> str:
        """The first caption of `row`: the one whose text feature is used."""
        return self.captions[row][0]

    @property
    def keys(self) -> list[str]:
        """The ids, as text."""
        return [str(row) for row in range(len(self))]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the file."""
        return sha256_file(self.path)


def read_table(path: str | Path, made_by: str = "") -> ImageTable:
    """Reads a Parquet file of images; rows are put in id order.

    Raises `ValueError` naming the file if it is missing (with the command `made_by` that makes it), damaged,
    lacks a column, if its ids are not 0..n-1, or if an image has no caption.
    """
    path = require_file(path, made_by)
    try:
        names = pq.read_schema(path).names
        missing = [column for column in COLUMNS if column not in names]
        if missing:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, found no {', '.join(missing)}")
        columns = pq.read_table(path, columns=list(COLUMNS)).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a whole Parquet file, found a damaged one ({error})") from error
    ids = np.asarray(columns["id"], dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(ids[order], np.arange(len(ids))):
        raise ValueError(f"{path}: expected the ids 0..{len(ids) - 1}, each once, found others")
    for row in order:
        if not columns["captions"][row]:
            raise ValueError(f"{path}: expected a caption for each image, found none for id {ids[row]}")

    def sorted_column(name: str) -> list:
        return [columns[name][row] for row in order]

    return ImageTable(
        path, sorted_column("image"), sorted_column("captions"), sorted_column("concept"), sorted_column("set")
    )


def split_path(data_dir: Path, split: str) -> Path:
    """The Parquet file of `split`: "data" is the training set, "test_query" the test queries, and so on."""
    if split == "data":
        return data_dir / "trainset" / "emoji.parquet"
    if split in SPLITS:
        return data_dir / f"query_{split.removesuffix('_query')}" / "queries.parquet"
    raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")


def split_command(data_dir: Path, split: str) -> str:
    """The command that makes the Parquet file of `split`."""
    return f"python -m feature_extraction.emoji --mode {data_dir.name}" if split == "data" else "python -m abu.sample"


def read_split(data_dir: Path, split: str) -> ImageTable:
    """The pictures of `split`; `ValueError` naming the command that makes them if they are not there."""
    return read_table(split_path(data_dir, split), split_command(data_dir, split))
