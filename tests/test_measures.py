"""Gradients of measured functions against autograd, and amortised scores against ⟨Δθ, ∇𝓛⟩, all in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_teacher import tiny_teacher

from abu.amortised import MeanGradients, QueryMatrix, Sketch, score_block, sketched
from abu.curvature import EKFAC
from abu.diffusion_loss import PREDICTIONS, example_losses
from abu.draws import DrawConfig, draw
from abu.keyvalue import key_value_layers
from abu.measures import MEASURES, MeasuredGradients, measured

DRAWS = DrawConfig(bins=2, draws=2)
BY_HAND = {
    "square": lambda f: (f**2).sum() / f.numel(),
    "average": lambda f: f.sum() / f.numel(),
    "l1": lambda f: torch.linalg.vector_norm(f, 1),
    "l2": lambda f: torch.linalg.vector_norm(f, 2),
    "linf": lambda f: torch.linalg.vector_norm(f, torch.inf),
}


def weight_gradient(tiny, examples, function):
    """Mean over the draws of ∇W [Σ out, in] of one example, by autograd on the weights."""
    weights = [layer.weight for layer in key_value_layers(tiny.denoiser).values()]
    for weight in weights:
        weight.requires_grad_()
    total = torch.zeros(sum(len(weight) for weight in weights), weights[0].shape[1], dtype=torch.float64)
    for bin_index in range(DRAWS.bins):
        for index in range(DRAWS.draws):
            timesteps, noise = draw(DRAWS, examples.role, examples.ids, 0, bin_index, index, (2, 4, 4))
            noisy, target = tiny.schedule.noised(examples.latents, noise.double(), timesteps)
            value = function(noisy, target, timesteps, examples.text)
            total += torch.cat(torch.autograd.grad(value, weights))
    for weight in weights:
        weight.requires_grad_(False)
    return total / (DRAWS.bins * DRAWS.draws)


def dense_inverse(curvature: EKFAC, gradient):
    """F⁻¹∇W of each layer with the damped Fisher as one dense matrix."""
    parts, basis_in = [], curvature.basis_in
    layers = zip(curvature.basis_out, curvature.eigenvalues.split(curvature.sizes), strict=True)
    for (basis, values), piece in zip(layers, gradient.split(curvature.sizes), strict=True):
        vectors = torch.kron(basis.contiguous(), basis_in.contiguous())
        dense = vectors @ torch.diag((values + curvature.damping * values.mean()).flatten()) @ vectors.mT
        parts.append(torch.linalg.solve(dense, piece.flatten()).view_as(piece))
    return torch.cat(parts)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_amortised_scores_are_products_of_the_step_with_the_gradients_of_the_loss(prediction):
    tiny = tiny_teacher(images=6, prediction=prediction)
    curvature = tiny.curvature()

    def loss(*batch):
        return example_losses(tiny.denoiser, *batch).sum()

    step = dense_inverse(curvature, weight_gradient(tiny, tiny.query, loss))
    expected = [(step * weight_gradient(tiny, tiny.training.rows(i, i + 1), loss)).sum() for i in range(6)]

    engine, whole = MeanGradients(tiny.denoiser, tiny.schedule), Sketch.of(curvature, curvature.eigenvalues.numel())
    vectors = [
        torch.stack([sketched(g, examples.text, curvature, whole) for g in engine(examples, DRAWS, 0)])
        for examples in (tiny.query, tiny.training)
    ]
    plain, _ = score_block(QueryMatrix.of(vectors[0]), vectors[1])
    found = plain[0] * vectors[0].mean(0).norm()
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", BY_HAND)
def test_measured_gradients_are_those_of_autograd(name):
    tiny = tiny_teacher(images=2)
    engine = MeanGradients(tiny.denoiser, tiny.schedule, measure=name)
    outputs = engine(tiny.query, DRAWS, 0).mean(0)
    found = (outputs.mT @ tiny.query.text)[0]

    def function(noisy, target, timesteps, text):
        return BY_HAND[name](tiny.denoiser(noisy, timesteps, text).sample)

    torch.testing.assert_close(found, weight_gradient(tiny, tiny.query, function), rtol=1e-9, atol=1e-14)


def test_measured_gradients_come_with_the_loss_and_leave_the_model_as_it_was():
    tiny = tiny_teacher(images=2)
    timesteps, noise = draw(DRAWS, "train", [0, 1], 0, 0, 0, (2, 4, 4))
    batch = (*tiny.schedule.noised(tiny.training.latents, noise.double(), timesteps), timesteps, tiny.training.text)
    before = example_losses(tiny.denoiser, *batch)
    losses = MeasuredGradients(tiny.denoiser, "linf")(*batch)[1]
    torch.testing.assert_close(losses, before)
    torch.testing.assert_close(example_losses(tiny.denoiser, *batch), before)


def test_measures_are_named():
    assert set(MEASURES) == {"loss", *BY_HAND}
    with pytest.raises(ValueError, match=r"measure: expected one of square, .*, found 'cube'"):
        measured("cube", torch.ones(1, 1))
    with pytest.raises(ValueError, match="found 'cube'"):
        MeasuredGradients(tiny_teacher(images=1).denoiser, "cube")
