"""`vblora-serve doctor --data-dir D [--repair]`: checks an adapter store that no server runs on, and mends it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from adapters.store.inventory import Finding
from adapters.store.repair import Report, examine, repair
from service.commands.output import say, show_columns, show_json
from service.commands.progress import working


def run(data_dir: Path, *, mend: bool, as_json: bool) -> int:
    """Prints a line for each finding and a summary; 1 if any remains.

    Raises StoreError if there is no store, if a server runs on it, or if the disk fails.
    """
    with working(f"Checking {data_dir}"):
        report = (repair if mend else examine)(data_dir)
    if as_json:
        _show_json(report)
    else:
        _show(report, mend=mend)
    return 1 if report.remaining else 0


def _show(report: Report, *, mend: bool) -> None:
    if report.found:
        show_columns([(_state(finding, report), *asdict(finding).values()) for finding in report.findings])
    say(
        f"{report.adapters:,} adapters, {report.versions:,} versions, {report.files:,} sets of files. "
        + _verdict(report)
    )
    if report.remaining and not mend:
        say("--repair mends what can be mended; what it takes out of service goes to quarantine/ there.")


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
