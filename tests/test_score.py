"""Scoring by command: expansions against the exact loss change, captions and views, pieces, and what is refused."""

from __future__ import annotations

import re
import shutil
import tempfile

import numpy as np
import pytest
import torch
from tiny_pipelines import CPU, POOLED, TOKENS, WIDTH, save_tiny

from abu import fisher, score, score_estimate
from abu.conditioning import pack_text
from abu.draws import DrawConfig
from abu.encoded import EncodedPictures
from abu.grouped import WeightGradients, first_order_scores, moved, unlearning_steps
from abu.influence import mean_losses
from abu.kronfluence_files import load_curvature
from abu.layers import select_layers
from abu.loss_draws import LossDraws
from abu.pipelines import load_pipeline
from abu.score_config import ScoreConfig
from fastgda.core import load_npz, save_npz, verify_artifact

PICTURES, QUERIES = 7, 2
SMALL = ["--timesteps", "2", "--query_draws", "4", "--captions", "2"]


def write_encoded(folder, kind, pictures, views, captions, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(pictures, captions, TOKENS, WIDTH, generator=generator)
    pooled = torch.randn(pictures, captions, POOLED, generator=generator) if kind == "flow" else None
    folder.mkdir()
    np.save(folder / "text_embeddings.npy", pack_text(tokens, pooled).numpy())
    np.save(folder / "latents.npy", torch.randn(views * pictures, 2, 4, 4, generator=generator).numpy())


@pytest.fixture(scope="module", params=["v_prediction", "flow"])
def world(request, tmp_path_factory):
    """A source, its encoded pictures and queries, and its factors."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "model", request.param)
    write_encoded(folder / "trainset", request.param, PICTURES, 2, 3, 0)
    write_encoded(folder / "queries", request.param, QUERIES, 1, 1, 1)
    flags = ["--source", str(folder / "model"), "--trainset", str(folder / "trainset")]
    assert fisher.main(["fit", *flags, "--draws", "2", "--output", str(folder / "factors")]) == 0
    return folder


def run(world, *more):
    """The command, its pieces in a new folder unless `more` names one."""
    flags = [f"--{name}={world / name}" for name in ("trainset", "queries")]
    flags += [f"--source={world / 'model'}", f"--curvature={world / 'factors'}", f"--output={world / 'scores.npz'}"]
    flags += [f"--folder={tempfile.mkdtemp(dir=world)}"]
    return score.main([*flags, *SMALL, *more])


def scores(world, *more):
    assert run(world, *more) == 0
    verify_artifact(world / "scores.npz")
    return load_npz(world / "scores.npz", ("influence", "ids", "queries"))


def close(found, expected):
    """Equal up to float32's rounding."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def steps_of(world, query, images=118_287, step=0.01):
    """(source, Δθ) of a query, draw by draw."""
    source = load_pipeline(world / "model", CPU)
    curvature = load_curvature(world / "factors").for_layers(select_layers(source.denoiser))
    examples = EncodedPictures.open(world / "queries", "query").examples([query], CPU)
    gradients = WeightGradients(source.denoiser, source.schedule)(examples, DrawConfig(2, 2))
    return source, unlearning_steps(curvature, gradients, step, images)


def test_both_orders_have_the_small_step_limit_of_the_exact_change(world, capsys):
    step = ["--images", "7", "--step", "1e-5"]
    changes = ("exact", "first-order", "second-order")
    exact, *orders = (scores(world, *step, "--change", name)["influence"] for name in changes)
    assert "query 1:" in capsys.readouterr().out
    for order in orders:
        assert order.shape == (QUERIES, PICTURES)
        assert min(np.corrcoef(row, other)[0, 1] for row, other in zip(order, exact, strict=True)) > 0.999
    assert not np.array_equal(*orders)


def test_captions_are_averaged_and_the_larger_view_counts(world):
    found = scores(world, "--query", "1", "--start", "2", "--stop", "6", "--change", "first-order")
    assert found["ids"].tolist() == [2, 3, 4, 5] and found["queries"].tolist() == [1]
    source, steps = steps_of(world, 1)
    training, engine = EncodedPictures.open(world / "trainset"), WeightGradients(source.denoiser, source.schedule)
    draws = DrawConfig(2, 1)
    views = []
    for view in range(2):
        parts = [training.examples(range(2, 6), CPU, view=view, caption=caption) for caption in range(2)]
        views.append(torch.stack([first_order_scores(engine, part, steps, draws) for part in parts]).mean(0))
    expected = torch.stack(views).amax(0)
    np.testing.assert_allclose(found["influence"], expected.numpy(), rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert not torch.equal(views[0], expected) and not torch.equal(views[1], expected)


def test_settings_of_the_paper_are_the_defaults():
    coco, diffusion = (ScoreConfig(settings=name).resolved() for name in ("coco", "stable-diffusion"))
    assert (coco.images, coco.step, coco.timesteps, coco.captions, coco.query_draws) == (118_287, 0.01, 20, 5, 50_000)
    assert (diffusion.images, diffusion.step, diffusion.timesteps) == (400_000_000, 0.002, 10)
    assert ScoreConfig(settings="stable-diffusion", timesteps=5).resolved().timesteps == 5


def test_what_does_not_fit_is_refused(world, capsys):
    assert run(world, "--stop", "8") == 2
    assert "--start, --stop: expected a range within 0..7, found 0..8" in capsys.readouterr().err
    assert run(world, "--query", "2") == 2
    assert "expected ids 0..1, found 2" in capsys.readouterr().err
    assert run(world, "--step", "0") == 2
    assert "--step: expected a positive number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score.main(["--help"])
    assert "python -m abu.score --source data/coco/model.bin" in capsys.readouterr().out


def test_factors_of_another_source_are_refused(world, tmp_path, capsys):
    save_tiny(tmp_path / "other", "pixart")
    assert run(world, f"--source={tmp_path / 'other'}") == 2
    assert "curvature: expected factors of" in capsys.readouterr().err


def test_exact_scores_are_the_loss_changes_of_a_moved_copy_at_the_papers_timesteps(world):
    larger = ["--images", "7", "--step", "0.01", "--change", "exact"]
    found = scores(world, *larger, "--protocol", "grid")["influence"]
    training, draws = EncodedPictures.open(world / "trainset"), LossDraws("grid", 2, captions=2, flips=True)
    for query in range(QUERIES):
        source, steps = steps_of(world, query, 7)
        models = [source.denoiser, moved(source.denoiser, {name: matrix[0] for name, matrix in steps.items()})]
        changes = np.zeros((2, PICTURES))
        for picture in range(PICTURES):
            for caption in range(2):
                timesteps, noise = draws.of(picture, caption, (2, 4, 4), len(source.schedule))
                assert timesteps.tolist() == [250, 750] * 2
                for place, (t, e) in enumerate(zip(timesteps[:, None], noise[:, None], strict=True)):
                    pair = training.examples([picture], CPU, view=place // 2, caption=caption)
                    noisy, target = source.schedule.noised(pair.latents, e, t)
                    before, after = ((m(noisy, t, pair.text).sample - target).square().mean() for m in models)
                    changes[place // 2, picture] += float(after - before) / 4
        np.testing.assert_allclose(found[query], changes.max(0), rtol=1e-3, atol=1e-3 * np.abs(changes).max())
    assert not np.allclose(found, scores(world, *larger)["influence"], rtol=1e-2)


def test_exact_scores_at_stratified_timesteps_are_those_of_mean_losses(world):
    flags = ["--images", "7", "--step", "0.01", "--change", "exact", "--views", "1", "--captions", "1", "--query", "1"]
    source, steps = steps_of(world, 1, 7)
    models = [source.denoiser, moved(source.denoiser, {name: matrix[0] for name, matrix in steps.items()})]
    examples = EncodedPictures.open(world / "trainset").examples(range(PICTURES), CPU)
    before, after = mean_losses(models, source.schedule, examples, DrawConfig(2, 1), progress=False)
    expected = (after - before).numpy()
    found = scores(world, *flags)["influence"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("change", ["exact", "second-order"])
def test_other_tiles_and_shards_give_the_same_numbers(world, change):
    flags = ["--images", "7", "--change", change]
    whole = scores(world, *flags)["influence"]
    parts = scores(world, *flags, "--tile", "1", "--shard", "3")["influence"]
    if change == "exact":
        assert np.array_equal(parts, whole)
    close(parts, whole)


def test_a_lost_piece_is_made_again_and_others_are_kept(world, tmp_path, capsys):
    flags = [f"--folder={tmp_path / 'pieces'}", "--tile", "1", "--shard", "3"]
    first = scores(world, *flags)["influence"]
    pieces = sorted((tmp_path / "pieces").glob("*.npz"))
    assert [len(list((tmp_path / "pieces").glob(f"{stage}_*"))) for stage in ("steps", "scores")] == [2, 6]
    made = {piece: piece.stat().st_mtime_ns for piece in pieces}
    lost = tmp_path / "pieces/scores_00001_00000003.npz"
    lost.unlink()
    capsys.readouterr()
    assert run(world, *flags, "--status") == 0
    done, scored = capsys.readouterr().out.splitlines()
    assert done == "steps: 2 of 2 pieces" and scored.startswith("scores: 5 of 6 pieces, ")
    assert np.array_equal(scores(world, *flags)["influence"], first)
    assert [piece for piece in pieces if piece.stat().st_mtime_ns != made[piece]] == [lost]


def test_pieces_of_other_settings_or_inputs_are_refused(world, tmp_path, capsys):
    folder = f"--folder={tmp_path / 'pieces'}"
    scores(world, folder)
    for flags, name in ((["--step", "0.5"], "step"), (["--query", "1"], "query"), (["--shard", "2"], "shard")):
        assert run(world, folder, *flags) == 2
        assert f"config.{name} is" in capsys.readouterr().err
    shutil.copytree(world / "queries", tmp_path / "queries")
    latents = np.load(tmp_path / "queries/latents.npy")
    np.save(tmp_path / "queries/latents.npy", latents + 1)
    for more in ([], ["--dry_run"]):
        assert run(world, folder, f"--queries={tmp_path / 'queries'}", *more) == 2
        assert "inputs.queries/latents.npy is" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["exact", "first-order"])
def test_candidates_get_the_numbers_of_the_full_run(world, tmp_path, change):
    lists = np.array([[5, 0, 3], [6, 5, 1]])
    save_npz(tmp_path / "lists.npz", rank=np.column_stack([lists, [1, 0]]))
    flags = ["--images", "7", "--change", change]
    whole = scores(world, *flags)["influence"]
    found = scores(world, *flags, f"--candidates={tmp_path / 'lists.npz'}", "--k", "3", "--shard", "2")
    assert np.array_equal(found["ids"], lists)
    close(found["influence"], np.take_along_axis(whole, lists, 1))
    one = scores(world, *flags, f"--candidates={tmp_path / 'lists.npz'}", "--k", "3", "--query", "1")
    assert np.array_equal(one["ids"], lists[1:]) and one["queries"].tolist() == [1]
    close(one["influence"], found["influence"][1:])


def test_a_random_share_of_a_range_is_scored_for_all_queries(world):
    whole = scores(world)["influence"]
    found = scores(world, "--subset", "0.6", "--start", "1")
    assert 1 <= len(found["ids"]) <= 4 and found["ids"].min() >= 1
    close(found["influence"], whole[:, found["ids"]])


def test_ray_workers_give_the_same_numbers(world, tmp_path):
    if world.name.startswith("flow"):
        pytest.skip("the same path")
    flags = ["--tile", "1", "--shard", "4"]
    alone = scores(world, *flags)["influence"]
    folder = f"--folder={tmp_path / 'pieces'}"
    close(scores(world, *flags, folder, "--workers", "2", "--threads", "1")["influence"], alone)


def test_a_dry_run_writes_nothing_and_the_status_counts_pieces(world, tmp_path, capsys, files_in):
    (tmp_path / "out").mkdir()
    flags = [f"--folder={tmp_path / 'out/pieces'}", f"--output={tmp_path / 'out/scores.npz'}", "--shard", "4"]
    for change in ("exact", "second-order"):
        assert run(world, *flags, "--change", change, "--dry_run") == 0
        assert re.search(r"^4 pieces, [\d.]+ min, [\d.]+ GiB of memory, \d+ MiB on disk", capsys.readouterr().out)
    assert run(world, *flags, "--status") == 0
    assert capsys.readouterr().out.splitlines() == ["steps: 0 of 2 pieces", "scores: 0 of 2 pieces"]
    assert files_in(tmp_path / "out") == []


def test_too_little_memory_or_disk_is_refused_before_work(world, tmp_path, capsys, monkeypatch):
    flags = [f"--folder={tmp_path / 'pieces'}"]
    for size, message in ((2**60, "GiB free for the pieces, found"), (2**36, "--tile 64 --shard 256, 1 workers: exp")):
        with monkeypatch.context() as patch:
            patch.setattr(score_estimate, "change_bytes", lambda model, size=size: size)
            if size < 2**60:
                patch.setattr(score_estimate, "require_disk", lambda *args: None)
            assert run(world, *flags) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "pieces").exists()


def test_captions_and_views_that_are_not_there_are_refused(world, tmp_path, capsys):
    assert run(world, "--captions", "5") == 2
    assert f"--captions: expected at most 3, as many as {world / 'trainset'} has, found 5" in capsys.readouterr().err
    assert run(world, "--views", "3") == 2
    assert "--views: expected at most 2" in capsys.readouterr().err
    assert run(world, "--protocol", "grid") == 2
    assert "--protocol grid: expected --change exact" in capsys.readouterr().err
    settings = ScoreConfig().resolved_for(EncodedPictures.open(world / "trainset"), world)
    assert (settings.captions, settings.views) == (3, 2)


@pytest.mark.parametrize("folder", ["trainset", "queries"])
def test_pictures_of_another_source_are_refused(world, tmp_path, capsys, folder):
    text, latents = (np.load(world / folder / f"{name}.npy") for name in ("text_embeddings", "latents"))
    for name, arrays, message in (
        ("width", (text[..., :-1], latents), "text_embeddings.npy: expected token states of 6 numbers, "),
        ("channels", (text, latents[:, :1]), "latents.npy: expected latents [2, 4, 4], "),
        ("side", (text, np.tile(latents, 2)), "latents.npy: expected latents [2, 4, 4], "),
    ):
        place = tmp_path / name
        place.mkdir()
        for file, array in zip(("text_embeddings", "latents"), arrays, strict=True):
            np.save(place / f"{file}.npy", array)
        assert run(world, f"--{folder}={place}", f"--folder={tmp_path / 'pieces'}") == 2
        assert f"{place}/{message}" in capsys.readouterr().err
    assert not (tmp_path / "pieces").exists()
