"""Scores [Q, N] of the released MSCOCO test queries, for `benchmark.removal` and `benchmark.lds` to judge.

    python -m benchmark.coco_scores                            # everything that is there
    python -m benchmark.coco_scores influence dino random      # some of it

Writes data/coco/scores/<name>.npy: `influence`, the released influence of AbU+ (influence_test.pkl); <feature type>,
the cosines of untuned features (feats/<feature type>); tuned-<feature type>, the inner products under the released
ranker (weights/<feature type>.pth); `random`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmark.coco import COCO, Coco
from benchmark.methods import RANDOM, TUNED, feature_scores, random_scores, tuned_scores
from benchmark.scores import save_scores
from fastgda.core import ROOT, command_line, command_parser, sha256_file
from fastgda.dataset import layout

INFLUENCE, PREFIX = "influence", f"{TUNED}-"


def available(coco: Coco, weights: Path) -> list[str]:
    """Names of the scores that the files allow."""
    ftypes = sorted(path.parent.name for path in coco.data.glob("feats/*/data_feats.npy"))
    tuned = [f"{PREFIX}{ftype}" for ftype in ftypes if (weights / f"{ftype}.pth").is_file()]
    influence = [INFLUENCE] if layout(COCO, "", coco.data).ranking("test").is_file() else []
    return [*influence, *ftypes, *tuned, RANDOM]


def scores_of(coco: Coco, name: str, weights: Path) -> tuple[np.ndarray, dict[str, str]]:
    """(the scores called `name`, hashes of what else they are made from)."""
    if name == INFLUENCE:
        return coco.influence("test"), {}
    if name == RANDOM:
        return random_scores(len(coco.query_captions("test")), coco.images), {}
    paths = layout(COCO, name.removeprefix(PREFIX), coco.data)
    if not name.startswith(PREFIX):
        return feature_scores(paths, "test"), {}
    checkpoint = weights / f"{paths.ftype}.pth"
    return tuned_scores(paths, checkpoint, "test"), {"checkpoint": sha256_file(checkpoint)}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.coco_scores", __doc__)
    parser.add_argument("names", nargs="*", help="which scores (default: all whose files are there)")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with data/ (default: the repository)")
    parser.add_argument("--weights", type=Path, help="folder of the rankers (default: weights/ of the root)")
    args = parser.parse_args(argv)
    coco, weights = Coco(args.root), args.weights or args.root / "weights"
    for name in args.names or available(coco, weights):
        scores, inputs = scores_of(coco, name, weights)
        command = f"python -m benchmark.coco_scores {name}"
        path = save_scores(coco, name, "test", scores, {"method": name}, command, **inputs)
        print(f"{path}: {list(scores.shape)}")


if __name__ == "__main__":
    sys.exit(main())
