"""Optional logging to Weights & Biases; the only importer of wandb. `WANDB_MODE=offline` keeps everything local."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Tracker:
    """A run on Weights & Biases."""

    def __init__(
        self, project: str, name: str, config: dict[str, Any], folder: Path, entity: str | None = None
    ) -> None:
        """Starts the run, its files under `folder`; `ValueError` naming the extra if wandb is not installed."""
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "--wandb: expected the package wandb, found none; pip install 'fastgda[tracking]'"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=project, entity=entity, name=name, config=config, dir=str(folder), resume="allow")
        self.table = wandb.Table

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records scalars at a step."""
        self.run.log(values, step=step)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table at a step."""
        self.run.log({name: self.table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()
