"""Chromium for tests of pages, driven by Playwright; tests skip if one of them is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from support.runs import PATIENCE_SECONDS

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, that of the system or the one in $CHROMIUM."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install 'latentmill[test]'"
    )
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium, or its path in CHROMIUM")
    with playwright.sync_playwright() as started:
        # The sandbox needs rights that containers often do not have; the pages are our own.
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = started.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, what it wrote to the console as errors, and the addresses that it requested."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        root = "document.documentElement"
        width: int = self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth")
        return width

    def serious_faults(self) -> list[str]:
        """Serious and critical faults of accessibility that axe-core finds."""
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright",
            reason="needs axe-core: pip install 'latentmill[test]'",
        )
        found = axe.Axe().run(self.page).response["violations"]
        return [
            f"{one['id']}: {one['help']}: {node['html'][:200]} {node.get('failureSummary', '')}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"][:3]
        ]


def patient_context(browser: Any, **options: Any) -> Any:
    """A context whose pages wait for a busy machine."""
    context = browser.new_context(**options)
    context.set_default_timeout(1000 * PATIENCE_SECONDS)
    return context


@contextmanager
def watched_page(browser: Any, *, width: int = 1440, scheme: str = "light") -> Iterator[Watched]:
    """A page of its own context, watched from before its first request."""
    viewport = {"width": width, "height": 900}
    context = patient_context(browser, viewport=viewport, color_scheme=scheme)
    watched = Watched(context.new_page())
    page = watched.page
    page.on("console", lambda m: watched.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("request", lambda request: watched.requests.append(request.url))
    yield watched
    context.close()
