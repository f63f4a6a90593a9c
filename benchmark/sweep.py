"""The studies of the paper's section 4 on the testbed, several seeds each.

    python -m benchmark.sweep                              # everything; a run that is finished is not repeated
    python -m benchmark.sweep --studies losses --seeds 1   # a part of it
    python -m benchmark.sweep --dry_run                    # which runs there are, and which are finished

Trains the best recipe with one thing changed at a time, evaluates on the test queries, and writes <output>/<study>.json
and the figures. Seeds are the outer loop, so that after a while every study has a first answer. All flags of training
can be given and become the base that the studies vary. A killed sweep goes on in the middle of its run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from benchmark.figures import save_figure
from benchmark.studies import FIGURES, STUDIES, Problem, Setting, draw
from fastgda.core import ROOT, best_device, command_line, environment, require_file, save_json, sha256_file
from fastgda.dataset import Layout, default_levels, layout, load_images, load_split, normalise
from fastgda.evaluation import teacher_reliability
from fastgda.flags import add_flags, device, from_flags
from fastgda.metrics import Retrieval, chance, embedding_retrieval, standard_error
from fastgda.recipes import RECIPES, TrainConfig
from fastgda.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """One training of one setting."""

    study: str
    setting: Setting
    ftype: str
    config: TrainConfig
    queries: int


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
        return embedding_retrieval(queries, images, test.rankings, self.levels, precision_only=True)


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
        ranker = trainer.run()
        embedded = ranker.embed_queries(test.features), ranker.embed(data.images)
        found = embedding_retrieval(*embedded, test.rankings, data.levels, precision_only=True)
        by_level = {"mAP": found.precision.mean(axis=0), "standard_error": standard_error(found.precision)}
        result = {name: _by_level(data.levels, values) for name, values in by_level.items()}
        save_json(file, {**result, "validation": trainer.best, "steps": trainer.step})
        trainer.checkpoint_file.unlink()
    return json.loads(file.read_text())


def write_study(study: str, runs: list[dict[str, Any]], data: Data, paths: Layout, output: Path) -> None:
    """Writes <output>/<study>.json."""
    total = len(data.images)
    document = {
        "study": study,
        "queries": data.splits["test"].queries,
        "images": total,
        "levels": list(data.levels),
        "chance": {str(level): chance(level, total) for level in data.levels},
        "reliability": teacher_reliability(paths.ranking("test")),
        "inputs": data.inputs,
        "runs": runs,
        "environment": environment(),
    }
    save_json(output / f"{study}.json", document)


def draw_figures(output: Path) -> None:
    """Draws the figures whose studies are all in `output`."""
    for name, studies in FIGURES.items():
        files = [output / f"{study}.json" for study in studies]
        if all(file.is_file() for file in files):
            save_figure(draw([json.loads(file.read_text()) for file in files]), output / f"{name}.png")


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    found = argparse.ArgumentParser(prog="python -m benchmark.sweep", description=__doc__.splitlines()[0])
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
    add("--dry_run", action="store_true", help="list the runs")
    add_flags(found, TrainConfig, RECIPES["best"])
    return found


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)

    @cache
    def data_of(ftype: str) -> Data:
        return Data(paths_of(ftype), tuple(args.topk_values) if args.topk_values else None)

    def paths_of(ftype: str) -> Layout:
        return layout("emoji", ftype, args.data_dir)

    train = data_of(args.ftype).splits["train"]
    problem = Problem(from_flags(TrainConfig, args), train.queries, train.rankings.candidates, args.ftypes)
    runs = plan(args, problem)
    entries: dict[str, list[dict[str, Any]]] = {study: [] for study in args.studies}
    for number, run in enumerate(runs):
        data = data_of(run.ftype)
        folder = folder_of(run, data, args.run_dir)
        what = f"{number + 1}/{len(runs)} {run.study} {run.setting.x} {run.setting.series} seed {run.config.seed}"
        if args.dry_run:
            print(f"{what}: {'finished' if (folder / 'result.json').is_file() else 'to do'}")
            continue
        result = result_of(run, data, folder, args.device)
        untuned = _by_level(data.levels, data.untuned.precision.mean(axis=0))
        named = {"x": run.setting.x, "series": run.setting.series, "seed": run.config.seed, "ftype": run.ftype}
        config = {"training_queries": run.queries, "config": asdict(run.config)}
        entries[run.study].append({**named, **result, "untuned": untuned, **config})
        write_study(run.study, entries[run.study], data_of(args.ftype), paths_of(args.ftype), args.output)
        print(f"{what}: test mAP(L) " + ", ".join(f"{value:.3f}" for value in result["mAP"].values()))
    if not args.dry_run:
        draw_figures(args.output)


def _by_level(levels: tuple[int, ...], values: Any) -> dict[str, float]:
    return {str(level): float(value) for level, value in zip(levels, values, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
