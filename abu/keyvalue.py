"""The weights that unlearning moves: text key/value projections of the cross-attention layers (paper, section 3.2).

All of them read the same input, the text tokens a [B, T, in]; so the gradient of an example's loss for all layers
together is Σ_tokens gᵀa with g [B, T, Σ out] the gradients at the layers' outputs, side by side.

Where a model reads the text only through other layers, or through hidden states that change with (t, ε) as a joint
attention's do (SD3, PixArt), a is not the text and this does not hold: see `abu.grouped`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from abu.layers import GroupGradients, Layer, LayerGradients, select_layers


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

        `text` may carry a pooled embedding in further rows (`abu.conditioning`), at which g is zero. Raises
        `ValueError` unless the layers read the token states of `text` as they are.
        """
        groups, losses = self.engine(noisy, target, timesteps, text)
        return side_by_side(groups, text), losses

    def products(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, directions: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[Tensor]:
        """g [B, T, Σ out] of Jᵀv for each direction v of the output (see `LayerGradients.products`)."""
        return [side_by_side(groups, text) for groups in self.engine.products(noisy, timesteps, text, directions)]


def side_by_side(groups: list[GroupGradients], text: Tensor) -> Tensor:
    """g [B, T, Σ out] of layers that read the tokens of `text`; `ValueError` naming one that reads another input."""
    others = [group.names[0] for group in groups if not is_beginning(group.inputs, text)]
    if others:
        raise ValueError(
            f"{others[0]}: expected the layer to read the text tokens, found it reads something else "
            "(layers that do not share the text are served by abu.grouped)"
        )
    return F.pad(groups[0].outputs, (0, 0, 0, text.shape[1] - groups[0].outputs.shape[1]))


def is_beginning(tokens: Tensor, text: Tensor) -> bool:
    """Whether `tokens` [B, T, d] is `text`, or its first rows seen through a view."""
    same_place = tokens.data_ptr() == text.data_ptr() and tokens.stride() == text.stride()
    return tokens is text or (same_place and tokens.shape[0] == text.shape[0] and tokens.shape[2] == text.shape[2])
