"""Curvature of the chosen layers: EK-FAC (George et al. 2018; paper, section 3.2 and appendix on AbU+) and diagonal.

Per layer with input a and output gradient g:  A = E[a aᵀ], B = E[g gᵀ] over positions; U_A, U_B their eigenvectors;
S = E[(U_Bᵀ ∇W U_A)²] over examples (image, ε, t);
F⁻¹∇W ≈ U_B ((U_Bᵀ ∇W U_A) / (S + λ)) U_Aᵀ with λ = damping · mean(S).
The diagonal Fisher (AbU) is the same with U_A = U_B = I. Layers that read the same input form a group and share A and
U_A: all key/value layers read the same text tokens. Positions whose input is zero (padding) are left out of A and B,
because they contribute nothing to ∇W.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from abu.layers import Layer, matrix_shape
from fastgda.core import atomic_path, require_file

DAMPING = 0.1
CHUNK = 8
"""Examples whose gradients [out, in] are in memory at once: a few stay in the processor's cache."""


def eigenbasis(covariance: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(eigenvalues ascending, eigenvectors in columns) of a symmetric matrix, in float64.

    Raises `ValueError` naming `name` if the matrix is not finite.
    """
    if not torch.isfinite(covariance).all():
        raise ValueError(f"{name}: expected a finite covariance, found NaN or infinity")
    symmetric = covariance.double()
    values, vectors = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
    return values, vectors


@dataclass(frozen=True, kw_only=True)
class DiagonalFisher:
    """F ≈ diag(S) for the weights of layers that read the same input. Matrices [out, in], the layers side by side."""

    sizes: tuple[int, ...]
    """Output width of each layer; they add up to `out`."""
    eigenvalues: Tensor
    """S [out, in]."""
    damping: float = DAMPING
    names: tuple[str, ...] = ()
    """The layers; empty if the file that the factors come from does not say."""

    def to(self, target: torch.device | torch.dtype) -> DiagonalFisher:
        """The same factors on another device or in another type."""
        return replace(self, eigenvalues=self.eigenvalues.to(target))

    def damped(self) -> Tensor:
        """S + λ [out, in], with λ = damping · mean(S) of each layer."""
        return torch.cat([s + self.damping * s.mean() for s in self.eigenvalues.split(self.sizes)])

    def rotate(self, gradients: Tensor) -> Tensor:
        """Weight gradients [..., out, in] into the basis in which F is diagonal."""
        return gradients

    def rotate_back(self, rotated: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return rotated

    def rotated_gradients(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """∇W [B, out, in] of each example in that basis, from g [B, T, out] and a [B, T, in]."""
        return gradients.mT @ inputs

    def natural_gradient(self, rotated: Tensor) -> Tensor:
        """F⁻¹∇W [..., out, in] in the original basis, from a gradient in the basis of `rotate`."""
        return self.rotate_back(rotated / self.damped())

    def require_fit(self, layers: Mapping[str, Layer]) -> None:
        """Raises `ValueError` naming the first difference unless the factors are those of `layers`, in their order."""
        if len(self.sizes) != len(layers):
            raise ValueError(f"curvature: expected factors of {len(layers)} layers, found {len(self.sizes)}")
        for name, size, (wanted, layer) in zip(self.names or layers, self.sizes, layers.items(), strict=True):
            found, shape = (size, self.eigenvalues.shape[-1]), matrix_shape(layer)
            if (name, found) != (wanted, shape):
                raise ValueError(f"curvature: expected factors of {wanted} {shape}, found {name} {found}")

    def reordered(self, order: list[int]) -> DiagonalFisher:
        """The same factors with the layers in another order."""
        pieces = self.eigenvalues.split(self.sizes)
        return replace(
            self,
            sizes=tuple(self.sizes[index] for index in order),
            eigenvalues=torch.cat([pieces[index] for index in order]),
            names=tuple(self.names[index] for index in order),
        )


@dataclass(frozen=True, kw_only=True)
class EKFAC(DiagonalFisher):
    """F ≈ U diag(S) Uᵀ with U = U_B ⊗ U_A, layer by layer."""

    basis_in: Tensor
    """U_A [in, in]."""
    basis_out: tuple[Tensor, ...]
    """U_B of each layer [size, size]."""

    def to(self, target: torch.device | torch.dtype) -> EKFAC:
        """The same factors on another device or in another type."""
        return replace(
            self,
            basis_in=self.basis_in.to(target),
            basis_out=tuple(basis.to(target) for basis in self.basis_out),
            eigenvalues=self.eigenvalues.to(target),
        )

    def reordered(self, order: list[int]) -> EKFAC:
        """The same factors with the layers in another order."""
        diagonal = super().reordered(order)
        assert isinstance(diagonal, EKFAC)
        return replace(diagonal, basis_out=tuple(self.basis_out[index] for index in order))

    def rotate_out(self, gradients: Tensor) -> Tensor:
        """Output gradients [..., out] into the eigenbases U_B, layer by layer."""
        pieces = gradients.split(self.sizes, dim=-1)
        return torch.cat([piece @ basis for piece, basis in zip(pieces, self.basis_out, strict=True)], dim=-1)

    def rotate(self, gradients: Tensor) -> Tensor:
        """U_Bᵀ ∇W U_A."""
        return self.rotate_out((gradients @ self.basis_in).mT).mT

    def rotate_back(self, rotated: Tensor) -> Tensor:
        """U_B R U_Aᵀ."""
        pieces = (rotated @ self.basis_in.mT).split(self.sizes, dim=-2)
        return torch.cat([basis @ piece for piece, basis in zip(pieces, self.basis_out, strict=True)], dim=-2)

    def rotated_gradients(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """U_Bᵀ ∇W U_A [B, out, in] of each example, in the order that takes fewer multiplications."""
        positions, width = inputs.shape[-2:]
        rotate_first = positions * (width**2 + sum(size**2 for size in self.sizes))
        rotate_last = width * sum(size * (width + size) for size in self.sizes)
        if rotate_first <= rotate_last:
            return self.rotate_out(gradients).mT @ (inputs @ self.basis_in)
        return self.rotate(gradients.mT @ inputs)

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        tensors = {
            "basis_in": self.basis_in,
            "eigenvalues": self.eigenvalues,
            "damping": torch.tensor([self.damping], dtype=torch.float64),
        }
        tensors |= {f"basis_out.{index}": basis for index, basis in enumerate(self.basis_out)}
        with atomic_path(path) as temporary:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"names": json.dumps(self.names)})

    @staticmethod
    def load(path: Path) -> EKFAC:
        """Reads what `save` wrote; `ValueError` if the file is missing, damaged or of another kind."""
        try:
            with safe_open(require_file(path, "python -m abu.fisher fit"), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                metadata = file.metadata() or {}
            basis_out = tuple(tensors[f"basis_out.{index}"] for index in range(len(tensors) - 3))
            factors = EKFAC(
                sizes=tuple(len(basis) for basis in basis_out),
                eigenvalues=tensors["eigenvalues"],
                damping=float(tensors["damping"]),
                names=tuple(json.loads(metadata.get("names", "[]"))),
                basis_in=tensors["basis_in"],
                basis_out=basis_out,
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: expected EK-FAC factors, found a damaged or another file ({error})") from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: expected finite numbers, found NaN or infinity in {name}")
        return factors


@dataclass(frozen=True)
class Curvature:
    """Factors of all chosen layers."""

    groups: tuple[DiagonalFisher, ...]
    """One for each set of layers that read the same input."""
    examples: int
    """Gradients that S is the mean of."""

    def to(self, target: torch.device | torch.dtype) -> Curvature:
        """The same factors on another device or in another type."""
        return replace(self, groups=tuple(group.to(target) for group in self.groups))

    def shared(self) -> DiagonalFisher:
        """The factors of the only group; `ValueError` if the layers read several inputs."""
        if len(self.groups) > 1:
            first, second = (group.names[0] for group in self.groups[:2])
            raise ValueError(f"curvature: expected layers that read one input, found {first} and {second} do not")
        return self.groups[0]

    def for_layers(self, layers: Mapping[str, Layer]) -> Curvature:
        """The same factors in the order of `layers`, and named after them if the file did not name them.

        Raises `ValueError` naming the first difference unless they are the factors of these layers.
        """
        place = {name: index for index, name in enumerate(layers)}
        groups: list[DiagonalFisher] = []
        for group in self.groups:
            if not group.names:
                group.require_fit(layers)
            names = group.names or tuple(layers)
            others = [name for name in names if name not in place]
            if others:
                raise ValueError(f"curvature: expected factors of {len(place)} layers, found {others[0]} besides")
            order = sorted(range(len(names)), key=[place[name] for name in names].__getitem__)
            groups.append(replace(group, names=names).reordered(order))
            groups[-1].require_fit({name: layers[name] for name in groups[-1].names})
        found = {name for group in groups for name in group.names}
        missing = [name for name in layers if name not in found]
        if missing:
            raise ValueError(f"curvature: expected factors of {missing[0]}, found none")
        groups.sort(key=lambda group: place[group.names[0]])
        return replace(self, groups=tuple(groups))

    def natural_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> F⁻¹∇W [..., out, in], from weight gradients of every layer by name."""
        result: dict[str, Tensor] = {}
        for group in self.groups:
            gradient = torch.cat([gradients[name] for name in group.names], dim=-2)
            natural = group.natural_gradient(group.rotate(gradient)).split(group.sizes, dim=-2)
            result |= dict(zip(group.names, natural, strict=True))
        return result
