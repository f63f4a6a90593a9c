"""TRAK against its authors' implementation (`traker`), on a small denoiser."""

from __future__ import annotations

import numpy as np
import torch
import trak
from tiny_layers import tiny_layers
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import NoOpProjector

from abu.amortised import Examples
from abu.draws import DrawConfig
from abu.influence import all_draws
from benchmark.kernels import Kernel
from benchmark.projected import FeatureConfig, ProjectedGradients


class DenoisingLoss(AbstractModelOutput):
    """The loss of one example as the output that is attributed."""

    def __init__(self):
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, noisy, target, timestep, text):
        batch = (noisy[None], timestep[None], text[None])
        predicted = torch.func.functional_call(model, (weights, buffers), batch).sample
        return (predicted - target).square().mean()

    @staticmethod
    def get_out_to_loss_grad(model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


def test_scores_are_trakers(tmp_path):
    world, ridge, draws = tiny_layers(images=10), 1.0, DrawConfig(bins=1, draws=1)
    latents, text = torch.randn_like(world.latents[:4]), world.text[:4]
    training = Examples("train", list(range(10)), world.latents, world.text)
    queries = Examples("test", list(range(4)), latents, text)
    engine = ProjectedGradients(world.denoiser, world.schedule, FeatureConfig(projection=100_000))
    phi, query = engine(training, draws)[0], engine(queries, draws)[0]
    ours = Kernel(phi).scores(query, ridge)

    def batch(examples):
        ((timesteps, noise),) = all_draws(draws, examples, 0)
        noisy, target = world.schedule.noised(examples.latents, noise, timesteps)
        return [noisy, target, timesteps, examples.text]

    model = world.denoiser.requires_grad_()
    width = sum(parameter.numel() for parameter in model.parameters())
    peer = trak.TRAKer(
        model,
        DenoisingLoss(),
        train_set_size=10,
        save_dir=str(tmp_path),
        device="cpu",
        projector=NoOpProjector(width, width, device="cpu"),
        proj_dim=width,
        use_half_precision=False,
        # traker divides gradients by the root of the number of weights
        lambda_reg=ridge / width,
        logging_level=50,
    )
    peer.load_checkpoint(model.state_dict(), model_id=0)
    peer.featurize(batch(training), num_samples=10)
    peer.finalize_features()
    peer.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=4)
    peer.score(batch(queries), num_samples=4)
    theirs = np.asarray(peer.finalize_scores("queries")).T
    factor = float((ours.numpy() * theirs).sum() / (theirs**2).sum())
    assert factor > 0
    np.testing.assert_allclose(factor * theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
