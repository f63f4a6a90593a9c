"""Pictures inside Parquet and tar files: indexed at once, read and decoded one by one."""

from __future__ import annotations

import hashlib
import json
import tarfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from feature_extraction.readers import open_image

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "bytes", "image_bytes")
CAPTION_COLUMNS = ("captions", "caption", "text", "TEXT")
KEY_COLUMNS = ("key", "__key__", "id", "file_name", "url")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MEMBERS = {"txt": "text", "json": "record"} | dict.fromkeys(EXTENSIONS, "image")
"""What the extension of a tar's member says of it."""
BLOCK = 512
"""Bytes of a tar block."""


def captions_of(entry: Mapping[str, Any]) -> list[str]:
    """The captions of one record, under whichever of the usual names it has them; none where it has none."""
    for name in CAPTION_COLUMNS:
        value = entry.get(name)
        if value is not None:
            return [str(caption) for caption in value] if isinstance(value, (list, tuple)) else [str(value)]
    return []


class ParquetPictures:
    """Rows of Parquet files with encoded pictures: a binary column, or a struct with `bytes` as in Hugging Face's."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Indexes `files` in order; `ValueError` naming the one that is damaged or has no pictures."""
        self.path = path
        self._groups: list[tuple[Path, int]] = []
        rows: list[dict[str, Any]] = []
        starts = [0]
        digest = hashlib.sha256()
        for file in files:
            try:
                with pq.ParquetFile(file) as opened:
                    _image_column(file, opened.schema_arrow)
                    digest.update(_footer(file))
                    names = [name for name in (*CAPTION_COLUMNS, *KEY_COLUMNS) if name in opened.schema_arrow.names]
                    rows += opened.read(columns=names).to_pylist() if names else [{}] * opened.metadata.num_rows
                    for group in range(opened.num_row_groups):
                        self._groups.append((file, group))
                        starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file}: expected a whole Parquet file, found a damaged one ({error})") from error
        ids = [row.get("id") for row in rows]
        ordered = set(ids) == set(range(len(ids)))
        self._places = np.argsort(ids) if ordered else np.arange(len(ids))  # type: ignore[arg-type]
        self._starts = starts
        self.captions = [captions_of(rows[place]) for place in self._places]
        self.keys = [_key(rows[place], row) for row, place in enumerate(self._places)]
        self.fingerprint = digest.hexdigest()
        # rows are asked for in order by several threads, which may stand in two groups; none is to be read twice
        self._group, self._reading = lru_cache(maxsize=2)(self._read_group), Lock()

    def __len__(self) -> int:
        return len(self.captions)

    def _read_group(self, number: int) -> pa.ChunkedArray:
        file, group = self._groups[number]
        try:
            with pq.ParquetFile(file) as opened:
                column = _image_column(file, opened.schema_arrow)
                return opened.read_row_group(group, columns=[column])[column]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file}: expected a whole row group {group}, found a damaged one ({error})") from error

    def image(self, row: int) -> Image.Image:
        """The decoded picture of `row`."""
        place = int(self._places[row])
        number = bisect_right(self._starts, place) - 1
        with self._reading:
            column = self._group(number)
        value = column[place - self._starts[number]].as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        name = f"{self._groups[number][0]}, id {row}"
        if encoded is None:
            raise ValueError(f"{name}: expected the bytes of an image, found none")
        return open_image(encoded, name)

    def caption(self, row: int) -> str:
        """The first caption of `row`."""
        return next(iter(self.captions[row]), "")


def _image_column(file: Path, schema: pa.Schema) -> str:
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            if binary or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
                return name
    raise ValueError(
        f"{file}: expected a column of encoded pictures called {', '.join(IMAGE_COLUMNS)}, "
        f"found {', '.join(schema.names)}"
    )


def _footer(file: Path) -> bytes:
    """What describes a Parquet file's content: sizes, places and extreme values of all its columns."""
    with open(file, "rb") as handle:
        handle.seek(-8, 2)
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(-8 - length, 2)
        return file.name.encode() + handle.read(length)


def _key(record: Mapping[str, Any], row: int) -> str:
    return next((str(record[name]) for name in KEY_COLUMNS if record.get(name) is not None), str(row))


@dataclass
class _Sample:
    """Where the members of one sample lie: (file number, offset, bytes) each; absent where there is none."""

    image: tuple[int, int, int] | None = None
    text: tuple[int, int, int] | None = None
    record: tuple[int, int, int] | None = None


class _Captions(Sequence[list[str]]):
    """Captions read from the tar files when asked for."""

    def __init__(self, pictures: TarPictures) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, row: int) -> list[str]: ...

    @overload
    def __getitem__(self, row: slice) -> list[list[str]]: ...

    def __getitem__(self, row: int | slice) -> list[str] | list[list[str]]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        return self._pictures.read_captions(row)


@dataclass
class TarPictures:
    """Samples of uncompressed tar files: members that share a name up to its first dot, as in WebDataset.

    The picture is the member with an image extension, its caption the `.txt` member, else `caption` of the `.json` one.
    A sample without a picture keeps its row.
    """

    path: Path
    files: Sequence[Path]
    keys: list[str] = field(init=False, default_factory=list)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self._samples: list[_Sample] = []
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            samples: dict[str, _Sample] = {}
            for member in _members(file):
                digest.update(f"{file.name}\0{member.name}\0{member.size}\0".encode())
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
                if attribute := MEMBERS.get(extension.lower()):
                    if getattr(sample, attribute) is not None:
                        raise ValueError(f"{file}: expected one {attribute} for each sample, found two of {stem}")
                    setattr(sample, attribute, (number, member.offset_data, member.size))
            self.keys += samples
            self._samples += samples.values()
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def captions(self) -> Sequence[list[str]]:
        """Captions of each sample, read when asked for."""
        return _Captions(self)

    def _read(self, place: tuple[int, int, int]) -> bytes:
        number, offset, size = place
        with open(self.files[number], "rb") as handle:
            handle.seek(offset)
            return handle.read(size)

    def read_captions(self, row: int) -> list[str]:
        """The captions of `row`; `ValueError` naming the sample if its JSON is damaged."""
        sample = self._samples[row]
        if sample.text is not None:
            return [self._read(sample.text).decode("utf-8", errors="replace").strip()]
        if sample.record is None:
            return []
        try:
            return captions_of(json.loads(self._read(sample.record)))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self.path}, id {row} ({self.keys[row]}): expected a JSON record ({error})") from error

    def image(self, row: int) -> Image.Image:
        """The decoded picture of `row`."""
        name = f"{self.path}, id {row} ({self.keys[row]})"
        place = self._samples[row].image
        if place is None:
            raise ValueError(f"{name}: expected an image ({', '.join(EXTENSIONS)}), found none")
        return open_image(self._read(place), name)

    def caption(self, row: int) -> str:
        """The first caption of `row`."""
        return next(iter(self.read_captions(row)), "")


def _members(file: Path) -> list[tarfile.TarInfo]:
    """The regular files of a tar file; `ValueError` if it is damaged or compressed.

    tarfile takes a file that was cut between two members for a whole one: only the block of zeros tells.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            members = archive.getmembers()
        members = [member for member in members if member.isreg()]
        end = max((member.offset_data + -(-member.size // BLOCK) * BLOCK for member in members), default=0)
        with open(file, "rb") as handle:
            handle.seek(end)
            if handle.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("it ends too early")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file}: expected a whole uncompressed tar file, found another ({error})") from error
    return members
