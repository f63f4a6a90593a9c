"""An index on disk: built once, then searched while images are added and removed.

    manifest.json       the checkpoint: segments, settings, measured recall, the ranker's hash; replaced as a whole
    journal.jsonl       every change, appended and synced before it counts
    segments/<number>/  immutable pieces (see segment.py)
    removed-<line>.npy  ids removed up to the checkpoint

A change is prepared aside, becomes valid with its journal line, and is then checkpointed by replacing the manifest. An
open index looks at both files before every search (see reader.py), so a search that begins after `remove` returned, in
whichever process, no longer finds the image, and one under way sees the old or the new index, never a mixture.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgda.core import manifest_path, read_manifest, sha256_file
from fastgda.index.backend import EXACT, Neighbours, as_vectors, check_k
from fastgda.index.journal import JOURNAL, Journal, State, exclusive, write_checkpoint
from fastgda.index.reader import SEGMENTS, Reader
from fastgda.index.segment import TRAINED, BuildShards, SegmentConfig, build_segment, live_source, one_by_one
from fastgda.index.snapshot import Settings, Snapshot
from fastgda.index.source import Source

LOCK = "lock"
EXACT_ADDITION = 65_536
"""Images up to which an addition is searched exhaustively instead of by the trained structure."""
REMOVED_LIMIT, SEGMENT_LIMIT = 0.2, 8
"""Share of removed images, and number of segments, above which a rebuild is advised."""


@dataclass(frozen=True)
class Change:
    """What a change did."""

    images: int
    """Images added or removed by it."""
    advice: str | None
    """Why the index should be rebuilt; `None` if it need not."""


class Index:
    """An index on disk, open. All methods may be called from several threads and processes at once."""

    def __init__(self, path: str | Path, *, ranker: str | None = None, verify: bool = True) -> None:
        """Opens the index in folder `path`.

        `ranker` is what identifies the caller's embedding (see `load_embedding`). `verify` compares the hashes of all
        files, which reads them once; else only sizes. Raises `ValueError` if the index was made with another ranker, or
        a file is missing, damaged or of another index.
        """
        self.path = Path(path)
        self._reader = Reader(self.path, verify=verify)
        found = self.manifest["inputs"].get("ranker")
        if ranker is not None and found != ranker:
            raise ValueError(
                f"{self.path}: expected an index of the ranker {_short(ranker)}, found one of {_short(found)}; "
                "build it again with this ranker"
            )

    @classmethod
    def create(
        cls,
        path: str | Path,
        source: Source,
        config: SegmentConfig,
        *,
        ranker: str,
        command: str,
        build: BuildShards = one_by_one,
    ) -> Index:
        """Builds an index in folder `path`, going on from an interrupted build of the same source and configuration.

        `build` makes the shards: in this process, or see workers.py.
        """
        path = Path(path)
        if manifest_path(path).exists():
            raise ValueError(f"{path}: expected no index there, found one; use add, remove or rebuild, or delete it")
        segments = path / SEGMENTS
        segments.mkdir(parents=True, exist_ok=True)
        with exclusive(path / LOCK, wait=False):
            build_segment(path / "building", source, config, ranker=ranker, command=command, trained=None, build=build)
            shutil.rmtree(segments)  # of a build that was killed right before its manifest
            segments.mkdir()
            name = _next_name(segments)
            os.replace(path / "building", segments / name)
            _sync(segments / name)
            (path / JOURNAL).touch()
            state = State({}, np.empty(0, np.int64))
            entry = {"segments": {name: sha256_file(manifest_path(segments / name))}, "command": command}
            state = Journal(path / JOURNAL).append(state, entry)
            write_checkpoint(
                path, state, {"dim": source.dim, "metric": "inner product"}, command, {"ranker": ranker}, None
            )
        return cls(path, verify=False)

    @property
    def manifest(self) -> dict[str, Any]:
        """The checkpoint as it is on disk now."""
        return read_manifest(self.path)

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._reader.current().dim

    def __len__(self) -> int:
        """Images that can be found."""
        return self._reader.current().live

    def snapshot(self) -> Snapshot:
        """The index as it is on disk now, once all of it is open; what it is made of does not change any more."""
        return self._reader.newest()

    def search(self, queries: np.ndarray, k: int, settings: Settings | None = None) -> Neighbours:
        """The `k` images of the highest inner product with each of `queries` [Q, D], by default as calibrated.

        Large segments that were added a moment ago, here or in another process, are searched as soon as they are open.
        """
        snapshot = self._reader.current()
        vectors = as_vectors("queries", queries, snapshot.dim)
        check_k(k, snapshot.live)
        return snapshot.search(vectors, k, settings or snapshot.settings)

    def metadata(self, ids: np.ndarray) -> list[dict[str, Any] | None]:
        """What is known of each id; `None` for one that is not in the index or was removed."""
        return self._reader.current().metadata(np.asarray(ids, dtype=np.int64))

    def add(self, source: Source, *, command: str) -> Change:
        """Adds images under ids that the index never held; a few are searched exactly until the next rebuild.

        Searches and removals go on meanwhile.
        """
        with exclusive(self.path / "add.lock"):
            snapshot = self.snapshot()
            if source.dim != snapshot.dim:
                raise ValueError(f"vectors: expected width {snapshot.dim}, as in {self.path}, found {source.dim}")
            removed = np.isin(source.ids, snapshot.state.removed)
            _refuse(source.ids, removed, "ids that were never removed", "removed before; ids are not given out twice")
            _refuse(source.ids, snapshot.contains(source.ids), "new ids", "already in the index")
            largest = snapshot.largest
            trained = largest.folder / TRAINED
            given = trained if trained.is_file() and len(source) > EXACT_ADDITION else None
            shards = math.ceil(len(source) / len(largest) * largest.config.shards)
            config = replace(largest.config, shards=shards)
            if trained.is_file() and given is None:
                config = SegmentConfig(EXACT, largest.config.store)
            building, ranker = self.path / "adding", self.manifest["inputs"]["ranker"]
            build_segment(building, source, config, ranker=ranker, command=command, trained=given)
            with exclusive(self.path / LOCK):
                self._commit_built(building, {"added": len(source)}, command, keep_calibration=True)
        return Change(len(source), self.advice())

    def remove(self, ids: np.ndarray | None = None, *, creator: str | None = None, command: str) -> Change:
        """Removes images for good, by id or all of a creator; ids that are not in the index are refused.

        When this returns, no search that begins later, here or in another process, finds them. Removing an image again
        changes nothing.
        """
        with exclusive(self.path / LOCK):
            snapshot = self.snapshot()
            if (ids is None) == (creator is None):
                raise ValueError("remove: expected either ids or a creator")
            if ids is None:
                wanted = snapshot.ids_of_creator(str(creator))
                if not len(wanted):
                    raise ValueError(f"creator {creator!r}: expected images of that creator, found none in {self.path}")
            else:
                wanted = np.unique(np.asarray(ids, dtype=np.int64))
                known = snapshot.contains(wanted) | np.isin(wanted, snapshot.state.removed)
                _refuse(wanted, ~known, f"ids of {self.path}", "not in it; nothing was removed")
                wanted = np.setdiff1d(wanted, snapshot.state.removed)
            if len(wanted):
                why = {"creator": creator} if creator is not None else {}
                self._commit(snapshot.state, {"removed": wanted.tolist(), **why, "command": command})
        return Change(len(wanted), self.advice())

    def rebuild(self, config: SegmentConfig, *, command: str, build: BuildShards = one_by_one) -> Change:
        """One new segment of what is left, trained anew; searches, additions and removals go on meanwhile.

        What is added meanwhile stays a segment of its own, what is removed meanwhile stays removed.
        """
        with exclusive(self.path / "rebuild.lock", wait=False):
            snapshot = self.snapshot()
            if snapshot.live == 0:
                raise ValueError(f"{self.path}: expected images to rebuild from, found that all were removed")
            rows = [np.flatnonzero(~dead) for dead in snapshot.dead]
            source = live_source(list(zip(snapshot.segments, rows, strict=True)))
            building = self.path / "rebuilding"
            ranker = self.manifest["inputs"]["ranker"]
            build_segment(building, source, config, ranker=ranker, command=command, trained=None, build=build)
            with exclusive(self.path / LOCK):
                entry = {"replaced": sorted(snapshot.state.segments)}
                self._commit_built(building, entry, command, keep_calibration=False)
                self._sweep()
        return Change(len(source), self.advice())

    def set_calibration(self, calibration: dict[str, Any], measured: Snapshot) -> None:
        """Keeps what `calibrate` found on the snapshot `measured`; searches use it from now on.

        Raises `ValueError` if the index was rebuilt since.
        """
        with exclusive(self.path / LOCK):
            state = self.snapshot().state
            if not measured.state.segments.keys() <= state.segments.keys():
                raise ValueError(
                    f"{self.path}: expected the index that was measured, found it rebuilt; calibrate again"
                )
            self._write_checkpoint(state, calibration)

    def advice(self) -> str | None:
        """Why the index should be rebuilt; `None` if it need not."""
        snapshot = self.snapshot()
        if (share := 1 - snapshot.live / snapshot.total) > REMOVED_LIMIT:
            return f"{share:.0%} of the stored images are removed"
        if len(snapshot.segments) > SEGMENT_LIMIT:
            return f"every search visits {len(snapshot.segments)} segments"
        return None

    def _commit_built(self, building: Path, entry: dict[str, Any], command: str, *, keep_calibration: bool) -> None:
        """Makes a built segment part of the index. The caller holds the lock."""
        self._sweep()
        segments = self.path / SEGMENTS
        name = _next_name(segments)
        os.replace(building, segments / name)
        _sync(segments / name)
        entry = {**entry, "segments": {name: sha256_file(manifest_path(segments / name))}, "command": command}
        self._commit(self.snapshot().state, entry, keep_calibration=keep_calibration)

    def _commit(self, state: State, entry: dict[str, Any], *, keep_calibration: bool = True) -> None:
        """The journal line, with which the change is valid, then the checkpoint. The caller holds the lock."""
        after = self._reader.journal.append(state, entry)
        self._write_checkpoint(after, self.manifest.get("calibration") if keep_calibration else None)

    def _write_checkpoint(self, state: State, calibration: dict[str, Any] | None) -> None:
        manifest = self.manifest
        write_checkpoint(self.path, state, manifest["config"], manifest["command"], manifest["inputs"], calibration)

    def _sweep(self) -> None:
        """Deletes segments that the journal does not keep. The caller holds the lock, under which segments appear."""
        state = self.snapshot().state
        for folder in (self.path / SEGMENTS).iterdir():
            if folder.name not in state.segments:
                shutil.rmtree(folder)


def _sync(segment: Path) -> None:
    """Waits until the files of a segment are on disk, before a journal line says that they are."""
    for path in (*segment.iterdir(), segment, segment.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _next_name(segments: Path) -> str:
    return f"{max((int(folder.name) for folder in segments.iterdir()), default=-1) + 1:06d}"


def _refuse(ids: np.ndarray, wrong: np.ndarray, expected: str, found: str) -> None:
    if count := int(wrong.sum()):
        some = ", ".join(map(str, ids[wrong][:5])) + (", …" if count > 5 else "")
        raise ValueError(f"expected {expected}, found {count} {found}: {some}")


def _short(ranker: str | None) -> str:
    return "unknown" if ranker is None else ranker[:12] + "…" * (len(ranker) > 12)
