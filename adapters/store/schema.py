"""The database's tables, as the migrations that lead to them."""

from __future__ import annotations

APPLICATION_ID = 0x56424C41  # "VBLA", in the file's header: tells our database from anybody else's

# Entry i takes a database from schema i to i + 1, in one transaction. Entries are only ever appended.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE adapters (
            tenant TEXT NOT NULL,  -- '' is the shared one
            name TEXT NOT NULL,
            digest TEXT NOT NULL,  -- the current version
            created_at REAL NOT NULL,
            updated_at REAL NOT NULL,
            PRIMARY KEY (tenant, name),
            FOREIGN KEY (tenant, name, digest) REFERENCES versions (tenant, name, digest)
                DEFERRABLE INITIALLY DEFERRED
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE versions (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- newer is larger
            tenant TEXT NOT NULL,
            name TEXT NOT NULL,
            digest TEXT NOT NULL,
            created_at REAL NOT NULL,
            file_bytes INTEGER NOT NULL,
            info TEXT NOT NULL,  -- JSON: the publisher's, so that a listing opens no file
            UNIQUE (tenant, name, digest),
            FOREIGN KEY (tenant, name) REFERENCES adapters (tenant, name) ON DELETE CASCADE
        )
        """,
        "CREATE INDEX versions_by_digest ON versions (digest)",
        """
        CREATE TABLE activations (
            tenant TEXT NOT NULL PRIMARY KEY,
            name TEXT NOT NULL,
            mode TEXT NOT NULL CHECK (mode IN ('switch', 'merge')),
            FOREIGN KEY (tenant, name) REFERENCES adapters (tenant, name) ON DELETE CASCADE
        ) WITHOUT ROWID
        """,
    ),
    (  # a tenant may make a shared adapter its default
        """
        CREATE TABLE defaults (
            tenant TEXT NOT NULL PRIMARY KEY,
            owner TEXT NOT NULL,  -- of the adapter: the tenant, or ''
            name TEXT NOT NULL,
            mode TEXT NOT NULL CHECK (mode IN ('switch', 'merge')),
            FOREIGN KEY (owner, name) REFERENCES adapters (tenant, name) ON DELETE CASCADE
        ) WITHOUT ROWID
        """,
        "INSERT INTO defaults SELECT tenant, tenant, name, mode FROM activations",
        "DROP TABLE activations",
        "ALTER TABLE defaults RENAME TO activations",
        "CREATE INDEX activations_by_adapter ON activations (owner, name)",  # for the cascade
    ),
    (),  # no table changes, but files do: a release that knows no banks would take adapters without theirs for damaged
)

VERSION = len(MIGRATIONS)
