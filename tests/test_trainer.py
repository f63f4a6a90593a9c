"""Trainer: the loss of a step against a slow loop, kill and resume, the best state kept, planted problems solved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import LEVELS, planted

from fastgda.dataset import Split, normalise
from fastgda.metrics import chance, embedding_retrieval
from fastgda.rankings import labels
from fastgda.recipes import RECIPES, TrainConfig
from fastgda.trainer import Trainer

CPU = torch.device("cpu")
SMALL = TrainConfig(
    hidden_sizes=(16,), out_feat_dim=8, sampling="blocks", query_block=16, image_block=64, epochs=3, outlier_prob=0.3
)


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, dict[str, Split]]:
    """The planted problem."""
    return planted()


def make_trainer(problem, config, folder, **options) -> Trainer:
    images, splits = problem
    chosen = {"levels": LEVELS, "device": CPU, **options}
    return Trainer(config, images, splits["train"], splits["val"], run_dir=folder, **chosen)


@pytest.mark.parametrize("sampling", ["pairs", "blocks"])
def test_a_step_has_the_loss_of_a_slow_loop(problem, tmp_path, sampling):
    images, splits = problem
    config = replace(SMALL, sampling=sampling, batch_size=200, dropout=0.0)
    trainer = make_trainer(problem, config, tmp_path)
    step = trainer.sampler.step(0)
    ranker = trainer.ranker.double().eval()
    table = labels(splits["train"].rankings, len(images))
    if step.pairs is None:
        places = [(row, column) for row in range(len(step.queries)) for column in range(len(step.images))]
    else:
        places = list(zip(*step.pairs, strict=True))
    total = 0.0
    weights = step.weight.ravel()
    for (row, column), weight in zip(places, weights, strict=True):
        query, image = step.queries[row], step.images[column]
        pair = torch.from_numpy(np.stack([splits["train"].features[query], images[image]])).double()
        left, right = ranker.mlp(pair)
        cosine = torch.nn.functional.cosine_similarity(left, right, dim=0)
        modelled = torch.sigmoid(ranker.scale * cosine + ranker.bias).item()
        target = float(table[query, image])
        total -= weight * (target * np.log(modelled) + (1 - target) * np.log(1 - modelled))
    trainer.ranker.float().train()
    trainer._update(step)
    assert trainer.loss_sum.item() == pytest.approx(total / weights.sum(), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "cosine", "random_subset_size": 40, "subset": "fixed"},
        {"sampling": "pairs", "batch_size": 2048, "epochs": 2, "input_norm": "batch"},
        {"ema": 0.9, "random_subset_size": 40, "loss": "ordinal"},
    ],
)
def test_killed_and_resumed_is_the_identical_run(problem, tmp_path, change):
    config = replace(SMALL, **change)
    whole = make_trainer(problem, config, tmp_path / "whole")
    expected = whole.run().state_dict()
    for steps in (1, whole.sampler.steps_per_epoch, None):
        torch.manual_seed(steps or 0)
        part = make_trainer(problem, config, tmp_path / "parts")
        found = part.run(stop_after_steps=steps).state_dict()
    assert part.history == whole.history
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_interrupted_run_goes_on_from_its_last_checkpoint(problem, tmp_path, monkeypatch):
    expected = make_trainer(problem, SMALL, tmp_path / "whole").run().state_dict()
    broken = make_trainer(problem, SMALL, tmp_path / "parts")
    draw = broken.sampler.step

    def interrupted(number):
        if number == 14:
            raise KeyboardInterrupt
        return draw(number)

    monkeypatch.setattr(broken.sampler, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run(checkpoint_seconds=0)
    resumed = make_trainer(problem, SMALL, tmp_path / "parts")
    assert resumed.step == 14
    found = resumed.run().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoint_of_another_run_is_refused(problem, tmp_path):
    make_trainer(problem, SMALL, tmp_path).run(stop_after_steps=1)
    with pytest.raises(
        ValueError,
        match=r"checkpoint\.pt: expected a checkpoint of this run, found another: config\.lr is 0\.001, wanted 0\.5",
    ):
        make_trainer(problem, replace(SMALL, lr=0.5), tmp_path)
    with pytest.raises(ValueError, match="found another: data is '"):
        make_trainer(planted(seed=1), SMALL, tmp_path)
    images, splits = problem
    train = splits["train"]
    scored = replace(train, rankings=replace(train.rankings, score=train.rankings.score * 2))
    with pytest.raises(ValueError, match="found another: data is '"):
        make_trainer((images, splits | {"train": scored}), SMALL, tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"{path}: expected a checkpoint, found a damaged file"):
        make_trainer(problem, SMALL, tmp_path)


def test_best_validation_state_is_kept_and_patience_stops(problem, tmp_path):
    config = replace(SMALL, epochs=30, lr=0.3, patience=3)
    trainer = make_trainer(problem, config, tmp_path)
    ranker = trainer.run()
    scores = [entry["score"] for entry in trainer.history]
    assert len(scores) < 31 and len(scores) - 1 - int(np.argmax(scores)) == 3
    images, splits = problem
    queries = ranker.embed_queries(splits["val"].features)
    found = embedding_retrieval(queries, ranker.embed(images), splits["val"].rankings, LEVELS)
    assert found.precision.mean() == pytest.approx(max(scores), abs=1e-6)


def test_average_of_the_weights(problem, tmp_path):
    """The first weights, then decay * average + (1 - decay) * weights; what is validated is the average."""
    trainer = make_trainer(problem, replace(SMALL, ema=0.8, lr=0.1), tmp_path)
    expected: dict[str, torch.Tensor] = {}
    for number in range(4):
        trainer._update(trainer.sampler.step(number))
        for name, value in trainer.ranker.state_dict().items():
            expected[name] = 0.8 * expected[name] + 0.2 * value if name in expected else value.clone()
    trainer._validate(0, None)
    for name, value in trainer.best_state.items():
        torch.testing.assert_close(value, expected[name])
        assert not torch.equal(value, trainer.ranker.state_dict()[name])


def test_diverging_run_is_an_error(problem, tmp_path):
    config = replace(SMALL, lr=1e30)
    with pytest.raises(ValueError, match="the loss became"):
        make_trainer(problem, config, tmp_path).run()


@pytest.mark.parametrize("option", [{"bf16": True}, {"input_norm": "batch"}, {"loss": "ordinal", "sampling": "pairs"}])
def test_options_train(problem, tmp_path, option):
    trainer = make_trainer(problem, replace(SMALL, lr=1e-2, **option), tmp_path)
    trainer.run()
    losses = [entry["loss"] for entry in trainer.history[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("loss", "hidden_sizes"),
    [("bce", ()), ("bce", (64,)), ("listwise", ()), ("listwise", (64,)), ("mse", ()), ("ordinal", ()), ("score", ())],
)
def test_planted_problem_is_solved(problem, tmp_path, loss, hidden_sizes):
    """Scientific floor: the influence is a linear map away from the feature; chance and untuned are far below."""
    images, splits = problem
    config = replace(
        RECIPES["best"],
        loss=loss,
        # the regression of scores needs the scale at which cosines span their few deviations
        init_scale=-3.0 if loss == "score" else -8.0,
        hidden_sizes=hidden_sizes,
        residual=bool(hidden_sizes),
        input_norm="none",
        out_feat_dim=16,
        dropout=0.0,
        query_block=30,
        image_block=240,
        epochs=80,
        lr=1e-2,
        val_every=20,
    )
    ranker = make_trainer(problem, config, tmp_path).run()
    test = splits["test"]
    tuned = embedding_retrieval(ranker.embed_queries(test.features), ranker.embed(images), test.rankings, LEVELS)
    unit = torch.from_numpy(normalise(test.features)), torch.from_numpy(normalise(images))
    untuned = embedding_retrieval(*unit, test.rankings, LEVELS)
    assert (tuned.precision.mean(axis=0) > 0.5).all()
    assert (tuned.precision.mean(axis=0) > 2 * untuned.precision.mean(axis=0)).all()


def test_untrained_random_embedding_is_at_chance(problem):
    _, splits = problem
    random = np.random.default_rng(0)
    queries, images = (torch.from_numpy(random.standard_normal((count, 8))) for count in (30, 600))
    found = embedding_retrieval(queries, images, splits["test"].rankings, LEVELS)
    expected = np.array([chance(level, 600) for level in LEVELS])
    error = found.precision.std(axis=0, ddof=1) / np.sqrt(30)
    assert (np.abs(found.precision.mean(axis=0) - expected) < 4 * error).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs: expected a positive number, found 0"),
        ({"lr": float("nan")}, "--lr: expected a positive number"),
        ({"outlier_prob": 1.0}, "--outlier_prob"),
        ({"weight_decay": -1.0}, "--weight_decay"),
        ({"ema": 1.0}, "--ema: expected a decay below 1"),
        ({"random_subset_size": -1}, "--random_subset_size: expected zero or more"),
        ({"loss": "listwise", "sampling": "pairs"}, "--loss listwise: expected --sampling blocks"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TrainConfig(), **change)


def test_levels_beyond_the_ranking_are_refused_before_training(problem, tmp_path):
    with pytest.raises(ValueError, match=r"every L of mAP\(L\)"):
        make_trainer(problem, SMALL, tmp_path, levels=(601,))
