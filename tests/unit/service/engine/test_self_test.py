"""Which backend is chosen: for models that are right in slots, only in rows, or only alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from adapters.layers import AdaptedModel
from service.engine.base_model import BaseModelError
from service.engine.model_runner import TransformersRunner
from service.engine.self_test import choose_runner
from tests.factories import VOCAB_SIZE, Arch, randomize, tiny_model
from tests.unit.adapters.support import adapted

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}


def chosen(model: AdaptedModel, context: int = 256) -> tuple[str, bool]:
    """The backend, and whether it may batch. Whatever it is, it answers this model rightly, row by row at least."""
    runner, batches = choose_runner(model, CPU, VOCAB_SIZE, 1 << 30, context)
    assert runner.rows == 0, "nothing of the test is left"
    check_alone(runner, model)
    return runner.kv.name, batches


@torch.inference_mode()
def check_alone(runner: TransformersRunner, model: AdaptedModel) -> None:
    text = [*range(40, 70)]
    runner.add(1)
    runner.extend([0], [text[:29]], None)
    answer = runner.extend([0], [text[29:]], None)[0]
    plain = model.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(answer, plain, rtol=0, atol=1e-3)
    runner.keep([])


def built(config: PretrainedConfig) -> AdaptedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, 0)
    return adapted(model)


def altered(change: Callable[[dict[str, Any]], None], arch: Arch = "llama") -> AdaptedModel:
    """A model whose forward gets its arguments changed first."""
    model = adapted(tiny_model(arch))
    forward = model.model.forward

    # Named: the runner looks at which arguments a forward takes.
    def changed(
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
    ) -> Any:
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        change(arguments)
        return forward(**arguments)

    model.model.forward = changed
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt"])
def test_slots_where_they_are_right(arch: Arch) -> None:
    assert chosen(adapted(tiny_model(arch))) == ("slot", True)


def test_a_model_that_ignores_explicit_masks_gets_rows() -> None:
    def drop_explicit_mask(arguments: dict[str, Any]) -> None:
        mask = arguments["attention_mask"]
        if mask is not None and mask.dim() == 4:
            arguments["attention_mask"] = None

    assert chosen(altered(drop_explicit_mask)) == ("rows", True)


def test_a_model_that_refuses_explicit_masks_gets_rows() -> None:
    def refuse(arguments: dict[str, Any]) -> None:
        if arguments["attention_mask"] is not None and arguments["attention_mask"].dim() == 4:
            raise ValueError("a mask has two dimensions")

    assert chosen(altered(refuse)) == ("rows", True)


def test_a_model_that_answers_nan_to_one_row_is_not_right() -> None:
    def drown_the_last_row(arguments: dict[str, Any]) -> None:
        mask = arguments["attention_mask"]
        if mask is not None and mask.dim() == 4 and len(mask) > 2:
            mask[1] = float("nan")

    assert chosen(altered(drown_the_last_row)) == ("rows", True)


def test_a_model_that_ignores_every_mask_runs_alone() -> None:
    assert chosen(altered(lambda arguments: arguments.update(attention_mask=None))) == ("rows", False)


def test_a_model_that_counts_positions_by_columns_runs_alone() -> None:
    def by_columns(arguments: dict[str, Any]) -> None:
        cache, queries = arguments["past_key_values"], arguments["input_ids"].shape[1]
        held = 0 if cache is None else cache.get_seq_length()
        arguments["position_ids"] = torch.arange(held, held + queries).unsqueeze(0)

    # Rotary positions are relative: only learned ones tell.
    assert chosen(altered(by_columns, "gpt2")) == ("rows", False)


def test_windows_get_rows() -> None:
    """Slots would be right in the short texts of the test, and wrong beyond the window."""
    config = MistralConfig(**COMMON, **HEADS, sliding_window=16)
    assert chosen(built(config)) == ("rows", True)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**COMMON, **HEADS, head_dim=16, sliding_window=16),
        GPTNeoConfig(
            **{**COMMON, "num_layers": 2}, num_heads=4, window_size=8, attention_types=[[["global", "local"], 1]]
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_windows_in_some_layers_get_rows(config: PretrainedConfig) -> None:
    assert chosen(built(config)) == ("rows", True)


def test_a_window_that_no_text_outgrows_is_none() -> None:
    config = MistralConfig(**COMMON, **HEADS, sliding_window=64)
    assert chosen(built(config), context=64) == ("slot", True)
    assert chosen(built(config), context=65) == ("rows", True)


@pytest.mark.parametrize(("context", "backend"), [(256, "slot"), (257, "rows")])
def test_windows_by_another_name(context: int, backend: str) -> None:
    """GPT-Neo's, which no layer_types tell of: 256 tokens, far beyond the texts of the test."""
    config = GPTNeoConfig(
        **{**COMMON, "num_layers": 2}, num_heads=4, window_size=256, attention_types=[[["global", "local"], 1]]
    )
    assert chosen(built(config), context) == (backend, True)


def test_a_model_that_is_wrong_even_alone_is_refused() -> None:
    def forget_the_past(arguments: dict[str, Any]) -> None:
        if arguments["past_key_values"] is not None and arguments["input_ids"].shape[1] == 1:
            arguments.update(past_key_values=None, attention_mask=None, position_ids=None)

    with pytest.raises(BaseModelError, match="LlamaForCausalLM cannot be served"):
        chosen(altered(forget_the_past))


def test_no_window_means_slots() -> None:
    assert chosen(built(MistralConfig(**COMMON, **HEADS, sliding_window=None))) == ("slot", True)


@pytest.mark.parametrize(
    "config",
    [BloomConfig(**COMMON, n_head=4), FalconConfig(**COMMON, num_attention_heads=4, alibi=True)],
    ids=lambda config: config.model_type,
)
def test_models_with_distances_instead_of_positions_are_answered_rightly(config: PretrainedConfig) -> None:
    assert chosen(built(config))[1]


def test_sixteen_bit_models_are_batched() -> None:
    model = adapted(tiny_model("llama"), torch.bfloat16)
    runner, batches = choose_runner(model, CPU, VOCAB_SIZE, 1 << 30, 256)
    assert (runner.kv.name, batches) == ("slot", True)
