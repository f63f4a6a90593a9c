"""Optional logging to Weights & Biases; the only importer of wandb. `WANDB_MODE=offline` keeps everything local."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgda.core import save_json


class Tracker:
    """A run on Weights & Biases."""

    def __init__(
        self, project: str, name: str, config: dict[str, Any], folder: Path, entity: str | None = None
    ) -> None:
        """Starts the run, its files under `folder`, or takes it up where one of the same `config` was not ended.

        Raises `ValueError` naming the extra if wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "--wandb: expected the package wandb, found none; pip install 'fastgda[tracking]'"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self.note = folder / "wandb.json"
        self.run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            config=config,
            dir=str(folder),
            id=_run_id(self.note, config),
            resume="allow",
        )
        self.table = wandb.Table

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records scalars at a step."""
        self.run.log(values, step=step)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table at a step."""
        self.run.log({name: self.table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def close(self) -> None:
        """Ends the run: another one in the same folder is a new one."""
        self.run.finish()
        self.note.unlink(missing_ok=True)


def _run_id(note: Path, config: dict[str, Any]) -> str:
    """The id in `note`, or a new one, kept there, where the note is of another configuration or there is none."""
    plain = json.loads(json.dumps(config))
    kept = json.loads(note.read_text()) if note.is_file() else {}
    if kept.get("config") != plain:
        kept = {"id": uuid.uuid4().hex[:8], "config": plain}
        save_json(note, kept)
    return kept["id"]
