"""One table of untuned features, tuned rankers and baselines against the teacher's rankings (paper, section 4.1)."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgda.core import atomic_path, environment, manifest_path, read_manifest, relative, save_json, sha256_file
from fastgda.dataset import Layout, Split, default_levels, load_images, load_split, normalise
from fastgda.metrics import Retrieval, chance, check_levels, embedding_retrieval, score_retrieval, standard_error
from fastgda.ranker import load_ranker
from fastgda.rankings import load_rankings, popularity


@dataclass(frozen=True)
class Candidate:
    """One feature type, and rankers trained on it."""

    ftype: str
    paths: Layout
    checkpoints: tuple[Path, ...] = ()


def evaluate(
    candidates: Sequence[Candidate],
    split: str,
    levels: Sequence[int] | None = None,
    *,
    rank_file: Path | None = None,
    train_rank_file: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """A JSON document with one row per method; `ValueError` naming the file where artifacts disagree.

    `levels`: values of L; the mode's where absent. `rank_file`: ground truth of `split`; the layout's own where absent.
    The popularity baseline needs the training rankings and is left out where they do not exist.
    """
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        images = load_images(candidate.paths)
        queries = load_split(candidate.paths, split, images, rank_file)
        levels = tuple(levels or default_levels(candidate.paths.mode, len(images)))
        check_levels(levels, queries.rankings.candidates, len(images))
        rows += _feature_rows(candidate, images, queries, levels, device)
    assert levels is not None
    truth = rank_file or candidates[0].paths.ranking(split)
    count, total = queries.queries, len(images)
    train_file = train_rank_file or candidates[0].paths.ranking("train")
    if train_file.is_file():
        score = popularity(load_rankings(train_file, total), total).astype(np.float32)
        found = score_retrieval(np.broadcast_to(score, (count, total)), queries.rankings, levels)
        rows.append(_row("popularity", None, found))
    elif train_rank_file is not None:
        raise ValueError(f"{train_file}: expected the training rankings, found nothing")
    rows.append({"method": "chance", "mAP": {str(level): chance(level, total) for level in levels}})
    reliability = teacher_reliability(truth)
    if reliability:
        rows.append({"method": "teacher's reliability", "mAP": reliability})
    return {
        "split": split,
        "queries": count,
        "images": total,
        "levels": list(levels),
        "ground_truth": {"file": relative(truth), "sha256": sha256_file(truth)},
        "rows": rows,
        "environment": environment(),
    }


def teacher_reliability(rank_file: Path) -> dict[str, float]:
    """L -> mAP(L) of one run of the teacher against another, from the ranking's manifest; empty where not measured."""
    if not manifest_path(rank_file).is_file():
        return {}
    return {str(level): float(value) for level, value in read_manifest(rank_file).get("reliability", {}).items()}


def save_report(document: dict[str, Any], output: Path) -> tuple[Path, Path]:
    """Writes `output` with the suffixes .csv (one line per method and L) and .json (everything)."""
    table, full = output.with_suffix(".csv"), output.with_suffix(".json")
    with atomic_path(table) as temporary, open(temporary, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["method", "ftype", "checkpoint", "L", "mAP", "standard_error", "overlap", "spearman"])
        for row in document["rows"]:
            for level, value in row["mAP"].items():
                extra = [row.get(name, {}).get(level, "") for name in ("standard_error", "overlap")]
                named = [row["method"], row.get("ftype") or "", row.get("checkpoint", ""), level]
                writer.writerow([*named, value, *extra, row.get("spearman", "")])
    save_json(full, document)
    return table, full


def format_table(document: dict[str, Any]) -> str:
    """The report as text: mAP(L) ± standard error of each method."""
    levels = [str(level) for level in document["levels"]]
    lines = [["method", "feature", *(f"mAP({level})" for level in levels), "Spearman"]]
    for row in document["rows"]:
        errors = row.get("standard_error", {})
        cells = [_cell(row["mAP"].get(level), errors.get(level)) for level in levels]
        lines.append([row["method"], row.get("ftype") or "", *cells, _cell(row.get("spearman"), None)])
    for row in document["rows"]:
        if "gain" in row:
            cells = [_cell(row["gain"][level], row["gain_standard_error"][level]) for level in levels]
            lines.append(["tuned - untuned", row["ftype"], *cells, ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    head = f"{document['split']} split: {document['queries']} queries, {document['images']} training images"
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([head, *text])


def _feature_rows(
    candidate: Candidate, images: np.ndarray, queries: Split, levels: tuple[int, ...], device: torch.device | str
) -> list[dict[str, Any]]:
    untuned = embedding_retrieval(
        torch.from_numpy(normalise(queries.features)).to(device),
        torch.from_numpy(normalise(images)).to(device),
        queries.rankings,
        levels,
    )
    rows = [_row("untuned", candidate.ftype, untuned)]
    for checkpoint in candidate.checkpoints:
        ranker = load_ranker(checkpoint, device, in_dim=images.shape[1])
        trained_on = ranker.info.get("ftype", candidate.ftype)
        if trained_on != candidate.ftype:
            raise ValueError(f"{checkpoint}: expected a ranker of {candidate.ftype}, found one of {trained_on}")
        embedded = ranker.embed_queries(queries.features), ranker.embed(images)
        tuned = embedding_retrieval(*embedded, queries.rankings, levels)
        row = _row("tuned", candidate.ftype, tuned)
        gain = tuned.precision - untuned.precision
        row |= {
            "checkpoint": relative(checkpoint),
            "checkpoint_sha256": sha256_file(checkpoint),
            "gain": _by_level(levels, gain.mean(axis=0)),
            "gain_standard_error": _by_level(levels, standard_error(gain)),
        }
        rows.append(row)
    return rows


def _row(method: str, ftype: str | None, found: Retrieval) -> dict[str, Any]:
    assert found.overlap is not None and found.spearman is not None
    return {
        "method": method,
        "ftype": ftype,
        "mAP": _by_level(found.levels, found.precision.mean(axis=0)),
        "standard_error": _by_level(found.levels, standard_error(found.precision)),
        "overlap": _by_level(found.levels, found.overlap.mean(axis=0)),
        "spearman": _finite(found.spearman.mean()),
        "per_query": {str(level): found.precision[:, at].tolist() for at, level in enumerate(found.levels)},
    }


def _by_level(levels: Sequence[int], values: np.ndarray) -> dict[str, float | None]:
    return {str(level): _finite(value) for level, value in zip(levels, values, strict=True)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
