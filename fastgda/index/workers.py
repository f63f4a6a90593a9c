"""Builds the shards of an index by Ray workers, on this machine or on several.

All nodes see the folders of the index and of the vectors under the same paths. Each worker reads its rows and writes
its shard where the index is built; this process trains before and merges after. The files are those of a build in one
process, and the same command goes on after any of them was killed.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from tqdm import tqdm

from fastgda.cluster import ClusterConfig, Pool
from fastgda.index.segment import BuildShards, SegmentConfig, Shard, build_shard
from fastgda.index.source import Vectors


class ShardBuilder:
    """A worker's process."""

    def __init__(self, vectors: Vectors, config: SegmentConfig) -> None:
        self.vectors, self.config = vectors, config

    def compute(self, shard: Shard) -> dict[str, np.ndarray]:
        """Makes a shard; nothing but its file."""
        build_shard(shard, self.vectors, self.config)
        return {}


def on_workers(cluster: ClusterConfig) -> BuildShards:
    """What builds shards on the workers of `cluster`; `ValueError` naming the first that was given up."""

    def build(vectors: Vectors, config: SegmentConfig, shards: list[Shard]) -> None:
        if not shards:
            return
        reasons: dict[Shard, str] = {}
        absolute = [shard._replace(path=shard.path.absolute()) for shard in shards]
        with (
            Pool(partial(ShardBuilder, vectors, config), cluster, gpus=0) as pool,
            tqdm(total=len(shards), unit="shard") as bar,
        ):
            given_up = pool.run(
                absolute, lambda *_: bar.update(), lambda shard, _, reason: reasons.update({shard: reason})
            )
        if given_up:
            first = given_up[0]
            raise ValueError(
                f"{first.path}: expected a shard after {cluster.attempts} attempts, found: {reasons[first]}"
            )

    return build
