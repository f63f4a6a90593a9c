"""EK-FAC factors fitted by us and by Kronfluence, on the same model, data and layers: time, and how equal they are.

    python -m benchmark.factors --sizes tiny emoji             # results/teacher/factors.json

Both read the same noisy latents with the same batch size and write Kronfluence's folder; runs alternate, after one of
each that is not counted. Differences are the largest over layers, relative to Kronfluence's factors in norm: of the
corrected eigenvalues, and of F⁻¹∇W for a random ∇W, which does not depend on the signs of eigenvectors. The peak of the
resident memory is measured in a process for each side, beside one that only loads the model and the data.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kronfluence import Analyzer, FactorArguments, Task, prepare_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from abu.curvature import Curvature
from abu.diffusion_loss import example_losses
from abu.draws import DrawConfig, draw
from abu.fisher import CurvatureConfig, fit_curvature
from abu.kronfluence_files import load_curvature, save_curvature
from abu.layers import PATTERNS, Layer, matrix_shape, select_layers
from abu.models import DiffusionConfig, build_denoiser, noise_schedule
from abu.peak import forget_peak, peak_bytes
from abu.testbed import TESTBEDS
from fastgda.core import ROOT, command_line, command_parser, environment, save_json

BATCH = 64


@dataclass(frozen=True)
class Size:
    """A model with random weights, and how much random data it sees."""

    model: DiffusionConfig
    tokens: int
    """Text tokens of a caption, none of them padding: Kronfluence counts padding, we do not."""
    images: int


SIZES = {
    "tiny": Size(DiffusionConfig(sample_size=4, latent_channels=2, channels=(16, 16), heads=2, text_width=32), 8, 128),
    "emoji": Size(TESTBEDS["emoji"].diffusion, 16, 1024),
    "wide": Size(DiffusionConfig(16, 4, channels=(128, 256), heads=8, text_width=1024), 77, 256),
}
"""`wide` has the text of Stable Diffusion 2."""


class DenoisingTask(Task):
    """The sum of example losses, whose output gradients are those of each example's own loss."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The batch is (noisy, target, timesteps, text)."""
        return example_losses(model, *batch).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The same."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """The chosen layers."""
        return self.names


def analyzer_of(model: nn.Module, names: Iterable[str], folder: Path) -> Analyzer:
    """Kronfluence for a copy of `model`; its factors go to `folder/kronfluence/factors_<name>`."""
    task = DenoisingTask(names)
    prepared = prepare_model(copy.deepcopy(model), task)
    return Analyzer(
        "kronfluence", prepared, task, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=str(folder)
    )


def differences(ours: Curvature, theirs: Curvature) -> dict[str, float]:
    """Largest relative difference over layers, in norm; `theirs` in the order of our layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {n: (s, g.eigenvalues.shape[-1]) for g in ours.groups for n, s in zip(g.names, g.sizes, strict=True)}
    gradients = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    mine, other = ours.natural_gradients(gradients), theirs.natural_gradients(gradients)
    values, reference = (
        {n: s for g in factors.groups for n, s in zip(g.names, g.eigenvalues.split(g.sizes), strict=True)}
        for factors in (ours, theirs)
    )
    return {
        "eigenvalues": max(_relative(values[name], reference[name]) for name in shapes),
        "natural_gradient": max(_relative(mine[name], other[name]) for name in shapes),
    }


@dataclass(frozen=True)
class Sides:
    """The two ways to the same factors, on one model and data."""

    ours: Callable[[], None]
    """Fits and writes `folder/ours`."""
    theirs: Callable[[], None]
    """Fits and writes `folder/kronfluence/factors_theirs`."""
    layers: dict[str, Layer]


def sides(size: Size, layers: str, folder: Path) -> Sides:
    """Both ways, for random weights and data."""
    torch.manual_seed(0)
    denoiser, schedule = build_denoiser(size.model).eval().requires_grad_(False), noise_schedule(size.model)
    shape = (size.model.latent_channels, size.model.sample_size, size.model.sample_size)
    latents, text = torch.randn(size.images, *shape), torch.randn(size.images, size.tokens, size.model.text_width)
    config = CurvatureConfig(layers=layers)  # type: ignore[arg-type] # a choice of the command line
    draws = DrawConfig(bins=1, draws=1, antithetic=False)
    timesteps, noise = draw(draws, "curvature", list(range(size.images)), 0, 0, 0, shape)
    dataset = TensorDataset(*schedule.noised(latents, noise, timesteps), timesteps, text)
    chosen = select_layers(denoiser, layers)
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    # made by the first fit, which is not timed
    analyzer = functools.cache(lambda: analyzer_of(denoiser, chosen, folder))

    def fit_ours() -> None:
        curvature = fit_curvature(denoiser, schedule, latents, text, config, batch_size=BATCH)
        save_curvature(folder / "ours", curvature)

    def fit_theirs() -> None:
        options = {"per_device_batch_size": BATCH, "factor_args": arguments, "overwrite_output_dir": True}
        analyzer().fit_all_factors("theirs", dataset, **options)

    return Sides(fit_ours, fit_theirs, chosen)


def compare(name: str, layers: str, repeats: int, folder: Path) -> dict[str, Any]:
    """One row of the report."""
    size = SIZES[name]
    both = sides(size, layers, folder)
    seconds = [(_timed(both.ours), _timed(both.theirs)) for _ in range(repeats + 1)][1:]
    ours, theirs = (statistics.median(side) for side in zip(*seconds, strict=True))
    found = [load_curvature(path) for path in (folder / "ours", folder / "kronfluence/factors_theirs")]
    base, *peaks = (peak_in_process(name, layers, side) for side in ("none", "ours", "theirs"))
    return {
        "layers": layers,
        "weights": sum(rows * columns for rows, columns in map(matrix_shape, both.layers.values())),
        "images": size.images,
        "tokens": size.tokens,
        "repeats": repeats,
        "seconds": round(ours, 3),
        "kronfluence_seconds": round(theirs, 3),
        "ratio": round(theirs / ours, 2),
        "largest_relative_difference": differences(found[0], found[1].for_layers(both.layers)),
        "peak_bytes": {"model_and_data": base, "ours": peaks[0], "kronfluence": peaks[1]},
    }


def peak(name: str, layers: str, side: str) -> int:
    """Peak resident memory in bytes of this process while it fits once, or does not at all with "none"."""
    with tempfile.TemporaryDirectory() as folder:
        both = sides(SIZES[name], layers, Path(folder))
        forget_peak()
        if side != "none":
            {"ours": both.ours, "theirs": both.theirs}[side]()
    return peak_bytes()


def peak_in_process(name: str, layers: str, side: str) -> int:
    """`peak` of a process of its own."""
    command = [sys.executable, "-m", "benchmark.factors", "--peak", name, layers, side]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.factors", __doc__)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["tiny", "emoji"])
    parser.add_argument("--layers", choices=tuple(PATTERNS), default="cross-attn-kv")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/teacher/factors.json")
    parser.add_argument("--peak", nargs=3, metavar=("SIZE", "LAYERS", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak is not None:
        print(json.dumps(peak(*args.peak)))
        return
    rows = {}
    for name in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = compare(name, args.layers, args.repeats, Path(folder))
        print(name, rows[name])
    save_json(args.output, {"threads": torch.get_num_threads(), "sizes": rows, "environment": environment()})


if __name__ == "__main__":
    sys.exit(main())
