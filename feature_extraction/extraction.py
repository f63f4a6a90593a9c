"""One extraction of features: its configuration, and what belongs to it: pictures, encoders, plans and manifests."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastgda.core import ROOT, best_device, manifest_path, read_manifest, relative, save_json, write_manifest
from feature_extraction.encoders import (
    ENCODERS,
    Encoder,
    Join,
    Precision,
    asymmetric,
    identity,
    load_encoder,
    parse_weights,
    part_names,
)
from feature_extraction.measure import Drift, drift
from feature_extraction.readers import SPLITS
from feature_extraction.shards import Plan, feature_path, read_skipped, skipped_path
from feature_extraction.sources import COCO_SPLITS, Pictures, open_source, open_split

DRIFT = "drift.json"
"""Note of the drift, beside the shards that were made in half precision."""


@dataclass(frozen=True)
class ExtractConfig:
    """What to extract, from where, to where."""

    mode: Literal["emoji", "emoji-mini", "coco"] = "emoji"
    """Dataset."""
    ftype: str = "effnet+minilm"
    """Encoder: dino, dinov2, clip, clip_text, abc_dino, abc_clip, effnet, minilm, pixel, or several joined by '+'."""
    source: Path | None = None
    """Pictures in the place of a dataset's: COCO captions (.json), a .parquet or .tar file, or a folder of them or with
    metadata.jsonl, metadata.csv or captions.txt."""
    data_dir: Path | None = None
    """Folder with trainset/ and query_*/; by default data/<mode>."""
    out: Path | None = None
    """Folder of the features; by default <data_dir>/feats, for a source data/<its name>/feats."""
    splits: tuple[str, ...] | None = None
    """What to extract; by default all that the dataset has, and of a source data."""
    weights: tuple[str, ...] = ()
    """Weights that replace the packaged ones and the hub's: PATH, or NAME=PATH for each part of a composition."""
    join: Literal["normalised", "raw"] | None = None
    """Parts of a composition at unit length, or as they are; by default raw for coco, as released, else normalised."""
    bf16: bool = False
    """Matrix products in bfloat16, and the drift against float32 on 64 pictures measured. By default all is float32, on
    a GPU too (no TF32), so that features of queries and training images agree whichever machine made them."""
    max_corrupt: float = 0.01
    """Share of pictures that may be unreadable before extraction stops."""
    device: str | None = None
    """torch device; by default CUDA where there is one, else the CPU."""
    shard_rows: int = 512
    """Images in one shard, the piece that is redone after an interruption."""
    shards: int = 1
    """Processes that divide the work."""
    shard: int | None = None
    """Which of them this is, from 0: it makes its shards and nothing else."""
    merge: bool = False
    """Put the shards of all processes together; encode nothing."""
    workers: int | None = None
    """Ray workers that make the shards, while this process writes them; by default this process alone, without Ray."""
    address: str | None = None
    """A running Ray cluster; by default with --workers one on this machine."""
    threads: int | None = None
    """Processors of each Ray worker; by default an equal share of this machine's."""
    dry_run: bool = False
    """Print images, estimated seconds and bytes, and write nothing."""

    def __post_init__(self) -> None:
        part_names(self.ftype)
        unknown = [split for split in self.splits or () if split not in SPLITS]
        if unknown or self.splits == ():
            raise ValueError(f"--splits {' '.join(self.splits or ())}: expected some of {' '.join(SPLITS)}")
        if self.source is not None and len(self.all_splits) > 1:
            raise ValueError(f"--splits {' '.join(self.all_splits)}: expected one split, as --source is one")
        if self.shard_rows < 1:
            raise ValueError(f"--shard_rows {self.shard_rows}: expected at least 1")
        if not 0 <= self.max_corrupt <= 1:
            raise ValueError(f"--max_corrupt {self.max_corrupt}: expected a share from 0 to 1")
        if not 0 <= (self.shard or 0) < self.shards or (self.shards > 1 and self.shard is None):
            raise ValueError(f"--shards {self.shards} --shard {self.shard}: expected both, and shard below shards")
        for name in ("workers", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, found {getattr(self, name)}")
        if self.workers is not None and (self.merge or self.shard is not None):
            raise ValueError("--workers: expected it without --merge and --shard")
        if self.merge and self.shard is not None:
            raise ValueError("--merge: expected it without --shards and --shard")

    @property
    def folder(self) -> Path:
        """The dataset's folder."""
        name = self.source.stem if self.source else self.mode
        return self.data_dir or ROOT / "data" / name

    @property
    def target(self) -> Path:
        """The folder that holds one folder for each ftype."""
        return self.out or self.folder / "feats"

    @property
    def all_splits(self) -> tuple[str, ...]:
        """The splits asked for."""
        if self.splits is not None:
            return self.splits
        if self.source is not None:
            return ("data",)
        return COCO_SPLITS if self.mode == "coco" else SPLITS

    @property
    def joined(self) -> Join:
        """How parts are put together."""
        return self.join or ("raw" if self.mode == "coco" and self.source is None else "normalised")

    @property
    def torch_device(self) -> torch.device:
        """The device that encoders run on; `ValueError` if this machine has none of that name."""
        return named_device(self.device)


def named_device(name: str | None) -> torch.device:
    """The torch device of a `--device` flag; `ValueError` if this machine has none of that name."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error
    return device


class Extraction:
    """One run: its pictures and weights, opened at once so that a missing file is noticed first."""

    def __init__(self, config: ExtractConfig) -> None:
        self.config = config
        self.weights = parse_weights(config.ftype, config.weights)
        parts = part_names(config.ftype)
        self.ftypes = [*parts, config.ftype] if len(parts) > 1 else parts
        self.tables: dict[str, Pictures] = {
            split: open_source(config.source) if config.source else open_split(config.mode, config.folder, split)
            for split in config.all_splits
        }
        for table in self.tables.values():
            if len(table) == 0:
                raise ValueError(f"{table.path}: expected pictures, found none")
            if not {"clip_text", "minilm"}.isdisjoint(parts) and not captioned(table):
                raise ValueError(f"{table.path}: expected captions for an encoder of text, found none")
        self.hashes = {split: table.fingerprint for split, table in self.tables.items()}
        self.precision: Precision = "bfloat16" if config.bf16 else "float32"
        self.identities = {ftype: identity(ftype, self.weights, config.joined, self.precision) for ftype in self.ftypes}
        self.drifts: dict[str, Drift] = {}
        self._loaded: dict[tuple[str, bool], Encoder] = {}

    def folder(self, ftype: str) -> Path:
        """Where the features of `ftype` go."""
        return self.config.target / ftype

    def current(self, ftype: str) -> dict[str, str]:
        """The splits of `ftype` that are up to date, with the fingerprints of their pictures."""
        return current_splits(self.folder(ftype), self.identities[ftype], self.hashes)

    def plan(self, ftype: str, split: str) -> Plan:
        """The shards of one split."""
        key = [self.identities[ftype], self.hashes[split]]
        sizes = self.config.shard_rows, self.config.max_corrupt
        return Plan.make(self.folder(ftype), split, self.tables[split], ENCODERS[ftype].dim, *sizes, key)

    def share(self, plan: Plan) -> list[int]:
        """The shards of this process."""
        return plan.share(self.config.shard or 0, self.config.shards)

    def load(self, ftype: str, split: str) -> Encoder:
        """The encoder of `ftype` for `split`, kept until another is asked for."""
        key = ftype, split != "data" and asymmetric(ftype)
        if key not in self._loaded:
            self._loaded = {key: self._load(*key, self.precision)}
        return self._loaded[key]

    def _load(self, ftype: str, query: bool, precision: Precision) -> Encoder:
        return load_encoder(ftype, self.config.torch_device, self.weights, query, self.config.joined, precision)

    def measure(self, ftype: str, split: str) -> None:
        """In half precision, prints by how much features turn and notes it beside the shards, for who merges them.

        It is measured once, however many processes make the shards and however often they are interrupted.
        """
        if not self.config.bf16:
            return
        self.recall(ftype, split)
        if ftype not in self.drifts:
            reference = self._load(ftype, split != "data" and asymmetric(ftype), "float32")
            self.drifts[ftype] = drift(self.load(ftype, split), reference, self.tables[split])
            print(f"{ftype}, bfloat16 against float32: {self.drifts[ftype]}")
        save_json(self.plan(ftype, split).folder / DRIFT, asdict(self.drifts[ftype]))

    def recall(self, ftype: str, split: str) -> None:
        """Takes up the drift that was noted when the shards of `split` were made."""
        note = self.plan(ftype, split).folder / DRIFT
        if ftype not in self.drifts and note.is_file():
            self.drifts[ftype] = Drift(**json.loads(note.read_text()))

    def encode(self, ftype: str, splits: list[str]) -> None:
        """Makes the shards of this process that are missing."""
        for split in splits:
            plan = self.plan(ftype, split)
            starts = self.share(plan)
            if plan.missing(starts):
                self.measure(ftype, split)
                plan.extract(self.load(ftype, split), starts, f"{ftype} {split}")

    def merge(self, ftype: str, split: str) -> None:
        """Puts the shards of `split` together."""
        self.recall(ftype, split)
        self.plan(ftype, split).merge(self.folder(ftype), split)

    def known_drifts(self, ftype: str) -> dict[str, Any]:
        """The drift of each part of `ftype`: of this run, else what the manifest of its features says."""
        known = {}
        for part in part_names(ftype):
            if part in self.drifts:
                known[part] = asdict(self.drifts[part])
            elif manifest_path(self.folder(part)).is_file():
                known |= read_manifest(self.folder(part)).get("drift", {})
        return known

    def record(self, ftype: str, current: dict[str, str]) -> None:
        """Writes the manifest of the splits that are there."""
        config, folder = self.config, self.folder(ftype)
        origin = f"--source {relative(config.source)}" if config.source else f"--mode {config.mode}"
        command = f"python -m feature_extraction.extract {origin} --ftype {ftype}" + " --bf16" * config.bf16
        files = [path(folder, split) for split in current for path in (feature_path, skipped_path)]
        write_manifest(
            folder,
            self.identities[ftype],
            command=command,
            inputs=current,
            files=tuple(file for file in files if file.is_file()),
            skipped={split: len(read_skipped(folder, split)) for split in current},
            drift=self.known_drifts(ftype),
        )


def captioned(table: Pictures) -> bool:
    """Whether any picture has a caption; a damaged one is none."""
    for row in range(len(table)):
        try:
            if table.captions[row]:
                return True
        except ValueError:
            continue
    return False


def current_splits(folder: Path, encoder: dict[str, Any], hashes: dict[str, str]) -> dict[str, str]:
    """The splits in `folder` that were made by this encoder from these files (split -> hash of its pictures).

    A split that is not asked for now (absent from `hashes`) stays current as long as the encoder is the same.
    """
    if not manifest_path(folder).is_file():
        return {}
    manifest = read_manifest(folder)
    if manifest["config"] != encoder:
        return {}
    current = {}
    for split, made_from in manifest["inputs"].items():
        path = feature_path(folder, split)
        recorded = manifest["files"].get(path.name, {}).get("bytes")
        if hashes.get(split, made_from) == made_from and path.is_file() and path.stat().st_size == recorded:
            current[split] = made_from
    return current


def forget(folder: Path) -> None:
    """Deletes the manifest in `folder` and the features it lists: made by another encoder, they must not be mixed."""
    if manifest_path(folder).is_file():
        for name in read_manifest(folder)["files"]:
            (folder / name).unlink(missing_ok=True)
        manifest_path(folder).unlink()
