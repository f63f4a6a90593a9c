"""Follows the files of an index on disk: a snapshot of them at any moment, without waiting for new segments.

A segment of ten million images takes minutes to open, because its hash is compared. A thread of its own opens it;
searches go on meanwhile in the old segments, from which everything is missing that was removed since.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastgda.index.journal import JOURNAL, Journal, State, read_checkpoint
from fastgda.index.segment import Segment
from fastgda.index.snapshot import Snapshot, Stamp

SEGMENTS = "segments"
PATIENCE = 1.0
"""Seconds for which new segments are waited for before searches go on in the old ones."""
Key = tuple[str, str]
"""Name of a segment and hash of its manifest."""


class Opening(NamedTuple):
    """Segments that a thread is opening."""

    keys: list[Key]
    begun: float
    """By `time.monotonic`."""
    done: Future[dict[Key, Segment]]


class View(NamedTuple):
    """What can be searched now."""

    snapshot: Snapshot
    opening: Opening | None
    """What the index has besides, where it is not all in the snapshot."""


class Reader:
    """The index in folder `path`, open for reading from several threads at once."""

    def __init__(self, path: Path, *, verify: bool) -> None:
        """`verify` compares the hashes of all files; else only sizes. `ValueError` if one is missing or damaged."""
        self.path = path
        self.journal = Journal(path / JOURNAL)
        self._verify = verify
        self._changing = threading.Lock()
        while True:
            stamp, state, calibration = self._read(verify=verify)
            try:
                self._segments = self._opened(list(state.segments.items()))
                break
            except (ValueError, OSError):
                if self.stamp() == stamp:
                    raise
        self._view = View(Snapshot.make(stamp, state, tuple(self._segments.values()), calibration), None)

    def newest(self) -> Snapshot:
        """The index as it is on disk now; waits until its segments are open, and raises if they are damaged."""
        return self._follow(float("inf"))

    def current(self) -> Snapshot:
        """The same; while new segments take longer than `PATIENCE`, those open before, without all that was removed."""
        return self._follow(PATIENCE)

    def stamp(self) -> Stamp:
        """Changes with every checkpoint and every journal line."""
        try:
            manifest, journal = os.stat(self.path / "manifest.json"), os.stat(self.path / JOURNAL)
        except FileNotFoundError as error:
            raise ValueError(f"{self.path}: expected an index, found no {Path(error.filename).name} in it") from error
        return manifest.st_ino, manifest.st_mtime_ns, journal.st_size, journal.st_mtime_ns

    def _follow(self, patience: float) -> Snapshot:
        while True:
            view = self._view
            if view.snapshot.stamp != self.stamp() or (view.opening is not None and view.opening.done.done()):
                with self._changing:
                    if self._view is view:
                        self._view = self._next(view)
                continue
            if view.opening is None:
                return view.snapshot
            left = view.opening.begun + patience - time.monotonic()
            if left <= 0:
                return view.snapshot
            wait([view.opening.done], min(left, threading.TIMEOUT_MAX))

    def _next(self, view: View) -> View:
        """What can be searched after `view`. The caller holds the lock."""
        stamp, state, calibration = self._read(verify=False)
        wanted, opening = list(state.segments.items()), view.opening
        if opening is not None and opening.done.done():
            # one that failed stays, and is raised to every search, until the index does without its segments
            if opening.done.exception() is None or not set(opening.keys).isdisjoint(wanted):
                self._segments |= opening.done.result()
            opening = None
        missing = [key for key in wanted if key not in self._segments]
        if not missing:
            self._segments = {key: self._segments[key] for key in wanted}
            return View(Snapshot.make(stamp, state, tuple(self._segments.values()), calibration), None)
        old = view.snapshot
        state = replace(old.state, removed=state.removed)
        return View(Snapshot.make(stamp, state, old.segments, old.calibration), opening or self._begin(missing))

    def _begin(self, keys: list[Key]) -> Opening:
        done: Future[dict[Key, Segment]] = Future()

        def work() -> None:
            try:
                done.set_result(self._opened(keys))
            except Exception as error:  # whoever waits for the segments raises it
                done.set_exception(error)

        # a daemon, so that a server stops without waiting for it
        threading.Thread(target=work, name="opening segments", daemon=True).start()
        return Opening(keys, time.monotonic(), done)

    def _opened(self, keys: list[Key]) -> dict[Key, Segment]:
        folder = self.path / SEGMENTS
        return {(name, sha): Segment(folder / name, sha256=sha, verify=self._verify) for name, sha in keys}

    def _read(self, *, verify: bool) -> tuple[Stamp, State, dict[str, Any] | None]:
        """Manifest and journal with their stamp: (stamp, state, calibration); again if they change meanwhile."""
        while True:
            stamp = self.stamp()
            try:
                manifest, checkpoint = read_checkpoint(self.path)
                if verify:
                    self.journal.verify(checkpoint.size, manifest["state"]["journal"])
                state = self.journal.replay(checkpoint)
            except (ValueError, OSError):
                if self.stamp() == stamp:
                    raise
                continue
            measured = state.segments.keys() >= checkpoint.segments.keys()
            return stamp, state, manifest.get("calibration") if measured else None
