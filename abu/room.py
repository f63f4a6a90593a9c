"""Whether this machine has the memory and the disk that a collection needs: asked before its work starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from abu.amortised import RUNS
from abu.collect_config import CollectConfig, MeasuredConfig, Settings, StepConfig
from abu.keyvalue import key_value_layers
from abu.plan import Piece
from abu.stages import examples_of, pass_counts, query_counts
from abu.testbed import Testbed

GIB = 2**30


def require_disk(folder: Path, needed: int) -> None:
    """Raises `ValueError` if the disk of `folder`, which need not exist yet, has fewer than `needed` bytes free."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(f"{folder}: expected {needed / GIB:.2f} GiB free for the pieces, found {free / GIB:.2f}")


def require_memory(needed: int, purpose: str) -> None:
    """Raises `ValueError` that begins with `purpose` if this machine has less memory than `needed` bytes."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > installed:
        raise ValueError(f"{purpose}: expected {needed / GIB:.1f} GiB of memory, found {installed / GIB:.1f}")


def step_memory(queries: int, judged: int, weights: int, config: StepConfig) -> int:
    """Bytes of the queries' gradients that a worker of `steps` holds: of all pooled, and of the judged by run."""
    numbers = weights + 2 * (weights // config.fold)
    return (queries + RUNS * judged) * numbers * config.query_bits // 8


def require_step_memory(testbed: Testbed, config: StepConfig, workers: int) -> None:
    """Raises `ValueError` if this machine cannot hold the queries' gradients for `workers` workers of `steps`."""
    every, judged = query_counts(testbed)
    weights = testbed.load_curvature(torch.device("cpu")).eigenvalues.numel()
    purpose = f"--query_bits {config.query_bits} --fold {config.fold}, gradients of {every} queries"
    if workers > 1:
        purpose += f" on {workers} workers"
    require_memory(workers * step_memory(every, judged, weights, config), purpose)


def piece_bytes(testbed: Testbed, config: Settings, pieces: list[Piece]) -> int:
    """Bytes of `pieces` on disk, but for the headers of their arrays and, of DAS, its own scores."""
    if isinstance(config, CollectConfig):
        return gradient_bytes(testbed, config, pieces)
    (every, judged), found = query_counts(testbed), 0
    for piece in pieces:
        of_image = 2 * 4 * every
        if isinstance(config, StepConfig):
            of_image += 2 * 4 * RUNS * judged
        else:
            compared = len(pass_counts(int(piece.part))) if config.growth else 1
            of_image += compared * RUNS * judged * (4 + 2 * len(config.bin_weights))
        found += of_image * (piece.stop - piece.start)
    return found


def gradient_bytes(testbed: Testbed, config: CollectConfig, pieces: list[Piece]) -> int:
    """The same for gradients: 16 bits at every token that is not padding, 32 for scale and loss, by run and bin."""
    device, tokens, found = torch.device("cpu"), dict[str, Tensor](), 0
    out = sum(len(layer.weight) for layer in key_value_layers(testbed.load_source(device).denoiser).values())
    for piece in pieces:
        if piece.examples not in tokens:
            tokens[piece.examples] = (examples_of(testbed, piece.examples, device).text.abs().amax(-1) > 0).sum(1)
        counts = tokens[piece.examples][piece.start : piece.stop]
        found += 2 * out * int(counts.sum()) + (8 if isinstance(config, MeasuredConfig) else 4) * len(counts)
    return RUNS * config.bins * found
