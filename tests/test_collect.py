"""Collection end to end on a tiny source model: pieces, resumption, merging into rankings."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from abu import collect
from abu.models import Autoencoder, AutoencoderConfig, DiffusionConfig, SourceModel, build_denoiser, save_source
from abu.sample import QUERY_SCHEMA
from benchmark import teacher
from fastgda.core import ROOT, read_manifest, save_npy, sha256_file
from fastgda.rankings import load_rankings

IMAGES, QUERIES = 300, {"train": 70, "val": 3, "test": 4}


def write_testbed(root):
    """300 random latents with random token states, 77 queries, an untrained model."""
    random = np.random.default_rng(0)
    shape = DiffusionConfig(sample_size=4, latent_channels=2, channels=(16, 16), heads=2)
    small = AutoencoderConfig(latent_channels=2, channels=(8, 8, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SourceModel(build_denoiser(shape), Autoencoder(small), shape, small)
    save_source(model, root / "weights/emoji_ldm")
    trainset = root / "data/emoji/trainset"
    save_npy(trainset / "latents.npy", random.normal(size=(IMAGES, 2, 4, 4)).astype(np.float32))
    save_npy(trainset / "text_embeddings.npy", random.normal(size=(IMAGES, 1, 16, 384)).astype(np.float16))
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    for split, count in QUERIES.items():
        folder = root / f"data/emoji/query_{split}"
        save_npy(folder / "latents.npy", random.normal(size=(count, 2, 4, 4)).astype(np.float32))
        rows = [
            {"id": i, "image": picture.getvalue(), "captions": [f"{split} {i}"], "concept": "", "set": "", "seed": i}
            for i in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows, QUERY_SCHEMA), folder / "queries.parquet")


def run(stage, root, *flags):
    assert collect.main([stage, "--root", str(root), "--sketch", "384", *flags]) == 0


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    root = tmp_path_factory.mktemp("testbed")
    write_testbed(root)
    for stage in ("curvature", "queries", "training"):
        run(stage, root)
    random = np.random.default_rng(1)
    features = root / "data/emoji/feats/effnet"
    save_npy(features / "data_feats.npy", random.normal(size=(IMAGES, 5)).astype(np.float32))
    save_npy(features / "train_query_feats.npy", random.normal(size=(QUERIES["train"], 5)).astype(np.float32))
    assert teacher.main(["--root", str(root)]) == 0
    return root


def test_every_image_is_scored_for_every_query(collected):
    folder = collected / "data/emoji/cache/teacher"
    assert teacher.load_pass(folder, 0, "normalised").shape == (77, IMAGES)
    assert teacher.load_pass(folder, 0, "plain_runs").shape == (2, 7, IMAGES)
    assert teacher.load_pass(folder, 0, "normalised_terms").shape == (2, 5, 7, IMAGES)


def test_a_lost_piece_is_computed_again_to_the_same_numbers(collected):
    folder = collected / "data/emoji/cache/teacher"
    lost, kept = folder / "pass_0_000000.npz", folder / "pass_0_000256.npz"
    before, stamp = teacher.load_pass(folder, 0, "normalised"), kept.stat().st_mtime_ns
    lost.unlink()
    run("training", collected)
    after = teacher.load_pass(folder, 0, "normalised")
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-7)
    assert kept.stat().st_mtime_ns == stamp


def test_pieces_of_other_settings_are_refused(collected, capsys):
    folder = collected / "data/emoji/cache/teacher"
    before = sorted(folder.iterdir())
    assert collect.main(["training", "--root", str(collected), "--sketch", "192"]) == 2
    assert "config.sketch is 384, wanted 192" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_ray_workers_leave_the_same_pieces_even_if_the_driver_is_killed(collected, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(collected, root)
    folder = root / "data/emoji/cache/teacher"
    expected = teacher.load_pass(folder, 0, "normalised")
    for piece in folder.glob("pass_*"):
        piece.unlink()
    command = [
        sys.executable,
        "-m",
        "abu.collect",
        "training",
        "--root",
        str(root),
        "--sketch",
        "384",
        "--workers",
        "1",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as driver:
        while not list(folder.glob("pass_*.npz")):
            assert driver.poll() is None, "the driver ended before it had written a piece"
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGKILL)
    run("training", root)
    np.testing.assert_allclose(teacher.load_pass(folder, 0, "normalised"), expected, rtol=1e-4, atol=1e-6)


def test_a_dry_run_computes_nothing_and_names_time_memory_and_disk(collected, capsys):
    run("training", collected, "--first_pass", "5", "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"2 pieces, [\d.]+ min, [\d.]+ GiB of memory, \d+ MiB on disk", printed)
    assert not list((collected / "data/emoji/cache/teacher").glob("pass_5_*"))


def test_status_counts_pieces(collected, capsys):
    run("status", collected)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["queries: 4 of 4 pieces", "pass 0: 2 of 2 pieces"]


@pytest.mark.parametrize("name", ["influence", "influence_plain"])
def test_rankings_follow_the_scores(collected, name):
    key = "normalised" if name == "influence" else "plain"
    scores = teacher.load_pass(collected / "data/emoji/cache/teacher", 0, key)
    test = load_rankings(collected / f"data/emoji/{name}_test.npz", IMAGES)
    assert test.rank.shape == (4, IMAGES)
    assert np.array_equal(test.rank[:, 0], scores[-4:].argmax(1))
    train = load_rankings(collected / f"data/emoji/{name}_train.npz", IMAGES)
    ordered = np.take_along_axis(scores[:70], train.rank.astype(int), 1)
    assert (np.diff(ordered, axis=1) <= 0).all()
    assert train.rank.shape == (70, IMAGES if name == "influence" else 25)


def test_the_papers_candidates_are_the_nearest_images():
    scores = np.array([[0.1, 0.9, 0.5, 0.7]], np.float32)
    images = np.array([[1, 0], [0, 1], [2, 0.1], [1, 1]], np.float32)
    found = teacher.neighbour_candidates(scores, np.array([[3, 0]], np.float32), images, 3)
    assert found.rank.tolist() == [[3, 2, 0]]


def test_two_runs_of_a_model_of_noise_are_barely_reliable(collected):
    manifest = read_manifest(collected / "data/emoji/influence_test.npz")
    assert set(manifest["reliability"]) == {"1", "3", "10"}
    assert manifest["reliability"]["10"] < 0.5


def test_reliability_is_one_for_equal_runs_and_chance_for_unrelated_ones():
    first, second = np.random.default_rng(0).normal(size=(2, 20, 400))
    assert teacher.reliability(first, first, (4, 14))["mAP"] == {"4": 1.0, "14": 1.0}
    unrelated = teacher.reliability(first, second, (4, 14))
    assert unrelated["mAP"]["14"] < 0.1
    assert abs(unrelated["spearman"]) < 0.05


def test_missing_scores_name_the_command(tmp_path, capsys):
    assert teacher.main(["--root", str(tmp_path)]) == 2
    assert "python -m abu.collect training" in capsys.readouterr().err


def test_curvature_remembers_its_model(collected):
    weights = collected / "weights/emoji_ldm"
    manifest = read_manifest(weights / "ekfac.safetensors")
    assert manifest["inputs"]["denoiser"] == sha256_file(weights / "denoiser.safetensors")
