"""Fits a ranker's credit rule on the validation queries and measures on the test queries how well it is calibrated.

    python -m benchmark.credit --checkpoint weights/emoji_effnet+minilm.pth --ftype effnet+minilm

Writes <checkpoint stem>.credit.json beside the checkpoint, for bundles and the demo, and results/credit/<ftype>.json:

magnitude      is the teacher's score what the ranker's score predicts? pairs of all test queries and images in ten
               groups by prediction, the most influential apart; R^2, slope of observed on predicted (calibrated: 1)
concentration  1 / sum_i p_i^2 for the credits p of the first images: how many images share the influence
shares         mean absolute error of creators' shares against the teacher's own, beside rules that know less
intervals      for how many queries they hold all of the teacher's shares; and how many of all shares, of those above
               LARGE, and of the largest one that was predicted
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from fastgda.attributor import Untuned, all_scores
from fastgda.core import (
    ROOT,
    command_line,
    command_parser,
    environment,
    relative,
    require_file,
    save_json,
    sha256_file,
    write_manifest,
)
from fastgda.credit import DEPTH, LEVEL, UNKNOWN, Credit, coded, credit_path, dense, teacher_shares
from fastgda.dataset import Layout, Split, layout, load_images, load_split
from fastgda.flags import add_flags, from_flags
from fastgda.index import Embedder
from fastgda.index.source import COSINE
from fastgda.metrics import standard_error
from fastgda.ranker import load_ranker
from fastgda.rankings import top
from feature_extraction.readers import split_path

LARGE = 0.3
"""Shares above this one are counted apart."""
TOP_SHARES = (1e-4, 1e-3, 1e-2, 0.1)
"""Groups by prediction: the highest so many of all pairs, beside which the rest is cut into equal groups."""


@dataclass(frozen=True)
class CreditConfig:
    """What to fit and to judge."""

    checkpoint: Path = ROOT / "weights" / "emoji_effnet+minilm.pth"
    """The ranker."""
    ftype: str = "effnet+minilm"
    """Feature that it was trained on."""
    mode: Literal["emoji", "emoji-mini"] = "emoji"
    """Testbed."""
    data_dir: Path | None = None
    """Folder of training set and rankings; by default data/<mode>."""
    feature_dir: Path | None = None
    """Folder of the features; by default <data_dir>/feats/<ftype>."""
    by: Literal["creator", "set"] = "creator"
    """Column of the training set that says whose an image is."""
    depth: int = DEPTH
    """Images that can have credit."""
    output: Path | None = None
    """Report; by default results/credit/<ftype>.json."""

    @property
    def paths(self) -> Layout:
        """Where the artifacts are."""
        return layout(self.mode, self.ftype, self.data_dir, self.feature_dir)

    @property
    def rule(self) -> Path:
        """The fitted rule."""
        return credit_path(self.checkpoint)


def magnitude_report(credit: Credit, scores: np.ndarray, influence: np.ndarray) -> dict[str, Any]:
    """How the teacher's scores lie about their prediction, over all pairs."""
    predicted, observed = credit.magnitude.predict(scores).ravel(), influence.ravel().astype(np.float64)
    order = np.argsort(-predicted, kind="stable")
    edges = [0, *(round(share * len(order)) for share in TOP_SHARES)]
    edges = [*edges, *np.linspace(edges[-1], len(order), 7)[1:].astype(int).tolist()]
    groups = []
    for start, stop in pairwise(edges):
        if stop - start < 2:
            continue
        rows = order[start:stop]
        error = observed[rows].std(ddof=1) / np.sqrt(len(rows))
        groups.append(
            {"pairs": len(rows), "predicted": predicted[rows].mean(), "observed": observed[rows].mean(), "error": error}
        )
    slope, offset = np.polyfit(predicted, observed, 1) if np.ptp(predicted) else (float("nan"), observed.mean())
    residual = ((observed - predicted) ** 2).mean() / observed.var()
    return {"r_squared": 1 - residual, "slope": slope, "offset": offset, "groups": groups}


def concentration(credits: np.ndarray) -> np.ndarray:
    """[Q] effective number of images among credits [Q, depth]; 0 where none is positive."""
    credits = np.maximum(credits, 0)
    total, squares = credits.sum(1), (credits**2).sum(1)
    return np.where(squares > 0, total**2 / np.where(squares > 0, squares, 1), 0)


def shares_report(estimates: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, Any]:
    """Mean absolute error [shares of a whole] of each rule's shares [Q, creators], mean and error over queries."""
    report = {}
    for name, found in estimates.items():
        error = np.abs(found - truth).mean(1)
        report[name] = {
            "absolute_error": error.mean(),
            "standard_error": standard_error(error[:, None])[0],
            "correlation": np.corrcoef(found.ravel(), truth.ravel())[0, 1] if np.ptp(found) else 0.0,
        }
    return report


def intervals_report(low: np.ndarray, high: np.ndarray, shares: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """How often the intervals from `low` to `high` of the predicted `shares` hold the teacher's; all [Q, creators]."""
    held = (low <= truth) & (truth <= high)
    largest = np.take_along_axis(held, shares.argmax(1)[:, None], 1)
    return {
        "level": LEVEL,
        "all_of_a_query": held.all(1).mean(),
        "shares": held.mean(),
        "large_shares": held[truth > LARGE].mean() if (truth > LARGE).any() else None,
        "largest_predicted": largest.mean(),
        "mean_width": (high - low).mean(),
    }


class Judge:
    """The test queries with the teacher's shares, and what each rule says of them."""

    def __init__(self, split: Split, codes: np.ndarray, names: list[str], depth: int) -> None:
        self.split, self.codes, self.names, self.depth = split, codes, names, depth
        self.truth = teacher_shares(split.rankings, codes, len(names), depth)

    def estimates(self, credit: Credit, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shares, sigma, credits of the first images) of all queries."""
        ids = top(scores, self.depth)
        firsts = np.take_along_axis(scores, ids, 1)
        pairs = [credit.estimate(row, self.codes[some], len(self.names)) for row, some in zip(firsts, ids, strict=True)]
        shares, sigma = (np.stack(parts) for parts in zip(*pairs, strict=True))
        return shares, sigma, credit.magnitude.predict(firsts)

    def counts(self, scores: np.ndarray) -> np.ndarray:
        """Shares where every one of the first images counts alike."""
        owners = self.codes[top(scores, self.depth)]
        return np.stack([np.bincount(row, minlength=len(self.names)) for row in owners]) / self.depth


def report(config: CreditConfig) -> tuple[Credit, dict[str, Any]]:
    """The fitted rule and its report."""
    paths = config.paths
    images = load_images(paths)
    ranker = load_ranker(config.checkpoint, in_dim=images.shape[1])
    table = require_file(split_path(paths.data_dir, "data"))
    owners = pq.read_table(table, columns=["id", config.by]).sort_by("id")[config.by]
    creators = [name or UNKNOWN for name in owners.to_pylist()]
    val, test = (load_split(paths, split, images) for split in ("val", "test"))
    codes, names = coded(creators)
    judge = Judge(test, codes, names, min(config.depth, len(images)))
    fitted: dict[str, tuple[Credit, np.ndarray]] = {}
    judged: dict[str, tuple[Embedder, str]] = {
        "tuned": (ranker, sha256_file(config.checkpoint)),
        "untuned": (Untuned(), COSINE),
    }
    for name, (embedder, identity) in judged.items():
        words = f"{val.queries} validation queries, by {config.by}"
        scores = all_scores(embedder, val.features, images)
        credit = Credit.fit(scores, val.rankings, creators, depth=config.depth, ranker=identity, fitted_on=words)
        fitted[name] = credit, all_scores(embedder, test.features, images)
    credit, scores = fitted["tuned"]
    shares, sigma, credits = judge.estimates(credit, scores)
    low, high = credit.interval(shares, sigma)
    estimates = {
        "tuned, influence predicted": shares,
        "tuned, images counted": judge.counts(scores),
        "untuned, influence predicted": judge.estimates(*fitted["untuned"])[0],
        "untuned, images counted": judge.counts(fitted["untuned"][1]),
        "images in the training set": np.tile(np.bincount(codes) / len(codes), (test.queries, 1)),
        "mean of the validation queries": np.tile(
            teacher_shares(val.rankings, codes, len(names), judge.depth).mean(0), (test.queries, 1)
        ),
    }
    assert test.rankings.score is not None
    effective = concentration(credits), concentration(test.rankings.score[:, : judge.depth].astype(np.float64))
    return credit, {
        "queries": test.queries,
        "images": len(images),
        "creators": names,
        "depth": judge.depth,
        "magnitude": {
            name: magnitude_report(rule, values, dense(test.rankings, len(images)))
            for name, (rule, values) in fitted.items()
        },
        "concentration": {
            "predicted": effective[0].mean(),
            "teacher": effective[1].mean(),
            "correlation": np.corrcoef(*effective)[0, 1],
        },
        "shares": shares_report(estimates, judge.truth),
        "intervals": intervals_report(low, high, shares, judge.truth) | {"width_in_sigma": credit.width},
    }


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.credit", __doc__)
    add_flags(parser, CreditConfig)
    config = from_flags(CreditConfig, parser.parse_args(argv))
    credit, found = report(config)
    credit.save(config.rule)
    command = f"python -m benchmark.credit --checkpoint {relative(config.checkpoint)} --ftype {config.ftype}"
    write_manifest(config.rule, config, command=command, inputs={"ranker": credit.ranker})
    output = config.output or ROOT / "results" / "credit" / f"{config.ftype}.json"
    save_json(output, {"config": asdict(config), **found, "environment": environment()})
    for name, row in found["magnitude"].items():
        print(f"{name:8s} R^2 {row['r_squared']:.3f}, observed = {row['offset']:.3f} + {row['slope']:.3f} predicted")
    for name, row in found["shares"].items():
        print(f"{name:31s} error of a share {row['absolute_error']:.4f} ± {row['standard_error']:.4f}")
    held = found["intervals"]["all_of_a_query"]
    print(f"intervals hold all of the teacher's shares for {held:.1%} of queries ({LEVEL:.0%} wanted)")
    print(f"{config.rule}, {output}")


if __name__ == "__main__":
    sys.exit(main())
