"""`vblora-serve serve --replicas N`: a Ray of this process's own, on this machine alone, and replicas on it."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

# Read when Ray is imported. Whoever else is on this machine is to have no part in this one's Ray, which has its ports
# on the loopback interface alone where it is told that there are no clusters.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from service.api.keys import KeyRing
from service.assembly import load_keys, open_store
from service.cluster.ingress import Ingress
from service.cluster.log_lines import LogLines
from service.cluster.metrics import IngressMetrics
from service.cluster.replicas import RayReplicas
from service.cluster.resources import resources_of
from service.commands import CommandError
from service.ray_app import engines
from service.settings import Settings

log = logging.getLogger(__name__)

APPLICATION = "vblora"
_OBJECTS_BYTES = 256 << 20  # beside one upload
_ATTEMPTS_TO_START = 2
_END_S = 15.0


class Replicated:
    """The replicas, ready, and the ingress before them, in this process. `with` ends them all."""

    ingress: Ingress

    def __init__(self, settings: Settings) -> None:
        self.keys = KeyRing(load_keys(settings.api_key_file) if settings.api_key_file else ())
        store = settings.store or f"file://{settings.data_dir.absolute()}/objects"
        self._resources = resources_of(settings)
        threads = settings.threads or max(1, self._resources["num_cpus"] // settings.tensor_parallel)
        self._settings = replace(settings, store=store, threads=threads)
        self._opened = ExitStack()

    def __enter__(self) -> Replicated:
        with self._opened:
            self._lines = self._opened.enter_context(LogLines())
            private = Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="vblora-ray-")))
            self._start_ray(private / "ray")
            self._opened.callback(ray.shutdown)
            self._opened.callback(_end_replicas)
            replicas = RayReplicas(self._start_replicas())
            facts = asyncio.run(replicas.facts())
            self.base = facts.base
            self.store = open_store(self._settings, reserved=facts.settings.base_names)
            self._opened.callback(self.store.close)
            self.ingress = Ingress(replicas, self.store, self.keys, facts.settings, IngressMetrics())
            self._opened = self._opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def _start_ray(self, directory: Path) -> None:
        """Ray opens its directory to everybody on the machine, sockets and all; the one that holds it is not."""
        each = self._resources
        ray.init(
            address="local",
            _temp_dir=str(directory),
            num_cpus=each["num_cpus"] * self._settings.replicas + 1,
            num_gpus=each["num_gpus"] * self._settings.replicas,
            object_store_memory=_OBJECTS_BYTES + self._settings.max_upload,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )

    def _start_replicas(self) -> Any:
        _take_log_lines("ray", "ray.serve")
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        application = engines(
            self._settings,
            log_lines=self._lines.path,
            num_replicas=self._settings.replicas,
            ray_actor_options=self._resources,
            max_constructor_retry_count=_ATTEMPTS_TO_START,
            logging_config=quiet,
        )
        try:
            return serve.run(application, name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            raise CommandError(f"the replicas cannot be started: {error}") from error


def _take_log_lines(*names: str) -> None:
    """Loggers of Ray's, which write to stderr as they like, write as all others do."""
    for logger in map(logging.getLogger, names):
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()
        logger.propagate = True


def _end_replicas() -> None:
    """Their requests have ended, or had their time. A Ray that does not answer must not keep this process."""
    ending = threading.Thread(target=serve.shutdown, name="serve-shutdown", daemon=True)
    ending.start()
    ending.join(_END_S)
    if ending.is_alive():
        log.warning("the replicas did not end within %g seconds: killing them", _END_S)
