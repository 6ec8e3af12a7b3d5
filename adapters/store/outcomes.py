"""What every store answers in the same words."""

from __future__ import annotations

from adapters.errors import AdapterExists, AdapterNotFound, AdapterUnavailable, InvalidSelection
from adapters.store.names import is_name
from adapters.store.records import AdapterRecord

MODES = ("switch", "merge")


def check_mode(mode: str) -> None:
    """Raises InvalidSelection."""
    if mode not in MODES:
        raise InvalidSelection(f"mode is {mode[:80]!r}: it is one of {', '.join(MODES)}", subject="mode")


def check_page(limit: int, after: str | None) -> None:
    """Raises InvalidSelection for an `after` that cannot be a name."""
    if limit < 1:
        raise ValueError(f"limit is {limit}: a page has at least one adapter")
    if after and not is_name(after):
        raise InvalidSelection(f"{after[:140]!r} is no name to continue after", subject="after")


def check_keep(keep_versions: int) -> None:
    if keep_versions < 1:
        raise ValueError(f"keep_versions is {keep_versions}: at least the current version is kept")


def not_found(name: str) -> AdapterNotFound:
    what = f"no adapter is named {name[:140]!r}; list the adapters to see which there are"
    if ":" in name or "+" in name:
        what += ". A blend is a:0.7+b:0.3 without spaces in OpenAI's model, and a list in the field adapters"
    return AdapterNotFound(what, subject=name)


def files_gone(name: str, digest: str) -> AdapterUnavailable:
    return AdapterUnavailable(f"the files of {digest} are gone: publish this version of {name!r} again", subject=name)


def exists(existing: AdapterRecord, digest: str) -> AdapterExists:
    """For a publication of the files of `digest`."""
    if existing.digest == digest:
        return AdapterExists(
            f"adapter {existing.name!r} exists already, with these very files ({digest})", subject=existing.name
        )
    return AdapterExists(
        f"adapter {existing.name!r} exists already, with other files ({existing.digest}): "
        "replace it, delete it, or choose another name",
        subject=existing.name,
    )
