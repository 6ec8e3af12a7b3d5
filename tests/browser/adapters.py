"""What the tests of adapters' pages share: the demo's adapters, their rows, and a server that wants keys."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

from service.demo.run import ASSETS
from tests.browser.conftest import WAIT_MS, watch
from tests.server import Server, demo_server

ADAPTERS = ASSETS / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir())


def listed(server: Server) -> dict[str, dict[str, Any]]:
    return {adapter["name"]: adapter for adapter in server.http.get("/v1/adapters?limit=1000").json()["data"]}


def detail(server: Server, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get(f"/v1/adapters/{name}").json()
    return found


def uploaded(server: Server, name: str, source: str = "dashes") -> dict[str, Any]:
    """An adapter of that name, made from one of the demo's."""
    response = server.upload(name, ADAPTERS / source, replace="true")
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


def row(page: Page, name: str) -> Locator:
    return page.locator(f'table.adapters tr[data-name="{name}"]')


def shown_names(page: Page) -> list[str]:
    return page.locator("table.adapters tbody th.name a").all_inner_texts()


def command(page: Page, name: str, label: str) -> Locator:
    """A command of a row's menu, opened."""
    row(page, name).get_by_role("button", name=f"More for {name}").click()
    return page.get_by_role("menuitem", name=label)


def dialog(page: Page) -> Locator:
    return page.locator("dialog.confirm[open]")


def notice(page: Page, text: str) -> Locator:
    return page.locator(".notice", has_text=text)


def until(page: Page, condition: Callable[[], bool]) -> None:
    """Asks the server again and again, for as long as a page may take."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        page.wait_for_timeout(20)  # the page's events come meanwhile; its own clock may stand still


def lora_of(server: Server, name: str, folder: Path) -> Path:
    """An adapter as plain LoRA, in a directory."""
    archive = server.http.get(f"/v1/adapters/{name}/export?format=lora").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder / name


def copied(source: str, folder: Path, **config: Any) -> Path:
    """One of the demo's adapters in a directory of one's own; with other values in its config, if given."""
    folder.mkdir(parents=True)
    for file in (ADAPTERS / source).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@contextmanager
def keyed_server(folder: Path) -> Iterator[Server]:
    """The demo, for three keys: "admin-key", "infer-key" and "tenant-key" (of acme, for everything)."""
    keys = folder / "keys"
    keys.write_text("admin-key name=admin\ninfer-key scopes=infer name=app\ntenant-key tenant=acme name=acme\n")
    keys.chmod(0o600)
    with demo_server(folder / "data", "--api-key-file", str(keys)) as server:
        server.http.headers["Authorization"] = "Bearer admin-key"
        yield server


@contextmanager
def opened(browser: Browser, server: Server, faults: list[str], path: str = "/", **options: Any) -> Iterator[Page]:
    """A page of its own, in a context with those options."""
    options = {"viewport": {"width": 1280, "height": 860}, **options}
    with browser.new_context(base_url=server.url, **options) as context:
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        watch(page, server.url, faults)
        page.goto(path)
        yield page


def use_key(page: Page, key: str) -> None:
    """Answers the page's question for a key."""
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use", exact=True).click()


def has_no_sideways_scroll(page: Page) -> bool:
    wide: bool = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    return wide


def ready(page: Page) -> None:
    expect(page.locator("table.adapters tbody tr").first).to_be_visible()
