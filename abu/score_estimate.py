"""Time, memory and disk that a collection of scores will need, before it is begun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from abu.estimate import Estimate, seconds_of
from abu.exact_collection import change_bytes
from abu.peak import peak_bytes
from abu.room import require_disk, require_memory
from abu.score_collection import ScoreCollector

TRIAL_QUERIES = 4
"""Queries that are added to one, to time what a further one costs."""


class Costs(NamedTuple):
    """Seconds."""

    draw: float
    """Of a query's gradient, one draw."""
    step: float
    """From a query's gradient to its step."""
    picture: float
    """Of a training picture, for any number of queries."""
    pair: float
    """Of a training picture with one query."""


def require_room(collector: ScoreCollector, workers: int, *, here: int | None = None) -> tuple[int, int]:
    """(bytes of memory, bytes on disk) that the missing pieces will need.

    `ValueError` if this machine has less than the workers need that run `here` (default: all).
    """
    plan, cut, settings = collector.plan, collector.job.cut, collector.settings
    training, exact = collector.inputs.training, collector.exact
    latents, text = (int(np.prod(array.shape[-3:])) for array in (training.latents, training.text[:, 0]))
    losses = settings.timesteps * settings.captions * settings.views
    # The exact form holds noised inputs and targets of a shard, and the moved weights beside the steps.
    of_picture = 2 * losses * latents if exact else latents + text
    of_query = change_bytes(collector.source.denoiser)
    tile = (1 + exact) * min(cut.tile, plan.queries) * of_query
    memory = peak_bytes() + 4 * cut.shard * of_picture + tile
    steps, scores = left(collector)
    pairs = plan.lists.size
    disk = int(steps * plan.queries * of_query + scores * pairs * 4) + pairs * (4 if plan.shared else 12)
    require_disk(collector.collection.folder, disk)
    here = workers if here is None else here
    require_memory(here * memory, f"--tile {cut.tile} --shard {cut.shard}, {here} workers")
    return workers * memory, disk


def dry_run(
    collector: ScoreCollector, workers: int, threads: int | None = None, *, here: int | None = None
) -> Estimate:
    """From one batch of each kind of work, with the threads that one of `workers` gets; stores nothing.

    Raises `ValueError` if disk or memory will not do, before and after it.
    """
    require_room(collector, workers, here=here)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, before // workers))
    try:
        costs = trial(collector)
    finally:
        torch.set_num_threads(before)
    memory, disk = require_room(collector, workers, here=here)
    (steps, scores), plan, pieces = left(collector), collector.plan, collector.plan.influence()
    draws = collector.query_draws.bins * collector.query_draws.draws
    pictures = sum(piece.stop - piece.start for piece in pieces)
    products = sum((piece.stop - piece.start) * len(plan.tile(piece.tile)) for piece in pieces)
    pairs = plan.lists.size if collector.exact else products
    seconds = steps * plan.queries * (draws * costs.draw + costs.step)
    seconds += scores * (pictures * costs.picture + pairs * costs.pair)
    missing = sum(len(collector.collection.missing(stage)) for stage in plan.stages().values())
    gpu = 0
    if torch.cuda.is_available():
        further = max(0, min(collector.job.cut.tile, plan.queries) - 1 - TRIAL_QUERIES)
        gpu = torch.cuda.max_memory_allocated()
        gpu += (1 + collector.exact) * further * change_bytes(collector.source.denoiser)
    return Estimate(missing, seconds / workers, memory, gpu, disk)


def left(collector: ScoreCollector) -> tuple[float, float]:
    """Shares of the pieces of either stage that are missing."""
    steps, scores = (
        len(collector.collection.missing(pieces)) / len(pieces) for pieces in collector.plan.stages().values()
    )
    return steps, scores


def trial(collector: ScoreCollector) -> Costs:
    """One batch of the first query's draws, and of the first pictures with one query and with several."""
    batch, row = collector.job.cut.batch, collector.inputs.query[0]
    few = replace(collector.query_draws, bins=1, draws=batch)
    collector.gradient(row, replace(few, draws=1))
    draw = seconds_of(lambda: collector.gradient(row, few)) / batch
    gradient = collector.gradient(row, replace(few, draws=1))
    step = seconds_of(lambda: collector.step(gradient))
    steps = collector.step(gradient)
    ids = collector.plan.tile_images(0)[:batch]

    def score(ids: np.ndarray, queries: int) -> Callable[[], object]:
        changes = {name: matrix.expand(queries, -1, -1).contiguous() for name, matrix in steps.items()}
        return lambda: collector.pair_scores(ids, changes, np.ones((queries, len(ids)), bool))

    score(ids[:1], 1)()
    one = seconds_of(score(ids, 1)) / len(ids)
    several = seconds_of(score(ids, 1 + TRIAL_QUERIES)) / len(ids)
    pair = max(0.0, several - one) / TRIAL_QUERIES
    return Costs(draw, step, max(0.0, one - pair), pair)
