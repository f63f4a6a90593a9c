"""The running service as a whole: what is accepted is answered, also when the server is told to stop."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from demo_world import QUERIES, load, served, write_world
from http_calls import call, fetch, get, post_bytes, submit

from serving.guard import Jobs
from serving.limits import Limits, Workers
from serving.world import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "emoji")


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return load(folder, Limits(requests_per_minute=10_000))


class Slow:
    """An encoder that takes its time."""

    def __init__(self, encoder: Any, seconds: float) -> None:
        self.encoder, self.seconds = encoder, seconds
        self.reads_images = self.reads_captions = True
        self.name, self.dim, self.network = encoder.name, encoder.dim, None

    def encode(self, images: list, captions: list[str]) -> Any:
        time.sleep(self.seconds)
        return self.encoder.encode(images, captions)


def until(true: Callable[[], bool]) -> None:
    """Waits until something is so."""
    for _ in range(600):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def test_stopping_waits_for_jobs_that_nobody_asks_after_yet(world: World) -> None:
    """Two jobs were accepted and no request is open: both are finished, and fetched late."""
    with served(replace(world, encoder=Slow(world.encoder, 1.0))) as (url, service), ThreadPoolExecutor(1) as pool:
        places = [submit(url, "query", number, 3) for number in (1, 2)]
        until(lambda: service.under_way == 0)
        assert service.health()["jobs"] == 2
        end = pool.submit(service.finish)
        until(lambda: service.jobs().unfinished == 0)
        assert service.jobs().uncollected == 2 and not end.done()
        answers = [fetch(place) for place in places]
        assert end.result() is True and service.jobs().uncollected == 0
    assert [(event, told[0]["query"]) for event, told in answers] == [("complete", 1), ("complete", 2)]


def test_stopping_gives_up_on_work_that_takes_too_long(world: World) -> None:
    slow = replace(world, encoder=Slow(world.encoder, 2.0), limits=Limits(grace_s=0.5))
    with served(slow) as (url, service):
        submit(url, "query", 1, 3)
        assert service.finish() is False and service.jobs().unfinished == 1


def test_answers_that_nobody_fetches_do_not_hold_up_the_end_for_long(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.guard.COLLECT_S", 1.0)
    with served(world) as (url, service):
        submit(url, "query", 1, 3)
        until(lambda: service.jobs().unfinished == 0)
        assert service.finish() is True and service.jobs().uncollected == 1


def test_work_that_takes_too_long_is_answered(world: World) -> None:
    slow = replace(world, encoder=Slow(world.encoder, 1.5), working=Workers(0.3))
    with served(slow) as (url, _):
        event, told = call(url, "query", 1, 3)
        assert event == "error" and "took longer than 0.3 seconds" in json.dumps(told)
        assert get(f"{url}/health")[0] == 200


def ask(url: str, number: int) -> tuple[int, str]:
    """(status, where the answer will be, or why not) of one stored query."""
    status, text = post_bytes(f"{url}/gradio_api/call/query", json.dumps({"data": [number, 3]}).encode())
    return status, f"{url}/gradio_api/call/query/{json.loads(text)['event_id']}" if status == 200 else text


def answers(accepted: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(stored query asked for, stored query answered) of what was accepted."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: fetch(pair[1]), accepted))
    assert {event for event, _ in found} <= {"complete"}
    return [(number, told[0]["query"]) for (number, _), (_, told) in zip(accepted, found, strict=True)]


def test_load_is_answered_refused_or_told_to_come_again(world: World) -> None:
    """Sixty requests at once from one client that may send forty, to a queue of five: each accepted one is answered."""
    limits = Limits(requests_per_minute=40, queue_length=5)
    slow = replace(world, encoder=Slow(world.encoder, 0.05), limits=limits)
    with served(slow) as (url, _), ThreadPoolExecutor(20) as pool:
        sent = [(number % QUERIES, pool.submit(ask, url, number % QUERIES)) for number in range(60)]
        replies = [(number, *reply.result()) for number, reply in sent]
        statuses = Counter(status for _, status, _ in replies)
        assert statuses.keys() == {200, 429, 503} and sum(statuses.values()) == 60
        assert all("Queue is full" in text for _, status, text in replies if status == 503)
        assert all("at most 40 a minute" in text for _, status, text in replies if status == 429)
        found = answers([(number, text) for number, status, text in replies if status == 200])
        assert len(found) == statuses[200] and all(asked == answered for asked, answered in found)
        assert get(f"{url}/health")[0] == 200


def test_stopping_under_load_answers_all_that_was_accepted(world: World) -> None:
    """Eight clients ask without pause when the order comes; what was accepted by then is answered, the rest refused."""
    slow = replace(world, encoder=Slow(world.encoder, 0.05))
    with served(slow) as (url, service), ThreadPoolExecutor(9) as pool:

        def client(number: int) -> tuple[list[tuple[int, int]], int]:
            done: list[tuple[int, int]] = []
            while True:
                status, text = ask(url, number % QUERIES)
                if status != 200:
                    return done, status
                done += answers([(number % QUERIES, text)])

        clients = [pool.submit(client, number) for number in range(8)]
        until(lambda: service.health()["served"] > 20)
        assert pool.submit(service.finish).result() is True
        results = [one.result() for one in clients]
        assert service.jobs() == Jobs(0, 0)
    assert {status for _, status in results} == {503}
    found = [pair for done, _ in results for pair in done]
    assert found and all(asked == answered for asked, answered in found)
