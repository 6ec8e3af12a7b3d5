"""`--resolve`: a name that nobody has is looked up once, and served; or refused for what was found."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from adapters.errors import AdapterNotFound
from service.api.errors import ApiError
from service.api.hub_ids import HubTemplate
from service.api.keys import ApiKey
from service.api.resolver import (
    FAILURE_REMEMBERED_S,
    MOST_FAILURES,
    MOST_WAITING,
    AdapterResolver,
    DirectorySource,
    HubSource,
    NameSource,
)
from service.api.source_errors import SourceNotFound
from service.engine.errors import Overloaded
from tests.api.conftest import Server, error_of
from tests.fake_hub import FakeHub

WAIT_S = 20  # for what should take milliseconds
MAX_BYTES = 1 << 24


@pytest.fixture
def root(tmp_path: Path, adapter_dirs: dict[str, Path]) -> Path:
    """A directory with the adapters `one` and `two`."""
    for name in ("one", "two"):
        shutil.copytree(adapter_dirs[name], tmp_path / "root" / name)
    return tmp_path / "root"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def resolving(server: Server, *sources: NameSource) -> Server:
    """The server, looking unknown names up."""
    server.app.state.server = replace(server.state, resolver=AdapterResolver(server.registry, sources))
    return server


class FakeSource:
    """Copies an adapter for the names in `held`. Counts look-ups; `gate` holds them."""

    def __init__(self, adapter: Path, *held: str) -> None:
        self.adapter = adapter
        self.held = set(held)
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def fetch(self, name: str, staged: Path) -> str:
        self.asked.append(name)
        self.begun.release()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        if name not in self.held:
            raise SourceNotFound("none here")
        shutil.copytree(self.adapter, staged, dirs_exist_ok=True)
        return f"fake:{name}"


@pytest.fixture
def source(adapter_dirs: dict[str, Path]) -> FakeSource:
    return FakeSource(adapter_dirs["one"], "sql", "style")


class TestOverHttp:
    def test_a_directory(self, server: Server, root: Path) -> None:
        resolving(server, DirectorySource(root, MAX_BYTES))
        assert server.generate(adapter="one").json()["selection"]["adapters"][0]["name"] == "one"
        assert [adapter["name"] for adapter in server.client.get("/v1/adapters").json()["data"]] == ["one"]

    def test_the_hub(self, server: Server, hub: FakeHub, adapter_dirs: dict[str, Path]) -> None:
        hub.add("org/vb-sql", adapter_dirs["one"])
        resolving(server, HubSource(HubTemplate.parse("hf://org/vb-*"), MAX_BYTES, 30))
        assert server.generate(adapter="sql").status_code == 200
        error_of(server.generate(adapter="style"), 404, "adapter_not_found")
        asked = len(hub.requests)
        assert server.generate(adapter="sql").status_code == 200
        error_of(server.generate(adapter="a--b"), 404, "adapter_not_found")
        assert len(hub.requests) == asked

    def test_every_way_of_naming(self, server: Server, root: Path) -> None:
        resolving(server, DirectorySource(root, MAX_BYTES))
        blend = [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 0.5}]
        assert server.generate(adapters=blend).status_code == 200
        assert server.generate(adapter=f"one@{server.digest('one')[:20]}").status_code == 200
        error_of(server.generate(adapter="one@sha256:00000000"), 404, "adapter_not_found")

    @pytest.mark.parametrize("name", ["none", "..", ".", "a/b", "../one", "", "-x", "a\0b", "link", "file", "empty"])
    def test_what_is_no_adapter_of_the_directory_is_a_404(self, server: Server, root: Path, name: str) -> None:
        (root / "link").symlink_to(root / "one")
        (root / "file").write_text("x")
        (root / "empty").mkdir()
        resolving(server, DirectorySource(root, MAX_BYTES))
        error_of(server.generate(adapter=name), 404, "adapter_not_found")
        server.assert_nothing_left()

    def test_linked_files_are_not_followed(self, server: Server, root: Path, tmp_path: Path) -> None:
        weights = root / "one" / "adapter_model.safetensors"
        weights.rename(tmp_path / "moved")
        weights.symlink_to(tmp_path / "moved")
        resolving(server, DirectorySource(root, MAX_BYTES))
        assert "symbolic link" in error_of(server.generate(adapter="one"), 400, "invalid_request")["message"]
        server.assert_nothing_left()

    def test_a_directory_that_is_gone(self, server: Server, tmp_path: Path) -> None:
        resolving(server, DirectorySource(tmp_path / "none", MAX_BYTES))
        error_of(server.generate(adapter="one"), 404, "adapter_not_found")

    def test_what_is_found_and_refused_says_why(self, server: Server, root: Path) -> None:
        (root / "one" / "adapter_model.safetensors").write_bytes(b"no")
        (root / "two" / "tokenizer_config.json").write_text("[]")
        resolving(server, DirectorySource(root, MAX_BYTES))
        error = error_of(server.generate(adapter="one"), 422, "invalid_safetensors")
        assert error["param"] == "one"
        assert "was looked up, and cannot be served" in error["message"]
        error_of(server.generate(adapter="two"), 422, "bad_config")
        server.assert_nothing_left()

    def test_the_base_model_is_never_looked_up(self, server: Server, source: FakeSource) -> None:
        resolving(server, source)
        assert server.generate(adapter="base").status_code == 200
        assert server.generate().status_code == 200
        assert source.asked == []

    def test_a_foreign_name_is_looked_up_like_one_that_nobody_has(
        self, make_server: Callable[..., Server], source: FakeSource
    ) -> None:
        server = resolving(make_server([ApiKey.of(name, tenant=name) for name in ("acme", "rival")]), source)
        for name in ("sql", "secret"):
            server.client.post("/v1/adapters", data={"name": name}, files=server.form("two"), headers=bearer("acme"))

        def ask(name: str, tenant: str) -> httpx.Response:
            body = {"prompt": "hi", "adapter": name}
            return server.client.post("/v1/generate", json=body, headers=bearer(tenant))

        refused = error_of(ask("secret", "rival"), 404, "adapter_not_found")["message"]
        assert (
            refused.replace("secret", "nobody") == error_of(ask("nobody", "rival"), 404, "adapter_not_found")["message"]
        )
        assert source.asked == ["secret", "nobody"]
        found = ask("sql", "rival").headers["x-adapter-digest"]
        assert found == server.digest("sql"), "it is registered for all"
        assert ask("sql", "acme").headers["x-adapter-digest"] == server.store.get("acme", "sql").digest != found
        assert source.asked == ["secret", "nobody", "sql"]

    def test_a_bug_is_not_shown(self, server: Server, source: FakeSource, caplog: pytest.LogCaptureFixture) -> None:
        source.error = ZeroDivisionError("a secret")
        resolving(server, source)
        assert "secret" not in error_of(server.generate(adapter="sql"), 500, "internal_error")["message"]
        assert "a secret" in caplog.text


def test_concurrent_requests_for_one_name_are_one_look_up(server: Server, source: FakeSource) -> None:
    resolving(server, source)
    source.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.generate, adapter="sql") for _ in range(8)]
        assert source.begun.acquire(timeout=WAIT_S)
        assert server.generate(adapter="base").status_code == 200, "who waits for a look-up stops nobody else"
        source.gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * 8
    assert source.asked == ["sql"]
    assert len(server.store.get("", "sql").versions) == 1


def test_those_who_wait_are_told_of_the_same_failure(server: Server, source: FakeSource) -> None:
    resolver = AdapterResolver(server.registry, [source])
    source.gate.clear()
    source.error = ApiError("forbidden", "gated")
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(resolver.resolve, "sql") for _ in range(4)]
        assert source.begun.acquire(timeout=WAIT_S)
        source.gate.set()
        errors = [call.exception(WAIT_S) for call in calls]
    assert source.asked == ["sql"]
    assert all(isinstance(error, ApiError) and error.code == "forbidden" for error in errors)
    assert len({id(error) for error in errors}) == 4, "a shared exception would collect everybody's frames"


def test_different_names_are_looked_up_side_by_side(server: Server, source: FakeSource) -> None:
    resolver = AdapterResolver(server.registry, [source])
    source.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(resolver.resolve, name) for name in ("sql", "style")]
        assert all(source.begun.acquire(timeout=WAIT_S) for _ in calls)
        source.gate.set()
        assert [call.exception(WAIT_S) for call in calls] == [None, None]


def test_too_many_who_wait_are_sent_away(server: Server, source: FakeSource) -> None:
    resolver = AdapterResolver(server.registry, [source])
    source.gate.clear()
    with ThreadPoolExecutor(MOST_WAITING) as pool:
        calls = [pool.submit(resolver.resolve, f"n{i}") for i in range(MOST_WAITING)]
        assert all(source.begun.acquire(timeout=WAIT_S) for _ in calls)
        with pytest.raises(Overloaded):
            resolver.resolve("sql")
        source.gate.set()
        assert all(isinstance(call.exception(WAIT_S), AdapterNotFound) for call in calls)
    resolver.resolve("sql")


@pytest.mark.parametrize("error", [SourceNotFound("no"), ApiError("adapter_unavailable", "offline")])
def test_a_failure_is_remembered_for_a_while(server: Server, source: FakeSource, error: Exception) -> None:
    times = iter([0.0, 0.0, FAILURE_REMEMBERED_S - 1, FAILURE_REMEMBERED_S])  # asked, remembered, asked, asked
    resolver = AdapterResolver(server.registry, [source], clock=lambda: next(times))
    source.error = error
    for _ in range(2):
        with pytest.raises((AdapterNotFound, ApiError)):
            resolver.resolve("sql")
    assert source.asked == ["sql"]
    source.error = None
    resolver.resolve("sql")
    assert source.asked == ["sql", "sql"]


def test_only_so_many_failures_are_remembered(server: Server, source: FakeSource) -> None:
    resolver = AdapterResolver(server.registry, [source], clock=lambda: 0.0)
    for i in range(MOST_FAILURES + 1):
        with pytest.raises(AdapterNotFound):
            resolver.resolve(f"n{i}")
    for name in ("n1", "n0"):  # the oldest alone is forgotten
        with pytest.raises(AdapterNotFound):
            resolver.resolve(name)
    assert source.asked.count("n1") == 1
    assert source.asked.count("n0") == 2


def test_sources_are_asked_in_order(server: Server, source: FakeSource, adapter_dirs: dict[str, Path]) -> None:
    second = FakeSource(adapter_dirs["two"], "sql", "other")
    resolver = AdapterResolver(server.registry, [source, second])
    resolver.resolve("sql")
    resolver.resolve("other")
    assert (source.asked, second.asked) == (["sql", "other"], ["other"])


def test_an_upload_meanwhile_is_what_the_name_means(server: Server, source: FakeSource) -> None:
    resolver = AdapterResolver(server.registry, [source])
    source.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(resolver.resolve, "sql")
        assert source.begun.acquire(timeout=WAIT_S)
        server.upload("sql", "two")
        uploaded = server.digest("sql")
        source.gate.set()
        assert call.exception(WAIT_S) is None
    assert server.digest("sql") == uploaded


def test_a_pipe_in_the_directory_does_not_hang(server: Server, root: Path) -> None:
    weights = root / "one" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ApiError, match="not a plain file"):
        AdapterResolver(server.registry, [DirectorySource(root, MAX_BYTES)]).resolve("one")


def test_a_resolver_is_not_asked_for_what_is_there(make_server: Callable[..., Server], source: FakeSource) -> None:
    server = resolving(make_server(), source)
    server.upload("sql")
    assert server.generate(adapter="sql").status_code == 200
    assert source.asked == []
