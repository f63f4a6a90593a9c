"""The reports on the exact form, on a tiny model: agreement with its expansion, and what the shared sweep saves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_collection import IMAGES, small_collection

from benchmark import exact, exact_sweep
from fastgda.core import load_npz


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with small_collection(tmp_path_factory.mktemp("exact")) as root:
        yield root


def run(root, *flags):
    return exact.main(["--root", str(root), "--queries", "2", *flags])


def test_the_expansion_is_compared_with_the_exact_form(root, capsys, monkeypatch):
    steps = ("--steps", "0.0001", "0.01")
    assert run(root, *steps) == 0
    report = json.loads((root / "results/teacher/exact.json").read_text())
    small, large = report["rows"]
    for row in (small, large):
        for terms in ("first_term", "both_terms"):
            found = row[terms]
            assert found["spearman"] == pytest.approx(np.mean(found["spearman_by_query"]), abs=1e-4)
            assert found["spearman_min"] == min(found["spearman_by_query"])
            assert len(found["spearman_by_query"]) == 2 and found["spearman_standard_error"] >= 0
    assert small["first_term"]["spearman"] > 0.95
    assert small["first_term"]["spearman"] >= large["first_term"]["spearman"]
    assert small["relative_change"] < large["relative_change"]
    assert (root / "results/teacher/exact.png").read_bytes().startswith(b"\x89PNG")

    folder = root / "data/emoji/cache/exact_2_0.0001_0.01"
    piece = load_npz(folder / "exact_000000.npz", ("before", "after", "first", "second"))
    assert piece["after"].shape == (2, 2, IMAGES) and piece["second"].min() >= 0
    # what is there is not computed again, and never mixed with another model's
    monkeypatch.setattr(exact, "first_order", None)
    assert run(root, *steps) == 0
    capsys.readouterr()
    path = root / "data/emoji/query_test/latents.npy"
    latents = np.load(path)
    np.save(path, latents + 1)
    assert run(root, *steps) == 2
    assert "expected pieces of the same settings and inputs" in capsys.readouterr().err
    np.save(path, latents)


def test_the_shared_sweep_is_timed_against_one_query_at_a_time(root):
    flags = ["--root", str(root), "--queries", "2", "--images", "6"]
    threads = torch.get_num_threads()
    try:
        assert exact_sweep.main([*flags, "--repeats", "1"]) == 0
        assert exact_sweep.main([*flags, "--bf16", "--steps", "0.01", "1000"]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((root / "results/speed/exact_sweep.json").read_text())
    assert report["largest_difference"] < 1e-6 < report["deviation"] * 1e3
    assert report["ratio"]["plain"] == 1 and report["spearman"] == 1
    for side in ("plain", "shared"):
        assert report["memory_bytes"][side]["peak"] >= report["memory_bytes"][side]["before"] > 0
    rows = json.loads((root / "results/speed/exact_bf16.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0.01, 1000]
    # rounding matters the less the more the losses change
    assert rows[1]["spearman"] > rows[0]["spearman"]
    assert rows[0]["error"] / rows[0]["change"] > rows[1]["error"] / rows[1]["change"]
