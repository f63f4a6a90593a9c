"""Trains the ranker on the teacher's rankings.

    python train.py --ftype effnet+minilm                              # emoji testbed, best recipe
    python train.py --ftype effnet+minilm --recipe paper               # the paper's: BCE on i.i.d. pairs
    python train.py --mode coco --name coco_baseline                   # released data under data/coco, paper's recipe
    torchrun --nproc_per_node 2 train.py --ftype effnet+minilm         # the same run by two processes

Writes the checkpoint with the best validation mAP(L) and its manifest; a killed run continues where it stopped, a
finished one is not repeated. Curves are in <run_dir>/log.json. `--mode coco` has the defaults of the released code and
takes its flags under their own names: feature type, training and validation queries, recipe, checkpoints/<name>.pth.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fastgda.core import (
    ROOT,
    best_device,
    command_line,
    command_parser,
    manifest_difference,
    require_file,
    sha256_file,
    write_manifest,
)
from fastgda.dataset import (
    COCO_VALIDATION,
    FTYPES,
    MODES,
    Layout,
    Split,
    default_levels,
    hold_out,
    hold_out_rows,
    layout,
    load_images,
    load_split,
)
from fastgda.distributed import Group, process_group
from fastgda.evaluation import Candidate, evaluate
from fastgda.flags import add_flags, device, from_flags
from fastgda.ranker import save_ranker
from fastgda.recipes import RECIPES, TrainConfig
from fastgda.report import format_table, save_report
from fastgda.tracking import Tracker
from fastgda.trainer import Trainer

DEFAULT_RECIPES = {"coco": "paper", "emoji": "best"}


def parser_for(recipe: str, mode: str = "emoji") -> argparse.ArgumentParser:
    """The parser whose training defaults are those of `recipe`, the others those of `mode`."""
    parser = command_parser("python train.py", __doc__)
    add = parser.add_argument
    add(
        "--recipe",
        choices=sorted(RECIPES),
        default=recipe,
        help="which defaults the training flags have (default: best, for coco paper)",
    )
    add("--mode", choices=MODES, default=mode, help="which layout, defaults and L (default: emoji)")
    add("--ftype", default=FTYPES[mode], help="feature type, a folder under <data_dir>/feats (default: the mode's)")
    add("--data_dir", type=Path, help="folder of the artifacts (default: data/<mode>)")
    add("--feature_dir", type=Path, help="folder of the features (default: <data_dir>/feats/<ftype>)")
    add("--rank_file", type=Path, help="training rankings, .npz or .pkl (default: <data_dir>/influence_train)")
    add("--val_rank_file", type=Path, help="validation rankings (default: <data_dir>/influence_val)")
    add("--val_queries", type=int, default=0, help="hold out this many training queries instead of a validation split")
    add("--val_start", type=int, help="validate on the training queries from this one (default: for coco 4900)")
    add("--val_end", type=int, help="up to before this one (default: for coco 5000)")
    add("--train_size", type=int, help="number of training queries to use (default: all that validation leaves)")
    add("--nn_cutoff", type=int, help="use the first candidates of each training query's ranking only (default: all)")
    add("--topk_values", type=int, nargs="+", help="values of L of mAP(L) (default: the mode's)")
    written = "<output_dir>" if mode == "coco" else "weights"
    stem = "<ftype>" if mode == "coco" else f"{mode}_<ftype>"
    add("--output", type=Path, help=f"checkpoint to write (default: {written}/{stem}.pth)")
    add("--name", help="write <output_dir>/<name>.pth instead, and <name>_eval.csv with --eval_after_train")
    text = "folder of --name, and for coco of the default checkpoint (default: checkpoints)"
    add("--output_dir", type=Path, default=ROOT / "checkpoints", help=text)
    add("--run_dir", type=Path, help="folder for the state and log of the run (default: runs/<name of the output>)")
    add("--device", type=device, default=best_device(), help="torch device")
    add("--half", action="store_true", help="store the checkpoint in float16, at half the size")
    add("--eval_after_train", action="store_true", help="evaluate on the test split afterwards")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    add("--wandb_project", default="fastgda", help="its project (default: fastgda)")
    add("--wandb_entity", help="its team or user (default: yours)")
    add_flags(parser, TrainConfig, RECIPES[recipe])
    return parser


def load_data(args: argparse.Namespace, paths: Layout) -> tuple:
    """(images [N, D], training split, validation split, hashes of the files read)."""
    images = load_images(paths)
    train = load_split(paths, "train", images, args.rank_file)
    files = {
        "images": paths.images,
        "train_queries": paths.features("train"),
        "train_rankings": args.rank_file or paths.ranking("train"),
    }
    validation: Split
    rows = validation_rows(args)
    if args.val_queries:
        train, validation = hold_out(train, args.val_queries)
    elif rows is not None:
        train, validation = hold_out_rows(train, *rows)
    else:
        validation = load_split(paths, "val", images, args.val_rank_file)
        files["val_queries"] = paths.features("val")
        files["val_rankings"] = args.val_rank_file or paths.ranking("val")
    if args.train_size is not None:
        if not 1 <= args.train_size <= train.queries:
            raise ValueError(f"--train_size: expected 1..{train.queries} training queries, found {args.train_size}")
        train = train.rows(slice(0, args.train_size))
    if args.nn_cutoff is not None:
        try:
            train = Split(train.features, train.rankings.first(args.nn_cutoff))
        except ValueError as error:
            raise ValueError(f"--nn_cutoff: {error}") from error
    return images, train, validation, {name: sha256_file(require_file(path)) for name, path in files.items()}


def validation_rows(args: argparse.Namespace) -> tuple[int, int] | None:
    """The training queries to validate on, where they are named by rows: for COCO by default the paper's."""
    start, end = args.val_start, args.val_end
    if args.val_queries:
        return None
    if start is None and end is None and (args.mode != "coco" or args.val_rank_file is not None):
        return None
    start, end = (usual if row is None else row for row, usual in zip((start, end), COCO_VALIDATION, strict=True))
    return start, end


def train_ranker(
    args: argparse.Namespace, argv: list[str], paths: Layout, output: Path, group: Group, device: torch.device
) -> tuple[int, ...]:
    """Trains and writes `output` unless it is up to date; returns the values of L. One of the processes of `group`."""
    config = from_flags(TrainConfig, args)
    images, train, validation, inputs = load_data(args, paths)
    levels = tuple(args.topk_values or default_levels(args.mode, len(images)))
    recorded = {
        **asdict(config),
        "ftype": args.ftype,
        "half": args.half,
        "candidates": train.rankings.candidates,
        "levels": levels,
        "train_queries": train.queries,
        "val_queries": validation.queries,
    }
    if (rows := validation_rows(args)) is not None:
        recorded["val_rows"] = rows
    if manifest_difference(output, recorded, inputs) is None:
        if group.first:
            print(f"{output}: up to date")
        return levels
    wanted = args.wandb and group.first
    place = run_dir_of(args, output)
    tracker = Tracker(args.wandb_project, output.stem, recorded, place, args.wandb_entity) if wanted else None
    trainer = Trainer(
        config,
        images,
        train,
        validation,
        levels=levels,
        run_dir=place,
        device=device,
        tracker=tracker,
        group=group,
    )
    ranker = trainer.run()
    if not group.first:
        return levels
    if trainer.best_epoch == 0:
        found = f"no validation was better than the one before training, mAP(L) {trainer.best:.3f}"
        print(f"warning: {output} holds the untrained ranker: {found}", file=sys.stderr)
    save_ranker(output, ranker, torch.float16 if args.half else torch.float32, ftype=args.ftype)
    command = f"python train.py {' '.join(argv)}".strip()
    write_manifest(output, recorded, command=command, inputs=inputs, history=trainer.history)
    trainer.checkpoint_file.unlink()
    if tracker is not None:
        tracker.close()
    print(f"{output}: validation mAP(L) {trainer.best:.3f} on average over L = {', '.join(map(str, levels))}")
    return levels


def output_of(args: argparse.Namespace) -> Path:
    """The checkpoint to write."""
    if args.name is not None:
        if args.output is not None:
            raise ValueError("--name: expected it without --output, found both")
        return args.output_dir / f"{args.name}.pth"
    # weights/<ftype>.pth is where the released ranker lies
    coco = args.mode == "coco"
    folder, stem = (args.output_dir, args.ftype) if coco else (ROOT / "weights", f"{args.mode}_{args.ftype}")
    return args.output or folder / f"{stem}.pth"


def run_dir_of(args: argparse.Namespace, output: Path) -> Path:
    """The folder of the run that writes `output`."""
    return args.run_dir or ROOT / "runs" / output.stem


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--recipe", choices=sorted(RECIPES))
    choice.add_argument("--mode", choices=MODES, default="emoji")
    chosen = choice.parse_known_args(argv)[0]
    args = parser_for(chosen.recipe or DEFAULT_RECIPES[chosen.mode], chosen.mode).parse_args(argv)
    paths = layout(args.mode, args.ftype, args.data_dir, args.feature_dir)
    output = output_of(args)
    with process_group(args.device) as (group, device):
        levels = train_ranker(args, argv, paths, output, group, device)
    if args.eval_after_train and group.first:
        candidate = Candidate(args.ftype, paths, (output,))
        document = evaluate([candidate], "test", levels, train_rank_file=args.rank_file, device=args.device)
        print(format_table(document))
        report = output.with_name(f"{args.name}_eval.csv") if args.name else run_dir_of(args, output) / "eval.csv"
        written = save_report(document, report, released=args.mode == "coco")
        print("wrote " + " and ".join(map(str, written)))


if __name__ == "__main__":
    sys.exit(main())
