"""Fits the curvature of a source model's layers, and shows its spectrum.

    python -m abu.fisher fit                                    # EK-FAC of the key/value layers (AbU+), the default
    python -m abu.fisher fit --kind diagonal --layers attn      # diagonal Fisher (AbU) of all attention projections
    python -m abu.fisher fit --source data/coco/model.bin --trainset data/coco/trainset --output data/coco/ekfac_fisher
    python -m abu.fisher fit --source stable-diffusion-v1-4/ --trainset laion-encoded --output sd-ekfac
    python -m abu.fisher inspect weights/emoji_ldm/ekfac.safetensors --output spectrum.png
    python -m abu.fisher convert weights/emoji_ldm/ekfac.safetensors kronfluence_factors

EK-FAC takes two sweeps over the training set with the same draws of (t, ε): the first sums the covariances A and B, the
second the corrected eigenvalues S of single draws' gradients. The diagonal Fisher takes one. Output gradients of the
first sweep that fit into memory are kept, so that the second needs no network for them.

`--source` takes COCO's model.bin or a pipeline of diffusers (folder, or name on the hub), and `--trainset` the folder
that abu.encode_pictures wrote for it; draw k of a picture uses its caption k and, in turn, its flipped view.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.curvature import CHUNK, DAMPING, EKFAC, Curvature, DiagonalFisher, eigenbasis
from abu.diffusion_loss import NoiseSchedule, at_least_float32
from abu.draws import DrawConfig, draw
from abu.encoded import LATENTS, EncodedPictures
from abu.kronfluence_files import load_curvature, save_curvature
from abu.layers import PATTERNS, GroupGradients, LayerGradients, LayerPattern, select_layers
from abu.models import SourceModel
from abu.pipelines import denoiser_inputs, open_source, source_hashes
from abu.spectrum import draw_spectra, spectra
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from fastgda.core import best_device, command_line, command_parser, sha256_file, write_manifest
from fastgda.flags import add_flags, from_flags

STANDARD = ("ekfac", "cross-attn-kv")
"""The factors that fit into one file, because their layers read one input."""
KEPT_BYTES = 2**30
"""Gradients of the first sweep that are kept in memory for the second."""


@dataclass(frozen=True)
class CurvatureConfig:
    """What the factors are, and what they are estimated from."""

    kind: Literal["ekfac", "diagonal"] = "ekfac"
    """EK-FAC (AbU+) or the diagonal Fisher (AbU)."""
    layers: LayerPattern = "cross-attn-kv"
    """Which layers: text key/value projections of cross-attention, all its projections, all attention, or every Linear
    and Conv2d."""
    draws: int = 1
    """Draws of (t, ε) for each training image, from random timesteps."""
    damping: float = DAMPING
    """λ as a share of the mean of S."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.kind not in ("ekfac", "diagonal") or self.draws < 1 or not self.damping > 0:
            raise ValueError(
                "expected kind ekfac or diagonal, at least one draw and a positive damping, "
                f"found {self.kind!r}, {self.draws} and {self.damping}"
            )


class CovarianceSums:
    """Running sums of aaᵀ and, per layer, gᵀg over positions, in float64."""

    def __init__(self, width: int, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes = sizes
        self.inputs = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.outputs = [torch.zeros(s, s, dtype=torch.float64, device=device) for s in sizes]
        self.positions = 0

    def add(self, gradients: Tensor, inputs: Tensor) -> None:
        """Adds a batch g [B, T, out], a [B, T, in]; positions with a = 0 (padding) are not counted."""
        used = inputs.abs().sum(-1) > 0
        a, g = at_least_float32(inputs[used]), gradients[used]
        self.inputs += (a.mT @ a).double()
        for total, piece in zip(self.outputs, g.split(self.sizes, dim=-1), strict=True):
            total += (piece.mT @ piece).double()
        self.positions += len(a)

    def bases(self, names: tuple[str, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(U_A, U_B of each layer); `ValueError` naming the layer if nothing was added or a sum is not finite."""
        if not self.positions:
            raise ValueError(f"{names[0]}: expected at least one position whose input is not zero, found none")
        basis_in = eigenbasis(self.inputs / self.positions, f"input of {names[0]}")[1]
        outputs = zip(names, self.outputs, strict=True)
        return basis_in, tuple(eigenbasis(total / self.positions, f"output of {name}")[1] for name, total in outputs)


def fit_bases(batches: Iterable[list[GroupGradients]]) -> dict[tuple[str, ...], tuple[Tensor, tuple[Tensor, ...]]]:
    """Names of a group -> (U_A, U_B of each layer), in float64."""
    sums: dict[tuple[str, ...], CovarianceSums] = {}
    for groups in batches:
        for group in groups:
            if group.names not in sums:
                device = group.outputs.device
                sums[group.names] = CovarianceSums(group.inputs.shape[-1], group.sizes, device)
            sums[group.names].add(group.outputs, group.inputs)
    return {names: total.bases(names) for names, total in sums.items()}


def fit_factors(batches: Iterable[list[GroupGradients]], config: CurvatureConfig, dtype: torch.dtype) -> Curvature:
    """Factors in `dtype` from batches of gradients, which are read twice for EK-FAC and once for the diagonal Fisher.

    Raises `ValueError` naming the layer whose gradients are not finite, or all zero: it has no curvature to invert.
    """
    bases = fit_bases(batches) if config.kind == "ekfac" else {}
    factors: dict[tuple[str, ...], DiagonalFisher] = {}
    totals: dict[tuple[str, ...], Tensor] = {}
    count = 0
    for groups in batches:
        count += len(groups[0].outputs)
        for group in groups:
            names = group.names
            if names not in factors:
                shape = (sum(group.sizes), group.inputs.shape[-1])
                totals[names] = torch.zeros(shape, dtype=torch.float64, device=group.outputs.device)
                factors[names] = _empty(group, totals[names], bases.get(names), config.damping).to(dtype)
            for g, a in zip(group.outputs.split(CHUNK), group.inputs.split(CHUNK), strict=True):
                totals[names] += factors[names].rotated_gradients(g, at_least_float32(a)).square().sum(0)
    for names, factor in factors.items():
        for name, total in zip(names, totals[names].split(factor.sizes), strict=True):
            if not (torch.isfinite(total).all() and total.sum() > 0):
                raise ValueError(f"{name}: expected finite gradients that are not all zero, found others")
    fitted = (replace(factor, eigenvalues=(totals[names] / count).to(dtype)) for names, factor in factors.items())
    return Curvature(tuple(fitted), count)


def _empty(
    group: GroupGradients, zeros: Tensor, bases: tuple[Tensor, tuple[Tensor, ...]] | None, damping: float
) -> DiagonalFisher:
    diagonal = DiagonalFisher(sizes=group.sizes, eigenvalues=zeros, damping=damping, names=group.names)
    return diagonal if bases is None else EKFAC(**vars(diagonal), basis_in=bases[0], basis_out=bases[1])


class TrainingGradients:
    """Gradients of every training image and draw, batch by batch; each iteration gives the same numbers."""

    def __init__(
        self,
        engine: LayerGradients,
        schedule: NoiseSchedule,
        latents: Tensor,
        text: Tensor,
        config: CurvatureConfig,
        batch_size: int,
        kept_bytes: int,
    ) -> None:
        self.engine, self.schedule, self.latents = engine, schedule, latents
        self.text = text if text.dim() == 4 else text[:, None]
        # Every timestep lies in one bin of the full width, so a draw is uniform over all of them.
        self.draws = DrawConfig(bins=1, draws=config.draws, antithetic=False, timesteps=len(schedule), seed=config.seed)
        self.batches = [
            (range(start, min(start + batch_size, len(text))), index)
            for start in range(0, len(text), batch_size)
            for index in range(config.draws)
        ]
        self.kept: list[list[GroupGradients]] = []
        self.room = kept_bytes

    def __iter__(self) -> Iterator[list[GroupGradients]]:
        for place, (rows, index) in enumerate(tqdm(self.batches, desc="curvature", unit="batch")):
            if place < len(self.kept):
                yield self.kept[place]
                continue
            groups = self._compute(rows, index)
            self.room -= sum(group.inputs.nbytes + group.outputs.nbytes for group in groups)
            if self.room >= 0:
                self.kept.append(groups)
            yield groups

    def _compute(self, rows: range, index: int) -> list[GroupGradients]:
        device = next(self.engine.model.parameters()).device
        images, captions = self.text.shape[:2]
        first = index % (len(self.latents) // images) * images
        x = at_least_float32(self.latents[first + rows.start : first + rows.stop].to(device))
        tokens = at_least_float32(self.text[rows.start : rows.stop, index % captions].to(device))
        timesteps, noise = draw(self.draws, "curvature", list(rows), 0, 0, index, tuple(x.shape[1:]))
        timesteps, noise = timesteps.to(device), noise.to(x)
        groups, losses = self.engine(*self.schedule.noised(x, noise, timesteps), timesteps, tokens)
        if not torch.isfinite(losses).all():
            example = rows[int((~torch.isfinite(losses)).nonzero()[0])]
            raise ValueError(f"training image {example}: expected a finite loss, found {losses[example - rows[0]]}")
        return groups


def fit_curvature(
    denoiser: nn.Module,
    schedule: NoiseSchedule,
    latents: Tensor,
    text: Tensor,
    config: CurvatureConfig,
    *,
    batch_size: int = 64,
    kept_bytes: int = KEPT_BYTES,
) -> Curvature:
    """Factors from the whole training set.

    latents [N, c, h, w], or [2N, c, h, w] with the flipped images behind; token states [N, T, d], or [N, C, T, d] with
    several captions. Draw k takes caption k mod C, and the flipped image where k is odd and there is one.
    """
    engine = LayerGradients(denoiser, config.layers)
    kept = kept_bytes if config.kind == "ekfac" else 0
    batches = TrainingGradients(engine, schedule, latents, text, config, batch_size, kept)
    return fit_factors(batches, config, at_least_float32(latents[:1]).dtype)


def fit_testbed(testbed: Testbed, source: SourceModel, config: CurvatureConfig, path: Path) -> Curvature:
    """Fits the curvature of a testbed's model and writes it to `path` (see `save_curvature`), with its manifest."""
    if path.suffix == ".safetensors" and (config.kind, config.layers) != STANDARD:
        raise ValueError(f"{path}: expected a folder for {config.kind} factors of {config.layers}, found a file's name")
    examples = testbed.training_examples(source.device)
    curvature = fit_curvature(source.denoiser, source.schedule, examples.latents, examples.text, config)
    files = save_curvature(path, curvature)
    inputs = {"denoiser": sha256_file(testbed.source / "denoiser.safetensors")}
    write_manifest(path, config, command="python -m abu.fisher fit", inputs=inputs, files=files)
    return curvature


def fit_encoded(source: str, trainset: Path, config: CurvatureConfig, path: Path) -> Curvature:
    """Fits the curvature of any source model on encoded pictures and writes it to the folder `path`."""
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: expected a folder for the factors of --source, found a file's name")
    encoded = EncodedPictures.open(trainset)
    model = open_source(source, best_device())
    encoded.require_fit(trainset, *denoiser_inputs(model.denoiser))
    curvature = fit_curvature(model.denoiser, model.schedule, *encoded.tensors(), config)
    files = save_curvature(path, curvature)
    inputs = source_hashes(source) | {"latents": sha256_file(trainset / LATENTS)}
    write_manifest(path, config, command="python -m abu.fisher fit", inputs=inputs, files=files)
    return curvature


def run_fit(args: argparse.Namespace) -> None:
    """Fits and prints the spectrum."""
    config = from_flags(CurvatureConfig, args)
    if args.source:
        if not (args.trainset and args.output):
            raise ValueError("--source: expected --trainset and --output with it, found neither or one of them")
        print(*spectra(fit_encoded(args.source, args.trainset, config, args.output)), args.output, sep="\n")
        return
    testbed = testbed_from(args)
    folder = testbed.source / f"{config.kind}-{config.layers}"
    path = args.output or (testbed.curvature if (config.kind, config.layers) == STANDARD else folder)
    curvature = fit_testbed(testbed, testbed.load_source(best_device()), config, path)
    print(*spectra(curvature), path, sep="\n")


def run_inspect(args: argparse.Namespace) -> None:
    """Prints and draws the spectrum of factors on disk."""
    layers = list(spectra(load_curvature(args.path)))
    draw_spectra(layers, args.output)
    print(*layers, args.output, sep="\n")


def run_convert(args: argparse.Namespace) -> None:
    """Writes factors in the other layout, after checking that they are those of the testbed's model."""
    layers = select_layers(testbed_from(args).load_source(torch.device("cpu")).denoiser, args.layers)
    save_curvature(args.target, load_curvature(args.source).for_layers(layers))
    print(args.target)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m abu.fisher", __doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    fit = stages.add_parser(
        "fit",
        help="estimate the factors on a testbed's training set",
        epilog="example: python -m abu.fisher fit --kind diagonal --layers attn --output diagonal",
    )
    add_testbed_flags(fit)
    add_flags(fit, CurvatureConfig)
    fit.add_argument("--source", help="COCO's model.bin or a pipeline of diffusers, in place of a testbed's model")
    fit.add_argument("--trainset", type=Path, help="folder that abu.encode_pictures wrote for --source")
    fit.add_argument(
        "--output", type=Path, help="a folder in Kronfluence's layout, or for the default a .safetensors file"
    )
    fit.set_defaults(run=run_fit)
    inspect = stages.add_parser(
        "inspect",
        help="print and draw the spectrum of each layer",
        epilog="example: python -m abu.fisher inspect weights/emoji_ldm/ekfac.safetensors --output spectrum.png",
    )
    inspect.add_argument("path", type=Path, help="a .safetensors file or a folder in Kronfluence's layout")
    inspect.add_argument("--output", type=Path, default=Path("spectrum.png"), help="the picture (default: %(default)s)")
    inspect.set_defaults(run=run_inspect)
    convert = stages.add_parser(
        "convert",
        help="from one file to a folder in Kronfluence's layout, or back",
        epilog="example: python -m abu.fisher convert weights/emoji_ldm/ekfac.safetensors kronfluence_factors",
    )
    add_testbed_flags(convert)
    convert.add_argument("--layers", choices=tuple(PATTERNS), default="cross-attn-kv", help="which layers they are of")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.set_defaults(run=run_convert)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
