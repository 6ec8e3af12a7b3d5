"""What an encoder-decoder's files say of how its decoder begins, of what it may not say, and of how much it reads."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from service.engine.pooling.base import Unservable

log = logging.getLogger(__name__)

UNBOUNDED_CONTEXT = 4096  # where positions are relative and nothing limits them but memory
_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length")
_ENCODER_LENGTHS = ("max_encoder_position_embeddings", "max_source_positions", *_LENGTHS)
_DECODER_LENGTHS = ("max_decoder_position_embeddings", "max_target_positions", *_LENGTHS)
# What `generate` would also follow, and the value that changes nothing.
_NOT_FOLLOWED = {
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
}


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How every output begins (`start` is fed, and not part of it; `first` must be its first token), and the tokens
    that none may hold.
    """

    start: int
    first: int | None = None
    suppressed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Seq2SeqBase:
    """What a base brings to its task besides the model.

    `encoder_context` and `decoder_context` are the most tokens of a prompt and of an output; `usual_context` those that
    its files name where it can read more.
    """

    rules: DecodingRules
    encoder_context: int
    decoder_context: int
    usual_context: int | None = None

    @property
    def context(self) -> int:
        """The more of the two: beyond it there is nothing to allow."""
        return max(self.encoder_context, self.decoder_context)

    def limits(self, max_context: int) -> tuple[int, int]:
        """(of a prompt, of an output), `max_context` at most; 0: as many as its files name."""
        most = max_context or self.usual_context or self.context
        return min(most, self.encoder_context), min(most, self.decoder_context)


def describe(model: Any) -> Seq2SeqBase:
    """What the configs of a loaded model say. Raises Unservable."""
    config, generation = model.config, model.generation_config
    if (getattr(config, "num_experts", None) or 0) > 1:
        raise Unservable("it hands tokens to experts, whose layers cannot tell the rows of a batch apart")
    encoder = _longest(getattr(config, "encoder", config), _ENCODER_LENGTHS)
    decoder = _longest(getattr(config, "decoder", config), _DECODER_LENGTHS)
    usual = None
    if hasattr(config, "relative_attention_num_buckets"):  # no position is too far
        usual = encoder
        encoder, decoder = (max(length or 0, UNBOUNDED_CONTEXT) for length in (encoder, decoder))
    _tell_what_is_not_followed(generation)
    return Seq2SeqBase(
        DecodingRules(_start(config, generation), _single(generation.forced_bos_token_id), _suppressed(model)),
        encoder or UNBOUNDED_CONTEXT,
        decoder or UNBOUNDED_CONTEXT,
        usual,
    )


def _start(config: Any, generation: Any) -> int:
    """As `generate` finds it."""
    given = (generation.decoder_start_token_id, getattr(config, "decoder_start_token_id", None))
    for token in (*given, generation.bos_token_id):
        if token is not None:
            if isinstance(token, int):
                return token
            break
    raise Unservable("its files name no decoder_start_token_id: write it into generation_config.json")


def _single(token: int | list[int] | None) -> int | None:
    if isinstance(token, list):
        return token[0] if len(token) == 1 else None
    return token


def _suppressed(model: Any) -> tuple[int, ...]:
    """Tokens that are never generated; of bad words those that are a token alone, and not the end."""
    generation = model.generation_config
    ends = generation.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    words = [word for word in generation.bad_words_ids or () if len(word) == 1 and word[0] not in ends]
    return tuple(sorted({*(generation.suppress_tokens or ()), *(word[0] for word in words)}))


def _tell_what_is_not_followed(generation: Any) -> None:
    ignored = [
        f"{name}={value!r}"
        for name, neutral in _NOT_FOLLOWED.items()
        if (value := getattr(generation, name, None)) is not None and value != neutral
    ]
    if any(len(word) > 1 for word in generation.bad_words_ids or ()):
        ignored.append("bad_words_ids of several tokens")
    if ignored:
        log.info("requests say how tokens are chosen: the model's generation config asks for %s", ", ".join(ignored))


def _longest(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        if isinstance(length := getattr(config, name, None), int) and length > 0:
            return length
    return None
