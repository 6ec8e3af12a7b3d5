"""Puts a server together from its settings: base model, adapter store, registry, engine, and what the routes need."""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from adapters.errors import AdapterError, AdapterNotFound, CheckpointError
from adapters.registry import AdapterRegistry, AdapterState
from adapters.store import AdapterStore, digest_of
from service.api.deps import ApiSettings, BaseInfo, ServerState
from service.api.guidance import Guidance
from service.api.sources import OPTIONAL_FILES, REQUIRED_FILES
from service.engine.base_model import LoadedBase, identify, load_base
from service.engine.build import EngineOptions, build_engine
from service.engine.seam import Engine
from service.engine.threads import compute_with, in_own_thread
from service.metrics import PrometheusMetrics
from service.setting_kinds import AdapterSource
from service.settings import Settings, SettingsError, load_api_keys

log = logging.getLogger(__name__)

_SHARED = ""  # the tenant of adapters registered at start


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """A server whose engine runs. `state` is what the application is made of; `close` gives everything back."""

    state: ServerState
    _opened: ExitStack

    @property
    def engine(self) -> Engine:
        return self.state.engine

    def close(self) -> None:
        """Stops the engine, failing what still runs, and closes the store. Calling it again does nothing."""
        self._opened.close()


def build_server(settings: Settings) -> Server:
    """Loads the base model, opens the store, registers the adapters of the settings and starts the engine.

    Raises SettingsError, BaseModelError, or StoreError when another server owns the data directory.
    """
    assert settings.model is not None
    api_keys = load_api_keys(settings.api_key_file) if settings.api_key_file else frozenset[str]()
    threads = settings.threads or torch.get_num_threads()
    compute_with(1)
    with ExitStack() as opened:
        # Before the model, which takes longer: a directory that another server owns is known at once.
        names = identify(settings.model, settings.served_model_name, settings.base_alias).names
        store = AdapterStore(settings.data_dir, keep_versions=settings.keep_versions, reserved=names)
        opened.callback(store.close)
        base = in_own_thread(threads, partial(_load_base, settings))
        registry = AdapterRegistry(
            store, base.adapted, base.identity, factor_budget=settings.adapter_memory, device=base.device
        )
        register_all(registry, settings.adapter)
        engine = in_own_thread(threads, partial(build_engine, base, registry, _engine_options(settings))).start()
        compute_with(1)  # as the engine's thread was not: what computes from here on does so alone
        opened.callback(engine.stop)
        state = ServerState(
            settings=_api_settings(settings, base, api_keys),
            store=store,
            registry=registry,
            engine=engine,
            tokenizer=base.tokenizer,
            base=_base_info(base, engine.kv_backend),
            metrics=PrometheusMetrics(engine, registry, store),
            guidance=Guidance(base.tokenizer.underlying, base.vocabulary, base.eos_token_ids),
        )
        return Server(state, opened.pop_all())


def register_all(registry: AdapterRegistry, sources: tuple[AdapterSource, ...]) -> None:
    """Checks every adapter of the store, then registers those of the settings.

    Raises SettingsError for one of the settings that cannot be served; a stored one is only FAILED.
    """
    failed = registry.check_stored()
    log.info("checked the stored adapters", extra={"adapters": registry.store.count(_SHARED), "failed": failed})
    for source in sources:
        try:
            _register(registry, source)
        except AdapterError as error:
            reason = f"({error.code}): {error.message}" if isinstance(error, CheckpointError) else f": {error.message}"
            raise SettingsError(f"the adapter {source.name!r} in {source.source} is refused {reason}") from error


def _register(registry: AdapterRegistry, source: AdapterSource) -> None:
    """Registers one adapter, unless the name has a version with these files: a rollback outlives a restart."""
    directory = Path(source.source).expanduser()
    if not directory.is_dir():
        raise SettingsError(f"the adapter {source.name!r} is to come from {directory}, which is not a directory")
    with registry.store.staging() as staged:
        for name in (*REQUIRED_FILES, *OPTIONAL_FILES):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, staged / name)
        digest = _known_digest(registry.store, source.name, staged)
        if digest is None:
            digest = registry.register(_SHARED, source.name, staged, replace=True).digest
            log.info("registered an adapter", extra={"adapter": source.name, "digest": digest})
    status = registry.status(digest)
    if status.state is AdapterState.FAILED:
        raise SettingsError(f"the adapter {source.name!r} in {directory} cannot be served here: {status.reason}")


def _known_digest(store: AdapterStore, name: str, staged: Path) -> str | None:
    try:
        return store.version(_SHARED, name, digest_of(staged)).digest
    except AdapterNotFound:
        return None


def _load_base(settings: Settings) -> LoadedBase:
    assert settings.model is not None
    log.info("loading the base model", extra={"model": settings.model})
    if settings.log_format == "json" or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # and those of huggingface_hub
    base = load_base(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        served_model_name=settings.served_model_name,
        aliases=settings.base_alias,
    )
    facts = {"model": base.id, "parameters": base.parameters, "dtype": str(base.dtype), "device": str(base.device)}
    log.info("loaded the base model", extra={**facts, "context": base.context, "fingerprint": base.fingerprint})
    return base


def _engine_options(settings: Settings) -> EngineOptions:
    return EngineOptions(
        max_batch_size=settings.max_batch_size,
        max_queue=settings.max_queue,
        max_context=settings.max_context,
        kv_memory=settings.kv_memory,
        prefill_tokens=settings.prefill_tokens,
        prefix_cache=settings.prefix_cache,
        auto_merge=settings.auto_merge,
    )


def _api_settings(settings: Settings, base: LoadedBase, api_keys: frozenset[str]) -> ApiSettings:
    return ApiSettings(
        served_model_name=base.id,
        base_names=base.identity.names | {base.id},
        max_upload_bytes=settings.max_upload,
        upload_timeout_s=settings.upload_timeout_s,
        request_timeout_s=settings.request_timeout_s,
        default_max_tokens=settings.default_max_tokens,
        allow_source=settings.allow_source,
        api_keys=api_keys,
        metrics_public=settings.metrics_public,
        cors_origins=settings.cors_origin,
        log_prompts=settings.log_prompts,
    )


def _base_info(base: LoadedBase, kv_backend: str | None) -> BaseInfo:
    return BaseInfo(
        id=base.id,
        model_type=base.model_type,
        parameters=base.parameters,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        fingerprint=base.fingerprint,
        modules=base.modules,
        created=base.created,
        kv_backend=kv_backend,
    )
