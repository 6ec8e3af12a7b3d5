"""How a choice is written: whole, or the part that is new; with its log-probabilities; after the prompt, if echoed."""

from __future__ import annotations

from collections.abc import Sequence

from service.api.deps import Tokenizer
from service.api.generation import ChoiceText
from service.api.schemas.generate import ChoiceView, LikelyToken, TokenLogprobView
from service.engine.events import TokenEvent, TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI writes this


class ChoiceWriter:
    """Writes the choices of one request. Deltas are written in the order in which they are sent."""

    def __init__(self, tokenizer: Tokenizer, *, with_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._echo: tuple[str, list[int]] = ("", [])
        self._begun: set[int] = set()

    def echoing(self, text: str, token_ids: Sequence[int]) -> ChoiceWriter:
        """Puts the prompt before each choice."""
        self._echo = (text, list(token_ids))
        return self

    def whole(self, choice: ChoiceText) -> ChoiceView:
        text, token_ids = self._echo
        return ChoiceView(
            index=choice.index,
            text=text + choice.text,
            token_ids=token_ids + choice.token_ids,
            finish_reason=choice.finish_reason,
            logprobs=self._logprobs(choice.logprobs),
        )

    def delta(self, event: TokenEvent) -> ChoiceView:
        text, token_ids = ("", []) if event.choice in self._begun else self._echo
        self._begun.add(event.choice)
        return ChoiceView(
            index=event.choice,
            text=text + event.text,
            token_ids=[*token_ids, *event.token_ids],
            finish_reason=event.finish_reason,
            logprobs=self._logprobs(event.logprobs),
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[TokenLogprobView] | None:
        return [self._token(token) for token in logprobs] if self._with_logprobs else None

    def _token(self, token: TokenLogprob) -> TokenLogprobView:
        return TokenLogprobView(
            token_id=token.token_id,
            token=self._tokenizer.token_text(token.token_id),
            logprob=max(token.logprob, LOWEST_LOGPROB),
            top=[
                LikelyToken(
                    token_id=token_id,
                    token=self._tokenizer.token_text(token_id),
                    logprob=max(logprob, LOWEST_LOGPROB),
                )
                for token_id, logprob in token.top
            ],
        )
