"""The page where things are not as they should be: links that are cut, storage that is full, keys that go away."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.adapters import has_no_sideways_scroll, keyed_server, opened, ready, until, uploaded, use_key
from tests.browser.conftest import WAIT_MS
from tests.browser.playing import finished, open_playground, run
from tests.server import Server

KEYS = "admin-key name=admin\ninfer-key scopes=infer name=app\ntenant-key tenant=acme name=acme\n"
SECRET = "acme-secret"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("keyed")
    with keyed_server(folder) as server:
        server.http.headers["Authorization"] = "Bearer tenant-key"
        uploaded(server, SECRET)
        yield server, folder / "keys"


def reread(server: Server, page: Page, keys: Path, text: str) -> None:
    """Gives the server another key file, and returns once it has it."""
    keys.write_text(text)
    server.process.send_signal(signal.SIGHUP)
    known = "infer-key" in text
    header = {"Authorization": "Bearer infer-key"}
    until(page, lambda: (server.http.get("/v1/whoami", headers=header).status_code == 200) == known)


class TestLinks:
    @pytest.mark.parametrize("place", ["adapters/100%", "playground/%E0%A4", "adapters/%"])
    def test_no_encoding(self, page: Page, faults: list[str], place: str) -> None:
        page.goto(f"/#/{place}")
        page.reload()
        expect(page.locator("main h1")).to_be_visible()
        page.evaluate("location.hash = '#/live'")
        expect(page.get_by_role("heading", name="Live")).to_be_visible()
        assert not [fault for fault in faults if "404" not in fault]
        faults.clear()


class TestStorage:
    def test_more_than_it_holds(self, page: Page) -> None:
        open_playground(page)
        page.get_by_label("Prompt").evaluate(
            "box => { box.value = 'x'.repeat(6e6); box.dispatchEvent(new Event('input', { bubbles: true })) }"
        )
        page.get_by_role("button", name="+ Column").click()
        expect(page.locator(".column")).to_have_count(3)

    def test_forbidden(self, browser: Browser, server: Server, faults: list[str]) -> None:
        with opened(browser, server, faults, "/docs") as page:
            page.add_init_script(
                "for (const kind of ['sessionStorage', 'localStorage'])"
                " Object.defineProperty(window, kind, { get() { throw new DOMException('no', 'SecurityError') } })"
            )
            page.goto("/")
            ready(page)
            page.get_by_title("Dark or light").click()
            expect(page.get_by_title("Dark or light")).to_have_text("Light")
            open_playground(page)
            assert not faults


class TestKeys:
    def test_another_key_sees_nothing_of_the_one_before(
        self, browser: Browser, keyed: tuple[Server, Path], faults: list[str]
    ) -> None:
        with opened(browser, keyed[0], faults, f"/#/adapters/{SECRET}") as page:
            use_key(page, "tenant-key")
            expect(page.get_by_role("heading", name="Facts")).to_be_visible()
            page.get_by_role("button", name="acme", exact=True).click()
            assert page.get_by_label("Key", exact=True).input_value() == ""
            use_key(page, "infer-key")
            expect(page.locator(".refusal")).to_contain_text("no adapter is named")
            expect(page.get_by_role("heading", name="Facts")).to_have_count(0)
            expect(page.get_by_role("button", name="Delete")).to_have_count(0)

    def test_a_key_that_was_forgotten(self, browser: Browser, keyed: tuple[Server, Path], faults: list[str]) -> None:
        with opened(browser, keyed[0], faults) as page:
            use_key(page, "tenant-key")
            ready(page)
            open_playground(page)
            run(page)
            finished(page)
            expect(page.locator(".answer .text").first).to_be_visible()
            page.get_by_role("button", name="acme", exact=True).click()
            page.get_by_role("button", name="Forget it").click()
            expect(page.locator("dialog .refusal")).to_contain_text("asks for an API key")
            page.get_by_role("button", name="Cancel").click()
            expect(page.locator(".answer .text")).to_have_count(0)
            page.goto("/#/adapters")
            expect(page.locator("main")).to_contain_text("A key is needed.")
            expect(page.locator("main")).not_to_contain_text("No adapters yet")

    @pytest.mark.parametrize("place", ["adapters", "adapters/dashes", "live"])
    def test_a_key_that_is_revoked(
        self, browser: Browser, keyed: tuple[Server, Path], faults: list[str], place: str
    ) -> None:
        server, keys = keyed
        with opened(browser, server, faults, f"/#/{place}") as page:
            use_key(page, "infer-key")
            expect(page.locator("main .card").first).to_be_visible()
            try:
                reread(server, page, keys, "admin-key name=admin\ntenant-key tenant=acme name=acme\n")
                expect(page.locator("dialog .refusal")).to_contain_text("not known", timeout=WAIT_MS)
                page.get_by_role("button", name="Cancel").click()
                asked: list[str] = []
                page.on("request", lambda request: asked.append(request.url))
                expect(page.locator("main")).to_contain_text("A key is needed.")
                page.wait_for_timeout(2000)  # the shortest of the pages' intervals, twice
                assert asked == [], "it would be refused"
                expect(page.locator("dialog[open]")).to_have_count(0)
            finally:
                reread(server, page, keys, KEYS)
            page.get_by_role("button", name="Key", exact=True).click()
            use_key(page, "infer-key")
            expect(page.locator("main")).not_to_contain_text("A key is needed.")


def test_a_server_that_was_away_when_the_page_came(page: Page, faults: list[str]) -> None:
    page.route("**/v1/whoami", lambda route: route.abort())
    page.reload()
    expect(page.locator("main")).to_contain_text("Loading…")
    page.unroute("**/v1/whoami")
    ready(page)
    expect(page.locator("header .base strong")).to_have_text("vblora-demo-base")
    faults.clear()


def test_an_adapter_that_somebody_else_deletes(page: Page, server: Server, faults: list[str]) -> None:
    uploaded(server, "short-lived")
    page.goto("/#/adapters/short-lived")
    expect(page.get_by_role("heading", name="Facts")).to_be_visible()
    server.http.delete("/v1/adapters/short-lived").raise_for_status()
    # The page's own word: a part of it that was still loading may have been refused before it asked again.
    expect(page.get_by_role("alert")).to_contain_text("no adapter is named", timeout=WAIT_MS)
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)
    faults.clear()


@pytest.mark.parametrize("place", ["adapters", f"adapters/{'L' * 128}", f"playground/{'L' * 128}", "live"])
def test_a_narrow_screen(browser: Browser, server: Server, faults: list[str], place: str) -> None:
    uploaded(server, "L" * 128)
    with opened(browser, server, faults, f"/#/{place}", viewport={"width": 320, "height": 640}) as page:
        expect(page.locator("header .base strong")).to_be_visible()
        expect(page.locator("main .card").first).to_be_visible()
        assert has_no_sideways_scroll(page), json.dumps(
            page.evaluate(
                "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
                ".map(e => `${e.tagName} ${e.className}`)"
            )
        )
