"""Which adapters a request is for, as far as that can be told without a model.

What cannot be told, or is wrong, has no affinity: any replica refuses it as it should be refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapters.errors import AdapterError
from adapters.store import Store
from service.api.access import Access, access_to
from service.api.deps import ApiSettings
from service.api.model_names import parse_model
from service.cluster.policy import affinity_key
from service.engine.selection import WeightedName


def generates(method: str, path: str) -> bool:
    """Whether it takes a place in an engine."""
    return method == "POST" and access_to(method, path, metrics_public=False) is Access.INFER


def affinity_of(body: bytes, tenant: str, store: Store, settings: ApiSettings) -> str | None:
    """The key of a request to a route that generates. Reads the store: not for an event loop."""
    try:
        names = _names(json.loads(body), settings)
        return affinity_key(_digests(names, tenant, store, settings))
    except (AdapterError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _names(body: Any, settings: ApiSettings) -> list[str] | None:
    """The names that a body has, in any route's fields; None: it names none."""
    if not isinstance(body, dict):
        return []
    asked = _native(body) or _lorax(body.get("parameters"))
    if asked is not None:
        return asked
    model = body.get("model")
    if not isinstance(model, str) or settings.means_base(model):
        return None if model is None or "adapter" in body else []
    return [term.name for term in parse_model(model)]


def _native(body: Mapping[str, Any]) -> list[str] | None:
    if isinstance(body.get("adapter"), str):
        return [body["adapter"]]
    if isinstance(body.get("adapters"), list):
        return [part["name"] for part in body["adapters"]]
    return None


def _lorax(parameters: Any) -> list[str] | None:
    if not isinstance(parameters, dict):
        return None
    if isinstance(parameters.get("adapter_id"), str):
        return [parameters["adapter_id"]]
    merged = parameters.get("merged_adapters")
    return list(merged["ids"]) if isinstance(merged, dict) else None


def _digests(names: list[str] | None, tenant: str, store: Store, settings: ApiSettings) -> list[str]:
    """Raises AdapterError."""
    if names is None:
        active = store.active(tenant)
        return [] if active is None else [store.get(active.owner, active.name).digest]
    return [_digest(name, tenant, store) for name in names if not settings.means_base(name)]


def _digest(text: str, tenant: str, store: Store) -> str:
    name, prefix = WeightedName(text).split()
    record = store.visible(tenant, name)
    return record.version(prefix or record.digest).digest
