"""Merges the loss changes after a finite unlearning step into the rankings that the project ships.

    python -m abu.collect queries
    python -m abu.collect steps --passes 4 --query_bits 16
    python -m benchmark.finite_step         # writes data/emoji/influence_{train,val,test}.npz

The score is τ at step α, the sum of both terms (`abu.second_order`). Its reliability is measured as that of the first
order is (`benchmark.teacher`): two runs with independent noise on both sides, mAP(L) of one against the top L of the
other, for both terms and for each alone; results/teacher/reliability.json.
"""

from __future__ import annotations

import sys

import numpy as np

from abu.plan import Collection
from abu.second_order import loss_change_at
from abu.stages import gradient_inputs, started_passes, step_plan, steps_folder
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from abu.unlearn import STEP
from benchmark.teacher import measure, rankings_of
from fastgda.core import (
    command_line,
    command_parser,
    environment,
    load_npz,
    manifest_path,
    read_manifest,
    require_file,
    save_json,
    write_manifest,
)
from fastgda.dataset import default_levels
from fastgda.metrics import chance
from fastgda.rankings import save_rankings

COMMAND = "python -m benchmark.finite_step"


def whole_step_passes(testbed: Testbed) -> int:
    """How many passes, counted from the first, have all their pieces; `ValueError` if there is none."""
    collection = Collection(steps_folder(testbed))
    begun = started_passes(collection.folder, "step")
    whole = [index for index in begun if not collection.missing(step_plan(testbed, range(index, index + 1)))]
    if whole != list(range(len(whole))) or not whole:
        raise ValueError(
            f"{collection.folder}: expected whole passes from the first on, found {begun} begun and {whole} whole; "
            "collect them with: python -m abu.collect steps"
        )
    return len(whole)


def load_terms(testbed: Testbed, passes: int, key: str) -> np.ndarray:
    """One array of the terms, joined along the training images (last axis), the mean over passes."""
    folder, total = Collection(steps_folder(testbed)), np.zeros(())
    for index in range(passes):
        plan = step_plan(testbed, range(index, index + 1))
        total = total + np.concatenate(
            [load_npz(folder.path(p), (key,), "python -m abu.collect steps")[key] for p in plan], axis=-1
        )
    return (total / passes).astype(np.float32)


def require_own_steps(testbed: Testbed) -> None:
    """`ValueError` naming the file unless the collected terms were made from the model, images and queries of now."""
    folder = steps_folder(testbed)
    require_file(manifest_path(folder), f"python -m abu.collect steps --mode {testbed.name}")
    made_from = read_manifest(folder)["inputs"]
    for name, value in gradient_inputs(testbed).items():
        if made_from.get(name) != value:
            raise ValueError(
                f"{folder}: expected terms of this model and these examples, found those of another {name}"
            )


def load_changes(testbed: Testbed, passes: int, step: float = STEP) -> np.ndarray:
    """τ [Q, N] of all queries after a step of α = `step`, the draws of all passes pooled."""
    first, second = (load_terms(testbed, passes, term) for term in ("first", "second"))
    return loss_change_at(first, second, step, testbed.images)


def run_teachers(testbed: Testbed, passes: int, step: float, tests: int) -> dict[str, np.ndarray]:
    """Scores [runs, tests, N] of the last so many queries by both terms and by each alone, each run from its draws."""
    first, second = (load_terms(testbed, passes, f"{term}_runs")[:, -tests:] for term in ("first", "second"))
    changes = loss_change_at(first, second, step, testbed.images)
    return {"both terms": changes, "first term": first, "second term": second}


def draws_per_run(testbed: Testbed, passes: int) -> int:
    """Draws of a training image in each run."""
    config = read_manifest(steps_folder(testbed))["config"]
    return config["bins"] * config["draws"] * passes


def merge(testbed: Testbed, passes: int, step: float) -> dict:
    """Writes the rankings of every split and returns the report."""
    config = read_manifest(steps_folder(testbed))["config"]
    images, counts = testbed.images, {split: len(testbed.query_captions(split)) for split in SPLITS}
    levels, draws = default_levels("emoji", images), [draws_per_run(testbed, passes)]
    teachers = run_teachers(testbed, passes, step, counts["test"])
    report: dict = {"queries": counts, "passes": passes, "step": step}
    report["chance"] = {str(level): round(chance(level, images), 4) for level in levels}
    report["teachers"] = {name: measure(runs[None], name, draws, levels) for name, runs in teachers.items()}
    scores = load_changes(testbed, passes, step)
    start = 0
    for split, count in counts.items():
        part = scores[start : start + count]
        start += count
        rankings = rankings_of(part, split)
        path = testbed.data / f"influence_{split}.npz"
        save_rankings(path, rankings)
        row = report["teachers"]["both terms"][-1]
        extra = {"reliability": row["mAP"], "reliability_draws": row["draws_per_run"]}
        settings = {"teacher": "finite step", "step": step, "passes": passes} | config
        write_manifest(path, settings, command=COMMAND, **extra)
        print(f"{path}: {rankings.queries} queries, {rankings.candidates} images each")
    return report


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser(COMMAND, __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--step", type=float, default=STEP, help="α in eq. 1 (default: %(default)s)")
    parser.add_argument("--passes", type=int, help="merge the first so many passes (default: all whole passes)")
    args = parser.parse_args(argv)
    if args.step <= 0:
        raise ValueError(f"--step: expected a positive number, found {args.step}")
    testbed = testbed_from(args)
    report = merge(testbed, args.passes or whole_step_passes(testbed), args.step)
    name = "reliability.json" if testbed.name == "emoji" else f"reliability_{testbed.name}.json"
    report |= {"mode": testbed.name, "environment": environment()}
    save_json(testbed.root / "results/teacher" / name, report)


if __name__ == "__main__":
    sys.exit(main())
