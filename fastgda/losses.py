"""Losses of the ranker behind one signature.

A loss takes, for the labelled pairs of a step, arrays of one shape, [B, M] (B queries x M images) or flat [P]:
    logits     scale * r + bias, the logit of the modelled normalised rank; low = influential. Losses that need several
               heads (`HEADS`) take one such array for each head, stacked along a new first axis
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

BINS = 10
"""Equal bins of the normalised rank that `ordinal` distinguishes."""
HEADS = {"ordinal": BINS - 1}
"""Heads that a loss needs, where it is more than one."""


def bce(logits: Tensor, label: Tensor, relevance: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy between sigmoid(logits) and the normalised rank (eq. 3), weighted mean over the pairs."""
    values = functional.binary_cross_entropy_with_logits(logits, label, reduction="none")
    return _mean(values, weight)


def mse(logits: Tensor, label: Tensor, relevance: Tensor, weight: Tensor) -> Tensor:
    """(sigmoid(logits) - pi)^2, weighted mean over the pairs: regression of the normalised rank.

    The modelled rank is that of `bce`, so the two differ in the loss alone; a rank regressed on the cosine itself would
    have to fill [0, 1] by the geometry of the embedding.
    """
    return _mean((logits.sigmoid() - label) ** 2, weight)


def ordinal(logits: Tensor, label: Tensor, relevance: Tensor, weight: Tensor) -> Tensor:
    """Ordinal regression of the rank's decile (eqs. 17-20): head k = 1..9 classifies pi > k/10, with its own feature.

    Binary cross-entropy, mean over the heads, weighted mean over the pairs. `logits` is [9, B, M] or [9, P].
    """
    assert len(logits) == BINS - 1
    # divided in float64 and then rounded, as the labels are, so that a label on a threshold equals it
    edges = (torch.arange(1, BINS, dtype=torch.float64, device=label.device) / BINS).to(label.dtype)
    above = (label > edges.view(-1, *[1] * label.ndim)).to(logits.dtype)
    values = functional.binary_cross_entropy_with_logits(logits, above, reduction="none")
    return _mean(values.mean(dim=0), weight)


def score(logits: Tensor, label: Tensor, relevance: Tensor, weight: Tensor) -> Tensor:
    """(-logit - z)^2, weighted mean over the candidates: regression of the standardised teacher score.

    Images outside the candidates have no score and are left out.
    """
    known = relevance > -torch.inf
    errors = torch.where(known, logits + torch.where(known, relevance, 0.0), 0.0) ** 2
    return _mean(errors, torch.where(known, weight, 0.0))


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
    losses = {"bce": bce, "mse": mse, "ordinal": ordinal, "score": score, "listwise": listwise(temperature)}
    return losses[name]


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    # a step of outliers alone has no weight in `score`: its loss is zero
    return (weight * values).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
