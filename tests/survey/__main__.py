"""Runs the survey: of every architecture into docs/architectures.md, or of those named, printed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import transformers

from tests.survey.configs import SURVEYED
from tests.survey.survey import Finding, survey

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

_INTRODUCTION = """\
# Architectures

Written by `python -m tests.survey`; do not edit by hand.

Which text decoders of transformers are served, found out with a tiny random model of each: it is loaded as a server
loads it, with its self-test; two VB-LoRA adapters that PEFT made for its linear layers (all of them but the output
layer, and every second) are registered; eight greedy requests of different lengths, of the base and of both, run in
one batch with chunked prompts and the prefix cache. *Works* means that every token is the one that transformers and
PEFT give for that text alone, without a cache, in float32 on a CPU. What the self-test finds wrong is refused when
the server starts, with the reason.

The key-value backend is what the self-test chose: `slot`, the fast one; `rows`, padded as `generate` pads, also for
windows that a text can outgrow; `solo`, one row at a time. Windows are 16 tokens here, which some texts outgrow: a
model whose window is no shorter than `--max-context` gets slots, if it is right otherwise. Experts that a model keeps
in one tensor are no linear layers, and cannot be targets. A tiny random model says that the computation is right, not
that a released checkpoint was tried.
"""


def render(findings: Sequence[Finding]) -> str:
    """The text of docs/architectures.md. On another machine, the line of versions alone may be otherwise."""
    works = [finding for finding in findings if finding.outcome == "works"]
    refused = [finding for finding in findings if finding.outcome == "refused"]
    wrong = [finding for finding in findings if finding.outcome not in ("works", "refused")]
    lines = [
        _INTRODUCTION,
        versions(),
        "",
        f"{len(works)} work, {len(refused)} are refused, {len(wrong)} are wrong.",
        "",
    ]
    lines += _table("## Works", ("architecture", "backend", "layers adapted"), works, lambda f: (f.kv, str(f.layers)))
    lines += _table("## Refused", ("architecture", "reason"), refused, lambda f: (f.detail,))
    if wrong:
        lines += _table("## Wrong", ("architecture", "what"), wrong, lambda f: (f.detail,))
    return "\n".join(lines).rstrip() + "\n"


def versions() -> str:
    named = ", ".join(f"{package} {version(package)}" for package in ("transformers", "peft", "torch"))
    return f"Versions: {named}."


def _table(
    title: str, head: Sequence[str], findings: Iterable[Finding], cells: Callable[[Finding], tuple[str, ...]]
) -> list[str]:
    rows = [" | ".join((f"`{finding.architecture}`", *cells(finding))) for finding in findings]
    return [title, "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *(f"| {row} |" for row in rows), ""]


def main(names: Sequence[str]) -> int:
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    findings = []
    for name in names or SURVEYED:
        findings.append(survey(name))
        print(name, findings[-1].outcome, findings[-1].kv, findings[-1].detail, flush=True)
    if not names:
        PAGE.write_text(render(findings), encoding="utf-8")
    return int(any(finding.outcome not in ("works", "refused") for finding in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
