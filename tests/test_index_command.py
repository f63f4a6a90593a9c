"""Calibration against what searches then find, and the command line in-process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from index_world import IDS, N, build, metadata, queries, vectors

from fastgda.core import save_npy
from fastgda.index import FlatIndex, Index, SegmentConfig, Settings
from fastgda.index.__main__ import main
from fastgda.index.calibrate import calibrate, choose, recall, truth_places
from fastgda.index.metadata import metadata_bytes

LOSSY = SegmentConfig("IVF16,PQ4x4")


def test_recall_counts_shared_neighbours() -> None:
    found = recall(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1], [7, 6]]))
    assert found.tolist() == [1.0, 0.5]


def test_places_say_what_a_search_of_each_depth_finds(tmp_path: Path) -> None:
    """With several segments too, and rows removed: one pass of candidates stands for a search of each depth."""
    index = build(tmp_path / "x", LOSSY)
    index.remove(IDS[:40], command="test")
    snapshot = index.snapshot()
    truth = snapshot.exact(queries(), 5).ids
    places = truth_places(snapshot, queries(), truth, Settings(4, 60, 5))
    for depth in (5, 12, 60):
        found = snapshot.search(queries(), 5, Settings(4, depth, 5)).ids
        assert np.array_equal((places < depth).mean(1), recall(found, truth))


@pytest.mark.parametrize("wanted", [0.5, 0.95, 1.0])
def test_calibration_reaches_the_recall_asked_for(tmp_path: Path, wanted: float) -> None:
    index = build(tmp_path / "x", LOSSY)
    exact = FlatIndex.build(vectors(), IDS).search(queries(), 5).ids
    settings = choose(index.snapshot(), queries(), exact, wanted)
    assert recall(index.search(queries(), 5, settings).ids, exact).mean() >= wanted
    found = calibrate(index, queries(), 5, wanted)
    assert Index(tmp_path / "x").snapshot().settings == Settings(found["nprobe"], found["depth"], 5)
    judged = recall(index.search(queries()[1::2], 5).ids, exact[1::2])
    assert found["recall"] == pytest.approx(judged.mean())
    assert (found["queries_chosen_on"], found["queries_judged_on"]) == (6, 6)
    assert calibrate(index, queries(), 5, wanted, exact) | {"made": ""} == found | {"made": ""}
    with pytest.raises(ValueError, match=r"truth: expected shape \(12, 5\), found \(12, 4\)"):
        calibrate(index, queries(), 5, wanted, exact[:, :4])


def test_more_recall_costs_more(tmp_path: Path) -> None:
    snapshot = build(tmp_path / "x", LOSSY).snapshot()
    exact = FlatIndex.build(vectors(), IDS).search(queries(), 5).ids
    cheap, dear = (choose(snapshot, queries(), exact, wanted) for wanted in (0.3, 1.0))
    assert (cheap.nprobe, cheap.depth) < (dear.nprobe, dear.depth)
    with pytest.raises(ValueError, match="expected at least 4, found 3"):
        calibrate(Index(tmp_path / "x"), queries()[:3], 5, 0.9)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_npy(tmp_path / "a.npy", vectors()[:200])
    save_npy(tmp_path / "b.npy", vectors()[200:])
    save_npy(tmp_path / "q.npy", queries())
    pq.write_table(metadata(range(200)), tmp_path / "a.parquet")
    pq.write_table(metadata(range(200, N)), tmp_path / "b.parquet")
    save_npy(tmp_path / "none.npy", queries()[:0])
    pq.write_table(pa.table({"id": pa.array(range(2**63 - 99, 2**63 + 1), pa.uint64())}), tmp_path / "large.parquet")
    return tmp_path


def test_an_index_by_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Build, info, calibrate, add, search, remove, rebuild: what is printed, and what can be found then."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    x = files / "x"
    out = run("build", x, "--vectors", files / "a.npy", "--metadata", files / "a.parquet", "--factory", "IVF8,SQ8")
    assert "200 images, IVF8,SQ8" in out
    out = run("info", x)
    assert "recall       not measured" in out and "MB of file cache: vectors, ids, metadata" in out
    assert "recall@5 =" in run("calibrate", x, "--queries", files / "q.npy", "--k", 5, "--recall", 0.9)
    out = run("info", x)
    assert "recall@5 =" in out and "(0.9 wanted), measured with 200 images" in out
    assert "added 100 images" in run("add", x, "--vectors", files / "b.npy", "--metadata", files / "b.parquet")
    lines = run("search", x, "--queries", files / "q.npy", "--k", 3, "--rows", 8, 11).splitlines()
    expected = FlatIndex.build(vectors(), IDS).search(queries()[[8, 11]], 3).ids
    assert [int(line.split("\t")[2]) for line in lines] == expected.ravel().tolist()
    assert lines[0].split("\t")[4] == f"picture {np.flatnonzero(expected[0, 0] == IDS)[0]}"
    (files / "list.txt").write_text(f"{IDS[0]}\n{IDS[5]}\n")
    assert "removed 2 images" in run("remove", x, "--list", files / "list.txt")
    out = run("remove", x, "--creator", "creator 3")
    assert "removed 30 images" in out and "rebuild" not in out
    out = run("remove", x, "--ids", *IDS[[i for i in range(100) if i % 10 in (1, 2, 4, 6)]])
    assert "advice       24% of the stored images are removed; run: python -m fastgda.index rebuild" in out
    out = run("rebuild", x)
    assert "rebuilt from 228 images" in out and "calibrate again" in out
    out = run("info", x)
    assert "images       228 (72 removed) x 16" in out and "000002: 228 x IVF8,SQ8" in out and "advice" not in out


def test_a_change_rebuilds_when_asked_to(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = files / "x"
    given = ["--vectors", str(files / "a.npy"), "--metadata", str(files / "a.parquet"), "--factory", "IVF8,SQ8"]
    assert main(["build", str(x), *given]) == 0
    assert main(["remove", str(x), "--ids", str(IDS[0]), "--rebuild"]) == 0
    assert "rebuilt from" not in capsys.readouterr().out, "one of 200 is no reason"
    gone = [str(number) for number in IDS[1:60]]
    assert main(["remove", str(x), "--rebuild", "--ids", *gone]) == 0
    out = capsys.readouterr().out
    assert "rebuilding   30% of the stored images are removed" in out and "rebuilt from 140 images" in out
    (segment,) = Index(x).snapshot().segments
    assert np.array_equal(segment.ids, IDS[60:200]) and segment.config.factory == "IVF8,SQ8"


def test_rows_of_zeros_are_counted(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = vectors()[:50].copy()
    part[[3, 4]] = 0
    save_npy(files / "c.npy", part)
    assert main(["build", str(files / "x"), "--vectors", str(files / "c.npy")]) == 0
    out = capsys.readouterr().out
    assert "x: 48 images" in out and "left out     2 rows of zeros" in out


def test_dry_run_prints_and_writes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(files.iterdir())
    build_ = ["build", str(files / "x"), "--vectors", str(files / "a.npy"), str(files / "b.npy"), "--dry_run"]
    assert main(build_) == 0
    out = capsys.readouterr().out
    for text in ("300 x 16", "factory           Flat", "64 searched, 64 stored", "RAM", "disk", "0 vectors"):
        assert text in out
    assert main([*build_, "--factory", "IVF16,PQ8", "--store", "float16"]) == 0
    out = capsys.readouterr().out
    assert "16 searched, 32 stored" in out and "300 vectors, about" in out
    assert main([*build_, "--latency_ms", "0.0001"]) == 0 and "HNSW32,SQ8" in capsys.readouterr().out
    known = ["--metadata", str(files / "a.parquet"), str(files / "b.parquet")]
    assert main([*build_, *known]) == 0 and "GB searching, 0.30 GB building" in capsys.readouterr().out
    assert sorted(files.iterdir()) == before


def test_a_plan_needs_no_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--images", "400000000", "--memory_gb", "16"]) == 0
    out = capsys.readouterr().out
    for text in (
        "400,000,000 x 768",
        "OPQ64_256,IVF65536_HNSW32,PQ64",
        "on disk",
        "72 searched",
        "adding",
        "- 5 shards",
    ):
        assert text in out
    assert main(["plan", "--images", "0"]) == 2
    assert "expected positive images" in capsys.readouterr().err


def test_metadata_is_estimated(files: Path) -> None:
    paths = [files / "a.parquet", files / "b.parquet"]
    index = build(files / "x", SegmentConfig())
    written = sum(path.stat().st_size for path in index.snapshot().segments[0].folder.glob("metadata.*"))
    assert metadata_bytes(paths) == pytest.approx(written, rel=0.3)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["info", "{x}/nothing"], "nothing: expected an index, found no manifest.json in it"),
        (["build", "{x}/y", "--vectors", "{x}/c.npy"], "c.npy: expected a file, found nothing"),
        (["build", "{x}/y", "--vectors", "{x}/a.npy", "--metadata", "{x}/b.parquet"], "expected 200 rows"),
        (["build", "{x}/y", "--vectors", "{x}/a.npy", "--factory", "Fat"], "factory Fat: expected a FAISS factory"),
        (["build", "{x}/y", "--vectors", "{x}/a.npy", "--memory_gb", "0"], "expected positive images, dim, memory"),
        (["build", "{x}/y", "--vectors", "{x}/a.npy", "--latency_ms", "0"], "memory and latency, found 200, 16"),
        (["search", "{x}/x", "--queries", "{x}/q.npy", "--unit"], "expected an index of the ranker cosine, found one"),
        (["search", "{x}/x", "--queries", "{x}/q.npy", "--k", "201"], "k = 201: expected 1 to 200"),
        (["search", "{x}/x", "--queries", "{x}/q.npy", "--rows", "12"], "rows: expected 0 to 11, found 12 to 12"),
        (["calibrate", "{x}/x", "--queries", "{x}/q.npy", "--recall", "1.5"], "recall 1.5: expected a share"),
        (["remove", "{x}/x", "--list", "{x}/q.npy"], "q.npy: expected ids, one on a line"),
        (["remove", "{x}/x", "--ids", "5"], "found 1 not in it; nothing was removed: 5"),
        (["search", "{x}/x", "--queries", "{x}/none.npy"], "none.npy: expected at least one query, found none"),
        (["calibrate", "{x}/x", "--queries", "{x}/none.npy"], "none.npy: expected at least one query, found none"),
        (
            ["build", "{x}/y", "--vectors", "{x}/b.npy", "--metadata", "{x}/large.parquet"],
            f"below 2^63 in the column id, found {2**63}",
        ),
        (["remove", "{x}/x", "--ids", str(2**64)], "expected integers of 64 bits"),
    ],
)
def test_mistakes_are_named(files: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str) -> None:
    arguments = ["build", str(files / "x"), "--vectors", str(files / "a.npy"), "--metadata", str(files / "a.parquet")]
    assert "{x}/x" not in words or main(arguments) == 0
    capsys.readouterr()
    assert main([word.format(x=files) for word in words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and complaint in error


def test_only_answers_are_on_standard_output(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    built = ["build", str(files / "x"), "--vectors", str(files / "a.npy"), "--metadata", str(files / "a.parquet")]
    assert main([*built, "--factory", "IVF8,SQ8", "--on_disk"]) == 0
    reported = capfd.readouterr()
    assert reported.out.splitlines() == ["- the factory is as asked for", f"{files / 'x'}: 200 images, IVF8,SQ8"]
    assert "ondisk filename" in reported.err
    assert main(["search", str(files / "x"), "--queries", str(files / "q.npy"), "--rows", "3", "--k", "2"]) == 0
    assert [line.split("\t")[:2] for line in capfd.readouterr().out.splitlines()] == [["3", "1"], ["3", "2"]]


@pytest.mark.parametrize("name", ["build", "plan", "info", "calibrate", "add", "remove", "rebuild", "search"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"example: python -m fastgda.index {name}" in " ".join(capsys.readouterr().out.split())
