"""Limits on what a visitor may ask for; hostile pictures; the guard in front of the page, by hand-made ASGI calls."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import threading
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.guard import Guard, Service
from serving.limits import Limits, Rate, Turn, Workers, from_base64

LIMITS = Limits(upload_mb=1)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8) * 2).convert(mode)


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that say they are a picture of that size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_kinds_of_pictures_are_read_as_they_look() -> None:
    grey = np.asarray(gradient("L"), dtype=int)
    cmyk = encoded(gradient().convert("CMYK"), "JPEG", quality=95)
    sixteen = encoded(Image.fromarray((grey * 257).astype(np.uint16)), "PNG")
    frames = [gradient(), Image.new("RGB", (60, 40), "red")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    clear = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    for content, expected in (
        (encoded(gradient(), "PNG"), grey),
        (cmyk, grey),
        (sixteen, grey),
        (animated, grey),
        (encoded(clear, "WEBP", lossless=True), np.full((40, 60), 255)),
        (encoded(gradient("LA"), "PNG"), grey),
        (encoded(gradient("P"), "PNG"), grey),
    ):
        found = LIMITS.picture(content, "x")
        assert found.mode == "RGB" and found.size == (60, 40)
        assert np.abs(np.asarray(found.convert("L"), dtype=int) - expected).max() <= 6


def test_broken_exif_does_not_hide_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(gradient(), "JPEG", exif=exif)
    assert LIMITS.picture(turned, "x").size == (40, 60)
    at = turned.index(b"Exif\0\0") + 6
    for broken in (b"\xff" * 20, b"II*\0" + b"\xff" * 16, b"MM\0*\0\0\0\x08\xff\xff"):
        content = turned[:at] + broken + turned[at + len(broken) :]
        assert LIMITS.picture(content, "x").size in ((60, 40), (40, 60))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "expected an image"),
        (b"GIF89a", "expected an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected an image"),
        (huge_png(0, 5), "expected an image"),
        (huge_png(40_000, 40_000), "at most 50 megapixels"),
        (huge_png(9000, 6000), "at most 50 megapixels"),
        (huge_png(2**31 - 1, 2**31 - 1), "expected"),
        (huge_png(500, 500), "x: expected a whole image"),
        (encoded(gradient(), "PNG")[:-40], "x: expected a whole image"),
        (b"x" * 730_001, "x: expected at most 0.7 MB, found more"),
    ],
)
def test_what_is_no_picture_is_named(content: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LIMITS.picture(content, "x")


def test_damaged_pictures_are_pictures_or_mistakes() -> None:
    """Random damage to every format never raises anything but `ValueError`."""
    chance, outcomes = random.Random(0), set()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(gradient(), kind)
        for _ in range(60):
            content = bytearray(whole[: chance.randrange(8, len(whole) + 1)])
            for _ in range(chance.randrange(6)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            try:
                outcomes.add(LIMITS.picture(bytes(content), "x").mode)
            except ValueError as error:
                assert str(error).startswith("x: expected")
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


def test_numbers_and_texts_have_their_ranges() -> None:
    assert LIMITS.checked_k(5.0, 10) == 5 and LIMITS.checked_prompt("  red \n heart ") == "red heart"
    for k in (0, 11, -1, 2.5, float("inf"), float("nan"), True, "5", None):
        with pytest.raises(ValueError, match=r"k: expected a whole number from 1 to 10"):
            LIMITS.checked_k(k, 10)
    with pytest.raises(ValueError, match="from 1 to 1,000, found 1001"):
        LIMITS.checked_k(1001, 10**6)
    with pytest.raises(ValueError, match="at most 1,000 characters, found 100,000"):
        LIMITS.checked_prompt("x" * 100_000)
    assert from_base64("data:image/png;base64,QUI=") == from_base64("QUI=") == b"AB"
    for text in ("?", "QUI", "/etc/passwd", "ü", 5):
        with pytest.raises(ValueError, match="image: expected the picture's file as base64"):
            from_base64(text)
    with pytest.raises(ValueError, match="--max_k 0"):
        Limits(max_k=0)


def test_rate_fills_again() -> None:
    now = [0.0]
    rate = Rate(60, now=lambda: now[0])
    assert [rate.wait("a") for _ in range(60)] == [0.0] * 60
    assert rate.wait("a") == pytest.approx(1) and rate.wait("b") == 0
    now[0] = 2.0
    assert [rate.wait("a") > 0 for _ in range(3)] == [False, False, True]


def test_nobody_waits_for_ever() -> None:
    turn = Turn(0.01)
    with turn(), pytest.raises(ValueError, match="Too busy"), turn():
        pass
    with turn():
        pass


def test_work_is_given_up_on_and_keeps_its_thread() -> None:
    working, go = Workers(0.2, threads=1), threading.Event()
    assert working(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        working(lambda: 1 // 0)
    with pytest.raises(ValueError, match=r"Given up: the answer took longer than 0.2 seconds"):
        working(go.wait)
    with pytest.raises(ValueError, match="Too busy"):
        working(lambda: 5)
    go.set()
    assert working(lambda: 5) == 5


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the length of the body."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(message.get("body", b""))).encode()})


def call(
    service: Service, path: str = "/gradio_api/call/x", method: str = "POST", parts: Any = (b"{}",), **headers: str
):
    """(status, body) of one request."""
    kind = {"content_type": "application/json"} | headers
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in kind.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": pairs, "query_string": b"prompt=secret"}
    scope["client"] = ("10.0.0.1", 5)
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if messages:
        messages[-1]["more_body"] = False
    sent: list[Any] = []

    async def receive() -> Any:
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(echo, service)(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_guard_limits_requests() -> None:
    service = Service(Limits(upload_mb=0.001, requests_per_minute=12, timeout_s=0.5), lambda: {"images": 3})
    assert call(service, parts=[b'{"a"', b": 1}"]) == (200, b"8")
    assert call(service, parts=[b"[" + b"1," * 400, b"1]" * 400])[0] == 413
    assert call(service, content_length="1001")[0] == 413
    assert call(service, content_length="many")[0] == 413
    assert call(service, parts=[b"not json"])[0] == 400
    assert call(service, parts=[b"[" * 900])[0] == 400
    assert call(service, parts=[])[0] == 408
    assert call(service, method="GET", parts=[b""]) == (200, b"0")
    assert call(service, method="DELETE")[0] == 404
    assert call(service, parts=[b"{}"], content_type=" Application/JSON ; charset=utf-8") == (200, b"2")
    assert [call(service)[0] for _ in range(4)] == [200, 200, 200, 429]
    status, body = call(service, path="/health", method="GET")
    assert status == 200 and json.loads(body)["status"] == "ok" and json.loads(body)["images"] == 3
    assert json.loads(body)["under_way"] == 1 and json.loads(body)["served"] >= 13


@pytest.mark.parametrize(
    "kind", ["application/vnd.x+json", "text/plain", "multipart/form-data; boundary=x", "application/jsonx", ""]
)
def test_only_json_is_taken(kind: str) -> None:
    """Gradio would parse some of these as JSON, after the guard had not looked at it."""
    assert call(Service(LIMITS, dict), content_type=kind)[0] == 415


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/upload", "/gradio_api/component_server", "/gradio_api/run/x", "/gradio_api/stream/1", "/login"),
        *("/gradio_api/call/v2/x", "/gradio_api/process_recording", "/gradio_api/call/../upload"),
    ],
)
def test_nothing_else_is_offered(path: str) -> None:
    assert call(Service(LIMITS, dict), path)[0] == 404


@pytest.mark.parametrize("path", ["file=/etc/passwd", "file=http://127.0.0.1/", "proxy=http://x.hf.space/", "file/x"])
def test_no_file_or_address_is_read(path: str) -> None:
    assert call(Service(LIMITS, dict), f"/gradio_api/{path}", method="GET", parts=[b""])[0] == 404


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"data": [' + b"{}," * 300_000 + b"1]}", 413),
        (json.dumps({"data": ["x" * 900_000], "session_hash": "y"}).encode(), 200),
        (json.dumps({"data": [], "session_hash": "y" * 20_000}).encode(), 413),
        (json.dumps({"data": [{"path": "http://127.0.0.1:1/x"}]}).encode(), 400),
        (json.dumps({"data": [[{"a": [{"url": "http://127.0.0.1:1/x"}]}]]}).encode(), 400),
        (json.dumps({"data": [], "event_data": {"path": "/etc/passwd"}}).encode(), 400),
        (b"[1]", 400),
        (b'"text"', 400),
        (b"", 400),
        (b"\xff\xfe{}", 400),
        (b'{"data": [' + b"9" * 900_000 + b"]}", 400),
    ],
)
def test_json_is_small_around_one_picture(content: bytes, status: int) -> None:
    assert call(Service(LIMITS, dict), parts=[content])[0] == status


def test_requests_together_are_bounded() -> None:
    """Two halves of the same megabyte at once are too many; nothing is held afterwards, whatever happened."""
    service = Service(Limits(upload_mb=1, held_mb=0.5), dict)
    assert call(service, parts=[b'{"data": "', b"x" * 600_000, b'"}'])[0] == 503
    assert call(service, parts=[b"not json"])[0] == 400
    assert call(service)[0] == 200 and service.held == 0


def test_log_has_no_prompts(caplog) -> None:
    service = Service(Limits(), dict)
    with caplog.at_level("INFO", "serving"):
        call(service, parts=[b'{"data": ["secret"]}'])
    assert "secret" not in caplog.text
    (line,) = (json.loads(record.message) for record in caplog.records)
    assert line["status"] == 200 and line["client"] == "10.0.0.1" and line["bytes"] == 2 and line["event"] == "request"


def test_stopping_waits_for_what_is_under_way() -> None:
    service = Service(Limits(grace_s=5), dict)
    service.begin()
    threading.Timer(0.2, service.end).start()
    assert service.finish(quiet=0.1) is True and service.under_way == 0
    assert call(service)[0] == 503 and call(service, method="GET", parts=[b""])[0] == 200
    status, body = call(service, path="/health", method="GET")
    assert status == 503 and json.loads(body)["status"] == "stopping"
    late = Service(Limits(grace_s=0.2), dict)
    late.begin()
    assert late.finish(quiet=0.1) is False


def test_base64_of_a_file_is_the_file() -> None:
    content = encoded(gradient(), "PNG")
    assert from_base64(base64.b64encode(content).decode()) == content
