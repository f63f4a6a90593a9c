"""Everything the page and the HTTP API answer from, and their answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from fastgda.attributor import Attribution, Clock, FeatureAttributor
from fastgda.credit import UNKNOWN, Credit, teacher_shares
from fastgda.dataset import normalise
from fastgda.rankings import Rankings
from feature_extraction.encoders import Encoder
from feature_extraction.sources import Pictures
from serving.answer import Answer, creators_of
from serving.limits import Limits, Turn, whole
from serving.painter import Painter
from serving.retrained import Retrained

SAMPLE = 256
"""Training images whose nearest others say what distance is usual."""


@dataclass(frozen=True)
class World:
    """Loaded and checked."""

    images: Pictures
    """Training images."""
    features: np.ndarray
    """[N, D] their features."""
    known: list[dict[str, Any]]
    """[N] what is told of them besides the caption: creator and licence, or key, what their dataset calls them."""
    queries: Pictures
    """Stored test queries."""
    teacher: Rankings
    """The teacher's rankings for the stored queries."""
    encoder: Encoder
    tuned: FeatureAttributor
    untuned: FeatureAttributor
    topk: int
    level: int
    """L: the teacher's top L count as influential."""
    how: dict[str, Any]
    """What makes the answers: see `answer.method`."""
    credit: Credit | None = None
    """Absent where the teacher's scores of validation queries are."""
    painter: Painter | None = None
    """Absent without the source model."""
    retrained: Retrained | None = None
    """Pictures of models trained again; absent where they were not made."""
    limits: Limits = field(default_factory=Limits)
    typical_distance: float = 0.0
    """Median cosine distance of a training image to its nearest other."""
    encoding: Turn = field(default_factory=lambda: Turn(Limits.timeout_s))
    """Tokenizers refuse to be used by two threads at once."""

    @cached_property
    def has_creators(self) -> bool:
        """Whether there is anything to tell of creators."""
        return self.credit is not None or any(known.get("creator") for known in self.known)

    def depth(self, k: int) -> int:
        """Images to find where `k` are wanted and the credit rule needs its own."""
        return k if self.credit is None else max(k, min(self.credit.depth, len(self.images)))

    def answer(self, image: Image.Image, prompt: str, k: int, query: int | None = None) -> Answer:
        """The training images of a picture and its prompt; of stored query number `query` with the teacher's shares."""
        clock = Clock()
        with self.encoding():
            features = self.encoder.encode([image], [prompt])[0]
        encode = clock.lap()
        tuned = self._described(self.tuned.attribute(features, self.depth(k), encode))
        untuned = self._described(self.untuned.attribute(features, k, encode))
        shares = () if self.credit is None else self.credit.shares(tuned.scores, creators_of(tuned.metadata))
        rows = normalise(self.features[tuned.ids].astype(np.float32))
        distances = np.maximum(1 - rows @ normalise(features[None])[0], 0)
        return Answer(image, prompt, tuned, shares, query, None, untuned, distances, self._truth(query))

    def stored(self, query: object, k: int) -> Answer:
        """The answer for stored query number `query`; `ValueError` if there is none of that number."""
        row = whole(query)
        if not 0 <= row < len(self.queries):
            raise ValueError(f"query: expected a number from 0 to {len(self.queries) - 1}, found {query!r:.40}")
        return self.answer(self.queries.image(row), self.queries.caption(row), k, row)

    def generated(self, prompt: object, seed: object, k: int) -> Answer:
        """Generates a picture and answers for it; `ValueError` for a prompt or seed beyond the limits."""
        if self.painter is None:
            raise ValueError("This server has no source model to generate pictures with.")
        words, number = self.limits.checked_prompt(prompt), self.limits.checked_seed(seed)
        clock = Clock()
        image = self.painter.paint(words, number)
        seconds = clock.lap()
        return replace(self.answer(image, words, k), seed=number, generate_seconds=seconds)

    def _described(self, found: Attribution) -> Attribution:
        clock = Clock()
        known = tuple({"id": i, "caption": self.images.caption(i), **self.known[i]} for i in map(int, found.ids))
        return replace(found, metadata=known, timings=replace(found.timings, metadata=clock.lap()))

    def _truth(self, query: int | None) -> dict[str, float] | None:
        """The teacher's shares of a stored query, largest first; `None` where its scores are not known."""
        if query is None or self.credit is None or self.teacher.score is None:
            return None
        row = self.teacher.rows(slice(query, query + 1))
        first = row.rank[0, : self.credit.depth].tolist()
        owners = [self.known[image].get("creator") or UNKNOWN for image in first]
        names = sorted(set(owners))
        codes = np.zeros(len(self.images), dtype=np.int64)
        codes[first] = [names.index(owner) for owner in owners]
        shares = teacher_shares(row, codes, len(names), self.credit.depth)[0]
        return dict(sorted(zip(names, shares.tolist(), strict=True), key=lambda pair: -pair[1]))


def typical_distance(untuned: FeatureAttributor, features: np.ndarray) -> float:
    """Median cosine distance of some training images to their nearest others."""
    step = max(1, len(features) // SAMPLE)
    rows = np.asarray(features[::step][:SAMPLE], dtype=np.float32)
    rows = rows[np.any(rows, axis=1)]
    found = untuned.attribute_batch(rows, 2)
    return float(np.median([1 - one.scores[1] for one in found]))
