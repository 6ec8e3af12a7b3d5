"""POST /v1/adapters with JSON: adapters from the server's disk or from the Hub, where the operator allows it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.split_file import BANK_FILE, WEIGHTS_FILE, open_file
from service.api import directories, sources
from service.api.directories import copy_directory
from service.api.hub_ids import HubPattern
from tests.api.conftest import Server, error_of
from tests.fake_hub import COMMIT, FakeHub
from tests.unit.adapters.store_support import uploaded


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


def test_the_store_is_no_source(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """Else whoever knows the digest of a foreign adapter, from a receipt for one, could register it as his own."""
    server = make_server(allow_source=(Path("/"),))
    (tmp_path / "link").symlink_to(server.data_dir)
    server.upload("secret", "two")
    stored = server.store.path(server.digest("secret"))
    shutil.copytree(stored, server.data_dir / "quarantine" / "x")
    sources = [stored, tmp_path / "link" / stored.relative_to(server.data_dir), server.data_dir / "quarantine" / "x"]
    for source in sources:
        error_of(load(server, source), 403, "forbidden")
        error_of(
            server.client.post("/v1/load_lora_adapter", json={"lora_name": "sql", "lora_path": str(source)}),
            403,
            "forbidden",
        )
    copied = server.data_dir / "incoming"
    shutil.copytree(stored, copied)
    assert "bank apart" in error_of(load(server, copied), 400, "invalid_request")["message"]
    with open_file(copied / WEIGHTS_FILE) as file:
        weights = file.read()
    (copied / WEIGHTS_FILE).write_bytes(weights)
    (copied / BANK_FILE).unlink()
    assert load(server, copied).status_code == 201, "the rest of the directory is the operator's"


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


@pytest.mark.parametrize("kind", ["socket", "directory"])
def test_what_is_no_plain_file_is_refused(
    server: Server, root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    weights.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "socket":
            monkeypatch.chdir(weights.parent)  # the path from elsewhere may be too long for a socket
            listener.bind(weights.name)
        else:
            weights.mkdir()
        error_of(load(server, root / "sql"), 400, "invalid_request")
    server.assert_nothing_left()


def test_a_device_is_refused(server: Server, root: Path) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    weights.unlink()
    try:
        os.mknod(weights, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("only root makes devices")
    error_of(load(server, root / "sql"), 400, "invalid_request")
    server.assert_nothing_left()


def test_files_with_another_name_are_copied_and_not_shared(server: Server, root: Path, tmp_path: Path) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    weights.chmod(0o644)
    os.link(weights, tmp_path / "linked")
    assert load(server, root / "sql").status_code == 201
    stored = server.store.path(server.digest("sql")) / "adapter_model.safetensors"
    assert stored.stat().st_nlink == 1
    assert weights.stat().st_mode & 0o077, "the original is not made private with the copy"


def test_a_file_that_grows_is_read_as_far_as_was_checked(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = root / "sql" / "adapter_model.safetensors"
    before, fstat = weights.read_bytes(), os.fstat

    def fstat_then_grow(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        if os.path.samestat(status, weights.stat()):
            weights.write_bytes(before + b"x" * 10_000)
        return status

    monkeypatch.setattr(directories.os, "fstat", fstat_then_grow)
    assert load(server, root / "sql").status_code == 201
    assert uploaded(server.store.path(server.digest("sql")) / "adapter_model.safetensors") == before


@pytest.mark.parametrize("swapped", ["sql", "."])
def test_a_link_put_there_after_the_check_is_not_followed(
    server: Server, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    real = tmp_path / "real"

    def swap_then_copy(directory: Path, *args: Any, **options: Any) -> None:
        (root / swapped).resolve().rename(real)
        (root if swapped == "." else root / swapped).symlink_to(real)
        copy_directory(directory, *args, **options)

    monkeypatch.setattr(sources, "copy_directory", swap_then_copy)
    error_of(load(server, root / "sql"), 400, "invalid_request")
    server.assert_nothing_left()


SCHEMES = ("file", "http", "https", "s3", "gs", "ftp", "ssh", "git+https", "data", "HF", "Hf", "hF", "hf+http", "HTTP")
NO_SOURCES = [
    *(f"{scheme}://org/sql" for scheme in SCHEMES),
    "https://user:secret@host/x", "hf:///sql", "hf:////org/sql", "hf:org/sql", "hf:/org/sql", "hf://org:80/sql",
    "hf://user@org/sql", "hf://user:secret@org/sql", "hf://org/../sql", "hf://../org", "hf://org//sql",
    "hf://org/%2e%2e", "hf://org%2fsql", "hf://org/sql%00", "hf://org/sql?x=1", "hf://org/sql#x", "hf://org/sql@",
    "hf://org/sql@../main", "hf://org/sql@a/../../b", "hf://org/sql@%2e%2e", "hf://org/sql@a b", "hf://org/sql\n",
    " hf://org/sql", "hf://org/sql ", "hf://оrg/sql", "hf://org/ѕql", "hf://org／sql", "ｈｆ://org/sql",
    "hf:／/org/sql", "hf://org/sql\u202e", "file:/etc", "file:etc", "data:text/plain,x", "//host/share",
    "\\\\host\\share", "~/x", "~root", "./sql", "../sql", "sql", "C:\\x", "-", "$HOME", "{root}/sql\0",
]  # fmt: skip


@pytest.mark.parametrize("source", NO_SOURCES)
@pytest.mark.parametrize("route", ["/v1/adapters", "/v1/load_lora_adapter"])
def test_nothing_else_is_a_source(
    make_server: Callable[..., Server], root: Path, hub: FakeHub, adapter_dirs: dict[str, Path], source: str, route: str
) -> None:
    """Not even where everything on the Hub is allowed."""
    server = make_server(allow_source=(root,), allow_hub=(HubPattern.parse("hf://*"),))
    hub.add("org/sql", adapter_dirs["one"])
    names = ("name", "source") if route == "/v1/adapters" else ("lora_name", "lora_path")
    response = server.client.post(route, json=dict(zip(names, ("sql", source.format(root=root)), strict=True)))
    assert response.status_code in (400, 403, 404), response.text
    assert hub.requests == []
    server.assert_nothing_left()


@pytest.mark.parametrize("source", ["gs://bucket/key", "https://example.com/x"])
def test_other_remote_sources_are_not_supported(server: Server, source: str) -> None:
    error = error_of(load(server, source), 400, "invalid_request")
    assert error["param"] == "source"
    assert "not supported: give hf://org/repo or s3://bucket/prefix" in error["message"]


def test_code_that_comes_along_is_neither_taken_nor_run(
    server: Server, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT and transformers would import what `auto_mapping` and `auto_map` name, were they let."""
    witness = tmp_path / "witness"
    (root / "sql" / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(root / "sql")
    config = json.loads((root / "sql" / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    code = {"auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}, "trust_remote_code": True}
    (root / "sql" / "adapter_config.json").write_text(json.dumps({**config, **code}))
    (root / "sql" / "tokenizer_config.json").write_text(json.dumps({**code, "tokenizer_class": "evil.Evil"}))
    assert load(server, root / "sql").status_code == 201
    server.registry.pin(server.digest("sql"))
    body = {"model": "sql", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    server.client.post("/v1/chat/completions", json=body)
    assert not witness.exists()
    assert not (server.store.path(server.digest("sql")) / "evil.py").exists()


@pytest.mark.parametrize("field", ["trust_remote_code", "token", "endpoint", "revision"])
def test_no_field_of_a_request_says_how_a_source_is_read(server: Server, root: Path, field: str) -> None:
    assert error_of(load(server, root / "sql", **{field: True}), 400, "invalid_request")["param"] == field
    server.assert_nothing_left()


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
