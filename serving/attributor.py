"""The whole path from a picture and its prompt to the training images that made it, in one object.

    attributor = Attributor.from_pretrained("bundles/emoji")
    found = attributor.attribute("heart.png", "red heart, noto style", k=10)
    print(found.ids, found.scores, found.metadata, found.timings)

It composes what the arrows keep apart: a frozen encoder of feature_extraction with a ranker and an index of fastgda. A
bundle (serving/bundle.py) is the folder that holds or names all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastgda.attributor import Attribution, Clock, FeatureAttributor, Untuned
from fastgda.index import Embedder
from feature_extraction.encoders import Encoder, load_encoder
from feature_extraction.readers import open_image, plain
from serving.bundle import Bundle, copy_bundle

Picture = Image.Image | bytes | str | Path
BATCH = 64
"""Pictures encoded at a time."""


class Attributor:
    """Encoder, ranker and index. Safe to use from several threads at once."""

    def __init__(self, encoder: Encoder, retrieval: FeatureAttributor, bundle: Bundle | None = None) -> None:
        """`encoder` must be the one whose features `retrieval` was made from."""
        self.encoder = encoder
        self.retrieval = retrieval
        self._bundle = bundle
        # tokenizers refuse to be used by two threads at once
        self._encoding = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        weights: Mapping[str, Path] | None = None,
        device: torch.device | None = None,
        verify: bool = True,
    ) -> Attributor:
        """Opens the bundle in folder `path`.

        `weights` maps encoder names to files that replace the packaged ones or the hub's; they must be those that the
        bundle was made with. `verify` compares the hashes of all files, which reads them once. Raises `ValueError`
        naming what is missing, damaged or belongs to another bundle.
        """
        bundle = Bundle.open(path, weights=weights, verify=verify)
        parts = bundle.ftype, device, weights, True, bundle.join, bundle.precision
        embedder: Embedder = Untuned() if bundle.ranker is None else bundle.ranker.to(device or "cpu")
        return cls(load_encoder(*parts), FeatureAttributor(embedder, bundle.index), bundle)

    @property
    def bundle(self) -> Bundle:
        """The bundle it was opened from; `ValueError` if it was put together in memory."""
        if self._bundle is None:
            raise ValueError("expected an attributor of a bundle, found one in memory; see python -m serving.bundle")
        return self._bundle

    def save_pretrained(self, path: str | Path) -> Path:
        """Copies the bundle into folder `path`, which must not be one yet; images removed by then stay removed."""
        return copy_bundle(self.bundle, Path(path))

    def features(self, images: Sequence[Picture], prompts: Sequence[str]) -> np.ndarray:
        """[Q, D] features of pictures and their prompts; `ValueError` naming what cannot be read or is no text."""
        if len(images) != len(prompts):
            raise ValueError(f"prompts: expected one for each of {len(images)} images, found {len(prompts)}")
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {row}: expected text, found {prompt!r:.40}")
        parts = []
        for start in range(0, len(images), BATCH):
            some = range(start, min(start + BATCH, len(images)))
            pictures = [read_picture(images[row], f"image {row}") for row in some]
            with self._encoding:
                parts.append(self.encoder.encode(pictures, [prompts[row] for row in some]))
        return np.concatenate(parts) if parts else np.zeros((0, self.encoder.dim), np.float32)

    def attribute(self, image: Picture, prompt: str, k: int = 10) -> Attribution:
        """The `k` training images that most influenced `image` (a PIL image, a file's bytes or its path)."""
        return self.attribute_batch([image], [prompt], k)[0]

    def attribute_batch(self, images: Sequence[Picture], prompts: Sequence[str], k: int = 10) -> list[Attribution]:
        """The same for several images, with one prompt each; faster than one by one."""
        clock = Clock()
        features = self.features(images, prompts)
        return self.retrieval.attribute_batch(features, k, clock.lap())


def read_picture(picture: Picture, name: str) -> Image.Image:
    """A picture however it is given, as a file of it would be read; `name` is what errors call one without a path."""
    if isinstance(picture, Image.Image):
        return plain(picture, name)
    return open_image(picture, name if isinstance(picture, bytes) else "")
