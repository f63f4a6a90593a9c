"""Bundles: a picture in, training images out, the same as by hand; parts that do not belong together are refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_world import build_bundle, draw, png, write_bundle, write_ranker

from fastgda.core import sha256_file
from fastgda.ranker import load_ranker
from feature_extraction.encoders import load_encoder
from feature_extraction.readers import open_image
from serving import Attributor
from serving.bundle import main as bundle_command

IMAGES = 36


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set of 36 pictures, the last of which cannot be read, a ranker and a bundle."""
    folder = tmp_path_factory.mktemp("world") / "emoji"
    write_bundle(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def bundle(data: Path) -> Path:
    return data / "bundle"


def slow_twin(data: Path, picture: bytes, prompt: str) -> np.ndarray:
    """All readable ids, sorted by the ranker's scores."""
    features = np.load(data / "feats" / "pixel" / "data_feats.npy")[: IMAGES - 1]
    query = load_encoder("pixel").encode([open_image(picture)], [prompt])
    ranker = load_ranker(data / "ranker.pth")
    with torch.no_grad():
        scores = ranker(torch.from_numpy(features)) @ ranker(torch.from_numpy(query))[0]
    return np.argsort(-scores.numpy(), kind="stable")


def test_a_picture_is_attributed_as_by_hand(data: Path, bundle: Path, tmp_path: Path) -> None:
    attributor, picture, prompt = Attributor.from_pretrained(bundle), draw("red", "circle", "flat"), "red circle"
    (tmp_path / "x.png").write_bytes(png(picture))
    expected = slow_twin(data, png(picture), prompt)
    for given in (picture, png(picture), tmp_path / "x.png", str(tmp_path / "x.png")):
        found = attributor.attribute(given, prompt, k=IMAGES - 1)
        assert np.array_equal(found.ids, expected)
    first = found.metadata[0]
    assert first is not None and first["id"] == expected[0] and first["licence"] == "CC0-1.0"
    assert first["creator"] in ("flat studio", "outline studio") and first["caption"].endswith("style")
    assert found.timings.encode > 0 and found.timings.metadata > 0
    with pytest.raises(ValueError, match="k = 36: expected 1 to 35"):
        attributor.attribute(picture, prompt, k=IMAGES)
    with pytest.raises(ValueError, match="k = 0"):
        attributor.attribute(picture, prompt, k=0)
    with pytest.raises(ValueError, match="image 1: expected an image"):
        attributor.attribute_batch([picture, b"nothing"], ["a", "b"])
    with pytest.raises(ValueError, match="prompts: expected one for each of 2 images, found 1"):
        attributor.attribute_batch([picture, picture], ["a"])


def test_pictures_in_memory_are_read_as_their_files_are(bundle: Path) -> None:
    attributor = Attributor.from_pretrained(bundle, verify=False)
    clear = draw("red", "circle", "flat").convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))))
    clear.paste((0, 0, 0, 0), (0, 0, 64, 20))
    deep = Image.fromarray(np.asarray(draw("blue", "square", "flat").convert("L"), dtype=np.uint16) * 257)
    turned = draw("blue", "triangle", "flat")
    turned.getexif()[0x0112] = 6
    exif = BytesIO()
    turned.save(exif, "PNG", exif=turned.getexif())
    for picture, content in ((clear, png(clear)), (deep, png(deep)), (turned, exif.getvalue())):
        as_file, as_object = (attributor.features([given], ["x"]) for given in (content, picture))
        assert np.array_equal(as_file, as_object)
    with pytest.raises(ValueError, match="image 0: expected an image, found one of 0 x 5 pixels"):
        attributor.attribute(Image.new("RGB", (0, 5)), "x")
    with pytest.raises(ValueError, match="image 0: expected at most 50 megapixels, found 9000 x 6000"):
        attributor.attribute(Image.new("1", (9000, 6000)), "x")


@pytest.mark.parametrize("prompt", [None, 5, b"red"])
def test_prompts_are_text_even_where_no_encoder_reads_them(bundle: Path, prompt: Any) -> None:
    attributor = Attributor.from_pretrained(bundle, verify=False)
    with pytest.raises(ValueError, match="prompt 1: expected text, found"):
        attributor.attribute_batch([draw("red", "circle", "flat")] * 2, ["x", prompt])


def test_threads_and_batches_get_the_same_answers(bundle: Path) -> None:
    attributor = Attributor.from_pretrained(bundle, verify=False)
    pictures = [draw(colour, shape, "flat") for colour in ("red", "blue") for shape in ("circle", "square", "triangle")]
    alone = [attributor.attribute(picture, "x", 5).ids.tolist() for picture in pictures]
    batch = [found.ids.tolist() for found in attributor.attribute_batch(pictures, ["x"] * 6, 5)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda picture: attributor.attribute(picture, "x", 5).ids.tolist(), pictures * 3))
    assert batch == alone and together == alone * 3


def test_saved_bundle_is_the_same_and_keeps_opt_outs(bundle: Path, tmp_path: Path, files_in) -> None:
    own = shutil.copytree(bundle, tmp_path / "own")
    attributor, picture = Attributor.from_pretrained(own), draw("red", "circle", "flat")
    gone = int(attributor.attribute(picture, "x", 1).ids[0])
    attributor.bundle.index.remove(np.array([gone]), command="opt-out")
    expected = attributor.attribute(picture, "x", 10)
    assert attributor.save_pretrained(tmp_path / "copy") == tmp_path / "copy"
    again = Attributor.from_pretrained(tmp_path / "copy")
    found = again.attribute(picture, "x", 10)
    assert gone not in found.ids and np.array_equal(found.ids, expected.ids)
    scores, creators = np.array([0.5, 0.25]), ["a", "b"]
    mine, other = again.bundle.credit, attributor.bundle.credit
    assert mine is not None and other is not None
    assert mine.shares(scores, creators) == other.shares(scores, creators)
    assert not any("lock" in name or name.startswith(".") for name in files_in(tmp_path / "copy"))
    with pytest.raises(ValueError, match="expected an empty folder"):
        attributor.save_pretrained(tmp_path / "copy")


def test_without_a_ranker_cosines_are_searched(data: Path, tmp_path: Path) -> None:
    assert build_bundle(data, tmp_path / "cosine", checkpoint=None, credit=None) == 0
    picture = draw("blue", "square", "outline")
    query = load_encoder("pixel").encode([picture], [""])[0]
    features = np.load(data / "feats" / "pixel" / "data_feats.npy")[: IMAGES - 1]
    cosines = features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)
    found = Attributor.from_pretrained(tmp_path / "cosine").attribute(picture, "", 3)
    assert np.allclose(found.scores, np.sort(cosines)[::-1][:3], atol=1e-6)


def test_the_index_is_built_as_asked_for(data: Path, tmp_path: Path) -> None:
    assert build_bundle(data, tmp_path / "graph", factory="HNSW8,SQ8", store="float16", shards=1) == 0
    attributor = Attributor.from_pretrained(tmp_path / "graph")
    (segment,) = attributor.bundle.index.snapshot().segments
    assert (segment.config.factory, segment.config.store) == ("HNSW8,SQ8", "float16")
    picture = draw("red", "circle", "flat")
    assert attributor.attribute(picture, "", 3).ids[0] == slow_twin(data, png(picture), "")[0]


def test_parts_of_others_are_refused(data: Path, bundle: Path, tmp_path: Path, capsys) -> None:
    own = shutil.copytree(bundle, tmp_path / "own")
    manifest = own / "manifest.json"
    original = manifest.read_text()
    manifest.write_text(original.replace('"pixels": 16', '"pixels": 8'))
    with pytest.raises(ValueError, match=r"found another: encoder.parts.pixel.pixels is 16, wanted 8"):
        Attributor.from_pretrained(own)
    manifest.write_text(original)
    torch.manual_seed(5)
    write_ranker(tmp_path / "other.pth", 768)
    ranker = load_ranker(tmp_path / "other.pth")
    ranker.scale.data += 1
    torch.save(ranker.state_dict(), tmp_path / "other.pth")
    shutil.copyfile(tmp_path / "other.pth", own / "ranker.pth")
    with pytest.raises(ValueError, match=r"ranker.pth: expected SHA-256"):
        Attributor.from_pretrained(own)
    # a manifest that was made to fit the other ranker still meets the index's own record
    changed = json.loads(original)
    changed["config"]["ranker"] = changed["files"]["ranker.pth"]["sha256"] = sha256_file(own / "ranker.pth")
    del changed["files"]["credit.json"]
    manifest.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="expected an index of the ranker"):
        Attributor.from_pretrained(own)
    assert build_bundle(data, tmp_path / "new", checkpoint=tmp_path / "other.pth") == 2
    assert "credit.json: expected the credit rule of ranker" in capsys.readouterr().err


def test_metadata_of_other_pictures_is_refused(data: Path, tmp_path: Path, capsys) -> None:
    path, table = tmp_path / "meta.parquet", pq.read_table(data / "trainset" / "emoji.parquet")
    for changed, complaint in (
        (table.slice(0, 30), "expected 36 rows"),
        (table.take(list(range(IMAGES))[::-1]), "expected the ids 0, 1, 2, ... in order"),
        (table.append_column("more", table["set"]), "expected the pictures that"),
    ):
        pq.write_table(changed, path)
        assert build_bundle(data, tmp_path / "bundle", metadata=path) == 2
        assert complaint in capsys.readouterr().err
    pq.write_table(table.drop_columns(["image"]), path)
    assert build_bundle(data, tmp_path / "bundle", metadata=path) == 0
    assert build_bundle(data, tmp_path / "bundle", metadata=path) == 2
    assert "expected no bundle there" in capsys.readouterr().err


def test_info_tells_what_is_inside(bundle: Path, capsys) -> None:
    assert bundle_command(["info", str(bundle)]) == 0
    told = capsys.readouterr().out
    assert "35 x 16" in told and "pixel" in told and "credit       nothing" in told
    assert bundle_command(["info", str(bundle.parent)]) == 2
