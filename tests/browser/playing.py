"""The playground as a user handles it: its columns, their pickers, and what they were answered."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import WAIT_MS


def open_playground(page: Page, linked: str = "") -> None:
    page.goto(f"/#/playground{linked}")
    expect(page.get_by_role("heading", name="Playground")).to_be_visible()
    expect(page.get_by_role("button", name="Run")).to_be_enabled()


def column(page: Page, letter: str) -> Locator:
    return page.get_by_role("region", name=re.compile(f"^Column {letter}:"))


def pick(page: Page, label: str, name: str) -> None:
    """Chooses in a picker by typing."""
    box = page.get_by_role("combobox", name=label, exact=True)
    box.fill(name)
    box.press("Enter")
    expect(box).to_have_value(name)


def blend(page: Page, letter: str, weights: dict[str, float]) -> None:
    """Makes a column a blend of just these."""
    own = column(page, letter)
    own.get_by_role("button", name="Blend", exact=True).click()
    rows = own.get_by_role("group", name=re.compile(r", adapter \d+$"))
    while rows.count() > 0:
        rows.first.get_by_role("button", name="Remove").click()
    for i, (name, weight) in enumerate(weights.items(), 1):
        own.get_by_role("button", name="Add an adapter").click()
        title = f"column {letter}, adapter {i}"
        pick(page, title, name)
        weigh = own.get_by_label(f"Weight of {title}, as a number")
        weigh.clear()
        weigh.press_sequentially(str(weight))


def option(page: Page, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).fill(value)


def run(page: Page) -> None:
    page.get_by_role("button", name="Run").click()


def finished(page: Page) -> None:
    """Every column has ended in some way."""
    expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=WAIT_MS)


def text_of(one: Locator) -> str:
    """The answer as it stands in the column, without the caret."""
    without = "text => [...text.childNodes].filter(node => node.className !== 'caret')"
    return str(one.locator(".text").evaluate(f"{without}.map(node => node.textContent).join('')"))


def fact(one: Locator, name: str) -> Locator:
    return one.locator(".answer-facts > div", has=one.page.get_by_text(name, exact=True)).locator("dd")
