"""Encodes pictures and captions for a source model with its own autoencoder and text encoders.

    python -m abu.encode_pictures --source stabilityai/stable-diffusion-2 --output data/coco/trainset \\
        --pictures data/coco/trainset/annotations/captions_train2017.json --pixels 128 --captions 5
    python -m abu.encode_pictures --source sd-v1-4/ --pictures laion/ --output laion-encoded --pixels 512
    python -m abu.encode_pictures --source stabilityai/stable-diffusion-2 --pictures data/coco/query_test \\
        --output data/coco/query_test --pixels 128 --no-flip

`--source` is a folder that diffusers saved or its name on the hub; `--pictures` is anything that
feature_extraction/sources.py reads. Writes, in the released layout, latents.npy [V·N, c, h, w] float32 (unflipped, then
flipped) and text_embeddings.npy [N, C, T, d]. Goes on where it was stopped. A picture that cannot be read keeps its
row, as zeros, and is listed in latents_skipped.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from abu.encoded import LATENTS, TEXT
from abu.pipelines import ENCODERS, PipelineEncoder, source_hashes
from fastgda.core import (
    best_device,
    command_line,
    command_parser,
    keyed_generator,
    manifest_difference,
    manifest_path,
    save_json,
    write_manifest,
)
from fastgda.flags import add_flags, from_flags
from feature_extraction.preprocess import Preprocessing
from feature_extraction.sources import Pictures, open_source

SKIPPED = "latents_skipped.json"
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation that take [0, 1] to [-1, 1]."""


@dataclass(frozen=True)
class EncodeConfig:
    """What is written."""

    pixels: int = 512
    """Side of the square that is kept: the short side is resized to it, then the centre cut out."""
    captions: int = 1
    """Captions of each picture, the first ones; a picture with fewer has them repeated."""
    flip: bool = True
    """Whether the mirrored pictures are encoded too."""
    text_dtype: Literal["float16", "float32"] = "float16"
    """Type of the token states on disk: COCO's take 93 GB in float16."""
    seed: int = 0
    """Of the draw from the autoencoder's posterior."""
    max_corrupt: float = 0.01
    """Share of unreadable pictures that is accepted."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the arrays depend on."""
        return {name: value for name, value in vars(self).items() if name != "max_corrupt"}

    def __post_init__(self) -> None:
        if self.pixels < 1 or self.captions < 1 or not 0 <= self.max_corrupt <= 1:
            raise ValueError(
                "expected at least one pixel and caption and a share from 0 to 1, "
                f"found {self.pixels}, {self.captions} and {self.max_corrupt}"
            )


class Writer:
    """The arrays while they are written: under a temporary name, with a note of how many pictures are done."""

    def __init__(self, folder: Path, config: EncodeConfig, inputs: dict[str, str]) -> None:
        self.files = {name: folder / f".{name}.partial" for name in (LATENTS, TEXT)}
        self.note, self.folder = folder / ".encode_pictures.json", folder
        key = json.loads(json.dumps({"config": config.identity, "inputs": inputs}))
        self.state: dict[str, Any] = {**key, "done": 0, "skipped": []}
        if self.note.is_file():
            found = json.loads(self.note.read_text())
            if {name: found[name] for name in key} != key:
                raise ValueError(
                    f"{self.note}: expected an unfinished encoding of the same pictures, source and settings, found "
                    "one of others; delete it to start again"
                )
            if all(file.is_file() for file in self.files.values()):
                self.state = found
        self.arrays: dict[str, np.memmap] = {}

    @property
    def done(self) -> int:
        """Pictures whose rows are on disk."""
        return self.state["done"]

    def write(self, rows: dict[str, list[tuple[int, np.ndarray]]], shapes: dict[str, int], done: int) -> None:
        """Writes blocks (first row, values) of each array of `shapes` rows, then notes that `done` are finished."""
        for name, blocks in rows.items():
            if name not in self.arrays:
                self.arrays[name] = self._open(name, shapes[name], blocks[0][1])
            for start, values in blocks:
                self.arrays[name][start : start + len(values)] = values
            self.arrays[name].flush()
        self.state["done"] = done
        save_json(self.note, self.state)

    def _open(self, name: str, total: int, like: np.ndarray) -> np.memmap:
        shape, file = (total, *like.shape[1:]), self.files[name]
        if not self.done:
            return np.lib.format.open_memmap(file, mode="w+", dtype=like.dtype, shape=shape)
        array = np.lib.format.open_memmap(file, mode="r+")
        if array.shape != shape or array.dtype != like.dtype:
            raise ValueError(f"{file}: expected {like.dtype} {list(shape)}, found {array.dtype} {list(array.shape)}")
        return array

    def finish(self) -> list[Path]:
        """Gives the arrays their names."""
        self.arrays.clear()
        for name, file in self.files.items():
            os.replace(file, self.folder / name)
        skipped = self.folder / SKIPPED
        if self.state["skipped"]:
            save_json(skipped, self.state["skipped"])
        else:
            skipped.unlink(missing_ok=True)
        self.note.unlink()
        return [self.folder / name for name in self.files]


def chosen_captions(captions: list[str], count: int) -> list[str]:
    """The first `count`, repeated from the first on where there are fewer; empty ones where there is none."""
    captions = captions or [""]
    return [captions[index % len(captions)] for index in range(count)]


def read_batch(pictures: Pictures, rows: range, config: EncodeConfig) -> tuple[Tensor, list[dict[str, Any]]]:
    """(images [B, 3, P, P] in [-1, 1], those that could not be read, which are grey)."""
    images, skipped = [], []
    for row in rows:
        try:
            images.append(pictures.image(row))
        except ValueError as error:
            images.append(Image.new("RGB", (config.pixels, config.pixels)))
            skipped.append({"id": row, "key": pictures.keys[row], "reason": str(error)})
    return Preprocessing(config.pixels, config.pixels, HALF, HALF)(images), skipped


def encode_pictures(
    pictures: Pictures, encoder: PipelineEncoder, config: EncodeConfig, writer: Writer, batch_size: int = 32
) -> list[Path]:
    """Writes all rows that `writer` does not have yet; returns the finished files.

    Raises `ValueError` if too many pictures cannot be read.
    """
    total = len(pictures)
    views = 2 if config.flip else 1
    for start in tqdm(range(writer.done, total, batch_size), desc="encode", unit="batch"):
        rows = range(start, min(start + batch_size, total))
        images, unread = read_batch(pictures, rows, config)
        writer.state["skipped"] += unread
        if len(skipped := writer.state["skipped"]) > config.max_corrupt * total:
            raise ValueError(
                f"{pictures.path}: expected at most {config.max_corrupt:.2%} unreadable pictures (--max_corrupt), "
                f"found {len(skipped)} of {total}; the first: {skipped[0]['reason']}"
            )
        blocks = []
        for view in range(views):

            def noise(index: int, shape: tuple[int, ...], rows: range = rows, view: int = view) -> Tensor:
                key = keyed_generator("posterior", config.seed, rows[index], view)
                return torch.randn(shape, generator=key)

            latents = encoder.latents(images.flip(-1) if view else images, noise).float().cpu().numpy()
            latents[[entry["id"] - start for entry in unread]] = 0
            blocks.append((view * total + start, latents))
        captions = [text for row in rows for text in chosen_captions(pictures.captions[row], config.captions)]
        text = encoder.text(captions, config.pixels).cpu().numpy().astype(config.text_dtype)
        if not np.isfinite(text).all():
            raise ValueError(
                f"pictures {rows.start}..{rows.stop - 1}: expected finite token states; --text_dtype float32"
            )
        grouped = text.reshape(len(rows), config.captions, *text.shape[1:])
        writer.write({LATENTS: blocks, TEXT: [(start, grouped)]}, {LATENTS: views * total, TEXT: total}, rows.stop)
    return writer.finish()


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = command_parser("python -m abu.encode_pictures", __doc__)
    made.add_argument("--source", required=True, help="folder of a pipeline, or its name on the hub")
    made.add_argument("--pictures", type=Path, required=True, help="pictures with captions")
    made.add_argument("--output", type=Path, required=True, help="folder of the two arrays")
    made.add_argument("--batch_size", type=int, default=32, help="pictures encoded at once (default: %(default)s)")
    add_flags(made, EncodeConfig)
    return made


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    config, pictures = from_flags(EncodeConfig, args), open_source(args.pictures)
    if not len(pictures):
        raise ValueError(f"{args.pictures}: expected at least one picture, found none")
    inputs = {"pictures": pictures.fingerprint} | source_hashes(args.source, ENCODERS)
    files = [args.output / name for name in (LATENTS, TEXT)]
    for file in files:
        if file.is_file() and not manifest_path(file).is_file():
            raise ValueError(f"{file}: expected a file of this command or none, found one without a manifest")
    if all(manifest_difference(file, config.identity, inputs) is None for file in files):
        print(*(f"{file}: up to date" for file in files), sep="\n")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    writer = Writer(args.output, config, inputs)
    encoder = PipelineEncoder(args.source, best_device())
    for file in encode_pictures(pictures, encoder, config, writer, args.batch_size):
        write_manifest(file, config.identity, command="python -m abu.encode_pictures", inputs=inputs)
        print(file)


if __name__ == "__main__":
    sys.exit(main())
