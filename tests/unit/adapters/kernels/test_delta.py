"""Which pair runs, and what is refused before one does."""

from __future__ import annotations

import sys

import pytest
import torch

import adapters.kernels
from adapters.kernels.blocks import FactorBlocks, TileBlocks
from adapters.kernels.delta import GroupDelta, Pair, Timings, TritonMissing
from adapters.kernels.tables import BankTable, DoesNotFit, FactorTable, GroupShape, RowTable, SelectionTable

SHAPE = GroupShape(16, (16, 8))
TIMINGS = Timings(
    {
        8: {Pair.BANK_DIRECT: 9.0, Pair.GATHERED: 5.0},
        64: {Pair.BANK_DIRECT: 20.0, Pair.GATHERED: 30.0},
    }
)


def factor_table() -> FactorTable:
    return FactorTable(SHAPE, slots=2, rank=2)


def selection_table(shape: GroupShape = SHAPE) -> SelectionTable:
    return SelectionTable(shape, BankTable(2, 4, 8), slots=2, rank=2, topk=2)


class TestWithoutTriton:
    def test_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        for pair in Pair:
            monkeypatch.delitem(sys.modules, f"adapters.kernels.{pair.value}", raising=False)
            monkeypatch.delattr(adapters.kernels, pair.value, raising=False)
            with pytest.raises(TritonMissing, match="vblora-serve\\[kernels\\]"):
                GroupDelta(RowTable(4), selections=selection_table(), factors=factor_table(), choice=pair)


class TestTimings:
    @pytest.mark.parametrize(
        ("rows", "pair"),
        [
            (1, Pair.GATHERED),
            (8, Pair.GATHERED),
            (9, Pair.BANK_DIRECT),
            (64, Pair.BANK_DIRECT),
            (65, Pair.BANK_DIRECT),
        ],
    )
    def test_the_faster_at_the_next_number_of_rows_that_was_measured(self, rows: int, pair: Pair):
        assert TIMINGS.faster(rows) is pair

    def test_nothing_was_measured(self):
        with pytest.raises(ValueError, match="name the pair"):
            Timings({}).faster(1)


class TestBlocks:
    """They depend on shapes alone, are powers of two, and cover what they must."""

    @pytest.mark.parametrize("rank", [1, 4, 5, 64])
    @pytest.mark.parametrize("length", [1, 3, 16, 256, 320, 4096])
    @pytest.mark.parametrize("tiles", [1, 7, 16, 688])
    def test_of_tiles(self, rank: int, length: int, tiles: int):
        blocks = TileBlocks.of(rank=rank, vector_length=length, in_tiles=tiles)
        for size in (blocks.ranks, blocks.tiles, blocks.features):
            assert size & (size - 1) == 0
        assert blocks.ranks * blocks.tiles * blocks.features <= 2048
        assert 1 <= blocks.splits <= 8

    def test_of_a_7b_models_attention(self):
        assert TileBlocks.of(rank=4, vector_length=256, in_tiles=16) == TileBlocks(4, 1, 256, 8)
        assert FactorBlocks.of(rank=4, in_features=4096) == FactorBlocks(4, 256, 8)


@pytest.mark.usefixtures("triton")
class TestChoice:
    @pytest.fixture
    def triton(self) -> None:
        pytest.importorskip("triton", reason="Triton is not installed (the extra `kernels`, on Linux)")

    def test_by_name(self):
        for pair in Pair:
            delta = GroupDelta(RowTable(4), selections=selection_table(), factors=factor_table(), choice=pair)
            assert delta.pair(1) is delta.pair(64) is pair

    def test_by_measurement(self):
        delta = GroupDelta(RowTable(64), selections=selection_table(), factors=factor_table(), choice=TIMINGS)
        assert [delta.pair(rows) for rows in (8, 64)] == [Pair.GATHERED, Pair.BANK_DIRECT]

    def test_one_table_is_enough_for_one_pair(self):
        GroupDelta(RowTable(4), factors=factor_table(), choice=Pair.GATHERED)
        with pytest.raises(DoesNotFit, match="no table for bank_direct"):
            GroupDelta(RowTable(4), factors=factor_table(), choice=Pair.BANK_DIRECT)
        with pytest.raises(DoesNotFit, match="no table for bank_direct"):
            GroupDelta(RowTable(4), factors=factor_table(), choice=TIMINGS)

    def test_tables_of_one_group(self):
        other = selection_table(GroupShape(16, (8, 16)))
        with pytest.raises(DoesNotFit, match="one shape"):
            GroupDelta(RowTable(4), selections=other, factors=factor_table(), choice=Pair.GATHERED)
        with pytest.raises(DoesNotFit, match="one shape"):
            GroupDelta(RowTable(4), choice=Pair.GATHERED)

    @pytest.mark.parametrize(
        ("x", "output"),
        [
            (torch.zeros(4, 15), torch.zeros(4, 24)),
            (torch.zeros(4, 16), torch.zeros(4, 23)),
            (torch.zeros(1, 4, 16), torch.zeros(1, 4, 24)),
            (torch.zeros(5, 16), torch.zeros(5, 24)),
            (torch.zeros(3, 16), torch.zeros(4, 24)),
            (torch.zeros(4, 16).double(), torch.zeros(4, 24)),
            (torch.zeros(4, 16), torch.zeros(24, 4).T),
            (torch.zeros(4, 16, device="meta"), torch.zeros(4, 24)),
        ],
    )
    def test_tensors_that_do_not_fit(self, x: torch.Tensor, output: torch.Tensor):
        delta = GroupDelta(RowTable(4), factors=factor_table(), choice=Pair.GATHERED)
        for run in (delta.write, delta.add_to):
            with pytest.raises(DoesNotFit):
                run(output, x)
