"""A bound on the memory of a command, pages of mapped files included, by a Linux control group (needs root)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
PATIENCE = 5.0
"""Seconds until a group whose processes have ended can be removed."""


@dataclass(frozen=True)
class Group:
    """Where a command is put; nowhere without a folder."""

    folder: Path | None = None

    @property
    def prefix(self) -> list[str]:
        """What to put before a command so that it and all that it starts belong to the group."""
        if self.folder is None:
            return []
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.folder / "cgroup.procs")]

    def peak(self) -> int | None:
        """The most bytes that the group had at a time; `None` where that is not known."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if self.folder is not None and (self.folder / name).is_file():
                return int((self.folder / name).read_text())
        return None


@contextmanager
def limited(gigabytes: float) -> Iterator[Group]:
    """A group of at most so many gigabytes for commands, and none for 0; `ValueError` if it cannot be made."""
    if gigabytes < 0:
        raise ValueError(f"limit: expected at least 0 GB, found {gigabytes:g}")
    if gigabytes == 0:
        yield Group()
        return
    second = (GROUPS / "cgroup.controllers").is_file()
    folder = (GROUPS if second else GROUPS / "memory") / f"fastgda-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(round(gigabytes * 1e9)))
    except OSError as error:
        raise ValueError(f"{folder}: expected a control group with a memory limit, found {error.strerror}") from error
    try:
        yield Group(folder)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    # a group is busy for a moment after its last process has ended
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
