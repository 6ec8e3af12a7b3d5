"""Jinja for chat templates that come with adapters: transformers' sandbox, and a bound on the work that they make.

transformers' sandbox keeps a template from what is not its own; here it is also kept from loops without end and values
without bound. Everything whose cost may grow is paid for from the render's Meter: the bodies of loops, macros and
blocks before each run, by their size; operators, filters, tests, methods and what is written, by the size of what they
go through. What could take much from little (widths and formats, repetitions, powers) is checked before it is done, or
is not offered. Nothing is computed while compiling.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateAssertionError, TemplateError, TemplateRuntimeError, nodes, pass_context
from jinja2.environment import Environment, Template
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from service.engine.template_meter import CHARACTERS_A_UNIT, TemplateLimit, meter

MAX_TEMPLATE_CHARACTERS = 64 << 10
_ITERATION, _RUN, _PIECE = 5, 100, 5  # units: of a loop, of a macro or block, of JSON
_MAX_BITS = 16_384  # of whole numbers: more than JSON may bring
_MAX_INDENT = 64
_MAX_FORMAT = 256
_MAX_PRECISION = 20

# What takes no longer for a long value than for a short one, or gives what is paid for as it is taken.
_CHEAP_FILTERS = {
    *("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr"),
    *("reverse", "select", "selectattr"),
}
_FILTERS = {"length", "count", "first", "last", "default", "d", "list", "reverse", "items", "attr"} | {
    "select",
    "reject",
    "selectattr",
    "rejectattr",
    "map",
}
_FILTERS = _CHEAP_FILTERS | {
    *("abs", "capitalize", "dictsort", "e", "escape", "float", "forceescape", "indent", "int", "join", "lower", "max"),
    *("min", "replace", "round", "safe", "sort", "string", "title", "trim", "unique", "upper"),
}
_CHEAP_TESTS = {
    *("boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "integer", "iterable"),
    *("mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined"),
}
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

# Filters that only instrumented templates name.
_STEP, _ONCE, _WHOLE, _COMPARED = " step", " once", " whole", " compared"


def compile_template(source: str) -> Template:
    """Raises TemplateError, and what Python raises for code that is nested too deep. Under a meter, as `render` is."""
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateLimit(f"it has {len(source):,} characters, and may have {MAX_TEMPLATE_CHARACTERS:,}")
    environment = _Sandbox()
    tree = _Instrument().visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, with which transformers marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return str(caller())


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, GenerationTag],
            finalize=_finalize,
            optimized=False,
        )
        offered = {name: each for name, each in self.filters.items() if name in _FILTERS}
        self.filters = {name: _metered(name, each, name in _CHEAP_FILTERS) for name, each in offered.items()}
        self.filters |= {"tojson": _tojson, _STEP: _step, _ONCE: _once, _WHOLE: _whole, _COMPARED: _compared}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _metered(name, each, name in _CHEAP_TESTS) for name, each in tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _dict,
            "namespace": _Namespace,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            meter().take_whole(argument)  # it is hashed
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is not wrapped: `call` refuses it."""
        return

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja's
        if not isinstance(__obj, Macro):  # whose body is paid for
            args = tuple(_compared(value) for value in args)
            kwargs = {name: _compared(value) for name, value in kwargs.items()}
            _pay_for_call(__obj, (*args, *kwargs.values()))
        return _checked(super().call(__context, __obj, *args, **kwargs))


class _Instrument(NodeTransformer):  # its methods are named as the nodes are
    """Puts payments into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        step = self._step(node, _ITERATION)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(step))
        if node.test is not None:
            node.test = nodes.And(step, node.test)
        return node

    def _visit_run(self, node: Any) -> nodes.Node:
        """What is run as often as it is called."""
        step = self._step(node, _RUN)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(step))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _visit_run  # noqa: N815

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        first = node.ops[0]
        with_constant = isinstance(node.expr, nodes.Const) or isinstance(first.expr, nodes.Const)
        if len(node.ops) > 1 or first.op in ("in", "notin") or not with_constant:
            node.expr = _filtered(_COMPARED, node.expr)
            for operand in node.ops:
                operand.expr = _filtered(_COMPARED, operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_filtered(_WHOLE, each) for each in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(_ONCE, node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _filtered(_WHOLE, node.key)
        return node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise TemplateAssertionError(f"{type(node).__name__.lower()} is not offered", node.lineno)

    visit_EvalContextModifier = visit_ScopedEvalContextModifier = visit_Include = visit_Import = _refuse  # noqa: N815
    visit_FromImport = visit_Extends = _refuse  # noqa: N815

    def _step(self, node: nodes.Node, base: int) -> nodes.Filter:
        """A payment for one run of what is in a node."""
        weight = base + sum(1 + len(_text(each)) // CHARACTERS_A_UNIT for each in node.find_all(nodes.Node))
        return _filtered(_STEP, nodes.Const(weight, lineno=node.lineno))


def _text(node: nodes.Node) -> str:
    match node:
        case nodes.TemplateData(data=text) | nodes.Const(value=str() as text):
            return text
    return ""


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _step(weight: int) -> bool:
    meter().spend(weight)
    return True


def _once(value: Any) -> Any:
    meter().take(value)
    return value


def _whole(value: Any) -> Any:
    meter().take_whole(value)
    return value


def _compared(value: Any) -> Any:
    return _whole(_realised(value))


def _realised(value: Any) -> Any:
    """What is taken only once, as a list: it can be paid for before it is used."""
    return list(value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value


@pass_context  # so that nothing is written at compile time
def _finalize(context: Context, value: Any) -> Any:
    return _whole(value)


def _metered(name: str, function: Callable[..., Any], cheap: bool) -> Callable[..., Any]:
    """A filter or a test that is paid for. Its arguments may begin with what Jinja passes on request."""
    prepare = _PREPARED.get(name)

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        passed, given = args[: _passed(args)], args[_passed(args) :]
        if not cheap:
            given = tuple(_compared(value) for value in given)
            kwargs = {key: _compared(value) for key, value in kwargs.items()}
        if prepare is not None:
            given, kwargs = prepare(*given, **kwargs), {}
        result = function(*passed, *given, **kwargs)
        return meter().each(result) if isinstance(result, types.GeneratorType) else _checked(result)

    return paid


def _passed(args: tuple[Any, ...]) -> int:
    return int(bool(args) and isinstance(args[0], Context | Environment | EvalContext))


def _checked(result: Any) -> Any:
    """A result, paid for; no number is larger than its neighbours may be."""
    if isinstance(result, int) and result.bit_length() > _MAX_BITS:
        raise TemplateLimit(f"a number has more than {_MAX_BITS:,} bits")
    meter().take(result)
    return result


def _check_operands(operator: str, left: Any, right: Any) -> None:
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


def _pay_for_call(called: Any, args: tuple[Any, ...]) -> None:
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
    _check_indent(width)
    meter().spend(str(value).count("\n") * _MAX_INDENT // CHARACTERS_A_UNIT)
    return value, width, first, blank


def _prepare_round(value: Any, precision: Any = 0, method: Any = "common") -> tuple[Any, ...]:
    if isinstance(precision, int) and abs(precision) > _MAX_PRECISION:
        raise TemplateLimit(f"a number is rounded to {_MAX_PRECISION} digits at most")
    return value, precision, method


def _check_indent(width: Any) -> None:
    if (isinstance(width, int) and width > _MAX_INDENT) or (isinstance(width, str) and len(width) > _MAX_INDENT):
        raise TemplateLimit(f"an indentation has {_MAX_INDENT} characters at most")


_PREPARED: dict[str, Callable[..., tuple[Any, ...]]] = {
    "join": _prepare_join,
    "replace": _prepare_replace,
    "trim": _prepare_trim,
    "indent": _prepare_indent,
    "round": _prepare_round,
}


# --- what transformers adds to Jinja, metered -----------------------------------------------------


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON that is not escaped for HTML."""
    _check_indent(indent)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    ).iterencode(value)
    pieces = []
    for piece in encoder:
        meter().spend(_PIECE)
        meter().take(piece)
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(_whole(message)))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_FORMAT:
        raise TemplateLimit(f"a format of the time has {_MAX_FORMAT} characters at most")
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    """Keeps no attribute that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a namespace may have a `self`
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateRuntimeError(f"a namespace keeps no {name!r}: its name begins with an underscore")
