"""A slot of a model's tables holds the whole adapter, and gives up what it held."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from adapters.factors import AdapterFactors
from adapters.kernels import reference
from adapters.kernels.model_tables import FactorTables, LayerGroup, SelectionTables, TableSpec, layer_groups
from adapters.kernels.residency import SlotResidency
from adapters.kernels.table_batch import TableBatch
from adapters.kernels.tables import DoesNotFit, GroupShape
from adapters.targets import LayerShape
from adapters.vector_bank import VectorBank
from tests.factories import AdapterSpec, make_adapter, tiny_model
from tests.lora_factory import make_lora
from tests.unit.adapters.support import base_modules, factors

CPU = torch.device("cpu")
SPEC = TableSpec(rank=5, topk=3, vector_length=8, num_vectors=70, dtype=torch.float32)
Tables = SelectionTables | FactorTables


def names(layer: int) -> list[tuple[str, ...]]:
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    qkv = tuple(f"{attention}.{each}_proj" for each in "qkv")
    return [qkv, (f"{attention}.o_proj",), (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (f"{mlp}.down_proj",)]


@pytest.fixture(scope="module")
def groups() -> list[LayerGroup]:
    layers = {name: layer for name, layer in base_modules(tiny_model("llama")).layers.items() if name != "lm_head"}
    siblings = {name: group for layer in range(2) for group in names(layer) for name in group}
    return layer_groups(layers, siblings, vector_length=8)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFactors]:
    """Of several ranks, topk, lengths and targets; the last is a LoRA."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("adapters")
    specs = [
        AdapterSpec(seed=0),
        AdapterSpec(seed=1, r=2, topk=3, target_modules="all-linear"),
        AdapterSpec(seed=2, vector_length=8, num_vectors=70, layers_to_transform=[1]),
    ]
    made = [factors(make_adapter(model, spec, folder / f"{i}")) for i, spec in enumerate(specs)]
    return [*made, factors(make_lora(model, folder / "lora", r=3))]


def test_layers_by_what_they_read(groups: list[LayerGroup]) -> None:
    assert [group.names for group in groups] == names(0) + names(1)
    assert groups[0].shape == GroupShape(64, (64, 32, 32))


def test_groups_that_vectors_do_not_tile_are_left_out() -> None:
    layers = {name: LayerShape(name, 24, out) for name, out in (("a", 16), ("b", 8), ("c", 24))}
    siblings = {"a": ("a", "b"), "b": ("a", "b")}
    assert [group.names for group in layer_groups(layers, siblings, vector_length=8)] == [("a", "b"), ("c",)]
    assert [group.names for group in layer_groups(layers, siblings, vector_length=12)] == [("c",)]


def check_slot(tables: Tables, groups: list[LayerGroup], slot: int, adapter: AdapterFactors | None) -> None:
    for table, group in zip(tables.tables, groups, strict=True):
        for projection, name in enumerate(group.names):
            a, b_t = reference.factors(table, slot, projection)
            layer = adapter.layers.get(name) if adapter is not None else None
            if layer is None:
                assert len(a) == len(b_t) == 0
            else:
                torch.testing.assert_close(a.float(), layer.a, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(b_t.float(), layer.b_t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SelectionTables, FactorTables])
def test_every_slot_is_its_adapter(
    kind: type[Tables], groups: list[LayerGroup], adapters: list[AdapterFactors]
) -> None:
    tables = kind(groups, SPEC, 3, CPU)
    fitting = adapters if kind is FactorTables else adapters[:3]
    for turn in range(3):  # each over the remains of others
        held = [fitting[(turn + slot) % len(fitting)] for slot in range(3)]
        for slot, adapter in enumerate(held):
            tables.put(slot, adapter)
        for slot, adapter in enumerate(held):
            check_slot(tables, groups, slot, adapter)
    tables.clear(1)
    check_slot(tables, groups, 1, None)
    check_slot(tables, groups, 2, held[2])


@pytest.mark.parametrize("kind", [SelectionTables, FactorTables])
def test_what_does_not_fit_leaves_the_slot_as_it_was(
    kind: type[Tables], groups: list[LayerGroup], adapters: list[AdapterFactors]
) -> None:
    tables = kind(groups, SPEC, 1, CPU)
    tables.put(0, adapters[0])
    for message, unfit in unfitting(kind, adapters[0], adapters):
        with pytest.raises(DoesNotFit, match=message):
            tables.put(0, unfit)
        check_slot(tables, groups, 0, adapters[0])


def unfitting(
    kind: type[Tables], one: AdapterFactors, adapters: list[AdapterFactors]
) -> Iterator[tuple[str, AdapterFactors]]:
    assert one.selections is not None
    yield "trained biases or saved", replace(one, replaced={"model.norm": {"weight": torch.ones(64)}})
    yield "lm_head", replace(one, layers={**one.layers, "lm_head": next(iter(one.layers.values()))})
    if kind is SelectionTables:
        yield "plain LoRA", adapters[3]
        longer = replace(one.selections, bank=VectorBank(torch.zeros(36, 16)))
        yield "36 vectors of 16", replace(one, selections=longer)
        layout = one.selections.layout
        for change in ({"r": 6}, {"topk": 4}):
            larger = replace(one.selections, layout=replace(layout, config=replace(layout.config, **change)))
            yield "do not fit a table of rank 5", replace(one, selections=larger)
    else:
        name, layer = next(iter(one.layers.items()))
        larger_layer = replace(layer, a=layer.a.repeat(2, 1), b_t=layer.b_t.repeat(2, 1))
        yield "do not fit projection", replace(one, layers={**one.layers, name: larger_layer})


def test_a_bank_is_held_once_and_its_place_given_back(groups: list[LayerGroup], adapters: list[AdapterFactors]) -> None:
    tables = SelectionTables(groups, SPEC, 3, CPU)
    first, other = adapters[0], adapters[1]
    assert first.selections is not None
    assert other.selections is not None
    shared = replace(other, selections=replace(other.selections, bank=first.selections.bank))
    tables.put(0, first)
    tables.put(1, shared)
    assert tables.tables[0].places[0] == tables.tables[0].places[1]
    for _ in range(4):  # were places lost, there would soon be none
        tables.put(0, other)
        check_slot(tables, groups, 0, other)
        tables.put(2, adapters[2])
        tables.put(0, first)
        assert tables.tables[0].places[0] == tables.tables[0].places[1]
    tables.clear(0)
    tables.clear(1)
    tables.put(0, other)  # where the bank was
    tables.put(1, first)
    check_slot(tables, groups, 0, other)
    check_slot(tables, groups, 1, first)
    place = int(tables.tables[0].places[1])
    tables.clear(1)
    new = replace(other, selections=replace(other.selections, bank=VectorBank(torch.ones(32, 16))))
    tables.put(1, new)
    assert tables.tables[0].places[1] == place, "where the first one's bank was"
    tables.put(2, first)
    assert tables.tables[0].places[2] != place
    check_slot(tables, groups, 2, first)


def test_a_bank_that_is_gone_leaves_no_place_to_a_later_one(
    groups: list[LayerGroup], adapters: list[AdapterFactors]
) -> None:
    """A bank is known by who it is, and another may come to lie where it lay."""
    tables = SelectionTables(groups, SPEC, 2, CPU)
    one = adapters[0]
    assert one.selections is not None
    for seed in range(20):
        bank = VectorBank.uniform(32, 16, bound=1.0, generator=torch.Generator().manual_seed(seed))
        tables.put(0, replace(one, selections=replace(one.selections, bank=bank)))
        at = int(tables.tables[0].places[0])
        assert torch.equal(tables.tables[0].banks.vectors[at, :64], bank.vectors.view(64, 8))
        del bank
        gc.collect()


def test_the_bytes_of_a_slot(groups: list[LayerGroup]) -> None:
    for kind in (SelectionTables, FactorTables):
        one, five = (kind(groups, SPEC, slots, CPU) for slots in (1, 5))
        grown = (held(five) - held(one)) / 4
        assert kind.slot_bytes(groups, SPEC) <= grown <= kind.slot_bytes(groups, SPEC) + 4 + 4 * 14, "places and ranks"


def held(tables: Tables) -> int:
    if isinstance(tables, FactorTables):
        return sum(t.nbytes for table in tables.tables for t in (table.a, table.b_t, table.ranks))
    storage = tables._storage
    parts = storage.indices, storage.weights, storage.ranks, storage.places, tables._banks.vectors
    return sum(t.nbytes for t in parts)


class TestTableBatch:
    @pytest.fixture
    def batch(self) -> tuple[TableBatch, list[list[object]]]:
        calls: list[list[object]] = []
        groups = [LayerGroup(("q", "k"), GroupShape(2, (3, 1))), LayerGroup(("other",), GroupShape(2, (3,)))]
        return TableBatch(groups, [Noted(group.names[0], calls) for group in groups]), calls  # type: ignore[misc]

    def test_the_first_of_a_group_shrinks_for_all(self, batch: tuple[TableBatch, list[list[object]]]) -> None:
        layers, calls = batch
        x = torch.ones(4, 1, 2)
        assert layers.add_delta("q", torch.zeros(4, 1, 3), x).shape == (4, 1, 3)
        layers.add_delta("k", torch.zeros(4, 1), x)
        layers.add_delta("none of these", torch.zeros(4, 1, 3), x)
        assert calls == [["q", (4, 2)], ["q", 0, (4, 3)], ["q", 1, (4, 1)]]

    def test_another_input_another_group_or_another_forward_shrinks_again(
        self, batch: tuple[TableBatch, list[list[object]]]
    ) -> None:
        layers, calls = batch
        x, y = torch.ones(4, 2), torch.ones(4, 2)
        for name, read in (("q", x), ("k", y), ("other", y), ("k", y)):
            layers.add_delta(name, torch.zeros(4, 3), read)
        layers.forget_input()
        layers.add_delta("k", torch.zeros(4, 3), y)
        assert [len(call) for call in calls] == [2, 3] * 5

    def test_an_output_is_added_to_where_it_is(self, batch: tuple[TableBatch, list[list[object]]]) -> None:
        output = torch.zeros(4, 1, 3)
        assert batch[0].add_delta("q", output, torch.ones(4, 1, 2)).data_ptr() == output.data_ptr()


class Noted:
    """What a GroupDelta was asked for."""

    def __init__(self, name: str, calls: list[list[object]]) -> None:
        self._name, self._calls = name, calls

    def shrink(self, x: torch.Tensor) -> None:
        self._calls.append([self._name, tuple(x.shape)])

    def add_projection(self, output: torch.Tensor, projection: int) -> None:
        self._calls.append([self._name, projection, tuple(output.shape)])


class TestResidency:
    @pytest.fixture
    def residency(self, groups: list[LayerGroup]) -> SlotResidency:
        self.tables = FactorTables(groups, SPEC, 2, CPU)
        self.groups = groups
        return SlotResidency(self.tables)

    def held(self, residency: SlotResidency, *adapters: AdapterFactors) -> list[int]:
        slots = residency.hold(adapters)
        assert slots is not None
        for adapter in adapters:
            check_slot(self.tables, self.groups, slots[adapter.digest], adapter)
        return [slots[adapter.digest] for adapter in adapters]

    def test_the_least_recently_used_makes_room(self, residency: SlotResidency, adapters: list[AdapterFactors]) -> None:
        a, b, c, _ = adapters
        first, second = self.held(residency, a, b)
        assert self.held(residency, a) == [first]
        assert self.held(residency, c) == [second]
        assert (residency.filled, residency.evicted, residency.resident) == (3, 1, 2)
        assert self.held(residency, a) == [first]

    def test_nobody_makes_room_for_a_neighbour(self, residency: SlotResidency, adapters: list[AdapterFactors]) -> None:
        a, b, c, _ = adapters
        self.held(residency, a, b)
        self.held(residency, c, a)  # b, though a was there first
        assert residency.hold([a, b, c]) is None
        assert residency.filled == 3

    def test_who_does_not_fit_is_tried_once(
        self, residency: SlotResidency, adapters: list[AdapterFactors], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved = replace(adapters[0], digest="saved", replaced={"model.norm": {"weight": torch.ones(64)}})
        self.held(residency, adapters[1])
        assert residency.hold([adapters[1], saved]) is None
        monkeypatch.setattr(self.tables, "put", None)
        assert residency.hold([adapters[1], saved]) is None
        assert self.held(residency, adapters[1]) is not None

    def test_a_copy_that_fails_leaves_nobody_half_there(
        self, residency: SlotResidency, adapters: list[AdapterFactors], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(self.tables, "put", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                residency.hold(adapters[:1])
        assert residency.resident == 0
        self.held(residency, *adapters[:2])
