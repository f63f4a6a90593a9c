"""Curvature on disk: one safetensors file of ours, or a folder in the layout of Kronfluence 1.0.1.

A Kronfluence folder holds one safetensors file for each kind of factor, with one tensor for each layer by name:

    activation_eigenvectors    U_A [in, in], of every layer, shared or not
    gradient_eigenvectors      U_B [out, out]
    lambda_matrix              the sum of (U_Bᵀ ∇W U_A)² over examples [out, in]; for the diagonal Fisher, of ∇W²
    num_lambda_processed       the number of examples [1], int64

with weights as matrices [out, in] whose last column is the bias (`abu.layers`). The diagonal Fisher has the last two
only; which of the two a folder holds is said by the strategy in factor_arguments.json. Kronfluence itself also asks for
activation_eigenvalues and gradient_eigenvalues, which its EK-FAC does not use: written, and ignored when read. What
Kronfluence has no place for (which layers read the same input, the damping) goes into the metadata of lambda_matrix; in
a folder without it, layers whose U_A are equal form a group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from abu.curvature import DAMPING, EKFAC, Curvature, DiagonalFisher
from abu.diffusion_loss import at_least_float32
from fastgda.core import atomic_path, manifest_path, read_manifest, require_file, save_json

INPUT_VECTORS, OUTPUT_VECTORS = "activation_eigenvectors", "gradient_eigenvectors"
INPUT_VALUES, OUTPUT_VALUES = "activation_eigenvalues", "gradient_eigenvalues"
LAMBDA, COUNT = "lambda_matrix", "num_lambda_processed"
ARGUMENTS = "factor_arguments.json"
Tensors = dict[str, Tensor]


def save_curvature(path: Path, curvature: Curvature) -> tuple[Path, ...]:
    """Writes one file if `path` ends in .safetensors (EK-FAC of one group), else a Kronfluence folder.

    Returns the files. Raises `ValueError` if one file cannot hold the factors.
    """
    if path.suffix != ".safetensors":
        return _save_folder(path, curvature)
    group = curvature.shared()
    if not isinstance(group, EKFAC):
        raise ValueError(f"{path}: expected EK-FAC factors to write into one file, found a diagonal; name a folder")
    group.save(path)
    return (path,)


def load_curvature(path: Path) -> Curvature:
    """Reads what `save_curvature` or Kronfluence wrote.

    Raises `ValueError` naming the file that is missing, damaged, or whose layers or shapes are not those of the others.
    """
    if path.is_dir():
        return _load_folder(path)
    return Curvature((EKFAC.load(path),), examples=1)


def _save_folder(folder: Path, curvature: Curvature) -> tuple[Path, ...]:
    factors: dict[str, Tensors] = {LAMBDA: {}, COUNT: {}}
    for group in curvature.groups:
        if not group.names:
            raise ValueError(f"{folder}: expected factors that name their layers, found factors that do not")
        for index, (name, mean) in enumerate(zip(group.names, group.eigenvalues.split(group.sizes), strict=True)):
            factors[LAMBDA][name] = mean * curvature.examples
            factors[COUNT][name] = torch.tensor([curvature.examples])
            if isinstance(group, EKFAC):
                # safetensors refuses tensors that share memory, so each layer gets its copy of U_A
                factors.setdefault(INPUT_VECTORS, {})[name] = group.basis_in.clone()
                factors.setdefault(OUTPUT_VECTORS, {})[name] = group.basis_out[index]
                # S ≈ (its row sums)(its column sums)ᵀ / its sum: Kronfluence's loader wants the files to exist
                factors.setdefault(INPUT_VALUES, {})[name] = mean.mean(0)
                factors.setdefault(OUTPUT_VALUES, {})[name] = mean.sum(1) / mean.mean(0).sum()
    groups = [group.names for group in curvature.groups]
    metadata = {"groups": json.dumps(groups), "damping": repr(curvature.groups[0].damping)}
    folder.mkdir(parents=True, exist_ok=True)
    kind = "ekfac" if isinstance(curvature.groups[0], EKFAC) else "diagonal"
    save_json(folder / ARGUMENTS, {"strategy": kind, "use_empirical_fisher": True})
    for factor, tensors in factors.items():
        with atomic_path(folder / f"{factor}.safetensors") as temporary:
            contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata=metadata)
    return (folder / ARGUMENTS, *(folder / f"{factor}.safetensors" for factor in factors))


def _load_folder(folder: Path) -> Curvature:
    sums, metadata = _read(folder, LAMBDA)
    shapes = {name: tuple(total.shape) for name, total in sums.items()}
    counts = {int(count) for count in _read(folder, COUNT, {name: (1,) for name in sums})[0].values()}
    if len(counts) != 1 or min(counts) < 1:
        raise ValueError(f"{folder / COUNT}.safetensors: expected one positive count, found {sorted(counts)}")
    (examples,) = counts
    diagonal = _kind(folder) == "diagonal"
    bases_in = {} if diagonal else _read(folder, INPUT_VECTORS, {n: (s[1], s[1]) for n, s in shapes.items()})[0]
    bases_out = {} if diagonal else _read(folder, OUTPUT_VECTORS, {n: (s[0], s[0]) for n, s in shapes.items()})[0]
    groups: list[DiagonalFisher] = []
    for names in _groups(folder, list(sums), bases_in, metadata):
        group = DiagonalFisher(
            sizes=tuple(shapes[name][0] for name in names),
            eigenvalues=torch.cat([sums[name] for name in names]) / examples,
            damping=float(metadata.get("damping", DAMPING)),
            names=names,
        )
        if not diagonal:
            basis_out = tuple(bases_out[name] for name in names)
            group = EKFAC(**vars(group), basis_in=bases_in[names[0]], basis_out=basis_out)
        groups.append(group)
    return Curvature(tuple(groups), examples)


def _kind(folder: Path) -> str:
    """ "ekfac" or "diagonal": as the folder says, else by its eigenvectors; their absence alone proves no diagonal.

    An unfinished copy of EK-FAC factors lacks them too, and its sums are in the eigenbasis, not of ∇W².
    """
    path = folder / ARGUMENTS
    if path.is_file():
        try:
            found = json.loads(path.read_text())["strategy"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected JSON that names a strategy, found a damaged file ({error})") from error
    elif manifest_path(folder).is_file():
        path, found = manifest_path(folder), read_manifest(folder)["config"].get("kind")
    elif any((folder / f"{factor}.safetensors").is_file() for factor in (INPUT_VECTORS, OUTPUT_VECTORS)):
        return "ekfac"
    else:
        raise ValueError(
            f"{folder}: expected eigenvectors, or {ARGUMENTS} that says the factors are diagonal, found neither"
        )
    if found not in ("ekfac", "diagonal"):
        raise ValueError(f"{path}: expected factors of the strategy ekfac or diagonal, found {found!r}")
    return found


def _groups(folder: Path, names: list[str], bases_in: Tensors, metadata: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Layers that read the same input: as the metadata says, else those whose U_A are equal, else each by itself."""
    if "groups" in metadata:
        groups = [tuple(group) for group in json.loads(metadata["groups"])]
        if sorted(name for group in groups for name in group) != sorted(names):
            raise ValueError(f"{folder / LAMBDA}.safetensors: expected the layers of its metadata, found others")
        return groups
    found: list[list[str]] = []
    for name in names:
        group = next((group for group in found if _equal(bases_in.get(group[0]), bases_in.get(name))), None)
        if group is None:
            found.append([name])
        else:
            group.append(name)
    return [tuple(group) for group in found]


def _read(
    folder: Path, factor: str, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Tensors, Mapping[str, str]]:
    """(tensors by layer, metadata) of one factor's file: finite numbers, of `shapes` if these are given."""
    path = require_file(folder / f"{factor}.safetensors")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: _plain(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected Kronfluence factors, found a damaged file ({error})") from error
    if not tensors:
        raise ValueError(f"{path}: expected factors of at least one layer, found none")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: expected finite numbers, found NaN or infinity in {name}")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = found if shapes is None else shapes
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: expected {name} of shape {wanted.get(name)} as in {LAMBDA}, found {found.get(name)}"
            )
    return tensors, metadata


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two eigenbases are the same, up to the rounding of equal sums in another order."""
    if first is None or second is None or first.shape != second.shape:
        return False
    return torch.allclose(first, second, rtol=0, atol=1e-6)


def _plain(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor) if tensor.is_floating_point() else tensor
