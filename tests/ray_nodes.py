"""A Ray cluster of two nodes on this machine, for tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster


@contextmanager
def two_nodes() -> Iterator[tuple[Cluster, Any]]:
    """(cluster, its second node): one processor each, and this process connected to them."""
    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    second = cluster.add_node(**small)
    environment = {"env_vars": {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"}}
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()
