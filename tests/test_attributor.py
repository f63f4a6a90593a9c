"""Attribution by retrieval against the definition: sorting embed_queries(q) @ embed(z).T."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import index_world
import numpy as np
import pytest
import torch

from fastgda.attributor import Clock, FeatureAttributor, Untuned
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
    found = FeatureAttributor.build(features, ranker).attribute(query, 60)
    assert np.array_equal(found.ids, np.argsort(modelled))
    assert (np.diff(found.scores) <= 0).all()
    assert found.ids.dtype == np.int64


def test_an_index_on_disk_attributes_as_one_in_memory(tmp_path: Path, rng: np.random.Generator) -> None:
    features, ranker = rng.normal(size=(60, 12)).astype(np.float32), make_ranker(4.0)
    source = Source([features], embed=lambda rows: ranker.embed(rows).numpy())
    index = Index.create(tmp_path / "index", source, SegmentConfig("SQfp16"), ranker="test", command="test")
    expected = FeatureAttributor.build(features, ranker).attribute(features[3], 10)
    found = FeatureAttributor(ranker, index).attribute(features[3], 10)
    assert np.array_equal(found.ids, expected.ids) and np.allclose(found.scores, expected.scores, atol=1e-6)


def test_untuned_scores_are_cosines(rng: np.random.Generator) -> None:
    features, query = rng.normal(size=(40, 12)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    cosines = features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)
    found = FeatureAttributor.build(features, Untuned()).attribute(query, 5, encode_seconds=0.25)
    assert np.array_equal(found.ids, np.argsort(-cosines)[:5])
    assert np.allclose(found.scores, np.sort(cosines)[::-1][:5], atol=1e-6)
    assert found.timings.encode == 0.25


def test_rows_of_unreadable_pictures_are_never_found(rng: np.random.Generator) -> None:
    features = rng.normal(size=(30, 12)).astype(np.float32)
    features[[3, 17]] = 0
    for embedder in (make_ranker(-4.0), Untuned()):
        attributor = FeatureAttributor.build(features, embedder)
        found = attributor.attribute(features[5], 28)
        assert sorted(found.ids) == [row for row in range(30) if row not in (3, 17)]
        with pytest.raises(ValueError, match="k = 29"):
            attributor.attribute(features[5], 29)


def test_threads_get_the_same_answers(rng: np.random.Generator) -> None:
    features = rng.normal(size=(200, 12)).astype(np.float32)
    attributor = FeatureAttributor.build(features, make_ranker(-4.0))
    expected = [attributor.attribute(row, 10).ids for row in features[:32]]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: attributor.attribute(row, 10).ids, features[:32]))
    assert np.array_equal(np.stack(found), np.stack(expected))


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one training image"):
        FeatureAttributor.build(np.zeros((0, 12), np.float32), Untuned())
    attributor = FeatureAttributor.build(np.eye(12, dtype=np.float32), Untuned())
    with pytest.raises(ValueError, match=r"expected shape \[D\]"):
        attributor.attribute(np.ones((1, 12), np.float32), 1)
    with pytest.raises(ValueError, match="expected finite"):
        attributor.attribute(np.full(12, np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="k = 13"):
        attributor.attribute(np.ones(12, np.float32), 13)


def test_a_batch_is_its_queries_one_by_one(rng: np.random.Generator) -> None:
    features = rng.normal(size=(80, 12)).astype(np.float32)
    attributor = FeatureAttributor.build(features, make_ranker(-4.0))
    together = attributor.attribute_batch(features[:7], 10, encode_seconds=0.7)
    for row, found in zip(features, together, strict=False):
        alone = attributor.attribute(row, 10)
        assert np.array_equal(found.ids, alone.ids) and np.allclose(found.scores, alone.scores, atol=1e-6)
        assert found.timings.encode == pytest.approx(0.1) and found.metadata == (None,) * 10
        assert found.timings.total == pytest.approx(
            found.timings.encode + found.timings.embed + found.timings.search + found.timings.metadata
        )
    assert attributor.attribute_batch(features[:0], 10) == []
    with pytest.raises(ValueError, match=r"expected shape \[Q, D\]"):
        attributor.attribute_batch(features[0], 10)


def test_metadata_is_that_of_the_index_and_removed_images_are_gone(tmp_path: Path) -> None:
    index = index_world.build(tmp_path / "index", SegmentConfig("Flat"))
    attributor = FeatureAttributor(Untuned(), index)
    query = index_world.vectors()[17]
    found = attributor.attribute(query, 5)
    assert found.ids[0] == index_world.IDS[17]
    for name, known in zip(found.ids, found.metadata, strict=True):
        row = int(np.flatnonzero(name == index_world.IDS)[0])
        assert known is not None and known["id"] == name and known["creator"] == index_world.creator(row)
        assert known["caption"] == f"picture {row}" and known["path"] == f"{row}.png"
    index.remove(found.ids[:1], command="test")
    assert np.array_equal(attributor.attribute(query, 4).ids, found.ids[1:])


def test_an_image_removed_while_it_is_looked_up_is_not_returned(tmp_path: Path) -> None:
    index = index_world.build(tmp_path / "index", SegmentConfig("Flat"))
    query = index_world.vectors()[17]
    first, second = (int(name) for name in index.search(query[None], 2).ids[0])

    class Slow(Index):
        """Between its first search and the look-up the nearest image is removed."""

        def search(self, *arguments, **options):
            found = super().search(*arguments, **options)
            if first in found.ids:
                index.remove(np.array([first]), command="opt-out")
            return found

    found = FeatureAttributor(Untuned(), Slow(tmp_path / "index")).attribute(query, 1)
    assert found.ids.tolist() == [second]


def test_clock_adds_up() -> None:
    times = iter([1.0, 3.5, 4.0])
    clock = Clock(lambda: next(times))
    assert (clock.lap(), clock.lap()) == (2.5, 0.5)
