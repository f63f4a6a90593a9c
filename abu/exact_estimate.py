"""Time, memory and disk that a collection of exact influence will need, before it is begun."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from abu.amortised import Examples
from abu.estimate import Estimate, seconds_of
from abu.exact_collection import ExactCollector, change_bytes, disk_bytes
from abu.influence import ExactInfluence
from abu.peak import peak_bytes
from abu.room import require_disk, require_memory
from abu.unlearn import query_gradient

TRIAL_DRAWS = 6
"""Draws per timestep bin of the gradient that is timed; as many rows as are taken at once, or nearly."""
TRIAL_QUERIES = 4
"""Models that share the sweep that is timed."""


def require_room(collector: ExactCollector, workers: int, *, here: int | None = None) -> tuple[int, int]:
    """(bytes of memory of all workers, bytes on disk) that the plan will need.

    `ValueError` if this machine has less disk, or less memory than the workers need that run `here` (default: all); on
    other machines the memory is not known.
    """
    plan, config, folder = collector.plan, collector.config, collector.collection.folder
    inputs = 2 * config.draws.per_image * config.plan.shard * int(np.prod(collector.exact.images.shape)) * 4
    tile = 2 * min(config.plan.tile, plan.queries) * change_bytes(collector.exact.model)
    memory = peak_bytes() + inputs + tile
    stored = sum(path.stat().st_size for path in folder.glob("*.npz"))
    disk = max(0, disk_bytes(plan, config, collector.exact.model) - stored)
    require_disk(folder, disk)
    here = workers if here is None else here
    require_memory(here * memory, f"--tile {config.plan.tile} --shard {config.plan.shard}, {here} workers")
    return workers * memory, disk


def dry_run(collector: ExactCollector, workers: int, *, here: int | None = None) -> Estimate:
    """From one batch of each kind of work, with the threads that one of `workers` gets; raises as `require_room`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        seconds = sum(stage_seconds(collector).values()) / workers
    finally:
        torch.set_num_threads(threads)
    memory, disk = require_room(collector, workers, here=here)
    pieces = sum(len(collector.collection.missing(stage)) for stage in collector.plan.stages().values())
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Estimate(pieces, seconds, memory, gpu, disk)


def stage_seconds(collector: ExactCollector) -> dict[str, float]:
    """Seconds of each stage's missing pieces, on one worker."""
    plan, config = collector.plan, collector.config
    left = {name: len(collector.collection.missing(pieces)) / len(pieces) for name, pieces in plan.stages().items()}
    gradient, once, further = trial(collector.exact, collector.queries.rows(0, 1), plan.needed)
    return {
        "unlearned": left["unlearned"] * plan.queries * config.unlearning.steps * gradient,
        "before": left["before"] * len(plan.needed) * once,
        "influence": left["influence"] * plan.lists.size * further,
    }


def trial(exact: ExactInfluence, query: Examples, ids: np.ndarray) -> tuple[float, float, float]:
    """Seconds of one step's gradient, of an image at θ0, and of an image at one of several moved models."""
    sweep, draws = exact.sweep, exact.unlearning.draws(len(exact.schedule))
    few = replace(draws, draws=min(TRIAL_DRAWS, draws.draws))
    gradient = seconds_of(lambda: query_gradient(exact.model, exact.schedule, exact.curvature, query, few))
    some = ids[: max(1, sweep.groups // sweep.draws.captions)].tolist()
    sweep.losses(some[:1], [None])
    once = seconds_of(lambda: sweep.losses(some, [None]))
    several = seconds_of(lambda: sweep.losses(some, [None] * (1 + TRIAL_QUERIES)))
    return gradient * draws.draws / few.draws, once / len(some), (several - once) / len(some) / TRIAL_QUERIES


def attribution_estimate(exact: ExactInfluence, query: Examples, ids: np.ndarray) -> str:
    """Time and memory of one query's influence on `ids`."""
    gradient, once, further = trial(exact, query, ids)
    seconds = exact.unlearning.steps * gradient + len(ids) * (once + further)
    memory = peak_bytes()
    return f"{len(ids)} images, {seconds / 60:.1f} min, {memory / 2**30:.1f} GiB of memory"
