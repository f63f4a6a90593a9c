"""What is said about one picture, as data: found images, shares, method, versions and caveats. The report, the HTTP API
and the page show the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image

from fastgda.attributor import Attribution, Known
from fastgda.credit import LEVEL, Credit, Share

SHOWN = ("caption", "creator", "licence", "url")
"""What is told of a training image. Not its path: that is where it lies on the server."""
NO_INFLUENCE = "No training image among the first has positive influence."
CAVEATS = (
    "The order is predicted by a ranker that learned it from a teacher, which estimates how the generated image's loss "
    "would change had a training image been unlearned. Neither is proof that an image was copied.",
    "Shares are of the predicted influence of the first images only; for pictures like those that they were fitted on, "
    f"all intervals together hold the teacher's own shares in {LEVEL:.0%} of cases, and say nothing of its own error.",
    "Scores of different pictures can be compared only roughly, and pictures that the model did not make have no "
    "influences: for them the list shows look-alikes.",
)


@dataclass(frozen=True)
class Judged:
    """A training image in the teacher's ranking of a stored query."""

    rank: int
    """From 1."""
    score: float | None
    """The teacher's; absent where only ranks are known."""
    known: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The training images found for one picture."""

    image: Image.Image
    prompt: str
    tuned: Attribution
    """By the ranker; at least as deep as the credit rule needs."""
    shares: tuple[Share, ...] = ()
    """By creator; empty without a credit rule."""
    query: int | None = None
    """Number of a stored query."""
    seed: int | None = None
    """Of a picture generated here."""
    untuned: Attribution | None = None
    """By the features before any training."""
    distances: np.ndarray | None = None
    """[k] cosine distances of the images of `tuned` from the picture, under the features before any training; NaN where
    an image's features are not at hand."""
    judged: tuple[Judged, ...] = ()
    """The first of the teacher's ranking, for a stored query."""
    truth: Mapping[str, float] | None = None
    """The teacher's shares, for a stored query."""
    generate_seconds: float = 0.0

    @property
    def ids(self) -> np.ndarray:
        """All training images that it names."""
        untuned = [] if self.untuned is None else [self.untuned.ids]
        return np.concatenate([self.tuned.ids, *untuned, np.array([one.known["id"] for one in self.judged], np.int64)])

    @property
    def seconds(self) -> dict[str, float]:
        """What took how long."""
        parts = {"generate": self.generate_seconds} if self.seed is not None else {}
        return parts | asdict(self.tuned.timings)


def creators_of(known: Sequence[Known]) -> list[str | None]:
    """The creator of each image found."""
    return [(entry or {}).get("creator") for entry in known]


def method(encoder: Mapping[str, Any], ranker: str, images: int, credit: Credit | None) -> dict[str, Any]:
    """What made the answer: see the fields."""
    return {
        "encoder": encoder,
        "ranker": ranker,
        "training_images": images,
        "credit": None if credit is None else {"depth": credit.depth, "fitted_on": credit.fitted_on},
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
    }


def document(answer: Answer, how: Mapping[str, Any], k: int, credit: Credit | None) -> dict[str, Any]:
    """The answer as JSON, with the first `k` images of each list."""
    influence = None if credit is None else credit.magnitude.predict(answer.tuned.scores)
    found = images_found(answer.tuned, k)
    for place, entry in enumerate(found):
        if influence is not None:
            entry["influence"] = float(influence[place])
        if answer.distances is not None and np.isfinite(answer.distances[place]):
            entry["distance"] = float(answer.distances[place])
    return {
        "prompt": answer.prompt,
        "query": answer.query,
        "seed": answer.seed,
        "images": found,
        "untuned": [] if answer.untuned is None else images_found(answer.untuned, k),
        "shares": [asdict(share) for share in answer.shares],
        "teacher_shares": None if answer.truth is None else dict(answer.truth),
        "milliseconds": {name: round(1000 * value, 3) for name, value in answer.seconds.items()},
        "method": dict(how),
        "caveats": list(CAVEATS),
    }


def images_found(found: Attribution, k: int) -> list[dict[str, Any]]:
    """The first `k` images: place, id, score, and what is known of them."""
    entries = []
    for place, (name, score) in enumerate(zip(found.ids[:k].tolist(), found.scores[:k].tolist(), strict=True), 1):
        known = found.metadata[place - 1] or {}
        entries.append({"place": place, "id": name, "score": score} | {key: known.get(key) for key in SHOWN})
    return entries
