"""Extraction by Ray Data workers on this machine or on many nodes. The only importer of ray in this package.

Workers read pictures and compute, this process writes: every node needs the pictures and the repository, none but this
one the folder of the features. A worker that dies is replaced and its shard made again by Ray. What was finished is on
disk, so the same command goes on after this process was killed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastgda.core import ROOT
from feature_extraction.extraction import ExtractConfig, Extraction
from feature_extraction.shards import Skipped, encode_rows


class ShardWorker:
    """A worker's process: makes shards of one split."""

    def __init__(self, config: ExtractConfig, ftype: str, split: str, threads: int) -> None:
        torch.set_num_threads(threads)
        work = Extraction(config)
        self.plan, self.encoder = work.plan(ftype, split), work.load(ftype, split)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"start": [1]} -> the features of that shard, and its unreadable pictures as JSON."""
        (start,) = batch["start"]
        features, skipped = encode_rows(self.encoder, self.plan.table, self.plan.rows(int(start)))
        return {"start": batch["start"], "features": features[None], "skipped": np.array([json.dumps(skipped)])}


def encode_on_workers(work: Extraction, ftype: str, split: str) -> None:
    """Makes the missing shards of `split`; `ValueError` as soon as too many pictures cannot be read."""
    config, plan = work.config, work.plan(ftype, split)
    missing = plan.missing(plan.share())
    if not missing:
        return
    work.measure(ftype, split)
    assert config.workers is not None
    workers = min(config.workers, len(missing))
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.workers)
    total, left = (sum(len(plan.rows(start)) for start in some) for some in (plan.share(), missing))
    skipped: Skipped = []
    with _connected(config, threads) as ray:
        starts = ray.data.from_items([{"start": start} for start in missing], override_num_blocks=len(missing))
        made = starts.map_batches(
            ShardWorker,
            fn_constructor_args=(config, ftype, split, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=1 if config.torch_device.type == "cuda" else 0,
        )
        with tqdm(total=total, initial=total - left, desc=f"{ftype} {split}", unit="image") as bar:
            try:
                for row in made.iter_rows():
                    unread = json.loads(str(row["skipped"]))
                    skipped += unread
                    plan.check(skipped)
                    plan.store(int(row["start"]), np.asarray(row["features"], np.float32), unread)
                    bar.update(len(plan.rows(int(row["start"]))))
            except ray.exceptions.RayError as error:
                raise ValueError(f"{plan.table.path}: expected the workers to go on, found: {_cause(error)}") from error


@contextmanager
def _connected(config: ExtractConfig, threads: int) -> Iterator[Any]:
    # leaves a cluster running unless it was started here
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--workers: expected ray, found none; pip install 'fastgda[cluster]'") from error
    started = not ray.is_initialized()
    if started:
        assert config.workers is not None
        local: dict[str, Any] = {"num_cpus": threads * config.workers, "_node_ip_address": "127.0.0.1"}
        ray.init(
            address=config.address,
            include_dashboard=False if config.address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
            **(local if config.address is None else {}),
        )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _cause(error: Exception) -> str:
    """The last line of a remote error: what was raised, without the remote traceback."""
    lines = [line for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
