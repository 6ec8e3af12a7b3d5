"""How /v1/completions writes its answers, whole and as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from service.api.choices import LOWEST_LOGPROB
from service.api.deps import Tokenizer
from service.api.generation import EventStream, gather
from service.api.openai import Envelope, usage_of
from service.api.receipt import ReceiptWriter
from service.api.schemas.completions import CompletionChoice, CompletionLogprobs, CompletionResponse
from service.api.sse import DONE, data_frame
from service.engine.detokenizer import TextStream
from service.engine.events import FinishedEvent, PromptEvent, TokenEvent, TokenLogprob, Usage
from service.engine.sequence import GenerationRequest


@dataclass(slots=True)
class _Choice:
    """Where one choice stands: its tokens' text, how many characters of it there are, and whether any were sent."""

    text: TextStream
    length: int = 0
    begun: bool = False


@dataclass(slots=True)
class CompletionWriter:
    """`echoes` are the prompts' texts, to be put before their choices; None: not asked for."""

    answer: Envelope
    requests: Sequence[GenerationRequest]
    tokenizer: Tokenizer
    logprobs: int | None
    echoes: Sequence[str] | None
    receipt: ReceiptWriter
    include_usage: bool
    _prompt_logprobs: dict[str, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)
    _choices: dict[int, _Choice] = field(default_factory=dict)

    async def whole(self, events: EventStream) -> CompletionResponse:
        answers = await gather(events, self.requests)
        choices = []
        for request, answer in zip(self.requests, answers, strict=True):
            self._prompt_logprobs[request.request_id] = answer.prompt_logprobs
            for choice in answer.choices:
                reason = choice.finish_reason
                choices.append(self._write(request.request_id, choice.index, choice.text, choice.logprobs, reason))
        usage = usage_of(answer.finished.usage for answer in answers)
        response = CompletionResponse(**self.answer.fields(), object="text_completion", choices=choices, usage=usage)
        return self.receipt.whole(response, answers[0])

    async def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        ends: list[FinishedEvent] = []
        async with events:
            async for event in events:
                match event:
                    case FinishedEvent():
                        ends.append(event)
                    case PromptEvent():
                        self._prompt_logprobs[event.request_id] = event.logprobs
                    case TokenEvent():
                        self.receipt.saw(event)
                        choice = self._write(
                            event.request_id, event.choice, event.text, event.logprobs, event.finish_reason
                        )
                        if choice.text or choice.logprobs or choice.finish_reason:
                            yield _frame(self._event([choice]))
        if self.include_usage or self.receipt.wanted:
            yield _frame(self.receipt.last(self._event([], [end.usage for end in ends]), ends[0]))
        yield DONE

    def _event(self, choices: list[CompletionChoice], usages: Sequence[Usage] = ()) -> CompletionResponse:
        fields = {**self.answer.fields(), "object": "text_completion", "choices": choices}
        if self.include_usage:
            fields["usage"] = usage_of(usages) if usages else None
        return CompletionResponse(**fields)

    def _write(
        self, request_id: str, choice: int, text: str, logprobs: Sequence[TokenLogprob], finish_reason: str | None
    ) -> CompletionChoice:
        """What is new of a choice; the prompt before its first part, if it is echoed."""
        prompt = next(i for i, request in enumerate(self.requests) if request.request_id == request_id)
        index = prompt * self.requests[prompt].n + choice
        if index not in self._choices:
            before = self.requests[prompt].prompt_ids if self.echoes is None else ()
            self._choices[index] = _Choice(TextStream(self.tokenizer, before=before))
        state = self._choices[index]
        tokens: list[tuple[int, TokenLogprob | None]] = [(token.token_id, token) for token in logprobs]
        if self.echoes is not None and not state.begun:
            text = self.echoes[prompt] + text
            known = self._prompt_logprobs.get(request_id, ())
            if known:
                tokens = [*zip(self.requests[prompt].prompt_ids, known, strict=True), *tokens]
        state.begun = True
        view = None if self.logprobs is None else self._logprobs(tokens, state)
        return CompletionChoice(index=index, text=text, logprobs=view, finish_reason=finish_reason)

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprob | None]], state: _Choice) -> CompletionLogprobs:
        offsets = []
        for token_id, _ in tokens:
            offsets.append(state.length)  # of a part of a character: the character's
            state.length += len(state.text.push(token_id))
        return CompletionLogprobs(
            tokens=[self.tokenizer.token_text(token_id) for token_id, _ in tokens],
            token_logprobs=[None if token is None else _finite(token.logprob) for _, token in tokens],
            top_logprobs=[self._top(token) for _, token in tokens] if self.logprobs else None,
            text_offset=offsets,
        )

    def _top(self, token: TokenLogprob | None) -> dict[str, float] | None:
        """The likeliest first; of tokens that read the same the likeliest counts. The chosen one is always there."""
        if token is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(self.tokenizer.token_text(token_id), _finite(logprob))
        return top


def _frame(event: CompletionResponse) -> str:
    return data_frame(event.model_dump_json(exclude_unset=True))


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
