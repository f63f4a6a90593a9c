"""Takes the README's screenshot of a running demo, in headless Chromium.

python demo.py &
python -m benchmark.screenshot_demo --url http://127.0.0.1:7860 --query 0 --out results/demo.png
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fastgda.core import ROOT, atomic_path, command_line
from fastgda.flags import add_flags, from_flags

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
INSTALL = "install Chromium (apt-get install chromium) or set CHROMIUM_PATH"


@dataclass(frozen=True)
class ScreenshotConfig:
    """What to photograph."""

    url: str = "http://127.0.0.1:7860"
    """Address of the running demo."""
    query: int = 0
    """Stored query to show."""
    out: Path = ROOT / "results" / "demo.png"
    """File to write."""
    width: int = 1400
    """Width of the window in pixels."""
    height: int = 1000
    """Height of the window in pixels."""
    dark: bool = False
    """Whether the reader prefers dark pages."""


def find_chromium() -> str | None:
    """CHROMIUM_PATH, or the first Chromium on the PATH; `None` if there is none."""
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


def screenshot(config: ScreenshotConfig) -> None:
    """Opens the demo, chooses the query and writes the picture; `ValueError` if there is no browser or no demo."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise ValueError("playwright is not installed; pip install 'fastgda[dev]'") from None
    browser_path = find_chromium()
    if browser_path is None:
        raise ValueError(f"no browser: {INSTALL}")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, headless=True, args=list(CHROMIUM_FLAGS))
        page = browser.new_page(
            viewport={"width": config.width, "height": config.height},
            color_scheme="dark" if config.dark else "light",
        )
        try:
            page.goto(config.url)
            page.wait_for_selector("#teacher img")
            page.get_by_label("Prompt", exact=True).click()
            page.get_by_role("option").nth(config.query).click()
            page.locator("#query .small", has_text=f"test query {config.query}").wait_for()
            page.mouse.move(0, 0)
        except Error as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{config.url}: expected a running demo with query {config.query} ({reason})") from error
        with atomic_path(config.out) as temporary:
            # the list of prompts fades out
            page.wait_for_timeout(1000)
            page.screenshot(path=temporary, type="png")
        browser.close()


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.screenshot_demo", description=__doc__.splitlines()[0])
    add_flags(parser, ScreenshotConfig)
    config = from_flags(ScreenshotConfig, parser.parse_args(argv))
    screenshot(config)
    print(config.out)


if __name__ == "__main__":
    sys.exit(main())
