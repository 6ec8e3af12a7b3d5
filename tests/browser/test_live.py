"""The live view: what its charts and tables say, held against the server's own numbers, and when it asks for them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.browser.adapters import until
from tests.browser.conftest import WAIT_MS, screenshot
from tests.server import Server

EVERY_MS = 1000
DAY_MS = 86_400_000  # no test takes that long: the clock is never set back

COUNTED = """() => {
  window.asked = 0
  const real = window.fetch
  window.fetch = (...all) => { window.asked += String(all[0]).endsWith("/v1/stats"); return real(...all) }
}"""


def open_live(page: Page) -> None:
    page.goto("/#/live")
    expect(page.get_by_role("heading", name="Live")).to_be_visible()
    expect(page.locator(".now-facts")).to_be_visible()


def chart(page: Page, title: str) -> Locator:
    return page.get_by_role("figure", name=title, exact=True)


def value(page: Page, title: str, name: str) -> Locator:
    """What a chart's table says of one of its series."""
    row = chart(page, title).get_by_role("row", name=name)
    return row.get_by_role("cell").last


def fact(page: Page, name: str) -> Locator:
    return page.locator(".now-facts > div", has=page.get_by_text(name, exact=True)).locator("dd")


@pytest.fixture
def traffic(server: Server) -> Iterator[None]:
    """Two long generations at a time, again and again."""
    ended = threading.Event()

    def generate(**selection: Any) -> None:
        while not ended.is_set():
            server.generate("Open a file and", max_new_tokens=200, ignore_eos=True, **selection)

    blend = [{"name": "shout", "weight": 0.7}, {"name": "snake", "weight": 0.3}]
    threads = [
        threading.Thread(target=generate, kwargs={"adapter": "dashes"}),
        threading.Thread(target=generate, kwargs={"adapters": blend}),
    ]
    for thread in threads:
        thread.start()
    yield
    ended.set()
    for thread in threads:
        thread.join()


def test_charts_show_the_traffic(page: Page, server: Server, traffic: None) -> None:
    open_live(page)
    for name in ("dashes", "shout:0.7+snake:0.3"):
        expect(chart(page, "Batch by adapter").get_by_role("row", name=name)).to_be_visible(timeout=WAIT_MS)
    expect(value(page, "Requests", "Running")).to_have_text("2", timeout=WAIT_MS)
    expect(value(page, "Tokens per second", "Generated")).not_to_have_text("0", timeout=WAIT_MS)
    expect(value(page, "Time between tokens", "p95")).not_to_have_text("–", timeout=WAIT_MS)
    expect(chart(page, "Tokens per second").locator("path.line").first).to_have_attribute(
        "d", _drawn(3), timeout=WAIT_MS
    )
    expect(chart(page, "Batch by adapter").locator("path.area").first).to_have_attribute("d", _drawn(1))
    screenshot(page, "live-light")
    page.emulate_media(color_scheme="dark")
    screenshot(page, "live-dark")
    page.set_viewport_size({"width": 390, "height": 844})
    screenshot(page, "live-phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def _drawn(points: int) -> re.Pattern[str]:
    """Anywhere in a path: where an answer was late there is a gap, and what is before it may be short."""
    return re.compile(rf"M[\d.,-]+(L[\d.,-]+){{{points},}}")


def test_the_numbers_are_the_servers(page: Page, server: Server) -> None:
    server.generate("Open a file and", adapter="shout", max_new_tokens=20)
    open_live(page)
    stats = server.http.get("/v1/stats").json()
    expect(fact(page, "State")).to_have_text("ready")
    expect(fact(page, "Tokens generated")).to_have_text(f"{stats['completion_tokens']:,}")
    expect(fact(page, "Running")).to_have_text("0")
    expect(value(page, "Requests", "Waiting")).to_have_text("0")
    megabytes = f"{stats['memory']['weight_bytes'] / 1e6:.1f} MB"
    expect(value(page, "Memory", "Base weights")).to_have_text(megabytes)
    limits = stats["limits"]
    note = f"At most {limits['max_batch_size']} run at once and {limits['max_queue']} wait."
    expect(chart(page, "Requests")).to_contain_text(note)


class FakeStats:
    """The server's stats with what a test puts into them, a second later at each answer unless it says when.

    Once the view is open the page's clock stands still, but for what `tick` lets it run: how many answers there are is
    the test's to say, however busy the machine is.
    """

    def __init__(self, page: Page, server: Server) -> None:
        self.stats: dict[str, Any] = server.http.get("/v1/stats").json()
        self.asked = 0
        self._page = page
        page.clock.install(time=0)
        page.route("**/v1/stats", self._answer)
        page.evaluate(COUNTED)

    def _answer(self, route: Route) -> None:
        self.asked += 1
        self.stats["time"] += 1
        self.stats["completion_tokens"] = self.asked  # by which it is seen that the page has this answer
        route.fulfill(json=self.stats)

    def open(self) -> None:
        open_live(self._page)
        self._page.clock.pause_at(DAY_MS)
        self.settle(1)

    def settle(self, least: int) -> None:
        """Waits for as many questions, and until the page shows the last answer."""

        def settled() -> bool:
            asked = self._page.evaluate("window.asked")
            return asked >= least and asked == self.asked and told.inner_text() == f"{asked:,}"

        told = fact(self._page, "Tokens generated")
        until(self._page, settled)

    def tick(self, seconds: int = 1) -> None:
        """Lets the page's clock run, a second and its answer at a time."""
        for _ in range(seconds):
            asked = self.asked
            self._page.clock.run_for(EVERY_MS)
            self.settle(asked + 1)


def test_a_pause_is_a_gap_and_an_earlier_moment_can_be_read(page: Page, server: Server) -> None:
    fake = FakeStats(page, server)
    fake.stats["running"] = 1
    fake.open()
    fake.tick(3)
    fake.stats["running"] = 2
    fake.stats["time"] += 60
    fake.tick(3)
    line = chart(page, "Requests").locator("path.line").first
    expect(line).to_have_attribute("d", _parts(2))

    expect(value(page, "Requests", "Running")).to_have_text("2")
    plot = chart(page, "Requests").get_by_role("group")
    plot.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(value(page, "Requests", "Running")).to_have_text("1")
    expect(chart(page, "Requests").locator(".when")).to_have_text("1 min 3 s ago")
    expect(chart(page, "Memory").locator(".when")).to_have_text("1 min 3 s ago")  # all charts show one moment
    expect(chart(page, "Requests").locator("[aria-live]")).to_contain_text("1 min 3 s ago: Running 1, Waiting 0")
    page.keyboard.press("Escape")
    expect(value(page, "Requests", "Running")).to_have_text("2")
    expect(chart(page, "Requests").locator(".when")).to_have_text("now")

    box = chart(page, "Requests").locator(".chart-plot svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 80, box["y"] + 60)  # far on the left: the first moment
    expect(value(page, "Requests", "Running")).to_have_text("1")


def _parts(count: int) -> re.Pattern[str]:
    return re.compile(rf"^(M[^M]+){{{count}}}$")


def test_only_a_page_that_is_seen_asks(page: Page, server: Server) -> None:
    fake = FakeStats(page, server)
    fake.open()
    fake.tick(2)
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => window.isHidden, configurable: true })")
    _hide(page, hidden=True)
    asked = fake.asked
    page.clock.run_for(20 * EVERY_MS)
    assert fake.asked == asked
    _hide(page, hidden=False)
    fake.settle(asked + 1)
    fake.tick(2)
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_role("heading", name="Playground")).to_be_visible()
    asked = fake.asked
    page.clock.run_for(20 * EVERY_MS)
    assert fake.asked == asked


def _hide(page: Page, *, hidden: bool) -> None:
    page.evaluate(
        "hidden => { window.isHidden = hidden; document.dispatchEvent(new Event('visibilitychange')) }", hidden
    )


def test_it_asks_once_a_second(page: Page, server: Server) -> None:
    """However often it is hidden and shown while an answer is on its way."""
    fake = FakeStats(page, server)
    fake.open()
    fake.tick()
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => window.isHidden, configurable: true })")
    for _ in range(5):
        _hide(page, hidden=True)
        _hide(page, hidden=False)
    fake.tick(2)  # what the showing has asked is answered, and it is asked by the clock again
    asked = fake.asked
    fake.tick(5)
    assert fake.asked == asked + 5


def test_many_selections_are_eight_and_others_and_keep_their_colours(page: Page, server: Server) -> None:
    fake = FakeStats(page, server)
    fake.stats["batch"] = [{"selection": f"adapter-{i:02}", "rows": 20 - i} for i in range(12)]
    fake.stats["batch"].append({"selection": None, "rows": 5})
    fake.open()
    fake.tick(2)
    batch = chart(page, "Batch by adapter")
    rows = batch.get_by_role("row")
    expect(rows).to_have_count(10)
    expect(value(page, "Batch by adapter", "all others")).to_have_text(str(sum(20 - i for i in range(8, 12))))
    expect(value(page, "Batch by adapter", "other tenants")).to_have_text("5")

    def colour(name: str) -> str | None:
        return batch.get_by_role("row", name=name).locator("rect").get_attribute("fill")

    before = {f"adapter-{i:02}": colour(f"adapter-{i:02}") for i in range(8)}
    assert len(set(before.values())) == 8
    fake.stats["batch"] = [{"selection": "late", "rows": 900}]
    fake.tick(2)
    expect(batch.get_by_role("row", name="late")).to_be_visible()
    kept = {name: colour(name) for name in list(before)[:7]}
    assert kept == {name: before[name] for name in kept}
    assert colour("late") == before["adapter-07"]
    screenshot(page, "live-many")


def test_a_server_that_is_away_is_named_and_comes_back(page: Page, server: Server, faults: list[str]) -> None:
    open_live(page)
    page.route("**/v1/stats", lambda route: route.abort())
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.unroute("**/v1/stats")
    expect(page.get_by_role("alert")).to_have_count(0)
    faults.clear()
