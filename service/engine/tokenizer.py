"""Text to token ids and back, over a transformers tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextTokenizer:
    """The base model's tokenizer. Safe to call from several threads: it only encodes and decodes."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary

    @property
    def underlying(self) -> Any:
        """The transformers tokenizer itself."""
        return self._tokenizer

    @property
    def bos_token_id(self) -> int | None:
        return self._tokenizer.bos_token_id  # type: ignore[no-any-return]

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id  # type: ignore[no-any-return]

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds of itself."""
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens. Ids beyond the tokenizer's own (a padded vocabulary) decode to nothing."""
        known = [i for i in ids if i < len(self._tokenizer)]
        return str(self._tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens included."""
        if token_id >= len(self._tokenizer):
            return ""
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
