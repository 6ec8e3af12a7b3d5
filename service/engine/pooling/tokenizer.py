"""Texts, alone or in pairs, to token ids and token types, cut to a length where that is asked for."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EncodedInput:
    """`types` tells the texts of a pair apart, for models that take that; None: the model takes none, or all are 0."""

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None


class PairTokenizer:
    """Encodes as the tokenizer does in training: `tokenizer(text, text_pair, truncation=…)`. From any thread.

    A fast tokenizer that is told to cut changes its state, so that is done on a copy and under a lock. Only the cutting
    is: a text that takes seconds to read holds nobody else up.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._whole = copy.deepcopy(tokenizer)  # never told to cut
        self._cutting = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        for each in (self._whole, self._cutting):
            if each.is_fast:  # what its file says of lengths is for whoever wrote it
                each.backend_tokenizer.no_truncation()
                each.backend_tokenizer.no_padding()

    def encode(self, text: str, pair: str | None = None, *, limit: int | None = None) -> EncodedInput:
        """`limit` is the most tokens, special ones included; of a pair the longer text is cut first.

        Raises ValueError for a limit that does not hold the special tokens.
        """
        pair = pair or None  # to a tokenizer, an empty second text is none
        if limit is None:
            return _encoded(self._whole(text, pair))
        if limit <= (fewest := self._whole.num_special_tokens_to_add(pair is not None)):
            raise ValueError(f"{limit} tokens hold nothing of the text: {fewest} of them are special")
        if not self._whole.is_fast:
            return _encoded(self._whole(text, pair, truncation=True, max_length=limit))
        return self._cut([text] if pair is None else [text, pair], limit)

    def _cut(self, texts: list[str], limit: int) -> EncodedInput:
        """What the tokenizer does in one call: each text to its tokens, then all of them cut and put together."""
        whole, cutting = self._whole.backend_tokenizer, self._cutting.backend_tokenizer
        side = self._cutting.truncation_side
        read = whole.encode_batch_fast(texts, add_special_tokens=False)
        longest = max(map(len, read))
        for each in read:
            # Putting together takes its time with what is cut off. One token more tells which of a pair is the longer.
            each.truncate(limit + (len(each) == longest), direction=side)
        with self._lock:
            cutting.enable_truncation(limit, strategy="longest_first", direction=side)
            put = cutting.post_process(*read, add_special_tokens=True)
        types = put.type_ids if "token_type_ids" in self._cutting.model_input_names else None
        return _encoded({"input_ids": put.ids, "token_type_ids": types})


def _encoded(encoded: Any) -> EncodedInput:
    types = encoded.get("token_type_ids")
    return EncodedInput(tuple(encoded["input_ids"]), tuple(types) if types is not None and any(types) else None)
