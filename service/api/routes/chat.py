"""POST /v1/chat/completions, as OpenAI's and vLLM's clients know it."""

from __future__ import annotations

from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.chat import render_chat, template_of
from service.api.chat_writer import ChatWriter
from service.api.deps import CONTINUES, HAS_ROOM, ServerState, State, Tenant
from service.api.errors import ApiError
from service.api.field_names import FieldNames
from service.api.openai import envelope, generations, select
from service.api.receipt import ReceiptWriter
from service.api.respond import respond
from service.api.schemas.chat import ChatRequest, ChatResponse
from service.api.schemas.common import streaming_responses
from service.api.structure import grammar_of
from service.api.tools import ToolUse, tool_use
from service.engine.guide import Grammar

router = APIRouter(tags=["openai"])

_FIELDS = FieldNames("messages", "max_tokens")


@router.post(
    "/v1/chat/completions",
    dependencies=[CONTINUES, HAS_ROOM],
    response_model=ChatResponse,
    response_model_exclude_unset=True,
    responses=streaming_responses(),
)
async def chat_completions(
    body: ChatRequest, request: Request, response: Response, state: State, tenant: Tenant
) -> object:
    """Answers a conversation, with the selection that `model` names."""
    writer = await to_thread.run_sync(partial(_prepare, state, tenant, body))
    return await respond(request, response, state, [writer.request], writer, stream=bool(body.stream), fields=_FIELDS)


def _prepare(state: ServerState, tenant: str, body: ChatRequest) -> ChatWriter:
    """Reads the store, renders, tokenizes and compiles: not for the event loop."""
    selection = select(state, tenant, body)
    template = template_of(state, selection)
    use = tool_use(body, template or state.tokenizer.chat_template)
    prompt = render_chat(
        state,
        template,
        body.messages,
        tools=body.tools if use.shown else None,
        add_generation_prompt=not body.continue_final_message and body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
    )
    params = body.params(_max_new_tokens(state, body, len(prompt)), logprobs=body.wanted_logprobs)
    answer = envelope(state, "chatcmpl", body, selection)
    grammar = _grammar(state, body, use)
    (generation,) = generations(state, tenant, body, answer, selection, [tuple(prompt)], params, grammar)
    receipt = ReceiptWriter(state.base, generation, body.receipt)
    return ChatWriter(answer, generation, state.tokenizer, use.reader, receipt, body.wants_usage)


def _max_new_tokens(state: ServerState, body: ChatRequest, prompt: int) -> int:
    """As asked for; else the default, as far as the context allows. (The engine refuses a prompt that fills it.)"""
    asked = body.max_completion_tokens or body.max_tokens
    return asked or max(1, min(state.settings.default_max_tokens, state.engine.max_context - prompt))


def _grammar(state: ServerState, body: ChatRequest, use: ToolUse) -> Grammar | None:
    shape = grammar_of(state, body)
    if use.schema is None:
        return shape
    if shape is not None:
        raise ApiError(
            "invalid_request",
            "a forced tool call and a response format ask for different shapes of the output: give one of them",
            param="tool_choice",
        )
    return state.guidance.json_schema(use.schema, param="tools")
