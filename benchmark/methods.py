"""Scores of attribution methods, one interface: an array [Q, N] for each query, higher = more influential.

    python -m benchmark.methods random pixel effnet minilm effnet+minilm
    python -m benchmark.methods tuned --checkpoint weights/emoji_effnet+minilm.pth
    python -m benchmark.methods finite-step finite-step@1       # the teacher's collected steps; at α = 1
    python -m benchmark.methods first-order second-order        # the terms of those steps, each alone
    python -m benchmark.methods normalised plain                # the first-order teachers' collected passes
    python -m benchmark.methods normalised-knn plain-knn        # the same on K nearest images only (paper, Table 2)
    python -m benchmark.methods minilm --influence finite-step  # minilm-influence: what the cosine predicts of τ
    python -m benchmark.methods minilm --influence das          # of any scores, after: das --split val
    python -m benchmark.methods exact exact@1       # of abu.collect_exact: its own folder, and cache/exact_test@1
    python -m benchmark.methods trak journey-trak d-trak das abu ekfac --dry_run      # time, memory and disk
    python -m benchmark.methods trak journey-trak d-trak das abu ekfac --workers 2    # resumable
    python -m benchmark.methods trak d-trak --select            # the ridge λ by the LDS of the validation queries
    python -m benchmark.methods trak --models 4 --ridge 0.1     # trak-4models-ridge0.1.npy
    python -m benchmark.methods das --select --split train      # of training queries: see benchmark.distil
    python -m benchmark.methods abu-plus --layers attn --damping 0.01 --name abu-attn    # other settings, another name

Writes data/<mode>/scores/<name>.npy, which benchmark.lds, benchmark.removal and the leaderboard judge and call by that
name: the method, tuned-<feature type> for a ranker, with -<M>models, -ridge<λ> or -selected after it where these were
asked for; or what --name says. With --influence a method's score becomes the influence that it predicts: a monotone map
(`fastgda.magnitude`), fitted on the validation queries to a teacher's scores, gives the same order the magnitudes of
influence, which sums over images need. A feature's score is the cosine of query and training image, a tuned ranker's
the inner product of their embeddings; the others are in `benchmark.gradient_methods`.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from abu.cluster import add_cluster_flags, cluster_from
from abu.layers import LayerPattern
from abu.stages import whole_passes
from abu.testbed import SPLITS, Testbed, testbed_from
from abu.unlearn import STEP
from benchmark.exact_rankings import full_influence
from benchmark.finite_step import load_changes, load_terms, require_own_steps, whole_step_passes
from benchmark.gradient_methods import METHODS, Method, collect_method, foresee_method, method_scores, select_ridge
from benchmark.lds import Judge
from benchmark.projected import Measure
from benchmark.retrain import add_judge_flags
from benchmark.scores import load_scores as load_file
from benchmark.scores import save_scores, score_path
from benchmark.teacher import NEIGHBOUR_FTYPE, NEIGHBOURS, TEACHERS, load_scores
from fastgda.core import command_line, command_parser, load_npy, sha256_file
from fastgda.dataset import Layout, layout, load_images, normalise
from fastgda.magnitude import Magnitude
from fastgda.ranker import load_ranker
from fastgda.rankings import top

RANDOM, TUNED, FINITE_STEP, EXACT = "random", "tuned", "finite-step", "exact"
TERMS = {"first-order": "first", "second-order": "second"}
"""The terms of the finite step, which alone are its limits for small and for large α."""
COLLECTED = (FINITE_STEP, *TERMS, *TEACHERS, EXACT)
"""The teachers, whose scores abu.collect and abu.collect_exact made."""
OVERRIDES = ("layers", "curvature", "damping", "measure", "bins", "draws", "query_draws", "only", "normalised")
"""Settings of methods on gradients that have a flag."""
AT, NEAREST, SELECTED = "@", "-knn", "-selected"
"""Parts a teacher from the α of its step; ends the names of teachers on candidates, as the paper collects them for
training queries; ends those of methods whose λ validation queries chose."""


def random_scores(queries: int, images: int, seed: int = 0) -> np.ndarray:
    """Scores without any information: the null of every table."""
    return np.random.default_rng(seed).random((queries, images), dtype=np.float32)


def feature_scores(paths: Layout, split: str) -> np.ndarray:
    """Cosines of the untuned features."""
    images = load_images(paths)
    return normalise(load_npy(paths.features(split), (None, images.shape[1]), finite=True)) @ normalise(images).T


def tuned_scores(paths: Layout, checkpoint: Path, split: str) -> np.ndarray:
    """Inner products under a ranker."""
    images = load_images(paths)
    ranker = load_ranker(checkpoint, in_dim=images.shape[1])
    queries = load_npy(paths.features(split), (None, images.shape[1]), finite=True)
    return (ranker.embed_queries(queries) @ ranker.embed(images).T).numpy()


def is_teacher(method: str) -> bool:
    """Whether it is one of `COLLECTED`, or a finite step or the exact form with a step of its own."""
    return method in COLLECTED or method.partition(AT)[0] in (FINITE_STEP, EXACT)


def step_of(method: str) -> float:
    """α of "finite-step", or of "finite-step@α" and "exact@α"; `ValueError` unless it is a positive number."""
    text = method.partition(AT)[2]
    if method == FINITE_STEP:
        return STEP
    try:
        step = float(text)
    except ValueError:
        step = math.nan
    if not 0 < step < math.inf:
        raise ValueError(f"{method}: expected a positive number after @, found {text!r}")
    return step


def teacher_scores(testbed: Testbed, teacher: str, split: str) -> np.ndarray:
    """The collected scores of a split's queries, all passes pooled."""
    if teacher.partition(AT)[0] == EXACT:
        return full_influence(testbed, split, None if teacher == EXACT else step_of(teacher))
    if teacher in TEACHERS:
        scores = load_scores(testbed, whole_passes(testbed), teacher)
    else:
        require_own_steps(testbed)
        passes = whole_step_passes(testbed)
        if teacher in TERMS:
            scores = load_terms(testbed, passes, TERMS[teacher])
        else:
            scores = load_changes(testbed, passes, step_of(teacher))
    counts = {part: len(testbed.query_captions(part)) for part in SPLITS}
    start = sum(counts[part] for part in SPLITS[: SPLITS.index(split)])
    return scores[start : start + counts[split]]


def among_nearest(scores: np.ndarray, features: np.ndarray, count: int) -> np.ndarray:
    """Scores [Q, N] of the `count` images nearest in a feature (cosines [Q, N]); all others get the lowest of them."""
    nearest = top(features, count)
    kept = np.take_along_axis(scores, nearest, 1)
    found = np.repeat(kept.min(1, keepdims=True), scores.shape[1], 1)
    np.put_along_axis(found, nearest.astype(np.int64), kept, 1)
    return found


def influence_scores(testbed: Testbed, method: str, split: str, args: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """`frozen_scores`, or the influence under the teacher `args.influence` that they predict; `ValueError` if that is
    the same for all.
    """
    scores, inputs = frozen_scores(testbed, method, split, args)
    if args.influence is None:
        return scores, inputs
    fitted_on = scores if split == "val" else frozen_scores(testbed, method, "val", args)[0]
    if is_teacher(args.influence):
        teacher = teacher_scores(testbed, args.influence, "val")
    else:
        teacher = load_file(score_path(testbed, args.influence, "val"), testbed, "val")
    magnitude = Magnitude.fit(fitted_on, teacher)
    if np.ptp(magnitude.influence) == 0:
        raise ValueError(f"{method}: expected scores that rise with the influence under {args.influence}, found none")
    return magnitude.predict(scores), inputs


def frozen_scores(testbed: Testbed, method: str, split: str, args: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """(scores of a method that takes no gradients of its own, hashes of what else they are made from)."""
    if method == RANDOM:
        return random_scores(len(testbed.query_captions(split)), testbed.images), {}
    if is_teacher(teacher := method.removesuffix(NEAREST)):
        scores = teacher_scores(testbed, teacher, split)
        if teacher == method:
            return scores, {}
        cosines = feature_scores(layout("emoji", NEIGHBOUR_FTYPE, testbed.data), split)
        return among_nearest(scores, cosines, round(NEIGHBOURS * scores.shape[1])), {}
    if method == TUNED:
        if args.checkpoint is None:
            raise ValueError("tuned: expected --checkpoint with it, found none")
        scores = tuned_scores(layout("emoji", args.ftype, testbed.data), args.checkpoint, split)
        return scores, {"checkpoint": sha256_file(args.checkpoint)}
    return feature_scores(layout("emoji", method, testbed.data), split), {}


def score_name(method: str, args: argparse.Namespace) -> str:
    """What a method is called in score files and tables."""
    if args.name is not None:
        return args.name
    if method not in METHODS:
        name = f"{TUNED}-{args.ftype}" if method == TUNED else method
        return name if args.influence is None else f"{name}-influence"
    name = method if args.models == 1 else f"{method}-{args.models}models"
    if METHODS[method].score == "inner":
        return name
    if args.select:
        return f"{name}{SELECTED}"
    return name if args.ridge is None else f"{name}-ridge{args.ridge:g}"


def recipe_of(method: str, args: argparse.Namespace) -> Method:
    """A method on gradients with the settings that were asked for; `ValueError` if it then has no name of its own."""
    changed = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    if changed and args.name is None:
        raise ValueError(f"--{next(iter(changed))}: expected --name beside it, found none")
    return replace(METHODS[method], features=replace(METHODS[method].features, **changed))


def gradient_scores(testbed: Testbed, method: str, args: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """(scores, settings) of a method on gradients; collects what is missing."""
    recipe = recipe_of(method, args)
    for split in {args.split, "val"} if args.select else {args.split}:
        collect_method(testbed, recipe, args.models, split, cluster_from(args))
    settings: dict[str, Any] = {"method": method, "models": args.models, "features": asdict(recipe.features)}
    ridge = args.ridge
    if args.select and recipe.score != "inner":
        ridge, table = select_ridge(testbed, recipe, args.models, Judge(testbed, "val", args.halves))
        settings["validation"] = table
        print(*(f"{method}: ridge {row['ridge']:.3g}: LDS {row['lds']:+.4f} on validation" for row in table), sep="\n")
    scores, used = method_scores(testbed, recipe, args.models, args.split, ridge)
    return scores, settings | {"ridge": used}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.methods", __doc__)
    teachers = f"{', '.join(COLLECTED)}, {FINITE_STEP}{AT}<α>, {EXACT}{AT}<α>"
    known = f"{RANDOM}, {TUNED}, {teachers}, each also with {NEAREST}, {', '.join(METHODS)}, or feature types"
    parser.add_argument("methods", nargs="+", help=known)
    add_judge_flags(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="which queries (default: test)")
    parser.add_argument("--ftype", default="effnet+minilm", help="feature type of the tuned ranker")
    parser.add_argument("--checkpoint", type=Path, help="the tuned ranker")
    parser.add_argument("--influence", metavar="TEACHER", help="map the scores to the influence under this teacher")
    parser.add_argument("--models", type=int, default=1, help="models that TRAK and its kin average over (default: 1)")
    parser.add_argument("--ridge", type=float, help="λ (default: the paper's, or a share of the mean squared length)")
    parser.add_argument("--select", action="store_true", help="λ by the LDS of the validation queries")
    parser.add_argument("--halves", type=int, default=64, help="models that --select judges with (default: 64)")
    group = parser.add_argument_group("settings of a method on gradients (default: its own); with --name")
    group.add_argument("--layers", choices=get_args(LayerPattern), help="layers whose weights count")
    group.add_argument("--curvature", choices=("none", "diagonal", "ekfac"), help="what whitens the gradients")
    group.add_argument("--damping", type=float, help="its damping, as a share of a layer's mean eigenvalue")
    group.add_argument("--measure", choices=get_args(Measure), help="what is differentiated")
    group.add_argument("--bins", type=int, help="timestep bins")
    group.add_argument("--draws", type=int, help="draws of a training image in each bin")
    group.add_argument("--query_draws", type=int, help="draws of a query in each bin")
    group.add_argument("--only", type=int, help="the one bin that all draws are taken in")
    group.add_argument("--normalised", action="store_true", default=None, help="bins brought to length one")
    parser.add_argument("--name", help="what the scores are called, where one method is asked for")
    add_cluster_flags(parser)
    parser.add_argument("--dry_run", action="store_true", help="print what gradients will need; compute nothing")
    args = parser.parse_args(argv)
    if args.name is not None and len(args.methods) > 1:
        raise ValueError(f"--name: expected one method beside it, found {len(args.methods)}")
    testbed = testbed_from(args)
    if args.influence is not None:
        if not (is_teacher(args.influence) or score_path(testbed, args.influence, "val").is_file()):
            raise ValueError(
                f"--influence: expected one of {teachers} or what validation scores are called, found {args.influence}"
            )
        if given := [method for method in args.methods if is_teacher(method) or method in METHODS]:
            raise ValueError(f"--influence: expected features or a tuned ranker beside it, found {given[0]}")
    if args.ridge is not None and not args.ridge > 0:
        raise ValueError(f"--ridge: expected a positive number, found {args.ridge:g}")
    if args.select and args.ridge is not None:
        raise ValueError("--select: expected no --ridge beside it, found one")
    for method in args.methods:
        if args.dry_run:
            if method in METHODS:
                needed = foresee_method(testbed, recipe_of(method, args), args.models, args.split, args.workers or 1)
                print(*(f"{method}: {line}" for line in needed), sep="\n")
            continue
        command = f"python -m benchmark.methods {method} --mode {testbed.name}"
        if method in METHODS:
            scores, settings = gradient_scores(testbed, method, args)
            inputs: dict[str, str] = {}
        else:
            scores, inputs = influence_scores(testbed, method, args.split, args)
            settings = {"method": method} | ({"ftype": args.ftype} if method == TUNED else {})
            settings |= {"influence": args.influence} if args.influence is not None else {}
        path = save_scores(testbed, score_name(method, args), args.split, scores, settings, command, **inputs)
        print(f"{path}: {list(scores.shape)}")


if __name__ == "__main__":
    sys.exit(main())
