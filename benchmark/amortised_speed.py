"""Time and memory of amortised against exact influence: same queries, images, timesteps and noise, on one machine.

    python -m benchmark.amortised_speed                            # emoji; results/speed/amortised_emoji.{json,png}
    python -m benchmark.amortised_speed --images 2048              # fewer training images; the rest is extrapolated
    python -m benchmark.amortised_speed --order 2 --sketch 540672  # the shipped teacher: second_order_emoji.json
    python -m benchmark.amortised_speed --architecture coco        # COCO's shapes, random weights, a few dozen images
    python -m benchmark.amortised_speed --memory                   # peak memory and growth, each in its own process

Both forms take the same query gradients. Exact: one sweep over the images evaluates the losses of the source model and
of k unlearned models on the same draws; it is timed for several k (--exact_queries), shown to be linear in k, and
extrapolated to Q. Amortised: one sweep of gradients, rotated, sketched and multiplied with Q queries, to second order
those of the squares too; timed for every Q of --queries. Queries beyond the testbed's own are random rows in the
product, and cost a gradient like the others. Shards of images are timed one after the other, both forms in turn;
medians over shards count. What the exact form could share besides the losses of the source model saves it a twentieth
(`benchmark.exact_sweep`). What is measured is kept under runs/speed: after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from abu.stages import hashes
from abu.testbed import add_testbed_flags, testbed_from
from benchmark.drawing import plt, save_figure
from benchmark.growth import growth
from benchmark.stopwatch import SpeedConfig, Stopwatch, collect
from benchmark.worlds import COCO_IMAGES, COCO_QUERIES
from fastgda.core import ROOT, best_device, command_line, command_parser, environment, load_npz, save_json
from fastgda.flags import add_flags, from_flags
from fastgda.metrics import spearman
from fastgda.rankings import from_scores


def line(counts: list[int], seconds: list[float]) -> dict[str, float]:
    """Least-squares line seconds = base + each · count, and how far the points lie from it."""
    each, base = np.polyfit(counts, seconds, 1)
    fitted = base + each * np.array(counts)
    worst = float(np.abs(fitted / np.array(seconds) - 1).max())
    return {"base": float(base), "each": float(each), "largest_relative_deviation": round(worst, 4)}


def summary(folder: Path, config: SpeedConfig, images: int) -> dict[str, Any]:
    """The report: seconds of each form for `images` training images and each number of queries."""
    shards = [json.loads(path.read_text()) for path in sorted(folder.glob("shard_*.json"))]
    rates = json.loads((folder / "queries.json").read_text())

    def median(*keys: str) -> float:
        """Seconds for an image, from the shards' entries under these keys."""
        return statistics.median(reduce(getitem, keys, shard) / shard["images"] for shard in shards)

    exact = line(list(config.exact_queries), [median("exact", str(count)) for count in config.exact_queries])
    parts = {name: median("amortised", name) for name in ("gradients", "compression")}
    products = {count: median("amortised", "products", str(count)) for count in config.queries}
    rows = []
    for count in config.queries:
        query_seconds = count * rates["gradient"]
        exact_seconds = images * (exact["base"] + exact["each"] * count) + count * rates["unlearn"] + query_seconds
        ours = images * (sum(parts.values()) + products[count]) + query_seconds
        rows.append(
            {
                "queries": count,
                "exact_seconds": round(exact_seconds, 2),
                "amortised_seconds": round(ours, 2),
                "ratio": round(exact_seconds / ours, 2),
                "query_gradients_seconds": round(query_seconds, 2),
            }
        )
        print(rows[-1])
    measured = sum(shard["images"] for shard in shards)
    return {
        "config": asdict(config),
        "images": images,
        "images_timed": measured,
        "shards": len(shards),
        "extrapolated": "exact in the number of queries (linear)" + ("" if measured == images else "; both in images"),
        "seconds_per_image": {"exact": exact, **parts, "products": {str(k): v for k, v in products.items()}},
        "seconds_per_query": rates,
        "spearman_on_timed_images": None if config.architecture == "coco" else agreement(folder),
        "rows": rows,
    }


def agreement(folder: Path) -> list[float]:
    """Spearman of the two forms over the images that were timed, for each query that both scored."""
    scores = [load_npz(path, ("exact", "amortised")) for path in sorted(folder.glob("shard_*.npz"))]
    change, plain = (np.concatenate([s[key] for s in scores], 1) for key in ("exact", "amortised"))
    return np.round(spearman(plain, from_scores(change).rank), 4).tolist()


def coco_table(report: dict[str, Any], config: SpeedConfig) -> dict[str, Any]:
    """Costs of the paper's collection: 118,287 images from 2 sides, 5,000 queries, 20 timesteps × 5 captions.

    Query gradients are counted apart, with the paper's 50,000 draws and with 1,000: both forms need the same.
    """
    per_image, draws = report["seconds_per_image"], config.bins * config.draws
    captions, views = 5, 2
    samples = COCO_IMAGES * views * captions * 20 / draws
    each_query = per_image["exact"]["each"] * samples
    exact = each_query * COCO_QUERIES + per_image["exact"]["base"] * samples
    most = max(config.queries)
    product = per_image["products"][str(most)] / most * COCO_IMAGES * views * COCO_QUERIES
    compression = per_image["compression"] * COCO_IMAGES * views * captions
    amortised = per_image["gradients"] * samples + compression + product
    per_draw = report["seconds_per_query"]["gradient"] / (config.bins * config.query_draws)
    pairs, day = COCO_IMAGES * views * COCO_QUERIES, 86_400
    return {
        "images": COCO_IMAGES,
        "views": views,
        "queries": COCO_QUERIES,
        "exact_seconds_per_image_and_query": exact / pairs,
        "amortised_seconds_per_image_and_query": amortised / pairs,
        "exact_days": round(exact / day, 1),
        "amortised_days": round(amortised / day, 2),
        "amortised_days_of": {
            "gradients": round(per_image["gradients"] * samples / day, 2),
            "compression": round(compression / day, 2),
            "products": round(product / day, 2),
        },
        "ratio": round(exact / amortised, 1),
        "query_gradient_days": {
            str(count): round(COCO_QUERIES * count * per_draw / day, 2) for count in (1_000, 50_000)
        },
        "assumptions": [
            "random weights, images and an identity for the curvature; time depends on shapes only",
            "20 timesteps × 5 captions for each image and view, each (timestep, caption) one draw",
            "time is linear in images, draws and queries; all on this machine, one process",
            "a compression for each caption, because tokens differ; a product for each view, the captions' gradients "
            "being summed before it",
            f"products as measured with {most} queries; the largest of the two views' scores is kept, at no cost",
            "gradients of the queries are needed by both forms and counted apart",
        ],
    }


def figure(report: dict[str, Any]) -> Figure:
    """Seconds of both forms, and their ratio, against the number of queries."""
    drawing, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    counts = [row["queries"] for row in report["rows"]]
    for name in ("exact", "amortised"):
        left.plot(counts, [row[f"{name}_seconds"] for row in report["rows"]], marker="o", label=name)
    right.plot(counts, [row["ratio"] for row in report["rows"]], marker="o", color="C2")
    left.set(xscale="log", yscale="log", xlabel="queries", ylabel=f"seconds, {report['images']:,} images")
    right.set(xscale="log", yscale="log", xlabel="queries", ylabel="exact / amortised")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend()
    return drawing


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.amortised_speed", __doc__)
    add_testbed_flags(parser)
    add_flags(parser, SpeedConfig)
    parser.add_argument("--memory", action="store_true", help="measure peak memory and growth instead of the curve")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/speed", help="folder of what is measured")
    parser.add_argument("--output", type=Path, help="folder of the report (default: results/speed)")
    args = parser.parse_args(argv)
    config, device = from_flags(SpeedConfig, args), best_device()
    output = args.output or ROOT / "results/speed"
    model = model_hashes(config, args)
    if args.memory:
        found = growth(config.architecture, args, args.work / folder_name(model))
        save_json(output / f"memory_{config.architecture}.json", found | {"environment": environment()})
        return
    folder = args.work / folder_name(asdict(config) | model | {"threads": torch.get_num_threads()})
    world = config.world(args, device)
    collect(Stopwatch(world, config), folder)
    report = summary(folder, config, len(world.training.ids))
    if config.architecture == "emoji" and config.images and args.root is None:
        full = testbed_from(args).images
        report["all_images"] = summary(folder, config, full)["rows"]
    if config.architecture == "coco":
        report["paper_scale"] = coco_table(report, config)
        print(json.dumps(report["paper_scale"], indent=1))
    report |= {"threads": torch.get_num_threads(), "environment": environment()}
    name = f"{'amortised' if config.order == 1 else 'second_order'}_{config.architecture}"
    save_json(output / f"{name}.json", report)
    save_figure(figure(report), output / f"{name}.png")


def model_hashes(config: SpeedConfig, args: argparse.Namespace) -> dict[str, str]:
    """What is timed: the testbed's weights and factors; COCO's are random."""
    if config.architecture == "coco":
        return {}
    testbed = testbed_from(args)
    return hashes(testbed, [testbed.source / "denoiser.safetensors", testbed.curvature])


def folder_name(settings: dict[str, Any]) -> str:
    """One folder for each setting: what is measured with other settings is never mixed."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
