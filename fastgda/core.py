"""What every package shares: errors, atomic files, manifests, safe array reading, keyed randomness, the CLI frame.

Imports nothing of this project. An output is written to a temporary name and renamed, so a file under its
final name is always whole; beside it a manifest says which command, configuration and inputs made it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
MANIFEST_SUFFIX = ".manifest.json"
FINITE_BLOCK = 1 << 20
"""Numbers that are checked together for NaN and infinity."""
DAMAGED_ARCHIVE = (
    *(ValueError, OSError, EOFError, TypeError, AttributeError, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
)
"""What numpy and zipfile raise for a damaged archive, depending on which byte is wrong."""
RECORDED_PACKAGES = (
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "timm",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "scikit-learn",
)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` on success, deletes it on any failure.

    A failed write raises `OSError` naming `path`: numpy's and the archive's own messages name no file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: expected to write the whole file, found: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, value: Any) -> None:
    """Writes JSON atomically, indented, with a final newline."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, default=_plain) + "\n")


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes one `.npy` file atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, array, allow_pickle=False)


def save_npz(path: str | Path, *, compress: bool = True, **arrays: np.ndarray) -> None:
    """Writes one `.npz` file atomically."""
    write = np.savez_compressed if compress else np.savez
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        write(handle, allow_pickle=False, **arrays)


def require_file(path: str | Path, made_by: str = "") -> Path:
    """`path` as a `Path`; `ValueError` naming the command that makes it if it is not a file."""
    path = Path(path)
    if not path.is_file():
        hint = f"; make it with: {made_by}" if made_by else ""
        raise ValueError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}{hint}")
    return path


def load_npy(
    path: str | Path,
    shape: tuple[int | None, ...] | None = None,
    *,
    finite: bool = False,
    mmap: bool = False,
    writable: bool = True,
    made_by: str = "",
) -> np.ndarray:
    """Reads a `.npy` file without unpickling anything.

    `shape` may hold `None` for a free axis. `finite` refuses NaN and infinity. `mmap` maps the file instead of reading
    it; what is written to the array stays in memory, which Linux therefore wants to have for all of it: a file larger
    than memory is mapped with `writable=False` only. Raises `ValueError` naming the file, what was expected and what
    was found.
    """
    path = require_file(path, made_by)
    try:
        array = np.load(path, mmap_mode=("c" if writable else "r") if mmap else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, tokenize.TokenError) as error:
        raise ValueError(f"{path}: expected a whole .npy array, found a damaged file ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected a .npy array, found an archive")
    if shape is not None:
        matches = len(shape) == array.ndim and all(
            want is None or want == have for want, have in zip(shape, array.shape, strict=True)
        )
        if not matches:
            wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
            raise ValueError(f"{path}: expected shape {wanted}, found {list(array.shape)}")
    if finite and (row := next(rows_not_finite(array), None)) is not None:
        raise ValueError(f"{path}: expected finite numbers, found NaN or infinity (first in row {row})")
    return array


def rows_not_finite(array: np.ndarray) -> Iterator[int]:
    """Rows of `array` [N, ...] that hold NaN or infinity, ascending."""
    rows = np.atleast_1d(array)
    # a block at a time: a mask of the whole array would be a quarter of the size of a float32 file
    step = max(1, FINITE_BLOCK * len(rows) // max(1, rows.size))
    for start in range(0, len(rows), step):
        finite = np.isfinite(rows[start : start + step])
        yield from (start + np.flatnonzero(~finite.all(axis=tuple(range(1, rows.ndim))))).tolist()


def load_npz(
    path: str | Path, keys: tuple[str, ...], made_by: str = "", optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Reads the named arrays of a `.npz` file, and those of the `optional` ones that are there, without unpickling
    anything; `ValueError` if damaged or incomplete.
    """
    path = require_file(path, made_by)
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = sorted(archive.files)
            arrays = {key: archive[key] for key in (*keys, *optional) if key in archive}
    except DAMAGED_ARCHIVE as error:
        raise ValueError(f"{path}: expected a whole .npz archive, found a damaged file ({error})") from error
    if any(key not in arrays for key in keys):
        raise ValueError(f"{path}: expected arrays {list(keys)}, found {found}")
    return arrays


def environment() -> dict[str, Any]:
    """Versions and hardware, as recorded in manifests and results."""
    packages = {}
    for name in RECORDED_PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": packages,
    }


def processor_name() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def git_sha() -> str:
    """Commit of the checkout, with '+' when the tree has changes; 'unknown' outside git."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def manifest_path(artifact: str | Path) -> Path:
    """The manifest that belongs to a file or to a folder."""
    artifact = Path(artifact)
    return artifact / "manifest.json" if artifact.is_dir() else artifact.with_name(artifact.name + MANIFEST_SUFFIX)


def relative(path: str | Path) -> str:
    """`path` relative to the repository where it lies inside it, so that manifests do not depend on the machine."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def write_manifest(
    artifact: str | Path,
    config: Any,
    *,
    command: str,
    inputs: Mapping[str, str] | None = None,
    files: tuple[Path, ...] = (),
    **extra: Any,
) -> None:
    """Writes the manifest of `artifact` (a file or a folder).

    `config` is what must be equal for the artifact to be reused; `inputs` maps names to hashes and must be equal
    too; `files` are hashed so that a later reader can detect damage; `extra` is recorded only.
    """
    artifact = Path(artifact)
    files = files or ((artifact,) if artifact.is_file() else ())
    save_json(
        manifest_path(artifact),
        {
            "command": command,
            "config": _config(config),
            "inputs": dict(inputs or {}),
            "files": {file.name: {"sha256": sha256_file(file), "bytes": file.stat().st_size} for file in files},
            **extra,
            "git": git_sha(),
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": environment(),
        },
    )


def read_manifest(artifact: str | Path) -> dict[str, Any]:
    """The manifest of `artifact`; `ValueError` if it is missing or damaged."""
    path = require_file(manifest_path(artifact))
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a JSON manifest, found a damaged file ({error})") from error
    if not isinstance(manifest, dict) or not {"config", "inputs", "files"} <= manifest.keys():
        raise ValueError(f"{path}: expected the keys config, inputs and files, found another JSON document")
    return manifest


def first_difference(wanted: Any, found: Any, name: str) -> str | None:
    """Where two values of JSON differ first, in words: the place within `name`, and both; `None` if they are equal."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(wanted.keys() | found.keys())
        inside = (first_difference(wanted.get(key), found.get(key), f"{name}.{key}") for key in keys)
        return next((text for text in inside if text is not None), None)
    return None if wanted == found else f"{name} is {found!r}, wanted {wanted!r}"


def manifest_difference(artifact: str | Path, config: Any, inputs: Mapping[str, str] | None = None) -> str | None:
    """Why `artifact` cannot be reused for `config` and `inputs`: the first difference in words; `None` if it can."""
    artifact = Path(artifact)
    if not artifact.exists():
        return f"{artifact} does not exist"
    if not manifest_path(artifact).is_file():
        return f"{manifest_path(artifact)} does not exist"
    manifest = read_manifest(artifact)
    for field, wanted in (("config", _config(config)), ("inputs", dict(inputs or {}))):
        if (difference := first_difference(wanted, manifest[field], field)) is not None:
            return difference
    folder = artifact if artifact.is_dir() else artifact.parent
    for name, entry in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["bytes"]:
            return f"{folder / name} has {size} bytes, the manifest says {entry['bytes']}"
    return None


def verify_artifact(artifact: str | Path) -> dict[str, Any]:
    """The manifest of `artifact` after checking the hash of each file it lists; `ValueError` on a mismatch."""
    artifact = Path(artifact)
    manifest = read_manifest(artifact)
    folder = artifact if artifact.is_dir() else artifact.parent
    for name, entry in manifest["files"].items():
        file = require_file(folder / name)
        found = sha256_file(file)
        if found != entry["sha256"]:
            raise ValueError(
                f"{file}: expected SHA-256 {entry['sha256'][:12]}… as in {manifest_path(artifact).name}, "
                f"found {found[:12]}… (damaged, or made by another run)"
            )
    return manifest


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `key` only: the same for any batch, shard, order or worker.

    Keys look like (purpose, seed, example id, timestep, view).
    """
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock(device: torch.device) -> float:
    """`time.perf_counter()` after all work that was given to `device`; CUDA works on after a call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class CommandParser(argparse.ArgumentParser):
    """A parser that takes `--dry-run` for `--dry_run`, and no abbreviations.

    An abbreviation would be read differently by a command that looks at a flag before it knows all of them. Options
    are declared with underscores; only the `--no-` of a switch has a dash.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse, which `parse_args` calls."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        return super().parse_known_args([*map(_underscored, options), *words[len(options) :]], namespace)


def command_parser(prog: str, description: str | None, **options: Any) -> CommandParser:
    """The parser of the command `prog`; `description` is shown as it is written."""
    shown = argparse.RawDescriptionHelpFormatter
    return CommandParser(prog=prog, description=description, formatter_class=shown, **options)


def command_line(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorates an entry point: a user's mistake or a full disk prints one line and returns 2, Ctrl-C returns 130."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())
            print(f"error: {message}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; start the same command again to go on from here", file=sys.stderr)
            return 130

    return run


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    start = len("--no-") if name.startswith("--no-") else len("--")
    return name[:start] + name[start:].replace("-", "_") + equals + value


def _config(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    return json.loads(json.dumps(config, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return relative(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not go into JSON")
