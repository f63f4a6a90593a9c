"""Fitting curvature: against per-example autograd, against a Fisher known in closed form, and by command."""

from __future__ import annotations

import pytest
import torch
from test_collect import write_testbed
from tiny_layers import GROUPS, NAMES, tiny_layers

from abu import fisher
from abu.curvature import EKFAC, DiagonalFisher
from abu.fisher import CurvatureConfig, fit_curvature, fit_factors
from abu.kronfluence_files import load_curvature
from abu.layers import GroupGradients
from fastgda.core import read_manifest, verify_artifact


def fit(tiny, kind, **options):
    config = CurvatureConfig(kind=kind, layers="all")
    return fit_curvature(tiny.denoiser, tiny.schedule, tiny.latents, tiny.text, config, batch_size=7, **options)


def by_layer(curvature):
    """Name -> (group, U_A, U_B, S), with identities for the diagonal Fisher."""
    result = {}
    for group in curvature.groups:
        for index, values in enumerate(group.eigenvalues.split(group.sizes)):
            identities = [torch.eye(size, dtype=torch.float64) for size in values.T.shape]
            bases = [group.basis_in, group.basis_out[index]] if isinstance(group, EKFAC) else identities
            result[group.names[index]] = (*bases, values)
    return result


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_eigenvalues_are_mean_squares_of_per_example_gradients(kind):
    tiny = tiny_layers()
    gradients = tiny.weight_gradients()
    curvature = fit(tiny, kind)
    assert curvature.examples == 24
    found = by_layer(curvature)
    assert list(found) == NAMES
    for name, (basis_in, basis_out, values) in found.items():
        expected = (basis_out.mT @ gradients[name] @ basis_in).square().mean(0)
        torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-12 * expected.max().item(), msg=name)


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_natural_gradients_solve_the_damped_system(kind):
    tiny = tiny_layers()
    curvature = fit(tiny, kind)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: values.shape for name, (*_, values) in by_layer(curvature).items()}
    gradients = {name: torch.randn(*shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    natural = curvature.natural_gradients(gradients)
    for name, (basis_in, basis_out, values) in by_layer(curvature).items():
        vectors = torch.kron(basis_out, basis_in)
        dense = vectors @ torch.diag(values.flatten() + 0.1 * values.mean()) @ vectors.mT
        torch.testing.assert_close(dense @ natural[name].flatten(), gradients[name].flatten(), msg=name)


def test_ekfac_is_the_exact_fisher_but_for_what_couples_its_eigenvectors():
    """The model's exact Fisher, a dense matrix for each layer: in the eigenbasis its diagonal is S and nothing is lost
    but the rest, so that no other eigenvalues on these vectors are closer (George et al. 2018, theorem 2)."""
    tiny = tiny_layers()
    gradients = tiny.weight_gradients()
    for name, (basis_in, basis_out, values) in by_layer(fit(tiny, "ekfac")).items():
        flat = gradients[name].flatten(1)
        exact = flat.mT @ flat / len(flat)
        vectors = torch.kron(basis_out.contiguous(), basis_in.contiguous())
        approximation = vectors @ torch.diag(values.flatten()) @ vectors.mT
        lost = vectors.mT @ (exact - approximation) @ vectors
        scale = exact.norm()
        assert lost.diagonal().abs().max() < 1e-10 * scale, name
        generator = torch.Generator().manual_seed(0)
        other = values.flatten() * (1 + 0.1 * torch.randn(values.numel(), dtype=torch.float64, generator=generator))
        assert (exact - approximation).norm() < (exact - vectors @ torch.diag(other) @ vectors.mT).norm(), name
        assert approximation.trace() == pytest.approx(exact.trace().item()), name


def factorial_gradients():
    """(g [20, 1, 3], a [20, 1, 4]): every pair of four output gradients and five inputs, so that they are independent.

    Then the Fisher E[(g aᵀ)(g aᵀ)ᵀ], with weights read row by row, is B ⊗ A exactly.
    """
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    inputs = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    return outputs.repeat_interleave(5, 0)[:, None], inputs.repeat(4, 1)[:, None]


def test_ekfac_of_one_token_with_independent_gradients_is_the_exact_fisher():
    g, a = factorial_gradients()
    gradients = (g.mT @ a).flatten(1)
    exact = gradients.mT @ gradients / len(gradients)
    curvature = fit_factors([[GroupGradients(("layer",), (3,), a, g)]], CurvatureConfig(), torch.float64)
    values, vectors = torch.linalg.eigh(exact)
    torch.testing.assert_close(curvature.shared().eigenvalues.flatten().sort().values, values)
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    damping = 0.1 * exact.trace() / 12
    expected = vectors @ ((vectors.mT @ weights.flatten()) / (values + damping))
    torch.testing.assert_close(curvature.natural_gradients({"layer": weights})["layer"].flatten(), expected)


def test_diagonal_fisher_is_the_diagonal_of_the_exact_one():
    g, a = factorial_gradients()
    gradients = (g.mT @ a).flatten(1)
    exact = gradients.mT @ gradients / len(gradients)
    curvature = fit_factors([[GroupGradients(("layer",), (3,), a, g)]], CurvatureConfig(kind="diagonal"), torch.float64)
    torch.testing.assert_close(curvature.shared().eigenvalues.flatten(), exact.diagonal())


def test_factors_depend_neither_on_what_is_kept_in_memory_nor_on_the_batch():
    tiny = tiny_layers()
    kept, some = fit(tiny, "ekfac"), fit(tiny, "ekfac", kept_bytes=60_000)
    config = CurvatureConfig(layers="all")
    whole = fit_curvature(tiny.denoiser, tiny.schedule, tiny.latents, tiny.text, config, batch_size=24, kept_bytes=0)
    gradients = {name: torch.ones(values.shape, dtype=torch.float64) for name, (*_, values) in by_layer(kept).items()}
    expected = kept.natural_gradients(gradients)
    for other in (some, whole):
        for name, found in other.natural_gradients(gradients).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_groups_share_one_input_basis():
    curvature = fit(tiny_layers(), "ekfac")
    assert {g.names: (sum(g.sizes), len(g.basis_in)) for g in curvature.groups if isinstance(g, EKFAC)} == GROUPS
    with pytest.raises(ValueError, match="expected layers that read one input, found conv_in and down do not"):
        curvature.shared()


def test_a_loss_that_is_not_finite_names_the_image():
    tiny = tiny_layers()
    tiny.latents[11, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="training image 11: expected a finite loss, found nan"):
        fit(tiny, "diagonal")


def test_a_layer_without_gradients_is_named():
    tiny = tiny_layers()
    # attention to a single token is constant, whatever the query
    tiny = type(tiny)(tiny.denoiser, tiny.schedule, tiny.latents, tiny.text[:, :1])
    with pytest.raises(ValueError, match=r"attn2\.to_q: expected finite gradients that are not all zero"):
        fit(tiny, "diagonal")


@pytest.mark.parametrize("options", [{"kind": "kfac"}, {"draws": 0}, {"damping": 0.0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected kind ekfac or diagonal"):
        CurvatureConfig(**options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fisher")
    write_testbed(folder)
    return folder


def test_fit_inspect_and_convert(root, capsys):
    assert fisher.main(["fit", "--root", str(root)]) == 0
    path = root / "weights/emoji_ldm/ekfac.safetensors"
    verify_artifact(path)
    assert read_manifest(path)["config"]["layers"] == "cross-attn-kv"

    assert fisher.main(["inspect", str(path), "--output", str(root / "spectrum.png")]) == 0
    printed = capsys.readouterr().out
    assert "attn2.to_k: 16 × 384, mean" in printed
    assert (root / "spectrum.png").read_bytes().startswith(b"\x89PNG")

    assert fisher.main(["convert", "--root", str(root), str(path), str(root / "folder")]) == 0
    back = load_curvature(root / "folder").shared()
    factors = EKFAC.load(path)
    assert isinstance(back, EKFAC) and back.names == factors.names
    torch.testing.assert_close(back.damped(), factors.damped())
    assert torch.equal(back.basis_in, factors.basis_in)


def test_fit_writes_other_kinds_and_layers_into_a_folder(root):
    assert fisher.main(["fit", "--root", str(root), "--kind", "diagonal", "--layers", "cross-attn"]) == 0
    folder = root / "weights/emoji_ldm/diagonal-cross-attn"
    verify_artifact(folder)
    curvature = load_curvature(folder)
    assert not any(isinstance(group, EKFAC) for group in curvature.groups)
    assert sorted(len(group.names) for group in curvature.groups) == [1] * 14 + [14]
    assert all(isinstance(group, DiagonalFisher) and (group.eigenvalues >= 0).all() for group in curvature.groups)


def test_commands_refuse_what_does_not_fit(root, capsys):
    assert fisher.main(["fit", "--root", str(root), "--kind", "diagonal", "--output", str(root / "x.safetensors")]) == 2
    assert "x.safetensors: expected a folder for diagonal factors of cross-attn-kv" in capsys.readouterr().err
    assert fisher.main(["inspect", str(root / "nothing")]) == 2
    assert "python -m abu.fisher fit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fisher.main(["--help"])
    assert "python -m abu.fisher fit --kind diagonal" in capsys.readouterr().out
