"""What a collection will need, from a short calibration: time, memory and disk, before anything is computed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from abu.cluster import Worker
from abu.peak import forget_peak, peak_bytes
from abu.plan import Collection, Piece
from abu.room import require_disk, require_memory

SAMPLE = {"query": 8, "pass": 64, "scores": 64, "step": 64}
"""Examples that are computed to measure the rate."""


@dataclass(frozen=True)
class Estimate:
    """What the missing pieces will need."""

    pieces: int
    seconds: float
    """Wall time from the start of the first piece."""
    memory: int
    """Bytes of main memory, all workers together."""
    gpu_memory: int
    """Bytes on each GPU; 0 without one."""
    disk: int
    """Bytes of the pieces."""

    def __str__(self) -> str:
        parts = [
            f"{self.pieces} pieces",
            f"{self.seconds / 60:.1f} min",
            f"{self.memory / 2**30:.1f} GiB of memory",
            f"{self.disk / 2**20:.0f} MiB on disk",
        ]
        if self.gpu_memory:
            parts.append(f"{self.gpu_memory / 2**30:.1f} GiB on each GPU")
        return ", ".join(parts)


def estimate(
    worker: Worker, collection: Collection, pieces: list[Piece], workers: int, *, here: int | None = None
) -> Estimate:
    """Computes a few examples of each part of the plan, with the threads that one of `workers` gets.

    Raises `ValueError` if the folder's disk will not hold what is needed, or this machine's memory what the workers
    need that run `here` (default: all). Workers on other machines are assumed to be as fast as this one; whether their
    memory suffices is not known.
    """
    missing, threads, loaded = collection.missing(pieces), torch.get_num_threads(), peak_bytes()
    torch.set_num_threads(max(1, threads // workers))
    try:
        measured = {piece.examples: piece for piece in reversed(missing)}
        costs = {key: _measure(worker, piece) for key, piece in measured.items()}
    finally:
        torch.set_num_threads(threads)
    seconds = disk = 0.0
    for piece in missing:
        cost = costs[piece.examples]
        seconds += cost.seconds * (piece.stop - piece.start) / workers
        disk += cost.disk * (piece.stop - piece.start)
    memory = max([loaded, *(cost.memory for cost in costs.values())])
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    require_disk(collection.folder, int(disk))
    here = workers if here is None else here
    require_memory(here * memory, f"--workers {here}")
    return Estimate(len(missing), seconds, workers * memory, gpu, int(disk))


@dataclass(frozen=True)
class Cost:
    """What was measured on a few examples."""

    seconds: float
    """Of one."""
    disk: float
    """Bytes of one."""
    memory: int
    """Peak of the process while it computes a whole piece."""


def _measure(worker: Worker, piece: Piece) -> Cost:
    """Two examples first, which load what is loaded only once; then some, and twice as many.

    What the second has above the first in memory is taken to grow on to the size of the piece.
    """
    size, some = piece.stop - piece.start, SAMPLE[piece.stage]
    _compute(worker, piece, min(2, size))
    counts = sorted({min(some, size), min(2 * some, size)})
    peaks = []
    for count in counts:
        forget_peak()
        began = time.perf_counter()
        arrays = _compute(worker, piece, count)
        seconds = time.perf_counter() - began
        peaks.append(peak_bytes())
    growth = max(0.0, (peaks[-1] - peaks[0]) / max(1, counts[-1] - counts[0]))
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    memory = int(peaks[-1] + growth * (size - counts[-1]))
    return Cost(seconds / counts[-1], packed.getbuffer().nbytes / counts[-1], memory)


def _compute(worker: Worker, piece: Piece, count: int) -> dict[str, np.ndarray]:
    return worker.compute(replace(piece, stop=piece.start + count))


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call, what it started on an accelerator included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
