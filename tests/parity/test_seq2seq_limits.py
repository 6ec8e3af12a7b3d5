"""Encoder-decoders at their limits: what their files say of outputs, lengths, memory, and what goes wrong."""

from __future__ import annotations

import json
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from service.engine.base_model import BaseModelError, load_base
from service.engine.errors import InvalidRequest, OutputTooLong, PromptTooLong, WrongTask
from service.engine.events import Event, FailedEvent, FinishedEvent, FinishReason, TokenEvent
from service.engine.selection import Selection
from service.engine.seq2seq import positions
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.task import Task
from tests.factories import AdapterSpec, make_adapter, save_model, tiny_model
from tests.parity.seq2seq_bench import (
    KV_BYTES,
    PENALTY,
    PROMPTS,
    TOKENS,
    Bench,
    ask,
    check,
    make_bench,
    submit,
)
from tests.seq2seq_factory import (
    CONTEXT,
    Seq2SeqArch,
    peft_generated,
    peft_loaded,
)


class TestWhatTheFilesSayOfOutputs:
    def rewritten(self, bench: Bench, **fields: Any) -> Bench:
        """The base with other fields in its generation config."""
        path = bench.folder / "base" / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        bench.model = type(bench.model).from_pretrained(bench.folder / "base").eval()
        return bench

    @pytest.mark.parametrize("arch", ["t5", "bart"])
    def test_an_end_ends_an_output(self, arch: Seq2SeqArch, tmp_path: Path) -> None:
        bench = make_bench(arch, tmp_path, adapters=1)
        whole = peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        end = next(token for token in whole[3:] if token not in whole[:3])
        self.rewritten(bench, eos_token_id=[257, end])
        with bench.engine() as engine:
            requests = [bench.request("r", {}, PROMPTS[1], repetition_penalty=PENALTY)]
            requests.append(bench.request("on", {}, PROMPTS[1], repetition_penalty=PENALTY, ignore_eos=True))
            answer, on = ask(engine, requests)
        assert answer.reason is FinishReason.STOP
        assert answer.tokens == whole[: whole.index(end) + 1]
        assert answer.tokens == peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        assert (on.tokens, on.reason) == (whole, FinishReason.LENGTH)

    @pytest.mark.parametrize("arch", ["t5", "bart"])
    def test_a_forced_beginning_and_words_that_are_never_said(self, arch: Seq2SeqArch, tmp_path: Path) -> None:
        bench = make_bench(arch, tmp_path, adapters=2)
        said = peft_generated(bench.model, PROMPTS[0], TOKENS)
        rules = {"forced_bos_token_id": 65, "bad_words_ids": [[said[-1]], [257]], "suppress_tokens": [said[0], 66]}
        self.rewritten(bench, **rules)
        rows: list[dict[str, float]] = [{}, {"a0": 1.0}, {"a1": 1.0}]
        with bench.engine() as engine:
            requests = [bench.request(f"r{i}", weights, PROMPTS[i]) for i, weights in enumerate(rows)]
            answers = ask(engine, requests)
        for i, weights in enumerate(rows):
            path = next((bench.adapters[name] for name in weights), None)
            expected = peft_generated(peft_loaded(bench.model, path), PROMPTS[i], TOKENS)
            assert answers[i].tokens == expected
            assert expected[0] == 65
            assert answers[i].logprobs[0].logprob == 0.0, "there was no other"

    def test_another_start(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=1)
        before = peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        self.rewritten(bench, decoder_start_token_id=33)
        with bench.engine() as engine:
            (answer,) = ask(engine, [bench.request("r", {}, PROMPTS[1], repetition_penalty=PENALTY)])
        after = peft_generated(bench.model, PROMPTS[1], TOKENS, repetition_penalty=PENALTY)
        assert answer.tokens == after != before

    def test_none_is_refused(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=0)
        for name in ("generation_config.json", "config.json"):
            path = bench.folder / "base" / name
            fields = json.loads(path.read_text())
            path.write_text(json.dumps({**fields, "decoder_start_token_id": None, "bos_token_id": None}))
        with pytest.raises(BaseModelError, match="name no decoder_start_token_id"), bench.engine():
            pass


class TestLengthsAndMemory:
    def test_both_sides_have_their_own_limit(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=1)
        with bench.engine() as engine:
            longest = bench.request("r", {"a0": 1.0}, [*range(CONTEXT)], max_new_tokens=CONTEXT)
            (answer,) = ask(engine, [longest])
            with pytest.raises(PromptTooLong, match="encoder reads at most 96 tokens and the prompt has 97") as prompt:
                engine.submit([bench.request("p", {}, [1] * 97, max_new_tokens=1)], lambda event: None)
            with pytest.raises(
                OutputTooLong, match=r"decoder writes at most 96 tokens.*max_new_tokens is 97"
            ) as output:
                engine.submit([bench.request("o", {}, [1], max_new_tokens=97)], lambda event: None)
        check(bench, {"a0": 1.0}, longest.prompt_ids, answer, tokens=CONTEXT)
        assert (prompt.value.param, output.value.param) == ("prompt", "max_new_tokens")
        with bench.engine(max_context=40) as engine:
            assert engine.max_context == 40
            with pytest.raises(OutputTooLong, match="at most 40"):
                engine.submit([bench.request("o", {}, [1] * 40, max_new_tokens=41)], lambda event: None)
        with (
            pytest.raises(BaseModelError, match="max_context is 97 but the model's is 96"),
            bench.engine(max_context=97),
        ):
            pass

    def test_relative_positions_go_beyond_what_files_name(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=1)
        path = bench.folder / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "n_positions": 20}))
        with bench.engine() as engine:
            assert engine.max_context == 20
        with bench.engine(max_context=200) as engine:
            request = bench.request("r", {"a0": 1.0}, [i % 250 for i in range(200)])
            (answer,) = ask(engine, [request])
        check(bench, {"a0": 1.0}, request.prompt_ids, answer)

    def test_memory_is_for_prompts_and_outputs(self, tmp_path: Path) -> None:
        """Rows of 30 and 12 tokens, and memory for two and a half of them: no more run together."""
        bench = make_bench("bart", tmp_path, adapters=2)
        row = (30 + TOKENS) * KV_BYTES
        with bench.engine(kv_memory=5 * row // 2) as engine:
            prompts = [[i * 7 % 250 for i in range(k, k + 30)] for k in range(6)]
            names = ["a0", "a1"] * 3
            most = 0
            requests = [bench.request(f"r{i}", {names[i]: 1.0}, prompt) for i, prompt in enumerate(prompts)]
            runner: Any = engine._worker._runner  # type: ignore[attr-defined]
            keep = runner.keep

            def watched(rows: Sequence[int]) -> None:
                nonlocal most
                most = max(most, runner.kv_bytes[0])
                keep(rows)

            runner.keep = watched
            answers = ask(engine, requests)
            with pytest.raises(InvalidRequest, match="more memory than --kv-memory allows"):
                engine.submit([bench.request("l", {}, [1] * 90, max_new_tokens=90)], lambda event: None)
            # A prompt's tokens and an output's do not stand for each other: 80 and 10 fit, as 10 and 80 do.
            ask(engine, [bench.request("p", {}, [1] * 80, max_new_tokens=10)])
            ask(engine, [bench.request("o", {}, [1] * 10, max_new_tokens=80)])
        assert max(bench.forwards) == 2
        assert 2 * (30 + TOKENS - 1) * KV_BYTES <= most <= 5 * row // 2
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            check(bench, {names[i]: 1.0}, prompt, answer)


class TestWhenThingsGoWrong:
    def test_a_forward_that_fails_takes_its_own_request_alone(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=2)
        with bench.engine() as engine:
            assert bench.base is not None
            embed: Any = bench.base.adapted.model.encoder.embed_tokens  # type: ignore[union-attr]

            def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if (inputs[0] == 251).any():
                    raise RuntimeError("the forward failed, as it was told to")

            embed.register_forward_pre_hook(fail)
            rows = [(PROMPTS[0], "a0"), ([5, 251, 6], "a1"), (PROMPTS[1], "a1"), (PROMPTS[3], "a0")]
            requests = [bench.request(f"r{i}", {name: 1.0}, prompt) for i, (prompt, name) in enumerate(rows)]
            answers = ask(engine, requests)
        assert isinstance(answers[1].end, FailedEvent)
        for i in (0, 2, 3):
            check(bench, {rows[i][1]: 1.0}, rows[i][0], answers[i])

    def test_a_decode_step_that_fails_leaves_the_others_as_they_were(self, tmp_path: Path) -> None:
        """The same forward is tried again in halves: nothing of the first try may stay behind."""
        bench = make_bench("bart", tmp_path, adapters=2)
        with bench.engine() as engine:
            assert bench.base is not None
            layer: Any = bench.base.adapted.model.model.decoder.layers[1].fc2  # type: ignore[union-attr]
            failures = 0

            def fail_once(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                nonlocal failures
                if len(inputs[0]) == 4 and failures < 3 and bench.forwards[-1] > 0:
                    failures += 1
                    raise RuntimeError("the forward failed, as it was told to")

            layer.register_forward_pre_hook(fail_once)
            names = ["a0", "a1", "a0", "a1"]
            requests = [bench.request(f"r{i}", {name: 1.0}, PROMPTS[i]) for i, name in enumerate(names)]
            answers = ask(engine, requests)
        assert failures == 3
        for i, name in enumerate(names):
            check(bench, {name: 1.0}, PROMPTS[i], answers[i])

    def test_a_request_that_is_cancelled_leaves_the_others_as_they_were(self, tmp_path: Path) -> None:
        bench = make_bench("bart", tmp_path, adapters=2)
        with bench.engine() as engine:
            events: queue.Queue[Event] = queue.Queue()
            engine.submit([bench.request("gone", {"a0": 1.0}, PROMPTS[3], max_new_tokens=90)], events.put)
            events.get(timeout=60)
            wait = submit(engine, [bench.request(f"r{i}", {"a1": 1.0}, PROMPTS[i]) for i in range(4)])
            engine.cancel("gone")
            answers = wait()
            last = [events.get(timeout=60)]
            while not isinstance(last[-1], FinishedEvent):
                last.append(events.get(timeout=60))
            assert isinstance(last[-2], TokenEvent)
            assert last[-2].finish_reason is FinishReason.CANCELLED
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            check(bench, {"a1": 1.0}, prompt, answer)

    def test_decoders_whose_positions_cannot_be_told_run_one_row_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The self-test finds out, and what is said is right all the same."""
        monkeypatch.setattr(positions.RowPositions, "__init__", _no_positions)
        bench = make_bench("bart", tmp_path, adapters=2)
        with bench.engine() as engine:
            assert engine.kv_backend == "solo"
            requests = [bench.request(f"r{i}", {f"a{i % 2}": 1.0}, prompt) for i, prompt in enumerate(PROMPTS[:4])]
            answers = ask(engine, requests)
        assert {*bench.forwards} == {1, -1}
        for i, (prompt, answer) in enumerate(zip(PROMPTS[:4], answers, strict=True)):
            check(bench, {f"a{i % 2}": 1.0}, prompt, answer)

    def test_bases_of_another_kind_say_which_task_is_theirs(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=0)
        save_model(tiny_model("llama"), tmp_path / "llama")
        with pytest.raises(BaseModelError, match="encoder-decoders: start the server with --task seq2seq"):
            load_base(str(tmp_path / "base"), device="cpu")
        with pytest.raises(BaseModelError, match=r"llama models have no encoder.*--task generate"):
            load_base(str(tmp_path / "llama"), device="cpu", task=Task.SEQ2SEQ)
        request = GenerationRequest("r", (1,), SamplingParams(), Selection())
        with bench.engine() as engine, pytest.raises(WrongTask):
            engine.submit([request], lambda event: None)

    def test_an_adapter_of_a_decoder_does_not_bind(self, tmp_path: Path) -> None:
        bench = make_bench("t5", tmp_path, adapters=0)
        bench.adapters["foreign"] = make_adapter(tiny_model("llama"), AdapterSpec(), tmp_path / "foreign")
        with pytest.raises(Exception, match="q_proj"), bench.engine():
            pass


def _no_positions(self: positions.RowPositions, decoder: nn.Module) -> None:
    self._positions = None
