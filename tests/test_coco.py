"""The COCO model: its shape as published, its files in the released layout, and files that are not its."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from abu.coco import build_coco, load_coco
from abu.layers import matrix_shape, select_layers
from abu.pipelines import open_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    """The state dict, zeros that take no memory but for the last bias, which is then what the model predicts."""
    with torch.device("meta"):
        model = build_coco()
    zeros = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    return zeros | {"conv_out.bias": torch.arange(4.0)}


@pytest.fixture(scope="module")
def source(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("coco") / "model.bin"
    torch.save(weights, path)
    return open_source(path, CPU)


def test_weights_are_loaded_and_run(source):
    assert source.device == CPU and not any(p.requires_grad for p in source.denoiser.parameters())
    predicted = source.denoiser(torch.zeros(1, 4, 16, 16), torch.tensor([999]), torch.zeros(1, 77, 1024)).sample
    assert torch.equal(predicted, torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 16, 16))


def test_schedule_is_ddpms(source):
    assert torch.equal(source.schedule.levels, DDPMScheduler(1000).alphas_cumprod)
    assert source.schedule.prediction == "epsilon"


def test_text_layers_are_those_of_the_published_shape(source):
    """16 attentions to the text: 2 + 2 + 2 on the way down, 1 in the middle, 3 + 3 + 3 on the way up."""
    layers = select_layers(source.denoiser)
    shapes = [matrix_shape(layer) for layer in layers.values()]
    assert len(shapes) == 2 * 16
    assert shapes.count((128, 1024)) == 2 * 5 and shapes.count((256, 1024)) == 2 * 11
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in layers


def test_other_files_are_refused(tmp_path, weights):
    path = tmp_path / "model.bin"
    with pytest.raises(ValueError, match=r"model.bin: expected a file, found nothing"):
        load_coco(path, CPU)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model.bin: expected a PyTorch state dict or safetensors, found a damaged"):
        load_coco(path, CPU)
    key = "conv_in.weight"
    torch.save({name: tensor for name, tensor in weights.items() if name != key}, path)
    with pytest.raises(ValueError, match=r"the weights of the COCO model.*conv_in.weight is absent, expected \[128, 4"):
        load_coco(path, CPU)
    torch.save(weights | {key: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"conv_in.weight is \[1\], expected \[128, 4, 3, 3\]"):
        load_coco(path, CPU)
