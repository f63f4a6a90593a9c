"""Writes the tables of README.md from the JSON files in results/, so that every number there was printed by a command.

python -m benchmark.tables            # rewrites what stands between <!-- results --> and <!-- /results -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmark.judged_tables import judged_parts, read_lds_studies, removal_parts
from benchmark.markdown import folded, markdown, number
from benchmark.service_tables import service_parts
from benchmark.studies import LABELS, STUDIES
from benchmark.table1 import read_reports
from fastgda.core import ROOT, atomic_path, command_line, command_parser, require_file
from fastgda.dataset import MODES

BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
Report = dict[str, Any]


def evaluation_rows(report: Report, name: Callable[[Report], str]) -> list[list[str]]:
    """One line for each method of a report of `eval.py`, and the paired gain below each tuned ranker."""
    levels, rows = [str(level) for level in report["levels"]], []
    for row in report["rows"]:
        errors = row.get("standard_error", {})
        rows.append([name(row), *(number(row["mAP"][level], errors.get(level)) for level in levels)])
        if "gain" in row:
            gain = [number(row["gain"][level], row["gain_standard_error"][level]) for level in levels]
            rows.append(["gain, query by query", *gain])
    return rows


def feature_name(row: Report) -> str:
    """What a line of the table of features is called."""
    names = {
        "popularity": "popularity (ignores the query)",
        "teacher's reliability": "teacher: one half of its draws against the other",
    }
    bold = "**" if row["method"] == "tuned" else ""
    return f"{bold}{names.get(row['method'], row['method'])} {row.get('ftype') or ''}".strip() + bold


def recipe_name(row: Report) -> str:
    """What a line of the table of recipes is called."""
    if row["method"] != "tuned":
        return feature_name(row)
    return "paper's recipe" if Path(row["checkpoint"]).stem == "paper" else "best recipe"


def evaluation_table(report: Report, name: Callable[[Report], str]) -> str:
    """mAP(L) of all methods of a report."""
    return markdown(["", *(f"L = {level}" for level in report["levels"])], evaluation_rows(report, name))


def exact_table(report: Report) -> str:
    """Agreement of the amortised with the exact teacher, for each step size and number of terms."""
    levels = list(report["rows"][0]["both_terms"]["overlap"])
    header = ["step α", "", "Spearman", "lowest", *(f"overlap at {level}" for level in levels)]
    rows = []
    for row in report["rows"]:
        for terms in ("first_term", "both_terms"):
            found, leading = row[terms], terms == "first_term"
            rows.append(
                [
                    f"{row['step']:g}" if leading else "",
                    terms.replace("_", " "),
                    f"{found['spearman']:.4f} ± {found['spearman_standard_error']:.4f}",
                    f"{found['spearman_min']:.4f}",
                    *(number(found["overlap"][level], found["overlap_standard_error"][level]) for level in levels),
                    f"{row['relative_change']:.1e}" if leading else "",
                    f"{row['float32_noise']:.1e}" if leading else "",
                ]
            )
    return markdown([*header, "relative change of the loss", "float32 noise"], rows)


def whole_set(report: Report) -> list[Report]:
    """Rows of a report of `benchmark.amortised_speed` for all training images."""
    return report["all_images"] if "all_images" in report else report["rows"]


def amortised_table(first: Report, second: Report) -> str:
    """Time of the exact form and of both amortised ones by number of queries; each ratio is of one run."""
    header = ["queries", "exact", "first order", "", "exact", "second order", ""]
    rows = []
    for row, other in zip(whole_set(first), whole_set(second), strict=True):
        cells = [f"{row['queries']:,}"]
        for found in (row, other):
            cells += [duration(found["exact_seconds"]), duration(found["amortised_seconds"]), f"{found['ratio']:,.1f}×"]
        rows.append(cells)
    return markdown(header, rows)


def scale_table(scale: Report) -> str:
    """Costs of the paper's collection on MSCOCO, on the machine that measured them."""
    rows = []
    for name in ("exact", "amortised"):
        cost, days = scale[f"{name}_seconds_per_image_and_query"], scale[f"{name}_days"]
        rows.append([name, f"{1e3 * cost:,.4g} ms", f"{days:,.1f} days"])
    for draws, days in scale["query_gradient_days"].items():
        rows.append([f"gradients of the queries, {int(draws):,} draws each", "", f"{days:,.1f} days"])
    return markdown(["", "an image and a query", "all of them"], rows)


def peers_table(factors: Report, sweep: Report, metric: Report) -> str:
    """What is ours beside others' code or a plain loop: how many times as fast, and how far the results are apart."""
    fitted, (precise, *_) = factors["sizes"]["emoji"], metric["rows"]
    rows = [
        [
            f"EK-FAC factors from {fitted['images']:,} images",
            "Kronfluence",
            f"{fitted['ratio']:.1f}×",
            f"{max(fitted['largest_relative_difference'].values()):.0e} relative",
        ],
        [
            f"exact influence of {sweep['config']['queries']} queries",
            "a loop over the queries",
            f"{sweep['ratio']['shared']:.1f}×",
            "none" if not sweep["largest_difference"] else f"{sweep['largest_difference']:.0e}",
        ],
        [
            f"mAP(L) of {metric['config']['queries']} queries × {metric['config']['images']:,} images",
            "scikit-learn",
            f"{precise['times_as_fast']:.0f}×",
            f"{precise['largest_difference']:.0e}",
        ],
    ]
    return markdown(["", "against", "times as fast", "largest difference"], rows, left=2)


def forecast_table(report: Report) -> str:
    """How far predictions of time, memory and disk were from what was measured."""
    rows = []
    for row in report["rows"]:
        errors = [row[name]["relative_error"] for name in ("seconds", "memory", "disk")]
        rows.append([row["job"].replace("-", " "), *(f"{round(100 * error):+d} %" for error in errors)])
    return markdown(["collection", "time", "memory", "disk"], rows)


def training_table(report: Report) -> str:
    """How soon each contender of `benchmark.ranker_speed` reaches the plain loop's mAP(L), and where its time goes."""
    rows = []
    for name, found in report["contenders"].items():
        reached, faster = found["seconds_to_target"], found["times_as_fast"]
        rows.append(
            [
                name.replace("_", " "),
                "not reached" if reached is None else duration(reached),
                "" if faster is None else f"{faster:.1f}×",
                f"{found['pairs_per_second']:,.0f}",
                f"{round(100 * found['matrix_products']['all'])} %",
            ]
        )
    return markdown(["", "time to the target", "times as fast", "pairs per second", "matrix products"], rows)


def extraction_table(report: Report) -> str:
    """Images per second of feature extraction, and the ratio to the plain loop."""
    rows = [
        [name, f"{found['images_per_second']:,.1f}", f"{found['times_as_fast']:.2f}×"]
        for name, found in report["rows"].items()
    ]
    return markdown(["", "images per second", "times as fast"], rows)


def drift_table(report: Report) -> str:
    """Change of mAP(L) by half precision, with its standard error over queries."""
    levels = list(report["mAP"]["untuned"]["change"])
    rows = [
        [name, *(f"{found['change'][level]:+.4f} ± {found['standard_error'][level]:.4f}" for level in levels)]
        for name, found in report["mAP"].items()
    ]
    return markdown(["", *(f"L = {level}" for level in levels)], rows)


def study_table(report: Report) -> str:
    """mAP(L) of each setting of a study, mean over the seeds, below the untuned feature that it starts from."""
    levels = [str(level) for level in report["levels"]]
    settings: dict[tuple[Any, str], list[Report]] = {}
    for run in report["runs"]:
        settings.setdefault((run["x"], run["series"]), []).append(run)
    rows: list[list[str]] = []
    start: list[str] = []
    for (x, series), runs in settings.items():
        untuned = [f"untuned {runs[0]['ftype']}", *(number(runs[0]["untuned"][level]) for level in levels)]
        if untuned != start:
            rows.append(untuned)
            start = untuned
        name = x if isinstance(x, str) else f"{x:,}"
        rows.append(
            [f"{name} {series}".strip(), *(number(fmean(run["mAP"][level] for run in runs)) for level in levels)]
        )
    return markdown([LABELS[report["study"]], *(f"L = {level}" for level in levels)], rows)


def study_parts(results: Path) -> list[str]:
    """A table for each of the paper's studies that is finished."""
    found = [read(results, f"studies/{name}.json") for name in STUDIES if (results / f"studies/{name}.json").is_file()]
    if not found:
        return []
    parts = ["The paper's studies on the testbed, mAP(L) of the test queries (`python -m benchmark.sweep`):"]
    for report in found:
        seeds, changed = report["seeds"], report["changed_from_the_best_recipe"]
        text = f"{report['study'].capitalize()}, " + (f"means over {seeds} seeds" if seeds > 1 else "one seed")
        if changed:
            text += "; the base is the best recipe but for " + ", ".join(f"`{name}`" for name in changed)
        parts += [f"{text}:", study_table(report)]
    return parts


def teacher_parts(results: Path) -> list[str]:
    """What was measured of the amortised scores beside the exact ones."""
    parts = []
    if (results / "teacher/exact.json").is_file():
        exact = read(results, "teacher/exact.json")
        parts += [
            f"Amortised AbU+ (all queries in one pass) against the exact loss change after unlearning, on "
            f"{exact['config']['queries']} test queries and the whole training set, the same draws on both sides "
            "(`python -m benchmark.exact`):",
            exact_table(exact),
        ]
    if (results / "speed/amortised_emoji.json").is_file():
        images = read(results, "ranker/features.json")["images"]
        first, second = (read(results, f"speed/{name}_emoji.json") for name in ("amortised", "second_order"))
        parts += [
            f"Time of the exact form and of the amortised one, first and second order, for all {images:,} "
            f"images with 20 draws each on {first['threads']} cores, gradients of the queries included "
            f"(`python -m benchmark.amortised_speed`; {first['images_timed']:,} and {second['images_timed']:,} images "
            "timed, the exact form linear in queries beyond 4):",
            amortised_table(first, second),
        ]
    if (results / "speed/amortised_coco.json").is_file():
        scale = read(results, "speed/amortised_coco.json")["paper_scale"]
        parts += [
            f"The paper's collection on MSCOCO ({scale['images']:,} images × {scale['views']} views × "
            f"{scale['queries']:,} queries, 20 timesteps × 5 captions) on those cores, from the measured cost of a few "
            "dozen images on the released model's shapes, first order (`--architecture coco`; its JSON lists the "
            "assumptions). Both need the queries' gradients:",
            scale_table(scale),
        ]
    return parts


def speed_parts(results: Path) -> list[str]:
    """What was measured of the speed of everything but teacher and search, and of `--dry_run`."""
    parts = []
    peers = [f"{name}.json" for name in ("teacher/factors", "speed/exact_sweep", "speed/metric")]
    if all((results / name).is_file() for name in peers):
        parts += [
            "Beside others' code and a plain loop (`python -m benchmark.factors`, `benchmark.exact_sweep`, "
            "`benchmark.metric_speed`):",
            peers_table(*(read(results, name) for name in peers)),
        ]
    parts += training_parts(results)
    if (results / "speed/forecast.json").is_file():
        parts += [
            "What `--dry_run` predicts, against what the collection then took (`python -m benchmark.forecast`):",
            forecast_table(read(results, "speed/forecast.json")),
        ]
    return parts


def training_parts(results: Path) -> list[str]:
    """What was measured of the speed of training the ranker and of extracting features, and of half precision."""
    parts = []
    for mode in MODES:
        if (results / f"speed/ranker_{mode}.json").is_file():
            report = read(results, f"speed/ranker_{mode}.json")
            parts += [
                f"Training the ranker until its validation mAP(L) is {report['target_mAP']:.3f}, the best of a plain "
                f"loop in {duration(report['config']['plain_seconds'])}, on {machine(report)}; {report['images']:,} "
                f"images, {report['training_queries']:,} queries with {report['candidates']:,} candidates each "
                f"(`python -m benchmark.ranker_speed --mode {mode}`; each is validated at times that double, so that "
                "none looks faster than it is):",
                training_table(report),
            ]
    if (results / "speed/extraction.json").is_file():
        report = read(results, "speed/extraction.json")
        parts += [
            f"Extraction of {report['config']['ftype']} features from {report['images']:,} images on "
            f"{report['threads']} cores (`python -m benchmark.extraction_speed`):",
            extraction_table(report),
        ]
    if (results / "speed/feature_drift.json").is_file():
        report = read(results, "speed/feature_drift.json")
        drift = report["features"]["data"]
        parts += [
            f"Extraction of {report['ftype']} features in half precision turns those of {drift['images']:,} training "
            f"images by 1 − cosine = {drift['mean']:.1e} on average, {drift['max']:.1e} at most, and changes the "
            "mAP(L) of the test queries by (`python -m benchmark.feature_drift`):",
            drift_table(report),
        ]
    return parts


def machine(report: Report) -> str:
    """What a report was measured on."""
    on_gpu = report["device"].startswith("cuda")
    return f"one {report['environment']['gpu']}" if on_gpu else f"{report['threads']} cores"


def read(results: Path, name: str) -> Report:
    """A report of the folder `results`; `ValueError` if it is not there."""
    return json.loads(require_file(results / name).read_text())


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def results_block(results: Path) -> str:
    """Everything between the markers of README.md."""
    features = read(results, "ranker/features.json")
    parts = [
        f"mAP(L) on {features['queries']} held-out test queries, whose concepts no training query shares; "
        f"{features['images']:,} training images, mean ± standard error over queries "
        "(`bash scripts/train_rankers.sh`):",
        evaluation_table(features, feature_name),
    ]
    if (results / "ranker/recipes.json").is_file():
        parts += [
            "The best recipe (the teacher of a finite step, listwise loss) beside the paper's (first order, K-NN "
            "candidates, binary cross-entropy), judged by the finite step and then by the first order:",
            evaluation_table(read(results, "ranker/recipes.json"), recipe_name),
            evaluation_table(read(results, "ranker/recipes_plain.json"), recipe_name),
        ]
    reports = read_reports(results)
    parts += removal_parts(reports) + service_parts(results)
    parts += folded("The paper's studies: features, losses, outliers, queries, candidates", study_parts(results))
    parts += folded("The amortised teacher against the exact one: agreement and time", teacher_parts(results))
    parts += folded("How fast the rest is, and how well it is forecast", speed_parts(results))
    judged = judged_parts(reports, read_lds_studies(results))
    parts += folded("All methods by retraining: LDS, creators, calibration, K-NN; the teacher's choices", judged)
    return "\n\n".join(parts)


def with_results(readme: str, block: str) -> str:
    """The text of README.md with `block` between the markers; `ValueError` if they are missing."""
    if not BLOCK.search(readme):
        raise ValueError("README.md: expected the markers <!-- results --> and <!-- /results -->, found none")
    return BLOCK.sub(lambda match: f"{match[1]}{block}\n{match[2]}", readme)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    command_parser("python -m benchmark.tables", __doc__).parse_args(argv)
    readme = ROOT / "README.md"
    text = with_results(readme.read_text(), results_block(ROOT / "results"))
    with atomic_path(readme) as temporary:
        temporary.write_text(text)
    print(f"{readme}: tables written")


if __name__ == "__main__":
    sys.exit(main())
