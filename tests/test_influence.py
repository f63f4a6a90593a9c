"""Exact influence against its definition, and the amortised form against exact influence in the small-step limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from tiny_teacher import tiny_teacher

from abu.amortised import Examples, GradientEngine, QueryMatrix, Sketch, score_block
from abu.diffusion_loss import example_losses
from abu.draws import DrawConfig, draw
from abu.fisher import CurvatureConfig, fit_curvature
from abu.influence import mean_losses, query_gradient, unlearn

DRAWS = DrawConfig(bins=2, draws=2)


@pytest.fixture(scope="module")
def tiny():
    return tiny_teacher()


@pytest.fixture(scope="module")
def curvature(tiny):
    return tiny.curvature()


def exact(tiny, curvature, step):
    gradient = query_gradient(tiny.denoiser, tiny.schedule, curvature, tiny.query, DRAWS)
    models = [tiny.denoiser, unlearn(tiny.denoiser, curvature, gradient, step, 24)]
    before, after = mean_losses(models, tiny.schedule, tiny.training, DRAWS)
    return (after - before) / step


def amortised(tiny, curvature, sketch, batch_size=24):
    engine = GradientEngine(tiny.denoiser, tiny.schedule, curvature, Sketch.of(curvature, sketch))
    queries = QueryMatrix.of(engine(tiny.query, DRAWS, 0))
    blocks = [
        score_block(queries, engine(tiny.training.rows(start, start + batch_size), DRAWS, 0))
        for start in range(0, 24, batch_size)
    ]
    return torch.cat([plain for plain, _ in blocks], 1)[0], torch.cat([terms for _, terms in blocks], 2)[:, 0]


def test_amortised_is_the_small_step_limit_of_exact(tiny, curvature):
    plain, _ = amortised(tiny, curvature, curvature.eigenvalues.numel())
    small, large = exact(tiny, curvature, 1e-6), exact(tiny, curvature, 3.0)
    assert spearmanr(plain, small).statistic > 0.999
    ratio = small / plain.double()
    assert ratio.std() < 1e-3 * ratio.mean().abs()
    assert ratio.mean() > 0
    # a step that is no small perturbation leaves the limit, so the agreement above says something
    assert (large / plain.double()).std() > 10 * ratio.std()


def test_the_diagonal_fisher_takes_the_same_place(tiny):
    config = CurvatureConfig(kind="diagonal")
    training = tiny.training
    diagonal = fit_curvature(tiny.denoiser, tiny.schedule, training.latents, training.text, config).shared()
    plain, _ = amortised(tiny, diagonal, diagonal.eigenvalues.numel())
    assert spearmanr(plain, exact(tiny, diagonal, 1e-6)).statistic > 0.999


def test_factors_of_another_model_are_refused(tiny, curvature):
    wide = Sketch.of(curvature, 48)
    other = replace(curvature, names=("a", *curvature.names[1:]))
    with pytest.raises(ValueError, match=r"expected factors of down_blocks.*, found a \(16, 6\)"):
        GradientEngine(tiny.denoiser, tiny.schedule, other, wide)
    with pytest.raises(ValueError, match="expected factors of 14 layers, found 13"):
        query_gradient(tiny.denoiser, tiny.schedule, replace(curvature, sizes=(16,) * 13), tiny.query, DRAWS)


def test_unlearning_raises_the_loss_of_the_query_itself(tiny, curvature):
    gradient = query_gradient(tiny.denoiser, tiny.schedule, curvature, tiny.query, DRAWS)
    moved = unlearn(tiny.denoiser, curvature, gradient, 1e-3, 24)
    before, after = mean_losses([tiny.denoiser, moved], tiny.schedule, tiny.query, DRAWS)
    assert after > before


def test_scores_do_not_depend_on_the_batch(tiny, curvature):
    whole, pieces = amortised(tiny, curvature, 48), amortised(tiny, curvature, 48, batch_size=5)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_normalised_terms_are_cosines_of_whitened_gradients(tiny, curvature):
    _, terms = amortised(tiny, curvature, curvature.eigenvalues.numel())
    engine = GradientEngine(
        tiny.denoiser, tiny.schedule, curvature, Sketch.of(curvature, curvature.eigenvalues.numel())
    )
    for bin_index in range(DRAWS.bins):
        gradients = [
            curvature.rotated_gradients(engine.output_gradients(examples, DRAWS, 0, bin_index), examples.text)
            / curvature.damped().sqrt()
            for examples in (tiny.query, tiny.training)
        ]
        expected = torch.cosine_similarity(gradients[0].flatten(1), gradients[1].flatten(1))
        torch.testing.assert_close(terms[bin_index].double(), expected.double(), rtol=1e-3, atol=1e-5)


def test_sketched_products_are_unbiased(tiny, curvature):
    gradients = torch.randn(2, *curvature.eigenvalues.shape, generator=torch.Generator().manual_seed(0))
    white = gradients.flatten(1) / curvature.damped().sqrt().flatten()
    truth = (white[0] @ white[1]).item()
    estimates = torch.stack([torch.prod(Sketch.of(curvature, 48, seed)(gradients), 0).sum() for seed in range(300)])
    assert estimates.std() > 0
    assert abs(estimates.mean().item() - truth) < 4 * (estimates.std() / 300**0.5).item()


def test_sketch_size_must_divide_the_weights(curvature):
    with pytest.raises(ValueError, match="expected a divisor"):
        Sketch.of(curvature, 11)


def test_losses_follow_the_definition_and_a_subset_gets_the_same(tiny):
    expected = torch.zeros(24, dtype=torch.float64)
    for bin_index in range(DRAWS.bins):
        for index in range(DRAWS.draws):
            for row in range(24):
                timesteps, noise = draw(DRAWS, "train", [row], 0, bin_index, index, (2, 4, 4))
                noisy, target = tiny.schedule.noised(tiny.training.latents[row : row + 1], noise.double(), timesteps)
                text = tiny.training.text[row : row + 1]
                expected[row] += example_losses(tiny.denoiser, noisy, target, timesteps, text).item() / 4
    found = mean_losses([tiny.denoiser], tiny.schedule, tiny.training, DRAWS, batch_size=7)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    rows = [20, 3]
    subset = Examples("train", rows, tiny.training.latents[rows], tiny.training.text[rows])
    part = mean_losses([tiny.denoiser], tiny.schedule, subset, DRAWS)[0]
    torch.testing.assert_close(part, found[rows], rtol=1e-6, atol=0)
