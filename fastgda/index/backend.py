"""FAISS behind a small interface; only this module and gpu.py import it.

Embeddings are calibrated: a higher inner product of query and training embedding means more influential, so retrieval
is a maximum-inner-product search. Inside a `Structure` a vector is known by its row 0, 1, 2, ...; ids are kept outside.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from fastgda.core import rows_not_finite

try:
    import faiss
    from faiss.contrib.ondisk import merge_ondisk
except ImportError as error:
    raise ImportError("faiss is not installed; pip install 'fastgda[cpu]' or 'fastgda[gpu]'") from error

from fastgda.index.gpu import GPU_LIMIT, Copy, assigning, copied

# as FAISS will have it (facebookresearch/faiss#5109): until then 14,000 x 4 is compared pair by pair, 12 times slower
faiss.cvar.distance_compute_blas_threshold = 800 * faiss.omp_get_max_threads()

EXACT = "Flat"
"""Factory string whose scores are the inner products themselves, so that nothing is re-ranked."""
LISTS_FILE = "lists.ivfdata"
TRAINING_FLOOR = 65_536
"""Training vectors for 256-entry codebooks: as many as FAISS would use at most."""
CODE_TRAINING = 100_000
"""Vectors on which FAISS trains the codes of an inverted file at most."""
WIDEST_GRAPH = 4096
"""Largest efSearch: beyond it a scan is as good."""
GRAPH_COST = 4.0
"""A comparison in a graph takes as long as so many of a matrix product."""
COMPARISON_COST = 40.0
"""Multiplications and additions that a comparison with a centroid of a codebook counts for at least, however few its
dimensions."""
COARSE_ROUNDS, CODEBOOK_ROUNDS = 10, 25
"""Rounds of k-means for inverted lists and for a product quantiser."""
TRAINING_PER_LIST = 64
"""Training vectors per inverted list; FAISS warns below 39 and drops what exceeds 256."""


@dataclass(frozen=True)
class Neighbours:
    """The result of a search."""

    ids: np.ndarray
    """[Q, k] int64 training ids, most influential first."""
    scores: np.ndarray
    """[Q, k] float32 inner products, descending."""


class FlatIndex:
    """Exact inner-product search in memory. Searching from several threads at once is safe; adding is not offered."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def build(cls, embeddings: np.ndarray, ids: np.ndarray | None = None) -> FlatIndex:
        """An index of embeddings [N, D] under int64 `ids` [N], by default 0..N-1."""
        vectors = as_vectors("embeddings", embeddings)
        labels = as_ids("ids", np.arange(len(vectors)) if ids is None else ids, len(vectors))
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        index.add_with_ids(vectors, labels)
        return cls(index)

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._index.d

    def __len__(self) -> int:
        return self._index.ntotal

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """The `k` training images of the highest inner product with each of `queries` [Q, D]."""
        vectors = as_vectors("queries", queries, self.dim)
        check_k(k, len(self))
        scores, ids = self._index.search(vectors, k)
        return Neighbours(ids.astype(np.int64, copy=False), scores)


class Structure:
    """A FAISS index of any factory string, over rows. Searching from several threads at once is safe."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index
        self._ivf = faiss.try_extract_index_ivf(index)
        self._gpu: Copy | None = None

    @classmethod
    def create(cls, factory: str, dim: int) -> Structure:
        """An empty, untrained index; `ValueError` unless `factory` allows inner products and leaves ids to us."""
        for part, why in (("IDMap", "ids are kept beside the index"), ("Refine", RERANKS), ("RFlat", RERANKS)):
            if part in factory:
                raise ValueError(f"factory {factory}: expected no {part}, because {why}")
        try:
            index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"factory {factory}: expected a FAISS factory string for {dim} dimensions, found: {_reason(error)}"
            ) from error
        codes = _codes(index)
        if hasattr(codes, "do_polysemous_training"):
            codes.do_polysemous_training = False  # two minutes of annealing, for a filter of codes that is not used
        return cls(index)

    @property
    def dim(self) -> int:
        """Width D of a vector."""
        return self._index.d

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return self._index.ntotal

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added: at once for Flat, else after `train`."""
        return self._index.is_trained

    @property
    def lists(self) -> int:
        """Number of inverted lists; 0 where there are none."""
        return 0 if self._ivf is None else self._ivf.nlist

    @property
    def widest(self) -> int:
        """The largest useful nprobe (inverted lists) or efSearch (graph); 0 where all rows are scanned."""
        return self.lists or (min(self.rows, WIDEST_GRAPH) if _parameters(self._index, 1) is not None else 0)

    def code_bytes(self) -> int:
        """Bytes of one vector in memory: its code, and its row number in an inverted list or its links in a graph."""
        index = _innermost(self._index)
        if self._ivf is not None:
            return self._ivf.code_size + 8
        if isinstance(index, faiss.IndexHNSW):
            return faiss.downcast_index(index.storage).sa_code_size() + 4 * index.hnsw.nb_neighbors(0) + 12
        return index.sa_code_size()

    def fixed_bytes(self) -> int:
        """Bytes of the coarse quantiser."""
        return 0 if self._ivf is None else 4 * self._ivf.nlist * self._ivf.d

    def training_flops(self, sample: int) -> float:
        """Multiplications and additions of training on `sample` vectors.

        k-means of the coarse quantiser on all of them; on at most 65,536 of the product quantiser, and of OPQ, which
        alternates between a few rounds of the same, encoding, and two matrix products.
        """
        if self.is_trained:
            return 0.0
        few = min(sample, TRAINING_FLOOR)
        work = 0.0 if self._ivf is None else 2.0 * COARSE_ROUNDS * sample * self._ivf.nlist * self._ivf.d
        quantiser = getattr(_codes(self._index), "pq", None)
        if quantiser is not None:
            work += few * CODEBOOK_ROUNDS * _encoding_flops(quantiser.d, quantiser.M, quantiser.ksub)
        rotation = _rotation(self._index)
        if rotation is not None:
            rounds = rotation.niter_pq_0 + (rotation.niter - 1) * rotation.niter_pq + rotation.niter
            work += few * rounds * _encoding_flops(rotation.d_out, rotation.M, 256)
            work += few * rotation.niter * 4.0 * rotation.d_in * rotation.d_out
        return work

    def adding_flops(self) -> float:
        """Multiplications and additions of adding one vector: transformation, nearest centroid, code; in a graph the
        comparisons that place it, each counted `GRAPH_COST` times because they wait for memory."""
        index, work = faiss.downcast_index(self._index), 0.0
        if isinstance(index, faiss.IndexPreTransform):
            work += 2.0 * self.dim * index.index.d
            index = faiss.downcast_index(index.index)
        if isinstance(index, faiss.IndexHNSW):
            return work + _graph_flops(index, index.hnsw.efConstruction)
        if not isinstance(index, faiss.IndexIVF):
            return work + 2.0 * index.d
        quantiser = faiss.downcast_index(index.quantizer)
        graph = isinstance(quantiser, faiss.IndexHNSW)
        work += _graph_flops(quantiser, quantiser.hnsw.efSearch) if graph else 2.0 * index.nlist * index.d
        codes = getattr(index, "pq", None)
        return work + (2.0 * index.d if codes is None else _encoding_flops(codes.d, codes.M, codes.ksub))

    def training_size(self, images: int) -> int:
        """Vectors to train on, of `images`; 0 where nothing is trained."""
        return 0 if self.is_trained else min(images, max(TRAINING_FLOOR, TRAINING_PER_LIST * self.lists))

    def training_bytes(self, sample: int) -> float:
        """Bytes that FAISS allocates to train on `sample` vectors, within a fifth (measured; see its sources).

        OPQ: at most 65,536 vectors, three copies as wide as they come and four as wide as they are after it. Then all
        of them transformed, and two copies of those that the codes are trained on.
        """
        if self.is_trained or not sample:
            return 0.0
        width, total = _innermost(self._index).d, 0.0
        if _rotation(self._index) is not None:
            total = 4.0 * min(sample, TRAINING_FLOOR) * (3 * self.dim + 4 * width)
        after = 4.0 * width * (sample * (width != self.dim) + 2 * min(sample, CODE_TRAINING))
        return max(total, after)

    def train(self, sample: np.ndarray) -> None:
        """Trains on `sample` [n, D]; the same sample in the same order gives the same structure."""
        try:
            with nullcontext() if self._ivf is None else assigning(self._ivf):
                self._index.train(sample)
        except RuntimeError as error:
            raise ValueError(
                f"training on {len(sample)} vectors: expected enough of them, found: {_reason(error)}"
            ) from error

    def add(self, vectors: np.ndarray, first: int) -> None:
        """Adds float32 vectors [n, D] as rows first, first + 1, ...; without inverted lists, rows count from 0 here."""
        if self._ivf is None:
            self._index.add(vectors)
        else:
            self._index.add_with_ids(vectors, np.arange(first, first + len(vectors)))

    def search(self, queries: np.ndarray, depth: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """(approximate scores, rows) [Q, depth], best first; row -1 where fewer than `depth` were reached."""
        parameters = _parameters(self._index, nprobe)
        if self._gpu is not None and max(depth, min(nprobe, self.lists)) <= GPU_LIMIT:
            return self._gpu.search(queries, depth, parameters)
        return self._index.search(queries, depth, params=parameters)

    def use_gpu(self) -> None:
        """Searches on a GPU from now on, where `gpu.copied` can."""
        self._gpu = copied(self._index)

    def merge(self, other: Structure) -> None:
        """Moves the vectors of `other`, trained alike, in here; without inverted lists its rows follow those here."""
        try:
            self._index.merge_from(other._index, 0)
        except RuntimeError as error:
            raise ValueError(f"shards: expected a factory that can be merged, found: {_reason(error)}") from error

    def write(self, path: Path) -> None:
        """Writes the index to `path`; `OSError` naming it on failure."""
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            raise OSError(f"{path}: expected to write the whole index, found: {_reason(error)}") from error

    @classmethod
    def read(cls, path: Path) -> Structure:
        """Reads an index; inverted lists that were merged on disk stay there, beside `path`."""
        try:
            with _printing_to_stderr():
                return cls(faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"{path}: expected a FAISS index, found a damaged file ({_reason(error)})") from error


RERANKS = "re-ranking with the stored vectors is done outside FAISS"


def merge_on_disk(trained: Structure, shards: Sequence[Path], folder: Path) -> None:
    """Puts the inverted lists of `shards` into one file in `folder`, read piecewise; `trained` refers to it then."""
    try:
        with _printing_to_stderr():
            merge_ondisk(trained._index, [str(shard) for shard in shards], str(folder / LISTS_FILE))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"on_disk: expected a factory with plain inverted lists, found: {_reason(error)}") from error


_descriptors = Lock()


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Sends to standard error what FAISS prints about lists on disk: standard output is for answers. While it lasts,
    it does so in all threads.
    """
    with _descriptors:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def set_threads(count: int) -> None:
    """Threads that one search may use when it is called from this thread (OpenMP keeps the number for each thread)."""
    faiss.omp_set_num_threads(count)


def as_vectors(name: str, array: np.ndarray, dim: int | None = None) -> np.ndarray:
    """`array` as contiguous float32 [n, D]; `ValueError` naming it if it has another shape or is not finite."""
    vectors = np.ascontiguousarray(array, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] < 1 or (dim is not None and vectors.shape[1] != dim):
        raise ValueError(f"{name}: expected shape [*, {dim or '*'}], found {list(vectors.shape)}")
    if next(rows_not_finite(vectors), None) is not None:
        raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    return vectors


def as_ids(name: str, array: np.ndarray, count: int) -> np.ndarray:
    """`array` as int64 ids [count]; `ValueError` naming it unless they are integers of 64 bits, each once."""
    found = np.asarray(array)
    if found.shape != (count,) or not np.can_cast(found.dtype, np.int64):
        raise ValueError(f"{name}: expected {count} integers, found {found.dtype} {list(found.shape)}")
    if len(np.unique(found)) != count:
        raise ValueError(f"{name}: expected each id once, found repeated ones")
    return found.astype(np.int64)


def check_k(k: int, images: int) -> None:
    """`ValueError` unless 1 <= k <= images."""
    if not 1 <= k <= images:
        raise ValueError(f"k = {k}: expected 1 to {images}, the number of images in the index")


def _innermost(index: faiss.Index) -> faiss.Index:
    """The index behind transformations of its vectors."""
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _codes(index: faiss.Index) -> faiss.Index:
    """The part of `index` that holds the vectors' codes."""
    inner = _innermost(index)
    return faiss.downcast_index(inner.storage) if isinstance(inner, faiss.IndexHNSW) else inner


def _rotation(index: faiss.Index) -> faiss.OPQMatrix | None:
    """The learned rotation that `index` begins with, if it does."""
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexPreTransform):
        return None
    first = faiss.downcast_VectorTransform(index.chain.at(0))
    return first if isinstance(first, faiss.OPQMatrix) else None


def _encoding_flops(dim: int, parts: int, centroids: int) -> float:
    """Of comparing a vector's `parts` with all `centroids` of each."""
    return centroids * max(2.0 * dim, COMPARISON_COST * parts)


def _graph_flops(graph: faiss.IndexHNSW, visited: int) -> float:
    """Of one search that looks at the neighbours of so many vertices, by the rule in `Structure.adding_flops`."""
    return GRAPH_COST * 2.0 * graph.d * visited * graph.hnsw.nb_neighbors(0)


def _parameters(index: faiss.Index, nprobe: int) -> Any:
    """Search parameters, passed with each search because setting them on the index would affect other threads."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, nprobe)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        nprobe = min(nprobe, index.nlist)
        # a graph over the centroids finds nprobe of them reliably only when it looks at more
        coarse = _parameters(index.quantizer, 2 * nprobe)
        if coarse is None:
            return faiss.SearchParametersIVF(nprobe=nprobe)
        return faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=coarse)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=nprobe)
    return None


def _reason(error: BaseException) -> str:
    return str(error).strip().rpartition("Error: ")[2].splitlines()[-1] if str(error).strip() else type(error).__name__
