"""The shared sweep: equal to the definition of the loss, and bit for bit the same in any company."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_teacher import tiny_teacher
from torch import nn

from abu.diffusion_loss import example_losses
from abu.draws import draw
from abu.influence import exact_influence
from abu.layers import select_layers
from abu.loss_draws import LossDraws, TrainingImages, open_images
from abu.sweep import Sweep, SweepConfig
from abu.unlearn import moved_model
from fastgda.core import keyed_generator, save_npy

IMAGES = 11
DRAWS = {
    "stratified": LossDraws(timesteps=2, draws=2, captions=2, flips=True),
    "grid": LossDraws("grid", timesteps=3, captions=2, flips=True, seed=5),
}


@pytest.fixture(scope="module")
def tiny():
    return tiny_teacher(IMAGES)


@pytest.fixture(scope="module")
def images(tiny):
    latents = tiny.training.latents.numpy()
    text = torch.randn(IMAGES, 2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TrainingImages((latents, latents[..., ::-1].copy()), text.numpy())


@pytest.fixture(scope="module")
def changes(tiny):
    generator = torch.Generator().manual_seed(2)
    layers = select_layers(tiny.denoiser)
    return [
        {name: 0.1 * torch.randn(layer.weight.shape, generator=generator) for name, layer in layers.items()}
        for _ in range(3)
    ]


def noise_of(draws, image, caption, view, shape):
    """(timestep, ε) pairs from the keys, written out."""
    if draws.protocol == "grid":
        for index, timestep in enumerate((166, 500, 833)):
            key = ("train", "grid", 5, image, index, view, caption, 0)
            yield torch.tensor([timestep]), torch.randn(shape, generator=keyed_generator(*key))[None]
        return
    role = "train" if view == caption == 0 else f"train-view{view}-caption{caption}"
    for index in range(2):
        for number in range(2):
            yield draw(draws.stratified(1000), role, [image], 0, index, number, shape)


@pytest.mark.parametrize("protocol", DRAWS)
def test_losses_are_those_of_the_definition(tiny, images, changes, protocol):
    draws = DRAWS[protocol]
    models = [tiny.denoiser, moved_model(tiny.denoiser, changes[0])]
    ids, expected = [4, 0], np.zeros((2, 2, 2))
    for place, image in enumerate(ids):
        for view in range(2):
            for caption in range(2):
                latents, text = (
                    torch.from_numpy(array[image : image + 1])
                    for array in (images.latents[view], images.text[:, caption])
                )
                for timesteps, noise in noise_of(draws, image, caption, view, (2, 4, 4)):
                    noisy, target = tiny.schedule.noised(latents, noise.double(), timesteps)
                    for index, model in enumerate(models):
                        loss = example_losses(model, noisy, target, timesteps, text).item()
                        expected[index, place, view] += loss / (draws.per_image / 2)
    sweep = Sweep(tiny.denoiser, tiny.schedule, images, draws, SweepConfig(rows=32))
    found = sweep.losses(ids, [None, changes[0]])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert sweep.prefix
    influence = exact_influence(sweep, ids, changes[:1])
    np.testing.assert_allclose(influence, (expected[1:] - expected[:1]).max(-1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_the_same_bits_in_any_company(tiny, images, changes, dtype):
    model = copy.deepcopy(tiny.denoiser).to(dtype)
    whole = Sweep(model, tiny.schedule, images, DRAWS["grid"], SweepConfig(rows=32))
    every = whole.losses(range(IMAGES), [None, *changes])
    few = Sweep(model, tiny.schedule, images, DRAWS["grid"], SweepConfig(rows=32))
    assert np.array_equal(few.losses([9, 2, 5], [changes[2], None]), every[[3, 0]][:, [9, 2, 5]])
    assert np.array_equal(few.losses([3], [changes[0]]), every[1:2, 3:4])
    needed = np.random.default_rng(0).random((4, IMAGES)) < 0.4
    part = few.losses(range(IMAGES), [None, *changes], needed)
    assert np.array_equal(part[needed], every[needed])
    assert np.isnan(part[~needed]).all()
    # what is shared changes no bit either
    whole.prefix = []
    assert np.array_equal(whole.losses(range(IMAGES), [None, *changes]), every)


def test_where_rows_depend_on_their_place_a_batch_holds_one_image(tiny, images, changes, caplog):
    class Uneven(nn.Module):
        """Rounds the second half of a batch differently, as some kernels do."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, noisy, timesteps, text):
            found = self.inner(noisy, timesteps, text)
            found.sample[len(noisy) // 2 :] *= 1 + 1e-15
            return found

    model = Uneven(tiny.denoiser)
    sweep = Sweep(model, tiny.schedule, images, DRAWS["grid"], SweepConfig(rows=32))
    every = sweep.losses(range(IMAGES), [None])
    assert (sweep.groups, sweep.rows) == (1, 6)
    assert "treat rows by their place" in caplog.text
    assert np.array_equal(sweep.losses([8, 1], [None])[0], every[0, [8, 1]])


def test_more_losses_of_an_image_than_rows_still_go_together(tiny, images):
    sweep = Sweep(tiny.denoiser, tiny.schedule, images, DRAWS["grid"], SweepConfig(rows=4))
    wide = Sweep(tiny.denoiser, tiny.schedule, images, DRAWS["grid"], SweepConfig(rows=64))
    np.testing.assert_allclose(sweep.losses([1, 2], [None]), wide.losses([1, 2], [None]), rtol=1e-12)


def test_a_module_that_writes_into_a_shared_output_is_not_shared(tiny, images, changes):
    class InPlace(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.first, self.scale, self.inner = nn.Identity(), nn.Conv2d(2, 2, 1).double(), inner

        def forward(self, noisy, timesteps, text):
            hidden = self.scale(noisy)
            hidden *= 2
            return self.inner(hidden, timesteps, text)

    sweep = Sweep(InPlace(tiny.denoiser), tiny.schedule, images, DRAWS["grid"], SweepConfig(rows=32))
    named = [{f"inner.{name}": value for name, value in change.items()} for change in changes]
    together = sweep.losses([0, 1], [None, *named])
    assert sweep.prefix is not None and "scale" not in sweep.prefix and "inner.conv_in" in sweep.prefix
    assert np.array_equal(together[2], sweep.losses([0, 1], [named[1]])[0])


def test_text_that_carries_more_than_tokens_gets_the_same_losses(tiny, images, changes):
    class Carrying(nn.Module):
        """Reads the first two rows of its text only."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, noisy, timesteps, text):
            return self.inner(noisy, timesteps, text[:, :2])

    named = [{f"inner.{name}": value for name, value in change.items()} for change in changes]
    short = TrainingImages(images.latents, images.text[:, :, :2])
    carried = Sweep(Carrying(tiny.denoiser), tiny.schedule, images, DRAWS["grid"], SweepConfig(rows=32))
    plain = Sweep(tiny.denoiser, tiny.schedule, short, DRAWS["grid"], SweepConfig(rows=32))
    found, expected = carried.losses([1, 2], [None, *named]), plain.losses([1, 2], [None, *changes])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_model_is_left_as_it_was(tiny, images, changes):
    before = {name: value.clone() for name, value in tiny.denoiser.state_dict().items()}
    Sweep(tiny.denoiser, tiny.schedule, images, DRAWS["grid"]).losses([0], changes)
    assert all(torch.equal(before[name], value) for name, value in tiny.denoiser.state_dict().items())
    assert not any("forward" in vars(module) for module in tiny.denoiser.modules())


def test_bfloat16_is_near_and_keeps_the_change_of_the_weights(tiny, images, changes):
    model = copy.deepcopy(tiny.denoiser).float()
    exact, half = (
        exact_influence(Sweep(model, tiny.schedule, images, DRAWS["grid"], SweepConfig(32, bf16)), range(8), changes)
        for bf16 in (False, True)
    )
    assert 0 < np.abs(exact - half).max() < 0.05
    assert np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.8


def test_a_loss_that_is_not_finite_is_named(tiny, images):
    latents = images.latents[0].copy()
    latents[6] = np.inf
    broken = TrainingImages((latents,), images.text)
    sweep = Sweep(tiny.denoiser, tiny.schedule, broken, LossDraws("grid", 2, captions=2))
    with pytest.raises(ValueError, match="training image 6, caption 0, timestep 250: expected a finite loss"):
        sweep.losses([5, 6, 7], [None])


def test_ids_views_and_captions_that_there_are_not_are_refused(tiny, images):
    sweep = Sweep(tiny.denoiser, tiny.schedule, images, LossDraws())
    with pytest.raises(ValueError, match=r"expected training ids 0\.\.10, found 11"):
        sweep.losses([3, 11], [None])
    with pytest.raises(ValueError, match="--captions: expected at most 2, found 5"):
        Sweep(tiny.denoiser, tiny.schedule, images, LossDraws(captions=5))
    single = TrainingImages(images.latents[:1], images.text)
    with pytest.raises(ValueError, match="--flips: expected the latents of flipped images, found none"):
        Sweep(tiny.denoiser, tiny.schedule, single, LossDraws(flips=True))


def test_flipped_latents_are_read_from_either_layout(tmp_path, images):
    save_npy(tmp_path / "text_embeddings.npy", images.text)
    save_npy(tmp_path / "latents.npy", np.concatenate(images.latents))
    released = open_images(tmp_path, "")
    save_npy(tmp_path / "latents.npy", images.latents[0])
    assert len(open_images(tmp_path, "").latents) == 1
    save_npy(tmp_path / "latents_flipped.npy", images.latents[1])
    separate = open_images(tmp_path, "")
    for found in (released, separate):
        assert all(np.array_equal(a, b) for a, b in zip(found.latents, images.latents, strict=True))
    save_npy(tmp_path / "latents.npy", images.latents[0][:-1])
    with pytest.raises(ValueError, match="expected latents of 11 images or twice as many, found 10"):
        open_images(tmp_path, "")
