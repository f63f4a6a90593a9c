"""What a collection's pieces depend on: recorded in the manifests of its folders, which never mix two settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from abu.draws import DrawConfig


@dataclass(frozen=True)
class CollectConfig:
    """How many draws the gradients are averaged over."""

    bins: int = 5
    """Timestep bins; the normalised teacher is a weighted mean of cosines over them."""
    training_draws: int = 2
    """Draws per timestep bin, run and pass for each training image: one antithetic pair."""
    query_draws: int = 8
    """Draws per bin and run for each training query."""
    judged_query_draws: int = 24
    """The same for validation and test queries, which judge the ranker."""
    seed: int = 0
    bf16: bool = False

    def draws(self, part: str, timesteps: int) -> DrawConfig:
        """Draws of one run for a split of the queries or, with "training", for a pass over the training set."""
        per_bin = {"training": self.training_draws, "train": self.query_draws}.get(part, self.judged_query_draws)
        return DrawConfig(self.bins, per_bin, timesteps=timesteps, seed=self.seed)


@dataclass(frozen=True)
class MeasuredConfig(CollectConfig):
    """The same for gradients of another function than the loss."""

    measure: str = "square"
    """One of `abu.measures.MEASURES`."""


@dataclass(frozen=True)
class ScoreConfig:
    """How scores are made from gradients."""

    sketch: int | None = None
    """Numbers kept of each whitened gradient; all by default, because folding costs more rank than draws can mend."""
    seed: int = 0
    growth: bool = True
    """Compare the two runs after 1, 2, 4, … passes too, and not with all passes only."""
    bin_weights: tuple[float, ...] = (0.07, 0.08, 0.1, 0.2, 0.55)
    """Weights of the timestep bins in the normalised teacher, the clean end first: the inverse of the noise in a
    bin's cosines, measured between two runs on validation queries."""
    query_bits: int = 32
    """Bits of a query's numbers: 32, 8, or 16 (bfloat16, products too); what fewer cost in rank is measured by
    `python -m benchmark.compression`."""


@dataclass(frozen=True)
class StepConfig:
    """How the loss change after a step of finite size is measured."""

    bins: int = 5
    """Timestep bins."""
    draws: int = 1
    """Draws of (t, ε) and of the random signs per bin, run and pass for each training image."""
    fold: int = 8
    """Numbers of a whitened gradient that are added up to one for the squares."""
    seed: int = 0
    query_bits: int = 32
    """Bits of a number in products: 32, or 16 (bfloat16)."""
    query_bins: int = CollectConfig.bins
    query_draws: int = CollectConfig.query_draws
    judged_query_draws: int = CollectConfig.judged_query_draws
    """How the queries' gradients were collected."""

    def __post_init__(self) -> None:
        if self.query_bits not in (16, 32):
            raise ValueError(f"--query_bits: expected 16 or 32 for steps, found {self.query_bits}")

    def drawn(self, timesteps: int) -> DrawConfig:
        """Draws of one run and pass."""
        return DrawConfig(self.bins, self.draws, self.draws > 1, timesteps, self.seed)


Settings: TypeAlias = CollectConfig | ScoreConfig | StepConfig
