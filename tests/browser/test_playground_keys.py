"""The playground with API keys: what a key may not do is not offered, and a wrong one is asked for anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from service.demo.run import ASSETS
from tests.browser.playing import column, finished, open_playground, option, pick, run, text_of
from tests.e2e.test_api_keys import make_key
from tests.server import Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keyed")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    file = folder / "keys"
    return {
        "infer": make_key(file, "--scopes", "infer"),
        "admin": make_key(file, "--scopes", "admin"),
        "acme": make_key(file, "--tenant", "acme"),
    }


@pytest.fixture(scope="module")
def server(folder: Path, keys: dict[str, str]) -> Iterator[Server]:
    adapters = [f"--adapter={name}={ASSETS / 'adapters' / name}" for name in ("shout", "dashes")]
    options = ["--api-key-file", str(folder / "keys"), "--no-metrics-public"]
    with Server("serve", "--model", str(ASSETS / "base"), *adapters, *options, data_dir=folder / "data") as started:
        yield started


def use(page: Page, key: str, faults: list[str]) -> None:
    """In place of the page's question for a key. That it was opened without one is logged before it asks."""
    expect(page.locator("dialog .refusal")).to_be_visible()
    faults.clear()
    page.evaluate("key => sessionStorage.setItem('vblora.key', key)", key)
    page.reload()


def test_a_key_that_only_infers_cannot_save(
    page: Page, server: Server, keys: dict[str, str], faults: list[str]
) -> None:
    use(page, keys["infer"], faults)
    open_playground(page)
    option(page, "New tokens", "6")
    pick(page, "Adapter of column B", "shout")
    run(page)
    finished(page)
    headers = {"Authorization": f"Bearer {keys['infer']}"}
    body = {"prompt": "Open a file and", "adapter": "shout", "temperature": 0, "max_new_tokens": 6}
    expected = server.http.post("/v1/generate", json=body, headers=headers).json()["choices"][0]["text"]
    assert text_of(column(page, "B")) == expected
    column(page, "B").get_by_role("button", name="Blend", exact=True).click()
    save = column(page, "B").get_by_role("button", name="Save as an adapter")
    expect(save).to_be_disabled()
    expect(save).to_have_attribute("title", "This key may not change adapters.")


def test_a_key_without_the_scope_cannot_run(page: Page, keys: dict[str, str], faults: list[str]) -> None:
    use(page, keys["admin"], faults)
    page.goto("/#/playground")
    button = page.get_by_role("button", name="Run")
    expect(button).to_be_disabled()
    expect(button).to_have_attribute("title", "This key may not run requests.")


def test_a_wrong_key_is_asked_for_anew(page: Page, server: Server, keys: dict[str, str], faults: list[str]) -> None:
    use(page, "wrong", faults)
    said = server.http.get("/v1/whoami", headers={"Authorization": "Bearer wrong"}).json()["error"]["message"]
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".refusal")).to_have_text(said)
    dialog.get_by_label("Key").fill(keys["infer"])
    dialog.get_by_role("button", name="Use").click()
    expect(dialog).to_be_hidden()
    open_playground(page)
    faults.clear()


def test_the_live_view_says_what_a_tenant_may_not_know(page: Page, keys: dict[str, str], faults: list[str]) -> None:
    use(page, keys["acme"], faults)
    page.goto("/#/live")
    for title in ("Requests", "Tokens per second", "Time to the first token", "Memory"):
        chart = page.locator(".chart", has=page.get_by_role("heading", name=title, exact=True))
        expect(chart).to_contain_text("Not shown to this key")
    expect(page.locator(".now-facts")).to_contain_text("not shown to this key")
    expect(page.get_by_role("figure", name="Batch by adapter")).to_contain_text("Only this key's own requests")
    assert not faults
