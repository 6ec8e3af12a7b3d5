"""Where things are: the keys of tenants' manifests and of adapters' files.

    tenants/<tenant>.json              the tenant's names, versions and activation
    blobs/sha256/<64 hex>/<file>       an adapter's files

Tenants and file names are written in lower-case letters, digits, '.', '_' and '-'; every other byte, and a '.' at the
beginning, as '=' and two hex digits. So no two have the same key, not even where case does not count, and none leads
elsewhere. The shared tenant, whose name is empty, is "=shared": no encoded name can be that.
"""

from __future__ import annotations

import re

from adapters.store.names import is_digest

TENANTS = "tenants"
BLOBS = "blobs/sha256"

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789._-")
_ENCODED = re.compile(r"(?!\.)(?:[a-z0-9._-]|=[0-9a-f]{2})+")
_SHARED = "=shared"
_SUFFIX = ".json"


def manifest_key(tenant: str) -> str:
    return f"{TENANTS}/{encode(tenant) if tenant else _SHARED}{_SUFFIX}"


def tenant_of(key: str) -> str | None:
    """The tenant whose manifest has that key; None for a key that is no manifest's."""
    name = key.removeprefix(f"{TENANTS}/")
    if name == key or not name.endswith(_SUFFIX):
        return None
    name = name.removesuffix(_SUFFIX)
    return "" if name == _SHARED else decode(name)


def blob_prefix(digest: str) -> str:
    assert is_digest(digest)
    return f"{BLOBS}/{digest.removeprefix('sha256:')}"


def blob_key(digest: str, file: str) -> str:
    return f"{blob_prefix(digest)}/{encode(file)}"


def file_of(key: str) -> tuple[str, str] | None:
    """The digest and the file's name of a blob's key; None for any other key."""
    parts = key.removeprefix(f"{BLOBS}/").split("/")
    if not key.startswith(f"{BLOBS}/") or len(parts) != 2 or not is_digest(f"sha256:{parts[0]}"):
        return None
    name = decode(parts[1])
    return None if name is None else (f"sha256:{parts[0]}", name)


def encode(name: str) -> str:
    """One segment of a key, for a name that is not empty."""
    assert name
    encoded = "".join(chr(byte) if byte in _PLAIN else f"={byte:02x}" for byte in name.encode())
    return f"=2e{encoded[1:]}" if encoded.startswith(".") else encoded


def decode(segment: str) -> str | None:
    """The name that `encode` wrote so; None for what it cannot have written."""
    if not _ENCODED.fullmatch(segment):
        return None
    try:
        name = re.sub(rb"=(..)", lambda match: bytes([int(match[1], 16)]), segment.encode()).decode()
    except UnicodeDecodeError:
        return None
    return name if encode(name) == segment else None
