"""Losses of the ranker behind one signature.

A loss takes, for the labelled pairs of a step, arrays of one shape, [B, M] (B queries x M images) or flat [P]:
    logits     scale * r + bias, the logit of the modelled normalised rank; low = influential
    label      pi, the normalised rank of the teacher in (0, 1]; 1 outside the candidates
    relevance  standardised teacher score z, higher = more influential; -inf outside the candidates
    weight     importance of the pair, which makes the step an unbiased sample of the paper's pairs
and returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bce(logits: Tensor, label: Tensor, relevance: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy between sigmoid(logits) and the normalised rank (eq. 3), weighted mean over the pairs."""
    values = functional.binary_cross_entropy_with_logits(logits, label, reduction="none")
    return (weight * values).sum() / weight.sum()


def listwise(temperature: float) -> Loss:
    """Softmax cross-entropy over the images of the step, its target concentrated on the top of the ranking.

    Per query, t_i = w_i exp(z_i / T) / sum_j w_j exp(z_j / T) and p_i = w_i exp(-logit_i) / sum_j w_j exp(-logit_j);
    loss = mean over queries of -sum_i t_i log(p_i / w_i). With normally distributed z the target's mass lies around
    z = 1/T: T = 0.5 means the top 2 %. Queries without a candidate among the images of the step are left out.
    Departs from the paper, whose loss spends nearly all of itself on the order of images without influence.
    """

    def loss(logits: Tensor, label: Tensor, relevance: Tensor, weight: Tensor) -> Tensor:
        if logits.ndim != 2:
            raise ValueError(f"expected blocks [B, M] for the listwise loss, found {list(logits.shape)}")
        log_weight = weight.log()
        known = (relevance > -torch.inf) & (weight > 0)
        present = known.any(dim=1, keepdim=True)
        # rows without a candidate get a harmless uniform target here and no share in the mean below
        energy = torch.where(known, relevance / temperature + log_weight, -torch.inf)
        target = torch.where(present, energy, 0.0).softmax(dim=1)
        normaliser = (log_weight - logits).logsumexp(dim=1)
        rows = normaliser + (target * logits).sum(dim=1)
        return torch.where(present[:, 0], rows, 0.0).sum() / present.sum().clamp(min=1)

    return loss


def make_loss(name: str, temperature: float) -> Loss:
    """The loss called `name`."""
    return {"bce": bce, "listwise": listwise(temperature)}[name]
