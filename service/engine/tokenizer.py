"""Text to token ids and back, over a transformers tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from service.engine.chat_template import ChatTemplateError, render_bounded
from service.engine.detokenizer import REPLACEMENT
from service.engine.token_bytes import TokenBytes


class TextTokenizer:
    """The base model's tokenizer. Safe to call from several threads: it only encodes and decodes."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._bytes = TokenBytes(tokenizer)
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

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

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own, to look into; several named ones one after another."""
        template = getattr(self._tokenizer, "chat_template", None)
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text, through `template` or the tokenizer's own. Raises ChatTemplateError.

        Templates run in Jinja's immutable sandbox; `template`, which comes with an adapter, within limits besides.
        """
        if template is not None:
            return render_bounded(
                template,
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**self._tokenizer.special_tokens_map, **variables},
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=None if tools is None else list(tools),
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **variables,
                )
            )
        except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
            raise ChatTemplateError(" ".join(str(error).split()) or type(error).__name__) from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds of itself unless told not to."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text. Ids beyond the tokenizer's own (a padded vocabulary) decode to nothing."""
        known = [i for i in ids if i < len(self._tokenizer)]
        return str(
            self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def entries(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary spells them, which is not always text: `Ġthe`."""
        return list(self._tokenizer.convert_ids_to_tokens(list(ids)))

    def is_special(self, token_id: int) -> bool:
        """Whether it stands for no text of its own, as EOS does."""
        return token_id in self._special

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens included."""
        if token_id >= len(self._tokenizer):
            return ""
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that the token adds to a text, which may be part of a character; None if that cannot be told."""
        if token_id >= len(self._tokenizer):
            return b""
        own = self._bytes.of(self._tokenizer.convert_ids_to_tokens(token_id))
        if own is not None:
            return own
        text = self.token_text(token_id)
        return None if REPLACEMENT in text else text.encode()
