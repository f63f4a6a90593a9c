"""The index against plain numpy and against flat search, its estimates against its files, its files against damage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from index_world import IDS, N, build, creator, exhaustive, metadata, queries, vectors

from fastgda.core import save_npy
from fastgda.index import FlatIndex, Index, SegmentConfig, Settings, Source, load_embedding, recommend
from fastgda.index.backend import COMPARISON_COST, GRAPH_COST, Structure
from fastgda.index.metadata import MetadataTable, write_metadata
from fastgda.index.plan import estimate
from fastgda.index.segment import INDEX, VECTORS, training_rows
from fastgda.ranker import Ranker, RankerConfig, save_ranker


@pytest.mark.parametrize("k", [1, 7, 50])
def test_search_equals_sorting_all_inner_products(rng: np.random.Generator, k: int) -> None:
    data, queries = rng.normal(size=(50, 9)), rng.normal(size=(6, 9))
    scores = queries @ data.T
    found = FlatIndex.build(data).search(queries, k)
    order = np.argsort(-scores, axis=1)[:, :k]
    assert found.ids.dtype == np.int64
    assert np.array_equal(found.ids, order)
    assert np.allclose(found.scores, np.take_along_axis(scores, order, 1), atol=1e-5)


def test_ids_are_the_callers(rng: np.random.Generator) -> None:
    data = rng.normal(size=(20, 4)).astype(np.float32)
    ids = np.arange(20) * 3_000_000_000 + 5
    plain, named = FlatIndex.build(data), FlatIndex.build(data, ids)
    assert np.array_equal(named.search(data, 5).ids, ids[plain.search(data, 5).ids])


def test_threads_get_the_same_answers(rng: np.random.Generator) -> None:
    index, queries = FlatIndex.build(rng.normal(size=(300, 8))), rng.normal(size=(40, 8))
    expected = index.search(queries, 10).ids
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: index.search(queries[row : row + 1], 10).ids[0], range(40)))
    assert np.array_equal(np.stack(found), expected)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: FlatIndex.build(np.zeros(4)), r"embeddings: expected shape \[\*, \*\], found \[4\]"),
        (lambda: FlatIndex.build(np.full((2, 2), np.nan)), "embeddings: expected finite"),
        (lambda: FlatIndex.build(np.ones((2, 2)), np.array([1, 1])), "each id once"),
        (lambda: FlatIndex.build(np.ones((2, 2)), np.array([1.0, 2.0])), "expected 2 integers"),
        (lambda: FlatIndex.build(np.ones((2, 2))).search(np.ones((1, 3)), 1), r"queries: expected shape \[\*, 2\]"),
        (lambda: FlatIndex.build(np.ones((2, 2))).search(np.ones((1, 2)), 3), "k = 3: expected 1 to 2"),
        (lambda: FlatIndex.build(np.ones((2, 2))).search(np.ones((1, 2)), 0), "k = 0: expected 1 to 2"),
    ],
)
def test_wrong_arguments_are_refused(call, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()


@pytest.mark.parametrize(
    ("factory", "on_disk", "shards"),
    [
        *(("Flat", False, shards) for shards in (1, 3)),
        *(("SQ8", False, shards) for shards in (1, 2)),
        ("SQfp16", False, 1),
        ("PCA8,SQ8", False, 1),
        ("HNSW16", False, 1),
        *(("IVF8,PQ4x4", on_disk, shards) for on_disk in (False, True) for shards in (1, 3)),
        ("IVF8,PQ4x4fs", False, 1),
        ("IVF8_HNSW4,SQ8", True, 2),
    ],
)
def test_thorough_search_equals_flat_search(tmp_path: Path, factory: str, on_disk: bool, shards: int) -> None:
    """Whatever the structure, its candidates are re-ranked exactly, so visiting everything finds the same."""
    index = build(tmp_path / "index", SegmentConfig(factory, on_disk=on_disk, shards=shards))
    expected = FlatIndex.build(vectors(), IDS).search(queries(), 10)
    for opened in (index, Index(tmp_path / "index")):
        found = opened.search(queries(), 10, exhaustive())
        assert np.array_equal(found.ids, expected.ids)
        assert np.allclose(found.scores, expected.scores, atol=1e-5)
    assert not list((tmp_path / "index").rglob("shard_*")), "shards are deleted once they are merged"


def test_many_queries_are_searched_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "index", SegmentConfig("IVF8,PQ4x4"))
    whole = index.search(queries(), 10, Settings(4, 30, 10))
    monkeypatch.setattr("fastgda.index.snapshot.CANDIDATES", 150)
    found = index.search(queries(), 10, Settings(4, 30, 10))
    assert np.array_equal(found.ids, whole.ids) and np.array_equal(found.scores, whole.scores)


def test_exact_scan_equals_flat_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgda.index.snapshot.BLOCK", 37)
    index = build(tmp_path / "index", SegmentConfig("IVF8,PQ4x4"))
    expected = FlatIndex.build(vectors(), IDS).search(queries(), 5)
    found = index.snapshot().exact(queries(), 5)
    assert np.array_equal(found.ids, expected.ids) and np.allclose(found.scores, expected.scores, atol=1e-6)


def test_results_do_not_depend_on_shards_files_or_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the search is approximate: the training vectors are chosen by id."""
    settings = Settings(nprobe=2, depth=20, k=10)
    config = SegmentConfig("IVF8,PQ4x4", "float16")
    expected = build(tmp_path / "whole", config).search(queries(), 10, settings)
    parts = np.array_split(np.arange(N), 4)
    monkeypatch.setattr("fastgda.index.source.BLOCK", 30)
    for name, order, shards in (("files", (0, 1, 2, 3), 3), ("order", (2, 0, 3, 1), 2)):
        rows = np.concatenate([parts[place] for place in order])
        source = Source([vectors()[parts[place]] for place in order], IDS[rows])
        sharded = SegmentConfig("IVF8,PQ4x4", "float16", shards=shards)
        found = Index.create(tmp_path / name, source, sharded, ranker="none", command="test")
        again = found.search(queries(), 10, settings)
        assert np.array_equal(again.ids, expected.ids) and np.array_equal(again.scores, expected.scores)
    assert (expected.ids != FlatIndex.build(vectors(), IDS).search(queries(), 10).ids).any(), "it is approximate"


def test_training_rows_follow_ids(rng: np.random.Generator) -> None:
    order = rng.permutation(N)
    chosen = IDS[training_rows(IDS, 50, 0)]
    assert np.array_equal(chosen, IDS[order][training_rows(IDS[order], 50, 0)])
    assert len(set(chosen)) == 50
    assert set(chosen) != set(IDS[training_rows(IDS, 50, 1)])


def test_files_are_embedded_by_the_ranker(tmp_path: Path, rng: np.random.Generator) -> None:
    features = rng.normal(size=(90, 12)).astype(np.float32)
    torch.manual_seed(0)
    ranker = Ranker(RankerConfig(in_dim=12, hidden_sizes=(8,), out_feat_dim=6), init_scale=5.0).eval()
    save_ranker(tmp_path / "ranker.pth", ranker)
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, part in zip(files, np.split(features, [40]), strict=True):
        save_npy(path, part)
    embed, embed_queries, name = load_embedding(tmp_path / "ranker.pth", unit=False)
    index = Index.create(
        tmp_path / "index", Source.from_files(files, embed=embed), SegmentConfig(), ranker=name, command="test"
    )
    scores = (ranker.embed_queries(features[:3]) @ ranker.embed(features).T).numpy()
    assert np.array_equal(index.search(embed_queries(features[:3]), 90).ids, np.argsort(-scores, axis=1))
    Index(tmp_path / "index", ranker=name)
    with pytest.raises(ValueError, match=rf"expected an index of the ranker cosine, found one of {name[:12]}"):
        Index(tmp_path / "index", ranker="cosine")


def test_rows_of_zeros_are_left_out_and_the_others_keep_their_ids(tmp_path: Path) -> None:
    """Zeros stand for pictures that could not be read; with metadata and without, in any of several files."""
    features, zeros = vectors().copy(), [0, 7, 299]
    features[zeros] = 0
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, part in zip(files, np.split(features, [1]), strict=True):  # the first file holds nothing else
        save_npy(path, part)
    pq.write_table(metadata(), tmp_path / "m.parquet")
    left = np.delete(np.arange(N), zeros)
    for known, ids in (([], left), ([tmp_path / "m.parquet"], IDS[left])):
        source = Source.from_files(files, known)
        assert source.left_out == 3 and np.array_equal(source.ids, ids)
        index = Index.create(tmp_path / f"x{len(known)}", source, SegmentConfig(), ranker="none", command="test")
        found = index.search(queries(), 5)
        best = np.argsort(-(queries() @ features[left].T), axis=1)[:, :5]
        assert np.array_equal(found.ids, ids[best])
    (first,) = index.metadata(found.ids[0, :1])
    assert first is not None and first["path"] == f"{left[best[0, 0]]}.png"
    save_npy(files[1], np.zeros_like(features))
    with pytest.raises(ValueError, match=r"a\.npy .*b\.npy: expected pictures that could be read"):
        Source.from_files(files)


class Failing:
    """Rows that fail at one row and refuse to be read before another."""

    def __init__(self, fail_at: int = N, first: int = 0) -> None:
        self.fail_at, self.first = fail_at, first
        self.shape = vectors().shape

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice) and (rows.start > 0 or rows.stop > 1):
            assert rows.start >= self.first, "a whole shard is not built again"
            if rows.stop > self.fail_at:
                raise KeyboardInterrupt
        return vectors()[rows]


def test_interrupted_build_goes_on_at_the_next_shard(tmp_path: Path) -> None:
    config = SegmentConfig("IVF8,SQ8", shards=4)
    with pytest.raises(KeyboardInterrupt):
        Index.create(tmp_path / "x", Source([Failing(N // 2 + 5)], IDS), config, ranker="none", command="test")
    with pytest.raises(ValueError, match=r"expected an index, found no manifest\.json"):
        Index(tmp_path / "x")
    index = Index.create(tmp_path / "x", Source([Failing(first=N // 2)], IDS), config, ranker="none", command="test")
    expected = FlatIndex.build(vectors(), IDS).search(queries(), 10)
    assert np.array_equal(index.search(queries(), 10, exhaustive()).ids, expected.ids)
    with pytest.raises(ValueError, match="expected no index there, found one"):
        Index.create(tmp_path / "x", Source([vectors()], IDS), config, ranker="none", command="test")


def test_metadata_is_found_by_id(tmp_path: Path) -> None:
    index = build(tmp_path / "index", SegmentConfig())
    found = index.metadata(np.array([IDS[7], 1, IDS[0]]))
    assert found[0] == {"id": IDS[7], "caption": "picture 7", "creator": creator(7), "path": "7.png"}
    assert found[1] is None
    assert found[2] is not None and found[2]["caption"] == "picture 0"


def test_metadata_comes_back_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of odd sizes come out in groups of one size, the same from Parquet and from the mapped file."""
    monkeypatch.setattr("fastgda.index.metadata.ROW_GROUP", 1000)
    rows = 2100
    names = [f"a{row}" for row in range(rows)]

    def pieces() -> Iterator[pa.Table]:
        for start in range(0, rows, 700):
            part = names[start : start + 700]
            empty = pa.nulls(len(part), pa.string())
            yield pa.table({"caption": part, "creator": part, "licence": empty, "path": empty, "url": empty})

    paths = tmp_path / "m.parquet", tmp_path / "m.arrow"
    write_metadata(*paths, np.arange(rows) * 3, pieces())
    table = MetadataTable(*paths)
    asked = np.array([1, 0, 999, 1000, rows - 1])
    assert table.rows(asked) == [{"id": 3 * row, "caption": names[row], "creator": names[row]} for row in asked]
    assert table.rows_of_creator("a1500").tolist() == [1500]
    assert pa.concat_tables(table.tables())["caption"].to_pylist() == names
    assert pq.read_table(paths[0])["id"].to_pylist() == list(range(0, 3 * rows, 3))
    with pytest.raises(ValueError, match=f"expected {rows - 1} rows, as many as vectors, found more"):
        write_metadata(*paths, np.arange(rows - 1), pieces())


def test_looking_up_a_row_reads_no_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompressing a row group for each id took a hundred times as long as the search."""
    index = build(tmp_path / "index", SegmentConfig())
    monkeypatch.setattr(index.snapshot().segments[0].metadata, "_file", None)
    found = index.metadata(IDS[[250, 3]])
    assert [entry and entry["caption"] for entry in found] == ["picture 250", "picture 3"]


@pytest.mark.parametrize(
    "file", ["index.faiss", "vectors.npy", "ids.npy", "order.npy", "metadata.parquet", "metadata.arrow"]
)
def test_damaged_segment_files_are_refused(tmp_path: Path, file: str) -> None:
    build(tmp_path / "index", SegmentConfig("SQ8"))
    path = tmp_path / "index" / "segments" / "000000" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=rf"{file}: expected \d+ bytes, found"):
        Index(tmp_path / "index", verify=False)
    path.write_bytes(whole[:-9] + bytes(9))
    with pytest.raises(ValueError, match=rf"{file}: expected SHA-256"):
        Index(tmp_path / "index")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{file}: expected a file, found nothing"):
        Index(tmp_path / "index", verify=False)


def test_parts_of_another_index_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "a", SegmentConfig("SQ8"))
    build(tmp_path / "b", SegmentConfig("Flat"))
    for part in ("segments", "journal.jsonl", "manifest.json"):
        shutil.copytree(tmp_path / "a", tmp_path / "mixed")
        target = tmp_path / "mixed" / part
        if target.is_dir():
            shutil.rmtree(target)
            shutil.copytree(tmp_path / "b" / part, target)
        else:
            shutil.copyfile(tmp_path / "b" / part, target)
        with pytest.raises(ValueError, match=r"mixed.*expected"):
            Index(tmp_path / "mixed")
        shutil.rmtree(tmp_path / "mixed")


def test_sources_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    save_npy(tmp_path / "a.npy", vectors())
    save_npy(tmp_path / "narrow.npy", vectors()[:, :3])
    pq.write_table(metadata().slice(1), tmp_path / "short.parquet")
    pq.write_table(metadata(), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=rf"short\.parquet: expected {N} rows, as many as vectors, found {N - 1}"):
        Source.from_files([tmp_path / "a.npy"], [tmp_path / "short.parquet"])
    with pytest.raises(ValueError, match="expected files of one width"):
        Source.from_files([tmp_path / "a.npy", tmp_path / "narrow.npy"])
    (tmp_path / "m.parquet").write_bytes((tmp_path / "m.parquet").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"m\.parquet: expected a whole Parquet file"):
        Source.from_files([tmp_path / "a.npy"], [tmp_path / "m.parquet"])
    broken = vectors().copy()
    broken[50, 2] = np.nan
    with pytest.raises(ValueError, match="vectors from row 0: expected finite"):
        Index.create(tmp_path / "x", Source([broken], IDS), SegmentConfig(), ranker="none", command="test")


def test_full_disk_leaves_no_index(tmp_path: Path, disk_limit) -> None:
    with disk_limit(10_000), pytest.raises(OSError):
        build(tmp_path / "index", SegmentConfig("SQ8"))
    assert not (tmp_path / "index" / "manifest.json").exists()
    build(tmp_path / "index", SegmentConfig("SQ8"))


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("IDMap,Flat", "expected no IDMap"),
        ("IVF8,PQ4x4,RFlat", "expected no RFlat"),
        ("Nonsense", "expected a FAISS factory string"),
        ("LSH", "expected a FAISS factory string"),
    ],
)
def test_unusable_factories_are_refused(factory: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"factory {factory}: .*{complaint}"):
        Structure.create(factory, 16)


def test_too_few_images_and_unmergeable_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"training on {N} vectors: expected enough of them"):
        build(tmp_path / "a", SegmentConfig("IVF1024,Flat"))
    with pytest.raises(ValueError, match="on_disk: expected a factory with plain inverted lists"):
        build(tmp_path / "b", SegmentConfig("SQ8", on_disk=True))
    with pytest.raises(ValueError, match="shards: expected a factory that can be merged"):
        build(tmp_path / "c", SegmentConfig("HNSW8", shards=2))


@pytest.mark.parametrize(
    ("images", "gigabytes", "factory", "on_disk"),
    [
        (14_297, 4, "Flat", False),
        (1_000_000, 4, "Flat", False),
        (1_000_000, 2, "SQfp16", False),
        (1_000_000, 1, "SQ8", False),
        (1_000_000, 0.2, "OPQ64_256,IVF4096,PQ64", False),
        (10_000_000, 1.5, "OPQ64_256,IVF16384,PQ64", False),
        (10_000_000, 0.2, "OPQ64_256,IVF16384,PQ64", True),
        (400_000_000, 16, "OPQ64_256,IVF65536_HNSW32,PQ64", True),
    ],
)
def test_recommendation(images: int, gigabytes: float, factory: str, on_disk: bool) -> None:
    advice = recommend(images, 768, gigabytes * 1e9)
    assert (advice.config.factory, advice.config.on_disk) == (factory, on_disk)
    assert advice.reasons
    assert Structure.create(factory.replace("65536", "256"), 768).dim == 768


@pytest.mark.parametrize(
    ("images", "gigabytes", "milliseconds", "factory"),
    [
        (118_287, 4, 1, "HNSW32,SQ8"),
        (118_287, 4, 100, "Flat"),
        (118_287, 0.1, 1, "OPQ64_256,IVF1024,PQ64"),
        (5_000, 4, 1, "Flat"),
        (10_000_000, 4, 1, "OPQ64_256,IVF16384,PQ64"),
    ],
)
def test_recommendation_for_a_latency(images: int, gigabytes: float, milliseconds: float, factory: str) -> None:
    advice = recommend(images, 768, gigabytes * 1e9, milliseconds / 1e3)
    assert advice.config.factory == factory and not advice.config.on_disk and advice.reasons


@pytest.mark.parametrize(
    ("factory", "flops"),
    [
        ("Flat", 2 * 64),
        ("IVF16,SQ8", 2 * 16 * 64 + 2 * 64),
        ("IVF16,PQ2", 2 * 16 * 64 + 2 * 256 * 64),
        ("IVF16,PQ8", 2 * 16 * 64 + COMPARISON_COST * 256 * 8),
        ("IVF16,PQ8x4fs", 2 * 16 * 64 + COMPARISON_COST * 16 * 8),
        ("OPQ8_32,IVF16,PQ8", 2 * 64 * 32 + 2 * 16 * 32 + COMPARISON_COST * 256 * 8),
        ("HNSW8,SQ8", GRAPH_COST * 2 * 64 * 40 * 16),
        ("IVF16_HNSW8,SQ8", GRAPH_COST * 2 * 64 * 16 * 16 + 2 * 64),
    ],
)
def test_work_of_adding_a_vector(factory: str, flops: float) -> None:
    assert Structure.create(factory, 64).adding_flops() == flops
    assert estimate(SegmentConfig(factory), 1000, 64, flops=1e3).adding_seconds == pytest.approx(flops)


@pytest.mark.parametrize(
    ("factory", "flops"),
    [
        ("Flat", 0),
        ("IVF16,SQ8", 2 * 10 * 16 * 64),
        ("IVF16,PQ2", 2 * 10 * 16 * 64 + 25 * 2 * 256 * 64),
        ("HNSW8_PQ8", 25 * COMPARISON_COST * 256 * 8),
        (
            "OPQ8_32,IVF16,PQ8",
            2 * 10 * 16 * 32 + (25 + 40 + 49 * 4 + 50) * COMPARISON_COST * 256 * 8 + 50 * 4 * 64 * 32,
        ),
    ],
)
def test_work_of_training_on_a_vector(factory: str, flops: float) -> None:
    assert Structure.create(factory, 64).training_flops(1000) == pytest.approx(1000 * flops)


def test_codes_are_not_annealed_for_a_filter_that_is_not_used(tmp_path: Path) -> None:
    sample = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)
    ours, plain = Structure.create("PQ8", 64), faiss.IndexPQ(64, 8, 8, faiss.METRIC_INNER_PRODUCT)
    plain.do_polysemous_training = False
    ours.train(sample)
    plain.train(sample)
    ours.write(tmp_path / "index")
    written = faiss.read_index(str(tmp_path / "index"))
    np.testing.assert_array_equal(*(faiss.vector_to_array(index.pq.centroids) for index in (written, plain)))


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF8,SQ8", "HNSW16"])
def test_estimate_is_what_the_files_weigh(tmp_path: Path, factory: str) -> None:
    config = SegmentConfig(factory, "float16")
    build(tmp_path / "index", config)
    cost = estimate(config, N, vectors().shape[1], flops=1e9)
    folder = tmp_path / "index" / "segments" / "000000"
    searched, stored = ((folder / name).stat().st_size for name in (INDEX, VECTORS))
    assert cost.bytes_per_vector * N == pytest.approx(searched, rel=0.15)
    assert searched + stored < 1.15 * cost.disk
