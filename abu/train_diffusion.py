"""Trains a testbed's latent diffusion model on the encoded training set.

    python -m abu.train_diffusion --mode emoji      # about 70 minutes on two cores; resumes where it stopped

Timesteps are stratified over the batch, one caption in ten is dropped (all-zero token states) so that sampling can be
guided, and what is kept is the moving average of the weights.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from abu.diffusion_loss import NoiseSchedule, example_losses
from abu.models import Autoencoder, SourceModel, build_denoiser, load_module, noise_schedule, save_source
from abu.testbed import add_testbed_flags, testbed_from
from abu.training import StepLoss, save_history, train
from fastgda.core import best_device, command_line, manifest_difference, require_file, sha256_file, write_manifest

CAPTION_DROPOUT = 0.1


def diffusion_loss(latents: Tensor, text: Tensor, schedule: NoiseSchedule, device: torch.device) -> StepLoss:
    """The loss of a step, for `latents` [N, c, h, w], token states `text` [N, T, d] and the noise schedule."""
    steps = len(schedule)

    def loss(model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        x = latents[rows].to(device)
        # Stratified over the batch: an unbiased draw of t with less variance than independent ones.
        offsets = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        t = (offsets * steps).long().clamp(max=steps - 1).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        keep = (torch.rand(len(rows), generator=generator) >= CAPTION_DROPOUT).view(-1, 1, 1)
        tokens = (text[rows].float() * keep).to(device)
        noisy, target = schedule.noised(x, noise, t)
        return example_losses(model, noisy, target, t, tokens).mean()

    return loss


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m abu.train_diffusion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loop.seed)
        model = build_denoiser(testbed.diffusion)
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
