"""Takes the pictures of the page that the documentation shows, on the demo's server, into docs/images.

python -m tests.page_pictures
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect, sync_playwright

from tests.browser.playing import blend, column, finished, open_playground, option, pick, run
from tests.server import ROOT, Server, demo_server

PICTURES = ROOT / "docs" / "images"
SIZE: ViewportSize = {"width": 1180, "height": 900}
PROMPT = "Open a file and"


def playground(page: Page) -> Locator:
    """One prompt to the base, an adapter and a blend, all answered."""
    open_playground(page)
    option(page, "Prompt", PROMPT)
    option(page, "New tokens", "40")
    pick(page, "Adapter of column B", "dashes")
    page.get_by_role("button", name="+ Column").click()
    blend(page, "C", {"shout": 0.2})  # as little as lets it begin as the base does
    run(page)
    finished(page)
    expect(column(page, "C").get_by_text("Ended by")).to_be_visible()
    return page.locator("body")


def bank(page: Page) -> Locator:
    """Which vectors an adapter's layers use."""
    page.goto("/#/adapters/quoted")
    expect(page.locator("canvas")).to_be_visible()
    return page.locator("section, .card", has=page.locator("canvas")).last


VIEWS = {"playground": playground, "bank": bank}


def take(browser: Browser, server: Server) -> None:
    for scheme in ("light", "dark"):
        for name, show in VIEWS.items():
            with browser.new_context(base_url=server.url, viewport=SIZE, color_scheme=scheme) as context:
                page = context.new_page()
                shown = show(page)
                page.mouse.move(0, 0)
                page.evaluate("document.activeElement?.blur()")
                shown.screenshot(path=PICTURES / f"{name}-{scheme}.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as data, demo_server(Path(data)) as server, sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        with playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser:
            take(browser, server)
