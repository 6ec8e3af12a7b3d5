"""Writes answers as LoRAX does."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from service.api.choices import LOWEST_LOGPROB
from service.api.deps import Tokenizer
from service.api.generation import ChoiceText, EventStream, gather
from service.api.schemas.lorax import (
    LoraxAlternative,
    LoraxDetails,
    LoraxEvent,
    LoraxFinishReason,
    LoraxPrefillToken,
    LoraxResponse,
    LoraxStreamDetails,
    LoraxToken,
)
from service.api.sse import data_frame
from service.engine.events import FinishReason, TokenEvent, TokenLogprob
from service.engine.sequence import GenerationRequest


@dataclass(frozen=True, slots=True)
class LoraxWriter:
    """Writes the answer to one request. `before` is put before the text; `alternatives` are listed for each token."""

    request: GenerationRequest
    tokenizer: Tokenizer
    before: str
    with_details: bool
    alternatives: int

    async def whole(self, events: EventStream) -> LoraxResponse:
        (answer,) = await gather(events, [self.request])
        choice = answer.choices[0]
        details = None
        if self.with_details:
            details = LoraxDetails(
                **self._summary(choice),
                prefill=self._prefill(answer.prompt_logprobs),
                tokens=[self._token(token) for token in choice.logprobs],
            )
        return LoraxResponse(generated_text=self.before + choice.text, details=details)

    async def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        """One for each token. LoRAX ends its streams without [DONE]."""
        choice = ChoiceText(0)
        async with events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    choice.add(event)
                    yield data_frame(self._event(event, choice).model_dump_json())

    def _event(self, event: TokenEvent, choice: ChoiceText) -> LoraxEvent:
        (logprob,) = event.logprobs
        token = self._token(logprob)
        if event.text or not token.special:  # clients join the texts of all tokens that are not special
            token = token.model_copy(update={"text": event.text, "special": False})
        if event.finish_reason is None:
            return LoraxEvent(token=token, generated_text=None, details=None)
        details = LoraxStreamDetails(**self._summary(choice)) if self.with_details else None
        return LoraxEvent(token=token, generated_text=self.before + choice.text, details=details)

    def _summary(self, choice: ChoiceText) -> dict[str, Any]:
        params = self.request.params
        return {
            "finish_reason": self._finish_reason(choice),
            "prompt_tokens": len(self.request.prompt_ids),
            "generated_tokens": len(choice.token_ids),
            "seed": None if params.greedy else params.seed,
        }

    def _finish_reason(self, choice: ChoiceText) -> LoraxFinishReason:
        """What the engine calls a stop is EOS, a grammar's end, or a stop string."""
        if choice.finish_reason is FinishReason.LENGTH:
            return "length"
        by_string = self.request.params.stop and not self.tokenizer.is_special(choice.token_ids[-1])
        return "stop_sequence" if by_string else "eos_token"

    def _prefill(self, logprobs: tuple[TokenLogprob | None, ...]) -> list[LoraxPrefillToken]:
        tokens = zip(self.request.prompt_ids, logprobs, strict=False)  # none unless they were asked for
        return [
            LoraxPrefillToken(
                id=token_id,
                text=self.tokenizer.token_text(token_id),
                logprob=None if token is None else max(token.logprob, LOWEST_LOGPROB),
            )
            for token_id, token in tokens
        ]

    def _token(self, token: TokenLogprob) -> LoraxToken:
        alternatives = [self._alternative(token_id, logprob) for token_id, logprob in token.top]
        return LoraxToken(
            **self._alternative(token.token_id, token.logprob).model_dump(),
            special=self.tokenizer.is_special(token.token_id),
            alternative_tokens=alternatives if self.alternatives else None,
        )

    def _alternative(self, token_id: int, logprob: float) -> LoraxAlternative:
        return LoraxAlternative(
            id=token_id, text=self.tokenizer.token_text(token_id), logprob=max(logprob, LOWEST_LOGPROB)
        )
