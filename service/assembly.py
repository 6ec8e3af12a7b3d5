"""Puts a server together from its settings: base model, adapter store, registry, engine, and what the routes need."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from adapters.errors import AdapterError
from adapters.registry import AdapterRegistry
from adapters.status import AdapterState
from adapters.store import SHARED, AdapterStore, Store
from adapters.store.names import check_name
from adapters.store.shared import SharedAdapterStore, open_objects
from adapters.store.shared.s3 import SCHEME as S3_SCHEME
from service.adapters_dir import AdaptersDirectory, AdaptersDirectoryWatcher
from service.api.bucket_ids import BucketPattern
from service.api.deps import ApiSettings, BaseInfo, PooledServing, ServerState
from service.api.errors import ApiError
from service.api.guidance import Guidance
from service.api.hub_ids import SCHEME as HUB_SCHEME
from service.api.hub_ids import HubPattern, HubTemplate
from service.api.keys import ApiKey, KeyFileError, KeyRing, load_key_file
from service.api.registration import register_unless_known
from service.api.resolver import AdapterResolver, DirectorySource, HubSource, NameSource
from service.api.sources import fetch_own_source
from service.engine.base_model import BaseModelError, LoadedBase, identify, load_base
from service.engine.build import EngineOptions, build_engine
from service.engine.fatal import ShardsLost
from service.engine.graphs.setup import GraphOptions
from service.engine.pooling.tokenizer import PairTokenizer
from service.engine.seam import Engine
from service.engine.shards.team import Team
from service.engine.task import Pooling, Task
from service.engine.threads import compute_with, in_own_thread
from service.logs import draws
from service.metrics import PrometheusMetrics
from service.setting_kinds import AdapterSource
from service.settings import Settings, SettingsError
from service.sharding import check_settings, start_team

log = logging.getLogger(__name__)


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
    _check_task(settings)
    keys = KeyRing(load_keys(settings.api_key_file) if settings.api_key_file else ())
    threads = settings.threads or max(1, torch.get_num_threads() // settings.tensor_parallel)
    compute_with(1)
    with ExitStack() as opened:
        # Before the model, which takes longer: a directory that another server owns is known at once.
        names = identify(settings.model, settings.served_model_name, settings.base_alias).names
        _check_sources(settings, reserved=names)
        store = open_store(settings, reserved=names)
        opened.callback(store.close)
        team = start_team(settings, threads, opened)
        base = in_own_thread(threads, partial(_load_base, settings, team))
        registry = AdapterRegistry(
            store, base.adapted, base.identity, factor_budget=settings.adapter_memory, device=base.device
        )
        if isinstance(store, SharedAdapterStore):
            store.listen(registry.note_changes)
        register_all(registry, settings)
        watcher = _watcher(registry, settings)
        build = partial(build_engine, base, registry, _engine_options(settings), team=team)
        engine = in_own_thread(threads, build).start()
        compute_with(1)  # as the engine's thread was not: what computes from here on does so alone
        opened.callback(engine.stop)
        if team is not None:
            team.on_lost(engine.die)
        state = ServerState(
            settings=_api_settings(settings, base),
            keys=keys,
            store=store,
            registry=registry,
            engine=engine,
            tokenizer=base.tokenizer,
            base=_base_info(base, engine.kv_backend, settings.tensor_parallel),
            metrics=PrometheusMetrics(engine, registry, store),
            guidance=Guidance(base.tokenizer.underlying, base.vocabulary, base.eos_token_ids),
            resolver=_resolver(registry, settings),
            task=base.task,
            pooled=_pooled(base),
        )
        if watcher is not None:
            watcher.start()
            opened.callback(watcher.stop)
        return Server(state, opened.pop_all())


def open_store(settings: Settings, *, reserved: Collection[str] = frozenset()) -> Store:
    """The store of the settings: this process's own, or one that it shares with others. Raises StoreError."""
    if settings.store is None:
        return AdapterStore(settings.data_dir, keep_versions=settings.keep_versions, reserved=reserved)
    return SharedAdapterStore(
        open_objects(settings.store, settings.store_endpoint),
        settings.data_dir,
        cache_bytes=settings.store_cache,
        refresh_s=settings.store_refresh_s,
        keep_versions=settings.keep_versions,
        reserved=reserved,
    )


def _check_task(settings: Settings) -> None:
    """Raises SettingsError for settings that mean nothing to the task."""
    task = Task(settings.task)
    if task is not Task.EMBED and (settings.pooling is not None or settings.normalize is not None):
        raise SettingsError(f"pooling and normalize are for --task embed, not {task}")
    if task.pools and settings.auto_merge:
        raise SettingsError(f"auto_merge is for --task generate, not {task}: activate with mode merge instead")
    if settings.tensor_parallel > 1:
        check_settings(settings)


def _check_sources(settings: Settings, reserved: Collection[str]) -> None:
    """What is wrong with names and directories is said before the model loads. Raises SettingsError."""
    if settings.adapters_dir is not None and not settings.adapters_dir.is_dir():
        raise SettingsError(f"adapters_dir is {settings.adapters_dir}, which is not a directory")
    for adapter in settings.adapter:
        try:
            check_name(adapter.name, reserved)
            if "://" not in adapter.source and not Path(adapter.source).is_dir():
                raise ApiError("invalid_request", f"{adapter.source!r} is not a directory that the server can read")
        except (AdapterError, ApiError) as error:
            raise _refused(adapter, error) from error


def _refused(adapter: AdapterSource, error: AdapterError | ApiError) -> SettingsError:
    return SettingsError(f"the adapter {adapter.name!r} in {adapter.source} is refused ({error.code}): {error.message}")


def _pooled(base: LoadedBase) -> PooledServing | None:
    if base.pooled is None:
        return None
    encoder = PairTokenizer(base.tokenizer.underlying)
    pooled = base.pooled
    return PooledServing(encoder, pooled.labels, pooled.problem_type, pooled.normalize, pooled.width)


def register_all(registry: AdapterRegistry, settings: Settings) -> None:
    """Checks every adapter of the store, then registers those of the settings.

    Raises SettingsError for one of the settings that cannot be served; a stored one is only FAILED.
    """
    failed = registry.check_stored()
    log.info("checked the stored adapters", extra={"adapters": registry.store.count(SHARED), "failed": failed})
    for adapter in settings.adapter:
        try:
            _register(registry, adapter, settings)
        except (AdapterError, ApiError) as error:
            raise _refused(adapter, error) from error


def _register(registry: AdapterRegistry, adapter: AdapterSource, settings: Settings) -> None:
    """Registers one adapter, unless the name has a version with these files: a rollback outlives a restart."""
    with registry.store.staging() as staged:
        source = fetch_own_source(
            adapter.source,
            staged,
            max_bytes=settings.max_upload,
            timeout_s=settings.source_timeout_s,
            s3_endpoint=settings.store_endpoint,
        )
        digest = register_unless_known(registry, adapter.name, staged, source=source)
    status = registry.status(digest)
    if status.state is AdapterState.FAILED:
        raise SettingsError(f"the adapter {adapter.name!r} in {source} cannot be served here: {status.reason}")


def _watcher(registry: AdapterRegistry, settings: Settings) -> AdaptersDirectoryWatcher | None:
    """What watches --adapters-dir, once its adapters are registered."""
    if settings.adapters_dir is None:
        return None
    directory = AdaptersDirectory(registry, settings.adapters_dir, max_bytes=settings.max_upload)
    directory.scan()
    return AdaptersDirectoryWatcher(directory, settings.adapters_dir_interval_s)


def _resolver(registry: AdapterRegistry, settings: Settings) -> AdapterResolver | None:
    sources = [_name_source(source, settings) for source in settings.resolve]
    return AdapterResolver(registry, sources) if sources else None


def _name_source(source: Path | str, settings: Settings) -> NameSource:
    if isinstance(source, Path):
        return DirectorySource(source, settings.max_upload)
    return HubSource(HubTemplate.parse(source), settings.max_upload, settings.source_timeout_s)


def _load_base(settings: Settings, team: Team | None = None) -> LoadedBase:
    assert settings.model is not None
    log.info("loading the base model", extra={"model": settings.model})
    if settings.log_format == "json" or not draws(sys.stderr):
        transformers_logging.disable_progress_bar()  # and those of huggingface_hub
    base = load_base(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        quantization=settings.quantization,
        served_model_name=settings.served_model_name,
        aliases=settings.base_alias,
        pack_weights=settings.pack_weights,
        task=Task(settings.task),
        pooling=None if settings.pooling is None else Pooling(settings.pooling),
        normalize=settings.normalize,
        shard=None if team is None else team.shard,
    )
    if team is not None:
        try:
            team.join(base.device)
        except ShardsLost as error:
            raise BaseModelError(f"cannot load the base model in parts: {error}; the log says why") from error
    facts = {"model": base.id, "parameters": base.parameters, "dtype": str(base.dtype), "device": str(base.device)}
    facts |= {"quantization": base.quantization or "none", "weight_bytes": base.weight_bytes}
    log.info("loaded the base model", extra={**facts, "context": base.context, "fingerprint": base.fingerprint})
    return base


def _engine_options(settings: Settings) -> EngineOptions:
    return EngineOptions(
        pooled_tokens=settings.pooled_tokens,
        max_batch_size=settings.max_batch_size,
        max_queue=settings.max_queue,
        max_context=settings.max_context,
        kv_memory=settings.kv_memory,
        prefill_tokens=settings.prefill_tokens,
        prefix_cache=settings.prefix_cache,
        auto_merge=settings.auto_merge,
        graphs=GraphOptions(settings.decode_kernels, settings.decode_memory, settings.decode_graphs),
    )


def load_keys(path: Path) -> tuple[ApiKey, ...]:
    """The API keys of a file. Raises SettingsError."""
    try:
        return load_key_file(path)
    except KeyFileError as error:
        raise SettingsError(str(error)) from error


def _api_settings(settings: Settings, base: LoadedBase) -> ApiSettings:
    return ApiSettings(
        served_model_name=base.id,
        base_names=base.identity.names | {base.id},
        max_upload_bytes=settings.max_upload,
        upload_timeout_s=settings.upload_timeout_s,
        request_timeout_s=settings.request_timeout_s,
        default_max_tokens=settings.default_max_tokens,
        allow_source=tuple(source for source in settings.allow_source if isinstance(source, Path)),
        allow_hub=tuple(HubPattern.parse(source) for source in _urls(settings, HUB_SCHEME)),
        allow_buckets=tuple(BucketPattern.parse(source) for source in _urls(settings, S3_SCHEME)),
        s3_endpoint=settings.store_endpoint,
        source_timeout_s=settings.source_timeout_s,
        metrics_public=settings.metrics_public,
        cors_origins=settings.cors_origin,
        log_prompts=settings.log_prompts,
    )


def _urls(settings: Settings, scheme: str) -> list[str]:
    return [source for source in settings.allow_source if isinstance(source, str) and source.startswith(scheme)]


def _base_info(base: LoadedBase, kv_backend: str | None, shards: int) -> BaseInfo:
    return BaseInfo(
        id=base.id,
        model_type=base.model_type,
        parameters=base.parameters,
        weight_bytes=base.weight_bytes,
        quantization=base.quantization,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        fingerprint=base.fingerprint,
        modules=base.modules,
        created=base.created,
        kv_backend=kv_backend,
        eos_token_ids=base.eos_token_ids,
        shards=shards,
    )
