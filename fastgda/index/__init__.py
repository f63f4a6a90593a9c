"""Nearest-neighbour index over embeddings: in memory (`FlatIndex`), or on disk and of any size (`Index`)."""

from fastgda.index.backend import FlatIndex, Neighbours
from fastgda.index.plan import recommend
from fastgda.index.segment import SegmentConfig
from fastgda.index.snapshot import Settings
from fastgda.index.source import Embedder, Source, load_embedding
from fastgda.index.store import Index

__all__ = [
    "Embedder",
    "FlatIndex",
    "Index",
    "Neighbours",
    "SegmentConfig",
    "Settings",
    "Source",
    "load_embedding",
    "recommend",
]
