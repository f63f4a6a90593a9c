"""Curvature on disk and against Kronfluence: the same factors from the same gradients, files that both can read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from kronfluence import FactorArguments, ScoreArguments
from kronfluence.factor.config import FactorConfig
from safetensors.torch import load_file, save_file
from tiny_layers import NAMES, tiny_layers
from torch.utils.data import TensorDataset

from abu.curvature import EKFAC
from abu.fisher import CurvatureConfig, fit_curvature
from abu.kronfluence_files import load_curvature, save_curvature
from abu.layers import matrix_shape, select_layers
from abu.models import build_denoiser
from abu.testbed import TESTBEDS
from benchmark import factors
from fastgda.core import ROOT, write_manifest

CPU = torch.device("cpu")
DOUBLE = {
    f"{name}_dtype": torch.float64
    for name in ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
}


def fit(kind="ekfac"):
    tiny = tiny_layers()
    config = CurvatureConfig(kind=kind, layers="all")
    return fit_curvature(tiny.denoiser, tiny.schedule, tiny.latents, tiny.text, config, batch_size=8)


def random_gradients():
    layers = select_layers(tiny_layers(1).denoiser, "all")
    generator = torch.Generator().manual_seed(0)
    shapes = {name: matrix_shape(layer) for name, layer in layers.items()}
    return {name: torch.randn(*shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


def preconditioned(analyzer, name, strategy):
    """Kronfluence's own F⁻¹∇W of the random gradients, from the factors that it finds on disk under `name`."""
    loaded, result = analyzer.load_all_factors(name), {}
    for layer, gradient in random_gradients().items():
        storage = {factor: tensors[layer].clone() for factor, tensors in loaded.items()}
        method = FactorConfig.CONFIGS[strategy]
        method.prepare(storage, ScoreArguments(damping_factor=None, precondition_dtype=torch.float64), CPU)
        result[layer] = method.precondition_gradient(gradient.clone()[None], storage)[0]
    return result


@pytest.fixture(scope="module")
def kronfluence(tmp_path_factory):
    """Kronfluence with its EK-FAC and diagonal factors of all layers of the tiny model, in float64."""
    tiny = tiny_layers()
    analyzer = factors.analyzer_of(tiny.denoiser, NAMES, tmp_path_factory.mktemp("kronfluence"))
    for strategy in ("ekfac", "diagonal"):
        arguments = FactorArguments(strategy=strategy, use_empirical_fisher=True, **DOUBLE)
        analyzer.fit_all_factors(strategy, TensorDataset(*tiny.batch()), 8, factor_args=arguments)
    return analyzer


def test_eigenvectors_and_eigenvalues_are_those_of_kronfluence(kronfluence):
    theirs = kronfluence.load_all_factors("ekfac")
    for group in fit().groups:
        assert isinstance(group, EKFAC)
        values = group.eigenvalues.split(group.sizes)
        for name, basis_out, mine in zip(group.names, group.basis_out, values, strict=True):
            for basis, factor in ((group.basis_in, "activation_eigenvectors"), (basis_out, "gradient_eigenvectors")):
                # both ascend, so that they are equal up to sign
                overlap = (basis.mT @ theirs[factor][name]).abs()
                torch.testing.assert_close(overlap, torch.eye(len(overlap)).double(), rtol=0, atol=1e-4, msg=name)
            expected = theirs["lambda_matrix"][name] / theirs["num_lambda_processed"][name]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-8 * expected.max().item(), msg=name)


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_natural_gradients_are_those_of_kronfluence(kronfluence, kind):
    expected = preconditioned(kronfluence, kind, kind)
    for name, found in fit(kind).natural_gradients(random_gradients()).items():
        assert (found - expected[name]).norm() < 1e-6 * expected[name].norm()


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_kronfluence_reads_our_folder(kronfluence, kind):
    curvature = fit(kind)
    save_curvature(kronfluence.factors_output_dir(f"our_{kind}"), curvature)
    expected = curvature.natural_gradients(random_gradients())
    for name, found in preconditioned(kronfluence, f"our_{kind}", kind).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_we_read_the_folder_of_kronfluence(kronfluence, kind):
    layers = select_layers(tiny_layers(1).denoiser, "all")
    curvature = load_curvature(kronfluence.factors_output_dir(kind)).for_layers(layers)
    assert curvature.examples == 24
    if kind == "ekfac":
        assert [group.names for group in curvature.groups] == [group.names for group in fit().groups]
    expected = preconditioned(kronfluence, kind, kind)
    for name, found in curvature.natural_gradients(random_gradients()).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_a_folder_holds_what_was_saved(tmp_path, kind):
    curvature = fit(kind)
    save_curvature(tmp_path / "folder", curvature)
    loaded = load_curvature(tmp_path / "folder")
    assert loaded.examples == 24
    for mine, theirs in zip(curvature.groups, loaded.groups, strict=True):
        assert type(mine) is type(theirs)
        assert (mine.names, mine.sizes, mine.damping) == (theirs.names, theirs.sizes, theirs.damping)
        torch.testing.assert_close(mine.eigenvalues, theirs.eigenvalues)
        if isinstance(mine, EKFAC) and isinstance(theirs, EKFAC):
            assert torch.equal(mine.basis_in, theirs.basis_in)


def test_factors_that_one_file_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected layers that read one input, found conv_in and down do not"):
        save_curvature(tmp_path / "factors.safetensors", fit())
    assert not list(tmp_path.iterdir())


def test_the_shipped_factors_are_those_of_the_shipped_model():
    factors_on_disk = load_curvature(ROOT / "weights/emoji_ldm/ekfac.safetensors")
    layers = select_layers(build_denoiser(TESTBEDS["emoji"].diffusion))
    group = factors_on_disk.for_layers(layers).shared()
    assert group.names == tuple(layers)
    with pytest.raises(ValueError, match=r"expected factors of .*attn1\.to_q, found none"):
        factors_on_disk.for_layers(select_layers(build_denoiser(TESTBEDS["emoji"].diffusion), "attn"))


def test_factors_of_other_layers_are_refused():
    layers = select_layers(tiny_layers(1).denoiser, "all")
    curvature = fit("diagonal")
    with pytest.raises(ValueError, match=r"expected factors of 10 layers, found conv_in besides"):
        curvature.for_layers(
            {name: layer for name, layer in layers.items() if name.startswith(("attn", "time", "head"))}
        )
    with pytest.raises(ValueError, match=r"expected factors of attn3, found none"):
        curvature.for_layers(layers | {"attn3": layers["time"]})
    with pytest.raises(ValueError, match=r"expected factors of down \(6, 2\), found down \(6, 24\)"):
        curvature.for_layers(layers | {"down": layers["time"]})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "factors"
    save_curvature(folder, fit())
    return folder


def damage(folder, factor, change):
    path = folder / f"{factor}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("factor", "change", "message"),
    [
        ("lambda_matrix", lambda t: t["time"].fill_(float("nan")), "NaN or infinity in time"),
        ("num_lambda_processed", lambda t: t["time"].fill_(0), r"expected one positive count, found \[0, 24\]"),
        ("gradient_eigenvectors", lambda t: t.pop("time"), r"expected time of shape \(6, 6\) .*found None"),
        ("activation_eigenvectors", lambda t: t.update(x=t["time"].clone()), "expected x of shape None"),
    ],
)
def test_a_damaged_folder_names_the_file(saved, tmp_path, factor, change, message):
    folder = shutil.copytree(saved, tmp_path / "factors")
    damage(folder, factor, change)
    with pytest.raises(ValueError, match=f"{factor}.safetensors: .*{message}"):
        load_curvature(folder)


def test_a_missing_or_truncated_file_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "factors")
    path = folder / "gradient_eigenvectors.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"gradient_eigenvectors\.safetensors: .*damaged"):
        load_curvature(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"gradient_eigenvectors\.safetensors: expected a file, found nothing"):
        load_curvature(folder)


def test_ekfac_factors_without_eigenvectors_are_not_taken_for_a_diagonal(saved, tmp_path):
    """An unfinished copy; what is left of it are the files that a diagonal consists of."""
    folder = shutil.copytree(saved, tmp_path / "factors")
    for vectors in folder.glob("*_eigenvectors.safetensors"):
        vectors.unlink()
    with pytest.raises(ValueError, match=r"eigenvectors\.safetensors: expected a file, found nothing"):
        load_curvature(folder)
    arguments = folder / "factor_arguments.json"
    for text, message in (('{"strategy": "kfac"}', "expected .*ekfac or diagonal, found 'kfac'"), ("{", "damaged")):
        arguments.write_text(text)
        with pytest.raises(ValueError, match=rf"factor_arguments\.json: .*{message}"):
            load_curvature(folder)
    arguments.unlink()
    write_manifest(folder, CurvatureConfig(), command="")
    with pytest.raises(ValueError, match=r"eigenvectors\.safetensors: expected a file, found nothing"):
        load_curvature(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"expected eigenvectors, or factor_arguments\.json .*, found neither"):
        load_curvature(folder)


def test_the_folder_says_that_factors_are_diagonal(saved, tmp_path):
    """By the manifest as well, and though eigenvectors of an earlier fit lie beside them."""
    folder = shutil.copytree(saved, tmp_path / "factors")
    save_curvature(folder, fit("diagonal"))
    (loaded, *_) = load_curvature(folder).groups
    assert not isinstance(loaded, EKFAC)
    (folder / "factor_arguments.json").unlink()
    write_manifest(folder, CurvatureConfig(kind="diagonal"), command="")
    (again, *_) = load_curvature(folder).groups
    assert torch.equal(again.eigenvalues, loaded.eigenvalues)


def test_the_benchmark_reports_times_and_equal_factors(tmp_path):
    output = tmp_path / "factors.json"
    assert factors.main(["--sizes", "tiny", "--repeats", "1", "--output", str(output)]) == 0
    row = json.loads(output.read_text())["sizes"]["tiny"]
    assert row["seconds"] > 0 and row["kronfluence_seconds"] > 0
    assert row["weights"] == 14 * 16 * 32
    assert max(row["largest_relative_difference"].values()) < 1e-4
