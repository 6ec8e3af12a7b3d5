"""Adapters from the Hub: at one commit, only what an adapter consists of, within its size and within its time."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from service.api.errors import ApiError
from service.api.hub import fetch_from_hub
from service.api.hub_ids import HubRepo
from service.api.source_errors import SourceNotFound
from tests.fake_hub import COMMIT, FakeHub, FakeRepo

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 200_000}
OTHER_COMMIT = "f" * 40
HUB = "https://hub.test"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A directory of files to put into a repository. Nothing here reads them."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    (tmp_path / "staged").mkdir()
    return tmp_path / "staged"


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fetch(
    staged: Path,
    source: str = "hf://org/sql",
    *,
    max_bytes: int = 1 << 20,
    timeout_s: float = 30.0,
    clock: Callable[[], float] | None = None,
) -> str:
    options = {} if clock is None else {"clock": clock}
    return str(fetch_from_hub(HubRepo.parse(source), staged, max_bytes=max_bytes, timeout_s=timeout_s, **options))


def refused(code: str, staged: Path, source: str = "hf://org/sql", **options: object) -> str:
    with pytest.raises(ApiError) as caught:
        fetch(staged, source, **options)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == (code, "source")
    return caught.value.message


def contents(staged: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in staged.iterdir()}


def test_only_the_adapters_files_are_fetched(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter).files["pytorch_model.bin"] = b"pickle"
    assert fetch(staged) == f"hf://org/sql@{COMMIT}"
    assert contents(staged) == FILES
    assert hub.downloads == list(FILES)


def test_optional_files_come_along(hub: FakeHub, adapter: Path, staged: Path) -> None:
    optional = {"tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    hub.add("org/sql", adapter).files |= optional
    fetch(staged)
    assert contents(staged) == FILES | optional


def test_a_revision_is_resolved_before_a_file_is_asked_for(
    hub: FakeHub, adapter: Path, staged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo = hub.add("org/sql", adapter)
    repo.branches = {"main": COMMIT, "refs/pr/1": OTHER_COMMIT}
    with caplog.at_level(logging.INFO, "service.api.hub"):
        assert fetch(staged, "hf://org/sql@refs/pr/1") == f"hf://org/sql@{OTHER_COMMIT}"
    assert hub.requests[0] == "/api/models/org/sql/revision/refs/pr/1"
    assert all(f"/resolve/{OTHER_COMMIT}/" in path for path in hub.requests[1:])
    assert [record.commit for record in caplog.records if hasattr(record, "commit")] == [OTHER_COMMIT]


def test_redirects_are_followed_without_the_token(
    hub: FakeHub, adapter: Path, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "alpha")
    hub.add("org/sql", adapter, elsewhere=True)
    fetch(staged)
    assert contents(staged) == FILES
    assert hub.tokens[f"/org/sql/resolve/{COMMIT}/adapter_config.json"] == "Bearer alpha"
    assert hub.tokens["/elsewhere/org/sql/adapter_config.json"] is None


class TestHttps:
    """A Hub at https, played by a transport: `addresses` are what was asked for, with the token sent along."""

    @pytest.fixture
    def addresses(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str | None]]]:
        asked: list[tuple[str, str | None]] = []
        client, transport = type(get_session()), importlib.import_module(type(get_session()).__module__.split(".")[0])

        def answer(request: Any) -> Any:
            url = str(request.url)
            asked.append((url, request.headers.get("authorization")))
            if url in self.redirects:
                return transport.Response(302, headers={"location": self.redirects[url]})
            if "/api/models/" in url:
                siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
                return transport.Response(200, json={"id": "org/sql", "sha": COMMIT, "siblings": siblings})
            return transport.Response(200, stream=transport.ByteStream(FILES[url.rpartition("/")[2]]))

        monkeypatch.setenv("HF_TOKEN", "alpha")
        monkeypatch.setattr(constants, "ENDPOINT", HUB)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", HUB + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        set_client_factory(lambda: client(transport=transport.MockTransport(answer), follow_redirects=True))
        yield asked
        set_client_factory(default_client_factory)

    @pytest.fixture(autouse=True)
    def redirects(self) -> None:
        self.redirects: dict[str, str] = {}

    LISTING = f"{HUB}/api/models/org/sql?blobs=true"
    WEIGHTS = f"{HUB}/org/sql/resolve/{COMMIT}/adapter_model.safetensors"

    def test_redirects_stay_with_https_and_leave_the_token(
        self, addresses: list[tuple[str, str | None]], staged: Path
    ) -> None:
        there = ["https://cdn.test/1/adapter_model.safetensors", "https://cdn.test:444/2/adapter_model.safetensors"]
        self.redirects = {self.WEIGHTS: there[0], there[0]: there[1]}
        fetch(staged)
        assert contents(staged) == FILES
        tokens = dict(addresses)
        assert tokens[self.WEIGHTS] == "Bearer alpha"
        assert [tokens[url] for url in there] == [None, None]

    @pytest.mark.parametrize(
        "target",
        ["http://hub.test/x", "http://cdn.test/x", "HTTP://hub.test/x", "http://169.254.169.254/latest/meta-data",
         "ftp://cdn.test/x", "file:///etc/passwd"],
    )  # fmt: skip
    @pytest.mark.parametrize("hops", [0, 1])
    @pytest.mark.parametrize("start", ["LISTING", "WEIGHTS"])
    def test_a_redirect_to_anything_else_is_not_followed(
        self, addresses: list[tuple[str, str | None]], staged: Path, target: str, hops: int, start: str
    ) -> None:
        begin = getattr(self, start)
        self.redirects = {begin: "https://cdn.test/hop", "https://cdn.test/hop": target} if hops else {begin: target}
        refused("adapter_unavailable", staged)
        assert not (staged / "adapter_model.safetensors").exists()
        assert all(url.startswith("https://") for url, _ in addresses)
        assert all(token is None for url, token in addresses if not url.startswith(HUB))

    def test_endless_redirects_end(self, addresses: list[tuple[str, str | None]], staged: Path) -> None:
        self.redirects = {self.WEIGHTS: self.WEIGHTS}
        refused("adapter_unavailable", staged)


@pytest.mark.parametrize("name", ["org/none", "other/sql"])
def test_no_such_repository(hub: FakeHub, adapter: Path, staged: Path, name: str) -> None:
    hub.add("org/sql", adapter)
    with pytest.raises(SourceNotFound, match=f"no repository '{name}'"):
        fetch(staged, f"hf://{name}")


def test_a_repository_without_an_adapter(hub: FakeHub, adapter: Path, staged: Path) -> None:
    del hub.add("org/sql", adapter).files["adapter_config.json"]
    with pytest.raises(SourceNotFound, match=r"has no adapter_config\.json"):
        fetch(staged)


def test_an_adapter_without_weights(hub: FakeHub, adapter: Path, staged: Path) -> None:
    del hub.add("org/sql", adapter).files["adapter_model.safetensors"]
    assert "has no adapter_model.safetensors" in refused("invalid_request", staged)
    assert hub.downloads == []


def test_no_such_revision(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter)
    assert "no revision 'v2'" in refused("invalid_request", staged, "hf://org/sql@v2")


def test_gated(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter, gated=True)
    assert "HF_TOKEN" in refused("forbidden", staged)


def test_offline(hub: FakeHub, staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("adapter_unavailable", staged)
    assert hub.requests == []


def test_a_repository_that_was_renamed_is_not_followed(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter, called="other/sql")
    with pytest.raises(SourceNotFound, match="'other/sql' now"):
        fetch(staged)
    assert hub.downloads == []


def test_a_hub_that_fails_or_cannot_be_reached(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter)
    hub.broken = True
    assert "answers 500" in refused("adapter_unavailable", staged)
    hub.close()
    assert "cannot be reached" in refused("adapter_unavailable", staged)


def test_a_file_that_is_gone_when_it_is_asked_for(hub: FakeHub, adapter: Path, staged: Path) -> None:
    repo = hub.add("org/sql", adapter)
    hub.before_answer = lambda path: "/resolve/" in path and repo.files.clear()
    assert "answers 404" in refused("adapter_unavailable", staged)


def test_an_answer_that_is_no_json(hub: FakeHub, staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fake_hub.json.dumps", lambda body: "<html>")
    hub.repos["org/sql"] = FakeRepo({})
    assert "cannot be read" in refused("adapter_unavailable", staged)


def test_an_adapter_too_large_is_not_asked_for(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter)
    total = sum(map(len, FILES.values()))
    assert f"takes {total:,} bytes" in refused("payload_too_large", staged, max_bytes=total - 1)
    assert hub.downloads == []
    fetch(staged, max_bytes=total)


def test_an_optional_file_too_large_is_not_asked_for(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter).files["chat_template.jinja"] = b"x" * ((1 << 20) + 1)
    assert "chat_template.jinja" in refused("payload_too_large", staged, max_bytes=1 << 30)
    assert hub.downloads == []


def test_a_size_that_is_not_announced(hub: FakeHub, adapter: Path, staged: Path) -> None:
    hub.add("org/sql", adapter, announced={"adapter_model.safetensors": None})
    assert "how large" in refused("adapter_unavailable", staged)


@pytest.mark.parametrize("announced", [100, 199_999, 200_001])
def test_what_arrives_is_what_was_announced(hub: FakeHub, adapter: Path, staged: Path, announced: int) -> None:
    hub.add("org/sql", adapter, announced={"adapter_model.safetensors": announced})
    assert "announced" in refused("adapter_unavailable", staged)


@pytest.mark.parametrize("declared", [100, 300_000])
def test_a_wrong_content_length(hub: FakeHub, adapter: Path, staged: Path, declared: int) -> None:
    hub.add("org/sql", adapter, declared={"adapter_model.safetensors": declared})
    refused("adapter_unavailable", staged)


def test_a_body_that_trickles_ends_with_the_deadline(hub: FakeHub, adapter: Path, staged: Path) -> None:
    clock = Clock()

    def trickle(write: Callable[[bytes], object], content: bytes) -> None:
        write(content[:1000])
        clock.now = 31.0
        write(content[1000:])

    hub.add("org/sql", adapter, sending=trickle)
    assert "within 30 seconds" in refused("request_timeout", staged, clock=clock)


def test_a_body_that_stops_ends_with_the_deadline(hub: FakeHub, adapter: Path, staged: Path) -> None:
    over = threading.Event()

    def stop(write: Callable[[bytes], object], content: bytes) -> None:
        write(content[:1000])
        over.wait(30)

    hub.add("org/sql", adapter, sending=stop)
    try:
        assert "--source-timeout-s" in refused("request_timeout", staged, timeout_s=0.2)
    finally:
        over.set()


def test_time_spent_on_the_listing_counts(hub: FakeHub, adapter: Path, staged: Path) -> None:
    clock = Clock()
    hub.add("org/sql", adapter)
    hub.before_answer = lambda path: setattr(clock, "now", 31.0)
    refused("request_timeout", staged, clock=clock)
    assert hub.downloads == []
