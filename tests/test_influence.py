"""Exact influence against its definition, and the amortised form against exact influence in the small-step limit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from tiny_teacher import tiny_teacher
from torch import nn

from abu.amortised import Examples, MeanGradients, QueryMatrix, Sketch, score_block, sketched
from abu.curvature import Curvature
from abu.diffusion_loss import example_losses
from abu.draws import DrawConfig, draw
from abu.fisher import CurvatureConfig, fit_curvature
from abu.influence import mean_losses
from abu.layers import select_layers
from abu.second_order import TrainingTerms
from abu.unlearn import UnlearnConfig, moved_model, natural_step, query_gradient, still_weights, unlearn

DRAWS = DrawConfig(bins=2, draws=2)


@pytest.fixture(scope="module")
def tiny():
    return tiny_teacher()


@pytest.fixture(scope="module")
def curvature(tiny):
    return tiny.curvature()


@pytest.fixture(scope="module")
def factors(curvature):
    return Curvature((curvature,), 1)


def exact(tiny, curvature, step):
    factors = Curvature((curvature,), 1)
    gradient = query_gradient(tiny.denoiser, tiny.schedule, factors, tiny.query, DRAWS)
    models = [tiny.denoiser, moved_model(tiny.denoiser, natural_step(factors, gradient, step / 24))]
    before, after = mean_losses(models, tiny.schedule, tiny.training, DRAWS)
    return (after - before) / step


def amortised(tiny, curvature, sketch, batch_size=24):
    gradients, sketch = MeanGradients(tiny.denoiser, tiny.schedule), Sketch.of(curvature, sketch)

    def vectors(examples):
        found = gradients(examples, DRAWS, 0)
        return torch.stack([sketched(g, examples.text, curvature, sketch) for g in found])

    queries = QueryMatrix.of(vectors(tiny.query))
    blocks = [
        score_block(queries, vectors(tiny.training.rows(start, start + batch_size)))
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
    def gradient(other):
        query_gradient(tiny.denoiser, tiny.schedule, Curvature((other,), 1), tiny.query, DRAWS)

    with pytest.raises(ValueError, match="expected factors of 14 layers, found a besides"):
        gradient(replace(curvature, names=("a", *curvature.names[1:])))
    with pytest.raises(ValueError, match=r"expected factors of down_blocks.*\(16, 6\), found .* \(16, 5\)"):
        gradient(replace(curvature, eigenvalues=curvature.eigenvalues[:, :5]))


def test_unlearning_raises_the_loss_of_the_query_itself(tiny, factors):
    losses = [mean_losses([tiny.denoiser], tiny.schedule, tiny.query, DRAWS)[0]]
    for steps in (1, 3):
        config = UnlearnConfig(step=1e-3, steps=steps, query_draws=2)
        change = unlearn(tiny.denoiser, tiny.schedule, factors, tiny.query, config, 24)
        losses.append(mean_losses([moved_model(tiny.denoiser, change)], tiny.schedule, tiny.query, DRAWS)[0])
    assert losses[0] < losses[1] < losses[2]


def slow_unlearn(tiny, curvature, steps, size):
    """Autograd on the mean loss at the moved weights and F⁻¹ written out, a step at a time."""
    model = copy.deepcopy(tiny.denoiser)
    layers = select_layers(model)
    start = {name: layer.weight.clone() for name, layer in layers.items()}
    config = DrawConfig(draws=1)
    for step in range(steps):
        losses = []
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        for bin_index in range(10):
            timesteps, noise = draw(config, "test", [0], step, bin_index, 0, (2, 4, 4))
            noisy, target = tiny.schedule.noised(tiny.query.latents, noise.double(), timesteps)
            losses.append(example_losses(model, noisy, target, timesteps, tiny.query.text)[0])
        gradients = torch.autograd.grad(torch.stack(losses).mean(), [layer.weight for layer in layers.values()])
        values = curvature.eigenvalues.split(curvature.sizes)
        for layer, gradient, basis, s in zip(layers.values(), gradients, curvature.basis_out, values, strict=True):
            inverse = 1 / (s + 0.1 * s.mean())
            kron = torch.kron(basis, curvature.basis_in)
            natural = kron @ (inverse.flatten() * (kron.mT @ gradient.flatten()))
            layer.weight = nn.Parameter(layer.weight.detach() + size * natural.view_as(gradient))
    return {name: layer.weight.detach() - start[name] for name, layer in layers.items()}


def test_steps_follow_the_gradient_at_the_moved_weights(tiny, curvature, factors):
    config = UnlearnConfig(step=5.0, steps=2, query_draws=1, images=10)
    expected = slow_unlearn(tiny, curvature, 2, 0.5)
    newton = replace(config, step=0.5, newton=True)
    found, same, once = (
        unlearn(tiny.denoiser, tiny.schedule, factors, tiny.query, c, 24)
        for c in (config, newton, replace(config, steps=1))
    )
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(same[name], found[name], rtol=1e-12, atol=0)
        assert not torch.allclose(found[name], 2 * once[name], rtol=1e-3)


def test_a_step_lost_in_the_weights_precision_is_noticed(tiny):
    model = copy.deepcopy(tiny.denoiser).float()
    small = {name: 1e-12 * layer.weight for name, layer in select_layers(model).items()}
    assert still_weights(model, small) == 1
    assert still_weights(model, {name: 1e11 * change for name, change in small.items()}) == 0


def test_a_query_whose_loss_is_not_finite_is_named(tiny, factors):
    broken = replace(tiny.query, latents=tiny.query.latents * torch.nan)
    with pytest.raises(ValueError, match="test query 0: expected a finite loss"):
        query_gradient(tiny.denoiser, tiny.schedule, factors, broken, DRAWS)


@pytest.mark.parametrize("field", ["step", "steps", "query_draws", "images"])
def test_unlearning_wants_positive_numbers(field):
    with pytest.raises(ValueError, match=f"--{field}: expected a positive number, found 0"):
        replace(UnlearnConfig(), **{field: 0})  # type: ignore[arg-type]


def test_scores_do_not_depend_on_the_batch(tiny, curvature):
    whole, pieces = amortised(tiny, curvature, 48), amortised(tiny, curvature, 48, batch_size=5)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_normalised_terms_are_cosines_of_whitened_gradients(tiny, curvature):
    _, terms = amortised(tiny, curvature, curvature.eigenvalues.numel())
    engine = MeanGradients(tiny.denoiser, tiny.schedule)
    for bin_index in range(DRAWS.bins):
        gradients = [
            curvature.rotated_gradients(engine.of_bin(examples, DRAWS, 0, bin_index), examples.text)
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


def test_what_is_not_finite_is_refused_with_the_examples_name(tiny):
    """Row 3 of the batch is image 8."""
    latents = tiny.training.latents.clone()
    latents[8] = torch.nan
    batch = replace(tiny.training, latents=latents).rows(5, 12)
    engine = MeanGradients(tiny.denoiser, tiny.schedule)
    for compute in (
        lambda: engine(batch, DRAWS, 0),
        lambda: mean_losses([tiny.denoiser], tiny.schedule, batch, DRAWS, progress=False),
        lambda: TrainingTerms(tiny.denoiser, tiny.schedule)(batch, DRAWS, 0),
    ):
        with pytest.raises(ValueError, match=r"train example 8, timestep bin 0: expected a finite (loss|gradient)"):
            compute()


def test_a_gradient_that_overflows_is_refused_though_its_loss_is_finite(tiny, monkeypatch):
    engine = MeanGradients(tiny.denoiser, tiny.schedule)
    compute = engine.gradients

    def overflow(*inputs):
        gradients, losses = compute(*inputs)
        gradients[2, 1, 0] = torch.inf
        return gradients, losses

    monkeypatch.setattr(engine, "gradients", overflow)
    with pytest.raises(ValueError, match="train example 2, timestep bin 1: expected a finite gradient"):
        engine.of_bin(tiny.training, DRAWS, 0, 1)


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
