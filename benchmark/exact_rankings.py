"""Merges the pieces of exact influence into rankings: `.npz`, and the pickles that the paper's authors released.

    python -m abu.collect_exact all --split train --candidates data/emoji/nn_effnet_train.npz
    python -m benchmark.exact_rankings --split train      # data/emoji/exact/influence_train.npz and influence_train.pkl

A pickle holds {"random": {...}}. Where every query's influence is known on the whole training set: `rank` [Q, N] and
`influence` [Q, N], by training id. Where it is known on candidates: `influence_subset` [Q, K], in the order of the
query's candidates; `rank_influence_subset` [Q, K], their places in descending order of it; `rank` [Q, K], their ids in
that order.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from abu.collect_exact import folder_of
from abu.exact_collection import COMMAND, ExactConfig, ExactPlan, exact_plan, input_hashes
from abu.plan import Collection
from abu.testbed import SPLITS, Testbed, add_testbed_flags, testbed_from
from fastgda.core import (
    ROOT,
    command_line,
    command_parser,
    load_npz,
    manifest_path,
    read_manifest,
    require_file,
    write_manifest,
)
from fastgda.rankings import Rankings, save_rankings, save_released, top


def load_influence(collection: Collection, plan: ExactPlan) -> np.ndarray:
    """τ [Q, K] float32, in the order of each query's candidates; `ValueError` if a piece is missing or damaged."""
    found = np.full(plan.lists.shape, np.nan, np.float32)
    places = [_places(plan, query) for query in range(plan.queries)] if plan.lists.strides[0] else [_places(plan, 0)]
    for piece in tqdm(plan.influence(), desc="pieces", unit="piece"):
        arrays = load_npz(collection.path(piece), ("query", "image", "change"), f"{COMMAND} influence")
        change = arrays["change"].max(axis=1)
        for query in np.unique(arrays["query"]):
            mine = arrays["query"] == query
            ids, order = places[int(query) % len(places)]
            found[query, order[np.searchsorted(ids, arrays["image"][mine])]] = change[mine]
    bad = ~np.isfinite(found).all(axis=1)
    if bad.any():
        raise ValueError(f"{collection.folder}: expected finite influence, found NaN for query {int(np.argmax(bad))}")
    return found


def _places(plan: ExactPlan, query: int) -> tuple[np.ndarray, np.ndarray]:
    """(candidates of a query in ascending order, their places in its list)."""
    order = np.argsort(plan.lists[query], kind="stable")
    return plan.lists[query][order], order


def recorded_plan(
    testbed: Testbed, split: str, folder: Path | None = None, candidates: Path | None = None
) -> tuple[Collection, ExactConfig, ExactPlan]:
    """The collection of a split's queries with its settings and plan; `ValueError` if it was made from other files."""
    collection = Collection(folder_of(testbed, split, folder))
    require_file(manifest_path(collection.folder), f"{COMMAND} all --split {split} --mode {testbed.name}")
    manifest = read_manifest(collection.folder)
    config = ExactConfig.of(manifest["config"])
    if config.candidates.candidates is not None:
        listed = candidates or ROOT / config.candidates.candidates
        config = replace(config, candidates=replace(config.candidates, candidates=listed))
    plan = exact_plan(testbed, config)
    now = input_hashes(testbed, config)
    changed = [name for name, value in now.items() if value not in manifest["inputs"].values()]
    if changed:
        raise ValueError(f"{changed[0]}: expected the file that the pieces were made from, found another")
    return collection, config, plan


def has_all_images(config: ExactConfig) -> bool:
    """Whether every query's influence is known on the whole training set."""
    return config.candidates.candidates is None and config.candidates.subset == 1


def full_influence(testbed: Testbed, split: str, step: float | None = None) -> np.ndarray:
    """τ [Q, N] float32 of a split's queries, by training id, from its folder or, where a step α is asked for, from that
    folder's neighbour of this name; `ValueError` if it is known on candidates only or was made with another step.
    """
    folder = None
    if step is not None:
        folder = folder_of(testbed, f"{split}@{step:g}")
        made_by = f"{COMMAND} all --split {split} --mode {testbed.name} --step {step:g} --folder {folder}"
        require_file(manifest_path(folder), made_by)
    collection, config, plan = recorded_plan(testbed, split, folder)
    if step not in (None, config.unlearning.step):
        raise ValueError(f"{collection.folder}: expected pieces of step {step:g}, found {config.unlearning.step:g}")
    if not has_all_images(config):
        raise ValueError(
            f"{collection.folder}: expected influence on all {testbed.images} training images, found it on "
            f"{plan.lists.shape[1]} candidates of each query; collect it without --candidates and --subset"
        )
    return load_influence(collection, plan)


def merge(testbed: Testbed, split: str, folder: Path | None, candidates: Path | None, out: Path) -> list[Path]:
    """Writes both files of a split and returns their paths."""
    collection, config, plan = recorded_plan(testbed, split, folder, candidates)
    settings = read_manifest(collection.folder)["config"]
    influence = load_influence(collection, plan)
    order = top(influence)
    rank = np.take_along_axis(plan.lists, order.astype(np.int64), 1)
    paths = [out / f"influence_{split}.npz", out / f"influence_{split}.pkl"]
    save_rankings(paths[0], Rankings(rank, np.take_along_axis(influence, order, 1)))
    if has_all_images(config):
        save_released(paths[1], rank=rank, influence=influence)
    else:
        save_released(paths[1], rank=rank, influence_subset=influence, rank_influence_subset=order.astype(np.int64))
    for path in paths:
        write_manifest(path, settings, command="python -m benchmark.exact_rankings")
    return paths


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.exact_rankings", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--folder", type=Path, help="folder of the pieces (default: that of the split)")
    parser.add_argument("--candidates", type=Path, help="the file of the candidates, where it has been moved")
    parser.add_argument("--output", type=Path, help="folder of the rankings (default: exact/ beside the data)")
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    for path in merge(testbed, args.split, args.folder, args.candidates, args.output or testbed.data / "exact"):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
