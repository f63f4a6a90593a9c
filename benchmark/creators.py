"""Leave-one-creator-out: does the summed influence of a creator's images say what its absence does to a query?

    python -m benchmark.retrain reference --models 4
    python -m benchmark.retrain creators --models 3             # every creator removed in turn, three seeds each
    python -m benchmark.creators data/emoji-mini/scores/*.npy   # prints the table, writes results/creators/
    python -m benchmark.creators data/emoji-mini/scores/mine.npy --add    # keeps what the report has of others

The true effect of a creator on a query is the rise of the query's loss when the model is trained from scratch without
the creator's images, over the reference model of the same seed, averaged over seeds. A method predicts it by the sum of
its scores over these images. Reported for each method: Spearman over creators, mean over queries; how often the creator
with the largest predicted effect is the one with the largest true effect. The ceiling is the Spearman that the truth
would reach, whose mean over a few seeds is noisy; beside it what one seed says of the others. Removing a creator also
removes its prompt's style from the captions: a query in that style loses most, so the creator that the prompt names is
a baseline of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from abu.testbed import testbed_from
from benchmark.lds import correlate, judged_path
from benchmark.losses import Losses, open_losses
from benchmark.reports import add_add_flag, foundation, load_report, with_rows
from benchmark.retrain import add_judge_flags, loss_changes, without_creators
from benchmark.scores import by_method
from fastgda.core import command_line, command_parser, environment, save_json
from fastgda.metrics import bootstrap_interval

PROMPT = "creator named by the prompt"


@dataclass(frozen=True)
class Effects:
    """What removing each creator does to the loss of each query."""

    names: tuple[str, ...]
    """The creators."""
    change: np.ndarray
    """Rise of the loss [seeds, creators, Q]."""

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds [Q, creators]."""
        return self.change.mean(0).T


def load_effects(stored: Losses, split: str, models: int, count: int) -> Effects:
    """From stored retrainings: `models` seeds of each removal, `count` reference models."""
    sets = stored.sets("training")
    names, change = tuple(dict.fromkeys(sets)), loss_changes(stored, without_creators(sets, models), count, split)
    return Effects(names, change.reshape(len(names), models, -1).swapaxes(0, 1))


def by_creator(scores: np.ndarray, sets: list[str], names: tuple[str, ...]) -> np.ndarray:
    """Sums [Q, creators] of scores [Q, N] over each creator's images."""
    member = np.asarray(sets)[:, None] == np.asarray(names)
    return scores @ member.astype(np.float64)


def agreement(predicted: np.ndarray, effects: np.ndarray, concepts: list[str] | None = None) -> dict[str, Any]:
    """How well `predicted` [Q, creators] orders `effects` [Q, creators]: Spearman and top-1, with bootstrap intervals
    over the queries' concepts (default: over the queries).
    """
    order = correlate(predicted, effects)
    first = (predicted.argmax(1) == effects.argmax(1)).astype(np.float64)
    return {
        "spearman": float(order.mean()),
        "spearman_interval": bootstrap_interval(order, concepts).tolist(),
        "top1": float(first.mean()),
        "top1_interval": bootstrap_interval(first, concepts).tolist(),
        "per_query": order.tolist(),
    }


def ceiling(change: np.ndarray) -> dict[str, Any] | None:
    """Spearman that the creators' true mean effects would reach, from `change` [seeds, creators, Q], and the agreement
    of each seed with the mean of the others, averaged; `None` for one seed.

    With r the mean correlation of two seeds, the mean of S seeds correlates with its own expectation by √(S r / (1 +
    (S - 1) r)) (Spearman and Brown; attenuation).
    """
    seeds = len(change)
    if seeds < 2:
        return None
    reliability = float(np.mean([correlate(first.T, second.T) for first, second in combinations(change, 2)]))
    r = max(reliability, 0)
    rows = [agreement(seed.T, np.delete(change, index, 0).mean(0).T) for index, seed in enumerate(change)]
    one = {key: float(np.mean([row[key] for row in rows])) for key in ("spearman", "top1")}
    return {"spearman": (seeds * r / (1 + (seeds - 1) * r)) ** 0.5, "reliability": reliability, "one_seed": one}


def named_by_prompt(query_sets: list[str], names: tuple[str, ...]) -> np.ndarray:
    """The baseline [Q, creators] that predicts an effect of the prompt's creator and of no other."""
    return (np.asarray(query_sets)[:, None] == np.asarray(names)).astype(np.float64)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.creators", __doc__)
    parser.add_argument("scores", type=Path, nargs="+", help="arrays [Q, N] of a method, higher = more influential")
    add_judge_flags(parser)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="which queries (default: test)")
    parser.add_argument("--models", type=int, default=3, help="seeds of each removal (default: 3)")
    parser.add_argument("--references", type=int, default=4, help="models trained on everything (default: 4)")
    parser.add_argument("--output", type=Path, help="default: results/creators/creators[_<split>].json")
    add_add_flag(parser)
    args = parser.parse_args(argv)
    testbed, files = testbed_from(args), by_method(args.scores)
    stored = open_losses(testbed)
    output = args.output or judged_path("creators/creators", args.split)
    rests_on = {"mode": testbed.name, "split": args.split, "models": args.models, "references": args.references}
    rests_on |= foundation(stored, args.split)
    earlier = load_report(output, rests_on, "python -m benchmark.creators")["rows"] if args.add else []
    effects = load_effects(stored, args.split, args.models, args.references)
    sets, concepts = stored.sets("training"), stored.concepts(args.split)
    prompts = named_by_prompt(stored.sets(args.split), effects.names)
    rows = [{"method": PROMPT} | agreement(prompts, effects.mean, concepts)]
    for name, path in files.items():
        predicted = by_creator(stored.scores(path, args.split), sets, effects.names)
        rows.append({"method": name} | agreement(predicted, effects.mean, concepts))
    for row in rows:
        print(f"{row['method']:28s} Spearman {row['spearman']:+.4f}  top-1 {row['top1']:.3f}")
    report = rests_on | {
        "creators": effects.names,
        "effects": effects.mean.tolist(),
        "rows": with_rows(earlier, rows),
        "ceiling": ceiling(effects.change),
        "environment": environment(),
    }
    if (bound := report["ceiling"]) is not None:
        print(f"{'ceiling':28s} Spearman {bound['spearman']:+.4f}")
        print(f"{'one seed for the others':28s} Spearman {bound['one_seed']['spearman']:+.4f}")
    save_json(output, report)


if __name__ == "__main__":
    sys.exit(main())
