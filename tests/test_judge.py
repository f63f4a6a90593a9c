"""The judges end to end on a small testbed: methods, retraining, LDS, creators, removals, leaderboard, bad input."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from small_collection import few_draws
from small_judge import IMAGES, QUERIES, SETS, small_testbed, write_small_testbed

from abu import collect, collect_exact, query
from abu import testbed as testbeds
from abu.encoded import LoadedPictures
from abu.influence import ExactInfluence
from abu.loss_draws import LossDraws
from abu.plan import Collection
from abu.sample import SampleConfig
from abu.sweep import SweepConfig
from abu.testbed import TESTBEDS
from abu.train_diffusion import refilled
from abu.unlearn import STEP, UnlearnConfig
from benchmark import (
    calibration,
    creators,
    distil,
    gradient_store,
    image_rows,
    latency,
    lds,
    lds_study,
    leaderboard,
    losses,
    methods,
    removal,
    removal_effects,
    retrain,
    retrainer,
)
from benchmark.gradient_methods import METHODS, Method, method_scores
from benchmark.gradient_store import StoreConfig, load_store
from benchmark.losses import CachedLosses
from benchmark.projected import FeatureConfig
from benchmark.retrainer import RetrainConfig, Retrainer, Retraining
from benchmark.scores import ABU_INPUTS, load_scores, save_scores, score_inputs, score_path
from benchmark.together import Together, run_together
from fastgda.core import load_npz, manifest_path, save_json, save_npy, save_npz, write_manifest
from fastgda.dataset import layout
from fastgda.ranker import Ranker, RankerConfig, save_ranker
from fastgda.rankings import from_scores, load_rankings, save_rankings
from feature_extraction.encoders import load_encoder
from feature_extraction.minilm import MiniLM
from serving.retrained import Retrained

HALVES = 4
REMOVALS = ["--queries", "2", "--levels", "1", "3", "--null", "2", "--references", "2"]


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Every command finds the small testbed under the name emoji-mini; one folder for the module."""
    root = tmp_path_factory.mktemp("judge")
    write_small_testbed(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TESTBEDS, "emoji-mini", small_testbed(root))
        # what every command measures a model and an image with: a few draws and steps instead of hundreds
        patch.setattr(RetrainConfig.__init__, "__defaults__", (2, 1, 3, 1))
        patch.setattr(SampleConfig.__init__, "__defaults__", (3, 3.0, 3, 0))
        patch.setattr(StoreConfig.__init__, "__defaults__", (0, False, 2))
        # encoders are loaded once and not by every command
        patch.setattr(testbeds, "MiniLM", functools.cache(MiniLM))
        patch.setattr(removal_effects, "load_encoder", functools.cache(load_encoder))
        for name, method in METHODS.items():
            few = replace(method.features, bins=2, draws=1, query_draws=1, projection=64)
            patch.setitem(METHODS, name, replace(method, features=few))
        yield TESTBEDS["emoji-mini"]


@pytest.fixture(scope="module")
def retrained(small):
    """Halves, references and models without each creator."""
    for what, models in (("halves", HALVES), ("again", HALVES), ("reference", 2), ("creators", 2)):
        assert retrain.main([what, "--models", str(models)]) == 0
    return small


@pytest.fixture(scope="module")
def scores(small):
    """Two files of random scores."""
    paths = []
    for name, seed in (("first", 0), ("second", 1)):
        values = np.random.default_rng(seed).normal(size=(QUERIES["test"], IMAGES))
        paths.append(save_scores(small, name, "test", values, {}, "test"))
    return paths


def test_a_model_is_the_same_bit_for_bit_however_often_it_is_interrupted_and_whatever_the_threads(small):
    job = Retraining((3, 5, 8), seed=7)
    torch.set_num_threads(2)
    worker = Retrainer(small, RetrainConfig())
    whole = worker.compute(job)

    def interrupted(*args, **settings):
        train(*args, **settings, stop_after_steps=2)
        raise KeyboardInterrupt

    train = retrainer.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.compute(job)
    resumed = worker.compute(job)
    assert torch.get_num_threads() == 1
    assert whole.keys() == {"removed", "losses_val", "losses_test", "latents_test", "seconds"}
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole.keys() - {"seconds"})
    other = worker.compute(replace(job, seed=8))
    assert not np.array_equal(whole["losses_test"], other["losses_test"])


def test_a_trained_model_is_not_lost_when_its_result_cannot_be_written(small, tmp_path, capsys):
    copied = replace(small, root=tmp_path / "copy")
    shutil.copytree(small.root, copied.root, ignore=shutil.ignore_patterns("cache"))
    job, flags = retrain.references(1)[0], ["reference", "--models", "1", "--root", str(copied.root)]

    def full(*args, **arrays):
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abu.plan.save_npz", full)
        assert retrain.main(flags) == 2
    assert "no space left on device" in capsys.readouterr().err
    state = retrainer.run_folder(copied, job)
    assert len(torch.load(state / "checkpoint.pt", weights_only=True)["history"]) == copied.diffusion_loop.steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abu.training.batch_rows", lambda *args: pytest.fail("trained again"))
        assert retrain.main(flags) == 0
    assert retrain.reference_file(copied, 0).is_file() and not state.exists()


@pytest.mark.parametrize("removed", [tuple(range(IMAGES)), (0, 0), (-1,), (IMAGES,)])
def test_removals_that_are_no_part_of_the_training_set_are_refused(removed):
    with pytest.raises(ValueError, match=f"expected to remove fewer than {IMAGES} different images with ids 0 to 29"):
        retrainer.kept_images(Retraining(removed, 0), IMAGES)


def test_references_keep_their_weights(retrained):
    device = torch.device("cpu")
    source = gradient_store.load_member(retrained, 2, device)
    queries = retrained.query_examples("test", device)
    draws = RetrainConfig().judged_draws
    found = retrainer.mean_losses([source.denoiser], source.schedule, queries, draws, progress=False)[0]
    stored = load_npz(retrain.reference_file(retrained, 1), ("losses_test",))["losses_test"]
    np.testing.assert_allclose(found, stored, rtol=1e-2)


def test_models_of_another_recipe_are_refused(retrained, capsys):
    with pytest.MonkeyPatch.context() as patch:
        loop = replace(retrained.diffusion_loop, steps=4)
        patch.setitem(TESTBEDS, "emoji-mini", replace(retrained, diffusion_loop=loop))
        assert retrain.main(["status"]) == 2
    assert "config.loop.steps is" in capsys.readouterr().err


def test_status_counts_models_and_their_rate(retrained, capsys):
    assert retrain.main(["status", "--models", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "halves: 2 of 2 models",
        "again: 2 of 2 models",
        "reference: 2 of 2 models",
        "creators: 6 of 6 models",
    ]
    assert all("models an hour" in line for line in lines)


def test_every_method_on_gradients_writes_scores(small, capsys):
    names = list(METHODS)
    assert methods.main(["journey-trak", "--dry_run"]) == 0
    assert capsys.readouterr().out.count("GiB of memory") == 2
    assert methods.main(names) == 0
    found = {name: load_scores(small.data / f"scores/{name}.npy", small, "test") for name in names}
    assert {array.shape for array in found.values()} == {(QUERIES["test"], IMAGES)}
    assert (found["das"] >= 0).all() and (found["d-trak"] < 0).any()
    again = {path: path.stat().st_mtime_ns for path in small.data.rglob("projected/**/*.npz")}
    assert methods.main(["trak"]) == 0
    assert again == {path: path.stat().st_mtime_ns for path in small.data.rglob("projected/**/*.npz")}


def test_trak_is_the_closed_form_on_the_stored_gradients_and_a_mean_over_models(retrained):
    method = Method(FeatureConfig(projection=64, bins=2, draws=1, query_draws=1))
    expected = []
    for model in (1, 2):
        store = StoreConfig(method.features, model)
        gradient_store.collect(retrained, store, None)
        phi, query = (load_store(retrained, store, part).double().numpy() for part in ("training", "test"))
        expected.append(query @ np.linalg.solve(phi.T @ phi + 1e-3 * np.eye(64), phi.T))
    found, used = method_scores(retrained, method, 2, "test", ridge=1e-3)
    assert used == 1e-3
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-3, atol=1e-6 * np.abs(expected).max())


def test_any_method_becomes_a_teacher(small, capsys):
    """Scores of the training queries, collected beside those of the judged ones, and all of them as rankings."""
    assert distil.main(["ekfac"]) == 2
    assert "scores/train/ekfac.npy: expected a file, found nothing" in capsys.readouterr().err
    judged = {path: path.stat().st_mtime_ns for path in small.data.rglob("projected/**/*.npz")}
    for split in ("train", "val", "test"):
        assert methods.main(["ekfac", "--split", split]) == 0
    folder = small.data / "cache/projected" / METHODS["ekfac"].stores(0)[0].name
    assert [path.name for path in folder.with_name(f"{folder.name}-train").glob("*.npz")] == ["query_train_000000.npz"]
    assert judged.items() <= {path: path.stat().st_mtime_ns for path in small.data.rglob("projected/**/*.npz")}.items()
    assert distil.main(["ekfac"]) == 0
    for split in ("train", "val", "test"):
        scores = load_scores(score_path(small, "ekfac", split), small, split)
        found = load_rankings(small.data / f"influence_ekfac_{split}.npz", images=IMAGES)
        assert np.array_equal(found.rank, np.argsort(-scores, axis=1, kind="stable"))


def test_gradients_of_other_queries_are_refused(small, tmp_path):
    store = StoreConfig(FeatureConfig(projection=8, bins=1, draws=1, query_draws=1))
    gradient_store.collect(small, store, None)
    shutil.copytree(small.root, tmp_path / "root")
    moved = replace(small, root=tmp_path / "root")
    queries = moved.data / "query_test/latents.npy"
    save_npy(queries, np.load(queries) + 1)
    with pytest.raises(ValueError, match="query_test is"):
        gradient_store.collect(moved, store, None)


def test_the_ridge_is_chosen_on_validation_queries(retrained):
    flags = ["d-trak", "--select", "--halves", str(HALVES)]
    assert methods.main(flags) == 0
    manifest = json.loads((retrained.data / "scores/d-trak-selected.npy.manifest.json").read_text())
    table = manifest["config"]["validation"]
    assert manifest["config"]["ridge"] == max(table, key=lambda row: row["lds"])["ridge"]
    assert any(row["ridge"] == 500 for row in table) and len(table) == 9


def test_a_ridge_that_is_none_is_refused_before_anything_is_computed(retrained, capsys):
    for value in ("0", "-1", "nan"):
        assert methods.main(["d-trak", f"--ridge={value}"]) == 2
        assert f"--ridge: expected a positive number, found {value}" in capsys.readouterr().err


def test_lds_command_reports_ceiling_and_sign(retrained, scores, tmp_path, capsys):
    judge = lds.Judge(retrained, "test", HALVES)
    linear = -(judge.losses - judge.losses.mean(0)).T @ (judge.seen - 0.5)
    good = save_scores(retrained, "good", "test", linear, {}, "test")
    bad = save_scores(retrained, "bad", "test", -linear, {}, "test")
    output = tmp_path / "lds.json"
    assert lds.main([str(good), str(bad), "--models", str(HALVES), "--output", str(output)]) == 0
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["good"]["sharpened"]["lds"] > 0 > rows["bad"]["sharpened"]["lds"]
    assert rows["good"]["lds"] > 0.5 and not rows["good"]["probable_sign_error"]
    assert rows["bad"]["lds"] == pytest.approx(-rows["good"]["lds"]) and rows["bad"]["probable_sign_error"]
    assert "far below zero: are low scores the influential ones?" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert 0 <= report["ceiling"]["lds"] <= 1 and report["ceiling"]["models"] == HALVES
    assert report["mode"] == "emoji-mini" and report["truth"] == "both"


@pytest.mark.parametrize(
    ("judge", "flags"), [(lds, ["--models", str(HALVES)]), (creators, ["--models", "2", "--references", "2"])]
)
def test_rows_are_added_to_a_report_of_the_same(retrained, scores, tmp_path, capsys, judge, flags):
    whole, grown = tmp_path / "whole.json", tmp_path / "grown.json"
    names = [str(path) for path in scores]
    assert judge.main([*names, *flags, "--output", str(whole)]) == 0
    flags = [*flags, "--output", str(grown)]
    assert judge.main([names[1], *flags, "--add"]) == 2
    assert "grown.json: expected a file, found nothing" in capsys.readouterr().err
    assert judge.main([names[0], *flags]) == 0
    assert judge.main([names[1], *flags, "--add"]) == 0
    assert json.loads(grown.read_text()) == json.loads(whole.read_text())
    save_scores(retrained, "first", "test", -np.load(scores[0]), {}, "test")
    assert judge.main([names[0], *flags, "--add"]) == 0
    before, after = (json.loads(path.read_text())["rows"] for path in (whole, grown))
    assert [row["method"] for row in after] == [row["method"] for row in before]
    assert [row["method"] for row, old in zip(after, before, strict=True) if row != old] == ["first"]
    report = json.loads(grown.read_text())
    for change, message in (
        ({"split": "val"}, "expected a report of the same, found another: split is 'val', wanted 'test'"),
        ({"inputs": {"model": "0"}}, "found another: inputs.model is '0', wanted "),
        ({"recipe": report["recipe"] | {"draws": 3}}, "found another: recipe.draws is 3, wanted "),
        ({"models": 1}, "found another: models is 1, wanted "),
        ({"rows": [{}]}, "expected a report of python -m benchmark."),
    ):
        grown.write_text(json.dumps(report | change))
        kept = grown.read_bytes()
        assert judge.main([names[1], *flags, "--add"]) == 2
        assert message in capsys.readouterr().err and grown.read_bytes() == kept


@pytest.mark.parametrize("command", [lds, creators, calibration, leaderboard, removal, image_rows])
def test_two_files_of_one_method_are_refused(retrained, scores, tmp_path, capsys, command):
    other = tmp_path / "first.npy"
    save_npy(other, np.zeros((QUERIES["test"], IMAGES)))
    what = ["report"] if command is removal else []
    where = ["--board"] if command is leaderboard else ["--output"]
    assert command.main([*what, *map(str, [*scores, other]), *where, str(tmp_path / "nothing")]) == 2
    assert f"{other}: expected a method of another name, found {scores[0]} before it" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_an_export_judges_as_the_models_do_and_needs_no_data(retrained, scores, tmp_path, capsys):
    assert retrain.main(["export"]) == 0
    alone = replace(retrained, root=tmp_path / "clone")
    shutil.copytree(retrained.root / "results", alone.root / "results")
    shutil.copytree(retrained.data / "scores", tmp_path / "scores")
    files, flags = [str(tmp_path / "scores" / path.name) for path in scores], ["--models", str(HALVES)]
    for command, name in ((lds, "lds"), (creators, "creators")):
        few = flags if command is lds else ["--models", "2", "--references", "2"]
        found = []
        for root in (retrained.root, alone.root):
            output = tmp_path / f"{name}.json"
            assert command.main([*files, *few, "--root", str(root), "--output", str(output)]) == 0
            found.append(json.loads(output.read_text()))
        assert found[0] == found[1]
    capsys.readouterr()
    assert lds.main([files[0], "--models", "5", "--root", str(alone.root)]) == 2
    assert "expected 5 models, found no without_" in capsys.readouterr().err
    write_manifest(Path(files[0]), {}, command="", inputs={"queries": "0" * 64})
    assert lds.main([files[0], *flags, "--root", str(alone.root)]) == 2
    assert "found another queries: SHA-256 000000000000" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        loop = replace(retrained.diffusion_loop, steps=4)
        patch.setitem(TESTBEDS, "emoji-mini", replace(retrained, diffusion_loop=loop))
        assert lds.main([files[1], *flags, "--root", str(alone.root)]) == 2
    assert "expected the losses of the recipe of now, found others (config.loop.steps is" in capsys.readouterr().err


def test_exported_models_are_restored_and_need_no_second_training(retrained, tmp_path, capsys):
    assert retrain.main(["export"]) == 0
    shutil.copytree(retrained.root, tmp_path / "clone", ignore=shutil.ignore_patterns("cache"))
    clone = replace(retrained, root=tmp_path / "clone")
    flags = ["--root", str(clone.root)]
    capsys.readouterr()
    assert retrain.main(["restore", *flags]) == 0
    assert capsys.readouterr().out == f"{2 * HALVES + 2 * len(SETS)} models restored\n"
    assert retrain.main(["status", "--models", str(HALVES), *flags]) == 0
    printed = capsys.readouterr().out
    assert f"halves: {HALVES} of {HALVES} models\n" in printed, "restored models say nothing of the machine's rate"
    jobs = retrain.random_halves(IMAGES, HALVES)
    for split in ("val", "test"):
        found, expected = (losses.CachedLosses(part).of(jobs, split) for part in (clone, retrained))
        np.testing.assert_array_equal(found, expected)
    assert retrain.main(["restore", *flags]) == 0
    assert capsys.readouterr().out == "0 models restored\n"
    before = {name: array.copy() for name, array in losses.ExportedLosses(clone).arrays.items()}
    losses.folder_of(clone).joinpath(jobs[0].name).unlink()
    assert retrain.main(["export", *flags]) == 0
    for name, array in losses.ExportedLosses(clone).arrays.items():
        np.testing.assert_array_equal(array, before[name], err_msg=f"{name}: models that the cache lacks are kept")
    latents = clone.data / "query_val/latents.npy"
    save_npy(latents, 2 * np.load(latents))
    shutil.rmtree(clone.data / "cache")
    assert retrain.main(["restore", *flags]) == 2
    assert "expected losses of this testbed, found another val: SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("truth", ["halves", "both"])
def test_scores_are_judged_by_one_training_or_by_the_mean_of_two(retrained, truth):
    judge = lds.Judge(retrained, "test", HALVES, truth)
    stored = [judge.stored.of(jobs, "test") for jobs in (judge.halves, retrain.again(judge.halves))]
    np.testing.assert_allclose(judge.losses, stored[0] if truth == "halves" else np.mean(stored, 0), rtol=1e-6)
    assert lds.Judge(retrained, "test", HALVES).truth == "both"
    assert lds.Judge(retrained, "test", HALVES + 1).truth == "halves"


def test_creators_effects_and_sums(retrained, scores, tmp_path):
    sets = [SETS[i % 3] for i in range(IMAGES)]
    effects = creators.load_effects(CachedLosses(retrained), "test", 2, 2)
    references = [load_npz(retrain.reference_file(retrained, s), ("losses_test",))["losses_test"] for s in (0, 1)]
    job = Retraining(tuple(range(1, IMAGES, 3)), 1)
    stored = load_npz(retrain.folder_of(retrained) / job.name, ("losses_test",))["losses_test"]
    assert effects.names == SETS
    np.testing.assert_allclose(effects.change[1, 1], stored - references[1])
    other = retrain.loss_changes(CachedLosses(retrained), [job], 1, "test")
    np.testing.assert_allclose(other[0], stored - references[0], err_msg="a seed that no reference has")
    values = load_scores(scores[0], retrained, "test")
    np.testing.assert_allclose(creators.by_creator(values, sets, SETS)[:, 2], values[:, 2::3].sum(1))
    output = tmp_path / "creators.json"
    flags = ["--models", "2", "--references", "2", "--output", str(output)]
    assert creators.main([*map(str, scores), *flags]) == 0
    report = json.loads(output.read_text())
    assert [row["method"] for row in report["rows"]] == [creators.PROMPT, "first", "second"]
    assert report["ceiling"].keys() == {"spearman", "reliability", "one_seed"}


def test_calibration_reads_the_scores_of_both_splits(retrained, scores, tmp_path, capsys):
    output = tmp_path / "calibration.json"
    flags = ["--models", "2", "--references", "2", "--output", str(output)]
    assert calibration.main([str(scores[0]), *flags]) == 2
    assert "scores/val/first.npy: expected a file, found nothing" in capsys.readouterr().err
    values = np.random.default_rng(7).normal(size=(QUERIES["val"], IMAGES))
    save_scores(retrained, "first", "val", values, {}, "test")
    assert calibration.main([str(scores[0]), *flags]) == 0
    groups = json.loads(output.read_text())["rows"][0]["groups"]
    assert groups["creators"]["models"] == 2 * len(SETS) and groups["halves"]["models"] == HALVES


def test_the_creators_ceiling_is_what_the_truth_reaches():
    random = np.random.default_rng(0)
    truth = random.normal(size=(40, 400))
    change = truth + 1.5 * random.normal(size=(3, 40, 400))
    found, nothing = creators.ceiling(change), creators.ceiling(np.stack([truth, -truth]))
    assert found is not None and nothing is not None
    reached = creators.agreement(truth.T, change.mean(0).T)["spearman"]
    assert found["spearman"] == pytest.approx(reached, abs=0.02)
    assert found["one_seed"]["spearman"] < reached - 0.2
    assert creators.ceiling(change[:1]) is None
    assert nothing["spearman"] == 0


def test_agreement_is_one_for_the_truth_and_turns_with_the_sign():
    effects = np.random.default_rng(0).normal(size=(6, 9))
    assert creators.agreement(effects**3, effects)["spearman"] == pytest.approx(1)
    assert creators.agreement(effects**3, effects)["top1"] == 1
    assert creators.agreement(-effects, effects)["spearman"] == pytest.approx(-1)


def test_removals_run_and_report_and_the_leaderboard_uses_them(retrained, scores, tmp_path, capsys, caplog):
    output, files = tmp_path / "removal.json", [str(path) for path in scores]
    assert removal.main(["run", *files, *REMOVALS, "--dry_run"]) == 0
    assert "removals: 2 of 14 models" in capsys.readouterr().out
    assert removal.main(["run", *files, *REMOVALS]) == 0
    assert removal.main(["report", *files, *REMOVALS, "--output", str(output)]) == 0
    rows = {(row["method"], row["K"]): row for row in json.loads(output.read_text())["rows"]}
    assert {key for key in rows} == {(m, k) for m in (removal_effects.RANDOM, "first", "second") for k in (1, 3)}
    first = rows["first", 3]["delta_loss"]
    null = rows[removal_effects.RANDOM, 3]["delta_loss"]
    assert first["excess"] == pytest.approx(first["mean"] - null["mean"])
    assert 0 < rows["first", 3]["similarity"]["mean"] <= 1.000001
    report = json.loads(output.read_text())
    assert [(pair["first"], pair["second"], pair["K"]) for pair in report["pairs"]] == [
        ("first", "second", 1),
        ("first", "second", 3),
    ]
    change = np.subtract(*(rows[name, 3]["delta_loss"]["per_query"] for name in ("first", "second")))
    assert report["pairs"][1]["difference"] == pytest.approx(change.mean())
    shared = np.load(scores[0])
    shared[1:] = np.roll(shared[1:], 5, axis=1)
    partly = save_scores(retrained, "partly", "test", shared, {}, "test")
    again = ["report", files[0], str(partly), *REMOVALS, "--output", str(tmp_path / "again" / "removal.json")]
    assert removal.main(again) == 0
    found = {(row["method"], row["K"]) for row in json.loads((tmp_path / "again" / "removal.json").read_text())["rows"]}
    assert ("first", 3) in found and ("partly", 3) not in found, "the model that it shares is not all that it needs"
    drawn = {(one.method, one.removed) for one in Retrained.load(tmp_path / "again" / "pictures.npz").removals}
    assert drawn == found
    capsys.readouterr()
    assert removal.main(["report", *files, *REMOVALS[:2], "--levels", "2", *REMOVALS[5:]]) == 2
    assert "expected all models of a method and a K, found those of none" in capsys.readouterr().err
    pictures = Retrained.load(tmp_path / "pictures.npz")
    kept = {(one.query, one.method, one.removed): one for one in pictures.removals}
    assert len(kept) == 2 * 3 * 2 and pictures.captions[0] == retrained.query_captions("test")[0]
    for place in (0, 1):
        one = kept[place, "first", 3]
        error = ((one.picture / 255 - pictures.references[place] / 255) ** 2).mean()
        assert one.change == pytest.approx(rows["first", 3]["delta_loss"]["per_query"][place])
        assert error == pytest.approx(rows["first", 3]["mse"]["per_query"][place], abs=1e-3)

    save_rankings(
        retrained.data / "influence_test.npz",
        from_scores(np.random.default_rng(5).normal(size=(QUERIES["test"], IMAGES))),
    )
    board = tmp_path / "board"
    flags = [*REMOVALS, "--models", str(HALVES), "--board", str(board)]
    assert leaderboard.main([files[0], *flags]) == 0
    row = json.loads((board / "first.json").read_text())
    nearest = {found["K"]: found for found in row["removals"]}
    assert nearest[3]["shared"] == 1.0
    assert nearest[3]["delta_loss"]["per_query"] == pytest.approx(first["per_query"])
    assert row["retrieval"]["mAP"].keys() == {"1"}
    third = save_scores(retrained, "third", "test", np.random.default_rng(9).normal(size=(4, IMAGES)), {}, "test")
    assert leaderboard.main([str(third), *flags]) == 0
    assert json.loads((board / "third.json").read_text())["removals"][1]["shared"] < 1
    assert leaderboard.main([str(third), *flags, "--retrain"]) == 0
    assert json.loads((board / "third.json").read_text())["removals"][1]["shared"] == 1
    capsys.readouterr()
    assert leaderboard.main(flags) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    # rows that rest on something else are left out, and the board says why
    row = json.loads((board / "third.json").read_text())
    save_json(board / "third.json", row | {"models": 2})
    save_json(board / "lds.json", {"mode": "emoji-mini", "rows": []})
    assert leaderboard.main([files[0], *flags]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["first"]
    assert "third.json: left out, as it cannot be compared: third.models is 2, wanted" in caplog.text
    assert "lds.json: left out" in caplog.text
    (board / "broken.json").write_text("[1")
    assert leaderboard.main(["--board", str(board)]) == 2
    assert "broken.json: expected a row of the leaderboard, found a damaged one" in capsys.readouterr().err


def test_removals_of_restored_models_are_added_to_a_report(retrained, scores, tmp_path, capsys):
    first, values = str(scores[0]), np.random.default_rng(11).normal(size=(QUERIES["test"], IMAGES))
    added = str(save_scores(retrained, "added", "test", values, {}, "test"))
    assert removal.main(["run", first, *REMOVALS]) == 0
    assert retrain.main(["export"]) == 0
    root = tmp_path / "clone"
    shutil.copytree(retrained.root, root, ignore=shutil.ignore_patterns("cache"))
    flags = [*REMOVALS, "--output", str(root / "results/removal/removal.json"), "--root", str(root)]
    output = Path(flags[-3])
    assert removal.main(["report", first, *flags[:-2]]) == 0
    before, drawn = json.loads(output.read_text()), Retrained.load(output.with_name("pictures.npz"))
    assert retrain.main(["restore", "--root", str(root)]) == 0
    capsys.readouterr()
    assert removal.main(["report", first, *flags, "--add"]) == 0
    assert "mse" not in capsys.readouterr().out
    again, kept = json.loads(output.read_text()), Retrained.load(output.with_name("pictures.npz"))
    assert again["rows"] == before["rows"] and "mse" in again["rows"][0], "what pictures said is kept"
    assert len(kept.removals) == len(drawn.removals)
    assert removal.main(["run", added, *flags]) == 0
    assert removal.main(["report", added, *flags, "--add"]) == 0
    grown, kept = json.loads(output.read_text()), Retrained.load(output.with_name("pictures.npz"))
    rows = {(row["method"], row["K"]): row for row in grown["rows"]}
    assert all(rows[row["method"], row["K"]] == row for row in before["rows"])
    assert rows["added", 3]["mse"]["excess"] == pytest.approx(
        rows["added", 3]["mse"]["mean"] - rows[removal_effects.RANDOM, 3]["mse"]["mean"]
    )
    assert len(kept.removals) == len(drawn.removals) + 2 * 2
    assert [(pair["first"], pair["second"]) for pair in grown["pairs"]] == [("first", "added")] * 2
    np.testing.assert_allclose(grown["reference_loss"], before["reference_loss"])
    # ΔL rests on the reference of the first report
    here = load_npz(losses.folder_of(retrained) / rows["first", 3]["models"][0][0], ("losses_test",))["losses_test"]
    query = rows["first", 3]["queries"][0]
    assert rows["first", 3]["delta_loss"]["per_query"][0] == pytest.approx(here[query] - before["reference_loss"][0])
    # without --add the report holds what was asked for alone, and of restored models no pictures
    plain = tmp_path / "plain/removal.json"
    assert retrain.main(["reference", "--models", "2", "--root", str(root)]) == 0
    assert removal.main(["report", first, *REMOVALS, "--output", str(plain), "--root", str(root)]) == 0
    found = {(row["method"], row["K"]): row for row in json.loads(plain.read_text())["rows"]}
    assert found.keys() == {(method, k) for method in (removal_effects.RANDOM, "first") for k in (1, 3)}
    assert all("mse" not in row and "delta_loss" in row for row in found.values())
    other = plain.with_name("other.json")
    flags = [*REMOVALS, "--null", "0", "--output", str(other), "--root", str(root)]
    assert removal.main(["report", first, *flags]) == 0
    rows = json.loads(other.read_text())["rows"]
    assert {row["method"] for row in rows} == {"first"} and "excess" not in rows[0]["delta_loss"]
    assert other.with_name("other_pictures.npz").is_file()
    assert Retrained.load(plain.with_name("pictures.npz")).removals == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"bins": 7}}, "expected a report of the same, found another: recipe.bins is 7, wanted 2"),
        ({"inputs": {"model": "0"}}, "found another: inputs.model is '0', wanted "),
        ({"queries": [0]}, "found another: queries is [0], wanted [0, "),
        ({"reference_loss": [1.0]}, "expected a reference loss for each query"),
        ({"rows": [{"method": "first"}]}, "found a damaged one ('models')"),
        ({"rows": [{"method": "first", "models": [], "queries": [0]}]}, "expected models of each query and an effect"),
        (None, "found a damaged one"),
    ],
)
def test_a_report_of_something_else_is_not_added_to(retrained, scores, tmp_path, capsys, change, message):
    flags = [*REMOVALS, "--output", str(tmp_path / "removal.json")]
    assert removal.main(["report", str(scores[0]), *flags, "--add"]) == 2
    assert "removal.json: expected a file, found nothing" in capsys.readouterr().err
    assert removal.main(["run", str(scores[0]), *flags]) == 0
    assert removal.main(["report", str(scores[0]), *flags]) == 0
    path = tmp_path / "removal.json"
    text = path.read_text()
    path.write_text(text[:-9] if change is None else json.dumps(json.loads(text) | change))
    changed = path.read_bytes()
    assert removal.main(["report", str(scores[0]), *flags, "--add"]) == 2
    assert message in capsys.readouterr().err and path.read_bytes() == changed
    path.write_text(text)
    path.with_name("pictures.npz").unlink()
    assert removal.main(["report", str(scores[0]), *flags, "--add"]) == 2
    assert "expected pictures of the reference" in capsys.readouterr().err


def test_rows_of_images_are_drawn(retrained, scores, tmp_path, capsys):
    flags = ["--queries", "1", "--count", "3", "--level", "2", "--output", str(tmp_path)]
    assert image_rows.main([*map(str, scores), *flags]) == 0
    assert (tmp_path / "rows_1.png").stat().st_size > 500
    assert image_rows.main([str(scores[0]), "--queries", "4"]) == 2
    assert "--queries: expected 0 to 3, found [4]" in capsys.readouterr().err


def test_latency_and_storage_of_every_kind_of_method(small, features, tmp_path):
    output = tmp_path / "latency.json"
    tuned = ["--ftype", "effnet", "--checkpoint", str(features)]
    assert methods.main(["d-trak", "abu-plus"]) == 0
    kinds = ["effnet", "tuned", "d-trak", "abu-plus", "exact"]
    assert latency.main([*kinds, *tuned, "--queries", "2", "--output", str(output)]) == 0
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert list(rows) == ["effnet", "tuned-effnet", "d-trak", "abu-plus", "exact"]
    assert rows["effnet"]["storage"] == 4 * IMAGES * 1280 and rows["tuned-effnet"]["storage"] == 4 * IMAGES * 4
    assert latency.main(["d-trak", "effnet", "--name", "both", "--output", str(output)]) == 2
    assert latency.main(["d-trak", "--name", "chosen", "--queries", "2", "--output", str(output)]) == 0
    assert [row["method"] for row in json.loads(output.read_text())["rows"]] == [*rows, "chosen"]
    width = load_store(small, METHODS["d-trak"].stores(0)[0], "training").shape[1]
    assert rows["d-trak"]["storage"] == IMAGES * width * 4


@pytest.mark.parametrize("method", ["trak", "journey-trak", "d-trak", "abu"])
def test_what_is_timed_is_what_scores(small, method):
    assert methods.main([method]) == 0
    expected = np.load(score_path(small, method, "test"))
    attribute = latency.gradient_cost(small, method).attribute
    found = np.concatenate([np.asarray(attribute(query)) for query in range(QUERIES["test"])])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_stores_of_other_query_draws_lie_apart_and_damping_counts_where_something_is_damped():
    usual, damped = FeatureConfig(), FeatureConfig(curvature="ekfac")
    names = {StoreConfig(config).name for config in (usual, replace(usual, query_draws=8), damped)}
    names.add(StoreConfig(replace(damped, damping=0.5)).name)
    assert len(names) == 4
    assert StoreConfig(replace(usual, damping=0.5)).settings == StoreConfig(usual).settings
    assert StoreConfig(replace(damped, damping=0.5)).settings != StoreConfig(damped).settings


@pytest.fixture(scope="module")
def features(small):
    """Random features of two kinds, the second `effnet`, whose neighbours are candidates, and a ranker on it."""
    random = np.random.default_rng(0)
    for ftype, width in (("pixel", 5), ("effnet", 1280)):
        for name, rows in (("data", IMAGES), ("val_query", QUERIES["val"]), ("test_query", QUERIES["test"])):
            save_npy(small.data / f"feats/{ftype}/{name}_feats.npy", random.normal(size=(rows, width)).astype("f4"))
    checkpoint = small.root / "ranker.pth"
    save_ranker(checkpoint, Ranker(RankerConfig(in_dim=1280, hidden_sizes=(8,), out_feat_dim=4)))
    return checkpoint


@pytest.fixture(scope="module")
def collected(small):
    """The teachers' passes, steps and exact influence, of few draws."""
    root = ["--mode", "emoji-mini", "--root", str(small.root)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect.CollectConfig, "draws", few_draws)
        for stage in ("curvature", "queries", "training", "scores", "steps"):
            assert collect.main([stage, *root, *(["--sketch", "384"] if stage == "scores" else [])]) == 0
    few = ["--step", "0.01", "--query_draws", "1", "--timesteps", "2"]
    assert collect_exact.main(["all", *root, "--split", "test", *few]) == 0
    return small


def stored(testbed, name):
    return load_scores(testbed.data / f"scores/{name}.npy", testbed, "test")


def test_frozen_methods_write_scores_under_their_names(collected, features):
    teachers = ["finite-step", "finite-step@0.01", "finite-step@1", "first-order", "second-order", "plain", "exact"]
    nearest = ["finite-step-knn", "finite-step@1-knn"]
    assert methods.main(["random", "pixel", "normalised", *teachers, *nearest]) == 0
    assert methods.main(["tuned", "--ftype", "effnet", "--checkpoint", str(features)]) == 0
    assert methods.main(["tuned", "--ftype", "effnet", "--checkpoint", str(features), "--name", "mine"]) == 0
    np.testing.assert_array_equal(stored(collected, "tuned-effnet"), stored(collected, "mine"))
    first, second = stored(collected, "first-order"), stored(collected, "second-order")
    for name, step in (("finite-step", STEP), ("finite-step@0.01", 0.01), ("finite-step@1", 1.0)):
        expected = step / IMAGES * first + (step / IMAGES) ** 2 * second
        np.testing.assert_allclose(stored(collected, name), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    few = stored(collected, "finite-step-knn")
    assert ((few == few.min(1, keepdims=True)).sum(1) >= IMAGES - round(methods.NEIGHBOURS * IMAGES)).all()


def test_influence_keeps_the_order_and_has_the_teachers_magnitude(collected, features, capsys):
    assert methods.main(["finite-step@1", "--split", "val"]) == 0
    teacher = load_scores(collected.data / "scores/val/finite-step@1.npy", collected, "val")
    folder = collected.data / "feats/dino"
    save_npy(folder / "data_feats.npy", np.eye(IMAGES, dtype="f4"))
    # the cosine with image i is then proportional to its place
    save_npy(folder / "val_query_feats.npy", rankdata(teacher, axis=1).astype("f4"))
    assert methods.main(["dino", "--influence", "finite-step@1", "--split", "val"]) == 0
    influence = load_scores(collected.data / "scores/val/dino-influence.npy", collected, "val")
    assert (np.diff(np.take_along_axis(influence, np.argsort(teacher, axis=1), 1), axis=1) >= 0).all()
    assert ((influence - teacher) ** 2).mean() < 0.75 * teacher.var()
    save_npy(folder / "val_query_feats.npy", rankdata(-teacher, axis=1).astype("f4"))
    assert methods.main(["dino", "--influence", "finite-step@1", "--split", "val"]) == 2
    assert "dino: expected scores that rise with the influence under finite-step@1" in capsys.readouterr().err


def test_any_validation_scores_can_be_the_influence(small, features):
    cubes = methods.feature_scores(layout("emoji", "pixel", small.data), "val") ** 3
    save_scores(small, "cubes", "val", cubes, {}, "test")
    assert methods.main(["pixel", "--influence", "cubes", "--split", "val", "--name", "found"]) == 0
    found = load_scores(score_path(small, "found", "val"), small, "val")
    assert (np.diff(found.ravel()[np.argsort(cubes, axis=None)]) >= 0).all()
    assert ((found - cubes) ** 2).mean() < 0.75 * cubes.var()


@pytest.mark.parametrize(
    "flags", [["pixel", "--influence", "pixel"], ["d-trak", "--influence", "plain"], ["plain", "--influence", "plain"]]
)
def test_influence_is_predicted_from_features_under_a_teacher(flags, capsys):
    assert methods.main(flags) == 2
    assert "--influence: expected" in capsys.readouterr().err


def test_exact_scores_are_loss_changes_at_the_moved_weights(collected):
    assert methods.main(["exact"]) == 0
    device, ids = torch.device("cpu"), list(range(IMAGES))
    step = UnlearnConfig(step=0.01, query_draws=1)
    exact = ExactInfluence.of(collected, step, LossDraws(timesteps=2), SweepConfig(), device)
    change = exact.unlearned(collected.query_examples("test", device).rows(2, 3))
    before, after = exact.sweep.losses(ids, [None])[0], exact.sweep.losses(ids, [change])[0]
    np.testing.assert_allclose(stored(collected, "exact")[2], (after - before).max(1), rtol=1e-3, atol=1e-9)


def test_the_exact_form_is_studied_with_steps_of_folders_of_their_own(
    collected, retrained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lds_study, "EXACT_STEPS", (0.01, 1.0))
    moved = ["--mode", "emoji-mini", "--split", "val", "--query_draws", "1", "--timesteps", "2"]
    folders = {size: collected.data / f"cache/exact_val@{size:g}" for size in lds_study.EXACT_STEPS}
    for size, folder in folders.items():
        root = ["--root", str(collected.root), "--folder", str(folder)]
        assert collect_exact.main(["all", *moved, *root, "--step", str(size)]) == 0
    output = tmp_path / "study.json"
    study = ["--study", "exact", "--models", str(HALVES), "--output", str(output)]
    assert lds_study.main(study) == 0
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows.keys() == {"exact@0.01", "exact@1"}
    scores = {size: methods.teacher_scores(collected, f"exact@{size:g}", "val") for size in folders}
    assert (scores[0.01] != scores[1.0]).all()
    assert rows["exact@1"]["per_query"] == lds.Judge(collected, "val", HALVES)(scores[1.0])["per_query"]
    folders[1.0].rename(collected.data / "cache/exact_val@3")
    assert lds_study.main(study) == 2
    asked = f"--split val --mode emoji-mini --step 1 --folder {folders[1.0]}"
    assert f"make it with: python -m abu.collect_exact all {asked}" in capsys.readouterr().err
    assert methods.main(["exact@3", "--split", "val"]) == 2
    assert "expected pieces of step 3, found 1" in capsys.readouterr().err


def test_influence_on_candidates_is_no_score(collected, tmp_path, capsys):
    moved = replace(collected, root=tmp_path)
    shutil.copytree(collected.root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(moved.data / "cache/exact_test")
    root = ["--mode", "emoji-mini", "--root", str(tmp_path)]
    few = ["--step", "0.01", "--query_draws", "1", "--timesteps", "2", "--subset", "0.2"]
    assert methods.main(["exact", *root]) == 2
    assert "make it with: python -m abu.collect_exact all --split test" in capsys.readouterr().err
    assert collect_exact.main(["all", *root, "--split", "test", *few]) == 0
    assert methods.main(["exact", *root]) == 2
    assert f"expected influence on all {IMAGES} training images, found it on 6 candidates" in capsys.readouterr().err


def test_terms_of_other_queries_are_no_scores(collected, tmp_path, capsys):
    shutil.copytree(collected.root, tmp_path, dirs_exist_ok=True)
    queries = replace(collected, root=tmp_path).data / "query_test/latents.npy"
    save_npy(queries, np.load(queries) + 1)
    assert methods.main(["finite-step", "--root", str(tmp_path)]) == 2
    assert "found those of another data/emoji-mini/query_test/latents.npy" in capsys.readouterr().err


def test_a_study_of_steps_judges_what_is_collected(collected, retrained, tmp_path):
    output = tmp_path / "study.json"
    flags = ["--models", str(HALVES), "--output", str(output)]
    assert lds_study.main(["--study", "step", *flags]) == 0
    report = json.loads(output.read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert rows.keys() == {*(f"finite-step@{step:g}" for step in lds_study.STEPS), "first-order", "second-order"}
    judge = lds.Judge(collected, "val", HALVES)
    expected = judge(methods.teacher_scores(collected, "finite-step@10", "val"))
    assert rows["finite-step@10"]["per_query"] == expected["per_query"]
    assert report["fixed"] == "the passes that abu.collect steps has collected" and report["split"] == "val"


def test_a_study_of_bins_spends_the_same_draws_on_each(retrained, tmp_path):
    output = tmp_path / "study.json"
    base = replace(lds_study.BASE, bins=2, draws=1, query_draws=1, projection=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds_study, "BASE", base)
        variants = lds_study.bins().variants
        assert lds_study.main(["--study", "bins", "--models", str(HALVES), "--output", str(output)]) == 0
        assert {config.bins * config.draws for config in lds_study.strata().variants.values()} == {2}
    assert list(variants) == ["all bins", "bin 0 of 2 alone", "bin 1 of 2 alone"]
    budgets = [(c.draws_of("training", 1000), len(c.places)) for c in variants.values()]
    assert [draws.draws * places for draws, places in budgets] == [2, 2, 2]
    rows = {row["variant"]: row for row in json.loads(output.read_text())["rows"]}
    chosen = ["--curvature", "ekfac", "--only", "1", "--name", "late"]
    assert methods.main(["abu-plus", *chosen, "--split", "val"]) == 0
    found = load_scores(retrained.data / "scores/val/late.npy", retrained, "val")
    late = lds.Judge(retrained, "val", HALVES)(found)
    assert late["per_query"] == pytest.approx(rows["bin 1 of 2 alone"]["per_query"])


def test_other_settings_need_another_name(small, capsys):
    assert methods.main(["abu-plus", "--damping", "1", "--dry_run"]) == 2
    assert "--damping: expected --name beside it, found none" in capsys.readouterr().err
    assert methods.main(["abu-plus", "--only", "2", "--name", "x", "--dry_run"]) == 2
    assert "expected a bin from 0 to 1, found 2" in capsys.readouterr().err


def test_latency_of_the_teachers(collected, tmp_path, monkeypatch):
    monkeypatch.setattr(collect.CollectConfig, "draws", few_draws)
    root = ["--mode", "emoji-mini", "--root", str(collected.root)]
    assert query.main(["build", *root]) == 0
    output = tmp_path / "latency.json"
    for names in (["plain", "finite-step@1"], ["plain", "exact"]):
        assert latency.main([*names, *root, "--queries", "1", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["finite-step@1", "plain", "exact"]
    assert all(row["seconds"] > 0 for row in rows)
    (store,) = (collected.data / "cache/teacher").glob("store_*")
    assert rows[1]["storage"] == sum(path.stat().st_size for path in store.glob("*.npy"))
    report = json.loads(output.read_text())
    output.write_text(json.dumps(report | {"images": IMAGES + 1}))
    assert latency.main(["exact", *root, "--queries", "1", "--output", str(output)]) == 0
    assert [row["method"] for row in json.loads(output.read_text())["rows"]] == ["exact"]


@pytest.mark.parametrize("size", ["", "x", "0", "-1", "inf", "nan"])
def test_steps_that_are_no_sizes_are_refused(size):
    with pytest.raises(ValueError, match="expected a positive number after @"):
        methods.step_of(f"finite-step@{size}")


def test_settings_are_part_of_a_methods_name(capsys):
    def name(method, **settings):
        usual = {"name": None, "ftype": "pixel", "models": 1, "select": False, "ridge": None, "influence": None}
        return methods.score_name(method, argparse.Namespace(**usual | settings))

    assert name("trak") == "trak"
    assert name("trak", models=4, ridge=0.05) == "trak-4models-ridge0.05"
    assert name("trak", models=4, select=True) == "trak-4models-selected"
    assert name("abu-plus", models=4, ridge=0.05, select=True) == "abu-plus-4models"
    assert name("tuned") == "tuned-pixel"
    assert name("tuned", influence="plain") == "tuned-pixel-influence"
    assert name("tuned", name="best") == "best"
    assert methods.main(["trak", "das", "--name", "one"]) == 2
    assert methods.main(["trak", "--select", "--ridge", "1"]) == 2
    assert "--select: expected no --ridge beside it" in capsys.readouterr().err


def test_a_teacher_on_nearest_images_orders_them_before_all_others():
    scores = np.array([[5.0, 1.0, 4.0, 2.0, 3.0]])
    cosines = np.array([[0.1, 0.9, 0.2, 0.8, 0.7]])
    assert methods.among_nearest(scores, cosines, 3).tolist() == [[1.0, 1.0, 1.0, 2.0, 3.0]]


def test_each_concept_has_one_query_and_every_set_appears():
    concepts = ["a", "a", "a", "b", "b", "b", "c", "c", "c", "d", "d"]
    sets = ["x", "y", "z", "u", "v", "w", "x", "y", "z", "u", "v"]
    assert removal.one_per_concept(concepts, sets) == [0, 3, 7, 10]
    names = [f"set {i}" for i in range(9)]
    chosen = removal.one_per_concept([f"{i // 3}" for i in range(60)], [names[i % 9] for i in range(60)])
    assert [row // 3 for row in chosen] == list(range(20))
    assert {names[row % 9] for row in chosen} == set(names)


def test_more_images_than_there_are_cannot_be_removed(retrained, scores, capsys):
    assert removal.main(["run", str(scores[0]), "--levels", str(IMAGES), "--queries", "1"]) == 2
    assert f"expected to remove 1 to {IMAGES - 1} of {IMAGES} images" in capsys.readouterr().err
    for flag, value in (("--seeds", "0"), ("--queries", "0"), ("--null", "-1"), ("--references", "-1")):
        assert removal.main(["run", str(scores[0]), flag, value]) == 2
        assert "expected at least 1; --references, --null: at least 0; found " in capsys.readouterr().err
    assert removal.main(["run", str(scores[0]), "--queries", "5"]) == 2
    assert "--queries: expected 1 to 4, the concepts of the test queries, found 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: np.where(np.arange(IMAGES) == 3, np.nan, a), "expected finite numbers"),
        (lambda a: a.T, r"expected shape \[4, 30\], found \[30, 4\]"),
        (lambda a: np.ones_like(a), "expected scores that differ, found the same for all images in row 0"),
        (lambda a: a.astype("U3"), "expected numbers"),
    ],
)
def test_scores_that_are_none_are_refused(small, tmp_path, change, message):
    save_npy(tmp_path / "s.npy", change(np.random.default_rng(0).normal(size=(4, IMAGES))))
    with pytest.raises(ValueError, match=message):
        load_scores(tmp_path / "s.npy", small, "test")


def test_ids_put_scores_in_order_and_wrong_ids_are_refused(small, tmp_path):
    values, random = np.random.default_rng(0).normal(size=(4, IMAGES)), np.random.default_rng(1)
    path, columns, rows = tmp_path / "s.npz", random.permutation(IMAGES), random.permutation(4)
    save_npz(path, scores=values[rows][:, columns], train_ids=columns, query_ids=rows)
    np.testing.assert_array_equal(load_scores(path, small, "test"), values)
    save_npz(path, influence=values[rows][:, columns], ids=columns, queries=rows)
    np.testing.assert_array_equal(load_scores(path, small, "test"), values)
    hashes = {names[0]: score_inputs(small, "test")[name] for name, names in ABU_INPUTS.items()}
    write_manifest(path, {}, command="python -m abu.score", inputs=hashes)
    np.testing.assert_array_equal(load_scores(path, small, "test"), values)
    for name, (called, *_) in ABU_INPUTS.items():
        write_manifest(path, {}, command="python -m abu.score", inputs=hashes | {called: "0" * 64})
        with pytest.raises(ValueError, match=f"found another {name}: SHA-256 000000000000…, not "):
            load_scores(path, small, "test")
    manifest_path(path).unlink()
    save_npz(path, influence=values[:, :9], ids=np.argsort(-values)[:, :9], queries=rows)
    with pytest.raises(ValueError, match=r"expected shape \[4, 30\], found \[4, 9\]"):
        load_scores(path, small, "test")
    save_npz(path, values=values)
    with pytest.raises(ValueError, match="expected an array called scores or influence, found neither"):
        load_scores(path, small, "test")
    save_npz(path, scores=values, train_ids=columns + 1)
    with pytest.raises(ValueError, match="expected train_ids 0 to 29, each once, found 30"):
        load_scores(path, small, "test")
    save_npz(path, scores=values, query_ids=np.zeros(4, int))
    with pytest.raises(ValueError, match="expected query_ids 0 to 3, each once, found 1 different ones"):
        load_scores(path, small, "test")


@pytest.mark.parametrize("what", ["model", "training", "queries"])
def test_scores_of_another_model_or_dataset_are_refused(small, tmp_path, what):
    path = tmp_path / "s.npy"
    save_npy(path, np.random.default_rng(0).normal(size=(4, IMAGES)))
    write_manifest(path, {}, command="", inputs=score_inputs(small, "test") | {what: "0" * 64})
    with pytest.raises(ValueError, match=f"found another {what}: SHA-256 000000000000"):
        load_scores(path, small, "test")


def test_models_trained_together_are_those_trained_alone(small):
    worker = Retrainer(small, RetrainConfig())
    jobs = [Retraining((3, 5, 8), seed=7), Retraining((), seed=1), Retraining((0,), seed=7)]
    together = dict(Together(worker, 2).train(jobs))
    for job, found in together.items():
        alone = worker.compute(job)
        assert not isinstance(found, str)
        assert found.keys() == alone.keys()
        assert np.array_equal(found["removed"], alone["removed"])
        for name in ("losses_val", "losses_test", "latents_test"):
            np.testing.assert_allclose(found[name], alone[name], rtol=2e-3, atol=2e-3, err_msg=name)
        weights = [name for name in alone if name.startswith(retrainer.WEIGHT)]
        assert bool(weights) == (job.removed == ())
        for name in weights:
            # Adam moves a weight by its whole rate on a gradient that is nothing but rounding
            difference = np.linalg.norm((found[name] - alone[name]).astype(float))
            assert difference <= 1e-2 * np.linalg.norm(alone[name].astype(float)) + 1e-3, name
    assert list(together) == jobs
    assert worker.compute(jobs[0])["losses_test"][0] != worker.compute(jobs[2])["losses_test"][0]


def test_together_stores_what_is_missing_and_excludes_workers(small, capsys):
    assert retrain.main(["again", "--models", "3", "--together", "2"]) == 0
    assert "again: 3 of 3 models" in capsys.readouterr().out
    assert retrain.main(["again", "--models", "3", "--together", "2", "--workers", "1"]) == 2
    assert "--together: expected at least 1, and no --workers" in capsys.readouterr().err


def test_workers_train_the_models_that_one_process_trains(retrained, tmp_path):
    alone = replace(retrained, root=tmp_path)
    shutil.copytree(retrained.data, alone.data, ignore=shutil.ignore_patterns("cache", "scores"))
    shutil.copytree(retrained.source, alone.source)
    assert retrain.main(["halves", "--models", "2", "--root", str(tmp_path), "--workers", "2"]) == 0
    for job in retrain.random_halves(IMAGES, 2):
        keys = ("removed", "losses_val", "losses_test", "latents_test")
        here, there = (load_npz(CachedLosses(bed).collection.path(job), keys) for bed in (retrained, alone))
        assert all(np.array_equal(here[key], there[key]) for key in keys)


def test_a_model_that_does_not_train_is_listed_and_the_others_of_its_round_are_kept(small, tmp_path):
    worker = Retrainer(small, RetrainConfig())
    assert isinstance(worker.pictures, LoadedPictures)
    latents = worker.pictures.latents.clone()
    latents[:15] = float("nan")
    worker.pictures = replace(worker.pictures, latents=latents)
    collection, jobs = Collection(tmp_path), [Retraining((), seed=1), Retraining(tuple(range(15)), seed=1)]
    with pytest.raises(ValueError, match="expected 2 models to train, 1 did not"):
        run_together(worker, collection, jobs, 2)
    assert collection.missing(jobs) == jobs[:1]
    assert "the loss of step 0 became nan" in collection.failures()[jobs[0].name]


def test_models_of_one_seed_differ_by_what_they_saw_and_not_by_order_or_noise():
    kept, generator = torch.tensor([0, 1, 3]), torch.Generator()
    rows = torch.tensor([2, 0, 1, 2, 3, 3])
    found = refilled(rows, kept, 4, generator.manual_seed(0))
    assert torch.equal(found[rows != 2], rows[rows != 2])
    assert torch.isin(found, kept).all()
    assert torch.equal(refilled(rows, torch.arange(4), 4, generator), rows)
    many = refilled(torch.full((3000,), 2), kept, 4, generator)
    assert np.bincount(many, minlength=4)[[0, 1, 3]].min() > 900
