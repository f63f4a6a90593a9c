"""The demo's small world in a folder, loaded and served, for the tests of page and HTTP API."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from released_layout import FTYPE as RELEASED
from released_layout import ReleasedSize, write_pictures, write_released
from small_world import write_data, write_ranker, write_rankings, write_source

import demo
from abu.sample import SampleConfig
from fastgda.ranker import Ranker, load_ranker
from feature_extraction.extract import main as extract
from serving.guard import Service
from serving.limits import Limits
from serving.page import build_app, launch
from serving.retrained import Removal, Retrained
from serving.world import World

IMAGES, QUERIES, TOP, FTYPE = 36, 4, 6, "pixel+minilm"
RELEASED_SIZE = ReleasedSize(images=40, dim=768, train_queries=3, candidates=20, test_queries=4, hidden=3, width=16)


def write_world(folder: Path) -> Path:
    """Writes everything that the demo reads."""
    write_data(folder, IMAGES, QUERIES)
    write_rankings(folder, IMAGES, QUERIES, ("val", "test"))
    write_ranker(folder / "ranker.pth", 768 + 384)
    write_source(folder / "source")
    retrained().save(folder / "retrained.npz")
    options = ["--ftype", FTYPE, "--splits", "data", "val_query", "--device", "cpu"]
    assert extract(["--data_dir", str(folder), *options]) == 0
    return folder


def retrained() -> Retrained:
    """Pictures of three queries, each of one colour; the second was judged for two methods and two K."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 3), np.uint8)
    pictures = np.broadcast_to(colours[:, None, None], (8, 6, 6, 3))
    rows = [(1, "tuned", 9, 0.02), (1, "tuned", 2, 0.01), (1, "untuned", 2, -0.005), (2, "tuned", 9, 0.03)]
    removals = [Removal(*row, picture) for row, picture in zip(rows, pictures[3:], strict=False)]
    return Retrained(("red heart, noto style", "cat, twemoji style", "<b>dog</b>"), pictures[:3], tuple(removals))


def load(folder: Path, limits: Limits | None = None) -> World:
    """The world in `folder`."""
    source, pictures = folder / "source", folder / "retrained.npz"
    config = demo.DemoConfig(
        folder / "ranker.pth", FTYPE, data_dir=folder, topk=TOP, source_model=source, retrained=pictures
    )
    world = demo.load_world(config, limits)
    assert world.painter is not None
    world.painter.config = SampleConfig(steps=2)
    return world


def write_coco(folder: Path) -> Path:
    """Writes the released layout in small, and in feats/pixel the features of an encoder without weights."""
    write_released(folder, RELEASED_SIZE)
    write_pictures(folder, RELEASED_SIZE)
    common = ["--mode", "coco", "--ftype", "pixel", "--data_dir", str(folder), "--device", "cpu"]
    assert extract([*common, "--splits", "data", "test_query"]) == 0
    return folder


def coco_config(folder: Path) -> demo.DemoConfig:
    """The demo of the released layout in `folder`, with the features of the encoder without weights."""
    return demo.DemoConfig(folder / "weights" / f"{RELEASED}.pth", "pixel", folder, topk=TOP)


def expected_ids(world: World, data: Path, image: Image.Image, prompt: str, tuned: bool) -> list[int]:
    """The slow twin: embed everything, sort all scores."""
    training = np.load(data / "feats" / "pixel+minilm" / "data_feats.npy")
    query = world.encoder.encode([image], [prompt])
    if tuned:
        ranker: Ranker = load_ranker(data / "ranker.pth")
        with torch.no_grad():
            scores = (ranker(torch.from_numpy(training)) @ ranker(torch.from_numpy(query)).T)[:, 0].numpy()
    else:
        scores = (training @ query.T)[:, 0]
    return np.argsort(-scores)[:TOP].tolist()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(world: World) -> Iterator[tuple[str, Service]]:
    """(address without the last slash, service) of a running server."""
    app, service = build_app(world), Service(world.limits, dict)
    url = launch(app, service, "127.0.0.1", free_port())
    try:
        yield url.rstrip("/"), service
    finally:
        app.close(verbose=False)
