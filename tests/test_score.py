"""Scoring by command: first order against the exact loss change, captions and views, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_pipelines import CPU, POOLED, TOKENS, WIDTH, save_tiny

from abu import fisher, score
from abu.conditioning import pack_text
from abu.draws import DrawConfig
from abu.encoded import EncodedPictures
from abu.grouped import WeightGradients, first_order_scores
from abu.kronfluence_files import load_curvature
from abu.layers import select_layers
from abu.pipelines import load_pipeline
from fastgda.core import load_npz, verify_artifact

PICTURES, QUERIES = 7, 2
SMALL = ["--timesteps", "2", "--query_draws", "4", "--captions", "2"]


def write_encoded(folder, kind, pictures, views, captions, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(pictures, captions, TOKENS, WIDTH, generator=generator)
    pooled = torch.randn(pictures, captions, POOLED, generator=generator) if kind == "flow" else None
    folder.mkdir()
    np.save(folder / "text_embeddings.npy", pack_text(tokens, pooled).numpy())
    np.save(folder / "latents.npy", torch.randn(views * pictures, 2, 4, 4, generator=generator).numpy())


@pytest.fixture(scope="module", params=["v_prediction", "flow"])
def world(request, tmp_path_factory):
    """A source, its encoded pictures and queries, and its factors."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "model", request.param)
    write_encoded(folder / "trainset", request.param, PICTURES, 2, 3, 0)
    write_encoded(folder / "queries", request.param, QUERIES, 1, 1, 1)
    flags = ["--source", str(folder / "model"), "--trainset", str(folder / "trainset")]
    assert fisher.main(["fit", *flags, "--draws", "2", "--output", str(folder / "factors")]) == 0
    return folder


def run(world, *more):
    flags = [f"--{name}={world / name}" for name in ("trainset", "queries")]
    flags += [f"--source={world / 'model'}", f"--curvature={world / 'factors'}", f"--output={world / 'scores.npz'}"]
    return score.main([*flags, *SMALL, *more])


def scores(world, *more):
    assert run(world, *more) == 0
    verify_artifact(world / "scores.npz")
    return load_npz(world / "scores.npz", ("influence", "ids", "queries"))


def test_both_orders_have_the_small_step_limit_of_the_exact_change(world, capsys):
    step = ["--images", "7", "--step", "1e-5"]
    changes = ("exact", "first-order", "second-order")
    exact, *orders = (scores(world, *step, "--change", name)["influence"] for name in changes)
    assert "query 1:" in capsys.readouterr().out
    for order in orders:
        assert order.shape == (QUERIES, PICTURES)
        assert min(np.corrcoef(row, other)[0, 1] for row, other in zip(order, exact, strict=True)) > 0.999
    assert not np.array_equal(*orders)


def test_captions_are_averaged_and_the_larger_view_counts(world):
    found = scores(world, "--query", "1", "--start", "2", "--stop", "6", "--change", "first-order")
    assert found["ids"].tolist() == [2, 3, 4, 5] and found["queries"].tolist() == [1]
    source = load_pipeline(world / "model", CPU)
    curvature = load_curvature(world / "factors").for_layers(select_layers(source.denoiser))
    config = score.ScoreConfig(timesteps=2, query_draws=4)
    steps = score.query_steps(source, curvature, EncodedPictures.open(world / "queries", "query"), [1], config)
    training, engine = EncodedPictures.open(world / "trainset"), WeightGradients(source.denoiser, source.schedule)
    draws = DrawConfig(2, 1)
    views = []
    for view in range(2):
        parts = [training.examples(range(2, 6), CPU, view=view, caption=caption) for caption in range(2)]
        views.append(torch.stack([first_order_scores(engine, part, steps, draws) for part in parts]).mean(0))
    expected = torch.stack(views).amax(0)
    np.testing.assert_allclose(found["influence"], expected.numpy(), rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert not torch.equal(views[0], expected) and not torch.equal(views[1], expected)


def test_settings_of_the_paper_are_the_defaults():
    coco, diffusion = (score.ScoreConfig(settings=name).resolved() for name in ("coco", "stable-diffusion"))
    assert (coco.images, coco.step, coco.timesteps, coco.captions, coco.query_draws) == (118_287, 0.01, 20, 5, 50_000)
    assert (diffusion.images, diffusion.step, diffusion.timesteps) == (400_000_000, 0.002, 10)
    assert score.ScoreConfig(settings="stable-diffusion", timesteps=5).resolved().timesteps == 5


def test_what_does_not_fit_is_refused(world, capsys):
    assert run(world, "--stop", "8") == 2
    assert "--start, --stop: expected a range within 0..7, found 0..8" in capsys.readouterr().err
    assert run(world, "--query", "2") == 2
    assert "expected ids 0..1, found 2" in capsys.readouterr().err
    assert run(world, "--step", "0") == 2
    assert "--step: expected a positive number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score.main(["--help"])
    assert "python -m abu.score --source data/coco/model.bin" in capsys.readouterr().out


def test_factors_of_another_source_are_refused(world, tmp_path, capsys):
    save_tiny(tmp_path / "other", "pixart")
    assert run(world, f"--source={tmp_path / 'other'}") == 2
    assert "curvature: expected factors of" in capsys.readouterr().err
