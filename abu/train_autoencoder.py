"""Trains a testbed's autoencoder: images to latents and back.

    python -m abu.train_autoencoder --mode emoji      # about 12 minutes on two cores; resumes where it stopped

Loss: mean absolute error of pixels and of their differences to the right and down (edges), plus a small KL term that
keeps the latents near a unit normal. Horizontal flips double the data.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

import torch
from torch import Tensor

from abu.models import Autoencoder, save_module
from abu.testbed import add_testbed_flags, testbed_from
from abu.training import StepLoss, save_history, train
from fastgda.core import best_device, command_line, command_parser, manifest_difference, sha256_file, write_manifest

EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-3


def autoencoder_loss(images: Tensor, device: torch.device) -> StepLoss:
    """The loss of a step, for `images` [N, 3, P, P] in 0..255."""

    def loss(model: Autoencoder, rows: Tensor, generator: torch.Generator) -> Tensor:
        x = images[rows].to(device).float() / 127.5 - 1
        flipped = (torch.rand(len(x), generator=generator) < 0.5).to(device)
        x = torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x)
        mean, log_variance = (part.float() for part in model.posterior(x))
        noise = torch.randn(mean.shape, generator=generator).to(device)
        out = model.reconstruct(mean + torch.exp(0.5 * log_variance) * noise).float()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        right, down = ((out.diff(dim=axis) - x.diff(dim=axis)).abs().mean() for axis in (-1, -2))
        return (out - x).abs().mean() + EDGE_WEIGHT * (right + down) + KL_WEIGHT * divergence

    return loss


@torch.inference_mode()
def standardise(model: Autoencoder, images: Tensor, device: torch.device, batch_size: int = 256) -> None:
    """Sets the buffers so that the training set's latents have mean 0 and deviation 1 in each channel."""
    raw = [
        model.posterior(images[start : start + batch_size].to(device).float() / 127.5 - 1)[0].cpu()
        for start in range(0, len(images), batch_size)
    ]
    latents = torch.cat(raw)
    model.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
    model.deviation.copy_(latents.std((0, 2, 3), keepdim=True))


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m abu.train_autoencoder", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--steps", type=int, help="optimisation steps (default: the testbed's recipe)")
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    loop = replace(testbed.autoencoder_loop, steps=args.steps or testbed.autoencoder_loop.steps)
    path = testbed.source / "autoencoder.safetensors"
    config = {"autoencoder": asdict(testbed.autoencoder), "loop": asdict(loop)}
    inputs = {"trainset": sha256_file(testbed.parquet)} if testbed.parquet.is_file() else {}
    if manifest_difference(path, config, inputs) is None:
        print(f"{path}: up to date")
        return
    device, images = best_device(), testbed.load_images()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loop.seed)
        model = Autoencoder(testbed.autoencoder)
    run = testbed.runs / "autoencoder"
    history = train(model, autoencoder_loss(images, device), len(images), loop, run, device=device)
    model.eval()
    standardise(model, images, device)
    save_module(model, path)
    save_history(testbed.source / "autoencoder_loss.json", history)
    write_manifest(path, config, command=f"python -m abu.train_autoencoder --mode {args.mode}", inputs=inputs)


if __name__ == "__main__":
    sys.exit(main())
