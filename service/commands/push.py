"""`vblora-serve push DIR… --url URL`: uploads many adapters to a server, and only those that it does not have."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from adapters.config import CONFIG_FILE
from adapters.errors import AdapterError
from adapters.store import digest_of_files
from service.api.adapter_files import FILE_PARTS, REQUIRED_FILES
from service.commands import CommandError
from service.commands.output import say, show_columns, show_json
from service.commands.progress import counting
from service.commands.push_client import AdapterClient, ApiRefusal


class PushStatus(StrEnum):
    UPLOADED = "uploaded"
    UNCHANGED = "unchanged"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What to send where. `name` renames a single adapter; others are called as their directories."""

    directories: tuple[Path, ...]
    url: str
    name: str | None
    replace: bool
    parallel: int
    api_key: str | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one adapter: the server's digest of it, or the reason why it has none."""

    name: str
    directory: str
    status: PushStatus
    digest: str | None = None
    reason: str | None = None


def run(options: PushOptions) -> int:
    """Sends what is missing and says what became of each; 1 if any failed. Raises CommandError."""
    adapters = named_directories(options.directories, options.name)
    client = AdapterClient(options.url, options.api_key)
    try:
        client.check()
        outcomes = push_all(
            adapters, lambda name, path: push(client, name, path, replace=options.replace), options.parallel
        )
    finally:
        client.close()
    _report(outcomes, as_json=options.as_json)
    return 1 if any(outcome.status is PushStatus.FAILED for outcome in outcomes) else 0


def named_directories(directories: Iterable[Path], name: str | None) -> dict[str, Path]:
    """The adapters in directories that are one or hold some, by name. Raises CommandError for what is none."""
    found = [path for directory in directories for path in _adapters_in(directory)]
    if name is not None:
        if len(found) != 1:
            raise CommandError(f"--name is for one adapter, and there are {len(found)}: name their directories instead")
        return {name: found[0]}
    named: dict[str, Path] = {}
    for path in found:
        called = os.path.basename(os.path.abspath(path))  # `.` has a name too, and a link its own
        if called in named:
            raise CommandError(f"{named[called]} and {path} are both called {called!r}: rename one directory")
        named[called] = path
    return named


def _adapters_in(directory: Path) -> list[Path]:
    if (directory / CONFIG_FILE).is_file():
        return [directory]
    if not directory.is_dir():
        raise CommandError(f"{directory} is not a directory; give an adapter's, or one that holds some")
    found = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    if not found:
        raise CommandError(
            f"{directory} holds no {CONFIG_FILE}, nor does any directory in it; give an adapter's directory"
        )
    return found


def push_all(adapters: dict[str, Path], push_one: Callable[[str, Path], Outcome], parallel: int) -> list[Outcome]:
    """Pushes several at a time, with a bar on a terminal; the outcomes in the adapters' order."""
    outcomes: dict[str, Outcome] = {}
    pool = ThreadPoolExecutor(parallel, "vblora-push")
    try:
        with counting("Pushing", len(adapters)) as advance:
            for done in as_completed([pool.submit(push_one, name, path) for name, path in adapters.items()]):
                outcome = done.result()
                outcomes[outcome.name] = outcome
                advance(1)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: those that have not begun never do
    return [outcomes[name] for name in adapters]


def push(client: AdapterClient, name: str, directory: Path, *, replace: bool) -> Outcome:
    """Uploads one adapter unless the server has these very files under its name."""
    try:
        parts = _parts(directory)
        digest = digest_of_files({FILE_PARTS[part]: path for part, path in parts.items()})
        status = _push(client, name, parts, digest, replace=replace)
    except (CommandError, AdapterError, OSError) as error:
        return Outcome(name, str(directory), PushStatus.FAILED, reason=str(error))
    return Outcome(name, str(directory), status, digest)


def _parts(directory: Path) -> dict[str, Path]:
    """The files that there are, by the parts of the form; links, as in the Hub's cache, are followed."""
    parts = {part: (directory / file).resolve() for part, file in FILE_PARTS.items() if (directory / file).is_file()}
    for part, file in FILE_PARTS.items():
        if file in REQUIRED_FILES and part not in parts:
            raise CommandError(f"{directory} has no {file}")
    return parts


def _push(client: AdapterClient, name: str, parts: dict[str, Path], digest: str, *, replace: bool) -> PushStatus:
    there = client.digest(name)
    if there == digest:
        return PushStatus.UNCHANGED
    if there is not None and not replace:
        raise CommandError(f"the server has other files under this name ({there}); replace them with --replace")
    try:
        stored = client.upload(name, parts, replace=replace)
    except ApiRefusal as error:
        # An upload whose answer was lost has happened: tried again, it meets itself.
        if error.code != "adapter_exists" or client.digest(name) != digest:
            raise
        return PushStatus.UPLOADED
    if stored != digest:
        raise CommandError(f"the files changed while they were sent: the server stored {stored}, not {digest}")
    return PushStatus.UPLOADED


def _report(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    counts = Counter(outcome.status for outcome in outcomes)
    if as_json:
        summary = {str(status): counts[status] for status in PushStatus}
        show_json({"adapters": [asdict(outcome) for outcome in outcomes], **summary})
        return
    show_columns([(outcome.status, outcome.name, outcome.digest or outcome.reason or "") for outcome in outcomes])
    total = f"{len(outcomes)} adapter{'s' if len(outcomes) != 1 else ''}"
    say(f"{total}: " + ", ".join(f"{counts[status]} {status}" for status in PushStatus if counts[status]))
