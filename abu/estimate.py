"""What a collection will need, from a short calibration: time, memory and disk, before anything is computed."""

from __future__ import annotations

import io
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch

from abu.cluster import Worker
from abu.plan import Collection, Piece
from abu.room import require_disk, require_memory

SAMPLE = {"query": 16, "pass": 64, "scores": 64, "step": 64}
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
    missing, threads = collection.missing(pieces), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        measured = {piece.examples: piece for piece in reversed(missing)}
        costs = {key: _measure(worker, piece) for key, piece in measured.items()}
    finally:
        torch.set_num_threads(threads)
    seconds = disk = 0.0
    for piece in missing:
        per_second, per_byte = costs[piece.examples]
        seconds += per_second * (piece.stop - piece.start) / workers
        disk += per_byte * (piece.stop - piece.start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    require_disk(collection.folder, int(disk))
    here = workers if here is None else here
    require_memory(here * memory, f"--workers {here}")
    return Estimate(len(missing), seconds, workers * memory, gpu, int(disk))


def _measure(worker: Worker, piece: Piece) -> tuple[float, float]:
    """(seconds, bytes on disk) of one example; a few examples first, which load what is loaded only once."""
    worker.compute(Piece(piece.stage, piece.part, piece.start, min(piece.start + 2, piece.stop)))
    stop = min(piece.start + SAMPLE[piece.stage], piece.stop)
    began = time.perf_counter()
    arrays = worker.compute(Piece(piece.stage, piece.part, piece.start, stop))
    seconds = time.perf_counter() - began
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    return seconds / (stop - piece.start), packed.getbuffer().nbytes / (stop - piece.start)
