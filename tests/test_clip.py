"""CLIP's two towers: features are open_clip's own, weights of other models are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_world import rows, write_table

from benchmark.extraction_speed import network_share
from feature_extraction import clip
from feature_extraction.encoders import load_encoder
from feature_extraction.sources import open_source

CPU = torch.device("cpu")
CONFIG = {
    "embed_dim": clip.WIDTH,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
CAPTIONS = ["a red circle", "", "Two dogs &amp; a cat, résumé", "many words " * 100]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG).eval()


@pytest.fixture
def weights(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model's file, read as if ViT-B/32 were as small."""
    (tmp_path / "tiny-clip.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    monkeypatch.setattr(clip, "MODEL", "tiny-clip")
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def pictures(count: int) -> list[Image.Image]:
    arrays = np.random.default_rng(0).integers(0, 256, (count, 70, 50, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in arrays]


def test_image_features_are_the_models_own(model, weights: Path) -> None:
    images = pictures(10)
    preprocess = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(), is_train=False)
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(image) for image in images])).numpy()
    found = load_encoder("clip", CPU, {"clip": weights}).encode(images, [""] * 10)
    assert found.dtype == np.float32 and found.shape == (10, 512)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.ptp(np.linalg.norm(found, axis=1)) > 0, "not normalised"


def test_text_features_are_the_models_own(model, weights: Path) -> None:
    tokens = open_clip.tokenize(CAPTIONS)
    assert tokens.shape == (4, 77) and tokens[3, -1] == tokens[0].max(), "a long caption is cut and closed"
    with torch.no_grad():
        expected = model.encode_text(tokens).numpy()
    encoder = load_encoder("clip_text", CPU, {"clip_text": weights})
    assert not encoder.reads_images
    assert np.abs(encoder.encode([], CAPTIONS) - expected).max() < 1e-5 * np.abs(expected).max()
    assert encoder.encode([], []).shape == (0, 512)


def test_both_networks_are_measured(weights: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "pictures.parquet", rows(2))
    for name in ("clip", "clip_text"):
        encoder = load_encoder(name, CPU, {name: weights})
        share = network_share(encoder, open_source(tmp_path / "pictures.parquet"), 2)
        assert share is not None and 0 < share < 1


def test_numbers_beside_openais_weights_are_passed_over(model, weights: Path, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in model.state_dict().items()}
    numbers = {name: torch.tensor(77) for name in clip.RECORDED}
    torch.save(state | numbers, tmp_path / "openai.pt")
    loaded = clip.load_model(tmp_path / "openai.pt")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_a_program_is_not_run(weights: Path, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt: expected a PyTorch state dict .* found a TorchScript archive"):
        clip.load_model(tmp_path / "ViT-B-32.pt")


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    save_file({"visual.proj": torch.zeros(3, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: expected the weights of CLIP ViT-B/32"):
        load_encoder("clip", CPU, {"clip": tmp_path / "w.safetensors"})


def test_full_size_is_vit_b_32() -> None:
    config = open_clip.get_model_config(clip.MODEL)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in open_clip.CLIP(**config).state_dict().items()}
    assert config["quick_gelu"], "OpenAI's activation"
    assert shapes["visual.conv1.weight"] == (768, 3, 32, 32) and shapes["visual.proj"] == (768, 512)
    assert shapes["text_projection"] == (512, 512) and shapes["positional_embedding"] == (77, 512)
