"""Finds the text key/value projections of a denoiser by watching it run, whatever they are called.

Every Linear is watched, and every call of scaled dot-product attention. A projection of keys or values is a Linear
whose output reaches an attention's keys or values and passes no other Linear on the way. It projects the text if

- what it reads changes with the text and not with the latents (cross-attention, U-Nets and PixArt), or
- it reads one position for each token, for any number of tokens, and besides no more than such layers do (AuraFlow
  puts eight registers before the tokens): the text stream of a joint attention (SD3), which depends on the latents too
  after its first block. Where latents and tokens are one sequence, no projection is the text's.

It counts only where something other than the text attends to it: self-attention among tokens moves no picture by
itself. Names would mislead: `attn2.to_k` is cross-attention in a U-Net and attention among latents in SD3.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROLES = ("query", "key", "value")


@dataclass(frozen=True)
class Probe:
    """Inputs to watch the model with; those of a pair differ in every number."""

    latents: tuple[Tensor, Tensor]
    """[B, c, h, w] each."""
    timesteps: Tensor
    text: tuple[Tensor, Tensor]
    """[B, T, d] each, with what `abu.conditioning` carries in further rows."""
    longer: Tensor
    """Text of one token more."""
    carried: int = 0
    """Rows of the text that are no tokens."""


@dataclass
class Passage:
    """What was seen in one forward pass."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Name of a Linear -> what it read."""
    attentions: list[dict[str, set[str]]] = field(default_factory=list)
    """For each attention: role -> names of the Linear layers that it is projected by."""


class _AttentionWatch(TorchFunctionMode):
    """Hands the queries, keys and values of every attention to `seen`."""

    def __init__(self, seen: Any) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen(dict(zip(ROLES, args, strict=False)) | {r: kwargs[r] for r in ROLES if r in kwargs})
        return func(*args, **kwargs)


def _reached(tensor: Tensor, leaves: dict[int, str]) -> set[str]:
    """Names of those leaves that `tensor` was computed from."""
    found = {leaves[id(tensor)]} if id(tensor) in leaves else set()
    todo, done = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        found |= {leaves[id(leaf)] for leaf in [getattr(node, "variable", None)] if id(leaf) in leaves}
        todo += [parent for parent, _ in node.next_functions]
    return found


@contextmanager
def _watching(model: nn.Module) -> Iterator[Passage]:
    passage, leaves, kept = Passage(), {}, []

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            passage.inputs[name] = inputs[0].detach()
            leaves[id(leaf)] = name
            kept.append(leaf)
            return leaf

        return hook

    def seen(tensors: dict[str, Tensor]) -> None:
        passage.attentions.append({role: _reached(tensor, leaves) for role, tensor in tensors.items()})

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(record(name)) for name, module in linear]
    try:
        with _AttentionWatch(seen), torch.enable_grad():
            yield passage
    finally:
        for handle in handles:
            handle.remove()


def watch(model: nn.Module, latents: Tensor, timesteps: Tensor, text: Tensor) -> Passage:
    """Runs the model once."""
    with _watching(model) as passage:
        model(latents, timesteps, text)
    return passage


def find_text_layers(model: nn.Module, probe: Probe) -> tuple[str, ...]:
    """Names of the text key/value projections, in the order of `named_modules`; `ValueError` if there are none."""
    (x, other_x), (c, other_c) = probe.latents, probe.text
    base = watch(model, x, probe.timesteps, c)
    moved, said = watch(model, other_x, probe.timesteps, c), watch(model, x, probe.timesteps, other_c)
    longer = watch(model, x, probe.timesteps, probe.longer)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name in base.inputs]

    growth = probe.longer.shape[1] - c.shape[1]

    def registers(name: str) -> int | None:
        """Positions that are read besides the tokens; None if they do not grow by one with each token."""
        read, grown = (p.inputs[name].shape[-2] if p.inputs[name].dim() == 3 else 0 for p in (base, longer))
        return read - (c.shape[1] - probe.carried) if grown - read == growth else None

    still = {name for name in names if torch.equal(base.inputs[name], moved.inputs[name])}
    pure = {name for name in still if not torch.equal(base.inputs[name], said.inputs[name])}
    counts = {0, *(registers(name) for name in pure)} - {None}
    text = pure | {name for name in names if name not in still and registers(name) in counts}
    found: set[str] = set()
    for attention in base.attentions:
        if attention["query"] - text:
            found |= (attention["key"] | attention["value"]) & text
    if not found:
        raise ValueError(
            f"{type(model).__name__}: expected attention to keys and values that are projections of the text, found "
            f"none in {len(base.attentions)} calls of scaled dot-product attention"
        )
    return tuple(name for name in names if name in found)
