"""The demo: artifacts checked at start, and a browser that clicks through it over a small testbed."""

from __future__ import annotations

import re
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import draw, png, write_data, write_ranker, write_rankings

import demo
from benchmark.screenshot_demo import CHROMIUM_FLAGS, INSTALL, find_chromium
from benchmark.screenshot_demo import main as screenshot
from fastgda.core import load_npz
from fastgda.ranker import Ranker, load_ranker
from feature_extraction.extract import main as extract
from feature_extraction.readers import open_image

IMAGES, QUERIES, TOP = 36, 4, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "emoji"
    write_data(folder, IMAGES, QUERIES)
    write_rankings(folder, IMAGES, QUERIES)
    write_ranker(folder / "ranker.pth", 1280 + 384)
    assert extract(["--data_dir", str(folder), "--splits", "data", "--device", "cpu"]) == 0
    return folder


def flags(data: Path, **changes: Any) -> list[str]:
    """The command line for the small testbed."""
    values = {"data_dir": data, "checkpoint": data / "ranker.pth", "feature_dir": data / "feats", "topk": TOP} | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def world(data: Path) -> demo.World:
    return demo.load_world(demo.DemoConfig(data / "ranker.pth", data_dir=data, topk=TOP))


def expected_ids(world: demo.World, data: Path, image: Image.Image, prompt: str, tuned: bool) -> list[int]:
    """The slow twin: embed everything, sort all scores."""
    training = np.load(data / "feats" / "effnet+minilm" / "data_feats.npy")
    query = world.encoder.encode([image], [prompt])
    if tuned:
        ranker: Ranker = load_ranker(data / "ranker.pth")
        with torch.no_grad():
            scores = (ranker(torch.from_numpy(training)) @ ranker(torch.from_numpy(query)).T)[:, 0].numpy()
    else:
        scores = (training @ query.T)[:, 0]
    return np.argsort(-scores)[:TOP].tolist()


def test_results_are_those_of_the_slow_twin(world: demo.World, data: Path) -> None:
    for query in range(QUERIES):
        image, prompt = world.queries.image(query), world.queries.caption(query)
        tuned, untuned = demo.attribute(world, image, prompt)
        assert tuned.ids.tolist() == expected_ids(world, data, image, prompt, tuned=True)
        assert untuned.ids.tolist() == expected_ids(world, data, image, prompt, tuned=False)
        assert tuned.encode_seconds > 0 and tuned.embed_seconds > 0 and tuned.search_seconds > 0


def test_threads_see_their_own_results(world: demo.World) -> None:
    alone = [demo.show_query(world, query)[1:] for query in range(QUERIES)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: demo.show_query(world, query)[1:], list(range(QUERIES)) * 3))
    assert together == alone * 3


def test_agreement_with_the_teacher_is_counted(world: demo.World) -> None:
    status, _, tuned, untuned, teacher = demo.show_query(replace(world, level=18), 1)
    counts = re.search(r"(\d+) \(tuned\) and (\d+) \(untuned\)", status)
    assert counts is not None
    assert (int(counts[1]), int(counts[2])) == (tuned.count('"agreed"'), untuned.count('"agreed"'))
    shown, _ = demo.attribute(world, world.queries.image(1), world.queries.caption(1))
    assert int(counts[1]) == len(set(shown.ids.tolist()) & set(world.teacher.rank[1, :18].tolist()))
    first = world.images.caption(int(world.teacher.rank[1, 0]))
    assert re.findall(r'alt="([^"]+)"', teacher)[0] == first


@pytest.mark.parametrize(
    ("content", "prompt", "complaint"),
    [
        (None, "red circle", "Choose a picture first."),
        (b"no picture", "red circle", "up.png: expected an image"),
        (png(Image.new("1", (9_000, 6_000))), "red circle", "up.png: expected at most 50 megapixels"),
        (png(draw("red", "circle", "flat"))[:80], "red circle", "up.png: expected"),
        (png(draw("red", "circle", "flat")), " \n", "Type the prompt"),
        (png(draw("red", "circle", "flat")), None, "Type the prompt"),
    ],
)
def test_mistakes_become_messages(
    world: demo.World, tmp_path: Path, content: bytes | None, prompt: str | None, complaint: str
) -> None:
    path = None
    if content is not None:
        path = str(tmp_path / "up.png")
        Path(path).write_bytes(content)
    status, *galleries = demo.show_upload(world, path, prompt)
    assert complaint in status and 'role="alert"' in status
    assert galleries == ["", "", "", ""]


def test_markup_in_a_prompt_is_text(world: demo.World, tmp_path: Path) -> None:
    (tmp_path / "up.png").write_bytes(png(draw("red", "circle", "flat")))
    _, shown, *_ = demo.show_upload(world, str(tmp_path / "up.png"), '<script>alert(1)</script> "quoted"')
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "&quot;quoted&quot;" in shown


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("trainset/emoji.parquet", "python -m feature_extraction.emoji"),
        ("query_test/queries.parquet", "python -m abu.sample"),
        (
            "feats/effnet+minilm/data_feats.npy",
            "python -m feature_extraction.extract --mode emoji --ftype effnet+minilm",
        ),
        ("feats/effnet+minilm/manifest.json", "manifest.json"),
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
    write_ranker(copy / "narrow.pth", 1280)
    assert demo.main(flags(copy, checkpoint=copy / "narrow.pth")) == 2
    assert "narrow.pth: expected a ranker of 1664-dimensional features" in capsys.readouterr().err
    manifest = copy / "feats" / "effnet+minilm" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pixels": 192', '"pixels": 64'))
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


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(world: demo.World) -> Iterator[str]:
    app = demo.build_app(world)
    url = demo.launch(app, "127.0.0.1", free_port())
    yield url
    app.close()


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
    page.set_default_timeout(30_000)
    found = Visit(page)
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#teacher img")
    yield found
    assert found.errors == []
    page.close()


def names(world: demo.World, ids: list[int]) -> list[str]:
    """Captions of training images."""
    return [world.images.caption(image) for image in ids]


def test_browser_shows_a_stored_query(visit: Visit, world: demo.World, data: Path) -> None:
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
    assert re.search(r"set (flat|outline)", first) and re.search(r"score -?\d\.\d{3}", first)
    assert re.search(r"ms: encode [\d.]+, embed [\d.]+, search [\d.]+", page.locator("#status").inner_text())


def test_browser_attributes_an_upload(visit: Visit, world: demo.World, data: Path, tmp_path: Path) -> None:
    page, picture = visit.page, draw("orange", "triangle", "outline")
    (tmp_path / "mine.png").write_bytes(png(picture))
    page.get_by_role("tab", name="Your own picture").click()
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.png")
    page.locator("#upload").get_by_text("mine").first.wait_for()
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
    page.get_by_role("tab", name="Your own picture").click()
    page.locator("#submit").click()
    page.locator("#status [role=alert]", has_text="Choose a picture first.").wait_for()
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "notes.png")
    page.locator("#upload").get_by_text("notes").first.wait_for()
    page.locator("#prompt textarea").fill("a note")
    page.locator("#submit").click()
    page.locator("#status [role=alert]", has_text="notes.png: expected an image").wait_for()
    assert visit.captions("tuned") == []
    page.get_by_role("tab", name="Stored query").click()
    page.get_by_label("Prompt", exact=True).click()
    page.get_by_role("option").nth(1).click()
    page.wait_for_selector("#tuned img")


def test_page_asks_nothing_of_the_internet(visit: Visit, address: str) -> None:
    visit.page.evaluate("document.fonts.ready.then(() => document.fonts.size)")
    outside = {url for url in visit.requests if not url.startswith((address, "data:", "blob:"))}
    assert visit.requests and outside == set()


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


def test_screenshot_command(browser: Any, address: str, tmp_path: Path) -> None:
    """The command opens a browser of its own, hence in a thread: Playwright allows one loop in each."""
    out = tmp_path / "demo.png"
    arguments = ["--url", address, "--query", "3", "--out", str(out), "--width", "900"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(screenshot, arguments).result() == 0
    assert open_image(out).size == (900, 1000)


def test_command_serves_until_interrupted(data: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import gradio

    port, answers = free_port(), []

    def visit_and_stop(app: gradio.Blocks) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as reply:
            answers.append(reply.status)
        app.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", visit_and_stop)
    assert demo.main(flags(data, port=port)) == 0
    assert answers == [200]
    assert f"serving on http://127.0.0.1:{port}" in capsys.readouterr().out
