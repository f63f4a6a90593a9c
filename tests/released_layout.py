"""Writes the released data's layout at any size, planted so that a known ranker is optimal.

    PYTHONPATH=. python tests/released_layout.py FOLDER           # 118,287 x 1280 features and so on; 3 GB
    PYTHONPATH=. python tests/released_layout.py FOLDER --small   # in seconds
    PYTHONPATH=. python tests/released_layout.py FOLDER --hub     # small, as the release stands on the hub
    PYTHONPATH=.:tests python tests/released_layout.py FOLDER --trainable   # small, with a model that trains in seconds

The teacher's score is the cosine in a few hidden directions of the feature. Two ReLU units carry each direction through
the hidden layers, one for each sign, so the released architecture can represent the teacher exactly. Pictures are
written with --small and --hub: coloured squares, whose features these are not. With --trainable FOLDER is the root,
with data/coco, weights/ and, in pipeline/, a tiny Stable Diffusion; latents and token states are noise.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_pipelines import save_tiny_diffusion

from abu.coco import initial_coco, read_model
from fastgda.dataset import normalise
from fastgda.ranker import Ranker, RankerConfig, save_ranker

FTYPE = "dino+clip_text"
BLOCK = 4096
"""Rows made at a time."""
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
LATENT_SIDE, TOKENS, TEXT_WIDTH = 8, 4, 16
"""Of the latents and token states that the small model reads."""
TINY_MODEL = {
    "denoiser": {
        "sample_size": LATENT_SIDE,
        "block_out_channels": [8, 8],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "training": {"steps": 12, "batch_size": 8, "learning_rate": 5e-3, "warmup": 1, "ema": 0.5},
}
"""The model.json of a model that trains in a second."""


@dataclass(frozen=True)
class ReleasedSize:
    """Sizes of the released MSCOCO data."""

    images: int = 118_287
    dim: int = 1280
    train_queries: int = 5000
    candidates: int = 10_000
    test_queries: int = 110
    hidden: int = 8
    """Directions of the feature that the teacher sees."""
    width: int = 768
    """Hidden size and output size of the ranker."""


SMALL = ReleasedSize(images=700, dim=12, train_queries=60, candidates=80, test_queries=9, hidden=3, width=16)
TRAINABLE = ReleasedSize(images=120, dim=12, train_queries=9, candidates=40, test_queries=5, hidden=3, width=16)


def write_released(folder: Path, size: ReleasedSize, seed: int = 0) -> Ranker:
    """Writes feats/, influence_{train,test}.pkl and weights/<ftype>.pth under `folder`; returns the optimal ranker."""
    random = np.random.default_rng(seed)
    map_ = np.linalg.qr(random.standard_normal((size.dim, size.hidden)))[0].astype(np.float32)
    features = folder / "feats" / FTYPE
    features.mkdir(parents=True)
    hidden = {
        name: _write_features(features / f"{name}.npy", count, map_, random)
        for name, count in (
            ("data_feats", size.images),
            ("train_query_feats", size.train_queries),
            ("test_query_feats", size.test_queries),
        )
    }
    train = _train_ranks(hidden["train_query_feats"], hidden["data_feats"], size.candidates, random)
    places = np.broadcast_to(np.arange(size.candidates), train.shape)
    _write_pickle(
        folder / "influence_train.pkl", {"rank": train, "influence_subset": -places, "rank_influence_subset": places}
    )
    influence = hidden["test_query_feats"] @ hidden["data_feats"].T
    rank = np.argsort(-influence, axis=1)
    _write_pickle(folder / "influence_test.pkl", {"rank": rank, "influence": influence})
    ranker = optimal_ranker(map_, size.width)
    save_ranker(folder / "weights" / f"{FTYPE}.pth", ranker)
    return ranker


def write_pictures(folder: Path, size: ReleasedSize) -> None:
    """Writes trainset/ and query_{train,test}/: pictures, captions, and arrays of the released shapes."""
    trainset = folder / "trainset"
    names = [f"{number:012d}.jpg" for number in range(size.images)]
    for number, name in enumerate(names):
        _write_picture(trainset / "train2017" / name, number)
    document = {
        "images": [{"id": 7 * number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": 2 * number + again, "image_id": 7 * number, "caption": f"{_caption(number)}{', again' * again}"}
            for number in range(size.images)
            for again in range(2)
        ],
    }
    annotations = trainset / "annotations" / "captions_train2017.json"
    annotations.parent.mkdir()
    annotations.write_text(json.dumps(document))
    for split, count in (("train", size.train_queries), ("test", size.test_queries)):
        queries = folder / f"query_{split}"
        for number in range(count):
            _write_picture(queries / "images" / f"{number}.png", number + 1)
        (queries / "captions.txt").write_text("".join(f"{_caption(number + 1)}\n" for number in range(count)))
        np.save(queries / "latents.npy", np.zeros((count, 4, 16, 16), np.float16))
    near = np.tile(np.arange(size.candidates), (size.train_queries, 1))
    with open(folder / "query_train" / "nn_dino.pkl", "wb") as handle:
        pickle.dump({"fixed": {"rank": near}}, handle)


def write_trainable(root: Path, size: ReleasedSize = TRAINABLE, seed: int = 0) -> Path:
    """Writes everything under `root` that a model is retrained and judged with; returns data/coco.

    Latents are [2N, 4, 8, 8], the second half mirrored, token states [N, 5, 4, 16]; model.json says how small the model
    is that reads them.
    """
    coco, random = root / "data/coco", np.random.default_rng(seed)
    write_released(coco, size)
    write_pictures(coco, size)
    (coco / "weights").rename(root / "weights")
    for folder, count, captions in (("trainset", size.images, 5), ("query_test", size.test_queries, 1)):
        latents = random.standard_normal((count, 4, LATENT_SIDE, LATENT_SIDE), dtype=np.float32)
        views = [latents, latents[..., ::-1]] if folder == "trainset" else [latents]
        np.save(coco / folder / "latents.npy", np.concatenate(views))
        text = random.standard_normal((count, captions, TOKENS, TEXT_WIDTH)).astype(np.float16)
        np.save(coco / folder / "text_embeddings.npy", text)
    (coco / "model.json").write_text(json.dumps(TINY_MODEL))
    torch.save(initial_coco(read_model(coco / "model.bin"), seed).state_dict(), coco / "model.bin")
    save_tiny_diffusion(root / "pipeline", latent_channels=4, width=TEXT_WIDTH, tokens=TOKENS)
    return coco


def write_hub(folder: Path, size: ReleasedSize = SMALL, parts: int = 3) -> None:
    """Writes the files as they stand on the hub: all under coco/, the training images as a tar file in parts."""
    coco = folder / "coco"
    write_released(coco, size)
    write_pictures(coco, size)
    trainset = coco / "trainset"
    archive = folder / "train2017.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(trainset / "train2017", "train2017")
    shutil.rmtree(trainset / "train2017")
    content = archive.read_bytes()
    archive.unlink()
    step = -(-len(content) // parts)
    for number in range(parts):
        part = trainset / f"train2017.tar.part{chr(ord('a') + number // 26)}{chr(ord('a') + number % 26)}"
        part.write_bytes(content[number * step : (number + 1) * step])
    (folder / "README.md").write_text("of the repository\n")


def optimal_ranker(map_: np.ndarray, width: int) -> Ranker:
    """The ranker whose embedding is the feature's image under `map_` [D, hidden], which takes 2 * hidden <= width."""
    dim, hidden = map_.shape
    ranker = Ranker(RankerConfig(dim, (width, width, width), width)).eval()
    weights = ranker.mlp.state_dict()
    for value in weights.values():
        value.zero_()
    directions, unit = torch.from_numpy(map_.T), torch.eye(2 * hidden)
    weights["layers.0.weight"][: 2 * hidden] = torch.cat([directions, -directions])
    for name in ("layers.1.weight", "layers.2.weight"):
        weights[name][: 2 * hidden, : 2 * hidden] = unit
    weights["output_layer.weight"][:hidden, : 2 * hidden] = unit[:hidden] - unit[hidden:]
    ranker.mlp.load_state_dict(weights)
    return ranker


def _write_features(path: Path, count: int, map_: np.ndarray, random: np.random.Generator) -> np.ndarray:
    # returns the unit vectors [count, hidden] that the teacher compares
    file = np.lib.format.open_memmap(path, "w+", np.float32, (count, len(map_)))
    hidden = np.empty((count, map_.shape[1]), dtype=np.float32)
    for start in range(0, count, BLOCK):
        rows = random.standard_normal(file[start : start + BLOCK].shape, dtype=np.float32)
        file[start : start + BLOCK] = rows
        hidden[start : start + BLOCK] = normalise(rows @ map_)
    file.flush()
    return hidden


def _train_ranks(queries: np.ndarray, images: np.ndarray, candidates: int, random: np.random.Generator) -> np.ndarray:
    # half the candidates from the top, half at random, so that the ranking spans the whole range as a K-NN list does
    rank = np.empty((len(queries), candidates), dtype=np.int64)
    for query, row in zip(queries, rank, strict=True):
        score = images @ query
        split = np.argpartition(-score, candidates // 2)
        others = random.choice(split[candidates // 2 :], candidates - candidates // 2, replace=False)
        chosen = np.concatenate([split[: candidates // 2], others])
        row[:] = chosen[np.argsort(-score[chosen], kind="stable")]
    return rank


def _write_pickle(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as handle:
        pickle.dump({"random": {name: np.ascontiguousarray(array) for name, array in arrays.items()}}, handle)


def _write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (40, 32), "white")
    side = 6 + number * 7 % 20
    picture.paste(COLOURS[number % len(COLOURS)], (4, 4, 4 + side, 4 + side))
    picture.save(path)


def _caption(number: int) -> str:
    return f"a {COLOURS[number % len(COLOURS)]} square, {6 + number * 7 % 20} wide"


def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="a small size, with pictures")
    parser.add_argument("--hub", action="store_true", help="small, as the release stands on the hub")
    parser.add_argument("--trainable", action="store_true", help="small, with a model that trains in seconds")
    args = parser.parse_args(argv)
    if args.trainable:
        write_trainable(args.folder)
    elif args.hub:
        write_hub(args.folder)
    else:
        write_released(args.folder, SMALL if args.small else ReleasedSize())
        if args.small:
            write_pictures(args.folder, SMALL)


if __name__ == "__main__":
    main()
