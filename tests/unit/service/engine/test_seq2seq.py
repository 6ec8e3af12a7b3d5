"""What an encoder-decoder's runner is made of: states of prompts by row, positions by row, and what files say."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.engine.events import Event, FinishReason, TokenEvent
from service.engine.job import make_job
from service.engine.pooling.base import Unservable
from service.engine.selection import Selection
from service.engine.seq2seq.base import DecodingRules, Seq2SeqBase, describe
from service.engine.seq2seq.cross import CrossStates, Layers
from service.engine.seq2seq.positions import RowPositions
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine.task import Task
from tests.seq2seq_factory import tiny_seq2seq

TOKEN_BYTES = 2 * 2 * 3 * 4  # two layers' keys and values, of one head with three features


def states(*texts: list[float]) -> Layers:
    """Two layers whose keys are the texts' numbers, padded with -1 on the right, and whose values are their tenfold."""
    longest = max(map(len, texts))
    padded = torch.tensor([[*text, *[-1.0] * (longest - len(text))] for text in texts])
    keys = padded[:, None, :, None].expand(-1, 1, -1, 3).contiguous()
    return ((keys, 10 * keys), (keys + 100, 10 * keys + 100))


def held(cross: CrossStates, rows: list[int]) -> list[list[float]]:
    """The keys of the first layer by row, as far as the mask says, once all else is found to go with them."""
    cache, mask = cross.of(rows)
    first, second = cache.layers
    assert first.keys is not None
    assert second.values is not None
    assert torch.equal(second.values[mask.bool().unsqueeze(1)], 10 * first.keys[mask.bool().unsqueeze(1)] + 100)
    assert mask.shape == (len(rows), first.keys.shape[2])
    assert mask[:, -1].any(), "a column that nobody has"
    return [first.keys[i, 0, mask[i].bool(), 0].tolist() for i in range(len(rows))]


class TestCrossStates:
    def test_rows_come_and_go_in_any_order(self) -> None:
        cross = CrossStates().with_rows(2)
        assert (cross.rows, cross.nbytes, cross.bytes_per_token) == (2, 0, 0)
        cross = cross.with_states([1], states([1, 2, 3]), [3])
        assert [cross.is_read(row) for row in range(2)] == [False, True]
        cross = cross.with_rows(2).with_states([0, 3], states([4], [5, 6, 7, 8, 9]), [1, 5])
        assert held(cross, [1, 3, 0]) == [[1, 2, 3], [5, 6, 7, 8, 9], [4]]
        assert held(cross, [0]) == [[4]]
        cross = cross.kept([3, 2, 1])
        assert [cross.is_read(row) for row in range(3)] == [True, False, True]
        assert held(cross, [0, 2]) == [[5, 6, 7, 8, 9], [1, 2, 3]]
        cross = cross.with_states([1], states([7, 7]), [2])
        assert held(cross, [0, 1, 2]) == [[5, 6, 7, 8, 9], [7, 7], [1, 2, 3]]

    def test_nothing_is_held_of_rows_that_left(self) -> None:
        cross = CrossStates().with_rows(3).with_states([0, 1, 2], states([1] * 2, [2] * 9, [3] * 4), [2, 9, 4])
        assert (cross.nbytes, cross.bytes_per_token) == (3 * 9 * TOKEN_BYTES, TOKEN_BYTES)
        kept = cross.kept([0, 2])
        assert kept.nbytes == 2 * 4 * TOKEN_BYTES
        assert all(part.untyped_storage().nbytes() == part.nbytes for pair in kept.layers for part in pair)
        assert kept.kept([]).nbytes == 0
        assert held(cross, [1]) == [[2] * 9], "what was before stays as it was"

    def test_a_prompt_is_read_once(self) -> None:
        cross = CrossStates().with_rows(1).with_states([0], states([1]), [1])
        with pytest.raises(AssertionError):
            cross.with_states([0], states([1]), [1])


class Table(nn.Embedding):
    """Positions as BART looks them up: given, or counted from a length."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]) + past_key_values_length
        return super().forward(position_ids.unsqueeze(0))


class ByLength(nn.Module):
    """Positions as M2M100 looks them up: one length for all rows."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table.weight

    def forward(self, input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        assert isinstance(past_key_values_length, int)
        return self.table[torch.arange(input_ids.shape[1]) + past_key_values_length].expand(len(input_ids), -1, -1)


@pytest.mark.parametrize("kind", ["given", "length"])
def test_each_row_has_its_own_position(kind: str) -> None:
    table = Table(10, 4)
    module: Any = table if kind == "given" else ByLength(table)
    expected = module(torch.zeros(1, 6, dtype=torch.long)).expand(3, 6, 4)[0]
    rows = RowPositions(nn.ModuleDict({"embed_positions": module}))
    tokens = torch.zeros(3, 1, dtype=torch.long)
    with rows.at(torch.tensor([5, 0, 2])):
        found = module(tokens, 5, position_ids=torch.tensor([5])) if kind == "given" else module(tokens, 5)
    assert torch.equal(found, expected[[5, 0, 2]].unsqueeze(1))
    alone = module(tokens[:1], 3)
    assert torch.equal(alone.flatten(), expected[3]), "outside of it nothing is changed"


class TestWhatFilesSay:
    def test_lengths_of_each_side(self) -> None:
        bart = describe(tiny_seq2seq("bart"))
        assert bart == Seq2SeqBase(DecodingRules(257), 96, 96)
        assert (bart.limits(0), bart.limits(50), bart.context) == ((96, 96), (50, 50), 96)
        t5 = describe(tiny_seq2seq("t5", n_positions=512))
        assert (t5.limits(0), t5.limits(3000), t5.context) == ((512, 512), (3000, 3000), 4096)
        sides = Seq2SeqBase(DecodingRules(0), 1000, 100)
        assert (sides.limits(0), sides.limits(500), sides.context) == ((1000, 100), (500, 100), 1000)

    @pytest.mark.parametrize(
        ("generation", "rules"),
        [
            ({}, DecodingRules(257)),
            ({"decoder_start_token_id": 3}, DecodingRules(3)),
            ({"forced_bos_token_id": 5}, DecodingRules(257, 5)),
            ({"forced_bos_token_id": [5]}, DecodingRules(257, 5)),
            ({"bad_words_ids": [[7], [257], [8, 9]], "suppress_tokens": [2, 7]}, DecodingRules(257, None, (2, 7))),
        ],
    )
    def test_rules_of_outputs(self, generation: dict[str, Any], rules: DecodingRules) -> None:
        model = tiny_seq2seq("bart")
        model.generation_config.update(**generation)
        assert describe(model).rules == rules

    def test_what_is_not_followed_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        model = tiny_seq2seq("bart")
        model.generation_config.update(num_beams=4, no_repeat_ngram_size=3, bad_words_ids=[[8, 9]], min_length=0)
        with caplog.at_level("INFO"):
            describe(model)
        assert "num_beams=4, no_repeat_ngram_size=3, bad_words_ids of several tokens" in caplog.text
        caplog.clear()
        with caplog.at_level("INFO"):
            describe(tiny_seq2seq("bart"))
        assert caplog.text == ""

    def test_experts_are_refused(self) -> None:
        model = tiny_seq2seq("t5", num_experts=8)
        with pytest.raises(Unservable, match="hands tokens to experts"):
            describe(model)

    def test_a_beginning_is_needed(self) -> None:
        model = tiny_seq2seq("bart")
        model.config = SimpleNamespace(max_position_embeddings=9, decoder_start_token_id=None)  # type: ignore[assignment]
        model.generation_config.update(decoder_start_token_id=None, bos_token_id=None)
        with pytest.raises(Unservable, match="decoder_start_token_id"):
            describe(model)


class Words:
    """A tokenizer of words, with a space before each but the first: as SentencePiece's."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize(("task", "text"), [(Task.SEQ2SEQ, "w7 w8"), (Task.GENERATE, " w7 w8")])
def test_an_output_is_no_continuation_of_its_prompt(task: Task, text: str) -> None:
    events: list[Event] = []
    request = GenerationRequest("r", (1, 2), SamplingParams(), Selection(), task=task)
    job = make_job(request, events.append, Words(), lambda job: None)
    for token, reason in ((7, None), (8, FinishReason.LENGTH)):
        job.take_token(job.choices[0], token, reason, None, hidden=False)
    assert "".join(event.text for event in events if isinstance(event, TokenEvent)) == text
