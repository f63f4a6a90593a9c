"""Training steps drawn from the rankings, as arrays: which queries, which images, and what is known of their pairs.

The paper draws i.i.d. pairs: a query, then one of its K candidates, or with probability p a random image outside them,
labelled 1. `PairSampler` does that. `BlockSampler` draws the same pairs for a few queries, embeds each distinct image
once and uses all the labelled pairs among the drawn queries and images; each pair is weighted by its probability under
the paper's sampling over the probability that the block contains it (Horvitz-Thompson), so that the expected loss is
the paper's. A step depends on (seed, step) only.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fastgda.rankings import Rankings, candidate_labels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """The labelled pairs of one training step; arguments of the losses in `fastgda.losses`."""

    queries: np.ndarray
    """[B] distinct rows of the training queries."""
    images: np.ndarray
    """[M] distinct training ids."""
    pairs: tuple[np.ndarray, np.ndarray] | None
    """([P], [P]) places in `queries` and `images`; absent where the pairs are the whole block [B, M]."""
    label: np.ndarray
    """[B, M] or [P] float32."""
    relevance: np.ndarray
    """Like `label`."""
    weight: np.ndarray
    """Like `label`."""


class Outliers:
    """Draws training images outside the candidates of a query, uniformly and without rejection."""

    def __init__(self, rankings: Rankings, images: int) -> None:
        """images: N."""
        self.candidates, self.outside = rankings.candidates, images - rankings.candidates
        # place j of a sorted row has (id_j - j) outsiders below it; adding a multiple of the row number makes the
        # table ascend as a whole, so that one searchsorted serves pairs of any queries
        kind = np.dtype(np.int32 if rankings.queries * (self.outside + 1) < 2**31 else np.int64)
        below = np.sort(rankings.rank, axis=1).astype(kind)
        below -= np.arange(self.candidates, dtype=kind)
        below += (np.arange(rankings.queries) * (self.outside + 1)).astype(kind)[:, None]
        self.below = below.ravel()

    def draw(self, queries: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """[P] query rows -> [P] ids of images that are not among their candidates."""
        if queries.size == 0:
            return np.empty(0, dtype=np.int64)
        which = random.integers(self.outside, size=queries.shape)
        keys = (queries * (self.outside + 1) + which).astype(self.below.dtype)
        return which + np.searchsorted(self.below, keys, side="right") - queries * self.candidates


class PairSampler:
    """The paper's i.i.d. pairs, `batch_size` a step."""

    def __init__(
        self, rankings: Rankings, images: int, relevance: np.ndarray, *, batch_size: int, outlier_prob: float, seed: int
    ) -> None:
        self.rankings, self.relevance = rankings, relevance
        self.batch_size, self.seed = batch_size, seed
        self.outlier_prob = usable_outlier_prob(rankings, images, outlier_prob)
        self.outliers = Outliers(rankings, images)
        self.labels = candidate_labels(rankings.candidates)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that draw as many pairs as the rankings hold."""
        return -(-self.rankings.rank.size // self.batch_size)

    def step(self, number: int) -> Step:
        """Step `number` of the run."""
        random = np.random.default_rng((self.seed, number))
        query = random.integers(self.rankings.queries, size=self.batch_size)
        place = random.integers(self.rankings.candidates, size=self.batch_size)
        outlier = random.random(self.batch_size) < self.outlier_prob
        image = self.rankings.rank[query, place].astype(np.int64)
        image[outlier] = self.outliers.draw(query[outlier], random)
        relevance = self.relevance[query if len(self.relevance) > 1 else 0, place]
        queries, rows = np.unique(query, return_inverse=True)
        images, columns = np.unique(image, return_inverse=True)
        return Step(
            queries,
            images,
            (rows, columns),
            np.where(outlier, np.float32(1), self.labels[place]),
            np.where(outlier, np.float32(-np.inf), relevance),
            np.ones(self.batch_size, dtype=np.float32),
        )


class BlockSampler:
    """Blocks of queries x images: every query once in a pass, `image_block` draws shared among a block's queries."""

    def __init__(
        self,
        rankings: Rankings,
        images: int,
        relevance: np.ndarray,
        *,
        query_block: int,
        image_block: int,
        outlier_prob: float,
        seed: int,
    ) -> None:
        self.rankings, self.images, self.relevance = rankings, images, relevance
        self.query_block, self.seed = min(query_block, rankings.queries), seed
        self.draws = max(1, image_block // self.query_block)
        self.outlier_prob = usable_outlier_prob(rankings, images, outlier_prob)
        self.outliers = Outliers(rankings, images)
        self.labels = candidate_labels(rankings.candidates)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the queries."""
        return -(-self.rankings.queries // self.query_block)

    def step(self, number: int) -> Step:
        """Step `number` of the run."""
        epoch, block = divmod(number, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch, 0)).permutation(self.rankings.queries)
        queries = np.sort(order[block * self.query_block : (block + 1) * self.query_block])
        images = self.draw_images(queries, np.random.default_rng((self.seed, epoch, 1 + block)))
        candidates = self.rankings.candidates
        column = np.full(self.images, -1, dtype=np.int32)
        column[images] = np.arange(images.size, dtype=np.int32)
        found = column[self.rankings.rank[queries]]
        row, place = np.nonzero(found >= 0)
        columns = found[row, place]

        shape = (queries.size, images.size)
        label = np.ones(shape, dtype=np.float32)
        label[row, columns] = self.labels[place]
        relevance = np.full(shape, -np.inf, dtype=np.float32)
        relevance[row, columns] = self.relevance[queries[row] if len(self.relevance) > 1 else 0, place]
        inside, outside = self.draw_probabilities()
        weight = np.full(shape, outside)
        weight[row, columns] = inside
        shared = np.bincount(columns, minlength=images.size)
        weight /= self.inclusion(shared, queries.size)
        return Step(queries, images, None, label, relevance, (weight * candidates).astype(np.float32))

    def draw_images(self, queries: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Distinct ids, sorted, of the images that the block's queries draw, `draws` each."""
        query = np.repeat(queries, self.draws)
        image = self.rankings.rank[query, random.integers(self.rankings.candidates, size=query.size)].astype(np.int64)
        outlier = random.random(query.size) < self.outlier_prob
        image[outlier] = self.outliers.draw(query[outlier], random)
        return np.unique(image)

    def draw_probabilities(self) -> tuple[float, float]:
        """Probability that one draw of a query gives a certain one of its candidates, or a certain outsider."""
        outside = self.images - self.rankings.candidates
        return (1 - self.outlier_prob) / self.rankings.candidates, self.outlier_prob / outside if outside else 0.0

    def inclusion(self, shared: np.ndarray, queries: int) -> np.ndarray:
        """Probability that a block contains an image that is a candidate of `shared` of its `queries`: [M]."""
        inside, outside = self.draw_probabilities()
        missed = shared * np.log1p(-min(inside, 1 - 1e-12)) + (queries - shared) * np.log1p(-min(outside, 1 - 1e-12))
        return -np.expm1(self.draws * missed)


def usable_outlier_prob(rankings: Rankings, images: int, outlier_prob: float) -> float:
    """`outlier_prob`, or 0 with a warning where the rankings cover every training image."""
    if outlier_prob and rankings.candidates == images:
        logger.warning("outlier_prob %s is ignored: the rankings cover all %d images", outlier_prob, images)
        return 0.0
    return outlier_prob


def relevance_table(rankings: Rankings, target: str) -> np.ndarray:
    """Standardised influence of the candidates in their order: [Q, K] from `score`s, or [1, K] from `rank`s alone.

    `score`: (score - mean) / deviation of each query. `rank`: the normal quantile of the rank, which is what a
    normally distributed score would give and is untouched by heavy tails.
    """
    if target == "score":
        if rankings.score is None:
            raise ValueError("expected rankings with scores for --target score, found ranks only; use --target rank")
        score = rankings.score.astype(np.float32)
        deviation = score.std(axis=1, keepdims=True)
        return (score - score.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-12)
    normal, size = NormalDist(), rankings.candidates
    return np.array([[normal.inv_cdf(1 - (place + 0.5) / size) for place in range(size)]], dtype=np.float32)
