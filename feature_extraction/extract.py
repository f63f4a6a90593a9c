"""Extracts features of the training set and of the queries in the released layout.

    python -m feature_extraction.extract --mode emoji --ftype effnet+minilm
    python -m feature_extraction.extract --mode coco --ftype dino+clip_text --bf16
    python -m feature_extraction.extract --source laion/ --ftype clip --out data/laion/feats    # tar, Parquet, folder
    python -m feature_extraction.extract --mode emoji --ftype effnet --dry_run    # estimates; writes nothing

Writes <out>/<ftype>/{data_feats,train_query_feats,val_query_feats,test_query_feats}.npy (float32 [images, D], row = id)
and manifest.json. Work is cut into shards (feature_extraction/shards.py): after Ctrl-C the same command goes on from
the last whole shard. `--shards 4 --shard 0` ... `--shard 3` divide it over four processes that share the folder, and
`--merge` puts their shards together: the same bytes as one process writes. A split whose pictures, encoder and file are
unchanged is skipped. A composition a+b is made from the files of a and b, which are extracted first where they are not
up to date. A picture that cannot be read keeps its row, as zeros, and is listed in <split>_skipped.json. `--workers 8`
has Ray Data make the shards, on this machine or on the nodes of the cluster at `--address`: the same bytes again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import numpy as np

from fastgda.core import command_line, command_parser, load_npy
from fastgda.flags import add_flags, from_flags
from feature_extraction.encoders import ENCODERS, concatenate, part_names
from feature_extraction.extraction import ExtractConfig, Extraction, forget
from feature_extraction.measure import seconds_per_image
from feature_extraction.shards import feature_path, read_skipped, save_skipped, skipped_path, write_rows


def extract(config: ExtractConfig) -> None:
    """Brings the features of `config.ftype`, and of its parts, up to date; one process of several makes its shards."""
    work = Extraction(config)
    for ftype in work.ftypes:
        folder, current = work.folder(ftype), work.current(ftype)
        todo = [split for split in config.all_splits if split not in current]
        if not todo:
            print(f"{folder}: up to date")
        elif config.shard is not None:
            if "+" not in ftype:
                work.encode(ftype, todo)
                print(f"{folder}: shards of process {config.shard} of {config.shards}")
        else:
            finish(work, ftype, todo, current)
            print(f"{folder}: {', '.join(todo)}")


def finish(work: Extraction, ftype: str, todo: list[str], current: dict[str, str]) -> None:
    """Makes what is missing of the splits `todo` and writes their feature files and the manifest.

    Shards of other work are removed at the end, but not by a merge: other processes may still be making them.
    """
    folder = work.folder(ftype)
    if not current:
        forget(folder)
    for split in todo:
        if "+" in ftype:
            compose(work, ftype, split)
        else:
            if work.config.workers is not None:
                # imported here, because extraction needs no Ray otherwise
                from feature_extraction.cluster import encode_on_workers

                encode_on_workers(work, ftype, split)
            elif not work.config.merge:
                work.encode(ftype, [split])
            work.merge(ftype, split)
        current[split] = work.hashes[split]
        work.record(ftype, current)
        if skipped := read_skipped(folder, split):
            print(f"{skipped_path(folder, split)}: {len(skipped)} unreadable pictures, their rows are zero")
    shards = folder / ".shards"
    if not work.config.merge:
        shutil.rmtree(shards, ignore_errors=True)
    elif shards.is_dir() and not any(shards.iterdir()):
        shards.rmdir()


def compose(work: Extraction, ftype: str, split: str) -> None:
    """Writes the features of a composition from the files of its parts; a row that one part lacks is zero."""
    names, step = part_names(ftype), work.config.shard_rows
    paths = [feature_path(work.folder(name), split) for name in names]
    arrays = [load_npy(path, (None, ENCODERS[name].dim), mmap=True) for path, name in zip(paths, names, strict=True)]
    skipped = {entry["id"]: entry for name in names for entry in read_skipped(work.folder(name), split)}

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(arrays[0]), step):
            block = concatenate([array[start : start + step] for array in arrays], work.config.joined)
            block[[row - start for row in skipped if start <= row < start + step]] = 0
            yield block

    folder = work.folder(ftype)
    write_rows(feature_path(folder, split), blocks(), len(arrays[0]), sum(ENCODERS[name].dim for name in names))
    save_skipped(folder, split, [skipped[row] for row in sorted(skipped)])


def dry_run(config: ExtractConfig) -> None:
    """Prints, for each encoder and split, the images, the seconds estimated from a short run, and the bytes."""
    work = Extraction(config)
    total_seconds, total_bytes = 0.0, 0
    for ftype in work.ftypes:
        current, width = work.current(ftype), sum(ENCODERS[part].dim for part in part_names(ftype))
        todo = [split for split in config.all_splits if split not in current]
        rate = 0.0
        if todo and "+" not in ftype:
            rate = seconds_per_image(work.load(ftype, todo[0]), work.tables[todo[0]])
        for split in config.all_splits:
            images = left = len(work.tables[split])
            if "+" not in ftype:
                plan = work.plan(ftype, split)
                images = sum(len(plan.rows(start)) for start in work.share(plan))
                left = sum(len(plan.rows(start)) for start in plan.missing(work.share(plan)))
            need = (rate * left, 4 * images * width) if split in todo else (0.0, 0)
            state = f"about {need[0]:.0f} s, {need[1] / 1e6:.1f} MB" if split in todo else "up to date"
            print(f"{feature_path(work.folder(ftype), split)}: {images} images, {state}")
            total_seconds, total_bytes = total_seconds + need[0], total_bytes + need[1]
    print(f"total: about {total_seconds:.0f} s on {config.torch_device}, {total_bytes / 1e6:.1f} MB; nothing written")


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m feature_extraction.extract", __doc__)
    add_flags(parser, ExtractConfig)
    config = from_flags(ExtractConfig, parser.parse_args(argv))
    if config.dry_run:
        dry_run(config)
    else:
        extract(config)


if __name__ == "__main__":
    sys.exit(main())
