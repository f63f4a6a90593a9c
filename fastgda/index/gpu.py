"""FAISS on a GPU, where it was built for one and there is one; CUDA_VISIBLE_DEVICES="" hides them.

Training: the assignment of k-means, nearly all of its time. Searching: structures in memory that FAISS has for GPUs
(exact, and inverted lists of plain, scalar or product-quantised codes). Not yet run on a GPU: the tests play one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

GPU_LIMIT = 2048
"""Largest k and nprobe of a search on a GPU; FAISS refuses more."""
KNOWN = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
log = logging.getLogger(__name__)


def has_gpu() -> bool:
    """Whether FAISS was built for GPUs and sees one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@contextmanager
def assigning(ivf: faiss.IndexIVF) -> Iterator[None]:
    """Training inside assigns vectors to the centroids of `ivf` on the GPUs, if there are any."""
    if not has_gpu():
        yield
        return
    # kept in a variable, because FAISS holds a bare pointer to it
    assignment = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
    ivf.clustering_index = assignment
    try:
        yield
    finally:
        ivf.clustering_index = None


class Copy:
    """A structure on a GPU, searched by one thread at a time: FAISS shares its working memory among searches."""

    def __init__(self, resources: Any, index: Any) -> None:
        """`resources` live as long as the `index` that uses them."""
        self._resources, self._index = resources, index
        self._lock = threading.Lock()

    def search(self, queries: np.ndarray, k: int, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `Structure.search`; k and nprobe up to `GPU_LIMIT`."""
        with self._lock:
            return self._index.search(queries, k, params=parameters)


def copied(index: faiss.Index) -> Copy | None:
    """A copy of `index` on the first GPU; `None` without one, or where it does not know or hold the structure."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if not (isinstance(inner, KNOWN) and has_gpu()):
        return None
    options, resources = faiss.GpuClonerOptions(), faiss.StandardGpuResources()
    # look-up tables of 64 codes do not fit a GPU's shared memory otherwise; what they find is re-ranked
    options.useFloat16 = isinstance(inner, faiss.IndexIVFPQ)
    try:
        return Copy(resources, faiss.index_cpu_to_gpu(resources, 0, index, options))
    except RuntimeError as error:
        log.warning("searching on the processor; on the GPU: %s", error)
        return None
