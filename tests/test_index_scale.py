"""The benchmark of index structures: what it draws, and one tiny run that is cut off and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmark import index_scale
from benchmark.index_scale import main
from benchmark.synthetic import Statistics, Synthetic, exact_neighbours
from fastgda.core import save_npy
from fastgda.dataset import normalise
from fastgda.index import FlatIndex


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
    tmp_path: Path, embedding: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--embedding", str(tmp_path / "rows.npy"), "--queries", str(tmp_path / "asked.npy"), "--sizes", "400"]
    run += ["--dims", "16", "--query_count", "24", "--k", "10", "--clients", "2", "--work", str(tmp_path / "work")]
    run += ["--output", str(tmp_path / "out.json"), "--factories", "Flat", "IVF{lists},SQ8"]
    run_piece, done = index_scale.run_piece, list[str]()

    def once(config: index_scale.ScaleConfig, rows: Synthetic, factory: str, truth: Path) -> dict:
        if done:
            raise KeyboardInterrupt
        done.append(factory)
        return run_piece(config, rows, factory, truth)

    monkeypatch.setattr(index_scale, "run_piece", once)
    assert main(run) == 130
    done.clear()
    assert main(run) == 0
    assert done == ["IVF{lists},SQ8"], "the first piece is not made again"
    report = json.loads((tmp_path / "out.json").read_text())
    assert [piece["factory"] for piece in report["pieces"]] == ["Flat", "IVF64,SQ8"]
    flat = report["pieces"][0]
    assert flat["recall"] == {k: {"mean": 1.0, "standard_error": 0.0} for k in ("10", "100")}
    assert report["pieces"][1]["recall"]["10"]["mean"] > 0.5
    assert {"python", "processor", "packages"} <= report["environment"].keys()
    assert not (tmp_path / "work" / "index").exists()
