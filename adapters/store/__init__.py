"""The adapter store: files by digest on disk; names, versions and activations in SQLite.

    data_dir/
      lock                     held by the one process that owns the directory
      reserve                  room kept back, so that a full disk can still be emptied
      store.sqlite3            what exists: names, versions, which of them is current, what is active
      store.sqlite3.backup     a copy of it that is a little older; .schema-N: one from before an upgrade
      blobs/sha256/<64 hex>/   one directory per distinct adapter, never changed after it appears
      tmp/                     uploads in progress and removals in progress; emptied at every start
      quarantine/              what `repair` has taken out of service; nothing here ever removes it

The database is the truth. A blob is complete and on disk before the row that names it is committed, and is
removed only after the last such row is gone, so a process killed anywhere in between leaves files that nothing
refers to, never a row without its files. The next start sweeps those files up.

No torch here: the store opens in milliseconds.
"""

from adapters.store.files import digest_of, digest_of_files
from adapters.store.names import check_name
from adapters.store.records import SHARED, Activation, AdapterRecord, AdapterVersion
from adapters.store.store import AdapterStore

__all__ = [
    "SHARED",
    "Activation",
    "AdapterRecord",
    "AdapterStore",
    "AdapterVersion",
    "check_name",
    "digest_of",
    "digest_of_files",
]
