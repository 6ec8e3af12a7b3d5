"""The adapter store: files by digest on disk; names, versions and activations in SQLite.

    data_dir/
      lock                     held by the one process that owns the directory
      reserve                  room kept back, so that a full disk can still be emptied
      store.sqlite3            what exists: names, versions, which of them is current, what is active
      store.sqlite3.backup     a copy of it that is a little older; .schema-N: one from before an upgrade
      blobs/sha256/<64 hex>/   one directory per distinct adapter, never changed after it appears
      banks/sha256/<64 hex>    the vector banks of those adapters, equal ones once; the adapters hold hard links to them
      tmp/                     uploads in progress and removals in progress; emptied at every start
      quarantine/              what `repair` has taken out of service; nothing here ever removes it

The database is the truth. A blob is complete and on disk before the row that names it is committed, and is
removed only after the last such row is gone, so a process killed anywhere in between leaves files that nothing
refers to, never a row without its files. The next start sweeps those files up.

A compact adapter is mostly its bank, and adapters that were trained on one bank have that in common. So an adapter's
weights are kept without it, and the bank as a link to the one copy (`adapter_model.safetensors.bank`); what readers,
exports and digests see is what was uploaded, all the same. The number of links is the count of references: a bank goes
with the last adapter that has it. Large weights, and on a file system without hard links all weights, are kept whole,
as earlier releases kept them.

No torch here: the store opens in milliseconds.
"""

from adapters.store.files import digest_of, digest_of_files
from adapters.store.names import check_name
from adapters.store.records import SHARED, Activation, AdapterRecord, AdapterVersion
from adapters.store.seam import Store
from adapters.store.store import AdapterStore

__all__ = [
    "SHARED",
    "Activation",
    "AdapterRecord",
    "AdapterStore",
    "AdapterVersion",
    "Store",
    "check_name",
    "digest_of",
    "digest_of_files",
]
