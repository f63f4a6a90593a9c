"""Evaluates features and rankers against the teacher's rankings: mAP(L) over the whole training set.

    python eval.py --ftype effnet+minilm --checkpoint weights/emoji_effnet+minilm.pth --output results/eval.csv
    python eval.py --ftype effnet minilm effnet+minilm                     # untuned features only
    python eval.py --mode coco --ftype dino+clip_text --checkpoint weights/dino+clip_text.pth

Prints untuned, tuned, popularity, chance and the teacher's reliability; --output writes the same as CSV and JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastgda.core import best_device, command_line
from fastgda.dataset import MODES, layout
from fastgda.evaluation import Candidate, evaluate, format_table, save_report
from fastgda.flags import device


def candidates(args: argparse.Namespace) -> list[Candidate]:
    """Feature types with their checkpoints: one checkpoint per type in order, or any number for a single type."""
    if args.feature_dir is not None and len(args.ftype) > 1:
        raise ValueError(f"--feature_dir: expected one --ftype with it, found {len(args.ftype)}")
    if len(args.ftype) == 1:
        groups = [tuple(args.checkpoint)]
    elif len(args.checkpoint) in (0, len(args.ftype)):
        groups = [(path,) for path in args.checkpoint] or [()] * len(args.ftype)
    else:
        expected = f"expected one for each of the {len(args.ftype)} feature types"
        raise ValueError(f"--checkpoint: {expected}, found {len(args.checkpoint)}")
    return [
        Candidate(ftype, layout(args.mode, ftype, args.data_dir, args.feature_dir), group)
        for ftype, group in zip(args.ftype, groups, strict=True)
    ]


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Evaluates features and rankers against the teacher's rankings.")
    add = parser.add_argument
    add("--mode", choices=MODES, default="emoji", help="which layout and which L (default: emoji)")
    add("--ftype", nargs="+", default=["effnet+minilm"], help="feature types, folders under <data_dir>/feats")
    add(
        "--checkpoint",
        type=Path,
        nargs="*",
        default=[],
        help="rankers: one per feature type, or any number for one type",
    )
    add("--data_dir", type=Path, help="folder of the artifacts (default: data/<mode>)")
    add("--feature_dir", type=Path, help="folder of the features (default: <data_dir>/feats/<ftype>)")
    add("--rank_file", type=Path, help="ground truth, .npz or .pkl (default: <data_dir>/influence_<split>)")
    add("--train_rank_file", type=Path, help="training rankings for the popularity baseline (default: influence_train)")
    add("--split", choices=("test", "val"), default="test", help="which queries (default: test)")
    add("--topk_values", type=int, nargs="+", help="values of L of mAP(L) (default: the mode's)")
    add("--output", type=Path, help="write <output>.csv and <output>.json")
    add("--device", type=device, default=best_device(), help="torch device")
    args = parser.parse_args(argv)
    document = evaluate(
        candidates(args),
        args.split,
        args.topk_values,
        rank_file=args.rank_file,
        train_rank_file=args.train_rank_file,
        device=args.device,
    )
    print(format_table(document))
    if args.output is not None:
        print("wrote " + " and ".join(str(path) for path in save_report(document, args.output)))


if __name__ == "__main__":
    sys.exit(main())
