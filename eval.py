"""Evaluates features and rankers against the teacher's rankings: mAP(L) over the whole training set.

    python eval.py --ftype effnet+minilm --checkpoint weights/emoji_effnet+minilm.pth --output results/eval.csv
    python eval.py --ftype effnet minilm effnet+minilm                     # untuned features only
    python eval.py --mode coco --checkpoint weights/dino+clip_text.pth --output results/dino+clip_text.csv

    python eval.py --ftype effnet --checkpoint weights/effnet.pth --index effnet.index    # exact search and index

Prints untuned, tuned, popularity, chance and the teacher's reliability; --output writes the same and more (bootstrap
intervals, overlap, recall@k, NDCG@k) as CSV and JSON, --per_query the values of each query. For one checkpoint in mode
coco the CSV is the released code's table of k, mAP and its error, and <output>_methods.csv the longer one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastgda.core import best_device, command_line, command_parser
from fastgda.dataset import FTYPES, MODES, layout
from fastgda.evaluation import Candidate, evaluate
from fastgda.flags import device
from fastgda.ranker import NORMS, load_ranker
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
        from fastgda.index import Index, load_embedding

        if len(args.ftype) > 1:
            raise ValueError(f"--index: expected one --ftype with it, found {len(args.ftype)}")
        checkpoint = args.checkpoint[0] if args.checkpoint else None
        index = Index(args.index, ranker=load_embedding(checkpoint, unit=checkpoint is None)[2])
    return [
        Candidate(ftype, layout(args.mode, ftype, args.data_dir, args.feature_dir), group, index, args.index_depth)
        for ftype, group in zip(args.ftype, groups, strict=True)
    ]


def check_architecture(args: argparse.Namespace) -> None:
    """`ValueError` naming the checkpoint if its architecture is not the one that flags ask for."""
    wanted = {name: getattr(args, name) for name in ("hidden_sizes", "out_feat_dim", "input_norm")}
    wanted = {name: tuple(value) if isinstance(value, list) else value for name, value in wanted.items()}
    for path in args.checkpoint if any(value is not None for value in wanted.values()) else []:
        config = load_ranker(path).config
        for name, value in wanted.items():
            if value is not None and value != getattr(config, name):
                raise ValueError(f"{path}: expected --{name} {value}, found a ranker of {getattr(config, name)}")


def without_baseline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a report without the untuned features and the gain over them."""
    gains = {"gain", "gain_standard_error"}
    return [{k: v for k, v in row.items() if k not in gains} for row in rows if row["method"] != "untuned"]


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python eval.py", __doc__)
    add = parser.add_argument
    add("--mode", choices=MODES, default="emoji", help="which layout and which L (default: emoji)")
    add("--ftype", nargs="+", help="feature types, folders under <data_dir>/feats (default: the mode's usual one)")
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
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the untuned features in the same table (default: yes)",
    )
    add("--output", type=Path, help="write <output>.csv and <output>.json")
    add("--per_query", type=Path, metavar="CSV", help="write one line for each method, query and L")
    add("--hidden_sizes", type=int, nargs="*", help="sizes the checkpoint must have (default: whatever it has)")
    add("--out_feat_dim", type=int, help="output dimension it must have (default: whatever it has)")
    add("--input_norm", nargs="?", const="layer", choices=NORMS, help="input norm it must have (default: any)")
    add("--dropout", type=float, help="without effect at evaluation; accepted as in the released code")
    add("--device", type=device, default=best_device(), help="torch device")
    args = parser.parse_args(argv)
    args.ftype = args.ftype or [FTYPES[args.mode]]
    check_architecture(args)
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
    if not args.baseline:
        document["rows"] = without_baseline(document["rows"])
    print(format_table(document))
    if args.output is not None:
        written = save_report(document, args.output, released=args.mode == "coco" and len(args.checkpoint) == 1)
        print("wrote " + " and ".join(map(str, written)))
    if args.per_query is not None:
        save_per_query(document, args.per_query)
        print(f"wrote {args.per_query}")


if __name__ == "__main__":
    sys.exit(main())
