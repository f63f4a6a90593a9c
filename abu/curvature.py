"""EK-FAC curvature of the key/value layers (George et al. 2018; paper, section 3.2 and appendix on AbU+).

Per layer with input a and output gradient g:  A = E[a aᵀ], B = E[g gᵀ] over tokens; U_A, U_B their eigenvectors;
S = E[(U_Bᵀ ∇W U_A)²] over examples (image, ε, t);
F⁻¹∇W ≈ U_B ((U_Bᵀ ∇W U_A) / (S + λ)) U_Aᵀ with λ = damping · mean(S).
A and U_A are shared, because all key/value layers read the same text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from abu.diffusion_loss import NoiseSchedule
from abu.draws import DrawConfig, draw
from abu.keyvalue import OutputGradients
from fastgda.core import atomic_path, require_file

DAMPING = 0.1


def eigenbasis(covariance: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(eigenvalues ascending, eigenvectors in columns) of a symmetric matrix, in float64.

    Raises `ValueError` naming `name` if the matrix is not finite.
    """
    if not torch.isfinite(covariance).all():
        raise ValueError(f"{name}: expected a finite covariance, found NaN or infinity")
    symmetric = covariance.double()
    values, vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
    return values, vectors


@dataclass(frozen=True)
class EKFAC:
    """Eigenbases and corrected eigenvalues of the key/value layers."""

    sizes: tuple[int, ...]
    """Output width of each layer; they add up to `out`."""
    basis_in: Tensor
    """U_A [in, in]."""
    basis_out: tuple[Tensor, ...]
    """U_B of each layer [size, size]."""
    eigenvalues: Tensor
    """S [out, in], the layers one below the other."""
    damping: float = DAMPING

    def to(self, target: torch.device | torch.dtype) -> EKFAC:
        """The same factors on another device or in another type."""
        moved = tuple(basis.to(target) for basis in self.basis_out)
        return EKFAC(self.sizes, self.basis_in.to(target), moved, self.eigenvalues.to(target), self.damping)

    def damped(self) -> Tensor:
        """S + λ [out, in], with λ = damping · mean(S) of each layer."""
        return torch.cat([s + self.damping * s.mean() for s in self.eigenvalues.split(self.sizes)])

    def rotate_out(self, gradients: Tensor) -> Tensor:
        """Output gradients [..., out] into the eigenbases U_B, layer by layer."""
        pieces = gradients.split(self.sizes, dim=-1)
        return torch.cat([piece @ basis for piece, basis in zip(pieces, self.basis_out, strict=True)], dim=-1)

    def rotated_gradients(self, gradients: Tensor, tokens: Tensor) -> Tensor:
        """U_Bᵀ ∇W U_A [B, out, in] of each example, from g [B, T, out] and a [B, T, in]."""
        return self.rotate_out(gradients).mT @ (tokens @ self.basis_in)

    def natural_gradient(self, rotated: Tensor) -> Tensor:
        """F⁻¹∇W [..., out, in] in the original basis, from a gradient in the eigenbasis."""
        scaled = (rotated / self.damped()) @ self.basis_in.mT
        pieces = scaled.split(self.sizes, dim=-2)
        return torch.cat([basis @ piece for piece, basis in zip(pieces, self.basis_out, strict=True)], dim=-2)

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        tensors = {
            "basis_in": self.basis_in,
            "eigenvalues": self.eigenvalues,
            "damping": torch.tensor([self.damping], dtype=torch.float64),
        }
        tensors |= {f"basis_out.{index}": basis.contiguous() for index, basis in enumerate(self.basis_out)}
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)

    @staticmethod
    def load(path: Path) -> EKFAC:
        """Reads what `save` wrote; `ValueError` if the file is missing or damaged."""
        try:
            tensors = load_file(require_file(path, "python -m abu.curvature"))
        except SafetensorError as error:
            raise ValueError(f"{path}: expected EK-FAC factors, found a damaged file ({error})") from error
        count = sum(name.startswith("basis_out.") for name in tensors)
        basis_out = tuple(tensors[f"basis_out.{index}"] for index in range(count))
        sizes = tuple(len(basis) for basis in basis_out)
        return EKFAC(sizes, tensors["basis_in"], basis_out, tensors["eigenvalues"], float(tensors["damping"]))


class CovarianceSums:
    """Running sums of aaᵀ and, per layer, gᵀg over tokens, in float64."""

    def __init__(self, width: int, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes = sizes
        self.inputs = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.outputs = [torch.zeros(s, s, dtype=torch.float64, device=device) for s in sizes]
        self.tokens = 0

    def add(self, gradients: Tensor, tokens: Tensor) -> None:
        """Adds a batch g [B, T, out], a [B, T, in]; tokens that are padding (a = 0) are not counted."""
        used = tokens.abs().sum(-1) > 0
        a, g = tokens[used], gradients[used]
        self.inputs += (a.mT @ a).double()
        for total, piece in zip(self.outputs, g.split(self.sizes, dim=-1), strict=True):
            total += (piece.mT @ piece).double()
        self.tokens += len(a)

    def bases(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(U_A, U_B of each layer)."""
        if not self.tokens:
            raise ValueError("curvature: expected at least one text token, found none")
        basis_in = eigenbasis(self.inputs / self.tokens, "input covariance")[1]
        outputs = (eigenbasis(total / self.tokens, f"layer {i}") for i, total in enumerate(self.outputs))
        return basis_in, tuple(vectors for _, vectors in outputs)


@dataclass(frozen=True)
class CurvatureConfig:
    """What the factors are estimated from."""

    draws: int = 1
    """Draws of (t, ε) for each training image, from random timesteps."""
    damping: float = DAMPING
    seed: int = 0


def fit_curvature(
    denoiser: torch.nn.Module,
    schedule: NoiseSchedule,
    latents: Tensor,
    text: Tensor,
    config: CurvatureConfig,
    batch_size: int = 64,
) -> EKFAC:
    """Two sweeps over the training set (latents [N, c, h, w], token states [N, T, d]) with the same draws.

    The first sums the covariances A and B, the second the corrected eigenvalues S of single draws' gradients.
    """
    engine = OutputGradients(denoiser)
    device = next(denoiser.parameters()).device
    sizes = tuple(engine.sizes)
    # Every timestep lies in one bin of the full width, so a draw is uniform over all of them.
    draws = DrawConfig(bins=1, draws=config.draws, antithetic=False, timesteps=len(schedule), seed=config.seed)

    def sweep(title: str) -> Iterator[tuple[Tensor, Tensor]]:
        for start in tqdm(range(0, len(latents), batch_size), desc=title, unit="batch"):
            ids = list(range(start, min(start + batch_size, len(latents))))
            x, tokens = latents[ids].to(device), text[ids].to(device)
            for index in range(config.draws):
                timesteps, noise = draw(draws, "curvature", ids, 0, 0, index, tuple(x.shape[1:]))
                timesteps, noise = timesteps.to(device), noise.to(x)
                yield engine(*schedule.noised(x, noise, timesteps), timesteps, tokens)[0], tokens

    sums = CovarianceSums(text.shape[-1], sizes, device)
    for gradients, tokens in sweep("covariance"):
        sums.add(gradients, tokens)
    basis_in, basis_out = sums.bases()
    total = torch.zeros(sum(sizes), text.shape[-1], dtype=torch.float64, device=device)
    rotation = EKFAC(sizes, basis_in, basis_out, total, config.damping).to(text.dtype)
    count = 0
    for gradients, tokens in sweep("eigenvalues"):
        total += rotation.rotated_gradients(gradients, tokens).square().sum(0)
        count += len(gradients)
    return EKFAC(sizes, basis_in, basis_out, total / count, config.damping).to(text.dtype)
