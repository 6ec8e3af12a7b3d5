"""Runs an encoder-decoder: prompts by the encoder, once, and then the decoder token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from adapters.layers import AdaptedModel
from adapters.low_rank import LowRankBatch
from service.engine.kv.backend import Blocks
from service.engine.kv.rows import RowsBackend
from service.engine.seq2seq.base import DecodingRules
from service.engine.seq2seq.cross import CrossStates
from service.engine.seq2seq.positions import RowPositions
from service.engine.sequence import RowLength


class Seq2SeqRunner:
    """Implements `ModelRunner`: the first tokens of a row are its prompt, whole; those after it its output's.

    A prompt's forward runs the encoder, and the decoder over the token that every output begins after. Outputs are rows
    of a `RowsBackend`, padded on the left; prompts are padded on the right. `kv_bytes` counts both.
    """

    name = "encoder-decoder"

    def __init__(self, adapted: AdaptedModel, device: torch.device, budget_bytes: int, rules: DecodingRules) -> None:
        self._adapted = adapted
        self._device = device
        self._budget = budget_bytes
        self.rules = rules
        self.ragged = True
        self._kv = RowsBackend(device, budget_bytes)
        self._cross = CrossStates()
        self._cross_bytes_per_token = 0
        self._positions = RowPositions(adapted.model.get_decoder())  # type: ignore[operator]
        self._states: Tensor | None = None  # what the encoder answers for one token, in zeros

    @property
    def rows(self) -> int:
        return self._kv.rows

    def spare(self, lengths: Sequence[RowLength]) -> int:
        prompt = max((length.prompt for length in lengths), default=0) * self._cross_bytes_per_token
        output = max((length.output for length in lengths), default=0) * self._kv.bytes_per_token
        return self._budget - max(len(lengths) * (prompt + output), self._held)

    @property
    def _held(self) -> int:
        return self._kv.used_bytes + self._cross.nbytes

    @property
    def kv_bytes(self) -> tuple[int, int]:
        return self._held, self._budget

    def add(self, rows: int) -> None:
        self._kv.add(rows)
        self._cross = self._cross.with_rows(rows)

    @torch.inference_mode()
    def extend(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        batch: LowRankBatch | None,
        *,
        every_position: bool = False,
    ) -> Tensor:
        assert not every_position, "an encoder says nothing of how likely its text is"
        with self._adapted.using(batch):
            return self._decode(rows, tokens) if self._cross.is_read(rows[0]) else self._read(rows, tokens)

    def _read(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts whole, and token logits of what their outputs begin with."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        assert self.ragged or min(lengths) == longest
        padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self._device)
        columns = torch.arange(longest, device=self._device)
        mask = (columns < torch.tensor(lengths, device=self._device)[:, None]).long()
        answer = self._adapted.model.get_encoder()(input_ids=padded, attention_mask=mask)  # type: ignore[operator]
        step = self._kv.begin(rows, [1] * len(rows))
        cache = EncoderDecoderCache(step.cache, DynamicCache())
        output = self._adapted.model(
            encoder_outputs=answer,
            attention_mask=mask,
            decoder_input_ids=torch.full((len(rows), 1), self.rules.start, device=self._device),
            past_key_values=cache,
            use_cache=True,
        )
        token_logits = self._allowed(output.logits[:, -1].float().cpu(), first=True)
        layers = tuple((layer.keys, layer.values) for layer in cache.cross_attention_cache.layers)
        grown = self._cross.with_states(rows, layers, lengths)
        self._kv.commit()
        self._cross, self._cross_bytes_per_token = grown, grown.bytes_per_token
        if self._states is None:
            self._states = torch.zeros_like(answer.last_hidden_state[:1, :1])
        return token_logits

    def _decode(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """One more token of each row's output."""
        assert self._states is not None
        step = self._kv.begin(rows, [1] * len(rows))
        prompts, mask = self._cross.of(rows)
        # Its numbers are in the cache: of the encoder's answer the shape alone is looked at.
        answer = self._states.expand(*mask.shape, -1)
        with self._positions.at(step.positions[:, -1]):
            output = self._adapted.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=answer),
                attention_mask=mask,
                decoder_input_ids=torch.tensor(tokens, device=self._device),
                decoder_attention_mask=step.mask,
                past_key_values=EncoderDecoderCache(step.cache, prompts),
                use_cache=True,
            )
        token_logits = self._allowed(output.logits[:, -1].float().cpu(), first=False)
        self._kv.commit()
        return token_logits

    def _allowed(self, token_logits: Tensor, *, first: bool) -> Tensor:
        """Token logits [rows, vocabulary] without what the model's generation config rules out."""
        if first and self.rules.first is not None:
            forced = torch.full_like(token_logits, -torch.inf)
            forced[:, self.rules.first] = token_logits[:, self.rules.first]
            return forced
        if self.rules.suppressed:
            token_logits[:, list(self.rules.suppressed)] = -torch.inf
        return token_logits

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        kept = self._cross.kept(rows)
        self._kv.keep(rows)
        self._cross = kept

    def read(self, row: int, start: int, end: int) -> Blocks:
        raise NotImplementedError("outputs have no beginnings in common that would be worth keeping")

    def write(self, row: int, *pieces: Blocks) -> None:
        raise NotImplementedError("outputs have no beginnings in common that would be worth keeping")
