"""Losses against slow twins in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgda.losses import HEADS, make_loss
from fastgda.rankings import candidate_labels

NAMES = ["bce", "mse", "ordinal", "score", "listwise"]


def for_loss(name: str, logits: torch.Tensor) -> torch.Tensor:
    """Different logits for each head that the loss `name` needs."""
    heads = [logits * (1 + 0.1 * head) for head in range(HEADS.get(name, 1))]
    return torch.stack(heads) if len(heads) > 1 else logits.clone()


@pytest.fixture
def block(rng):
    """Logits, labels, relevance and weights of 3 queries x 8 images, a third of them outliers."""
    relevance = rng.standard_normal((3, 8))
    outlier = rng.random((3, 8)) < 0.33
    relevance[outlier] = -np.inf
    label = np.where(outlier, 1.0, rng.random((3, 8)))
    return tuple(torch.from_numpy(x) for x in (3 * rng.standard_normal((3, 8)), label, relevance, rng.random((3, 8))))


def test_bce_is_equation_3(block):
    logits, label, _, weight = (array.numpy() for array in block)
    total = 0.0
    for s, pi, w in zip(logits.ravel(), label.ravel(), weight.ravel(), strict=True):
        modelled = 1 / (1 + math.exp(-s))
        total -= w * (pi * math.log(modelled) + (1 - pi) * math.log(1 - modelled))
    assert make_loss("bce", 1.0)(*block).item() == pytest.approx(total / weight.sum(), rel=1e-12)
    flat = [array.flatten() for array in block]
    assert make_loss("bce", 1.0)(*flat).item() == pytest.approx(total / weight.sum(), rel=1e-12)


def test_mse_regresses_the_modelled_rank(block):
    logits, label, _, weight = (array.numpy().ravel() for array in block)
    total = sum(w * (1 / (1 + math.exp(-s)) - pi) ** 2 for s, pi, w in zip(logits, label, weight, strict=True))
    assert make_loss("mse", 1.0)(*block).item() == pytest.approx(total / weight.sum(), rel=1e-12)


def test_ordinal_classifies_every_threshold(block, rng):
    _, label, relevance, weight = block
    logits = torch.from_numpy(rng.standard_normal((9, 3, 8)))
    total = 0.0
    for row, column in np.ndindex(3, 8):
        for head in range(9):
            above = 1 / (1 + math.exp(-logits[head, row, column].item()))
            right = above if label[row, column] > (head + 1) / 10 else 1 - above
            total -= weight[row, column].item() * math.log(right) / 9
    loss = make_loss("ordinal", 1.0)
    assert loss(logits, label, relevance, weight).item() == pytest.approx(total / weight.sum().item(), rel=1e-12)
    flat = loss(logits.flatten(1), label.flatten(), relevance.flatten(), weight.flatten())
    assert flat.item() == pytest.approx(total / weight.sum().item(), rel=1e-12)


@pytest.mark.parametrize("candidates", [10, 70, 10_000])
def test_ordinal_bins_are_equal(candidates):
    """A tenth of the candidates lies below each threshold: logits that say so lose nothing."""
    label = torch.from_numpy(candidate_labels(candidates))
    bins = torch.arange(candidates) // (candidates // 10)
    logits = torch.where(bins > torch.arange(9)[:, None], 50.0, -50.0)
    ones = torch.ones(candidates)
    assert make_loss("ordinal", 1.0)(logits, label, ones, ones).item() < 1e-20


def test_score_regresses_the_candidates(block):
    logits, _, relevance, weight = (array.numpy().ravel() for array in block)
    known = np.isfinite(relevance)
    expected = np.average((-logits[known] - relevance[known]) ** 2, weights=weight[known])
    assert make_loss("score", 1.0)(*block).item() == pytest.approx(expected, rel=1e-12)
    outliers = torch.full_like(block[2], -torch.inf)
    logits = block[0].clone().requires_grad_()
    value = make_loss("score", 1.0)(logits, block[1], outliers, block[3])
    value.backward()
    assert value.item() == 0 and logits.grad is not None and (logits.grad == 0).all()


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_listwise_is_the_cross_entropy_of_two_softmaxes(block, temperature):
    logits, _, relevance, weight = (array.numpy() for array in block)
    rows = []
    for s, z, w in zip(logits, relevance, weight, strict=True):
        target = [wi * math.exp(zi / temperature) for wi, zi in zip(w, z, strict=True)]
        target = [value / sum(target) for value in target]
        normaliser = sum(wi * math.exp(-si) for wi, si in zip(w, s, strict=True))
        rows.append(-sum(t * math.log(math.exp(-si) / normaliser) for t, si in zip(target, s, strict=True)))
    assert make_loss("listwise", temperature)(*block).item() == pytest.approx(sum(rows) / 3, rel=1e-12)


def test_listwise_ignores_queries_without_candidates(block):
    logits, label, relevance, weight = block
    alone = make_loss("listwise", 1.0)(logits[:2], label[:2], relevance[:2], weight[:2])
    empty = relevance.clone()
    empty[2] = -torch.inf
    logits = logits.clone().requires_grad_()
    together = make_loss("listwise", 1.0)(logits, label, empty, weight)
    together.backward()
    torch.testing.assert_close(together, alone)
    assert logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[2] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_weight_removes_the_pair(block, name):
    logits, label, relevance, weight = block
    weight = weight.clone()
    weight[:, 5:] = 0
    relevance = relevance.clone()
    relevance[:, 0] = 1.0
    loss = make_loss(name, 1.0)
    logits = for_loss(name, logits).requires_grad_()
    value = loss(logits, label, relevance, weight)
    value.backward()
    kept = loss(*(array[..., :5] for array in (logits.detach(), label, relevance, weight)))
    torch.testing.assert_close(value.detach(), kept)
    assert logits.grad is not None and (logits.grad[..., 5:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients(block, name):
    logits, label, relevance, weight = block
    loss = make_loss(name, 0.7)
    assert torch.autograd.gradcheck(
        lambda s: loss(s, label, relevance, weight), for_loss(name, logits).requires_grad_()
    )


@pytest.mark.parametrize("name", NAMES)
def test_influential_images_want_low_logits(block, name):
    logits, label, relevance, weight = block
    label, relevance = torch.full_like(label, 0.95), torch.full_like(relevance, -3.0)
    label[:, 2], relevance[:, 2] = 0.05, 3.0
    logits = torch.zeros_like(for_loss(name, logits)).requires_grad_()
    make_loss(name, 1.0)(logits, label, relevance, weight).backward()
    assert logits.grad is not None and (logits.grad[..., 2] > 0).all()
    assert (logits.grad[..., 3:] < 0).all()


def test_listwise_needs_blocks(block):
    with pytest.raises(ValueError, match=r"expected blocks \[B, M\]"):
        make_loss("listwise", 1.0)(*(array.flatten() for array in block))
