"""Exact AbU+ for one query: prints and draws the training images that the model forgets first.

python -m abu.attribute --query 7                      # test query 7, every training image; about 20 minutes
python -m abu.attribute --query 7 --candidates 500     # only the first 500 of the stored ranking; half a minute
python -m abu.attribute --query 7 --dry_run            # time and memory that it will need
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from abu.exact_estimate import attribution_estimate
from abu.influence import ExactInfluence, exact_influence
from abu.loss_draws import LossDraws
from abu.sweep import SweepConfig
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from abu.unlearn import UnlearnConfig
from fastgda.core import ROOT, atomic_path, best_device, command_line, command_parser, load_npz, save_json
from fastgda.flags import add_flags, from_flags
from feature_extraction.readers import read_split


def picture(images: list[Image.Image], query: Image.Image) -> Image.Image:
    """The query, then the images from the most influential on, ten to a line."""
    side = query.width + 4
    sheet = Image.new("RGB", (11 * side, -(-len(images) // 10) * side), "white")
    sheet.paste(query, (0, 0))
    for place, image in enumerate(images):
        sheet.paste(image, ((1 + place % 10) * side, place // 10 * side))
    return sheet


def candidate_ids(testbed: Testbed, split: str, query: int, count: int | None, images: int) -> list[int]:
    """The first `count` of the stored ranking, or all training images.

    `ValueError` naming the ranking if it has other queries or ids that are no training image's.
    """
    if count is None:
        return list(range(images))
    path, queries = testbed.data / f"influence_{split}.npz", len(testbed.query_captions(split))
    rank = load_npz(path, ("rank",))["rank"]
    if rank.ndim != 2 or len(rank) != queries:
        raise ValueError(f"{path}: expected rank [{queries}, K], a row for each query, found {list(rank.shape)}")
    if not 1 <= count <= rank.shape[1]:
        raise ValueError(f"--candidates: expected 1..{rank.shape[1]}, as many as are ranked, found {count}")
    found = rank[query, :count]
    if found.min() < 0 or found.max() >= images:
        raise ValueError(f"{path}: expected training ids 0..{images - 1}, found {found.min()} to {found.max()}")
    return found.tolist()


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = command_parser("python -m abu.attribute", __doc__)
    made.add_argument("--query", type=int, required=True, help="number of the query in its split")
    made.add_argument("--split", choices=SPLITS, default="test")
    made.add_argument("--candidates", type=int, help="evaluate only the first K of the stored ranking")
    made.add_argument("--top", type=int, default=20, help="how many are shown (default: 20)")
    for part in (UnlearnConfig, LossDraws, SweepConfig):
        add_flags(made, part)
    add_testbed_flags(made)
    made.add_argument("--output", type=Path, help="folder for the picture and JSON (default: results/attribute)")
    made.add_argument("--dry_run", action="store_true", help="print the time and memory needed; attribute nothing")
    return made


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    device, testbed = best_device(), testbed_from(args)
    examples = testbed.query_examples(args.split, device)
    if not 0 <= args.query < len(examples.ids):
        raise ValueError(f"--query: expected 0..{len(examples.ids) - 1} in split {args.split}, found {args.query}")
    query = examples.rows(args.query, args.query + 1)
    unlearning, draws = from_flags(UnlearnConfig, args), from_flags(LossDraws, args)
    exact = ExactInfluence.of(testbed, unlearning, draws, from_flags(SweepConfig, args), device)
    ids = candidate_ids(testbed, args.split, args.query, args.candidates, len(exact.images))
    if args.dry_run:
        print(attribution_estimate(exact, query, np.array(ids)))
        return
    influence = exact_influence(exact.sweep, ids, [exact.unlearned(query)], progress=True)[0]
    order = np.argsort(-influence, kind="stable")[: args.top].tolist()
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
            "unlearning": vars(unlearning),
            "draws": vars(draws),
            "images": len(ids),
            "top": [{"id": ids[p], "influence": float(influence[p])} for p in order],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
