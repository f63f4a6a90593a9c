"""Collection on Ray workers: the same pieces as in one process, whoever dies on the way."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ray_nodes import two_nodes

from abu.cluster import ClusterConfig, Pool, run_plan
from abu.plan import Collection, cut

PIECES = cut("pass", "0", 40, 5)


class Worker:
    """Arrays that depend on the piece only; dies or fails once for each file that says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def compute(self, piece):
        order = self.folder / piece.name
        if order.is_file():
            text = order.read_text()
            if text != "always":
                order.unlink()
            if text == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"told to fail on {piece.name}")
        return {"node": np.array(os.getpid()), "rows": np.arange(piece.start, piece.stop) ** 2}


def refuse() -> Worker:
    raise ValueError("no model here")


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two nodes with one processor each."""
    with two_nodes() as both:
        yield both


@pytest.fixture
def orders(tmp_path):
    folder = tmp_path / "orders"
    folder.mkdir()
    return folder


@pytest.fixture
def collection(tmp_path):
    made = Collection(tmp_path / "pieces")
    made.claim({"what": "test"}, {})
    return made


def stored(collection):
    return np.concatenate([np.load(collection.path(piece))["rows"] for piece in PIECES])


def test_pieces_survive_failures_and_killed_workers(nodes, orders, collection):
    (orders / PIECES[1].name).write_text("die")
    (orders / PIECES[4].name).write_text("fail")
    run_plan(partial(Worker, orders), collection, PIECES, ClusterConfig(2, threads=1))
    assert np.array_equal(stored(collection), np.arange(40) ** 2)
    lines = (collection.folder / "failed.jsonl").read_text()
    assert PIECES[1].name in lines and "told to fail" in lines
    assert collection.failures() == {}


def test_a_piece_that_always_fails_is_given_up_and_tried_again_by_the_next_call(nodes, orders, collection):
    order = orders / PIECES[2].name
    order.write_text("always")
    with pytest.raises(ValueError, match=f"gave up 1 after 2 attempts each, {PIECES[2].name}"):
        run_plan(partial(Worker, orders), collection, PIECES, ClusterConfig(2, threads=1, attempts=2))
    assert collection.missing(PIECES) == [PIECES[2]]
    assert "told to fail" in collection.failures()[PIECES[2].name]
    order.unlink()
    run_plan(partial(Worker, orders), collection, PIECES, ClusterConfig(1, threads=1))
    assert np.array_equal(stored(collection), np.arange(40) ** 2)


def test_workers_that_cannot_start_say_why(nodes, collection):
    with pytest.raises(ValueError, match="no model here"):
        run_plan(refuse, collection, PIECES, ClusterConfig(2, threads=1))


def test_a_node_may_be_killed(nodes, orders, collection):
    cluster, second = nodes
    finished = []

    def done(piece, arrays):
        collection.store(piece, arrays)
        finished.append(piece)
        if len(finished) == 1:
            cluster.remove_node(second, allow_graceful=False)

    with Pool(partial(Worker, orders), ClusterConfig(2, threads=1)) as pool:
        assert pool.run(PIECES, done, collection.failed) == []
    assert np.array_equal(stored(collection), np.arange(40) ** 2)
