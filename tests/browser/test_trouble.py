"""The page where answers are late, cut off, out of order, or somebody else's; and what people choose by mistake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.adapters import (
    command,
    copied,
    dialog,
    keyed_server,
    listed,
    notice,
    opened,
    ready,
    row,
    uploaded,
    use_key,
)
from tests.browser.playing import column, finished, open_playground, run
from tests.browser.test_live import open_live
from tests.browser.test_upload import drop_directories, job, pick_directory
from tests.server import Server

CUT = """
    const real = window.fetch
    window.fetch = (url, init) => {
      if (!String(url).endsWith("/v1/generate")) return real(url, init)
      const delta = { choices: [{ index: 0, text: "as far as this", token_ids: [1], finish_reason: null }] }
      return Promise.resolve(new Response(new ReadableStream({
        start(controller) {
          controller.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(delta)}\\n\\n`))
          addEventListener("cut", () => controller.error(new TypeError("network error")))  // as Chromium has it
        },
      })))
    }
"""


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with keyed_server(tmp_path_factory.mktemp("keyed")) as server:
        yield server


@pytest.mark.parametrize("failing", ["v1/whoami", "version"])
@pytest.mark.parametrize("place", ["playground", "adapters/dashes", "live", "adapters"])
def test_a_page_that_came_before_the_server_was_ready(page: Page, faults: list[str], place: str, failing: str) -> None:
    page.route(f"**/{failing}", lambda route: route.fulfill(status=503, body="not yet"))
    page.goto(f"/#/{place}")
    page.reload()
    expect(notice(page, "HTTP 503: not yet")).to_be_visible()
    expect(page.locator("header .base strong")).to_have_count(0)
    page.unroute(f"**/{failing}")
    expect(page.locator("header .base strong")).to_have_text("vblora-demo-base")
    if place == "playground":
        expect(page.get_by_role("button", name="Run")).to_be_enabled()
    if place == "adapters/dashes":
        expect(page.get_by_role("button", name="Activate", exact=True)).to_be_enabled()
    expect(page.locator(".notice")).to_have_count(1)
    faults.clear()


def test_what_may_be_done_is_not_known_before_the_server_has_said_it(page: Page, faults: list[str]) -> None:
    page.route("**/v1/whoami", lambda route: route.abort())
    page.goto("/#/playground")
    page.reload()
    button = page.get_by_role("button", name="Run")
    expect(button).to_be_disabled()
    expect(button).to_have_attribute("title", "The server has not said yet what you may do.")
    faults.clear()


def test_a_stream_that_is_cut_keeps_what_came_and_says_so(page: Page) -> None:
    page.add_init_script(CUT)
    page.reload()
    open_playground(page)
    run(page)
    for letter in "AB":
        expect(column(page, letter).locator(".text")).to_have_text("as far as this")
    page.evaluate("dispatchEvent(new Event('cut'))")
    finished(page)
    expect(column(page, "A").locator(".text")).to_have_text("as far as this")
    expect(column(page, "A").locator(".refusal")).to_have_text("The stream broke off before its end.unreachable")


def test_a_server_that_stands_still_is_named(page: Page) -> None:
    page.add_init_script("const real = AbortSignal.timeout; AbortSignal.timeout = () => real.call(AbortSignal, 300)")
    page.reload()
    open_live(page)
    page.route("**/v1/stats", lambda route: None)  # never answered
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    page.unroute("**/v1/stats")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_an_older_list_does_not_bring_back_what_was_deleted(page: Page, server: Server) -> None:
    uploaded(server, "late")
    expect(row(page, "late")).to_be_visible()
    held: list[Route] = []

    def hold_one(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    before = {"data": list(listed(server).values()), "next": None}
    page.route("**/v1/adapters?*", hold_one)
    with page.expect_request("**/v1/adapters?*"):
        pass  # the page's own, of every few seconds
    command(page, "late", "Delete").click()
    dialog(page).get_by_role("button", name="Delete").click()
    expect(row(page, "late")).to_have_count(0)
    page.evaluate(
        """() => {
          window.rows = []
          new MutationObserver(() => window.rows.push(document.querySelectorAll('[data-name=late]').length))
            .observe(document.querySelector('table.adapters'), { childList: true, subtree: true })
        }"""
    )
    with page.expect_response("**/v1/adapters?*"):
        held[0].fulfill(json=before)
    with page.expect_response("**/v1/adapters?*"):
        pass  # the next one, and what came before it was dealt with
    assert page.evaluate("Math.max(0, ...window.rows)") == 0
    expect(row(page, "late")).to_have_count(0)


def test_a_late_refusal_is_not_taken_for_that_of_another_question(
    page: Page, server: Server, faults: list[str]
) -> None:
    held: list[Route] = []
    page.route("**/v1/adapters/shout", lambda route: held.append(route))
    command(page, "shout", "Delete").click()
    with page.expect_request("**/v1/adapters/shout"):
        dialog(page).get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    command(page, "dashes", "Delete").click()
    expect(dialog(page)).to_contain_text("Delete dashes?")
    error = {"message": "shout is held", "type": "x", "param": None, "code": "x"}
    held[0].fulfill(status=503, json={"error": error})
    expect(notice(page, "shout is held")).to_be_visible()
    expect(dialog(page)).to_contain_text("Delete dashes?")
    expect(dialog(page).get_by_role("alert")).to_have_count(0)
    assert {"shout", "dashes"} <= listed(server).keys()
    faults.clear()


@pytest.mark.parametrize("answer", ["<html>Sign in</html>", '{"name": "cut'])
def test_an_answer_that_is_not_the_servers_ends_an_upload(page: Page, tmp_path: Path, answer: str) -> None:
    """A proxy's page to sign in, or half an answer: the next in line must not wait for it for ever."""
    ready(page)
    page.get_by_role("button", name="Add adapter").click()
    panel = page.locator("section.upload")
    page.route("**/v1/adapters", lambda route: route.fulfill(status=200, body=answer))
    for name in ("one", "two"):
        pick_directory(panel, copied("dashes", tmp_path / name))
    panel.get_by_role("button", name="Upload all (2)").click()
    for name in ("one", "two"):
        expect(job(panel, name).get_by_role("alert")).to_contain_text("The answer broke off, or is not one of")


def test_such_an_answer_to_a_question_says_so(page: Page, faults: list[str]) -> None:
    ready(page)
    page.route("**/v1/adapters?*", lambda route: route.fulfill(status=200, body="<html>Sign in</html>"))
    expect(page.get_by_text("This list is not up to date: The answer broke off, or is not one of")).to_be_visible()
    page.unroute("**/v1/adapters?*")
    page.route("**/v1/adapters?*", lambda route: route.fulfill(status=502, json={"error": "bad gateway"}))
    expect(page.get_by_text("This list is not up to date: HTTP 502: ")).to_contain_text("bad gateway")
    faults.clear()


def test_a_key_that_no_header_can_have(browser: Browser, keyed: Server, faults: list[str]) -> None:
    with opened(browser, keyed, faults) as page:
        expect(page.locator("dialog[open]")).to_be_visible()
        for key in ("schlüssel", "admin key", "“admin-key”"):
            use_key(page, key)
            expect(page.locator("dialog .refusal")).to_contain_text("it has letters that no key has")
        use_key(page, "admin-key")
        ready(page)


def test_a_digest_is_copied_where_the_browser_has_no_clipboard(page: Page) -> None:
    """On pages without TLS it has none."""
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.reload()
    row(page, "shout").get_by_role("button", name="Copy the digest").click()
    expect(row(page, "shout").get_by_text("Copied", exact=True)).to_be_attached()
    expect(page.locator(".notice")).to_have_count(0)


def test_a_drop_that_holds_nothing_says_so(page: Page, tmp_path: Path) -> None:
    ready(page)
    (tmp_path / "empty").mkdir()
    drop_directories(page, [tmp_path / "empty"])
    expect(notice(page, "There are no files in what was dropped.")).to_be_visible()
    expect(page.locator("section.upload")).to_have_count(0)


def test_a_drop_that_lies_too_deep_says_so(page: Page, tmp_path: Path) -> None:
    ready(page)
    top = tmp_path / "runs"
    top.joinpath(*"abcde").mkdir(parents=True)
    copied("shout", top / "near")
    copied("dashes", top.joinpath(*"abcde", "far"))
    drop_directories(page, [top])
    expect(job(page.locator("section.upload"), "near")).to_be_visible()
    expect(notice(page, "Not all of it was looked at")).to_be_visible()
