"""A store of adapters that many servers share: files and names in an object storage, copies of files on each machine.

    tenants/<tenant>.json              what a tenant has: see `manifest`
    blobs/sha256/<64 hex>/<file>       adapters' files, by the digest that AdapterStore gives them too

Files are there before a manifest names them, and manifests are replaced whole, by compare and swap. So a server that is
killed leaves at most files that nothing names, which `garbage` collects when they have been so for a while.
"""

from pathlib import Path

from adapters.store.shared.local import LocalObjects
from adapters.store.shared.objects import ObjectStore
from adapters.store.shared.s3 import S3Objects
from adapters.store.shared.store import SharedAdapterStore

__all__ = ["SharedAdapterStore", "open_objects"]


def open_objects(url: str, endpoint: str | None = None) -> ObjectStore:
    """The objects at s3://bucket/prefix or file:///directory. Raises StoreError."""
    if url.startswith("file://"):
        return LocalObjects(Path(url.removeprefix("file://")))
    return S3Objects(url, endpoint=endpoint)
