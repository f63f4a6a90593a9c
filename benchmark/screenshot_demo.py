"""Takes the README's screenshots of a running demo, in headless Chromium.

python demo.py &
python -m benchmark.screenshot_demo --url http://127.0.0.1:7860 --show "query=0" --out results/demo.png
python -m benchmark.screenshot_demo --show "prompt=red heart, noto style&seed=7" --width 390 --height 844 --dark \\
    --out results/demo_phone.png
python -m benchmark.screenshot_demo --show "query=3" --at "#judged" --height 900 --out results/demo_retrained.png
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fastgda.core import ROOT, atomic_path, command_line, command_parser
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
    show: str = "query=0"
    """Parameters of the answer's permalink: query=3, or prompt=red heart&seed=7."""
    at: str = ""
    """CSS selector of the part of the page to scroll to; empty: the top."""
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
    """Opens the demo at an answer and writes the picture; `ValueError` if there is no browser, demo or such answer."""
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
            page.goto(f"{config.url.rstrip('/')}/?{config.show}")
            page.wait_for_selector("#tuned img, #status [role=alert]")
            if config.at:
                page.locator(config.at).first.evaluate("part => part.scrollIntoView()")
            mistakes = page.locator("#status [role=alert]").all_inner_texts()
        except Error as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{config.url}: expected a running demo, found none ({reason})") from error
        if mistakes:
            raise ValueError(f"--show {config.show}: {mistakes[0]}")
        with atomic_path(config.out) as temporary:
            # pictures and bars fade in
            page.wait_for_timeout(1000)
            page.screenshot(path=temporary, type="png")
        browser.close()


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.screenshot_demo", __doc__)
    add_flags(parser, ScreenshotConfig)
    config = from_flags(ScreenshotConfig, parser.parse_args(argv))
    screenshot(config)
    print(config.out)


if __name__ == "__main__":
    sys.exit(main())
