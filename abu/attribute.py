"""Exact AbU+ for one query: prints and draws the training images that the model forgets first.

python -m abu.attribute --query 7                      # test query 7, every training image; about 10 minutes
python -m abu.attribute --query 7 --candidates 500     # only the first 500 of the stored ranking; half a minute
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

from abu.amortised import Examples
from abu.curvature import EKFAC
from abu.draws import DrawConfig
from abu.influence import UnlearnConfig, mean_losses, query_gradient, unlearn
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from fastgda.core import ROOT, atomic_path, best_device, command_line, load_npz, save_json
from feature_extraction.readers import read_split


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


def picture(images: list[Image.Image], query: Image.Image) -> Image.Image:
    """The query, then the images from the most influential on, ten to a line."""
    side = query.width + 4
    sheet = Image.new("RGB", (11 * side, -(-len(images) // 10) * side), "white")
    sheet.paste(query, (0, 0))
    for place, image in enumerate(images):
        sheet.paste(image, ((1 + place % 10) * side, place // 10 * side))
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
    images, queries = read_split(testbed.data, "data"), read_split(testbed.data, f"{args.split}_query")
    print(f"query {args.query}: {queries.caption(args.query)}")
    for place in order:
        print(f"{ids[place]:6d}  {influence[place]:+.3e}  {images.caption(ids[place])}")
    folder = args.output or ROOT / "results/attribute"
    with atomic_path(folder / f"{args.split}_{args.query}.png") as temporary:
        picture([images.image(ids[place]) for place in order], queries.image(args.query)).save(temporary)
    save_json(
        folder / f"{args.split}_{args.query}.json",
        {
            "prompt": queries.caption(args.query),
            "step": args.step,
            "draws_per_bin": args.draws,
            "images": len(ids),
            "top": [{"id": ids[p], "influence": float(influence[p])} for p in order],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
