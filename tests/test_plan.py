"""The folder of a collection: what its log and the times of its pieces say, in one process."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from abu.cluster import run_plan
from abu.plan import Collection, cut

PIECES = cut("pass", "0", 100, 5)


def written(folder, pieces, times):
    for piece, time in zip(pieces, times, strict=True):
        (folder / piece.name).touch()
        os.utime(folder / piece.name, (time, time))


def started(folder, *times):
    (folder / "started.jsonl").write_text("".join(json.dumps({"time": time}) + "\n" for time in times))


def left(collection):
    """(pieces a minute, minutes left) of the status."""
    words = collection.status("pass 0", PIECES).split(", ")
    return float(words[1].split()[0]), float(words[2].split()[0])


@pytest.mark.parametrize("workers", [1, 4])
def test_a_pause_does_not_count(tmp_path, workers):
    """Pieces take `workers` minutes each, so that one a minute is done; 5 hours after the eighth it goes on."""
    cycles = [1000 + 60 * workers * (1 + place // workers) for place in range(12)]
    times = [time + 5 * 3600 * (place >= 8) for place, time in enumerate(cycles)]
    written(tmp_path, PIECES[:12], times)
    started(tmp_path, 1000, times[8] - 60 * workers)
    assert left(Collection(tmp_path)) == (1.0, 8.0)
    # killed and resumed again, with no piece since
    started(tmp_path, 1000, times[8] - 60 * workers, times[-1] + 9999)
    assert left(Collection(tmp_path)) == (1.0, 8.0)


def test_the_pieces_of_another_stage_lie_between(tmp_path):
    written(tmp_path, PIECES[:4], [1060, 1120, 9060, 9120])
    written(tmp_path, cut("query", "test", 10, 5), [5000, 9000])
    started(tmp_path, 1000)
    assert left(Collection(tmp_path)) == (1.0, 16.0)


def test_without_a_log_the_first_piece_is_the_beginning(tmp_path):
    collection = Collection(tmp_path)
    assert collection.rate(PIECES) is None
    written(tmp_path, PIECES[:1], [1000])
    assert collection.rate(PIECES) is None
    written(tmp_path, PIECES[:3], [1000, 1030, 1060])
    assert collection.rate(PIECES) == pytest.approx(1 / 30)


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    collection = Collection(tmp_path)
    collection.failed(PIECES[0], 1, "first")
    whole = (tmp_path / "failed.jsonl").read_bytes()
    for cut_short in (whole[:-1], whole[:20], b"{"):
        (tmp_path / "failed.jsonl").write_bytes(whole + cut_short)
        assert collection.failures() == {PIECES[0].name: "first"}
        collection.failed(PIECES[1], 1, "second")
        assert collection.failures() == {PIECES[0].name: "first", PIECES[1].name: "second"}


class Worker:
    """Fails on the third piece as long as it is told to."""

    broken = True

    def compute(self, piece):
        if self.broken and piece == PIECES[2]:
            raise ValueError("no such luck")
        return {"rows": np.arange(piece.start, piece.stop)}


def test_an_error_in_this_process_is_listed_and_the_next_call_goes_on(tmp_path):
    collection, worker = Collection(tmp_path), Worker()
    with pytest.raises(ValueError, match="no such luck"):
        run_plan(lambda: worker, collection, PIECES)
    assert collection.missing(PIECES) == PIECES[2:]
    assert collection.failures() == {PIECES[2].name: "ValueError: no such luck"}
    (line,) = (tmp_path / "failed.jsonl").read_text().splitlines()
    assert json.loads(line)["attempt"] == 1
    worker.broken = False
    run_plan(lambda: worker, collection, PIECES)
    assert collection.missing(PIECES) == [] and collection.failures() == {}
    assert len((tmp_path / "started.jsonl").read_text().splitlines()) == 2
