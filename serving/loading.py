"""What the demo is told, and loading of what it shows: a data folder with a ranker, or a bundle."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fastgda.attributor import FeatureAttributor, Untuned, all_scores
from fastgda.core import (
    ROOT,
    load_npy,
    manifest_path,
    read_manifest,
    sha256_file,
)
from fastgda.credit import Credit, credit_path
from fastgda.dataset import FTYPES, RANK, Layout, default_levels, layout, load_split
from fastgda.ranker import Ranker, load_ranker
from fastgda.rankings import Rankings, load_rankings
from feature_extraction.encoders import Encoder, Join, identity, load_encoder, parse_weights
from feature_extraction.readers import split_path
from feature_extraction.sources import Pictures, open_split
from serving.answer import method
from serving.attributor import Attributor
from serving.bundle import weights_for
from serving.collection import Collection, Fixed, Live, NoPictures
from serving.limits import Limits, Turn, Workers
from serving.painter import Painter
from serving.retrained import Retrained
from serving.world import World, typical_distance

RANKER, DATA = ROOT / "weights" / "emoji_effnet+minilm.pth", ROOT / "data" / "emoji"
"""The testbed's ranker and its data."""
SOURCE = ROOT / "weights" / "emoji_ldm"
"""The testbed's source model."""
RETRAINED = ROOT / "results" / "removal" / "pictures.npz"
"""Pictures of the testbed's models trained again."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demo shows and where it listens."""

    checkpoint: Path | None = None
    """The ranker, by default weights/emoji_effnet+minilm.pth."""
    ftype: str | None = None
    """Feature that the ranker was trained on; by default effnet+minilm, for COCO dino+clip_text."""
    data_dir: Path | None = None
    """Folder with trainset/, query_test/ and influence_test: the testbed's, or the released COCO data. By default
    data/emoji; with --bundle, none."""
    feature_dir: Path | None = None
    """Folder of the training features, or the folder above it; by default <data_dir>/feats/<ftype>."""
    weights: tuple[str, ...] = ()
    """Weights of the encoder that replace the packaged ones and the hub's: PATH, or NAME=PATH for each part."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7860
    """Port to listen on."""
    topk: int = 12
    """Training images shown in each gallery."""
    source_model: Path | None = None
    """Source model to generate pictures with, by default weights/emoji_ldm for the testbed; without one the demo shows
    stored and uploaded pictures only."""

    retrained: Path | None = None
    """Pictures of models trained without a query's most influential images, by default results/removal/pictures.npz
    for the testbed; without them the page has no such part."""

    bundle: Path | None = None
    """Bundle to answer from, which brings its own ranker and encoders."""

    def __post_init__(self) -> None:
        if self.bundle is not None and (self.checkpoint is not None or self.ftype is not None):
            raise ValueError("--bundle: expected no --checkpoint and no --ftype, the bundle brings its own; found one")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: expected 1 to 65535")
        if self.topk < 1:
            raise ValueError(f"--topk {self.topk}: expected at least 1")

    @property
    def ranker(self) -> Path:
        """The file of the ranker, where there is no bundle."""
        return self.checkpoint or RANKER

    @property
    def data(self) -> Path | None:
        """The data folder, if any."""
        return self.data_dir or (DATA if self.bundle is None else None)

    @property
    def mode(self) -> str | None:
        """Which layout the data folder has."""
        if self.data is None:
            return None
        return "coco" if (self.data / "query_test" / "captions.txt").is_file() else "emoji"


@dataclass(frozen=True)
class Stored:
    """A data folder, loaded and checked; empty where there is none."""

    images: Pictures = field(default_factory=NoPictures)
    queries: Pictures = field(default_factory=NoPictures)
    features: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    teacher: Rankings = field(default_factory=lambda: Rankings(np.empty((0, 0), np.int64)))
    paths: Layout | None = None

    @classmethod
    def load(cls, config: DemoConfig, ftype: str, encoder: dict[str, Any]) -> Stored:
        """Reads the folder of `config`, whose features must be those of `encoder`."""
        mode, data = config.mode, config.data
        if mode is None or data is None:
            return cls()
        images, queries = (open_split(mode, data, split) for split in ("data", "test_query"))
        folder = config.feature_dir or data / "feats"
        if (folder / ftype).is_dir():
            folder = folder / ftype
        paths = layout(mode, ftype, data, folder)
        features = load_npy(paths.images, (len(images), None), finite=True, mmap=True, made_by=paths.extract)
        # the released features came without a manifest
        has_manifest = mode == "emoji" or manifest_path(folder).is_file()
        if has_manifest and read_manifest(folder)["config"] != encoder:
            raise ValueError(f"{folder}: expected features of this {ftype}, found others; redo: {paths.extract}")
        teacher = load_rankings(paths.ranking("test"), len(images), made_by=RANK[mode])
        if teacher.queries != len(queries):
            raise ValueError(f"{paths.ranking('test')}: expected {len(queries)} queries, found {teacher.queries}")
        return cls(images, queries, features, teacher, paths)


def load_world(config: DemoConfig, limits: Limits | None = None) -> World:
    """Loads the artifacts; `ValueError` naming the first one that is missing, damaged or of another run."""
    limits = limits or Limits()
    return (load_data if config.bundle is None else load_bundle)(config, limits)


def load_data(config: DemoConfig, limits: Limits) -> World:
    """A data folder and a ranker."""
    mode = config.mode
    assert mode is not None
    ftype = config.ftype or FTYPES[mode]
    weights = parse_weights(ftype, config.weights)
    join: Join = "raw" if mode == "coco" else "normalised"
    encoder = identity(ftype, weights, join)
    stored = Stored.load(config, ftype, encoder)
    ranker = load_ranker(config.ranker, in_dim=stored.features.shape[1])
    known = load_known(config, stored.images)
    creators = [entry.get("creator") for entry in known]
    assert stored.paths is not None
    credit = load_credit(config.ranker, ranker, stored.paths, stored.features, creators)
    how = method(encoder, sha256_file(config.ranker), len(known), credit)
    tuned = FeatureAttributor.build(stored.features, ranker)
    query_encoder = load_encoder(ftype, weights=weights, query=True, join=join)
    return build_world(config, limits, stored, Fixed(stored.images, known), query_encoder, tuned, how, credit)


def load_bundle(config: DemoConfig, limits: Limits) -> World:
    """A bundle, and the data folder that it was built from where one is named."""
    assert config.bundle is not None
    attributor = Attributor.from_pretrained(config.bundle, weights=weights_for(config.bundle, config.weights))
    bundle = attributor.bundle
    stored = Stored.load(config, bundle.ftype, bundle.encoder)
    if stored.paths is not None:
        wanted = read_manifest(config.bundle)["inputs"].get(stored.paths.images.name)
        if (found := sha256_file(stored.paths.images)) != wanted:
            raise ValueError(
                f"{stored.paths.images}: expected the features that {config.bundle} was built from, SHA-256 {wanted}, "
                f"found {found}"
            )
    how = method(bundle.encoder, bundle.ranker_id, len(bundle.index), bundle.credit)
    parts = Live(bundle.index), attributor.encoder, attributor.retrieval, how, bundle.credit
    return build_world(config, limits, stored, *parts)


def build_world(
    config: DemoConfig,
    limits: Limits,
    stored: Stored,
    collection: Collection,
    encoder: Encoder,
    tuned: FeatureAttributor,
    how: dict[str, Any],
    credit: Credit | None,
) -> World:
    """What both have in common."""
    features, images = stored.features, len(stored.images)
    untuned = FeatureAttributor.build(features, Untuned()) if images else None
    return World(
        images=stored.images,
        features=features,
        collection=collection,
        queries=stored.queries,
        teacher=stored.teacher,
        encoder=encoder,
        tuned=tuned,
        untuned=untuned,
        topk=min(config.topk, len(collection)),
        level=0 if config.mode is None else min(default_levels(config.mode, images)[0], images),
        how=how,
        credit=credit,
        painter=load_painter(config, limits),
        retrained=load_retrained(config),
        limits=limits,
        typical_distance=0.0 if untuned is None else typical_distance(untuned, features),
        encoding=Turn(limits.timeout_s),
        working=Workers(limits.timeout_s),
    )


def load_known(config: DemoConfig, images: Pictures) -> list[dict[str, Any]]:
    """Creator and licence of each training image, as far as its Parquet file has them; of COCO's, its number there."""
    if config.mode == "coco":
        return [{"key": key} for key in images.keys]
    assert config.data is not None
    path = split_path(config.data, "data")
    names = [name for name in ("creator", "licence") if name in pq.read_schema(path).names]
    return [
        {name: row[name] for name in names}
        for row in pq.read_table(path, columns=["id", *names]).sort_by("id").to_pylist()
    ]


def load_painter(config: DemoConfig, limits: Limits) -> Painter | None:
    """What generates pictures; `None` without a source model. The testbed's draws emoji, so it is not COCO's."""
    folder = config.source_model or (SOURCE if config.mode == "emoji" else None)
    return Painter(folder, seconds=limits.timeout_s) if folder is not None and folder.is_dir() else None


def load_retrained(config: DemoConfig) -> Retrained | None:
    """Pictures of models trained again: those asked for, else the testbed's own where they are."""
    if config.retrained is None and (config.mode != "emoji" or not RETRAINED.is_file()):
        return None
    return Retrained.load(config.retrained or RETRAINED)


def load_credit(
    checkpoint: Path, ranker: Ranker, paths: Layout, features: np.ndarray, creators: list[str | None]
) -> Credit | None:
    """The credit rule kept beside the checkpoint, else one fitted now; `None` without scores to fit it on."""
    kept, sha = credit_path(checkpoint), sha256_file(checkpoint)
    if kept.is_file():
        return Credit.load(kept, ranker=sha)
    if not (paths.features("val").is_file() and paths.ranking("val").is_file()):
        return None
    val = load_split(paths, "val", features)
    if val.rankings.score is None:
        return None
    words = f"{val.queries} validation queries"
    scores = all_scores(ranker, val.features, features)
    return Credit.fit(scores, val.rankings, creators, ranker=sha, fitted_on=words)
