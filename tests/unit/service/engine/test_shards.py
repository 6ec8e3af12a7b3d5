"""How a model is cut, what is refused, and how a leader takes what goes wrong on its own part and on others."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cuts import Side
from adapters.factors import AdapterFactors, LayerFactors
from adapters.low_rank import LowRankBatch
from service.engine.fatal import ShardsLost, is_fatal
from service.engine.kv.backend import Blocks
from service.engine.pooling.base import Unservable
from service.engine.shards import messages
from service.engine.shards.cutting import cut_model
from service.engine.shards.leader import LeadingRunner, lead
from service.engine.shards.plan import Shard, plan_of
from tests.factories import Arch, tiny_model

# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2"])
def test_parts_make_up_every_weight(arch: Arch) -> None:
    whole = dict(tiny_model(arch).named_parameters())
    parts = []
    for rank in range(2):
        model = tiny_model(arch)
        plan = plan_of(model, Shard(rank, 2))
        assert plan.gathered == {"lm_head"}
        cut_model(model, plan.cuts)
        parts.append((plan, dict(model.named_parameters())))
    (plan, first), (_, second) = parts
    cut = {f"{name}.weight" for name in plan.cuts}
    assert {name.rsplit(".", 2)[-2] for name in cut} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip
    for name, weight in whole.items():
        layer, _, attribute = name.rpartition(".")
        if layer not in plan.cuts:
            assert torch.equal(first[name], weight)
            assert torch.equal(second[name], weight)
            continue
        by_input = plan.cuts[layer].side is Side.INPUT
        if by_input and attribute == "bias":
            assert torch.equal(first[name], weight)
            assert name not in second
            continue
        assert torch.equal(torch.cat([first[name], second[name]], dim=int(by_input)), weight)


def test_a_vocabulary_that_cannot_be_divided_stays_whole() -> None:
    plan = plan_of(tiny_model("llama", vocab_size=271), Shard(0, 2))
    assert not plan.gathered
    assert "lm_head" not in plan.cuts


@pytest.mark.parametrize(
    ("arch", "config", "size", "said"),
    [
        ("gpt2", {}, 2, "no plan for tensor parallelism"),
        ("llama", {"num_key_value_heads": 1}, 2, "does not divide the model's 1 key-value heads"),
        ("llama", {"num_attention_heads": 4}, 3, "does not divide the model's 4 attention heads"),
        ("llama", {"intermediate_size": 99}, 2, "does not divide the 99 features of model.layers.0.mlp"),
    ],
)
def test_what_cannot_be_cut_is_refused(arch: Arch, config: dict[str, Any], size: int, said: str) -> None:
    with pytest.raises(Unservable, match=said):
        plan_of(tiny_model(arch, **config), Shard(0, size))


def test_a_style_that_is_not_known_is_refused() -> None:
    model = tiny_model("llama")
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(Unservable, match=r"cuts model\.layers\.0\.mlp\.up_proj, a Linear, packed_colwise"):
        plan_of(model, Shard(0, 2))


# --- leading --------------------------------------------------------------------------------------


class FakeTeam:
    """Notes what it is told; `failures` are its answers to every step, ShardsLost raised."""

    def __init__(self, failures: Sequence[str | None] | ShardsLost = (None,)) -> None:
        self.told: list[Any] = []
        self.failures = failures
        self.chosen: object = messages.Chosen("slot", True)

    def tell(self, message: object) -> None:
        self.told.append(message)

    def answers(self, *, hurried: bool = False) -> Sequence[str | None]:
        if isinstance(self.failures, ShardsLost):
            raise self.failures
        return self.failures

    def receive(self) -> list[object]:
        return [self.chosen]


class FakePart:
    """A runner that fails where it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.kv = SimpleNamespace(name="slot")
        self.error = error
        self.written: list[tuple[Blocks, ...]] = []

    def extend(self, rows: Any, tokens: Any, batch: Any, *, every_position: bool = False) -> Tensor:
        if self.error is not None:
            raise self.error
        return torch.zeros(len(rows), 3)

    def read(self, row: int, start: int, end: int) -> Blocks:
        return [(torch.zeros(1, end - start, 2), torch.zeros(1, end - start, 2))]

    def write(self, row: int, *pieces: Blocks) -> None:
        self.written.append(pieces)


def leading(team: FakeTeam, part: FakePart | None = None) -> LeadingRunner:
    runner: Any = part or FakePart()
    fake: Any = team
    return LeadingRunner(runner, fake)


def test_a_step_that_fails_everywhere_may_be_tried_again() -> None:
    error = MemoryError("too much")
    with pytest.raises(MemoryError):
        leading(FakeTeam(["MemoryError: too much"]), FakePart(error)).extend([0], [[1]], None)
    assert not is_fatal(error)


@pytest.mark.parametrize("failures", [(None,), ("OSError", None), ShardsLost("gone")])
def test_a_step_that_fails_here_and_not_there_is_fatal(failures: Any) -> None:
    with pytest.raises(ShardsLost, match="too much") as raised:
        leading(FakeTeam(failures), FakePart(MemoryError("too much"))).extend([0], [[1]], None)
    assert is_fatal(raised.value)


@pytest.mark.parametrize("failures", [("OSError: no room",), (None, "OSError: no room")])
def test_a_step_that_fails_there_and_not_here_is_fatal(failures: Any) -> None:
    with pytest.raises(ShardsLost, match="no room"):
        leading(FakeTeam(failures)).extend([0], [[1]], None)


def adapter(name: str) -> AdapterFactors:
    whole: Any = f"the checkpoint of {name}"
    return AdapterFactors(name, {"q": LayerFactors(torch.ones(2, 4), torch.ones(2, 4))}, whole=whole)


def test_adapters_are_sent_once_and_dropped_with_their_factors() -> None:
    team = FakeTeam()
    runner = leading(team)
    one, two = adapter("one"), adapter("two")
    for batch in ([one], [one, two], [two]):
        runner.extend([0], [[1]], LowRankBatch(batch, torch.ones(1, len(batch))))
    held = [message for message in team.told if isinstance(message, messages.Hold)]
    assert [(message.digest, message.checkpoint) for message in held] == [
        ("one", "the checkpoint of one"),
        ("two", "the checkpoint of two"),
    ]
    del one, batch
    runner.extend([0], [[1]], LowRankBatch([two], torch.ones(1, 1)))
    assert messages.Drop(("one",)) in team.told
    one = adapter("one")
    runner.extend([0], [[1]], LowRankBatch([one], torch.ones(1, 1)))
    assert [message.digest for message in team.told if isinstance(message, messages.Hold)] == ["one", "two", "one"]
    step = team.told[-1]
    assert isinstance(step, messages.Extend)
    assert step.mix == messages.Mix(("one",), ((1.0,),), frozenset({"one"}))


def test_keys_and_values_are_numbered_and_forgotten_with_the_leaders_own() -> None:
    team, part = FakeTeam(), FakePart()
    runner = leading(team, part)
    first, second = runner.read(0, 0, 2), runner.read(0, 2, 5)
    runner.write(1, first, second)
    assert part.written == [(first, second)]
    assert team.told == [messages.Read(0, 0, 0, 2), messages.Read(1, 0, 2, 5), messages.Write(1, (0, 1))]
    part.written.clear()
    del first
    runner.extend([0], [[1]], None)
    assert team.told[3] == messages.Forget((0,))
    with pytest.raises(AssertionError):
        runner.write(1, [(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))])


def test_parts_that_choose_otherwise_end_the_start() -> None:
    team, part = FakeTeam(), FakePart()
    fake_team: Any = team
    fake_part: Any = part
    lead(fake_part, fake_team, True, 4, 64)
    assert team.told == [messages.Reserve(4, 64)]
    team.chosen = messages.Chosen("rows", True)
    with pytest.raises(ShardsLost, match="different key-value backends"):
        lead(fake_part, fake_team, True, 4, 64)
