"""The running service as a whole: what is accepted is answered, also when the server is told to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from demo_world import load, served, write_world
from http_calls import fetch, submit

from serving.limits import Limits
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
