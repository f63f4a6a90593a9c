"""The page in a real browser: every control, an error message, a narrow screen, light and dark, by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_world import TOP, coco_config, expected_ids, load, served, write_coco, write_world
from small_world import draw, png, write_bundle

import demo
from benchmark.screenshot_demo import CHROMIUM_FLAGS, INSTALL, find_chromium
from benchmark.screenshot_demo import main as screenshot
from fastgda.index import Index
from feature_extraction.readers import open_image
from serving.limits import Limits
from serving.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "emoji")


@pytest.fixture(scope="module")
def world(data: Path) -> World:
    return load(data, Limits(upload_mb=2))


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    with served(world) as (url, _):
        yield url + "/"


@dataclass
class Visit:
    """A page and what it asked for."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def captions(self, gallery: str) -> list[str]:
        """The captions that a gallery shows, in order."""
        return self.page.locator(f"#{gallery} img").evaluate_all("images => images.map(image => image.alt)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip(f"no browser: {INSTALL}")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, headless=True, args=list(CHROMIUM_FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    found = Visit(page)
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#teacher img")
    yield found
    assert found.errors == []
    page.close()


def names(world: World, ids: list[int]) -> list[str]:
    """Captions of training images."""
    return [world.images.caption(image) for image in ids]


def test_browser_shows_a_stored_query(visit: Visit, world: World, data: Path, address: str) -> None:
    page = visit.page
    page.get_by_label("Prompt", exact=True).click()
    page.get_by_role("option", name=f"2: {world.queries.caption(2)}").click()
    page.locator("#query .small", has_text="test query 2").wait_for()
    image, prompt = world.queries.image(2), world.queries.caption(2)
    assert visit.captions("query") == [prompt]
    assert visit.captions("tuned") == names(world, expected_ids(world, data, image, prompt, tuned=True))
    assert visit.captions("untuned") == names(world, expected_ids(world, data, image, prompt, tuned=False))
    assert visit.captions("teacher") == names(world, world.teacher.rank[2, :TOP].tolist())
    first = page.locator("#tuned figure").first.inner_text()
    assert re.search(r"by (flat|outline) studio", first) and re.search(r"score -?\d\.\d{3}\s+distance \d\.\d{3}", first)
    status = page.locator("#status").inner_text()
    assert re.search(r"ms: encode [\d.]+, embed [\d.]+, search [\d.]+, metadata [\d.]+", status)
    assert re.search(r"nearest training image is at cosine distance \d\.\d{3}", status)
    shares = world.stored(2, TOP).shares
    assert page.locator("#shares th").all_inner_texts() == [share.creator for share in shares]
    told = page.locator("#shares td.number").first.inner_text()
    assert told.startswith(f"{shares[0].share:.0%} (") and "teacher" in told
    page.wait_for_url("**/?query=2")
    assert page.locator("#link a").get_attribute("href") == "?query=2"
    visit.page.evaluate("document.fonts.ready.then(() => document.fonts.size)")
    outside = {url for url in visit.requests if not url.startswith((address, "data:", "blob:"))}
    assert visit.requests and outside == set(), "asks nothing of the internet"


def test_browser_attributes_an_upload(visit: Visit, world: World, data: Path, tmp_path: Path) -> None:
    page, picture = visit.page, draw("orange", "triangle", "outline")
    (tmp_path / "mine.png").write_bytes(png(picture))
    page.get_by_role("tab", name="Upload").click()
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.png")
    page.locator("#prompt textarea").fill("orange triangle, outline style")
    page.locator("#submit").click()
    page.locator("#query .small", has_text="your picture").wait_for()
    prompt = "orange triangle, outline style"
    assert visit.captions("tuned") == names(world, expected_ids(world, data, picture, prompt, tuned=True))
    assert visit.captions("untuned") == names(world, expected_ids(world, data, picture, prompt, tuned=False))
    assert visit.captions("untuned")[0] == prompt
    assert "stored queries only" in page.locator("#teacher").inner_text()


def test_browser_shows_a_message_for_what_is_no_picture(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    (tmp_path / "notes.png").write_text("not a picture")
    page.get_by_role("tab", name="Upload").click()
    page.locator("#submit").click()
    page.locator("#status [role=alert]", has_text="Choose a picture first.").wait_for()
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "notes.png")
    page.locator("#prompt textarea").fill("a note")
    page.locator("#submit").click()
    page.locator("#status [role=alert]", has_text="picture: expected an image").wait_for()
    assert visit.captions("tuned") == []
    assert "no permalink" in page.locator("#upload").inner_text()
    page.locator("#upload input[type=file]").set_input_files(
        {"name": "large.png", "mimeType": "image/png", "buffer": b"x" * 3_000_000}
    )
    page.locator("#submit").click()
    page.locator("#status [role=alert]", has_text="picture: expected at most 1.5 MB").wait_for()
    page.get_by_role("tab", name="Stored").click()
    page.get_by_label("Prompt", exact=True).click()
    page.get_by_role("option").nth(1).click()
    page.wait_for_selector("#tuned img")


def test_browser_generates_by_keyboard_and_the_permalink_leads_back(visit: Visit, world: World, address: str) -> None:
    page = visit.page
    tab = page.get_by_role("tab", name="Generate")
    assert tab.get_attribute("tabindex") != "-1", "within reach of the Tab key"
    tab.focus()
    page.keyboard.press("Enter")
    page.locator("#new textarea").focus()
    page.wait_for_timeout(500)  # Gradio draws a tab when it is first opened, and letters typed before that are lost
    page.keyboard.type("a <b> & heart")
    assert page.locator("#new textarea").input_value() == "a <b> & heart"
    page.keyboard.press("Tab")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("7")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"
    page.keyboard.press("Enter")
    page.locator("#query .small", has_text="generated from seed 7").wait_for()
    expected = names(world, world.generated("a <b> & heart", 7, TOP).tuned.ids[:TOP].tolist())
    assert visit.captions("tuned") == expected
    page.wait_for_url("**/?prompt=*")
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.locator("#query .small", has_text="generated from seed 7").wait_for()
    assert visit.captions("tuned") == expected and page.locator("#new textarea").input_value() == "a <b> & heart"
    assert page.locator("#seed input").input_value() == "7"
    page.goto(address + "?query=99")
    page.locator("#status [role=alert]", has_text="query: expected a number from 0 to 3").wait_for()


def test_browser_shows_what_models_trained_again_draw(visit: Visit, world: World) -> None:
    assert visit.captions("retrained") == ["red heart, noto style"]
    visit.page.locator("#judged input").click()
    visit.page.get_by_role("option", name="cat, twemoji style").click()
    visit.page.wait_for_function("document.querySelectorAll('#retrained img').length === 4")
    assert visit.captions("retrained") == ["cat, twemoji style", "tuned", "untuned", "tuned"]
    assert "without 2 images" in visit.page.locator("#retrained").inner_text()
    assert not visit.errors


def test_browser_shows_released_data_without_what_it_lacks(browser: Any, tmp_path: Path) -> None:
    world = demo.load_world(coco_config(write_coco(tmp_path / "coco")))
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with served(world) as (url, _):
        page.goto(f"{url}/?query=2")
        page.locator("#query .small", has_text="test query 2").wait_for()
        assert page.locator("#tuned img").count() == page.locator("#teacher img").count() == TOP
        assert re.search(r"image \d+\s+score", page.locator("#tuned figure").first.inner_text())
        assert page.get_by_role("tab").all_inner_texts() == ["Stored", "Upload"]
        assert page.get_by_text("Shares").count() == 0
        (tmp_path / "mine.png").write_bytes(png(draw("orange", "triangle", "outline")))
        page.get_by_role("tab", name="Upload").click()
        page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.png")
        page.locator("#prompt textarea").fill("an orange triangle")
        page.locator("#submit").click()
        page.locator("#query .small", has_text="your picture").wait_for()
        page.goto(f"{url}/?prompt=a+square&seed=3")
        page.locator("#status [role=alert]", has_text="no source model").wait_for()
        assert page.get_by_role("tab", name="Stored").get_attribute("aria-selected") == "true"
        page.close()
    assert errors == []


def test_browser_shows_a_bundle_without_its_pictures(browser: Any, tmp_path: Path) -> None:
    """Captions in place of pictures, one tab, and an image that was removed meanwhile is gone from the next answer."""
    bundle = write_bundle(tmp_path / "emoji")
    world = demo.load_world(demo.DemoConfig(bundle=bundle, data_dir=None, topk=TOP, source_model=tmp_path / "none"))
    page, errors = browser.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    (tmp_path / "mine.png").write_bytes(png(draw("orange", "triangle", "outline")))
    with served(world) as (url, _):
        page.goto(url)
        page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.png")
        page.locator("#prompt textarea").fill("orange triangle, outline style")
        page.locator("#submit").click()
        page.locator("#query .small", has_text="your picture").wait_for()
        assert page.get_by_role("tab").all_inner_texts() == ["Upload"]
        found = page.locator("#tuned figure").all_inner_texts()
        assert len(found) == TOP and page.locator("#tuned img").count() == 0
        expected: Any = world.answer(open_image(tmp_path / "mine.png"), "orange triangle, outline style", TOP)
        captions = [known["caption"] for known in expected.tuned.metadata[:TOP]]
        assert all(caption in text for caption, text in zip(captions, found, strict=True))
        Index(bundle / "index").remove(expected.tuned.ids[:1], command="test")
        page.locator("#submit").click()
        page.wait_for_function("before => document.querySelector('#tuned figure').innerText !== before", arg=found[0])
        assert captions[1] in page.locator("#tuned figure").first.inner_text()
        page.close()
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_nothing_overflows_on_a_phone(browser: Any, address: str, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("#teacher img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    script = "node => [getComputedStyle(node).color, getComputedStyle(node.closest('figure')).backgroundColor]"
    for selector in ("#tuned figcaption", "#tuned figcaption .small"):
        text, paper = (luminance(c) for c in page.locator(selector).first.evaluate(script))
        assert (paper < 0.5) == (scheme == "dark")
        assert (max(text, paper) + 0.05) / (min(text, paper) + 0.05) >= 4.5, f"{selector} in {scheme}"
    page.close()


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of a CSS rgb() colour."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_screenshot_command(browser: Any, address: str, tmp_path: Path, capsys) -> None:
    """The command opens a browser of its own, hence in a thread: Playwright allows one loop in each."""
    out = tmp_path / "demo.png"
    arguments = ["--url", address, "--show", "query=3", "--out", str(out), "--width", "900"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(screenshot, arguments).result() == 0
        assert pool.submit(screenshot, ["--url", address, "--show", "query=99", "--out", str(out)]).result() == 2
    assert "--show query=99: query: expected a number from 0 to 3" in capsys.readouterr().err
    assert open_image(out).size == (900, 1000)
