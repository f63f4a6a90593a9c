"""The weights that unlearning moves: text key/value projections of the cross-attention layers (paper, section 3.2).

All of them read the same input, the text tokens a [B, T, in]; so the gradient of an example's loss for all layers
together is Σ_tokens gᵀa with g [B, T, Σ out] the gradients at the layers' outputs, side by side. Everything here works
on that pair (g, a) and never builds per-example weight gradients unless asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from abu.diffusion_loss import at_least_float32, example_losses

PATTERNS = ("attn2.to_k", "attn2.to_v")


def key_value_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> layer, in the order of `named_modules`; `ValueError` if there is none or their inputs differ in width."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(PATTERNS)
    }
    if not layers:
        raise ValueError(
            f"expected Linear layers named *{' or *'.join(PATTERNS)}, found none in {type(model).__name__}"
        )
    widths = {layer.in_features for layer in layers.values()}
    if len(widths) > 1:
        raise ValueError(f"expected one input width for all key/value layers, found {sorted(widths)}")
    return layers


class OutputGradients:
    """Gradients of example losses at the outputs of the key/value layers, for a frozen model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers = key_value_layers(model)
        self.sizes = [layer.out_features for layer in self.layers.values()]
        self._outputs: dict[str, Tensor] = {}

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def record(name: str):
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
                # The frozen network builds no graph before this leaf; autograd starts at each layer's output.
                leaf = output.detach().requires_grad_() if not output.requires_grad else output
                self._outputs[name] = leaf
                return leaf

            return hook

        handles = [layer.register_forward_hook(record(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs = {}

    def __call__(self, noisy: Tensor, target: Tensor, timesteps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(g [B, T, Σ out], losses [B]) with g the gradient of each example's own loss, in float32 or better."""
        with self._recording(), torch.enable_grad():
            losses = example_losses(self.model, noisy, target, timesteps, text)
            outputs = [self._outputs[name] for name in self.layers]
            gradients = torch.autograd.grad(losses.sum(), outputs)
        return torch.cat([at_least_float32(g) for g in gradients], dim=-1), losses.detach()
