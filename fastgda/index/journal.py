"""What was done to an index, in a file that only grows: a change counts from the moment its line is on disk.

The state of an index is its manifest (a checkpoint) and the lines after it. A process that is killed between the two
leaves nothing undone: whoever opens the index next reads the line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgda.core import load_npy, manifest_path, require_file, save_npy, verify_artifact, write_manifest

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class State:
    """What an index consists of after some lines of its journal."""

    segments: dict[str, str]
    """Name of each segment -> SHA-256 of its manifest, in order."""
    removed: np.ndarray
    """[R] int64, ascending: every id that was ever removed. They are never searched and never given out again."""
    line: int = 0
    """Lines of the journal that are included."""
    size: int = 0
    """Bytes of those lines."""

    def after(self, entry: dict[str, Any], size: int) -> State:
        """The state after one more line, which ends at byte `size`."""
        segments = {name: sha for name, sha in self.segments.items() if name not in entry.get("replaced", ())}
        removed = self.removed
        if "removed" in entry:
            removed = np.union1d(removed, np.array(entry["removed"], dtype=np.int64))
        return replace(
            self, segments=segments | entry.get("segments", {}), removed=removed, line=self.line + 1, size=size
        )


class Journal:
    """JSON lines; each carries its number and a hash of itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def replay(self, state: State) -> State:
        """`state` and the whole lines after it. A last line without its end was never acknowledged and is passed over.

        Raises `ValueError` if the journal is shorter than `state` says or a whole line is damaged.
        """
        with open(require_file(self.path), "rb") as handle:
            if os.fstat(handle.fileno()).st_size < state.size:
                raise ValueError(f"{self.path}: expected at least {state.size} bytes, found a truncated journal")
            handle.seek(state.size)
            for line in handle:
                if not line.endswith(b"\n"):
                    break
                state = state.after(self._parse(line, state.line + 1), state.size + len(line))
        return state

    def append(self, state: State, entry: dict[str, Any]) -> State:
        """Writes `entry` after the lines of `state`, on disk when this returns; the state with it.

        The caller holds the index's lock and `state` is up to date: what follows it is a line that was cut off.
        """
        entry = {"line": state.line + 1, "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **entry}
        text = json.dumps({**entry, "check": _digest(entry)}).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, state.size)
            os.lseek(descriptor, state.size, os.SEEK_SET)
            written = 0
            while written < len(text):
                written += os.write(descriptor, text[written:])
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, state.size)
            raise OSError(f"{self.path}: expected to write a line, found: {error}; nothing was changed") from error
        finally:
            os.close(descriptor)
        return state.after(entry, state.size + len(text))

    def verify(self, size: int, sha256: str) -> None:
        """`ValueError` unless the first `size` bytes have the hash `sha256`."""
        if self.prefix_hash(size) != sha256:
            raise ValueError(f"{self.path}: expected the journal as the manifest knows it, found a changed one")

    def prefix_hash(self, size: int) -> str:
        """SHA-256 of the first `size` bytes."""
        digest = hashlib.sha256()
        with open(require_file(self.path), "rb") as handle:
            while size > 0 and (block := handle.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
        return digest.hexdigest()

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            check = entry.pop("check")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path}: expected a journal line {number}, found a damaged one") from error
        if check != _digest(entry) or entry["line"] != number:
            raise ValueError(f"{self.path}: expected line {number} as it was written, found a changed one")
        return entry


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], State]:
    """The manifest of the index in `folder` and the state it records; `ValueError` if damaged or of something else."""
    manifest = verify_artifact(folder)
    kept = manifest.get("state", {})
    if not {"line", "size", "journal", "segments"} <= kept.keys() or len(manifest["files"]) != 1:
        raise ValueError(f"{manifest_path(folder)}: expected the manifest of an index, found another")
    (removed,) = manifest["files"]
    return manifest, State(kept["segments"], load_npy(folder / removed, (None,)), kept["line"], kept["size"])


def write_checkpoint(
    folder: Path,
    state: State,
    config: dict[str, Any],
    command: str,
    inputs: dict[str, str],
    calibration: dict[str, Any] | None,
) -> None:
    """Replaces the manifest of the index in `folder`: whoever reads it starts from `state`."""
    removed = folder / f"removed-{state.line:08d}.npy"
    save_npy(removed, state.removed)
    kept = {
        "line": state.line,
        "size": state.size,
        "journal": Journal(folder / JOURNAL).prefix_hash(state.size),
        "segments": state.segments,
    }
    write_manifest(
        folder, config, command=command, inputs=inputs, files=(removed,), state=kept, calibration=calibration
    )
    for older in folder.glob("removed-*.npy"):
        if older != removed:
            older.unlink()


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock file `path` against other processes and threads; it is freed when the process dies.

    Without `wait`, `ValueError` if another holds it.
    """
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ValueError(f"{path.parent}: expected no other command on what is in it, found one at work") from error
        yield


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]
