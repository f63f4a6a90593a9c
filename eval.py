"""Evaluates features and rankers against the teacher's rankings: mAP(L) over the whole training set.

    python eval.py --ftype effnet+minilm --checkpoint weights/emoji_effnet+minilm.pth --output results/eval.csv
    python eval.py --ftype effnet minilm effnet+minilm                     # untuned features only
    python eval.py --mode coco --ftype dino+clip_text --checkpoint weights/dino+clip_text.pth

    python eval.py --ftype effnet --checkpoint weights/effnet.pth --index effnet.index    # exact search and index

Prints untuned, tuned, popularity, chance and the teacher's reliability; --output writes the same and more (bootstrap
intervals, overlap, recall@k, NDCG@k) as CSV and JSON, --per_query the values of each query.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastgda.core import best_device, command_line
from fastgda.dataset import MODES, layout
from fastgda.evaluation import Candidate, evaluate
from fastgda.flags import device
from fastgda.report import format_table, save_per_query, save_report


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
    index = None
    if args.index is not None:
        # imported here, because evaluation needs no FAISS otherwise
        from fastgda.index import Index

        if len(args.ftype) > 1:
            raise ValueError(f"--index: expected one --ftype with it, found {len(args.ftype)}")
        index = Index(args.index)
    return [
        Candidate(ftype, layout(args.mode, ftype, args.data_dir, args.feature_dir), group, index, args.index_depth)
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
    add("--cutoffs", type=int, nargs="+", help="values of k of recall@k and NDCG@k (default: 10 100 1000)")
    add("--index", type=Path, help="evaluate this FAISS index of the training images, too")
    add("--index_depth", type=int, help="neighbours asked of the index; the rest share the last place (default: all)")
    add("--output", type=Path, help="write <output>.csv and <output>.json")
    add("--per_query", type=Path, metavar="CSV", help="write one line for each method, query and L")
    add("--device", type=device, default=best_device(), help="torch device")
    args = parser.parse_args(argv)
    document = evaluate(
        candidates(args),
        args.split,
        args.topk_values,
        rank_file=args.rank_file,
        train_rank_file=args.train_rank_file,
        cutoffs=args.cutoffs,
        per_query=args.per_query is not None,
        device=args.device,
    )
    print(format_table(document))
    if args.output is not None:
        print("wrote " + " and ".join(str(path) for path in save_report(document, args.output)))
    if args.per_query is not None:
        save_per_query(document, args.per_query)
        print(f"wrote {args.per_query}")


if __name__ == "__main__":
    sys.exit(main())
