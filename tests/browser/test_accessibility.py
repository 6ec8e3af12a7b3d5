"""Every view by axe-core, for WCAG 2.2 AA: names, roles, order and contrast, in both schemes and at both widths."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.adapters import ADAPTERS, command, dialog, keyed_server, opened, ready
from tests.browser.playing import blend, finished, open_playground, run
from tests.browser.test_adapter_page import show
from tests.browser.test_live import open_live
from tests.server import Server

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


def adapters(page: Page) -> None:
    ready(page)


def adding(page: Page) -> None:
    """The panel with one adapter in it that the server has refused, since its name exists."""
    ready(page)
    page.get_by_role("button", name="Add adapter").click()
    panel = page.locator("section.upload")
    panel.get_by_label("A directory", exact=True).set_input_files(ADAPTERS / "dashes")
    panel.get_by_role("button", name="Upload", exact=True).first.click()
    expect(panel.get_by_text("adapter_exists")).to_be_visible()


def menu(page: Page) -> None:
    ready(page)
    expect(command(page, "dashes", "Delete")).to_be_visible()


def asked(page: Page) -> None:
    menu(page)
    page.get_by_role("menuitem", name="Delete").click()
    expect(dialog(page)).to_be_visible()


def adapter(page: Page) -> None:
    show(page, "dashes")


def playground(page: Page) -> None:
    """Two answers that differ, one of them a blend's."""
    open_playground(page)
    blend(page, "B", {"dashes": 0.5, "shout": 0.5})
    page.get_by_label("Prompt", exact=True).fill("The default value is")
    run(page)
    finished(page)


def live(page: Page) -> None:
    open_live(page)


VIEWS = (adapters, adding, menu, asked, adapter, playground, live)


def violations(page: Page) -> list[str]:
    """What axe finds, one line for each element."""
    found: dict[str, Any] = Axe().run(page, options=RULES).response
    assert found["passes"], "it has looked at nothing"
    return [
        f"{rule['id']}: {node['target']}: {json.dumps(node['failureSummary'])}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    browser: Browser, server: Server, faults: list[str], scheme: Any, width: int, view: Callable[[Page], None]
) -> None:
    options = {"viewport": {"width": width, "height": 860}, "color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, server, faults, **options) as page:
        view(page)
        assert violations(page) == []
    assert [fault for fault in faults if "409" not in fault] == [], "a name that exists is refused on purpose"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nor_where_a_key_is_asked_for(
    browser: Browser, faults: list[str], scheme: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        keyed_server(tmp_path_factory.mktemp("keyed")) as server,
        opened(browser, server, faults, color_scheme=scheme) as page,
    ):
        expect(page.get_by_label("Key", exact=True)).to_be_visible()
        assert violations(page) == []
