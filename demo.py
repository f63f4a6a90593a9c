"""Browser demo: which training images made this picture?

    python demo.py --checkpoint weights/emoji_effnet+minilm.pth --data_dir data/emoji --port 7860
    python demo.py --checkpoint weights/dino+clip_text.pth --data_dir data/coco    # released data

Pick a stored test query, generate an emoji, or upload a picture and type its prompt. Shown are the training images that
the tuned ranker finds most influential, shares by creator, the neighbours under the untuned features, for stored
queries the teacher's own top images, and the time taken. The released data names no creators and the demo has no model
that draws such pictures, so there the page lacks shares and generation. The same goes by HTTP: see serving/page.py. The
server listens on 127.0.0.1 and asks nothing of the internet; its log goes to standard error, one JSON object a line.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fastgda.attributor import FeatureAttributor, Untuned, all_scores
from fastgda.core import (
    ROOT,
    command_line,
    command_parser,
    load_npy,
    manifest_path,
    read_manifest,
    relative,
    sha256_file,
)
from fastgda.credit import Credit, credit_path
from fastgda.dataset import FTYPES, RANK, Layout, default_levels, layout, load_split
from fastgda.flags import add_flags, from_flags
from fastgda.ranker import Ranker, load_ranker
from fastgda.rankings import load_rankings
from feature_extraction.encoders import Join, identity, load_encoder, parse_weights
from feature_extraction.readers import split_path
from feature_extraction.sources import Pictures, open_split
from serving.answer import method
from serving.guard import LOG, Service
from serving.limits import Limits, Turn
from serving.page import build_app, finish, launch, signals
from serving.painter import Painter
from serving.retrained import Retrained
from serving.world import World, typical_distance

SOURCE = ROOT / "weights" / "emoji_ldm"
"""The testbed's source model."""
RETRAINED = ROOT / "results" / "removal" / "pictures.npz"
"""Pictures of the testbed's models trained again."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demo shows and where it listens."""

    checkpoint: Path = ROOT / "weights" / "emoji_effnet+minilm.pth"
    """The ranker."""
    ftype: str | None = None
    """Feature that the ranker was trained on; by default effnet+minilm, for COCO dino+clip_text."""
    data_dir: Path = ROOT / "data" / "emoji"
    """Folder with trainset/, query_test/ and influence_test: the testbed's, or the released COCO data."""
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

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: expected 1 to 65535")
        if self.topk < 1:
            raise ValueError(f"--topk {self.topk}: expected at least 1")

    @property
    def mode(self) -> str:
        """Which layout the data folder has."""
        return "coco" if (self.data_dir / "query_test" / "captions.txt").is_file() else "emoji"


def load_world(config: DemoConfig, limits: Limits | None = None) -> World:
    """Loads the artifacts; `ValueError` naming the first one that is missing, damaged or of another run."""
    limits = limits or Limits()
    mode, ftype = config.mode, config.ftype or FTYPES[config.mode]
    images, queries = (open_split(mode, config.data_dir, split) for split in ("data", "test_query"))
    folder = config.feature_dir or config.data_dir / "feats"
    if (folder / ftype).is_dir():
        folder = folder / ftype
    paths = layout(mode, ftype, config.data_dir, folder)
    features = load_npy(paths.images, (len(images), None), finite=True, mmap=True, made_by=paths.extract)
    weights = parse_weights(ftype, config.weights)
    join: Join = "raw" if mode == "coco" else "normalised"
    encoder_identity = identity(ftype, weights, join)
    # the released features came without a manifest
    has_manifest = mode == "emoji" or manifest_path(folder).is_file()
    if has_manifest and read_manifest(folder)["config"] != encoder_identity:
        raise ValueError(f"{folder}: expected features of this {ftype}, found others; redo: {paths.extract}")
    ranker = load_ranker(config.checkpoint, in_dim=features.shape[1])
    teacher = load_rankings(paths.ranking("test"), len(images), made_by=RANK[mode])
    if teacher.queries != len(queries):
        raise ValueError(f"{paths.ranking('test')}: expected {len(queries)} queries, found {teacher.queries}")
    known = load_known(config, images)
    credit = load_credit(config.checkpoint, ranker, paths, features, [entry.get("creator") for entry in known])
    untuned = FeatureAttributor.build(features, Untuned())
    return World(
        images=images,
        features=features,
        known=known,
        queries=queries,
        teacher=teacher,
        encoder=load_encoder(ftype, weights=weights, query=True, join=join),
        tuned=FeatureAttributor.build(features, ranker),
        untuned=untuned,
        topk=min(config.topk, len(images)),
        level=min(default_levels(mode, len(images))[0], len(images)),
        how=method(encoder_identity, sha256_file(config.checkpoint), len(images), credit),
        credit=credit,
        painter=load_painter(config, limits),
        retrained=load_retrained(config),
        limits=limits,
        typical_distance=typical_distance(untuned, features),
        encoding=Turn(limits.timeout_s),
    )


def load_known(config: DemoConfig, images: Pictures) -> list[dict[str, Any]]:
    """Creator and licence of each training image, as far as its Parquet file has them; of COCO's, its number there."""
    if config.mode == "coco":
        return [{"key": key} for key in images.keys]
    path = split_path(config.data_dir, "data")
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


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python demo.py", __doc__)
    for cls in (DemoConfig, Limits):
        add_flags(parser, cls)
    args = parser.parse_args(argv)
    config, limits = from_flags(DemoConfig, args), from_flags(Limits, args)
    world = load_world(config, limits)
    handler = logging.StreamHandler()
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    app = build_app(world)
    service = Service(limits, {"training_images": len(world.images), "ranker": world.how["ranker"]})
    with signals() as stop:
        url = launch(app, service, config.host, config.port)
        print(f"{relative(config.checkpoint)}: serving on {url} (Ctrl-C stops)", flush=True)
        stop.wait()
        finish(app, service)
    LOG.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
