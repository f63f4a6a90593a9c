"""Rankings: order, labels, both file kinds, refusal of damaged and hostile files."""

from __future__ import annotations

import codecs
import importlib
import logging
import os
import pickle
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest

from fastgda.rankings import (
    Rankings,
    candidate_labels,
    from_scores,
    labels,
    load_rankings,
    main,
    popularity,
    save_rankings,
    save_released,
    top,
)

EXECUTED: list[str] = []


def slow_order(row: np.ndarray) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-float(row[i]), i))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_top_is_the_stable_order(rng, kind):
    values = np.array([-3.5, -1.0, -0.0, 0.0, 1e-3, 0.25, 2.0, 1000.0], dtype=kind)
    for _ in range(50):
        images = int(rng.integers(1, 30))
        scores = rng.choice(values, size=(3, images))
        count = int(rng.integers(1, images + 1))
        assert top(scores, count).tolist() == [slow_order(row)[:count] for row in scores]


def test_top_of_distinct_float32(rng):
    scores = rng.standard_normal((3, 5000)).astype(np.float32) * 10.0 ** rng.integers(-30, 30, (3, 5000))
    scores = scores.astype(np.float32)
    assert top(scores).tolist() == [slow_order(row) for row in scores]


def test_top_refuses_what_has_no_order():
    with pytest.raises(ValueError, match="finite"):
        top(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match=r"1\.\.2"):
        top(np.zeros((1, 2)), 3)


def test_labels_and_popularity(rng):
    rankings = Rankings(np.array([[3, 0], [4, 3]]))
    table = labels(rankings, 5)
    assert table.tolist() == [[1, 1, 1, 0.5, 1], [1, 1, 1, 1, 0.5]]
    many = from_scores(rng.standard_normal((7, 40)), keep=9)
    np.testing.assert_allclose(popularity(many, 40), 1 - labels(many, 40).mean(axis=0), atol=1e-6)
    assert candidate_labels(4).tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("images", "kind"), [(300, np.int16), (40_000, np.int32)])
def test_npz_round_trip(tmp_path, rng, images, kind):
    rankings = from_scores(rng.standard_normal((3, images)).astype(np.float32) * 3e-9, keep=200)
    rankings.rank[0, 0], rankings.rank[0, np.argmax(rankings.rank[0] == images - 1)] = images - 1, rankings.rank[0, 0]
    save_rankings(tmp_path / "r.npz", rankings)
    read = load_rankings(tmp_path / "r.npz", images)
    assert read.rank.dtype == kind
    np.testing.assert_array_equal(read.rank, rankings.rank)
    assert read.score is not None and rankings.score is not None
    assert read.score.dtype == np.float16
    ratio = read.score.astype(np.float64) / rankings.score
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-3)


def pickled(rank: np.ndarray, protocol: int, key: str = "random") -> bytes:
    return pickle.dumps({key: {"rank": rank, "influence": np.zeros(rank.shape)}}, protocol=protocol)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("key", ["random", "fixed"])
def test_released_pickle(tmp_path, rng, protocol, key):
    rank = np.argsort(rng.random((2, 50)), axis=1)
    path = tmp_path / "influence_test.pkl"
    path.write_bytes(pickled(rank, protocol, key))
    np.testing.assert_array_equal(load_rankings(path, 50).rank, rank)


def test_pickle_of_numpy_1(tmp_path):
    path = tmp_path / "old.pkl"
    path.write_bytes(pickled(np.array([[1, 0]]), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_rankings(path, 2).rank.tolist() == [[1, 0]]


class Payload:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize(
    "payload",
    [
        Payload(os.system, "touch {marker}"),
        Payload(os.mkdir, "{marker}"),
        Payload(eval, "__import__('os').mkdir('{marker}')"),
        Payload(subprocess.check_output, ["touch", "{marker}"]),
        Payload(EXECUTED.append, "x"),
        Payload(codecs.open, "{marker}", "w"),
        Payload(np.save, "{marker}", 0),
        Payload(getattr, np, "save"),
        Payload(__import__, "subprocess"),
        Payload(exec, "open('{marker}', 'w')"),
        Payload(importlib.import_module, "antigravity"),
        Payload(shutil.copytree, ".", "{marker}"),
        Payload(partial, os.mkdir, "{marker}"),
    ],
)
def test_hostile_pickle_runs_nothing(tmp_path, payload):
    marker = tmp_path / "marker"
    payload.args = tuple(
        [part.replace("{marker}", str(marker)) for part in arg]
        if isinstance(arg, list)
        else arg.replace("{marker}", str(marker))
        if isinstance(arg, str)
        else arg
        for arg in payload.args
        if not hasattr(arg, "__loader__")
    )
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps({"random": {"rank": np.array([[0]]), "more": payload}}))
    with pytest.raises(ValueError, match=r"hostile\.pkl.*refused to load"):
        load_rankings(path, 1)
    assert not marker.exists() and not EXECUTED


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93.",  # a dotted name below an allowed one
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"ios\nsystem\n(S'true'\ntR.",
        b"Pcommand\n.",  # an object that a server would look up
        b"\x80\x02\x82\x01.",  # an entry of copyreg's extension registry
        b"cnumpy\nndarray\n(L1000000000000000L\ntR.",  # petabytes
        b"cnumpy\ndtype\n(S'no type'\ntR.",
        b"\x80\x04\x95",
    ],
)
def test_hostile_opcodes_are_one_clear_error(tmp_path, content):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"hostile\.pkl: expected a pickle of numpy arrays and containers"):
        load_rankings(path, 1)


def test_an_array_of_objects_is_no_ranking(tmp_path):
    path = tmp_path / "objects.pkl"
    path.write_bytes(pickle.dumps({"random": {"rank": np.array([[{}, []]], dtype=object)}}))
    with pytest.raises(ValueError, match=r"objects\.pkl: expected rank .* of integers, found object"):
        load_rankings(path, 2)


@pytest.mark.parametrize(
    ("rank", "score", "message"),
    [
        ([[0, 5]], None, "training ids 0 to 4, found 0 to 5"),
        ([[0, -1]], None, "training ids 0 to 4, found -1 to 0"),
        ([[0, 1], [2, 2]], None, "found 2 twice in row 1"),
        ([[0, 1]], [[1.0, 2.0]], "descending order, found an increase in row 0"),
        ([[0, 1]], [[1.0, np.nan]], "finite scores, found NaN or infinity in row 0"),
        ([[0, 1]], [[1.0]], r"expected score \[1, 2\] like rank"),
        ([[0.0, 1.0]], None, r"of integers, found float64 \[1, 2\]"),
        ([0, 1], None, r"expected rank \[Q, K\]"),
        (np.zeros((0, 3), int), None, "at least one query"),
    ],
)
def test_bad_rankings_name_the_file(tmp_path, rank, score, message):
    path = tmp_path / "bad.npz"
    if score is None:
        np.savez(path, rank=np.array(rank))
    else:
        np.savez(path, rank=np.array(rank), score=np.array(score))
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}"):
        load_rankings(path, 5)


@pytest.mark.parametrize("name", ["r.npz", "r.pkl"])
def test_damaged_or_missing_file(tmp_path, rng, name):
    path = tmp_path / name
    with pytest.raises(ValueError, match="found nothing"):
        load_rankings(path, 50)
    rankings = from_scores(rng.standard_normal((4, 50)))
    if name == "r.npz":
        save_rankings(path, rankings)
    else:
        path.write_bytes(pickled(rankings.rank, 4))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{path}: expected"):
        load_rankings(path, 50)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=f"{path}: expected"):
        load_rankings(path, 50)


def test_convert_command(tmp_path, capsys):
    source, target = tmp_path / "influence_train.pkl", tmp_path / "influence_train.npz"
    source.write_bytes(pickled(np.array([[2, 0], [1, 2]]), 4))
    assert main(["convert", str(source), str(target), "--images", "3"]) == 0
    assert load_rankings(target, 3).rank.tolist() == [[2, 0], [1, 2]]
    assert main(["convert", str(source), str(target), "--images", "2"]) == 2
    assert "training ids 0 to 1" in capsys.readouterr().err


def subset_arrays(rng) -> dict[str, np.ndarray]:
    """As the authors' code makes them for 2 queries with 6 candidates each of 30 images."""
    candidates = np.argsort(rng.random((2, 30)), axis=1)[:, :6]
    influence = rng.standard_normal((2, 6)) * 1e-7
    order = np.argsort(-influence, axis=1)
    rank = np.take_along_axis(candidates, order, axis=1)
    return {"rank": rank, "influence_subset": influence, "rank_influence_subset": order}


def test_scores_of_released_pickles(tmp_path, rng, caplog):
    path = tmp_path / "influence_train.pkl"
    subset = subset_arrays(rng)
    whole = {"rank": subset["rank"], "influence": np.full((2, 30), -1.0)}
    np.put_along_axis(whole["influence"], whole["rank"], np.sort(subset["influence_subset"])[:, ::-1], axis=1)
    for arrays in (subset, whole):
        save_released(path, **arrays)
        found = load_rankings(path, 30)
        np.testing.assert_array_equal(found.rank, subset["rank"])
        expected = np.sort(subset["influence_subset"].astype(np.float32))[:, ::-1]
        assert found.score is not None and np.array_equal(found.score, expected)
    assert main(["convert", str(path), str(tmp_path / "r.npz"), "--images", "30"]) == 0
    converted = load_rankings(tmp_path / "r.npz", 30).score
    assert converted is not None
    np.testing.assert_allclose(converted / converted[0, 0].astype(float), expected / expected[0, 0], rtol=2e-3)
    assert not caplog.records
    for wrong in (subset["influence_subset"][:, ::-1], np.full((2, 6), np.nan)):
        save_released(path, **{**subset, "influence_subset": wrong})
        caplog.clear()
        # some libraries set the root logger's level
        with caplog.at_level(logging.WARNING):
            assert load_rankings(path, 30).score is None
        assert "influence is ignored" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"influence_subset": np.zeros((2, 5))},
        {"influence_subset": np.zeros(6)},
        {"influence_subset": np.array([[None] * 6] * 2)},
        {"rank_influence_subset": np.full((2, 6), -1)},
        {"rank_influence_subset": np.zeros((1, 6), int)},
        {"rank_influence_subset": np.zeros((2, 6))},
    ],
)
def test_scores_of_other_shapes_leave_the_ranks(tmp_path, rng, change):
    arrays = subset_arrays(rng) | change
    (tmp_path / "r.pkl").write_bytes(pickle.dumps({"random": arrays}))
    found = load_rankings(tmp_path / "r.pkl", 30)
    assert found.score is None and np.array_equal(found.rank, arrays["rank"])


def test_released_pickle_round_trip(tmp_path, rng):
    influence = rng.standard_normal((3, 20))
    rank = np.argsort(-influence, axis=1)
    save_released(tmp_path / "influence_test.pkl", rank=rank, influence=influence)
    assert np.array_equal(load_rankings(tmp_path / "influence_test.pkl", 20).rank, rank)
    plain = pickle.loads((tmp_path / "influence_test.pkl").read_bytes())
    assert plain.keys() == {"random"} and plain["random"].keys() == {"rank", "influence"}
    assert np.array_equal(plain["random"]["influence"], influence)
    with pytest.raises(ValueError, match=r"expected a name ending in \.pkl"):
        save_released(tmp_path / "influence_test.npz", rank=rank)
