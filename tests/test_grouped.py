"""Influence of any source model: ⟨Δθ, ∇𝓛⟩ by autograd, the exact loss change of a small step, the output's change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import KINDS, tiny_pipeline

from abu import grouped
from abu.amortised import Examples
from abu.curvature import EKFAC, Curvature
from abu.draws import DrawConfig, draw
from abu.fisher import CurvatureConfig, fit_curvature
from abu.grouped import WeightGradients, first_order_scores, moved, second_order_scores, unlearning_steps
from abu.influence import mean_losses
from abu.layers import select_layers
from abu.second_order import random_signs

DRAWS, ONE = DrawConfig(bins=2, draws=2), DrawConfig(bins=1, draws=1)


@pytest.fixture(scope="module", params=KINDS)
def tiny(request, tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def curvature(tiny):
    source, training = tiny.source, tiny.training
    config = CurvatureConfig(draws=2)
    return fit_curvature(source.denoiser, source.schedule, training.latents, training.text, config, batch_size=4)


@pytest.fixture(scope="module")
def steps(tiny, curvature):
    """Δθ of one query."""
    gradients = WeightGradients(tiny.source.denoiser, tiny.source.schedule)(tiny.query, DRAWS)
    return unlearning_steps(curvature, gradients, 1e-6, 8)


def mean_training_losses(tiny) -> torch.Tensor:
    """𝓛(z, θ) [B] over all draws, by diffusers called directly: it has a graph to the weights."""
    ids, total = tiny.training.ids, torch.zeros(len(tiny.training.ids), dtype=torch.float64)
    for bin_index in range(DRAWS.bins):
        for index in range(DRAWS.draws):
            timesteps, noise = draw(DRAWS, "train", ids, 0, bin_index, index, (2, 4, 4))
            total = total + tiny.losses(noise.double(), timesteps)
    return total / (DRAWS.bins * DRAWS.draws)


def test_scores_are_the_product_of_the_step_with_autograds_gradient(tiny, steps):
    layers = select_layers(tiny.source.denoiser)
    weights = [p.requires_grad_() for layer in layers.values() for p in layer.parameters()]
    changes = []
    for name, layer in layers.items():
        matrix = steps[name][0]
        changes += [matrix[:, :-1], matrix[:, -1]] if layer.bias is not None else [matrix]
    expected = []
    for loss in mean_training_losses(tiny):
        slopes = torch.autograd.grad(loss, weights, retain_graph=True)
        expected.append(torch.stack([(c * g).sum() for c, g in zip(changes, slopes, strict=True)]).sum())
    gradients = WeightGradients(tiny.source.denoiser, tiny.source.schedule)
    found = first_order_scores(gradients, tiny.training, steps, DRAWS, batch_size=3)[0]
    assert found.abs().min() > 0
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9 * found.abs().max().item())


def test_scores_are_the_small_step_limit_of_the_loss_change(tiny, steps):
    source = tiny.source
    models = [source.denoiser, moved(source.denoiser, {name: matrix[0] for name, matrix in steps.items()})]
    before, after = mean_losses(models, source.schedule, tiny.training, DRAWS, progress=False)
    found = first_order_scores(WeightGradients(source.denoiser, source.schedule), tiny.training, steps, DRAWS)[0]
    torch.testing.assert_close(after - before, found, rtol=1e-2, atol=1e-3 * found.abs().max().item())
    forgotten = mean_losses(models, source.schedule, tiny.query, DRAWS, progress=False)
    assert forgotten[1] > forgotten[0]


def output_changes(tiny, steps) -> torch.Tensor:
    """‖f(θ0 + Δθ) − f(θ0)‖² / n [B], averaged over all draws."""
    training, source, total = tiny.training, tiny.source, []
    models = [source.denoiser, moved(source.denoiser, {name: matrix[0] for name, matrix in steps.items()})]
    for bin_index in range(DRAWS.bins):
        for timesteps, noise in training.draws(DRAWS, 0, bin_index):
            noisy, _ = source.schedule.noised(training.latents, noise, timesteps)
            before, after = (model(noisy, timesteps, training.text).sample for model in models)
            total.append((after - before).square().flatten(1).mean(1))
    return torch.stack(total).mean(0)


def test_squares_are_the_change_of_the_output_on_average_over_signs(tiny, steps):
    gradients = WeightGradients(tiny.source.denoiser, tiny.source.schedule)
    first = first_order_scores(gradients, tiny.training, steps, DRAWS)
    signs = 60
    found = []
    for seed in range(signs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                grouped, "random_signs", lambda draws, *place, s=seed: random_signs(replace(draws, seed=s), *place)
            )
            found.append(second_order_scores(gradients, tiny.training, steps, DRAWS, batch_size=5)[0] - first[0])
    squares = torch.stack(found)
    error = squares.std(0) / signs**0.5
    assert (squares > 0).all() and (error < 0.5 * squares.mean(0)).all()
    assert ((squares.mean(0) - output_changes(tiny, steps)).abs() < 4 * error).all()


def test_several_queries_are_scored_as_each_alone(tiny, curvature):
    """One draw is enough: queries meet in the last product only."""
    gradients = WeightGradients(tiny.source.denoiser, tiny.source.schedule)
    queries = Examples("test", [0, 1], tiny.training.latents[:2], tiny.training.text[:2])
    both = unlearning_steps(curvature, gradients(queries, ONE), 0.01, 8)
    scores = first_order_scores(gradients, tiny.training, both, ONE)
    alone = unlearning_steps(curvature, gradients(queries.rows(1, 2), ONE), 0.01, 8)
    torch.testing.assert_close(scores[1:], first_order_scores(gradients, tiny.training, alone, ONE))


def test_a_joint_attention_has_a_basis_for_each_block(tiny, curvature):
    assert isinstance(curvature, Curvature) and all(isinstance(group, EKFAC) for group in curvature.groups)
    assert len(curvature.groups) == (3 if tiny.kind == "flow" else 1)
