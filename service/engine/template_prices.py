"""What the parts of a chat template cost, and what of Python's they may call.

All is paid for from the meter of the render that runs. Raises TemplateLimit for what may not be had at any price.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import wraps
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.environment import Environment
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext

from service.engine.template_meter import CHARACTERS_A_UNIT, TemplateLimit, meter

_MAX_BITS = 16_384  # of whole numbers: more than JSON may bring
_MAX_INDENT = 64
_MAX_PRECISION = 20

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        {
            *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii"),
            *(
                "isdecimal",
                "isdigit",
                "islower",
                "isnumeric",
                "isspace",
                "istitle",
                "isupper",
                "join",
                "lower",
                "lstrip",
            ),
            *("partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"),
            *("rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
        }
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
_BUILTIN = (types.BuiltinMethodType, types.MethodWrapperType, types.MethodDescriptorType)


def once(value: Any) -> Any:
    """The value, paid for by its own size."""
    meter().take(value)
    return value


def whole(value: Any) -> Any:
    """The value, paid for with all that is in it."""
    meter().take_whole(value)
    return value


def compared(value: Any) -> Any:
    """The value as it can be gone through, paid for with all that is in it."""
    return whole(_realised(value))


def _realised(value: Any) -> Any:
    """What is taken only once, as a list: it can be paid for before it is used."""
    return list(value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value


def metered(name: str, function: Callable[..., Any], cheap: bool) -> Callable[..., Any]:
    """A filter or a test that is paid for. Its arguments may begin with what Jinja passes on request."""
    prepare = _PREPARED.get(name)

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        passed, given = args[: _passed(args)], args[_passed(args) :]
        if not cheap:
            given = tuple(compared(value) for value in given)
            kwargs = {key: compared(value) for key, value in kwargs.items()}
        if prepare is not None:
            given, kwargs = prepare(*given, **kwargs), {}
        result = function(*passed, *given, **kwargs)
        return meter().each(result) if isinstance(result, types.GeneratorType) else checked(result)

    return paid


def _passed(args: tuple[Any, ...]) -> int:
    return int(bool(args) and isinstance(args[0], Context | Environment | EvalContext))


def checked(result: Any) -> Any:
    """A result, paid for; no number is larger than its neighbours may be."""
    if isinstance(result, int) and result.bit_length() > _MAX_BITS:
        raise TemplateLimit(f"a number has more than {_MAX_BITS:,} bits")
    meter().take(result)
    return result


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Pays for an operation before it is done. Raises TemplateRuntimeError for one that is not offered."""
    pair = (left, right)
    match operator:
        case "*":
            for sequence, times in (pair, pair[::-1]):
                if isinstance(times, int) and isinstance(sequence, str):
                    meter().spend(max(0, times) * len(sequence) // CHARACTERS_A_UNIT)
                elif isinstance(times, int) and isinstance(sequence, list | tuple):
                    meter().spend(max(0, times) * len(sequence))
        case "**" if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _MAX_BITS:
                raise TemplateLimit(f"a power has more than {_MAX_BITS:,} bits")
        case "%" if isinstance(left, str):
            raise TemplateRuntimeError("formatting with % is not offered: join texts with ~")
        case _:
            for value in pair:
                meter().take(value)


def pay_for_call(called: Any, args: tuple[Any, ...]) -> None:
    """Raises TemplateRuntimeError if it may not be called. The arguments are paid for already."""
    owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
    kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
    if kind is not None and name in _METHODS[kind]:
        if isinstance(owner, str):
            _pay_for_method(owner, name, args)
        elif name in ("count", "index"):
            meter().take_whole(owner)
    elif kind is not None or isinstance(called, _BUILTIN):
        raise TemplateRuntimeError(f"{type(owner).__name__}.{name} is not offered")


def _pay_for_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    _pay_for_search(text, args)
    match name, args:
        case "join", (Sized() as items,):
            meter().spend(len(items) * len(text) // CHARACTERS_A_UNIT)
        case "replace", (old, new, *_):
            _pay_for_replacing(text, str(old), str(new))


def _pay_for_search(text: str, patterns: Iterable[Any]) -> None:
    """Some searches go through the text for each character of what they look for; most do not."""
    longest = max((len(each) for each in patterns if isinstance(each, str)), default=0)
    meter().spend(1 + len(text) * (1 + longest // 64) // CHARACTERS_A_UNIT)


def _pay_for_replacing(text: str, old: str, new: str) -> None:
    found = text.count(old)
    meter().spend(found * len(new) // CHARACTERS_A_UNIT)


def _prepare_join(value: Any, d: Any = "", attribute: Any = None) -> tuple[Any, ...]:
    if isinstance(value, Sized):
        meter().spend(len(value) * len(str(d)) // CHARACTERS_A_UNIT)
    return value, d, attribute


def _prepare_replace(value: Any, old: Any, new: Any, count: Any = None) -> tuple[Any, ...]:
    text, old, new = str(value), str(old), str(new)
    _pay_for_search(text, (old,))
    _pay_for_replacing(text, old, new)
    return value, old, new, count


def _prepare_trim(value: Any, chars: Any = None) -> tuple[Any, ...]:
    _pay_for_search(str(value), (chars,))
    return value, chars


def _prepare_indent(value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> tuple[Any, ...]:
    check_indent(width)
    meter().spend(str(value).count("\n") * _MAX_INDENT // CHARACTERS_A_UNIT)
    return value, width, first, blank


def _prepare_round(value: Any, precision: Any = 0, method: Any = "common") -> tuple[Any, ...]:
    if isinstance(precision, int) and abs(precision) > _MAX_PRECISION:
        raise TemplateLimit(f"a number is rounded to {_MAX_PRECISION} digits at most")
    return value, precision, method


def check_indent(width: Any) -> None:
    """Raises TemplateLimit."""
    if (isinstance(width, int) and width > _MAX_INDENT) or (isinstance(width, str) and len(width) > _MAX_INDENT):
        raise TemplateLimit(f"an indentation has {_MAX_INDENT} characters at most")


_PREPARED: dict[str, Callable[..., tuple[Any, ...]]] = {
    "join": _prepare_join,
    "replace": _prepare_replace,
    "trim": _prepare_trim,
    "indent": _prepare_indent,
    "round": _prepare_round,
}
