"""Makes any method a teacher: its scores of training, validation and test queries become rankings for train.py.

    for split in train val test; do python -m benchmark.methods das --select --split $split --mode emoji-mini; done
    python -m benchmark.distil das-selected --mode emoji-mini
    python train.py --mode emoji --data_dir data/emoji-mini --ftype minilm \\
        --rank_file data/emoji-mini/influence_das-selected_train.npz \\
        --val_rank_file data/emoji-mini/influence_das-selected_val.npz --output runs/rankers-mini/das-minilm.pth

Writes data/<mode>/influence_<name>_{train,val,test}.npz in the form of the project's own teacher: of a training query
the first images of its ranking and a sample of the rest, of the others all.
"""

from __future__ import annotations

import sys

from abu.testbed import SPLITS, testbed_from
from benchmark.retrain import add_judge_flags
from benchmark.scores import load_scores, score_path
from benchmark.teacher import rankings_of
from fastgda.core import command_line, command_parser, require_file, sha256_file, write_manifest
from fastgda.rankings import save_rankings


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.distil", __doc__)
    parser.add_argument("name", help="what the scores are called")
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    paths = {split: score_path(testbed, args.name, split) for split in SPLITS}
    for split, path in paths.items():
        require_file(path, f"python -m benchmark.methods {args.name} --split {split}")
    for split, path in paths.items():
        rankings = rankings_of(load_scores(path, testbed, split), split)
        out = testbed.data / f"influence_{args.name}_{split}.npz"
        save_rankings(out, rankings)
        inputs = {"scores": sha256_file(path)}
        write_manifest(out, {"teacher": args.name}, command="python -m benchmark.distil", inputs=inputs)
        print(f"{out}: {rankings.queries} queries, {rankings.candidates} images each")


if __name__ == "__main__":
    sys.exit(main())
