"""Structured output: random tokens, let through by a guide, are always what was asked for."""

from __future__ import annotations

import json
import random
import re
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import pytest
import torch
from transformers import AutoTokenizer

from service.api import guidance as module
from service.api.errors import ApiError
from service.api.guidance import MAX_OPTIONS, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, Guidance
from service.demo.run import ASSETS
from service.engine.guide import Grammar, GrammarFailed, Guide
from service.engine.sampler import SamplingRow, sample
from service.engine.sequence import SamplingParams
from tests.factories import EOS_ID, PAD_ID, VOCAB_SIZE, byte_tokenizer

MOST_TOKENS = 2000
SEEDS = range(12)
LIKES_TO_END = b'"}]'  # random tokens would make strings and lists endless


@pytest.fixture(scope="module")
def guidance() -> Guidance:
    return Guidance(byte_tokenizer(), VOCAB_SIZE, {EOS_ID})


def generate(grammar: Grammar, seed: int, *, vocabulary: int, ending: Sequence[int], eos: int = EOS_ID) -> list[int]:
    """Tokens drawn at random, through a guide, until it is complete; EOS is left out."""
    random = torch.Generator().manual_seed(seed)
    guide, output = grammar.start(), []
    while not guide.complete:
        token_logits = torch.randn(1, vocabulary, generator=random) * 2
        token_logits[0, [*ending, eos]] += 4
        (token,) = sample(token_logits, [SamplingRow(SamplingParams(), random, allowed=guide.allowed())])
        guide.accept(token)
        output.append(token)
        assert len(output) < MOST_TOKENS, "the grammar did not come to an end"
    return output[:-1] if output[-1] == eos else output


def write(grammar: Grammar, seed: int) -> str:
    return bytes(generate(grammar, seed, vocabulary=VOCAB_SIZE, ending=LIKES_TO_END)).decode()


def accepted(grammar: Grammar, text: str) -> bool:
    """Whether the whole text may be written, and may end there."""
    guide = grammar.start()
    for byte in text.encode():
        if guide.complete or not guide.allowed()[byte]:
            return False
        guide.accept(byte)
    return bool(guide.complete or guide.allowed()[EOS_ID])


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "integers": record(
        {"a": {"type": "integer", "minimum": 5, "maximum": 12}, "b": {"type": "integer", "minimum": -3}}
    ),
    "exclusive": record({"a": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1000, "multipleOf": 7}}),
    "numbers": record({"a": {"type": "number", "minimum": -1.5, "maximum": 2.25}}),
    "lengths": record({"a": {"type": "string", "minLength": 3, "maxLength": 9}, "b": {"type": "string"}}),
    "patterns": record({"a": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"}}),
    "enums": record({"a": {"enum": ["x", 3, None, {"k": [1]}]}, "b": {"const": "fixed"}, "c": {"type": "boolean"}}),
    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 5},
    "tuples": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False, "minItems": 2},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 4}},
        "required": ["b"],
        "additionalProperties": {"type": "boolean"},
    },
    "alternatives": {"anyOf": [record({"a": {"type": "integer"}}), {"type": "string", "maxLength": 5}]},
    "formats": record({"a": {"type": "string", "format": "date"}, "b": {"type": "string", "format": "ipv4"}}),
    "recursive": {
        "$defs": {"tree": record({"leaf": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}})},
        "$ref": "#/$defs/tree",
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_through_a_schema_are_valid(guidance: Guidance, name: str) -> None:
    grammar = guidance.json_schema(SCHEMAS[name])
    validator = jsonschema_rs.Draft202012Validator(SCHEMAS[name], validate_formats=True)
    texts = {write(grammar, seed) for seed in SEEDS}
    assert len(texts) > 2, "nothing was left to chance"
    for text in texts:
        validator.validate(json.loads(text))


def test_random_tokens_of_a_real_vocabulary_are_valid() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    vocabulary, eos = len(tokenizer) + 9, tokenizer.eos_token_id  # padded, as models' vocabularies are
    guidance = Guidance(tokenizer, vocabulary, {eos})
    ending = [i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) & {'"', "}", "]"}]
    for name in ("integers", "lengths", "optional", "recursive"):
        grammar = guidance.json_schema(SCHEMAS[name])
        for seed in SEEDS:
            text = tokenizer.decode(generate(grammar, seed, vocabulary=vocabulary, ending=ending, eos=eos))
            jsonschema_rs.validate(SCHEMAS[name], json.loads(text))


def test_every_value_within_the_bounds_can_come_and_no_other(guidance: Guidance) -> None:
    grammar = guidance.json_schema({"type": "integer", "minimum": 5, "maximum": 12})
    assert [number for number in range(-20, 200) if accepted(grammar, str(number))] == [*range(5, 13)]


def test_a_json_object_is_any_and_nothing_else(guidance: Guidance) -> None:
    grammar = guidance.json_object()
    for seed in SEEDS:
        assert isinstance(json.loads(write(grammar, seed)), dict)
    assert accepted(grammar, '{"a": [1, {"b": null}], "c": "d"}')
    assert not accepted(grammar, "[]")


def test_whitespace_is_at_most_one_space_behind_a_separator(guidance: Guidance) -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    for grammar in (guidance.json_object(), guidance.json_schema(schema)):
        assert accepted(grammar, '{"a": [1, 2], "b":3}')
        for text in ('{"a":  1}', '{ "a":1}', '{"a":1 }', '{"a" :1}', '{"a":1,\n"b":2}'):
            assert not accepted(grammar, text)


def test_random_tokens_through_a_regular_expression_match_it(guidance: Guidance) -> None:
    pattern = r"(yes|no), [a-z]{2,5}(/[0-9]+)?\."
    texts = {write(guidance.regex(pattern), seed) for seed in SEEDS}
    assert len(texts) > 2
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_anchors_change_nothing(guidance: Guidance) -> None:
    assert accepted(guidance.regex("^ab$"), "ab")
    assert not accepted(guidance.regex("b"), "ab")


def test_every_choice_can_come_literally_and_nothing_else(guidance: Guidance) -> None:
    options = ["a", "a/b", "x.y*", '"quoted"', "two\nlines", "ünï", " #-&~"]
    grammar = guidance.choice(options)
    assert all(accepted(grammar, option) for option in options)
    assert not any(accepted(grammar, text) for text in ("", "b", "xzy", "a/"))
    assert {write(grammar, seed) for seed in range(40)} <= set(options)


def test_eos_is_allowed_exactly_where_the_grammar_may_end() -> None:
    guide = Guidance(byte_tokenizer(), VOCAB_SIZE, {EOS_ID, PAD_ID}).regex("ab?").start()
    assert guide.allowed().nonzero().flatten().tolist() == [ord("a")]
    guide.accept(ord("a"))
    assert guide.allowed().nonzero().flatten().tolist() == [ord("b"), EOS_ID, PAD_ID]
    assert not guide.complete
    guide.accept(PAD_ID)
    assert guide.complete


def test_a_guide_is_complete_when_nothing_may_follow(guidance: Guidance) -> None:
    guide = guidance.regex("ab?").start()
    for token in b"ab":
        assert not guide.complete
        guide.accept(token)
    assert guide.complete


def test_what_is_no_text_is_never_allowed(guidance: Guidance) -> None:
    allowed = guidance.regex(r"(?s:.*)").start().allowed()
    assert allowed.dtype == torch.bool
    assert allowed.shape == (VOCAB_SIZE,)
    assert allowed[ord("a")]
    assert allowed[256:].nonzero().flatten().tolist() == [EOS_ID - 256], "special tokens and padding"


def test_a_tokenizer_larger_than_the_model_is_cut() -> None:
    assert Guidance(byte_tokenizer(), 258, {EOS_ID}).regex("a").start().allowed().shape == (258,)


def test_a_token_that_is_not_allowed_is_an_error(guidance: Guidance) -> None:
    guide = guidance.regex("ab").start()
    with pytest.raises(ValueError, match="doesn't satisfy the grammar"):
        guide.accept(ord("b"))
    with pytest.raises(ValueError, match="doesn't satisfy the grammar"):
        guide.allowed()


def test_guides_of_one_grammar_go_their_own_ways_in_many_threads(guidance: Guidance) -> None:
    grammar = guidance.json_schema(SCHEMAS["optional"])
    alone = [write(grammar, seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda seed: write(grammar, seed), range(40))) == alone


def test_a_grammar_is_compiled_once_and_forgotten_when_many_others_came(guidance: Guidance) -> None:
    first = weakref.ref(guidance.regex("first"))
    assert guidance.regex("first") is first()
    for i in range(module._GRAMMARS_KEPT):
        guidance.regex(f"other {i}")
    assert first() is None


def test_large_grammars_are_forgotten_sooner(guidance: Guidance) -> None:
    first = weakref.ref(guidance.choice(["first"]))
    for i in range(2):
        assert first() is not None
        guidance.choice([str(i) * (module._BYTES_KEPT // 2)])
    assert first() is None


def test_grammars_in_use_are_bounded_by_the_size_of_their_sources() -> None:
    guidance = Guidance(byte_tokenizer(), VOCAB_SIZE, {EOS_ID})
    texts = [f"{i:x<200}" + "a" * 100_000 for i in range(20)]
    room = module._BYTES_ALIVE // len(texts[0]) - 1  # the last ones are kept besides
    in_use = [guidance.choice([text]) for text in texts[:room]]
    with pytest.raises(ApiError, match="too many different grammars") as refused:
        in_use += [guidance.choice([text]) for text in texts[room:]]
    assert refused.value.code == "overloaded"
    assert guidance.choice([texts[0]]) is in_use[0]
    in_use.clear()
    guidance.choice([texts[-1]])


@pytest.mark.parametrize("quick", [True, False])
def test_one_that_outgrows_a_grammar_leaves_others_alone(monkeypatch: pytest.MonkeyPatch, *, quick: bool) -> None:
    monkeypatch.setattr(module, "_MAX_LEXER_STATES", 120)
    monkeypatch.setattr(module, "_BYTES_RENEWED", 100 if quick else 10)
    guidance = Guidance(byte_tokenizer(), VOCAB_SIZE, {EOS_ID})
    pattern = "[a-z]{8}|[AB]*A[AB]{12}C"
    grammar = guidance.regex(pattern)
    neighbour, late = grammar.start(), grammar.start()
    write_bytes(neighbour, b"abcd")
    with pytest.raises(GrammarFailed, match="too many states"):
        write_bytes(grammar.start(), bytes(random.Random(0).choices(b"AB", k=500)))
    if quick:
        write_bytes(neighbour, b"efgh")
        assert neighbour.allowed().nonzero().flatten().tolist() == [EOS_ID]
        write_bytes(late, b"abcdefgh")
    assert guidance.regex(pattern) is grammar
    write_bytes(grammar.start(), b"abcdefgh")


def write_bytes(guide: Guide, text: bytes) -> None:
    for byte in text:
        assert guide.allowed()[byte]
        guide.accept(byte)


REFUSED = {
    "unknown type": (lambda g: g.json_schema({"type": "text"}, param="guided_json"), "guided_json", "Invalid type"),
    "keyword not enforced": (lambda g: g.json_schema({"uniqueItems": True}), "response_format", "uniqueItems"),
    "lenient asked for": (
        lambda g: g.json_schema({"x-guidance": {"lenient": True}, "not": {"type": "null"}}),
        "response_format",
        "not",
    ),
    "contradiction": (
        lambda g: g.json_schema(record({"a": {"type": "integer", "minimum": 3, "maximum": 2}})),
        "response_format",
        "nsatisfiable",
    ),
    "endless reference": (
        lambda g: g.json_schema({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}),
        "response_format",
        "no output can satisfy",
    ),
    "reference elsewhere": (lambda g: g.json_schema({"$ref": "http://localhost/x"}), "response_format", "retrieving"),
    "syntax": (lambda g: g.regex("("), "guided_regex", "unclosed group"),
    "look-around": (lambda g: g.regex("(?=a)b"), "guided_regex", "look-around"),
    "too complex": (lambda g: g.regex("(a{1000}){1000}"), "guided_regex", "too many expressions"),
    "long schema": (lambda g: g.json_schema({"const": "x" * MAX_SCHEMA_BYTES}), "response_format", "131,072 bytes"),
    "long regex": (lambda g: g.regex("ü" * MAX_REGEX_BYTES), "guided_regex", "16,384 bytes"),
    "no choice": (lambda g: g.choice([]), "guided_choice", "1 to 1,000 texts"),
    "many choices": (lambda g: g.choice(["a"] * (MAX_OPTIONS + 1)), "guided_choice", "1 to 1,000 texts"),
    "long choices": (lambda g: g.choice(["a" * 300] * MAX_OPTIONS), "guided_choice", "262,144 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused_with_the_reason(guidance: Guidance, case: str) -> None:
    ask, param, reason = REFUSED[case]
    with pytest.raises(ApiError, match=re.escape(reason)) as caught:
        ask(guidance)
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)


def test_a_model_without_eos_is_refused() -> None:
    with pytest.raises(ApiError, match="no EOS token"):
        Guidance(byte_tokenizer(), VOCAB_SIZE, set()).json_object()


def test_without_the_extra_a_client_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    guidance = Guidance(byte_tokenizer(), VOCAB_SIZE, {EOS_ID})
    assert not guidance.available
    with pytest.raises(ApiError, match=re.escape("pip install 'vblora-serve[guided]'")) as caught:
        guidance.choice(["a", "b"], param="structured_outputs")
    assert (caught.value.code, caught.value.param) == ("invalid_request", "structured_outputs")
