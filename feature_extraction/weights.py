"""Where encoders get their weights: a file, the Hugging Face cache, the hub. Reading one runs nothing that is in it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgda.core import require_file


def hub_file(encoder: str, repo: str, name: str) -> Path:
    """The file `name` of the hub's `repo`, downloaded unless the cache has it; `ValueError` if neither is reachable."""
    from huggingface_hub import constants, hf_hub_download

    try:
        return Path(hf_hub_download(repo, name))
    except OSError as error:
        reason = str(error).split(". ")[0].splitlines()[0].rstrip(".")
        raise ValueError(
            f"{encoder}: weights not found; tried {name} of {repo} in the cache {constants.HF_HUB_CACHE} and at "
            f"{constants.ENDPOINT} ({reason}). Where there is no access, give the file: --weights {encoder}=PATH"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch state dict, nested ones under names joined by dots.

    Raises `ValueError` naming the file if it is missing, damaged, something else, or would have to run code.
    """
    require_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        found = "a damaged or other file"
        if "TorchScript" in str(error):
            found = "a TorchScript archive, which is a program; save its state_dict() on a machine that trusts it"
        raise ValueError(f"{path}: expected a PyTorch state dict or safetensors, found {found}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a PyTorch state dict, found a {type(state).__name__}")
    return dict(_tensors(state, ""))


def _tensors(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path, title: str) -> nn.Module:
    """`model` holding `state` as float32, frozen, in evaluation mode.

    `model` may lie on the meta device. Raises `ValueError` saying that `path` should hold the weights of `title`, and
    the first name or shape that differs.
    """
    wanted = {key: list(value.shape) for key, value in model.state_dict().items()}
    found = {key: list(value.shape) for key, value in state.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise ValueError(
                f"{path}: expected the weights of {title}, found others: "
                f"{key} is {found.get(key, 'absent')}, expected {wanted.get(key, 'absent')}"
            )
    floats = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(floats, strict=True, assign=True)
    return model.eval().requires_grad_(False)
