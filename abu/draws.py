"""Timesteps and noise of the teacher, keyed by (role, seed, example, run, bin, draw): equal for any batch or order.

The timesteps 0..T-1 are cut into bins of equal width. In each bin an example gets the same number of draws; draws 2k
and 2k + 1 share a timestep and use ε and −ε (antithetic), which cancels the part of the gradient that is odd in ε.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda.core import keyed_generator


@dataclass(frozen=True)
class DrawConfig:
    """Which (t, ε) an example's expectation is taken over."""

    bins: int = 10
    """Equal bins of timesteps; gradients are normalised within a bin by the normalised teacher."""
    draws: int = 2
    """Draws of (t, ε) in each bin."""
    antithetic: bool = True
    timesteps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bins < 1 or self.draws < 1 or self.timesteps % self.bins:
            raise ValueError(
                f"expected bins that divide {self.timesteps} timesteps and at least one draw, "
                f"found {self.bins} bins and {self.draws} draws"
            )


def draw(
    config: DrawConfig, role: str, examples: list[int], run: int, bin_index: int, index: int, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(timesteps [B], noise [B, *shape]) of draw `index` in a bin.

    `role` is "train" or the split of the queries; runs (0, 1, …) are independent of each other.
    """
    width = config.timesteps // config.bins
    pair, sign = (index // 2, 1 - 2 * (index % 2)) if config.antithetic else (index, 1)
    timesteps, noise = [], []
    for example in examples:
        generator = keyed_generator(role, config.seed, example, run, bin_index, pair)
        timesteps.append(torch.randint(width, (), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    return bin_index * width + torch.stack(timesteps), sign * torch.stack(noise)
