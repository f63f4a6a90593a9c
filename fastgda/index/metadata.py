"""What is known about each training image, as Parquet in row groups, so that a few rows are read without the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastgda.core import require_file

COLUMNS = ("caption", "creator", "licence", "path", "url")
SCHEMA = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in COLUMNS)])
ROW_GROUP = 1024
"""Rows read together for the sake of one."""
GROUPS_KEPT = 256
"""Row groups kept in memory after reading."""


def stored_ids(paths: Sequence[Path]) -> np.ndarray | None:
    """The column `id` of Parquet files in order, int64; `None` where they have no such column."""
    parts = []
    for path in paths:
        with _reading(path):
            file = pq.ParquetFile(require_file(path))
            if "id" not in file.schema_arrow.names:
                return None
            column = file.read(columns=["id"]).column("id")
            if column.null_count or not pa.types.is_integer(column.type):
                raise ValueError(f"{path}: expected integers in the column id, found {column.type} or empty cells")
            parts.append(column.cast(pa.int64()).to_numpy())
    return np.concatenate(parts) if parts else None


def count_rows(paths: Sequence[Path]) -> int:
    """Rows of Parquet files together."""
    total = 0
    for path in paths:
        with _reading(path):
            total += pq.ParquetFile(require_file(path)).metadata.num_rows
    return total


def read_tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """The known columns of Parquet files, a piece at a time: `captions` (a list) gives its first as `caption`."""
    for path in paths:
        with _reading(path):
            file = pq.ParquetFile(path)
            names = set(file.schema_arrow.names)
            wanted = [name for name in (*COLUMNS, "captions") if name in names]
            for batch in file.iter_batches(ROW_GROUP, columns=wanted):
                found = {name: batch.column(name) for name in wanted}
                if "captions" in found and "caption" not in found:
                    found["caption"] = pa.array([row[0] if row else None for row in found["captions"].to_pylist()])
                empty = pa.nulls(len(batch), pa.string())
                yield pa.table({name: found.get(name, empty).cast(pa.string()) for name in COLUMNS})


def write_metadata(path: Path, ids: np.ndarray, tables: Iterable[pa.Table]) -> None:
    """Writes `tables` under `ids` in row groups of `ROW_GROUP`; without tables, ids only.

    Raises `ValueError` if the tables have another number of rows than there are ids.
    """
    waiting, start = SCHEMA.remove(0).empty_table(), 0
    with pq.ParquetWriter(path, SCHEMA) as writer:

        def write(table: pa.Table, first: int) -> int:
            column = pa.array(ids[first : first + len(table)])
            writer.write_table(table.add_column(0, "id", column), row_group_size=ROW_GROUP)
            return first + len(table)

        for table in tables:
            waiting = pa.concat_tables([waiting, table])
            if start + len(waiting) > len(ids):
                raise ValueError(f"metadata: expected {len(ids)} rows, as many as vectors, found more")
            if whole := len(waiting) // ROW_GROUP * ROW_GROUP:
                start = write(waiting.slice(0, whole), start)
                waiting = waiting.slice(whole)
        if start + len(waiting) != len(ids):
            raise ValueError(f"metadata: expected {len(ids)} rows, as many as vectors, found {start + len(waiting)}")
        if len(waiting):
            write(waiting, start)


def without_metadata(images: int) -> Iterator[pa.Table]:
    """Tables of `images` rows that say nothing."""
    for start in range(0, images, ROW_GROUP):
        rows = min(ROW_GROUP, images - start)
        yield pa.table({name: pa.nulls(rows, pa.string()) for name in COLUMNS})


class MetadataTable:
    """One file of metadata, open. Reading from several threads at once is safe."""

    def __init__(self, path: Path) -> None:
        """Raises `ValueError` if the file is missing, damaged or not written by `write_metadata`."""
        self.path = path
        with _reading(path):
            self._file = pq.ParquetFile(require_file(path))
        footer = self._file.metadata
        sizes = {footer.row_group(group).num_rows for group in range(footer.num_row_groups - 1)}
        if self._file.schema_arrow.names != SCHEMA.names or not sizes <= {ROW_GROUP}:
            raise ValueError(f"{path}: expected metadata of an index, found another Parquet file")
        self._lock = threading.Lock()
        self._group: Callable[[int], dict[str, list]] = lru_cache(GROUPS_KEPT)(self._read_group)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def row(self, row: int) -> dict[str, Any]:
        """id and what is known of the image in `row`."""
        group = self._group(row // ROW_GROUP)
        return {name: values[row % ROW_GROUP] for name, values in group.items() if values[row % ROW_GROUP] is not None}

    def tables(self) -> Iterator[pa.Table]:
        """All rows without ids, a row group at a time."""
        for group in range(self._file.metadata.num_row_groups):
            with self._lock, _reading(self.path):
                table = self._file.read_row_group(group, columns=list(COLUMNS))
            yield table

    def rows_of_creator(self, creator: str) -> np.ndarray:
        """Rows whose creator is exactly `creator`; reads that column only."""
        rows = []
        for group in range(self._file.metadata.num_row_groups):
            with self._lock, _reading(self.path):
                values = self._file.read_row_group(group, columns=["creator"]).column("creator").to_pylist()
            rows += [group * ROW_GROUP + place for place, value in enumerate(values) if value == creator]
        return np.array(rows, dtype=np.int64)

    def _read_group(self, group: int) -> dict[str, list]:
        with self._lock, _reading(self.path):
            return self._file.read_row_group(group).to_pydict()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into a `ValueError` naming it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a whole Parquet file, found a damaged one ({error})") from error
