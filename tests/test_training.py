"""The training loop: a run that was cut is continued bit for bit; data order; clear refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from abu import training
from abu.training import LoopConfig, batch_rows, learning_rate, train

CPU = torch.device("cpu")
TARGETS = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


def loss(model, rows, generator):
    noise = 0.1 * torch.randn(len(rows), 3, generator=generator)
    return (model(TARGETS[rows] + noise) - TARGETS[rows]).square().mean()


def new_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(3, 3)


def test_a_run_cut_twice_equals_one_that_was_not(tmp_path):
    config = LoopConfig(steps=30, batch_size=4, warmup=5)
    whole, pieces = new_model(), new_model()
    expected = train(whole, loss, 10, config, tmp_path / "whole", device=CPU)
    for _ in range(3):
        found = train(pieces, loss, 10, config, tmp_path / "pieces", device=CPU, stop_after_steps=12)
        if len(found) < 30:
            pieces = new_model()
    assert found == expected
    assert expected[-1] < expected[0]
    for mine, theirs in zip(pieces.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("after", [False, True])
def test_a_step_that_was_interrupted_is_not_applied_twice(tmp_path, after):
    config = LoopConfig(steps=6, batch_size=4, warmup=1)
    whole, cut = new_model(), new_model()
    expected = train(whole, loss, 10, config, tmp_path / "whole", device=CPU)
    apply = torch.optim.AdamW.step
    calls: list[None] = []

    def interrupted(optimizer, *args):
        calls.append(None)
        if len(calls) < 4 or after:
            apply(optimizer, *args)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cut, loss, 10, config, tmp_path / "cut", device=CPU, checkpoint_seconds=0)
    resumed = new_model()
    assert train(resumed, loss, 10, config, tmp_path / "cut", device=CPU) == expected
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_kept_weights_are_the_average(tmp_path):
    model = new_model()
    train(model, loss, 10, LoopConfig(steps=20, batch_size=4, warmup=1), tmp_path, device=CPU)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(model.weight, saved["averaged"]["weight"])
    assert not torch.equal(model.weight, saved["model"]["weight"])


def test_another_configuration_is_refused(tmp_path):
    train(new_model(), loss, 10, LoopConfig(steps=2, batch_size=4), tmp_path, device=CPU)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: expected configuration"):
        train(new_model(), loss, 10, LoopConfig(steps=3, batch_size=4), tmp_path, device=CPU)


def test_a_diverging_run_says_so_and_keeps_the_last_good_checkpoint(tmp_path):
    config = LoopConfig(steps=4, batch_size=4)
    train(new_model(), loss, 10, config, tmp_path, device=CPU, stop_after_steps=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def bad(model, rows, generator):
        return loss(model, rows, generator) * float("nan")

    with pytest.raises(ValueError, match="the loss became nan at step 2"):
        train(new_model(), bad, 10, config, tmp_path, device=CPU)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_every_epoch_visits_every_example_once():
    config = LoopConfig(steps=10, batch_size=4)
    rows = np.concatenate([batch_rows(step, 10, config) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])


def test_the_rate_warms_up_and_falls():
    config = LoopConfig(steps=100, learning_rate=1.0, warmup=10)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.03


def test_a_run_needs_steps():
    with pytest.raises(ValueError, match="must be positive"):
        LoopConfig(steps=0)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_the_processor_has_it(tmp_path, monkeypatch, caplog, native):
    monkeypatch.setattr(training, "computes_bfloat16", lambda device: native)
    config = LoopConfig(steps=5, batch_size=4, warmup=1)
    exact = train(new_model(), loss, 10, config, tmp_path / "exact", device=CPU)
    with caplog.at_level("WARNING"):  # other libraries set the root logger's level
        found = train(new_model(), loss, 10, replace(config, bf16=True), tmp_path / "found", device=CPU)
    assert (found == exact) is not native
    assert ("computing in float32 instead" in caplog.text) is not native
