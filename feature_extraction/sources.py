"""Pictures with captions from any of the supported places, in a stated order: row = id, and ids never move.

| source | order of the rows |
| --- | --- |
| COCO captions JSON | `images` of the JSON; captions in the order of `annotations` |
| folder with metadata.jsonl or metadata.csv (`file_name`, `caption` or `text` or `captions`) | lines of that file |
| query folder (images/<i>.png, captions.txt) | i; line i holds the caption |
| Parquet file, or folder of them | files by name, rows of each; by `id` where that column holds 0..n-1 |
| tar file, or folder of them (WebDataset, img2dataset) | files by name, samples as they first appear |

A picture that cannot be read keeps its row: `image` raises, and extraction lists it and writes zeros.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from fastgda.core import require_file, sha256_file
from feature_extraction.archives import ParquetPictures, TarPictures, captions_of
from feature_extraction.readers import open_image, read_split

COCO_SPLITS = ("data", "train_query", "test_query")


class Pictures(Protocol):
    """Pictures with captions; row i has id i."""

    @property
    def path(self) -> Path:
        """The file or folder they come from."""

    @property
    def keys(self) -> Sequence[str]:
        """What the source itself calls each picture."""

    @property
    def captions(self) -> Sequence[list[str]]:
        """All captions of each picture; possibly none."""

    @property
    def fingerprint(self) -> str:
        """Changes when pictures, captions or their order change."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> Image.Image:
        """The decoded picture of `row`; `ValueError` naming it if it is missing or damaged."""

    def caption(self, row: int) -> str:
        """The first caption of `row`, whose text feature is used; empty where there is none."""


@dataclass(frozen=True)
class FileTable:
    """Pictures in files of their own, decoded when asked for."""

    path: Path
    """The file that lists them."""
    folder: Path
    """What `names` are relative to."""
    names: list[str]
    keys: list[str]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, row: int) -> Image.Image:
        """The decoded picture of `row`."""
        return open_image(self.folder / self.names[row])

    def caption(self, row: int) -> str:
        """The first caption of `row`."""
        return next(iter(self.captions[row]), "")

    @property
    def fingerprint(self) -> str:
        """Of the list and the files' sizes: reading all pictures would take as long as extracting their features."""
        digest = hashlib.sha256(sha256_file(self.path).encode())
        for name in self.names:
            file = self.folder / name
            digest.update(f"{name}\0{file.stat().st_size if file.is_file() else 'missing'}\0".encode())
        return digest.hexdigest()


def read_coco(path: Path, folder: Path | None = None) -> FileTable:
    """COCO's captions; the pictures lie in `folder`, for annotations/captions_X.json by default in X beside it.

    Raises `ValueError` naming `path` if it is missing, no COCO captions file, or lists a picture twice.
    """
    folder = folder or path.parent.parent / path.stem.removeprefix("captions_")
    document = _read_json(path, require_file(path).read_bytes())
    captions: dict[Any, list[str]] = defaultdict(list)
    try:
        for annotation in document["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        ids = [entry["id"] for entry in document["images"]]
        names = [entry["file_name"] for entry in document["images"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected COCO captions (images with id and file_name, annotations with image_id and caption), "
            f"found no {error}"
        ) from error
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: expected each image id once, found {len(ids) - len(set(ids))} repeated")
    return FileTable(path, folder, names, [str(name) for name in ids], [captions.get(name, []) for name in ids])


def read_metadata(path: Path) -> FileTable:
    """A folder's metadata.jsonl or metadata.csv; `ValueError` naming the line that is damaged or names no file."""
    names, captions = [], []
    for line, entry in _metadata_lines(path):
        if not isinstance(entry, dict) or not entry.get("file_name"):
            raise ValueError(f"{path}, line {line}: expected a file_name, found none")
        names.append(str(entry["file_name"]))
        captions.append(captions_of(entry))
    return FileTable(path, path.parent, names, names, captions)


def read_query_folder(folder: Path) -> FileTable:
    """images/0.png, 1.png, ... with one caption a line in captions.txt; `ValueError` if their numbers differ."""
    path = require_file(folder / "captions.txt")
    with open(path, encoding="utf-8", errors="replace") as handle:
        captions = [line.strip() for line in handle]
    found = len(list((folder / "images").glob("*.png")))
    if found != len(captions):
        raise ValueError(f"{path}: expected a line for each of the {found} pictures of images/, found {len(captions)}")
    names = [f"images/{row}.png" for row in range(found)]
    return FileTable(path, folder, names, names, [[caption] for caption in captions])


def open_source(path: Path) -> Pictures:
    """The reader that fits `path`; `ValueError` listing what is supported if none does."""
    if path.suffix == ".json":
        return read_coco(path)
    if path.suffix == ".parquet" or path.suffix == ".tar":
        require_file(path)
        return ParquetPictures(path, [path]) if path.suffix == ".parquet" else TarPictures(path, [path])
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).is_file():
            return read_metadata(path / name)
    if (path / "captions.txt").is_file():
        return read_query_folder(path)
    # img2dataset leaves Parquet files without pictures beside its tar files
    for suffix, reader in ((".tar", TarPictures), (".parquet", ParquetPictures)):
        if files := sorted(path.glob(f"*{suffix}")):
            return reader(path, files)
    raise ValueError(
        f"{path}: expected COCO captions (.json), a .parquet or .tar file, or a folder with metadata.jsonl, "
        f"metadata.csv, captions.txt, .tar or .parquet files, found {'none of them' if path.exists() else 'nothing'}"
    )


def open_split(mode: str, data_dir: Path, split: str) -> Pictures:
    """The pictures of a dataset's `split`: "data" is the training set, "test_query" the test queries, and so on."""
    if mode != "coco":
        return read_split(data_dir, split)
    if split == "data":
        trainset = data_dir / "trainset"
        return read_coco(trainset / "annotations" / "captions_train2017.json", trainset / "train2017")
    return read_query_folder(data_dir / f"query_{split.removesuffix('_query')}")


def _metadata_lines(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as handle:
            reader = csv.DictReader(handle)
            try:
                for entry in reader:
                    yield reader.line_num, entry
            except csv.Error as error:
                line = reader.reader.line_num  # `reader` itself counts whole lines only
                raise ValueError(f"{path}, line {line}: expected CSV, found a damaged line ({error})") from error
        return
    with open(path, "rb") as handle:
        for line, text in enumerate(handle, 1):
            if text.strip():
                yield line, _read_json(f"{path}, line {line}", text)


def _read_json(name: object, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON, found a damaged document ({error})") from error
