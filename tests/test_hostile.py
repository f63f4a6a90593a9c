"""Fuzz over HTTP: whatever is sent, the server stays up, answers /health, and tells no path."""

from __future__ import annotations

import base64
import json
import random
import socket
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from demo_world import load, served, write_world
from http_calls import as_text, call, get, post_bytes
from PIL import Image
from small_world import draw, png
from test_limits import gradient, huge_png

from serving.limits import Limits
from serving.world import World

CALLS = ("attribute", "generate", "query")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = write_world(tmp_path_factory.mktemp("world") / "emoji")
    return load(folder, Limits(upload_mb=2, requests_per_minute=100_000, timeout_s=10))


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    with served(world) as (address, _):
        yield address


@pytest.fixture(autouse=True)
def still_well(url: str) -> Iterator[None]:
    """After each test the server is up and answers a plain request as ever."""
    yield
    status, text = get(f"{url}/health")
    assert status == 200 and json.loads(text)["status"] == "ok"
    event, (told,) = call(url, "attribute", as_text(draw("red", "circle", "flat")), "red circle", 3)
    assert event == "complete" and len(told["images"]) == 3


def tells_no_path(text: str, world: World) -> bool:
    """Whether an answer names neither the data folder, nor the code, nor a temporary file, nor a line of it."""
    places = (str(Path(world.images.path).parent.parent), str(Path(__file__).parent.parent), "/tmp/", "Traceback")
    return not any(place in text for place in places)


def hostile_pictures() -> Iterator[bytes]:
    """Damaged, truncated and boastful files of all formats, and noise."""
    chance = random.Random(1)
    for kind in FORMATS:
        out = BytesIO()
        gradient().save(out, kind)
        for _ in range(8):
            content = bytearray(out.getvalue()[: chance.randrange(4, out.tell() + 1)])
            for _ in range(chance.randrange(8)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            yield bytes(content)
    yield from (huge_png(40_000, 40_000), huge_png(2**31 - 1, 2**31 - 1), huge_png(0, 5), huge_png(7000, 7000))
    # few bytes that are many pixels, though not too many
    yield png(Image.new("1", (7000, 7000)))
    yield from (chance.randbytes(chance.randrange(2000)) for _ in range(20))


def test_hostile_pictures_are_answered(url: str, world: World) -> None:
    events = set()
    for content in hostile_pictures():
        event, told = call(url, "attribute", base64.b64encode(content).decode(), "x", 3)
        assert tells_no_path(json.dumps(told), world)
        assert event == "complete" or "expected" in json.dumps(told), told
        events.add(event)
    assert events == {"complete", "error"}


def value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON."""
    kinds = 8 if depth < 3 else 6
    return (
        lambda: None,
        lambda: chance.random() < 0.5,
        lambda: chance.choice([0, -1, 2**63, 10**30, 1e308, float("nan"), float("inf"), -0.0]),
        lambda: chance.choice(["", "x" * 5000, "\ud800", "\0", "../../etc/passwd", "http://127.0.0.1:1/", "<b>", "ÿ"]),
        lambda: as_text(draw("red", "circle", "flat")),
        lambda: {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        lambda: [value(chance, depth + 1) for _ in range(chance.randrange(4))],
        lambda: {chance.choice("abcd"): value(chance, depth + 1) for _ in range(chance.randrange(4))},
    )[chance.randrange(kinds)]()


def test_any_json_is_answered(url: str, world: World) -> None:
    chance, statuses = random.Random(2), set()
    for _ in range(150):
        name, data = chance.choice(CALLS), [value(chance) for _ in range(chance.randrange(5))]
        status, text = post_bytes(f"{url}/gradio_api/call/{name}", json.dumps({"data": data}).encode())
        statuses.add(status)
        assert status < 500 or "error" in text
        assert tells_no_path(text, world)
        if status == 200:
            status, text = get(f"{url}/gradio_api/call/{name}/{json.loads(text)['event_id']}")
            assert status == 200 and text.startswith(("event: complete", "event: error")), text
            assert tells_no_path(text, world) and "root:" not in text
    assert {200, 400} <= statuses


def test_broken_bodies_are_answered(url: str, world: World) -> None:
    chance, whole = random.Random(3), json.dumps({"data": [1, 3], "session_hash": "s", "fn_index": 2}).encode()
    for path in ("call/query", "call/nothing", "queue/join", "cancel", "reset", "upload", "run/query", "call/v2/query"):
        for _ in range(15):
            body = bytearray(whole[: chance.randrange(len(whole) + 1)])
            for _ in range(chance.randrange(4)):
                body[chance.randrange(len(body) + 1) :] = chance.randbytes(chance.randrange(20))
            status, text = post_bytes(f"{url}/gradio_api/{path}", bytes(body))
            assert 200 <= status < 600 and tells_no_path(text, world)


def test_addresses_that_lead_out_are_not_followed(url: str, world: World) -> None:
    for path in (
        "%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "\\..\\x",
        "x%00",
        "http://127.0.0.1:1/",
        "%ff%fe",
        "~root",
    ):
        for root in (
            "",
            "gradio_api/",
            "gradio_api/file=",
            "gradio_api/file/",
            "gradio_api/proxy=",
            "static/",
            "assets/",
        ):
            status, text = get(f"{url}/{root}{path}")
            assert status >= 400 or "root:" not in text
            assert tells_no_path(text, world), f"{root}{path}"


def test_what_is_not_even_http_is_survived(url: str) -> None:
    chance, place = random.Random(4), urlsplit(url)
    for sent in (
        *(chance.randbytes(200) for _ in range(10)),
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /gradio_api/call/query HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /gradio_api/call/query HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((place.hostname, place.port), timeout=5) as line:
            line.sendall(sent)
