"""An adapter in a repository of the Hugging Face Hub, fetched file by file into a staging directory.

The revision is resolved to a commit first, and only the files that an adapter consists of are asked for, at that
commit, by our names for them: nothing in a repository decides what is written where. The client, its token, HF_ENDPOINT
and HF_HUB_OFFLINE are those of huggingface_hub. So is the way redirects are followed, the token staying with its host;
but unless HF_ENDPOINT itself is http, nothing but https is spoken on any hop.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from adapters.config import CONFIG_FILE
from service.api.adapter_files import ADAPTER_FILES, MAX_OPTIONAL_BYTES, OPTIONAL_FILES
from service.api.deadline import Deadline
from service.api.errors import ApiError
from service.api.hub_ids import HubRepo
from service.api.source_errors import SourceNotFound, bad_source, too_large

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_from_hub(
    repo: HubRepo, staged: Path, *, max_bytes: int, timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> HubRepo:
    """Downloads an adapter's files into `staged`, within `timeout_s` in all; the repository at the commit they are of.

    Sizes are known, and held against `max_bytes`, before a file is asked for. Blocks on the network and the disk.
    Raises SourceNotFound, or ApiError: `forbidden` for a gated repository, `payload_too_large`, `request_timeout`,
    `adapter_unavailable` if the Hub cannot be reached, else `invalid_request`.
    """
    deadline = Deadline(timeout_s, clock)
    _speak_https_only(get_session())
    with _hub_errors(repo, deadline):
        commit, sizes = _resolve(repo, deadline)
        resolved = replace(repo, revision=commit)
        log.info("resolved a revision", extra={"source": str(repo), "commit": commit})
        _check_sizes(resolved, sizes, max_bytes)
        for name, size in sizes.items():
            _download(resolved, name, size, staged / name, deadline)
    return resolved


class _NotEncrypted(HTTPError):  # type: ignore[misc]  # untyped, as all of the Hub's client is here
    """A request, or a redirect, to an address that is not https."""


def _refuse_plain(request: Any) -> None:
    if request.url.scheme != "https" and constants.ENDPOINT.startswith("https:"):
        raise _NotEncrypted(f"{request.url.scheme}://{request.url.host} is not https")


def _speak_https_only(session: Any) -> None:
    """Has the Hub's client look at every request, those that redirects lead to as well."""
    hooks = session.event_hooks
    if _refuse_plain not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _refuse_plain]}


def _resolve(repo: HubRepo, deadline: Deadline) -> tuple[str, dict[str, int]]:
    """The commit of the revision, and the sizes there of the adapter's files, in our order."""
    info = HfApi().model_info(repo.id, revision=repo.revision, files_metadata=True, timeout=deadline.remaining())
    if info.id != repo.id:
        raise SourceNotFound(f"there is no repository {repo.id!r} on the Hub any more: it is called {info.id!r} now")
    if not _COMMIT.fullmatch(info.sha or ""):
        raise _unavailable(f"the Hub names no commit for {repo}")
    listed = {file.rfilename: file.size for file in info.siblings or ()}
    sizes: dict[str, int] = {}
    for name in ADAPTER_FILES:
        if name in listed:
            if (size := listed[name]) is None:
                raise _unavailable(f"the Hub does not say how large {name} in {repo} is")
            sizes[name] = size
        elif name not in OPTIONAL_FILES:
            message = f"{repo} has no {name}: name a repository with a PEFT adapter"
            raise SourceNotFound(message) if name == CONFIG_FILE else bad_source(message)
    return str(info.sha), sizes


def _check_sizes(repo: HubRepo, sizes: Mapping[str, int], max_bytes: int) -> None:
    for name in OPTIONAL_FILES:
        if sizes.get(name, 0) > MAX_OPTIONAL_BYTES:
            raise too_large(f"{name} in {repo}", sizes[name], f"the {MAX_OPTIONAL_BYTES:,} that it may take")
    if sum(sizes.values()) > max_bytes:
        raise too_large(f"the adapter in {repo}", sum(sizes.values()), "--max-upload allows for an adapter")


def _download(repo: HubRepo, name: str, size: int, target: Path, deadline: Deadline) -> None:
    # Asked for as it is, and read undecoded: what is counted is what was announced.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    url = hf_hub_url(repo.id, name, revision=repo.revision)
    timeout = deadline.remaining()
    received = 0
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
        hf_raise_for_status(response)
        with open(target, "xb") as file:
            for chunk in response.iter_raw():
                received += len(chunk)
                if received > size:
                    raise _unavailable(f"the Hub sends more of {name} in {repo} than the {size:,} bytes it announced")
                file.write(chunk)
                deadline.remaining()
    if received != size:
        raise _unavailable(f"the Hub sent {received:,} bytes of {name} in {repo}, but had announced {size:,}")


@contextmanager
def _hub_errors(repo: HubRepo, deadline: Deadline) -> Iterator[None]:
    """Inside, what the client raises becomes an ApiError. A connection that fails when time is up has timed out."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise _unavailable(
            f"{repo} cannot be fetched: the server runs with HF_HUB_OFFLINE; upload the files instead"
        ) from error
    except GatedRepoError as error:
        raise ApiError(
            "forbidden",
            f"the Hub does not let this server read {repo}, which is gated: give the server the HF_TOKEN of an "
            "account that has been granted access",
            param="source",
        ) from error
    except RevisionNotFoundError as error:
        raise bad_source(f"{repo.id!r} has no revision {repo.revision!r} on the Hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceNotFound(
            f"there is no repository {repo.id!r} on the Hub, or it is private: correct the name, or give the server "
            "an HF_TOKEN that may read it"
        ) from error
    except ValueError as error:
        raise _unavailable(f"the Hub's answer for {repo} cannot be read; try again") from error
    except _NotEncrypted as error:
        raise _unavailable(f"the Hub leads away from https for {repo} ({error}), which is not followed") from error
    except (TimeoutError, HTTPError) as error:
        if isinstance(error, TimeoutError) or deadline.passed:
            raise ApiError(
                "request_timeout",
                f"{repo} did not arrive within {deadline.timeout_s:g} seconds (--source-timeout-s); try again",
                param="source",
            ) from error
        if isinstance(error, HfHubHTTPError):
            raise _unavailable(f"the Hub answers {error.response.status_code} for {repo}; try again") from error
        raise _unavailable(f"the Hub cannot be reached for {repo} ({type(error).__name__}); try again") from error


def _unavailable(message: str) -> ApiError:
    return ApiError("adapter_unavailable", message, param="source")
