"""Source models, images and queries that the two forms of influence are timed on: the emoji testbed, and COCO's shapes.

The COCO model is the one of the released data (a `UNet2DConditionModel` on 16×16×4 latents, 77×1024 text) with random
weights, random images and an identity for its curvature: time and memory depend on shapes only, scores would mean
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from abu.amortised import Examples
from abu.curvature import EKFAC, DiagonalFisher
from abu.diffusion_loss import NoiseSchedule
from abu.fisher import CurvatureConfig, fit_curvature
from abu.keyvalue import key_value_layers
from abu.models import DiffusionConfig, UNet2DConditionModel, noise_schedule
from abu.testbed import Testbed

COCO_IMAGES, COCO_QUERIES = 118_287, 5_000
"""The training set of MSCOCO 2017 and the paper's training queries."""


@dataclass(frozen=True)
class World:
    """All that both forms need."""

    denoiser: nn.Module
    schedule: NoiseSchedule
    curvature: DiagonalFisher
    training: Examples
    queries: Examples
    images: int
    """N of eq. 1, images that the model was trained on; `training` may be the first of them."""


def emoji_world(testbed: Testbed, images: int, device: torch.device) -> World:
    """The testbed's model with its first `images` training images (0: all) and all its test queries."""
    source = testbed.load_source(device)
    source.denoiser.to(memory_format=torch.channels_last)
    training = testbed.training_examples(device)
    return World(
        source.denoiser,
        source.schedule,
        EKFAC.load(testbed.curvature).to(device),
        training.rows(0, images or len(training.ids)),
        testbed.query_examples("test", device),
        len(training.ids),
    )


def build_coco_denoiser() -> nn.Module:
    """The released COCO model's shape, untrained."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=1024,
        attention_head_dim=8,
    )


def random_world(
    build: Callable[[], nn.Module],
    schedule: NoiseSchedule,
    images: int,
    queries: int,
    latents: tuple[int, ...],
    text: tuple[int, ...],
    device: torch.device,
    *,
    fitted: bool,
) -> World:
    """An untrained model with random images of shape `latents` and random captions of shape `text`.

    Its curvature is `fitted` to them, or EK-FAC factors that are all identities.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build().eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        drawn = [torch.randn(images + queries, *shape).to(device) for shape in (latents, text)]
    training, asked = (
        Examples(role, list(range(stop - start)), *(tensor[start:stop] for tensor in drawn))
        for role, start, stop in (("train", 0, images), ("test", images, images + queries))
    )
    if fitted:
        curvature = fit_curvature(denoiser, schedule, training.latents, training.text, CurvatureConfig()).shared()
    else:
        curvature = identity_curvature(denoiser, text[-1], device)
    return World(denoiser, schedule, curvature, training, asked, len(training.ids))


def identity_curvature(denoiser: nn.Module, width: int, device: torch.device) -> EKFAC:
    """EK-FAC factors of the right shapes: identities, and eigenvalues of one."""
    layers = key_value_layers(denoiser)
    sizes = tuple(len(layer.weight) for layer in layers.values())
    return EKFAC(
        sizes=sizes,
        names=tuple(layers),
        eigenvalues=torch.ones(sum(sizes), width, device=device),
        basis_in=torch.eye(width, device=device),
        basis_out=tuple(torch.eye(size, device=device) for size in sizes),
    )


def coco_world(images: int, queries: int, device: torch.device) -> World:
    """The COCO model's shapes."""
    schedule = noise_schedule(DiffusionConfig())
    shapes = ((4, 16, 16), (77, 1024))
    return random_world(build_coco_denoiser, schedule, images, queries, *shapes, device, fitted=False)
