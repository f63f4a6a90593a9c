"""Shards: the pieces in which the features of one split are made, by one process or several, and put together.

A shard is a run of rows under <feats>/<ftype>/.shards/<split>-<hash>, written whole: features, and a note of its ids
and of the pictures that could not be read. The hash stands for encoder, pictures and shard size, so shards of other
work are never taken. A picture that cannot be read, or whose caption cannot where the encoder reads it, gets a row of
zeros: its cosine with everything is 0.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastgda.core import atomic_path, load_npy, require_file, save_json, save_npy
from feature_extraction.encoders import Encoder
from feature_extraction.sources import Pictures

BATCH = 64
READERS = 4
"""Threads that read pictures while the network has the batch before; Pillow decodes outside Python's lock."""
Skipped = list[dict[str, Any]]
"""Pictures that could not be read: {"id", "key", "reason"}, by id."""


def feature_path(folder: Path, split: str) -> Path:
    """The feature file of `split` in <feats>/<ftype>."""
    return folder / f"{split}_feats.npy"


def skipped_path(folder: Path, split: str) -> Path:
    """The list of the pictures of `split` that could not be read; absent where all could."""
    return folder / f"{split}_skipped.json"


def read_skipped(folder: Path, split: str) -> Skipped:
    """The pictures of `split` that could not be read."""
    path = skipped_path(folder, split)
    return json.loads(path.read_text()) if path.is_file() else []


def save_skipped(folder: Path, split: str, skipped: Skipped) -> None:
    """Writes that list, or removes an old one where all pictures could be read."""
    if skipped:
        save_json(skipped_path(folder, split), skipped)
    else:
        skipped_path(folder, split).unlink(missing_ok=True)


@dataclass(frozen=True)
class Plan:
    """The shards of one split; every process of the same work makes the same plan."""

    folder: Path
    table: Pictures
    dim: int
    """Width of a feature."""
    shard_rows: int
    """Pictures in a shard; the last may hold fewer."""
    max_corrupt: float
    """Largest share of pictures that may be unreadable."""

    @classmethod
    def make(
        cls, feats: Path, split: str, table: Pictures, dim: int, shard_rows: int, max_corrupt: float, key: list[Any]
    ) -> Plan:
        """The plan of `split` in <feats>/<ftype>; `key` is what its features depend on."""
        name = hashlib.sha256(json.dumps([*key, shard_rows], sort_keys=True).encode()).hexdigest()[:12]
        return cls(feats / ".shards" / f"{split}-{name}", table, dim, shard_rows, max_corrupt)

    def rows(self, start: int) -> range:
        """The rows of the shard that begins at `start`."""
        return range(start, min(start + self.shard_rows, len(self.table)))

    def share(self, process: int = 0, processes: int = 1) -> list[int]:
        """The shards of one of several processes: neighbours, so that each reads its own part of the source."""
        starts = range(0, len(self.table), self.shard_rows)
        return list(starts[process * len(starts) // processes : (process + 1) * len(starts) // processes])

    def file(self, start: int) -> Path:
        """The features of a shard."""
        return self.folder / f"{start:09d}.npy"

    def missing(self, starts: list[int]) -> list[int]:
        """Those of the shards that are not there yet."""
        return [start for start in starts if not self.file(start).is_file()]

    def extract(self, encoder: Encoder, starts: list[int], label: str) -> None:
        """Makes those of the shards that are missing; `ValueError` as soon as too many pictures cannot be read."""
        missing = self.missing(starts)
        total, left = (sum(len(self.rows(start)) for start in some) for some in (starts, missing))
        skipped: Skipped = []
        with tqdm(total=total, initial=total - left, desc=label, unit="image") as bar:
            for start in missing:
                features, unread = encode_rows(encoder, self.table, self.rows(start), bar)
                skipped += unread
                self.check(skipped)
                self.store(start, features, unread)

    def store(self, start: int, features: np.ndarray, skipped: Skipped) -> None:
        """Writes a shard, its note first."""
        save_json(self.file(start).with_suffix(".json"), {"ids": self._ids(start), "skipped": skipped})
        save_npy(self.file(start), features)

    def check(self, skipped: Skipped) -> None:
        """`ValueError` naming the first unreadable picture if there are more of them than allowed."""
        if len(skipped) > self.max_corrupt * len(self.table):
            raise ValueError(
                f"{self.table.path}: expected at most {self.max_corrupt:.2%} unreadable pictures (--max_corrupt), "
                f"found {len(skipped)} of {len(self.table)}; the first: {skipped[0]['reason']}"
            )

    def _ids(self, start: int) -> dict[str, Any]:
        rows = self.rows(start)
        keys = self.table.keys[rows.start : rows.stop]
        return {
            "first": rows.start,
            "last": rows.stop - 1,
            "keys": hashlib.sha256("\0".join(keys).encode()).hexdigest(),
        }

    def merge(self, feats: Path, split: str) -> None:
        """Writes the feature file of the whole split and the list of unreadable pictures; removes the shards.

        Raises `ValueError` naming the shard that is missing, damaged or holds other ids.
        """
        starts = self.share()
        if missing := self.missing(starts):
            raise ValueError(
                f"{self.folder}: expected {len(starts)} shards, found {len(starts) - len(missing)}; the first missing "
                f"one begins at row {missing[0]}. Run its process again, or the command without --merge"
            )
        skipped: Skipped = []
        for start in starts:
            note = self.file(start).with_suffix(".json")
            content = json.loads(require_file(note).read_text())
            if content["ids"] != self._ids(start):
                raise ValueError(f"{note}: expected the ids {self._ids(start)}, found {content['ids']}")
            skipped += content["skipped"]
        self.check(skipped)
        write_rows(feature_path(feats, split), self._blocks(starts), len(self.table), self.dim)
        save_skipped(feats, split, skipped)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _blocks(self, starts: list[int]) -> Iterator[np.ndarray]:
        for start in starts:
            yield load_npy(self.file(start), (len(self.rows(start)), self.dim), finite=True)


def encode_rows(encoder: Encoder, table: Pictures, rows: range, bar: tqdm | None = None) -> tuple[np.ndarray, Skipped]:
    """(features [rows, D], what could not be read); pictures and captions are fetched only for an encoder of them.

    Batches begin at the first of `rows`, so that a shard's features do not depend on who makes it.
    """
    features = np.zeros((len(rows), encoder.dim), np.float32)
    skipped: Skipped = []
    batches = [range(start, min(start + BATCH, rows.stop)) for start in range(rows.start, rows.stop, BATCH)]
    with ThreadPoolExecutor(READERS) as pool:
        asked = ((batch, pool.map(partial(_read, encoder, table), batch)) for batch in batches)
        # a pair is begun with both its batches asked for: one is read while the one before it is encoded
        for (batch, found), _ahead in pairwise(chain(asked, [(range(0), iter(()))])):
            images, captions, readable = [], [], []
            for row, (image, caption, reason) in zip(batch, found, strict=True):
                if reason:
                    skipped.append({"id": row, "key": table.keys[row], "reason": reason})
                    continue
                readable.append(row)
                captions.append(caption)
                if image is not None:
                    images.append(image)
            if readable:
                features[np.asarray(readable) - rows.start] = encoder.encode(images, captions)
            if bar is not None:
                bar.update(len(batch))
    return features, skipped


def _read(encoder: Encoder, table: Pictures, row: int) -> tuple[Image.Image | None, str, str]:
    """(picture, caption, why they cannot be read): what `encoder` does not look at is not fetched."""
    try:
        caption = table.caption(row) if encoder.reads_captions else ""
        return table.image(row) if encoder.reads_images else None, caption, ""
    except ValueError as error:
        return None, "", str(error)


def write_rows(path: Path, blocks: Iterator[np.ndarray], rows: int, width: int) -> None:
    """Writes one `.npy` file [rows, width] float32 from blocks of rows, holding one block in memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        for block in blocks:
            handle.write(np.ascontiguousarray(block, dtype="<f4").tobytes())
