"""What a run records: curves, mAP(L), a table of retrievals; with Weights & Biases, where it is installed, offline."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import LEVELS, planted, write_planted

from fastgda.recipes import TrainConfig
from fastgda.tracking import Tracker
from fastgda.trainer import RETRIEVED, Trainer

train = importlib.import_module("train")
SMALL = TrainConfig(hidden_sizes=(), out_feat_dim=8, epochs=2, batch_size=9000)


class Recorder:
    """Keeps what a tracker is given."""

    def __init__(self) -> None:
        self.curves: list[tuple] = []
        self.tables: list[tuple] = []

    def log(self, step, values):
        self.curves.append((step, values))

    def log_table(self, step, name, columns, rows):
        self.tables.append((step, name, columns, rows))


def test_curves_and_retrievals_are_recorded(tmp_path: Path):
    images, splits = planted()
    recorder = Recorder()
    data = images, splits["train"], splits["val"]
    options = {"levels": LEVELS, "run_dir": tmp_path, "device": torch.device("cpu")}
    trainer = Trainer(SMALL, *data, tracker=recorder, **options)  # type: ignore[arg-type]
    trainer.run()
    assert [step for step, _ in recorder.curves] == [2, 4]
    assert {"train/loss", "scale", *(f"validation/mAP({level})" for level in LEVELS)} == set(recorder.curves[0][1])
    assert [step for step, *_ in recorder.tables] == [0, 2, 4]
    _, name, columns, rows = recorder.tables[-1]
    assert (name, columns[-1], len(rows)) == ("validation/retrievals", "teacher's rank", math.prod(RETRIEVED))
    last = trainer.history[-1]["score"] == trainer.best
    scores = (trainer.ranker.embed_queries(splits["val"].features) @ trainer.ranker.embed(images).T).numpy()
    for query, position, image, score, rank in rows if last else []:
        order = np.argsort(-scores[int(query)])
        assert image == order[int(position) - 1] and score == pytest.approx(scores[int(query), int(image)])
        assert splits["val"].rankings.rank[int(query), int(rank) - 1] == image


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_resumed_run_is_the_same_one(tmp_path: Path, offline: None):
    """Until it is closed, and unless its configuration is another."""

    def start(**config: object) -> Tracker:
        tracker = Tracker("test", "name", {"epochs": (2, 3), **config}, tmp_path)
        if not config:
            tracker.log(1, {"train/loss": 1.0})
        return tracker

    killed = start()
    killed.run.finish()
    resumed = start()
    assert resumed.run.id == killed.run.id
    resumed.close()
    another = start()
    another.run.finish()
    changed = start(lr=0.1)
    assert len({killed.run.id, another.run.id, changed.run.id}) == 3
    changed.close()
    assert not (tmp_path / "wandb.json").exists()


def test_a_run_stays_on_this_machine_offline(tmp_path: Path, offline: None):
    write_planted(tmp_path / "data")
    command = ["--ftype", "planted", "--data_dir", str(tmp_path / "data"), "--topk_values", *map(str, LEVELS)]
    places = ["--output", str(tmp_path / "r.pth"), "--run_dir", str(tmp_path / "run")]
    size = ["--hidden_sizes", "--out_feat_dim", "8", "--no-residual", "--epochs", "1", "--val_every", "1"]
    assert train.main([*command, *places, *size, "--wandb", "--wandb_project", "test"]) == 0
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb")) and list(folder.rglob("retrievals*.table.json"))
