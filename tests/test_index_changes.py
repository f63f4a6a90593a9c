"""Adding, removing and rebuilding: against flat search over what should be left, among threads, and after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_world import IDS, N, build, creator, exhaustive, queries, source, vectors

from fastgda.core import ROOT
from fastgda.index import FlatIndex, Index, SegmentConfig, Settings, reader, store
from fastgda.index.journal import JOURNAL, exclusive

LOSSY = SegmentConfig("IVF8,PQ4x4")


def assert_holds(index: Index, rows: np.ndarray) -> None:
    """Exhaustive search finds exactly what flat search over `rows` finds."""
    k = min(10, len(rows))
    found = index.search(queries(), k, exhaustive())
    assert np.array_equal(found.ids, FlatIndex.build(vectors()[rows], IDS[rows]).search(queries(), k).ids)
    assert len(index) == len(rows)


def killed(path: Path, action: str, where: str) -> None:
    """Opens the index in another process, which does `action` and is killed when it reaches `where` (a dotted name)."""
    program = f"""
import os, signal
from index_world import IDS, source
from fastgda.index import Index, SegmentConfig, store
index = Index({str(path)!r})
{where} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
{action}
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("config", [SegmentConfig(), LOSSY], ids=lambda config: config.factory)
def test_a_history_of_changes(tmp_path: Path, config: SegmentConfig) -> None:
    """Every step against the oracle, in the process that changes the index, in one that has it open, and reloaded."""
    index = build(tmp_path / "x", config, range(200))
    server = Index(tmp_path / "x")
    kept = np.zeros(N, dtype=bool)
    kept[:200] = True

    def check() -> None:
        for opened in (index, server, Index(tmp_path / "x")):
            assert_holds(opened, np.flatnonzero(kept))

    check()
    assert index.remove(IDS[[3, 50, 199]], command="test").images == 3
    kept[[3, 50, 199]] = False
    check()
    assert index.add(source(range(200, 260)), command="test").images == 60
    kept[200:260] = True
    check()
    assert index.remove(creator=creator(4), command="test").images == kept[4::10].sum()
    kept[4::10] = False
    check()
    index.add(source(range(260, N)), command="test")
    index.remove(IDS[260:290], command="test")
    kept[260:N], kept[260:290] = True, False
    check()
    assert [len(segment) for segment in index.snapshot().segments] == [200, 60, 40]
    assert index.rebuild(config, command="test").images == kept.sum()
    check()
    assert [len(segment) for segment in index.snapshot().segments] == [kept.sum()]
    assert len(list((tmp_path / "x" / "segments").iterdir())) == 1
    known = index.metadata(IDS)
    assert [entry is not None for entry in known] == kept.tolist()
    assert all(entry["caption"] == f"picture {row}" for row, entry in enumerate(known) if entry is not None)


def test_rebuilding_gives_what_building_gives(tmp_path: Path) -> None:
    """Also where the search is approximate and the stored vectors are rounded."""
    config, settings = SegmentConfig("IVF8,PQ4x4", "float16"), Settings(nprobe=2, depth=15, k=10)
    direct = build(tmp_path / "a", config, range(100, N))
    index = build(tmp_path / "b", config)
    index.remove(IDS[:100], command="test")
    index.rebuild(SegmentConfig("IVF8,PQ4x4", "float16", shards=3), command="test")
    expected, found = direct.search(queries(), 10, settings), index.search(queries(), 10, settings)
    assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.scores, expected.scores)


def test_searching_where_nearly_everything_was_removed(tmp_path: Path) -> None:
    """The nearest candidates are all gone: the search goes further until it has k."""
    index = build(tmp_path / "x", LOSSY)
    nearest = FlatIndex.build(vectors(), IDS).search(queries()[:1], N - 7).ids[0]
    index.remove(nearest, command="test")
    found = index.search(queries()[:1], 7, Settings(nprobe=1, depth=7, k=7))
    assert set(found.ids[0]) == set(IDS) - set(nearest)
    with pytest.raises(ValueError, match="k = 8: expected 1 to 7"):
        index.search(queries()[:1], 8)
    index.remove(found.ids[0], command="test")
    assert len(index) == 0
    with pytest.raises(ValueError, match="found that all were removed"):
        index.rebuild(LOSSY, command="test")


def test_refused_changes_change_nothing(tmp_path: Path) -> None:
    index = build(tmp_path / "x", SegmentConfig(), range(50))
    index.remove(IDS[:5], command="test")
    journal = (tmp_path / "x" / JOURNAL).read_bytes()
    for change, complaint in (
        (lambda: index.add(source(range(40, 60)), command="test"), "found 10 already in the index"),
        (lambda: index.add(source(range(3, 5)), command="test"), "found 2 removed before"),
        (
            lambda: index.remove(np.array([IDS[9], 1, 2]), command="test"),
            "found 2 not in it; nothing was removed: 1, 2",
        ),
        (lambda: index.remove(creator="nobody", command="test"), "creator 'nobody': expected images"),
        (lambda: index.remove(command="test"), "expected either ids or a creator"),
    ):
        with pytest.raises(ValueError, match=complaint):
            change()
    assert index.remove(IDS[:5], command="test").images == 0, "removing again is no mistake"
    assert (tmp_path / "x" / JOURNAL).read_bytes() == journal
    assert_holds(index, np.arange(5, 50))


def test_concurrent_searches_see_whole_states_and_no_removed_image(tmp_path: Path) -> None:
    """Each answer is the flat answer of one state: of the one when the search began, or of a later one."""
    changer = build(tmp_path / "x", LOSSY)
    batches = np.array_split(np.random.default_rng(3).permutation(N)[:240], 8)
    states = [np.setdiff1d(np.arange(N), np.concatenate([*batches[:done], []])).astype(int) for done in range(9)]
    asked = queries()[:4]
    answers = [FlatIndex.build(vectors()[rows], IDS[rows]).search(asked, 10).ids for rows in states]
    done, started = 0, threading.Barrier(4)

    def search(index: Index) -> set[int]:
        seen: set[int] = set()
        started.wait()
        while True:
            before = done
            found = index.search(asked, 10, exhaustive()).ids
            state = next(number for number, ids in enumerate(answers) if np.array_equal(ids, found))
            assert state >= before, "an image that was removed before the search began was found"
            seen.add(state)
            if before == 8:
                return seen

    with ThreadPoolExecutor(3) as pool:
        servers = [changer, Index(tmp_path / "x"), Index(tmp_path / "x")]
        futures = [pool.submit(search, index) for index in servers]
        started.wait()
        for batch in batches:
            if done == 4:
                changer.rebuild(LOSSY, command="test")
            changer.remove(IDS[batch], command="test")
            done += 1
        assert all(8 in future.result() for future in futures)
    assert_holds(Index(tmp_path / "x"), states[8])


@contextmanager
def setting(event: threading.Event) -> Iterator[None]:
    """Sets `event` at the end, also where the test failed, so that threads that wait for it end."""
    try:
        yield
    finally:
        event.set()


@pytest.mark.parametrize("operation", ["add", "rebuild"])
def test_searches_go_on_while_a_segment_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Without waiting, in the old segments, and without what is removed meanwhile, from these or from the new one."""
    changer = build(tmp_path / "x", LOSSY, range(200))
    server, opened = Index(tmp_path / "x"), threading.Event()
    known, slow = np.arange(200), reader.Segment

    def segment(folder: Path, **options: Any) -> reader.Segment:
        if threading.current_thread().name == "opening segments":
            assert opened.wait(60)
        return slow(folder, **options)

    if operation == "add":
        changer.add(source(range(200, 260)), command="test")
        rows = np.arange(260)
    else:
        changer.rebuild(SegmentConfig(), command="test")
        rows = known
    monkeypatch.setattr(reader, "Segment", segment)
    monkeypatch.setattr(reader, "PATIENCE", 0.0)
    with ThreadPoolExecutor(4) as pool, setting(opened):
        batches, done, gone = np.array_split(np.random.default_rng(5).permutation(200)[:120], 6), 0, np.zeros(0, int)

        def search(_: int) -> None:
            while not opened.is_set():
                before = np.concatenate([*batches[:done], []]).astype(int)
                found = server.search(queries()[:4], 10, exhaustive()).ids
                assert not np.isin(found, IDS[before]).any(), "removed before the search began"
                assert np.isin(found, IDS[known]).all()

        futures = [pool.submit(search, number) for number in range(3)]
        for batch in batches:
            changer.remove(IDS[batch], command="test")
            done += 1
            gone = np.concatenate([gone, batch])
            assert_holds(server, np.setdiff1d(known, gone))
            assert server.metadata(IDS[batch]) == [None] * len(batch)
        waiting = pool.submit(server.snapshot)
        assert not waiting.done(), "who wants the newest waits for it"
        opened.set()
        assert waiting.result().live == len(rows) - len(gone)
        for future in futures:
            future.result()
    assert_holds(server, np.setdiff1d(rows, gone))


def test_damaged_new_segment_is_named_until_the_index_does_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changer = build(tmp_path / "x", LOSSY, range(200))
    server = Index(tmp_path / "x")
    changer.add(source(range(200, 260)), command="test")
    path = tmp_path / "x" / "segments" / "000001" / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    for use in (server.snapshot, lambda: server.search(queries(), 5)):
        with pytest.raises(ValueError, match=r"000001/vectors\.npy: expected SHA-256"):
            use()
    changer.rebuild(LOSSY, command="test")
    assert len(server) == 260


@pytest.mark.parametrize("operation", ["remove", "add", "rebuild"])
def test_kill_between_journal_and_swap(tmp_path: Path, operation: str) -> None:
    """The line counts: whoever opens the index next, or has it open, sees the change."""
    index = build(tmp_path / "x", LOSSY, range(200))
    index.remove(IDS[:20], command="test")
    server = Index(tmp_path / "x")
    rows = {"remove": np.arange(40, 200), "add": np.arange(20, 240), "rebuild": np.arange(20, 200)}[operation]
    action = {
        "remove": 'index.remove(IDS[20:40], command="test")',
        "add": 'index.add(source(range(200, 240)), command="test")',
        "rebuild": f'index.rebuild(SegmentConfig({LOSSY.factory!r}), command="test")',
    }[operation]
    killed(tmp_path / "x", action, "store.write_checkpoint")
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["state"]["line"] == 2
    for opened in (server, Index(tmp_path / "x")):
        assert_holds(opened, rows)
    server.remove(IDS[[150]], command="test")
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["state"]["line"] == 4
    assert_holds(Index(tmp_path / "x"), rows[rows != 150])


def test_kill_before_the_journal_changes_nothing(tmp_path: Path) -> None:
    """A segment that was moved in place but not written down is not part of the index and is swept away."""
    index = build(tmp_path / "x", LOSSY, range(200))
    killed(tmp_path / "x", 'index.add(source(range(200, 240)), command="test")', "store.Journal.append")
    assert len(list((tmp_path / "x" / "segments").iterdir())) == 2
    assert_holds(Index(tmp_path / "x"), np.arange(200))
    index.add(source(range(200, 220)), command="test")
    assert len(list((tmp_path / "x" / "segments").iterdir())) == 2
    assert_holds(Index(tmp_path / "x"), np.arange(220))


def test_torn_line_is_passed_over_and_overwritten(tmp_path: Path) -> None:
    index = build(tmp_path / "x", SegmentConfig(), range(50))
    with open(tmp_path / "x" / JOURNAL, "a") as handle:
        handle.write('{"line": 2, "removed": [' + str(IDS[1]))
    assert_holds(index, np.arange(50))
    index.remove(IDS[:1], command="test")
    assert_holds(Index(tmp_path / "x"), np.arange(1, 50))
    lines = (tmp_path / "x" / JOURNAL).read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 2]
    assert json.loads(lines[1])["removed"] == [IDS[0]]


def test_changed_journals_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "x", SegmentConfig(), range(50))
    killed(tmp_path / "x", 'index.remove(IDS[:1], command="test")', "store.write_checkpoint")
    path = tmp_path / "x" / JOURNAL
    whole = path.read_text()
    assert str(IDS[0]) in whole
    for text, complaint in (
        (whole.replace(str(IDS[0]), str(IDS[1])), "expected line 2 as it was written"),
        (whole.replace('"check"', '"chuck"'), "journal as the manifest knows it"),
        (whole + "nonsense\n", "expected a journal line 3, found a damaged one"),
        (whole[:10], "found a truncated journal|journal as the manifest knows it"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"journal\.jsonl: .*({complaint})"):
            Index(tmp_path / "x")
    path.write_text(whole)
    assert_holds(Index(tmp_path / "x"), np.arange(1, 50))


def test_full_disk_refuses_the_change(tmp_path: Path, disk_limit) -> None:
    index = build(tmp_path / "x", SegmentConfig(), range(50))
    size = (tmp_path / "x" / JOURNAL).stat().st_size
    with disk_limit(size + 20), pytest.raises(OSError, match=r"journal\.jsonl: expected to write a line"):
        index.remove(IDS[:1], command="test")
    assert_holds(index, np.arange(50))
    index.remove(IDS[:1], command="test")
    assert_holds(Index(tmp_path / "x"), np.arange(1, 50))


def test_changes_during_a_rebuild_survive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "x", SegmentConfig(), range(200))
    build_segment = store.build_segment

    def meanwhile(folder: Path, *args: object, **options: object) -> None:
        build_segment(folder, *args, **options)  # type: ignore[arg-type]
        if folder.name == "rebuilding":
            index.remove(IDS[:30], command="test")
            index.add(source(range(200, 220)), command="test")

    monkeypatch.setattr(store, "build_segment", meanwhile)
    index.rebuild(LOSSY, command="test")
    assert_holds(Index(tmp_path / "x"), np.arange(30, 220))
    with exclusive(tmp_path / "x" / "rebuild.lock"), pytest.raises(ValueError, match="found one at work"):
        index.rebuild(LOSSY, command="test")


def test_killed_rebuild_does_not_bring_back_what_was_removed_since(tmp_path: Path) -> None:
    index = build(tmp_path / "x", SegmentConfig(), range(100))
    index.remove(IDS[:10], command="test")
    killed(tmp_path / "x", 'index.rebuild(SegmentConfig(), command="test")', "Index._commit_built")
    index.remove(IDS[10:20], command="test")
    index.rebuild(SegmentConfig(), command="test")
    assert_holds(Index(tmp_path / "x"), np.arange(20, 100))


def test_advice_to_rebuild(tmp_path: Path) -> None:
    index = build(tmp_path / "x", SegmentConfig(), range(50))
    assert index.remove(IDS[:10], command="test").advice is None
    assert index.remove(IDS[10:11], command="test").advice == "22% of the stored images are removed"
    assert index.rebuild(SegmentConfig(), command="test").advice is None
    for row in range(50, 57):
        assert index.add(source(range(row, row + 1)), command="test").advice is None
    assert index.add(source(range(60, 61)), command="test").advice == "every search visits 9 segments"
