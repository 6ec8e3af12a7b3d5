"""The stack of factors: adapters come, stay while there is room, and give way."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from adapters.factors import AdapterFactors, FactorStack, LayerFactors

SHAPES = {"q": (4, 6), "k": (4, 2), "v": (4, 2), "o": (6, 4)}  # in, out
SIBLINGS = dict.fromkeys("qkv", ("q", "k", "v"))


def adapter(
    name: str, rank: int = 4, layers: Sequence[str] = "qkvo", ranks: dict[str, int] | None = None
) -> AdapterFactors:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    made = {}
    for layer in layers:
        r = (ranks or {}).get(layer, rank)
        into, out = SHAPES[layer]
        made[layer] = LayerFactors(torch.randn(r, into, generator=generator), torch.randn(r, out, generator=generator))
    return AdapterFactors(name, made)


def check(stack: FactorStack, held: Sequence[AdapterFactors]) -> None:
    """Each adapter's factors stand in its span, zeros where it has none, and no two spans overlap."""
    taken: set[int] = set()
    for each in held:
        span = stack.span(each)
        ranks = set(range(span.start, span.stop))
        assert len(ranks) == each.rank
        assert not ranks & taken
        taken |= ranks
        for layer in SHAPES:
            try:
                shelf = stack.shelf(layer)
            except KeyError:
                assert layer not in each.layers
                continue
            place = shelf.names.index(layer)
            a, b_t = shelf.a[span, place], shelf.b_t[place][span]
            own = each.layers.get(layer)
            rank = 0 if own is None else len(own.a)
            if own is not None:
                assert torch.equal(a[:rank], own.a)
                assert torch.equal(b_t[:rank], own.b_t)
            assert not a[rank:].any()
            assert not b_t[rank:].any()


def test_adapters_stand_side_by_side() -> None:
    stack = FactorStack(SIBLINGS)
    held = [adapter("a"), adapter("b", 3), adapter("c", 1)]
    stack.hold(held)
    check(stack, held)
    assert stack.ranks == 16
    assert stack.shelf("q") is stack.shelf("v"), "siblings share a shelf"
    assert stack.shelf("q").names == ("q", "k", "v")
    assert stack.shelf("o").names == ("o",)


def test_an_adapter_that_joins_moves_nobody() -> None:
    stack = FactorStack(SIBLINGS)
    first, second = adapter("a"), adapter("b")
    stack.hold([first])
    span, shelf, generation = stack.span(first), stack.shelf("q"), stack.generation
    stack.hold([second])
    check(stack, [first, second])
    assert (stack.span(first), stack.generation) == (span, generation)
    assert stack.shelf("q") is shelf


def test_who_has_left_stays_until_the_place_is_needed() -> None:
    stack = FactorStack(SIBLINGS)
    held = [adapter(name) for name in "abcd"]
    stack.hold(held)
    generation = stack.generation
    stack.hold(held[:1])
    check(stack, held)
    stack.hold([held[0], adapter("e")])
    assert stack.ranks == 16
    assert stack.generation > generation, "what was cached of the stack is stale"
    check(stack, [held[0], adapter("e")])
    with pytest.raises(KeyError):
        stack.span(held[1])


def test_grows_for_those_that_are_wanted_together() -> None:
    stack = FactorStack(SIBLINGS)
    held = [adapter(f"{i}") for i in range(9)]
    stack.hold(held[:4])
    generation = stack.generation
    stack.hold(held)
    check(stack, held)
    assert stack.ranks == 64
    assert stack.generation > generation


def test_a_layer_that_nobody_had_adapted() -> None:
    stack = FactorStack(SIBLINGS)
    few = [adapter("a", layers="qv"), adapter("b", layers="v")]
    stack.hold(few)
    check(stack, few)
    assert stack.shelf("v").names == ("q", "v")
    all_of_them = [*few, adapter("c", layers="ko")]
    stack.hold(all_of_them)
    check(stack, all_of_them)


def test_what_stood_in_a_place_before_is_gone() -> None:
    stack = FactorStack(SIBLINGS)
    stack.hold([adapter("a", 16)])
    partial = adapter("b", 8, layers="qo", ranks={"q": 3})
    stack.hold([partial])
    check(stack, [partial])


def test_adapters_without_factors_take_no_place() -> None:
    stack = FactorStack(SIBLINGS)
    empty = AdapterFactors("empty", {})
    stack.hold([empty])
    stack.hold([empty, adapter("a")])
    span = stack.span(empty)
    assert span.start == span.stop


def test_clearing_gives_all_memory_back() -> None:
    stack = FactorStack(SIBLINGS)
    stack.hold([adapter("a")])
    stack.clear()
    assert stack.ranks == 0
    stack.hold([adapter("a")])
    check(stack, [adapter("a")])


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_and_goes(seed: int) -> None:
    draw = random.Random(seed)
    stack = FactorStack(SIBLINGS)
    everybody = [adapter(f"{i}", draw.randint(1, 9), layers=draw.choice(["qkvo", "qv", "o", "k"])) for i in range(12)]
    for _ in range(60):
        wanted = draw.sample(everybody, draw.randint(0, 6))
        stack.hold(wanted)
        check(stack, wanted)


def test_may_be_made_in_inference_mode_and_written_outside_of_it() -> None:
    stack = FactorStack(SIBLINGS)
    with torch.inference_mode():
        stack.hold([adapter("a")])
    stack.hold([adapter("b")])
    check(stack, [adapter("a"), adapter("b")])
