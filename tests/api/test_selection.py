"""From names to digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import AdapterNotFound, AdapterUnavailable, InvalidSelection
from service.api.selection import resolve
from service.engine.selection import Mode, SelectedAdapter, Selection, SelectionSpec, WeightedName
from tests.api.conftest import ALIAS, BASE, Server, error_of


def ask(server: Server, *names: str | tuple[str, float], mode: Mode | None = None) -> Selection:
    wanted = tuple(WeightedName(*((name,) if isinstance(name, str) else name)) for name in names)
    return resolve(server.state, "", SelectionSpec(wanted, mode))


def damage(server: Server, name: str) -> None:
    """What is on the disk no longer is what was uploaded, and the server was restarted."""
    path: Path = server.store.path(server.digest(name)) / "adapter_model.safetensors"
    path.write_bytes(b"\0" * 64)
    assert server.registry.check_stored() == 1


def test_nothing_asked_is_the_base_if_nothing_is_active(server: Server) -> None:
    assert resolve(server.state, "", SelectionSpec()) == Selection()
    assert resolve(server.state, "", SelectionSpec(mode=Mode.MERGE)) == Selection(mode=Mode.MERGE)


@pytest.mark.parametrize("name", ["base", BASE, ALIAS])
def test_every_name_of_the_base_means_the_base(server: Server, name: str) -> None:
    server.upload("sql", activate="true")
    assert ask(server, name).is_base
    assert server.generate(adapter=name).headers["x-adapter-digest"] == "base"


def test_the_base_cannot_be_blended(server: Server) -> None:
    server.upload("sql")
    with pytest.raises(InvalidSelection, match="base model"):
        ask(server, "sql", ALIAS)


def test_a_digest_prefix_pins_a_version(server: Server) -> None:
    server.upload("sql", "one")
    first = server.digest("sql")
    server.upload("sql", "two", query="?replace=true")
    assert ask(server, "sql").adapters[0].digest == server.digest("sql") != first
    assert ask(server, f"sql@{first[:15]}").adapters == (SelectedAdapter("sql", first),)
    with pytest.raises(AdapterNotFound, match="no version"):
        ask(server, "sql@sha256:00000000")
    for malformed in ("sql@", "sql@sha256:0000", "sql@md5:00000000"):
        with pytest.raises(InvalidSelection):
            ask(server, malformed)


def test_the_same_files_twice_are_one_term(server: Server) -> None:
    server.upload("sql", "one")
    server.upload("copy", "one")
    server.upload("style", "two")
    blend = ask(server, ("sql", 0.5), ("style", 1.0), ("copy", 0.25))
    assert blend.adapters == (
        SelectedAdapter("sql", server.digest("sql"), 0.75),
        SelectedAdapter("style", server.digest("style"), 1.0),
    )


def test_weights_must_have_a_finite_sum(server: Server) -> None:
    server.upload("sql")
    with pytest.raises(InvalidSelection, match="finite"):
        ask(server, ("sql", 1.5e308), ("sql", 1.5e308))


def test_one_unknown_name_spoils_a_blend(server: Server) -> None:
    server.upload("sql")
    with pytest.raises(AdapterNotFound, match="nope"):
        ask(server, "sql", "nope")


def test_a_failed_adapter_is_unavailable_and_says_why(server: Server) -> None:
    server.upload("sql")
    damage(server, "sql")
    with pytest.raises(AdapterUnavailable, match="cannot be served"):
        ask(server, "sql")
    error_of(server.generate(adapter="sql"), 503, "adapter_unavailable")
    error_of(server.client.post("/v1/adapters/sql/activate"), 503, "adapter_unavailable")
    shown = server.client.get("/v1/adapters/sql").json()
    assert shown["state"] == "FAILED"
    assert shown["reason"]
    assert not shown["active"]


def test_a_failed_active_adapter_is_not_replaced_by_the_base(server: Server) -> None:
    server.upload("sql", activate="true")
    damage(server, "sql")
    error_of(server.generate(), 503, "adapter_unavailable")
    assert server.generate(adapter="base").status_code == 200


def test_an_active_adapter_deleted_in_between_leaves_the_base(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.upload("sql", activate="true")
    active = server.store.active("")
    answers = iter([active, None, None])
    monkeypatch.setattr(server.store, "active", lambda tenant: next(answers))
    server.store.delete("", "sql")
    assert resolve(server.state, "", SelectionSpec()).is_base
