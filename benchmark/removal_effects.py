"""What the removal of images does to a query, measured on the models that were trained again without them.

ΔL is the rise of the query's loss over the mean of the reference models; MSE the mean squared difference between the
image generated from the query's seed and that of the first reference model (pixels in [0, 1]); similarity the cosine of
the two images in an image encoder's space (1 = the same picture). Losses are exported with the repository and restored
from there, pictures are not: of a restored model there is ΔL alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from abu.plan import Collection
from abu.sampler import Sampler
from benchmark.retrain import references
from benchmark.retrainable import Retrainable
from benchmark.retrainer import LATENTS, Retraining, decoded
from fastgda.core import best_device, load_npz
from feature_extraction.encoders import load_encoder
from serving.retrained import Removal, Retrained

Plan = dict[tuple[str, int, int], list[Retraining]]
"""(method, query, K) -> the models trained for it."""
EFFECTS = ("delta_loss", "mse", "similarity")
RANDOM = "random removal"
RUN = "python -m benchmark.removal run"


@dataclass(frozen=True)
class Reference:
    """What models without images are compared with."""

    loss: dict[int, float]
    """Query -> its mean loss under the reference models."""
    pictures: dict[int, np.ndarray]
    """Query -> its picture [P, P, 3] uint8 by the first of them; empty where pictures are not wanted."""


class RemovalEffects:
    """Measures stored models, against `references` models trained on everything (0: the source model) or against the
    `reference` of an earlier report; pictures with the image encoder `encoder`.
    """

    def __init__(
        self,
        testbed: Retrainable,
        collection: Collection,
        queries: list[int],
        models: int,
        encoder: str,
        reference: Reference | None = None,
    ) -> None:
        self.collection, self.queries, self.device = collection, queries, best_device()
        self.sampler: Sampler | None = testbed.sampler(self.device)
        # random removals serve every query; a model of MSCOCO with pictures has 4 MB
        self._load = lru_cache(maxsize=16)(self._read)
        self.reference = self._trained_on_everything(models) if reference is None else reference
        if self.sampler is not None:
            self.encoder = load_encoder(encoder, self.device)
            pictures = self.reference.pictures
            if not pictures:
                raise ValueError("expected pictures of the reference beside the report that is added to, found none")
            found = self._features(np.stack([pictures[query] for query in queries]))
            self.features = dict(zip(queries, found, strict=True))

    def of(self, job: Retraining, query: int) -> dict[str, float]:
        """The effects of one model on one query; ΔL alone if its pictures are not there."""
        arrays = self._load(job)
        found = {"delta_loss": self._change(arrays, query)}
        picture = self._picture(arrays, query)
        if picture is not None:
            difference = (picture.astype(np.float64) - self.reference.pictures[query]) / 255
            found["mse"] = float((difference**2).mean())
            found["similarity"] = float(self._features(picture[None])[0] @ self.features[query])
        return found

    def drawn(self, plan: Plan, captions: list[str]) -> Retrained:
        """Pictures of the queries by the reference model and, of each removal of `plan` whose first model has some, by
        that one; `captions` are those of all test queries.
        """
        removals = []
        for (method, query, count), jobs in plan.items():
            arrays = self._load(jobs[0])
            picture = self._picture(arrays, query)
            if picture is not None:
                change = self._change(arrays, query)
                removals.append(Removal(self.queries.index(query), method, count, change, picture))
        pictures = np.stack([self.reference.pictures[query] for query in self.queries])
        return Retrained(tuple(captions[query] for query in self.queries), pictures, tuple(removals))

    def _trained_on_everything(self, models: int) -> Reference:
        stored = [self._load(job) for job in references(models)]
        loss = np.mean([arrays["losses_test"] for arrays in stored], axis=0)
        pictures = {query: self._picture(stored[0], query) for query in self.queries}
        lacking = self.sampler is not None and any(picture is None for picture in pictures.values())
        if lacking:
            path = self.collection.path(references(models)[0])
            raise ValueError(f"{path}: expected the test queries sampled again, found none; delete it and run {RUN}")
        return Reference(
            {query: float(loss[query]) for query in self.queries},
            {query: picture for query, picture in pictures.items() if picture is not None},
        )

    def _change(self, arrays: dict[str, np.ndarray], query: int) -> float:
        return float(arrays["losses_test"][query] - self.reference.loss[query])

    def _picture(self, arrays: dict[str, np.ndarray], query: int) -> np.ndarray | None:
        if self.sampler is None or LATENTS not in arrays:
            return None
        return decoded(self.sampler.decode, arrays[LATENTS][query], self.device)

    def _read(self, job: Retraining) -> dict[str, np.ndarray]:
        return load_npz(self.collection.path(job), ("losses_test",), RUN, optional=(LATENTS,))

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        images = [Image.fromarray(picture) for picture in pictures]
        features = self.encoder.encode(images, [""] * len(images))
        return features / np.linalg.norm(features, axis=1, keepdims=True)
