"""Everything the page and the HTTP API answer from, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from fastgda.attributor import Attribution, Clock, FeatureAttributor
from fastgda.credit import Credit, coded, teacher_shares
from fastgda.dataset import normalise
from fastgda.rankings import Rankings
from feature_extraction.encoders import Encoder
from feature_extraction.sources import Pictures
from serving.answer import Answer, Judged, creators_of
from serving.collection import Collection
from serving.limits import Limits, Turn, Workers, whole
from serving.painter import Painter
from serving.retrained import Retrained

Told = TypeVar("Told")
SAMPLE = 256
"""Training images whose nearest others say what distance is usual."""


@dataclass(frozen=True)
class World:
    """Loaded and checked."""

    images: Pictures
    """Training images by id; none where there is no data folder."""
    features: np.ndarray
    """[N, D] their features; N = 0 likewise."""
    collection: Collection
    """What is told of the training images, and which of them there still are."""
    queries: Pictures
    """Stored test queries, if any."""
    teacher: Rankings
    """The teacher's rankings for the stored queries."""
    encoder: Encoder
    tuned: FeatureAttributor
    untuned: FeatureAttributor | None
    """Absent without features."""
    topk: int
    level: int
    """L: the teacher's top L count as influential."""
    how: dict[str, Any]
    """What makes the answers: see `answer.method`."""
    credit: Credit | None = None
    """Absent where it was not fitted for this ranker."""
    painter: Painter | None = None
    """Absent without the source model."""
    retrained: Retrained | None = None
    """Pictures of models trained again; absent where they were not made."""
    limits: Limits = field(default_factory=Limits)
    typical_distance: float = 0.0
    """Median cosine distance of a training image to its nearest other."""
    encoding: Turn = field(default_factory=lambda: Turn(Limits.timeout_s))
    """Tokenizers refuse to be used by two threads at once."""
    working: Workers = field(default_factory=lambda: Workers(Limits.timeout_s))
    """Where answers are made."""

    @cached_property
    def has_creators(self) -> bool:
        """Whether there is anything to tell of creators."""
        return self.credit is not None or self.collection.has_creators

    @property
    def method(self) -> dict[str, Any]:
        """What makes the answers, with the number of training images at this moment."""
        return {**self.how, "training_images": len(self.collection)}

    def depth(self, k: int) -> int:
        """Images to find where `k` are wanted and the credit rule needs its own."""
        return k if self.credit is None else max(k, min(self.credit.depth, len(self.collection)))

    def told(self, find: Callable[[], Answer], tell: Callable[[Answer], Told]) -> Told:
        """`tell` of what `find` answers.

        Once more if an image of it was removed meanwhile: an opt-out holds for answers under way too. Raises
        `ValueError` if it takes too long.
        """

        def work() -> Told:
            while True:
                answer = find()
                said = tell(answer)
                if self.collection.holds(answer.ids).all():
                    return said

        return self.working(work)

    def answer(self, image: Image.Image, prompt: str, k: int, query: int | None = None) -> Answer:
        """The training images of a picture and its prompt; of stored query number `query` with the teacher's shares."""
        clock = Clock()
        with self.encoding():
            features = self.encoder.encode([image], [prompt])[0]
        encode = clock.lap()
        tuned = self._held(self.tuned, features, self.depth(k), encode)
        untuned = None if self.untuned is None else self._held(self.untuned, features, k, encode)
        shares = () if self.credit is None else self.credit.shares(tuned.scores, creators_of(tuned.metadata))
        judged = self._judged(query, k)
        distances = self._distances(features, tuned.ids)
        return Answer(image, prompt, tuned, shares, query, None, untuned, distances, judged, self._truth(judged))

    def stored(self, query: object, k: int) -> Answer:
        """The answer for stored query number `query`; `ValueError` if there is none of that number."""
        row = whole(query)
        if len(self.queries) == 0:
            raise ValueError("This server has no stored queries.")
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

    def _held(self, attributor: FeatureAttributor, features: np.ndarray, k: int, encode: float) -> Attribution:
        """The first `k` images that the collection holds, or as many as it does: an index in memory knows no removals.

        Raises `ValueError` if there are none.
        """
        wanted, most = k, len(attributor.index)
        while most:
            found = attributor.attribute(features, min(wanted, most), encode)
            clock = Clock()
            known = self.collection.known(found.ids)
            places = [place for place, entry in enumerate(known) if entry is not None][:k]
            if len(places) == k or (places and wanted >= most):
                timings = replace(found.timings, metadata=found.timings.metadata + clock.lap())
                told = tuple(known[place] for place in places)
                return Attribution(found.ids[places], found.scores[places], told, timings)
            if wanted >= most:
                break
            wanted *= 2
        raise ValueError("No training image is left.")

    def _distances(self, features: np.ndarray, ids: np.ndarray) -> np.ndarray | None:
        """[k] see `Answer.distances`."""
        if self.untuned is None:
            return None
        # images that were added to a bundle have no row
        stored = ids < len(self.features)
        distances = np.full(len(ids), np.nan, dtype=np.float32)
        rows = normalise(self.features[ids[stored]].astype(np.float32))
        distances[stored] = np.maximum(1 - rows @ normalise(features[None])[0], 0)
        return distances

    def _judged(self, query: int | None, k: int) -> tuple[Judged, ...]:
        """The first of the teacher's ranking of a stored query that the collection holds, as many as are found."""
        if query is None:
            return ()
        ids = self.teacher.rank[query].astype(np.int64)
        places = np.flatnonzero(self.collection.holds(ids))[: self.depth(k)].tolist()
        scores = None if self.teacher.score is None else self.teacher.score[query]
        pairs = zip(places, self.collection.known(ids[places]), strict=True)
        return tuple(
            Judged(place + 1, None if scores is None else float(scores[place]), known)
            for place, known in pairs
            if known is not None
        )

    def _truth(self, judged: Sequence[Judged]) -> dict[str, float] | None:
        """The teacher's shares of a stored query, largest first; `None` where its scores are not known."""
        if not judged or self.credit is None or self.teacher.score is None:
            return None
        first = judged[: self.credit.depth]
        codes, names = coded([one.known.get("creator") for one in first])
        order = Rankings(np.arange(len(first))[None], np.array([[one.score for one in first]]))
        shares = teacher_shares(order, codes, len(names), len(first))[0]
        return dict(sorted(zip(names, shares.tolist(), strict=True), key=lambda pair: -pair[1]))


def typical_distance(untuned: FeatureAttributor, features: np.ndarray) -> float:
    """Median cosine distance of some training images to their nearest others."""
    step = max(1, len(features) // SAMPLE)
    rows = np.asarray(features[::step][:SAMPLE], dtype=np.float32)
    rows = rows[np.any(rows, axis=1)]
    found = untuned.attribute_batch(rows, 2)
    return float(np.median([1 - one.scores[1] for one in found]))
