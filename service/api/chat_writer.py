"""How /v1/chat/completions writes its answers, whole and as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from service.api.choices import LOWEST_LOGPROB
from service.api.deps import Tokenizer
from service.api.generation import ChoiceText, EventStream, gather
from service.api.openai import Envelope, usage_of
from service.api.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    ChatTokenView,
    FunctionCallView,
    LikelyTokenView,
    ToolCallView,
)
from service.api.sse import DONE, data_frame
from service.api.tools import ForcedCall, new_call_id
from service.engine.detokenizer import REPLACEMENT
from service.engine.events import FinishedEvent, FinishReason, TokenEvent, TokenLogprob, Usage
from service.engine.sequence import GenerationRequest

_TOOL_CALLS = "tool_calls"


@dataclass(slots=True)
class ChatWriter:
    """`call` is what the output is if a tool has to be called."""

    answer: Envelope
    request: GenerationRequest
    tokenizer: Tokenizer
    call: ForcedCall | None
    include_usage: bool
    _texts: dict[int, str] = field(default_factory=dict)  # by choice: what a stream has of those that have begun

    async def whole(self, events: EventStream) -> ChatResponse:
        (answer,) = await gather(events, [self.request])
        choices = [self._choice(choice) for choice in answer.choices]
        usage = usage_of([answer.finished.usage])
        return ChatResponse(**self.answer.fields(), object="chat.completion", choices=choices, usage=usage)

    async def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        usage: Usage | None = None
        async with events:
            async for event in events:
                if isinstance(event, FinishedEvent):
                    usage = event.usage
                    continue
                assert isinstance(event, TokenEvent), "no chat asks for its prompt's log-probabilities"
                for choice in self._parts(event):
                    yield self._frame([choice])
        if self.include_usage:
            yield self._frame([], usage)
        yield DONE

    def _choice(self, choice: ChoiceText) -> ChatChoice:
        calls = None if self.call is None else self.call.calls(choice.text)
        if calls is None:
            message = ChatMessage(role="assistant", content=choice.text, refusal=None)
        else:
            # In a whole answer a call has no index.
            bare = [ToolCallView(id=call.id, type="function", function=call.function) for call in calls]
            message = ChatMessage(role="assistant", content=None, refusal=None, tool_calls=bare)
        return ChatChoice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=_reason(choice.finish_reason, called=calls is not None),
        )

    def _parts(self, event: TokenEvent) -> list[ChatChunkChoice]:
        """What a stream says of an event: who speaks, before a choice's first part, and what is new, if anything is."""
        parts = []
        if event.choice not in self._texts:
            self._texts[event.choice] = ""
            parts.append(self._part(event.choice, self._opening()))
        self._texts[event.choice] += event.text
        ends = event.finish_reason is not None
        delta = self._delta(event, ends=ends)
        logprobs = self._logprobs(event.logprobs)
        if ends or delta.model_fields_set or (logprobs and logprobs.content):
            reason = _reason(event.finish_reason, called=self._called(delta))
            parts.append(self._part(event.choice, delta, logprobs, reason))
        return parts

    def _opening(self) -> ChatDelta:
        if self.call is None or self.call.name is None:
            return ChatDelta(role="assistant", content="")
        function = FunctionCallView(name=self.call.name, arguments="")
        call = ToolCallView(index=0, id=new_call_id(), type="function", function=function)
        return ChatDelta(role="assistant", content=None, tool_calls=[call])

    def _delta(self, event: TokenEvent, *, ends: bool) -> ChatDelta:
        if self.call is None:
            return ChatDelta(content=event.text) if event.text else ChatDelta()
        if self.call.name is not None:
            if not event.text:
                return ChatDelta()
            return ChatDelta(tool_calls=[ToolCallView(index=0, function=FunctionCallView(arguments=event.text))])
        if not ends:
            return ChatDelta()  # an array of calls can be read when it is whole
        text = self._texts[event.choice]
        calls = self.call.calls(text)
        return ChatDelta(content=text) if calls is None else ChatDelta(tool_calls=calls)

    def _called(self, delta: ChatDelta) -> bool:
        return self.call is not None and (self.call.name is not None or delta.tool_calls is not None)

    def _part(
        self, choice: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None, finish_reason: str | None = None
    ) -> ChatChunkChoice:
        return ChatChunkChoice(index=choice, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def _frame(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> str:
        fields = {**self.answer.fields(), "object": "chat.completion.chunk", "choices": choices}
        if self.include_usage:
            fields["usage"] = None if usage is None else usage_of([usage])
        chunk = ChatChunk(**fields)
        return data_frame(chunk.model_dump_json(exclude_unset=True))

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if self.request.params.logprobs is None:
            return None
        return ChatLogprobs(content=[self._token(token) for token in logprobs], refusal=None)

    def _token(self, token: TokenLogprob) -> ChatTokenView:
        top = [self._likely(token_id, logprob) for token_id, logprob in token.top]
        return ChatTokenView(**self._likely(token.token_id, token.logprob).model_dump(), top_logprobs=top)

    def _likely(self, token_id: int, logprob: float) -> LikelyTokenView:
        text = self.tokenizer.token_text(token_id)
        own = None if REPLACEMENT in text else list(text.encode())
        return LikelyTokenView(token=text, logprob=max(logprob, LOWEST_LOGPROB), bytes=own)


def _reason(reason: FinishReason | None, *, called: bool) -> str | None:
    """OpenAI's word for a choice that ended with calls; one that was cut off says so instead."""
    return _TOOL_CALLS if called and reason is FinishReason.STOP else reason
