"""Downloads the released data and weights: features, rankings, queries, COCO images, rankers.

    python -m fastgda.download                     # Hugging Face dataset sywang/FastGDA into data/coco and weights/
    python -m fastgda.download --dry_run           # what is missing, and how large it is
    python -m fastgda.download --source mirror/    # a folder with the same files in the place of the hub

A file that is there with its size is skipped; one that was cut off goes on where it stopped. Archives that the release
split into parts (train2017.tar.partaa, ...) are unpacked beside their parts, from one part after the other, and the
parts deleted. Rankers go to weights/.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from fastgda.core import ROOT, command_line, command_parser, save_json, sha256_file

REPOSITORY = "sywang/FastGDA"
WEIGHTS = PurePosixPath("coco/weights")
"""Where the release keeps its rankers."""
PART = re.compile(r"(?P<archive>.+\.tar)\.part[^/]*")
ATTEMPTS = 6
"""Times a request is tried; the hub limits the rate of requests."""
WAIT = 5.0
"""Seconds before the second attempt, doubled before each further one."""
SPARE = 1 << 30
"""Bytes of the disk that stay free."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class File:
    """One file of the release."""

    name: str
    """Its path, relative to the folder of the release."""
    size: int
    sha256: str | None = None
    """Known of large files."""

    @property
    def archive(self) -> str | None:
        """The tar file that this is a part of."""
        found = PART.fullmatch(self.name)
        return found["archive"] if found else None


@dataclass(frozen=True)
class Places:
    """Where files go."""

    data: Path
    weights: Path

    def of(self, file: File) -> Path:
        """The place of one file."""
        path = PurePosixPath(file.name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{file.name}: expected a path inside the release")
        return self.weights / path.relative_to(WEIGHTS) if path.is_relative_to(WEIGHTS) else self.data / path

    def stamp(self, archive: str) -> Path:
        """What says that an archive is unpacked: the names and sizes of its parts."""
        path = self.data / archive
        return path.with_name(f".{path.name}.unpacked.json")


def list_files(source: str) -> list[File]:
    """The files of a folder, or of a dataset of the hub, by name."""
    folder = Path(source)
    if folder.is_dir():
        found = [path for path in folder.rglob("*") if path.is_file()]
        files = [File(path.relative_to(folder).as_posix(), path.stat().st_size) for path in found]
    else:
        entries = _patiently(
            f"{source}, list of files",
            lambda: list(HfApi().list_repo_tree(source, repo_type="dataset", recursive=True)),
        )
        files = [
            File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        ]
    # what the repository says of itself is no data
    files = sorted((file for file in files if "/" in file.name), key=lambda file: file.name)
    if not files:
        raise ValueError(f"{source}: expected the files of the release, found none")
    return files


def missing(files: Sequence[File], places: Places) -> list[File]:
    """Those that are not there; `ValueError` naming a file of weights/ that another one would replace."""
    left = []
    for file in files:
        path = places.of(file)
        if file.archive is not None and unpacked(file.archive, files, places):
            continue
        size = path.stat().st_size if path.is_file() else None
        if size == file.size:
            continue
        if size is not None and path.is_relative_to(places.weights):
            raise ValueError(f"{path}: expected the released file of {file.size} bytes, found {size}; move yours away")
        left.append(file)
    return left


def parts_of(archive: str, files: Sequence[File]) -> list[File]:
    """The parts of an archive in their order, which is that of their names."""
    return [file for file in files if file.archive == archive]


def unpacked(archive: str, files: Sequence[File], places: Places) -> bool:
    """Whether `archive` has been unpacked from these parts."""
    stamp = places.stamp(archive)
    return stamp.is_file() and json.loads(stamp.read_text()) == _sizes(archive, files)


def fetch(file: File, source: str, places: Places) -> None:
    """Brings one file to its place and checks its size; `ValueError` naming it if it cannot be had whole."""
    target = places.of(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.copying")
    if Path(source).is_dir():
        shutil.copyfile(Path(source) / file.name, temporary)
        temporary.replace(target)
    else:
        # an unfinished download lies below .cache/ of this folder, and the next attempt goes on from there
        download = partial(hf_hub_download, source, file.name, repo_type="dataset", local_dir=places.data)
        found = Path(_patiently(file.name, download))
        if found != target:
            # beside the target first: the weights may lie on another file system, where a move is a copy
            shutil.move(found, temporary)
            temporary.replace(target)
    size = target.stat().st_size
    if size != file.size:
        raise ValueError(f"{target}: expected {file.size} bytes, found {size}; start the same command again")


def verify(file: File, path: Path) -> None:
    """`ValueError` if the hub knows another SHA-256 of the file."""
    if file.sha256 is not None and (found := sha256_file(path)) != file.sha256:
        raise ValueError(f"{path}: expected SHA-256 {file.sha256[:12]}…, found {found[:12]}…; delete it, start again")


def unpack(archive: str, files: Sequence[File], places: Places) -> None:
    """Unpacks `archive` from its parts, whole or not at all, and deletes them."""
    parts, folder = parts_of(archive, files), (places.data / archive).parent
    unpacking = folder / f".{PurePosixPath(archive).name}.unpacking"
    shutil.rmtree(unpacking, ignore_errors=True)
    unpacking.mkdir(parents=True)
    joined = Joined([places.of(part) for part in parts])
    try:
        with tarfile.open(fileobj=joined, mode="r|") as tar:  # type: ignore[call-overload] # a stream is only read
            for member in tqdm(tar, desc=f"unpack {PurePosixPath(archive).name}", unit="file"):
                _extract(tar, member, unpacking)
    except tarfile.TarError as error:
        raise ValueError(f"{places.data / archive}: expected a whole tar file in parts, found: {error}") from error
    for entry in sorted(unpacking.iterdir()):
        place = folder / entry.name
        if place.exists():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        entry.replace(place)
    unpacking.rmdir()
    save_json(places.stamp(archive), _sizes(archive, files))
    for part in parts:
        places.of(part).unlink()


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Only files and folders, and only inside `folder`. Python's own filters came with 3.11.4."""
    inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
    if not inside or not (member.isfile() or member.isdir()):
        raise tarfile.ReadError(f"{member.name}, which is no file or folder inside it")
    tar.extract(member, folder, set_attrs=False)


class Joined:
    """Several files read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.blocks = self._read(paths)
        self.rest = b""

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer at the end of the last file."""
        assert size >= 0
        parts, wanted = [], size
        while wanted:
            if not self.rest:
                self.rest = next(self.blocks, b"")
                if not self.rest:
                    break
            parts.append(self.rest[:wanted])
            self.rest, wanted = self.rest[wanted:], wanted - len(parts[-1])
        return b"".join(parts)

    @staticmethod
    def _read(paths: Sequence[Path]) -> Iterator[bytes]:
        for path in paths:
            with open(path, "rb") as handle:
                while block := handle.read(1 << 16):
                    yield block


def download(source: str, places: Places, *, hashes: bool = False) -> None:
    """Brings everything that is missing to its place and unpacks the archives."""
    files = list_files(source)
    left = missing(files, places)
    _require_space(files, left, places)
    with tqdm(total=sum(file.size for file in left), unit="B", unit_scale=True, desc="download") as bar:
        for file in left:
            bar.set_postfix_str(PurePosixPath(file.name).name, refresh=False)
            fetch(file, source, places)
            bar.update(file.size)
    if hashes:
        for file in files:
            if places.of(file).is_file():
                verify(file, places.of(file))
    for archive in sorted({file.archive for file in files if file.archive is not None}):
        if not unpacked(archive, files, places):
            unpack(archive, files, places)
    print(f"{places.data}: {len(files)} files of the release are there, {len(left)} of them fetched now")


def _patiently(name: str, ask: Callable[[], Answer]) -> Answer:
    """What the hub answers, asked again where it refuses or breaks off; `ValueError` naming what cannot be had."""
    wait = WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except (OfflineModeIsEnabled, RepositoryNotFoundError):
            raise
        except (HTTPError, OSError) as error:
            if attempt == ATTEMPTS:
                raise ValueError(
                    f"{name}: expected to download it, gave up after {ATTEMPTS} attempts ({_line(error)}); "
                    "start the same command again"
                ) from error
            print(f"{name}: {_line(error)}; trying again in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
            wait *= 2
    raise AssertionError("unreachable")


def _sizes(archive: str, files: Sequence[File]) -> dict[str, int]:
    return {part.name: part.size for part in parts_of(archive, files)}


def _require_space(files: Sequence[File], left: Sequence[File], places: Places) -> None:
    # the parts of an archive and what is in it lie there together for a while
    archives = {file.archive for file in files if file.archive and not unpacked(file.archive, files, places)}
    wanted = sum(file.size for file in left) + sum(file.size for file in files if file.archive in archives)
    places.data.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(places.data).free
    if left and free < wanted + SPARE:
        raise ValueError(
            f"{places.data}: expected {(wanted + SPARE) / 1e9:.1f} GB of free disk, found {free / 1e9:.1f}"
        )


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m fastgda.download", __doc__)
    add = parser.add_argument
    add("--source", default=REPOSITORY, help=f"dataset of the hub, or a folder (default: {REPOSITORY})")
    add("--data_dir", type=Path, default=ROOT / "data", help="folder above coco/ (default: data)")
    add("--weights_dir", type=Path, default=ROOT / "weights", help="folder of the rankers (default: weights)")
    add("--hashes", action="store_true", help="check the SHA-256 of large files, too")
    add("--dry_run", action="store_true", help="list what is missing; download nothing")
    args = parser.parse_args(argv)
    places = Places(args.data_dir, args.weights_dir)
    try:
        if args.dry_run:
            left = missing(list_files(args.source), places)
            for file in left:
                print(f"{places.of(file)}: {file.size / 1e6:.1f} MB")
            print(f"total: {sum(file.size for file in left) / 1e9:.1f} GB in {len(left)} files; nothing written")
        else:
            download(args.source, places, hashes=args.hashes)
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(f"{args.source}: expected the hub or a folder to answer, found: {_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
