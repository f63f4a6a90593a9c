"""One training loop for the testbed's autoencoder and diffusion model: EMA, cosine schedule, exact resume.

Everything random in step s is drawn from generators keyed by (seed, s), and the order of examples from (seed, epoch);
with weights, optimizer, EMA and loss history in the checkpoint, a run that was killed continues bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgda.core import atomic_path, keyed_generator, save_json

log = logging.getLogger(__name__)

StepLoss = Callable[[Any, Tensor, torch.Generator], Tensor]
"""(model, row numbers of the batch, generator of the step) -> mean loss."""


@dataclass(frozen=True)
class LoopConfig:
    """Optimisation settings."""

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    """Peak of a linear warm-up followed by a cosine to 2 % of it."""
    warmup: int = 200
    weight_decay: float = 0.0
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are kept; warmed up as (1 + s) / (10 + s)."""
    gradient_clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    """Forward and backward under bfloat16 autocast; weights and their update stay float32. In float32 on processors
    that could only emulate it (a hundred times slower)."""
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be positive, found {self.steps} and {self.batch_size}")


def learning_rate(step: int, config: LoopConfig) -> float:
    """Rate of step `step`: linear warm-up, then cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has arithmetic in bfloat16 instead of emulating it."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def batch_rows(step: int, examples: int, config: LoopConfig) -> np.ndarray:
    """Row numbers of step `step`: consecutive pieces of one permutation per epoch, batches may span two epochs."""
    position = step * config.batch_size + np.arange(config.batch_size)
    orders = {
        int(epoch): torch.randperm(examples, generator=keyed_generator("order", config.seed, int(epoch))).numpy()
        for epoch in np.unique(position // examples)
    }
    return np.array([orders[int(place // examples)][place % examples] for place in position])


def train(
    model: nn.Module,
    loss: StepLoss,
    examples: int,
    config: LoopConfig,
    folder: Path,
    *,
    device: torch.device,
    checkpoint_seconds: float = 120.0,
    stop_after_steps: int | None = None,
    progress: bool = True,
) -> list[float]:
    """Minimises `loss(model, rows, generator)` and leaves the averaged weights in `model`.

    Returns the loss of each step. `folder/checkpoint.pt` is written every `checkpoint_seconds` and on Ctrl-C, and
    taken up again when its configuration is the same (`ValueError` if it is not). `stop_after_steps` ends the call
    early, as an interruption would.
    """
    model.to(device).train()
    runner = torch.compile(model) if config.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
    history: list[float] = []
    path = folder / "checkpoint.pt"
    if path.is_file():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["config"] != asdict(config):
            raise ValueError(f"{path}: expected configuration {asdict(config)}, found {saved['config']}; delete it")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        averaged, history = saved["averaged"], saved["history"]

    def save() -> None:
        with atomic_path(path) as temporary:
            torch.save(
                {
                    "config": asdict(config),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged,
                    "history": history,
                },
                temporary,
            )

    bf16 = config.bf16 and computes_bfloat16(device)
    if config.bf16 and not bf16:
        log.warning("%s: this processor has no bfloat16 arithmetic; computing in float32 instead", folder)
    bar = tqdm(total=config.steps, initial=len(history), desc=folder.name, unit="step", disable=not progress)
    saved_at, stop = time.monotonic(), min(config.steps, len(history) + (stop_after_steps or config.steps))
    between_steps = True
    try:
        for step in range(len(history), stop):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            rows = torch.from_numpy(batch_rows(step, examples, config))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = loss(runner, rows, keyed_generator("train", config.seed, step))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            between_steps = False
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, current in model.state_dict().items():
                    averaged[name].lerp_(current, 1 - decay)
            history.append(value.item())
            between_steps = True
            if not math.isfinite(history[-1]):
                raise ValueError(f"{folder}: the loss became {history[-1]} at step {step}; lower the learning rate")
            bar.update()
            bar.set_postfix(loss=f"{np.mean(history[-100:]):.4f}", refresh=False)
            if time.monotonic() - saved_at > checkpoint_seconds:
                save()
                saved_at = time.monotonic()
    finally:
        bar.close()
        # a step that was interrupted half way would be applied twice
        if between_steps and history and math.isfinite(history[-1]):
            save()
    if len(history) == config.steps:
        model.load_state_dict(averaged)
    return history


def save_history(path: Path, history: list[float], window: int = 50) -> None:
    """The loss curve as JSON: the mean of every `window` steps."""
    means = [float(np.mean(history[start : start + window])) for start in range(0, len(history), window)]
    save_json(path, {"window": window, "steps": len(history), "loss": [round(mean, 6) for mean in means]})
