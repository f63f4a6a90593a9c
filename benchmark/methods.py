"""Scores of attribution methods, one interface: an array [Q, N] for the test queries, higher = more influential.

    python -m benchmark.methods random pixel effnet minilm effnet+minilm --mode emoji-mini
    python -m benchmark.methods tuned --checkpoint weights/emoji_effnet+minilm.pth --mode emoji-mini
    python -m benchmark.methods normalised plain --mode emoji-mini          # the teacher's collected passes

Writes data/<mode>/scores/<method>.npy, which benchmark.lds and benchmark.removal judge. A feature's score is the cosine
of query and training image, a tuned ranker's the inner product of their embeddings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from abu.collect import folder_of
from abu.testbed import SPLITS, TESTBEDS, Testbed
from benchmark.teacher import TEACHERS, mean_over_passes, passes
from fastgda.core import command_line, load_npy, save_npy, sha256_file, write_manifest
from fastgda.dataset import Layout, layout, load_images, normalise
from fastgda.ranker import load_ranker

RANDOM, TUNED = "random", "tuned"


def random_scores(queries: int, images: int, seed: int = 0) -> np.ndarray:
    """Scores without any information: the null of every table."""
    return np.random.default_rng(seed).random((queries, images), dtype=np.float32)


def feature_scores(paths: Layout) -> np.ndarray:
    """Cosines of the untuned features."""
    images = load_images(paths)
    return normalise(load_npy(paths.features("test"), (None, images.shape[1]), finite=True)) @ normalise(images).T


def tuned_scores(paths: Layout, checkpoint: Path) -> np.ndarray:
    """Inner products under a ranker."""
    images = load_images(paths)
    ranker = load_ranker(checkpoint, in_dim=images.shape[1])
    queries = load_npy(paths.features("test"), (None, images.shape[1]), finite=True)
    return (ranker.embed_queries(queries) @ ranker.embed(images).T).numpy()


def teacher_scores(testbed: Testbed, teacher: str) -> np.ndarray:
    """The collected scores of the test queries, all passes pooled."""
    folder = folder_of(testbed)
    scores = mean_over_passes(folder, teacher, passes(folder))
    start = sum(len(testbed.query_captions(split)) for split in SPLITS[: SPLITS.index("test")])
    return scores[start:]


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.methods", description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+", help=f"{RANDOM}, {TUNED}, {', '.join(TEACHERS)}, or feature types")
    parser.add_argument("--mode", choices=sorted(TESTBEDS), default="emoji-mini", help="testbed (default: emoji-mini)")
    parser.add_argument("--ftype", default="effnet+minilm", help="feature type of the tuned ranker")
    parser.add_argument("--checkpoint", type=Path, help="the tuned ranker")
    args = parser.parse_args(argv)
    testbed = TESTBEDS[args.mode]
    for method in args.methods:
        inputs: dict[str, str] = {}
        if method == RANDOM:
            scores = random_scores(len(testbed.query_captions("test")), len(testbed.load_arrays()[0]))
        elif method in TEACHERS:
            scores = teacher_scores(testbed, method)
        elif method == TUNED:
            if args.checkpoint is None:
                raise ValueError("tuned: expected --checkpoint with it, found none")
            inputs = {"checkpoint": sha256_file(args.checkpoint)}
            scores = tuned_scores(layout("emoji", args.ftype, testbed.data), args.checkpoint)
        else:
            scores = feature_scores(layout("emoji", method, testbed.data))
        path = testbed.data / "scores" / f"{method}.npy"
        save_npy(path, scores.astype(np.float32))
        command = f"python -m benchmark.methods {method} --mode {args.mode}"
        write_manifest(path, {"method": method, "ftype": args.ftype}, command=command, inputs=inputs)
        print(f"{path}: {list(scores.shape)}")


if __name__ == "__main__":
    sys.exit(main())
