"""torch.hub's DINO and DINOv2 state dicts in timm's architecture give the outputs of the original forward pass."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from small_world import rows, write_table
from torch import Tensor

from benchmark.extraction_speed import network_share
from feature_extraction.preprocess import Preprocessing
from feature_extraction.sources import open_source
from feature_extraction.vit import DINO, DINOV2, IMAGENET, Architecture, ViT, create, timm_state

CPU = torch.device("cpu")
WIDTH, HEADS, DEPTH = 384, 6, 2
TINY = {"depth": DEPTH}
SMALL_DINO = Architecture(
    "DINO", "vit_small_patch16_224.dino", WIDTH, {**TINY, "img_size": 32}, Preprocessing(40, 32, **IMAGENET)
)
SMALL_DINOV2 = Architecture(
    *("DINOv2", "vit_small_patch14_reg4_dinov2.lvd142m", WIDTH),
    {**TINY, "img_size": 28},
    Preprocessing(36, 28, **IMAGENET),
)


def hub_state(patch: int, grid: int, registers: int) -> dict[str, Tensor]:
    """Random weights under the names and shapes of torch.hub's DINO (no registers) or DINOv2 (registers)."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    state = {
        "cls_token": random(1, 1, WIDTH),
        "pos_embed": random(1, 1 + grid**2, WIDTH),
        "patch_embed.proj.weight": random(WIDTH, 3, patch, patch) / patch,
        "patch_embed.proj.bias": random(WIDTH),
        "norm.weight": 1 + random(WIDTH),
        "norm.bias": random(WIDTH),
    }
    if registers:
        state |= {"register_tokens": random(1, registers, WIDTH), "mask_token": random(1, WIDTH)}
    for block in range(DEPTH):
        layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        layers |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, shape in layers.items():
            state[f"blocks.{block}.{name}.weight"] = random(*shape)
            state[f"blocks.{block}.{name}.bias"] = random(shape[0])
        for name in ("norm1", "norm2"):
            state[f"blocks.{block}.{name}.weight"] = 1 + random(WIDTH)
            state[f"blocks.{block}.{name}.bias"] = random(WIDTH)
        if registers:
            state |= {f"blocks.{block}.ls{place}.gamma": 1 + random(WIDTH) for place in (1, 2)}
    return state


def hub_forward(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The class token of the published architecture, written from the papers with the original's names: [B, WIDTH]."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    side = x.shape[-1]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    positions = state["pos_embed"]
    grid = math.isqrt(positions.shape[1] - 1)
    if grid != side:
        plane = positions[:, 1:].reshape(1, grid, grid, WIDTH).permute(0, 3, 1, 2)
        plane = F.interpolate(plane, size=(side, side), mode="bicubic", antialias=True)
        positions = torch.cat([positions[:, :1], plane.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], 1)
    x = x + positions
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for block in (f"blocks.{number}" for number in range(DEPTH)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        y = linear(f"{block}.attn.proj", (attention @ v).transpose(1, 2).flatten(2))
        x = x + y * state.get(f"{block}.ls1.gamma", 1)
        y = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
        x = x + y * state.get(f"{block}.ls2.gamma", 1)
    return norm("norm", x)[:, 0]


def pictures(count: int = 3) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(2)
    arrays = torch.randint(0, 256, (count, 50, 60, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(array.numpy()) for array in arrays]


@pytest.mark.parametrize(
    ("architecture", "patch", "grid", "registers"), [(SMALL_DINO, 16, 2, 0), (SMALL_DINOV2, 14, 5, 4)]
)
def test_hub_weights_give_the_original_outputs(tmp_path: Path, architecture, patch, grid, registers) -> None:
    state = hub_state(patch, grid, registers)
    torch.save(state, tmp_path / "hub.pth")
    encoder = ViT("dino", architecture, tmp_path / "hub.pth", CPU)
    images = pictures()
    found = torch.from_numpy(encoder.encode(images, [""] * 3))
    expected = hub_forward(state, architecture.preprocess(images))
    assert found.shape == (3, WIDTH)
    assert expected.std(0).min() > 1e-3, "the pictures must matter"
    assert torch.allclose(found, expected, atol=2e-5)
    save_file(encoder.network.state_dict(), tmp_path / "timm.safetensors")
    write_table(tmp_path / "pictures.parquet", rows(2))
    share = network_share(encoder, open_source(tmp_path / "pictures.parquet"), 2)
    assert share is not None and 0 < share < 1
    again = ViT("dino", architecture, tmp_path / "timm.safetensors", CPU)
    assert torch.equal(torch.from_numpy(again.encode(images, [""] * 3)), found), "timm's own names load as well"


@pytest.mark.parametrize(
    ("architecture", "parameters", "tokens"), [(DINO, 85_798_656, (1, 197, 768)), (DINOV2, 303_230_976, (1, 256, 1024))]
)
def test_full_size_is_the_published_one(architecture, parameters, tokens) -> None:
    """12 D² + 13 D parameters a block (ViT-L/14: and 2 D of layer scale), counted on the meta device at 224 px."""
    model = create(architecture.model, num_classes=0, **architecture.options)
    positions = model.state_dict()["pos_embed"]
    assert positions.shape == tokens
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert architecture.dim == tokens[-1]


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    state = hub_state(16, 2, 0)
    del state["blocks.1.norm2.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: expected the weights of DINO, .*blocks\.1\.norm2\.bias is absent"):
        ViT("dino", SMALL_DINO, tmp_path / "w.pth", CPU)


def test_the_class_token_takes_its_place_once() -> None:
    """DINOv2's position of the class token moves into the token: the sum stays."""
    state = hub_state(14, 2, 4)
    mapped = timm_state(state, create(SMALL_DINOV2.model, num_classes=0, **SMALL_DINOV2.options))
    assert torch.equal(mapped["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(mapped["pos_embed"], state["pos_embed"][:, 1:])
    assert "mask_token" not in mapped and "mask_token" in state
