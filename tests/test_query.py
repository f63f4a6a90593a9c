"""Stored training gradients: new queries against them, query tiles, compression, measured functions, reliability."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_collection import IMAGES, QUERIES, small_collection
from test_collect import other_factors

from abu import collect, query, stages
from abu.amortised import QueryMatrix, Sketch, score_block
from abu.collect_config import ScoreConfig
from abu.collectors import ScoreCollector
from abu.compress import Quantised, SignalSums, Truncation
from abu.curvature import EKFAC
from abu.gradients import stored_vectors
from abu.plan import Piece
from abu.store import GradientStore, StoreConfig, open_store
from abu.testbed import TESTBEDS
from abu.tiles import QueryTiles, tiles
from benchmark import amortised_speed, compression, growth, reliability
from fastgda.core import load_npz, read_manifest, save_npy
from fastgda.metrics import spearman
from fastgda.rankings import from_scores

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with small_collection(tmp_path_factory.mktemp("query"), passes=2) as folder:
        yield folder


@pytest.fixture(scope="module")
def testbed(root):
    return replace(TESTBEDS["emoji"], root=root)


@pytest.fixture(scope="module")
def whole(testbed):
    """(number of weights, scores [Q, N] that `abu.collect scores` makes without compression)."""
    size = EKFAC.load(testbed.curvature).eigenvalues.numel()
    collector = ScoreCollector(testbed, ScoreConfig(sketch=size))
    pieces = [collector.compute(piece) for piece in stages.score_plan(testbed, 2)]
    return size, {name: np.concatenate([p[name] for p in pieces], 1) for name in ("plain", "normalised")}


@pytest.fixture(scope="module")
def built(root, whole):
    flags = ["--root", str(root), "--compression", "sketch", "--size", str(whole[0])]
    assert query.main(["build", *flags]) == 0
    return flags


def test_a_split_gets_the_scores_that_the_collection_gives_it(root, built, whole, tmp_path):
    path = tmp_path / "scores.npz"
    assert query.main(["score", "--root", str(root), "--split", "val", "--draws", "2", "--output", str(path)]) == 0
    found = load_npz(path, ("plain", "normalised"))
    expected = {name: array[QUERIES["train"] : QUERIES["train"] + 2] for name, array in whole[1].items()}
    np.testing.assert_allclose(found["normalised"], expected["normalised"], atol=2e-3)
    for name, array in found.items():
        assert spearman(array, from_scores(expected[name]).rank).min() > 0.99


def test_without_compression_scores_are_exact(testbed, whole):
    """From another store than the module's, in which output gradients lie as they are."""
    store = GradientStore(testbed, StoreConfig(), 1)
    store.build(CPU)
    collector = ScoreCollector(testbed, ScoreConfig(sketch=whole[0]))
    pieces = [collector.compute(piece) for piece in stages.score_plan(testbed, 1)]
    expected = np.concatenate([piece["normalised"] for piece in pieces], 1)[-QUERIES["test"] :]
    queries = torch.cat([part.mean(0) for part in collector.queries("test")], 1)
    found = store.score(QueryMatrix.of(queries), CPU)["normalised"]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    # resumed where it stopped
    last = store.path(store.plan[-1], "scales")
    kept = last.read_bytes()
    last.unlink()
    store.build(CPU)
    assert last.read_bytes() == kept
    assert sum(path.stat().st_size for path in store.folder.glob("*.npy")) < 2 * whole[0] * IMAGES
    shutil.rmtree(store.folder)


def test_a_picture_with_its_prompt_is_scored_and_printed(root, built, tmp_path, capsys):
    Image.new("RGBA", (50, 40), (200, 30, 30, 128)).save(tmp_path / "new.png")
    path = tmp_path / "one.npz"
    flags = ["--root", str(root), "--draws", "2", "--output", str(path), "--top", "3"]
    assert query.main(["score", "--image", str(tmp_path / "new.png"), "--prompt", "red heart", *flags]) == 0
    scores = load_npz(path, ("normalised",))["normalised"]
    assert scores.shape == (1, IMAGES)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[1:4]] == np.argsort(-scores[0])[:3].tolist()

    save_npy(tmp_path / "latents.npy", np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32))
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")
    many = ["--latents", str(tmp_path / "latents.npy"), "--prompts", str(tmp_path / "prompts.txt")]
    assert query.main(["score", *many, *flags]) == 0
    assert load_npz(path, ("plain",))["plain"].shape == (2, IMAGES)
    (tmp_path / "prompts.txt").write_text("cat\n")
    assert query.main(["score", *many, *flags]) == 2
    assert "expected shape [1, 2, 4, 4], found [2, 2, 4, 4]" in capsys.readouterr().err


def test_bad_queries_and_other_stores_are_refused(root, built, tmp_path, capsys):
    def refused(*flags):
        assert query.main([*flags, "--root", str(root)]) == 2
        return capsys.readouterr().err

    assert "expected one of --split, --image and --latents, found none" in refused("score")
    assert "--image: expected --prompt" in refused("score", "--image", "x.png")
    (tmp_path / "x.png").write_text("no picture")
    bad = ["score", "--image", str(tmp_path / "x.png"), "--prompt", "x"]
    assert "x.png: expected a picture" in refused(*bad)
    assert "config.size is " in refused("build", "--compression", "sketch", "--size", "384")
    assert "expected 8 or 16 bits" in refused("build", "--bits", "4")
    weights = root / "weights/emoji_ldm/denoiser.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept + b" ")
        assert "expected pieces of the same settings and inputs" in refused("score", "--split", "val")
        changed = "inputs.weights/emoji_ldm/denoiser.safetensors is "
        assert changed in refused("build", *built[2:])
    finally:
        weights.write_bytes(kept)
    assert "--passes: expected 1..2, as many as are collected, found 3" in refused("build", "--passes", "3")
    assert "--passes: expected 1..2, as many as are collected, found 0" in refused("build", "--passes", "0")
    with other_factors(root):
        assert "ekfac.safetensors: expected factors of the model" in refused("build", *built[2:])


def test_without_a_store_the_command_is_named(tmp_path, capsys):
    assert query.main(["score", "--root", str(tmp_path), "--split", "val"]) == 2
    assert "python -m abu.query build" in capsys.readouterr().err


def test_a_lost_shard_is_written_again_and_eight_bits_are_close(testbed, built, tmp_path):
    store = open_store(testbed)
    lost = [store.path(store.plan[1], kind) for kind in ("vectors", "norms")]
    before, stamp = [path.read_bytes() for path in lost], store.path(store.plan[0], "norms").stat().st_mtime_ns
    for path in lost:
        path.unlink()
    store.build(CPU)
    assert [path.read_bytes() for path in lost] == before
    assert store.path(store.plan[0], "norms").stat().st_mtime_ns == stamp

    eight = GradientStore(testbed, replace(store.config, bits=8), 2)
    eight.folder = tmp_path / "eight"
    eight.build(CPU)
    units, _ = store.shard(store.plan[2], CPU)
    close, _ = eight.shard(store.plan[2], CPU)
    assert units.shape == (5, 8, int(built[-1]))
    assert torch.cosine_similarity(units, close, dim=-1).min() > 0.999


def test_scores_do_not_depend_on_the_tiles(testbed, tmp_path, whole):
    generator = torch.Generator().manual_seed(0)
    queries, images = torch.randn(5, 11, 96, generator=generator), torch.randn(5, 7, 96, generator=generator)
    plain, terms = score_block(QueryMatrix.of(queries), images)
    options: dict[str, Any] = {"bins": 5, "size": 96, "images": 7}
    for budget, expected in ((2**30, 1), (10_000, 11)):
        held = QueryTiles(queries.split(3, dim=1), 11, budget=budget, folder=tmp_path, **options)
        assert (len(held.tiles), held.mapped) == (expected, expected > 1)
        scores = held.score(images)
        torch.testing.assert_close(scores["plain"], plain)
        torch.testing.assert_close(scores["normalised"], terms.mean(0))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"--memory_gb: expected at least 0.000 for one query"):
        QueryTiles([], 11, budget=100, **options)
    with pytest.raises(ValueError, match="queries: expected 12, found 11"):
        QueryTiles([queries], 12, **options)

    small = ScoreCollector(testbed, ScoreConfig(sketch=whole[0]), memory_gb=2 * 6 * whole[0] * 4 * 2.5 / 2**30)
    assert len(small.pooled.tiles) > 1
    found = small.compute(Piece("scores", "2", 8, 16))
    np.testing.assert_allclose(found["normalised"], whole[1]["normalised"][:, 8:16], rtol=1e-4, atol=1e-6)


def test_tiles_cover_every_query_once():
    assert [range(*rows.indices(10)) for rows in tiles(10, 4, 12.0)] == [
        range(0, 3),
        range(3, 6),
        range(6, 9),
        range(9, 10),
    ]


@pytest.mark.parametrize(("bits", "mapped"), [(8, False), (16, False), (16, True)])
def test_queries_in_fewer_bits_give_nearly_the_same_scores(bits, mapped):
    generator = torch.Generator().manual_seed(0)
    queries, images = torch.randn(2, 9, 4096, generator=generator), torch.randn(2, 50, 4096, generator=generator)
    options: dict[str, Any] = {"bins": 2, "size": 4096, "images": 50}
    exact = QueryTiles([queries], 9, **options)
    # four queries and the terms of the images fit into half of this budget
    budget: dict[str, Any] = {"budget": 2 * (4 * 12 * 4096 + 4 * 6 * 50)} if mapped else {}
    coarse = QueryTiles([queries], 9, bits=bits, **options, **budget)
    assert coarse.mapped == mapped
    assert coarse.bytes_each < exact.bytes_each * bits / 32 * 1.03
    for name, found in coarse.score(images).items():
        assert spearman(found.numpy(), from_scores(exact.score(images)[name].numpy()).rank).min() > 0.99
    with pytest.raises(ValueError, match="bits: expected 8, 16, 32, found 4"):
        QueryTiles([queries], 9, bits=4, **options)


def test_rounding_errs_by_at_most_half_a_step():
    vectors = torch.randn(6, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors[2] = 0
    found = Quantised.of(vectors)
    assert found.codes.dtype == torch.int8
    assert ((found.vectors() - vectors).abs() <= found.scales / 2 + 1e-12).all()


def test_truncation_keeps_the_largest_whitened_directions(testbed):
    curvature = EKFAC.load(testbed.curvature)
    rotated = torch.randn(3, *curvature.eigenvalues.shape, generator=torch.Generator().manual_seed(0))
    white = (rotated / curvature.damped().sqrt()).flatten(1)
    everything = Truncation.of(curvature, white.shape[1])
    torch.testing.assert_close(everything(rotated), white)
    share = (curvature.eigenvalues / curvature.damped()).flatten()
    few = Truncation.of(curvature, 50)
    assert few.size == 50 and share[few.places].min() >= share.sort(descending=True).values[49]
    torch.testing.assert_close(few(rotated), white[:, few.places])
    with pytest.raises(ValueError, match="truncation: expected 1 to"):
        Truncation.of(curvature, white.shape[1] + 1)


def test_signal_is_what_two_runs_share(testbed):
    curvature = EKFAC.load(testbed.curvature)
    generator = torch.Generator().manual_seed(0)
    shape = (400, *curvature.eigenvalues.shape)
    signal = torch.zeros(curvature.eigenvalues.shape)
    signal[3, 5] = 2.0
    common = torch.randn(400, 1, 1, generator=generator) * signal
    sums = SignalSums(curvature)
    sums.add(common + torch.randn(shape, generator=generator), common + torch.randn(shape, generator=generator))
    found = sums.contribution() * curvature.damped()
    assert found.argmax() == 3 * shape[2] + 5
    assert found[3, 5] == pytest.approx(4.0, rel=0.3)


def test_measured_functions_have_a_folder_of_their_own(root, testbed, capsys):
    measure = "average"
    for stage in ("queries", "training"):
        assert collect.main([stage, "--root", str(root), "--measure", measure]) == 0
    folder = stages.folder_of(testbed, measure)
    assert read_manifest(folder)["config"]["measure"] == measure
    assert "measure" not in read_manifest(stages.folder_of(testbed))["config"]
    assert collect.main(["scores", "--root", str(root), "--measure", measure, "--sketch", "384"]) == 0
    assert collect.main(["status", "--root", str(root), "--measure", measure]) == 0
    assert "scores of 1 passes: 3 of 3 pieces" in capsys.readouterr().out
    path = stages.scores_folder(testbed, measure) / "scores_1_000016.npz"
    das = load_npz(path, ("das",))["das"]
    losses = load_npz(folder / "pass_0_000016.npz", ("losses",))["losses"].mean(0)
    collector = ScoreCollector(testbed, ScoreConfig(sketch=384), measure)
    piece, rows = Piece("pass", "0", 16, 24), collector.training.rows(16, 24)
    vectors = stored_vectors(collector.path(piece), piece, rows, collector.curvature, collector.sketch).mean(0)
    queries = torch.cat([part.mean(0) for split in QUERIES for part in collector.queries(split)], 1)
    expected = np.zeros_like(das)
    for b in range(5):
        cosines = torch.cosine_similarity(queries[b][:, None], vectors[b][None], dim=-1).numpy()
        error = np.sqrt(losses[b] / losses.sum(0))
        expected += (cosines * error) ** 2 / 5
    np.testing.assert_allclose(das, expected, rtol=1e-3, atol=1e-7)
    assert isinstance(collector.sketch, Sketch)


def test_settings_of_a_store():
    assert StoreConfig().compression == "none"
    with pytest.raises(ValueError, match="expected 16 without compression, found 8"):
        StoreConfig(bits=8)
    with pytest.raises(ValueError, match="expected 8 or 16 bits"):
        StoreConfig(size=0)


def test_reliability_is_measured_fitted_and_drawn(root, capsys):
    assert collect.main(["scores", "--root", str(root), "--sketch", "384"]) == 0
    assert reliability.main(["--root", str(root), "--teacher", "first-order", "--reliability", "0.7"]) == 0
    assert reliability.main(["--root", str(root), "--reliability", "1.5"]) == 2
    printed = capsys.readouterr()
    assert "--reliability: expected a number between 0 and 1, found 1.5" in printed.err
    report = json.loads((root / "results/teacher/draws_first-order_emoji.json").read_text())
    assert [row["draws_per_run"] for row in report["rows"]["plain"]] == [10, 20]
    (first, *others) = report["answers"]["normalised"]
    assert first["metric"] == "spearman" and first["collected"] == 20 and others
    assert first["draws_needed"] is None or first["draws_needed"] > 0
    assert (root / "results/teacher/draws_first-order_emoji.png").read_bytes().startswith(b"\x89PNG")


def test_commands_write_their_reports(root, tmp_path, capsys):
    flags = ["--root", str(root), "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    small = ["--images", "8", "--draws", "1", "--query_draws", "1", "--queries", "1", "6", "--exact_queries", "1", "2"]
    assert amortised_speed.main([*flags, *small]) == 0
    report = json.loads((tmp_path / "amortised_emoji.json").read_text())
    assert report["images_timed"] == 8 and len(report["rows"]) == 2
    assert (tmp_path / "amortised_emoji.png").is_file()
    options = {"architecture": "emoji", "mode": "emoji", "root": str(root), "images": 4, "queries": 1, "threads": 1}
    for form in growth.FORMS:
        found = growth.child(options | {"form": form})
        assert found["peak_bytes"] > 2**20 and (found["seconds"] > 0) == (form != "base")

    sizes = ["--sizes", "384", "1536", "--queries", "2", "--signal_images", "8"]
    assert compression.main(["--root", str(root), *sizes]) == 0
    assert "signal" in capsys.readouterr().out
    rows = json.loads((root / "results/teacher/compression.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + 3 * 2)
    by_key = {(row["compression"], row["size"], row["query_bits"]): row for row in rows}
    whole = max(size for name, size, _ in by_key if name == "none")
    assert by_key["none", whole, 32]["plain"]["spearman"] == 1.0
    assert by_key["none", whole, 8]["normalised"]["spearman"] > 0.99
    assert by_key["sketch", 1536, 8]["bytes_per_query"] == 6 * 1536
    assert by_key["sketch", 1536, 32]["bytes_per_image"] == 5 * 1536 * 2
    assert (root / "results/teacher/compression.png").is_file()
