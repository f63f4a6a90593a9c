"""The layers whose curvature is estimated, chosen by a pattern, and the gradients of example losses at them.

The gradient of one example's loss for a layer is Σ_positions g aᵀ [out, in], with a the layer's input and g the
gradient at its output. A position is a token of a Linear layer or a pixel of a Conv2d's output, whose input is the
patch under the kernel. A bias is the last column of the weights, and reads the constant 1 (Kronfluence's convention).

Layers that read the same input share a. They are found by watching the forward pass: the same tensor reaches them and
they read it in the same way. Everything here works on the pair (g, a) and builds no per-example weight gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abu.diffusion_loss import at_least_float32

LayerPattern = Literal["cross-attn-kv", "cross-attn", "attn", "all"]
PATTERNS: dict[str, str] = {
    "cross-attn-kv": r"attn2\.to_[kv]",
    "cross-attn": r"attn2\.(to_[qkv]|to_out\.0)",
    "attn": r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "all": r".*",
}
"""Pattern -> regular expression for the end of a layer's name: text key/value projections of cross-attention, all
projections of cross-attention, those of all attention, every Linear and Conv2d. A model that declares its text
key/value projections (`declare_key_values`) has those for "cross-attn-kv", whatever they are called, and the attention
modules that own them for "cross-attn"."""
DECLARED = "text_key_values"
"""Attribute that holds a model's declared text key/value projections."""
Layer: TypeAlias = nn.Linear | nn.Conv2d
SHOWN = 12
"""Kinds of layers that an error names."""


def declare_key_values(model: nn.Module, names: tuple[str, ...]) -> None:
    """Says which layers of `model` "cross-attn-kv" means, where their names do not; copies of the model know it too."""
    object.__setattr__(model, DECLARED, names)


def select_layers(model: nn.Module, pattern: str = "cross-attn-kv") -> dict[str, Layer]:
    """Name -> layer, in the order of `named_modules`.

    Raises `ValueError` if the pattern is unknown, matches no layer (the message says which exist) or matches a
    convolution that is grouped or whose padding is not a number of zeros.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"layers: expected one of {', '.join(PATTERNS)}, found {pattern!r}")
    existing: dict[str, Layer] = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    wanted = re.compile(rf"(.*\.)?{PATTERNS[pattern]}")
    declared = getattr(model, DECLARED, None)
    if declared is not None and pattern == "cross-attn-kv":
        wanted = re.compile("|".join(map(re.escape, declared)))
    elif declared is not None and pattern == "cross-attn":
        owners = {name.rpartition(".")[0] for name in declared}
        wanted = re.compile(rf"({'|'.join(map(re.escape, sorted(owners)))})\.{PATTERNS['attn']}")
    layers = {name: layer for name, layer in existing.items() if wanted.fullmatch(name)}
    if not layers:
        kinds = sorted({re.sub(r"\d+", "*", name) for name in existing})
        listed = ", ".join(kinds[:SHOWN]) + (f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else "")
        raise ValueError(
            f"layers: expected Linear or Conv2d layers that match {pattern!r} ({PATTERNS[pattern]}), "
            f"found none in {type(model).__name__}, whose layers are: {listed or 'none'}"
        )
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and (
            layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            raise ValueError(f"{name}: expected an ungrouped convolution padded by a number of zeros, found {layer}")
    return layers


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(out, in) of the layer's weights as a matrix, with a column for the bias if it has one."""
    return len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)


def flat_inputs(layer: Layer, inputs: Tensor) -> Tensor:
    """a [B, T, in]: what the weights are multiplied with at each position, from the layer's input."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        flat = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    else:
        flat = inputs if inputs.dim() == 3 else inputs.reshape(len(inputs), -1, inputs.shape[-1])
    return flat if layer.bias is None else torch.cat([flat, flat.new_ones(*flat.shape[:2], 1)], dim=-1)


def flat_outputs(layer: Layer, outputs: Tensor) -> Tensor:
    """[B, T, out]: the layer's output, or the gradient at it, position by position."""
    if isinstance(layer, nn.Conv2d):
        return outputs.flatten(2).mT
    return outputs if outputs.dim() == 3 else outputs.reshape(len(outputs), -1, outputs.shape[-1])


@torch.no_grad()
def add_to_weights(layer: Layer, change: Tensor) -> None:
    """Adds `change` [out, in] to the layer's weights, its last column to the bias if there is one."""
    if layer.bias is not None:
        layer.bias += change[:, -1].to(layer.bias)
        change = change[:, :-1]
    layer.weight += change.view_as(layer.weight).to(layer.weight)


@dataclass(frozen=True)
class GroupGradients:
    """Gradients of a batch of examples at layers that read the same input."""

    names: tuple[str, ...]
    """The layers, in the order of `named_modules`."""
    sizes: tuple[int, ...]
    """Output width of each."""
    inputs: Tensor
    """a [B, T, in]."""
    outputs: Tensor
    """g [B, T, Σ out], the layers side by side; float32 or better."""


class LayerGradients:
    """Gradients of example losses at the chosen layers of a frozen model."""

    def __init__(self, model: nn.Module, pattern: str = "cross-attn-kv") -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers = select_layers(model, pattern)

    @contextmanager
    def _recording(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Name -> (input, output) of each layer in the forward passes made inside."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def record(name: str):
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
                if name in seen:
                    raise ValueError(f"{name}: expected the layer to run once in a forward pass, found it run again")
                # The frozen network builds no graph before this leaf; autograd starts at the first layers' outputs.
                leaf = output if output.requires_grad else output.detach().requires_grad_()
                seen[name] = (inputs[0], leaf)
                return leaf

            return hook

        handles = [layer.register_forward_hook(record(name)) for name, layer in self.layers.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def __call__(
        self, noisy: Tensor, target: Tensor, timesteps: Tensor, text: Tensor
    ) -> tuple[list[GroupGradients], Tensor]:
        """(gradients of each example's own loss, group by group; losses [B])."""
        losses: list[Tensor] = []

        def slope(output: Tensor) -> list[Tensor]:
            error = at_least_float32(output) - at_least_float32(target)
            losses.append(error.square().flatten(1).mean(1))
            return [error * (2 / error[0].numel())]

        return self.products(noisy, timesteps, text, slope)[0], losses[0]

    def products(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, directions: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[list[GroupGradients]]:
        """Jᵀv for each direction v = `directions`(f) [B, ...] of the output f, which is known when they are chosen.

        J is the Jacobian of an example's output with respect to the weights; each product is given group by group.
        """
        with self._recording() as seen, torch.enable_grad():
            output = self.model(noisy, timesteps, text).sample
        idle = sorted(self.layers.keys() - seen.keys())
        if idle:
            raise ValueError(f"{idle[0]}: expected every chosen layer to run in a forward pass, found it idle")
        members = self._groups({name: tensors[0] for name, tensors in seen.items()})
        leaves = [seen[name][1] for name in self.layers]
        chosen = directions(output.detach())
        return [
            self._grouped(
                members,
                seen,
                torch.autograd.grad(output, leaves, v.to(output.dtype), retain_graph=index + 1 < len(chosen)),
            )
            for index, v in enumerate(chosen)
        ]

    def _grouped(
        self,
        groups: list[tuple[str, ...]],
        seen: dict[str, tuple[Tensor, Tensor]],
        gradients: Sequence[Tensor],
    ) -> list[GroupGradients]:
        flat = {
            name: flat_outputs(layer, at_least_float32(gradient))
            for (name, layer), gradient in zip(self.layers.items(), gradients, strict=True)
        }
        found = []
        for members in groups:
            source = seen[members[0]][0]
            inputs = flat_inputs(self.layers[members[0]], source.detach() if source.requires_grad else source)
            outputs = torch.cat([flat[name] for name in members], dim=-1)
            if len(inputs) != len(outputs):
                raise ValueError(f"{members[0]}: expected inputs of {len(outputs)} examples, found {len(inputs)}")
            sizes = tuple(flat[name].shape[-1] for name in members)
            found.append(GroupGradients(members, sizes, inputs, outputs))
        return found

    def _groups(self, inputs: dict[str, Tensor]) -> list[tuple[str, ...]]:
        """Names of the layers that got the same tensor and read it alike (kind, kernel, bias)."""
        groups: dict[tuple, list[str]] = {}
        for name, layer in self.layers.items():
            reading: tuple = (id(inputs[name]), type(layer), layer.bias is not None)
            if isinstance(layer, nn.Conv2d):
                reading += (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            groups.setdefault(reading, []).append(name)
        return [tuple(members) for members in groups.values()]
