"""The playground: one prompt to several selections at once, held against what the server answers to each alone."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect

from tests.browser.adapters import until
from tests.browser.conftest import screenshot
from tests.browser.playing import blend, column, fact, finished, open_playground, option, pick, run, text_of
from tests.server import Server

PROMPT = "Open a file and"
TOKENS = 48
TRIES = 5
METRIC = re.compile(r'^vblora_finished_choices_total\{reason="cancelled"\} (\S+)$', re.MULTILINE)


def answer(server: Server, tokens: int = TOKENS, **selection: Any) -> dict[str, Any]:
    choice: dict[str, Any] = server.generate(PROMPT, max_new_tokens=tokens, **selection)["choices"][0]
    return choice


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    return next(i for i in range(len(one)) if i >= len(other) or one[i] != other[i])


def slight(server: Server) -> tuple[float, int]:
    """A weight of `shout` so small that the base's answer goes on for a while, and the first token that differs."""
    base = answer(server, adapter="base")["token_ids"]
    for weight in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6):
        own = answer(server, adapters=[{"name": "shout", "weight": weight}])["token_ids"]
        if own != base and (differs := first_difference(own, base)) >= 2:
            return weight, differs
    raise AssertionError("no weight differs late")


def cancelled(server: Server) -> float:
    found = METRIC.search(server.http.get("/metrics").text)
    assert found is not None
    return float(found[1])


def test_columns_stream_side_by_side_and_are_marked_where_they_differ(page: Page, server: Server) -> None:
    weight, differs = slight(server)
    open_playground(page)
    option(page, "New tokens", str(TOKENS))
    pick(page, "Adapter of column B", "dashes")
    page.get_by_role("button", name="+ Column").click()
    blend(page, "C", {"shout": weight})
    with page.expect_request("**/v1/generate"):
        page.get_by_label("Prompt").press("Control+Enter")
    finished(page)

    base = answer(server, adapter="base")
    dashes = answer(server, adapter="dashes")
    slightly = answer(server, adapters=[{"name": "shout", "weight": weight}])
    for letter, expected in (("A", base), ("B", dashes), ("C", slightly)):
        assert text_of(column(page, letter)) == expected["text"]
        expect(fact(column(page, letter), "Tokens")).to_have_text(str(len(expected["token_ids"])))
        expect(fact(column(page, letter), "Ended by")).to_have_text(expected["finish_reason"])
        expect(fact(column(page, letter), "First token")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
        expect(fact(column(page, letter), "Server")).to_contain_text("total")
    expect(fact(column(page, "B"), "Speed")).to_contain_text("tokens/s")
    digest = server.http.get("/v1/adapters/dashes").json()["digest"].removeprefix("sha256:")
    expect(fact(column(page, "B"), "Ran")).to_contain_text(digest[:12])
    expect(fact(column(page, "A"), "Ran")).to_contain_text("base")

    expect(column(page, "A").locator(".compared")).to_have_text("the reference")
    at = first_difference(dashes["token_ids"], base["token_ids"])
    expect(column(page, "B").locator(".compared")).to_have_text(f"differs from token {at + 1}")
    expect(column(page, "C").locator(".compared")).to_have_text(f"differs from token {differs + 1}")
    expect(column(page, "C").locator(".caret")).to_have_text(str(differs + 1))
    before = answer(server, tokens=differs, adapter="base")["text"]
    assert base["text"].startswith(before)
    assert column(page, "C").locator(".same").text_content() == before
    assert column(page, "C").locator("mark").text_content() == slightly["text"][len(before) :]
    summary = page.locator("p[role=status]")
    expect(summary).to_contain_text(f"Column C, shout × {weight}: {len(slightly['token_ids'])} tokens")
    screenshot(page, "playground-light")
    page.emulate_media(color_scheme="dark")
    screenshot(page, "playground-dark")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "playground-phone")


def test_another_column_can_be_the_reference(page: Page, server: Server) -> None:
    open_playground(page)
    option(page, "New tokens", "8")
    pick(page, "Adapter of column B", "dashes")
    run(page)
    finished(page)
    column(page, "B").get_by_label("reference").check()
    expect(column(page, "B").locator(".compared")).to_have_text("the reference")
    expect(column(page, "B").locator("mark")).to_have_count(0)
    base, dashes = (answer(server, 8, adapter=name)["token_ids"] for name in ("base", "dashes"))
    words = f"differs from token {first_difference(base, dashes) + 1}"
    expect(column(page, "A").locator(".compared")).to_have_text(words)
    pick(page, "Adapter of column A", "dashes")
    expect(column(page, "A")).to_contain_text("The answer of base")
    run(page)
    finished(page)
    expect(column(page, "A").locator(".compared")).to_have_text("same tokens")
    page.get_by_role("button", name="Remove column B").click()
    page.get_by_role("button", name="+ Column").click()
    expect(column(page, "B")).to_contain_text("Nothing was asked yet.")


FED = """
    window.fed = []
    const real = window.fetch
    window.fetch = (url, init) => {
      if (!String(url).endsWith("/v1/generate")) return real(url, init)
      const stream = new ReadableStream({ start(controller) {
        init.signal.addEventListener("abort", () => controller.error(new DOMException("", "AbortError")))
        window.fed.push((text, token) => controller.enqueue(new TextEncoder().encode(
          `data: ${JSON.stringify({ choices: [{ index: 0, text, token_ids: [token], finish_reason: null }] })}\\n\\n`)))
      } })
      return Promise.resolve(new Response(stream))
    }
"""


def test_the_mark_appears_while_both_still_stream(page: Page) -> None:
    """Tokens come one by one, from the test: what is shown between them cannot depend on how fast a server is."""
    page.add_init_script(FED)
    page.reload()
    open_playground(page)
    run(page)
    first, second = column(page, "A"), column(page, "B")
    for one in (first, second):
        expect(one).to_contain_text("Waiting for the first token")

    def feed(number: int, text: str, token: int) -> None:
        page.evaluate("([number, text, token]) => window.fed[number](text, token)", [number, text, token])

    feed(0, "one", 1)
    feed(1, "one", 1)
    expect(second.locator(".text")).to_have_text("one")
    expect(second.locator(".compared")).to_have_text("same so far")
    feed(1, " more", 5)
    expect(second.locator(".text")).to_have_text("one more")
    expect(second.locator(".compared")).to_have_text("same so far")
    feed(0, " more", 6)  # the same text of another token
    expect(second.locator(".compared")).to_have_text("differs from token 2")
    expect(second.locator("mark")).to_have_text(" more")
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    page.keyboard.press("Escape")
    finished(page)
    for one in (first, second):
        expect(one).to_contain_text("Stopped.")
    expect(second.locator("mark")).to_have_text(" more")


def both_cancelled(page: Page, server: Server, leave: Callable[[], None]) -> bool:
    """Runs two long generations, leaves them when both have begun, and says whether the server cancelled both.

    They take a few seconds. On a machine that was busy with something else just then they may have ended before.
    """
    before = cancelled(server)
    open_playground(page)
    option(page, "New tokens", "480")
    for letter in "AB":
        pick(page, f"Adapter of column {letter}", "dashes")
    run(page)
    until(page, lambda: page.locator(".column [aria-busy=true] .text").count() == 2)
    leave()
    until(page, lambda: server.http.get("/v1/stats").json()["running"] == 0)
    # It is counted a moment after the batch is empty.
    return any(cancelled(server) == before + 2 for _ in range(100))


def test_stop_ends_the_generations_on_the_server_too(page: Page, server: Server) -> None:
    assert any(both_cancelled(page, server, lambda: page.keyboard.press("Escape")) for _ in range(TRIES))
    for letter in "AB":
        expect(column(page, letter)).to_contain_text("Stopped.")
        expect(fact(column(page, letter), "Ended by")).to_have_text("–")
    finished(page)


def test_a_view_that_is_left_stops_too(page: Page, server: Server) -> None:
    live = page.get_by_role("link", name="Live")
    assert any(both_cancelled(page, server, live.click) for _ in range(TRIES))
    expect(page.get_by_role("heading", name="Live")).to_be_visible()


def test_sliders_change_what_is_asked(page: Page) -> None:
    open_playground(page)
    option(page, "New tokens", "4")
    page.get_by_role("button", name="Remove column A").click()
    blend(page, "A", {"shout": 0.7, "dashes": -0.3})
    slider = page.get_by_label("Weight of column A, adapter 1", exact=True)
    assert slider.input_value() == "0.7"
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    expect(page.get_by_label("Weight of column A, adapter 1, as a number")).to_have_value("0.6")
    with page.expect_request("**/v1/generate") as asked:
        run(page)
    assert asked.value.post_data_json == {
        "prompt": PROMPT,
        "max_new_tokens": 4,
        "temperature": 0,
        "mode": "switch",
        "adapters": [{"name": "shout", "weight": 0.6}, {"name": "dashes", "weight": -0.3}],
        "stream": True,
    }
    finished(page)


def test_a_saved_blend_answers_as_its_sliders_did(page: Page, server: Server, faults: list[str]) -> None:
    open_playground(page)
    option(page, "New tokens", str(TOKENS))
    page.get_by_role("button", name="Remove column A").click()
    blend(page, "A", {"shout": 0.8, "dashes": 0.5})
    run(page)
    finished(page)
    before = text_of(column(page, "A"))
    weights = [{"name": "shout", "weight": 0.8}, {"name": "dashes", "weight": 0.5}]
    assert before == answer(server, adapters=weights)["text"]

    column(page, "A").get_by_role("button", name="Save as an adapter").click()
    name = page.get_by_label("Name to save column A under")
    expect(name).to_be_focused()
    name.fill("shout")
    with page.expect_response("**/v1/blends") as refused:
        name.press("Enter")
    assert refused.value.status == 409
    message = server.http.post("/v1/blends", json={"name": "shout", "adapters": weights}).json()["error"]["message"]
    expect(column(page, "A").get_by_role("alert")).to_have_text(message)
    faults.clear()  # the browser logs a refusal as an error

    name.fill("loud-dashes")
    column(page, "A").get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("The blend is saved as loud-dashes.")).to_be_visible()
    expect(page.get_by_role("combobox", name="Adapter of column A")).to_have_value("loud-dashes")
    parents = server.http.get("/v1/adapters/loud-dashes").json()["blend"]
    assert [(parent["name"], parent["weight"]) for parent in parents] == [("shout", 0.8), ("dashes", 0.5)]
    with page.expect_request("**/v1/generate") as asked:
        run(page)
    body = asked.value.post_data_json
    assert body is not None
    assert body["adapter"] == "loud-dashes"
    finished(page)
    assert text_of(column(page, "A")) == before
    page.get_by_role("button", name="+ Column").click()
    pick(page, "Adapter of column B", "loud-dashes")  # the list was refreshed


def test_one_seed_is_drawn_for_all_columns(page: Page) -> None:
    open_playground(page)
    option(page, "New tokens", "4")
    option(page, "Temperature", "0.9")
    option(page, "Top-p", "0.95")
    option(page, "Top-k", "40")
    page.get_by_label("Mode").select_option("merge")
    bodies: list[Any] = []

    def on_request(request: Request) -> None:
        if request.url.endswith("/v1/generate"):
            bodies.append(request.post_data_json)

    page.on("request", on_request)
    run(page)
    finished(page)
    assert [(body["temperature"], body["top_p"], body["top_k"], body["mode"]) for body in bodies] == [
        (0.9, 0.95, 40, "merge")
    ] * 2
    assert bodies[0]["seed"] == bodies[1]["seed"]
    expect(fact(column(page, "A"), "Ran")).to_contain_text(f"seed {bodies[0]['seed']}")
    option(page, "Seed", "7")
    run(page)
    finished(page)
    assert [body["seed"] for body in bodies[2:]] == [7, 7]


def test_a_refusal_stands_in_its_column_word_for_word(page: Page, server: Server, faults: list[str]) -> None:
    open_playground(page)
    option(page, "New tokens", "8")
    pick(page, "Adapter of column B", "nobody")
    run(page)
    finished(page)
    refused = server.http.post("/v1/generate", json={"prompt": PROMPT, "adapter": "nobody"}).json()["error"]
    expect(column(page, "B").locator(".refusal")).to_have_text(refused["message"] + refused["code"])
    assert text_of(column(page, "A")) == answer(server, 8, adapter="base")["text"]
    option(page, "New tokens", "100000")
    run(page)
    finished(page)
    refused = server.http.post("/v1/generate", json={"prompt": PROMPT, "max_new_tokens": 100000}).json()["error"]
    expect(column(page, "A").locator(".refusal")).to_have_text(refused["message"] + refused["code"])
    blend(page, "B", {})
    run(page)
    finished(page)
    expect(column(page, "B").locator(".refusal")).to_contain_text("Add an adapter to the blend first.")
    faults.clear()


def test_an_answer_and_its_command_can_be_taken_along(page: Page, server: Server) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_playground(page)
    page.get_by_label("Prompt").fill('It\'s a "quoted" $HOME, \\ and')
    option(page, "New tokens", "12")
    pick(page, "Adapter of column B", "quoted")
    run(page)
    finished(page)
    shown = text_of(column(page, "B"))
    page.get_by_role("button", name="Copy the text of column B").click()
    expect(page.get_by_text("The text is copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == shown
    page.get_by_role("button", name="Copy column B as a curl command").click()
    expect(page.get_by_text("The command is copied.")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == shown


def test_what_was_set_outlives_a_reload_and_travels_in_a_link(page: Page, faults: list[str]) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_playground(page)
    page.get_by_label("Prompt").fill("50 % / done?")
    option(page, "Seed", "11")
    blend(page, "B", {"snake": -0.5})
    page.reload()
    for _ in range(2):
        expect(page.get_by_label("Prompt")).to_have_value("50 % / done?")
        expect(page.get_by_label("Seed")).to_have_value("11")
        expect(page.get_by_role("combobox", name="column B, adapter 1")).to_have_value("snake")
        expect(page.get_by_label("Weight of column B, adapter 1, as a number")).to_have_value("-0.5")
        page.get_by_role("button", name="Copy link").click()
        expect(page.get_by_text("The link is copied.").first).to_be_visible()
        link = page.evaluate("navigator.clipboard.readText()")
        page.evaluate("sessionStorage.clear()")
        page.goto("about:blank")
        page.goto(link)
    assert page.evaluate("location.hash") == "#/playground"
    open_playground(page, "/dashes")
    expect(page.get_by_role("combobox", name="Adapter of column B")).to_have_value("dashes")
    faults[:] = [fault for fault in faults if "about:blank" not in fault]


def test_all_of_it_by_keyboard(page: Page, server: Server) -> None:
    open_playground(page)
    option(page, "New tokens", "6")
    page.get_by_label("Prompt").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "Adapter of column B":
            break
    page.keyboard.press("ArrowDown")
    options = page.get_by_role("listbox", name="Adapter of column B").get_by_role("option")
    expect(options).to_have_count(1 + len(server.http.get("/v1/adapters").json()["data"]))
    page.keyboard.type("shou")
    expect(options).to_have_count(1)
    page.keyboard.press("Escape")
    expect(options).to_have_count(0)
    page.keyboard.press("ArrowDown")
    page.keyboard.type("shou")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    finished(page)
    expect(column(page, "B").locator(".text")).to_be_visible()
    assert text_of(column(page, "B")) == answer(server, 6, adapter="shout")["text"]


def test_two_thousand_adapters_and_long_names(page: Page, server: Server) -> None:
    one = server.http.get("/v1/adapters").json()["data"][0]
    long = "a" * 120 + "-the-last"
    listed = [{**one, "name": name, "active": False} for name in [*(f"adapter-{i:04}" for i in range(1999)), long]]
    page.route("**/v1/adapters?*", lambda route: route.fulfill(json={"data": listed, "next": None}))
    page.reload()
    open_playground(page)
    box = page.get_by_role("combobox", name="Adapter of column B")
    box.click()
    options = page.get_by_role("listbox", name="Adapter of column B").get_by_role("option")
    expect(options).to_have_count(50)
    expect(page.get_by_text("1,951 more: type to narrow them down")).to_be_visible()
    box.fill("the-last")
    expect(options).to_have_count(1)
    page.set_viewport_size({"width": 390, "height": 844})
    screenshot(page, "playground-long-name")
    box.press("Enter")
    expect(box).to_have_value(long)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [1280, 1400])
def test_six_columns_are_the_most(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    open_playground(page)
    add = page.get_by_role("button", name="+ Column")
    for _ in range(4):
        add.click()
    expect(add).to_be_disabled()
    option(page, "New tokens", "24")
    run(page)
    finished(page)
    for letter in "ABCDEF":
        expect(fact(column(page, letter), "Tokens")).not_to_have_text("–")
    screenshot(page, f"playground-six-{width}")
