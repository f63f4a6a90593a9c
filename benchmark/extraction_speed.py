"""Images per second of feature extraction against a plain one-by-one loop, and where the time goes.

    python -m benchmark.extraction_speed --ftype effnet --images 512                       # the testbed's pictures
    python -m benchmark.extraction_speed --ftype dino --source data/coco/trainset/annotations/captions_train2017.json

The plain loop opens a picture, encodes it alone and appends the row, as common scripts do, then writes the file. Ours
makes shards (batches, read ahead; on a CPU micro-batches that fit the cache; float32 or bfloat16) and merges them. Both
encode the same pictures with the same weights; runs alternate after a picture each that is not counted. Seconds are
split into waiting for pictures (reading and decoding), preparing them, the network, and writing. Those of "open" are
added up over the threads that read ahead, so in ours they may be more than was waited for.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgda.core import ROOT, command_line, command_parser, environment, save_json, save_npy
from fastgda.flags import add_flags, from_flags
from feature_extraction.encoders import ENCODERS, Encoder, load_encoder, parse_weights
from feature_extraction.extraction import named_device
from feature_extraction.shards import BATCH, Plan
from feature_extraction.sources import Pictures, open_source, open_split

NETWORK_IMAGES = 64
"""Pictures on which the network's share is measured."""


@dataclass(frozen=True)
class ExtractionSpeedConfig:
    """What is extracted, how often."""

    ftype: str = "effnet"
    """Encoder; not a composition."""
    mode: str = "emoji"
    """Dataset whose training images are taken: emoji, emoji-mini or coco."""
    source: Path | None = None
    """Pictures in its place, as of feature_extraction.extract."""
    data_dir: Path | None = None
    """Folder with trainset/; by default data/<mode>."""
    weights: tuple[str, ...] = ()
    """Weights of the encoder: PATH."""
    device: str | None = None
    """torch device; by default CUDA where there is one, else the CPU."""
    images: int = 512
    """Pictures, the first of the dataset."""
    bf16: bool = False
    """Ours in bfloat16, too."""
    repeats: int = 3
    """Timed runs of each side."""
    output: Path = ROOT / "results/speed/extraction.json"
    """JSON file."""

    def __post_init__(self) -> None:
        if self.ftype not in ENCODERS:
            raise ValueError(f"--ftype {self.ftype}: expected one of {', '.join(sorted(ENCODERS))}")
        if min(self.images, self.repeats) < 1:
            raise ValueError("--images, --repeats: expected at least 1")


@dataclass
class First:
    """The first pictures of a source; the time spent opening them is added up."""

    pictures: Pictures
    count: int
    seconds: float = 0.0
    adding: Lock = field(default_factory=Lock)

    @property
    def path(self) -> Path:
        """Of the source."""
        return self.pictures.path

    @property
    def keys(self) -> Sequence[str]:
        """Of the pictures."""
        return self.pictures.keys[: self.count]

    @property
    def captions(self) -> Sequence[list[str]]:
        """Of the pictures."""
        return self.pictures.captions[: self.count]

    @property
    def fingerprint(self) -> str:
        """Of the source."""
        return f"{self.pictures.fingerprint}, first {self.count}"

    def __len__(self) -> int:
        return self.count

    def image(self, row: int) -> Image.Image:
        """A decoded picture."""
        start = time.perf_counter()
        try:
            return self.pictures.image(row)
        finally:
            with self.adding:
                self.seconds += time.perf_counter() - start

    def caption(self, row: int) -> str:
        """The first caption."""
        return self.pictures.caption(row)


def plain_loop(encoder: Encoder, table: First, folder: Path) -> float:
    """One picture after the other; returns the seconds of writing."""
    rows = []
    for row in range(len(table)):
        images = [table.image(row)] if encoder.reads_images else []
        rows.append(encoder.encode(images, [table.caption(row) if encoder.reads_captions else ""])[0])
    start = now()
    save_npy(folder / "plain.npy", np.stack(rows))
    return now() - start


@dataclass(frozen=True)
class TimedPlan(Plan):
    """A plan that keeps the seconds of each writing of a shard."""

    writing: list[float] = field(default_factory=list)

    def store(self, start: int, features: np.ndarray, skipped: list[dict[str, Any]]) -> None:
        """As any plan."""
        began = now()
        super().store(start, features, skipped)
        self.writing.append(now() - began)


def shards(encoder: Encoder, table: First, folder: Path) -> float:
    """As `feature_extraction.extract` does; returns the seconds of writing."""
    plan = TimedPlan.make(folder, "data", table, encoder.dim, 512, 0.0, [encoder.name])
    assert isinstance(plan, TimedPlan)
    plan.extract(encoder, plan.share(), encoder.name)
    start = now()
    plan.merge(folder, "data")
    return now() - start + sum(plan.writing)


def timed(run: Callable[[Encoder, First, Path], float], encoder: Encoder, table: First) -> dict[str, float]:
    """Seconds of one run: all, encoding, writing, the rest, which is waiting for pictures, and opening them."""
    clock = Clock(encoder)
    table.seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        start = now()
        write = run(clock, table, Path(folder))
        total = now() - start
    wait = total - clock.seconds - write
    return {"total": total, "encode": clock.seconds, "write": write, "wait": wait, "open": table.seconds}


def now() -> float:
    """The time in seconds, after what was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """An encoder whose time is added up."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.name, self.dim, self.network = encoder, encoder.name, encoder.dim, encoder.network
        self.reads_images, self.reads_captions = encoder.reads_images, encoder.reads_captions
        self.seconds = 0.0

    def encode(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        """As the encoder."""
        start = now()
        try:
            return self.encoder.encode(images, captions)
        finally:
            self.seconds += now() - start


def network_share(encoder: Encoder, table: Pictures, batch: int) -> float | None:
    """Share of encoding `batch` at a time that is the network, the rest is preparing; `None` without a network.

    Encoders call the network as a whole or its parts one by one: time counts while any of them runs.
    """
    if encoder.network is None:
        return None
    spent, entered = 0.0, []

    def enter(*_: Any) -> None:
        entered.append(now())

    def leave(*_: Any) -> None:
        nonlocal spent
        start = entered.pop()
        spent += 0 if entered else now() - start

    hooks = []
    for part in (encoder.network, *encoder.network.children()):
        hooks += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    rows, clock = range(min(NETWORK_IMAGES, len(table))), Clock(encoder)
    for some in (rows[start : start + batch] for start in range(0, len(rows), batch)):
        images = [table.image(row) for row in some] if encoder.reads_images else []
        clock.encode(images, [table.caption(row) if encoder.reads_captions else "" for row in some])
    for hook in hooks:
        hook.remove()
    return spent / clock.seconds


def compare(config: ExtractionSpeedConfig) -> dict[str, Any]:
    """The report."""
    pictures = (
        open_source(config.source)
        if config.source
        else open_split(config.mode, config.data_dir or ROOT / "data" / config.mode, "data")
    )
    table = First(pictures, min(config.images, len(pictures)))
    weights, device = parse_weights(config.ftype, config.weights), named_device(config.device)
    encoders = {"float32": load_encoder(config.ftype, device, weights)}
    if config.bf16:
        encoders["bfloat16"] = load_encoder(config.ftype, device, weights, precision="bfloat16")
    sides = {"plain loop": (plain_loop, encoders["float32"])}
    sides |= {f"shards, {name}": (shards, encoder) for name, encoder in encoders.items()}
    for run, encoder in sides.values():
        timed(run, encoder, First(pictures, 1))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(config.repeats):
        for name, (run, encoder) in sides.items():
            runs[name].append(timed(run, encoder, table))
    network = {
        name: network_share(encoder, table, 1 if run is plain_loop else BATCH) for name, (run, encoder) in sides.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        seconds = {part: statistics.median(one[part] for one in found) for part in found[0]}
        if (share := network[name]) is not None:
            seconds["network"] = share * seconds["encode"]
            seconds["prepare"] = seconds["encode"] - seconds["network"]
        rows[name] = {"images_per_second": len(table) / seconds["total"], "seconds": seconds}
    plain = rows["plain loop"]["images_per_second"]
    for row in rows.values():
        row["times_as_fast"] = row["images_per_second"] / plain
    return {"images": len(table), "device": str(device), "threads": torch.get_num_threads(), "rows": rows}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.extraction_speed", __doc__)
    add_flags(parser, ExtractionSpeedConfig)
    config = from_flags(ExtractionSpeedConfig, parser.parse_args(argv))
    found = compare(config)
    for name, row in found["rows"].items():
        print(f"{name}: {row['images_per_second']:.1f} images/s, {row['times_as_fast']:.2f} times the plain loop")
    save_json(config.output, {"config": asdict(config), **found, "environment": environment()})
    print(f"wrote {config.output}")


if __name__ == "__main__":
    sys.exit(main())
