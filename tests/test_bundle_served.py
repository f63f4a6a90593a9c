"""A served bundle: what is removed from its index is in no answer from then on; what is not at hand is not shown."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_world import free_port, served
from http_calls import as_text, call, fetch, get, submit
from small_world import draw, png, write_bundle, write_rankings

import demo
from fastgda.core import ROOT
from fastgda.index import Index
from fastgda.index.__main__ import main as index_command
from serving import page, views
from serving.limits import Limits
from serving.world import World

IMAGES, QUERIES, TOP = 36, 4, 8
PICTURE, PROMPT = draw("red", "circle", "flat"), "red circle, flat style"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a bundle of its features; the last training picture cannot be read."""
    folder = tmp_path_factory.mktemp("world") / "emoji"
    write_bundle(folder, IMAGES)
    write_rankings(folder, IMAGES, QUERIES)
    return folder


@pytest.fixture
def bundle(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data / "bundle", tmp_path / "bundle")


def load(bundle: Path, data: Path | None) -> World:
    config = demo.DemoConfig(bundle=bundle, data_dir=data, topk=TOP, source_model=bundle / "none")
    return demo.load_world(config, Limits(requests_per_minute=100_000))


def test_a_bundle_answers_as_its_data_folder_does(bundle: Path, data: Path) -> None:
    world, folder = load(bundle, data), demo.DemoConfig(data / "ranker.pth", "pixel", data, topk=TOP)
    other = demo.load_world(folder)
    for query in range(QUERIES):
        mine: Any = world.stored(query, TOP)
        plain: Any = other.stored(query, TOP)
        assert mine.tuned.ids[:TOP].tolist() == plain.tuned.ids[:TOP].tolist()
        assert mine.untuned.ids.tolist() == plain.untuned.ids.tolist()
        readable = [image for image in world.teacher.rank[query].tolist() if image != IMAGES - 1]
        assert [one.known["id"] for one in mine.judged[:TOP]] == readable[:TOP]
        assert np.allclose(mine.distances[:TOP], plain.distances[:TOP], atol=1e-5)
        assert sum(mine.truth.values()) == pytest.approx(1)
    told = json.dumps(page.Api(world).query(1, 5))
    assert '"path"' not in told and str(data) not in told
    assert views.show_query(world, 1)[4].count("<img") == TOP


def test_without_a_data_folder_pictures_are_attributed_all_the_same(bundle: Path, data: Path) -> None:
    world = load(bundle, None)
    tab, *_, shown = views.show_address(world, {})
    assert tab == "upload" and "Upload a picture" in shown[0]
    with served(world) as (url, _):
        event, (told,) = call(url, "attribute", as_text(PICTURE), PROMPT, 5)
        assert event == "complete" and told["untuned"] == [] and told["shares"]
        expected: Any = load(bundle, data).answer(PICTURE, PROMPT, 5)
        assert [entry["id"] for entry in told["images"]] == expected.tuned.ids[:5].tolist()
        assert told["images"][0]["licence"] == "CC0-1.0" and "distance" not in told["images"][0]
        event, mistake = call(url, "query", 0, 5)
        assert event == "error" and "no stored queries" in json.dumps(mistake)
        config = json.loads(get(f"{url}/config")[1])
        hidden = {part["props"].get("label") for part in config["components"] if part["props"].get("visible") is False}
        assert {"Stored", "Generate"} <= hidden
    text = "data:image/png;base64," + base64.b64encode(png(PICTURE)).decode()
    _, shown_picture, _, _, tuned, untuned, _ = views.show_upload(world, text, PROMPT)
    assert "<img" in shown_picture and tuned.count("<figure") == TOP and "<img" not in tuned and untuned == ""


def ids_in(answer: Any) -> set[int]:
    """All training images that an answer of the API names."""
    return {entry["id"] for name in ("images", "untuned") for entry in answer[name]}


@pytest.mark.parametrize("which", ["id", "creator"])
def test_what_is_removed_is_in_no_answer_from_then_on(bundle: Path, data: Path, which: str) -> None:
    """Under a running server that six clients ask without pause; the removal is another process's command."""
    world = load(bundle, data)
    first = world.stored(1, TOP)
    gone = {int(first.tuned.ids[0])} if which == "id" else set(range(18, IMAGES))  # those of "outline studio"
    option = ["--ids", str(next(iter(gone)))] if which == "id" else ["--creator", "outline studio"]
    captions = {world.images.caption(image) for image in gone}
    begun, found = itertools.count(), []
    removed, stop = threading.Event(), threading.Event()

    def pages() -> set[int]:
        shown = views.show_query(world, 1)
        named = {name for name in captions if f">{name}<" in "".join(shown[4:])}
        return {image for image in gone if world.images.caption(image) in named}

    def ask(url: str) -> None:
        ways: list[Callable[[], set[int]]] = [
            lambda: ids_in(call(url, "query", 1, TOP)[1][0]),
            lambda: ids_in(call(url, "attribute", as_text(PICTURE), PROMPT, TOP)[1][0]),
            pages,
        ]
        while not stop.is_set():
            after, way = removed.is_set(), next(begun) % 3
            found.append((after, way, bool(ways[way]() & gone)))

    with served(world) as (url, _), ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(ask, url) for _ in range(6)]
        while len(found) < 12:
            stop.wait(0.02)
        assert index_command(["remove", str(bundle / "index"), *option]) == 0
        removed.set()
        asked = len(found)
        while len(found) < asked + 30:
            stop.wait(0.02)
        stop.set()
        for client in clients:
            client.result()
        told = call(url, "query", 1, TOP)[1][0]
    assert any(seen for after, _, seen in found if not after), "it was there before"
    assert {way for after, way, _ in found if after} == {0, 1, 2}
    assert not any(seen for after, _, seen in found if after)
    assert told["method"]["training_images"] == IMAGES - 1 - len(gone - {IMAGES - 1})
    if which == "creator":
        assert {share["creator"] for share in told["shares"]} == set(told["teacher_shares"]) == {"flat studio"}


def test_an_answer_under_way_when_an_image_is_removed_is_made_anew(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image goes after all lists were found, while its picture is drawn."""
    world, drawn = load(bundle, data), []
    first = int(world.stored(1, TOP).tuned.ids[0])
    original = views.shown

    def slow(world: World, answer: Any) -> views.Shown:
        said = original(world, answer)
        drawn.append(first in answer.ids)
        if len(drawn) == 1:
            Index(bundle / "index").remove(np.array([first]), command="opt-out")
        return said

    monkeypatch.setattr(views, "shown", slow)
    views.show_query(world, 1)
    assert drawn == [True, False]


def test_what_is_left_is_shown_until_nothing_is(bundle: Path, data: Path) -> None:
    world = load(bundle, data)
    index = Index(bundle / "index")
    index.remove(np.arange(IMAGES - 4), command="opt-out")
    answer: Any = world.stored(1, TOP)
    assert sorted(answer.tuned.ids) == sorted(answer.untuned.ids) == [IMAGES - 4, IMAGES - 3, IMAGES - 2]
    assert {one.known["id"] for one in answer.judged} == set(answer.tuned.ids.tolist())
    with pytest.raises(ValueError, match="k: expected a whole number from 1 to 3"):
        page.Api(world).query(1, 4)
    index.remove(np.arange(IMAGES - 4, IMAGES - 1), command="opt-out")
    assert "No training image is left" in views.show_upload(world, as_text(PICTURE), PROMPT)[0]


def test_data_of_another_bundle_is_refused(bundle: Path, data: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(data, tmp_path / "emoji")
    features = np.load(copy / "feats" / "pixel" / "data_feats.npy")
    np.save(copy / "feats" / "pixel" / "data_feats.npy", features[:, ::-1])
    assert demo.main(["--bundle", str(bundle), "--data_dir", str(copy)]) == 2
    assert f"data_feats.npy: expected the features that {bundle} was built from" in capsys.readouterr().err
    assert demo.main(["--bundle", str(bundle), "--checkpoint", str(data / "ranker.pth")]) == 2
    assert "--bundle: expected no --checkpoint" in capsys.readouterr().err
    assert demo.main(["--bundle", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_a_process_that_is_terminated_answers_all_that_it_accepted(bundle: Path, data: Path) -> None:
    """Eight clients wait for different pictures when the signal comes; each gets its own answer, then all is over."""
    pictures = [draw(colour, shape, "flat") for colour in ("red", "blue") for shape in ("circle", "square")] * 2
    expected = [load(bundle, None).answer(picture, PROMPT, 5).tuned.ids[:5].tolist() for picture in pictures]
    assert len({tuple(ids) for ids in expected}) == 4
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "demo.py", "--bundle", str(bundle), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and f"serving on {url}" in process.stdout.readline()
        places = [submit(url, "attribute", as_text(picture), PROMPT, 5) for picture in pictures]
        process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor(len(places)) as clients:
            answers = list(clients.map(fetch, places))
        _, errors = process.communicate(timeout=60)
    assert [[entry["id"] for entry in told["images"]] for _, (told,) in answers] == expected
    assert process.returncode == 0
    last = json.loads(errors.splitlines()[-1])
    assert (last["event"], last["finished"], last["unfinished"], last["uncollected"]) == ("stopped", True, 0, 0)
    with pytest.raises(OSError, match="refused"):
        get(f"{url}/health")
