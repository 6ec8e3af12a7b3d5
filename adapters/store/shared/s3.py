"""An S3 bucket, or what speaks as one does, by way of obstore: conditional puts, bounded time, retries with jitter.

Credentials come from where Amazon's tools find them: the variables AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, a web identity, the instance's role.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from adapters.errors import StoreError, StoreUnavailable
from adapters.store.shared.objects import AccessRefused, Conflict, Content, ObjectInfo, ObjectMissing

SCHEME = "s3://"
REQUEST_TIMEOUT_S = 10.0
FILE_TIMEOUT_S = 120.0  # of one request for a file, or a part of one
_CONNECT_TIMEOUT_S = 3.0
_RETRIES = 2
_CHUNK = 1 << 20


class S3Objects:
    """The objects of a bucket whose keys begin with a prefix."""

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
        file_timeout_s: float = FILE_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`url` is s3://bucket/prefix. Asks for nothing yet. Raises StoreError if obstore is not installed."""
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import S3Store
        except ImportError as error:
            raise StoreError(f"{url} needs obstore: pip install 'vblora-serve[shared]'") from error
        self.url = url.rstrip("/")
        self._obstore: Any = obstore
        self._exceptions: Any = exceptions
        self._clock = clock
        bucket, _, prefix = self.url.removeprefix(SCHEME).partition("/")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options: dict[str, Any] = {} if endpoint is None else {"endpoint": endpoint}
        if endpoint is not None or "." in bucket:  # a certificate covers one label before the host
            options["virtual_hosted_style_request"] = False
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            options["region"] = "us-east-1"
        plain = endpoint is not None and endpoint.startswith("http://")
        self._store, self._files = (
            S3Store(
                bucket,
                prefix=prefix or None,
                client_options={
                    "timeout": timedelta(seconds=seconds),
                    "connect_timeout": timedelta(seconds=min(seconds, _CONNECT_TIMEOUT_S)),
                    "allow_http": plain,
                },
                retry_config=_retrying_for(seconds),
                **options,
            )
            for seconds in (timeout_s, file_timeout_s)
        )

    def get(self, key: str, *, unless: str | None = None) -> Content | None:
        try:
            with self._errors(key):
                result = self._obstore.get(self._store, key, options={"if_none_match": unless} if unless else None)
                return Content(bytes(result.bytes()), _etag(result.meta))
        except self._exceptions.NotModifiedError:
            return None

    def put(self, key: str, data: bytes, *, over: str | None) -> str:
        mode: Any = "create" if over is None else {"e_tag": over}
        try:
            with self._errors(key):
                return _etag(self._obstore.put(self._store, key, data, mode=mode, use_multipart=False))
        except (self._exceptions.AlreadyExistsError, self._exceptions.PreconditionError) as error:
            raise Conflict(key) from error

    def put_file(self, key: str, path: Path) -> None:
        with self._errors(key):
            self._obstore.put(self._files, key, path, mode="overwrite")

    def get_file(self, key: str, path: Path, size: int, *, timeout_s: float | None = None) -> None:
        """Raises TimeoutError, too, when `timeout_s` is given and over."""
        end = None if timeout_s is None else self._clock() + timeout_s
        received = 0
        with self._errors(key), open(path, "xb") as file:
            for chunk in self._obstore.get(self._files, key).stream(min_chunk_size=_CHUNK):
                received += len(chunk)
                if received > size:
                    break
                file.write(chunk)
                if end is not None and self._clock() >= end:
                    raise TimeoutError
        if received != size:
            raise StoreError(f"{key} in {self.url} is not of the {size:,} bytes that were announced", subject=key)

    def size(self, key: str) -> int:
        """An object's bytes. Raises ObjectMissing."""
        with self._errors(key):
            return int(self._obstore.head(self._store, key)["size"])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            for batch in self._obstore.list(self._store, prefix=prefix or None):
                for meta in batch:
                    yield ObjectInfo(meta["path"], _etag(meta), meta["size"], meta["last_modified"].timestamp())

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._obstore.delete(self._store, key)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Inside, what the client raises becomes ours; what tells of a condition stays as it is."""
        known = self._exceptions
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._no_bucket() from error
            raise ObjectMissing(key) from error
        except (known.AlreadyExistsError, known.NotModifiedError):
            raise
        except known.PreconditionError as error:
            if "NoSuchBucket" in str(error):
                raise self._no_bucket() from error
            raise
        except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
            raise self._refused() from error
        except known.BaseError as error:
            raise self._translated(str(error)) from error

    def _translated(self, told: str) -> StoreError:
        if "NoSuchBucket" in told:
            return self._no_bucket()
        if "403 Forbidden" in told or "401 Unauthorized" in told or "InvalidAccessKeyId" in told:
            return self._refused()
        return StoreUnavailable(f"the shared store {self.url} does not answer ({_first_line(told)}); try again")

    def _no_bucket(self) -> StoreError:
        return StoreError(f"{self.url}: there is no such bucket; create it, or correct --store or --store-endpoint")

    def _refused(self) -> StoreError:
        return AccessRefused(
            f"{self.url} refuses the server's credentials: give it AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a "
            "role) that may list, read, write and delete there"
        )


def _retrying_for(seconds: float) -> dict[str, Any]:
    """With pauses that the client makes differ."""
    pauses = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2}
    return {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=seconds), "backoff": pauses}


def _etag(meta: Any) -> str:
    etag = meta["e_tag"]
    if not etag:
        raise StoreError("the object storage gives no ETags, without which no change of it is safe: use another one")
    return str(etag)


def _first_line(told: str) -> str:
    """Without the client's own account of its insides, and without addresses' queries."""
    return told.split("\n", 1)[0].split("?", 1)[0][:200].strip()
