"""The HTTP API of a running server: answers, mistakes, concurrency, and what it must never give away."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio_client
import numpy as np
import pytest
from demo_world import IMAGES, QUERIES, load, served, write_world
from http_calls import as_text, call, get, post_bytes
from PIL import Image
from small_world import COLOURS, SHAPES, draw

from fastgda.core import ROOT
from serving.limits import Limits
from serving.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = write_world(tmp_path_factory.mktemp("world") / "emoji")
    return load(folder, Limits(upload_mb=2, requests_per_minute=10_000))


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    with served(world) as (address, _):
        yield address


def test_attribute_answers_what_the_world_does(url: str, world: World) -> None:
    picture, prompt = draw("orange", "triangle", "outline"), "orange triangle, outline style"
    event, (told,) = call(url, "attribute", as_text(picture), prompt, 5)
    expected: Any = world.answer(picture, prompt, 5)
    assert event == "complete"
    assert [entry["id"] for entry in told["images"]] == expected.tuned.ids[:5].tolist()
    assert [entry["id"] for entry in told["untuned"]] == expected.untuned.ids.tolist()
    assert told["images"][0]["licence"] == "CC0-1.0" and "path" not in told["images"][0]
    assert told["images"][0]["distance"] == pytest.approx(float(expected.distances[0]), abs=1e-5)
    assert [share["share"] for share in told["shares"]] == pytest.approx([s.share for s in expected.shares])
    assert {"encode", "embed", "search", "metadata"} == told["milliseconds"].keys() and told["query"] is None
    assert told["method"]["training_images"] == IMAGES and len(told["caveats"]) == 3


def test_curl_of_the_readme_sends_a_picture_of_any_size(url: str, tmp_path: Path) -> None:
    """The example as it stands there, with a picture longer than a command line may be."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "heart.png")
    assert (tmp_path / "heart.png").stat().st_size > 200_000
    (example,) = re.findall(r"```bash\n(EVENT=.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = example.replace("localhost:7860", url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("event: complete") and '"red heart, noto style"' in done.stdout, done.stderr


def test_python_client_generates_and_asks_for_stored_queries(url: str, world: World) -> None:
    client = gradio_client.Client(url, verbose=False)
    told = client.predict("a heart", 7, 3, api_name="/generate")
    expected = world.generated("a heart", 7, 3)
    picture = Image.open(BytesIO(base64.b64decode(told["image"])))
    assert picture.tobytes() == expected.image.tobytes() and told["seed"] == 7
    assert [entry["id"] for entry in told["images"]] == expected.tuned.ids[:3].tolist()
    stored = client.predict(2, 4, api_name="/query")
    assert stored["query"] == 2 and stored["teacher_shares"] == pytest.approx(world.stored(2, 4).truth)
    with pytest.raises(ValueError):
        client.predict("x", api_name="/lambda")


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("attribute", (as_text(draw("red", "circle", "flat")), "x" * 100_000, 5), "at most 1,000 characters"),
        ("attribute", (as_text(draw("red", "circle", "flat")), "x", 0), "k: expected a whole number from 1 to 36"),
        ("attribute", (as_text(draw("red", "circle", "flat")), "x", IMAGES + 1), "k: expected"),
        ("attribute", ("/etc/passwd", "x", 5), "expected the picture's file as base64"),
        ("attribute", (base64.b64encode(b"no picture").decode(), "x", 5), "image: expected an image"),
        ("attribute", (None, "x", 5), "expected the picture's file as base64"),
        ("generate", ("a heart", -1, 5), "seed: expected"),
        ("generate", ("", 1, 5), "Type the prompt"),
        ("query", (QUERIES, 5), "query: expected a number from 0 to 3"),
        ("query", (1.5, 5), "query: expected a number from 0 to 3"),
        ("generate", ([1], 1, 5), "prompt: expected text"),
        ("generate", ("a heart", "x" * 10_000, 5), "seed: expected"),
    ],
)
def test_mistakes_are_told(url: str, name: str, data: tuple, complaint: str) -> None:
    event, told = call(url, name, *data)
    assert event == "error" and complaint in json.dumps(told)


def test_answers_are_never_mixed_up(url: str, world: World) -> None:
    """Eighteen pictures from eight clients at once: each gets its own answer."""
    pictures = [(draw(colour, shape, "flat"), f"{colour} {shape}") for colour in COLOURS for shape in SHAPES]
    alone = [world.answer(picture, prompt, 6).tuned.ids[:6].tolist() for picture, prompt in pictures]

    def ask(number: int) -> tuple[str, list[int]]:
        picture, prompt = pictures[number]
        event, told = call(url, "attribute", as_text(picture), prompt, 6)
        return told[0]["prompt"], [entry["id"] for entry in told[0]["images"]] if event == "complete" else []

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(len(pictures))))
    assert found == [(prompt, ids) for (_, prompt), ids in zip(pictures, alone, strict=True)]


def test_no_file_of_the_server_is_read(url: str, world: World) -> None:
    secret = str(Path(world.images.path))
    for path in ("/etc/passwd", secret, "pyproject.toml", "../pyproject.toml", f"{url}/health"):
        status, text = get(f"{url}/gradio_api/file={path}")
        assert status == 404 and path not in text
        given = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"):
            body = json.dumps({"data": [given, "x", 5]}).encode()
            status, text = post_bytes(f"{url}/gradio_api/call/attribute", body, content_type=kind)
            assert status in (400, 415) and path not in text


def test_nothing_is_left_on_the_disk(url: str) -> None:
    """There is no upload; Gradio's answered with the path of the file on the server."""
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.html"\r\n\r\n<b>\r\n--b--\r\n'
    status, text = post_bytes(f"{url}/gradio_api/upload", form, content_type="multipart/form-data; boundary=b")
    assert status == 404 and "x.html" not in text and "/tmp" not in text


def test_clients_cannot_choose_their_address(world: World) -> None:
    with served(replace(world, limits=Limits(requests_per_minute=3))) as (url, _):
        sent = [
            post_bytes(f"{url}/gradio_api/call/query", b'{"data": [1, 3]}', x_forwarded_for=f"10.0.0.{number}")[0]
            for number in range(5)
        ]
        assert sent == [200, 200, 200, 429, 429]


def test_health_is_answered_beside_a_large_body(url: str) -> None:
    body = b'{"data": [' + b"{}," * 500_000 + b"1]}"
    with ThreadPoolExecutor(4) as pool:
        large = [pool.submit(post_bytes, f"{url}/gradio_api/call/query", body) for _ in range(4)]
        assert get(f"{url}/health")[0] == 200
        assert {reply.result()[0] for reply in large} == {413}


def test_only_the_api_is_offered_and_no_path_is_told(url: str, world: World) -> None:
    offered = json.loads(get(f"{url}/gradio_api/info")[1])
    assert offered["named_endpoints"].keys() == {"/attribute", "/generate", "/query"}
    assert offered["unnamed_endpoints"] == {}
    told = json.dumps([call(url, "query", 1, 3), offered, get(f"{url}/config"), get(f"{url}/")])
    assert str(Path(world.images.path).parent.parent) not in told


def test_too_large_requests_are_refused_and_the_server_stays_up(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="413"):
        call(url, "attribute", "A" * 2_100_000, "x", 5)
    status, text = get(f"{url}/health")
    assert status == 200 and json.loads(text)["status"] == "ok"
