"""Projected gradients against autograd on the parameters, and the kernels against closed forms, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_layers import NAMES, TinyLayers, tiny_layers

from abu.amortised import Examples
from abu.diffusion_loss import example_losses
from abu.draws import DrawConfig
from abu.fisher import CurvatureConfig, fit_curvature
from abu.influence import all_draws
from benchmark.kernels import Kernel, das_scores
from benchmark.projected import FeatureConfig, ProjectedGradients, Projector

DRAWS = DrawConfig(bins=2, draws=2)
WHOLE = 100_000


@pytest.fixture(scope="module")
def world() -> TinyLayers:
    return tiny_layers(images=11)


def examples_of(world: TinyLayers) -> Examples:
    return Examples("train", list(range(len(world.latents))), world.latents, world.text)


def features(world, examples=None, **settings):
    config = FeatureConfig(**{"projection": WHOLE, "bins": 2} | settings)
    engine = ProjectedGradients(world.denoiser, world.schedule, config)
    return engine(examples or examples_of(world), DRAWS)


def by_autograd(world, measure):
    """Gradients [draws, B, weights] of f, layer by layer, weights before biases, and the losses [draws, B]."""
    examples = examples_of(world)
    parameters = [p for name in NAMES for p in world.denoiser.get_submodule(name).parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    rows, losses = [], []
    for timesteps, noise in all_draws(DRAWS, examples, 0):
        noisy, target = world.schedule.noised(examples.latents, noise, timesteps)
        output = world.denoiser(noisy, timesteps, examples.text).sample
        value = {
            "loss": example_losses(world.denoiser, noisy, target, timesteps, examples.text),
            "square": output.square().flatten(1).mean(1),
            "mean": output.flatten(1).mean(1),
        }[measure]
        gradients = [torch.autograd.grad(v, parameters, retain_graph=True) for v in value]
        rows.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients]))
        error = output if measure == "square" else output - target
        losses.append(error.square().flatten(1).mean(1).detach())
    world.denoiser.requires_grad_(False)
    return torch.stack(rows), torch.stack(losses)


@pytest.mark.parametrize("measure", ["loss", "square", "mean"])
def test_inner_products_are_those_of_whole_gradients(world, measure):
    rows, losses = by_autograd(world, measure)
    expected = rows.mean(0)
    found, residual = features(world, measure=measure)
    torch.testing.assert_close(found @ found.mT, expected @ expected.mT)
    torch.testing.assert_close(residual, losses.sqrt().mean(0))


def test_normalised_gradients_have_length_one_in_each_bin(world):
    rows, _ = by_autograd(world, "mean")
    expected = torch.nn.functional.normalize(rows.view(2, 2, *rows.shape[1:]).mean(1), dim=-1).mean(0)
    found, _ = features(world, measure="mean", normalised=True)
    torch.testing.assert_close(found @ found.mT, expected @ expected.mT)


def test_gradients_do_not_depend_on_the_batch(world):
    examples = examples_of(world)
    whole = features(world, projection=64)[0]
    parts = [features(world, examples.rows(low, low + 3), projection=64)[0] for low in range(0, 11, 3)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_whitened_products_are_influences(world, kind):
    curvature = fit_curvature(
        world.denoiser, world.schedule, world.latents, world.text, CurvatureConfig(kind, "all"), batch_size=8
    )
    rows = by_autograd(world, "loss")[0].mean(0)
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    place = 0
    for name in NAMES:
        for p in world.denoiser.get_submodule(name).parameters():
            pieces[name].append(rows[:, place : place + p.numel()].view(len(rows), len(p), -1))
            place += p.numel()
    gradients = {name: torch.cat(parts, -1) for name, parts in pieces.items()}
    natural = curvature.natural_gradients(gradients)
    expected = sum(natural[name].flatten(1) @ gradients[name].flatten(1).mT for name in NAMES)
    config = FeatureConfig(curvature=kind, projection=WHOLE, bins=2)
    engine = ProjectedGradients(world.denoiser, world.schedule, config, curvature)
    found, _ = engine(examples_of(world), DRAWS)
    torch.testing.assert_close(found @ found.mT, expected)


def test_the_projection_keeps_inner_products_on_average():
    vectors = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).double()
    exact, size = float(vectors[0] @ vectors[1]), 90
    projected = [Projector(1000, size, seed, torch.device("cpu"))(vectors) for seed in range(400)]
    found = np.array([float(rows[0] @ rows[1]) for rows in projected])
    spread = float(vectors[0].norm() * vectors[1].norm()) / np.sqrt(size)
    assert abs(found.mean() - exact) < 4 * spread / np.sqrt(len(found))
    assert 0.8 * spread < found.std() < 1.25 * spread


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_kernel_scores_and_leverage_are_the_closed_form(shape):
    random = np.random.default_rng(0)
    phi, queries = random.normal(size=shape), random.normal(size=(3, shape[1]))
    for ridge in (1e-3, 5.0):
        inverse = np.linalg.inv(phi.T @ phi + ridge * np.eye(shape[1]))
        kernel = Kernel(torch.from_numpy(phi))
        scores, leverage = queries @ inverse @ phi.T, np.diag(phi @ inverse @ phi.T)
        np.testing.assert_allclose(kernel.scores(torch.from_numpy(queries), ridge), scores, atol=1e-9)
        np.testing.assert_allclose(kernel.matrix(ridge), phi @ inverse, atol=1e-9)
        np.testing.assert_allclose(kernel.leverage(ridge), leverage, atol=1e-9)
        residual = random.random(shape[0])
        expected = (scores * residual / (1 - leverage)) ** 2
        found = das_scores(kernel, torch.from_numpy(queries), torch.from_numpy(residual), ridge)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_das_is_the_change_of_a_linear_models_output_without_an_image():
    """Ridge regression is linear in its weights: leaving an image out changes an output by exactly DAS's formula."""
    random = np.random.default_rng(1)
    phi, targets, query, ridge = random.normal(size=(20, 6)), random.normal(size=20), random.normal(size=(1, 6)), 0.3

    def output(rows):
        weights = np.linalg.solve(phi[rows].T @ phi[rows] + ridge * np.eye(6), phi[rows].T @ targets[rows])
        return (query @ weights)[0], targets - phi @ weights

    whole, residual = output(np.arange(20))
    expected = [(whole - output(np.delete(np.arange(20), i))[0]) ** 2 for i in range(20)]
    kernel = Kernel(torch.from_numpy(phi))
    found = das_scores(kernel, torch.from_numpy(query), torch.from_numpy(residual), ridge)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_gradients_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="expected finite numbers that are not all zero"):
        Kernel(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="ridge: expected a positive number, found 0"):
        Kernel(torch.ones(3, 4)).leverage(0)
    for wrong in ({"projection": 0}, {"damping": 0.0}, {"measure": "l1"}):
        with pytest.raises(ValueError, match="expected measure loss, square or mean"):
            FeatureConfig(**wrong)


def test_signs_are_balanced_and_those_of_two_seeds_differ():
    first, second = (Projector(4000, 10, seed, torch.device("cpu")).signs for seed in range(2))
    assert abs(float(first.mean())) < 0.1
    assert 0.4 < float((first == second).float().mean()) < 0.6
    assert all(sign in (-1, 1) for sign in itertools.islice(first.tolist(), 20))
