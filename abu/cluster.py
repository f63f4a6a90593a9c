"""Computes the pieces of a plan, in this process or on Ray workers (see fastgda/cluster.py), and stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
from tqdm import tqdm

from abu.plan import Collection, Task
from fastgda.cluster import ClusterConfig, Pool, Worker, add_cluster_flags, cause, cluster_from, workers_here

__all__ = [
    "ClusterConfig",
    "Pool",
    "Worker",
    "add_cluster_flags",
    "cluster_from",
    "run_plan",
    "run_stages",
    "workers_here",
]


def run_plan(
    build: Callable[[], Worker],
    collection: Collection,
    pieces: Sequence[Task],
    cluster: ClusterConfig | None = None,
    unit: str = "piece",
) -> None:
    """Computes and stores the missing pieces, in this process or on Ray workers.

    On workers, `ValueError` at the end if some were given up; in this process the first error is raised as it is.
    Either way failed.jsonl lists them, and the next call tries them again.
    """
    run_stages(build, collection, {unit: pieces}, cluster)


def run_stages(
    build: Callable[[], Worker],
    collection: Collection,
    stages: Mapping[str, Sequence[Task]],
    cluster: ClusterConfig | None = None,
) -> None:
    """The same for several plans (unit -> pieces), one after the other, by the same workers."""
    missing = {unit: collection.missing(pieces) for unit, pieces in stages.items()}
    if not any(missing.values()):
        return
    collection.started()
    with nullcontext() if cluster is None else Pool(build, cluster) as pool:
        runner = pool or build()
        for unit, pieces in stages.items():
            if missing[unit]:
                _run_stage(runner, collection, pieces, missing[unit], unit)


def _run_stage(
    runner: Worker | Pool, collection: Collection, pieces: Sequence[Task], missing: list[Task], unit: str
) -> None:
    with tqdm(total=len(pieces), initial=len(pieces) - len(missing), unit=unit) as bar:

        def done(piece: Task, arrays: dict[str, np.ndarray]) -> None:
            collection.store(piece, arrays)
            bar.update()

        if not isinstance(runner, Pool):
            for piece in missing:
                try:
                    arrays = runner.compute(piece)
                except Exception as error:
                    collection.failed(piece, 1, cause(error))
                    raise
                done(piece, arrays)
            return
        given_up = runner.run(missing, done, collection.failed)
    if given_up:
        raise ValueError(
            f"{collection.folder}: expected {len(pieces)} pieces, gave up {len(given_up)} after "
            f"{runner.config.attempts} attempts each, {given_up[0].name} the first; see failed.jsonl"
        )
