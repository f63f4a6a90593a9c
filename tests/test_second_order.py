"""The loss change after a finite step: its two terms against forward differentiation and against the exact change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_teacher import tiny_teacher
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from abu.amortised import PIECE, Examples, Sketch, inner_products
from abu.collect_config import StepConfig
from abu.curvature import Curvature
from abu.draws import DrawConfig
from abu.encoded import LoadedPictures
from abu.influence import mean_losses
from abu.keyvalue import OutputGradients, key_value_layers
from abu.second_order import (
    StepVectors,
    TrainingTerms,
    TwoFolds,
    loss_change_at,
    loss_terms,
    random_signs,
)
from abu.train_diffusion import diffusion_loss
from abu.training import LoopConfig, train
from abu.unlearn import moved_model, natural_step, query_gradient

CPU = torch.device("cpu")
DRAWS, IMAGES = DrawConfig(bins=2, draws=2), 24


def random_step(curvature, seed=0):
    """F^(-1/2) of a random gradient, and the change of the weights F⁻¹ of it, [out, in] in the original basis."""
    generator = torch.Generator().manual_seed(seed)
    rotated = torch.randn(curvature.eigenvalues.shape, generator=generator, dtype=torch.float64)
    return rotated, curvature.natural_gradient(rotated)


def output_change(tiny, change, noisy, timesteps, text):
    """J w [B, c, h, w] by forward differentiation."""
    layers = key_value_layers(tiny.denoiser)
    pieces = change.split([len(layer.weight) for layer in layers.values()])
    tangent = {f"{name}.weight": piece for name, piece in zip(layers, pieces, strict=True)}
    weights = {name: dict(tiny.denoiser.named_parameters())[name] for name in tangent}

    def output(moved):
        return functional_call(tiny.denoiser, moved, (noisy, timesteps, text)).sample

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward differentiation
        return jvp(output, (weights,), (tangent,))[1]


def test_products_with_all_unit_vectors_give_the_change_of_the_output():
    tiny = tiny_teacher(images=3)
    curvature = tiny.curvature()
    _, change = random_step(curvature)
    timesteps, noise = next(tiny.training.draws(DRAWS, 0, 1))
    noisy, _ = tiny.schedule.noised(tiny.training.latents, noise, timesteps)
    elements = noisy[0].numel()
    units = torch.eye(elements, dtype=torch.float64).view(elements, 1, *noisy.shape[1:])
    products = OutputGradients(tiny.denoiser).products(
        noisy, timesteps, tiny.training.text, lambda output: units.expand(-1, 3, -1, -1, -1).unbind()
    )
    moved = [((g.mT @ tiny.training.text) * change).sum((1, 2)) for g in products]
    expected = output_change(tiny, change, noisy, timesteps, tiny.training.text)
    torch.testing.assert_close(torch.stack(moved, 1), expected.flatten(1), rtol=1e-9, atol=1e-12)


def test_random_signs_are_keyed_by_image_and_draw():
    training = tiny_teacher(images=5).training
    signs = random_signs(DRAWS, training, 0, 1, 0)
    torch.testing.assert_close(signs.abs(), torch.full_like(signs, signs[0].numel() ** -0.5))
    torch.testing.assert_close(random_signs(DRAWS, training.rows(3, 5), 0, 1, 0), signs[3:])
    others = [random_signs(DRAWS, training, *place) for place in ((1, 1, 0), (0, 0, 0), (0, 1, 1))]
    assert not any(torch.equal(other, signs) for other in others)


def found_terms(tiny, curvature, query, draws, fold=1, seed=0):
    whole, folded = Sketch.of(curvature), TwoFolds.of(curvature, fold, seed)
    terms = TrainingTerms(tiny.denoiser, tiny.schedule)(tiny.training, draws, 0)
    images = StepVectors.of_images(terms, tiny.training.text, curvature, whole, folded)
    return loss_terms(StepVectors(whole(query[None]), [folded(query[None])]), images)


def test_terms_are_those_of_whole_weight_gradients():
    tiny = tiny_teacher(images=4)
    curvature = tiny.curvature()
    rotated, change = random_step(curvature)
    found_first, found_second = found_terms(tiny, curvature, rotated, DRAWS)
    gradients, products = TrainingTerms(tiny.denoiser, tiny.schedule)(tiny.training, DRAWS, 0)
    first = ((gradients.mT @ tiny.training.text) * change).sum((1, 2))
    squares = [((g.mT @ tiny.training.text) * change).sum((1, 2)).square() for g in products]
    torch.testing.assert_close(found_first[0], first, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found_second[0], torch.stack(squares).mean(0), rtol=1e-8, atol=1e-12)


def test_folding_leaves_the_squares_right_on_average():
    tiny = tiny_teacher(images=4)
    curvature = tiny.curvature()
    rotated, _ = random_step(curvature)
    _, exact = found_terms(tiny, curvature, rotated, DRAWS)
    folded = torch.stack([found_terms(tiny, curvature, rotated, DRAWS, 8, seed)[1][0] for seed in range(60)])
    error = folded.std(0) / len(folded) ** 0.5
    assert (folded.std(0) > 0).all()
    assert ((folded.mean(0) - exact[0]).abs() < 4 * error).all()


def trained_tiny(folder):
    """A trained teacher, for the second term leaves out what large errors do, and a query that resembles an image."""
    tiny = tiny_teacher(images=IMAGES)
    model, training = tiny.denoiser.float().requires_grad_(), tiny.training
    loss = diffusion_loss(LoadedPictures(training.latents.float(), training.text.float()), tiny.schedule, CPU)
    loop = LoopConfig(steps=600, batch_size=IMAGES, learning_rate=3e-3, warmup=20, ema=0.9)
    train(model, loss, IMAGES, loop, folder, device=CPU, progress=False)
    model.double().eval().requires_grad_(False)
    query = Examples("test", [0], training.latents[2:3] + 0.3 * tiny.query.latents, training.text[2:3])
    return replace(tiny, query=query)


def test_two_terms_follow_the_exact_loss_change_where_one_does_not(tmp_path):
    tiny = trained_tiny(tmp_path)
    curvature = tiny.curvature()
    factors = Curvature((curvature,), examples=1)
    gradient = query_gradient(tiny.denoiser, tiny.schedule, factors, tiny.query, DrawConfig(bins=2, draws=20))
    draws = DrawConfig(bins=2, draws=20, antithetic=False)
    first, second = (term[0] for term in found_terms(tiny, curvature, gradient[0], draws))

    def losses(model):
        return mean_losses([model], tiny.schedule, tiny.training, draws, progress=False)[0]

    before, step = losses(tiny.denoiser), 3e-4
    exact = losses(moved_model(tiny.denoiser, natural_step(factors, gradient, step / IMAGES))) - before
    both = loss_change_at(first, second, step, IMAGES)
    assert (exact - both).norm() < 0.5 * (exact - step / IMAGES * first).norm()
    assert spearmanr(exact, both)[0] > spearmanr(exact, first)[0] + 0.02


def test_any_step_comes_from_the_two_terms():
    first, second = np.array([[1.0, -2.0]]), np.array([[0.5, 4.0]])
    np.testing.assert_allclose(loss_change_at(first, second, 2.0, 4), [[0.625, 0.0]])


def test_products_in_bfloat16_are_not_rounded_to_it():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 3 * PIECE + 100, generator=generator)
    vectors = torch.randn(50, queries.shape[1], generator=generator) + queries[:1]
    exact = queries.double() @ vectors.double().mT
    found = inner_products(queries.bfloat16(), vectors)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 3e-3 * exact.norm()
    assert len(found[0].unique()) == len(vectors) > len(found[0].bfloat16().unique())
    torch.testing.assert_close(inner_products(queries.double(), vectors), exact, rtol=1e-12, atol=0)


def test_steps_take_bits_that_products_are_made_in():
    with pytest.raises(ValueError, match="--query_bits: expected 16 or 32 for steps, found 8"):
        StepConfig(query_bits=8)
