"""Both key-value backends against the plain model: whatever rows do, each answers as its text does alone.

The oracle is one forward over a row's whole text, without cache, mask or padding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from adapters.layers import AdaptedModel
from service.engine.kv.backend import Blocks, KVBackend
from service.engine.kv.rows import RowsBackend
from service.engine.kv.slots import SlotBackend
from service.engine.model_runner import TransformersRunner
from tests.factories import VOCAB_SIZE, Arch, randomize, tiny_model
from tests.unit.adapters.support import adapted

CPU = torch.device("cpu")
LAYERS = 2
AMPLE = 1 << 30
ARCHS: list[Arch] = ["llama", "qwen2", "gpt2", "opt"]  # two of them with grouped queries

BACKENDS: dict[str, Callable[[int], KVBackend]] = {
    "slot": lambda budget: SlotBackend(LAYERS, torch.float32, CPU, budget),
    "rows": lambda budget: RowsBackend(CPU, budget),
}
both = pytest.mark.parametrize("backend", BACKENDS)


@cache
def base(arch: Arch) -> AdaptedModel:
    return adapted(tiny_model(arch))


class Bench:
    """A runner, and the text of each of its rows."""

    def __init__(self, arch: Arch, backend: str, budget: int = AMPLE, seed: int = 0) -> None:
        self.model = base(arch)
        self.kv = BACKENDS[backend](budget)
        self.runner = TransformersRunner(self.model, CPU, self.kv)
        self.texts: list[list[int]] = []
        self.random = random.Random(seed)

    def add(self, rows: int) -> None:
        self.runner.add(rows)
        self.texts += [[] for _ in range(rows)]

    def tokens(self, count: int) -> list[int]:
        return self.random.choices(range(VOCAB_SIZE), k=count)

    def extend(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """In one forward where the backend can, and every answer is right."""
        tokens = [self.tokens(count) for count in counts]
        for row, of_row in zip(rows, tokens, strict=True):
            self.texts[row] += of_row
        if self.runner.ragged:
            self.check(rows, self.runner.extend(rows, tokens, None))
            return
        for count in sorted(set(counts)):
            some = {row: of_row for row, of_row in zip(rows, tokens, strict=True) if len(of_row) == count}
            self.check(list(some), self.runner.extend(list(some), list(some.values()), None))

    def check(self, rows: Sequence[int], answers: Tensor) -> None:
        for row, answer in zip(rows, answers, strict=True):
            torch.testing.assert_close(answer, self.plain(self.texts[row]), rtol=0, atol=1e-4)

    @torch.inference_mode()
    def plain(self, text: list[int]) -> Tensor:
        token_logits: Tensor = self.model.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        return token_logits

    def keep(self, rows: Sequence[int]) -> None:
        self.runner.keep(rows)
        self.texts = [self.texts[row] for row in rows]

    def copy_beginning(self, source: int, target: int, end: int) -> None:
        """As a prefix is kept and taken: read in blocks, written in one piece."""
        middle = end // 2
        parts = [self.runner.read(source, start, stop) for start, stop in ((0, middle), (middle, end)) if stop > start]
        self.runner.write(target, joined(parts))
        self.texts[target] += self.texts[source][:end]


def joined(parts: Sequence[Blocks]) -> Blocks:
    return [
        (torch.cat([keys for keys, _ in layer], dim=1), torch.cat([values for _, values in layer], dim=1))
        for layer in zip(*parts, strict=True)
    ]


@both
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_schedule(arch: Arch, backend: str, seed: int) -> None:
    """Rows join, take a prefix of another, extend in any company, change place, leave; the batch empties at times."""
    bench = Bench(arch, backend, seed=seed)
    pick = bench.random
    for _ in range(45):
        action = pick.choice(["add", "extend", "extend", "decode", "decode", "keep", "copy"])
        count = len(bench.texts)
        begun = [row for row in range(count) if bench.texts[row]]
        if action == "add" and count < 6:
            bench.add(pick.randint(1, 3))
        elif action == "extend" and count:
            rows = pick.sample(range(count), pick.randint(1, count))  # in any order, with gaps
            bench.extend(rows, [pick.choice([1, 2, 7, 19, 40]) for _ in rows])
        elif action == "decode" and begun:
            bench.extend(begun, [1] * len(begun))
        elif action == "keep":
            bench.keep(pick.sample(range(count), pick.randint(0, count)))
        elif action == "copy" and begun:
            source = pick.choice(begun)
            bench.add(1)
            bench.copy_beginning(source, len(bench.texts) - 1, pick.randint(1, len(bench.texts[source])))
        if any(len(text) > 200 for text in bench.texts):
            bench.keep([row for row, text in enumerate(bench.texts) if len(text) <= 200])
    assert bench.runner.rows == len(bench.texts)


@both
def test_rows_of_very_different_length_grow_over_bucket_boundaries(backend: str) -> None:
    bench = Bench("llama", backend)
    bench.add(3)
    bench.extend([0, 1, 2], [62, 1, 126])
    for _ in range(4):  # over 64 and 128
        bench.extend([0, 1, 2], [1, 1, 1])
    bench.add(2)  # a bucket of rows
    bench.extend([4], [250])
    for _ in range(6):  # to 256, the model's last position
        bench.extend([0, 1, 4], [1, 1, 1])
    bench.extend([3, 0], [5, 30])


@both
def test_rows_that_are_not_neighbours(backend: str) -> None:
    bench = Bench("qwen2", backend)
    bench.add(5)
    bench.extend([4, 0, 2], [5, 9, 2])
    bench.extend([1, 3], [3, 3])
    bench.extend([3, 0], [4, 6])
    bench.extend([4, 3, 2, 1, 0], [1] * 5)


@both
def test_a_slot_is_written_again_after_the_batch_shrank(backend: str) -> None:
    bench = Bench("llama", backend)
    bench.add(4)
    bench.extend([0, 1, 2, 3], [100, 3, 50, 7])
    bench.keep([3, 1])
    bench.add(2)
    bench.extend([2, 3], [2, 80])
    bench.extend([0, 1, 2, 3], [1] * 4)
    bench.keep([])
    bench.add(2)
    bench.extend([0, 1], [1, 70])
    bench.extend([0, 1], [1, 1])


@both
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_forward_that_raised_midway_can_be_tried_again(
    backend: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench("llama", backend)
    bench.add(3)
    bench.extend([0, 1, 2], [8, 3, 60])
    attention = bench.model.model.model.layers[layer].mlp  # the layer's keys and values have been written
    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("once")))
        for rows in ([0, 1, 2], [2], [0, 1]):
            with pytest.raises(RuntimeError, match="once"):
                bench.runner.extend(rows, [[7] * 9 for _ in rows], None)
    bench.extend([0, 1], [9, 9])  # the halves, tried again
    bench.extend([2], [1])
    bench.keep([2, 0])
    bench.extend([0, 1], [2, 2])


@both
def test_the_very_first_forward_may_raise(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("llama", backend)
    bench.add(2)
    with monkeypatch.context() as patch:
        patch.setattr(bench.model.model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.runner.extend([0, 1], [[1, 2], [3, 4]], None)
    bench.extend([0, 1], [2, 2])
    bench.extend([1, 0], [1, 1])


@both
def test_what_a_sick_row_leaves_behind_harms_no_later_one(backend: str) -> None:
    """Its place is taken by a shorter row, which then attends with a mask over what is still there."""
    bench = Bench("llama", backend)
    bench.add(2)
    bench.extend([0, 1], [40, 30])
    embedding = bench.model.base_layer("model.embed_tokens").weight
    healthy = embedding[5].clone()
    try:
        embedding.data[5] = float("nan")
        assert bench.runner.extend([1], [[5, 5, 5]], None).isnan().all()
    finally:
        embedding.data[5] = healthy
    bench.keep([0])
    bench.add(1)
    bench.extend([1], [3])
    bench.extend([0, 1], [1, 1])
    bench.keep([])
    bench.add(2)
    bench.extend([0, 1], [2, 60])


def test_a_window_counts_tokens_whatever_the_other_rows_take() -> None:
    """Padding between a row's tokens would use up its window. (Slots are not for such models at all.)"""
    bench = Bench("llama", "rows")
    bench.model = adapted(windowed_model())
    bench.runner = TransformersRunner(bench.model, CPU, bench.kv)
    bench.add(3)
    bench.extend([0, 1], [10, 33])
    bench.extend([0, 2, 1], [10, 60, 10])
    for _ in range(3):
        bench.extend([0, 1, 2], [1, 1, 1])
    bench.keep([2, 0])
    bench.extend([0, 1], [1, 1])


def windowed_model() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        sliding_window=16,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, 0)
    return model


# --- memory ---------------------------------------------------------------------------------------


def measured(backend: str, tokens: int) -> Bench:
    """A backend with memory for so many tokens, measured by running one; no rows."""
    once = Bench("llama", backend)
    once.add(1)
    once.extend([0], [1])
    bytes_per_token = once.kv.nbytes // (65 if backend == "slot" else 1)
    bench = Bench("llama", backend, budget=bytes_per_token * tokens)
    bench.add(1)
    bench.extend([0], [1])
    bench.keep([])
    return bench


@both
def test_what_fits(backend: str) -> None:
    bench = measured(backend, 4 * 129)
    fits = [([], True), ([128], True), ([100, 128, 1, 1], True), ([64] * 7, True), ([129] * 5, False), ([600], False)]
    assert [(lengths, bench.kv.spare(lengths) >= 0) for lengths, _ in fits] == fits


def test_slots_are_counted_in_blocks_with_their_scratch_column() -> None:
    bench = measured("slot", 4 * 129)
    token = bench.kv.nbytes // 65
    assert bench.kv.spare([128] * 4) == 0
    assert bench.kv.spare([65] * 4) == 0
    assert bench.kv.spare([129] * 4) < 0
    assert bench.kv.spare([64, 10]) == (4 * 129 - 2 * 65) * token


@both
def test_memory_stays_within_the_budget_whatever_comes_and_goes(backend: str) -> None:
    """A long row, then many short ones while the batch never empties: what was taken for the long one is given back."""
    bench = measured(backend, 6 * 129)
    budget = bench.kv.spare([]) + bench.kv.nbytes
    bench.add(1)
    bench.extend([0], [10])
    for long in (250, 130, 250):
        bench.add(1)
        bench.extend([1], [long])
        assert bench.kv.nbytes <= budget
        bench.keep([0])
        assert bench.kv.spare([100] * 6) >= 0
        bench.add(5)
        assert bench.kv.nbytes <= budget
        bench.extend(range(6), [30, *[90] * 5])
        assert bench.kv.nbytes <= budget
        bench.extend(range(6), [1] * 6)
        bench.keep([0])


@both
def test_what_the_tokens_of_the_rows_take(backend: str) -> None:
    bench = measured(backend, 6 * 129)
    assert bench.runner.kv_bytes == (0, bench.kv.budget_bytes)
    bench.add(2)
    bench.extend([0], [20])
    bench.extend([1], [20])
    both_rows, _ = bench.runner.kv_bytes
    assert 0 < both_rows <= bench.kv.nbytes
    bench.keep([1])
    assert bench.runner.kv_bytes == (both_rows // 2, bench.kv.budget_bytes)


def test_slots_grow_in_powers_of_two_and_are_given_back() -> None:
    bench = Bench("llama", "slot")
    slots = bench.kv
    assert isinstance(slots, SlotBackend)
    bench.add(3)
    bench.extend([0], [65])
    assert (slots.slots, slots.columns) == (4, 128)
    bench.extend([0], [64])
    assert (slots.slots, slots.columns) == (4, 256)
    bench.keep([])
    assert (slots.slots, slots.columns) == (1, 64)


def test_reserved_slots_neither_move_nor_are_given_back() -> None:
    bench = measured("slot", 64 * 257)
    slots = bench.kv
    assert isinstance(slots, SlotBackend)
    slots.reserve(4, 256)
    assert (slots.slots, slots.columns) == (4, 256)
    places = [layer.keys.data_ptr() for layer in slots._layers]
    bench.add(4)
    bench.extend([0, 1, 2, 3], [3, 250, 70, 1])
    bench.extend([0, 1, 2, 3], [1] * 4)
    bench.keep([2])
    bench.keep([])
    bench.add(1)
    bench.extend([0], [9])
    assert [layer.keys.data_ptr() for layer in slots._layers] == places
    bench.add(6)  # more rows than were reserved for
    bench.extend(range(7), [1, 2, 3, 4, 5, 6, 7])
    bench.keep([])
    assert (slots.slots, slots.columns) == (4, 256)


@pytest.mark.parametrize(
    ("budget", "longest", "reserved"),
    [
        (2 * 4 * 65, 500, (4, 64)),
        (2 * 4 * 250, 500, (4, 192)),
        (2 * 4 * 250, 100, (4, 128)),
        (2 * 4 * 64, 500, (1, 64)),
    ],
)
def test_what_is_reserved_takes_half_of_the_memory_at_most(
    budget: int, longest: int, reserved: tuple[int, int]
) -> None:
    bench = measured("slot", budget)
    slots = bench.kv
    assert isinstance(slots, SlotBackend)
    slots.reserve(4, longest)
    assert (slots.slots, slots.columns) == reserved
    assert slots.nbytes <= budget // 2 * slots.bytes_per_token


def test_what_a_long_row_took_is_given_back_while_others_run() -> None:
    """Prefixes may have it."""
    bench = measured("slot", 8 * 129)
    budget = bench.kv.spare([]) + bench.kv.nbytes
    bench.add(3)
    bench.extend([0, 1, 2], [250, 9, 30])
    assert bench.kv.nbytes > budget // 2
    bench.keep([2, 1])
    assert bench.kv.nbytes <= budget // 2
    bench.extend([0, 1], [1, 40])


def test_beyond_half_of_the_budget_slots_take_no_more_than_is_reserved() -> None:
    bench = measured("slot", 5 * 193)
    slots = bench.kv
    assert isinstance(slots, SlotBackend)
    assert slots.spare([192] * 5) == 0
    bench.add(5)
    bench.extend(range(5), [20, 50, 60, 60, 63])
    for count in (60, 60, 8):
        bench.extend([0, 4], [1, count])
        assert slots.nbytes <= 5 * 193 * slots.bytes_per_token
    assert (slots.slots, slots.columns) == (5, 192)


def test_when_memory_cannot_be_had_nothing_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("llama", "slot")
    bench.add(2)
    bench.extend([0, 1], [60, 10])
    with monkeypatch.context() as patch:
        patch.setattr("service.engine.kv.slots._moved", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            bench.runner.add(3)
        with pytest.raises(MemoryError):
            bench.runner.extend([0], [[1] * 10], None)
    assert bench.runner.rows == 2
    bench.extend([0, 1], [10, 1])
