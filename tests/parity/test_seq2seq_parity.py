"""Encoder-decoders through the engine against PEFT's `generate(do_sample=False)`, each text alone.

Adapters on encoder, decoder and cross-attention, of both storages, mixed in one batch that rows join and leave.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters.errors import UnsupportedCheckpoint
from service.engine.base_model import load_pretrained
from service.engine.events import FinishedEvent
from service.engine.selection import Mode
from service.engine.task import Task
from tests.parity.seq2seq_bench import (
    KV_BYTES,
    PENALTY,
    PROMPTS,
    TOKENS,
    Bench,
    ask,
    check,
    make_bench,
    peft_logprobs,
    submit,
)
from tests.seq2seq_factory import (
    MORE_ARCHS,
    SEQ2SEQ_ARCHS,
    Seq2SeqArch,
    Seq2SeqSpec,
    make_seq2seq_adapter,
    peft_generated,
    peft_loaded,
    save_seq2seq,
    tiny_seq2seq,
)

SELECTIONS: list[dict[str, float]] = [
    {},
    {"a0": 1.0},
    {"a1": 1.0},
    {"a2": 1.0},
    {"a3": 1.0},
    {"a0": 0.6, "a1": 0.4},
    {"a2": -0.5, "a3": 1.2},
]


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_mixed_in_one_batch_they_are_pefts(arch: Seq2SeqArch, tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path)
    with bench.engine(started=False) as engine:
        requests = [
            bench.request(f"r{i}", weights, prompt, repetition_penalty=PENALTY if i % 2 else 1.0)
            for i, (weights, prompt) in enumerate(zip(SELECTIONS, PROMPTS, strict=True))
        ]
        answers = ask(engine, requests)
    assert bench.forwards[0] == -len(SELECTIONS), "the prompts were not read together"
    unended = sum(len(answer.tokens) > 1 for answer in answers)
    assert max(bench.forwards) == unended >= 6, "the rows were not decoded together"
    for i, (weights, prompt, answer) in enumerate(zip(SELECTIONS, PROMPTS, answers, strict=True)):
        check(bench, weights, prompt, answer, repetition_penalty=PENALTY if i % 2 else 1.0)
    texts = {tuple(answer.tokens) for answer in answers}
    assert len(texts) == len(SELECTIONS), "the adapters must show"
    assert len({token for text in texts for token in text}) > 12, "so must the steps"


@pytest.mark.parametrize("arch", [*SEQ2SEQ_ARCHS, *MORE_ARCHS])
def test_rows_join_and_leave_in_mid_flight(arch: Seq2SeqArch, tmp_path: Path) -> None:
    """A batch of three, prompts read a few at a time, outputs of every length: rows join beside others further on."""
    bench = make_bench(arch, tmp_path)
    draw = random.Random(0)
    with bench.engine(max_batch_size=3, prefill_tokens=20) as engine:
        asked = []
        for i in range(24):
            weights, prompt = SELECTIONS[i % len(SELECTIONS)], [draw.randrange(256) for _ in range(draw.randint(1, 40))]
            asked.append((weights, prompt, draw.randint(1, 20)))
        requests = [
            bench.request(f"r{i}", weights, prompt, max_new_tokens=tokens, repetition_penalty=PENALTY)
            for i, (weights, prompt, tokens) in enumerate(asked)
        ]
        answers = ask(engine, requests)
        engine.stop()  # the last step is over then
        used, budget = engine.stats().kv_bytes, engine.stats().kv_budget_bytes
    assert (used, budget) == (0, 2 << 30), "what is held of prompts must go with its row"
    together = [rows for rows in bench.forwards if rows > 0]
    assert max(together) > 1, "they ran one at a time"
    assert len(bench.forwards) > len(together) > 20
    for (weights, prompt, tokens), answer in zip(asked, answers, strict=True):
        check(bench, weights, prompt, answer, tokens=tokens, repetition_penalty=PENALTY)


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_folded_it_says_the_same(arch: Seq2SeqArch, tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path, adapters=1)
    with bench.engine() as engine:
        assert bench.base is not None
        parameters = dict(bench.base.adapted.model.named_parameters())
        pristine = {name: parameter.clone() for name, parameter in parameters.items() if not parameter.is_meta}
        requests = [bench.request(f"r{i}", {"a0": 1.0}, prompt, Mode.MERGE) for i, prompt in enumerate(PROMPTS)]
        answers = ask(engine, requests)
        assert engine.stats().folds == 1
        (base,) = ask(engine, [bench.request("base", {}, PROMPTS[0])])
        assert all(torch.equal(parameters[name], own) for name, own in pristine.items())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert isinstance(answer.end, FinishedEvent)
        assert answer.end.mode == "merge"
        check(bench, {"a0": 1.0}, prompt, answer)
    check(bench, {}, PROMPTS[0], base)


@pytest.mark.parametrize(
    ("arch", "spec"),
    [
        ("bart", {"bias": "all"}),
        ("bart", {"bias": "vblora_only"}),
        ("bart", {"modules_to_save": ("lm_head", "layernorm_embedding")}),
        ("t5", {"modules_to_save": ("lm_head", "final_layer_norm")}),
        ("t5", {"target_modules": ("q", "v", "lm_head")}),
        ("bart", {"modules_to_save": ("decoder.embed_tokens",)}),
    ],
)
def test_biases_and_saved_modules_are_each_rows_own(arch: Seq2SeqArch, spec: dict[str, Any], tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path, adapters=3, **spec)
    rows = [{"a0": 1.0}, {}, {"a1": 1.0}, {"a2": 1.0}]
    with bench.engine(started=False) as engine:
        requests = [
            bench.request(f"r{i}", weights, prompt)
            for i, (weights, prompt) in enumerate(zip(rows, PROMPTS, strict=False))
        ]
        answers = ask(engine, requests)
    assert bench.forwards[0] == -len(rows)
    for weights, prompt, answer in zip(rows, PROMPTS, answers, strict=False):
        check(bench, weights, prompt, answer)


def test_what_t5_looks_up_once_for_all_rows_cannot_be_a_rows_own(tmp_path: Path) -> None:
    bench = make_bench("t5", tmp_path, adapters=1, modules_to_save=("relative_attention_bias",))
    with pytest.raises(UnsupportedCheckpoint, match=r"relative_attention_bias.*once for all rows"), bench.engine():
        pass


@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_a_seed_says_the_same_alone_and_in_any_batch(arch: Seq2SeqArch, tmp_path: Path) -> None:
    bench = make_bench(arch, tmp_path, adapters=2)
    with bench.engine() as engine:
        drawn = {"temperature": 1.0, "seed": 5}
        (alone,) = ask(engine, [bench.request("alone", {"a0": 1.0}, PROMPTS[0], **drawn)])
        rows = [bench.request(f"r{i}", {"a1": 1.0}, prompt, temperature=0.7) for i, prompt in enumerate(PROMPTS)]
        beside = ask(engine, [*rows, bench.request("beside", {"a0": 1.0}, PROMPTS[0], **drawn)])[-1]
    assert alone.tokens == beside.tokens
    assert len(set(alone.tokens)) > 3


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_a_flood_with_a_short_memory_is_answered_right(arch: Seq2SeqArch, tmp_path: Path) -> None:
    """From several threads' worth of submissions, with joins, waits for memory and ends of every kind."""
    bench = make_bench(arch, tmp_path)
    draw = random.Random(1)
    with bench.engine(max_batch_size=5, prefill_tokens=64, kv_memory=400 * KV_BYTES, max_queue=200) as engine:
        asked, waits = [], []
        for i in range(60):
            weights = draw.choice(SELECTIONS)
            prompt = [draw.randrange(256) for _ in range(draw.choice([1, 2, 5, 20, 45]))]
            tokens = draw.choice([1, 2, 7, 15])
            asked.append((weights, prompt, tokens))
            waits.append(submit(engine, [bench.request(f"r{i}", weights, prompt, max_new_tokens=tokens)]))
        answers = [wait()[0] for wait in waits]
        engine.stop()
        assert engine.stats().kv_bytes == 0
        assert engine.stats().running == engine.stats().waiting == 0
    references: dict[str, Any] = {}
    for (weights, prompt, tokens), answer in zip(asked, answers, strict=True):
        key = str(weights)
        loaded = references.setdefault(key, bench.reference(weights))
        assert answer.tokens == peft_generated(loaded, prompt, tokens)


def test_layers_of_unequal_number_on_both_sides(tmp_path: Path) -> None:
    """`generate` itself cannot, as it makes the cache for the encoder's layers; the model's forward can."""
    model = tiny_seq2seq("t5", num_decoder_layers=3)
    save_seq2seq(model, tmp_path / "base")
    path = make_seq2seq_adapter(model, Seq2SeqSpec(seed=4), tmp_path / "a")
    bench = Bench(model, tmp_path, {"a": path})
    with bench.engine() as engine:
        requests = [bench.request(f"r{i}", {"a": 1.0}, prompt) for i, prompt in enumerate(PROMPTS)]
        answers = ask(engine, requests)
    loaded = peft_loaded(model, path)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        likely = [each.logprob for each in answer.logprobs]
        assert likely == pytest.approx(peft_logprobs(loaded, prompt, answer.tokens), abs=2e-4)
        with torch.inference_mode():
            ids = torch.tensor([[model.config.decoder_start_token_id, *answer.tokens[:-1]]])
            best = loaded(input_ids=torch.tensor([prompt]), decoder_input_ids=ids, use_cache=False).logits[0].argmax(-1)
        assert best.tolist() == answer.tokens


@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.parametrize("arch", SEQ2SEQ_ARCHS)
def test_over_a_quantized_base_they_are_pefts(arch: Seq2SeqArch, how: str, tmp_path: Path) -> None:
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[how])
    wide = {"d_kv": 16, "d_ff": 128} if arch != "bart" else {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    model = tiny_seq2seq(arch, d_model=64, **wide)
    save_seq2seq(model, tmp_path / "base")
    paths = {f"a{i}": make_seq2seq_adapter(model, Seq2SeqSpec(seed=i), tmp_path / f"a{i}") for i in range(2)}
    bench = Bench(model, tmp_path, paths, quantization=how)
    rows: list[str | None] = ["a0", None, "a1", "a0"]
    with bench.engine(started=False) as engine:
        asked = zip(rows, PROMPTS, strict=False)
        requests = [bench.request(f"r{i}", {} if n is None else {n: 1.0}, p) for i, (n, p) in enumerate(asked)]
        answers = ask(engine, requests)
        assert bench.base is not None
        assert bench.base.quantization == how
    assert bench.forwards[0] == -len(rows)
    for name, prompt, answer in zip(rows, PROMPTS, answers, strict=False):
        plain = load_pretrained(
            str(tmp_path / "base"), dtype="float32", device=torch.device("cpu"), quantization=how, task=Task.SEQ2SEQ
        )
        loaded = plain.model if name is None else PeftModel.from_pretrained(plain.model, str(paths[name])).eval()
        likely = peft_logprobs(loaded, prompt, answer.tokens)
        # On some CPUs bitsandbytes' kernel computes in bfloat16, whatever it is given.
        assert [each.logprob for each in answer.logprobs] == pytest.approx(likely, abs=1e-3 if how == "int8" else 0.1)
        if how == "int8":
            assert answer.tokens == peft_generated(loaded, prompt, TOKENS)
        dense = peft_logprobs(peft_loaded(model, paths[name] if name else None), prompt, answer.tokens)
        assert likely != pytest.approx(dense, abs=1e-4), "nothing was quantized"
