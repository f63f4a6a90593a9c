"""The weights that unlearning moves: text key/value projections of the cross-attention layers (paper, section 3.2).

All of them read the same input, the text tokens a [B, T, in]; so the gradient of an example's loss for all layers
together is Σ_tokens gᵀa with g [B, T, Σ out] the gradients at the layers' outputs, side by side.
"""

from __future__ import annotations

from torch import Tensor, nn

from abu.layers import Layer, LayerGradients, select_layers


def key_value_layers(model: nn.Module) -> dict[str, Layer]:
    """Name -> layer, in the order of `named_modules`; `ValueError` if there is none."""
    return select_layers(model, "cross-attn-kv")


class OutputGradients:
    """Gradients of example losses at the outputs of the key/value layers, for a frozen model."""

    def __init__(self, model: nn.Module) -> None:
        self.engine = LayerGradients(model, "cross-attn-kv")
        self.layers = self.engine.layers

    def __call__(self, noisy: Tensor, target: Tensor, timesteps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(g [B, T, Σ out], losses [B]) with g the gradient of each example's own loss, in float32 or better.

        Raises `ValueError` unless the layers read the tensor `text` itself.
        """
        groups, losses = self.engine(noisy, target, timesteps, text)
        others = [group.names[0] for group in groups if group.inputs is not text]
        if others:
            raise ValueError(f"{others[0]}: expected the layer to read the text tokens, found it reads something else")
        return groups[0].outputs, losses
