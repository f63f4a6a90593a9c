"""Trains a testbed's latent diffusion model on the encoded training set.

    python -m abu.train_diffusion --mode emoji      # about 70 minutes on two cores; resumes where it stopped

Timesteps are stratified over the batch, one caption in ten is dropped (all-zero token states) so that sampling can be
guided, and what is kept is the moving average of the weights.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from abu.diffusion_loss import NoiseSchedule, example_losses
from abu.encoded import TrainingPictures
from abu.models import Autoencoder, SourceModel, initial_denoiser, load_module, noise_schedule, save_source
from abu.testbed import CAPTION_DROPOUT, add_testbed_flags, testbed_from
from abu.training import StepLoss, save_history, train
from fastgda.core import (
    best_device,
    command_line,
    command_parser,
    manifest_difference,
    require_file,
    sha256_file,
    write_manifest,
)


@dataclass(frozen=True)
class StepDraws:
    """What is random in a training step."""

    timesteps: Tensor
    """[B], integers."""
    noise: Tensor
    """[B, c, h, w]."""
    captioned: Tensor
    """[B], whether an example keeps its caption."""


def step_draws(
    shape: tuple[int, ...], timesteps: int, generator: torch.Generator, dropout: float = CAPTION_DROPOUT
) -> StepDraws:
    """The draws of a step for latents of `shape` [B, c, h, w], on the CPU; `dropout` is the share without captions."""
    # Stratified over the batch: an unbiased draw of t with less variance than independent ones.
    offsets = (torch.arange(shape[0]) + torch.rand(shape[0], generator=generator)) / shape[0]
    return StepDraws(
        (offsets * timesteps).long().clamp(max=timesteps - 1),
        torch.randn(shape, generator=generator),
        torch.rand(shape[0], generator=generator) >= dropout,
    )


def step_loss(model: nn.Module, schedule: NoiseSchedule, latents: Tensor, text: Tensor, draws: StepDraws) -> Tensor:
    """Mean loss of the `latents` [B, c, h, w] with token states `text` [B, T, d], all on the device of the draws."""
    tokens = text.float() * draws.captioned.view(-1, 1, 1)
    noisy, target = schedule.noised(latents, draws.noise, draws.timesteps)
    return example_losses(model, noisy, target, draws.timesteps, tokens).mean()


def refilled(rows: Tensor, kept: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """`rows` [B] of a training set of `images`, with random ones of the ids `kept` in the places of all others."""
    seen = torch.zeros(images, dtype=torch.bool)
    seen[kept] = True
    others = kept[torch.randint(len(kept), rows.shape, generator=generator)]
    return torch.where(seen[rows], rows, others)


def diffusion_loss(
    pictures: TrainingPictures,
    schedule: NoiseSchedule,
    device: torch.device,
    kept: Tensor | None = None,
    dropout: float = CAPTION_DROPOUT,
) -> StepLoss:
    """The loss of a step on `pictures`, a share `dropout` of them without captions.

    With ids `kept`, the model sees these images only. Whatever is removed, all else in a step stays the same, so that
    two models of one seed differ by what they saw and not by their order and noise.
    """

    def loss(model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        draws = step_draws((len(rows), *pictures.shape), len(schedule), generator, dropout)
        if kept is not None:
            rows = refilled(rows, kept, len(pictures), generator)
        placed = StepDraws(draws.timesteps.to(device), draws.noise.to(device), draws.captioned.to(device))
        latents, text = pictures.drawn(rows, generator)
        return step_loss(model, schedule, latents.to(device), text.to(device), placed)

    return loss


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m abu.train_diffusion", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--steps", type=int, help="optimisation steps (default: the testbed's recipe)")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    loop = replace(testbed.diffusion_loop, steps=args.steps or testbed.diffusion_loop.steps, compile=args.compile)
    pictures = testbed.training_pictures()
    config = {"diffusion": asdict(testbed.diffusion), "loop": asdict(loop)}
    weights = require_file(testbed.source / "autoencoder.safetensors")
    inputs = {"trainset": sha256_file(testbed.parquet), "autoencoder": sha256_file(weights)}
    path = testbed.source / "denoiser.safetensors"
    if manifest_difference(path, config, inputs) is None:
        print(f"{path}: up to date")
        return
    device = best_device()
    model = initial_denoiser(testbed.diffusion, loop.seed)
    schedule = noise_schedule(testbed.diffusion)
    loss = diffusion_loss(pictures, schedule, device)
    history = train(model, loss, len(pictures), loop, testbed.runs / "diffusion", device=device)
    autoencoder = Autoencoder(testbed.autoencoder)
    load_module(autoencoder, weights)
    save_source(SourceModel(model, autoencoder, testbed.diffusion, testbed.autoencoder), testbed.source)
    save_history(testbed.source / "diffusion_loss.json", history)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    command = f"python -m abu.train_diffusion --mode {args.mode}"
    write_manifest(path, config, command=command, inputs=inputs, parameters=parameters, loss=history[-1])


if __name__ == "__main__":
    sys.exit(main())
