"""The studies of the paper's section 4 on the testbed, several seeds each.

    python -m benchmark.sweep                              # everything; a run that is finished is not repeated
    python -m benchmark.sweep --studies losses --seeds 1 --output runs/losses      # a part of it
    python -m benchmark.sweep --reduced                    # smaller rankers and fewer epochs: minutes, not hours
    python -m benchmark.sweep --dry_run                    # which runs there are, which are finished, how long the rest

Trains the best recipe with one thing changed at a time, evaluates on the test queries, and writes <output>/<study>.json
once all runs of the study are finished, and the figures. `--reduced` changes the base of all studies; the JSON says so,
and holds each run's configuration. All flags of training can be given and become the base that the studies vary. Seeds
are the outer loop, so that after a while every study has a first answer in <run_dir>. A killed sweep goes on in the
middle of its run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmark.drawing import save_figure
from benchmark.studies import FIGURES, STUDIES, Problem, Setting, draw
from fastgda.core import (
    ROOT,
    best_device,
    clock,
    command_line,
    command_parser,
    environment,
    require_file,
    save_json,
    sha256_file,
)
from fastgda.dataset import Layout, default_levels, layout, load_images, load_split, normalise, unreadable
from fastgda.evaluation import teacher_reliability
from fastgda.flags import add_flags, device, from_flags
from fastgda.metrics import Retrieval, chance, embedding_retrieval, standard_error
from fastgda.recipes import RECIPES, TrainConfig
from fastgda.trainer import Trainer

REDUCED = replace(RECIPES["best"], hidden_sizes=(384,), out_feat_dim=256, image_block=512, epochs=40, val_every=20)
"""The base of the studies with `--reduced`: a thirtieth of the arithmetic, and five sixths of the best mAP(57)."""
TIMED_STEPS = 3


@dataclass(frozen=True)
class Run:
    """One training of one setting."""

    study: str
    setting: Setting
    ftype: str
    config: TrainConfig
    queries: int

    def __str__(self) -> str:
        series = f" {self.setting.series}" if self.setting.series else ""
        return f"{self.study} {self.setting.x}{series} seed {self.config.seed}"


class Data:
    """Features and rankings of one feature type."""

    def __init__(self, paths: Layout, levels: tuple[int, ...] | None) -> None:
        """Reads all splits; `levels` are the values of L, the testbed's where absent."""
        self.images = load_images(paths)
        self.splits = {name: load_split(paths, name, self.images) for name in ("train", "val", "test")}
        files = [paths.images, *(file for name in self.splits for file in (paths.features(name), paths.ranking(name)))]
        self.inputs = {file.name: sha256_file(require_file(file)) for file in files}
        self.levels = levels or default_levels(paths.mode, len(self.images))

    @cached_property
    def untuned(self) -> Retrieval:
        """How well the feature retrieves as it is."""
        test = self.splits["test"]
        queries, images = (torch.from_numpy(normalise(rows)) for rows in (test.features, self.images))
        judged = test.rankings, self.levels
        return embedding_retrieval(queries, images, *judged, precision_only=True, missing=unreadable(self.images))


def plan(args: argparse.Namespace, problem: Problem) -> list[Run]:
    """All runs, the first seed of every study first."""
    return [
        Run(
            study,
            setting,
            setting.ftype or args.ftype,
            replace(problem.base, seed=problem.base.seed + seed, **setting.changes),
            setting.queries or problem.queries,
        )
        for seed in range(args.seeds)
        for study in args.studies
        for setting in STUDIES[study](problem)
    ]


def folder_of(run: Run, data: Data, root: Path) -> Path:
    """Where a run keeps its state and its result: named by all that it depends on, so studies share equal runs."""
    identity = [asdict(run.config), run.queries, run.ftype, data.inputs, data.levels]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return root / digest[:16]


def result_of(run: Run, data: Data, folder: Path, place: torch.device) -> dict[str, Any]:
    """Trains and evaluates on the test queries, or reads what an earlier call found."""
    file = folder / "result.json"
    if not file.is_file():
        train, test = data.splits["train"].rows(slice(0, run.queries)), data.splits["test"]
        trainer = Trainer(
            run.config, data.images, train, data.splits["val"], levels=data.levels, run_dir=folder, device=place
        )
        began = clock(place)
        ranker = trainer.run()
        seconds = clock(place) - began
        embedded = ranker.embed_queries(test.features), ranker.embed(data.images)
        judged = test.rankings, data.levels
        found = embedding_retrieval(*embedded, *judged, precision_only=True, missing=unreadable(data.images))
        by_level = {"mAP": found.precision.mean(axis=0), "standard_error": standard_error(found.precision)}
        result = {name: _by_level(data.levels, values) for name, values in by_level.items()}
        save_json(file, {**result, "validation": trainer.best, "steps": trainer.step, "seconds": seconds})
        trainer.checkpoint_file.unlink()
    return json.loads(file.read_text())


def estimate(run: Run, data: Data, place: torch.device) -> float:
    """Seconds that a run will take, from the median of a few of its steps and one validation."""
    train = data.splits["train"].rows(slice(0, run.queries))
    with tempfile.TemporaryDirectory() as folder:
        arguments = run.config, data.images, train, data.splits["val"]
        trainer = Trainer(*arguments, levels=data.levels, run_dir=Path(folder), device=place)
        times = [clock(place)]
        for _ in trainer.steps(min(TIMED_STEPS + 1, trainer.total_steps)):
            times.append(clock(place))
        # the first step warms up
        step = sorted(after - before for before, after in pairwise(times))[len(times) // 2 - 1]
        trainer.ranker.embed(data.images)
        validation = clock(place) - times[-1]
    return step * trainer.total_steps + validation * (2 + run.config.epochs // run.config.val_every)


def shape_of(run: Run) -> tuple[Any, ...]:
    """What decides how long a step takes."""
    config = run.config
    blocks = config.query_block, config.image_block, config.random_subset_size > 0, config.subset
    return run.ftype, config.loss, config.sampling, config.out_feat_dim, blocks


def dry_run(runs: list[Run], data_of: Callable[[str], Data], root: Path, place: torch.device) -> None:
    """Lists the runs and how long those that are left will take; a run that several studies share counts once."""
    seen: set[Path] = set()
    steps: dict[tuple[Any, ...], float] = {}
    total = 0.0
    for number, run in enumerate(runs):
        data = data_of(run.ftype)
        folder, state = folder_of(run, data, root), "as before"
        if (folder / "result.json").is_file():
            state = "finished"
        elif folder not in seen:
            if shape_of(run) not in steps:
                steps[shape_of(run)] = estimate(run, data, place)
            seconds = steps[shape_of(run)]
            total, state = total + seconds, f"to do, about {seconds:.0f} s"
        seen.add(folder)
        print(f"{number + 1}/{len(runs)} {run}: {state}")
    print(f"total: about {total / 60:.0f} minutes on {place}; nothing written")


def write_study(
    study: str, runs: list[dict[str, Any]], data: Data, paths: Layout, output: Path, base: dict[str, Any]
) -> None:
    """Writes <output>/<study>.json; `base`: what the runs share."""
    total = len(data.images)
    document = {
        "study": study,
        "queries": data.splits["test"].queries,
        "images": total,
        "levels": list(data.levels),
        "chance": {str(level): chance(level, total) for level in data.levels},
        "reliability": teacher_reliability(paths.ranking("test")),
        "inputs": data.inputs,
        **base,
        "runs": runs,
        "environment": environment(),
    }
    save_json(output / f"{study}.json", document)


def require_more_seeds(studies: list[str], seeds: int, output: Path) -> None:
    """`ValueError` if a study in `output` has more seeds than the run that would replace it."""
    for study in studies:
        file = output / f"{study}.json"
        found = json.loads(file.read_text())["seeds"] if file.is_file() else 0
        if found > seeds:
            raise ValueError(f"{file}: expected --seeds of at least its {found}, or another --output, found {seeds}")


def draw_figures(output: Path) -> None:
    """Draws the figures whose studies are all in `output`."""
    for name, studies in FIGURES.items():
        files = [output / f"{study}.json" for study in studies]
        if all(file.is_file() for file in files):
            save_figure(draw([json.loads(file.read_text()) for file in files]), output / f"{name}.png")


def parser(base: TrainConfig = RECIPES["best"]) -> argparse.ArgumentParser:
    """The command's flags; `base`: the defaults of those of training."""
    found = command_parser("python -m benchmark.sweep", __doc__)
    add = found.add_argument
    add("--studies", nargs="+", choices=sorted(STUDIES), default=list(STUDIES), help="studies to run (default: all)")
    add("--seeds", type=int, default=3, help="runs of every setting (default: 3)")
    add("--ftype", default="effnet+minilm", help="feature type of all studies but `features`")
    add("--ftypes", nargs="+", default=["pixel", "effnet", "minilm", "effnet+minilm"], help="those of `features`")
    add("--data_dir", type=Path, help="folder of the artifacts (default: data/emoji)")
    add("--topk_values", type=int, nargs="+", help="values of L of mAP(L) (default: the testbed's)")
    add("--output", type=Path, default=ROOT / "results/studies", help="folder for JSON and figures")
    add("--run_dir", type=Path, default=ROOT / "runs/studies", help="folder for the state of the runs")
    add("--device", type=device, default=best_device(), help="torch device")
    add("--reduced", action="store_true", help="smaller rankers, trained for fewer epochs, as the base")
    add("--dry_run", action="store_true", help="list the runs and estimate their time")
    add_flags(found, TrainConfig, base)
    return found


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(REDUCED if "--reduced" in argv else RECIPES["best"]).parse_args(argv)

    @cache
    def data_of(ftype: str) -> Data:
        return Data(paths_of(ftype), tuple(args.topk_values) if args.topk_values else None)

    def paths_of(ftype: str) -> Layout:
        return layout("emoji", ftype, args.data_dir)

    train = data_of(args.ftype).splits["train"]
    problem = Problem(from_flags(TrainConfig, args), train.queries, train.rankings.candidates, args.ftypes)
    runs = plan(args, problem)
    if args.dry_run:
        dry_run(runs, data_of, args.run_dir, args.device)
        return
    require_more_seeds(args.studies, args.seeds, args.output)
    changed = {name: value for name, value in asdict(problem.base).items() if value != asdict(RECIPES["best"])[name]}
    shared = {"seeds": args.seeds, "changed_from_the_best_recipe": changed}
    entries: dict[str, list[dict[str, Any]]] = {study: [] for study in args.studies}
    wanted = Counter(run.study for run in runs)
    for number, run in enumerate(runs):
        data = data_of(run.ftype)
        folder = folder_of(run, data, args.run_dir)
        what = f"{number + 1}/{len(runs)} {run}"
        result = result_of(run, data, folder, args.device)
        untuned = _by_level(data.levels, data.untuned.precision.mean(axis=0))
        named = {"x": run.setting.x, "series": run.setting.series, "seed": run.config.seed, "ftype": run.ftype}
        config = {"training_queries": run.queries, "config": asdict(run.config)}
        entries[run.study].append({**named, **result, "untuned": untuned, **config})
        # never less than all runs, so that a sweep under way leaves what an earlier one wrote
        if len(entries[run.study]) == wanted[run.study]:
            write_study(run.study, entries[run.study], data_of(args.ftype), paths_of(args.ftype), args.output, shared)
        print(f"{what}: test mAP(L) " + ", ".join(f"{value:.3f}" for value in result["mAP"].values()))
    draw_figures(args.output)


def _by_level(levels: tuple[int, ...], values: Any) -> dict[str, float]:
    return {str(level): float(value) for level, value in zip(levels, values, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
