"""Weights that are missing, AbC's maps, and half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import draw

from feature_extraction.abc_map import AbC
from feature_extraction.encoders import (
    Bfloat16,
    Composition,
    MiniLMText,
    Pixel,
    asymmetric,
    concatenate,
    identity,
    load_encoder,
    parse_weights,
)
from feature_extraction.weights import read_state_dict

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ftype", "repo", "name"),
    [
        ("dino", "timm/vit_base_patch16_224.dino", "model.safetensors"),
        ("dinov2", "timm/vit_large_patch14_reg4_dinov2.lvd142m", "model.safetensors"),
        ("clip", "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"),
        ("clip_text", "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"),
    ],
)
def test_unreachable_weights_say_what_was_tried(ftype: str, repo: str, name: str) -> None:
    for attempt in (lambda: load_encoder(ftype, CPU), lambda: identity(ftype)):
        with pytest.raises(ValueError) as error:
            attempt()
        message = str(error.value)
        assert message.startswith(f"{ftype}: weights not found; tried {name} of {repo} in the cache ")
        assert f"--weights {ftype}=PATH" in message and len(message.splitlines()) == 1


def test_cached_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the hub's cache: a snapshot of a commit, and the commit that `main` names."""
    from huggingface_hub import constants

    folder = tmp_path / "models--timm--vit_base_patch16_224.dino"
    commit = "0" * 40
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert len(identity("dino")["parts"]["dino"]["weights"]) == 64


def test_nested_dicts_are_flattened_and_numbers_left_out(tmp_path: Path) -> None:
    torch.save({"a": {"weight": torch.ones(2)}, "epoch": 3, "b": torch.zeros(1)}, tmp_path / "w.pth")
    assert sorted(read_state_dict(tmp_path / "w.pth")) == ["a.weight", "b"]


def test_a_damaged_safetensors_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"w\.safetensors: expected a PyTorch state dict or safetensors"):
        read_state_dict(tmp_path / "w.safetensors")


def abc_checkpoint(path: Path, dim: int, kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint in the released layout with random maps."""
    generator = torch.Generator().manual_seed(0)

    def mapper() -> dict[str, torch.Tensor]:
        if kind == "linear":
            return {"weight": torch.randn(dim, dim, generator=generator), "bias": torch.randn(dim, generator=generator)}
        return {"weights": torch.rand(1, dim, generator=generator)}

    state = {"real_mapper": mapper(), "synth_mapper": mapper()}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("kind", ["linear", "channel"])
def test_abc_maps_training_images_and_queries_apart(tmp_path: Path, kind: str) -> None:
    state = abc_checkpoint(tmp_path / "abc.pth", Pixel.dim, kind)
    images = [draw(colour, "circle", "flat") for colour in ("red", "blue")]
    x = Pixel().encode(images, ["", ""])
    for query, side in ((False, "real_mapper"), (True, "synth_mapper")):
        maps = {key: value.double().numpy() for key, value in state[side].items()}
        y = x @ maps["weight"].T + maps["bias"] if kind == "linear" else x * maps["weights"]
        encoder = AbC(Pixel(), tmp_path / "abc.pth", query)
        assert (encoder.name, encoder.dim) == ("abc_pixel", Pixel.dim)
        found = encoder.encode(images, ["", ""])
        assert np.allclose(found, y / np.linalg.norm(y, axis=1, keepdims=True), atol=1e-6)


def test_abc_refuses_other_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "abc.pth"
    for state, found in (({"weight": torch.ones(2)}, "nothing called real_mapper"), (None, r"\[3, 3\]")):
        if state is None:
            abc_checkpoint(path, 3, "linear")
        else:
            torch.save(state, path)
        with pytest.raises(ValueError, match=rf"abc\.pth: expected real_mapper\.weight \[768, 768\].*{found}"):
            AbC(Pixel(), path, query=False)


def test_abc_needs_its_checkpoint_and_its_backbone(tmp_path: Path) -> None:
    assert asymmetric("minilm+abc_clip") and not asymmetric("clip+clip_text")
    with pytest.raises(ValueError, match=r"abc_dino: its checkpoint is on no hub; .*--weights abc_dino=PATH"):
        load_encoder("abc_dino", CPU)
    abc_checkpoint(tmp_path / "abc.pth", 768, "linear")
    weights = parse_weights("abc_dino", [str(tmp_path / "abc.pth")])
    with pytest.raises(ValueError, match="dino: weights not found"):
        load_encoder("abc_dino", CPU, weights)
    both = parse_weights("abc_dino", [f"abc_dino={tmp_path / 'abc.pth'}", f"dino={tmp_path / 'abc.pth'}"])
    assert identity("abc_dino", both)["parts"]["abc_dino"]["backbone"]["model"] == "vit_base_patch16_224.dino"


def test_raw_parts_keep_their_lengths() -> None:
    parts = [np.array([[3.0, 4.0]]), np.array([[2.0]])]
    assert np.allclose(concatenate(parts, "raw"), [[3, 4, 2]])
    assert np.allclose(concatenate(parts), [[0.6, 0.8, 1]])
    assert Composition([Pixel(), Pixel()], "raw").encode([Image.new("RGB", (16, 16))], [""]).sum() == 2 * 768
    assert identity("pixel+minilm", join="raw") != identity("pixel+minilm")
    assert identity("pixel", join="raw") == identity("pixel"), "nothing to join"


def test_half_precision_drifts_little_and_says_so() -> None:
    captions = ["a red circle", "grinning face, noto style"]
    full = load_encoder("minilm", CPU)
    half = load_encoder("minilm", CPU, precision="bfloat16")
    a, b = full.encode([], captions), half.encode([], captions)
    assert isinstance(full, MiniLMText) and b.dtype == np.float32
    assert np.abs(a - b).max() > 0 and ((a * b).sum(1) > 0.999 * np.linalg.norm(b, axis=1)).all()
    assert identity("minilm", precision="bfloat16") == identity("minilm") | {"precision": "bfloat16"}


def test_half_precision_leaves_the_map_of_abc_as_it_is(tmp_path: Path) -> None:
    """The map is float32 under autocast: on a backbone without matrix products nothing changes at all."""
    abc_checkpoint(tmp_path / "abc.pth", Pixel.dim, "linear")
    images = [draw(colour, "circle", "flat") for colour in ("red", "blue")]
    full = AbC(Pixel(), tmp_path / "abc.pth", query=False)
    found = Bfloat16(full, CPU).encode(images, ["", ""])
    assert found.dtype == np.float32 and np.array_equal(found, full.encode(images, ["", ""]))
