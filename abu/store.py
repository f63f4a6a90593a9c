"""The training set's gradients on disk: what new queries are multiplied with.

Made once from the stored passes (all of them and both runs pooled), as a shard for each of their pieces. Without
compression: `gradients` and `scales` of `abu.gradients.pack`, which are whitened as they are read. With it: `vectors`
[bins, B, size] float16 or int8, each divided by the norm of the whole whitened gradient, and `norms` [bins, B] of
those. All are plain .npy files, which are mapped: a query reads them once and needs no more memory than a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from abu.amortised import Compression, QueryMatrix, Sketch
from abu.collect_config import CollectConfig, ScoreConfig
from abu.compress import Quantised, Truncation
from abu.curvature import CHUNK, DiagonalFisher
from abu.gradients import MADE_BY as COLLECTED_BY
from abu.gradients import load_gradients, pack, unpack
from abu.plan import Collection, Piece
from abu.stages import folder_of, gradient_inputs, require_own_gradients, training_plan, whole_passes
from abu.testbed import Testbed
from fastgda.core import load_npy, read_manifest, relative, save_npy, sha256_file

MADE_BY = "python -m abu.query build"
FEW = 32
"""Images whose whole whitened gradients are in memory at once: 11 MB for each on the testbed."""


@dataclass(frozen=True)
class StoreConfig:
    """What is kept of each training image."""

    compression: Literal["none", "sketch", "truncate"] = "none"
    """Output gradients as they are, whitened when they are read: exact, and for few tokens smaller than what else keeps
    the ranks. Or whitened and folded with random signs, or their eigen-directions with the largest expected
    contribution: faster to score with, at a cost in rank that `python -m benchmark.compression` measures."""
    size: int = 6_144
    """Numbers that sketch and truncate keep of a gradient in each timestep bin."""
    bits: int = 16
    """16 or 8 for each of them."""
    seed: int = 0
    """Seed of the random signs."""

    def __post_init__(self) -> None:
        if self.bits not in (8, 16) or self.size < 1:
            raise ValueError(f"expected 8 or 16 bits and a positive size, found {self.bits} and {self.size}")
        if self.compression == "none" and self.bits != 16:
            raise ValueError(f"--bits: expected 16 without compression, found {self.bits}")

    def of(self, curvature: DiagonalFisher) -> Compression:
        """The compression of gradients with these factors."""
        if self.compression == "truncate":
            return Truncation.of(curvature, self.size)
        return Sketch.of(curvature, self.size if self.compression == "sketch" else None, self.seed)


def unit_vectors(
    gradients: Tensor, text: Tensor, curvature: DiagonalFisher, compression: Compression
) -> tuple[Tensor, Tensor]:
    """(compressed whitened gradients / ‖w‖ [bins, B, size], ‖w‖ [bins, B]) from g [bins, B, T, out], a [B, T, in].

    The norm is that of the whole gradient, which the compressed one only estimates.
    """
    white = curvature.damped().rsqrt()
    rows, norms = [], []
    for of_bin in gradients:
        for g, a in zip(of_bin.split(CHUNK), text.split(CHUNK), strict=True):
            rotated = curvature.rotated_gradients(g, a)
            norms.append((rotated * white).flatten(1).norm(dim=1))
            rows.append(compression(rotated) / norms[-1].clamp(min=torch.finfo(rotated.dtype).tiny)[:, None])
    shape = gradients.shape[:2]
    return torch.cat(rows).unflatten(0, shape), torch.cat(norms).unflatten(0, shape)


class GradientStore:
    """The folder of one testbed's store."""

    def __init__(self, testbed: Testbed, config: StoreConfig, passes: int) -> None:
        self.testbed, self.config, self.passes = testbed, config, passes
        self.folder = folder_of(testbed) / f"store_{passes}"
        self.plan = training_plan(testbed, range(1))

    @property
    def inputs(self) -> dict[str, str]:
        """What the store is made from."""
        files = (self.testbed.source / "denoiser.safetensors", self.testbed.curvature)
        return {relative(path): sha256_file(path) for path in files}

    def build(self, device: torch.device) -> None:
        """Writes the missing shards.

        `ValueError` if the folder holds others, or if the gradients or the factors are another model's.
        """
        whole_passes(self.testbed)
        require_own_gradients(self.testbed, gradient_inputs(self.testbed))
        curvature = self.testbed.load_curvature(device)
        Collection(self.folder).claim({**asdict(self.config), "passes": self.passes}, self.inputs, MADE_BY)
        whole = self.config.compression == "none"
        # what is written last says that a shard is there
        missing = [piece for piece in self.plan if not self.path(piece, "scales" if whole else "norms").is_file()]
        if not missing:
            return
        compression, examples = self.config.of(curvature), self.testbed.training_examples(device)
        for piece in tqdm(missing, desc="store", unit="shard"):
            text = examples.text[piece.start : piece.stop]
            if whole:
                for kind, array in pack(self.pooled(piece, text), text).items():
                    save_npy(self.path(piece, kind), array)
                continue
            vectors, norms = unit_vectors(self.pooled(piece, text), text, curvature, compression)
            if self.config.bits == 8:
                codes = Quantised.of(vectors)
                save_npy(self.path(piece, "scales"), codes.scales.cpu().numpy())
                vectors = codes.codes
            else:
                vectors = vectors.half()
            save_npy(self.path(piece, "vectors"), vectors.cpu().numpy())
            save_npy(self.path(piece, "norms"), norms.cpu().numpy())

    def pooled(self, piece: Piece, text: Tensor) -> Tensor:
        """g [bins, B, T, out]: the mean over all passes and both runs."""
        folder, total = Collection(folder_of(self.testbed)), torch.zeros((), device=text.device)
        for index in range(self.passes):
            source = Piece("pass", str(index), piece.start, piece.stop)
            total = total + load_gradients(folder.path(source), text, COLLECTED_BY["pass"]).mean(0)
        return total / self.passes

    def path(self, piece: Piece, kind: str) -> Path:
        """A shard's file."""
        return self.folder / f"{kind}_{piece.start:06d}.npy"

    def shard(self, piece: Piece, device: torch.device) -> tuple[Tensor, Tensor]:
        """(vectors [bins, B, size] float32, norms [bins, B]) of a shard."""
        bins, count = CollectConfig.bins, piece.stop - piece.start
        shape = (bins, count, self.config.size)
        vectors = torch.from_numpy(load_npy(self.path(piece, "vectors"), shape, mmap=True, made_by=MADE_BY))
        norms = torch.from_numpy(load_npy(self.path(piece, "norms"), (bins, count), finite=True, made_by=MADE_BY))
        if self.config.bits == 8:
            scales = load_npy(self.path(piece, "scales"), (bins, count, 1), made_by=MADE_BY)
            return Quantised(vectors.to(device), torch.from_numpy(scales).to(device)).vectors(), norms.to(device)
        return vectors.to(device).float(), norms.to(device)

    def whitened(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """What `shard` gives, of all images in their order; without compression a few of them at a time."""
        if self.config.compression != "none":
            for piece in self.plan:
                yield self.shard(piece, device)
            return
        curvature, examples = self.testbed.load_curvature(device), self.testbed.training_examples(device)
        compression = self.config.of(curvature)
        for piece in self.plan:
            text = examples.text[piece.start : piece.stop]
            shapes = {"gradients": (CollectConfig.bins, None, None), "scales": (CollectConfig.bins, len(text))}
            arrays = {
                kind: load_npy(self.path(piece, kind), shape, mmap=True, made_by=MADE_BY)
                for kind, shape in shapes.items()
            }
            gradients = unpack(arrays, text)
            for some, tokens in zip(gradients.split(FEW, 1), text.split(FEW), strict=True):
                yield unit_vectors(some, tokens, curvature, compression)

    def score(self, queries: QueryMatrix, device: torch.device) -> dict[str, np.ndarray]:
        """plain and normalised scores [Q, N] of queries whose matrix has this store's compression."""
        parts: dict[str, list[Tensor]] = {"plain": [], "normalised": []}
        with tqdm(total=self.testbed.images, desc="scores", unit="image", mininterval=1.0) as bar:
            for units, norms in self.whitened(device):
                parts["plain"].append(queries.plain @ (units * norms[..., None]).mean(0).mT)
                terms = torch.bmm(queries.normalised, units.mT)
                parts["normalised"].append(torch.einsum("b,bqn->qn", terms.new_tensor(ScoreConfig.bin_weights), terms))
                bar.update(norms.shape[1])
        return {name: torch.cat(found, 1).cpu().numpy() for name, found in parts.items()}


def open_store(testbed: Testbed) -> GradientStore:
    """The store of the most passes; `ValueError` if there is none, or if it belongs to another model."""
    folders = sorted(folder_of(testbed).glob("store_*"), key=lambda path: int(path.name.split("_")[1]))
    if not folders:
        raise ValueError(f"{folder_of(testbed)}: expected a store of training gradients, found none; run: {MADE_BY}")
    manifest = read_manifest(folders[-1])
    kept = {name: value for name, value in manifest["config"].items() if name != "passes"}
    store = GradientStore(testbed, StoreConfig(**kept), manifest["config"]["passes"])
    Collection(store.folder).claim(manifest["config"], store.inputs, MADE_BY)
    return store
