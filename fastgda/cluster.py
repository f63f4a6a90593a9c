"""Runs pieces of work on Ray workers: the index's shards, the teacher's plans. Imports nothing but the frame.

Workers compute, the driver hears of it: a worker, a node or the driver may be killed at any moment, and what is lost is
the pieces that were being computed. A worker that dies is replaced; a piece is tried a bounded number of times.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fastgda.core import ROOT

PATIENCE = 60.0
"""Seconds without any worker after which the wait is reported."""
LONGEST = 300
"""Characters of an error that are kept; Ray's own can fill a page."""
log = logging.getLogger(__name__)


class Worker(Protocol):
    """What computes pieces; built once in each worker's process."""

    def compute(self, piece: Any) -> dict[str, np.ndarray]:
        """The arrays of a piece."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the pieces are computed."""

    workers: int = 1
    """Worker processes."""
    address: str | None = None
    """Address of a running Ray cluster; by default one is started on this machine."""
    threads: int | None = None
    """Processors of each worker; by default an equal share of this machine's."""
    attempts: int = 3
    """Times a piece is tried before it is given up."""

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("threads", self.threads), ("attempts", self.attempts)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}: expected at least 1, found {value}")


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """`--workers` and `--address`, which every command with a plan takes."""
    parser.add_argument("--workers", type=int, help="Ray workers (default: this process, without Ray)")
    parser.add_argument("--threads", type=int, help="processors of each worker (default: an equal share)")
    parser.add_argument("--address", help="a running Ray cluster (default with --workers: one on this machine)")


def cluster_from(args: argparse.Namespace) -> ClusterConfig | None:
    """What the flags say; `None` for this process alone."""
    if args.workers is None and args.address is None:
        return None
    return ClusterConfig(1 if args.workers is None else args.workers, args.address, args.threads)


def workers_here(cluster: ClusterConfig | None) -> int:
    """Workers whose memory is this machine's: none with an address, whose nodes may be larger or smaller."""
    if cluster is None:
        return 1
    return cluster.workers if cluster.address is None else 0


class _Actor:
    """A worker's process."""

    def __init__(self, build: Callable[[], Worker], threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker = build()

    def ready(self) -> None:
        """Returns as soon as the worker is built."""

    def compute(self, piece: Any) -> dict[str, np.ndarray]:
        """See `Worker`."""
        return self.worker.compute(piece)


class Pool:
    """Workers of a Ray cluster; a context manager that leaves a cluster it started stopped."""

    def __init__(self, build: Callable[[], Worker], config: ClusterConfig, gpus: int | None = None) -> None:
        """`build` makes a worker; it is pickled by reference, so this repository must be importable on every node.

        `gpus` of each worker: by default one where this machine has any.
        """
        self.ray, self.build, self.config = _import_ray(), build, config
        self.gpus = int(torch.cuda.is_available()) if gpus is None else gpus
        self.threads = config.threads or max(1, (os.cpu_count() or 1) // config.workers)
        self.running: dict[Any, tuple[Any, Any, int]] = {}
        self.starting: dict[Any, Any] = {}
        self.actors: list[Any] = []
        self.idle = deque[Any]()
        self.broken = 0

    def __enter__(self) -> Pool:
        self.started = not self.ray.is_initialized()
        if self.started:
            local: dict[str, Any] = {"num_cpus": self.threads * self.config.workers, "_node_ip_address": "127.0.0.1"}
            self.ray.init(
                # without an address Ray would join whatever cluster was started on this machine last
                address=self.config.address or "local",
                include_dashboard=False if self.config.address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
                **(local if self.config.address is None else {}),
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self.started:
            self.ray.shutdown()
            return
        for actor in self.actors:
            self.ray.kill(actor)

    def run(
        self,
        pieces: list[Any],
        done: Callable[[Any, dict[str, np.ndarray]], None],
        failed: Callable[[Any, int, str], None],
    ) -> list[Any]:
        """Computes all pieces; returns those given up. `failed` hears of every attempt that failed.

        Workers that an earlier call started are used again.
        """
        waiting, idle = deque((piece, 1) for piece in pieces), self.idle
        given_up: list[Any] = []
        for _ in range(min(self.config.workers, len(pieces)) - len(idle) - len(self.starting)):
            self._start()
        while waiting or self.running:
            while waiting and idle:
                piece, attempt = waiting.popleft()
                actor = idle.popleft()
                self.running[actor.compute.remote(piece)] = (actor, piece, attempt)
            ready, _ = self.ray.wait([*self.running, *self.starting], num_returns=1, timeout=PATIENCE)
            if not ready and not self.running:
                log.warning("waiting for the cluster to have room for a worker of %d processors", self.threads)
            for reference in ready:
                if reference in self.starting:
                    idle.extend(self._started(reference))
                    continue
                actor, piece, attempt = self.running.pop(reference)
                try:
                    arrays = self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    failed(piece, attempt, cause(error))
                    if attempt < self.config.attempts:
                        waiting.append((piece, attempt + 1))
                    else:
                        given_up.append(piece)
                    if isinstance(error, self.ray.exceptions.RayActorError):
                        self._start()
                        continue
                else:
                    done(piece, arrays)
                idle.append(actor)
        return given_up

    def _start(self) -> None:
        # A piece is handed to a worker only when it stands: one for which the cluster has no room blocks nothing.
        remote = self.ray.remote(num_cpus=self.threads, num_gpus=self.gpus)(_Actor)
        actor = remote.remote(self.build, self.threads)
        self.actors.append(actor)
        self.starting[actor.ready.remote()] = actor

    def _started(self, reference: Any) -> list[Any]:
        actor = self.starting.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.broken += 1
            if self.broken >= self.config.attempts * self.config.workers:
                raise ValueError(f"workers: expected them to start, found: {cause(error)}") from error
            self._start()
            return []
        return [actor]


def cause(error: Exception) -> str:
    """The last line of an error, shortened: what was raised, without the remote traceback."""
    origin = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(origin).splitlines() if line.strip()]
    message = lines[-1] if lines else "no message"
    return f"{type(origin).__name__}: {message[:LONGEST]}{'…' * (len(message) > LONGEST)}"


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("--workers: expected ray, found none; pip install 'fastgda[cluster]'") from error
    return ray
