"""Optional logging to Weights & Biases; the only importer of wandb. `WANDB_MODE=offline` keeps everything local."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Tracker:
    """A run on Weights & Biases."""

    def __init__(self, project: str, name: str, config: dict[str, Any], folder: Path) -> None:
        """Starts the run, its files under `folder`; `ValueError` naming the extra if wandb is not installed."""
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "--wandb: expected the package wandb, found none; pip install 'fastgda[tracking]'"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=project, name=name, config=config, dir=str(folder), resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records scalars at a step."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()
