"""`vblora-serve doctor --data-dir D [--repair]`: checks an adapter store that no server runs on, and mends it.

With `--store URL` one that servers share, and may run on: checks it, and collects what nothing names any more.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from adapters.store.inventory import Finding
from adapters.store.repair import Report, examine, repair
from adapters.store.shared import garbage, open_objects
from service.commands.output import say, show_columns, show_json
from service.commands.progress import working


def run(data_dir: Path, *, mend: bool, as_json: bool) -> int:
    """Prints a line for each finding and a summary; 1 if any remains.

    Raises StoreError if there is no store, if a server runs on it, or if the disk fails.
    """
    with working(f"Checking {data_dir}"):
        report = (repair if mend else examine)(data_dir)
    hint = "--repair mends what can be mended; what it takes out of service goes to quarantine/ there."
    return _tell(report, None if mend else hint, as_json=as_json)


def run_shared(url: str, endpoint: str | None, *, grace_s: float, mend: bool, as_json: bool) -> int:
    """The same for a shared store. Raises StoreError if it does not answer."""
    look = partial(garbage.repair if mend else garbage.examine, open_objects(url, endpoint), grace_s=grace_s)
    with working(f"Checking {url}"):
        report = look()
    hint = "--repair removes files that no adapter has; adapters whose files are lost are to be uploaded again."
    return _tell(report, None if mend else hint, as_json=as_json)


def _tell(report: Report, hint: str | None, *, as_json: bool) -> int:
    if as_json:
        _show_json(report)
    else:
        _show(report, hint)
    return 1 if report.remaining else 0


def _show(report: Report, hint: str | None) -> None:
    if report.found:
        show_columns([(_state(finding, report), *asdict(finding).values()) for finding in report.findings])
    say(
        f"{report.adapters:,} adapters, {report.versions:,} versions, {report.files:,} sets of files. "
        + _verdict(report)
    )
    if report.remaining and hint is not None:
        say(hint)


def _verdict(report: Report) -> str:
    found, remaining = len(report.findings), len(report.remaining)
    if not found:
        return "Nothing is wrong."
    return f"{found} found, {found - remaining} repaired, {remaining} left."


def _show_json(report: Report) -> None:
    findings = [{**asdict(finding), "repaired": finding not in report.remaining} for finding in report.findings]
    counts = {"adapters": report.adapters, "versions": report.versions, "files": report.files}
    show_json({"healthy": not report.remaining, **counts, "findings": findings})


def _state(finding: Finding, report: Report) -> str:
    return "found" if finding in report.remaining else "repaired"
