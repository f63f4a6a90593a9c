"""Source models from pipelines of diffusers: what is found in them, their losses and gradients, what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from tiny_pipelines import CPU, KINDS, MORE, TOKENS, UNET, save_part, save_tiny, tiny_pipeline
from torch import nn

from abu.conditioning import Conditioning, pack_text, unpack_text
from abu.diffusion_loss import example_losses
from abu.keyvalue import OutputGradients
from abu.layers import LayerGradients, select_layers
from abu.models import SourceModel
from abu.pipelines import load_pipeline, open_source, probe, schedule_of
from abu.testbed import TESTBEDS
from abu.text_layers import find_text_layers

LAYERS = {
    "flow": [f"model.transformer_blocks.{i}.attn.add_{k}_proj" for i in range(3) for k in "kv"],
    "auraflow": [f"model.joint_transformer_blocks.{i}.attn.add_{k}_proj" for i in range(2) for k in "kv"],
    "sana": [f"model.transformer_blocks.{i}.attn2.to_{k}" for i in range(2) for k in "kv"],
    "pixart": [f"model.transformer_blocks.{i}.attn2.to_{k}" for i in range(2) for k in "kv"],
}


@pytest.fixture(scope="module", params=KINDS + MORE)
def tiny(request, tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp(request.param), request.param)


def a_draw(tiny):
    """(timesteps, noise) for every training image."""
    generator = torch.Generator().manual_seed(2)
    shape = tiny.training.latents.shape
    timesteps = torch.randint(1000, shape[:1], generator=generator)
    return timesteps, torch.randn(shape, dtype=torch.float64, generator=generator)


def test_text_layers_are_found_whatever_they_are_called(tiny):
    found = list(select_layers(tiny.source.denoiser))
    if tiny.kind == "flow":
        by_name = select_layers(tiny.source.denoiser.model)
        assert list(by_name) == [f"transformer_blocks.0.attn2.to_{k}" for k in "kv"], "an attention among latents"
    if tiny.kind in LAYERS:
        assert found == LAYERS[tiny.kind]
    else:
        assert len(found) == 8 and {name.split(".")[-2] for name in found} == {"attn2"}
        assert {name.split(".")[-1] for name in found} == {"to_k", "to_v"}
    assert list(select_layers(copy.deepcopy(tiny.source.denoiser))) == found


def test_cross_attention_is_that_which_reads_the_text(tiny):
    found = select_layers(tiny.source.denoiser, "cross-attn")
    text = select_layers(tiny.source.denoiser)
    assert text.keys() < found.keys() < select_layers(tiny.source.denoiser, "attn").keys()
    owners = {name.rpartition(".")[0] for name in text}
    assert all(any(name.startswith(f"{owner}.") for owner in owners) for name in found)
    # queries of the latents and the output of the attention belong to it
    assert all({f"{owner}.to_q", f"{owner}.to_out.0"} <= found.keys() for owner in owners)


def test_losses_are_those_of_diffusers_called_directly(tiny):
    timesteps, noise = a_draw(tiny)
    noisy, target = tiny.source.schedule.noised(tiny.training.latents, noise, timesteps)
    found = example_losses(tiny.source.denoiser, noisy, target, timesteps, tiny.training.text)
    torch.testing.assert_close(found, tiny.losses(noise, timesteps), rtol=1e-9, atol=0)


def test_gradients_of_every_layer_and_example_are_those_of_autograd(tiny):
    timesteps, noise = a_draw(tiny)
    layers = select_layers(tiny.source.denoiser)
    parameters = {f"{name}.{k}": p for name, layer in layers.items() for k, p in layer.named_parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_()
    losses = tiny.losses(noise, timesteps)
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    expected = {key: torch.stack(parts) for key, *parts in zip(parameters, *rows, strict=True)}
    noisy, target = tiny.source.schedule.noised(tiny.training.latents, noise, timesteps)
    groups, found_losses = LayerGradients(tiny.source.denoiser)(noisy, target, timesteps, tiny.training.text)
    torch.testing.assert_close(found_losses, losses.detach(), rtol=1e-9, atol=0)
    assert sorted(name for group in groups for name in group.names) == sorted(layers)
    for group in groups:
        for name, gradient in zip(
            group.names, (group.outputs.mT @ group.inputs).split(group.sizes, dim=1), strict=True
        ):
            columns = [expected[f"{name}.weight"]]
            if f"{name}.bias" in expected:
                columns.append(expected[f"{name}.bias"][:, :, None])
            torch.testing.assert_close(gradient, torch.cat(columns, -1), rtol=1e-7, atol=1e-12, msg=name)


def test_layers_that_share_the_text_are_told_from_those_that_do_not(tiny):
    timesteps, noise = a_draw(tiny)
    noisy, target = tiny.source.schedule.noised(tiny.training.latents, noise, timesteps)
    batch = noisy, target, timesteps, tiny.training.text
    groups, _ = LayerGradients(tiny.source.denoiser)(*batch)
    if tiny.kind in LAYERS:
        assert len(groups) == {"flow": 3, "auraflow": 2}.get(tiny.kind, 1)
        with pytest.raises(ValueError, match=r"to_k|add_k_proj: expected the layer to read the text tokens"):
            OutputGradients(tiny.source.denoiser)(*batch)
        return
    gradients, _ = OutputGradients(tiny.source.denoiser)(*batch)
    assert gradients.shape[:2] == tiny.training.text.shape[:2]
    assert not gradients[:, TOKENS:].any()
    torch.testing.assert_close(gradients.mT @ tiny.training.text, groups[0].outputs.mT @ tiny.tokens)


@pytest.mark.parametrize("kind", ["flow", "sdxl"])
def test_pooled_text_is_carried(tmp_path, kind):
    tiny = tiny_pipeline(tmp_path, kind)
    timesteps, noise = a_draw(tiny)
    changed = tiny.training.text.clone()
    changed[:, TOKENS] += 1
    first, second = (tiny.source.denoiser(noise, timesteps, text).sample for text in (tiny.training.text, changed))
    assert (first - second).abs().amax((1, 2, 3)).min() > 1e-6


@pytest.mark.parametrize("pooled", [1, 6, 10, 12])
def test_pooled_numbers_fill_as_many_rows_as_they_need(pooled):
    tokens, numbers = torch.randn(4, 3, 6), torch.randn(4, pooled)
    text = pack_text(tokens, numbers)
    assert text.shape == (4, 3 + -(-pooled // 6), 6)
    back = unpack_text(text, pooled)
    assert torch.equal(back[0], tokens) and torch.equal(back[1], numbers)
    with pytest.raises(ValueError, match="expected token states before a pooled embedding"):
        unpack_text(text[:, 3:], pooled)


def test_schedules_of_schedulers():
    ddpm, _ = schedule_of(DDPMScheduler(1000, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert ddpm.prediction == "v_prediction" and ddpm.levels[-1] == 0
    shifted, told = schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    sigma = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(shifted.levels, 3 * sigma / (1 + 2 * sigma))
    torch.testing.assert_close(told, 1000 * shifted.levels)
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert torch.equal(schedule_of(solver)[0].levels, shifted.levels)
    with pytest.raises(ValueError, match=r"prediction: expected one of .*, found 'sample'"):
        schedule_of(DDPMScheduler(prediction_type="sample"))


def test_flow_matching_of_a_denoiser_whose_time_is_not_known_is_refused(tmp_path):
    save_tiny(tmp_path, "pixart")
    save_part(FlowMatchEulerDiscreteScheduler(), tmp_path, "scheduler")
    with pytest.raises(
        ValueError, match="PixArtTransformer2DModel: expected flow matching with one of SD3Transformer2D"
    ):
        load_pipeline(tmp_path, CPU)


def test_a_denoiser_without_cross_attention_is_refused(tmp_path):
    save_tiny(tmp_path, "epsilon")
    options = {**UNET, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    options = {name: value for name, value in options.items() if name != "cross_attention_dim"}
    save_part(UNet2DModel(**options), tmp_path, "unet")
    with pytest.raises(
        ValueError, match="UNet2DModel: expected a denoiser of latents, timestep and encoder_hidden_sta"
    ):
        load_pipeline(tmp_path, CPU)


def test_inpainting_is_refused(tmp_path):
    save_tiny(tmp_path, "epsilon")
    save_part(UNet2DConditionModel(**{**UNET, "in_channels": 5}), tmp_path, "unet")
    with pytest.raises(ValueError, match="unet: expected a denoiser of 2 channels, found one that reads 5"):
        load_pipeline(tmp_path, CPU)


class Deaf(nn.Module):
    """Attends among latents only."""

    def __init__(self):
        super().__init__()
        self.to_q = self.to_k = nn.Linear(2, 2)

    def forward(self, noisy, timesteps, text):
        x = noisy.flatten(2).mT
        return nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), x)


def test_attention_that_never_reads_the_text_is_refused(tmp_path):
    inputs = probe(Conditioning("sample"), {"cross_attention_dim": 6}, (2, 4, 4), 500, CPU)
    with pytest.raises(
        ValueError, match="Deaf: expected attention to keys and values that are projections of the text"
    ):
        find_text_layers(Deaf(), inputs)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_does_not_fit_is_named(tmp_path):
    folder = save_tiny(tmp_path / "model", "epsilon")
    with pytest.raises(ValueError, match=r"nothing: expected a folder with model_index\.json"):
        open_source(tmp_path / "nothing", CPU)
    edit(folder / "unet/config.json", block_out_channels=[8, 16])
    with pytest.raises(ValueError, match="model/unet: expected a UNet2DConditionModel as diffusers saves it"):
        load_pipeline(folder, CPU)
    edit(folder / "unet/config.json", block_out_channels=[8, 8], layers_per_block=2)
    with pytest.raises(
        ValueError, match="model/unet: expected the weights of UNet2DConditionModel, found missing_keys"
    ):
        load_pipeline(folder, CPU)
    edit(folder / "unet/config.json", layers_per_block=1, class_embed_type="timestep")
    with pytest.raises(ValueError, match="model/unet: expected the weights"):
        load_pipeline(folder, CPU)
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match="model/unet: expected a UNet2DConditionModel"):
        load_pipeline(folder, CPU)
    edit(folder / "model_index.json", unet=["somewhere", "Strange"])
    with pytest.raises(ValueError, match="model/unet: expected a class of diffusers, found Strange of somewhere"):
        load_pipeline(folder, CPU)
    edit(folder / "model_index.json", unet=[None, None])
    with pytest.raises(ValueError, match="expected a pipeline with a scheduler and a unet or transformer"):
        load_pipeline(folder, CPU)


class Demanding(nn.Module):
    """Wants more than text."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, guidance):
        """Never called."""


@pytest.mark.parametrize("config", [{}, {"class_embed_type": "timestep"}, {"addition_embed_type": "image"}])
def test_other_conditioning_is_refused(config):
    found = ", ".join(["guidance", *config])
    with pytest.raises(ValueError, match=f"Demanding: expected conditioning on text only, found also {found}"):
        Conditioning.of(Demanding(), config)


def test_the_testbed_is_a_source_too():
    assert TESTBEDS["emoji"].source.is_dir()
    source = open_source(TESTBEDS["emoji"].source, CPU)
    assert isinstance(source, SourceModel) and source.device == CPU
    assert len(source.schedule) == 1000
