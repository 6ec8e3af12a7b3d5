"""What rendering a template may cost, counted in units of some 50 ns: steps taken and data gone through.

Counted, not timed: the same template over the same messages always costs the same.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sized, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.utils import Namespace

MAX_UNITS = 2_000_000
MAX_DEPTH = 100  # of containers in containers: hashing a tuple recurses on C's stack
CHARACTERS_A_UNIT = 32
_BITS_A_UNIT = 256
_VISIT = 5  # units: what take_whole takes for a value itself


class TemplateLimit(TemplateRuntimeError):
    """A template asks for more than one may."""


class Meter:
    def __init__(self, units: int = MAX_UNITS) -> None:
        self._units = self._left = units

    def spend(self, units: int) -> None:
        self._left -= units
        if self._left < 0:
            raise TemplateLimit(f"it takes more than {self._units:,} steps: loop less, and build shorter texts")

    def take(self, value: Any) -> None:
        """Pays for a pass over a text or over a container's own items."""
        if isinstance(value, str | bytes):
            self.spend(1 + len(value) // CHARACTERS_A_UNIT)
        elif isinstance(value, int):
            self.spend(1 + value.bit_length() // _BITS_A_UNIT)
        else:
            self.spend(1 + (len(value) if isinstance(value, Sized) else 0))

    def take_whole(self, value: Any) -> None:
        """Pays for a pass over all that a value holds, as printing, comparing and hashing do: what it holds twice
        counts twice.
        """
        rest = [(value, 0)]
        while rest:
            value, depth = rest.pop()
            self.spend(_VISIT)
            self.take(value)
            if depth > MAX_DEPTH:
                raise TemplateLimit(f"values are nested deeper than {MAX_DEPTH}")
            rest += ((item, depth + 1) for item in _items(value))

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each paid for as it is taken."""
        for item in items:
            self.spend(1)
            yield item


def _items(value: Any) -> Iterator[Any]:
    match value:
        case Mapping():
            for key, item in value.items():
                yield key
                yield item
        case list() | tuple():
            yield from value
        case KeysView() | ValuesView() | ItemsView():
            yield from value
        case Namespace():
            yield value._Namespace__attrs


_METER: ContextVar[Meter] = ContextVar("meter")


def meter() -> Meter:
    """That of what is being rendered here."""
    return _METER.get()


@contextmanager
def metered(units: int = MAX_UNITS) -> Iterator[None]:
    token = _METER.set(Meter(units))
    try:
        yield
    finally:
        _METER.reset(token)
