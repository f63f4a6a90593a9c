"""Draws depend on the example, never on its place in a batch; pairs are antithetic; timesteps stay in their bin."""

from __future__ import annotations

import pytest
import torch

from abu.draws import DrawConfig, draw

SHAPE = (2, 3, 3)


def test_a_draw_does_not_depend_on_batch_or_order():
    config = DrawConfig(draws=2)
    together = draw(config, "train", [5, 9, 2], 0, 3, 1, SHAPE)
    for place, example in enumerate([5, 9, 2]):
        timesteps, noise = draw(config, "train", [example], 0, 3, 1, SHAPE)
        assert timesteps[0] == together[0][place]
        assert torch.equal(noise[0], together[1][place])


def test_antithetic_pairs_share_the_timestep_and_negate_the_noise():
    config = DrawConfig(draws=4)
    first, second = draw(config, "train", [1, 2], 0, 0, 2, SHAPE), draw(config, "train", [1, 2], 0, 0, 3, SHAPE)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], -second[1])
    other = draw(config, "train", [1, 2], 0, 0, 0, SHAPE)
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("key", [("val", 0, 0), ("train", 1, 0), ("train", 0, 1)])
def test_role_run_and_bin_give_other_noise(key):
    role, run, bin_index = key
    reference = draw(DrawConfig(), "train", [0], 0, 0, 0, SHAPE)[1]
    assert not torch.equal(draw(DrawConfig(), role, [0], run, bin_index, 0, SHAPE)[1], reference)


def test_timesteps_fill_their_bin_evenly():
    config = DrawConfig(bins=10, draws=1, antithetic=False)
    timesteps = draw(config, "train", list(range(2000)), 0, 4, 0, (1,))[0]
    assert timesteps.min() >= 400 and timesteps.max() < 500
    # mean 449.5, standard error 28.9 / sqrt(2000) = 0.65
    assert abs(timesteps.double().mean().item() - 449.5) < 3


def test_bins_must_divide_the_timesteps():
    with pytest.raises(ValueError, match="found 7 bins"):
        DrawConfig(bins=7)
