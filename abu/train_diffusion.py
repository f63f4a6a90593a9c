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
from abu.models import Autoencoder, SourceModel, initial_denoiser, load_module, noise_schedule, save_source
from abu.testbed import add_testbed_flags, testbed_from
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

CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class StepDraws:
    """What is random in a training step."""

    timesteps: Tensor
    """[B], integers."""
    noise: Tensor
    """[B, c, h, w]."""
    captioned: Tensor
    """[B], whether an example keeps its caption."""


def step_draws(shape: tuple[int, ...], timesteps: int, generator: torch.Generator) -> StepDraws:
    """The draws of a step for latents of `shape` [B, c, h, w], on the CPU."""
    # Stratified over the batch: an unbiased draw of t with less variance than independent ones.
    offsets = (torch.arange(shape[0]) + torch.rand(shape[0], generator=generator)) / shape[0]
    return StepDraws(
        (offsets * timesteps).long().clamp(max=timesteps - 1),
        torch.randn(shape, generator=generator),
        torch.rand(shape[0], generator=generator) >= CAPTION_DROPOUT,
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
    latents: Tensor, text: Tensor, schedule: NoiseSchedule, device: torch.device, kept: Tensor | None = None
) -> StepLoss:
    """The loss of a step, for `latents` [N, c, h, w], token states `text` [N, T, d] and the noise schedule.

    With ids `kept`, the model sees these images only. Whatever is removed, all else in a step stays the same, so that
    two models of one seed differ by what they saw and not by their order and noise.
    """

    def loss(model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        draws = step_draws((len(rows), *latents.shape[1:]), len(schedule), generator)
        if kept is not None:
            rows = refilled(rows, kept, len(latents), generator)
        placed = StepDraws(draws.timesteps.to(device), draws.noise.to(device), draws.captioned.to(device))
        return step_loss(model, schedule, latents[rows].to(device), text[rows].to(device), placed)

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
    latents, text = testbed.load_arrays()
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
    loss = diffusion_loss(torch.from_numpy(latents), torch.from_numpy(text)[:, 0], schedule, device)
    history = train(model, loss, len(latents), loop, testbed.runs / "diffusion", device=device)
    autoencoder = Autoencoder(testbed.autoencoder)
    load_module(autoencoder, weights)
    save_source(SourceModel(model, autoencoder, testbed.diffusion, testbed.autoencoder), testbed.source)
    save_history(testbed.source / "diffusion_loss.json", history)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    command = f"python -m abu.train_diffusion --mode {args.mode}"
    write_manifest(path, config, command=command, inputs=inputs, parameters=parameters, loss=history[-1])


if __name__ == "__main__":
    sys.exit(main())
