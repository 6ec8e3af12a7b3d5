"""How /v1/chat/completions writes its answers, whole and as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.api.choices import LOWEST_LOGPROB
from service.api.deps import Tokenizer
from service.api.generation import ChoiceText, EventStream, gather
from service.api.openai import Envelope, usage_of
from service.api.receipt import ReceiptWriter
from service.api.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    ChatTokenView,
    LikelyTokenView,
    ToolCallView,
)
from service.api.sse import DONE, data_frame
from service.api.tool_calls import OutputReader, joined
from service.engine.events import FinishedEvent, FinishReason, TokenEvent, TokenLogprob, Usage
from service.engine.sequence import GenerationRequest

_TOOL_CALLS = "tool_calls"


@dataclass(slots=True)
class ChatWriter:
    """`reader` makes what reads one choice's text: as words, as calls of tools, or as both."""

    answer: Envelope
    request: GenerationRequest
    tokenizer: Tokenizer
    reader: Callable[[], OutputReader]
    receipt: ReceiptWriter
    include_usage: bool
    _readers: dict[int, OutputReader] = field(default_factory=dict)  # by choice: of those that a stream has begun

    async def whole(self, events: EventStream) -> ChatResponse:
        (answer,) = await gather(events, [self.request])
        choices = [self._choice(choice) for choice in answer.choices]
        usage = usage_of([answer.finished.usage])
        response = ChatResponse(**self.answer.fields(), object="chat.completion", choices=choices, usage=usage)
        return self.receipt.whole(response, answer)

    async def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        finished: FinishedEvent | None = None
        async with events:
            async for event in events:
                if isinstance(event, FinishedEvent):
                    finished = event
                    continue
                assert isinstance(event, TokenEvent), "no chat asks for its prompt's log-probabilities"
                self.receipt.saw(event)
                for choice in self._parts(event):
                    yield _frame(self._event([choice]))
        assert finished is not None, "a stream ends with its terminal event"
        if self.include_usage or self.receipt.wanted:
            yield _frame(self.receipt.last(self._event([], finished.usage), finished))
        yield DONE

    def _choice(self, choice: ChoiceText) -> ChatChoice:
        reader = self.reader()
        read = joined([reader.push(choice.text), reader.finish()])
        called: dict[str, Any] = {}
        if read.tool_calls:  # which in a whole answer have no index
            called["tool_calls"] = [
                ToolCallView(id=call.id, type="function", function=call.function) for call in read.tool_calls
            ]
        content = read.content if called else read.content or ""
        message = ChatMessage(role="assistant", content=content, refusal=None, **called)
        return ChatChoice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=_reason(choice.finish_reason, called=reader.called),
        )

    def _parts(self, event: TokenEvent) -> list[ChatChunkChoice]:
        """What a stream says of an event: who speaks, before a choice's first part, and what is new, if anything is."""
        parts = []
        if event.choice not in self._readers:
            self._readers[event.choice] = self.reader()
            parts.append(self._part(event.choice, ChatDelta(role="assistant", content="")))
        reader = self._readers[event.choice]
        deltas = [reader.push(event.text)]
        if event.finish_reason is not None:
            deltas.append(reader.finish())
        delta, reason = joined(deltas), _reason(event.finish_reason, called=reader.called)
        logprobs = self._logprobs(event.logprobs)
        if reason or delta.model_fields_set or (logprobs and logprobs.content):
            parts.append(self._part(event.choice, delta, logprobs, reason))
        return parts

    def _part(
        self, choice: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish_reason: str | None = None
    ) -> ChatChunkChoice:
        return ChatChunkChoice(index=choice, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        fields = {**self.answer.fields(), "object": "chat.completion.chunk", "choices": choices}
        if self.include_usage:
            fields["usage"] = None if usage is None else usage_of([usage])
        return ChatChunk(**fields)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if self.request.params.logprobs is None:
            return None
        return ChatLogprobs(content=[self._token(token) for token in logprobs], refusal=None)

    def _token(self, token: TokenLogprob) -> ChatTokenView:
        top = [self._likely(token_id, logprob) for token_id, logprob in token.top]
        return ChatTokenView(**self._likely(token.token_id, token.logprob).model_dump(), top_logprobs=top)

    def _likely(self, token_id: int, logprob: float) -> LikelyTokenView:
        own = self.tokenizer.token_bytes(token_id)
        return LikelyTokenView(
            token=self.tokenizer.token_text(token_id),
            logprob=max(logprob, LOWEST_LOGPROB),
            bytes=None if own is None else list(own),
        )


def _frame(chunk: ChatChunk) -> str:
    return data_frame(chunk.model_dump_json(exclude_unset=True))


def _reason(reason: FinishReason | None, *, called: bool) -> str | None:
    """OpenAI's word for a choice that ended with calls; one that was cut off says so instead."""
    return _TOOL_CALLS if called and reason is FinishReason.STOP else reason
