"""Builds, measures, changes and searches an index on disk.

    python -m fastgda.index build runs/index --vectors data/emoji/feats/effnet+minilm/data_feats.npy \\
        --checkpoint weights/emoji_effnet+minilm.pth --metadata data/emoji/trainset/emoji.parquet
    python -m fastgda.index calibrate runs/index --queries data/emoji/feats/effnet+minilm/train_query_feats.npy \\
        --checkpoint weights/emoji_effnet+minilm.pth --recall 0.95
    python -m fastgda.index remove runs/index --creator Google

Commands: build, plan, info, calibrate, add, remove, rebuild, search; each has its own --help with an example.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastgda.core import command_line, command_parser, load_npy
from fastgda.index.calibrate import calibrate
from fastgda.index.metadata import metadata_bytes
from fastgda.index.plan import describe, estimate, measured_flops
from fastgda.index.segment import BuildShards, SegmentConfig, one_by_one
from fastgda.index.source import Source, load_embedding
from fastgda.index.store import Change, Index
from fastgda.index.structure_flags import AUTO, add_structure_flags, builder_from, shards_from, structure_from

EXAMPLES = {
    "build": "build runs/index --vectors feats/data_feats.npy --checkpoint weights/ranker.pth --memory_gb 2 --dry_run",
    "plan": "plan --images 400000000 --dim 768 --memory_gb 16",
    "info": "info runs/index",
    "calibrate": "calibrate runs/index --queries feats/val_query_feats.npy --checkpoint weights/ranker.pth --k 100",
    "add": "add runs/index --vectors feats/new_feats.npy --checkpoint weights/ranker.pth --metadata new.parquet",
    "remove": "remove runs/index --list opted_out.txt",
    "rebuild": "rebuild runs/index --factory IVF1024,SQ8",
    "search": "search runs/index --queries feats/test_query_feats.npy --checkpoint weights/ranker.pth --k 5 --rows 0 1",
}
HELP = {
    "build": "build an index from .npy files of features or embeddings",
    "plan": "what an index of so many vectors would be and cost, before there are any",
    "info": "what an index holds, its measured recall, and whether to rebuild it",
    "calibrate": "set nprobe and re-rank depth for a wanted recall@k on real queries",
    "add": "add images",
    "remove": "remove images for good: by id, creator or list",
    "rebuild": "make one new segment of what is left, while the index is in use",
    "search": "the training images that most influenced some queries",
}


def run_build(args: argparse.Namespace) -> None:
    """`build`."""
    embed, _, ranker = load_embedding(args.checkpoint, args.unit)
    if args.dry_run:
        shapes = [load_npy(path, (None, None), mmap=True) for path in args.vectors]
        images, dim = sum(map(len, shapes)), embed(np.asarray(shapes[0][:1], dtype=np.float32)).shape[1]
        config, reasons = structure_from(args, images, dim)
        cost = estimate(config, images, dim, measured_flops(), metadata_bytes(args.metadata))
        print(describe(config, images, dim, cost))
        print("\n".join(f"- {reason}" for reason in reasons))
        return
    source = Source.from_files(args.vectors, args.metadata, embed)
    config, reasons = structure_from(args, len(source), source.dim)
    print("\n".join(f"- {reason}" for reason in reasons))
    Index.create(args.path, source, config, ranker=ranker, command=args.command_line, build=builder_from(args))
    print(f"{args.path}: {len(source):,} images, {config.factory}")
    _name_left_out(source)


def run_plan(args: argparse.Namespace) -> None:
    """`plan`."""
    config, reasons = structure_from(args, args.images, args.dim)
    print(describe(config, args.images, args.dim, estimate(config, args.images, args.dim, measured_flops())))
    print("\n".join(f"- {reason}" for reason in reasons))


def run_info(args: argparse.Namespace) -> None:
    """`info`."""
    index = Index(args.path, verify=args.verify)
    snapshot, manifest = index.snapshot(), index.manifest
    print(f"images       {snapshot.live:,} ({len(snapshot.state.removed):,} removed) x {snapshot.dim}")
    print(f"ranker       {manifest['inputs']['ranker']}")
    for segment in snapshot.segments:
        config, size = segment.config, segment.bytes
        print(f"segment      {segment.folder.name}: {len(segment):,} x {config.factory}, {size / 1e6:,.1f} MB on disk")
    print(
        f"memory       {sum(segment.held + len(segment) for segment in snapshot.segments) / 1e6:,.1f} MB held, up to "
        f"{sum(segment.mapped for segment in snapshot.segments) / 1e6:,.1f} MB of file cache: vectors, ids, metadata"
    )
    settings = snapshot.settings
    print(f"search       nprobe {settings.nprobe}, re-rank depth {settings.depth} at k = {settings.k}")
    found = snapshot.calibration
    print(
        "recall       not measured; run: python -m fastgda.index calibrate"
        if found is None
        else f"recall       recall@{found['k']} = {found['recall']:.4f} ± {found['standard_error']:.4f} on "
        f"{found['queries_judged_on']} queries against exact search ({found['wanted']} wanted), "
        f"measured with {found['images']:,} images"
    )
    _advise(index.path, index.advice())


def run_calibrate(args: argparse.Namespace) -> None:
    """`calibrate`."""
    index, queries = _opened_with_queries(args)
    found = calibrate(index, queries, args.k, args.recall)
    print(
        f"nprobe {found['nprobe']}, re-rank depth {found['depth']}: recall@{found['k']} = {found['recall']:.4f} ± "
        f"{found['standard_error']:.4f} on {found['queries_judged_on']} queries that it was not chosen on"
    )


def run_add(args: argparse.Namespace) -> None:
    """`add`."""
    embed, _, ranker = load_embedding(args.checkpoint, args.unit)
    index = Index(args.path, ranker=ranker, verify=args.verify)
    source = Source.from_files(args.vectors, args.metadata, embed)
    _report(args, index, index.add(source, command=args.command_line), "added")
    _name_left_out(source)


def run_remove(args: argparse.Namespace) -> None:
    """`remove`."""
    index = Index(args.path, verify=args.verify)
    ids = args.ids
    if args.list is not None:
        try:
            ids = [int(word) for word in args.list.read_text().split()]
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{args.list}: expected ids, one on a line, found something else ({error})") from error
    if ids is not None and any(not -(2**63) <= number < 2**63 for number in ids):
        raise ValueError("ids: expected integers of 64 bits, found larger ones")
    found = None if ids is None else np.array(ids, dtype=np.int64)
    _report(args, index, index.remove(found, creator=args.creator, command=args.command_line), "removed")


def run_rebuild(args: argparse.Namespace) -> None:
    """`rebuild`."""
    index = Index(args.path, verify=args.verify)
    snapshot = index.snapshot()
    if args.factory is None:
        kept = snapshot.largest.config
        on_disk = kept.on_disk if args.on_disk is None else args.on_disk
        config = SegmentConfig(kept.factory, args.store or kept.store, on_disk, shards_from(args, kept), args.seed)
    else:
        config, _ = structure_from(args, snapshot.live, snapshot.dim)
    _rebuild(args, index, config, builder_from(args))


def run_search(args: argparse.Namespace) -> None:
    """`search`."""
    index, queries = _opened_with_queries(args)
    rows = np.arange(len(queries)) if args.rows is None else np.array(args.rows)
    if rows.min() < 0 or rows.max() >= len(queries):
        raise ValueError(f"rows: expected 0 to {len(queries) - 1}, found {rows.min()} to {rows.max()}")
    found = index.search(queries[rows], args.k)
    for row, ids, scores in zip(rows, found.ids, found.scores, strict=True):
        for place, (name, score, known) in enumerate(zip(ids, scores, index.metadata(ids), strict=True), 1):
            rest = [str(value) for key, value in (known or {}).items() if key != "id"]
            print("\t".join([str(row), str(place), str(name), f"{score:.4f}", *rest]))


RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "build": run_build,
    "plan": run_plan,
    "info": run_info,
    "calibrate": run_calibrate,
    "add": run_add,
    "remove": run_remove,
    "rebuild": run_rebuild,
    "search": run_search,
}


def parser() -> argparse.ArgumentParser:
    """All flags."""
    top = command_parser("python -m fastgda.index", __doc__)
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, text in HELP.items():
        example = f"example: python -m fastgda.index {EXAMPLES[name]}"
        sub = commands.add_parser(name, help=text, description=text, epilog=example)
        if name != "plan":
            sub.add_argument("path", type=Path, help="folder of the index")
        if name not in ("build", "plan"):
            sub.add_argument(
                "--verify",
                action=argparse.BooleanOptionalAction,
                default=True,
                help="compare the hashes of all files at first, not only their sizes (default: yes)",
            )
        if name in ("build", "add"):
            sub.add_argument("--vectors", type=Path, nargs="+", required=True, help=".npy files [n, D], in order")
            sub.add_argument(
                "--metadata",
                type=Path,
                nargs="*",
                default=[],
                help="Parquet files with the same rows: id, caption or captions, creator, licence, path, url",
            )
        if name in ("calibrate", "search"):
            sub.add_argument("--queries", type=Path, required=True, help=".npy file [Q, D] of generated images")
            sub.add_argument("--k", type=int, default=100 if name == "calibrate" else 10, help="neighbours wanted")
        if name in ("build", "add", "calibrate", "search"):
            sub.add_argument("--checkpoint", type=Path, help="ranker that embeds the features (default: none)")
            sub.add_argument("--unit", action="store_true", help="without a ranker: put rows at unit length (cosine)")
        if name in ("build", "plan", "rebuild"):
            add_structure_flags(sub, default=None if name == "rebuild" else AUTO)
    _add_rest(commands.choices)
    return top


def _add_rest(subs: dict[str, Any]) -> None:
    text = "print bytes per vector, RAM, disk and training time, and build nothing"
    subs["plan"].add_argument("--images", type=int, required=True, help="number of vectors")
    subs["plan"].add_argument("--dim", type=int, default=768, help="their width (default: 768, a ranker's embedding)")
    subs["build"].add_argument("--dry_run", action="store_true", help=text)
    subs["calibrate"].add_argument("--recall", type=float, default=0.95, help="recall@k wanted (default: 0.95)")
    for name in ("add", "remove"):
        text = "rebuild at once where that is advised: a fifth of the images removed, or many segments"
        subs[name].add_argument("--rebuild", action="store_true", help=text)
    subs["search"].add_argument("--rows", type=int, nargs="+", help="rows of the query file (default: all)")
    which = subs["remove"].add_mutually_exclusive_group(required=True)
    which.add_argument("--ids", type=int, nargs="+", help="ids")
    which.add_argument("--creator", help="all images of exactly this creator")
    which.add_argument("--list", type=Path, help="text file of ids, one on a line")


def _opened_with_queries(args: argparse.Namespace) -> tuple[Index, np.ndarray]:
    _, embed_queries, ranker = load_embedding(args.checkpoint, args.unit)
    index = Index(args.path, ranker=ranker, verify=args.verify)
    features = load_npy(args.queries, (None, None), finite=True)
    if not len(features):
        raise ValueError(f"{args.queries}: expected at least one query, found none")
    return index, embed_queries(np.asarray(features, dtype=np.float32))


def _name_left_out(source: Source) -> None:
    if source.left_out:
        print(f"left out     {source.left_out:,} rows of zeros: pictures that could not be read")


def _report(args: argparse.Namespace, index: Index, change: Change, verb: str) -> None:
    """Says what a change did, and rebuilds where that is advised and was asked for."""
    print(f"{args.path}: {verb} {change.images:,} images")
    if change.advice is not None and args.rebuild:
        print(f"rebuilding   {change.advice}")
        _rebuild(args, index, index.snapshot().largest.config, one_by_one)
    else:
        _advise(args.path, change.advice)


def _rebuild(args: argparse.Namespace, index: Index, config: SegmentConfig, build: BuildShards) -> None:
    measured = index.snapshot().calibration is not None
    change = index.rebuild(config, command=args.command_line, build=build)
    print(f"{args.path}: rebuilt from {change.images:,} images")
    _advise(args.path, change.advice)
    if measured:
        print("run calibrate again: what was measured was the replaced structure")


def _advise(path: Path, advice: str | None) -> None:
    if advice is not None:
        print(f"advice       {advice}; run: python -m fastgda.index rebuild {path}")


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    args = parser().parse_args(argv)
    args.command_line = shlex.join(["python", "-m", "fastgda.index", *(sys.argv[1:] if argv is None else argv)])
    RUN[args.name](args)


if __name__ == "__main__":
    sys.exit(main())
