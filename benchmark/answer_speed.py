"""How long an answer takes, part by part: encode, embed, search, metadata; for one caller, for several, in batches.

    python -m serving.bundle build runs/bundle --features data/emoji/feats/effnet+minilm \\
        --checkpoint weights/emoji_effnet+minilm.pth --metadata data/emoji/trainset/emoji.parquet
    python -m benchmark.answer_speed runs/bundle --data_dir data/emoji

The pictures are the generated test queries, as PNG bytes; the attributor is warm. Each way of asking goes on for
`--seconds`. A part's time is what `Attributor.attribute` reports (in a batch an equal share of it), so with several
callers it holds the waiting for the encoder, which one thread uses at a time. Writes results/latency/answer.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark.service_tables import median_p99
from fastgda.attributor import Timings
from fastgda.core import ROOT, command_line, command_parser, environment, save_json
from fastgda.flags import add_flags, device, from_flags
from feature_extraction.readers import read_split
from serving.attributor import Attributor, Picture
from serving.bundle import weights_for

Ask = Callable[[int], Sequence[Timings]]
"""Answers request `number` and says what took how long, picture by picture."""


@dataclass(frozen=True)
class AnswerSpeedConfig:
    """What is asked."""

    data_dir: Path = ROOT / "data" / "emoji"
    """Folder with the generated test queries."""
    k: int = 100
    """Training images wanted."""
    callers: int = 4
    """Threads that ask at once, in the second measurement."""
    batch: int = 32
    """Pictures of one call, in the third."""
    seconds: float = 10.0
    """How long each goes on."""
    output: Path = ROOT / "results" / "latency" / "answer.json"
    """The report."""

    def __post_init__(self) -> None:
        if min(self.k, self.callers, self.batch, self.seconds) <= 0:
            raise ValueError("k, callers, batch, seconds: expected positive numbers")


def measure(ask: Ask, seconds: float, callers: int = 1) -> dict[str, Any]:
    """Milliseconds of each part (median and 99th percentile) and pictures a second, of requests made for `seconds`."""
    ask(0)
    found: list[Sequence[Timings]] = []

    def go_on(caller: int) -> None:
        number = caller
        while time.perf_counter() - began < seconds:
            found.append(ask(number))
            number += callers

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(go_on, range(callers)))
    elapsed = time.perf_counter() - began
    timings = [one for answer in found for one in answer]
    parts = {name: [getattr(one, name) for one in timings] for name in (*asdict(timings[0]), "total")}
    rows = {
        name: dict(zip(("median_ms", "p99_ms"), (1e3 * np.percentile(values, (50, 99))).tolist(), strict=True))
        for name, values in parts.items()
    }
    return {"pictures": len(timings), "per_second": len(timings) / elapsed, "parts": rows}


def run(attributor: Attributor, config: AnswerSpeedConfig) -> dict[str, Any]:
    """All three measurements."""
    table = read_split(config.data_dir, "test_query")
    images: list[Picture] = list(table.encoded)
    prompts = [table.caption(row) for row in range(len(table))]

    def several(number: int, count: int) -> list[Timings]:
        rows = np.arange(number * count, (number + 1) * count) % len(images)
        some = [images[row] for row in rows], [prompts[row] for row in rows]
        return [found.timings for found in attributor.attribute_batch(*some, config.k)]

    return {
        "one caller": measure(lambda number: several(number, 1), config.seconds),
        f"{config.callers} callers": measure(lambda number: several(number, 1), config.seconds, config.callers),
        f"batches of {config.batch}": measure(lambda number: several(number, config.batch), config.seconds),
    }


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.answer_speed", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--weights", nargs="*", default=[], help="NAME=PATH of encoder weights that are not the usual")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="torch device (default: cpu)")
    add_flags(parser, AnswerSpeedConfig)
    args = parser.parse_args(argv)
    config = from_flags(AnswerSpeedConfig, args)
    attributor = Attributor.from_pretrained(
        args.bundle, weights=weights_for(args.bundle, args.weights), device=args.device
    )
    ways = run(attributor, config)
    for way, found in ways.items():
        medians = [f"{name} {median_p99(row)}" for name, row in found["parts"].items()]
        print(f"{way:<16} {found['per_second']:6.1f} pictures/s; ms, median (p99): {'  '.join(medians)}")
    index = attributor.bundle.index
    report = {
        "images": len(index),
        "dim": index.dim,
        "factory": index.snapshot().largest.config.factory,
        "k": config.k,
        "encoder": attributor.bundle.ftype,
        "ways": ways,
        "environment": environment(),
    }
    save_json(config.output, report)


if __name__ == "__main__":
    sys.exit(main())
