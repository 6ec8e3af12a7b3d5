"""POST /v1/completions, as OpenAI's and vLLM's clients know it."""

from __future__ import annotations

from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.completion_writer import CompletionWriter
from service.api.deps import GENERATES, HAS_ROOM, ServerState, State, Tenant
from service.api.field_names import FieldNames
from service.api.generation import encode_prompt
from service.api.openai import envelope, generations, select
from service.api.receipt import ReceiptWriter
from service.api.respond import respond
from service.api.schemas.common import streaming_responses
from service.api.schemas.completions import CompletionRequest, CompletionResponse
from service.api.seq2seq import check_offered
from service.api.structure import grammar_of

router = APIRouter(tags=["openai"])

_DEFAULT_MAX_TOKENS = 16
_FIELDS = FieldNames("prompt", "max_tokens")


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    response_model_exclude_unset=True,
    responses=streaming_responses(),
    dependencies=[GENERATES, HAS_ROOM],
)
async def completions(
    body: CompletionRequest, request: Request, response: Response, state: State, tenant: Tenant
) -> object:
    """Continues prompts, with the selection that `model` names."""
    writer = await to_thread.run_sync(partial(_prepare, state, tenant, body))
    return await respond(
        request,
        response,
        state,
        writer.requests,
        writer,
        stream=bool(body.stream),
        answer_id=writer.answer.id,
        fields=_FIELDS,
    )


def _prepare(state: ServerState, tenant: str, body: CompletionRequest) -> CompletionWriter:
    """Reads the store, tokenizes and compiles: not for the event loop."""
    check_offered(state, body)
    selection = select(state, tenant, body)
    answer = envelope(state, "cmpl", body, selection)
    prompts = [encode_prompt(state.tokenizer, prompt) for prompt in body.prompts]
    params = body.params(
        _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    requests = generations(state, tenant, body, answer, selection, prompts, params, grammar_of(state, body))
    return CompletionWriter(
        answer,
        requests,
        state.tokenizer,
        body.logprobs,
        [_text_of(state, prompt) for prompt in body.prompts] if body.echo else None,
        ReceiptWriter(state.base, requests[0], body.receipt),
        body.wants_usage,
    )


def _text_of(state: ServerState, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else state.tokenizer.decode(prompt)
