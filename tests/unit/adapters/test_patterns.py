"""Strangers' regular expressions: what would take all time or all memory is refused, on models of any size."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.config import VBLoRAConfig
from adapters.errors import BadConfig
from adapters.patterns import MOST_EXPANDED, TIMEOUT_S, Allowance, Pattern
from adapters.targets import BaseModules, LayerShape

MODULES = [f"model.layers.{n}.{part}" for n in range(400) for part in ("q_proj", "k_proj", "v_proj", "mlp.up", "norm")]
BASE = BaseModules("llama", dict.fromkeys(MODULES, "Linear"), {name: LayerShape(name, 64, 64) for name in MODULES})


def pattern(text: str) -> Pattern:
    return Pattern(text, "target_modules", Allowance())


class TestOnAModelOf2000Modules:
    """In the processor time of this thread: a busy machine must not fail these."""

    # No name holds a "!" or "?". (A pattern that ends in one fixed character is seen through before it is tried.)
    SLOW = {  # noqa: RUF012
        "one name for ever": {"target_modules": r"(?:(?:.|\w)+)+[!?]"},
        "a little on each": {"target_modules": r"(?!(?:.|\w){14}[!?]).*"},
        "lookahead": {"target_modules": r"(?:.|\w)+(?=[!?])"},
        "lookbehind": {"target_modules": r".*(?<=[!?](?:.|\w)+)"},
        "back-references": {"target_modules": r"(?:(.)|(\w))+\1\2[!?]"},
        "excluded": {"target_modules": ["q_proj"], "exclude_modules": r"(?:.|\w)+[!?]"},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": [r"(?:.|\w)+[!?]"]},
        "layers": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": r"(?:.|\w)+[!?]"},
    }

    @pytest.mark.parametrize("fields", SLOW.values(), ids=SLOW)
    def test_a_catastrophic_pattern_is_refused_in_bounded_time(self, fields: dict[str, Any]):
        config = VBLoRAConfig.from_dict({"peft_type": "VBLORA", **fields})
        started = time.thread_time()
        with pytest.raises(BadConfig, match="takes too long") as refusal:
            BASE.selected_by(config)
        assert time.thread_time() - started < 4 * TIMEOUT_S
        assert refusal.value.subject in fields
        assert "list the module names instead" in refusal.value.message

    @pytest.mark.parametrize(
        "honest", [r".*\.(q|k|v)_proj", r"model\.layers\.(?!1\d\d\.).*_proj", r".*layers\.\d{1,3}\.mlp\.up"]
    )
    def test_an_honest_one_is_far_from_the_limit(self, honest: str):
        started = time.thread_time()
        assert BASE.selected_by(VBLoRAConfig(target_modules=honest))
        assert time.thread_time() - started < TIMEOUT_S / 4

    def test_compiling_counts(self):
        many = [f"({n}|a?)" * 1000 for n in range(90)]
        config = VBLoRAConfig(target_modules=("q_proj",), modules_to_save=tuple(many))
        started = time.thread_time()
        with pytest.raises(BadConfig, match="takes too long"):
            BASE.selected_by(config)
        assert time.thread_time() - started < 4 * TIMEOUT_S


COSTLY = {
    "a repeat in a repeat": ("(?:a{1000}){1000}", "repeats"),
    "many repeats": ("a{2}" * 20, "repeats"),
    "one large repeat": ("[ab]{1000000}", "repeats"),
    "a repeat of a thousand digits": ("a{" + "9" * 1000 + "}", "repeats"),
    "recursion": ("(?R)?a", "calls itself"),
    "a call of a group": ("(a|(?1)b)", "calls itself"),
    "a call of the group before": ("(a|(?-1)b)", "calls itself"),
    "a call by name": ("(?P<n>a|(?&n)b)", "calls itself"),
    "a call by name, Python's": ("(?P<n>a|(?P>n)b)", "calls itself"),
    "fuzzy matching": ("(?:a.b){e<=3}", "brace"),
    "fuzzy matching in a range": ("(?:a.b){1<e<3}", "brace"),
    "a repeat hidden by spaces": ("(?x)(?:a{1 0 0 0}){1 0 0 0}", "brace"),
    "a count hidden by spaces alone": ("(?i-x:a)(?ix) a", "verbose"),
    "a named list": (r"\L<names>", "not a valid"),
    "flags that exclude each other": ("(?a)(?L)a", "not a valid"),
}


@pytest.mark.parametrize(("text", "word"), COSTLY.values(), ids=COSTLY)
def test_refuses_before_compiling(text: str, word: str):
    tracemalloc.start()
    try:
        with pytest.raises(BadConfig, match=word) as refusal:
            pattern(text)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert refusal.value.subject == "target_modules"


@pytest.mark.parametrize(
    "text",
    [r"(?P<idx>\d+)", r"(?P<x>a)(?P=x)", "(?<!x)a", "(?:x|y)", "(?#x)a", "a{2}", "a{,3}", "a{1,}", "(?i)x", "(?i:x)"],
)
def test_pefts_own_language_is_taken(text: str):
    pattern(text)


def test_expansion_is_bounded_by_the_whole_pattern():
    head = "a" * 100
    pattern(head + "b{900}")
    with pytest.raises(BadConfig, match="repeats"):
        pattern(head + "b{900}b{2}")
    assert len(head) * 900 < MOST_EXPANDED


PIECES = [
    "a", ".", r"\d", "[ab]", "(", "(?:", "(?=", "(?!", "(?<=", ")", "|", "*", "+", "?", "{2}", "{,9}", "{e}", "(?i)",
    r"\1", "^", "$", "(?P<n>", "(?P=n)", "(?>", "(?|", "(?L)", "(?a)", "(?V1)", "[", "]", "\\", "(?R)", "(?1)",
]  # fmt: skip


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_pattern_is_matched_or_bad_config(text: str):
    try:
        taken = Pattern(text, "target_modules", Allowance(0.05))
        for name in ("a" * 30 + ".0.b", "model.layers.0.q_proj"):
            taken.fullmatch(name)
            taken.match(name)
    except BadConfig as error:
        assert error.subject == "target_modules"  # noqa: PT017
