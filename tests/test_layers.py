"""Choosing layers, finding those that share their input, and gradients at them against autograd on the weights."""

from __future__ import annotations

import pytest
import torch
from tiny_layers import GROUPS, NAMES, tiny_layers
from tiny_teacher import tiny_teacher
from torch import nn

from abu.diffusion_loss import example_losses
from abu.layers import LayerGradients, add_to_weights, flat_inputs, flat_outputs, matrix_shape, select_layers


def test_gradients_of_every_layer_and_example_are_those_of_autograd():
    tiny = tiny_layers(6)
    expected = tiny.weight_gradients()
    groups, losses = LayerGradients(tiny.denoiser, "all")(*tiny.batch())
    torch.testing.assert_close(losses, example_losses(tiny.denoiser, *tiny.batch()))
    for group in groups:
        found = (group.outputs.mT @ group.inputs).split(group.sizes, dim=1)
        for name, gradient in zip(group.names, found, strict=True):
            assert expected[name].abs().max() > 1e-8
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13, msg=name)


def test_layers_that_get_the_same_tensor_form_a_group():
    tiny = tiny_layers(2)
    groups, _ = LayerGradients(tiny.denoiser, "all")(*tiny.batch())
    assert {group.names: (sum(group.sizes), group.inputs.shape[-1]) for group in groups} == GROUPS


def test_a_source_model_shares_the_text_and_the_tokens_of_self_attention():
    tiny = tiny_teacher(2)
    noisy = tiny.training.latents
    groups, _ = LayerGradients(tiny.denoiser, "attn")(noisy, noisy, torch.tensor([3, 700]), tiny.training.text)
    text = [group for group in groups if group.inputs is tiny.training.text]
    assert [len(group.names) for group in text] == [14]
    shared = [{name.rsplit(".", 1)[1] for name in group.names} for group in groups if len(group.names) == 3]
    assert shared == [{"to_q", "to_k", "to_v"}] * 7


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("cross-attn-kv", ["attn2.to_k", "attn2.to_v"]),
        ("cross-attn", ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]),
        ("attn", [name for name in NAMES if name.startswith("attn")]),
        ("all", NAMES),
    ],
)
def test_patterns(pattern, names):
    assert list(select_layers(tiny_layers(1).denoiser, pattern)) == names


def test_a_pattern_without_a_match_names_the_layers_that_exist():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "out": nn.Conv2d(1, 1, 1)})
    with pytest.raises(
        ValueError, match=r"match 'cross-attn-kv' .*none in ModuleDict, whose layers are: blocks\.\*, out$"
    ):
        select_layers(model)
    with pytest.raises(ValueError, match="expected one of cross-attn-kv, cross-attn, attn, all, found 'kv'"):
        select_layers(model, "kv")


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_convolutions_that_have_no_single_patch_matrix_are_refused(options):
    with pytest.raises(ValueError, match=r"^0: expected an ungrouped convolution"):
        select_layers(nn.Sequential(nn.Conv2d(2, 2, 3, **options)), "all")


def test_a_layer_that_runs_twice_or_never_is_named():
    tiny, other = tiny_layers(2), tiny_layers(2)
    tiny.denoiser.attn1.to_k = tiny.denoiser.attn1.to_v
    with pytest.raises(ValueError, match=r"attn1\.to_[kv]: expected the layer to run once"):
        LayerGradients(tiny.denoiser, "all")(*tiny.batch())
    other.denoiser.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unused: expected every chosen layer to run"):
        LayerGradients(other.denoiser, "all")(*other.batch())


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_the_weights_moves_the_output_by_its_product_with_the_input(name):
    layer = select_layers(tiny_layers(1).denoiser, "all")[name]
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv_in": (3, 2, 4, 4), "down": (3, 4, 4, 4), "time": (3, 1)}
    x = torch.randn(*shapes.get(name, (3, 4, layer.weight.shape[1])), dtype=torch.float64, generator=generator)
    change = torch.randn(*matrix_shape(layer), dtype=torch.float64, generator=generator)
    before = layer(x)
    add_to_weights(layer, change)
    torch.testing.assert_close(flat_outputs(layer, layer(x) - before), flat_inputs(layer, x) @ change.mT)
