"""Extracts features of the training set and of the queries in the released layout.

    python -m feature_extraction.extract --mode emoji --ftype effnet+minilm
    python -m feature_extraction.extract --mode emoji --ftype effnet --dry_run    # estimates; writes nothing

Writes <out>/<ftype>/{data_feats,train_query_feats,val_query_feats,test_query_feats}.npy (float32 [images, D], row = id)
and manifest.json. Work is cut into shards that are written atomically under <out>/<ftype>/.shards: after Ctrl-C the
same command goes on from the last whole shard. A split whose pictures, encoder and file are unchanged is skipped. A
composition a+b is made from the files of a and b, which are extracted first where they are not up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from fastgda.core import (
    ROOT,
    atomic_path,
    best_device,
    command_line,
    load_npy,
    manifest_path,
    read_manifest,
    require_file,
    save_npy,
    sha256_file,
    write_manifest,
)
from fastgda.flags import add_flags, from_flags
from feature_extraction.encoders import (
    ENCODERS,
    Encoder,
    concatenate_normalised,
    identity,
    load_encoder,
    parse_weights,
    part_names,
)
from feature_extraction.readers import SPLITS, ImageTable, read_split, split_command, split_path

BATCH = 64
CALIBRATION = 64
"""Images encoded to estimate the rate in a dry run."""


@dataclass(frozen=True)
class ExtractConfig:
    """What to extract, from where, to where."""

    mode: Literal["emoji", "emoji-mini"] = "emoji"
    """Dataset."""
    ftype: str = "effnet+minilm"
    """Encoder: effnet, minilm, pixel, or several joined by '+'."""
    data_dir: Path | None = None
    """Folder with trainset/ and query_*/; by default data/<mode>."""
    out: Path | None = None
    """Folder of the features; by default <data_dir>/feats."""
    splits: tuple[str, ...] = SPLITS
    """What to extract."""
    weights: tuple[str, ...] = ()
    """Weights that replace the packaged ones: PATH, or NAME=PATH for each part of a composition."""
    device: str | None = None
    """torch device; by default CUDA where there is one, else the CPU."""
    shard_rows: int = 512
    """Images in one shard, the piece that is redone after an interruption."""
    dry_run: bool = False
    """Print images, estimated seconds and bytes, and write nothing."""

    def __post_init__(self) -> None:
        part_names(self.ftype)
        unknown = [split for split in self.splits if split not in SPLITS]
        if unknown or not self.splits:
            raise ValueError(f"--splits {' '.join(self.splits)}: expected some of {' '.join(SPLITS)}")
        if self.shard_rows < 1:
            raise ValueError(f"--shard_rows {self.shard_rows}: expected at least 1")

    @property
    def source(self) -> Path:
        """The dataset's folder."""
        return self.data_dir or ROOT / "data" / self.mode

    @property
    def target(self) -> Path:
        """The folder that holds one folder for each ftype."""
        return self.out or self.source / "feats"

    @property
    def torch_device(self) -> torch.device:
        """The device that encoders run on; `ValueError` if this machine has none of that name."""
        if self.device is None:
            return best_device()
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device}: not available here ({str(error).splitlines()[0]})") from error
        return device


class Sources:
    """The splits' files: hashed at once, so that a missing one is noticed first; read when needed."""

    def __init__(self, config: ExtractConfig) -> None:
        self.folder = config.source
        self.hashes: dict[str, str] = {}
        for split in config.splits:
            path = require_file(split_path(self.folder, split), split_command(self.folder, split))
            self.hashes[split] = sha256_file(path)
        self._tables: dict[str, ImageTable] = {}

    def table(self, split: str) -> ImageTable:
        """The pictures of `split`, kept after the first reading."""
        if split not in self._tables:
            self._tables[split] = read_split(self.folder, split)
        return self._tables[split]


def feature_path(folder: Path, split: str) -> Path:
    """The feature file of `split` in `<feats>/<ftype>`."""
    return folder / f"{split}_feats.npy"


def current_splits(folder: Path, encoder: dict[str, Any], hashes: dict[str, str]) -> dict[str, str]:
    """The splits in `folder` that were made by this encoder from these files (split -> hash of its pictures).

    A split that is not asked for now (absent from `hashes`) stays current as long as the encoder is the same.
    """
    if not manifest_path(folder).is_file():
        return {}
    manifest = read_manifest(folder)
    if manifest["config"] != encoder:
        return {}
    current = {}
    for split, made_from in manifest["inputs"].items():
        path = feature_path(folder, split)
        recorded = manifest["files"].get(path.name, {}).get("bytes")
        if hashes.get(split, made_from) == made_from and path.is_file() and path.stat().st_size == recorded:
            current[split] = made_from
    return current


def forget(folder: Path) -> None:
    """Deletes the manifest in `folder` and the features it lists: made by another encoder, they must not be mixed."""
    if manifest_path(folder).is_file():
        for name in read_manifest(folder)["files"]:
            (folder / name).unlink(missing_ok=True)
        manifest_path(folder).unlink()


def extract(config: ExtractConfig) -> None:
    """Brings the features of `config.ftype`, and of its parts, up to date."""
    sources = Sources(config)
    weights = parse_weights(config.ftype, config.weights)
    parts = part_names(config.ftype)
    for ftype in [*parts, config.ftype] if len(parts) > 1 else parts:
        folder = config.target / ftype
        encoder_identity = identity(ftype, weights)
        current = current_splits(folder, encoder_identity, sources.hashes)
        todo = [split for split in config.splits if split not in current]
        if not todo:
            print(f"{folder}: up to date")
            continue
        if not current:
            forget(folder)
        encoder = None if "+" in ftype else load_encoder(ftype, config.torch_device, weights)
        for split in todo:
            if encoder is None:
                blocks, rows = composed_blocks(config, ftype, split)
                write_rows(feature_path(folder, split), blocks, rows, sum(ENCODERS[part].dim for part in parts))
            else:
                key = [encoder_identity, sources.hashes[split]]
                extract_split(config, encoder, folder, split, sources.table(split), key)
            current[split] = sources.hashes[split]
            command = f"python -m feature_extraction.extract --mode {config.mode} --ftype {ftype}"
            files = tuple(feature_path(folder, name) for name in current)
            write_manifest(folder, encoder_identity, command=command, inputs=current, files=files)
        shutil.rmtree(folder / ".shards", ignore_errors=True)
        print(f"{folder}: {', '.join(todo)}")


def extract_split(
    config: ExtractConfig, encoder: Encoder, folder: Path, split: str, table: ImageTable, key: list[Any]
) -> None:
    """Encodes one split, shard by shard, and merges the shards. `key` is what a shard depends on."""
    name = hashlib.sha256(json.dumps([*key, config.shard_rows], sort_keys=True).encode()).hexdigest()[:12]
    shards = folder / ".shards" / f"{split}-{name}"
    starts = range(0, len(table), config.shard_rows)
    missing = [start for start in starts if not (shards / f"{start:09d}.npy").is_file()]
    done = len(table) - sum(min(config.shard_rows, len(table) - start) for start in missing)
    with tqdm(total=len(table), initial=done, desc=f"{encoder.name} {split}", unit="image") as bar:
        for start in missing:
            rows = range(start, min(start + config.shard_rows, len(table)))
            features = np.concatenate(list(encoded_blocks(encoder, table, rows, bar)))
            save_npy(shards / f"{start:09d}.npy", features)

    def blocks() -> Iterator[np.ndarray]:
        for start in starts:
            rows = min(config.shard_rows, len(table) - start)
            yield load_npy(shards / f"{start:09d}.npy", (rows, encoder.dim), finite=True)

    write_rows(feature_path(folder, split), blocks(), len(table), encoder.dim)
    shutil.rmtree(shards)


def encoded_blocks(encoder: Encoder, table: ImageTable, rows: range, bar: tqdm | None = None) -> Iterator[np.ndarray]:
    """Features of `rows`, batch by batch; pictures are decoded only for an encoder that reads them."""
    for start in range(rows.start, rows.stop, BATCH):
        batch = range(start, min(start + BATCH, rows.stop))
        images = [table.image(row) for row in batch] if encoder.reads_images else []
        yield encoder.encode(images, [table.caption(row) for row in batch])
        if bar is not None:
            bar.update(len(batch))


def composed_blocks(config: ExtractConfig, ftype: str, split: str) -> tuple[Iterator[np.ndarray], int]:
    """(blocks of rows of a composition, number of rows), from the up-to-date files of its parts."""
    names = part_names(ftype)
    paths = [feature_path(config.target / name, split) for name in names]
    arrays = [load_npy(path, (None, ENCODERS[name].dim), mmap=True) for path, name in zip(paths, names, strict=True)]
    rows = len(arrays[0])
    starts = range(0, rows, config.shard_rows)
    return (concatenate_normalised([a[s : s + config.shard_rows] for a in arrays]) for s in starts), rows


def write_rows(path: Path, blocks: Iterator[np.ndarray], rows: int, width: int) -> None:
    """Writes one `.npy` file [rows, width] float32 from blocks of rows, holding one block in memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        for block in blocks:
            handle.write(np.ascontiguousarray(block, dtype="<f4").tobytes())


def dry_run(config: ExtractConfig) -> None:
    """Prints, for each encoder and split, the images, the seconds estimated from a short run, and the bytes."""
    sources = Sources(config)
    weights = parse_weights(config.ftype, config.weights)
    total_seconds, total_bytes = 0.0, 0
    parts = part_names(config.ftype)
    for ftype in [*parts, config.ftype] if len(parts) > 1 else parts:
        current = current_splits(config.target / ftype, identity(ftype, weights), sources.hashes)
        todo = [split for split in config.splits if split not in current]
        seconds = 0.0
        if todo and "+" not in ftype:
            seconds = seconds_per_image(load_encoder(ftype, config.torch_device, weights), sources.table(todo[0]))
        width = sum(ENCODERS[part].dim for part in part_names(ftype))
        for split in config.splits:
            images = len(sources.table(split))
            need = (seconds * images, 4 * images * width) if split in todo else (0.0, 0)
            state = f"about {need[0]:.0f} s, {need[1] / 1e6:.1f} MB" if split in todo else "up to date"
            print(f"{feature_path(config.target / ftype, split)}: {images} images, {state}")
            total_seconds, total_bytes = total_seconds + need[0], total_bytes + need[1]
    print(f"total: about {total_seconds:.0f} s on {config.torch_device}, {total_bytes / 1e6:.1f} MB; nothing written")


def seconds_per_image(encoder: Encoder, table: ImageTable) -> float:
    """Time of one image, from the second of two runs over up to 64 images (the first warms up)."""
    rows = range(min(CALIBRATION, len(table)))
    list(encoded_blocks(encoder, table, rows))
    start = time.perf_counter()
    list(encoded_blocks(encoder, table, rows))
    return (time.perf_counter() - start) / max(len(rows), 1)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m feature_extraction.extract", description=__doc__.splitlines()[0])
    add_flags(parser, ExtractConfig)
    config = from_flags(ExtractConfig, parser.parse_args(argv))
    if config.dry_run:
        dry_run(config)
    else:
        extract(config)


if __name__ == "__main__":
    sys.exit(main())
