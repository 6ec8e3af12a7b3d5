"""POST /v1/adapters with JSON: adapters from the server's disk or from the Hub, where the operator allows it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.hub_ids import HubPattern
from tests.api.conftest import Server, error_of
from tests.fake_hub import COMMIT, FakeHub


@pytest.fixture
def root(tmp_path: Path, adapter_dirs: dict[str, Path]) -> Path:
    """An allowed root with one adapter, `sql`."""
    shutil.copytree(adapter_dirs["one"], tmp_path / "root" / "sql")
    return tmp_path / "root"


@pytest.fixture
def server(make_server: Callable[..., Server], root: Path) -> Server:
    return make_server(allow_source=(root,))


def load(server: Server, source: object, query: str = "", **fields: Any) -> httpx.Response:
    return server.client.post(f"/v1/adapters{query}", json={"name": "sql", "source": str(source), **fields})


def test_a_directory_is_taken_in_like_an_upload(server: Server, root: Path) -> None:
    (root / "sql" / "README.md").write_text("not part of the adapter")
    response = load(server, root / "sql")
    assert response.status_code == 201
    server.upload("uploaded")
    assert response.json()["digest"] == server.digest("uploaded")
    assert (root / "sql" / "adapter_config.json").exists()


def test_the_files_of_the_chat_come_along(server: Server, root: Path) -> None:
    (root / "sql" / "chat_template.jinja").write_text("{{ messages }}")
    (root / "sql" / "tokenizer_config.json").write_text("{}")
    load(server, root / "sql")
    stored = server.store.path(server.digest("sql"))
    assert (stored / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (stored / "tokenizer_config.json").read_text() == "{}"


def test_an_optional_file_too_large_is_refused(server: Server, root: Path) -> None:
    (root / "sql" / "tokenizer_config.json").write_bytes(b" " * (1 << 20) + b"{}")
    assert "tokenizer_config.json" in error_of(load(server, root / "sql"), 413, "payload_too_large")["message"]
    server.assert_nothing_left()


@pytest.mark.parametrize(("activate", "mode"), [(True, "switch"), ("merge", "merge"), (False, None)])
def test_it_may_be_activated(server: Server, root: Path, activate: object, mode: str | None) -> None:
    assert load(server, root / "sql", activate=activate).json()["mode"] == mode


def test_it_may_replace(server: Server, root: Path) -> None:
    server.upload("sql", "two")
    error_of(load(server, root / "sql"), 409, "adapter_exists")
    assert load(server, root / "sql", "?replace=true").status_code == 201


def test_a_link_to_an_allowed_directory_is_followed(server: Server, root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert load(server, tmp_path / "link" / "sql").status_code == 201


@pytest.mark.parametrize("source", ["{tmp}/secret", "{root}/../secret", "{root}/escape", "/", "/etc", "{root}x/sql"])
def test_outside_of_what_is_allowed_is_forbidden(server: Server, root: Path, tmp_path: Path, source: str) -> None:
    shutil.copytree(root / "sql", tmp_path / "secret")
    (root / "escape").symlink_to(tmp_path / "secret")
    error = error_of(load(server, source.format(tmp=tmp_path, root=root)), 403, "forbidden")
    assert error["type"] == "permission_error"
    assert "--allow-source" in error["message"]
    server.assert_nothing_left()


def test_without_an_allowed_root_everything_is_forbidden(make_server: Callable[..., Server], root: Path) -> None:
    error_of(load(make_server(), root / "sql"), 403, "forbidden")


@pytest.mark.parametrize("target", ["elsewhere", "sibling"])
def test_linked_files_are_not_followed(server: Server, root: Path, tmp_path: Path, target: str) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    moved = (tmp_path if target == "elsewhere" else root) / "moved"
    weights.rename(moved)
    weights.symlink_to(moved)
    assert "symbolic" in error_of(load(server, root / "sql"), 400, "invalid_request")["message"]
    server.assert_nothing_left()


def test_a_pipe_does_not_hang(server: Server, root: Path) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    error_of(load(server, root / "sql"), 400, "invalid_request")


def test_files_too_large_are_refused(make_server: Callable[..., Server], root: Path) -> None:
    server = make_server(allow_source=(root,), max_upload_bytes=2000)
    error_of(load(server, root / "sql"), 413, "payload_too_large")
    server.assert_nothing_left()


@pytest.mark.parametrize("source", ["s3://bucket/key", "https://example.com/x"])
def test_other_remote_sources_are_not_supported(server: Server, source: str) -> None:
    error = error_of(load(server, source), 400, "invalid_request")
    assert error["param"] == "source"
    assert "not supported: give hf://org/repo" in error["message"]


class TestHub:
    @pytest.fixture
    def server(self, make_server: Callable[..., Server]) -> Server:
        return make_server(allow_hub=(HubPattern.parse("hf://org/*"),))

    def test_a_repository_is_taken_in_like_an_upload(
        self, server: Server, hub: FakeHub, adapter_dirs: dict[str, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        hub.add("org/sql", adapter_dirs["one"])
        with caplog.at_level(logging.INFO, "service.api.registration"):
            response = load(server, "hf://org/sql@main", activate=True)
        assert (response.status_code, response.json()["active"]) == (201, True)
        server.upload("uploaded")
        assert response.json()["digest"] == server.digest("uploaded")
        logged = [vars(record)["source"] for record in caplog.records if record.name == "service.api.registration"]
        assert logged == [f"hf://org/sql@{COMMIT}"]

    @pytest.mark.parametrize("source", ["hf://other/sql", "hf://orgx/sql"])
    def test_repositories_that_are_not_allowed_are_not_asked_for(
        self, server: Server, hub: FakeHub, adapter_dirs: dict[str, Path], source: str
    ) -> None:
        hub.add(source[5:], adapter_dirs["one"])
        assert "--allow-source" in error_of(load(server, source), 403, "forbidden")["message"]
        assert hub.requests == []

    @pytest.mark.parametrize("source", ["hf://org", "hf://org/a/b", "hf://org/..", "hf://org/x@", "hf://"])
    def test_what_is_no_repository_is_refused(self, server: Server, hub: FakeHub, source: str) -> None:
        assert error_of(load(server, source), 400, "invalid_request")["param"] == "source"
        assert hub.requests == []

    def test_what_fails_leaves_nothing(self, server: Server, hub: FakeHub, adapter_dirs: dict[str, Path]) -> None:
        error_of(load(server, "hf://org/none"), 400, "invalid_request")
        repo = hub.add("org/sql", adapter_dirs["one"], declared={"adapter_model.safetensors": 1 << 20})
        error_of(load(server, "hf://org/sql"), 503, "adapter_unavailable")
        repo.declared = {}
        repo.files["adapter_model.safetensors"] = b"PK\x03\x04"
        error_of(load(server, "hf://org/sql"), 415, "unsupported_checkpoint")
        repo.gated = True
        error_of(load(server, "hf://org/sql"), 403, "forbidden")
        server.assert_nothing_left()


@pytest.mark.parametrize("source", ["sql", "", "{root}/nothing", "{root}/sql/adapter_config.json", "{root}", "\0"])
def test_what_is_no_adapter_directory_is_refused(server: Server, root: Path, source: str) -> None:
    assert error_of(load(server, source.format(root=root)), 400, "invalid_request")["param"] == "source"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", None),
        (b"[]", None),
        (b"", None),
        (b'"\\ud800"', None),
        (b'{"name": "sql"}', "source"),
        (b'{"name": 1, "source": "/x"}', "name"),
        (b'{"name": "sql", "source": "/x", "sauce": 1}', "sauce"),
        (b'{"name": "sql", "source": "/x", "activate": "now"}', "activate"),
        (b'{"name": "base", "source": "/x"}', "name"),
    ],
)
def test_the_body_is_checked(server: Server, content: bytes, named: str | None) -> None:
    response = server.client.post("/v1/adapters", content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400, "invalid_request")["param"] == named
