"""EK-FAC factors against their definitions, computed example by example."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_teacher import tiny_teacher

from abu.curvature import EKFAC, eigenbasis
from abu.draws import DrawConfig, draw
from abu.fisher import CovarianceSums
from abu.keyvalue import OutputGradients


def per_example_gradients(tiny):
    """(∇W [N, out, in], g [N, T, out]) of the draws that `fit_curvature` makes."""
    config = DrawConfig(bins=1, draws=1, antithetic=False)
    examples = tiny.training
    timesteps, noise = draw(config, "curvature", examples.ids, 0, 0, 0, (2, 4, 4))
    noisy, target = tiny.schedule.noised(examples.latents, noise.double(), timesteps)
    gradients, _ = OutputGradients(tiny.denoiser)(noisy, target, timesteps, examples.text)
    return torch.einsum("nto,nti->noi", gradients.double(), examples.text), gradients.double()


def test_bases_and_eigenvalues_follow_their_definitions():
    tiny = tiny_teacher()
    factors = tiny.curvature()
    weight_gradients, output_gradients = per_example_gradients(tiny)
    used = tiny.training.text.abs().sum(-1) > 0
    tokens = tiny.training.text[used]
    covariance = tokens.mT @ tokens / len(tokens)
    basis = factors.basis_in.double()
    off_diagonal = basis.mT @ covariance @ basis
    off_diagonal.fill_diagonal_(0)
    assert off_diagonal.abs().max() < 1e-5 * covariance.abs().max()

    start = 0
    for size, basis_out in zip(factors.sizes, factors.basis_out, strict=True):
        part = weight_gradients[:, start : start + size]
        expected = (basis_out.double().mT @ part @ basis).square().mean(0)
        torch.testing.assert_close(factors.eigenvalues[start : start + size].double(), expected, rtol=1e-3, atol=1e-14)
        g = output_gradients[used][:, start : start + size]
        rotated = basis_out.double().mT @ (g.mT @ g) @ basis_out.double()
        scale = rotated.abs().max()
        rotated.fill_diagonal_(0)
        assert rotated.abs().max() < 1e-4 * scale
        start += size


def test_natural_gradient_inverts_the_damped_curvature():
    tiny = tiny_teacher()
    factors = tiny.curvature()
    size, width = factors.sizes[0], len(factors.basis_in)
    gradient = torch.randn(sum(factors.sizes), width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = (
        torch.cat(
            [basis.mT @ part for basis, part in zip(factors.basis_out, gradient.split(factors.sizes), strict=True)]
        )
        @ factors.basis_in
    )
    natural = factors.natural_gradient(rotated)[:size]
    # the dense curvature of the first layer, acting on row-major weights
    eigenvectors = torch.kron(factors.basis_out[0], factors.basis_in)
    dense = eigenvectors @ torch.diag(factors.damped()[:size].flatten()) @ eigenvectors.mT
    torch.testing.assert_close(
        (dense @ natural.flatten()).view(size, width), gradient[:size].double(), rtol=1e-3, atol=1e-4
    )


def test_factors_survive_the_disk(tmp_path):
    factors = tiny_teacher(8).curvature()
    factors.save(tmp_path / "ekfac.safetensors")
    loaded = EKFAC.load(tmp_path / "ekfac.safetensors")
    assert loaded.sizes == factors.sizes
    assert torch.equal(loaded.damped(), factors.damped())
    assert torch.equal(loaded.basis_in, factors.basis_in)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(loaded.basis_out, factors.basis_out, strict=True))


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "ekfac.safetensors"
    tiny_teacher(8).curvature().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"ekfac\.safetensors: expected EK-FAC factors"):
        EKFAC.load(path)


def test_factors_that_are_not_finite_are_refused(tmp_path):
    factors = tiny_teacher(8).curvature()
    replace(factors, eigenvalues=factors.eigenvalues / 0).save(tmp_path / "ekfac.safetensors")
    with pytest.raises(ValueError, match=r"ekfac\.safetensors: .*NaN or infinity in eigenvalues"):
        EKFAC.load(tmp_path / "ekfac.safetensors")


def test_weights_of_another_kind_are_no_factors(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "denoiser.safetensors")
    with pytest.raises(ValueError, match=r"denoiser\.safetensors: expected EK-FAC factors"):
        EKFAC.load(tmp_path / "denoiser.safetensors")


@pytest.mark.parametrize("positions", [1, 100])
def test_both_orders_of_rotation_give_the_same(positions):
    factors = tiny_teacher(8).curvature()
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(2, positions, sum(factors.sizes), dtype=torch.float64, generator=generator)
    a = torch.randn(2, positions, len(factors.basis_in), dtype=torch.float64, generator=generator)
    torch.testing.assert_close(factors.rotated_gradients(g, a), factors.rotate(g.mT @ a))
    torch.testing.assert_close(factors.rotate_back(factors.rotate(g.mT @ a)), g.mT @ a)


def test_a_covariance_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="layer 3: expected a finite covariance"):
        eigenbasis(torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), "layer 3")


def test_padding_is_not_counted():
    sums = CovarianceSums(2, (1,), torch.device("cpu"))
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    sums.add(torch.tensor([[[2.0], [5.0]]]), tokens)
    assert sums.positions == 1
    assert sums.outputs[0].item() == 4
