"""Jinja for chat templates that come with adapters: transformers' sandbox, and a bound on the work that they make.

transformers' sandbox keeps a template from what is not its own; here it is also kept from loops without end and values
without bound. Everything whose cost may grow is paid for from the render's Meter: the bodies of loops, macros and
blocks before each run, by their size; operators, filters, tests, methods and what is written, by the size of what they
go through. What could take much from little (widths and formats, repetitions, powers) is checked before it is done, or
is not offered. Nothing is computed while compiling.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateAssertionError, TemplateError, TemplateRuntimeError, nodes, pass_context
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from service.engine.template_meter import CHARACTERS_A_UNIT, TemplateLimit, meter
from service.engine.template_prices import (
    check_indent,
    check_operands,
    checked,
    compared,
    metered,
    once,
    pay_for_call,
    whole,
)

MAX_TEMPLATE_CHARACTERS = 64 << 10
_ITERATION, _RUN, _PIECE = 5, 100, 5  # units: of a loop, of a macro or block, of JSON
_MAX_FORMAT = 256

# What takes no longer for a long value than for a short one, or gives what is paid for as it is taken.
_CHEAP_FILTERS = {
    *("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr"),
    *("reverse", "select", "selectattr"),
}
_FILTERS = _CHEAP_FILTERS | {
    *("abs", "capitalize", "dictsort", "e", "escape", "float", "forceescape", "indent", "int", "join", "lower", "max"),
    *("min", "replace", "round", "safe", "sort", "string", "title", "trim", "unique", "upper"),
}
_CHEAP_TESTS = {
    *("boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "integer", "iterable"),
    *("mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true", "undefined"),
}
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
        self.filters = {name: metered(name, each, name in _CHEAP_FILTERS) for name, each in offered.items()}
        self.filters |= {"tojson": _tojson, _STEP: _step, _ONCE: once, _WHOLE: whole, _COMPARED: compared}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: metered(name, each, name in _CHEAP_TESTS) for name, each in tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _dict,
            "namespace": _Namespace,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operands(operator, left, right)
        return checked(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            meter().take_whole(argument)  # it is hashed
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is not wrapped: `call` refuses it."""
        return

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja's
        if not isinstance(__obj, Macro):  # whose body is paid for
            args = tuple(compared(value) for value in args)
            kwargs = {name: compared(value) for name, value in kwargs.items()}
            pay_for_call(__obj, (*args, *kwargs.values()))
        return checked(super().call(__context, __obj, *args, **kwargs))


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


@pass_context  # so that nothing is written at compile time
def _finalize(context: Context, value: Any) -> Any:
    return whole(value)


# --- what transformers adds to Jinja, metered -----------------------------------------------------


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON that is not escaped for HTML."""
    check_indent(indent)
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
    raise TemplateError(str(whole(message)))


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
