"""What a measurement says to people: tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.commands.bench_figures import Figures, Latency, Results
from service.commands.output import say

_PLAIN_WIDTH = 120
_MOST_ADAPTERS = 20


def show_results(results: Results, title: str) -> None:
    """Counts and rates, latencies, and, if there are several, the adapters."""
    say(title)
    _show(_counts(results))
    _show(_latencies(results.total))
    if len(results.adapters) > 1:
        _show(_adapters(results))
    for code, count in results.total.by_code.items():
        message = results.messages[code]
        say(f"{count} × {code}" if message == code else f"{count} × {code}: {message}")


def _show(table: Table) -> None:
    """Without the spaces that rich fills lines with."""
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        say(line.rstrip())


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _counts(results: Results) -> Table:
    table = _table("requests", "")
    for name, value in _facts(results):
        table.add_row(name, value)
    return table


def _facts(results: Results) -> Iterator[tuple[str, str]]:
    total = results.total
    yield "answered", f"{total.ok:,}"
    yield "failed", f"{total.failed:,}"
    yield "refused (429)", f"{total.refused:,}"
    if total.retries:
        yield "retries after a refusal", f"{total.retries:,}"
    if results.unfinished:
        yield "under way when interrupted", f"{results.unfinished:,}"
    yield "duration", f"{results.duration_s:.2f} s"
    yield "requests a second", f"{results.per_second(total.ok):.2f}"
    yield "input tokens", f"{total.input_tokens:,}"
    yield "output tokens", f"{total.output_tokens:,}"
    yield "input tokens a second", f"{results.per_second(total.input_tokens):,.1f}"
    yield "output tokens a second", f"{results.per_second(total.output_tokens):,.1f}"


def _latencies(figures: Figures) -> Table:
    table = _table("latency, ms", "mean", "p50", "p95", "p99")
    for name, latency in (
        ("first token", figures.first_token_ms),
        ("inter-token", figures.inter_token_ms),
        ("end to end", figures.end_to_end_ms),
    ):
        table.add_row(name, *_milliseconds(latency))
    return table


def _milliseconds(latency: Latency) -> list[str]:
    return ["–" if each is None else f"{each:,.1f}" for each in (latency.mean, latency.p50, latency.p95, latency.p99)]


def _adapters(results: Results) -> Table:
    """Those asked for most; the JSON has all."""
    table = _table("adapter", "answered", "failed", "refused", "tokens out", "first token p50", "p99", "end p50", "p99")
    most = sorted(results.adapters.items(), key=lambda item: -(item[1].ok + item[1].failed + item[1].refused))
    for name, figures in most[:_MOST_ADAPTERS]:
        _, first_p50, _, first_p99 = _milliseconds(figures.first_token_ms)
        _, end_p50, _, end_p99 = _milliseconds(figures.end_to_end_ms)
        counts = (figures.ok, figures.failed, figures.refused, figures.output_tokens)
        cells = *(f"{count:,}" for count in counts), first_p50, first_p99, end_p50, end_p99
        table.add_row(Text(name), *cells)
    if len(most) > _MOST_ADAPTERS:
        table.add_row(f"… {len(most) - _MOST_ADAPTERS:,} more", *[""] * 8)
    return table
