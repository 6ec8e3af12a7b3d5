"""An adapter that a request or a setting names by its source.

A directory of the server, a repository of the Hub, or a place in a bucket.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from adapters.store.shared.s3 import SCHEME as S3_SCHEME
from service.api.bucket_ids import BucketSource
from service.api.buckets import fetch_from_bucket
from service.api.deps import ApiSettings, ServerState
from service.api.directories import copy_directory
from service.api.errors import ApiError
from service.api.hub import fetch_from_hub
from service.api.hub_ids import SCHEME, HubRepo
from service.api.source_errors import bad_source

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def fetch_source(source: str, staged: Path, state: ServerState) -> str:
    """Stages the adapter that a client names, where the operator allows it; where it came from, commit included.

    Links to a directory are resolved before it is asked whether it lies in an allowed one; links among its files are
    not followed. What the store keeps is never allowed. Blocks on the disk or the network. Raises ApiError: `forbidden`
    outside of what is allowed, else as `copy_directory`, `fetch_from_hub` and
    `fetch_from_bucket` say.
    """
    settings = state.settings
    if source.startswith(SCHEME):
        repo = _allowed_repo(source, settings)
        return str(
            fetch_from_hub(repo, staged, max_bytes=settings.max_upload_bytes, timeout_s=settings.source_timeout_s)
        )
    if source.startswith(S3_SCHEME):
        place = _allowed_place(source, state)
        return str(
            _from_bucket(place, staged, settings.s3_endpoint, settings.max_upload_bytes, settings.source_timeout_s)
        )
    directory = _allowed_directory(source, settings.allow_source, state.store.directories)
    copy_directory(directory, staged, max_bytes=settings.max_upload_bytes)
    return str(directory)


def fetch_own_source(
    source: str, staged: Path, *, max_bytes: int, timeout_s: float, s3_endpoint: str | None = None
) -> str:
    """Stages the adapter that the operator names: nobody need allow it, and links are followed.

    A directory may be of any size; `max_bytes` bounds what is downloaded. Raises ApiError.
    """
    if source.startswith(SCHEME):
        return str(fetch_from_hub(_repo(source), staged, max_bytes=max_bytes, timeout_s=timeout_s))
    if source.startswith(S3_SCHEME):
        return str(_from_bucket(_place(source), staged, s3_endpoint, max_bytes, timeout_s))
    directory = Path(source).expanduser()
    copy_directory(directory, staged, max_bytes=sys.maxsize, follow_links=True)
    return str(directory)


def _allowed_repo(source: str, settings: ApiSettings) -> HubRepo:
    repo = _repo(source)
    if any(pattern.covers(repo) for pattern in settings.allow_hub):
        return repo
    raise _forbidden(source, f"start it with --allow-source {SCHEME}{repo.org}/*")


def _repo(source: str) -> HubRepo:
    try:
        return HubRepo.parse(source)
    except ValueError as error:
        raise bad_source(str(error)) from error


def _from_bucket(
    place: BucketSource, staged: Path, endpoint: str | None, max_bytes: int, timeout_s: float
) -> BucketSource:
    return fetch_from_bucket(place, staged, endpoint=endpoint, max_bytes=max_bytes, timeout_s=timeout_s)


def _allowed_place(source: str, state: ServerState) -> BucketSource:
    """Never one in the shared store, whose files are other tenants', too."""
    place, store = _place(source), state.store.url
    if store is not None and place.is_within(store):
        raise _forbidden(source, "name a place outside of the server's own --store")
    if any(pattern.covers(place) for pattern in state.settings.allow_buckets):
        return place
    raise _forbidden(source, f"start it with --allow-source {S3_SCHEME}{place.bucket}/*")


def _place(source: str) -> BucketSource:
    try:
        return BucketSource.parse(source)
    except ValueError as error:
        raise bad_source(str(error)) from error


def _allowed_directory(source: str, allowed: Iterable[Path], private: Iterable[Path]) -> Path:
    if match := _URL.match(source):
        raise bad_source(
            f"sources at {match[0]} are not supported: give hf://org/repo or s3://bucket/prefix, or download the "
            "adapter and upload its files"
        )
    if "\0" in source or not os.path.isabs(source):
        raise bad_source(f"{source!r} is not an absolute path: give the adapter's directory on the server")
    directory = Path(os.path.realpath(source))
    if _is_within(directory, allowed) and not _is_within(directory, private):
        return directory
    raise _forbidden(source, "start it with --allow-source and a directory that holds them")


def _is_within(directory: Path, roots: Iterable[Path]) -> bool:
    return any(directory.is_relative_to(os.path.realpath(root)) for root in roots)


def _forbidden(source: str, otherwise: str) -> ApiError:
    message = f"the server may not read adapters from {source!r}: upload the files, or {otherwise}"
    return ApiError("forbidden", message, param="source")
