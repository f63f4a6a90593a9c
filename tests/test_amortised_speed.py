"""The benchmark of both forms: what it times is what it says, it goes on where it stopped, and its extrapolations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from abu.models import DiffusionConfig, build_denoiser, noise_schedule
from benchmark import growth
from benchmark.amortised_speed import coco_table, line, summary
from benchmark.stopwatch import SpeedConfig, Stopwatch, collect, divisor
from benchmark.worlds import build_coco_denoiser, identity_curvature, random_world
from fastgda.core import load_npz

SMALL: dict[str, Any] = {
    "bins": 2,
    "draws": 2,
    "query_draws": 2,
    "shard": 8,
    "queries": (1, 5),
    "exact_queries": (1, 2),
}


@pytest.fixture(scope="module", params=[1, 2])
def watch(request):
    shape = DiffusionConfig(sample_size=4, latent_channels=2, channels=(16, 16), heads=2, text_width=12)
    world = random_world(
        lambda: build_denoiser(shape),
        noise_schedule(shape),
        16,
        2,
        (2, 4, 4),
        (3, 12),
        torch.device("cpu"),
        fitted=True,
    )
    return Stopwatch(world, SpeedConfig(step=1e-5, order=request.param, **SMALL))


def test_both_forms_score_the_same_images_with_the_same_draws(watch, tmp_path):
    collect(watch, tmp_path)
    first = tmp_path / "shard_000000.json"
    stamp, lost = first.stat().st_mtime_ns, tmp_path / "shard_000008.json"
    kept = load_npz(lost.with_suffix(".npz"), ("exact", "amortised"))
    lost.unlink()
    collect(watch, tmp_path)
    assert first.stat().st_mtime_ns == stamp
    again = load_npz(lost.with_suffix(".npz"), ("exact", "amortised"))
    np.testing.assert_allclose(again["amortised"], kept["amortised"], rtol=1e-4, atol=1e-9)
    report = summary(tmp_path, watch.config, 1000)
    # whole gradients and a small step: rounding is all that differs; at 1e-3 one query is down to 0.75
    assert min(report["spearman_on_timed_images"]) > 0.95
    assert [row["queries"] for row in report["rows"]] == [1, 5]
    assert (report["images_timed"], report["shards"]) == (16, 2)
    assert report["extrapolated"].endswith("both in images")


def test_the_report_adds_up_what_was_measured(tmp_path):
    config = SpeedConfig(queries=(10,), exact_queries=(1, 2))
    shard = {
        "images": 2,
        "amortised": {"gradients": 6.0, "compression": 2.0, "products": {"10": 1.0}},
        "exact": {"1": 4.0, "2": 6.0},
    }
    (tmp_path / "shard_000000.json").write_text(json.dumps(shard))
    (tmp_path / "queries.json").write_text(json.dumps({"gradient": 0.5, "unlearn": 0.25, "queries": 1}))
    np.savez(tmp_path / "shard_000000.npz", exact=np.array([[1.0, 2.0]]), amortised=np.array([[1.0, 3.0]]))
    report = summary(tmp_path, config, 100)
    row = report["rows"][0]
    # an image costs 1 s and 1 s for each query exactly, 3 + 1 + 0.5 s amortised; a query 0.5 s, and 0.25 s to unlearn
    assert row["exact_seconds"] == pytest.approx(100 * (1 + 10) + 10 * 0.75)
    assert row["amortised_seconds"] == pytest.approx(100 * 4.5 + 10 * 0.5)
    table = coco_table(report, config)
    samples = 118_287 * 2 * 5
    assert table["exact_days"] == pytest.approx(samples * 5_001 / 86_400, rel=1e-3)
    product = 0.05 * 118_287 * 2 * 5_000
    assert table["amortised_days"] == pytest.approx((samples * 4 + product) / 86_400, rel=1e-3)
    assert table["query_gradient_days"]["50000"] == pytest.approx(5_000 * 50_000 * 0.5 / 40 / 86_400, rel=1e-3)


def test_small_parts():
    assert divisor(540_672, 33_792) == 33_792
    assert divisor(614_400, 33_792) == 30_720
    found = line([1, 2, 4], [3.0, 5.0, 9.0])
    assert (found["base"], found["each"]) == (pytest.approx(1), pytest.approx(2))
    assert found["largest_relative_deviation"] < 1e-6
    with pytest.raises(ValueError, match="exact_queries: expected at least two numbers"):
        SpeedConfig(exact_queries=(2, 2))
    with torch.device("meta"):
        denoiser = build_coco_denoiser()
        assert identity_curvature(denoiser, 1024, torch.device("meta")).eigenvalues.shape == (6912, 1024)
    widths = [m.in_features for n, m in denoiser.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert widths == [1024] * 32


def test_growth_varies_one_thing_at_a_time():
    plan = growth.plan("emoji", 2)
    assert [row["form"] for row in plan].count("base") == 1
    assert max(row["queries"] for row in plan if row["form"] == "exact") == 8
    assert {row["threads"] for row in plan if row["workers"] == 2} == {1}
    assert len({tuple(row.values()) for row in plan}) == len(plan)
