"""What abu.score computes and how the work is cut: its flags, filled up with the paper's settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from abu.encoded import EncodedPictures
from abu.exact_collection import PlanConfig
from abu.loss_draws import LossDraws
from abu.source import SETTINGS, PaperSettings

OPEN = ("step", "images", "timesteps", "captions", "views", "query_draws")
"""Fields that the paper's settings fill."""


@dataclass(frozen=True)
class ScoreConfig:
    """What is computed; what is left open is as the paper did it for that model."""

    settings: Literal["coco", "stable-diffusion"] = "coco"
    """Whose settings in the paper."""
    change: Literal["first-order", "second-order", "exact"] = "second-order"
    """The loss change: its expansion in the step, or measured on the unlearned model."""
    step: float | None = None
    """α of eq. 1. The Newton step is α/N with N of --images: Stable Diffusion's 0.002 is α, divided by 400 M."""
    images: int | None = None
    """N of eq. 1, pictures that the model was trained on; with 1, --step is the Newton step itself."""
    timesteps: int | None = None
    """Timesteps at which a picture's loss is taken."""
    captions: int | None = None
    """Captions that the loss is averaged over; without it the paper's number, or as many as the training set has."""
    views: int | None = None
    """1: pictures as they are; 2: flipped too, the larger score counts; without it 2 if the training set has them."""
    query_draws: int | None = None
    """Draws for a query's gradient."""
    protocol: Literal["stratified", "grid"] = "stratified"
    """A timestep at random in each of equal bins, or, with --change exact, the paper's equally spaced ones."""
    start: int = 0
    """First training picture that is scored."""
    stop: int | None = None
    """The one after the last; all without it."""
    seed: int = 0
    """Of timesteps and noise."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in OPEN if getattr(self, name) is not None}
        if wrong := [name for name, value in given.items() if value <= 0]:
            raise ValueError(f"--{wrong[0]}: expected a positive number, found {given[wrong[0]]}")
        if self.protocol == "grid" and self.change != "exact":
            raise ValueError(f"--protocol grid: expected --change exact, found {self.change}")

    def resolved(self) -> PaperSettings:
        """The paper's settings with what was given in their place."""
        given = {name: getattr(self, name) for name in OPEN if getattr(self, name) is not None}
        return replace(SETTINGS[self.settings], **given)

    def resolved_for(self, training: EncodedPictures, folder: Path) -> PaperSettings:
        """The same for the pictures in `folder`.

        Of captions and views the paper's numbers give way to what there is; `ValueError` if more were asked for.
        """
        there = {"captions": training.captions, "views": training.views}
        for name, count in there.items():
            asked = getattr(self, name)
            if asked is not None and asked > count:
                raise ValueError(f"--{name}: expected at most {count}, as many as {folder} has, found {asked}")
        settings = self.resolved()
        return replace(settings, **{name: min(getattr(settings, name), count) for name, count in there.items()})

    def loss_draws(self, settings: PaperSettings) -> LossDraws:
        """Draws of a training picture's loss, of the exact form."""
        return LossDraws(
            self.protocol,
            settings.timesteps,
            captions=settings.captions,
            flips=settings.views > 1,
            seed=self.seed,
        )


@dataclass(frozen=True)
class CutConfig(PlanConfig):
    """How the work is cut."""

    tile: int = 64
    """Queries scored together: their steps are in a worker's memory, and each tile costs a pass over its pictures."""
    shard: int = 256
    """Training pictures of a piece."""
    batch: int = 8
    """Draws of a query, or training pictures, that the network takes at once; in the exact form losses, but never fewer
    than one picture has with one caption."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise ValueError(f"--batch: expected at least 1, found {self.batch}")
