"""What lies in the tables is the adapter: the reference composes it back, and it is the checkpoint's own factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters.kernels import reference
from adapters.kernels.delta import Pair
from adapters.kernels.tables import (
    NO_SLOT,
    BankTable,
    DoesNotFit,
    FactorTable,
    GroupShape,
    RowTable,
    SelectionTable,
)
from benchmarks.kernel_cases import CHECKED, KernelCase, build, random_checkpoint

CASE = KernelCase(32, (48, 16), rank=3, topk=3)


@pytest.mark.parametrize("pair", Pair, ids=lambda pair: pair.value)
@pytest.mark.parametrize("name", ["plain", "tiles of 3", "rank 5, topk 8", "more vectors than int16"])
def test_an_adapter_is_found_again(name: str, pair: Pair):
    group = build(CHECKED[name])
    for slot, (checkpoint, names) in enumerate(zip(group.checkpoints, group.names, strict=True)):
        for projection, (_, a, b_t) in enumerate(checkpoint.factors()):
            found_a, found_b = reference.factors(group.table(pair), slot, projection)
            if names[projection] is None:
                assert len(found_a) == len(found_b) == 0
            else:
                torch.testing.assert_close(found_a, a.double(), rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(found_b, b_t.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pieces", [2, 4, 16])
def test_longer_vectors_are_cut_to_the_tables_length(pieces: int):
    checkpoint = random_checkpoint(CASE, None, torch.Generator().manual_seed(0))
    banks = BankTable(1, CASE.num_vectors * pieces, CASE.vector_length // pieces)
    table = SelectionTable(CASE.shape, banks, slots=2, rank=4, topk=4)
    banks.put(0, checkpoint.bank)
    table.put(1, checkpoint, ["p0", "p1"], place=0)
    for projection, (_, a, b_t) in enumerate(checkpoint.factors()):
        found_a, found_b = reference.factors(table, 1, projection)
        torch.testing.assert_close(found_a, a.double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_b, b_t.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("num_vectors", "dtype"), [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)]
)
def test_indices_are_as_narrow_as_the_bank_allows(num_vectors: int, dtype: torch.dtype):
    table = SelectionTable(GroupShape(2, (2,)), BankTable(1, num_vectors, 2), slots=1, rank=1, topk=1)
    assert table.indices.dtype == dtype


def test_columns_lie_side_by_side():
    assert list(GroupShape(8, (4, 12, 2)).columns()) == [slice(0, 4), slice(4, 16), slice(16, 18)]


class TestRows:
    def test_rows_beyond_those_set_are_the_bases(self):
        rows = RowTable(3, 2)
        rows.set([[(4, 1.0)], [(1, 0.25), (2, -3.5)], [(7, 1.0)]])
        assert rows.slots.tolist() == [[4, NO_SLOT], [1, 2], [7, NO_SLOT]]
        assert rows.weights.tolist() == [[1.0, 0.0], [0.25, -3.5], [1.0, 0.0]]
        rows.set([[], [(5, 2.0)]])
        assert rows.slots.tolist() == [[NO_SLOT, NO_SLOT], [5, NO_SLOT], [NO_SLOT, NO_SLOT]]

    def test_nothing_moves(self):
        """A captured graph reads where it read first."""
        rows = RowTable(3, 2)
        before = rows.slots.data_ptr(), rows.weights.data_ptr()
        rows.set([[(4, 1.0)]])
        assert (rows.slots.data_ptr(), rows.weights.data_ptr()) == before

    @pytest.mark.parametrize("selections", [[[]] * 4, [[(0, 1.0)] * 3]])
    def test_more_than_there_is_room_for(self, selections: list[list[tuple[int, float]]]):
        with pytest.raises(DoesNotFit, match="3 rows of 2"):
            RowTable(3, 2).set(selections)


class TestDoesNotFit:
    def table(self) -> SelectionTable:
        banks = BankTable(1, CASE.num_vectors, CASE.vector_length)
        return SelectionTable(CASE.shape, banks, slots=1, rank=CASE.rank, topk=CASE.topk)

    @pytest.mark.parametrize("change", [{"rank": 4}, {"topk": 4}, {"num_vectors": 17}, {"out_features": (16, 48)}])
    def test_a_larger_adapter_changes_nothing(self, change: dict[str, int]):
        table = self.table()
        table.put(0, random_checkpoint(CASE, None, torch.Generator()), ["p0", "p1"], place=0)
        before = table.ranks.clone(), table.indices.clone(), table.weights.clone()
        with pytest.raises(DoesNotFit):
            table.put(0, random_checkpoint(replace(CASE, **change), None, torch.Generator()), ["p0", "p1"], place=0)
        assert all(map(torch.equal, (table.ranks, table.indices, table.weights), before))

    def test_vectors_that_do_not_tile(self):
        with pytest.raises(DoesNotFit, match="do not tile 24"):
            SelectionTable(GroupShape(32, (24,)), BankTable(1, 4, 16), slots=1, rank=1, topk=1)
        with pytest.raises(DoesNotFit, match="4 vectors of 24"):
            BankTable(1, 4, 16).put(
                0,
                random_checkpoint(KernelCase(24, (24,), num_vectors=4, vector_length=24), None, torch.Generator()).bank,
            )

    def test_tables_of_other_types(self):
        with pytest.raises(DoesNotFit, match="int8"):
            BankTable(1, 4, 16, dtype=torch.int8)
        with pytest.raises(DoesNotFit, match="float64"):
            FactorTable(GroupShape(4, (4,)), slots=1, rank=1, dtype=torch.float64)

    @pytest.mark.parametrize(
        ("a", "b_t"), [((3, 4), (3, 6)), ((2, 5), (2, 6)), ((2, 4), (2, 5)), ((1, 4), (2, 6))], ids=str
    )
    def test_factors_of_another_shape(self, a: tuple[int, int], b_t: tuple[int, int]):
        table = FactorTable(GroupShape(4, (6,)), slots=1, rank=2)
        with pytest.raises(DoesNotFit):
            table.put(0, [(torch.ones(a), torch.ones(b_t))])
        assert not table.ranks.any()
