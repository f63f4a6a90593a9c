"""Attribution by retrieval against the definition: sorting embed_queries(q) @ embed(z).T."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgda.attributor import Attributor, Untuned
from fastgda.index import Index, SegmentConfig, Source
from fastgda.ranker import Ranker, RankerConfig


def make_ranker(scale: float) -> Ranker:
    """An untrained ranker whose learned scale is `scale`."""
    torch.manual_seed(0)
    ranker = Ranker(RankerConfig(in_dim=12, hidden_sizes=(16,), out_feat_dim=8))
    with torch.no_grad():
        ranker.scale.fill_(scale)
    return ranker.eval()


@pytest.mark.parametrize("scale", [-4.0, 4.0])
def test_order_is_that_of_the_modelled_rank(rng: np.random.Generator, scale: float) -> None:
    """Most influential first = smallest modelled normalised rank first, whichever sign the scale learned."""
    features, query = rng.normal(size=(60, 12)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    ranker = make_ranker(scale)
    with torch.no_grad():
        cosine = ranker(torch.from_numpy(features)) @ ranker(torch.from_numpy(query[None]))[0]
        modelled = torch.sigmoid(ranker.logits(cosine)).numpy()
    found = Attributor.build(features, ranker).attribute(query, 60)
    assert np.array_equal(found.ids, np.argsort(modelled))
    assert (np.diff(found.scores) <= 0).all()
    assert found.ids.dtype == np.int64


def test_an_index_on_disk_attributes_as_one_in_memory(tmp_path: Path, rng: np.random.Generator) -> None:
    features, ranker = rng.normal(size=(60, 12)).astype(np.float32), make_ranker(4.0)
    source = Source([features], embed=lambda rows: ranker.embed(rows).numpy())
    index = Index.create(tmp_path / "index", source, SegmentConfig("SQfp16"), ranker="test", command="test")
    expected = Attributor.build(features, ranker).attribute(features[3], 10)
    found = Attributor(ranker, index).attribute(features[3], 10)
    assert np.array_equal(found.ids, expected.ids) and np.allclose(found.scores, expected.scores, atol=1e-6)


def test_untuned_scores_are_cosines(rng: np.random.Generator) -> None:
    features, query = rng.normal(size=(40, 12)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    cosines = features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)
    found = Attributor.build(features, Untuned()).attribute(query, 5, encode_seconds=0.25)
    assert np.array_equal(found.ids, np.argsort(-cosines)[:5])
    assert np.allclose(found.scores, np.sort(cosines)[::-1][:5], atol=1e-6)
    assert found.encode_seconds == 0.25


def test_rows_of_unreadable_pictures_are_never_found(rng: np.random.Generator) -> None:
    features = rng.normal(size=(30, 12)).astype(np.float32)
    features[[3, 17]] = 0
    for embedder in (make_ranker(-4.0), Untuned()):
        attributor = Attributor.build(features, embedder)
        found = attributor.attribute(features[5], 28)
        assert sorted(found.ids) == [row for row in range(30) if row not in (3, 17)]
        with pytest.raises(ValueError, match="k = 29"):
            attributor.attribute(features[5], 29)


def test_threads_get_the_same_answers(rng: np.random.Generator) -> None:
    features = rng.normal(size=(200, 12)).astype(np.float32)
    attributor = Attributor.build(features, make_ranker(-4.0))
    expected = [attributor.attribute(row, 10).ids for row in features[:32]]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: attributor.attribute(row, 10).ids, features[:32]))
    assert np.array_equal(np.stack(found), np.stack(expected))


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one training image"):
        Attributor.build(np.zeros((0, 12), np.float32), Untuned())
    attributor = Attributor.build(np.eye(12, dtype=np.float32), Untuned())
    with pytest.raises(ValueError, match=r"expected shape \[D\]"):
        attributor.attribute(np.ones((1, 12), np.float32), 1)
    with pytest.raises(ValueError, match="expected finite"):
        attributor.attribute(np.full(12, np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="k = 13"):
        attributor.attribute(np.ones(12, np.float32), 13)
