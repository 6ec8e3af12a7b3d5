"""Structured output: JSON, regular expressions and choices as grammars that a choice's tokens must follow.

Compiled by llguidance, an optional extra: https://github.com/guidance-ai/llguidance. The engine knows of it only the
two protocols of `service.engine.guide`.

JSON is written on one line, with at most one space after a comma or a colon and none elsewhere: a model that likes
whitespace could otherwise write nothing else until its tokens run out.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.api.errors import ApiError
from service.engine.guide import Grammar, GrammarFailed, Guide

MAX_SCHEMA_BYTES = 256 << 10
MAX_REGEX_BYTES = 16 << 10
MAX_OPTIONS = 1000
MAX_OPTIONS_BYTES = 256 << 10

_GRAMMARS_KEPT = 64
_MAX_LEXER_STATES = 50_000  # of 1 to 2 KiB each
_LONGEST_REASON = 300
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
        self._compiled = lru_cache(maxsize=_GRAMMARS_KEPT)(self._compile)

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
        try:
            grammar = self._compiled(source, text)
            grammar.renew()
        except ValueError as error:
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise ApiError(
                "invalid_request", f"{param!r} cannot be compiled to a grammar: {reason}", param=param
            ) from error
        return grammar

    def _compile(self, source: Callable[[str], str], text: str) -> _CompiledGrammar:
        """Raises ValueError with llguidance's reason."""
        from llguidance import LLMatcher, LLParserLimits  # optional, and slow to import

        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        tokenizer, grammar = self._ll_tokenizer(), source(text)
        return _CompiledGrammar(
            grammar, lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=limits), self._vocabulary
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


class _CompiledGrammar:
    """A grammar at its beginning: a matcher that is only ever copied.

    Its copies share a lexer, whose states are computed once for all of them and only grow in number. One that has
    grown beyond its limit is in error for good, and must be made anew.
    """

    def __init__(self, source: str, make: Callable[[], Any], vocabulary: int) -> None:
        """Raises ValueError if `make`'s matcher is in error, or nothing can begin to satisfy it."""
        self.source = source
        self._make = make
        self._vocabulary = vocabulary
        self._renewing = threading.Lock()
        self._matcher = make()
        for _ in range(2):  # what the first one asks too much shows in the second
            self.start().allowed()

    def start(self) -> Guide:
        return _MatcherGuide(self._matcher.deep_copy(), self._vocabulary)

    def renew(self) -> None:
        """Makes the matcher anew if its lexer is in error. Guides that were started before stay as they are."""
        with self._renewing:
            try:
                self.start().allowed()
            except ValueError:
                self._matcher = self._make()


class _MatcherGuide:
    """One choice's way through a grammar. EOS is a token like others: allowed where the grammar may end."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)  # [ceil(vocabulary / 8)]
        self._check()
        bits = np.unpackbits(mask, bitorder="little", count=self._vocabulary)
        allowed = torch.from_numpy(bits.view(np.bool_))
        if not allowed.any():
            raise GrammarFailed(_NOTHING_FOLLOWS)
        return allowed

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        """A matcher never raises; it stays in an error state instead."""
        if self._matcher.is_error():
            reason = self._matcher.get_error().removesuffix("<non-verbose/>").strip()
            raise GrammarFailed(_NOTHING_FOLLOWS if reason.startswith("NoExtension") else reason)


def _of_schema(text: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))


def _of_regex(pattern: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_regex(pattern))


def _check_size(size: int, limit: int, what: str, param: str) -> None:
    if size > limit:
        raise ApiError("invalid_request", f"{what} may have {limit:,} bytes, not {size:,}", param=param)
