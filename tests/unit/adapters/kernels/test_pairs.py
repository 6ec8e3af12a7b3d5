"""Both pairs of kernels, run by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters.kernels import reference
from adapters.kernels.delta import GroupDelta, Pair
from benchmarks.kernel_cases import CHECKED, KernelCase, KernelGroup, build, random_checkpoint, tolerance
from tests.graphs import no_host

pytest.importorskip("triton", reason="Triton is not installed (the extra `kernels`, on Linux)")

SMALL = KernelCase(32, (48, 16, 32), rank=3, topk=3, rows=4)
both = pytest.mark.parametrize("pair", Pair, ids=lambda pair: pair.value)


@both
@pytest.mark.parametrize("name", CHECKED)
def test_every_row_equals_the_reference(name: str, pair: Pair):
    group = build(CHECKED[name])
    assert group.error(pair) < tolerance(group.case.dtype, "cpu")


@both
@pytest.mark.parametrize("seed", range(1, 5))
def test_other_adapters_and_rows(seed: int, pair: Pair):
    assert build(SMALL, seed=seed).error(pair) < tolerance(torch.float32, "cpu")


@both
def test_a_rows_result_is_the_same_to_the_bit_in_any_batch(pair: Pair):
    """Whatever its place, its neighbours, and the number of rows."""
    group = build(SMALL)
    selections = [[(1, 1.0)], [(2, 0.5), (3, -1.0)], [], [(1, 1.0)]]
    group.rows.set(selections)
    group.x[3] = group.x[0]
    together = group.written(pair)
    assert torch.equal(together[0], together[3]), "the same adapter and input in two rows"
    for row, selection in enumerate(selections):
        group.rows.set([selection])
        alone = group.output()[:1]
        group.delta(pair).write(alone, group.x[row : row + 1])
        assert torch.equal(alone[0], together[row])


@both
@pytest.mark.parametrize("name", ["plain", "tiles of 3", "tiles of 320", "blends of 4", "bfloat16"])
def test_each_projection_into_an_output_of_its_own(name: str, pair: Pair):
    """The bits are those of all at once."""
    group = build(CHECKED[name])
    delta, together = group.delta(pair), torch.randn(len(group.x), group.case.shape.total_out).to(group.x.dtype)
    apart = [together[:, columns].clone() for columns in group.case.shape.columns()]
    delta.add_to(together, group.x)
    delta.shrink(group.x)
    for projection in reversed(range(len(apart))):
        delta.add_projection(apart[projection], projection)
    assert torch.equal(torch.cat(apart, 1), together)


@both
@pytest.mark.parametrize("name", CHECKED)
def test_the_kernels_stand_in_computes_what_they_do(name: str, pair: Pair):
    """Where there is no GPU, and without a look at the tables from the host."""
    group = build(CHECKED[name])
    delta = GroupDelta(group.rows, selections=group.selections, factors=group.factors, choice=pair, kernels=reference)
    exact = reference.delta(group.x, group.table(pair), group.rows)
    output = group.output()
    with no_host():
        delta.write(output, group.x)
    assert float((output.double() - exact).abs().max() / exact.abs().max()) < tolerance(group.case.dtype, "cpu")
    apart = [torch.full_like(output[:, columns], -0.0) for columns in group.case.shape.columns()]
    with no_host():
        delta.shrink(group.x)
        for projection, each in enumerate(apart):
            delta.add_projection(each, projection)
    torch.testing.assert_close(torch.cat(apart, 1), output)
    assert apart[0][0].signbit().all(), "the base's own bits"


class TestBaseRows:
    @both
    def test_they_are_written_as_exact_zeros(self, pair: Pair):
        """Whatever their input is, and what was in the output."""
        group = build(SMALL)
        group.x[0] = float("nan")
        written = group.written(pair)
        assert written[0].eq(0).all()
        assert written.isfinite().all()

    @both
    def test_adding_leaves_their_bits_alone(self, pair: Pair):
        group = build(SMALL)
        output = torch.randn(4, group.case.shape.total_out)
        output[0, ::3], output[0, 1::3] = -0.0, float("nan")
        before = output.clone()
        group.delta(pair).add_to(output, group.x)
        assert torch.equal(output[0].view(torch.int32), before[0].view(torch.int32))
        assert not torch.equal(output[1], before[1])

    @both
    def test_a_projection_that_an_adapter_lacks_is_the_bases(self, pair: Pair):
        group = build(SMALL)
        lacking = group.names[1].index(None)
        group.rows.set([[(1, 1.0)]] * 4)
        output = torch.full((4, group.case.shape.total_out), -0.0)
        group.delta(pair).add_to(output, group.x)
        for projection, columns in enumerate(group.case.shape.columns()):
            untouched = output[:, columns].view(torch.int32) == torch.tensor(-0.0).view(torch.int32)
            assert bool(untouched.all()) == (projection == lacking)

    @both
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the interpreter
    def test_an_overflow_stays_in_its_row(self, pair: Pair):
        group = build(SMALL)
        expected = group.written(pair)
        group.x[1] = float("inf")
        written = group.written(pair)
        assert torch.equal(written[[0, 2, 3]], expected[[0, 2, 3]])
        assert not written[1].isfinite().all()


class TestAdding:
    @both
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_the_sum_is_rounded_once(self, pair: Pair, dtype: torch.dtype):
        group = build(replace(SMALL, dtype=dtype))
        output = torch.randn(4, group.case.shape.total_out).to(dtype)
        exact = output.double() + reference.delta(group.x, group.table(pair), group.rows)
        group.delta(pair).add_to(output, group.x)
        error = (output.double() - exact).abs().max() / exact.abs().max()
        assert error < tolerance(dtype, "cpu")

    @both
    def test_a_blend_whose_last_member_lacks_a_projection(self, pair: Pair):
        group = build(SMALL)
        assert None in group.names[1]
        group.rows.set([[(0, 1.0), (1, 1.0)], [(1, 1.0), (0, 1.0)]] * 2)
        output = torch.randn(4, group.case.shape.total_out)
        exact = output.double() + reference.delta(group.x, group.table(pair), group.rows)
        group.delta(pair).add_to(output, group.x)
        torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)

    @both
    def test_into_columns_of_a_wider_tensor(self, pair: Pair):
        """Rows need not lie one after the other, only be contiguous each."""
        group, expected = build(SMALL), build(SMALL).written(pair)
        wide = torch.full((4, 200), 7.0)
        columns = slice(50, 50 + group.case.shape.total_out)
        x = torch.cat((torch.zeros(4, 3), group.x), 1)[:, 3:]
        group.delta(pair).write(wide[:, columns], x)
        assert torch.equal(wide[:, columns], expected)
        assert wide[:, : columns.start].eq(7).all()
        assert wide[:, columns.stop :].eq(7).all()


class TestBlends:
    @both
    def test_a_blend_is_the_weighted_sum_of_its_members(self, pair: Pair):
        group = build(SMALL)
        group.x[:] = group.x[0]
        group.rows.set([[(1, 1.0)], [(2, 1.0)], [(1, 0.7), (2, -1.3)], [(2, -1.3), (1, 0.7)]])
        one, other, blend, turned = group.written(pair)
        torch.testing.assert_close(blend, 0.7 * one - 1.3 * other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(turned, blend, rtol=1e-5, atol=1e-5)

    @both
    def test_an_adapter_less_itself_is_nothing(self, pair: Pair):
        group = build(SMALL)
        group.rows.set([[(1, 2.5), (1, -2.5)]])
        output = group.output()[:1]
        group.delta(pair).write(output, group.x[:1])
        assert output.abs().max() < 1e-5


class TestChange:
    """Tables are rewritten in place, as under a captured graph: the same launches then compute something else."""

    @both
    def test_another_mix_is_another_row_table(self, pair: Pair):
        group = build(SMALL)
        delta, output = group.delta(pair), group.output()
        for selections in ([[(0, 1.0)]] * 4, [[], [(3, 1.0)]], []):
            group.rows.set(selections)
            delta.write(output, group.x)
            exact = reference.delta(group.x, group.table(pair), group.rows)
            torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
        assert output.eq(0).all()

    @both
    def test_another_adapter_in_a_slot(self, pair: Pair):
        """Of a lower rank: what the last one left in the table is not seen."""
        group = build(SMALL)
        smaller = random_checkpoint(replace(SMALL, rank=1, topk=1), None, torch.Generator().manual_seed(9))
        group.put(0, smaller, ["p0", None, "p2"])
        assert group.error(pair) < tolerance(torch.float32, "cpu")
        row = group.written(pair)[1]
        for projection, (layer, a, b_t) in enumerate(smaller.factors()):
            columns = list(group.case.shape.columns())[projection]
            expected = torch.zeros(layer.out_features) if projection == 1 else group.x[1] @ a.T @ b_t
            torch.testing.assert_close(row[columns], expected, rtol=1e-5, atol=1e-5)

    @both
    def test_a_cleared_slot_is_the_base(self, pair: Pair):
        group = build(SMALL)
        group.table(pair).clear(0)
        assert group.written(pair)[1].eq(0).all()


def test_both_pairs_compute_the_same():
    group: KernelGroup = build(SMALL, seed=7)
    group.rows.set([[(slot, 1.0)] for slot in range(4)])
    direct, gathered = (group.written(pair) for pair in Pair)
    torch.testing.assert_close(direct, gathered, rtol=1e-5, atol=1e-5)


@both
def test_fewer_rows_than_the_table_has(pair: Pair):
    group = build(SMALL)
    output = group.output()[:2]
    group.delta(pair).write(output, group.x[:2])
    torch.testing.assert_close(output, group.written(pair)[:2], rtol=0, atol=0)
    nothing = group.output()[:0]
    group.delta(pair).write(nothing, group.x[:0])


def test_adapters_on_one_bank_share_its_place():
    group = build(SMALL)
    first, second = group.checkpoints[0], group.checkpoints[2]
    related = replace(second, bank=first.bank)
    group.selections.put(2, related, group.names[2], place=0)
    group.rows.set([[(0, 1.0)], [(2, 1.0)]])
    written = group.written(Pair.BANK_DIRECT)
    for columns, (_, a, b_t), name in zip(group.case.shape.columns(), related.factors(), group.names[2], strict=True):
        assert name is not None
        torch.testing.assert_close(written[1, columns], group.x[1] @ a.T @ b_t, rtol=1e-5, atol=1e-5)
