"""Adapters as responses show them: the store's record, the registry's state and the active one, put together.

Everything here reads the store: keep it off the event loop.
"""

from __future__ import annotations

from adapters.store import Activation, AdapterRecord, AdapterVersion
from service.api.deps import ServerState
from service.api.errors import ApiError
from service.api.schemas.adapters import AdapterDetail, AdapterPage, AdapterView, VersionView, adapter_fields


def show(state: ServerState, tenant: str, record: AdapterRecord) -> AdapterView:
    """The adapter as that tenant sees it."""
    return _view(state, tenant, record, state.store.active(tenant))


def show_page(state: ServerState, tenant: str, limit: int, after: str | None) -> AdapterPage:
    records, following = state.store.list(tenant, limit=limit, after=after)
    active = state.store.active(tenant)
    return AdapterPage(data=[_view(state, tenant, record, active) for record in records], next=following)


def show_detail(state: ServerState, tenant: str, name: str) -> AdapterDetail:
    """Raises AdapterNotFound."""
    record = state.store.visible(tenant, name)
    fields = show(state, tenant, record).model_dump()
    fields["target_modules"] = record.info["target_modules"]
    versions = [_show_version(state, record, version) for version in record.versions]
    return AdapterDetail(**fields, config=record.info["config"], blend=record.info.get("blend"), versions=versions)


def own(state: ServerState, tenant: str, name: str) -> AdapterRecord:
    """The tenant's own adapter of that name, which it may change. Raises AdapterNotFound; ApiError for a shared one."""
    record = state.store.visible(tenant, name)
    if record.tenant != tenant:
        raise ApiError(
            "forbidden",
            f"{name!r} is shared with everyone and not this API key's to change: upload an adapter of that name, which "
            "then takes its place for you",
            param=name,
        )
    return record


def delete(state: ServerState, tenant: str, name: str) -> None:
    """Forgets an adapter of the tenant's own with all its versions. Raises what `own` does."""
    own(state, tenant, name)
    record = state.store.delete(tenant, name)
    state.registry.forget_deleted([version.digest for version in record.versions])
    state.activity.requests.forget(tenant, name)


def _view(state: ServerState, tenant: str, record: AdapterRecord, active: Activation | None) -> AdapterView:
    status = state.registry.status(record.digest)
    requests = state.activity.requests.of(record.tenant, record.name, tenant)
    return AdapterView(**adapter_fields(record, status, active, state.settings.served_model_name, requests))


def _show_version(state: ServerState, record: AdapterRecord, version: AdapterVersion) -> VersionView:
    return VersionView(
        digest=version.digest,
        created_at=version.created_at,
        file_bytes=version.file_bytes,
        current=version.digest == record.digest,
        state=state.registry.status(version.digest).state,
    )
