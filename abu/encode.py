"""Encodes a testbed's training set for its source model: latents and the token states of the captions.

    python -m abu.encode --mode emoji      # one minute on two cores
    python -m abu.encode --flips           # also the images flipped, for influence with two views

Writes `trainset/latents.npy` [N, c, h, w] float32 and `trainset/text_embeddings.npy` [N, 1, 16, 384] float16; with
`--flips` also `trainset/latents_flipped.npy`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from abu.models import Autoencoder, load_module
from abu.testbed import Testbed, add_testbed_flags, testbed_from
from fastgda.core import (
    best_device,
    command_line,
    command_parser,
    manifest_difference,
    require_file,
    save_npy,
    sha256_file,
    write_manifest,
)
from feature_extraction.minilm import MiniLM
from feature_extraction.readers import read_split


@torch.inference_mode()
def encode_images(
    testbed: Testbed, device: torch.device, batch_size: int = 256, *, flipped: bool = False
) -> np.ndarray:
    """Standardised latents [N, c, h, w] of the training images, or of these flipped left to right."""
    model = Autoencoder(testbed.autoencoder)
    load_module(model, testbed.source / "autoencoder.safetensors")
    model.to(device).eval()
    images = testbed.load_images()
    images = images.flip(-1) if flipped else images
    starts = tqdm(range(0, len(images), batch_size), desc="latents", unit="batch")
    parts = [model.encode(images[s : s + batch_size].to(device).float() / 127.5 - 1).cpu() for s in starts]
    return torch.cat(parts).numpy()


def encode_captions(testbed: Testbed, device: torch.device, batch_size: int = 256) -> np.ndarray:
    """Token states [N, 1, T, d], float16, of each image's first caption."""
    table = read_split(testbed.data, "data")
    captions = [table.caption(row) for row in range(len(table))]
    encoder = MiniLM(device=device)
    starts = tqdm(range(0, len(captions), batch_size), desc="captions", unit="batch")
    parts = [encoder.token_states(captions[s : s + batch_size]).half().cpu().numpy() for s in starts]
    return np.concatenate(parts)[:, None]


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m abu.encode", __doc__)
    add_testbed_flags(parser)
    parser.add_argument("--flips", action="store_true", help="also encode the images flipped left to right")
    args = parser.parse_args(argv)
    testbed = testbed_from(args)
    device = best_device()
    weights = require_file(
        testbed.source / "autoencoder.safetensors", f"python -m abu.train_autoencoder --mode {args.mode}"
    )
    trainset = require_file(testbed.parquet, f"python -m feature_extraction.emoji --mode {args.mode}")
    command, data = f"python -m abu.encode --mode {args.mode}", {"trainset": sha256_file(trainset)}
    encoded, shape = data | {"autoencoder": sha256_file(weights)}, asdict(testbed.autoencoder)
    outputs = [
        ("latents.npy", encoded, shape, encode_images),
        ("text_embeddings.npy", data, {"encoder": "all-MiniLM-L6-v2"}, encode_captions),
    ]
    if args.flips:
        flipped = partial(encode_images, flipped=True)
        outputs.append(("latents_flipped.npy", encoded, shape | {"flipped": True}, flipped))
    for name, inputs, config, encode in outputs:
        path = trainset.with_name(name)
        if manifest_difference(path, config, inputs) is None:
            print(f"{path}: up to date")
            continue
        save_npy(path, encode(testbed, device))
        write_manifest(path, config, command=command, inputs=inputs)


if __name__ == "__main__":
    sys.exit(main())
