"""A bundle: the folder that holds what attribution of one source model needs.

    python -m serving.bundle build bundles/emoji --features data/emoji/feats/effnet+minilm \\
        --checkpoint weights/emoji_effnet+minilm.pth --metadata data/emoji/trainset/emoji.parquet
    python -m serving.bundle info bundles/emoji

manifest.json       config: encoders with the hashes of their weights, and what identifies the ranker; hashes of files
ranker.pth          the ranker; absent where cosines of the untuned features are searched
credit.json         shares of creators (see fastgda/credit.py), where they were fitted
index/              vectors and metadata of the training images, to be changed by python -m fastgda.index

Encoders travel by name and hash: weights that are not the ones of the bundle are refused when it is opened, and so is
an index that another ranker made.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fastgda.core import (
    command_line,
    command_parser,
    first_difference,
    load_npy,
    manifest_path,
    read_manifest,
    require_file,
    sha256_file,
    verify_artifact,
    write_manifest,
)
from fastgda.credit import Credit
from fastgda.index import Index, SegmentConfig, Source, load_embedding
from fastgda.index.journal import exclusive
from fastgda.index.metadata import count_rows, stored_ids
from fastgda.index.segment import BuildShards
from fastgda.index.source import COSINE, Embed
from fastgda.index.store import LOCK
from fastgda.index.structure_flags import add_structure_flags, builder_from, structure_from
from fastgda.ranker import Ranker, load_ranker
from feature_extraction.encoders import Join, Precision, identity, parse_weights
from feature_extraction.shards import feature_path

RANKER, CREDIT, INDEX = "ranker.pth", "credit.json", "index"


@dataclass(frozen=True)
class Bundle:
    """An open bundle."""

    path: Path
    encoder: dict[str, Any]
    """What the features depend on: see `feature_extraction.encoders.identity`."""
    ranker_id: str
    """SHA-256 of the ranker's file, or what stands for cosines."""
    ranker: Ranker | None
    """Absent where cosines are searched."""
    credit: Credit | None
    index: Index

    @classmethod
    def open(cls, path: str | Path, *, weights: Mapping[str, Path] | None = None, verify: bool = True) -> Bundle:
        """Reads and checks the bundle in folder `path`; see `Attributor.from_pretrained`."""
        path = Path(path)
        manifest = verify_artifact(path)
        config = manifest["config"]
        if not {"encoder", "ranker"} <= config.keys():
            raise ValueError(f"{manifest_path(path)}: expected the manifest of a bundle, found another")
        encoder = config["encoder"]
        found = identity(
            encoder["ftype"], weights, encoder.get("join", "normalised"), encoder.get("precision", "float32")
        )
        if (difference := first_difference(encoder, found, "encoder")) is not None:
            raise ValueError(f"{path}: expected the encoder that the bundle was made with, found another: {difference}")
        ranker = credit = None
        if config["ranker"] != COSINE:
            ranker = load_ranker(path / RANKER, in_dim=_width(encoder))
        if CREDIT in manifest["files"]:
            credit = Credit.load(path / CREDIT, ranker=config["ranker"])
        index = Index(path / INDEX, ranker=config["ranker"], verify=verify)
        width = _width(encoder) if ranker is None else ranker.config.embedding_dim
        if index.dim != width:
            raise ValueError(f"{path / INDEX}: expected vectors of {width} numbers, found {index.dim}")
        return cls(path, encoder, config["ranker"], ranker, credit, index)

    @property
    def ftype(self) -> str:
        """Names of the encoders."""
        return self.encoder["ftype"]

    @property
    def join(self) -> Join:
        """How the parts of a feature are put together."""
        return self.encoder.get("join", "normalised")

    @property
    def precision(self) -> Precision:
        """Numbers that the encoder computes with."""
        return self.encoder.get("precision", "float32")

    def depth(self, k: int) -> int:
        """Images to find where `k` are wanted and the credit rule needs its own."""
        return k if self.credit is None else max(k, min(self.credit.depth, len(self.index)))


def training_source(folder: Path, metadata: list[Path], embed: Embed) -> Source:
    """The training images of the feature folder <feats>/<ftype> with their metadata, without unreadable pictures.

    Row i of the features is the image of id i. Raises `ValueError` naming the metadata if it has another number of
    rows, other ids, or is not what the features were extracted from.
    """
    path = feature_path(folder, "data")
    made_by = f"python -m feature_extraction.extract --ftype {folder.name}"
    features = load_npy(path, (None, None), finite=True, mmap=True, made_by=made_by)
    names = " ".join(map(str, metadata))
    if metadata and (found := count_rows(metadata)) != len(features):
        raise ValueError(f"{names}: expected {len(features)} rows, as many as {path}, found {found}")
    ids = stored_ids(metadata)
    if ids is not None and not np.array_equal(ids, np.arange(len(features))):
        raise ValueError(f"{names}: expected the ids 0, 1, 2, ... in order, as the rows of {path}, found others")
    hashes = {file.name: sha256_file(file) for file in metadata}
    origin = read_manifest(folder)["inputs"].get("data")
    if len(metadata) == 1 and "image" in _columns(metadata[0]) and origin not in hashes.values():
        raise ValueError(f"{names}: expected the pictures that {path} was made from, found others; extract again")
    return Source.from_files([path], metadata, embed)


def build_bundle(
    path: Path,
    features: Path,
    checkpoint: Path | None,
    metadata: list[Path],
    credit: Path | None,
    command: str,
    structure: Callable[[int, int], SegmentConfig],
    build: BuildShards,
) -> Index:
    """Makes a bundle in folder `path` from the feature folder <feats>/<ftype>; goes on where it was interrupted.

    `structure` says what index a number of vectors of a width gets, `build` makes its shards.
    """
    if manifest_path(path).exists():
        raise ValueError(f"{path}: expected no bundle there, found one; change its index, or delete it")
    encoder = read_manifest(features)["config"]
    if encoder.get("ftype") is None:
        raise ValueError(f"{manifest_path(features)}: expected the manifest of features, found another")
    if checkpoint is not None:
        load_ranker(checkpoint, in_dim=_width(encoder))
    embed, _, ranker_id = load_embedding(checkpoint, unit=checkpoint is None)
    if credit is not None:
        Credit.load(credit, ranker=ranker_id)
    source = training_source(features, metadata, embed)
    if manifest_path(path / INDEX).exists():
        index = Index(path / INDEX, ranker=ranker_id)
    else:
        config = structure(len(source), source.dim)
        index = Index.create(path / INDEX, source, config, ranker=ranker_id, command=command, build=build)
    files = [shutil.copyfile(checkpoint, path / RANKER)] if checkpoint else []
    files += [shutil.copyfile(credit, path / CREDIT)] if credit else []
    parts = {"encoder": encoder, "ranker": ranker_id}
    write_manifest(path, parts, command=command, inputs=source.inputs, files=tuple(files), images=len(source))
    return index


def copy_bundle(bundle: Bundle, path: Path) -> Path:
    """Copies a bundle into folder `path`, whole or not at all."""
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path}: expected an empty folder or none, found files in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    passing = shutil.ignore_patterns(LOCK, "*.lock", "building", "adding", "rebuilding", ".*")
    try:
        # every change of the index holds this lock while it becomes valid
        with exclusive(bundle.path / INDEX / LOCK):
            shutil.copytree(bundle.path, temporary, ignore=passing)
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def weights_for(path: Path, options: Sequence[str]) -> dict[str, Path] | None:
    """`--weights NAME=PATH` options for the encoders of the bundle in `path`."""
    return (
        parse_weights(read_manifest(path)["config"].get("encoder", {}).get("ftype", ""), options) if options else None
    )


def _width(encoder: dict[str, Any]) -> int:
    return sum(part["dim"] for part in encoder["parts"].values())


def _columns(path: Path) -> list[str]:
    return pq.read_schema(require_file(path)).names


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m serving.bundle", __doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="make a bundle from extracted features and a ranker")
    info = commands.add_parser("info", help="what a bundle holds, after checking all of it")
    for sub in (build, info):
        sub.add_argument("path", type=Path, help="folder of the bundle")
    build.add_argument("--features", type=Path, required=True, help="feature folder <feats>/<ftype>")
    build.add_argument("--checkpoint", type=Path, help="ranker (default: none, cosines of the features)")
    build.add_argument("--metadata", type=Path, nargs="*", default=[], help="Parquet files, a row for each image")
    build.add_argument("--credit", type=Path, help="what python -m benchmark.credit fitted for this ranker")
    add_structure_flags(build)
    info.add_argument("--weights", nargs="*", default=[], help="NAME=PATH of encoder weights that are not the usual")
    args = parser.parse_args(argv)
    if args.what == "build":
        command = shlex.join(["python", "-m", "serving.bundle", *(sys.argv[1:] if argv is None else argv)])
        index = build_bundle(
            args.path,
            args.features,
            args.checkpoint,
            args.metadata,
            args.credit,
            command,
            lambda images, dim: structure_from(args, images, dim)[0],
            builder_from(args),
        )
        print(f"{args.path}: {len(index):,} images")
        return
    bundle = Bundle.open(args.path, weights=weights_for(args.path, args.weights))
    print(f"images       {len(bundle.index):,} x {bundle.index.dim}")
    print(f"encoder      {bundle.ftype}")
    print(f"ranker       {bundle.ranker_id}")
    print(f"credit       {'not fitted' if bundle.credit is None else bundle.credit.fitted_on}")


if __name__ == "__main__":
    sys.exit(main())
