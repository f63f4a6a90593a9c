"""One run by two processes, as torchrun starts them, against the same run by one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from planted import LEVELS, write_planted

from fastgda.core import ROOT
from fastgda.distributed import Group
from fastgda.ranker import Dropout, load_ranker
from fastgda.recipes import TrainConfig
from fastgda.trainer import Trainer

train = importlib.import_module("train")


def arguments(folder, name: str) -> list[str]:
    return [
        *["--ftype", "planted", "--data_dir", str(folder / "data"), "--topk_values", *map(str, LEVELS)],
        *["--output", str(folder / f"{name}.pth"), "--run_dir", str(folder / name), "--device", "cpu"],
        *["--hidden_sizes", "16", "16", "--out_feat_dim", "8", "--dropout", "0.3", "--ema", "0.5"],
        *["--query_block", "15", "--image_block", "100", "--epochs", "3", "--val_every", "2"],
    ]


def test_two_processes_train_as_one(tmp_path):
    """Loss, validation and weights agree to float32's accuracy, dropout included, with shares of unequal size."""
    write_planted(tmp_path / "data")
    assert train.main(arguments(tmp_path, "one")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, str(ROOT / "train.py"), *arguments(tmp_path, "two")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("validation mAP(L)") == 1
    one, two = (json.loads((tmp_path / name / "log.json").read_text())["history"] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        if left["loss"] is not None:
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        if "score" in left:
            assert right["score"] == pytest.approx(left["score"], abs=1e-3)
    states = [load_ranker(tmp_path / f"{name}.pth").state_dict() for name in ("one", "two")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 7, 8])
def test_shares_are_a_partition_in_order(rows):
    shares = [np.arange(rows)[Group(rank, 4).share(rows)] for rank in range(4)]
    assert np.concatenate(shares).tolist() == list(range(rows))


def test_shares_of_a_mask_are_the_mask_of_the_whole_batch():
    """And on the CPU torch's own."""
    dropout, hidden = Dropout(0.3), torch.randn(7, 5)

    def drop(layer, batch=None, rows=slice(None)):
        dropout.batch = batch
        torch.manual_seed(0)
        return layer(hidden[rows])

    whole = drop(dropout)
    assert torch.equal(whole, drop(torch.nn.Dropout(0.3))) and 0 < (whole == 0).sum() < 35
    shares = [drop(dropout, (rows.start, 7), rows) for rows in (slice(0, 4), slice(4, 7))]
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize(
    ("config", "message"),
    [(TrainConfig(input_norm="batch"), "--input_norm batch"), (TrainConfig(compile=True), "--compile")],
)
def test_what_needs_one_process_is_refused(tmp_path, config, message):
    images, splits = write_planted(tmp_path / "data", queries=20)
    with pytest.raises(ValueError, match=f"{message}: expected one process, found 2"):
        Trainer(
            config,
            images,
            splits["train"],
            splits["val"],
            levels=LEVELS,
            run_dir=tmp_path,
            device=torch.device("cpu"),
            group=Group(0, 2),
        )
