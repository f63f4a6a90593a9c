"""The shipped source model: its reconstructions, its stored queries sampled again, the splits of concepts."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from abu.models import load_source
from abu.sample import (
    GRID_CONCEPTS,
    Query,
    SampleConfig,
    choose_queries,
    concept_key,
    grid_concepts,
    sample_latents,
    to_images,
)
from abu.testbed import SPLITS, TESTBEDS
from fastgda.core import load_npy, read_manifest, verify_artifact
from feature_extraction.emoji import read_lock
from feature_extraction.minilm import MiniLM

TESTBED = TESTBEDS["emoji"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return TESTBED.load_source(CPU)


@pytest.mark.parametrize("name", ["autoencoder.safetensors", "denoiser.safetensors", "ekfac.safetensors"])
def test_shipped_weights_are_what_their_manifest_says(name):
    verify_artifact(TESTBED.source / name)


@pytest.mark.parametrize("split", SPLITS)
def test_shipped_queries_are_what_their_manifest_says(split):
    manifest = verify_artifact(TESTBED.data / f"query_{split}")
    assert (
        manifest["inputs"]["denoiser"]
        == verify_artifact(TESTBED.source / "denoiser.safetensors")["files"]["denoiser.safetensors"]["sha256"]
    )


def test_stored_queries_can_be_sampled_again(source):
    rows = pq.read_table(TESTBED.data / "query_test/queries.parquet").to_pylist()[:3]
    stored = load_npy(TESTBED.data / "query_test/latents.npy", (TESTBED.queries["test"][0], None, None, None))
    text = MiniLM(device=CPU).token_states([row["captions"][0] for row in rows])
    config = SampleConfig(**read_manifest(TESTBED.data / "query_test")["config"])
    latents = sample_latents(source, text, [row["seed"] for row in rows], config)
    # another processor rounds differently, and fifty steps amplify it
    assert np.abs(latents.numpy() - stored[:3]).mean() < 0.05 * np.abs(stored[:3]).mean()
    for image, row in zip(to_images(source, latents), rows, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"), dtype=float)
        assert np.abs(np.asarray(image, dtype=float) - shown).mean() < 4


def test_concepts_of_the_splits_do_not_overlap():
    keys = {
        split: {
            concept_key(concept)
            for concept in pq.read_table(TESTBED.data / f"query_{split}/queries.parquet")["concept"].to_pylist()
        }
        for split in SPLITS
    }
    assert {split: len(found) for split, found in keys.items()} == {
        split: count for split, (count, _) in TESTBED.queries.items()
    }
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"] and not keys["val"] & keys["test"]


def test_concepts_prompted_in_several_sets_stay_in_one_split():
    sets = [entry.set for entry in read_lock()]
    concepts = [f"thing{number}" for number in range(6) for _ in sets]
    sizes = {"test": (5, 3), "val": (2, 1), "train": (18, 9)}
    found = choose_queries(concepts, sets * 6, sizes, SampleConfig())
    names = {split: [query.concept for query in queries] for split, queries in found.items()}
    assert [len(set(names[split])) for split in sizes] == [2, 2, 2]
    assert len(set().union(*map(set, names.values()))) == 6
    assert {(query.concept, query.set) for query in found["train"]} == {
        (name, style) for name in set(names["train"]) for style in sets
    }


def test_too_few_concepts_are_refused():
    with pytest.raises(ValueError, match="expected 1370 concepts in 3 sets, found 1"):
        choose_queries(["a heart"] * 3, ["noto", "twemoji", "openmoji"], TESTBED.queries, SampleConfig())


def test_the_noise_of_an_image_does_not_depend_on_its_batch(source):
    text = MiniLM(device=CPU).token_states(["red heart, noto style", "rocket, twemoji style"])
    config = SampleConfig(steps=2)
    together = sample_latents(source, text, [1, 2], config)
    alone = sample_latents(source, text[1:], [2], config)
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


def test_damaged_weights_are_named(tmp_path):
    for path in TESTBED.source.iterdir():
        if path.suffix in (".json", ".safetensors") and "loss" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "denoiser.safetensors").write_bytes(b"not a file")
    with pytest.raises(ValueError, match=r"denoiser\.safetensors: expected weights of UNet2DConditionModel"):
        load_source(tmp_path, CPU)


def test_a_grid_shows_what_the_training_set_has():
    queries = [Query(f"thing {index // 2}", "noto", "noto", 0) for index in range(40)]
    assert grid_concepts([*GRID_CONCEPTS, "thing 0"], queries) == GRID_CONCEPTS
    found = grid_concepts([GRID_CONCEPTS[3], "thing 0"], queries)
    assert found == (GRID_CONCEPTS[3], *(f"thing {index}" for index in range(len(GRID_CONCEPTS) - 1)))
