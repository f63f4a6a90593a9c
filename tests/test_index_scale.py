"""The benchmark of index structures: what it draws, and one tiny run that is cut off and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark import index_scale
from benchmark.index_scale import main
from benchmark.memory_limit import limited
from benchmark.synthetic import Statistics, Synthetic, exact_neighbours
from fastgda.core import save_npy
from fastgda.dataset import normalise
from fastgda.index import FlatIndex
from fastgda.index.journal import exclusive
from fastgda.index.source import NpyRows
from fastgda.ranker import Ranker, RankerConfig, save_ranker


@pytest.fixture
def embedding(tmp_path: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centres = rng.normal(size=(10, 24))
    rows = normalise(np.repeat(centres, 30, 0) + 0.3 * rng.normal(size=(300, 24))).astype(np.float32)
    asked = normalise(rows[::10] + 0.1 * rng.normal(size=(30, 24))).astype(np.float32)
    save_npy(tmp_path / "rows.npy", rows)
    save_npy(tmp_path / "asked.npy", asked)
    return rows, asked


def test_synthetic_rows_are_like_the_embedding(
    embedding: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unit length, any piece the same as the whole, queries as far from their neighbours as real ones, not on them."""
    monkeypatch.setattr("benchmark.synthetic.BLOCK", 256)
    rows, asked = embedding
    statistics = Statistics.of(rows, asked, 24)
    drawn = Synthetic(statistics, 2000)
    whole = drawn[0:2000]
    assert np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    assert np.array_equal(drawn[700:900], whole[700:900])
    assert np.array_equal(drawn[np.array([3, 255, 256, 1999])], whole[[3, 255, 256, 1999]])
    assert np.array_equal(Synthetic(statistics, 500)[0:500], whole[:500])
    queries = drawn.queries(60)
    nearest = FlatIndex.build(whole).search(queries, 1).scores
    assert float(np.median(nearest)) == pytest.approx(statistics.query_cosine, abs=0.05)
    assert nearest.max() < 0.9999
    truth = FlatIndex.build(whole).search(queries, 20).ids
    assert np.array_equal(exact_neighbours(drawn, queries, 20), truth)


def test_a_cut_off_run_goes_on(
    tmp_path: Path,
    embedding: tuple[np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_ranker(tmp_path / "ranker.pth", Ranker(RankerConfig(in_dim=24, hidden_sizes=(32,), out_feat_dim=20)))
    run = ["--features", str(tmp_path / "rows.npy"), "--queries", str(tmp_path / "asked.npy"), "--sizes", "400"]
    run += ["--dims", "16", "--query_count", "24", "--k", "10", "--clients", "2", "--work", str(tmp_path / "work")]
    run += ["--output", str(tmp_path / "out.json"), "--checkpoint", str(tmp_path / "ranker.pth")]
    factories = ["--factories", "Flat", "IVF{lists},SQ8"]
    run_piece, done = index_scale.run_piece, list[str]()

    def once(config: index_scale.ScaleConfig, rows: NpyRows, factory: str, *rest: Any) -> dict:
        if done:
            raise KeyboardInterrupt
        done.append(factory)
        return run_piece(config, rows, factory, *rest)

    monkeypatch.setattr(index_scale, "run_piece", once)
    assert main([*run, *factories]) == 130
    done.clear()
    assert main([*run, *factories]) == 0
    assert done == ["IVF{lists},SQ8"], "the first piece is not made again"
    report = json.loads((tmp_path / "out.json").read_text())
    assert [piece["factory"] for piece in report["pieces"]] == ["Flat", "IVF64,SQ8"]
    flat, lists = report["pieces"]
    for goal, wanted in zip(flat["goals"], (0.95, 0.99), strict=True):
        assert goal["wanted"] == wanted
        assert goal["recall"] == {k: {"mean": 1.0, "standard_error": 0.0} for k in ("10", "100")}
        assert goal["latency_one_client"]["queries"] == 24
    breadths = [goal["calibration"]["nprobe"] for goal in lists["goals"]]
    assert breadths == sorted(breadths) and lists["goals"][1]["recall"]["10"]["mean"] > 0.8
    assert {"python", "processor", "packages"} <= report["environment"].keys()
    left = sorted(path.suffix for path in (tmp_path / "work").iterdir())
    assert left == [".json", ".json", ".lock", ".npz"], "neither index nor vectors"
    done.clear()
    with exclusive(tmp_path / "work" / "index.lock"):
        assert main([*run, "--sizes", "300", "--factories", "Flat"]) == 2
    assert "found one at work" in capsys.readouterr().err and not done
    assert main([*run, "--sizes", "300", "--factories", "Flat"]) == 0
    sizes = [piece["size"] for piece in json.loads((tmp_path / "out.json").read_text())["pieces"]]
    assert sizes == [300, 400, 400], "what was measured before stays"


def test_memory_of_a_command_is_bounded() -> None:
    command = [sys.executable, "-c", "x = bytearray(80_000_000); print(len(x))"]
    try:
        with limited(0.4) as group:
            done = subprocess.run([*group.prefix, *command], capture_output=True, text=True)
            assert done.stdout == "80000000\n" and 80e6 < (group.peak() or 0) < 400e6
        folder = group.folder
        with limited(0.03) as group:
            assert subprocess.run([*group.prefix, *command], capture_output=True).returncode != 0
    except ValueError as error:
        pytest.skip(str(error))
    assert folder is not None and not folder.exists()


def test_without_a_limit_nothing_is_changed() -> None:
    with limited(0) as group:
        assert group.prefix == [] and group.peak() is None
    with pytest.raises(ValueError, match="expected at least 0 GB"), limited(-1):
        pass
