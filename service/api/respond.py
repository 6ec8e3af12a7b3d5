"""How a route that generates answers: whole, or as a stream of events, and never to a client that has left."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from fastapi import Request, Response
from pydantic import BaseModel

from service.api.deps import ServerState
from service.api.disconnect import unless_disconnected
from service.api.field_names import NATIVE, FieldNames
from service.api.generation import EventStream
from service.api.observation import observe
from service.api.sse import EventSourceResponse
from service.engine.errors import EngineError
from service.engine.sequence import GenerationRequest


class AnswerWriter(Protocol):
    """Turns the events of a route's requests into what the route promises."""

    async def whole(self, events: EventStream) -> BaseModel:
        """The answer. Raises ApiError if a request fails."""
        ...

    def frames(self, events: EventStream) -> AsyncGenerator[str, None]:
        """Server-sent events, the last of them [DONE]. Raises ApiError if a request fails."""
        ...


async def respond(
    request: Request,
    response: Response,
    state: ServerState,
    generations: Sequence[GenerationRequest],
    writer: AnswerWriter,
    *,
    stream: bool,
    answer_id: str | None = None,
    fields: FieldNames = NATIVE,
) -> object:
    """Has the generations done and answers. A stream begins with the first event, so that what fails before it is an
    error response; a client that leaves cancels them.

    `answer_id` is the answer's id where that is not its only generation's; `fields` are what refusals call the fields.
    """
    headers: Mapping[str, str] = {"X-Adapter-Digest": generations[0].selection.header}
    generation_id = answer_id or generations[0].request_id
    observation = await observe(state, request.scope, generation_id, generations, stream=stream)
    try:
        events = EventStream(state.engine, generations, observation)
    except EngineError as error:
        raise fields.in_clients_words(error) from error
    try:
        if not stream:
            answer = await unless_disconnected(request.receive, writer.whole(events))
            response.headers.update(headers)
            return answer
        await unless_disconnected(request.receive, events.started())
    except BaseException:  # cancelled too, be it before what was awaited has begun
        events.close()
        raise
    return EventSourceResponse(writer.frames(events), headers=headers, on_close=events.close)
