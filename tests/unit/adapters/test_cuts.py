"""Factors of a part of a model are that part of the factors, wherever a cut falls; and the parts make up the whole."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapters.binding import replaced_parameters
from adapters.compose import mixtures
from adapters.cuts import Cut, Side, factors_of
from adapters.reading import as_served, read_adapter
from tests.families import Family, families, raw_vblora, written


def cuts_at(borders: list[float], features: int) -> list[tuple[int, int]]:
    """The parts between borders that are drawn as shares of the features."""
    places = sorted({0, features, *(int(border * features) for border in borders)})
    return list(pairwise(places))


@given(families(with_lora=True, most=2), st.lists(st.floats(0, 1), max_size=3), st.integers(0, 9))
def test_parts_of_factors(family: Family, borders: list[float], seed: int) -> None:
    pick = random.Random(seed)
    with written(family) as members:
        for path, _ in members:
            checkpoint = as_served(read_adapter(path))
            whole = {layer.name: (layer, a, b_t) for layer, a, b_t in checkpoint.factors()}
            sides = {name: pick.choice([*Side, None]) for name in whole}
            for name, (layer, a, b_t) in whole.items():
                x = torch.randn(3, layer.in_features)
                side, summed, parts = sides[name], torch.zeros(3, layer.out_features), []
                features = layer.in_features if side is Side.INPUT else layer.out_features
                for start, stop in cuts_at(borders, features):
                    cuts = {} if side is None else {name: Cut(side, start, stop, features)}
                    of_part = {each.name: (a, b_t) for each, a, b_t in factors_of(checkpoint, cuts)}
                    assert of_part.keys() == whole.keys()
                    part_a, part_b = of_part[name]
                    expected_a = a[:, start:stop] if side is Side.INPUT else a
                    expected_b = b_t[:, start:stop] if side is Side.OUTPUT else b_t
                    assert torch.equal(part_a, expected_a)
                    assert torch.equal(part_b, expected_b)
                    held = x[:, start:stop] if side is Side.INPUT else x
                    parts.append(held @ part_a.T @ part_b)
                if side is None:
                    continue
                summed = torch.cat(parts, dim=-1) if side is Side.OUTPUT else sum(parts, summed)
                exact = x @ a.T @ b_t
                torch.testing.assert_close(summed, exact, rtol=1e-4, atol=1e-4 * (1 + float(exact.abs().max())))


def test_only_the_tiles_that_a_part_touches_are_composed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_vblora(targets=("q_proj", "down_proj"), numbers=(0,), vector_length=4, r=2)
    checkpoint = as_served(read_adapter(raw.write(tmp_path_factory.mktemp("adapter") / "a")))
    composed: list[int] = []

    def counting(indices: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
        composed.append(len(indices))
        return mixtures(indices, weights, bank)

    monkeypatch.setattr("adapters.cuts.mixtures", counting)
    (q,) = (layer for layer in checkpoint.layout.layers if layer.name.endswith("q_proj"))
    (down,) = (layer for layer in checkpoint.layout.layers if layer.name.endswith("down_proj"))
    cuts = {q.name: Cut(Side.OUTPUT, 6, 12, q.out_features), down.name: Cut(Side.INPUT, 8, 15, down.in_features)}
    list(factors_of(checkpoint, cuts))
    tiles_of_q = q.in_features // 4 + 2  # features 6 to 12: two tiles, one of them in half
    tiles_of_down = 2 + down.out_features // 4
    assert composed == [2 * (tiles_of_q + tiles_of_down)]


def test_parts_of_parameters() -> None:
    weight, bias = torch.arange(24.0).view(6, 4), torch.arange(6.0)
    rows, columns = Cut(Side.OUTPUT, 2, 5, 6), Cut(Side.INPUT, 1, 4, 4)
    parts = rows.parameter("weight", weight), rows.parameter("bias", bias), columns.parameter("weight", weight)
    for part, expected in zip(parts, (weight[2:5], bias[2:5], weight[:, 1:4]), strict=True):
        assert part is not None
        assert torch.equal(part, expected)
    assert columns.parameter("bias", bias) is None, "added where the part begins at 0"
    assert Cut(Side.INPUT, 0, 1, 4).parameter("bias", bias) is bias
    assert rows.whole_shape("weight", (3, 4)) == columns.whole_shape("weight", (6, 3)) == (6, 4)
    assert rows.whole_shape("bias", (3,)) == columns.whole_shape("bias", (6,)) == (6,)


def test_replaced_parameters_of_a_part() -> None:
    """What equals the base's own part replaces nothing; a bias that is added elsewhere is left out."""
    weight, bias = torch.randn(6, 4), torch.randn(6)
    held = Cut(Side.INPUT, 1, 4, 4)
    extras = {"base_model.model.o.weight": weight, "base_model.model.o.bias": bias}
    own = {"o.weight": weight[:, 1:4].clone()}
    assert replaced_parameters(extras, own.get, {"o": held}) == {}
    own["o.weight"] += 1
    replaced = replaced_parameters(extras, own.get, {"o": held})
    assert replaced.keys() == {"o"}
    assert replaced["o"].keys() == {"weight"}
    assert torch.equal(replaced["o"]["weight"], weight[:, 1:4])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_an_impossible_cut_is_our_own_mistake(start: int, stop: int) -> None:
    with pytest.raises(AssertionError):
        Cut(Side.OUTPUT, start, stop, 4)
