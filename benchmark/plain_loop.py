"""The plain way to train the ranker, to compare with: one `__getitem__` per pair, both sides of each pair embedded.

Written as common research code is: a `Dataset` of (query, candidate) pairs that returns two features and a label, the
default `collate`, binary cross-entropy on the normalised rank (eq. 3). Model, optimiser, learning rate and initial
weights are those of `fastgda.trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastgda.dataset import Split
from fastgda.ranker import Ranker
from fastgda.recipes import TrainConfig


class Pairs(Dataset):
    """Every (query, candidate) pair; with probability `outlier_prob` an image outside the candidates instead."""

    def __init__(self, images: np.ndarray, split: Split, outlier_prob: float) -> None:
        self.images = torch.from_numpy(images)
        self.queries = torch.from_numpy(split.features)
        self.rank = split.rankings.rank
        self.outlier_prob = outlier_prob if self.rank.shape[1] < len(images) else 0.0

    def __len__(self) -> int:
        return self.rank.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, float]:
        """(feature of the query, feature of the image, label pi)."""
        query, place = divmod(index, self.rank.shape[1])
        image, label = self.rank[query, place], (place + 1) / self.rank.shape[1]
        if self.outlier_prob and np.random.rand() < self.outlier_prob:
            image, label = np.random.randint(len(self.images)), 1.0
            while (self.rank[query] == image).any():
                image = np.random.randint(len(self.images))
        return self.queries[query], self.images[image], label


class PlainLoop:
    """Training by pairs; `steps` goes on for ever."""

    def __init__(
        self, images: np.ndarray, split: Split, config: TrainConfig, workers: int, device: torch.device
    ) -> None:
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        self.device = device
        self.ranker = Ranker(config.architecture(images.shape[1]), config.init_scale).to(device)
        self.optimizer = torch.optim.AdamW(self.ranker.parameters(), config.lr, weight_decay=config.weight_decay)
        pairs = Pairs(images, split, config.outlier_prob)
        # with replacement, as a permutation of all pairs is a list of 49 million integers at COCO's size
        sampler = RandomSampler(pairs, replacement=True, num_samples=len(pairs))
        pinned = device.type == "cuda"
        self.loader = DataLoader(
            pairs, config.batch_size, sampler=sampler, num_workers=workers, drop_last=True, pin_memory=pinned
        )

    def steps(self) -> Iterator[int]:
        """Trains; yields the number of pairs after each update."""
        while True:
            for batch in self.loader:
                queries, images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                self.ranker.train()
                similarity = (self.ranker(queries) * self.ranker(images)).sum(dim=1)
                loss = functional.binary_cross_entropy_with_logits(self.ranker.logits(similarity), labels.float())
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                yield len(labels)
