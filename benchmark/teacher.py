"""Merges first-order scores, those of infinitely small steps, into rankings, and measures how reliable they are.

    python -m feature_extraction.extract --ftype effnet     # features that the paper's candidates are taken from
    python -m abu.collect scores
    python -m benchmark.teacher            # writes data/emoji/influence_{normalised,plain}_*.npz

The project ships the plain ones, for the paper's recipe; its own teacher is that of `benchmark.finite_step`.
Reliability of a teacher: two runs with independent noise on both sides (training images and queries), mAP(L) of one
against the top L of the other. It is the ceiling of every mAP(L) of a student; the rankings pool both runs, so their
own reliability is higher than what is printed. It is printed for growing numbers of passes, and bin by bin: the mean
over queries of the correlation between the runs within each timestep bin, which says which timesteps deserve draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from abu.plan import Collection
from abu.stages import folder_of, pass_counts, score_plan, scores_folder, whole_passes
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from fastgda.core import (
    command_line,
    command_parser,
    environment,
    load_npy,
    load_npz,
    read_manifest,
    save_json,
    write_manifest,
)
from fastgda.dataset import default_levels, layout, load_images, normalise
from fastgda.metrics import average_precision, chance, spearman, standard_error
from fastgda.rankings import Rankings, from_scores, save_rankings, top

TEACHERS = {"normalised": "influence_normalised", "plain": "influence_plain"}
TOP, OTHERS = 1024, 1024
"""What is kept for a training query but by the plain teacher: the first of its ranking, and a sample of the rest."""
NEIGHBOURS, NEIGHBOUR_FTYPE = 10_000 / 118_287, "effnet"
"""The paper's candidates, which the plain teacher keeps: this share of the training set, nearest to the query in an
image feature (the paper takes DINO)."""


def load_scores(testbed: Testbed, passes: int, key: str) -> np.ndarray:
    """One array of the scores made from `passes` passes, its pieces joined along the training images (last axis)."""
    folder = Collection(scores_folder(testbed))
    made_by = "python -m abu.collect scores"
    return np.concatenate(
        [load_npz(folder.path(p), (key,), made_by)[key] for p in score_plan(testbed, passes)], axis=-1
    )


def training_candidates(scores: np.ndarray, first: int, others: int, seed: int) -> Rankings:
    """For each query the `first` highest scores and `others` drawn from the rest, in the teacher's order."""
    random = np.random.default_rng(seed)
    full = from_scores(scores)
    first = min(first, scores.shape[1] // 2)
    others = min(others, scores.shape[1] - first)
    columns = np.concatenate(
        [
            np.tile(np.arange(first), (len(scores), 1)),
            np.sort([first + random.choice(scores.shape[1] - first, others, replace=False) for _ in scores], axis=1),
        ],
        axis=1,
    )
    assert full.score is not None
    return Rankings(np.take_along_axis(full.rank, columns, 1), np.take_along_axis(full.score, columns, 1))


def rankings_of(scores: np.ndarray, split: str) -> Rankings:
    """Rankings of a split's queries by scores [Q, N], put in units of each query's spread: of a training query the
    first and a sample of the rest, of the others all.
    """
    scores = scores / scores.std(1, keepdims=True)
    return training_candidates(scores, TOP, OTHERS, seed=0) if split == "train" else from_scores(scores)


def neighbour_candidates(scores: np.ndarray, queries: np.ndarray, images: np.ndarray, count: int) -> Rankings:
    """For each query the `count` images nearest to it (cosine; features [Q, D] and [N, D]), in the teacher's order."""
    nearest = top(normalise(queries) @ normalise(images).T, count)
    order = top(np.take_along_axis(scores, nearest, 1))
    return Rankings(np.take_along_axis(nearest, order, 1))


def reliability(first: np.ndarray, second: np.ndarray, levels: tuple[int, ...]) -> dict:
    """mAP(L) of `second` [Q, N] against the top L of `first`, both ways averaged; Spearman over all images."""
    ways = [
        average_precision(mine, from_scores(truth, max(levels)).rank, levels)
        for mine, truth in ((first, second), (second, first))
    ]
    precision = (ways[0] + ways[1]) / 2
    order = spearman(first, from_scores(second).rank)
    return {
        "mAP": dict(zip(map(str, levels), precision.mean(0).round(4).tolist(), strict=True)),
        "standard_error": dict(zip(map(str, levels), standard_error(precision).round(4).tolist(), strict=True)),
        "spearman": round(float(order.mean()), 4),
    }


def run_scores(testbed: Testbed, passes: int, teacher: str, tests: int) -> np.ndarray:
    """Scores [counts, runs, tests, N] of the test queries, each run from its own draws; counts as in `pass_counts`."""
    if teacher == "plain":
        return load_scores(testbed, passes, "plain_runs")[:, :, -tests:]
    terms = load_scores(testbed, passes, "normalised_terms")[:, :, :, -tests:]
    weights = np.asarray(read_manifest(scores_folder(testbed))["config"]["bin_weights"], np.float32)
    return np.einsum("b,crbqn->crqn", weights, terms.astype(np.float32))


def measure(runs: np.ndarray, teacher: str, draws: list[int], levels: tuple[int, ...]) -> list[dict]:
    """Reliability of scores [counts, runs, tests, N], of which each run is made from so many draws per image."""
    rows = []
    for count, (first, second) in zip(draws[-len(runs) :], runs, strict=True):
        rows.append({"draws_per_run": count} | reliability(first, second, levels))
        print(f"{teacher:11s} {count:4d} draws per image and run: {rows[-1]['mAP']}, Spearman {rows[-1]['spearman']}")
    return rows


def bin_correlations(terms: np.ndarray) -> list[float]:
    """Mean over queries of the correlation between the two runs, for terms [runs, bins, tests, N]."""
    terms = terms - terms.mean(-1, keepdims=True, dtype=np.float32)
    terms /= np.linalg.norm(terms, axis=-1, keepdims=True)
    return (terms[0] * terms[1]).sum(-1).mean(-1).round(4).tolist()


def merge(testbed: Testbed, passes: int, out: Path) -> dict:
    """Writes the rankings of every split and returns the report."""
    config = read_manifest(folder_of(testbed))["config"]
    scoring = read_manifest(scores_folder(testbed))["config"]
    counts = {split: len(testbed.query_captions(split)) for split in SPLITS}
    levels = default_levels("emoji", testbed.images)
    draws = [config["bins"] * config["training_draws"] * count for count in pass_counts(passes)]
    report: dict = {"queries": counts, "passes": passes, "teachers": {}}
    report["chance"] = {str(level): round(chance(level, testbed.images), 4) for level in levels}
    for teacher, name in TEACHERS.items():
        rows = measure(run_scores(testbed, passes, teacher, counts["test"]), teacher, draws, levels)
        report["teachers"][teacher] = rows
        scores, start = load_scores(testbed, passes, teacher), 0
        for split, count in counts.items():
            part = scores[start : start + count]
            start += count
            if split != "train":
                rankings = from_scores(part)
            elif teacher == "plain":
                paths = layout("emoji", NEIGHBOUR_FTYPE, testbed.data)
                queries, images = load_npy(paths.features(split), (count, None)), load_images(paths)
                rankings = neighbour_candidates(part, queries, images, round(NEIGHBOURS * len(images)))
            else:
                rankings = training_candidates(part, TOP, OTHERS, seed=0)
            if teacher == "plain":
                rankings = Rankings(rankings.rank)
            path = out / f"{name}_{split}.npz"
            save_rankings(path, rankings)
            settings = {"teacher": teacher, "passes": passes} | config | scoring
            extra = {"reliability": rows[-1]["mAP"], "reliability_draws": rows[-1]["draws_per_run"]}
            write_manifest(path, settings, command="python -m benchmark.teacher", **extra)
            print(f"{path}: {rankings.queries} queries, {rankings.candidates} images each")
    terms = load_scores(testbed, passes, "normalised_terms")[-1, :, :, -counts["test"] :]
    report["bin_correlations"] = bin_correlations(terms)
    print("correlation of the runs by timestep bin:", report["bin_correlations"])
    return report


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.teacher", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--passes", type=int, help="the scores made from so many passes (default: all whole passes)")
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    report = merge(testbed, args.passes or whole_passes(testbed), testbed.data)
    name = "first_order.json" if testbed.name == "emoji" else f"first_order_{testbed.name}.json"
    report |= {"mode": testbed.name, "environment": environment()}
    save_json(testbed.root / "results/teacher" / name, report)


if __name__ == "__main__":
    sys.exit(main())
