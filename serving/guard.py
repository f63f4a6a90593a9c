"""What stands between the network and the page: /health, limits on requests, the log, and an orderly end.

An ASGI middleware. A request that asks for work is read whole, within its limits of size and time, before anything
behind sees it, and must be small JSON around at most one picture as text: Gradio's ways to upload a file, to name one
of the server's or to have it fetch an address are not offered. What is logged is one JSON object a line: times,
addresses, statuses and sizes, never a prompt, a picture or a query string.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from serving.limits import Limits, Rate

LOG = logging.getLogger("serving")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
API = "/gradio_api/"
HEARTBEAT = f"{API}heartbeat"
"""Open for as long as a page is; not waited for at the end."""
POSTED = re.compile(rf"{API}(call/\w+|queue/join|cancel|reset)/?")
"""What may be asked of Gradio by POST: calls, and no longer waiting for them."""
HIDDEN = tuple(API + name for name in ("file", "proxy", "upload", "deep_link", "stream"))
"""What may not be read: Gradio gives out its own files there, or fetches addresses."""
MARKS, LONG = 10_000, 10_000
"""Commas, colons and brackets of a JSON body, and characters of a text in it that is not among the data. Base64 has no
such marks, so a picture of any size passes; 8 MB of `{},{},...` would take 400 MB to parse."""
COLLECT_S = 5.0
"""Seconds that a finished answer waits for its visitor after SIGTERM."""


class Refused(Exception):
    """A request that is answered with an error at once."""

    def __init__(self, status: int, reason: str, retry: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.retry = retry


@dataclass(frozen=True)
class Jobs:
    """Work that was accepted by one request and is fetched by a later one."""

    unfinished: int = 0
    """Jobs that wait for their turn or are at work."""
    uncollected: int = 0
    """Visitors whose answers are ready and have not been fetched."""


class Service:
    """What the running server is doing, and whether it should end."""

    def __init__(self, limits: Limits, facts: Callable[[], dict[str, Any]]) -> None:
        """`facts` gives what /health tells besides; whoever keeps a queue of jobs sets `jobs`."""
        self.limits = limits
        self.facts = facts
        self.rate = Rate(limits.requests_per_minute)
        self.stopping = threading.Event()
        self.jobs: Callable[[], Jobs] = Jobs
        self.held = 0
        self._started = time.monotonic()
        self._under_way = 0
        self._done = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """One more request under way."""
        with self._lock:
            self._under_way += 1

    def end(self) -> None:
        """One less."""
        with self._lock:
            self._under_way -= 1
            self._done += 1

    @property
    def under_way(self) -> int:
        """Requests that have not been answered."""
        return self._under_way

    def health(self) -> dict[str, Any]:
        """The answer of /health."""
        status = "stopping" if self.stopping.is_set() else "ok"
        told = {"status": status, "seconds": round(time.monotonic() - self._started, 1), "under_way": self._under_way}
        return {**told, "jobs": self.jobs().unfinished, "served": self._done, **self.facts()}

    def finish(self, quiet: float = 0.5, step: float = 0.05) -> bool:
        """Refuses new work and waits until all that was accepted is answered; whether that came in time.

        That is when no request was under way and no job unfinished for `quiet` seconds, or for `COLLECT_S` where
        answers have not been fetched.
        """
        self.stopping.set()
        end, idle = time.monotonic() + self.limits.grace_s, 0.0
        while time.monotonic() < end:
            jobs = self.jobs()
            idle = 0.0 if self._under_way or jobs.unfinished else idle + step
            if idle >= (COLLECT_S if jobs.uncollected else quiet):
                return True
            time.sleep(step)
        return False


class Guard:
    """The middleware."""

    def __init__(self, app: App, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, answer = time.perf_counter(), {"status": 0, "bytes": 0}

        async def noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
            else:
                answer["bytes"] += len(message.get("body", b""))
            await send(message)

        waited_for = not scope["path"].startswith(HEARTBEAT)
        if waited_for:
            self.service.begin()
        try:
            await self._serve(scope, receive, noted)
        except Refused as refused:
            headers = {"retry-after": str(1 + int(refused.retry))} if refused.retry else {}
            await reply(noted, refused.status, {"error": str(refused)}, headers)
        finally:
            if waited_for:
                self.service.end()
            log(
                "request",
                client=client_of(scope),
                method=scope["method"],
                path=scope["path"][:200],
                seconds=round(time.perf_counter() - start, 4),
                **answer,
            )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        if scope["path"] == "/health":
            health = service.health()
            await reply(send, 200 if health["status"] == "ok" else 503, health)
            return
        if scope["path"].startswith(HIDDEN):
            raise Refused(404, "Not offered here.")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        if service.stopping.is_set():
            raise Refused(503, "The server is stopping.", 5)
        if wait := service.rate.wait(client_of(scope)):
            raise Refused(429, f"Too many requests: at most {service.limits.requests_per_minute} a minute.", wait)
        if scope["method"] != "POST" or not POSTED.fullmatch(scope["path"]):
            await self._discard(receive)
            raise Refused(404, "Not offered here.")
        if kinds_of(scope) != [b"application/json"]:
            await self._discard(receive)
            raise Refused(415, "Expected the content type application/json.")
        parts: list[bytes] = []
        try:
            await self._read(scope, receive, parts)
            body = b"".join(parts)
            # in a thread, because /health is to be answered meanwhile
            await asyncio.to_thread(check_json, body)
            given = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def replay() -> MutableMapping[str, Any]:
                return next(given, None) or await receive()

            await self.app(scope, replay, send)
        finally:
            service.held -= sum(map(len, parts))

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> None:
        """Adds the body to `parts` and to what the service holds.

        `Refused` if it is too long, announced or not, does not arrive in time, or too much is held already.
        """
        service, limits, size = self.service, self.service.limits, 0
        too_long = Refused(413, f"Expected at most {limits.upload_mb:g} MB.")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > limits.largest:
            await self._discard(receive)
            raise too_long
        try:
            async with asyncio.timeout(limits.timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "The request ended early.")
                    part, more = message.get("body", b""), bool(message.get("more_body"))
                    size += len(part)
                    if size > limits.largest or service.held + len(part) > limits.most_held:
                        if more:
                            await self._discard(receive)
                        busy = Refused(503, "Too busy: too many large requests at once. Try again.", 5)
                        raise too_long if size > limits.largest else busy
                    parts.append(part)
                    service.held += len(part)
        except TimeoutError:
            raise Refused(408, f"The request did not arrive within {limits.timeout_s:g} seconds.") from None

    async def _discard(self, receive: Receive) -> None:
        """Reads on, up to twice the limit: a client that is still sending would see a broken pipe and no answer."""
        left = 2 * self.service.limits.largest
        with suppress(TimeoutError):
            async with asyncio.timeout(self.service.limits.timeout_s):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return


def kinds_of(scope: Scope) -> list[bytes]:
    """The content types that a request states, without their parameters."""
    found = [value for name, value in scope["headers"] if name == b"content-type"]
    return [value.partition(b";")[0].strip().lower() for value in found]


def check_json(body: bytes) -> None:
    """`Refused` if the body is no JSON object, has too many parts, or names a file, which the server would open.

    Only the elements of `data` may be long texts: of the rest, Gradio keeps some for as long as it runs.
    """
    if sum(body.count(mark) for mark in (b",", b":", b"[", b"{")) > MARKS:
        raise Refused(413, f"Expected JSON of at most {MARKS:,} parts.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "Expected JSON.") from None
    if not isinstance(content, dict):
        raise Refused(400, "Expected a JSON object.")
    if any(isinstance(value, str) and len(value) > LONG for value in content.values()):
        raise Refused(413, f"Expected at most {LONG:,} characters outside of data.")
    waiting = list(content.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            if value.keys() & {"path", "url", "meta"}:
                raise Refused(400, "Expected a picture as base64 text, found the name of a file.")
            waiting += value.values()


async def reply(send: Send, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    """A whole JSON response."""
    body = json.dumps(content).encode()
    listed = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in listed.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def client_of(scope: Scope) -> str:
    """The address that a request comes from. What a proxy says of others is not believed."""
    return scope["client"][0] if scope.get("client") else "unknown"


def log(event: str, **fields: Any) -> None:
    """One line of the log."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    LOG.info(json.dumps({"time": now, "event": event, **fields}))
