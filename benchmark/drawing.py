"""Figures as files."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from fastgda.core import atomic_path

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["Figure", "plt", "save_figure"]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(path)
