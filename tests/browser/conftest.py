"""A real browser, on the page of a real server. Whatever the page does wrong on the way fails the test that saw it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.server import ASSETS, ROOT, Server, demo_server

SCREENSHOTS = ROOT / "build" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 30_000

expect.set_options(timeout=WAIT_MS)  # by default 5 s, as long as the page itself waits before it asks again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium. It is closed with the file: Playwright's event loop runs until then, and tests of other
    folders need their own. Without one these tests are skipped, but not where CI is set."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        assert not os.environ.get("CI"), "there is no Chromium: install Debian's package chromium"
        pytest.skip("needs Chromium: install Debian's package chromium")
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        with playwright.chromium.launch(executable_path=found, args=arguments) as launched:
            yield launched


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo's base and adapters, which may be registered again by their paths."""
    with demo_server(tmp_path_factory.mktemp("data"), "--allow-source", str(ASSETS / "adapters")) as started:
        yield started


@pytest.fixture
def faults() -> list[str]:
    """What the page did wrong so far; a test that provokes some on purpose clears it."""
    return []


@pytest.fixture
def page(browser: Browser, server: Server, faults: list[str]) -> Iterator[Page]:
    """The page, opened. It must log no error, break no policy, and ask nobody but its server."""
    with browser.new_context(base_url=server.url, viewport={"width": 1280, "height": 860}) as context:
        context.set_default_timeout(WAIT_MS)
        opened = context.new_page()
        watch(opened, server.url, faults)
        opened.goto("/")
        yield opened
        seen = [*faults]  # what a page that asks every few seconds is refused while it closes is nobody's fault
    assert not seen


def watch(page: Page, origin: str, faults: list[str]) -> None:
    """Collects what the page's console reports as errors, uncaught exceptions, and requests to other origins."""

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            faults.append(f"console: {message.text}")

    def on_request(request: Request) -> None:
        if not request.url.startswith((f"{origin}/", "data:", "blob:")):
            faults.append(f"a request to {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
    page.on("request", on_request)


def screenshot(page: Page, name: str) -> None:
    """A picture of the whole page, under build/screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
