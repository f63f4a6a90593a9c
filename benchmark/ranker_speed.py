"""Time that training needs to reach a validation mAP(L), against the plain loop of common research code.

    python -m benchmark.ranker_speed --mode coco --data_dir FOLDER    # FOLDER: written by tests/released_layout.py
    python -m benchmark.ranker_speed                                  # the emoji testbed
    python -m benchmark.ranker_speed --device cpu                     # where there is CUDA, too

All contenders start from the same initial weights where their architecture is the same, and share the machine one after
the other. A contender is validated at fixed training times, doubled from one to the next, and the clock stands still
meanwhile. The plain loop goes first; the mAP(L), averaged over L, that it reached in its time is the target, and each
contender stops at the first validation that reaches it. Its time is that of this validation, so it is never too short.
Also measured: pairs per second, and the share of the time that is spent in matrix products (PyTorch's profiler; on CUDA
the time of their kernels). Every reading of the clock waits for the device.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmark.plain_loop import PlainLoop
from fastgda.core import ROOT, best_device, clock, command_line, command_parser, environment, relative, save_json
from fastgda.dataset import FTYPES, MODES, Split, default_levels, hold_out, layout, load_images, load_split, unreadable
from fastgda.flags import add_flags, device, from_flags
from fastgda.metrics import embedding_retrieval
from fastgda.ranker import Ranker
from fastgda.recipes import RECIPES, TrainConfig
from fastgda.trainer import Trainer

PLAIN = "plain loop"
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::mkldnn_linear")
"""Operations of the profiler whose own time is that of matrix products."""
FOR_EVER = 10**6


@dataclass(frozen=True)
class SpeedConfig:
    """What is compared, on which data, for how long."""

    mode: str = "emoji"
    """Layout and values of L: coco or emoji."""
    ftype: str | None = None
    """Feature type; by default the mode's."""
    data_dir: Path | None = None
    """Folder of the artifacts; by default data/<mode>."""
    topk_values: tuple[int, ...] = ()
    """Values of L; by default the mode's."""
    val_queries: int = 100
    """Training queries held out for validation, where no validation split is stored."""
    plain_seconds: float = 1200.0
    """Training time of the plain loop; what it reaches in it is the target."""
    first_seconds: float = 2.0
    """Training time at the first validation; doubled up to the next."""
    loader_workers: tuple[int, ...] = (0, 2)
    """Numbers of worker processes that the plain loop may use; the fastest of them is timed."""
    contenders: tuple[str, ...] = ("pairs", "blocks", "blocks_bf16", "listwise", "best")
    """What to compare with it, see `contenders_of`."""
    hidden_sizes: tuple[int, ...] = (768, 768, 768)
    """Hidden layers of every contender."""
    out_feat_dim: int = 768
    """Dimension of the embedding of every contender."""
    batch_size: int = 4096
    """Pairs of a step, where pairs are drawn one by one."""
    query_block: int = 64
    """Queries of a step, where blocks are drawn."""
    image_block: int = 1024
    """Images of a step, where blocks are drawn."""
    profiled_steps: int = 3
    """Steps over which the profiler looks."""
    output: Path | None = None
    """JSON file; by default results/speed/ranker_<mode>.json."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"--mode: expected {' or '.join(MODES)}, found {self.mode}")
        unknown = set(self.contenders) - contenders_of(self).keys()
        if unknown:
            raise ValueError(f"--contenders: expected some of {', '.join(contenders_of(self))}, found {unknown.pop()}")
        if not 0 < self.first_seconds <= self.plain_seconds:
            raise ValueError("--first_seconds: expected a positive time of at most --plain_seconds")


def contenders_of(config: SpeedConfig) -> dict[str, TrainConfig]:
    """Configurations by name: `pairs` is the plain loop's training on arrays, each further one differs in one thing."""
    size: dict[str, Any] = {
        "hidden_sizes": config.hidden_sizes,
        "out_feat_dim": config.out_feat_dim,
        "epochs": FOR_EVER,
    }
    size |= {"query_block": config.query_block, "image_block": config.image_block}
    pairs = replace(RECIPES["paper"], batch_size=config.batch_size, **size)
    blocks = replace(pairs, sampling="blocks")
    best = replace(RECIPES["best"], schedule="constant", **size)
    return {
        "pairs": pairs,
        "blocks": blocks,
        "blocks_bf16": replace(blocks, bf16=True),
        "listwise": replace(blocks, loss="listwise", temperature=best.temperature, init_scale=best.init_scale),
        "best": best,
    }


@dataclass
class Curve:
    """One contender's training."""

    seconds: float = 0.0
    pairs: int = 0
    steps: int = 0

    def run(self, steps: Iterator[int], until: float, place: torch.device) -> None:
        """Trains on `place` until the clock shows `until`."""
        start, before = clock(place), self.seconds
        for pairs in steps:
            self.pairs += pairs
            self.steps += 1
            self.seconds = before + clock(place) - start
            if self.seconds >= until:
                return


class Problem:
    """Data, and the validation that all contenders share."""

    def __init__(self, config: SpeedConfig) -> None:
        paths = layout(config.mode, config.ftype or FTYPES[config.mode], config.data_dir)
        self.images = load_images(paths)
        self.missing = unreadable(self.images)
        self.train = load_split(paths, "train", self.images)
        self.validation: Split
        if paths.ranking("val").is_file():
            self.validation = load_split(paths, "val", self.images)
        else:
            self.train, self.validation = hold_out(self.train, config.val_queries)
        self.levels = config.topk_values or default_levels(config.mode, len(self.images))

    def score(self, ranker: Ranker) -> float:
        """Validation mAP(L), averaged over L."""
        embedded = ranker.embed_queries(self.validation.features), ranker.embed(self.images)
        judged = self.validation.rankings, self.levels
        found = embedding_retrieval(*embedded, *judged, precision_only=True, missing=self.missing)
        return float(found.precision.mean())

    def sizes(self) -> dict[str, Any]:
        """What was compared on."""
        images, dim = self.images.shape
        rankings = self.train.rankings
        return {
            "images": images,
            "dimension": dim,
            "training_queries": rankings.queries,
            "candidates": rankings.candidates,
            "validation_queries": self.validation.queries,
            "levels": list(self.levels),
        }


def train_curve(
    problem: Problem, ranker: Ranker, steps: Iterator[int], config: SpeedConfig, target: float | None
) -> dict[str, Any]:
    """Trains to the end of its time, or to the `target`; the points of its curve, and how fast it was."""
    place = ranker.scale.device
    curve, until = Curve(), config.first_seconds
    points = [{"seconds": 0.0, "steps": 0, "pairs": 0, "mAP": problem.score(ranker)}]
    while True:
        curve.run(steps, until, place)
        points.append({**asdict(curve), "mAP": problem.score(ranker)})
        print(f"  {curve.seconds:8.1f} s  {curve.steps:7d} steps  mAP {points[-1]['mAP']:.4f}", flush=True)
        if curve.seconds >= config.plain_seconds or (target is not None and points[-1]["mAP"] >= target):
            break
        until = min(2 * until, config.plain_seconds)
    return {
        "pairs_per_second": curve.pairs / curve.seconds,
        "steps_per_second": curve.steps / curve.seconds,
        "matrix_products": matrix_share(steps, config.profiled_steps, place),
        "curve": points,
    }


def matrix_share(steps: Iterator[int], count: int, place: torch.device) -> dict[str, float]:
    """Share of the time of `count` steps that is spent in matrix products, and the costliest operations.

    An operation's time is its own on the CPU, on CUDA that of the kernels that it starts.
    """
    on_cuda = place.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        start = clock(place)
        for _ in range(count):
            next(steps)
        total = clock(place) - start
    # kernels are also listed by their own names, beside the operations that started them
    operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    spent = {event.key: event.self_device_time_total if on_cuda else event.self_cpu_time_total for event in operations}
    own = {name: microseconds * 1e-6 / total for name, microseconds in spent.items()}
    shares = {"all": sum(own.get(name, 0.0) for name in MATRIX_PRODUCTS)}
    return shares | dict(sorted(own.items(), key=lambda item: -item[1])[:6])


def time_to(target: float, result: dict[str, Any]) -> float | None:
    """Training seconds at the first validation that reaches `target`; `None` if none does.

    The validation before training does not count: some contenders begin with the geometry of the untuned feature.
    """
    return next((point["seconds"] for point in result["curve"][1:] if point["mAP"] >= target), None)


def plain_steps(
    problem: Problem, config: SpeedConfig, place: torch.device
) -> tuple[PlainLoop, Iterator[int], dict[str, float]]:
    """The plain loop with the number of loader processes that is fastest on this machine, and the speeds of all."""
    speeds = {}
    for workers in config.loader_workers:
        loop = PlainLoop(problem.images, problem.train, plain_config(config), workers, place)
        steps, curve = loop.steps(), Curve()
        next(steps)
        curve.run(steps, config.first_seconds, place)
        speeds[str(workers)] = curve.pairs / curve.seconds
    fastest = max(speeds, key=lambda workers: speeds[workers])
    loop = PlainLoop(problem.images, problem.train, plain_config(config), int(fastest), place)
    return loop, loop.steps(), speeds


def plain_config(config: SpeedConfig) -> TrainConfig:
    """The paper's recipe."""
    return contenders_of(config)["pairs"]


def compare(config: SpeedConfig, place: torch.device) -> dict[str, Any]:
    """The report."""
    problem = Problem(config)
    print(PLAIN)
    loop, steps, speeds = plain_steps(problem, config, place)
    results = {PLAIN: train_curve(problem, loop.ranker, steps, config, None) | {"loader_workers": speeds}}
    target = max(point["mAP"] for point in results[PLAIN]["curve"][1:])
    for name in config.contenders:
        print(name)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                contenders_of(config)[name],
                problem.images,
                problem.train,
                problem.validation,
                levels=tuple(problem.levels),
                run_dir=Path(folder),
                device=place,
            )
            steps = (int(np.count_nonzero(step.weight)) for step in trainer.steps(trainer.total_steps))
            results[name] = train_curve(problem, trainer.ranker, steps, config, target)
    plain = time_to(target, results[PLAIN])
    assert plain is not None
    for name, result in results.items():
        seconds = time_to(target, result)
        result["seconds_to_target"] = seconds
        result["times_as_fast"] = plain / seconds if seconds else None
        ratio = result["pairs_per_second"] / results[PLAIN]["pairs_per_second"]
        result["times_as_many_pairs_per_second"] = ratio
        print(f"{name}: target {target:.3f} after {seconds} s, {ratio:.1f} times as many pairs per second")
    return {
        "data": relative(config.data_dir) if config.data_dir else f"data/{config.mode}",
        **problem.sizes(),
        "target_mAP": target,
        "device": str(place),
        "threads": torch.get_num_threads(),
        "config": asdict(config),
        "contenders": results,
        "environment": environment(),
    }


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.ranker_speed", __doc__)
    add_flags(parser, SpeedConfig)
    parser.add_argument("--device", type=device, default=best_device(), help="torch device of all contenders")
    args = parser.parse_args(argv)
    config = from_flags(SpeedConfig, args)
    output = config.output or ROOT / "results/speed" / f"ranker_{config.mode}.json"
    save_json(output, compare(config, args.device))
    print(f"wrote {output}")


if __name__ == "__main__":
    sys.exit(main())
