"""Training steps drawn from the rankings, as arrays: which queries, which images, and what is known of their pairs.

The paper draws i.i.d. pairs: a query, then one of its K candidates, or with probability p a random image outside them,
labelled 1. `PairSampler` does that. `BlockSampler` draws the same pairs for a few queries, embeds each distinct image
once and uses all the labelled pairs among the drawn queries and images; each pair is weighted by its probability under
the paper's sampling over the probability that the block contains it (Horvitz-Thompson), so that the expected loss is
the paper's. A step depends on (seed, step) only.

A random subset of S of the K candidates may stand for all of them, ranked among themselves: resampled in each step (the
paper's text), or drawn once for each query (the released code), where the others are as if the teacher had never seen
them. Outliers are outside the K candidates either way: to be a candidate costs a nearest-neighbour search, no teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastgda.candidates import Outliers, fixed_subset, relevance_table, usable_outlier_prob
from fastgda.rankings import Rankings, candidate_labels
from fastgda.recipes import TrainConfig


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
    """Like `label`; 0 where nothing is known of a pair."""


class PairSampler:
    """The paper's i.i.d. pairs, `batch_size` a step."""

    def __init__(
        self,
        rankings: Rankings,
        images: int,
        relevance: np.ndarray,
        *,
        batch_size: int,
        outlier_prob: float,
        seed: int,
        known: np.ndarray | None = None,
        resample: int = 0,
    ) -> None:
        """images: N. relevance: of `relevance_table`. known [Q, K]: no outlier is among these; `rankings`' by default.

        resample: S, the candidates that a ranking is thinned to in each step; 0 keeps all.
        """
        known = rankings.rank if known is None else known
        self.rankings, self.relevance = rankings, relevance
        self.batch_size, self.seed, self.resample = batch_size, seed, resample
        self.outlier_prob = usable_outlier_prob(known.shape[1], images, outlier_prob)
        self.outliers = Outliers(known, images)
        self.labels = candidate_labels(resample or rankings.candidates)

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
        thinned = place
        if self.resample:
            # of the S - 1 others in the subset of a pair, those ranked above it are hypergeometric in number
            below = self.rankings.candidates - 1 - place
            thinned = random.hypergeometric(place, below, self.resample - 1)
        shared = len(self.relevance) == 1
        relevance = self.relevance[0 if shared else query, thinned if shared else place]
        queries, rows = np.unique(query, return_inverse=True)
        images, columns = np.unique(image, return_inverse=True)
        return Step(
            queries,
            images,
            (rows, columns),
            np.where(outlier, np.float32(1), self.labels[thinned]),
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
        known: np.ndarray | None = None,
        resample: int = 0,
    ) -> None:
        """As in `PairSampler`."""
        self.known = rankings.rank if known is None else known
        self.rankings, self.images, self.relevance = rankings, images, relevance
        self.query_block, self.seed, self.resample = min(query_block, rankings.queries), seed, resample
        self.draws = max(1, image_block // self.query_block)
        self.outlier_prob = usable_outlier_prob(self.known.shape[1], images, outlier_prob)
        self.outliers = Outliers(self.known, images)
        self.candidates = resample or rankings.candidates
        self.labels = candidate_labels(self.candidates)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the queries."""
        return -(-self.rankings.queries // self.query_block)

    def step(self, number: int) -> Step:
        """Step `number` of the run."""
        epoch, block = divmod(number, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch, 0)).permutation(self.rankings.queries)
        queries = np.sort(order[block * self.query_block : (block + 1) * self.query_block])
        labelled, places = self.rankings.rank[queries], None
        if self.resample:
            places = self.draw_subsets(queries.size, np.random.default_rng((self.seed, epoch, 1 + block, 1)))
            labelled = np.take_along_axis(labelled, places, axis=1)
        images = self.draw_images(queries, labelled, np.random.default_rng((self.seed, epoch, 1 + block)))
        column = np.full(self.images, -1, dtype=np.int32)
        column[images] = np.arange(images.size, dtype=np.int32)
        row, place, columns = _among(labelled, column)

        shape = (queries.size, images.size)
        label = np.ones(shape, dtype=np.float32)
        label[row, columns] = self.labels[place]
        relevance = np.full(shape, -np.inf, dtype=np.float32)
        if len(self.relevance) == 1:
            relevance[row, columns] = self.relevance[0, place]
        else:
            relevance[row, columns] = self.relevance[queries[row], place if places is None else places[row, place]]
        return Step(queries, images, None, label, relevance, self.weights(queries, column, row, columns, shape))

    def draw_subsets(self, queries: int, random: np.random.Generator) -> np.ndarray:
        """[queries, S] places of a random subset of each query's candidates, ascending."""
        everything = np.tile(np.arange(self.rankings.candidates, dtype=np.int32), (queries, 1))
        return np.sort(random.permuted(everything, axis=1)[:, : self.resample], axis=1)

    def draw_images(self, queries: np.ndarray, labelled: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Distinct ids, sorted, of the images that the block's queries draw, `draws` each; labelled [B, S]."""
        row = np.repeat(np.arange(queries.size), self.draws)
        image = labelled[row, random.integers(self.candidates, size=row.size)].astype(np.int64)
        outlier = random.random(row.size) < self.outlier_prob
        image[outlier] = self.outliers.draw(queries[row[outlier]], random)
        return np.unique(image)

    def weights(
        self, queries: np.ndarray, column: np.ndarray, row: np.ndarray, columns: np.ndarray, shape: tuple[int, int]
    ) -> np.ndarray:
        """[B, M] float32, in proportion to each pair's probability in the paper's sampling over that of its image here.

        (row, columns): the pairs with a label. Candidates that a subset leaves out are neither labelled nor outliers.
        """
        inside, outside = self.draw_probabilities()
        weight = np.full(shape, outside)
        of = columns
        if self.candidates < self.known.shape[1]:
            rows, _, of = _among(self.known[queries], column)
            weight[rows, of] = 0
        weight[row, columns] = inside
        labelled, known = (np.bincount(places, minlength=shape[1]) for places in (columns, of))
        return (weight / self.inclusion(labelled, known, shape[0]) * self.candidates).astype(np.float32)

    def draw_probabilities(self) -> tuple[float, float]:
        """Probability that one draw of a query gives a certain one of its labelled candidates, or a certain outlier."""
        outside = self.images - self.known.shape[1]
        return (1 - self.outlier_prob) / self.candidates, self.outlier_prob / outside if outside else 0.0

    def inclusion(self, labelled: np.ndarray, known: np.ndarray, queries: int) -> np.ndarray:
        """[M] probability that a block contains an image that is a candidate of `known` of its queries.

        labelled [M]: how many of those have it in their subset.
        """
        inside, outside = self.draw_probabilities()
        missed = labelled * np.log1p(-min(inside, 1 - 1e-12)) + (queries - known) * np.log1p(-min(outside, 1 - 1e-12))
        return -np.expm1(self.draws * missed)


def make_sampler(config: TrainConfig, rankings: Rankings, images: int) -> PairSampler | BlockSampler:
    """The sampler that `config` names, of rankings of N `images`."""
    size, known = config.random_subset_size, rankings.rank
    if size > rankings.candidates:
        raise ValueError(f"--random_subset_size: expected at most the {rankings.candidates} candidates, found {size}")
    if size == rankings.candidates:
        size = 0
    if size and config.subset == "fixed":
        rankings, size = fixed_subset(rankings, size, config.seed), 0
    relevance = relevance_table(rankings, config.relevance, size or None)
    data = rankings, images, relevance
    if config.sampling == "pairs":
        return PairSampler(
            *data,
            batch_size=config.batch_size,
            outlier_prob=config.outlier_prob,
            seed=config.seed,
            known=known,
            resample=size,
        )
    return BlockSampler(
        *data,
        query_block=config.query_block,
        image_block=config.image_block,
        outlier_prob=config.outlier_prob,
        seed=config.seed,
        known=known,
        resample=size,
    )


def _among(ranks: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # (row, place, column) of the ids in ranks [B, K] that column [N] gives a place in the block
    found = column[ranks]
    row, place = np.nonzero(found >= 0)
    return row, place, found[row, place]
