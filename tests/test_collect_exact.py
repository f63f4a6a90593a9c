"""Collection of exact influence end to end on a tiny model: candidates, pieces, refusals, merging."""

from __future__ import annotations

import io
import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_collect import IMAGES, QUERIES, run, write_testbed

from abu import collect_exact, exact_estimate, room
from abu.candidates import CandidateConfig, candidate_lists
from abu.cluster import run_plan
from abu.exact_collection import ExactCollector, ExactConfig, ExactPlan, PlanConfig, exact_plan
from abu.influence import ExactInfluence, exact_influence
from abu.loss_draws import LossDraws
from abu.plan import Collection
from abu.sweep import SweepConfig
from abu.testbed import TESTBEDS
from abu.unlearn import UnlearnConfig
from benchmark import exact_rankings
from fastgda import neighbours
from fastgda.core import load_npz, save_npy, save_npz
from fastgda.rankings import load_rankings

CPU = torch.device("cpu")
FLAGS = ("--query_draws", "1", "--timesteps", "2", "--rows", "16", "--split", "test", "--tile", "3", "--shard", "5")
PLAN = PlanConfig(tile=3, shard=5)
DRAWS, UNLEARN = LossDraws(timesteps=2), UnlearnConfig(query_draws=1)
K = 8


def collect(root, stage, *flags):
    return collect_exact.main([stage, "--root", str(root), *FLAGS, *flags])


def with_lists(root, *flags):
    return ("--candidates", str(root / "lists.npz"), *flags)


@pytest.fixture(scope="module")
def lists():
    random = np.random.default_rng(3)
    return np.stack([random.choice(30, K, replace=False) for _ in range(4)])


@pytest.fixture(scope="module")
def root(tmp_path_factory, lists):
    folder = tmp_path_factory.mktemp("exact")
    write_testbed(folder)
    run("curvature", folder)
    save_npz(folder / "lists.npz", rank=lists)
    assert collect(folder, "all", *with_lists(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def expected(root, lists):
    """[4, K]: each query by itself, on its candidates only."""
    testbed = replace(TESTBEDS["emoji"], root=root)
    exact = ExactInfluence.of(testbed, UNLEARN, DRAWS, SweepConfig(rows=16), CPU)
    queries = testbed.query_examples("test", CPU)
    return np.stack(
        [
            exact_influence(exact.sweep, row.tolist(), [exact.unlearned(queries.rows(i, i + 1))])[0]
            for i, row in enumerate(lists)
        ]
    )


def test_pieces_hold_what_each_query_gets_by_itself(root, lists, expected):
    folder = root / "data/emoji/cache/exact_test"
    found = {}
    for path in folder.glob("influence_*.npz"):
        arrays = load_npz(path, ("query", "image", "change"))
        for query, image, change in zip(arrays["query"], arrays["image"], arrays["change"], strict=True):
            assert (query, image) not in found
            found[query, image] = change[0]
    wanted = {(q, image): value for q in range(4) for image, value in zip(lists[q], expected[q], strict=True)}
    assert found.keys() == wanted.keys()
    assert all(found[key] == np.float32(value) for key, value in wanted.items())
    # an image that several queries need is evaluated at θ0 once
    before = [load_npz(path, ("losses",))["losses"] for path in folder.glob("before_*.npz")]
    assert sum(map(len, before)) == len(np.unique(lists))


def test_merged_files_have_the_released_form(root, lists, expected, tmp_path):
    assert exact_rankings.main(["--root", str(root), "--candidates", str(root / "lists.npz")]) == 0
    out, order = root / "data/emoji/exact", np.argsort(-expected, axis=1, kind="stable")
    wanted = np.take_along_axis(lists, order, 1)
    assert np.array_equal(load_rankings(out / "influence_test.npz", IMAGES).rank, wanted)
    assert np.array_equal(load_rankings(out / "influence_test.pkl", IMAGES).rank, wanted)
    inner = pickle.loads((out / "influence_test.pkl").read_bytes())["random"]
    assert inner.keys() == {"rank", "influence_subset", "rank_influence_subset"}
    np.testing.assert_array_equal(inner["influence_subset"], expected.astype(np.float32))
    np.testing.assert_array_equal(inner["rank_influence_subset"], order)


def test_the_full_set_gives_candidates_the_same_numbers(root, lists, expected, tmp_path):
    """With other tiles and shards, one unlearned step reused, on a training set cut to 30 images."""
    testbed = replace(TESTBEDS["emoji"], root=tmp_path)
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "data/emoji/cache")
    for name in ("latents", "text_embeddings"):
        array = np.load(root / f"data/emoji/trainset/{name}.npy")
        save_npy(tmp_path / f"data/emoji/trainset/{name}.npy", array[:30])
    flags = ("--images", str(IMAGES), "--tile", "4", "--shard", "30")
    assert collect(tmp_path, "all", *flags) == 0
    assert exact_rankings.main(["--root", str(tmp_path)]) == 0
    inner = pickle.loads((testbed.data / "exact/influence_test.pkl").read_bytes())["random"]
    assert inner["rank"].shape == inner["influence"].shape == (4, 30)
    found = np.take_along_axis(inner["influence"], lists, 1)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_a_lost_piece_is_made_again_to_the_same_bits_and_others_are_kept(root):
    folder = root / "data/emoji/cache/exact_test"
    paths = sorted(folder.glob("*.npz"))
    before = {path: path.read_bytes() for path in paths}
    stamps = {path: path.stat().st_mtime_ns for path in paths}
    lost = {next(p for p in paths if p.name.startswith(stage)) for stage in ("unlearned", "before", "influence")}
    for path in lost:
        path.unlink()
    assert collect(root, "all", *with_lists(root)) == 0
    for path in paths:
        arrays = np.load(path)
        old = np.load(io.BytesIO(before[path]))
        assert all(np.array_equal(arrays[key], old[key]) for key in old.files)
        assert (path.stat().st_mtime_ns == stamps[path]) == (path not in lost)


def test_order_of_the_pieces_does_not_matter(root, tmp_path, lists):
    """Pieces computed backwards by a fresh worker are the same bits."""
    testbed = replace(TESTBEDS["emoji"], root=root)
    config = ExactConfig(
        unlearning=UNLEARN,
        draws=DRAWS,
        candidates=CandidateConfig(root / "lists.npz"),
        sweep=SweepConfig(rows=16),
        plan=PLAN,
    )
    made, kept = Collection(tmp_path), Collection(root / "data/emoji/cache/exact_test")
    worker = ExactCollector(testbed, config, tmp_path)
    for pieces in worker.plan.stages().values():
        run_plan(lambda: worker, made, pieces[::-1])
        for piece in pieces:
            old, new = np.load(kept.path(piece)), np.load(made.path(piece))
            assert all(np.array_equal(old[key], new[key]) for key in old.files)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--step", "0.02"), "config.step is 0.1, wanted 0.02"),
        (("--bf16",), "config.bf16 is False, wanted True"),
        (("--k", "5"), "config.k is None, wanted 5"),
        (("--captions", "3"), "--captions: expected at most 1, found 3"),
        (("--flips",), "--flips: expected the latents of flipped images, found none"),
        (("--k", "9"), "expected at least 9 candidates of each query, found 8"),
        (("--subset", "2"), "--subset: expected a share in (0, 1], found 2.0"),
        (("--steps", "0"), "--steps: expected a positive number, found 0"),
    ],
)
def test_other_settings_and_impossible_ones_are_refused(root, capsys, flags, message):
    folder = root / "data/emoji/cache/exact_test"
    before = sorted(folder.iterdir())
    assert collect(root, "all", *with_lists(root, *flags)) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ([[0, 1], [2, 300], [4, 5], [6, 7]], r"expected training ids 0\.\.299, found 0 to 300"),
        ([[0, -1], [2, 3], [4, 5], [6, 7]], r"expected training ids 0\.\.299, found -1 to 7"),
        ([[0, 1], [2, 2], [4, 5], [6, 7]], "found one twice in row 1"),
        ([[0, 1]], "expected candidates of 4 queries, found 1"),
        ([[0.5, 1]] * 4, "expected rank .* of integers, found float64"),
    ],
)
def test_bad_candidates_name_the_file(tmp_path, rank, message):
    save_npz(tmp_path / "bad.npz", rank=np.array(rank))
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}"):
        candidate_lists(CandidateConfig(tmp_path / "bad.npz"), 4, IMAGES)


def test_factors_of_another_model_are_refused(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    other = TESTBEDS["emoji"]
    weights = replace(other, root=tmp_path).source / "denoiser.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert collect(tmp_path, "all", *with_lists(root)) == 2
    assert "ekfac.safetensors: expected factors of the model" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_collection_and_names_the_image(root, lists, tmp_path, capsys):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path, image = tmp_path / "data/emoji/trainset/text_embeddings.npy", int(lists[0, 0])
    text = np.load(path)
    text[image] = np.nan
    save_npy(path, text)
    assert collect(tmp_path, "before", *with_lists(root, "--folder", str(tmp_path / "new"))) == 2
    assert f"training image {image}, caption 0" in capsys.readouterr().err


def test_too_little_memory_or_disk_is_refused_before_work(root, tmp_path, capsys, monkeypatch):
    for name, message in (("change_bytes", "1 workers: expected "), ("disk_bytes", "GiB free for the pieces, found")):
        with monkeypatch.context() as patch:
            patch.setattr(exact_estimate, name, lambda *args: 2**60)
            assert collect(root, "all", *with_lists(root, "--folder", str(tmp_path / "new"))) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_influence_waits_for_what_it_reads(root, tmp_path, capsys):
    assert collect(root, "influence", *with_lists(root, "--folder", str(tmp_path / "new"))) == 2
    assert "expected 4 pieces of the stage unlearned, found 0" in capsys.readouterr().err


def test_a_dry_run_and_the_status(root, tmp_path, capsys):
    assert collect(root, "all", "--dry_run", "--folder", str(tmp_path / "new")) == 0
    assert re.search(r"184 pieces, [\d.]+ min, [\d.]+ GiB of memory, \d+ MiB on disk", capsys.readouterr().out)
    assert not (tmp_path / "new").exists()
    assert collect(root, "status", *with_lists(root)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "unlearned: 4 of 4 pieces"
    assert all(re.fullmatch(r"\w+: (\d+) of \1 pieces", line) for line in printed)


def test_the_status_counts_the_plan_of_the_folder(root, tmp_path, capsys):
    """Flags that are left out are those that the pieces were made with, as in the module's examples."""
    command = ["status", "--root", str(root), "--split", "test"]
    testbed = replace(TESTBEDS["emoji"], root=root)
    stages = exact_plan(testbed, ExactConfig(candidates=CandidateConfig(root / "lists.npz"), plan=PLAN)).stages()
    wanted = [f"{name}: {len(pieces)} of {len(pieces)} pieces" for name, pieces in stages.items()]
    assert len(stages["influence"]) > 2
    # its manifest stands outside the repository, and so holds no more than the name of the candidates
    named = root / "data/emoji/lists.npz"
    for flags in ([], ["--candidates", str(root / "lists.npz")]):
        if not flags:
            shutil.copy(root / "lists.npz", named)
        assert collect_exact.main([*command, *flags]) == 0
        assert capsys.readouterr().out.splitlines() == wanted
        named.unlink(missing_ok=True)
    assert collect_exact.main(command) == 2
    assert "expected the candidates of" in capsys.readouterr().err
    save_npz(tmp_path / "lists.npz", rank=np.arange(8).reshape(4, 2))
    assert collect_exact.main([*command, "--candidates", str(tmp_path / "lists.npz")]) == 2
    assert "was made for, found others" in capsys.readouterr().err


def test_workers_on_other_machines_are_not_weighed_against_this_one(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room.os, "sysconf", lambda name: 64)
    flags = with_lists(root, "--folder", str(tmp_path / "new"), "--workers", "3", "--dry_run")
    assert collect(root, "all", *flags) == 2
    assert "3 workers: expected " in capsys.readouterr().err
    assert collect(root, "all", *flags, "--address", "elsewhere:6379") == 0
    assert "GiB of memory" in capsys.readouterr().out


def test_a_dry_run_refuses_the_folder_of_other_settings(root, capsys):
    assert collect(root, "all", "--dry_run", *with_lists(root, "--step", "0.02")) == 2
    assert "config.step is 0.1, wanted 0.02" in capsys.readouterr().err


def test_ray_workers_leave_the_same_pieces(root, tmp_path):
    """Of the last stage, which reads those of the others; each stage would start workers of its own."""
    kept, made = root / "data/emoji/cache/exact_test", tmp_path / "new"
    shutil.copytree(kept, made, ignore=shutil.ignore_patterns("influence_*"))
    assert collect(root, "all", *with_lists(root, "--folder", str(made), "--workers", "2")) == 0
    names = sorted(path.name for path in kept.glob("*.npz"))
    assert sorted(path.name for path in made.glob("*.npz")) == names
    for name in names:
        old, new = np.load(kept / name), np.load(made / name)
        for key in old.files:
            np.testing.assert_allclose(new[key], old[key], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_step_that_rounding_swallows_is_reported(root, tmp_path, capsys):
    flags = with_lists(root, "--folder", str(tmp_path / "new"), "--step", "1e-12")
    assert collect(root, "unlearned", *flags) == 0
    assert "warning: 4 of 4 queries leave more than half of the weights as they are" in capsys.readouterr().err


def test_subsets_are_random_shares_that_do_not_depend_on_the_other_queries(tmp_path, lists):
    save_npz(tmp_path / "lists.npz", rank=lists)
    config = CandidateConfig(tmp_path / "lists.npz", subset=0.5)
    found = candidate_lists(config, 4, IMAGES)
    assert found.shape == (4, 4)
    assert all(set(part) < set(row) for part, row in zip(found, lists, strict=True))
    save_npz(tmp_path / "lists.npz", rank=lists[:2])
    assert np.array_equal(candidate_lists(config, 2, IMAGES), found[:2])
    every = candidate_lists(CandidateConfig(subset=0.1), 4, IMAGES)
    assert every.shape == (4, 30) and (every == every[0]).all()
    assert len(ExactPlan(PlanConfig(), every).needed) == 30


def test_neighbours_are_those_of_a_sort(root, capsys):
    random = np.random.default_rng(1)
    features = root / "data/emoji/feats/effnet"
    images, queries = random.normal(size=(IMAGES, 5)), random.normal(size=(QUERIES["test"], 5))
    save_npy(features / "data_feats.npy", images.astype(np.float32))
    save_npy(features / "test_query_feats.npy", queries.astype(np.float32))
    flags = ["--ftype", "effnet", "--split", "test", "--data_dir", str(root / "data/emoji")]
    assert neighbours.main([*flags, "--k", "12"]) == 0
    cosine = (queries @ images.T) / np.linalg.norm(images, axis=1)
    expected = np.argsort(-cosine, axis=1)[:, :12]
    path = root / "data/emoji/nn_effnet_test.npz"
    assert np.array_equal(load_rankings(path, IMAGES).rank, expected)
    assert np.array_equal(candidate_lists(CandidateConfig(path), 4, IMAGES), expected)
    assert neighbours.main([*flags, "--k", "301"]) == 2
    assert "--k: expected 1..300, the number of training images, found 301" in capsys.readouterr().err
