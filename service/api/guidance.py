"""Structured output: JSON, regular expressions and choices as grammars that a choice's tokens must follow.

Compiled by llguidance, an optional extra: https://github.com/guidance-ai/llguidance. The engine knows of it only the
two protocols of `service.engine.guide`.

JSON is written on one line, with at most one space after a comma or a colon and none elsewhere: a model that likes
whitespace could otherwise write nothing else until its tokens run out.

A grammar takes memory, measured, for two things: up to 280 times the size of its schema (37 MB for the largest), and up
to 1 KiB for each state of its lexer, which are computed as they are met, 20,000 at most. So the sources of all that
are alive, kept or at work, are bounded together: 1 MiB, which makes 300 MB. The lexers come to 20 MB for each of 16
that are kept, and for each other that a running choice follows; twice that where one outgrew its lexer.

llguidance tells nobody how full a lexer is. When one is, a choice that follows a small grammar goes on with a new
lexer; with a large one it fails, for the model's thread cannot wait for that, and the next request has one made.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.util import find_spec
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from service.api.errors import ApiError
from service.engine.guide import Grammar, GrammarFailed, Guide

MAX_SCHEMA_BYTES = 128 << 10  # compiled in 0.7 s; twice that takes 4 s
MAX_REGEX_BYTES = 16 << 10
MAX_OPTIONS = 1000
MAX_OPTIONS_BYTES = 256 << 10

_GRAMMARS_KEPT = 16
_BYTES_KEPT = 256 << 10  # of the sources of those
_BYTES_ALIVE = 1 << 20  # of the sources of all
_BYTES_RENEWED = 8 << 10  # of a source that the model's thread compiles again: in some 10 ms
_RENEWED_AFTER = 100  # tokens, and not sooner after it did
_MAX_LEXER_STATES = 20_000  # a thousand serve most schemas; a long maxLength or a pattern can ask for any number
_LONGEST_REASON = 300
_OUTGROWN = "too many states"  # in what llguidance says of a lexer beyond its limit
_NOTHING_FOLLOWS = "no token may come next: no output can satisfy the grammar"

# What a schema's own "x-guidance" may not change. `lenient` would skip keywords that it cannot enforce.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}


class Guidance:
    """Compiles grammars for one model. Every method may be called from any thread; compiling takes milliseconds.

    `param` is the request's field that an error names. All raise ApiError (`invalid_request`) for what cannot be
    compiled, for what no output can satisfy, and when llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_token_ids: Collection[int]) -> None:
        """`tokenizer` is a fast Hugging Face tokenizer; `vocabulary` counts the model's logits, which may be more."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_token_ids = sorted(eos_token_ids)
        self._building = threading.Lock()
        self._built: Any = None
        self._grammars = _Grammars()

    @property
    def available(self) -> bool:
        """Whether llguidance is installed."""
        return find_spec("llguidance") is not None

    def json_object(self, *, param: str = "response_format") -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, param=param)

    def json_schema(self, schema: dict[str, Any], *, param: str = "response_format") -> Grammar:
        """JSON that a schema (draft 2020-12) accepts. A keyword that cannot be enforced is an error."""
        text = json.dumps(schema)  # properties are generated in the schema's order
        _check_size(len(text), MAX_SCHEMA_BYTES, "the schema", param)
        return self._grammar(_of_schema, text, param)

    def regex(self, pattern: str, *, param: str = "guided_regex") -> Grammar:
        """Text that a regular expression (Rust's syntax, no look-around) matches from beginning to end."""
        _check_size(len(pattern.encode()), MAX_REGEX_BYTES, "the regular expression", param)
        return self._grammar(_of_regex, pattern, param)

    def choice(self, options: Sequence[str], *, param: str = "guided_choice") -> Grammar:
        """One of the texts given."""
        if not 1 <= len(options) <= MAX_OPTIONS:
            raise ApiError(
                "invalid_request", f"{param!r} takes 1 to {MAX_OPTIONS:,} texts, not {len(options):,}", param=param
            )
        _check_size(sum(len(option.encode()) for option in options), MAX_OPTIONS_BYTES, "all choices together", param)
        return self._grammar(_of_regex, "|".join(re.escape(option) for option in options), param)

    def grammar(self, source: str, *, param: str = "grammar") -> Grammar:
        """What a grammar's own `source` says, compiled again."""
        return self._grammar(str, source, param)

    def _grammar(self, source: Callable[[str], str], text: str, param: str) -> Grammar:
        if not self.available:
            raise ApiError(
                "invalid_request",
                "this server cannot constrain output: install its extra with pip install 'vblora-serve[guided]', "
                f"or leave {param!r} out",
                param=param,
            )
        key = source.__name__, text
        try:
            grammar = self._grammars.get_or_make(key, lambda: self._compile(source, text))
            grammar.renew()
            return grammar
        except ValueError as error:
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise ApiError(
                "invalid_request", f"{param!r} cannot be compiled to a grammar: {reason}", param=param
            ) from error

    def _compile(self, source: Callable[[str], str], text: str) -> _CompiledGrammar:
        """Raises ValueError with llguidance's reason."""
        from llguidance import LLMatcher, LLParserLimits  # optional, and slow to import

        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        tokenizer, grammar = self._ll_tokenizer(), source(text)
        return _CompiledGrammar(
            grammar,
            lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=limits),
            self._vocabulary,
            quick=len(text) <= _BYTES_RENEWED,
        )

    def _ll_tokenizer(self) -> Any:
        """The tokenizer as llguidance reads it. Built once: it takes up to a second for a large vocabulary."""
        from llguidance.hf import from_tokenizer

        with self._building:
            if self._built is None:
                size = len(self._tokenizer)
                eos = [token_id for token_id in self._eos_token_ids if token_id < size]
                if not eos:
                    raise ValueError("this model has no EOS token, with which a grammar ends")
                self._built = from_tokenizer(self._tokenizer, n_vocab=max(size, self._vocabulary), eos_token=eos)
            return self._built


class _Grammars:
    """Those compiled: the latest are kept, and all that are in use are found. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], _CompiledGrammar] = OrderedDict()  # the latest last
        self._alive: WeakValueDictionary[tuple[str, str], _CompiledGrammar] = WeakValueDictionary()
        self._making = 0  # bytes of the sources that are being compiled

    def get_or_make(self, key: tuple[str, str], make: Callable[[], _CompiledGrammar]) -> _CompiledGrammar:
        """Raises ApiError (`overloaded`) if there is no room for one that must be made, and what `make` raises."""
        size = _size([key])
        with self._lock:
            if (alive := self._alive.get(key)) is not None:
                return self._keep(key, alive)
            in_use = _size(self._alive) - _size(self._kept) + self._making
            if in_use + size > _BYTES_ALIVE - _BYTES_KEPT:
                raise ApiError("overloaded", "too many different grammars are in use; try again later")
            self._making += size
        try:
            made = make()
            with self._lock:
                return self._keep(key, self._alive.setdefault(key, made))  # another thread may have been first
        finally:
            with self._lock:
                self._making -= size

    def _keep(self, key: tuple[str, str], grammar: _CompiledGrammar) -> _CompiledGrammar:
        self._kept[key] = grammar
        self._kept.move_to_end(key)
        while len(self._kept) > _GRAMMARS_KEPT or _size(self._kept) > _BYTES_KEPT:
            self._kept.popitem(last=False)
        return grammar


def _size(keys: Iterable[tuple[str, str]]) -> int:
    return sum(len(text) for _, text in keys)


class _CompiledGrammar:
    """A grammar at its beginning: a matcher that is only ever copied.

    Its copies share a lexer, whose states are computed once for all of them and only grow in number. At its limit all
    that share it are in error for good, and another must be made.
    """

    def __init__(self, source: str, make: Callable[[], Any], vocabulary: int, *, quick: bool) -> None:
        """Raises ValueError if `make`'s matcher is in error, or nothing can begin to satisfy it.

        `quick` says that the model's thread may make another.
        """
        self.source = source
        self.quick = quick
        self._make = make
        self._vocabulary = vocabulary
        self._renewing = threading.Lock()
        self._matcher = make()
        for _ in range(2):  # what the first one asks too much shows in the second
            self.start().allowed()

    def start(self) -> Guide:
        return _MatcherGuide(self, self._vocabulary)

    def renew(self) -> None:
        """Makes another matcher if the lexer is full."""
        matcher = self.matcher()
        copy = matcher.deep_copy()
        copy.compute_bitmask()
        if _OUTGROWN in _error_of(copy):
            self.matcher(outgrown=matcher)

    def matcher(self, outgrown: Any = None) -> Any:
        """The matcher to copy; a new one if that is still the one that was found `outgrown`."""
        with self._renewing:
            if outgrown is self._matcher:
                self._matcher = self._make()
            return self._matcher


class _MatcherGuide:
    """One choice's way through a grammar. EOS is a token like others: allowed where the grammar may end."""

    def __init__(self, grammar: _CompiledGrammar, vocabulary: int) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._copied = grammar.matcher()
        self._matcher = self._copied.deep_copy()
        self._taken: list[int] = []
        self._renewed: int | None = None  # after so many tokens

    def allowed(self) -> Tensor:
        mask = np.frombuffer(self._do(lambda matcher: matcher.compute_bitmask()), np.uint8)  # [ceil(vocabulary / 8)]
        bits = np.unpackbits(mask, bitorder="little", count=self._vocabulary)
        allowed = torch.from_numpy(bits.view(np.bool_))
        if not allowed.any():
            raise GrammarFailed(_NOTHING_FOLLOWS)
        return allowed

    def accept(self, token_id: int) -> None:
        self._do(lambda matcher: matcher.consume_token(token_id))
        self._taken.append(token_id)

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _do(self, step: Callable[[Any], Any]) -> Any:
        """Takes a step, with a new lexer if the old one was full, as it may be others who filled it."""
        result = step(self._matcher)
        if _OUTGROWN in _error_of(self._matcher) and self._may_renew():
            self._renewed = len(self._taken)
            result = self._again(step)
            if _OUTGROWN in _error_of(self._matcher):  # so is the latest one, which this choice has not filled
                result = self._again(step)
        if reason := _error_of(self._matcher):
            raise GrammarFailed(_NOTHING_FOLLOWS if reason.startswith("NoExtension") else reason)
        return result

    def _again(self, step: Callable[[Any], Any]) -> Any:
        """Takes the step with the latest lexer, or one that is newer than the one that failed."""
        self._copied = self._grammar.matcher(outgrown=self._copied)
        self._matcher = self._copied.deep_copy()
        self._matcher.consume_tokens(self._taken)
        return step(self._matcher)

    def _may_renew(self) -> bool:
        just_did = self._renewed is not None and len(self._taken) - self._renewed < _RENEWED_AFTER
        return self._grammar.quick and not just_did


def _error_of(matcher: Any) -> str:
    """A matcher never raises; it stays in an error state instead. Empty: it is in none."""
    return matcher.get_error().removesuffix("<non-verbose/>").strip() if matcher.is_error() else ""


def _of_schema(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))


def _of_regex(pattern: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_regex(pattern))


def _check_size(size: int, limit: int, what: str, param: str) -> None:
    if size > limit:
        raise ApiError("invalid_request", f"{what} may have {limit:,} bytes, not {size:,}", param=param)
