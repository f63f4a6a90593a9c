"""What a GPU computes is what the CPU computes: teacher, retraining by CUDA graphs, ranker. Needs a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import LEVELS, planted
from small_judge import write_small_testbed
from tiny_teacher import TinyTeacher, tiny_teacher

from abu.amortised import Examples, MeanGradients
from abu.draws import DrawConfig
from abu.encoded import LoadedPictures
from abu.influence import exact_influence
from abu.layers import select_layers
from abu.loss_draws import LossDraws, TrainingImages
from abu.second_order import TrainingTerms
from abu.sweep import Sweep, SweepConfig
from abu.train_diffusion import diffusion_loss
from abu.training import LoopConfig, train
from benchmark.retrainer import WEIGHT, RetrainConfig, Retrainer, Retraining
from benchmark.together import Together
from fastgda.dataset import normalise
from fastgda.metrics import embedding_retrieval
from fastgda.recipes import TrainConfig
from fastgda.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = (torch.device("cpu"), torch.device("cuda"))
DRAWS = DrawConfig(bins=2, draws=2)


def on_both(compute, dtype: torch.dtype = torch.float64) -> list[np.ndarray]:
    """`compute(tiny)` of the same teacher on the CPU and on the GPU."""
    found = []
    for device in DEVICES:
        tiny = tiny_teacher()
        training, query = (
            Examples(part.role, part.ids, part.latents.to(device, dtype), part.text.to(device, dtype))
            for part in (tiny.training, tiny.query)
        )
        result = compute(TinyTeacher(tiny.denoiser.to(device, dtype), tiny.schedule, training, query))
        found.append(result.cpu().double().numpy() if isinstance(result, torch.Tensor) else np.asarray(result))
    return found


def test_natural_gradients():
    def compute(tiny):
        curvature = tiny.curvature()
        gradients = MeanGradients(tiny.denoiser, tiny.schedule)(tiny.query, DRAWS, 0).mean(0)
        return curvature.natural_gradient(curvature.rotated_gradients(gradients, tiny.query.text))

    expected, found = on_both(compute)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())


def test_gradients_and_products_of_the_amortised_teacher():
    def compute(tiny):
        gradients, products = TrainingTerms(tiny.denoiser, tiny.schedule)(tiny.training, DRAWS, 0)
        return torch.stack([gradients, *products])

    expected, found = on_both(compute)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())


def test_a_sweep_of_losses():
    def compute(tiny):
        images = TrainingImages((tiny.training.latents.cpu().numpy(),), tiny.training.text[:, None].cpu().numpy())
        sweep = Sweep(tiny.denoiser, tiny.schedule, images, LossDraws(timesteps=2, draws=2), SweepConfig())
        generator = torch.Generator().manual_seed(2)
        change = {
            name: 0.1 * torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
            for name, layer in select_layers(tiny.denoiser).items()
        }
        return exact_influence(sweep, range(24), [change])

    expected, found = on_both(compute)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"compile": True}])
def test_a_diffusion_model_trains_alike(tmp_path, settings):
    def compute(tiny):
        device = tiny.training.latents.device
        chosen = settings if device.type == "cuda" else {}
        loop = LoopConfig(steps=5, batch_size=8, warmup=1, **chosen)
        latents, text = tiny.training.latents.cpu(), tiny.training.text.cpu()
        loss = diffusion_loss(LoadedPictures(latents, text), tiny.schedule, device)
        model = tiny.denoiser.requires_grad_(True)
        return train(model, loss, len(latents), loop, tmp_path / device.type, device=device)

    expected, found = on_both(compute, torch.float32)
    np.testing.assert_allclose(found, expected, rtol=3e-2 if "bf16" in settings else 1e-3)


def test_models_trained_by_graphs_are_those_of_the_cpu_and_the_same_bit_for_bit(tmp_path, monkeypatch):
    testbed, config = write_small_testbed(tmp_path), RetrainConfig(bins=2, draws=1, sampling_steps=3)
    jobs = [Retraining((3, 5, 8), seed=7), Retraining((), seed=1), Retraining((0,), seed=7)]
    on_gpu = Retrainer(testbed, config)
    assert on_gpu.device.type == "cuda"
    runs: list[dict] = [dict(Together(on_gpu, count).train(jobs)) for count in (2, 3)]
    monkeypatch.setattr("benchmark.retrainer.best_device", lambda: DEVICES[0])
    on_cpu = Retrainer(testbed, config)
    for job in jobs:
        alone = on_cpu.compute(job)
        for name in alone.keys() - {"seconds"}:
            assert np.array_equal(runs[0][job][name], runs[1][job][name]), name
        for name in ("losses_val", "losses_test", "latents_test"):
            np.testing.assert_allclose(runs[0][job][name], alone[name], rtol=1e-2, atol=1e-2, err_msg=name)
        assert any(name.startswith(WEIGHT) for name in alone) == (job.removed == ())


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"compile": True}, {"sampling": "pairs", "batch_size": 2048}])
def test_a_ranker_solves_the_planted_problem(tmp_path: Path, settings):
    images, splits = planted()
    config = TrainConfig(
        hidden_sizes=(32,),
        out_feat_dim=16,
        query_block=16,
        image_block=256,
        epochs=12,
        **({"sampling": "blocks"} | settings),
    )
    precision = []
    for device in DEVICES:
        trainer = Trainer(
            config, images, splits["train"], splits["val"], levels=LEVELS, run_dir=tmp_path / device.type, device=device
        )
        ranker = trainer.run()
        embedded = ranker.embed_queries(splits["test"].features), ranker.embed(images)
        found = embedding_retrieval(*embedded, splits["test"].rankings, LEVELS, precision_only=True)
        precision.append(found.precision.mean(0))
    asked, known = (torch.from_numpy(normalise(part)) for part in (splits["test"].features, images))
    untuned = embedding_retrieval(asked, known, splits["test"].rankings, LEVELS, precision_only=True)
    assert (precision[1] > 1.2 * untuned.precision.mean(0)).all()
    np.testing.assert_allclose(precision[1], precision[0], atol=0.05)
