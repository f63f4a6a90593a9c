"""Exact AbU+ for one query: prints and draws the training images that the model forgets first.

python -m abu.attribute --query 7                      # test query 7, every training image; about 10 minutes
python -m abu.attribute --query 7 --candidates 500     # only the first 500 of the stored ranking; half a minute
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image

from abu.amortised import Examples
from abu.curvature import EKFAC
from abu.draws import DrawConfig
from abu.influence import UnlearnConfig, mean_losses, query_gradient, unlearn
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from fastgda.core import ROOT, atomic_path, best_device, command_line, load_npz, save_json


def exact_influence(
    testbed: Testbed,
    query: Examples,
    candidates: list[int] | None,
    config: UnlearnConfig,
    draws: int,
    device: torch.device,
) -> tuple[list[int], torch.Tensor]:
    """(training ids, τ of each) for one query, higher = more influential."""
    source, curvature = testbed.load_source(device), EKFAC.load(testbed.curvature).to(device)
    training = testbed.training_examples(device)
    images = len(training.ids)
    if candidates is not None:
        rows = torch.tensor(candidates)
        training = Examples("train", candidates, training.latents[rows], training.text[rows])
    gradient = query_gradient(source.denoiser, source.schedule, curvature, query, DrawConfig(draws=config.draws))
    models = [source.denoiser, unlearn(source.denoiser, curvature, gradient, config.step, images)]
    before, after = mean_losses(models, source.schedule, training, DrawConfig(draws=draws))
    return training.ids, after - before


def picture(rows: list[dict], query: bytes, side: int = 64) -> Image.Image:
    """The query, then the images from the most influential on, ten to a line."""
    sheet = Image.new("RGB", (11 * (side + 4), -(-len(rows) // 10) * (side + 4)), "white")
    sheet.paste(Image.open(io.BytesIO(query)).convert("RGB"), (0, 0))
    for place, row in enumerate(rows):
        position = ((1 + place % 10) * (side + 4), place // 10 * (side + 4))
        sheet.paste(Image.open(io.BytesIO(row["image"])).convert("RGB"), position)
    return sheet


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m abu.attribute", description=__doc__.splitlines()[0])
    parser.add_argument("--query", type=int, required=True, help="number of the query in its split")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--step", type=float, default=UnlearnConfig.step, help="α of eq. 1")
    parser.add_argument("--draws", type=int, default=1, help="draws of (t, ε) per timestep bin for each training image")
    parser.add_argument("--candidates", type=int, help="evaluate only the first K of the stored ranking")
    parser.add_argument("--top", type=int, default=20)
    add_testbed_flags(parser)
    parser.add_argument("--output", type=Path, help="folder for the picture and JSON (default: results/attribute)")
    args = parser.parse_args(argv)
    device, testbed = best_device(), testbed_from(args)
    examples = testbed.query_examples(args.split, device)
    if not 0 <= args.query < len(examples.ids):
        raise ValueError(f"--query: expected 0..{len(examples.ids) - 1} in split {args.split}, found {args.query}")
    candidates = None
    if args.candidates is not None:
        path = testbed.data / f"influence_{args.split}.npz"
        candidates = [int(i) for i in load_npz(path, ("rank",))["rank"][args.query, : args.candidates]]
    query = examples.rows(args.query, args.query + 1)
    ids, influence = exact_influence(testbed, query, candidates, UnlearnConfig(step=args.step), args.draws, device)
    order = influence.argsort(descending=True, stable=True)[: args.top].tolist()
    table = pq.read_table(testbed.data / "trainset/emoji.parquet", columns=["image", "captions"])
    rows = table.take([ids[place] for place in order]).to_pylist()
    queries = pq.read_table(testbed.data / f"query_{args.split}/queries.parquet").to_pylist()
    print(f"query {args.query}: {queries[args.query]['captions'][0]}")
    for place, row in zip(order, rows, strict=True):
        print(f"{ids[place]:6d}  {influence[place]:+.3e}  {row['captions'][0]}")
    folder = args.output or ROOT / "results/attribute"
    with atomic_path(folder / f"{args.split}_{args.query}.png") as temporary:
        picture(rows, queries[args.query]["image"]).save(temporary)
    save_json(
        folder / f"{args.split}_{args.query}.json",
        {
            "prompt": queries[args.query]["captions"][0],
            "step": args.step,
            "draws_per_bin": args.draws,
            "images": len(ids),
            "top": [{"id": ids[p], "influence": float(influence[p])} for p in order],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
