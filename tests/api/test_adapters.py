"""Adapters listed, shown and deleted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import BASE, Server, error_of


def names(page: dict[str, Any]) -> list[str]:
    return [adapter["name"] for adapter in page["data"]]


def test_pages_follow_each_other_to_the_end(server: Server) -> None:
    for name in "edcba":
        server.upload(name, activate="true" if name == "b" else "false")
    first = server.client.get("/v1/adapters?limit=2").json()
    assert (names(first), first["next"]) == (["a", "b"], "b")
    assert [adapter["active"] for adapter in first["data"]] == [False, True]
    second = server.client.get("/v1/adapters?limit=2&after=b").json()
    assert (names(second), second["next"]) == (["c", "d"], "d")
    last = server.client.get("/v1/adapters?limit=2&after=d").json()
    assert (names(last), last["next"]) == (["e"], None)
    assert names(server.client.get("/v1/adapters").json()) == list("abcde")


@pytest.mark.parametrize(
    ("query", "param"), [("limit=0", "limit"), ("limit=1001", "limit"), ("after=/", "after"), ("page=2", "page")]
)
def test_the_page_asked_for_is_checked(server: Server, query: str, param: str) -> None:
    assert error_of(server.client.get(f"/v1/adapters?{query}"), 400, "invalid_request")["param"] == param


def test_one_adapter_is_shown_with_everything(server: Server) -> None:
    server.upload("sql")
    shown = server.client.get("/v1/adapters/sql").json()
    listed = server.client.get("/v1/adapters").json()["data"][0]
    own = {"config", "versions", "target_modules", "blend"}
    assert {key: shown[key] for key in shown if key not in own} == {
        key: listed[key] for key in listed if key not in own
    }
    assert shown["base"] == BASE
    assert (shown["r"], shown["num_vectors"], shown["vector_length"], shown["topk"]) == (4, 32, 16, 2)
    assert len(shown["target_modules"]) == listed["target_modules"] == 4
    assert shown["config"]["peft_type"] == "VBLORA"
    assert shown["file_bytes"] == sum(map(len, server.form().values()))
    assert shown["warnings"]


def test_state_and_residency_follow_the_registry(server: Server) -> None:
    server.upload("sql")
    compact = server.client.get("/v1/adapters/sql").json()
    assert (compact["state"], compact["pins"], compact["last_used"]) == ("STORED", 0, None)
    server.registry.pin(server.digest("sql"))
    shown = server.client.get("/v1/adapters/sql").json()
    assert (shown["state"], shown["pins"]) == ("READY", 1)
    assert shown["resident_bytes"] > compact["resident_bytes"]
    assert shown["last_used"] > 0
    assert shown["versions"][0]["state"] == "READY"


def test_versions_are_listed_newest_first(server: Server) -> None:
    digests = []
    for adapter in ("one", "two", "logits"):
        server.upload("sql", adapter, query="?replace=true")
        digests.insert(0, server.digest("sql"))
    versions = server.client.get("/v1/adapters/sql").json()["versions"]
    assert [version["digest"] for version in versions] == digests
    assert [version["current"] for version in versions] == [True, False, False]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/parameters"),
        ("POST", "/activate"),
        ("POST", "/deactivate"),
        ("POST", "/rollback"),
    ],
)
@pytest.mark.parametrize("name", ["nope", "base", "a b", "sql@sha256:00000000"])
def test_an_adapter_that_does_not_exist_is_404(server: Server, method: str, path: str, name: str) -> None:
    server.upload("sql")
    body = {"digest": "sha256:00000000"} if path == "/rollback" else None
    response = server.client.request(method, f"/v1/adapters/{name}{path}", json=body)
    assert error_of(response, 404, "adapter_not_found")["param"] == name


def test_a_deleted_adapter_is_gone(server: Server) -> None:
    server.upload("sql", activate="true")
    response = server.client.delete("/v1/adapters/sql")
    assert (response.status_code, response.content) == (204, b"")
    server.assert_nothing_left()
    error_of(server.generate(adapter="sql"), 404, "adapter_not_found")
    assert server.generate().headers["x-adapter-digest"] == "base"
    assert server.registry.resident_bytes() == (0, 0)


def test_a_pinned_adapter_outlives_its_deletion(server: Server) -> None:
    server.upload("sql")
    digest = server.digest("sql")
    server.registry.pin(digest)
    server.client.delete("/v1/adapters/sql")
    assert server.registry.status(digest).pins == 1
    server.registry.unpin(digest)
    assert server.registry.resident_bytes() == (0, 0)


def test_files_shared_with_another_name_survive(server: Server) -> None:
    server.upload("sql")
    server.upload("copy")
    server.client.delete("/v1/adapters/sql")
    assert server.generate(adapter="copy").status_code == 200
    server.registry.pin(server.digest("copy"))
