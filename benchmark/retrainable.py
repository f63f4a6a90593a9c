"""What can be trained again to judge attributions: the testbeds of `abu.testbed` and MSCOCO (`benchmark.coco`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from abu.amortised import Examples
from abu.diffusion_loss import NoiseSchedule
from abu.encoded import TrainingPictures
from abu.sampler import Sampler
from abu.testbed import add_testbed_flags, testbed_from
from abu.training import LoopConfig
from benchmark.coco import COCO, Coco

JUDGED_MODE = "emoji-mini"
"""The testbed that is small enough to be trained again many times."""


class Retrainable(Protocol):
    """A dataset with its queries, and the recipe of the model that generated them."""

    @property
    def name(self) -> str:
        """As `--mode` has it."""

    @property
    def layout(self) -> str:
        """How features and rankings lie under `data` (`fastgda.dataset.layout`)."""

    @property
    def root(self) -> Path:
        """Folder that holds `data/`, `runs/` and `results/`."""

    @property
    def data(self) -> Path:
        """Training set and queries; retrained models and scores are kept there."""

    @property
    def runs(self) -> Path:
        """State of unfinished training runs."""

    @property
    def judged(self) -> tuple[str, ...]:
        """Splits whose queries retrained models are measured on; "test" is one."""

    @property
    def diffusion_loop(self) -> LoopConfig:
        """How a model is trained."""

    @property
    def recipe(self) -> dict[str, Any]:
        """What a model of one seed is trained with, as manifests record it: "loop" and more."""

    @property
    def caption_dropout(self) -> float:
        """Share of the captions that training leaves out."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels and target of the loss."""

    @property
    def images(self) -> int:
        """N."""

    def training_files(self) -> dict[str, Path]:
        """Name -> file of all that a retrained model and its losses depend on, but for the recipe; `ValueError` naming
        one that is missing or does not fit the others.
        """

    def score_files(self, split: str) -> dict[str, Path]:
        """Name -> file of what scores of a split's queries are made from: "training", "queries" and "model"."""

    def initial_denoiser(self, seed: int) -> nn.Module:
        """The untrained denoiser of a seed."""

    def load_denoiser(self, device: torch.device) -> nn.Module:
        """That of the model which generated the queries."""

    def training_pictures(self) -> TrainingPictures:
        """The training set."""

    def query_examples(self, split: str, device: torch.device) -> Examples:
        """The generated images of a split, with the token states of their prompts."""

    def query_captions(self, split: str) -> list[str]:
        """Prompts of a split's queries."""

    def query_concepts(self, split: str) -> list[str]:
        """What they show: queries of one concept are not independent, and intervals resample concepts."""

    def query_sets(self, split: str) -> list[str]:
        """Creators that they name."""

    def training_sets(self) -> list[str]:
        """Creators of the training images."""

    def query_seeds(self, split: str) -> list[int]:
        """Seeds of the noise that retrained models sample the queries again from."""

    def sampler(self, device: torch.device) -> Sampler | None:
        """How they are sampled and decoded; `None` where pictures are not wanted."""


def add_retrainable_flags(parser: argparse.ArgumentParser) -> None:
    """`--mode`, the small testbed by default, `--root`, and what can be chosen on MSCOCO."""
    add_testbed_flags(parser, COCO)
    parser.set_defaults(mode=JUDGED_MODE)
    group = parser.add_argument_group(f"{COCO} only, the same for all commands on the same models")
    switch, bf16 = argparse.BooleanOptionalAction, "train under bfloat16 autocast (default: yes)"
    group.add_argument("--bf16", action=switch, default=None, help=bf16)
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    pipeline = "Stable Diffusion 2 as diffusers saves it, or its name on the hub, for pictures (default: ΔL alone)"
    group.add_argument("--pipeline", help=pipeline)


def retrainable_from(args: argparse.Namespace) -> Retrainable:
    """What the flags name; `ValueError` if some of them are another's."""
    given = {"bf16": args.bf16, "compile": args.compile or None, "pipeline": args.pipeline}
    given = {name: value for name, value in given.items() if value is not None}
    if args.mode == COCO:
        return Coco(**given) if args.root is None else Coco(root=args.root, **given)
    if given:
        raise ValueError(f"--{next(iter(given))}: expected --mode {COCO} beside it, found --mode {args.mode}")
    return testbed_from(args)


def require_judged(testbed: Retrainable, split: str) -> None:
    """`ValueError` unless retrained models are measured on the queries of `split`."""
    if split not in testbed.judged:
        raise ValueError(f"--split: expected {' or '.join(testbed.judged)} for {testbed.name}, found {split}")
