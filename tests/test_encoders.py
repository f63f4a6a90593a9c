"""Encoders: the packaged weights recognise photographs, features do not depend on the batch, compositions are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn
import timm
import torch
from PIL import Image
from small_world import draw
from timm.data import ImageNetInfo

from feature_extraction import effnet, encoders
from feature_extraction.encoders import (
    Encoder,
    concatenate,
    identity,
    load_encoder,
    parse_weights,
    part_names,
)
from feature_extraction.readers import open_image

PHOTOGRAPHS = {
    Path(skimage.__file__).parent / "data" / "chelsea.png": {"tabby", "tiger cat", "Egyptian cat"},
    Path(skimage.__file__).parent / "data" / "coffee.png": {"espresso", "cup", "coffee mug"},
    Path(skimage.__file__).parent / "data" / "rocket.jpg": {"missile", "projectile", "space shuttle"},
    Path(skimage.__file__).parent / "data" / "motorcycle_left.png": {"moped", "motor scooter"},
    Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg": {"daisy"},
    Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg": {"palace", "bell cote", "monastery"},
}


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    return effnet.load_classifier(effnet.default_weights())


@pytest.fixture(scope="module")
def composition() -> Encoder:
    return load_encoder("effnet+minilm+pixel", torch.device("cpu"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw(colour, shape, "flat") for colour in ("red", "green", "blue") for shape in ("circle", "square")]


CAPTIONS = ["a red circle", "a square", "x", "grinning face, noto style", "cat", "a long way home for two old dogs"]


@pytest.mark.parametrize("pixels", [224, effnet.PIXELS])
def test_packaged_weights_classify_photographs(classifier: torch.nn.Module, pixels: int) -> None:
    names = ImageNetInfo()
    batch = effnet.preprocess([open_image(path) for path in PHOTOGRAPHS], pixels)
    with torch.no_grad():
        classes = classifier(batch).argmax(1).tolist()
    for path, index in zip(PHOTOGRAPHS, classes, strict=True):
        found = names.index_to_description(index).split(",")[0]
        assert found in PHOTOGRAPHS[path], f"{path.name} classified as {found}"


def test_key_mapping_is_a_bijection_onto_timm() -> None:
    packaged = torch.load(effnet.default_weights(), map_location="cpu", weights_only=True)
    wanted = timm.create_model(effnet.MODEL, pretrained=False).state_dict()
    mapped = {effnet.timm_key(key): value.shape for key, value in packaged.items()}
    assert len(mapped) == len(packaged)
    assert mapped == {key: value.shape for key, value in wanted.items()}
    with pytest.raises(ValueError, match=r"parameter 'features\.0\.weight'"):
        effnet.timm_key("features.0.weight")


def test_folding_batch_norms_changes_nothing(classifier: torch.nn.Module, composition, pictures) -> None:
    with torch.no_grad():
        maps = classifier.forward_features(effnet.preprocess(pictures, effnet.PIXELS))  # type: ignore[operator]
        expected = maps.mean((2, 3)).numpy()
    found = composition.parts[0].encode(pictures, CAPTIONS)
    assert found.dtype == np.float32 and found.shape == (6, 1280)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_preprocessing_keeps_the_centre_in_range() -> None:
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    batch = effnet.preprocess([wide, wide.rotate(90, expand=True)], 64)
    assert batch.shape == (2, 3, 64, 64)
    assert (batch[:, :, 4:-4, 4:-4] == 1).all()
    assert (effnet.preprocess([Image.new("RGB", (1, 3000))], 32) == -1).all()


def test_features_do_not_depend_on_the_batch(composition, pictures) -> None:
    together = composition.encode(pictures, CAPTIONS)
    alone = np.concatenate([composition.encode([p], [c]) for p, c in zip(pictures, CAPTIONS, strict=True)])
    assert together.shape == (6, composition.dim) == (6, 1280 + 384 + 768)
    assert np.abs(together - alone).max() < 1e-5


def test_composition_is_the_normalised_parts_in_order(composition, pictures) -> None:
    whole = composition.encode(pictures, CAPTIONS)
    start = 0
    for part in composition.parts:
        features = part.encode(pictures if part.reads_images else [], CAPTIONS)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        assert np.allclose(whole[:, start : start + part.dim], unit, atol=1e-6)
        start += part.dim
    assert composition.name == "effnet+minilm+pixel"


def test_a_zero_part_stays_zero() -> None:
    joined = concatenate([np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[2.0], [-2.0]])])
    assert joined.dtype == np.float32
    assert np.allclose(joined, np.array([[0, 0, 1], [0.6, 0.8, -1]]))


def test_pixel_is_darkness_of_a_reduced_picture() -> None:
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste((255, 0, 0), (0, 0, 2, 2))
    feature = load_encoder("pixel").encode([picture], ["x"])[0].reshape(16, 16, 3)
    assert feature[0, 0].tolist() == [0, 1, 1]
    assert feature.sum() == 2


def test_texts_of_like_meaning_are_nearer(composition) -> None:
    cat, kitten, truck = composition.parts[1].encode([], ["a cat", "a small kitten", "a fire truck"])
    assert cat @ kitten > 0.6 > 0.4 > cat @ truck


def test_no_images_no_rows(composition) -> None:
    assert composition.encode([], []).shape == (0, composition.dim)


@pytest.mark.parametrize(
    ("ftype", "complaint"),
    [("dino3", "found 'dino3'"), ("effnet+", "found ''"), ("effnet+effnet", "each encoder once"), ("", "found ''")],
)
def test_unknown_ftypes_are_refused(ftype: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        part_names(ftype)


def test_weights_option(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"x")
    path = str(tmp_path / "w.pth")
    assert parse_weights("effnet", [path]) == {"effnet": Path(path)}
    assert parse_weights("effnet+minilm", [f"effnet={path}", f"minilm={tmp_path}"]) == {
        "effnet": Path(path),
        "minilm": tmp_path,
    }
    for ftype, option in (("effnet+minilm", path), ("effnet", f"clip={path}"), ("effnet", "none.pth"), ("pixel", path)):
        with pytest.raises(ValueError, match="--weights"):
            parse_weights(ftype, [option])


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02cos\nsystem\n."])
def test_damaged_and_hostile_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth: expected a PyTorch state dict"):
        load_encoder("effnet", torch.device("cpu"), {"effnet": path})


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for state in ({"layer.weight": torch.zeros(2)}, {"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}):
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"w\.pth: expected the weights of EfficientNet-Lite0"):
            effnet.load_classifier(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="found a list"):
        effnet.load_classifier(path)


def test_weights_path_replaces_the_packaged_ones(tmp_path: Path, classifier: torch.nn.Module, pictures) -> None:
    """Weights under timm's names load too, give other features where they differ, and another identity."""
    state = classifier.state_dict()
    state["bn2.weight"] = state["bn2.weight"] * 0.5
    torch.save(state, tmp_path / "w.pth")
    weights = {"effnet": tmp_path / "w.pth"}
    changed = load_encoder("effnet", torch.device("cpu"), weights).encode(pictures[:1], [""])
    packaged = load_encoder("effnet", torch.device("cpu")).encode(pictures[:1], [""])
    assert np.abs(changed - packaged).max() > 0.01
    assert identity("effnet", weights) != identity("effnet")


def test_identity_says_what_features_depend_on() -> None:
    parts = identity("effnet+minilm")["parts"]
    assert parts["effnet"]["pixels"] == effnet.PIXELS
    assert parts["effnet"]["weights"].startswith("57934424"), "the package names its file by this hash"
    assert {name: part["dim"] for name, part in parts.items()} == {"effnet": 1280, "minilm": 384}
    assert set(encoders.ENCODERS) >= {"effnet", "minilm", "pixel"}
