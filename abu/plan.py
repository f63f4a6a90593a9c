"""The plan of a collection: its pieces, which of them are done, how fast they come, and which failed.

A piece is one file. Pieces are cut before the work starts and do not depend on who computes them, so that any number of
workers, in any order, leaves the same files; a piece that exists is never computed again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from fastgda.core import manifest_difference, manifest_path, save_npz, write_manifest

FAILED, STARTED = "failed.jsonl", "started.jsonl"
"""Lines of the attempts that failed, and of the moments at which a run began or was resumed."""
T = TypeVar("T", bound="Task")
Stage = Literal["query", "pass", "scores", "step"]
RECENT = 100
"""Pieces that the rate is measured on."""


class Task(Protocol):
    """One unit of work, which ends in one file."""

    @property
    def name(self) -> str:
        """Its file."""


@dataclass(frozen=True)
class Piece:
    """Examples `start` to `stop`: gradients of a split of the queries or of a pass over the training set, or scores.

    A step is a pass that keeps both terms of the loss change of every query, and no gradients.
    """

    stage: Stage
    part: str
    """The split, the number of the pass, or the number of passes that the scores are made from."""
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Its file."""
        return f"{self.stage}_{self.part}_{self.start:06d}.npz"

    @property
    def examples(self) -> str:
        """Whose examples they are: the split of the queries, or "training" for passes and scores."""
        return self.part if self.stage == "query" else "training"


def cut(stage: Stage, part: str, total: int, size: int) -> list[Piece]:
    """Pieces of at most `size` examples."""
    return [Piece(stage, part, start, min(start + size, total)) for start in range(0, total, size)]


class Collection:
    """The folder of a collection."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, config: Any, inputs: dict[str, str], command: str = "python -m abu.collect") -> None:
        """Marks the folder as holding pieces of these settings and inputs; `ValueError` if it holds others."""
        self.check(config, inputs)
        if not manifest_path(self.folder).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_manifest(self.folder, config, command=command, inputs=inputs)

    def check(self, config: Any, inputs: dict[str, str]) -> None:
        """`ValueError` if the folder holds pieces of other settings or inputs; writes nothing."""
        if not manifest_path(self.folder).is_file():
            if any(self.folder.glob("*.npz")):
                raise ValueError(f"{self.folder}: expected a manifest beside the pieces, found none; delete the folder")
            return
        difference = manifest_difference(self.folder, config, inputs)
        if difference is not None:
            raise ValueError(
                f"{self.folder}: expected pieces of the same settings and inputs, found others ({difference}); "
                "delete the folder to collect anew"
            )

    def path(self, piece: Task) -> Path:
        """Where a piece is kept."""
        return self.folder / piece.name

    def missing(self, pieces: Sequence[T]) -> list[T]:
        """Those that do not exist yet."""
        return [piece for piece in pieces if not self.path(piece).is_file()]

    def store(self, piece: Task, arrays: dict[str, np.ndarray]) -> None:
        """Writes a piece, whole or not at all; what is mostly noise would only lose time by being compressed."""
        save_npz(self.path(piece), compress=False, **arrays)

    def failed(self, piece: Task, attempt: int, error: str) -> None:
        """Adds a line to failed.jsonl."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._append(FAILED, {"piece": piece.name, "attempt": attempt, "error": error, "time": now})

    def started(self) -> None:
        """Adds a line to started.jsonl: what lies between the last piece and now was a pause."""
        self._append(STARTED, {"time": time.time()})

    def failures(self) -> dict[str, str]:
        """Piece -> its last error, for the pieces that failed and do not exist."""
        lines = self._lines(FAILED)
        return {line["piece"]: line["error"] for line in lines if not (self.folder / line["piece"]).is_file()}

    def rate(self, pieces: Sequence[Task]) -> float | None:
        """Pieces a second, over the last ones written; `None` if there is none.

        A piece counts from the one written before it, of whatever stage, or from the beginning of the run if that is
        later. So pauses are left out, and workers that finish together count with the wait before them.
        """
        names = {piece.name for piece in pieces}
        events = [(float(line["time"]), "") for line in self._lines(STARTED)]
        # a name with a dot is a piece that is being written and may be gone in a moment
        files = [path for path in self.folder.glob("*.npz") if not path.name.startswith(".")]
        events += [(path.stat().st_mtime, path.name) for path in files]
        events.sort()
        taken = [time - before for (before, _), (time, name) in pairwise(events) if name in names][-RECENT:]
        return len(taken) / sum(taken) if sum(taken) > 0 else None

    def status(self, title: str, pieces: Sequence[Task]) -> str:
        """One line: what is done, the rate and the time left."""
        left, rate = len(self.missing(pieces)), self.rate(pieces)
        line = f"{title}: {len(pieces) - left} of {len(pieces)} pieces"
        if left and rate:
            line += f", {60 * rate:.2f} pieces/min, {left / rate / 60:.0f} min left at that rate"
        return line

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / name, "ab+") as handle:
            # after a line that a kill cut short
            if handle.tell() and os.pread(handle.fileno(), 1, handle.tell() - 1) != b"\n":
                handle.write(b"\n")
            handle.write(json.dumps(line).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file, but for those that a kill cut short; none if there is no file."""
        path, found = self.folder / name, []
        for line in path.read_text().splitlines() if path.is_file() else ():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found
