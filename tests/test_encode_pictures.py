"""Encoding pictures with a pipeline's own encoders, reading the arrays back, and what becomes of an interrupted run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from small_world import COLOURS, SHAPES
from small_world import draw as paint
from tiny_pipelines import CPU, WIDTH, save_tiny_diffusion

from abu import fisher
from abu.encode_pictures import EncodeConfig, chosen_captions, main, read_batch
from abu.encoded import EncodedPictures
from abu.kronfluence_files import load_curvature
from abu.layers import select_layers
from abu.pipelines import PipelineEncoder, load_pipeline
from fastgda.core import keyed_generator, read_manifest, verify_artifact
from feature_extraction.sources import open_source

PICTURES, CAPTIONS, TOKENS = 7, 2, 8


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_tiny_diffusion(tmp_path_factory.mktemp("pipeline"), latent_channels=2, width=WIDTH, tokens=TOKENS)


@pytest.fixture
def pictures(tmp_path):
    """Annotations and pictures as COCO has them; picture 0 has one caption only, the others three."""
    folder = tmp_path / "trainset"
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for row in range(PICTURES):
        colour, shape = COLOURS[row % len(COLOURS)], SHAPES[row % len(SHAPES)]
        paint(colour, shape, "flat").resize((24 + 4 * row, 32)).save(folder / f"train2017/{row}.jpg")
        images.append({"id": 100 + row, "file_name": f"{row}.jpg"})
        texts = [f"{colour} {shape}", f"a {shape}", colour][: 1 if row == 0 else 3]
        annotations += [{"image_id": 100 + row, "caption": text} for text in texts]
    path = folder / "annotations/captions_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def encode(pipeline, pictures, output, *more):
    flags = ["--source", str(pipeline), "--pictures", str(pictures), "--output", str(output)]
    return main([*flags, "--pixels", "8", "--captions", str(CAPTIONS), "--batch_size", "3", *more])


def test_arrays_are_those_of_the_pipelines_own_encoders(pipeline, pictures):
    folder = pictures.parent.parent
    assert encode(pipeline, pictures, folder) == 0
    encoded = EncodedPictures.open(folder)
    assert encoded.latents.shape == (2 * PICTURES, 2, 4, 4) and encoded.latents.dtype == np.float32
    assert encoded.text.shape == (PICTURES, CAPTIONS, TOKENS, 6) and encoded.text.dtype == np.float16
    verify_artifact(folder / "latents.npy")

    pipe = PipelineEncoder(pipeline, CPU).pipeline
    table, config = open_source(pictures), EncodeConfig(pixels=8, captions=CAPTIONS)
    pixels = torch.stack([read_batch(table, range(4, 5), config)[0][0]])
    for view, images in enumerate((pixels, pixels.flip(-1))):
        noise = torch.randn(2, 4, 4, generator=keyed_generator("posterior", 0, 4, view))
        distribution = pipe.vae.encode(images).latent_dist
        expected = (distribution.mean + distribution.std * noise) * pipe.vae.config.scaling_factor
        torch.testing.assert_close(torch.tensor(encoded.latents[view * PICTURES + 4]), expected[0].detach())
    for row, caption in ((4, 1), (0, 1)):
        text = table.captions[row][caption % len(table.captions[row])]
        states = pipe.encode_prompt([text], CPU, 1, False)[0][0]
        torch.testing.assert_close(torch.tensor(encoded.text[row, caption]), states.half().detach(), atol=2e-3, rtol=0)


def test_an_interrupted_run_goes_on_and_ends_the_same(pipeline, pictures, tmp_path, monkeypatch, capsys):
    assert encode(pipeline, pictures, tmp_path / "whole") == 0
    original, calls = PipelineEncoder.text, []

    def stop_at_third(self, captions, pixels):
        calls.append(len(captions))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, captions, pixels)

    monkeypatch.setattr(PipelineEncoder, "text", stop_at_third)
    assert encode(pipeline, pictures, tmp_path / "stopped") == 130
    assert not list((tmp_path / "stopped").glob("*.npy"))
    assert encode(pipeline, pictures, tmp_path / "stopped", "--seed", "1") == 2
    assert "unfinished encoding of the same pictures" in capsys.readouterr().err
    assert encode(pipeline, pictures, tmp_path / "stopped") == 0
    assert calls == [6, 6, 2, 2], "what was written is not encoded again"
    for name in ("latents.npy", "text_embeddings.npy"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "stopped").iterdir() if p.name.startswith(".")) == []
    assert encode(pipeline, pictures, tmp_path / "whole") == 0
    assert "up to date" in capsys.readouterr().out
    assert len(calls) == 4


def test_a_damaged_picture_keeps_its_row(pipeline, pictures, capsys):
    folder = pictures.parent.parent
    (folder / "train2017/2.jpg").write_bytes(b"no picture")
    assert encode(pipeline, pictures, folder) == 2
    assert "expected at most 1.00% unreadable pictures" in capsys.readouterr().err
    assert encode(pipeline, pictures, folder, "--max_corrupt", "0.5") == 0
    encoded = EncodedPictures.open(folder)
    zero = [row for row in range(len(encoded.latents)) if not encoded.latents[row].any()]
    assert zero == [2, PICTURES + 2]
    (entry,) = json.loads((folder / "latents_skipped.json").read_text())
    assert entry["id"] == 2 and "2.jpg" in entry["reason"]


def test_files_of_others_are_not_overwritten(pipeline, pictures, capsys):
    released = pictures.parent.parent / "latents.npy"
    np.save(released, np.zeros((2 * PICTURES, 4, 16, 16), np.float32))
    assert encode(pipeline, pictures, released.parent) == 2
    assert "latents.npy: expected a file of this command or none" in capsys.readouterr().err


def test_captions_are_repeated_where_there_are_few():
    assert chosen_captions(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert chosen_captions(["a", "b", "c"], 2) == ["a", "b"]
    assert chosen_captions([], 2) == ["", ""]


def test_views_and_captions_are_mapped_from_disk(tmp_path):
    latents = np.arange(2 * 3 * 2 * 2 * 2, dtype=np.float32).reshape(6, 2, 2, 2)
    text = np.arange(3 * 2 * 4 * 5, dtype=np.float16).reshape(3, 2, 4, 5)
    np.save(tmp_path / "latents.npy", latents)
    np.save(tmp_path / "text_embeddings.npy", text)
    encoded = EncodedPictures.open(tmp_path)
    assert (len(encoded), encoded.views, encoded.captions) == (3, 2, 2)
    assert isinstance(encoded.text, np.memmap) and isinstance(encoded.latents, np.memmap)
    found = encoded.examples([2, 0], CPU, view=1, caption=1)
    assert torch.equal(found.latents, torch.tensor(latents[[5, 3]]))
    assert torch.equal(found.text, torch.tensor(text[[2, 0], 1]).float())
    assert found.ids == [2, 0] and found.role != encoded.examples([2, 0], CPU).role == "train"
    for options, message in (({"view": 2}, "view: expected 0..1"), ({"caption": -1}, "caption: expected 0..1")):
        with pytest.raises(ValueError, match=message):
            encoded.examples([0], CPU, **options)
    with pytest.raises(ValueError, match=r"pictures: expected ids 0..2, found 3"):
        encoded.examples([1, 3], CPU)
    np.save(tmp_path / "latents.npy", latents[:4])
    with pytest.raises(ValueError, match=r"latents.npy: expected latents of the 3 pictures .*, found 4"):
        EncodedPictures.open(tmp_path)
    (tmp_path / "text_embeddings.npy").unlink()
    with pytest.raises(ValueError, match=r"python -m abu.encode_pictures"):
        EncodedPictures.open(tmp_path)


def test_curvature_is_fitted_on_what_was_encoded(pipeline, pictures, capsys):
    folder = pictures.parent.parent
    assert encode(pipeline, pictures, folder) == 0
    flags = ["fit", "--source", str(pipeline), "--trainset", str(folder)]
    assert fisher.main([*flags, "--draws", "3", "--output", str(folder / "factors")]) == 0
    curvature = load_curvature(folder / "factors")
    assert curvature.examples == 3 * PICTURES
    assert list(curvature.shared().names) == list(select_layers(load_pipeline(pipeline, CPU).denoiser))
    assert any(name.startswith("unet/") for name in read_manifest(folder / "factors")["inputs"])
    assert fisher.main(flags) == 2
    assert "--source: expected --trainset and --output with it" in capsys.readouterr().err
    assert fisher.main([*flags, "--output", "factors.safetensors"]) == 2
    assert "factors.safetensors: expected a folder" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m abu.encode_pictures --source stabilityai/stable-diffusion-2" in capsys.readouterr().out


def test_a_pipeline_without_encoders_is_refused(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "copy")
    index = tmp_path / "copy/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": [None, None]}))
    with pytest.raises(ValueError, match="copy: expected a pipeline with a vae, found"):
        PipelineEncoder(tmp_path / "copy", CPU)
    shutil.copytree(pipeline, tmp_path / "second")
    (tmp_path / "second/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="second: expected a whole pipeline as diffusers saves it"):
        PipelineEncoder(tmp_path / "second", CPU)
