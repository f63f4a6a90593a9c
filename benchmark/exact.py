"""How close amortised AbU+ is to the exact loss change, for several step sizes, on the full training set.

    python -m benchmark.exact --queries 10 --steps 0.01 0.1 1      # resumable; results/teacher/exact.{json,png}

All sides use the same query gradient and the same draws of (t, ε) for each training image, so what is compared is the
expansion alone: its first term ⟨w, ∇𝓛⟩, and both terms (`abu.second_order`), with ‖Jw‖² as it is when so many random
signs are drawn that their noise is gone. For each step: Spearman and overlap at L with the exact ranking, the size of
the loss change against the loss, and the floating-point noise of the exact form (float32 against float64 on a sample of
the images).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from abu.amortised import Examples
from abu.curvature import Curvature
from abu.diffusion_loss import NoiseSchedule
from abu.draws import DrawConfig
from abu.influence import ExactInfluence, all_draws, mean_losses
from abu.keyvalue import OutputGradients
from abu.loss_draws import LossDraws
from abu.plan import Collection
from abu.second_order import loss_change_at
from abu.stages import hashes
from abu.sweep import SweepConfig
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from abu.unlearn import UnlearnConfig, moved_model, natural_step, query_gradient
from benchmark.drawing import plt, save_figure
from fastgda.core import best_device, command_line, command_parser, environment, load_npz, save_json, save_npz
from fastgda.dataset import default_levels
from fastgda.metrics import overlap, spearman, standard_error
from fastgda.rankings import from_scores

SHARD, BATCH = 512, 64
SMALL = 1e-3
"""α of the step by which ‖Jw‖² is measured."""


@dataclass(frozen=True)
class ExactConfig:
    """What is compared."""

    queries: int = 10
    """The first so many test queries."""
    steps: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Values of α in eq. 1."""
    bins: int = 1
    """Timestep bins, one draw of (t, ε) in each for every training image."""
    query_draws: int = 40
    """Draws per bin for the query's gradient."""
    float64_images: int = 256
    """Images on which float32 is compared with float64."""

    @property
    def draws(self) -> LossDraws:
        """Draws of the training images."""
        return LossDraws(timesteps=self.bins, antithetic=False)


def first_order(
    model: nn.Module,
    schedule: NoiseSchedule,
    curvature: Curvature,
    gradients: Tensor,
    examples: Examples,
    draws: DrawConfig,
) -> Tensor:
    """⟨F⁻¹∇𝓛(ẑ), ∇𝓛(z)⟩ [Q, B] with the draws that the exact form uses; `gradients` [Q, out, in] in the eigenbasis."""
    engine, factors = OutputGradients(model), curvature.shared()
    scaled = (gradients / factors.damped()).flatten(1)
    total = torch.zeros(len(gradients), len(examples.ids))
    for timesteps, noise in all_draws(draws, examples, 0):
        output = engine(*schedule.noised(examples.latents, noise, timesteps), timesteps, examples.text)[0]
        total += (scaled @ factors.rotated_gradients(output, examples.text).flatten(1).mT).float().cpu()
    return total / (draws.bins * draws.draws)


@torch.no_grad()
def output_changes(
    model: nn.Module, moved: list[nn.Module], schedule: NoiseSchedule, examples: Examples, draws: DrawConfig
) -> Tensor:
    """Mean square over elements of the change of the output, E ‖f_moved − f‖² / n [Q, B], for each of the models."""
    total = torch.zeros(len(moved), len(examples.ids))
    for timesteps, noise in all_draws(draws, examples, 0):
        noisy, _ = schedule.noised(examples.latents, noise, timesteps)
        output = model(noisy, timesteps, examples.text).sample
        for row, other in zip(total, moved, strict=True):
            row += (other(noisy, timesteps, examples.text).sample - output).square().flatten(1).mean(1).cpu()
    return total / (draws.bins * draws.draws)


def collect(exact: ExactInfluence, testbed: Testbed, folder: Path, config: ExactConfig) -> None:
    """Writes a piece for every shard of training images: before [B], after [steps, Q, B], first and second [Q, B]."""
    model, schedule, curvature = exact.model, exact.schedule, exact.curvature
    device = exact.sweep.device
    examples, queries = testbed.training_examples(device), testbed.query_examples("test", device)
    drawing, draws = DrawConfig(config.bins, config.query_draws), config.draws.stratified(len(schedule))
    gradients = [
        query_gradient(model, schedule, curvature, queries.rows(i, i + 1), drawing)
        for i in tqdm(range(config.queries), desc="query gradients", unit="query")
    ]
    changes = [
        natural_step(curvature, gradient, step / len(examples.ids)) for step in config.steps for gradient in gradients
    ]
    rotated = torch.stack([gradient[0] for gradient in gradients])
    # so small that the output moves in proportion, and a hundred times what float32 rounds away
    small = SMALL / len(examples.ids)
    nearby = [moved_model(model, natural_step(curvature, gradient, small)) for gradient in gradients]
    for start in tqdm(range(0, len(examples.ids), SHARD), desc="exact", unit="shard"):
        path = folder / f"exact_{start:06d}.npz"
        if path.is_file():
            continue
        batch = examples.rows(start, start + SHARD)
        losses = exact.sweep.losses(batch.ids, [None, *changes])[..., 0]
        parts = batch.batches(BATCH)
        first = [first_order(model, schedule, curvature, rotated, part, draws) for part in parts]
        second = [output_changes(model, nearby, schedule, part, draws) / small**2 for part in parts]
        save_npz(
            path,
            before=losses[0],
            after=losses[1:].reshape(len(config.steps), config.queries, -1),
            first=torch.cat(first, 1).numpy(),
            second=torch.cat(second, 1).numpy(),
        )
    if not (folder / "float64.npz").is_file():
        few, middle = examples.rows(0, config.float64_images), changes[:: config.queries]
        single = exact.sweep.losses(few.ids, [None, *middle])[..., 0]
        double = Examples(few.role, few.ids, few.latents.double(), few.text.double())
        models = [model, *(moved_model(model, change) for change in middle)]
        precise = mean_losses([m.double() for m in models], schedule, double, draws)
        save_npz(folder / "float64.npz", single=single, double=precise.numpy())


def summarise(folder: Path, config: ExactConfig) -> list[dict]:
    """One row for each step size."""
    keys = ("before", "after", "first", "second")
    pieces = [load_npz(path, keys) for path in sorted(folder.glob("exact_*.npz"))]
    before, after, first, second = (np.concatenate([p[key] for p in pieces], -1) for key in keys)
    noise = load_npz(folder / "float64.npz", ("single", "double"))
    images, rows = len(before), []
    for index, step in enumerate(config.steps):
        change = after[index] - before
        single, double = (noise[key][1 + index] - noise[key][0] for key in ("single", "double"))
        rows.append(
            {
                "step": step,
                "first_term": agreement(first, change),
                "both_terms": agreement(loss_change_at(first, second, step, images), change),
                "relative_change": float(np.abs(change).mean() / before.mean()),
                "float32_noise": float(np.std(single - double) / np.std(double)),
            }
        )
        print(rows[-1])
    return rows


def agreement(amortised: np.ndarray, exact: np.ndarray) -> dict:
    """Spearman and overlap at L of the rankings of two scores [Q, N]: means over queries, errors, every query's."""
    levels, truth = default_levels("emoji", exact.shape[1]), from_scores(exact).rank
    shared, order = overlap(amortised, truth, levels), spearman(amortised, truth)

    def by_level(values: np.ndarray) -> dict[str, float]:
        return dict(zip(map(str, levels), values.round(4).tolist(), strict=True))

    return {
        "spearman": round(float(order.mean()), 4),
        "spearman_standard_error": round(float(standard_error(order)), 4),
        "spearman_min": round(float(order.min()), 4),
        "spearman_by_query": order.round(4).tolist(),
        "overlap": by_level(shared.mean(0)),
        "overlap_standard_error": by_level(standard_error(shared)),
    }


def figure(rows: list[dict]) -> Figure:
    """Agreement with the exact form against the step, for one term and for both."""
    drawing, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    steps, level = [row["step"] for row in rows], next(iter(rows[0]["both_terms"]["overlap"]))
    for terms in ("first_term", "both_terms"):
        found = [row[terms] for row in rows]
        label = terms.replace("_", " ")
        order, errors = ([one[key] for one in found] for key in ("spearman", "spearman_standard_error"))
        axes[0].errorbar(steps, order, errors, marker="o", label=label)
        shared, spread = ([one[key][level] for one in found] for key in ("overlap", "overlap_standard_error"))
        axes[1].errorbar(steps, shared, spread, marker="o", label=label)
    axes[0].set(xscale="log", xlabel="step α", ylabel="Spearman with the exact form", ylim=(0, 1.02))
    axes[1].set(xscale="log", xlabel="step α", ylabel=f"overlap of the first {level}")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    return drawing


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.exact", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--queries", type=int, default=ExactConfig.queries, help="the first so many test queries")
    parser.add_argument("--steps", type=float, nargs="+", default=ExactConfig.steps, help="values of α in eq. 1")
    args = parser.parse_args(argv)
    testbed, config = testbed_from(args), ExactConfig(args.queries, tuple(args.steps))
    exact = ExactInfluence.of(testbed, UnlearnConfig(), config.draws, SweepConfig(), best_device())
    collection = Collection(testbed.data / "cache" / f"exact_{config.queries}_{'_'.join(map(str, config.steps))}")
    files = [testbed.source / "denoiser.safetensors", testbed.curvature, testbed.data / "query_test/latents.npy"]
    files += [testbed.data / "trainset" / name for name in ("latents.npy", "text_embeddings.npy")]
    collection.claim(config, hashes(testbed, files), "python -m benchmark.exact")
    collect(exact, testbed, collection.folder, config)
    rows = summarise(collection.folder, config)
    results = testbed.root / "results/teacher"
    save_json(results / "exact.json", {"config": vars(config), "rows": rows, "environment": environment()})
    save_figure(figure(rows), results / "exact.png")


if __name__ == "__main__":
    sys.exit(main())
