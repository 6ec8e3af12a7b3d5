"""The playground of servers of other tasks: texts to labels, texts to likeness, and encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import WAIT_MS, screenshot, watch
from tests.browser.playing import column, finished, open_playground, option, pick, run, text_of
from tests.pooling_factory import HeadSpec, make_pool_adapter, save_pool_model, tiny_classifier, tiny_encoder
from tests.seq2seq_factory import Seq2SeqSpec, make_seq2seq_adapter, save_seq2seq, tiny_seq2seq
from tests.server import Server

TEXTS = ["where is it?", "when does it come?", "no."]


@pytest.fixture
def opened(browser: Browser) -> Iterator[list[Page]]:
    """Pages of servers that a test starts itself."""
    pages: list[Page] = []
    yield pages
    for page in pages:
        page.context.close()


def page_of(browser: Browser, server: Server, opened: list[Page], faults: list[str]) -> Page:
    context = browser.new_context(base_url=server.url, viewport={"width": 1280, "height": 860})
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    watch(page, server.url, faults)
    opened.append(page)
    page.goto("/")
    open_playground(page)
    return page


def test_texts_to_labels(browser: Browser, opened: list[Page], faults: list[str], tmp_path: Path) -> None:
    model = tiny_classifier("roberta")
    base = save_pool_model(model, "roberta", tmp_path / "base")
    adapters = [make_pool_adapter(model, HeadSpec(labels, seed=labels), tmp_path / f"of-{labels}") for labels in (2, 3)]
    with Server("serve", "--model", str(base), "--task", "classify", data_dir=tmp_path / "data") as server:
        for adapter in adapters:
            assert server.upload(adapter.name, adapter).status_code == 201
        page = page_of(browser, server, opened, faults)
        page.get_by_label("Texts, one a line").fill("\n\n".join(TEXTS))
        pick(page, "Adapter of column A", "of-2")
        pick(page, "Adapter of column B", "of-3")
        run(page)
        finished(page)
        for letter, name in (("A", "of-2"), ("B", "of-3")):
            asked = {"input": TEXTS, "adapter": name}
            expected = server.http.post("/v1/classify", json=asked).json()["data"]
            tables = column(page, letter).get_by_role("table")
            expect(tables).to_have_count(len(TEXTS))
            for i, (text, found) in enumerate(zip(TEXTS, expected, strict=True)):
                expect(tables.nth(i).locator("caption")).to_have_text(text)
                shown = tables.nth(i).locator("td.number").all_text_contents()
                assert [float(each) for each in shown] == pytest.approx(found["probs"], abs=6e-4)
                expect(tables.nth(i).locator(".best th")).to_have_text(found["label"])
        screenshot(page, "playground-classify")
    assert not faults


def test_texts_to_likeness(browser: Browser, opened: list[Page], faults: list[str], tmp_path: Path) -> None:
    model = tiny_encoder("bert")
    base = save_pool_model(model, "bert", tmp_path / "base")
    adapter = make_pool_adapter(model, HeadSpec(None, seed=1), tmp_path / "mine")
    with Server("serve", "--model", str(base), "--task", "embed", data_dir=tmp_path / "data") as server:
        assert server.upload("mine", adapter).status_code == 201
        page = page_of(browser, server, opened, faults)
        page.get_by_label("Texts, one a line").fill("\n".join(TEXTS))
        pick(page, "Adapter of column B", "mine")
        run(page)
        finished(page)
        for letter, name in (("A", "base"), ("B", "mine")):
            data = server.http.post("/v1/embeddings", json={"input": TEXTS, "adapter": name}).json()["data"]
            vectors = [each["embedding"] for each in data]  # of length 1
            expected = [sum(a * b for a, b in zip(one, other, strict=True)) for one in vectors for other in vectors]
            shown = column(page, letter).locator(".cosines tbody td").all_text_contents()
            assert [float(each) for each in shown] == pytest.approx(expected, abs=6e-4)
        screenshot(page, "playground-embed")
    assert not faults


def test_encoder_decoders(browser: Browser, opened: list[Page], faults: list[str], tmp_path: Path) -> None:
    model = tiny_seq2seq("t5")
    base = save_seq2seq(model, tmp_path / "base")
    adapter = make_seq2seq_adapter(model, Seq2SeqSpec(seed=1), tmp_path / "mine")
    with Server("serve", "--model", str(base), "--task", "seq2seq", data_dir=tmp_path / "data") as server:
        assert server.upload("mine", adapter).status_code == 201
        page = page_of(browser, server, opened, faults)
        option(page, "New tokens", "8")
        page.get_by_label("Prompt").fill("abc")
        pick(page, "Adapter of column B", "mine")
        run(page)
        finished(page)
        for letter, name in (("A", "base"), ("B", "mine")):
            expected = server.generate("abc", adapter=name, max_new_tokens=8)["choices"][0]
            assert (text_of(column(page, letter)) if expected["text"] else "") == expected["text"]
    assert not faults
