"""Shared stores of tests: in a directory, and in a bucket of a server that speaks S3 on this machine."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from adapters.store.shared import SharedAdapterStore, open_objects
from adapters.store.shared.objects import Content, ObjectInfo, ObjectStore

BUCKET = "adapters-of-tests"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
CACHE = 1 << 30
PATIENCE_S = 20.0


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with an empty bucket."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    answer, writing = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def atomic(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """S3 looks at a put's condition and writes in one; moto lets another writer in between the two."""
        with writing if environ["REQUEST_METHOD"] != "GET" else nullcontext():
            return answer(environ, start_response)

    server = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"))
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shared(objects: ObjectStore, data_dir: Path, **options: object) -> SharedAdapterStore:
    """A store that refreshes itself once a minute, so that tests say when."""
    values = {"cache_bytes": CACHE, "refresh_s": 60.0, **options}
    return SharedAdapterStore(objects, data_dir, **values)  # type: ignore[arg-type]


def until(condition: Callable[[], bool], *, within_s: float = PATIENCE_S) -> float:
    """Waits for what another thread or process does; the seconds that took. Fails when the time is over."""
    began, waiting = time.monotonic(), threading.Event()
    while not condition():
        assert time.monotonic() - began < within_s, "it has not come"
        waiting.wait(0.01)
    return time.monotonic() - began


class Faulty:
    """Objects that do what `before` and `after` each call say: raise, wait, change something elsewhere."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda call, key: None
        self.after: Callable[[str, str], None] = lambda call, key: None

    @property
    def url(self) -> str:
        return self.objects.url

    @contextmanager
    def _around(self, call: str, key: str) -> Iterator[None]:
        self.calls.append((call, key))
        self.before(call, key)
        yield
        self.after(call, key)

    def get(self, key: str, *, unless: str | None = None) -> Content | None:
        with self._around("get", key):
            return self.objects.get(key, unless=unless)

    def put(self, key: str, data: bytes, *, over: str | None) -> str:
        with self._around("put", key):
            return self.objects.put(key, data, over=over)

    def put_file(self, key: str, path: Path) -> None:
        with self._around("put_file", key):
            self.objects.put_file(key, path)

    def get_file(self, key: str, path: Path, size: int) -> None:
        with self._around("get_file", key):
            self.objects.get_file(key, path, size)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._around("list", prefix):
            return iter(list(self.objects.list(prefix)))

    def delete(self, key: str) -> None:
        with self._around("delete", key):
            self.objects.delete(key)


def objects_of(kind: str, tmp_path: Path, endpoint: Callable[[], str]) -> ObjectStore:
    if kind == "file":
        return open_objects(f"file://{tmp_path}/objects")
    return open_objects(f"s3://{BUCKET}/{tmp_path.name.lower()}", endpoint())
