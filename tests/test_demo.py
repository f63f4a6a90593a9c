"""The demo: artifacts checked at start, and a browser that clicks through it over a small testbed."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import signal
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
from demo_world import (
    FTYPE,
    IMAGES,
    QUERIES,
    RELEASED,
    TOP,
    coco_config,
    expected_ids,
    free_port,
    load,
    write_coco,
    write_world,
)
from http_calls import as_text
from PIL import Image
from small_world import draw, png, write_ranker

import demo
from fastgda.core import load_npz
from fastgda.ranker import load_ranker
from serving import page, views
from serving.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "emoji")


def flags(data: Path, **changes: Any) -> list[str]:
    """The command line for the small testbed."""
    values = {"data_dir": data, "checkpoint": data / "ranker.pth", "feature_dir": data / "feats", "topk": TOP}
    values |= {"ftype": FTYPE, "source_model": data / "source"} | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def world(data: Path) -> World:
    return load(data)


def test_answers_are_those_of_the_slow_twin(world: World, data: Path) -> None:
    for query in range(QUERIES):
        image, prompt = world.queries.image(query), world.queries.caption(query)
        answer: Any = world.stored(query, TOP)
        assert answer.tuned.ids[:TOP].tolist() == expected_ids(world, data, image, prompt, tuned=True)
        assert answer.untuned.ids.tolist() == expected_ids(world, data, image, prompt, tuned=False)
        assert min(answer.seconds.values()) > 0 and answer.query == query
        features = np.load(data / "feats" / FTYPE / "data_feats.npy")[answer.tuned.ids]
        cosines = features @ world.encoder.encode([image], [prompt])[0] / 2  # two parts of unit length each
        assert np.allclose(answer.distances, 1 - cosines, atol=1e-5)


def test_shares_are_those_of_the_rule(world: World) -> None:
    rule = world.credit
    answer: Any = world.stored(1, TOP)
    assert rule is not None and "4 validation queries" in rule.fitted_on
    order = answer.tuned.ids.tolist()
    assert len(order) == min(rule.depth, IMAGES)
    owners = [("flat", "outline")[i // 18] + " studio" for i in order]
    assert answer.shares == rule.shares(answer.tuned.scores, owners)
    teacher: Any = world.teacher
    rank, scores = teacher.rank[1].tolist(), np.maximum(teacher.score[1].astype(float), 0)
    flat = sum(score for image, score in zip(rank, scores, strict=True) if image < 18)
    assert answer.truth["flat studio"] == pytest.approx(flat / scores.sum())


def test_typical_distance_is_that_of_nearest_others(world: World, data: Path) -> None:
    features = np.load(data / "feats" / FTYPE / "data_feats.npy") / np.sqrt(2)
    cosines = features @ features.T - 9 * np.eye(IMAGES)
    assert world.typical_distance == pytest.approx(float(np.median(1 - cosines.max(1))), abs=1e-5)


def test_threads_see_their_own_results(world: World) -> None:
    alone = [views.show_query(world, query)[1:] for query in range(QUERIES)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: views.show_query(world, query)[1:], list(range(QUERIES)) * 3))
    assert together == alone * 3


def test_agreement_with_the_teacher_is_counted(world: World) -> None:
    status, _, _, _, tuned, untuned, teacher = views.show_query(replace(world, level=18), 1)
    counts = re.search(r"(\d+) \(tuned\) and (\d+) \(untuned\)", status)
    assert counts is not None
    assert (int(counts[1]), int(counts[2])) == (tuned.count('"agreed"'), untuned.count('"agreed"'))
    shown = world.stored(1, TOP).tuned.ids[:TOP]
    assert int(counts[1]) == len(set(shown.tolist()) & set(world.teacher.rank[1, :18].tolist()))
    first = world.images.caption(int(world.teacher.rank[1, 0]))
    assert re.findall(r'alt="([^"]+)"', teacher)[0] == first


def test_generated_pictures_depend_on_prompt_and_seed(world: World) -> None:
    first, again, other = (world.generated("a heart", seed, TOP) for seed in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert np.array_equal(first.tuned.ids, again.tuned.ids) and first.seconds["generate"] > 0
    assert first.image.size == (16, 16) and first.seed == 3 and first.prompt == "a heart"


@pytest.mark.parametrize(
    ("prompt", "seed", "complaint"),
    [
        ("", 0, "Type the prompt"),
        ("x" * 100_000, 0, "prompt: expected at most 1,000 characters, found 100,000"),
        ("a heart", -1, "seed: expected a whole number"),
        ("a heart", 1.5, "seed: expected a whole number"),
        ("a heart", None, "seed: expected a whole number"),
        ("a heart", float("nan"), "seed: expected a whole number"),
        ("a heart", 2**31, "seed: expected a whole number from 0 to 2,147,483,647"),
    ],
)
def test_what_cannot_be_generated_becomes_a_message(world: World, prompt: str, seed: float, complaint: str) -> None:
    status, *rest = views.show_generated(world, prompt, seed)
    assert complaint in status and 'role="alert"' in status and set(rest) == {""}


def test_any_script_may_be_prompted(world: World) -> None:
    for prompt in ("赤いハート", "قلب أحمر", "❤️ 👩‍👩‍👧", "\x00 \ud800 heart"):
        assert "ms: generate" in views.show_generated(world, prompt, 1)[0]


def test_permalinks_lead_back(world: World) -> None:
    for parameters in ({"query": "2"}, {"prompt": "a & b <c>", "seed": "5"}):
        tab, query, prompt, seed, shown = views.show_address(world, parameters)
        link = re.search(r'href="\?([^"]+)"', shown[2])
        assert link is not None
        assert dict(parse_qsl(html.unescape(link[1]))) == parameters
        assert (tab, query, prompt, seed) == (
            ("stored", 2, "", 0) if "query" in parameters else ("generate", 0, "a & b <c>", 5)
        )
    assert views.show_address(world, {})[4][2:] == views.show_query(world, 0)[2:]
    for wrong in (
        {"query": "99"},
        {"query": "-1"},
        {"query": "²"},
        {"query": "9" * 5000},
        {"prompt": "x", "seed": "y"},
    ):
        assert 'role="alert"' in views.show_address(world, wrong)[4][0]
    assert "no source model" in views.show_address(replace(world, painter=None), {"prompt": "x"})[4][0]


def test_without_scores_there_are_no_shares(world: World) -> None:
    assert "No shares" in views.show_query(replace(world, credit=None), 0)[3]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("released") / "coco")


def test_released_data_is_shown(coco: Path) -> None:
    """By layout; features with and without a manifest."""
    config, folder = coco_config(coco), coco / "feats" / "pixel"
    (folder / "manifest.json").rename(coco / "manifest.json")
    world = demo.load_world(config)
    (coco / "manifest.json").rename(folder / "manifest.json")
    assert config.mode == "coco" and demo.load_world(config).level == 40
    ranker = load_ranker(config.ranker)
    for query in range(4):
        answer: Any = world.stored(query, TOP)
        asked, stored = (np.load(folder / f"{name}_feats.npy") for name in ("test_query", "data"))
        scores = (ranker.embed_queries(asked[query][None]) @ ranker.embed(stored).T)[0].numpy()
        np.testing.assert_allclose(answer.tuned.scores, np.sort(scores)[::-1][:TOP], atol=1e-5)
        np.testing.assert_allclose(scores[answer.tuned.ids], answer.tuned.scores, atol=1e-5)
        # picture i of the training set is drawn as query i - 1 is, and stored as JPEG
        assert answer.untuned.scores[0] == pytest.approx(1, abs=0.05)
    status, shown, _, shares, tuned, _, teacher = views.show_query(world, 1)
    assert "among 40 training images" in status and "test query 1" in shown and shares == ""
    assert tuned.count("<img") == teacher.count("<img") == TOP
    found, first = (world.stored(1, 1).tuned.ids[0], world.teacher.rank[1, 0])
    assert f">image {7 * found}<" in tuned and f">image {7 * first}<" in teacher
    told = page.Api(world).query(1, 3)
    assert [entry["creator"] for entry in told["images"]] == [None] * 3 and told["shares"] == []


def test_what_released_data_lacks_is_a_message(coco: Path) -> None:
    world = demo.load_world(coco_config(coco))
    assert world.painter is None and world.credit is None
    tab, *_, shown = views.show_address(world, {"prompt": "a red square", "seed": "3"})
    assert tab == "stored" and "no source model" in shown[0]


def test_training_images_that_are_missing_keep_their_captions(coco: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(coco, tmp_path / "coco")
    shutil.rmtree(copy / "trainset" / "train2017")
    _, shown, _, _, tuned, untuned, teacher = views.show_query(demo.load_world(coco_config(copy)), 1)
    assert "<img" in shown and "<img" not in tuned + untuned + teacher
    assert tuned.count("square") == untuned.count("square") == teacher.count("square") == TOP


def test_released_data_of_another_feature_is_refused(coco: Path, capsys) -> None:
    command = ["--checkpoint", str(coco / "weights" / f"{RELEASED}.pth"), "--data_dir", str(coco)]
    assert demo.main([*command, "--ftype", "effnet"]) == 2
    assert "data_feats.npy: expected a file" in capsys.readouterr().err
    assert demo.main([*command, "--weights", f"dino={coco / 'none.pth'}"]) == 2
    assert "none.pth does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "prompt", "complaint"),
    [
        (None, "red circle", "Choose a picture first."),
        (b"no picture", "red circle", "picture: expected an image"),
        (png(Image.new("1", (9_000, 6_000))), "red circle", "picture: expected at most 50 megapixels"),
        (png(draw("red", "circle", "flat"))[:80], "red circle", "picture: expected"),
        (png(draw("red", "circle", "flat")), " \n", "Type the prompt"),
        (png(draw("red", "circle", "flat")), None, "Type the prompt"),
    ],
)
def test_mistakes_become_messages(world: World, content: bytes | None, prompt: str | None, complaint: str) -> None:
    text = None if content is None else "data:image/png;base64," + base64.b64encode(content).decode()
    status, *rest = views.show_upload(world, text, prompt)
    assert complaint in status and 'role="alert"' in status and set(rest) == {""}


def test_markup_in_a_prompt_is_text(world: World) -> None:
    text = as_text(draw("red", "circle", "flat"))
    _, shown, *_ = views.show_upload(world, text, '<script>alert(1)</script> "quoted"')
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "&quot;quoted&quot;" in shown


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("trainset/emoji.parquet", "python -m feature_extraction.emoji"),
        ("query_test/queries.parquet", "python -m abu.sample"),
        (
            "feats/pixel+minilm/data_feats.npy",
            "python -m feature_extraction.extract --mode emoji --ftype pixel+minilm",
        ),
        ("feats/pixel+minilm/manifest.json", "manifest.json"),
        ("ranker.pth", "train.py"),
        ("influence_test.npz", "influence_test.npz"),
    ],
)
def test_missing_artifact_exits_with_one_line(data: Path, tmp_path: Path, capsys, missing: str, complaint: str) -> None:
    copy = shutil.copytree(data, tmp_path / "emoji")
    (copy / missing).unlink()
    assert demo.main(flags(copy)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and missing in error and complaint in error


def test_artifacts_of_other_runs_are_refused(data: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(data, tmp_path / "emoji")
    write_ranker(copy / "narrow.pth", 768)
    assert demo.main(flags(copy, checkpoint=copy / "narrow.pth")) == 2
    assert "narrow.pth: expected a ranker of 1152-dimensional features" in capsys.readouterr().err
    manifest = copy / "feats" / "pixel+minilm" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pixels": 16', '"pixels": 8'))
    assert demo.main(flags(copy)) == 2
    assert "found others; redo: python -m feature_extraction.extract" in capsys.readouterr().err
    rank = load_npz(copy / "influence_test.npz", ("rank",))["rank"]
    np.savez(copy / "influence_test.npz", rank=rank[:2])
    shutil.copytree(data / "feats", copy / "feats", dirs_exist_ok=True)
    assert demo.main(flags(copy)) == 2
    assert f"influence_test.npz: expected {QUERIES} queries, found 2" in capsys.readouterr().err


def test_taken_port_exits_with_one_line(data: Path, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert demo.main(flags(data, port=taken.getsockname()[1])) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


def test_command_serves_until_sigterm(data: Path, capsys) -> None:
    """A request that is under way when the signal comes is answered; the command ends with 0."""
    port, answers = free_port(), []

    def visit_and_stop() -> None:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as reply:
                    answers.append(json.load(reply))
                break
            except OSError:
                time.sleep(0.05)
        body = json.dumps({"data": [0, 3]}).encode()
        call = f"http://127.0.0.1:{port}/gradio_api/call/query"
        request = urllib.request.Request(call, body, {"content-type": "application/json"})
        event = json.load(urllib.request.urlopen(request))["event_id"]
        os.kill(os.getpid(), signal.SIGTERM)
        answers.append(urllib.request.urlopen(f"{call}/{event}").read().decode())

    with ThreadPoolExecutor(1) as pool:
        visitor = pool.submit(visit_and_stop)
        assert demo.main(flags(data, port=port)) == 0
        visitor.result()
    assert answers[0]["status"] == "ok" and answers[0]["training_images"] == IMAGES
    assert "event: complete" in answers[1]
    told = capsys.readouterr()
    assert f"serving on http://127.0.0.1:{port}" in told.out
    lines = [json.loads(line) for line in told.err.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines if line["event"] in ("query", "stopped")] == ["query", "stopped"]
    assert lines[-1]["finished"] is True
