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
    """Encodes as the tokenizer does in training: `tokenizer(text, text_pair, truncation=…)`.

    On a copy and under a lock, because a fast tokenizer that is told to cut changes its state. From any thread.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    def encode(self, text: str, pair: str | None = None, *, limit: int | None = None) -> EncodedInput:
        """`limit` is the most tokens, special ones included; of a pair the longer text is cut first.

        Raises ValueError for a limit that does not hold the special tokens.
        """
        cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        with self._lock:
            if limit is not None and limit <= (fewest := self._tokenizer.num_special_tokens_to_add(pair is not None)):
                raise ValueError(f"{limit} tokens hold nothing of the text: {fewest} of them are special")
            encoded = self._tokenizer(text, pair, **cut)
        types = encoded.get("token_type_ids")
        return EncodedInput(tuple(encoded["input_ids"]), tuple(types) if types is not None and any(types) else None)
