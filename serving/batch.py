"""Attributes every picture of a folder, Parquet or WebDataset source, and writes Parquet.

    python -m serving.batch bundles/emoji generated/ --out runs/attributions --k 100 --dry_run
    python -m serving.batch bundles/emoji generated.tar --out runs/attributions --k 100

Sources are those of feature_extraction/sources.py: pictures with prompts as captions. Writes into the folder <out>

attributions-<first row>.parquet   query, key, prompt, place (from 1), id, score, and caption, creator, ... of the image
shares-<first row>.parquet         query, key, creator, share, low, high, images; where the bundle has a credit rule
skipped.json                       pictures that could not be read
manifest.json                      when all is done

A part is written whole, so after Ctrl-C the same command goes on from the last one. With another source, bundle or k,
or once the index changed, be it while the command runs, it refuses to mix results.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from fastgda.attributor import Attribution
from fastgda.core import (
    atomic_path,
    command_line,
    command_parser,
    manifest_path,
    save_json,
    sha256_file,
    write_manifest,
)
from fastgda.flags import add_flags, device, from_flags
from fastgda.index.journal import JOURNAL
from fastgda.index.metadata import COLUMNS
from feature_extraction.shards import Skipped
from feature_extraction.sources import Pictures, open_source
from serving.answer import creators_of
from serving.attributor import BATCH, Attributor
from serving.bundle import INDEX, Bundle, weights_for

PLAN, SKIPPED = "plan.json", "skipped.json"
TEXT = pa.string()
FOUND = pa.schema(
    [
        *(("query", pa.int64()), ("key", TEXT), ("prompt", TEXT), ("place", pa.int32())),
        *(("id", pa.int64()), ("score", pa.float32()), *((name, TEXT) for name in COLUMNS)),
    ]
)
SHARES = pa.schema(
    [
        *(("query", pa.int64()), ("key", TEXT), ("creator", TEXT), ("share", pa.float64())),
        *(("low", pa.float64()), ("high", pa.float64()), ("images", pa.int64())),
    ]
)
SAMPLE = 32
"""Pictures attributed by a dry run to tell how long all will take."""


@dataclass(frozen=True)
class BatchConfig:
    """What to attribute, with what, to where."""

    k: int = 100
    """Training images for each picture."""
    part_rows: int = 1024
    """Pictures in a part, the piece that is redone after an interruption."""
    max_corrupt: float = 0.01
    """Share of pictures that may be unreadable before the command stops."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.part_rows < 1:
            raise ValueError(f"--k {self.k} --part_rows {self.part_rows}: expected at least 1")
        if not 0 <= self.max_corrupt <= 1:
            raise ValueError(f"--max_corrupt {self.max_corrupt}: expected a share from 0 to 1")


def part_path(out: Path, start: int, name: str = "attributions") -> Path:
    """The file of the part that begins at row `start`."""
    return out / f"{name}-{start:09d}.parquet"


def inputs_of(bundle: Bundle, pictures: Pictures) -> dict[str, str]:
    """Hashes of what the results depend on."""
    return {
        "source": pictures.fingerprint,
        "bundle": sha256_file(manifest_path(bundle.path)),
        "index": sha256_file(bundle.path / INDEX / JOURNAL),
    }


def same_index(bundle: Bundle, journal: str) -> None:
    """`ValueError` if the index changed since its journal had the hash `journal`: an opt-out holds for all parts."""
    if sha256_file(bundle.path / INDEX / JOURNAL) != journal:
        raise ValueError(
            f"{bundle.path / INDEX}: expected the index as it was at the beginning, found images added or removed "
            "since; delete the results and begin again"
        )


def attribute_rows(attributor: Attributor, pictures: Pictures, rows: range, depth: int) -> Iterator[tuple]:
    """(row, attribution, None) of each picture, or (row, None, reason) where it cannot be read."""
    for start in range(rows.start, rows.stop, BATCH):
        images, captions, readable = [], [], []
        for row in range(start, min(start + BATCH, rows.stop)):
            try:
                image, caption = pictures.image(row), pictures.caption(row)
            except ValueError as error:
                yield row, None, str(error)
                continue
            images.append(image)
            captions.append(caption)
            readable.append(row)
        found = attributor.attribute_batch(images, captions, depth)
        yield from zip(readable, found, [None] * len(found), strict=True)


def found_rows(row: int, key: str, prompt: str, found: Attribution, k: int) -> Iterator[dict[str, Any]]:
    """What is written of one picture's first `k` training images."""
    ids, scores = found.ids[:k].tolist(), found.scores[:k].tolist()
    for place, (name, score, known) in enumerate(zip(ids, scores, found.metadata, strict=False), 1):
        entry = {"query": row, "key": key, "prompt": prompt, "place": place, "id": name, "score": score}
        yield entry | {column: (known or {}).get(column) for column in COLUMNS}


def write_part(attributor: Attributor, pictures: Pictures, rows: range, out: Path, k: int, bar: tqdm) -> Skipped:
    """Attributes `rows` and writes their part; returns the pictures that could not be read."""
    bundle = attributor.bundle
    credit = bundle.credit
    depth = bundle.depth(k)
    attributions: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    skipped: Skipped = []
    for row, found, reason in attribute_rows(attributor, pictures, rows, depth):
        key = pictures.keys[row]
        bar.update()
        if found is None:
            skipped.append({"id": row, "key": key, "reason": reason})
            continue
        attributions += found_rows(row, key, pictures.caption(row), found, k)
        if credit is not None:
            listed = credit.shares(found.scores, creators_of(found.metadata))
            shares += [{"query": row, "key": key} | asdict(share) for share in listed]
    if credit is not None:
        _write(part_path(out, rows.start, "shares"), shares, SHARES)
    # written last: its presence says that the part is whole
    _write(part_path(out, rows.start), attributions, FOUND.with_metadata({"skipped": json.dumps(skipped)}))
    return skipped


def skipped_in(path: Path) -> Skipped:
    """The unreadable pictures that a part lists."""
    try:
        return json.loads(pq.read_schema(path).metadata[b"skipped"])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a part of this command, found another file ({error})") from error


def run(attributor: Attributor, pictures: Pictures, out: Path, config: BatchConfig, command: str) -> Skipped:
    """Writes all parts that are missing, then the list of unreadable pictures and the manifest."""
    inputs = inputs_of(attributor.bundle, pictures)
    plan = {"config": asdict(config), "inputs": inputs}
    if (out / PLAN).is_file() and (found := json.loads((out / PLAN).read_text())) != plan:
        raise ValueError(f"{out}: expected results of {plan}, found those of {found}; choose another --out")
    save_json(out / PLAN, plan)
    starts = range(0, len(pictures), config.part_rows)
    done = [start for start in starts if part_path(out, start).is_file()]
    skipped = [entry for start in done for entry in skipped_in(part_path(out, start))]
    rows = {start: range(start, min(start + config.part_rows, len(pictures))) for start in starts}
    with tqdm(
        total=len(pictures), initial=sum(len(rows[start]) for start in done), desc="attribute", unit="image"
    ) as bar:
        for start in starts:
            if start not in done:
                same_index(attributor.bundle, inputs["index"])
                skipped += write_part(attributor, pictures, rows[start], out, config.k, bar)
            if len(skipped) > config.max_corrupt * len(pictures):
                raise ValueError(
                    f"{pictures.path}: expected at most {config.max_corrupt:.2%} unreadable pictures (--max_corrupt), "
                    f"found {len(skipped)} of {len(pictures)}; the first: {skipped[0]['reason']}"
                )
    same_index(attributor.bundle, inputs["index"])
    save_json(out / SKIPPED, sorted(skipped, key=lambda entry: entry["id"]))
    write_manifest(
        out,
        config,
        command=command,
        inputs=inputs,
        files=tuple(sorted(out.glob("*.parquet"))),
        images=len(pictures),
        skipped=len(skipped),
    )
    return skipped


def dry_run(attributor: Attributor, pictures: Pictures, config: BatchConfig) -> str:
    """What the command would do, in words; time and size from some of the pictures."""
    sample = range(min(SAMPLE, len(pictures)))
    start = time.perf_counter()
    list(attribute_rows(attributor, pictures, sample, config.k))
    seconds = (time.perf_counter() - start) / len(sample) * len(pictures)
    return f"{len(pictures):,} pictures, {len(pictures) * config.k:,} rows, about {seconds:.0f} s; nothing written"


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m serving.batch", __doc__)
    parser.add_argument("bundle", type=Path, help="folder that python -m serving.bundle made")
    parser.add_argument("source", type=Path, help="pictures with prompts: see feature_extraction/sources.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--weights", nargs="*", default=[], help="NAME=PATH of encoder weights that are not the usual")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="torch device (default: cpu)")
    parser.add_argument("--dry_run", action="store_true", help="print pictures, rows and seconds; write nothing")
    add_flags(parser, BatchConfig)
    args = parser.parse_args(argv)
    config = from_flags(BatchConfig, args)
    pictures = open_source(args.source)
    if len(pictures) == 0:
        raise ValueError(f"{args.source}: expected pictures, found none")
    weights = weights_for(args.bundle, args.weights)
    attributor = Attributor.from_pretrained(args.bundle, weights=weights, device=args.device)
    if config.k > len(attributor.bundle.index):
        raise ValueError(f"--k {config.k}: expected at most {len(attributor.bundle.index)}, the number of images")
    if args.dry_run:
        print(f"{args.out}: {dry_run(attributor, pictures, config)}")
        return
    command = shlex.join(["python", "-m", "serving.batch", *(sys.argv[1:] if argv is None else argv)])
    skipped = run(attributor, pictures, args.out, config, command)
    print(f"{args.out}: {len(pictures) - len(skipped):,} pictures attributed, {len(skipped)} unreadable")


if __name__ == "__main__":
    sys.exit(main())
