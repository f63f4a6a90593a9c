"""Collection end to end on a tiny source model: pieces, resumption, merging into rankings."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from abu import collect, collectors, room, stages
from abu.amortised import MeanGradients, sketched
from abu.collect_config import ScoreConfig, StepConfig
from abu.collectors import ScoreCollector, StepCollector
from abu.curvature import EKFAC
from abu.gradients import load_gradients, pack, unpack
from abu.models import Autoencoder, AutoencoderConfig, DiffusionConfig, SourceModel, build_denoiser, save_source
from abu.plan import Piece
from abu.sample import QUERY_SCHEMA
from abu.second_order import TrainingTerms, TwoFolds, loss_change_at
from abu.testbed import TESTBEDS
from abu.unlearn import STEP
from benchmark import finite_step, forecast, methods, reliability, teacher
from fastgda.core import ROOT, load_npz, read_manifest, save_npy, sha256_file
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


@contextmanager
def changed_json(path, part, name, value):
    """Inside, one value of a manifest is another."""
    kept = path.read_text()
    manifest = json.loads(kept)
    manifest[part][name] = value
    path.write_text(json.dumps(manifest))
    try:
        yield
    finally:
        path.write_text(kept)


def other_factors(root):
    """Inside, the factors say that they were fitted to other weights."""
    return changed_json(root / "weights/emoji_ldm/ekfac.safetensors.manifest.json", "inputs", "denoiser", "0" * 64)


def peak_of_tensors(compute):
    """Most bytes that live tensors took at once; what the process has resident depends on what it gave back before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = compute()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert kept
    return int(np.cumsum(sizes).max())


def run(stage, root, *flags):
    sketch = ["--sketch", "384"] if stage == "scores" else []
    assert collect.main([stage, "--root", str(root), *sketch, *flags]) == 0


def gradients(folder, index=0):
    """g [runs, bins, tokens, out] of a whole pass."""
    parts = [load_npz(path, ("gradients", "scales")) for path in sorted(folder.glob(f"pass_{index}_*.npz"))]
    return np.concatenate([part["gradients"] * part["scales"].repeat(16, -1)[..., None] for part in parts], axis=-2)


@pytest.fixture(scope="module")
def testbed(collected):
    return replace(TESTBEDS["emoji"], root=collected)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    root = tmp_path_factory.mktemp("testbed")
    write_testbed(root)
    for stage in ("curvature", "queries"):
        run(stage, root)
    run("training", root, "--passes", "2")
    run("scores", root)
    run("steps", root)
    random = np.random.default_rng(1)
    features = root / "data/emoji/feats/effnet"
    save_npy(features / "data_feats.npy", random.normal(size=(IMAGES, 5)).astype(np.float32))
    save_npy(features / "train_query_feats.npy", random.normal(size=(QUERIES["train"], 5)).astype(np.float32))
    assert teacher.main(["--root", str(root)]) == 0
    assert finite_step.main(["--root", str(root), "--step", "1e-9"]) == 0
    return root


def test_every_image_is_scored_for_every_query(testbed):
    assert teacher.load_scores(testbed, 2, "normalised").shape == (77, IMAGES)
    assert teacher.load_scores(testbed, 2, "plain_runs").shape == (2, 2, 7, IMAGES)
    assert teacher.load_scores(testbed, 2, "normalised_terms").shape == (2, 2, 5, 7, IMAGES)


def test_scores_are_products_of_the_mean_gradients_of_all_passes(testbed):
    """Against whole weight gradients, for one image and one query; the sketch is nearly as long as they are."""
    device, curvature = torch.device("cpu"), EKFAC.load(testbed.curvature)
    source, config = testbed.load_source(device), collect.CollectConfig()
    engine = MeanGradients(source.denoiser, source.schedule)

    def whitened(examples, part, runs):
        draws = config.draws(part, 1000)
        g = torch.stack([engine(examples, draws, run) for run in runs]).mean(0)
        return curvature.rotated_gradients(g.flatten(0, 1), examples.text.expand(5, -1, -1)) / curvature.damped().sqrt()

    query = whitened(testbed.query_examples("test", device).rows(2, 3), "test", range(2)).mean(0)
    image = whitened(testbed.training_examples(device).rows(270, 271), "training", range(4)).mean(0)
    size = curvature.eigenvalues.numel()
    assert collect.main(["scores", "--root", str(testbed.root), "--sketch", str(size)]) == 2
    full = ScoreCollector(testbed, collect.ScoreConfig(sketch=size)).compute(Piece("scores", "2", 256, 300))
    expected = (query * image).sum() / query.norm()
    assert full["plain"][-2, 14] == pytest.approx(float(expected), rel=5e-3)


def test_steps_are_scored_as_they_go(testbed):
    """Both terms against whole weight gradients, for one image and the pooled gradient of one query."""
    device, curvature = torch.device("cpu"), EKFAC.load(testbed.curvature)
    source, config = testbed.load_source(device), StepConfig(fold=1)
    query, image = testbed.query_examples("test", device).rows(2, 3), testbed.training_examples(device).rows(270, 271)
    engine, draws = MeanGradients(source.denoiser, source.schedule), collect.CollectConfig().draws("test", 1000)
    g = torch.stack([engine(query, draws, run) for run in range(2)]).mean((0, 1))
    change = curvature.natural_gradient(curvature.rotated_gradients(g, query.text))[0]
    found = [TrainingTerms(source.denoiser, source.schedule)(image, config.drawn(1000), run) for run in range(2)]
    first = [(gradients[0].mT @ image.text[0] * change).sum() for gradients, _ in found]
    squares = [(product[0].mT @ image.text[0] * change).sum().square() for _, part in found for product in part]

    terms = StepCollector(testbed, config).compute(Piece("step", "0", 256, 300))
    assert terms["first"][-2, 14] == pytest.approx(float(torch.stack(first).mean()), rel=5e-3)
    assert terms["second"][-2, 14] == pytest.approx(float(torch.stack(squares).mean()), rel=2e-2)
    assert terms["second_runs"].shape == (2, 7, 44)
    assert not np.array_equal(*terms["second_runs"])


def test_a_fold_that_does_not_divide_is_refused(collected, capsys):
    assert collect.main(["steps", "--root", str(collected), "--fold", "11"]) == 2
    assert "config.fold is 8, wanted 11" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--fold: expected a divisor of the \d+ weights, found 11"):
        TwoFolds.of(EKFAC.load(replace(TESTBEDS["emoji"], root=collected).curvature), 11)


def test_a_lost_piece_is_computed_again_to_the_same_numbers(collected):
    folder = collected / "data/emoji/cache/teacher"
    lost, kept = folder / "pass_0_000000.npz", folder / "pass_0_000256.npz"
    before, stamp = gradients(folder), kept.stat().st_mtime_ns
    lost.unlink()
    run("training", collected)
    np.testing.assert_allclose(gradients(folder), before, rtol=1e-3, atol=1e-5 * np.abs(before).max())
    assert kept.stat().st_mtime_ns == stamp


def test_passes_differ(collected):
    folder = collected / "data/emoji/cache/teacher"
    first, second = gradients(folder, 0), gradients(folder, 1)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] < 0.9


def test_pieces_of_other_settings_are_refused(collected, capsys):
    folder = collected / "data/emoji/cache/teacher"
    before = sorted(folder.rglob("*"))
    assert collect.main(["scores", "--root", str(collected), "--sketch", "192"]) == 2
    assert "config.sketch is 384, wanted 192" in capsys.readouterr().err
    assert collect.main(["training", "--root", str(collected), "--bf16"]) == 2
    assert "config.bf16 is False, wanted True" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_piece_of_other_captions_is_refused(testbed, tmp_path):
    text = testbed.training_examples(torch.device("cpu")).text[:256].clone()
    text[3, -1] = 0
    with pytest.raises(ValueError, match=r"pass_0_000000.npz: gradients: expected 4095 tokens .*, found 4096"):
        load_gradients(stages.folder_of(testbed) / "pass_0_000000.npz", text, "")


def test_gradients_at_padding_are_not_kept_and_the_rest_comes_back():
    generator = torch.Generator().manual_seed(0)
    gradients, text = torch.randn(2, 3, 4, 5, 6, generator=generator), torch.randn(4, 5, 7, generator=generator)
    gradients *= torch.tensor([1e-9, 1.0, 1e9, 0.0]).view(-1, 1, 1)
    text[1, 3:] = 0
    arrays = pack(gradients, text)
    assert arrays["gradients"].shape == (2, 3, 18, 6)
    wanted = gradients.clone()
    wanted[:, :, 1, 3:] = 0
    torch.testing.assert_close(unpack(arrays, text), wanted, rtol=1e-3, atol=0)


def test_ray_workers_leave_the_same_pieces_even_if_the_driver_is_killed(collected, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(collected, root)
    folder = root / "data/emoji/cache/teacher"
    expected = gradients(folder)
    for piece in folder.glob("pass_*"):
        piece.unlink()
    command = [sys.executable, "-m", "abu.collect", "training", "--root", str(root), "--workers", "1"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as driver:
        while not list(folder.glob("pass_*.npz")):
            assert driver.poll() is None, "the driver ended before it had written a piece"
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGKILL)
    run("training", root)
    np.testing.assert_allclose(gradients(folder), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_ray_workers_score_steps_to_the_same_numbers(collected, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(collected, root)
    pieces = sorted((root / "data/emoji/cache/teacher/steps").glob("step_0_*.npz"))
    names = ("first", "second", "first_runs", "second_runs")
    expected = [load_npz(piece, names) for piece in pieces]
    for piece in pieces:
        piece.unlink()
    run("steps", root, "--workers", "1")
    for piece, arrays in zip(pieces, expected, strict=True):
        for name, found in load_npz(piece, names).items():
            np.testing.assert_allclose(found, arrays[name], rtol=1e-3, atol=1e-5 * np.abs(arrays[name]).max())


def test_a_dry_run_computes_nothing_and_names_time_memory_and_disk(collected, capsys):
    run("training", collected, "--first_pass", "5", "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"2 pieces, [\d.]+ min, [\d.]+ GiB of memory, \d+ MiB on disk", printed)
    assert not list((collected / "data/emoji/cache/teacher").glob("pass_5_*"))


def test_a_dry_run_or_a_refusal_writes_nothing(collected, capsys, monkeypatch):
    new = ("training", "--root", str(collected), "--measure", "square")
    assert collect.main([*new, "--dry_run"]) == 0
    assert collect.main(["training", "--root", str(collected), "--bf16", "--dry_run"]) == 2
    assert "config.bf16 is False, wanted True" in capsys.readouterr().err
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 1024))
    assert collect.main([*new]) == 2
    assert "GiB free for the pieces" in capsys.readouterr().err
    assert not (collected / "data/emoji/cache/teacher_square").exists()


def test_a_gradient_that_is_not_finite_is_not_stored_and_listed_as_failed(collected, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(collected, root, ignore=shutil.ignore_patterns("cache"))
    path = root / "data/emoji/trainset/text_embeddings.npy"
    text = np.load(path)
    text[7] = np.nan
    save_npy(path, text)
    assert collect.main(["training", "--root", str(root)]) == 2
    message = "train example 7, timestep bin 0: expected a finite loss"
    assert message in capsys.readouterr().err
    folder = root / "data/emoji/cache/teacher"
    assert not list(folder.glob("*.npz"))
    (line,) = (folder / "failed.jsonl").read_text().splitlines()
    assert json.loads(line)["attempt"] == 1 and message in json.loads(line)["error"]
    run("status", root)
    assert f"failed: pass_0_000000.npz: ValueError: {message}" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["scores", "steps"])
def test_gradients_and_factors_of_another_model_make_no_scores(collected, capsys, stage):
    def refused(message):
        assert collect.main([stage, "--root", str(collected)]) == 2
        assert message in capsys.readouterr().err

    with other_factors(collected):
        refused("ekfac.safetensors: expected factors of the model")
    with changed_json(collected / "data/emoji/cache/teacher/manifest.json", "config", "query_draws", 9):
        refused("config.query_draws is 9, wanted 8")
    # as many bytes as before
    for name in ("trainset/latents.npy", "trainset/text_embeddings.npy", "query_train/latents.npy"):
        path = collected / "data/emoji" / name
        kept = path.read_bytes()
        try:
            path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            refused(f"draws that are used now, found others (inputs.data/emoji/{name} is")
        finally:
            path.write_bytes(kept)


def test_pieces_of_another_training_set_are_refused(collected, capsys):
    path = collected / "data/emoji/trainset/text_embeddings.npy"
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert collect.main(["training", "--root", str(collected), "--first_pass", "7"]) == 2
    finally:
        path.write_bytes(kept)
    assert "inputs.data/emoji/trainset/text_embeddings.npy is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("scores", "--passes", "3"), "--passes: expected 1..2, as many as are collected, found 3"),
        (("scores", "--passes", "0"), "--passes: expected at least 1, found 0"),
        (("training", "--passes", "-1"), "--passes: expected at least 1, found -1"),
        (("steps", "--first_pass", "-1"), "--first_pass: expected at least 0, found -1"),
    ],
)
def test_passes_that_there_cannot_be_are_refused(collected, capsys, flags, message):
    assert collect.main([*flags, "--root", str(collected)]) == 2
    assert message in capsys.readouterr().err


def test_queries_are_taken_in_without_a_second_copy(testbed, monkeypatch):
    """The same numbers as from all of them at once, and little more memory than is asked for beforehand."""
    config, runs = StepConfig(query_bits=16), {}
    collector = StepCollector(testbed, config)
    for split in QUERIES:
        examples, parts = stages.examples_of(testbed, split, torch.device("cpu")), []
        for piece in stages.query_plan(testbed, (split,)):
            text = examples.text[piece.start : piece.stop]
            gradients = load_gradients(stages.folder_of(testbed) / piece.name, text, "").mean(1)
            parts.append(torch.stack([sketched(run, text, collector.curvature, collector.whole) for run in gradients]))
        runs[split] = torch.cat(parts, 1)
    pooled = torch.cat([run.mean(0) for run in runs.values()])
    assert torch.equal(collector.queries.whole, pooled.bfloat16())
    for run, half in enumerate(collector.halves):
        assert torch.equal(half.whole, torch.cat([runs["val"], runs["test"]], 1)[run].bfloat16())

    loaded = {split: stages.examples_of(testbed, split, torch.device("cpu")) for split in QUERIES}
    monkeypatch.setattr(collectors, "examples_of", lambda testbed, split, device: loaded[split])
    rows, weights = collector.curvature.eigenvalues.shape[0], collector.curvature.eigenvalues.numel()
    needed, of_piece = room.step_memory(77, 7, weights, config), 4 * 2 * 5 * 64 * 16 * rows
    # a piece is unpacked and scaled; all queries by run in float32, as once, would take five times `needed`
    assert needed < peak_of_tensors(collector._queries) < needed + 3 * of_piece


def test_workers_on_other_machines_are_not_weighed_against_this_one(collected, testbed, capsys, monkeypatch):
    flags = ["--root", str(collected), "--first_pass", "7", "--workers", "3", "--dry_run"]
    monkeypatch.setattr(room.os, "sysconf", lambda name: 64)
    for stage, purpose in (("training", "--workers 3"), ("steps", "gradients of 77 queries on 3 workers")):
        assert collect.main([stage, *flags]) == 2
        assert f"{purpose}: expected " in capsys.readouterr().err
        assert collect.main([stage, *flags, "--address", "elsewhere:6379"]) == 0
        assert "2 pieces, " in capsys.readouterr().out


def test_status_counts_pieces(collected, capsys):
    run("status", collected)
    printed = capsys.readouterr().out.splitlines()
    wanted = ["queries: 4 of 4 pieces", "pass 0: 2 of 2 pieces", "pass 1: 2 of 2 pieces"]
    assert printed == [*wanted, "steps, pass 0: 2 of 2 pieces", "scores of 2 passes: 2 of 2 pieces"]


def test_a_split_has_its_own_rows_of_the_loss_change(testbed):
    first, second = (finite_step.load_terms(testbed, 1, name)[-4:] for name in ("first", "second"))
    found = methods.teacher_scores(testbed, "finite-step", "test")
    np.testing.assert_array_equal(found, loss_change_at(first, second, STEP, IMAGES))


@pytest.mark.parametrize("name", ["influence", "influence_normalised", "influence_plain"])
def test_rankings_follow_the_scores(collected, testbed, name):
    if name == "influence":
        first, second = (finite_step.load_terms(testbed, 1, term) for term in ("first", "second"))
        scores = loss_change_at(first, second, 1e-9, IMAGES)
    else:
        scores = teacher.load_scores(testbed, 2, name.removeprefix("influence_"))
    test = load_rankings(collected / f"data/emoji/{name}_test.npz", IMAGES)
    assert test.rank.shape == (4, IMAGES)
    assert np.array_equal(test.rank[:, 0], scores[-4:].argmax(1))
    train = load_rankings(collected / f"data/emoji/{name}_train.npz", IMAGES)
    ordered = np.take_along_axis(scores[:70], train.rank.astype(int), 1)
    assert (np.diff(ordered, axis=1) <= 0).all()
    assert train.rank.shape == (70, 25 if name == "influence_plain" else IMAGES)


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
    assert "python -m abu.encode" in capsys.readouterr().err


def test_a_pass_that_is_not_whole_is_not_scored(collected, tmp_path, capsys):
    shutil.copytree(collected, tmp_path / "root")
    (tmp_path / "root/data/emoji/cache/teacher/pass_0_000256.npz").unlink()
    assert collect.main(["scores", "--root", str(tmp_path / "root")]) == 2
    assert "expected the pieces of a whole pass, found 2 begun" in capsys.readouterr().err


def test_curvature_remembers_its_model(collected):
    weights = collected / "weights/emoji_ldm"
    manifest = read_manifest(weights / "ekfac.safetensors")
    assert manifest["inputs"]["denoiser"] == sha256_file(weights / "denoiser.safetensors")


def test_a_forecast_is_compared_with_what_was_needed(collected):
    command = ["--root", str(collected), "--jobs", "training", "exact", "--images", "256", "--queries", "2"]
    assert forecast.main(command) == 0
    report = json.loads((collected / "results/speed/forecast.json").read_text())
    assert [row["job"] for row in report["rows"]] == ["training", "exact"]
    for row in report["rows"]:
        for name in ("seconds", "memory", "disk"):
            found = row[name]
            assert found["measured"] > 0
            assert found["relative_error"] == pytest.approx(found["predicted"] / found["measured"] - 1, abs=0.05)
        assert abs(row["disk"]["relative_error"]) < 0.2
    assert not list((collected / "runs/forecast").glob("*"))
    # a finite-step teacher's reliability, from its one pass
    assert reliability.main(["--root", str(collected)]) == 0
    found = json.loads((collected / "results/teacher/draws_finite-step_emoji.json").read_text())
    assert found["rows"]["both terms"][0]["draws_per_run"] == 5 and found["queries"] == 7


def test_what_the_disk_or_the_memory_will_not_hold_is_refused_before_work(collected, testbed, capsys, monkeypatch):
    for stage, config in (("training", collect.CollectConfig()), ("scores", ScoreConfig()), ("steps", StepConfig())):
        (pieces, folder) = {
            "training": (stages.training_plan(testbed, range(1)), "cache/teacher"),
            "scores": (stages.score_plan(testbed, 2), "cache/teacher/scores"),
            "steps": (stages.step_plan(testbed, range(1)), "cache/teacher/steps"),
        }[stage]
        stored = sum((testbed.data / folder / piece.name).stat().st_size for piece in pieces)
        # what is left are the headers of the arrays
        assert 0 <= stored - room.piece_bytes(testbed, config, pieces) < 2048 * len(pieces)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 1024))
    for stage in ("training", "steps"):
        assert collect.main([stage, "--root", str(collected), "--first_pass", "7"]) == 2
        assert "GiB free for the pieces, found 0.00" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(room.os, "sysconf", lambda name: 64)
    assert collect.main(["steps", "--root", str(collected), "--first_pass", "7"]) == 2
    assert "gradients of 77 queries: expected 0.0 GiB of memory, found 0.0" in capsys.readouterr().err
    assert not list((testbed.data / "cache/teacher").rglob("*_7_*"))
