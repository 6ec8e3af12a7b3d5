"""Adapters that come in through the page: picked, dropped, fetched by the server, and refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.adapters import (
    ADAPTERS,
    copied,
    detail,
    has_no_sideways_scroll,
    keyed_server,
    listed,
    opened,
    ready,
    row,
    uploaded,
    use_key,
)
from tests.browser.conftest import screenshot
from tests.server import Server

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def panel(page: Page) -> Locator:
    """Where adapters are added, opened."""
    ready(page)
    page.get_by_role("button", name="Add adapter").click()
    return page.locator("section.upload")


def pick_directory(panel: Locator, directory: Path) -> None:
    panel.get_by_label("A directory", exact=True).set_input_files(directory)


def pick_files(panel: Locator, *files: Path) -> None:
    panel.get_by_label("Files", exact=True).set_input_files(files)


def broken(folder: Path, content: bytes = b"this is no safetensors file at all") -> Path:
    directory = copied("dashes", folder)
    (directory / WEIGHTS).write_bytes(content)
    return directory


def drop_files(page: Page, files: list[Path]) -> None:
    """A drop of files as a page may make one itself; see drop_directories for one of the system's."""
    contents = [{"name": file.name, "data": base64.b64encode(file.read_bytes()).decode()} for file in files]
    transfer = page.evaluate_handle(
        """(files) => {
          const transfer = new DataTransfer()
          for (const { name, data } of files) {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))
            transfer.items.add(new File([bytes], name))
          }
          return transfer
        }""",
        contents,
    )
    for event in ("dragenter", "dragover"):
        page.dispatch_event("table.adapters", event, {"dataTransfer": transfer})
    expect(page.get_by_text("Drop adapter directories or their files")).to_be_visible()
    page.dispatch_event("table.adapters", "drop", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop adapter directories or their files")).to_have_count(0)


def drop_directories(page: Page, directories: list[Path]) -> None:
    """As the system drops them from a file manager."""
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(directory) for directory in directories], "dragOperationsMask": 1}
    for event in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": event, "x": 400, "y": 300, "data": data})


def job(panel: Locator, name: str) -> Locator:
    return panel.get_by_role("form", name=f"Upload {name}", exact=True)


def test_a_directory_is_picked_named_and_uploaded(panel: Locator, page: Page, server: Server, tmp_path: Path) -> None:
    directory = copied("snake", tmp_path / "my snake")
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (directory / "README.md").write_text("not an adapter's file")
    pick_directory(panel, directory)
    form = job(panel, "my-snake")
    expect(form.get_by_label("Name", exact=True)).to_have_value("my-snake")
    expect(form).to_contain_text("1 other file is not sent")
    form.get_by_role("button", name="Upload", exact=True).click()
    expect(panel.get_by_text("Stored as my-snake.")).to_be_visible()
    expect(row(page, "my-snake")).to_be_visible()
    archive = server.http.get("/v1/adapters/my-snake/export").content
    assert b"{{ messages[0].content }}" in archive, "its chat template came along"
    assert (ADAPTERS / "snake" / WEIGHTS).read_bytes() in archive
    panel.get_by_role("button", name="Dismiss").click()
    expect(panel.get_by_role("form")).to_have_count(0)


def test_files_are_picked_one_by_one(panel: Locator, page: Page, server: Server) -> None:
    pick_files(panel, ADAPTERS / "shout" / CONFIG)
    form = job(panel, "")
    expect(form).to_contain_text(f"{WEIGHTS} is missing")
    expect(form.get_by_role("button", name="Upload", exact=True)).to_be_disabled()
    pick_files(panel, ADAPTERS / "shout" / WEIGHTS)
    expect(panel.get_by_role("form")).to_have_count(1)
    name = panel.get_by_label("Name", exact=True)
    name.fill("one/by one")
    expect(panel.get_by_text("the first a letter or a digit")).to_be_visible()
    expect(name).to_have_attribute("aria-invalid", "true")
    expect(panel.get_by_role("button", name="Upload", exact=True)).to_be_disabled()
    name.fill("one-by-one")
    name.press("Enter")
    expect(panel.get_by_text("Stored as one-by-one.")).to_be_visible()
    assert listed(server)["one-by-one"]["digest"] == listed(server)["shout"]["digest"]


def test_activate_and_replace(panel: Locator, page: Page, server: Server, tmp_path: Path) -> None:
    before = uploaded(server, "changing", "shout")["digest"]
    pick_directory(panel, copied("dashes", tmp_path / "changing"))
    form = job(panel, "changing")
    expect(form).to_contain_text("An adapter of this name exists")
    form.get_by_label("Replace one of this name").check()
    expect(form).not_to_contain_text("An adapter of this name exists")
    form.get_by_label("Then").select_option("activate it, merged")
    form.get_by_role("button", name="Upload", exact=True).click()
    expect(row(page, "changing").locator(".badge.active")).to_have_text("active, merged")
    now = detail(server, "changing")
    assert now["mode"] == "merge"
    assert [version["digest"] for version in now["versions"]] == [listed(server)["dashes"]["digest"], before]
    server.http.post("/v1/adapters/changing/deactivate")


def test_a_refusal_is_shown_word_for_word_and_what_was_chosen_stays(
    panel: Locator, page: Page, server: Server, tmp_path: Path, faults: list[str]
) -> None:
    directory = broken(tmp_path / "broken")
    error = server.upload("broken", directory).json()["error"]
    assert error["code"] == "invalid_safetensors"
    pick_directory(panel, directory)
    form = job(panel, "broken")
    form.get_by_role("button", name="Upload", exact=True).click()
    expect(form.get_by_role("alert")).to_have_text(f"{error['message']} {error['code']}")
    expect(form.get_by_label("Name", exact=True)).to_have_value("broken")
    expect(form).to_contain_text(WEIGHTS)
    screenshot(page, "upload-refused")
    assert "broken" not in listed(server)
    faults.clear()  # the 422


def test_what_was_refused_is_mended_and_tried_again(
    panel: Locator, page: Page, server: Server, tmp_path: Path, faults: list[str]
) -> None:
    pick_directory(panel, copied("dashes", tmp_path / "shout"))
    form = job(panel, "shout")
    form.get_by_role("button", name="Upload", exact=True).click()
    expect(form.get_by_role("alert")).to_contain_text("adapter_exists")
    words = server.upload("shout", ADAPTERS / "dashes").json()["error"]["message"]
    expect(form.get_by_role("alert")).to_contain_text(words)
    faults.clear()
    form.get_by_label("Name", exact=True).fill("shout-2")
    panel.get_by_role("button", name="Try again").click()
    expect(row(page, "shout-2")).to_be_visible()
    assert listed(server)["shout-2"]["digest"] == listed(server)["dashes"]["digest"]


def test_another_base_is_allowed_when_asked(
    panel: Locator, page: Page, server: Server, tmp_path: Path, faults: list[str]
) -> None:
    pick_directory(panel, copied("dashes", tmp_path / "foreign", base_model_name_or_path="org/other-model"))
    form = job(panel, "foreign")
    form.get_by_role("button", name="Upload", exact=True).click()
    expect(form.get_by_role("alert")).to_contain_text("base_model_mismatch")
    faults.clear()
    form.get_by_label("Allow another base model").check()
    form.get_by_role("button", name="Try again").click()
    expect(row(page, "foreign")).to_be_visible()
    assert listed(server)["foreign"]["warnings"]


def test_files_are_dropped(page: Page, server: Server) -> None:
    ready(page)
    drop_files(page, [ADAPTERS / "quoted" / CONFIG, ADAPTERS / "quoted" / WEIGHTS])
    panel = page.locator("section.upload")
    panel.get_by_label("Name", exact=True).fill("dropped")
    panel.get_by_role("button", name="Upload", exact=True).click()
    expect(row(page, "dropped")).to_be_visible()
    assert listed(server)["dropped"]["digest"] == listed(server)["quoted"]["digest"]


def test_directories_dropped_at_once_are_queued(page: Page, server: Server, tmp_path: Path, faults: list[str]) -> None:
    ready(page)
    copied("shout", tmp_path / "run" / "first")
    copied("dashes", tmp_path / "run" / "third")
    (tmp_path / "run" / "log.txt").write_text("of the training")
    drop_directories(page, [tmp_path / "run", broken(tmp_path / "second")])
    panel = page.locator("section.upload")
    expect(panel.get_by_role("form")).to_have_count(3)
    screenshot(page, "upload-queue")
    panel.get_by_role("button", name="Upload all (3)").click()
    expect(panel.get_by_text("Stored as first.")).to_be_visible()
    expect(panel.get_by_text("Stored as third.")).to_be_visible()
    expect(job(panel, "second").get_by_role("alert")).to_contain_text("invalid_safetensors")
    assert {"first", "third"} <= listed(server).keys()
    assert "second" not in listed(server)
    panel.get_by_role("button", name="Clear those that are stored").click()
    expect(panel.get_by_role("form")).to_have_count(1)
    faults.clear()


def watch_progress(page: Page) -> None:
    """Collects every text that an upload's progress has."""
    page.evaluate(
        """() => {
          window.seen = []
          new MutationObserver(() => {
            for (const shown of document.querySelectorAll('.sending')) window.seen.push(shown.innerText)
          }).observe(document.body, { childList: true, subtree: true, characterData: true })
        }"""
    )


def slow(page: Page, bytes_per_second: int) -> None:
    devtools = page.context.new_cdp_session(page)
    conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": bytes_per_second}
    devtools.send("Network.enable")
    devtools.send("Network.emulateNetworkConditions", conditions)


def test_progress_in_bytes_and_percent_then_the_check(
    panel: Locator, page: Page, server: Server, tmp_path: Path, faults: list[str]
) -> None:
    pick_directory(panel, broken(tmp_path / "large", content=b"\0" * 3_000_000))
    watch_progress(page)
    slow(page, 2_000_000)
    form = job(panel, "large")
    form.get_by_role("button", name="Upload", exact=True).click()
    expect(form.get_by_role("alert")).to_be_visible()
    seen: list[str] = page.evaluate("window.seen")
    assert any("of 3.0 MB, " in text and " %" in text for text in seen), seen
    parts = {int(text.rsplit(", ")[-1].removesuffix(" %")) for text in seen if ", " in text}
    assert any(0 < part < 100 for part in parts), parts
    assert "All sent. The server is checking it." in seen
    faults.clear()


def test_an_upload_is_cancelled(panel: Locator, page: Page, server: Server, tmp_path: Path) -> None:
    pick_directory(panel, broken(tmp_path / "endless", content=b"\0" * 8_000_000))
    slow(page, 200_000)
    form = job(panel, "endless")
    form.get_by_role("button", name="Upload", exact=True).click()
    expect(form.get_by_text("of 8.0 MB")).to_be_visible()
    expect(form.get_by_label("Name", exact=True)).to_be_disabled()
    screenshot(page, "upload-sending")
    form.get_by_role("button", name="Cancel").click()
    expect(form.get_by_role("progressbar")).to_have_count(0)
    expect(form.get_by_label("Name", exact=True)).to_be_enabled()
    expect(form).to_contain_text(WEIGHTS)
    assert "endless" not in listed(server)


def test_a_connection_that_breaks_says_so(panel: Locator, page: Page, tmp_path: Path, faults: list[str]) -> None:
    pick_directory(panel, copied("dashes", tmp_path / "lost"))
    page.route("**/v1/adapters", lambda route: route.abort())
    job(panel, "lost").get_by_role("button", name="Upload", exact=True).click()
    expect(job(panel, "lost").get_by_role("alert")).to_contain_text("The connection broke")
    expect(job(panel, "lost").get_by_role("button", name="Try again")).to_be_enabled()
    faults.clear()


def test_a_source_is_registered(panel: Locator, page: Page, server: Server) -> None:
    panel.get_by_label("A directory of the server, or the Hub").check()
    panel.get_by_label("Source", exact=True).fill(f"{ADAPTERS / 'snake'}/")
    expect(panel.get_by_label("Name", exact=True)).to_have_value("snake")
    panel.get_by_label("Name", exact=True).fill("from-disk")
    panel.get_by_label("Then").select_option("activate it")
    screenshot(page, "upload-source")
    panel.get_by_role("button", name="Register").click()
    expect(row(page, "from-disk").locator(".badge.active")).to_be_visible()
    assert detail(server, "from-disk")["active"]
    assert detail(server, "from-disk")["digest"] == listed(server)["snake"]["digest"]
    server.http.post("/v1/adapters/from-disk/deactivate")


def test_a_source_that_is_not_allowed_is_refused_word_for_word(
    panel: Locator, server: Server, faults: list[str]
) -> None:
    panel.get_by_label("A directory of the server, or the Hub").check()
    panel.get_by_label("Source", exact=True).fill("hf://org/my-adapter@v1")
    expect(panel.get_by_label("Name", exact=True)).to_have_value("my-adapter")
    panel.get_by_role("button", name="Register").click()
    asked = {"name": "my-adapter", "source": "hf://org/my-adapter@v1"}
    error = server.http.post("/v1/adapters", json=asked).json()["error"]
    expect(panel.get_by_role("alert")).to_have_text(f"{error['message']} {error['code']}")
    expect(panel.get_by_label("Source", exact=True)).to_have_value("hf://org/my-adapter@v1")
    faults.clear()


def test_what_is_no_adapter_says_what_is_missing(panel: Locator, tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"x")
    pick_directory(panel, tmp_path / "pickled")
    expect(panel.get_by_role("form")).to_contain_text(f"{CONFIG} is missing")
    expect(panel.get_by_role("form")).to_contain_text(f"{WEIGHTS} is missing")
    panel.get_by_role("button", name="Remove").click()
    expect(panel.get_by_role("form")).to_have_count(0)


def test_what_was_chosen_outlives_a_look_elsewhere(panel: Locator, page: Page, tmp_path: Path) -> None:
    pick_directory(panel, copied("dashes", tmp_path / "waiting"))
    page.get_by_role("link", name="shout", exact=True).click()
    expect(page.get_by_role("heading", name="shout")).to_be_visible()
    page.go_back()
    expect(job(panel, "waiting")).to_be_visible()
    expect(job(panel, "waiting").get_by_role("button", name="Upload", exact=True)).to_be_enabled()


# --- keys -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with keyed_server(tmp_path_factory.mktemp("keyed")) as server:
        yield server


def test_an_admin_key_uploads(browser: Browser, keyed: Server, tmp_path: Path, faults: list[str]) -> None:
    with opened(browser, keyed, faults) as page:
        use_key(page, "admin-key")
        ready(page)
        faults.clear()
        page.get_by_role("button", name="Add adapter").click()
        panel = page.locator("section.upload")
        pick_directory(panel, copied("shout", tmp_path / "with-a-key"))
        panel.get_by_role("button", name="Upload", exact=True).click()
        expect(row(page, "with-a-key")).to_be_visible()
        assert "with-a-key" in listed(keyed)


def test_an_infer_key_cannot_even_drop(browser: Browser, keyed: Server, tmp_path: Path, faults: list[str]) -> None:
    with opened(browser, keyed, faults) as page:
        use_key(page, "infer-key")
        ready(page)
        faults.clear()
        drop = [copied("shout", tmp_path / "refused")]
        devtools = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(drop[0])], "dragOperationsMask": 1}
        devtools.send("Input.dispatchDragEvent", {"type": "dragEnter", "x": 400, "y": 300, "data": data})
        expect(page.get_by_text("This key lacks the scope admin")).to_be_visible()
        devtools.send("Input.dispatchDragEvent", {"type": "drop", "x": 400, "y": 300, "data": data})
        expect(page.locator("section.upload")).to_have_count(0)
        assert page.url.startswith(keyed.url), "the browser did not open the file"


def test_a_queue_on_a_phone(browser: Browser, server: Server, faults: list[str], tmp_path: Path) -> None:
    with opened(browser, server, faults, viewport={"width": 390, "height": 844}) as page:
        ready(page)
        page.get_by_role("button", name="Add adapter").click()
        panel = page.locator("section.upload")
        pick_directory(panel, copied("shout", tmp_path / ("long-name." + "x" * 118)))
        pick_directory(panel, copied("shout", tmp_path / "short"))
        expect(panel.get_by_role("form")).to_have_count(2)
        assert has_no_sideways_scroll(page)
        screenshot(page, "upload-390")
