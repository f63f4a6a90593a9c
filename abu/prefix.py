"""The part of a network that runs before the first layer that unlearning moves: the same for every query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from abu.layers import Layer


def modules_before(model: nn.Module, layers: dict[str, Layer], run: Callable[[], object]) -> list[str]:
    """The outermost modules that `run` has finished with when the first of `layers` is called.

    Left out are those that run more than once, return anything but one tensor, or whose output is written into later.
    """
    calls: dict[str, int] = {}
    early: dict[str, tuple[Tensor, int]] = {}
    reached = False

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple) -> None:
            nonlocal reached
            calls[name] = calls.get(name, 0) + 1
            reached = reached or name in layers

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not reached and isinstance(output, Tensor):
                early[name] = (output, output._version)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    kept = [name for name, (output, version) in early.items() if calls[name] == 1 and output._version == version]
    return [name for name in kept if not any(name.startswith(f"{other}.") for other in kept)]
