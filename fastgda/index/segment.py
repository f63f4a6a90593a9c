"""A segment: one whole, unchanging piece of an index on disk. Built in resumable shards, then opened for search.

index.faiss (+ lists.ivfdata)   the FAISS structure over rows 0..n-1
vectors.npy                     [n, D] stored vectors, for re-ranking, exact search and rebuilding
ids.npy, order.npy              row -> id, and the rows in ascending order of id
metadata.parquet, .arrow        row i describes row i; the second is mapped for look-ups
trained.faiss                   the empty trained structure, for additions (where there is training)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap
from tqdm import tqdm

from fastgda.core import (
    atomic_path,
    load_npy,
    manifest_path,
    read_manifest,
    require_file,
    save_json,
    save_npy,
    sha256_file,
    verify_artifact,
    write_manifest,
)
from fastgda.index.backend import EXACT, LISTS_FILE, Structure, as_vectors, merge_on_disk
from fastgda.index.metadata import MetadataTable, write_metadata
from fastgda.index.rows import ScatteredRows
from fastgda.index.source import Kept, NpyRows, Source, Vectors, kept_tables

INDEX, VECTORS, IDS, ORDER, TRAINED = "index.faiss", "vectors.npy", "ids.npy", "order.npy", "trained.faiss"
METADATA, MAPPED_METADATA = "metadata.parquet", "metadata.arrow"
PLAN = "plan.json"


@dataclass(frozen=True)
class SegmentConfig:
    """What a segment's files depend on, besides its vectors."""

    factory: str = EXACT
    """FAISS factory string."""
    store: Literal["float16", "float32"] = "float32"
    """Numbers of the stored vectors."""
    on_disk: bool = False
    """Leave the inverted lists on disk."""
    shards: int = 1
    """Parts that are built one by one and merged."""
    seed: int = 0
    """Of the choice of training vectors, which depends on it and on the ids only."""

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ValueError(f"shards {self.shards}: expected at least 1")

    @property
    def reranks(self) -> bool:
        """Whether candidates are scored again with the stored vectors."""
        return self.factory != EXACT


def training_rows(ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The `count` rows whose ids hash lowest, in ascending order of hash: the same ids in any order of the files.

    The hash is splitmix64 of id + seed times the golden-ratio constant.
    """
    value = ids.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable")[:count]


class Shard(NamedTuple):
    """A part of a segment under construction."""

    path: Path
    """Where it is written, whole or not at all, beside the stored vectors."""
    start: int
    stop: int
    """Rows start..stop-1."""


BuildShards = Callable[[Vectors, SegmentConfig, list[Shard]], None]
"""Makes some shards, in whatever order and process."""


def one_by_one(vectors: Vectors, config: SegmentConfig, shards: list[Shard]) -> None:
    """Makes `shards` in this process."""
    for shard in shards:
        build_shard(shard, vectors, config)


def build_segment(
    folder: Path,
    source: Source,
    config: SegmentConfig,
    *,
    ranker: str,
    command: str,
    trained: Path | None,
    build: BuildShards = one_by_one,
) -> None:
    """Builds a segment in `folder`, going on from the whole shards of an interrupted build of the same source.

    `ranker` identifies what made the vectors of `source` (see `load_embedding`). `trained` is the structure of another
    segment to use; else one is trained on rows of this source. `build` makes the shards that are missing.
    """
    ids = hashlib.sha256(source.ids.tobytes()).hexdigest()
    plan = {"ranker": ranker, "inputs": list(source.inputs.values()), "ids": ids, "dim": source.dim}
    plan["config"] = asdict(config)
    if folder.is_dir() and not ((folder / PLAN).is_file() and json.loads((folder / PLAN).read_text()) == plan):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / PLAN, plan)
    with atomic_path(folder / METADATA) as table, atomic_path(folder / MAPPED_METADATA) as mapped:
        write_metadata(table, mapped, source.ids, source.tables())
    save_npy(folder / IDS, source.ids)
    save_npy(folder / ORDER, np.argsort(source.ids, kind="stable"))
    structure = _trained(folder / TRAINED, source, config, trained)
    if config.shards > 1 and not config.on_disk:
        structure.merge(_empty(folder, config, source.dim))  # refuses now what cannot be merged later
    _store(folder / VECTORS, len(source), source.dim, config.store)
    bounds = np.linspace(0, len(source), config.shards + 1).astype(int).tolist()
    paths = [folder / f"shard_{number:05d}.faiss" for number in range(config.shards)]
    shards = [Shard(*parts) for parts in zip(paths, bounds, bounds[1:], strict=False)]
    build(source.vectors(), config, [shard for shard in shards if not shard.path.is_file()])
    _merge(folder, structure, paths, on_disk=config.on_disk)
    for path in (*paths, folder / PLAN, *folder.glob(".*")):
        path.unlink(missing_ok=True)
    files = tuple(sorted(path for path in folder.iterdir() if path != manifest_path(folder)))
    write_manifest(folder, config, command=command, inputs=source.inputs, files=files, rows=len(source), dim=source.dim)


def build_shard(shard: Shard, vectors: Vectors, config: SegmentConfig) -> None:
    """Stores and indexes the rows of `shard` under the segment's trained structure; needs nothing of other shards."""
    folder = shard.path.parent
    structure = _empty(folder, config, vectors.dim)
    first_byte = open_memmap(folder / VECTORS, mode="r").offset
    # written, not mapped: a full disk is an error then, and processes on several nodes may share a page of the file
    with (
        open(folder / VECTORS, "r+b") as stored,
        tqdm(total=shard.stop - shard.start, desc=shard.path.stem, unit="image") as bar,
    ):
        for first, block in vectors.blocks(shard.start, shard.stop):
            kept = block.astype(config.store)
            stored.seek(first_byte + first * kept[0].nbytes)
            stored.write(kept.tobytes())
            # what is searched is what is stored, so that a rebuild from the stored vectors gives the same structure
            structure.add(as_vectors("stored vectors", kept), first)
            bar.update(len(block))
    with atomic_path(shard.path) as temporary:
        structure.write(temporary)


class Segment:
    """A segment, open for reading. Reading from several threads at once is safe."""

    def __init__(self, folder: Path, *, sha256: str, verify: bool) -> None:
        """Opens `folder`; `ValueError` if its manifest has another hash than `sha256` or a file does not match it.

        `verify` reads every file to compare its hash; else only sizes are compared.
        """
        path = require_file(manifest_path(folder))
        if (found := sha256_file(path)) != sha256:
            raise ValueError(f"{path}: expected SHA-256 {sha256[:12]}… as in the index, found {found[:12]}…")
        manifest = verify_artifact(folder) if verify else read_manifest(folder)
        for name, entry in manifest["files"].items():
            size = require_file(folder / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{folder / name}: expected {entry['bytes']} bytes, found {size}")
        self.folder = folder
        self.config = SegmentConfig(**manifest["config"])
        rows, dim = manifest["rows"], manifest["dim"]
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        self.bytes = sum(sizes.values())
        self.held = sizes[INDEX]
        """Bytes that are read into memory."""
        self.mapped = sum(sizes.get(name, 0) for name in (LISTS_FILE, VECTORS, IDS, ORDER, MAPPED_METADATA))
        """Bytes of which parts are in memory as file cache."""
        self.structure = Structure.read(folder / INDEX)
        if not self.config.on_disk:
            self.structure.use_gpu()
        self.vectors = load_npy(folder / VECTORS, (rows, dim), mmap=True, writable=False)
        self._scattered = ScatteredRows(folder / VECTORS, (rows, dim))
        self.ids = load_npy(folder / IDS, (rows,), mmap=True, writable=False)
        self._order = load_npy(folder / ORDER, (rows,), mmap=True, writable=False)
        self.metadata = MetadataTable(folder / METADATA, folder / MAPPED_METADATA)
        for name, count in ((INDEX, self.structure.rows), (METADATA, len(self.metadata))):
            if count != rows:
                raise ValueError(f"{folder / name}: expected {rows} rows, as many as vectors, found {count}")

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The row of each id [n], -1 where it is not here. Reads only what a binary search touches."""
        places = np.minimum(np.searchsorted(self.ids, ids, sorter=self._order), len(self) - 1)
        rows = np.asarray(self._order[places])
        return np.where(self.ids[rows] == ids, rows, -1)

    def exact_scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Inner products [Q, n] of queries [Q, D] with stored vectors of `rows` [Q, n]; -inf for row -1."""
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        for query, wanted, out in zip(queries, rows, scores, strict=True):
            (places,) = np.nonzero(wanted >= 0)
            places = places[np.argsort(wanted[places])]  # ascending rows, for the sake of the disk
            # row by row: a matrix product of many has threads that all callers share, and they wait for each other
            out[places] = np.vecdot(self._scattered.take(wanted[places]), query)
        return scores


def live_source(segments: list[tuple[Segment, np.ndarray]]) -> Source:
    """A source of the given ascending rows of some segments, ids and metadata included, as they are stored."""

    def tables() -> Iterator[pa.Table]:
        for segment, rows in segments:
            yield from kept_tables(segment.metadata.tables(), rows)

    ids = np.concatenate([segment.ids[rows] for segment, rows in segments])
    inputs = {segment.folder.name: sha256_file(manifest_path(segment.folder)) for segment, _ in segments}
    return Source(
        [Kept(NpyRows(segment.folder / VECTORS), rows) for segment, rows in segments if len(rows)],
        ids,
        tables=tables,
        inputs=inputs,
    )


def _trained(path: Path, source: Source, config: SegmentConfig, given: Path | None) -> Structure:
    """The empty structure, trained and kept in `path` where it needs training."""
    if path.is_file():
        return Structure.read(path)
    if given is not None:
        shutil.copyfile(given, path)
        return Structure.read(path)
    structure = Structure.create(config.factory, source.dim)
    if structure.is_trained:
        return structure
    rows = training_rows(source.ids, structure.training_size(len(source)), config.seed)
    order = np.argsort(rows)
    sample = np.empty((len(rows), source.dim), dtype=np.float32)
    for first, vectors in source.take(rows[order]):
        # the structure is trained on what is stored
        sample[order[first : first + len(vectors)]] = vectors.astype(config.store)
    structure.train(as_vectors("training vectors", sample))
    with atomic_path(path) as temporary:
        structure.write(temporary)
    return structure


def _empty(folder: Path, config: SegmentConfig, dim: int) -> Structure:
    """The trained structure of the segment under construction in `folder`."""
    trained = folder / TRAINED
    return Structure.read(trained) if trained.is_file() else Structure.create(config.factory, dim)


def _store(path: Path, rows: int, dim: int, store: str) -> None:
    """Makes the file of stored vectors at its full size, unless it is there."""
    if not path.is_file():
        with atomic_path(path) as temporary:
            open_memmap(temporary, mode="w+", dtype=np.dtype(store), shape=(rows, dim)).flush()


def _merge(folder: Path, structure: Structure, shards: list[Path], *, on_disk: bool) -> None:
    if on_disk:
        (folder / LISTS_FILE).unlink(missing_ok=True)
        merge_on_disk(structure, shards, folder)
        structure.write(folder / INDEX)
        return
    if len(shards) == 1:
        os.replace(shards[0], folder / INDEX)
        return
    whole = Structure.read(shards[0])
    for shard in shards[1:]:
        whole.merge(Structure.read(shard))
    with atomic_path(folder / INDEX) as temporary:
        whole.write(temporary)
