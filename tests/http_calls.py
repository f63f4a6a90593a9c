"""Requests to a running server, as curl would make them."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any

from PIL import Image
from small_world import png


def get(url: str) -> tuple[int, str]:
    """(status, text) of a page."""
    return send(urllib.request.Request(url))


def send(request: urllib.request.Request) -> tuple[int, str]:
    """(status, text) of the answer to any request, an error's too."""
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def post_bytes(url: str, body: bytes, **headers: str) -> tuple[int, str]:
    """(status, text) of the answer to any body; of JSON, unless `content_type` says otherwise."""
    named = {name.replace("_", "-"): value for name, value in ({"content_type": "application/json"} | headers).items()}
    return send(urllib.request.Request(url, body, named))


def post(url: str, content: Any) -> Any:
    """The JSON answer to JSON; `HTTPError` where it is refused."""
    request = urllib.request.Request(url, json.dumps(content).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def submit(url: str, name: str, *data: Any) -> str:
    """Where the answer of a call will be."""
    return f"{url}/gradio_api/call/{name}/" + post(f"{url}/gradio_api/call/{name}", {"data": list(data)})["event_id"]


def fetch(place: str) -> tuple[str, Any]:
    """(event, data) of a call that was submitted."""
    status, text = get(place)
    assert status == 200, text
    lines = [line.partition(": ")[2] for line in text.strip().splitlines() if line]
    return lines[-2], json.loads(lines[-1])


def call(url: str, name: str, *data: Any) -> tuple[str, Any]:
    """(event, data) of one call, in two requests as with curl."""
    return fetch(submit(url, name, *data))


def as_text(picture: Image.Image) -> str:
    """Base64 of a picture's PNG file."""
    return base64.b64encode(png(picture)).decode()
