"""Scores training pictures of any source model for queries: by an expansion of the loss change, or the exact one.

    python -m abu.score --source data/coco/model.bin --trainset data/coco/trainset --curvature data/coco/ekfac_fisher \\
        --queries data/coco/query_test --output scores.npz --query 0 1 2 --stop 1000
    python -m abu.score --source sd-v1-4/ --trainset laion-encoded --curvature sd-ekfac --queries generated \\
        --settings stable-diffusion --output scores.npz --change exact

`--trainset` and `--queries` are folders that abu.encode_pictures wrote (or the released ones), `--curvature` what
abu.fisher fit wrote for the same source. A picture's loss is averaged over stratified timesteps and its captions; of
its unflipped and flipped view the larger score counts. Writes influence [Q, K], higher is more influential, of the
training pictures ids [K]. To first or second order in the step, one pass over them serves all queries; exact, each
query costs a pass.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from abu.amortised import Examples
from abu.curvature import Curvature
from abu.draws import DrawConfig
from abu.encoded import LATENTS, EncodedPictures
from abu.grouped import (
    Changes,
    WeightGradients,
    first_order_scores,
    moved,
    second_order_scores,
    unlearning_steps,
)
from abu.influence import mean_losses
from abu.kronfluence_files import load_curvature
from abu.layers import select_layers
from abu.pipelines import open_source, source_hashes
from abu.source import SETTINGS, PaperSettings, Source
from fastgda.core import best_device, command_line, save_npz, sha256_file, write_manifest
from fastgda.flags import add_flags, from_flags

AMORTISED = {"first-order": first_order_scores, "second-order": second_order_scores}
"""What one pass over the training pictures gives for all queries."""


@dataclass(frozen=True)
class ScoreConfig:
    """What is computed; what is left open is as the paper did it for that model."""

    settings: Literal["coco", "stable-diffusion"] = "coco"
    """Whose settings in the paper."""
    change: Literal["first-order", "second-order", "exact"] = "second-order"
    """The loss change: its expansion in the step, or measured on the unlearned model."""
    step: float | None = None
    """α of eq. 1."""
    images: int | None = None
    """N of eq. 1, pictures that the model was trained on."""
    timesteps: int | None = None
    """Timestep bins, one draw in each."""
    captions: int | None = None
    """Captions that the loss is averaged over."""
    query_draws: int | None = None
    """Draws for a query's gradient."""
    start: int = 0
    """First training picture that is scored."""
    stop: int | None = None
    """The one after the last; all without it."""
    seed: int = 0
    """Of timesteps and noise."""

    def resolved(self) -> PaperSettings:
        """The settings with what was given in their place; `ValueError` if a number is out of range."""
        base = SETTINGS[self.settings]
        names = ("step", "images", "timesteps", "captions", "query_draws")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if wrong := [name for name, value in given.items() if value <= 0]:
            raise ValueError(f"--{wrong[0]}: expected a positive number, found {given[wrong[0]]}")
        return PaperSettings(**{**vars(base), **given})


def query_steps(
    source: Source, curvature: Curvature, queries: EncodedPictures, ids: list[int], config: ScoreConfig
) -> dict[str, Tensor]:
    """Δθ of each query: name -> [Q, out, in]."""
    settings = config.resolved()
    per_bin = -(-settings.query_draws // settings.timesteps)
    draws = DrawConfig(settings.timesteps, per_bin, timesteps=len(source.schedule), seed=config.seed)
    engine = WeightGradients(source.denoiser, source.schedule)
    bar = tqdm(ids, desc="queries", unit="query")
    found = [engine(queries.examples([row], source.device), draws) for row in bar]
    stacked = {name: torch.cat([gradients[name] for gradients in found]) for name in found[0]}
    return unlearning_steps(curvature, stacked, settings.step, settings.images)


def loss_changes(source: Source, examples: Examples, steps: Changes, draws: DrawConfig) -> Tensor:
    """𝓛(z, θ0 + Δθ) − 𝓛(z, θ0) [Q, K] with the same noise in both; one changed model is in memory at a time."""

    def losses(model: nn.Module) -> Tensor:
        return mean_losses([model], source.schedule, examples, draws)[0]

    before = losses(source.denoiser)
    queries = range(len(next(iter(steps.values()))))
    changed = (moved(source.denoiser, {name: matrix[row] for name, matrix in steps.items()}) for row in queries)
    return torch.stack([losses(model) - before for model in changed])


def score(
    source: Source, training: EncodedPictures, ids: list[int], steps: dict[str, Tensor], config: ScoreConfig
) -> Tensor:
    """τ [Q, K] of the training pictures `ids`: the mean over captions and draws, the maximum over views."""
    settings = config.resolved()
    draws = DrawConfig(settings.timesteps, 1, timesteps=len(source.schedule), seed=config.seed)
    amortised = AMORTISED.get(config.change)
    gradients = WeightGradients(source.denoiser, source.schedule)
    captions = min(settings.captions, training.captions)
    views = []
    for view in range(min(settings.views, training.views)):
        total: Tensor | None = None
        for caption in range(captions):
            examples = training.examples(ids, source.device, view=view, caption=caption)
            found = (
                amortised(gradients, examples, steps, draws).cpu()
                if amortised
                else loss_changes(source, examples, steps, draws)
            )
            total = found if total is None else total + found
        assert total is not None
        views.append(total / captions)
    return torch.stack(views).amax(0)


def parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    made = argparse.ArgumentParser(
        prog="python -m abu.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--source", required=True, help="COCO's model.bin, or a pipeline of diffusers")
    made.add_argument("--trainset", type=Path, required=True, help="folder of the encoded training pictures")
    made.add_argument("--queries", type=Path, required=True, help="folder of the encoded queries")
    made.add_argument("--query", type=int, nargs="+", help="numbers of the queries (default: all)")
    made.add_argument("--curvature", type=Path, required=True, help="folder of the factors")
    made.add_argument("--output", type=Path, required=True, help="the .npz file")
    made.add_argument("--top", type=int, default=10, help="training pictures to print (default: %(default)s)")
    add_flags(made, ScoreConfig)
    return made


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    config = from_flags(ScoreConfig, args)
    config.resolved()
    training, queries = EncodedPictures.open(args.trainset), EncodedPictures.open(args.queries, "query")
    stop = len(training) if config.stop is None else config.stop
    if not 0 <= config.start < stop <= len(training):
        raise ValueError(f"--start, --stop: expected a range within 0..{len(training)}, found {config.start}..{stop}")
    chosen, ids = args.query or list(range(len(queries))), list(range(config.start, stop))
    source = open_source(args.source, best_device())
    curvature = load_curvature(args.curvature).for_layers(select_layers(source.denoiser)).to(source.device)
    steps = query_steps(source, curvature, queries, chosen, config)
    influence = score(source, training, ids, steps, config)
    save_npz(args.output, influence=influence.float().numpy(), ids=np.array(ids), queries=np.array(chosen))
    inputs = source_hashes(args.source) | {"latents": sha256_file(args.trainset / LATENTS)}
    write_manifest(args.output, config, command="python -m abu.score", inputs=inputs)
    for query, row in zip(chosen, influence, strict=True):
        best = row.argsort(descending=True, stable=True)[: args.top].tolist()
        print(f"query {query}:", *(f"{ids[place]} ({row[place]:+.2e})" for place in best))


if __name__ == "__main__":
    sys.exit(main())
