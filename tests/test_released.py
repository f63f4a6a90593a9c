"""The released layout in small: its checkpoint, training on its files, and memory far below queries x images."""

from __future__ import annotations

import importlib
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from released_layout import FTYPE, ReleasedSize, write_released
from torch.utils._python_dispatch import TorchDispatchMode

from fastgda.dataset import Split, hold_out, layout, load_images, load_split
from fastgda.ranker import load_ranker
from fastgda.rankings import Rankings, load_rankings, save_rankings
from fastgda.recipes import TrainConfig
from fastgda.trainer import Trainer

SMALL = ReleasedSize(images=700, dim=12, train_queries=60, candidates=80, test_queries=9, hidden=3, width=16)
TALL = ReleasedSize(images=20_000, dim=6, train_queries=400, candidates=50, test_queries=1, hidden=2, width=8)

train = importlib.import_module("train")
evaluation = importlib.import_module("eval")


def test_released_files_train_and_the_released_checkpoint_is_optimal(tmp_path):
    write_released(tmp_path, SMALL)
    common = ["--mode", "coco", "--ftype", FTYPE, "--data_dir", str(tmp_path), "--topk_values", "10", "40"]
    options = ["--recipe", "paper", "--epochs", "2", "--batch_size", "500", "--val_queries", "10"]
    sizes = ["--hidden_sizes", "16", "16", "16", "--out_feat_dim", "16"]
    files = ["--output", str(tmp_path / "ours.pth"), "--run_dir", str(tmp_path / "run")]
    assert train.main([*common, *options, *sizes, *files]) == 0
    checkpoints = [str(tmp_path / "weights" / f"{FTYPE}.pth"), str(tmp_path / "ours.pth")]
    assert evaluation.main([*common, "--checkpoint", *checkpoints, "--output", str(tmp_path / "report")]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    optimal, ours = (row for row in rows if row["method"] == "tuned")
    assert min(optimal["mAP"].values()) > 0.999 and optimal["spearman"] > 0.999
    assert max(ours["mAP"].values()) < 0.9
    assert load_ranker(checkpoints[1]).config == replace(load_ranker(checkpoints[0]).config, dropout=0.1)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": "pairs", "batch_size": 4096},
        {"sampling": "blocks", "random_subset_size": 20, "subset": "resampled", "loss": "score", "target": "score"},
        {"sampling": "blocks", "random_subset_size": 20, "subset": "fixed", "loss": "listwise"},
    ],
)
def test_training_allocates_nothing_of_queries_times_images(tmp_path, change):
    """Features are mapped, rankings are integers [Q, K]: below one byte for each of 400 x 20,000 pairs."""
    write_released(tmp_path, TALL)
    paths = layout("coco", FTYPE, tmp_path)
    if change.get("loss") == "score":
        with_scores(paths.ranking("train"))
    pairs = TALL.train_queries * TALL.images
    config = TrainConfig(hidden_sizes=(8,), out_feat_dim=4, epochs=1, query_block=64, image_block=256, **change)

    def run(folder: str) -> tuple[np.ndarray, tuple[Split, Split]]:
        images = load_images(paths)
        splits = hold_out(load_split(paths, "train", images), 5)
        trainer = Trainer(config, images, *splits, levels=(10,), run_dir=tmp_path / folder, device=torch.device("cpu"))
        trainer.run(stop_after_steps=3)
        return images, splits

    run("first")  # what libraries import and cache at their first use is not the training's
    tracemalloc.start()
    try:
        with Largest() as largest:
            images, splits = run("second")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < pairs
    assert largest.elements < pairs / 40
    assert splits[0].rankings.rank.itemsize <= 4 and not images.flags.owndata


def with_scores(path) -> None:
    """Converts a pickle of ranks to .npz with scores."""
    rankings = load_rankings(path, TALL.images)
    score = np.broadcast_to(-np.arange(TALL.candidates, dtype=np.float32), rankings.rank.shape)
    save_rankings(path.with_suffix(".npz"), Rankings(rankings.rank, score))
