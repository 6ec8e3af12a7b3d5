"""An adapter's own page: what it says is what the server does, down to each cell of the bank's picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.adapters import (
    detail,
    dialog,
    has_no_sideways_scroll,
    keyed_server,
    lora_of,
    notice,
    opened,
    ready,
    row,
    uploaded,
    use_key,
)
from tests.browser.conftest import screenshot
from tests.server import Server


def show(page: Page, name: str) -> None:
    """Opens an adapter's page, and waits until all of it is there."""
    page.goto(f"/#/adapters/{name}")
    expect(page.get_by_role("heading", name=name, exact=True, level=1)).to_be_visible()
    expect(page.locator(".facts")).to_be_visible()
    expect(page.locator("table.bars")).to_be_visible()


def fact(page: Page, name: str) -> Locator:
    return page.locator(".facts > div", has=page.locator("dt", has_text=re.compile(f"^{name}$"))).locator("dd")


def bank(server: Server, name: str, columns: int) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get(f"/v1/adapters/{name}/bank?columns={columns}").json()
    return found


def percent(share: float) -> str:
    return "0 %" if share == 0 else "< 0.1 %" if share < 0.001 else f"{share * 100:.1f} %"


def test_it_is_reached_from_the_table_and_says_what_the_server_does(page: Page, server: Server) -> None:
    server.generate("x", adapter="dashes", max_new_tokens=1)
    ready(page)
    row(page, "dashes").get_by_role("link", name="dashes").click()
    show(page, "dashes")
    adapter = detail(server, "dashes")
    expect(fact(page, "Digest").locator("code")).to_have_text(adapter["digest"])
    expect(fact(page, "State")).to_have_text("ready")
    expect(fact(page, "Rank")).to_have_text(str(adapter["r"]))
    expect(fact(page, "Bank")).to_have_text(
        f"{adapter['num_vectors']} vectors of length {adapter['vector_length']}, top {adapter['topk']} mixed"
    )
    expect(fact(page, "Requests")).to_contain_text(str(adapter["requests"]))
    expect(fact(page, "On disk")).to_have_text(f"{adapter['file_bytes'] / 1000:.1f} kB")
    page.get_by_role("heading", name="Layers").click()
    for module in adapter["target_modules"]:
        expect(page.locator(".blocks")).to_contain_text(module.rsplit(".", 2)[-1])
    page.get_by_role("heading", name="Config").click()
    for key, value in adapter["config"].items():
        line = page.locator("table.config tr", has=page.get_by_role("rowheader", name=key, exact=True))
        expect(line.locator("td")).to_be_visible()
        assert json.loads(line.locator("td").inner_text()) == value
    page.get_by_role("link", name="← Adapters").click()
    ready(page)


def test_parameters_are_drawn_to_scale(page: Page, server: Server) -> None:
    show(page, "bullets")
    counted = server.http.get("/v1/adapters/bullets/parameters").json()
    bars = page.locator("table.bars tr")
    expect(bars.nth(1).locator(".number")).to_have_text(f"{counted['vblora_params']:,}")
    expect(bars.nth(2).locator(".number")).to_have_text(f"{counted['full_logits_params']:,}")
    expect(bars.nth(3).locator(".number")).to_have_text(f"{counted['lora_params']:,}")
    expect(page.get_by_text(counted["summary"])).to_be_visible()
    expect(page.get_by_text("6.4× fewer parameters than plain LoRA of rank 4.")).to_be_visible()
    wide = [bars.nth(i).locator(".part").last.bounding_box() for i in (2, 3)]
    assert wide[0]
    assert wide[1]
    logits = counted["full_logits_params"] - counted["vector_bank_params"]
    assert wide[1]["width"] / wide[0]["width"] == pytest.approx(counted["lora_params"] / logits, rel=0.02)


def test_activate_merge_and_deactivate(page: Page, server: Server) -> None:
    show(page, "shout")
    page.get_by_role("button", name="Activate", exact=True).click()
    expect(page.locator(".heading .badge.active")).to_have_text("active")
    assert detail(server, "shout")["mode"] == "switch"
    page.get_by_role("button", name="Merge", exact=True).click()
    expect(page.locator(".heading .badge.active")).to_have_text("active, merged")
    assert detail(server, "shout")["mode"] == "merge"
    page.get_by_role("button", name="Unmerge").click()
    expect(page.locator(".heading .badge.active")).to_have_text("active")
    assert detail(server, "shout")["mode"] == "switch"
    page.get_by_role("button", name="Deactivate").click()
    expect(page.locator(".heading .badge.active")).to_have_count(0)
    assert not detail(server, "shout")["active"]


def test_roll_back_to_an_earlier_version(page: Page, server: Server) -> None:
    first = uploaded(server, "versioned", "shout")["digest"]
    second = uploaded(server, "versioned", "dashes")["digest"]
    show(page, "versioned")
    lines = page.locator("table.versions tbody tr")
    expect(lines).to_have_count(2)
    expect(lines.nth(0)).to_contain_text(second.removeprefix("sha256:")[:12])
    expect(lines.nth(0)).to_contain_text("current")
    lines.nth(1).get_by_role("button", name="Roll back").click()
    expect(dialog(page)).to_contain_text(f"with the version {first.removeprefix('sha256:')[:12]}")
    page.keyboard.press("Escape")
    expect(dialog(page)).to_have_count(0)
    assert detail(server, "versioned")["digest"] == second
    lines.nth(1).get_by_role("button", name="Roll back").click()
    dialog(page).get_by_role("button", name="Roll back").click()
    expect(fact(page, "Digest").locator("code")).to_have_text(first)
    assert detail(server, "versioned")["digest"] == first
    current = {version["digest"]: version["current"] for version in detail(server, "versioned")["versions"]}
    assert current == {first: True, second: False}
    expect(page.get_by_role("button", name=f"Roll back to {second.removeprefix('sha256:')[:12]}")).to_be_visible()


def test_export(page: Page, server: Server) -> None:
    show(page, "snake")
    page.get_by_role("button", name="Export").click()
    expect(page.get_by_role("menuitem")).to_have_count(3)
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="As plain LoRA").click()
    expected = server.http.get("/v1/adapters/snake/export?format=lora").content
    assert download.value.path().read_bytes() == expected
    assert download.value.suggested_filename == "snake-lora.tar"


def test_delete_goes_back_to_the_table(page: Page, server: Server) -> None:
    uploaded(server, "doomed")
    show(page, "doomed")
    page.get_by_role("button", name="Delete").click()
    expect(dialog(page)).to_contain_text("Delete doomed?")
    dialog(page).get_by_role("button", name="Delete").click()
    ready(page)
    expect(row(page, "doomed")).to_have_count(0)
    expect(notice(page, "doomed was deleted.")).to_be_visible()
    assert server.http.get("/v1/adapters/doomed").status_code == 404


def test_a_blend_names_its_parents(page: Page, server: Server) -> None:
    members = [{"name": "shout", "weight": 1.0}, {"name": "bullets", "weight": -0.5}]
    assert server.http.post("/v1/blends", json={"name": "mixed", "adapters": members}).status_code == 201
    show(page, "mixed")
    blend = page.locator("section", has=page.get_by_role("heading", name="Blended from"))
    expect(blend.get_by_role("row")).to_have_count(3)
    expect(blend.get_by_role("row").nth(2)).to_contain_text("-0.5")
    blend.get_by_role("link", name="shout").click()
    expect(page.get_by_role("heading", name="shout", level=1)).to_be_visible()


def test_a_plain_lora_adapter_has_no_bank(page: Page, server: Server, tmp_path: Path) -> None:
    assert server.upload("plain", lora_of(server, "dashes", tmp_path)).status_code == 201
    show(page, "plain")
    expect(fact(page, "Bank")).to_have_text("none: it is plain LoRA")
    expect(page.locator(".plot")).to_have_count(0)
    expect(page.get_by_text("A plain LoRA adapter: it has no vector bank.")).to_be_visible()
    page.get_by_role("button", name="Export").click()
    expect(page.get_by_role("menuitem")).to_have_text(["As plain LoRA"])


def test_a_name_that_there_is_not_is_answered_in_the_servers_words(
    page: Page, server: Server, faults: list[str]
) -> None:
    page.goto("/#/adapters/nothing-here")
    words = server.http.get("/v1/adapters/nothing-here").json()["error"]["message"]
    expect(page.get_by_role("alert")).to_have_text(words)
    faults.clear()


# --- the bank -------------------------------------------------------------------------------------


def readout(page: Page) -> Locator:
    return page.locator(".readout")


def test_every_key_moves_through_the_picture(page: Page, server: Server) -> None:
    show(page, "dashes")
    usage = bank(server, "dashes", 64)
    layers, last = usage["layers"], usage["columns"] - 1
    plot = page.get_by_role("application")
    plot.focus()

    def expect_cell(layer: int, side: str, column: int) -> None:
        name = layers[layer]["name"]
        expect(readout(page)).to_contain_text(name.removeprefix("model.").rsplit(".", 1)[-1])
        share = percent(layers[layer][side][column])
        expect(readout(page)).to_contain_text(f"side {side}, vector {column}: {share} of its weight")

    expect_cell(0, "A", 0)
    page.keyboard.press("ArrowRight")
    expect_cell(0, "A", 1)
    page.keyboard.press("ArrowDown")
    expect_cell(0, "B", 1)
    page.keyboard.press("End")
    expect_cell(0, "B", last)
    page.keyboard.press("ArrowLeft")
    expect_cell(0, "B", last - 1)
    page.keyboard.press("PageDown")
    of_second_block = next(i for i, layer in enumerate(layers) if "layers.1." in layer["name"])
    expect_cell(of_second_block, "A", last - 1)
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowUp")
    expect_cell(0, "A", 0)
    page.keyboard.press("Tab")
    expect(readout(page)).to_contain_text("Point at a cell")


def test_the_pointer_reads_what_is_below_it(page: Page, server: Server) -> None:
    show(page, "dashes")
    usage = bank(server, "dashes", 64)
    plot = page.locator(".plot")
    box = plot.bounding_box()
    assert box
    # The row below the profile, the twelfth of 64 columns.
    plot.hover(position={"x": box["width"] * 11.5 / usage["columns"], "y": 44 + 6})
    share = percent(usage["layers"][0]["A"][11])
    expect(readout(page)).to_contain_text(f"side A, vector 11: {share} of its weight")
    page.mouse.move(5, 5)
    expect(readout(page)).to_contain_text("Point at a cell")


CELLS = """(canvas) => {
  const context = canvas.getContext('2d')
  const { data, width } = context.getImageData(0, 0, canvas.width, canvas.height)
  const dpr = devicePixelRatio
  const at = (row, column, columns) => {
    const x = Math.floor((column + 0.5) * width / columns), y = Math.floor((44 + row * 12 + 6) * dpr)
    return [...data.slice((y * width + x) * 4, (y * width + x) * 4 + 3)]
  }
  return { width, height: canvas.height, shown: canvas.getBoundingClientRect().width,
           first: Array.from({ length: 64 }, (_, column) => at(0, column, 64)) }
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_is_crisp_and_darker_where_more_weight_lies(
    browser: Browser, server: Server, faults: list[str], scheme: Any
) -> None:
    with opened(browser, server, faults, color_scheme=scheme, device_scale_factor=2) as page:
        show(page, "dashes")
        canvas = page.locator(".plot canvas")
        expect(canvas).to_be_visible()
        drawn = canvas.evaluate(CELLS)
        assert drawn["width"] == round(drawn["shown"] * 2), "a pixel of the picture is one of the screen"
        shares = bank(server, "dashes", 64)["layers"][0]["A"]
        # Lightness falls with the share on a light page, and rises on a dark one.
        by_share = sorted(range(64), key=lambda column: shares[column])
        light = [sum(drawn["first"][column]) for column in by_share]
        light = light if scheme == "dark" else light[::-1]
        assert light[0] < light[-1]
        assert all(one <= other + 3 for one, other in pairwise(light))


def test_the_theme_repaints_the_picture(page: Page) -> None:
    show(page, "dashes")
    canvas = page.locator(".plot canvas")
    expect(canvas).to_be_visible()
    before = canvas.evaluate(CELLS)["first"]
    page.get_by_role("button", name="Auto").click()
    page.get_by_role("button", name="Light").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.wait_for_function(
        f"(before) => JSON.stringify(({CELLS})(document.querySelector('.plot canvas')).first) !== before",
        arg=str(before).replace(" ", ""),
    )


def test_the_summary_and_the_table_say_what_the_picture_shows(page: Page, server: Server) -> None:
    show(page, "snake")
    expect(page.locator(".plot canvas")).to_be_visible()
    columns = int(
        page.evaluate("performance.getEntriesByType('resource').map(e => e.name).join()")
        .split("columns=")[-1]
        .split(",")[0]
    )
    usage = bank(server, "snake", columns)
    used, unused = usage["used_vectors"], usage["unused_vectors"]
    text = f"All {used} vectors are used." if not unused else f"{used} of 300 vectors are used, {unused} by no layer."
    expect(page.get_by_text(text)).to_be_visible()
    rows = [side for layer in usage["layers"] for side in (layer["A"], layer["B"])]
    totals = [sum(shares) / len(rows) for shares in zip(*rows, strict=True)]
    top = max(range(usage["columns"]), key=lambda column: totals[column])
    first = page.locator("table.most-used tbody tr").first
    width = usage["vectors_per_column"]
    expect(first.locator("th")).to_have_text(re.compile(rf"^{top * width}\b"))
    expect(first.locator("td")).to_have_text(percent(totals[top]))
    page.get_by_text("The same as a table").click()
    lines = page.locator("table.in-words tbody tr")
    expect(lines).to_have_count(len(usage["layers"]))
    expect(lines.first.get_by_role("rowheader")).to_have_text(usage["layers"][0]["name"])
    most = max(usage["layers"][0]["B"])
    expect(lines.first.locator("td").nth(1)).to_contain_text(f"({percent(most)})")


def test_columns_are_as_many_as_fit(browser: Browser, server: Server, faults: list[str]) -> None:
    asked: list[str] = []
    with opened(browser, server, faults, viewport={"width": 390, "height": 844}) as page:
        page.on("request", lambda request: asked.append(request.url) if "/bank?" in request.url else None)
        show(page, "snake")
        expect(page.locator(".plot canvas")).to_be_visible()
        assert asked[-1].endswith("columns=64")
        expect(page.get_by_text("each column 5 vectors")).to_be_visible()
        page.set_viewport_size({"width": 1400, "height": 844})
        expect(page.get_by_text("each column 2 vectors")).to_be_visible()
        assert asked[-1].endswith("columns=256")


# --- keys and looks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with keyed_server(tmp_path_factory.mktemp("keyed")) as server:
        yield server


def test_an_infer_key_sees_all_and_changes_nothing(browser: Browser, keyed: Server, faults: list[str]) -> None:
    uploaded(keyed, "versioned", "shout")
    uploaded(keyed, "versioned", "dashes")
    with opened(browser, keyed, faults, "/#/adapters/versioned") as page:
        use_key(page, "infer-key")
        show(page, "versioned")
        faults.clear()  # the 401 of the first questions
        expect(page.locator(".plot canvas")).to_be_visible()
        for name in ("Activate", "Activate merged", "Delete"):
            expect(page.get_by_role("button", name=name, exact=True)).to_be_disabled()
        back = page.get_by_role("button", name=re.compile("^Roll back to"))
        expect(back).to_be_disabled()
        expect(back).to_have_attribute("title", "This key lacks the scope admin, which changing adapters needs.")
        page.get_by_role("button", name="Export").click()
        with page.expect_download() as download:
            page.get_by_role("menuitem", name="Compact").click()
        assert download.value.path().read_bytes() == keyed.http.get("/v1/adapters/versioned/export").content


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_every_width(browser: Browser, server: Server, faults: list[str], scheme: Any, width: int) -> None:
    name = f"a-long-name.{'x' * 116}"
    uploaded(server, name, "shout")
    options = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    with opened(browser, server, faults, **options) as page:
        show(page, name)
        expect(page.locator(".plot canvas")).to_be_visible()
        assert has_no_sideways_scroll(page)
        screenshot(page, f"adapter-{width}-{scheme}")
