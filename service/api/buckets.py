"""An adapter in a bucket that speaks S3, fetched file by file into a staging directory.

Only the files that an adapter consists of are asked for, by our names for them. Credentials are those of the server's
environment, as for `--store`; the address is `--store-endpoint`, AWS_ENDPOINT_URL or Amazon's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.config import CONFIG_FILE
from adapters.errors import StoreError, StoreUnavailable
from adapters.store.shared.objects import AccessRefused, ObjectMissing
from adapters.store.shared.s3 import S3Objects
from service.api.adapter_files import ADAPTER_FILES, MAX_OPTIONAL_BYTES, OPTIONAL_FILES
from service.api.bucket_ids import BucketSource
from service.api.deadline import Deadline
from service.api.errors import ApiError
from service.api.source_errors import SourceNotFound, bad_source, too_large


def fetch_from_bucket(
    source: BucketSource,
    staged: Path,
    *,
    endpoint: str | None,
    max_bytes: int,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> BucketSource:
    """Downloads an adapter's files into `staged`, within `timeout_s` in all.

    Sizes are known, and held against `max_bytes`, before a file is asked for. Blocks on the network and the disk.
    Raises SourceNotFound, or ApiError: `forbidden` if the storage refuses the server, `payload_too_large`,
    `request_timeout`, `adapter_unavailable` if the storage cannot be reached, else `invalid_request`.
    """
    deadline = Deadline(timeout_s, clock)

    def objects() -> S3Objects:
        left = deadline.remaining()
        return S3Objects(str(source), endpoint=endpoint, timeout_s=left, file_timeout_s=left, clock=clock)

    with _bucket_errors(source, deadline):
        sizes = {name: size for name in ADAPTER_FILES if (size := _size(objects(), name)) is not None}
        _check_files(source, sizes, max_bytes)
        for name, size in sizes.items():
            objects().get_file(name, staged / name, size, timeout_s=deadline.remaining())
    return source


def _size(objects: S3Objects, name: str) -> int | None:
    try:
        return objects.size(name)
    except ObjectMissing:
        return None


def _check_files(source: BucketSource, sizes: dict[str, int], max_bytes: int) -> None:
    for name in ADAPTER_FILES:
        if name not in sizes and name not in OPTIONAL_FILES:
            message = f"{source} has no {name}: name a bucket, and a place in it with a PEFT adapter"
            raise SourceNotFound(message) if name == CONFIG_FILE else bad_source(message)
    for name in OPTIONAL_FILES:
        if sizes.get(name, 0) > MAX_OPTIONAL_BYTES:
            raise too_large(f"{name} in {source}", sizes[name], f"the {MAX_OPTIONAL_BYTES:,} that it may take")
    if sum(sizes.values()) > max_bytes:
        raise too_large(f"the adapter in {source}", sum(sizes.values()), "--max-upload allows for an adapter")


@contextmanager
def _bucket_errors(source: BucketSource, deadline: Deadline) -> Iterator[None]:
    """Inside, what the client raises becomes an ApiError. A connection that fails when time is up has timed out."""
    try:
        yield
    except AccessRefused as error:
        raise ApiError(
            "forbidden",
            f"the storage does not let this server read {source}: give the server AWS credentials that may list and "
            "read there",
            param="source",
        ) from error
    except (TimeoutError, StoreUnavailable) as error:
        if isinstance(error, TimeoutError) or deadline.passed:
            raise ApiError(
                "request_timeout",
                f"{source} did not arrive within {deadline.timeout_s:g} seconds (--source-timeout-s); try again",
                param="source",
            ) from error
        raise _unavailable(f"the storage cannot be reached for {source}; try again") from error
    except ObjectMissing as error:
        raise _unavailable(f"{source} changed while it was fetched; try again") from error
    except StoreError as error:
        raise _unavailable(f"{source} cannot be fetched: {error.message}") from error


def _unavailable(message: str) -> ApiError:
    return ApiError("adapter_unavailable", message, param="source")
