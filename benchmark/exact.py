"""How close amortised AbU+ is to the exact loss change, for several step sizes, on the full training set.

    python -m benchmark.exact --queries 10 --steps 0.01 0.1 1      # resumable; results/teacher/exact.json

Both sides use the same query gradient and the same draws of (t, ε) for each training image, so what is compared is the
linearisation alone. For each step: Spearman and overlap at L between the two, the size of the loss change against the
loss, and the floating-point noise of the exact form (float32 against float64 on a sample of the images).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.amortised import Examples
from abu.curvature import EKFAC, DiagonalFisher
from abu.diffusion_loss import NoiseSchedule
from abu.draws import DrawConfig
from abu.influence import all_draws, mean_losses, query_gradient, unlearn
from abu.keyvalue import OutputGradients
from abu.models import SourceModel
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from fastgda.core import best_device, command_line, environment, load_npz, save_json, save_npz
from fastgda.dataset import default_levels
from fastgda.metrics import overlap, spearman
from fastgda.rankings import from_scores

SHARD = 512


@dataclass(frozen=True)
class ExactConfig:
    """What is compared."""

    queries: int = 10
    """The first so many test queries."""
    steps: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Values of α in eq. 1."""
    bins: int = 2
    """Timestep bins, one draw of (t, ε) in each for every training image."""
    query_draws: int = 20
    """Draws per bin for the query's gradient."""
    float64_images: int = 256
    """Images on which float32 is compared with float64."""

    @property
    def draws(self) -> DrawConfig:
        """Draws of the training images."""
        return DrawConfig(self.bins, 1, antithetic=False)


def first_order(
    model: nn.Module,
    schedule: NoiseSchedule,
    curvature: DiagonalFisher,
    gradients: Tensor,
    examples: Examples,
    draws: DrawConfig,
) -> Tensor:
    """⟨F⁻¹∇𝓛(ẑ), ∇𝓛(z)⟩ [Q, B] with the draws that the exact form uses; `gradients` [Q, out, in] in the eigenbasis."""
    engine, scaled = OutputGradients(model), (gradients / curvature.damped()).flatten(1)
    total = torch.zeros(len(gradients), len(examples.ids))
    for timesteps, noise in all_draws(draws, examples, 0):
        output = engine(*schedule.noised(examples.latents, noise, timesteps), timesteps, examples.text)[0]
        total += (scaled @ curvature.rotated_gradients(output, examples.text).flatten(1).mT).float().cpu()
    return total / (draws.bins * draws.draws)


def collect(
    source: SourceModel, curvature: DiagonalFisher, testbed: Testbed, folder: Path, config: ExactConfig
) -> None:
    """Writes a piece for every shard of training images: before [B], after [steps, Q, B], amortised [Q, B]."""
    device, schedule = source.device, source.schedule
    examples, queries = testbed.training_examples(device), testbed.query_examples("test", device)
    drawing = DrawConfig(config.bins, config.query_draws)
    gradients = torch.stack(
        [
            query_gradient(source.denoiser, schedule, curvature, queries.rows(i, i + 1), drawing)
            for i in tqdm(range(config.queries), desc="query gradients", unit="query")
        ]
    )
    moved = [
        unlearn(source.denoiser, curvature, gradient, step, len(examples.ids))
        for step in config.steps
        for gradient in gradients
    ]
    for start in tqdm(range(0, len(examples.ids), SHARD), desc="exact", unit="shard"):
        path = folder / f"exact_{start:06d}.npz"
        if path.is_file():
            continue
        batch = examples.rows(start, start + SHARD)
        losses = mean_losses([source.denoiser, *moved], schedule, batch, config.draws, progress=False)
        amortised = [
            first_order(source.denoiser, schedule, curvature, gradients, batch.rows(low, low + 64), config.draws)
            for low in range(0, len(batch.ids), 64)
        ]
        save_npz(
            path,
            before=losses[0].numpy(),
            after=losses[1:].view(len(config.steps), config.queries, -1).numpy(),
            amortised=torch.cat(amortised, 1).numpy(),
        )
    if not (folder / "float64.npz").is_file():
        few, middle = examples.rows(0, config.float64_images), moved[:: config.queries]
        double = Examples(few.role, few.ids, few.latents.double(), few.text.double())
        single = mean_losses([source.denoiser, *middle], schedule, few, config.draws)
        exact = mean_losses([m.double() for m in (source.denoiser, *middle)], schedule, double, config.draws)
        save_npz(folder / "float64.npz", single=single.numpy(), double=exact.numpy())


def summarise(folder: Path, config: ExactConfig) -> list[dict]:
    """One row for each step size."""
    pieces = [load_npz(path, ("before", "after", "amortised")) for path in sorted(folder.glob("exact_*.npz"))]
    before, after, amortised = (
        np.concatenate([p[key] for p in pieces], -1) for key in ("before", "after", "amortised")
    )
    noise = load_npz(folder / "float64.npz", ("single", "double"))
    levels, rows = default_levels("emoji", len(before)), []
    for index, step in enumerate(config.steps):
        change = after[index] - before
        single, double = (noise[key][1 + index] - noise[key][0] for key in ("single", "double"))
        shared = overlap(amortised, from_scores(change).rank, levels).mean(0)
        order = spearman(amortised, from_scores(change).rank)
        rows.append(
            {
                "step": step,
                "spearman": round(float(order.mean()), 4),
                "spearman_min": round(float(order.min()), 4),
                "overlap": dict(zip(map(str, levels), shared.round(4).tolist(), strict=True)),
                "relative_change": float(np.abs(change).mean() / before.mean()),
                "float32_noise": float(np.std(single - double) / np.std(double)),
            }
        )
        print(rows[-1])
    return rows


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.exact", description=__doc__.splitlines()[0])
    add_testbed_flags(parser)
    parser.add_argument("--queries", type=int, default=ExactConfig.queries, help="the first so many test queries")
    parser.add_argument("--steps", type=float, nargs="+", default=ExactConfig.steps, help="values of α in eq. 1")
    args = parser.parse_args(argv)
    testbed, device = testbed_from(args), best_device()
    config = ExactConfig(args.queries, tuple(args.steps))
    folder = testbed.data / "cache" / f"exact_{config.queries}_{'_'.join(map(str, config.steps))}"
    source, curvature = testbed.load_source(device), EKFAC.load(testbed.curvature).to(device)
    collect(source, curvature, testbed, folder, config)
    report = {"config": vars(config), "rows": summarise(folder, config), "environment": environment()}
    save_json(testbed.root / "results/teacher/exact.json", report)


if __name__ == "__main__":
    sys.exit(main())
