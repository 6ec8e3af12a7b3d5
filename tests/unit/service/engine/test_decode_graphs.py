"""What replayed steps leave alone, what runs eagerly instead, and what becomes of graphs that fail."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.factors import AdapterFactors
from adapters.kernels import choice, reference
from adapters.kernels.delta import Pair
from adapters.kernels.model_tables import SelectionTables
from adapters.low_rank import LowRankBatch
from adapters.merge import Merger
from adapters.targets import LayerShape
from service.assembly import _engine_options
from service.engine.base_model import LoadedBase, load_base
from service.engine.graphs.capture import CaptureFailed, CudaGraphs, GraphBackend, Recorded, Step
from service.engine.graphs.decode import DecodeGraphs
from service.engine.graphs.setup import CHOICES, PAIRS, GraphOptions, attach_graphs, groups_of, table_spec
from service.engine.kv.rows import RowsBackend
from service.engine.kv.slots import SlotBackend
from service.engine.model_runner import TransformersRunner
from service.engine.self_test import choose_runner
from service.settings import SETTINGS, Settings
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.graphs import Guarded, HostNeeded, no_host, options
from tests.lora_factory import make_lora
from tests.unit.adapters.support import factors

CPU = torch.device("cpu")
TEXTS = [list(b"a row of its own"), list(b"another"), list(b"the third"), list(b"and a fourth one")]
LONG = list(b"0123456789" * 12)
ROWS = 5  # that there is room for
LENGTH = 128


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_base(str(save_model(tiny_model("llama"), tmp_path_factory.mktemp("base"))), device="cpu")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFactors]:
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("adapters")
    return [factors(make_adapter(model, AdapterSpec(seed=i), folder / f"{i}")) for i in range(6)]


@dataclass
class Bench:
    """Two runners over one model, one without graphs: both do the same, and must answer the same."""

    eager: TransformersRunner
    runner: TransformersRunner

    @property
    def graphs(self) -> DecodeGraphs:
        assert self.runner.graphs is not None
        return self.runner.graphs

    @property
    def kv(self) -> SlotBackend:
        assert isinstance(self.runner.kv, SlotBackend)
        return self.runner.kv

    def begin(self, texts: Sequence[Sequence[int]]) -> None:
        for runner in (self.eager, self.runner):
            first = runner.rows
            runner.add(len(texts))
            runner.extend(range(first, first + len(texts)), texts, None)

    def decode(self, rows: Sequence[int], batch: LowRankBatch | None = None) -> Tensor:
        tokens = [[40 + row] for row in rows]
        expected, answer = (runner.extend(rows, tokens, batch) for runner in (self.eager, self.runner))
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-3)
        return answer

    def keep(self, rows: Sequence[int]) -> None:
        self.eager.keep(rows)
        self.runner.keep(rows)


def runner_of(base: LoadedBase, kv_memory: int = 1 << 28) -> TransformersRunner:
    runner, _ = choose_runner(base.adapted, CPU, base.vocabulary, kv_memory, 256)
    runner.kv.reserve(ROWS, LENGTH)
    return runner


def bench_of(
    base: LoadedBase,
    adapters: Sequence[AdapterFactors],
    backend: GraphBackend | None = None,
    kernels: str = "bank-direct",
    **others: Any,
) -> Bench:
    runner = runner_of(base)
    layouts = [adapter.selections.layout for adapter in adapters if adapter.selections is not None]
    attach_graphs(base, runner, layouts, options(kernels, **others), backend or Guarded())
    return Bench(runner_of(base), runner)


@pytest.fixture
def bench(base: LoadedBase, adapters: Sequence[AdapterFactors]) -> Bench:
    return bench_of(base, adapters)


def mixed(adapters: Sequence[AdapterFactors], *rows: Mapping[int, float]) -> LowRankBatch:
    """Each row's weights by number of adapter."""
    present = sorted({number for row in rows for number in row})
    weights = torch.tensor([[row.get(number, 0.0) for number in present] for row in rows])
    return LowRankBatch([adapters[number] for number in present], weights)


class TestReplays:
    def test_rows_come_and_go_and_no_step_is_captured(self, bench: Bench, adapters: list[AdapterFactors]) -> None:
        captured = bench.graphs.captures
        bench.begin(TEXTS[:2])
        alone = bench.decode(range(2), mixed(adapters, {0: 1.0}, {}))
        bench.begin(TEXTS[2:])
        bench.decode(range(4), mixed(adapters, {0: 1.0}, {1: 1.0, 2: -0.5}, {}, {3: 0.7}))
        bench.keep([3, 1])
        bench.decode(range(2), mixed(adapters, {4: 1.0}, {5: 1.0}))
        bench.decode(range(1), None)
        bench.keep([])
        bench.begin(TEXTS[:2])
        torch.testing.assert_close(bench.decode(range(2), mixed(adapters, {0: 1.0}, {})), alone)
        assert bench.graphs.captures == captured
        assert bench.graphs.replayed == 5 + 1, "the first is the test at load"
        assert not bench.graphs.eager

    def test_a_block_takes_eleven_launches(self, base: LoadedBase, adapters: list[AdapterFactors]) -> None:
        """One shrink for each input, one expand for each layer, whoever is in the batch."""
        launches: list[str] = []
        counting: Any = SimpleNamespace(
            shrink=lambda *arguments: (launches.append("shrink"), reference.shrink(*arguments)),
            expand=lambda *arguments, **others: (launches.append("expand"), reference.expand(*arguments, **others)),
        )
        bench = bench_of(base, adapters, Recorded(kernels=counting))
        bench.begin(TEXTS[:2])
        for batch in (None, mixed(adapters, {0: 1.0}, {1: 0.5, 2: 0.5})):
            launches.clear()
            bench.decode(range(2), batch)
            assert Counter(launches) == {"shrink": 2 * 4, "expand": 2 * 7}

    def test_one_rows_weights_stand_for_all(self, bench: Bench, adapters: list[AdapterFactors]) -> None:
        bench.begin(TEXTS[:3])
        bench.decode(range(3), LowRankBatch(adapters[:1], torch.tensor([[0.5]])))
        assert not bench.graphs.eager

    def test_the_same_batch_is_told_again_when_its_slot_has_become_anothers(
        self, base: LoadedBase, adapters: list[AdapterFactors]
    ) -> None:
        one_slot = bench_of(base, adapters, memory=1)
        assert one_slot.runner.graphs is None, "not even one fits"
        bench = bench_of(base, adapters, memory=slot_bytes(base, adapters))
        assert bench.graphs.residency.slots == 1
        bench.begin(TEXTS[:1])
        one, other = (mixed(adapters, {number: 1.0}) for number in range(2))
        for batch in (one, other, one, other):
            bench.decode(range(1), batch)
        assert bench.graphs.residency.evicted == 3
        bench.begin(TEXTS[1:2])
        bench.decode(range(2), mixed(adapters, {0: 1.0}, {1: 1.0}))
        assert bench.graphs.eager == {"adapter": 1}, "two in a step are more than there are slots"

    def test_a_step_that_ran_eagerly_may_have_taken_slots_all_the_same(
        self, base: LoadedBase, adapters: list[AdapterFactors]
    ) -> None:
        bench = bench_of(base, adapters, memory=2 * slot_bytes(base, adapters))
        saved = replace(adapters[0], digest="saved", replaced={"model.norm": {"weight": torch.ones(64)}})
        bench.begin(TEXTS[:1])
        batch = mixed(adapters, {0: 1.0})
        bench.decode(range(1), batch)
        bench.decode(range(1), mixed(adapters, {1: 1.0}))
        bench.decode(range(1), batch)
        bench.decode(range(1), LowRankBatch([adapters[2], saved], torch.tensor([[1.0, 0.0]])))
        another = replace(saved, digest="another")
        bench.decode(range(1), LowRankBatch([adapters[3], another], torch.tensor([[1.0, 0.0]])))
        bench.decode(range(1), batch)
        assert bench.graphs.eager == {"adapter": 2}

    def test_rows_that_fill_the_batch_disturb_nobody(self, bench: Bench) -> None:
        """Three rows run as four, and the fourth's place is that of a row whose prompt still runs."""
        bench.begin(TEXTS)
        before = [(layer.keys[3:].clone(), layer.values[3:].clone()) for layer in bench.kv._layers]
        bench.decode(range(3))
        assert not bench.graphs.eager
        for layer, (keys, values) in zip(bench.kv._layers, before, strict=True):
            assert torch.equal(layer.keys[3:, :, :-1], keys[:, :, :-1])
            assert torch.equal(layer.values[3:, :, :-1], values[:, :, :-1])
        bench.decode(range(4))

    def test_a_sick_row_harms_no_other(self, bench: Bench) -> None:
        bench.begin(TEXTS[:3])
        bench.kv._layers[0].values[1, :, 0] = float("nan")
        tokens = [[40], [41], [42]]
        expected, answer = (runner.extend(range(3), tokens, None) for runner in (bench.eager, bench.runner))
        torch.testing.assert_close(answer[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-3)
        assert answer[1].isnan().any()

    def test_a_step_that_raised_can_be_tried_again(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        bench.begin(TEXTS[:2])
        lengths = [bench.kv.length(row) for row in range(2)]
        with monkeypatch.context() as patched:
            patched.setattr(bench.kv, "begin_decode", raising(MemoryError("no room")))
            with pytest.raises(MemoryError):
                bench.runner.extend(range(2), [[1], [2]], None)
        assert [bench.kv.length(row) for row in range(2)] == lengths
        bench.decode(range(2))
        assert not bench.graphs.eager


class TestEagerly:
    """What does not fit, one step at a time."""

    def test_rows_in_another_order_or_not_from_the_first(self, bench: Bench) -> None:
        bench.begin(TEXTS[:3])
        bench.decode([1, 2])
        bench.decode([1, 0])
        assert bench.graphs.eager == {"rows": 2}
        bench.decode(range(3))
        assert bench.graphs.eager == {"rows": 2}

    def test_prompts_are_no_decode_steps(self, bench: Bench) -> None:
        bench.begin([*TEXTS[:1], [65]])
        bench.runner.extend([0], [[1, 2]], None)
        bench.runner.extend([0], [[1]], None, every_position=True)
        assert not bench.graphs.eager

    def test_blends_of_more_than_the_table_is_wide(self, bench: Bench, adapters: list[AdapterFactors]) -> None:
        bench.begin(TEXTS[:2])
        wide = mixed(adapters, dict.fromkeys(range(5), 0.2), {0: 1.0})
        narrow = mixed(adapters, dict.fromkeys(range(4), 0.25), {0: 1.0})
        for batch in (narrow, wide, narrow):
            bench.decode(range(2), batch)
        assert bench.graphs.eager == {"blend": 1}

    @pytest.mark.parametrize("kernels", PAIRS)
    def test_adapters_that_fit_no_table(
        self, base: LoadedBase, adapters: list[AdapterFactors], kernels: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        model, folder = tiny_model("llama"), tmp_path_factory.mktemp("unfit")
        high_rank = AdapterFactors("lora", factors(make_lora(model, folder / "lora", r=32)).layers)
        saved = replace(adapters[0], digest="saved", replaced={"model.norm": {"weight": torch.ones(64)}})
        output_layer = factors(make_adapter(model, AdapterSpec(target_modules=["lm_head", "q_proj"]), folder / "head"))
        bench = bench_of(base, adapters, kernels=kernels)
        bench.begin(TEXTS[:2])
        for each in (high_rank, saved, output_layer):
            bench.decode(range(2), LowRankBatch([adapters[1], each], torch.eye(2)))
            bench.decode(range(2), LowRankBatch([adapters[1], each], torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
        bench.decode(range(2), mixed(adapters, {1: 1.0}, {}))
        assert bench.graphs.eager == {"adapter": 6}

    def test_a_plain_lora_of_low_rank_is_gathered(
        self, base: LoadedBase, adapters: list[AdapterFactors], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        lora = factors(make_lora(tiny_model("llama"), tmp_path_factory.mktemp("lora") / "lora", r=4))
        batch = LowRankBatch([adapters[1], lora], torch.tensor([[1.0, 0.0], [0.3, 1.0]]))
        gathered, direct = (bench_of(base, adapters, kernels=kernels) for kernels in ("gathered", "bank-direct"))
        for bench in (gathered, direct):
            bench.begin(TEXTS[:2])
            bench.decode(range(2), batch)
        assert not gathered.graphs.eager
        assert direct.graphs.eager == {"adapter": 1}

    def test_a_fold_that_moved_a_parameter(self, adapters: list[AdapterFactors], tmp_path: Any) -> None:
        """Tied embeddings get a weight of their own for the time of a fold, which graphs do not read."""
        model = tiny_model("gpt2")
        base = load_base(str(save_model(model, tmp_path / "base")), device="cpu")
        head = factors(make_adapter(model, AdapterSpec(target_modules=["lm_head", "c_attn"]), tmp_path / "head"))
        inner = factors(make_adapter(model, AdapterSpec(target_modules=["c_attn"]), tmp_path / "inner"))
        bench = bench_of(base, [inner])
        bench.begin(TEXTS[:2])
        merger = Merger(base.adapted)
        plain = bench.decode(range(2))
        merger.fold([(inner, 1.0)])
        assert not torch.allclose(bench.decode(range(2)), plain, atol=0.1)
        assert not bench.graphs.eager, "nothing has moved"
        merger.fold([(head, 1.0)])
        bench.decode(range(2))
        assert bench.graphs.eager["folded"] == len(base.adapted.moved)
        merger.restore()
        assert not base.adapted.moved
        base.adapted.moved.add("lm_head")
        before = bench.graphs.eager["folded"]
        bench.decode(range(2))
        assert bench.graphs.eager["folded"] == before + 1
        base.adapted.moved.clear()
        bench.decode(range(2))
        assert bench.graphs.eager["folded"] == before + 1

    def test_beyond_what_was_reserved_and_back(self, bench: Bench) -> None:
        """Keys and values have moved: the graphs read where they were, and are captured anew."""
        captured = bench.graphs.captures
        bench.begin([LONG, TEXTS[0]])
        for _ in range(LENGTH - len(LONG)):
            bench.decode(range(2))
        assert not bench.graphs.eager
        bench.decode(range(2))
        assert bench.graphs.eager == {"size": 1}
        bench.keep([1])
        bench.decode(range(1))
        bench.keep([])
        bench.begin(TEXTS[:2])
        bench.decode(range(2))
        assert bench.graphs.eager == {"size": 1}
        assert bench.graphs.captures == captured + 2

    def test_more_rows_than_were_reserved(self, bench: Bench) -> None:
        bench.begin(TEXTS + TEXTS[:2])
        bench.decode(range(ROWS + 1))
        assert bench.graphs.eager == {"size": 1}

    def test_slots_given_up_for_want_of_memory(self, base: LoadedBase, adapters: list[AdapterFactors]) -> None:
        """Two long rows take the room of all five, so a step of three that would run as four does not."""
        runner, eager = (runner_of(base, kv_memory=2 * ROWS * (LENGTH + 1) * 512) for _ in range(2))
        attach_graphs(base, runner, [], options("bank-direct"), Guarded())
        bench = Bench(eager, runner)
        bench.begin([LONG + LONG[:80], TEXTS[0], TEXTS[1]])
        assert bench.kv.slots == 3
        bench.decode(range(3))
        assert bench.graphs.eager == {"size": 1}, "longer than any bucket"
        bench.keep([1, 2])
        bench.decode(range(2))
        bench.begin(TEXTS[2:3])
        assert bench.kv.slots == 3
        bench.decode(range(3))
        assert bench.graphs.eager == {"size": 2}, "would run as four"


class TestFailures:
    def test_one_that_fails_in_a_replay_is_the_last(
        self, base: LoadedBase, adapters: list[AdapterFactors], caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = Breaking()
        bench = bench_of(base, adapters, backend)
        bench.begin(TEXTS[:2])
        bench.decode(range(2))
        backend.error = RuntimeError("out of luck")
        for _ in range(2):
            bench.decode(range(2), mixed(adapters, {0: 1.0}, {}))
        assert bench.graphs.eager == {"failed": 2}
        assert len([r for r in caplog.records if "without graphs from now on" in r.message]) == 1

    def test_what_leaves_the_device_unknown_is_raised(self, base: LoadedBase, adapters: list[AdapterFactors]) -> None:
        backend = Breaking()
        bench = bench_of(base, adapters, backend)
        bench.begin(TEXTS[:1])
        backend.error = torch.AcceleratorError("an illegal access")
        with pytest.raises(torch.AcceleratorError):
            bench.runner.extend([0], [[1]], None)

    def test_what_cuda_refuses_to_capture_is_no_failure_of_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both come as the same error: the device is asked afterwards."""
        graphs = CudaGraphs(torch.device("cuda"))
        monkeypatch.setattr(graphs, "_captured", raising(torch.AcceleratorError("not permitted while capturing")))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        with pytest.raises(CaptureFailed, match="not permitted while capturing"):
            graphs.capture(lambda: None)
        assert graphs.captures == 0
        monkeypatch.setattr(torch.cuda, "synchronize", raising(torch.AcceleratorError("the device is lost")))
        with pytest.raises(torch.AcceleratorError, match="the device is lost"):
            graphs.capture(lambda: None)

    def test_a_model_that_asks_the_host_runs_without(
        self, base: LoadedBase, adapters: list[AdapterFactors], monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        norm = base.adapted.base_layer("model.norm")
        forward = norm.forward
        monkeypatch.setattr(norm, "forward", lambda x: forward(x) * (1.0 if x.sum().item() else 2.0))
        bench = bench_of(base, adapters)
        assert bench.runner.graphs is None
        assert "decoding runs without graphs: HostNeeded" in caplog.text
        bench.begin(TEXTS[:2])
        bench.decode(range(2))

    def test_replays_that_answer_something_else_are_not_used(
        self, base: LoadedBase, adapters: list[AdapterFactors], caplog: pytest.LogCaptureFixture
    ) -> None:
        bench = bench_of(base, adapters, Idle())
        assert bench.runner.graphs is None
        assert "answer differently" in caplog.text
        assert bench.runner.rows == 0

    @pytest.mark.parametrize("kernels", PAIRS)
    @pytest.mark.parametrize("fault", ["nothing is added", "every projection is the first"])
    def test_kernels_that_compute_something_else_are_not_used(
        self, base: LoadedBase, adapters: list[AdapterFactors], kernels: str, fault: str, caplog: Any
    ) -> None:
        def expand(*arguments: Any, projection: int, **others: Any) -> None:
            if fault != "nothing is added":
                with suppress(RuntimeError):  # of another width
                    reference.expand(*arguments, projection=0, **others)

        wrong: Any = SimpleNamespace(shrink=reference.shrink, expand=expand)
        bench = bench_of(base, adapters, Recorded(kernels=wrong), kernels)
        assert bench.runner.graphs is None
        assert "compute something else" in caplog.text

    def test_tables_that_hold_no_adapter(
        self, base: LoadedBase, adapters: list[AdapterFactors], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert bench_of(base, adapters, memory=100).runner.graphs is None
        assert "--decode-memory" in caplog.text


class TestChoice:
    def test_the_settings_choices_are_these(self) -> None:
        (setting,) = (setting for setting in SETTINGS if setting.name == "decode_kernels")
        assert setting.kind.metavar == "{" + ",".join(CHOICES) + "}"

    @pytest.mark.parametrize("kernels", CHOICES)
    def test_a_cpu_has_none(self, base: LoadedBase, kernels: str, caplog: pytest.LogCaptureFixture) -> None:
        runner = runner_of(base)
        attach_graphs(base, runner, [], GraphOptions(kernels))
        assert runner.graphs is None
        assert ("need CUDA" in caplog.text) == (kernels in PAIRS)

    def test_off(self, base: LoadedBase, caplog: pytest.LogCaptureFixture) -> None:
        runner, backend = runner_of(base), Recorded()
        attach_graphs(base, runner, [], GraphOptions("off"), backend)
        assert runner.graphs is None
        assert backend.captures == 0

    def test_padded_rows_have_none(self, base: LoadedBase, caplog: pytest.LogCaptureFixture) -> None:
        runner = TransformersRunner(base.adapted, CPU, RowsBackend(CPU, 1 << 20))
        attach_graphs(base, runner, [], options("gathered"), Guarded())
        assert runner.graphs is None
        assert "not cpu, rows keys and values" in caplog.text

    @pytest.mark.parametrize("fast", Pair)
    def test_auto_takes_the_faster_pair(
        self, base: LoadedBase, adapters: list[AdapterFactors], fast: Pair, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(choice, "seconds_of", lambda pair, *_: 1.0 if pair is fast else 2.0)
        bench_of(base, adapters, kernels="auto")
        assert next(r.kernels for r in caplog.records if r.message == "captured decode steps") == fast.value

    def test_auto_times_both(self, base: LoadedBase, adapters: list[AdapterFactors]) -> None:
        bench = bench_of(base, adapters, kernels="auto")
        bench.begin(TEXTS[:2])
        bench.decode(range(2), mixed(adapters, {0: 1.0}, {1: 0.5}))
        assert not bench.graphs.eager

    def test_the_settings_are_the_engines(self) -> None:
        given = Settings(decode_kernels="gathered", decode_memory=5, decode_graphs=3)
        assert _engine_options(given).graphs == GraphOptions("gathered", memory=5, most=3)
        assert _engine_options(Settings()).graphs == GraphOptions()


class TestTableSpec:
    def test_made_for_the_adapters_known(self, adapters: list[AdapterFactors]) -> None:
        (layout,) = {id(a.selections.layout): a.selections.layout for a in adapters[:1] if a.selections}.values()
        larger = replace(layout, config=replace(layout.config, r=7, topk=5, num_vectors=400, vector_length=32))
        other = replace(layout, config=replace(layout.config, r=9, vector_length=24))
        spec = table_spec([layout, layout, larger, other], {}, torch.bfloat16)
        assert (spec.rank, spec.topk, spec.vector_length, spec.num_vectors) == (7, 5, 16, 800)
        huge = replace(layout, config=replace(layout.config, r=64))
        assert table_spec([huge], {}, torch.float32).rank == 16

    def test_of_none_vectors_tile_every_layer(self) -> None:
        layers = {"q": LayerShape("q", 896, 896), "up": LayerShape("up", 896, 4864)}
        spec = table_spec([], layers, torch.float32)
        assert (spec.rank, spec.topk, spec.vector_length, spec.num_vectors) == (4, 2, 128, 256)


class TestTheGuard:
    """It has teeth."""

    @pytest.mark.parametrize(
        "ask",
        [
            lambda x: x[0].item(),
            lambda x: bool(x[0] > 0),
            lambda x: x.tolist(),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: torch.tensor([1.0]),
            lambda x: x[[0, 1]],
            lambda x: x.numpy(),
            lambda x: torch.equal(x, x),
        ],
    )
    def test_refuses(self, ask: Any) -> None:
        x = torch.ones(3)
        with torch.inference_mode(), no_host(), pytest.raises(HostNeeded):
            ask(x)


class Breaking(Recorded):
    """Replays that raise once they are told to."""

    error: Exception | None = None

    def capture(self, step: Step) -> Step:
        replay = super().capture(step)

        def broken() -> None:
            if self.error is not None:
                raise self.error
            replay()

        return broken


class Idle(Recorded):
    """Replays that do nothing."""

    def capture(self, step: Step) -> Step:
        super().capture(step)
        return lambda: None


def raising(error: Exception) -> Any:
    def raises(*_: Any) -> Any:
        raise error

    return raises


def slot_bytes(base: LoadedBase, adapters: Sequence[AdapterFactors]) -> int:
    """Of the tables that these are given."""
    layouts = [adapter.selections.layout for adapter in adapters if adapter.selections is not None]
    spec = table_spec(layouts, base.modules.layers, base.dtype)
    return SelectionTables.slot_bytes(groups_of(base, spec), spec)
