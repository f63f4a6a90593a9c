"""Draws the figures of `results/` from its JSON files.

python -m benchmark.figures                     # results/source_model/loss.png, results/{teacher,removal}/*.png
python -m benchmark.figures --mode emoji-mini   # results/source_model/loss_emoji-mini.png
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
from PIL import Image

from abu.testbed import TESTBEDS, Testbed, add_testbed_flags, testbed_from
from benchmark.drawing import Figure, plt, save_figure
from benchmark.image_rows import draw_rows, sheet
from benchmark.losses import folder_of
from benchmark.retrainable import JUDGED_MODE
from benchmark.scores import score_path
from benchmark.table1 import read_reports, throughput_figures
from fastgda.core import atomic_path, command_line, command_parser, require_file
from serving.retrained import Retrained

ROWS = ("minilm", "tuned-minilm", "finite-step@0.01")
"""Methods whose images are shown one below the other: untuned, tuned, teacher."""
SHOWN, NAME = 12, 24
"""Queries of a sheet of removals, and letters of a row's name."""


def loss_curves(testbed: Testbed) -> Figure:
    """Training loss of autoencoder and diffusion model against the step."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    for axis, part in zip(axes, ("autoencoder", "diffusion"), strict=True):
        curve = json.loads(require_file(testbed.source / f"{part}_loss.json").read_text())
        steps = (np.arange(len(curve["loss"])) + 0.5) * curve["window"]
        axis.plot(steps, curve["loss"])
        axis.set(title=part, xlabel="step", ylabel=f"loss (mean of {curve['window']} steps)", yscale="log")
        axis.grid(alpha=0.3)
    return figure


def reliability_curves(report: dict) -> Figure:
    """mAP(L) between two independent runs of each teacher against the draws of a run."""
    teachers = report["teachers"]
    figure, axes = plt.subplots(1, len(teachers), figsize=(4.5 * len(teachers), 3), sharey=True)
    for axis, (teacher, rows) in zip(axes, teachers.items(), strict=True):
        for level, expected in report["chance"].items():
            draws = [row["draws_per_run"] for row in rows]
            axis.errorbar(
                draws,
                [row["mAP"][level] for row in rows],
                [row["standard_error"][level] for row in rows],
                marker="o",
                label=f"L = {level} (chance {expected:.3f})",
            )
        axis.set(title=teacher, xlabel="draws per training image and run", ylabel="mAP(L) of one run for the other")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def removal_sheets(kept: Retrained) -> dict[int, Image.Image]:
    """K -> what models draw from the same seeds: one column for each query, a row for the model that was trained on
    everything and one for each method whose first K images were removed.
    """
    queries, found = range(min(SHOWN, len(kept.captions))), {}
    for level in sorted({removal.removed for removal in kept.removals}):
        rows: list[tuple[str, list[Image.Image], Image.Image | None]] = [
            ("on everything", [kept.image(q) for q in queries], None)
        ]
        pictures = {(r.method, r.query): Image.fromarray(r.picture) for r in kept.removals if r.removed == level}
        for method in dict.fromkeys(name for name, _ in pictures):
            blank = Image.new("RGB", rows[0][1][0].size, "white")
            rows.append((method[:NAME], [pictures.get((method, q), blank) for q in queries], None))
        found[level] = sheet(rows)
    return found


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.figures", __doc__)
    add_testbed_flags(parser)
    testbed = testbed_from(parser.parse_args(argv))
    results = testbed.root / "results"
    if testbed.name != "emoji":
        save_figure(loss_curves(testbed), results / f"source_model/loss_{testbed.name}.png")
        return
    save_figure(loss_curves(testbed), results / "source_model/loss.png")
    for name, made_by in (("reliability", "benchmark.finite_step"), ("first_order", "benchmark.teacher")):
        path = require_file(results / f"teacher/{name}.json", f"python -m {made_by}")
        save_figure(reliability_curves(json.loads(path.read_text())), results / f"teacher/{name}.png")
    for level, figure in throughput_figures(read_reports(results)).items():
        save_figure(figure, results / f"removal/throughput_{level}.png")
    if (results / "removal/pictures.npz").is_file():
        for level, picture in removal_sheets(Retrained.load(results / "removal/pictures.npz")).items():
            with atomic_path(results / f"removal/pictures_{level}.png") as temporary:
                picture.save(temporary)
    judged = replace(TESTBEDS[JUDGED_MODE], root=testbed.root)
    scores = [score_path(judged, method, "test") for method in ROWS]
    if all(path.is_file() for path in scores) and any(folder_of(judged).glob("without_*.npz")):
        draw_rows(judged, scores, results / "removal")


if __name__ == "__main__":
    sys.exit(main())
