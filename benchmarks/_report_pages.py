"""Screenshots of a report's pages, and what its search finds, in headless Chromium."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)

TIMEOUT_MS = 300_000
"""Time for a page to open, on a machine with other work too."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser.

    Raises:
        FileNotFoundError: there is no Chromium on the path.
    """
    path = shutil.which("chromium")
    if path is None:
        raise FileNotFoundError("there is no chromium on the path: install it to take pictures")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def opened(browser: Any, folder: Path, address: str, **context: Any) -> Any:
    """A page of a report, once its script has run."""
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(f"{folder.resolve().as_uri()}/{address}")
    if not address.startswith("features/") and "summary" not in address:
        page.wait_for_selector("html[data-ready]")
    return page


def search_for(folder: Path, words: Sequence[str]) -> dict[str, list[str]]:
    """The first five features that a search for each word lists, with what they match."""
    found = {}
    with chromium() as browser:
        for word in words:
            page = opened(browser, folder, f"index.html#query={word}&sort=match")
            cards = page.locator("#view .card").all()[:5]
            found[word] = [
                f"{card.locator('a').text_content()}: {card.locator('.value').text_content()}"
                for card in cards
            ]
            page.context.close()
    return found


def take_pages(folder: Path, out: Path, *, word: str = "bird") -> list[Path]:
    """Write ``report-<page>.webp`` for index, feature, image, map, compare and summary.

    Args:
        folder: The report.
        out: Where the pictures go.
        word: A label of pictures; the image page is of such a picture, if there is one.
    """
    view = {"viewport": {"width": 1200, "height": 800}}
    taken = []
    with chromium() as browser:
        page = opened(browser, folder, "index.html#state=usual", **view)
        cards = page.locator("#view .card a")
        first = cards.first.text_content()
        addresses = {
            "index": "index.html#state=usual",
            "feature": f"features/{first}.html",
            "image": f"images.html#query={word}",
            "map": "map.html#colour=frequency",
            "compare": "compare.html",
            "summary": "summary.html",
        }
        for name, address in addresses.items():
            page = opened(browser, folder, address, **view)
            if name == "image":
                _choose_a_patch(page)
            if name == "map":
                page.locator("#find").fill(first)
                page.locator("#find").press("Enter")
                page.locator("#whole").click()
            page.wait_for_timeout(700)  # images of the sheets are decoded
            picture = Image.open(io.BytesIO(page.screenshot()))
            taken.append(out / f"report-{name}.webp")
            picture.convert("RGB").save(taken[-1], quality=80, method=6)
            page.context.close()
    return taken


def _choose_a_patch(page: Any) -> None:
    found = page.locator("#all button")
    if found.count():
        found.nth(min(2, found.count() - 1)).click()
    page.wait_for_selector("#stage .image")
    box = page.locator("#stage").bounding_box()
    page.locator("#stage").click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    page.locator("#over-image li").first.hover()
