"""Nearest training images of every query in any feature: the candidates that exact influence is computed on.

    python -m fastgda.neighbours --mode emoji --ftype effnet --split train --k 1200
    python -m fastgda.neighbours --mode coco --ftype dino --split train            # the paper's: K = 10,000

Cosine, by exact search in FAISS. Writes `nn_<ftype>_<split>.npz` beside the rankings, with `rank` [Q, K], nearest
first, and `score` (cosines); `python -m fastgda.rankings` reads the released `nn_dino.pkl` into the same form.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fastgda.core import command_line, command_parser, load_npy, relative, sha256_file, write_manifest
from fastgda.dataset import MODES, layout, load_images, normalise
from fastgda.index import FlatIndex
from fastgda.rankings import Rankings, save_rankings

K = 10_000


def nearest(queries: np.ndarray, images: np.ndarray, k: int) -> Rankings:
    """The `k` images [N, D] of the highest cosine with each of `queries` [Q, D]."""
    found = FlatIndex.build(normalise(images)).search(normalise(queries), k)
    return Rankings(found.ids, found.scores)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m fastgda.neighbours", __doc__)
    parser.add_argument("--mode", choices=MODES, default="emoji")
    parser.add_argument("--ftype", required=True, help="feature that neighbours are sought in")
    parser.add_argument("--split", default="train", help="which queries: train, val or test")
    parser.add_argument(
        "--k", type=int, help="neighbours of each query (default: the paper's 10,000 of COCO, in proportion)"
    )
    parser.add_argument("--data_dir", type=Path, help="folder of the mode's artifacts")
    parser.add_argument("--output", type=Path, help="file to write (default: nn_<ftype>_<split>.npz beside them)")
    args = parser.parse_args(argv)
    paths = layout(args.mode, args.ftype, args.data_dir)
    images = load_images(paths)
    queries = load_npy(paths.features(args.split), (None, images.shape[1]), finite=True, made_by=paths.extract)
    k = args.k or max(1, round(K / 118_287 * len(images)))
    if not 1 <= k <= len(images):
        raise ValueError(f"--k: expected 1..{len(images)}, the number of training images, found {k}")
    path = args.output or paths.data_dir / f"nn_{args.ftype}_{args.split}.npz"
    save_rankings(path, nearest(queries, images, k))
    inputs = {relative(file): sha256_file(file) for file in (paths.images, paths.features(args.split))}
    write_manifest(path, {"ftype": args.ftype, "k": k}, command="python -m fastgda.neighbours", inputs=inputs)
    print(f"{path}: {len(queries)} queries, {k} neighbours each")


if __name__ == "__main__":
    sys.exit(main())
