"""MSCOCO's model retrained and judged, on small files in the released layout, against plain loops; bad files."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from released_layout import LATENT_SIDE, TEXT_WIDTH, TOKENS, TRAINABLE, write_trainable

from abu.encoded import EncodedPictures
from abu.pipelines import PipelineEncoder
from abu.train_diffusion import diffusion_loss, refilled, step_draws
from abu.training import batch_rows
from benchmark import coco_scores, lds, leaderboard, removal, retrain, retrainer
from benchmark.coco import BATCH_SIZE, EPOCHS, Coco
from benchmark.losses import CachedLosses, collection_of
from benchmark.retrainer import SOURCE, RetrainConfig, Retrainer, Retraining
from fastgda.core import keyed_generator, load_npy, load_npz, write_manifest

IMAGES, QUERIES = TRAINABLE.images, TRAINABLE.test_queries
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """The release in small, with scores of all kinds; models are measured with few draws."""
    root = tmp_path_factory.mktemp("release")
    write_trainable(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetrainConfig.__init__, "__defaults__", (2, 1, 3, 1))
        assert coco_scores.main(["--root", str(root)]) == 0
        yield Coco(root)


@pytest.fixture
def copied(coco, tmp_path):
    """A copy whose files a test may damage."""
    shutil.copytree(coco.root, tmp_path / "copy", ignore=shutil.ignore_patterns("train2017", "cache"))
    return replace(coco, root=tmp_path / "copy")


def flags(coco, *more):
    return ["--mode", "coco", "--root", str(coco.root), *more]


def test_a_step_sees_what_a_plain_loop_over_pictures_draws(coco):
    pictures, loop, schedule = coco.training_pictures(), coco.diffusion_loop, coco.schedule
    kept, step = torch.arange(0, IMAGES, 2), 3
    rows = torch.from_numpy(batch_rows(step, IMAGES, loop))
    model = coco.initial_denoiser(5)
    loss = diffusion_loss(pictures, schedule, CPU, kept, coco.caption_dropout)(
        model, rows, keyed_generator("train", 5, step)
    )

    generator = keyed_generator("train", 5, step)
    draws = step_draws((len(rows), 4, LATENT_SIDE, LATENT_SIDE), 1000, generator, 0.0)
    seen = refilled(rows, kept, IMAGES, generator).tolist()
    views = torch.randint(2, (len(rows),), generator=generator).tolist()
    captions = torch.randint(5, (len(rows),), generator=generator).tolist()
    latents = np.load(coco.data / "trainset/latents.npy")
    text = np.load(coco.data / "trainset/text_embeddings.npy")
    total = 0.0
    for place, (image, view, caption) in enumerate(zip(seen, views, captions, strict=True)):
        picture = latents[image][..., ::-1] if view else latents[image]
        t = int(draws.timesteps[place])
        signal, deviation = schedule.levels[t].sqrt(), (1 - schedule.levels[t]).sqrt()
        noisy = signal * torch.from_numpy(picture.copy()) + deviation * draws.noise[place]
        states = torch.from_numpy(text[image, caption]).float()
        predicted = model(noisy[None], torch.tensor([t]), states[None]).sample[0]
        total += ((predicted - draws.noise[place]) ** 2).mean().item()
    assert loss.item() == pytest.approx(total / len(rows), rel=1e-5)
    assert draws.captioned.all() and len(set(views)) == 2 and len(set(captions)) > 1


def test_a_removed_image_is_drawn_in_no_view_and_models_of_a_seed_share_the_rest(coco):
    seen = []

    class Watched(EncodedPictures):
        def drawn(self, rows, generator):
            seen.append((rows, generator.get_state()))
            return super().drawn(rows, generator)

    pictures = coco.training_pictures()
    watched = Watched(pictures.role, pictures.latents, pictures.text)
    worker = Retrainer(coco, RetrainConfig())
    worker.pictures = watched
    whole = Retraining((), 3)
    worker.trained(whole)
    drawn = torch.cat([rows for rows, _ in seen]).unique()
    job, states = Retraining(tuple(drawn[::2].tolist()), 3), [state for _, state in seen]
    seen.clear()
    worker.trained(job)
    assert not torch.isin(torch.cat([rows for rows, _ in seen]), torch.tensor(job.removed)).any()
    # views and captions are drawn from the same state, whatever was removed
    assert all(torch.equal(state, before) for (_, state), before in zip(seen, states, strict=True))


def test_workers_train_the_models_that_one_process_trains(coco, copied):
    plan = retrain.random_halves(IMAGES, 2)
    assert retrain.main(["halves", *flags(coco), "--models", "2"]) == 0
    assert retrain.main(["halves", *flags(copied), "--models", "2", "--workers", "2"]) == 0
    config = RetrainConfig()
    for job in plan:
        here, there = (load_npz(collection_of(part, config).path(job), ("losses_test",)) for part in (coco, copied))
        assert np.array_equal(here["losses_test"], there["losses_test"])
    # nothing that is mapped travels to a worker
    assert len(pickle.dumps(coco)) < 1000


def test_halves_are_judged_by_lds(coco, tmp_path, capsys):
    scores = sorted((coco.data / "scores").glob("*.npy"))
    assert [path.stem for path in scores] == ["dino+clip_text", "influence", "random", "tuned-dino+clip_text"]
    assert retrain.main(["halves", *flags(coco), "--models", "4"]) == 0
    assert retrain.main(["again", *flags(coco), "--models", "4"]) == 0
    output = tmp_path / "lds.json"
    assert lds.main([*map(str, scores), *flags(coco), "--models", "4", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["mode"] == "coco" and report["ceiling"]["models"] == 4
    assert {len(row["per_query"]) for row in report["rows"]} == {QUERIES}
    assert CachedLosses(coco).concepts("test") == [str(query) for query in range(QUERIES)]
    capsys.readouterr()
    assert retrain.main(["status", *flags(coco), "--models", "4"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["halves", "again", "reference"]
    assert lds.main([str(scores[0]), *flags(coco), "--split", "val"]) == 2
    assert "--split: expected test for coco, found val" in capsys.readouterr().err
    assert retrain.main(["creators", *flags(coco)]) == 2
    assert "creators: expected one of halves, again, reference for coco" in capsys.readouterr().err


def test_removals_are_compared_with_the_released_model_with_and_without_pictures(coco, copied, tmp_path, capsys):
    scores, output = str(copied.data / "scores/influence.npy"), tmp_path / "removal.json"
    some = ["--queries", "2", "--levels", "5", "--null", "1", "--references", "0", "--output", str(output)]
    pictures = ["--pipeline", str(copied.root / "pipeline")]
    assert removal.main(["run", scores, *flags(copied), *some, "--dry_run"]) == 0
    assert "removals: 0 of 4 models" in capsys.readouterr().out
    assert removal.main(["run", scores, *flags(copied), *some]) == 0
    assert removal.main(["report", scores, *flags(copied), *some]) == 0
    plain = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert "mse" not in plain["influence"] and "excess" in plain["influence"]["delta_loss"]
    released = load_npz(collection_of(copied, RetrainConfig()).path(SOURCE), ("losses_test",))["losses_test"]
    draws, model = RetrainConfig().judged_draws, copied.load_denoiser(CPU)
    found = retrainer.mean_losses([model], copied.schedule, copied.query_examples("test", CPU), draws, progress=False)
    np.testing.assert_allclose(released, found[0], rtol=1e-6)
    job = Retraining(removal.removed_by(np.load(scores), 1, 5), 0)
    losses = load_npz(collection_of(copied, RetrainConfig()).path(job), ("losses_test",))["losses_test"]
    assert plain["influence"]["delta_loss"]["per_query"][1] == pytest.approx(losses[1] - released[1])

    assert removal.main(["report", scores, *flags(copied), *some, *pictures]) == 2
    assert "source.npz: expected the test queries sampled again, found none; delete it" in capsys.readouterr().err
    shutil.rmtree(copied.data / "cache")
    assert removal.main(["run", scores, *flags(copied), *some, *pictures]) == 0
    assert removal.main(["report", scores, *flags(copied), *some, *pictures]) == 0
    both = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert both["influence"]["delta_loss"] == plain["influence"]["delta_loss"]
    assert both["influence"]["mse"]["mean"] > 0 and both["influence"]["similarity"]["mean"] < 1
    board = ["--board", str(tmp_path / "board"), "--models", "2"]
    assert retrain.main(["halves", *flags(copied), "--models", "2"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaderboard, "default_levels", lambda mode, images: (5,))
        assert leaderboard.main([scores, *flags(copied), *some[:8], *board]) == 0
    row = json.loads((tmp_path / "board/influence.json").read_text())
    # the influence is the teacher's own
    assert row["retrieval"]["mAP"] == {"5": pytest.approx(1)}
    assert row["removals"][0]["shared"] == 1 and row["removals"][0]["delta_loss"]["per_query"]


def test_levels_are_the_papers_by_default(coco, capsys):
    influence = str(coco.data / "scores/influence.npy")
    assert removal.main(["run", influence, *flags(coco), "--queries", "2", "--dry_run"]) == 2
    wanted = f"expected to remove 1 to {IMAGES - 1} of {IMAGES} images, found (500, 1000, 4000)"
    assert wanted in capsys.readouterr().err


def test_queries_are_sampled_towards_the_empty_caption_and_decoded(coco):
    sampler = replace(coco, pipeline=str(coco.root / "pipeline")).sampler(CPU)
    encoder, model = PipelineEncoder(coco.root / "pipeline", CPU), coco.load_denoiser(CPU)
    text = coco.query_examples("test", CPU).text[:2]
    empty, schedule = encoder.text([""], 8 * LATENT_SIDE), sampler.schedule
    assert empty.shape == (1, TOKENS, TEXT_WIDTH)
    found = sampler.latents(model, text, [4, 9], 3)
    noise = torch.randn(4, LATENT_SIDE, LATENT_SIDE, generator=keyed_generator("query", 9))
    schedule.set_timesteps(3)
    with torch.inference_mode():
        for t in schedule.timesteps:
            conditional, unguided = (model(noise[None], t, states).sample[0] for states in (text[1:], empty))
            noise = schedule.step(unguided + 7.5 * (conditional - unguided), t, noise).prev_sample
    torch.testing.assert_close(found[1], noise, rtol=1e-4, atol=1e-4)
    vae = encoder.pipeline.vae
    with torch.inference_mode():
        expected = vae.decode(noise[None] / vae.config["scaling_factor"]).sample.clamp(-1, 1)
    torch.testing.assert_close(sampler.decode(found[1:]), expected, rtol=1e-3, atol=1e-3)


def test_the_published_recipe_where_no_file_says_otherwise(copied):
    (copied.data / "model.json").unlink()
    pictures = EncodedPictures("train", np.zeros((2 * 118_287, 1)), np.zeros((118_287, 1, 1, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coco, "training_pictures", lambda self: pictures)
        loop = copied.diffusion_loop
        assert loop.bf16 and not loop.compile
        assert replace(copied, bf16=False, compile=True).diffusion_loop == replace(loop, bf16=False, compile=True)
        assert replace(copied, compile=True).recipe == copied.recipe != replace(copied, bf16=False).recipe
    assert (loop.steps, loop.batch_size, loop.learning_rate) == (round(118_287 * EPOCHS / BATCH_SIZE), 128, 1e-4)
    assert copied.model.latent_shape == (4, 16, 16) and copied.model.text_width == 1024


def test_influence_of_the_release_is_in_the_order_of_its_ranks(coco):
    with open(coco.data / "influence_test.pkl", "rb") as handle:
        released = pickle.load(handle)["random"]
    found = coco.influence("test")
    np.testing.assert_allclose(found, released["influence"], rtol=1e-6)
    assert np.array_equal(np.argsort(-found, axis=1, kind="stable")[:, :50], released["rank"][:, :50])


def drop_rows(path, count):
    np.save(path, np.load(path)[:-count])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("trainset/latents.npy", lambda p: drop_rows(p, 2), r"latents.npy: expected latents of the 120 pictures of"),
        ("trainset/latents.npy", lambda p: drop_rows(p, IMAGES), "expected latents of 240 pictures, unflipped and"),
        ("trainset/text_embeddings.npy", lambda p: drop_rows(p, 1), "expected latents of the 119 pictures of text"),
        ("trainset/text_embeddings.npy", lambda p: np.save(p, np.load(p)[..., :8]), "expected token states of 16"),
        ("query_test/latents.npy", lambda p: np.save(p, np.load(p)[:, :2]), r"expected latents \[4, 8, 8\]"),
        ("trainset/annotations/captions_train2017.json", lambda p: p.write_text('{"images": [], "annotations": []}'),
         "text_embeddings.npy: expected captions of the 0 images of .*found 120"),
        ("model.bin", lambda p: p.unlink(), "model.bin: expected a file, found nothing; make it with: bash"),
        ("model.json", lambda p: p.write_text("{"), "model.json: expected JSON"),
        ("model.json", lambda p: p.write_text("[]"), 'model.json: expected {"denoiser"'),
        ("model.json", lambda p: p.write_text(p.read_text().replace("steps", "stepz")), "expected settings of"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(copied, file, damage, message, capsys):
    damage(copied.data / file)
    assert retrain.main(["halves", *flags(copied), "--models", "1"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_captions_of_other_queries_and_a_pipeline_that_is_not_there_are_refused(copied, tmp_path):
    (copied.data / "query_test/captions.txt").write_text("one\n")
    with pytest.raises(ValueError, match=f"expected a line for each of the {QUERIES} queries of latents.npy, found 1"):
        copied.query_captions("test")
    with pytest.raises(ValueError, match=r"--pipeline: expected stabilityai/stable-diffusion-2 .* for ΔL alone; found"):
        replace(copied, pipeline=str(tmp_path)).sampler(CPU)


def test_scores_of_another_model_are_refused_and_flags_of_coco_on_a_testbed(coco, copied, capsys):
    path = copied.data / "scores/influence.npy"
    write_manifest(path, {}, command="", inputs={"model": "0" * 64})
    assert lds.main([str(path), *flags(copied), "--models", "2"]) == 2
    assert "expected scores of this testbed (coco, test queries), found another model" in capsys.readouterr().err
    assert retrain.main(["status", "--bf16"]) == 2
    assert "--bf16: expected --mode coco beside it, found --mode emoji-mini" in capsys.readouterr().err
    assert retrain.main(["halves", *flags(coco), "--models", "9", "--together", "2"]) == 2
    assert "--together: expected a testbed, whose training set is small, found coco" in capsys.readouterr().err


def test_token_states_larger_than_memory_are_mapped(tmp_path):
    shape = (118_287, 5, 77, 1024)
    np.lib.format.open_memmap(tmp_path / "text_embeddings.npy", "w+", np.float16, shape).flush()
    np.save(tmp_path / "latents.npy", np.zeros((2 * shape[0], 4, 1, 1), np.float16))
    pictures = EncodedPictures.open(tmp_path)
    latents, text = pictures.drawn(torch.tensor([5, shape[0] - 1]), torch.Generator())
    assert latents.shape == (2, 4, 1, 1) and text.shape == (2, 77, 1024)
    with pytest.raises(ValueError, match="read-only"):
        load_npy(tmp_path / "latents.npy", mmap=True, writable=False)[0] = 1
