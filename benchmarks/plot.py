"""Line plots as SVG, without a library, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 640, 400, 60
_COLOURS = ("#1b6ac9", "#c9491b", "#3a8f3a", "#7a3a9f", "#6b6b6b")

Point = tuple[float, float]


def first_token_plot(open_loop: Mapping[str, Any]) -> str:
    """The median first token of every contender at every rate, and what the machine cannot go below."""
    lines: dict[str, list[Point]] = {}
    for rate, figures in open_loop.items():
        for name, latencies in figures["contenders"].items():
            lines.setdefault(name, []).append((float(rate), latencies["first_token_p50_ms"]))
        lines.setdefault("floor", []).append((float(rate), figures["floor"]["rows_1"]["first_token_ms"]))
    return line_plot(lines, "requests a second, offered", "first token, median, ms")


def memory_plot(memory: Mapping[str, Any]) -> str:
    """Each process's memory against the number of adapters, and the weights and files alone."""
    lines = {
        name: [(float(count), nbytes / 1e6) for count, nbytes in memory[key].items()]
        for name, key in (("server", "server_bytes"), ("peft", "peft_bytes"), ("floor", "floor_bytes"))
    }
    return line_plot(lines, "adapters registered", "memory of the process, MB")


def line_plot(lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_at, y_at = _Axis(xs, _MARGIN, _WIDTH - _MARGIN), _Axis(ys, _HEIGHT - _MARGIN, _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for x in sorted(set(xs)):
        parts.append(_text(x_at(x), _HEIGHT - _MARGIN + 18, f"{x:g}", "middle"))
    for y in _decades(ys):
        parts.append(f'<path d="M{_MARGIN} {y_at(y):.1f}H{_WIDTH - _MARGIN}" stroke="#ddd"/>')
        parts.append(_text(_MARGIN - 6, y_at(y) + 4, f"{y:g}", "end"))
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        column, row = divmod(number, 3)  # above the lines
        parts.append(_text(_MARGIN + 10 + 130 * column, _MARGIN - 36 + 14 * row, name, "start", colour))
    parts.append(_text(_WIDTH / 2, _HEIGHT - 16, x_label, "middle"))
    parts.append(_text(_WIDTH - _MARGIN, _MARGIN - 36, y_label, "end"))
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """Places values between two ends by their logarithms."""

    def __init__(self, values: Iterable[float], start: float, end: float) -> None:
        logs = [math.log(value) for value in values]
        self._least, self._span = min(logs), (max(logs) - min(logs)) or 1.0
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        return self._start + self._length * (math.log(value) - self._least) / self._span


def _decades(values: Sequence[float]) -> list[float]:
    lowest, highest = math.ceil(math.log10(min(values))), math.floor(math.log10(max(values)))
    return [10.0**power for power in range(lowest, highest + 1)]


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
