"""The one door through which adapters are registered: uploads, directories, the Hub, at start and while serving."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import AdapterNotFound
from adapters.registry import AdapterRegistry
from adapters.store import SHARED, AdapterRecord, digest_of
from service.api.chat_files import check_chat_files
from service.api.label_files import check_labels

log = logging.getLogger(__name__)


def register(
    registry: AdapterRegistry,
    tenant: str,
    name: str,
    staged: Path,
    *,
    replace: bool = False,
    allow_base_mismatch: bool = False,
    source: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> AdapterRecord:
    """Checks the staged files and publishes them. `source` is where they were fetched from, for the log.

    `provenance` is kept with the record.

    Raises what AdapterRegistry.register does, and BadConfig for labels and files of the chat that cannot be used.
    """
    check_chat_files(staged)
    check_labels(staged, registry.head)
    record = registry.register(
        tenant,
        name,
        staged,
        replace=replace,
        allow_base_mismatch=allow_base_mismatch,
        provenance=provenance,
    )
    if source is not None:
        log.info("registered an adapter", extra={"adapter": name, "digest": record.digest, "source": source})
    return record


def register_unless_known(registry: AdapterRegistry, name: str, staged: Path, *, source: str) -> str:
    """The digest of the staged files, registered for all unless `name` has a version with these very files.

    A version that is known is left as it is, current or not: a rollback outlives a restart.
    """
    try:
        return registry.store.version(SHARED, name, digest_of(staged)).digest
    except AdapterNotFound:
        return register(registry, SHARED, name, staged, replace=True, source=source).digest
