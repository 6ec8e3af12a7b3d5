"""Databases of earlier releases are brought up to date, with everything in them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from adapters.store import SHARED, Activation, AdapterStore
from adapters.store.schema import APPLICATION_ID, MIGRATIONS


def publish(store: AdapterStore, tenant: str, name: str) -> None:
    with store.staging() as staged:
        (staged / "adapter_config.json").write_text(f"{tenant}/{name}")
        store.publish(tenant, name, staged, {})


def test_defaults_of_the_first_schema_are_their_tenants_own(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    for tenant in (SHARED, "acme"):
        publish(store, tenant, "sql")
    store.close()
    database = sqlite3.connect(tmp_path / "store.sqlite3")
    (first_activations,) = [sql for sql in MIGRATIONS[0] if "CREATE TABLE activations" in sql]
    database.executescript(
        f"DROP TABLE activations; {first_activations};"
        "INSERT INTO activations VALUES ('', 'sql', 'merge'), ('acme', 'sql', 'switch');"
        f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1"
    )
    database.close()

    store = AdapterStore(tmp_path)
    assert store.active(SHARED) == Activation(SHARED, "sql", "merge", SHARED)
    assert store.active("acme") == Activation("acme", "sql", "switch", "acme")
    store.delete("acme", "sql")
    assert store.active("acme") is None, "the cascade is there too"
    store.activate("acme", "sql", "merge")
    store.delete(SHARED, "sql")
    assert store.active("acme") is store.active(SHARED) is None
    store.close()
