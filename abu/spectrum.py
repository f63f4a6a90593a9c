"""The spectrum of curvature factors: numbers of each layer, and a picture of the corrected eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

from abu.curvature import Curvature
from fastgda.core import atomic_path

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMED = 16
"""More layers than this get no legend."""


@dataclass(frozen=True)
class LayerSpectrum:
    """The corrected eigenvalues S of one layer, and what is made of them."""

    name: str
    values: np.ndarray
    """S [out, in], in float64."""
    damping: float
    """λ / mean(S)."""

    @property
    def effective(self) -> float:
        """Σ S / (S + λ): directions in which the data, and not the damping, decides the step."""
        return float((self.values / (self.values + self.damping * self.values.mean())).sum())

    def __str__(self) -> str:
        rows, columns = self.values.shape
        mean, size = self.values.mean(), self.values.size
        return (
            f"{self.name}: {rows} × {columns}, mean {mean:.3e}, largest {self.values.max() / mean:.1f} and median "
            f"{np.median(self.values) / mean:.1e} of the mean, effective {self.effective:.0f} "
            f"({100 * self.effective / size:.1f} %)"
        )


def spectra(curvature: Curvature) -> Iterator[LayerSpectrum]:
    """One for each layer; layers that the file does not name are numbered."""
    number = 0
    for group in curvature.groups:
        for index, values in enumerate(group.eigenvalues.split(group.sizes)):
            name = group.names[index] if group.names else f"layer {number}"
            yield LayerSpectrum(name, _array(values), group.damping)
            number += 1


def draw_spectra(layers: list[LayerSpectrum], path: Path) -> None:
    """Draws S / mean(S) of each layer from the largest down, with the damping as a line, into a PNG."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(layers)))
    for layer, colour in zip(layers, colours, strict=True):
        values = np.sort(layer.values, axis=None)[::-1] / layer.values.mean()
        # a thousand points, evenly on the logarithmic axis, draw the same line
        places = np.unique(np.geomspace(1, len(values), 1000).astype(int))
        axis.plot(places / len(values), values[places - 1], color=colour, linewidth=1, label=layer.name)
    for damping in sorted({layer.damping for layer in layers}):
        axis.axhline(damping, color="black", linestyle="--", linewidth=1, label=f"damping {damping:g}")
    axis.set(xscale="log", yscale="log", xlabel="share of the layer's directions", ylabel="eigenvalue / mean")
    axis.grid(alpha=0.3)
    if len(layers) <= NAMED:
        axis.legend(fontsize=6, loc="lower left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
